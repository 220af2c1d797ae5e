import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmlm_fast.nn.norms import RMSNorm
from mmlm_fast.nn.plain import is_plain
from mmlm_fast.ops import qk_norm_rope, rope_tables
from mmlm_fast.positions import vision_positions

# Kinds whose frequencies change with the length of the sequence.
_CHANGING = ("dynamic", "longrope")


class RotaryEmbedding(nn.Module):
    """Rotary positions of queries and keys: Llama, Qwen, M-RoPE (sectioned, interleaved), partial, GPT-J's pairs.

    Called with positions it gives the tables, once for all layers of a forward pass; `rotate` applies them. It has no
    parameters, and its buffer is not saved, as transformers' ``inv_freq``.

    Args:
        head_dim: D.
        base: Of the frequencies ``base^(−2i/R)``.
        rotary_dim: R, how much of each head rotates; all of it by default.
        sections, interleaved_sections: Of M-RoPE; see `ops.rope_tables`.
        interleaved: Pairs are neighbours; see `ops.qk_norm_rope`.
        inv_freq: Frequencies other than those of `base` (YaRN, llama3 …), ``[R/2]``.
        scaling: Multiplies cos and sin.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        base: float = 10000.0,
        rotary_dim: int | None = None,
        sections: Sequence[int] | None = None,
        interleaved_sections: bool = False,
        interleaved: bool = False,
        inv_freq: Tensor | None = None,
        scaling: float = 1.0,
    ) -> None:
        super().__init__()
        rotary_dim = head_dim if rotary_dim is None else rotary_dim
        if rotary_dim % 2 or rotary_dim > head_dim:
            raise ValueError(f"rotary_dim must be even and at most head_dim {head_dim}, got {rotary_dim}")
        if inv_freq is None:
            inv_freq = 1.0 / base ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
        if 2 * inv_freq.shape[0] > head_dim:
            raise ValueError(f"inv_freq must be at most {head_dim // 2} numbers, got {inv_freq.shape[0]}")
        self.register_buffer("inv_freq", inv_freq.detach().float().clone(), persistent=False)
        self.head_dim, self.scaling = head_dim, scaling
        self.sections = None if sections is None else list(sections)
        self.interleaved_sections, self.interleaved = interleaved_sections, interleaved

    @classmethod
    def from_transformers(cls, module: nn.Module, head_dim: int | None = None, **options: Any) -> "RotaryEmbedding":
        """With the frequencies, scaling and sections of a rotary module of transformers, proved on a few positions.

        Args:
            module: e.g. ``model.model.rotary_emb``.
            head_dim: D; twice the number of frequencies by default.
            options: ``interleaved`` (pairs of `ops.qk_norm_rope`, which the tables do not show), or other sections.

        Raises:
            ValueError: where the frequencies change with the length (dynamic, longrope), or the module's tables are
                none of those this class makes.
        """
        if getattr(module, "rope_type", "default") in _CHANGING:
            raise ValueError(f"frequencies must not change with the length, got rope_type {module.rope_type!r}")
        inv_freq: Tensor = module.inv_freq  # type: ignore[assignment]
        options = {"sections": getattr(module, "mrope_section", None), **options}
        half = inv_freq.shape[0]
        head_dim = 2 * half if head_dim is None else head_dim
        scaling = float(getattr(module, "attention_scaling", 1.0))
        shape = (1, 4) if options["sections"] is None else (len(options["sections"]), 1, 4)
        positions = torch.arange(1, 1 + 7 * math.prod(shape), 7, device=inv_freq.device).view(shape)
        expected = module(inv_freq.new_zeros(1, 4, 1), positions)
        for interleaved_sections in (False, True):  # no attribute tells them apart
            made = cls(
                head_dim, inv_freq=inv_freq, scaling=scaling, interleaved_sections=interleaved_sections, **options
            )
            if all(torch.allclose(t, e[..., :half].float()) for t, e in zip(made(positions), expected, strict=True)):
                return made.to(inv_freq.device)
        raise ValueError(f"the tables of {type(module).__name__} are not those of inv_freq and mrope_section")

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin ``[B, S, R/2]`` float32 of positions ``[B, S]``, or ``[axes, B, S]`` with sections."""
        if self.sections is not None and position_ids.dim() == 2:
            position_ids = position_ids.expand(len(self.sections), -1, -1)
        sections = self.sections if position_ids.dim() == 3 else None
        return rope_tables(
            position_ids,
            self.inv_freq,  # type: ignore[arg-type]
            sections=sections,
            interleaved_sections=self.interleaved_sections,
            scaling=self.scaling,
        )

    def rotate(
        self,
        query: Tensor,
        key: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        *,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Queries and keys ``[B, heads, S, D]``, after the RMSNorm of their heads where there is one."""
        if q_norm is not None and _are_alike(q_norm, q_norm if key is None else k_norm):
            return qk_norm_rope(
                query, key, cos, sin, query_weight=q_norm.weight, key_weight=None if k_norm is None else k_norm.weight,
                eps=q_norm.eps, offset=q_norm.offset, interleaved=self.interleaved,
            )  # fmt: skip
        query = query if q_norm is None else q_norm(query)  # type: ignore[assignment]
        key = key if key is None or k_norm is None else k_norm(key)  # type: ignore[assignment]
        return qk_norm_rope(query, key, cos, sin, interleaved=self.interleaved)

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, sections={self.sections}"


def _are_alike(first: RMSNorm, second: RMSNorm | None) -> bool:
    """Whether both are plain, and of one formula."""
    if second is None or not (is_plain(first, RMSNorm) and is_plain(second, RMSNorm)):
        return False
    return (first.eps, first.offset) == (second.eps, second.offset)


class VisionRotaryEmbedding(RotaryEmbedding):
    """Two-dimensional rotary positions of patches: half of the pairs turn by the row, half by the column.

    Args:
        head_dim: D, divisible by 4.
        base: Of the frequencies.
        spatial_merge_size: Order of the patches; see `positions.vision_positions`.
        alternate: Rows and columns take every other frequency of the whole head (Pixtral), in place of both having all
            those of half a head (Qwen-VL).
    """

    def __init__(
        self, head_dim: int, *, base: float = 10000.0, spatial_merge_size: int = 1, alternate: bool = False
    ) -> None:
        if head_dim % 4:
            raise ValueError(f"head_dim must be divisible by 4, got {head_dim}")
        size = head_dim if alternate else head_dim // 2
        freq = 1.0 / base ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
        rows, columns = (freq[::2], freq[1::2]) if alternate else (freq, freq)
        super().__init__(head_dim, inv_freq=torch.cat([rows, columns]), sections=[head_dim // 4] * 2)
        self.spatial_merge_size = spatial_merge_size

    def from_grid(self, grid_thw: Tensor, num_tokens: int | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin of all patches of pictures ``[items, 3]`` (frames, height, width); `num_tokens` as there."""
        return self(vision_positions(grid_thw, self.spatial_merge_size, num_tokens))
