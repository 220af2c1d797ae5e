"""Custom kernels for multimodal language models.

Importing does no work: no kernel is compiled, no device touched, neither Triton nor a GPU needed.
"""

from mmlm_fast.doctor import doctor
from mmlm_fast.ops._registry import reference

__version__ = "0.1.0"
__all__ = ["__version__", "doctor", "reference"]
