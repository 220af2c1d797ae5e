"""Features of pictures and clips, any number a sample, from towers and projectors; and what is made of their tokens."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mmlm_fast.models.configuration import CONFIG_OF, MMLMConfig, width_of
from mmlm_fast.models.fusion import MMLMProjector
from mmlm_fast.models.towers import make_tower, tokens_of

VALUES = {"image": "pixel_values", "audio": "input_features"}
ITEM_DIMS = {"image": 3, "audio": 2}


def make_projector(config: MMLMConfig, width: int) -> nn.Module:
    """Make what leads from a tower's width to that in which modalities meet."""
    assert config.hidden_size is not None
    if config.projector_layers == 2:
        return MMLMProjector(width, config.hidden_size, config.projector_hidden_act)
    if config.projector_layers == 1:
        return nn.Linear(width, config.hidden_size)
    if width != config.hidden_size:
        raise ValueError(f"projector_layers=0 needs towers of width {config.hidden_size}, got one of {width}")
    return nn.Identity()


def add_towers(module: nn.Module, config: MMLMConfig) -> None:
    """Give `module` the towers of pictures and sound and their projectors, by the names LLaVA uses."""
    for modality, tower, projector in (
        ("image", "vision_tower", "multi_modal_projector"),
        ("audio", "audio_tower", "audio_projector"),
    ):
        if modality in (config.modalities or ()):
            tower_config: Any = getattr(config, CONFIG_OF[modality])
            setattr(module, tower, make_tower(tower_config))
            setattr(module, projector, make_projector(config, width_of(tower_config)))


def encode_items(
    tower: nn.Module, projector: nn.Module, values: Tensor, mask: Tensor | None, modality: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Make features of pictures or clips, one or several a sample.

    Args:
        values: ``[B, *item]`` or ``[B, F, *item]``: F frames, pictures or chunks of sound.
        mask: Bool ``[B]`` or ``[B, F]``, False for fillers; None: all are there.

    Returns:
        The tower's tokens ``[B·F, n, width]``, the projected ones ``[B, F·n, H]``, and which are there,
        bool ``[B, F·n]``.
    """
    name, dims = VALUES[modality], ITEM_DIMS[modality]
    if values.dim() not in (dims + 1, dims + 2):
        raise ValueError(f"{name} must have {dims + 1} or {dims + 2} dimensions, got {tuple(values.shape)}")
    leading = values.shape[: values.dim() - dims]
    mask = as_mask(mask, leading, values.device, modality)
    states = tokens_of(tower, values.flatten(0, 1) if len(leading) == 2 else values)
    features = projector(states)
    present = mask.reshape(-1, 1).expand(-1, features.shape[1]).reshape(leading[0], -1)
    return states, features.reshape(leading[0], -1, features.shape[-1]), present


def as_mask(mask: Tensor | None, shape: Iterable[int], device: torch.device, modality: str) -> Tensor:
    """Return the mask of items of `shape`, all True for None, once it is seen to be one."""
    shape = tuple(shape)
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    if mask.shape != shape or mask.dtype != torch.bool:
        raise ValueError(f"{modality}_mask must be bool of shape {shape}, got {mask.dtype} {tuple(mask.shape)}")
    return mask


def masked_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Take the mean over the tokens that are there: ``[B, N, H]`` and bool ``[B, N]`` to ``[B, H]``; zeros for none."""
    weight = mask.to(tokens.dtype) / mask.sum(1, keepdim=True).clamp(min=1).to(tokens.dtype)
    return (weight[:, None] @ torch.where(mask[..., None], tokens, 0))[:, 0]


def last_token(states: Tensor, mask: Tensor | None) -> Tensor:
    """Take the state of the last token that is there: ``[B, N, H]`` to ``[B, H]``."""
    if mask is None:
        return states[:, -1]
    positions = torch.arange(states.shape[1], device=states.device)
    last = torch.where(mask.bool(), positions, -1).amax(1).clamp(min=0)
    return states[torch.arange(states.shape[0], device=states.device), last]


def join_tokens(parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Put tokens ``[B, N, H]`` of several modalities end to end, what is missing behind what is there.

    Returns:
        ``[B, ΣN, H]``, zeros where nothing is, and bool ``[B, ΣN]``, True in front.
    """
    parts = list(parts)
    tokens = torch.cat([torch.where(mask[..., None], x, 0) for x, mask in parts], 1)
    mask = torch.cat([mask for _, mask in parts], 1)
    order = mask.int().argsort(dim=1, descending=True, stable=True)
    return tokens.gather(1, order[..., None].expand_as(tokens)), mask.gather(1, order)
