"""Methods of transformers' models that loop over tokens, wait for the device or copy twice, known by fingerprint."""

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmlm_fast.hf import proof
from mmlm_fast.hf.changing import change, is_eager, is_undone, layers_of, original_class
from mmlm_fast.hf.fingerprint import fingerprint
from mmlm_fast.hf.kinds import merging
from mmlm_fast.hf.kinds.norms import taken, twin
from mmlm_fast.hf.site import ALREADY, Site
from mmlm_fast.masks import require
from mmlm_fast.ops.merge_embeddings import scatter_features
from mmlm_fast.ops.paths import using_reference
from mmlm_fast.positions import mrope_positions


@dataclass(frozen=True)
class Method:
    """One method.

    Args:
        name: Of it.
        kind: In words.
        ours: ``ours(self, **arguments)``; None where the original is to compute it.
        prove: ``prove(module, original, ours)`` returns the largest error found; raises `RefusedError`.
    """

    name: str
    kind: str
    ours: Callable[..., Any]
    prove: Callable[[Any, Callable[..., Any], Callable[..., Any]], float]


# ---- positions of M-RoPE ---------------------------------------------------------------------------------------------


def _positions(
    module: Any,
    input_ids: Any = None,
    mm_token_type_ids: Any = None,
    image_grid_thw: Any = None,
    video_grid_thw: Any = None,
    second_per_grid_ts: Any = None,
    attention_mask: Any = None,
    *,
    frames_apart: bool = False,
    has_speed: bool = False,
    **kwargs: Any,
) -> Any:
    if not isinstance(input_ids, Tensor) or not isinstance(mm_token_type_ids, Tensor) or input_ids.numel() == 0:
        return None
    vision = module.config.vision_config
    if not has_speed:
        second_per_grid_ts = None
    if second_per_grid_ts is not None and not isinstance(second_per_grid_ts, Tensor):
        second_per_grid_ts = torch.tensor(second_per_grid_ts, dtype=torch.float32)
    if frames_apart and video_grid_thw is not None:
        video_grid_thw = torch.repeat_interleave(video_grid_thw, video_grid_thw[:, 0], dim=0)
        video_grid_thw[:, 0] = 1
    try:
        positions, deltas = mrope_positions(
            mm_token_type_ids,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            attention_mask=attention_mask,
            second_per_grid_ts=second_per_grid_ts,
            spatial_merge_size=vision.spatial_merge_size,
            tokens_per_second=vision.tokens_per_second if has_speed else None,
        )
    except ValueError:  # the original has its own way with it
        return None
    return positions.to(input_ids.dtype), deltas


def _prove_positions(module: Any, original: Callable[..., Any], ours: Callable[..., Any]) -> float:
    """Random batches of pictures and videos among text, padded on either side: equal, not close."""
    has_frames_apart = ours.keywords.get("frames_apart", False)  # type: ignore[attr-defined]
    merge = module.config.vision_config.spatial_merge_size
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator, device="cpu"))

    for trial in range(6):
        rows, pictures, videos, seconds = [], [], [], []
        for _ in range(2):
            row = [0] * draw(1, 3)
            for _ in range(draw(1, 2)):
                frames, height, width = draw(1, 3), draw(1, 3), draw(1, 3)
                if trial % 2:
                    pictures.append([1, merge * height, merge * width])
                    row += [1] * (height * width)
                else:
                    videos.append([frames, merge * height, merge * width])
                    seconds.append(float(draw(1, 2)))
                    between = [0] * has_frames_apart
                    row += ([2] * (height * width) + between) * frames
                row += [0] * draw(1, 3)
            rows.append(row)
        length = max(map(len, rows))
        padding = [[0] * (length - len(row)) for row in rows]
        kinds, valid = [], []
        for row, none in zip(rows, padding, strict=True):
            kinds.append(none + row if trial < 3 else row + none)
            ones = [1] * len(row)
            valid.append(none + ones if trial < 3 else ones + none)
        arguments: dict[str, Any] = dict(
            input_ids=torch.zeros(2, length, dtype=torch.int64, device="cpu"),
            mm_token_type_ids=torch.tensor(kinds, device="cpu"),
            image_grid_thw=torch.tensor(pictures, device="cpu") if pictures else None,
            video_grid_thw=torch.tensor(videos, device="cpu") if videos else None,
            attention_mask=torch.tensor(valid, device="cpu"),
        )
        if "second_per_grid_ts" in inspect.signature(original).parameters and videos and trial % 4 == 0:
            arguments["second_per_grid_ts"] = torch.tensor(seconds, device="cpu")
        expected = original(module, **arguments)
        found = taken(ours(module, **arguments))
        for what, a, b in zip(("positions", "deltas"), found, expected, strict=True):
            if a.dtype != b.dtype or not torch.equal(a, b):
                raise proof.RefusedError(f"{what} differ from the original's")
    return 0.0


def _positions_of(**options: bool) -> Method:
    return Method("get_rope_index", "M-RoPE positions", functools.partial(_positions, **options), _prove_positions)


# ---- features added to the first layers ------------------------------------------------------------------------------


