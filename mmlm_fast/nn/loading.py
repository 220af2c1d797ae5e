"""State dicts in other layouts, changed in place into a layer's own while it loads them."""

import torch


def rename(state_dict: dict, prefix: str, old: str, new: str) -> None:
    """``old.weight`` and ``old.bias`` under `prefix` become ``new``'s."""
    for kind in ("weight", "bias"):
        if f"{prefix}{old}.{kind}" in state_dict:
            state_dict[f"{prefix}{new}.{kind}"] = state_dict.pop(f"{prefix}{old}.{kind}")


def join(state_dict: dict, prefix: str, parts: tuple[str, ...], joined: str) -> None:
    """Weights and biases of `parts`, one below the other, become those of `joined`; names end before the kind."""
    for kind in ("weight", "bias"):
        names = [f"{prefix}{part}{kind}" for part in parts]
        if all(name in state_dict for name in names):
            state_dict[f"{prefix}{joined}{kind}"] = torch.cat([state_dict.pop(name) for name in names])


def split(state_dict: dict, prefix: str, joined: str, parts: tuple[str, ...]) -> None:
    """The other way."""
    for kind in ("weight", "bias"):
        tensor = state_dict.pop(f"{prefix}{joined}{kind}", None)
        if tensor is not None:
            names = [f"{prefix}{part}{kind}" for part in parts]
            state_dict.update(zip(names, tensor.chunk(len(parts)), strict=True))
