"""`IntervalMask`: which keys each query may see, as one interval of keys per query.

Full, causal, windowed, chunked, packed, padded, prefix and image-block masks, and "this text sees the latest image" of
cross-attention, all let query i see exactly the keys lo[i] ≤ j < hi[i]. Two int32 vectors then say everything, in O(S)
memory, and a kernel knows from them which tiles to skip and which need no masking.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils import _pytree as pytree

Offset = int | Tensor
_NOT_ONE_INTERVAL = "keys of a query that are not one interval"


class IntervalMask:
    """Query i of sample b sees the keys ``lo[b, i] <= j < hi[b, i]``; where ``hi <= lo`` it sees none.

    `lo` and `hi` are int32 ``[B or 1, Sq]``; one row serves all samples of a batch. Bounds outside the keys at hand are
    cut by the attention. `kind` is ``"full"`` or ``"causal"`` where a builder knows that the mask is just that (full:
    every query sees the first `kv_len` keys; causal: query i sees the keys up to i), which lets the attention take a
    mask-free kernel where there are no more keys.

    Combine with ``&`` (keys both masks allow) and ``|`` (keys either allows). Instances are not modified; they can be
    pickled, moved (`to`), put into a batch (`batch`, `expand`), and passed to compiled and checkpointed functions:
    graphs do not depend on the bounds.

    Raises:
        ValueError: unless both bounds are int32 of one shape ``[B, Sq]`` on one device, and `kind` is one of these.
    """

    kv_len: int | None = None

    def __init__(self, lo: Tensor, hi: Tensor, kind: str | None = None, kv_len: int | None = None) -> None:
        for name, bound in (("lo", lo), ("hi", hi)):
            if not isinstance(bound, Tensor):
                raise ValueError(f"{name} must be a tensor, got {type(bound).__name__}")
            if bound.dtype != torch.int32 or bound.dim() != 2:
                raise ValueError(f"{name} must be int32 [B or 1, Sq], got {bound.dtype} {tuple(bound.shape)}")
        if lo.shape != hi.shape or lo.device != hi.device:
            raise ValueError(
                f"lo and hi must agree, got {tuple(lo.shape)} on {lo.device} and {tuple(hi.shape)} on {hi.device}"
            )
        if kind not in (None, "full", "causal"):
            raise ValueError(f'kind must be "full", "causal" or None, got {kind!r}')
        if (kind == "full") != (kv_len is not None):
            raise ValueError(f"kv_len must be given with kind full, and with no other, got {kv_len} with {kind}")
        self.lo, self.hi, self.kind, self.kv_len = lo, hi, kind, kv_len

    # ---- builders ----------------------------------------------------------------------------------------------------

    @classmethod
    def full(cls, q_len: int, kv_len: int, *, device: Any = None) -> "IntervalMask":
        """Every query sees every key, of `kv_len`: not what lies behind them, as in a static cache with room."""
        _check_lengths(q_len=q_len, kv_len=kv_len)
        hi = torch.full((1, q_len), kv_len, dtype=torch.int32, device=device)
        return cls(torch.zeros_like(hi), hi, "full", kv_len)

    @classmethod
    def causal(
        cls, q_len: int, kv_len: int | None = None, *, q_offset: Offset | None = None, device: Any = None
    ) -> "IntervalMask":
        """Query i sees the keys up to its own position ``q_offset + i``.

        Args:
            q_len, kv_len: Numbers of queries and keys; `kv_len` is `q_len` by default.
            q_offset: Position of the first query among the keys: an int, or an integer tensor, scalar or ``[B]`` (the
                keys in a static cache so far). By default the queries are the last ones, ``kv_len - q_len``.
            device: Of the bounds; by default that of `q_offset`, or the current one.
        """
        square = q_offset is None and kv_len in (None, q_len)
        position, kv_len = _positions(q_len, kv_len, q_offset, device)
        mask = _bounded(torch.zeros_like(position), position + 1, kv_len)
        return cls(mask.lo, mask.hi, "causal" if square else None)

    @classmethod
    def sliding_window(
        cls,
        q_len: int,
        kv_len: int | None = None,
        *,
        window: int,
        bidirectional: bool = False,
        q_offset: Offset | None = None,
        device: Any = None,
    ) -> "IntervalMask":
        """The last `window` keys up to and including one's own; with `bidirectional`, those at most `window` away.

        Both are transformers' conventions (`sliding_window_overlay`, `sliding_window_bidirectional_overlay`). Other
        arguments as `causal`.
        """
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        position, kv_len = _positions(q_len, kv_len, q_offset, device)
        if bidirectional:
            return _bounded(position - window, position + window + 1, kv_len)
        return _bounded(position - window + 1, position + 1, kv_len)

    @classmethod
    def chunked(
        cls,
        q_len: int,
        kv_len: int | None = None,
        *,
        chunk_size: int,
        left_padding: Tensor | None = None,
        q_offset: Offset | None = None,
        device: Any = None,
    ) -> "IntervalMask":
        """Causal in chunks of `chunk_size` positions, counted from ``left_padding`` ([B], 0 by default) (Llama 4)."""
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        device = left_padding.device if device is None and left_padding is not None else device
        position, kv_len = _positions(q_len, kv_len, q_offset, device)
        start = torch.zeros((), dtype=torch.int64, device=position.device)
        if left_padding is not None:
            start = _check_integers("left_padding", left_padding)[:, None]
        chunk = torch.div(position - start, chunk_size, rounding_mode="floor")
        return _bounded(chunk * chunk_size + start, position + 1, kv_len)

    @classmethod
    def packed(
        cls, cu_seqlens: Tensor, q_len: int, *, is_causal: bool = False, cu_seqlens_k: Tensor | None = None,
        kv_len: int | None = None,
    ) -> "IntervalMask":  # fmt: skip
        """Sequences packed end to end: each token sees its own sequence only.

        Args:
            cu_seqlens: Where each sequence begins, and the last ends: integers ``[num_sequences + 1]``, nondecreasing,
                from 0. Queries from ``cu_seqlens[-1]`` on see nothing.
            q_len: Number of packed queries (a plain int, so that nothing waits for a device).
            is_causal: Causal inside each sequence, aligned at its end where queries and keys differ in number.
            cu_seqlens_k: The same for the keys in cross-attention; by default the queries' own.
            kv_len: Number of packed keys; needed with `cu_seqlens_k`, else `q_len`.

        Raises:
            ValueError: for what cannot be such places: lengths, or places that decrease, do not begin at 0 or lie
                beyond the tokens. Only on a CPU and outside torch.compile, where looking is free; elsewhere nothing
                waits to look at them, and tokens see what they say.
        """
        cu_q = _check_integers("cu_seqlens", cu_seqlens)
        cu_k = cu_q if cu_seqlens_k is None else _check_integers("cu_seqlens_k", cu_seqlens_k)
        if cu_q.numel() < 1 or cu_k.shape != cu_q.shape:
            raise ValueError(
                f"cu_seqlens must be [num_sequences + 1], the same for queries and keys, got {tuple(cu_q.shape)} and "
                f"{tuple(cu_k.shape)}"
            )
        if cu_seqlens_k is not None and kv_len is None:
            raise ValueError("kv_len must be given with cu_seqlens_k, got None")
        _check_lengths(q_len=q_len)
        kv_len = q_len if kv_len is None else kv_len
        _check_places("cu_seqlens", cu_q, q_len)
        _check_places("cu_seqlens_k", cu_k, kv_len)
        num_sequences = cu_q.numel() - 1
        position = torch.arange(q_len, device=cu_q.device)
        if num_sequences == 0:
            return _bounded(torch.zeros_like(position)[None], torch.zeros_like(position)[None], kv_len)
        sequence = torch.searchsorted(cu_q, position, right=True) - 1
        inside = sequence.clamp(0, num_sequences - 1)
        lo, hi = cu_k[inside], cu_k[inside + 1]
        if is_causal:
            hi = torch.minimum(hi, position + 1 + (hi - cu_q[inside + 1]))
        outside = (sequence < 0) | (sequence >= num_sequences)
        return _bounded(lo[None], torch.where(outside, lo, hi)[None], kv_len)

    @classmethod
    def padded(
        cls, lengths: Tensor, kv_len: int, *, q_len: int | None = None, side: str = "right"
    ) -> "IntervalMask":  # fmt: skip
        """Every query of sample b sees its first (`side` right) or last (`side` left) ``lengths[b]`` keys.

        The name is that of the side where the padding is. Combine with ``&``: ``causal(n) & padded(lengths, n)``.
        """
        if side not in ("left", "right"):
            raise ValueError(f"side must be left or right, got {side!r}")
        lengths = _check_integers("lengths", lengths)
        q_len = kv_len if q_len is None else q_len
        _check_lengths(q_len=q_len, kv_len=kv_len)
        lengths = lengths.clamp(0, kv_len)[:, None].expand(-1, q_len)
        if side == "right":
            return _bounded(torch.zeros_like(lengths), lengths, kv_len)
        return _bounded(kv_len - lengths, torch.full_like(lengths, kv_len), kv_len)

    @classmethod
    def prefix(
        cls,
        prefix_lengths: Tensor,
        q_len: int,
        kv_len: int | None = None,
        *,
        q_offset: Offset | None = None,
    ) -> "IntervalMask":
        """Causal, and the first ``prefix_lengths[b]`` keys are visible to all (prefix-LM, PaliGemma)."""
        prefix_lengths = _check_integers("prefix_lengths", prefix_lengths)
        position, kv_len = _positions(q_len, kv_len, q_offset, prefix_lengths.device)
        hi = torch.maximum(position + 1, prefix_lengths[:, None])
        return _bounded(torch.zeros_like(hi), hi, kv_len)

    @classmethod
    def image_blocks(
        cls,
        block_ids: Tensor,
        *,
        window: int | None = None,
        q_len: int | None = None,
        q_offset: Offset | None = None,
    ) -> "IntervalMask":
        """Causal, and tokens of one image see each other in both directions (Gemma 3).

        Args:
            block_ids: Integers ``[B, Skv]``: the same number ≥ 0 for all tokens of an image, which stand together; < 0
                for text.
            window: Only the last `window` keys up to one's own, and the later ones of one's image: transformers'
                sliding_window & (causal | image). By default all.
            q_len, q_offset: Number of queries (all by default), position of the first (by default they are the last).

        Raises:
            ValueError: if an id stands in two places, which is no interval (on CUDA and under compile: a device-side
                assertion).
        """
        ids = _check_integers("block_ids", block_ids, dims=2)
        kv_len = ids.shape[1]
        position, kv_len = _positions(kv_len if q_len is None else q_len, kv_len, q_offset, ids.device)
        _, block_hi = runs_of_ids(ids)
        require(each_id_runs_once(ids), "block_ids: an id of an image stands in two places")
        index = position.clamp(0, max(kv_len - 1, 0)).expand(ids.shape[0], -1)
        if kv_len == 0:
            return _bounded(torch.zeros_like(index), torch.zeros_like(index), 0)
        in_image = (ids.gather(1, index) >= 0) & (position < kv_len)
        hi = torch.where(in_image, torch.maximum(block_hi.gather(1, index), position + 1), position + 1)
        if window is None:
            return _bounded(torch.zeros_like(hi), hi, kv_len)
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        return _bounded((position - window + 1).expand_as(hi), hi, kv_len)

    @classmethod
    def latest_image(
        cls, media_locations: Tensor, tokens_per_image: int, *, num_images: int | None = None, only: bool = True
    ) -> "IntervalMask":
        """Cross-attention of text to images: each token sees the latest image at or before it (Flamingo).

        Args:
            media_locations: Bool ``[B, Sq]``: True where an image stands in the text. Tokens before the first see none.
            tokens_per_image: Keys an image has; the keys are the sample's images one after the other.
            num_images: Images there are keys for; tokens of later ones see what there is. By default no limit.
            only: The latest image only; else all images so far.
        """
        if not isinstance(media_locations, Tensor) or media_locations.dtype != torch.bool or media_locations.dim() != 2:
            raise ValueError(f"media_locations must be bool [B, Sq], got {_describe(media_locations)}")
        _check_lengths(tokens_per_image=tokens_per_image)
        count = media_locations.cumsum(1)
        hi = count * tokens_per_image
        lo = (hi - tokens_per_image).clamp(min=0) if only else torch.zeros_like(hi)
        return _bounded(lo, hi, _INT32_MAX if num_images is None else num_images * tokens_per_image)

    @classmethod
    def from_dense(cls, mask: Tensor) -> "IntervalMask":
        """The intervals of a bool mask ``[Sq, Skv]``, ``[B, Sq, Skv]`` or ``[B, 1, Sq, Skv]``, True where visible.

        Looks at every element, and waits for the device.

        Raises:
            ValueError: where the keys of a row are not one interval, naming the first such row.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() not in (2, 3, 4):
            raise ValueError(f"mask must be bool [Sq, Skv], [B, Sq, Skv] or [B, 1, Sq, Skv], got {_describe(mask)}")
        if mask.dim() == 4 and mask.shape[1] != 1:
            raise ValueError(f"mask must be the same for all heads, [B, 1, Sq, Skv], got {tuple(mask.shape)}")
        mask = mask[None] if mask.dim() == 2 else mask.squeeze(1) if mask.dim() == 4 else mask
        lo, hi, count = _first_and_last(mask)
        wrong = (count > 0) & (hi - lo != count)
        if bool(wrong.any()):
            sample, row = (int(i) for i in wrong.nonzero()[0])
            raise ValueError(f"mask is not one interval of keys in row {row} of sample {sample}")
        return _bounded(lo, hi, mask.shape[2])

    # ---- what one does with a mask -----------------------------------------------------------------------------------

    def dense(self, kv_len: int) -> Tensor:
        """The same mask as bool ``[B or 1, Sq, kv_len]``, True where visible: O(Sq · kv_len) memory."""
        key = torch.arange(kv_len, device=self.device, dtype=torch.int32)
        return (key >= self.lo[..., None]) & (key < self.hi[..., None])

    def kind_for(self, kv_len: int) -> str | None:
        """The `kind` where there are `kv_len` keys: "full" only if it hides none of them."""
        if self.kind == "full" and (self.kv_len is None or self.kv_len < kv_len):
            return None
        return self.kind

    def __and__(self, other: "IntervalMask") -> "IntervalMask":
        lo, hi = torch.maximum(self.lo, other.lo), torch.minimum(self.hi, other.hi)
        return IntervalMask(*_tidy(lo, hi))

    def __or__(self, other: "IntervalMask") -> "IntervalMask":
        """Union.

        Raises:
            ValueError: where it is not one interval (on CUDA and under compile: a device-side assertion).
        """
        mine, theirs = self.hi > self.lo, other.hi > other.lo
        apart = (torch.maximum(self.lo, other.lo) > torch.minimum(self.hi, other.hi)) & mine & theirs
        require(~apart.any(), f"union of masks: {_NOT_ONE_INTERVAL}")
        lo = torch.where(mine & theirs, torch.minimum(self.lo, other.lo), torch.where(mine, self.lo, other.lo))
        hi = torch.where(mine & theirs, torch.maximum(self.hi, other.hi), torch.where(mine, self.hi, other.hi))
        return IntervalMask(lo, hi)

    def to(self, device: Any, non_blocking: bool = False) -> "IntervalMask":
        """The same mask on another device."""
        lo, hi = (x.to(device, non_blocking=non_blocking) for x in (self.lo, self.hi))
        return IntervalMask(lo, hi, self.kind, self.kv_len)

    def expand(self, batch_size: int) -> "IntervalMask":
        """One mask for every sample of a batch, without copying."""
        lo, hi = (x.expand(batch_size, -1) for x in (self.lo, self.hi))
        return IntervalMask(lo, hi, self.kind, self.kv_len)

    def rows(self, start: int, stop: int) -> "IntervalMask":
        """The mask of the queries from `start` to `stop` only."""
        return IntervalMask(self.lo[:, start:stop], self.hi[:, start:stop])

    @staticmethod
    def batch(masks: Sequence["IntervalMask"]) -> "IntervalMask":
        """Masks of samples, with the same number of queries, as one batch."""
        if not masks:
            raise ValueError("masks must hold at least one mask, got none")
        if len({m.q_len for m in masks}) > 1:
            raise ValueError(f"masks must have the same number of queries, got {[m.q_len for m in masks]}")
        return IntervalMask(torch.cat([m.lo for m in masks]), torch.cat([m.hi for m in masks]))

    @property
    def batch_size(self) -> int:
        return self.lo.shape[0]

    @property
    def q_len(self) -> int:
        return self.lo.shape[1]

    @property
    def device(self) -> torch.device:
        return self.lo.device

    def __repr__(self) -> str:
        kind = f", {self.kind}" if self.kind else ""
        return f"IntervalMask(batch_size={self.batch_size}, q_len={self.q_len}, device={self.device}{kind})"