def _deepstack(module: Any, hidden_states: Any = None, visual_pos_masks: Any = None, visual_embeds: Any = None) -> Any:
    tensors = hidden_states, visual_pos_masks, visual_embeds
    if using_reference() or any(type(t) not in (Tensor, nn.Parameter) for t in tensors):
        return None
    mask, features = visual_pos_masks.to(hidden_states.device), visual_embeds.to(hidden_states)
    if mask.dtype != torch.bool or mask.shape != hidden_states.shape[:-1] or hidden_states.numel() == 0:
        return None
    if features.dim() != 2 or features.shape[1] != hidden_states.shape[-1]:
        return None
    if hidden_states.device.type == "cpu" and int(mask.sum()) != features.shape[0]:
        return None  # the original's error, or its broadcast of one row
    return scatter_features(hidden_states, mask.int(), {1: features}, add=True)


def _prove_deepstack(module: Any, original: Callable[..., Any], ours: Callable[..., Any]) -> float:
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    dtype = torch.float32 if weight is None else weight.dtype
    like = torch.empty(0, dtype=dtype, device="cpu" if weight is None else weight.device)
    mask = torch.zeros(2, 8, dtype=torch.bool, device=like.device)
    mask[0, 1:5] = mask[1, 2:4] = True

    def exact(x: Tensor, features: Tensor) -> Tensor:
        place = (mask.flatten().cumsum(0) - 1).clamp(min=0).view(mask.shape)
        return x + torch.where(mask[..., None], features[place], 0)

    tensors = [proof.random(2, 8, 32, like=like), proof.random(6, 32, like=like, seed=1)]
    return proof.prove(
        lambda x, f: original(module, x, mask, f), lambda x, f: taken(ours(module, x, mask, f)), exact, tensors
    )


# ---- pixel shuffle ---------------------------------------------------------------------------------------------------


SHUFFLE = "pixel shuffle"


