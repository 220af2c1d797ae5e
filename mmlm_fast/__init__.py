"""Custom kernels for multimodal language models.

Importing does no work: no kernel is compiled, no device touched, neither Triton nor a GPU needed, nor torch, until
something that needs it is asked for. As soon as torch is loaded, our ops are registered with it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mmlm_fast._doctor import doctor
from mmlm_fast._registration import import_torch, register_ops
from mmlm_fast._version import __version__

if TYPE_CHECKING:
    from mmlm_fast.hf import accelerate
    from mmlm_fast.ops.paths import reference

__all__ = ["__version__", "accelerate", "doctor", "reference"]
_NEED_TORCH = ("distributed", "hf", "masks", "models", "nn", "ops", "positions", "testing", "training")

register_ops()


def __getattr__(name: str) -> Any:
    if name in ("accelerate", "reference", *_NEED_TORCH):
        import_torch()
    if name == "accelerate":  # needs transformers, whose import takes seconds
        from mmlm_fast.hf import accelerate

        return accelerate
    if name == "reference":
        from mmlm_fast.ops.paths import reference

        return reference
    if name in ("audio", "core", *_NEED_TORCH):
        return import_module(f"mmlm_fast.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