pytree.register_pytree_node(
    IntervalMask,
    lambda mask: ([mask.lo, mask.hi], [mask.kind, mask.kv_len]),
    lambda bounds, known: _unchecked(list(bounds), known),
    serialized_type_name="mmlm_fast.masks.IntervalMask",
)

_INT32_MAX = 2**31 - 1


def _unchecked(bounds: list[Any], known: Any) -> IntervalMask:
    """Pytree maps put anything in the place of the bounds."""
    mask = object.__new__(IntervalMask)
    mask.lo, mask.hi = bounds
    mask.kind, mask.kv_len = known
    return mask


def _tidy(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """Empty rows as ``lo == hi``, which keeps bounds that grow along the row growing."""
    return torch.minimum(lo, hi.clamp(min=0)), hi.clamp(min=0)


def _bounded(lo: Tensor, hi: Tensor, kv_len: int) -> IntervalMask:
    lo, hi = torch.broadcast_tensors(lo.clamp(0, kv_len), hi.clamp(0, kv_len))
    lo, hi = _tidy(lo, hi)
    return IntervalMask(lo.to(torch.int32), hi.to(torch.int32))


def _positions(q_len: int, kv_len: int | None, q_offset: Offset | None, device: Any) -> tuple[Tensor, int]:
    """Positions of the queries among the keys, int64 ``[1 or B, Sq]``, and the number of keys."""
    kv_len = q_len if kv_len is None else kv_len
    _check_lengths(q_len=q_len, kv_len=kv_len)
    if q_offset is None:
        q_offset = kv_len - q_len
    if isinstance(q_offset, Tensor):
        offset = _check_integers("q_offset", q_offset.reshape(-1) if q_offset.dim() == 0 else q_offset)
        device = offset.device if device is None else device
        return torch.arange(q_len, device=device) + offset.to(device)[:, None], kv_len
    return (torch.arange(q_len, device=device) + q_offset)[None], kv_len


def _check_lengths(**lengths: int) -> None:
    for name, value in lengths.items():
        if isinstance(value, Tensor):
            raise ValueError(f"{name} must be an int, got a tensor")
        if value < 0 or value > _INT32_MAX:
            raise ValueError(f"{name} must be from 0 to 2**31 - 1, got {value}")


def _check_integers(name: str, tensor: Any, dims: int = 1) -> Tensor:
    ok = isinstance(tensor, Tensor) and tensor.dim() == dims
    if not ok or tensor.dtype not in (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8):
        raise ValueError(f"{name} must be a {dims}-D integer tensor, got {_describe(tensor)}")
    return tensor.to(torch.int64)


def _check_places(name: str, places: Tensor, length: int) -> None:
    """`places` divide `length` tokens, or ValueError where looking is free."""
    if not _looking_is_free(places):
        return
    numbers = places.tolist()
    if numbers[0] != 0 or numbers != sorted(numbers) or numbers[-1] > length:
        shown = f"{numbers[:8]}"[:-1] + (", …]" if len(numbers) > 8 else "]")
        raise ValueError(
            f"{name} must be the places where sequences begin, from 0, nondecreasing, at most {length} (the tokens), "
            f"got {shown}"
        )


def _looking_is_free(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not is_fake(tensor)


def _describe(thing: Any) -> str:
    return f"{thing.dtype} {tuple(thing.shape)}" if isinstance(thing, Tensor) else type(thing).__name__


def require(condition: Tensor, message: str) -> None:
    """ValueError where looking is free; an assertion on the device where it would stall, or break a graph."""
    if _looking_is_free(condition):
        if not bool(condition):
            raise ValueError(message)
    elif condition.device.type != "meta":
        torch._assert_async(condition, message)


def runs_of_ids(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Begin and end of the run of equal ids around each position, int64 ``[B, S]``."""
    _, length = ids.shape
    index = torch.arange(length, device=ids.device)
    change = torch.ones_like(ids, dtype=torch.bool)
    change[:, 1:] = ids[:, 1:] != ids[:, :-1]
    begin = torch.where(change, index, 0).cummax(1).values if length else torch.zeros_like(ids)
    last = torch.ones_like(change)
    last[:, :-1] = change[:, 1:]
    end = torch.where(last, index + 1, length).flip(1).cummin(1).values.flip(1) if length else torch.zeros_like(ids)
    return begin, end


def each_id_runs_once(ids: Tensor) -> Tensor:
    """Whether no id ≥ 0 of a sample stands in two runs: sorted, the begins of runs are all different."""
    if ids.shape[1] == 0:
        return torch.ones((), dtype=torch.bool, device=ids.device)
    begins = (ids >= 0).clone()
    begins[:, 1:] &= ids[:, 1:] != ids[:, :-1]
    unique = torch.arange(ids.shape[1], device=ids.device) - ids.shape[1] - 1  # all different, all negative
    sorted_ids = torch.where(begins, ids, unique).sort(1).values
    return (sorted_ids[:, 1:] != sorted_ids[:, :-1]).all()


def _first_and_last(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First visible key of each row, one past the last, and their number, int64 ``[B, Sq]``; zeros where none."""
    kv_len = mask.shape[-1]
    count = mask.sum(-1)
    if kv_len == 0:
        return count, count, count
    first = mask.to(torch.int8).argmax(-1)
    last = kv_len - mask.flip(-1).to(torch.int8).argmax(-1)
    seen = count > 0
    return torch.where(seen, first, 0), torch.where(seen, last, 0), count