def _shuffled(module: Any, vision_features: Any = None, scale_factor: float = 0.5) -> Any:
    if not isinstance(vision_features, Tensor) or vision_features.dim() != 4 or scale_factor <= 0:
        return None
    batch, width, height, channels = vision_features.shape
    r = round(1 / scale_factor)
    if r < 1 or 1 / r != scale_factor or width % r or height % r:
        return None
    cut = vision_features.reshape(batch, width // r, r, height // r, r, channels).permute(0, 1, 3, 2, 4, 5)
    return cut.reshape(batch, width // r, height // r, r * r * channels)


def _shuffled_tokens(module: Any, x: Any = None, scale_factor: int = 2) -> Any:
    if not isinstance(x, Tensor) or x.dim() != 3 or not isinstance(scale_factor, int) or scale_factor < 1:
        return None
    batch, length, channels = x.shape
    side, r = int(length**0.5), scale_factor
    if side * side != length or side % r:
        return None
    cut = x.reshape(batch, side // r, r, side // r, r, channels).permute(0, 1, 3, 2, 4, 5)
    return cut.reshape(batch, length // r**2, r * r * channels)


def _prove_shuffle(module: Any, original: Callable[..., Any], ours: Callable[..., Any]) -> float:
    """One copy in place of two: the same numbers."""
    x = torch.arange(2 * 16 * 3, device="cpu", dtype=torch.float32)
    x = x.view(2, 16, 3) if ours is _shuffled_tokens else x.view(2, 2, 8, 3)
    if not torch.equal(taken(ours(module, x)), original(module, x)):
        raise proof.RefusedError("the result differs from the original's")
    return 0.0


# ---- patches merged, a picture at a time -----------------------------------------------------------------------------


MERGER = "patch merger"


def _merged_patches(module: Any, image_features: Any = None, image_sizes: Any = None) -> Any:
    """Sizes are read once, where the original waits for each number of each picture; a copy in place of an unfold."""
    if not isinstance(image_features, Tensor) or image_features.dim() != 2:
        return None
    sizes = image_sizes.tolist() if isinstance(image_sizes, Tensor) else image_sizes
    grids = [[int(n) // module.patch_size for n in size] for size in sizes]
    if sum(h * w for h, w in grids) != image_features.shape[0]:
        return None
    m, size, merged = module.spatial_merge_size, image_features.shape[1], []
    for tokens, (h, w) in zip(image_features.split([h * w for h, w in grids]), grids, strict=True):
        if h < m or w < m:
            return None
        whole = tokens.view(h, w, size)[: h // m * m, : w // m * m]
        cut = whole.unflatten(0, (h // m, m)).unflatten(2, (w // m, m))
        merged.append(cut.permute(0, 2, 4, 1, 3).reshape(-1, size * m * m))
    return module.merging_layer(merged[0] if len(merged) == 1 else torch.cat(merged))


def _prove_merged_patches(module: Any, original: Callable[..., Any], ours: Callable[..., Any]) -> float:
    """The patches that go into its layer, of pictures of two sizes, one of them with a rest: equal."""
    made = twin(module, original_class(module), {"merging_layer": nn.Identity()})
    side = module.patch_size * module.spatial_merge_size
    sizes = [[2 * side, 3 * side + module.patch_size], [side, side]]
    num = sum((h // module.patch_size) * (w // module.patch_size) for h, w in sizes)
    x = torch.arange(num * 3, dtype=torch.float32, device="cpu").view(num, 3)
    for given in (sizes, torch.tensor(sizes, device="cpu")):
        if not torch.equal(taken(ours(made, x, given)), original(made, x, given)):
            raise proof.RefusedError("the patches are in another order than the original's")
    return 0.0


# ---- placeholders, in a method of its own ----------------------------------------------------------------------------


def _merged_inputs(
    module: Any, input_ids: Any = None, inputs_embeds: Any = None, image_hidden_states: Any = None
) -> Any:
    if any(type(t) is not Tensor for t in (input_ids, inputs_embeds, image_hidden_states)):
        return None
    mask = (input_ids == module.config.image_token_id)[..., None].to(inputs_embeds.device)
    features = image_hidden_states.to(inputs_embeds.device, inputs_embeds.dtype)
    fits = mask.sum() * inputs_embeds.shape[-1] == features.numel()
    if fits.is_cuda:
        require(fits, "image features and image tokens do not match")
    elif not fits:
        return None  # the original's error
    return merging.scattered(inputs_embeds, mask, features)


def _prove_merged_inputs(module: Any, original: Callable[..., Any], ours: Callable[..., Any]) -> float:
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    ids = torch.zeros(2, 8, dtype=torch.int64, device="cpu") + module.config.image_token_id + 1
    ids[0, 1:5] = ids[1, 2:6] = module.config.image_token_id
    x = torch.arange(2 * 8 * 4, dtype=torch.float32, device="cpu").view(2, 8, 4)
    features = -torch.arange(2 * 4 * 4, dtype=torch.float32, device="cpu").view(2, 4, 4)
    if not torch.equal(taken(ours(module, ids, x, features)), original(module, ids, x, features)):
        raise proof.RefusedError("the result differs from the original's")
    return merging.prove(weight)


# By the fingerprint of the method; one of the classes that have it.
METHODS = {
    "d020d93e784ed8b4": _positions_of(),  # Qwen2VLModel
    "a3ec5eb83f1fbce4": _positions_of(),  # Qwen2VLModel of 5.17
    "bb759b30a2326311": _positions_of(has_speed=True),  # Qwen2_5_VLModel
    "729d6aee2e1f863d": _positions_of(frames_apart=True),  # Qwen3VLModel
    "b00c985f5545aea8": _positions_of(frames_apart=True),  # Qwen3VLModel of 5.17
    "4802fb219c9756e2": Method("_deepstack_process", "deepstack", _deepstack, _prove_deepstack),  # Qwen3VLTextModel
    "00750cec2bc2f4e5": Method("pixel_shuffle", SHUFFLE, _shuffled, _prove_shuffle),  # InternVLModel
    "5c9d1c63db245c78": Method("pixel_shuffle", SHUFFLE, _shuffled_tokens, _prove_shuffle),  # Idefics3Connector
    "6ff76190847e89c7": Method(
        "forward", "patch merger", _merged_patches, _prove_merged_patches
    ),  # Mistral3PatchMerger
    "8c45ea83fdc508b1": Method("inputs_merger", merging.KIND, _merged_inputs, _prove_merged_inputs),  # Idefics3Model
}
NAMES = {method.name: method.kind for method in METHODS.values()}


def find(model: nn.Module) -> Iterator[Site]:
    """Methods whose fingerprint is known, and those of the same name whose is not."""
    for path, module in model.named_modules():
        cls = original_class(module)
        if cls.__module__.startswith("torch."):
            continue
        for name, kind in NAMES.items():
            if not callable(getattr(cls, name, None)):
                continue
            site = Site(kind, path, type(module).__name__, module)
            method = METHODS.get(fingerprint(cls, name) or "-")
            if name == "forward" and (method is None or method.name != name):
                continue
            if method is None or method.name != name:
                site.reason = f"its {name} is none of those known"
            elif any(made is methods and options[0].name == name for made, options in layers_of(type(module))):
                site.reason = ALREADY
            elif name in module.__dict__:
                site.reason = f"it has a {name} of its own"
            else:
                site.alike = (cls, method)
                site.prove = functools.partial(method.prove, module, getattr(cls, name), method.ours)
                site.apply = functools.partial(_apply, module, method)
            yield site


def _apply(module: nn.Module, method: Method) -> Callable[[], None]:
    return change(module, methods, method)


def methods(cls: Any, method: Method) -> dict[str, Any]:
    """The method as ours computes it; compiled code has the original's."""
    original = getattr(cls, method.name)
    names = tuple(inspect.signature(original).parameters)[1:]

    @functools.wraps(original)
    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_eager() and getattr(cls, method.name) is original and not is_undone(self):
            found = method.ours(self, **dict(zip(names, args, strict=False)), **kwargs)
            if found is not None:
                return found
        return getattr(cls, method.name)(self, *args, **kwargs)

    return {method.name: changed}
