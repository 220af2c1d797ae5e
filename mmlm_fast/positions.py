"""Positions of pictures and videos among text, without loops over tokens and without waiting for a device."""

import torch
from torch import Tensor


def mrope_positions(
    mm_token_type_ids: Tensor,
    *,
    image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    attention_mask: Tensor | None = None,
    second_per_grid_ts: Tensor | None = None,
    spatial_merge_size: int = 2,
    tokens_per_second: float | None = None,
    frames_apart: bool = False,
    check: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the (time, height, width) positions of M-RoPE: what ``get_rope_index`` of Qwen-VL computes.

    Text advances all three by one a token. A picture's tokens start where the text before it ended and spread over its
    grid; the text behind it goes on after the larger of its height and width.

    Args:
        mm_token_type_ids: Integers ``[B, S]``: 0 text, 1 picture, 2 video.
        image_grid_thw, video_grid_thw: ``[items, 3]``: frames, height and width in patches, in the order of the items
            over the whole batch. On any device; what is not on that of the ids is copied there.
        attention_mask: ``[B, S]``, 0 where padding; those positions are 0.
        second_per_grid_ts: ``[videos]`` seconds between frames; 1 by default.
        spatial_merge_size: Patches joined to a token along each side.
        tokens_per_second: Positions a second of video; None: one a frame.
        frames_apart: Each frame of a video is an item of its own, with text between, as in Qwen3-VL.
        check: Whether to look at once that tokens and grids agree; by default at once on a CPU, by a device-side
            assertion on CUDA.

    Returns:
        Positions ``[3, B, S]`` int64, and ``[B, 1]`` int64 of largest position + 1 − number of tokens, by which
        generation goes on.

    Raises:
        ValueError: for shapes that do not fit, or if tokens and grids do not agree.

    Source: Wang et al. 2024 (Qwen2-VL), section 2.1; transformers' Qwen2_5_VLModel.get_rope_index and Qwen3VLModel's.
    """
    if mm_token_type_ids.dim() != 2:
        raise ValueError(f"mm_token_type_ids must be [B, S], got {tuple(mm_token_type_ids.shape)}")
    if attention_mask is not None and attention_mask.shape != mm_token_type_ids.shape:
        raise ValueError(f"attention_mask must be {tuple(mm_token_type_ids.shape)}, got {tuple(attention_mask.shape)}")
    batch, length = mm_token_type_ids.shape
    device = mm_token_type_ids.device
    kinds = mm_token_type_ids.long()
    valid = torch.ones_like(kinds, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if batch == 0 or length == 0:
        return kinds.new_zeros(3, batch, length), kinds.new_zeros(batch, 1)
    place = valid.long().cumsum(1) - 1  # among the tokens of the row that count

    advance = (valid & (kinds == 0)).long()  # of the position, booked at the token
    time, height, width = (torch.zeros_like(kinds) for _ in range(3))
    start = torch.arange(length, device=device).expand(batch, length)  # where the token's item begins
    problems = [((kinds >= 0) & (kinds <= 2)).all()]
    for kind, grids in ((1, image_grid_thw), (2, video_grid_thw)):
        here = valid & (kinds == kind)
        if grids is None or grids.shape[0] == 0:
            problems.append(~here.any())
            continue
        if grids.dim() != 2 or grids.shape[1] != 3:
            raise ValueError(f"grids must be [items, 3], got {tuple(grids.shape)}")
        t, h, w = grids.to(device, torch.int64, non_blocking=True).unbind(1)
        h, w = h // spatial_merge_size, w // spatial_merge_size
        interval = torch.ones_like(h, dtype=torch.float32)
        if kind == 2 and tokens_per_second is not None:
            interval = interval * tokens_per_second
            if second_per_grid_ts is not None:
                interval = interval * second_per_grid_ts.to(device, torch.float32, non_blocking=True)
        last = (t * h * w).cumsum(0)
        rank = here.flatten().long().cumsum(0) - 1  # among all tokens of this kind
        problems.append(rank[-1] + 1 == last[-1])
        item = torch.searchsorted(last, rank.clamp(min=0), right=True).clamp(max=last.shape[0] - 1)
        offset = (rank - (last - t * h * w)[item]).view(batch, length)
        item = item.view(batch, length)
        rows, columns = h[item], w[item]
        frame_size = rows * columns
        frame = offset // frame_size
        if frames_apart:
            offset, frame = offset % frame_size, torch.zeros_like(frame)
        first = (valid.long() * here.long() * (offset == 0)).bool()
        begins = torch.where(first, start, 0).cummax(1).values
        start = torch.where(here, begins, start)
        # The tokens of an item follow each other.
        problems.append(torch.where(here, place - place.gather(1, begins) == offset, True).all())
        advance = advance + torch.where(first, torch.maximum(rows, columns), 0)
        time = torch.where(here, (frame * interval[item]).long(), time)
        height = torch.where(here, offset // columns % rows, height)
        width = torch.where(here, offset % columns, width)
    _report(torch.stack(problems).all(), check)
    before = advance.cumsum(1) - advance
    base = before.gather(1, start)
    positions = torch.where(valid, base + torch.stack([time, height, width]), 0)
    largest = torch.where(valid, positions.amax(0), -1).amax(1, keepdim=True)
    return positions, largest + 1 - valid.sum(1, keepdim=True)


def _report(fine: Tensor, check: bool | None) -> None:
    message = (
        "mm_token_type_ids and grids must agree: 0, 1 or 2, as many tokens of pictures and videos as the grids have "
        "after merging, those of an item one after the other"
    )
    if check is None:
        check = fine.device.type == "cpu" and not torch.compiler.is_compiling()
    if not check:
        torch._assert_async(fine, message)
    elif not fine:
        raise ValueError(f"{message}; got others")


def vision_positions(grid_thw: Tensor, spatial_merge_size: int = 1, num_tokens: int | None = None) -> Tensor:
    """Compute the (height, width) of every patch of packed pictures and videos, for a tower's 2-D rotary embedding.

    Args:
        grid_thw: ``[items, 3]``: frames, height and width in patches.
        spatial_merge_size: m: the m² patches that a merger joins follow each other; 1: row by row.
        num_tokens: The number of patches, Σ frames·height·width; needed where `grid_thw` is on CUDA, since reading it
            would wait for the device.

    Returns:
        ``[2, 1, patches]`` int64: axes in front, as `ops.rope_tables` takes them.

    Raises:
        ValueError: for another shape, or a CUDA tensor without `num_tokens`.

    Source: transformers' vision_utils.get_vision_position_ids (which has the axes last).
    """
    if grid_thw.dim() != 2 or grid_thw.shape[1] != 3:
        raise ValueError(f"grid_thw must be [items, 3], got {tuple(grid_thw.shape)}")
    if num_tokens is None:
        if grid_thw.is_cuda:
            raise ValueError("num_tokens must be given where grid_thw is on CUDA: reading it would wait for the device")
        num_tokens = int(grid_thw.prod(1).sum())
    t, h, w = grid_thw.long().unbind(1)
    last = (t * h * w).cumsum(0)
    index = torch.arange(num_tokens, device=grid_thw.device)
    if grid_thw.shape[0] == 0:
        return index.new_zeros(2, 1, num_tokens)
    item = torch.searchsorted(last, index, right=True).clamp(max=last.shape[0] - 1)
    m, columns = spatial_merge_size, w[item]
    offset = (index - (last - t * h * w)[item]) % (h[item] * columns)
    block, inside = offset // m**2, offset % m**2
    y = block // (columns // m) * m + inside // m
    x = block % (columns // m) * m + inside % m
    return torch.stack([y, x])[:, None]
