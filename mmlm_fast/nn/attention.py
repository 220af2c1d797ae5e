"""Attention layers over `ops.interval_attention`, with the state dicts of what they replace."""

from typing import Any

import torch
from torch import Tensor, nn

from mmlm_fast.masks import IntervalMask
from mmlm_fast.nn.loading import join, rename, split
from mmlm_fast.nn.mlp import GatedMLP
from mmlm_fast.nn.norms import RMSNorm
from mmlm_fast.ops import gated_add, interval_attention


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    """``[B, S, H·D]`` to ``[B, H, S, D]``, without copying."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: IntervalMask | None) -> Tensor:
    return interval_attention(query, key, value, mask).transpose(1, 2).flatten(2)


def _check_hidden(name: str, x: Any, size: int) -> None:
    if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[-1] != size:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be [B, tokens, {size}], got {got}")


def _check_heads(embed_dim: int, num_heads: int) -> None:
    if num_heads < 1 or embed_dim % num_heads:
        raise ValueError(f"num_heads must divide embed_dim, got {num_heads} for {embed_dim}")


class MultiheadSelfAttention(nn.Module):
    """Self-attention with the parameters and state dict of ``torch.nn.MultiheadAttention(embed_dim, num_heads)``.

    Also loads state dicts of separate projections (``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj`` or ``o_proj``).

    Args:
        embed_dim, num_heads: As in ``torch.nn.MultiheadAttention``.
        bias: Of all projections.

    Raises:
        ValueError: if `num_heads` does not divide `embed_dim`.
    """

    def __init__(self, embed_dim: int, num_heads: int, *, bias: bool = True) -> None:
        super().__init__()
        _check_heads(embed_dim, num_heads)
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim)) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        nn.init.xavier_uniform_(self.in_proj_weight)
        if bias:
            nn.init.zeros_(self.out_proj.bias)

    def forward(self, hidden_states: Tensor, mask: IntervalMask | None = None) -> Tensor:
        """``[B, S, embed_dim]`` to the same; `mask` for S queries and S keys, by default everything sees everything."""
        _check_hidden("hidden_states", hidden_states, self.embed_dim)
        qkv = nn.functional.linear(hidden_states, self.in_proj_weight, self.in_proj_bias)
        query, key, value = (_split_heads(x, self.num_heads) for x in qkv.chunk(3, dim=-1))
        return self.out_proj(_attend(query, key, value, mask))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        join(state_dict, prefix, ("q_proj.", "k_proj.", "v_proj."), "in_proj_")
        rename(state_dict, prefix, "o_proj", "out_proj")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"


class CrossAttention(nn.Module):
    """Queries from one sequence, keys and values from another, with the usual ``q_proj, k_proj, v_proj, o_proj``.

    Also loads a state dict of ``torch.nn.MultiheadAttention`` (``in_proj_weight`` or, with another `kv_dim`, its
    separate weights), and ``out_proj`` for ``o_proj``.

    Args:
        embed_dim: Size of queries and output.
        num_heads: Of the queries.
        kv_dim: Size of the context; `embed_dim` by default.
        num_key_value_heads: Of keys and values; `num_heads` by default.
        head_dim: ``embed_dim // num_heads`` by default.
        bias: Of all projections.
        qk_norm_eps: With it, queries and keys are normalised head by head (``q_norm``, ``k_norm``), as in mllama.

    Raises:
        ValueError: if numbers of heads do not divide.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        kv_dim: int | None = None,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        qk_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        if head_dim is None:
            _check_heads(embed_dim, num_heads)
            head_dim = embed_dim // num_heads
        kv_dim = embed_dim if kv_dim is None else kv_dim
        num_key_value_heads = num_heads if num_key_value_heads is None else num_key_value_heads
        if num_key_value_heads < 1 or num_heads % num_key_value_heads:
            raise ValueError(f"num_key_value_heads must divide num_heads, got {num_key_value_heads} for {num_heads}")
        self.embed_dim, self.kv_dim = embed_dim, kv_dim
        self.num_heads, self.num_key_value_heads = num_heads, num_key_value_heads
        self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(kv_dim, num_key_value_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(kv_dim, num_key_value_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, embed_dim, bias=bias)
        self.q_norm = None if qk_norm_eps is None else RMSNorm(head_dim, qk_norm_eps)
        self.k_norm = None if qk_norm_eps is None else RMSNorm(head_dim, qk_norm_eps)

    def forward(self, hidden_states: Tensor, context: Tensor, mask: IntervalMask | None = None) -> Tensor:
        """``[B, Sq, embed_dim]`` and context ``[B, Skv, kv_dim]`` to ``[B, Sq, embed_dim]``.

        `mask` says which of the context each query sees, e.g. ``IntervalMask.latest_image(...)``; by default all.
        """
        _check_hidden("hidden_states", hidden_states, self.embed_dim)
        _check_hidden("context", context, self.kv_dim)
        query = _split_heads(self.q_proj(hidden_states), self.num_heads)
        key, value = (_split_heads(f(context), self.num_key_value_heads) for f in (self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        return self.o_proj(_attend(query, key, value, mask))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        split(state_dict, prefix, "in_proj_", ("q_proj.", "k_proj.", "v_proj."))
        for kind in ("weight", "bias"):
            for name in "qkv":
                separate = state_dict.pop(f"{prefix}{name}_proj_{kind}", None)
                if separate is not None:
                    state_dict[f"{prefix}{name}_proj.{kind}"] = separate
        rename(state_dict, prefix, "out_proj", "o_proj")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_key_value_heads={self.num_key_value_heads}"


class GatedCrossAttention(nn.Module):
    """``x + tanh(gate) · CrossAttention(norm(x), context)``: how Flamingo and Llama 3.2 Vision let text see images.

    The gate starts at 0, so that a language model is unchanged at first. A token that sees no image passes unchanged
    too, except for the bias of ``o_proj`` (there is none by default, as in both models).

    Args:
        embed_dim, num_heads: As in `CrossAttention`, as are the keyword arguments; `bias` is False by default.
        norm: Applied to x; ``nn.LayerNorm(embed_dim)`` by default.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, *, norm: nn.Module | None = None, bias: bool = False, **options: Any
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim) if norm is None else norm
        self.attn = CrossAttention(embed_dim, num_heads, bias=bias, **options)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, hidden_states: Tensor, context: Tensor, mask: IntervalMask | None = None) -> Tensor:
        """Shapes and `mask` as in `CrossAttention.forward`."""
        return gated_add(self.attn(self.norm(hidden_states), context, mask), hidden_states, self.gate)


class GatedCrossAttentionLayer(nn.Module):
    """Llama 3.2 Vision's layer between text layers: gated cross-attention, then a gated MLP.

    Its state dict is that of MllamaCrossAttentionDecoderLayer. With a mask, a token that sees no picture passes
    unchanged; transformers' layer gives it the mean of all pictures in the attention, and masks the MLP alone.

    Args:
        embed_dim, num_heads, intermediate_size: Widths and heads.
        kv_dim, num_key_value_heads: As in `CrossAttention`.
        eps: Of all norms.
        activation: Of the MLP, by transformers' name.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        intermediate_size: int,
        *,
        kv_dim: int | None = None,
        num_key_value_heads: int | None = None,
        eps: float = 1e-5,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        self.cross_attn = CrossAttention(
            embed_dim, num_heads, kv_dim=kv_dim, num_key_value_heads=num_key_value_heads, bias=False, qk_norm_eps=eps
        )
        self.input_layernorm = RMSNorm(embed_dim, eps)
        self.cross_attn_attn_gate = nn.Parameter(torch.zeros(1))
        self.mlp = GatedMLP(embed_dim, intermediate_size, activation)
        self.post_attention_layernorm = RMSNorm(embed_dim, eps)
        self.cross_attn_mlp_gate = nn.Parameter(torch.zeros(1))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.cross_attn_attn_gate)
        nn.init.zeros_(self.cross_attn_mlp_gate)

    def forward(self, hidden_states: Tensor, context: Tensor, mask: IntervalMask | None = None) -> Tensor:
        """Shapes and `mask` as in `CrossAttention.forward`."""
        keep = None
        if mask is not None:
            keep = (mask.hi.clamp(max=context.shape[1]) > mask.lo.clamp(min=0)).expand(hidden_states.shape[:-1])
        attended = self.cross_attn(self.input_layernorm(hidden_states), context, mask)
        hidden_states = gated_add(attended, hidden_states, self.cross_attn_attn_gate, keep=keep)
        moved = self.mlp(self.post_attention_layernorm(hidden_states))
        return gated_add(moved, hidden_states, self.cross_attn_mlp_gate, keep=keep)
