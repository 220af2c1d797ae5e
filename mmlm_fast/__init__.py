"""Custom kernels for multimodal language models.

Importing does no work: no kernel is compiled, no device touched, neither Triton nor a GPU needed.
"""

from typing import TYPE_CHECKING, Any

from mmlm_fast._doctor import doctor
from mmlm_fast._version import __version__
from mmlm_fast.ops.paths import reference

if TYPE_CHECKING:
    from mmlm_fast.hf import accelerate

__all__ = ["__version__", "accelerate", "doctor", "reference"]


def __getattr__(name: str) -> Any:
    if name == "accelerate":  # needs transformers, whose import takes seconds
        from mmlm_fast.hf import accelerate

        return accelerate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
