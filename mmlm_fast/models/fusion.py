"""What joins towers and decoder: projectors, token merge, and fusion with pooled features."""

from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from mmlm_fast.masks import IntervalMask
from mmlm_fast.nn import FuseModalities, GatedCrossAttentionLayer
from mmlm_fast.nn.fusion import linear_of_parts
from mmlm_fast.nn.mlp import activation_of
from mmlm_fast.ops import bias_act, scatter_features


class MMLMProjector(nn.Module):
    """Two linear layers from a tower's width to the decoder's, as in LLaVA 1.5."""

    def __init__(self, tower_size: int, hidden_size: int, activation: str) -> None:
        super().__init__()
        self.activation = None if activation == "none" else activation_of(activation)
        self.linear_1 = nn.Linear(tower_size, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.linear_1(hidden_states)
        if self.activation is not None:
            hidden_states = bias_act(hidden_states, activation=self.activation)
        return self.linear_2(hidden_states)


class MMLMFusion(nn.Module):
    """Fuse the features of one modality, usually tokens of text, with one feature of each other modality."""

    def __init__(self, fusion: str, hidden_size: int, num_others: int) -> None:
        super().__init__()
        self.linear = self.fuse = self.pool = None
        if fusion == "concat":
            self.linear = nn.Linear((1 + num_others) * hidden_size, hidden_size)
        elif fusion == "gated" and num_others:
            self.fuse = FuseModalities("gated", hidden_size)
            self.pool = FuseModalities("mean", hidden_size)
        else:  # a single modality has nothing to be gated with
            self.fuse = FuseModalities("mean" if fusion == "gated" else fusion, hidden_size, 1 + num_others)

    @overload
    def forward(
        self, first: Tensor, others: Tensor, present: Tensor, *, return_weights: Literal[False] = ...
    ) -> Tensor: ...

    @overload
    def forward(
        self, first: Tensor, others: Tensor, present: Tensor, *, return_weights: Literal[True]
    ) -> tuple[Tensor, Tensor | None]: ...

    @overload
    def forward(
        self, first: Tensor, others: Tensor, present: Tensor, *, return_weights: bool = ...
    ) -> Tensor | tuple[Tensor, Tensor | None]: ...

    def forward(
        self, first: Tensor, others: Tensor, present: Tensor, *, return_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Fuse each feature of `first` with those of the others.

        Args:
            first: ``[B, T, H]``.
            others: ``[B, k, H]``.
            present: Bool ``[B, 1 + k]``.
            return_weights: Also return the weights of the modalities, see `fuse_modalities`; None for ``concat``.

        Returns:
            ``[B, T, H]``.
        """
        modalities = [x[:, None] for x in others.unbind(1)]  # [B, 1, H] each: broadcast over the tokens
        if self.linear is not None:
            every = [torch.where(present[:, i, None, None], x, 0) for i, x in enumerate([first, *modalities])]
            fused = linear_of_parts(self.linear, *every)
            return (fused, None) if return_weights else fused
        assert self.fuse is not None
        if self.pool is not None:  # one feature of all others, to be gated with
            modalities = [self.pool(modalities, present[:, None, 1:])]
            present = torch.cat([present[:, :1], present[:, 1:].any(1, keepdim=True)], 1)
        return self.fuse([first, *modalities], present[:, None], return_weights=return_weights)


def _look(added: nn.ModuleList, index: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Let a layer of a decoder see the context of the decoder's call. What is at `index` may be wrapped later."""
    pair = kwargs.pop("cross_attention_context", None)
    if pair is None:
        return args, kwargs
    context, present = pair
    hidden_states = args[0] if args else kwargs["hidden_states"]
    hi = present.sum(1, dtype=torch.int32)[:, None].expand(-1, hidden_states.shape[1])  # what is there comes first
    hidden_states = added[index](hidden_states, context, IntervalMask(torch.zeros_like(hi), hi))
    return ((hidden_states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden_states})


def _pass(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Keep the context of a call from a layer without cross-attention."""
    kwargs.pop("cross_attention_context", None)
    return args, kwargs


def add_cross_attention(language_model: nn.Module, interval: int) -> nn.ModuleList:
    """Put gated cross-attention before every `interval`-th layer of a decoder of transformers, from the first on.

    The layers are hooked, so that the decoder's state dict stays its own; `language_model(...)` takes
    ``cross_attention_context=(context [B, N, H], present [B, N])`` then.

    Raises:
        ValueError: for a decoder that has no list of layers, or does not hand keyword arguments to them.
    """
    layers: Any = getattr(language_model, "layers", None)
    config: Any = language_model.config
    if not isinstance(layers, nn.ModuleList) or not hasattr(config, "num_key_value_heads"):
        raise ValueError(
            f"gated_cross_attention needs a decoder with `layers` and grouped heads, such as Llama or Qwen, got "
            f"{type(language_model).__name__}"
        )
    added = nn.ModuleList()
    for i, layer in enumerate(layers):
        if i % interval:
            layer.register_forward_pre_hook(_pass, with_kwargs=True)
            continue
        layer.register_forward_pre_hook(partial(_look, added, len(added)), with_kwargs=True)
        added.append(
            GatedCrossAttentionLayer(
                config.hidden_size,
                config.num_attention_heads,
                config.intermediate_size,
                num_key_value_heads=config.num_key_value_heads,
            )
        )
    return added


def merge_tokens(inputs_embeds: Tensor, input_ids: Tensor, token_id: int, features: Tensor, modality: str) -> Tensor:
    """Replace the embeddings of placeholder tokens by features, in order.

    Args:
        inputs_embeds: ``[B, T, H]``.
        input_ids: ``[B, T]``.
        token_id: The placeholder.
        features: ``[num_items, tokens per item, H]``.
        modality: For messages.

    Raises:
        ValueError: on a CPU, if placeholders and feature tokens differ in number. On CUDA looking would stall the
            device: there a device-side assertion fails instead.
    """
    rows = features.reshape(-1, features.shape[-1]).to(inputs_embeds.dtype)
    try:
        return scatter_features(inputs_embeds, input_ids, {token_id: rows})
    except ValueError as error:
        raise ValueError(f"{modality} ({features.shape[0]} items of {features.shape[1]} tokens): {error}") from error
