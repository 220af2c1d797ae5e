"""Token embeddings with the features of pictures and sounds in the place of their placeholder tokens."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmlm_fast.ops._derivatives import differentiable, recorded, unseen
from mmlm_fast.ops._native import core, number_type, rows
from mmlm_fast.ops._op import Op
from mmlm_fast.ops._registry import check_floating, looked_at, plain_float, register_op
from mmlm_fast.ops.paths import KERNEL, REFERENCE, is_transformed

OP = Op("merge_embeddings", smallest=2**18, functions=("merge_embeddings", "scatter_features"))
MAX_MODALITIES = 16  # of the native core and the kernel

# What the op does with a row of the base: look it up by token, keep it where there is no feature, add to it.
EMBED, REPLACE, ADD = "embed", "replace", "add"


def merge_embeddings_ref(
    input_ids: Tensor,
    table: Tensor,
    features: Mapping[int, Tensor],
    scale: float = 1.0,
    padding_idx: int | None = None,
) -> Tensor:
    """``masked_scatter`` into the embeddings, one modality after the other, as in transformers."""
    placeholder = torch.zeros_like(input_ids, dtype=torch.bool)
    for token_id in features:
        placeholder = placeholder | (input_ids == token_id)
    embeds = F.embedding(torch.where(placeholder, 0, input_ids), table, padding_idx)
    return scatter_features_ref(embeds if scale == 1 else embeds * scale, input_ids, features)


def scatter_features_ref(
    inputs_embeds: Tensor, input_ids: Tensor, features: Mapping[int, Tensor], add: bool = False
) -> Tensor:
    out = inputs_embeds
    for token_id, rows_ in features.items():
        mask = (input_ids == token_id)[..., None]
        placed = torch.zeros_like(out).masked_scatter(mask, rows_) if add else out.masked_scatter(mask, rows_)
        out = out + placed if add else placed
    return out


def gather_ref(
    source: Tensor, base: Tensor, features: Sequence[Tensor], mode: str, scale: float = 1.0, unused: int = -1
) -> Tensor:
    """What both ops are in terms of sources ``[tokens]``; `unused`: a row of the base that gets no gradient, or −1.

    For derivatives: of ``masked_scatter`` torch has no batching rule, nor forward mode over its backward pass.
    """
    size, is_feature = base.shape[1], (source < 0)[:, None]
    rows_ = torch.cat([*(f.reshape(-1, size) for f in features), base.new_zeros(1, size)])
    placed = rows_[(-1 - source).clamp(min=0)]
    if mode == ADD:
        return base + torch.where(is_feature, placed, 0)
    if mode == EMBED:
        base = F.embedding(source.clamp(min=0), base, unused if unused >= 0 else None) * scale
    return torch.where(is_feature, placed, base)


def merge_embeddings(
    input_ids: Tensor,
    table: Tensor,
    features: Mapping[int, Tensor],
    *,
    scale: float = 1.0,
    padding_idx: int | None = None,
    check: bool | None = None,
) -> Tensor:
    """Compute ``scale·table[id]``, or the next feature where the id is a placeholder.

    Args:
        input_ids: Integers, any shape ``[*batch, S]``. A placeholder need not be a row of the table.
        table: ``[V, H]``: the embedding's weight.
        features: Of each modality, by its placeholder token: ``[..., H]`` in the dtype of the table; its rows go to the
            placeholders in their order over the whole batch.
        scale: Of the text embeddings alone (√H in Gemma).
        padding_idx: A row of the table that gets no gradient, as in ``nn.Embedding``.
        check: Whether to look at once that placeholders and rows agree in number and that ids are rows of the table;
            on CUDA that waits for the device. By default it is looked at once on a CPU and by a device-side assertion
            on CUDA: no wait, and the error comes at the next synchronisation. Never silent.

    Returns:
        ``[*batch, S, H]`` in the dtype of the table. Beside it, memory of O(S) integers; these are what is kept for
        the backward pass.

    Raises:
        ValueError: for shapes, dtypes or devices that do not go together, counts that differ, or ids out of range.

    Source: the merge of LLaVA (Liu et al. 2023), ``masked_scatter`` in 92 model folders of transformers.
    """
    check_floating("table", table)
    if table.dim() != 2:
        raise ValueError(f"table must be [V, H], got {tuple(table.shape)}")
    _check_features(input_ids, table, features)
    if padding_idx is not None and not 0 <= padding_idx < table.shape[0]:
        raise ValueError(f"padding_idx must be in [0, {table.shape[0]}), got {padding_idx}")
    path = OP.path(table, input_ids.numel() * table.shape[1])
    source = _sources(input_ids, features, table.shape[0], check, path)
    # One row of the table for its gradient to leave out; -1 where every row may mean a token.
    free = [token_id for token_id in features if 0 <= token_id < table.shape[0]]
    unused = padding_idx if padding_idx is not None else free[0] if free else -1
    if is_transformed():
        out = gather_ref(source, table, list(features.values()), EMBED, scale, unused)
    elif path == REFERENCE:
        return merge_embeddings_ref(input_ids, table, features, scale, padding_idx)
    else:
        out = recorded(_MergeEmbeddings, EMBED, plain_float(scale), unused, False, source, table, *features.values())
    return out.view(*input_ids.shape, table.shape[1])


def scatter_features(
    inputs_embeds: Tensor,
    input_ids: Tensor,
    features: Mapping[int, Tensor],
    *,
    add: bool = False,
    spare: bool = False,
    check: bool | None = None,
) -> Tensor:
    """Put features in the place of placeholders' embeddings, or add them (the deepstack of Qwen3-VL).

    Args:
        inputs_embeds: ``[*batch, S, H]``.
        input_ids: ``[*batch, S]``.
        features, check: As in `merge_embeddings`.
        add: Add the features instead.
        spare: Whether there may be more rows than placeholders, as in ``masked_scatter``: the last ones are not used.

    Returns:
        Like `inputs_embeds`, which is not modified.

    Raises:
        ValueError: as `merge_embeddings`.

    Source: as `merge_embeddings`; ``_deepstack_process`` of transformers' Qwen3-VL.
    """
    check_floating("inputs_embeds", inputs_embeds)
    if not isinstance(input_ids, Tensor) or inputs_embeds.shape[:-1] != input_ids.shape:
        got = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ValueError(f"input_ids must be {tuple(inputs_embeds.shape[:-1])}, got {got}")
    _check_features(input_ids, inputs_embeds, features)
    path = OP.path(inputs_embeds)
    source = _sources(input_ids, features, None, check, path, spare)
    base, mode = inputs_embeds.reshape(-1, inputs_embeds.shape[-1]), ADD if add else REPLACE
    if is_transformed():
        out = gather_ref(source, base, list(features.values()), mode)
    elif path == REFERENCE:
        return scatter_features_ref(inputs_embeds, input_ids, features, add)
    else:
        out = recorded(_MergeEmbeddings, mode, 1.0, -1, spare, source, base, *features.values())
    return out.view(inputs_embeds.shape)


def _check_features(input_ids: Tensor, base: Tensor, features: Mapping[int, Tensor]) -> None:
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        got = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ValueError(f"input_ids must be int64 or int32, got {got}")
    if input_ids.device != base.device:
        raise ValueError(f"input_ids must be on {base.device}, got {input_ids.device}")
    if not isinstance(features, Mapping):
        raise ValueError(f"features must map placeholder tokens to tensors, got {type(features).__name__}")
    if len(features) > MAX_MODALITIES:
        raise ValueError(f"features must be at most {MAX_MODALITIES}, got {len(features)}")
    for token_id, feature in features.items():
        if not isinstance(token_id, int):
            raise ValueError(f"placeholder tokens must be int, got {type(token_id).__name__}")
        check_floating(f"features[{token_id}]", feature)
        if feature.dim() < 1 or feature.shape[-1] != base.shape[-1]:
            raise ValueError(f"features[{token_id}] must be [..., {base.shape[-1]}], got {tuple(feature.shape)}")
        if feature.dtype != base.dtype or feature.device != base.device:
            raise ValueError(
                f"features[{token_id}] must be {base.dtype} on {base.device}, got {feature.dtype} on {feature.device}"
            )


def _num_rows(feature: Tensor) -> int:
    count = 1
    for size in feature.shape[:-1]:
        count = count * size
    return count


def _sources(
    input_ids: Tensor,
    features: Mapping[int, Tensor],
    num_ids: int | None,
    check: bool | None,
    path: str,
    spare: bool = False,
) -> Tensor:
    """``[tokens]`` int64: the row of the table, or −1 − the row of all features one after the other."""
    ids, tokens, counts = input_ids.reshape(-1), list(features), [_num_rows(f) for f in features.values()]
    rows = -1 if num_ids is None else num_ids  # of the table
    if path == KERNEL and tokens:
        source, all_wrong = _find(ids, tokens, counts, rows)
        wrong = all_wrong.unbind()
    else:
        source, wrong = _found(ids, tokens, counts, rows)
    messages = [
        f"features of token {token}: {count} rows for {{}} placeholders in input_ids"
        for token, count in zip(tokens, counts, strict=True)
    ]
    if num_ids is not None:
        messages.append(f"input_ids must be in [0, {num_ids}) or placeholders, got {{}} outside")
    if check is None:
        check = input_ids.device.type == "cpu" and not torch.compiler.is_compiling()
    for count, message, far in zip([*counts, 0], messages, wrong, strict=False):
        fine = far <= 0 if spare else far == 0
        if not check:
            torch._assert_async(fine, message.format("another number of"))
        elif not (well := looked_at(fine)).all():
            raise ValueError(message.format(count + int(looked_at(far)[~well][0])))
    return source


def _found(ids: Tensor, tokens: list[int], counts: list[int], num_ids: int) -> tuple[Tensor, list[Tensor]]:
    """`_sources`, and by how many there are more placeholders than rows of each modality, and ids that are no row.

    Text has row 0 where there is no table: `num_ids` of −1.
    """
    source, first, wrong = ids.long(), 0, []
    text = torch.ones_like(ids, dtype=torch.bool)
    for token, count in zip(tokens, counts, strict=True):
        here = ids == token
        rank = here.cumsum(0)
        wrong.append((rank[-1] if ids.shape[0] else rank.new_zeros(())) - count)
        # Never out of range, also where the counts differ and the assertion has not come yet.
        source = torch.where(here, -first - rank.clamp(min=1, max=max(count, 1)), source)
        text = text & ~here
        first = first + count
    if num_ids < 0:
        return torch.where(text, 0, source), wrong
    bad = text & ((ids < 0) | (ids >= num_ids))
    return torch.where(bad, 0, source), [*wrong, bad.sum()]


def _portable_sources(ids: Tensor, tokens: list[int], counts: list[int], num_ids: int) -> tuple[Tensor, Tensor]:
    source, wrong = _found(ids, tokens, counts, num_ids)
    return source, torch.stack(wrong if num_ids >= 0 else [*wrong, source.new_zeros(())])


_find = register_op(
    "merge_embeddings_sources",
    portable=_portable_sources,
    fake=lambda ids, tokens, counts, num_ids: (
        ids.new_empty(ids.shape[0], dtype=torch.int64), ids.new_empty(len(tokens) + 1, dtype=torch.int64)
    ),
)  # fmt: skip


def flat_features(features: Sequence[Tensor]) -> list[Tensor]:
    """``[rows, H]`` each, dense."""
    flat = [f.reshape(-1, f.shape[-1]) if f.numel() else f.new_empty(0, f.shape[-1]) for f in features]
    return [f if f.stride(-1) == 1 else f.contiguous() for f in flat]


def _address(features: list[Tensor]) -> list[tuple[int, int, int]]:
    return [(f.data_ptr(), f.stride(0), f.shape[0]) for f in features]


def _native_fwd(source: Tensor, base: Tensor, features: list[Tensor], mode: str, scale: float) -> Tensor:
    flat, base = flat_features(features), base if base.stride(-1) == 1 else base.contiguous()
    out = base.new_empty(source.shape[0], base.shape[1])
    core().merge_embeddings_fwd(
        number_type(base), source.shape[0], base.shape[1], source.data_ptr(), rows(base), mode != EMBED, mode == ADD,
        scale, _address(flat), rows(out), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _native_bwd(grad: Tensor, source: Tensor, sizes: list[int]) -> list[Tensor]:
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    gradients = [grad.new_empty(size, grad.shape[1]) for size in sizes]
    core().merge_embeddings_bwd(
        number_type(grad), grad.shape[0], grad.shape[1], source.data_ptr(), _address(gradients), rows(grad),
        torch.get_num_threads(),
    )  # fmt: skip
    return gradients


_fwd = register_op(
    "merge_embeddings_fwd",
    native=_native_fwd,
    fake=lambda source, base, features, mode, scale: base.new_empty(source.shape[0], base.shape[1]),
)
# Gradients of the features, `sizes` rows each.
_bwd = register_op(
    "merge_embeddings_bwd",
    native=_native_bwd,
    fake=lambda grad, source, sizes: [grad.new_empty(size, grad.shape[1]) for size in sizes],
)


def _without_spare(gradients: list[Tensor], source: Tensor) -> list[Tensor]:
    """Gradients of features, 0 where no placeholder took the row."""
    sizes = [g.shape[0] for g in gradients]
    used = source.new_zeros(sum(sizes) + 1, dtype=torch.bool)
    used[(-1 - source).clamp(min=-1)] = True  # the last one is where text goes
    parts = used[:-1].split(sizes)
    return [torch.where(part[:, None], g, 0) for part, g in zip(parts, gradients, strict=True)]


def _again(ctx, grads, source):
    (grad,) = grads
    base = unseen((ctx.base_rows, grad.shape[1]), grad)
    features = [unseen(shape, grad) for shape in ctx.shapes]
    out = gather_ref(source, base, features, ctx.mode, ctx.scale, ctx.unused)
    return (out,), (None, None, None, None, None, base, *features)


class _MergeEmbeddings(torch.autograd.Function):
    @staticmethod
    # `*args` for all: without gradients Dynamo takes a call with as many arguments as forward has names, `ctx` among
    # them, for one of the form without a context.
    def forward(ctx, *args):
        ctx.set_materialize_grads(False)
        mode, scale, unused, spare, source, base, *features = args
        ctx.mode, ctx.scale, ctx.unused, ctx.base_rows, ctx.spare = mode, scale, unused, base.shape[0], spare
        ctx.shapes = [f.shape for f in features]
        ctx.save_for_backward(source)
        return _fwd(source, base, list(features), mode, scale)

    @staticmethod
    @differentiable(_again)
    def backward(ctx, grad):
        (source,) = ctx.saved_tensors
        needs_base, *needs_features = ctx.needs_input_grad[5:]
        dbase = None
        if needs_base and ctx.mode == EMBED:
            dbase = torch.ops.aten.embedding_dense_backward(
                grad if ctx.scale == 1 else grad * ctx.scale,
                torch.where(source < 0, ctx.unused, source), ctx.base_rows, ctx.unused, False,
            )  # fmt: skip
        elif needs_base:
            dbase = grad if ctx.mode == ADD else grad.masked_fill((source < 0)[:, None], 0)
        dfeatures = [None] * len(ctx.shapes)
        if any(needs_features):
            sizes = [s.numel() // max(1, s[-1]) for s in ctx.shapes]
            found = _bwd(grad, source, sizes)
            found = _without_spare(found, source) if ctx.spare else found
            dfeatures = [g.view(s) for g, s in zip(found, ctx.shapes, strict=True)]
        return None, None, None, None, None, dbase, *dfeatures
