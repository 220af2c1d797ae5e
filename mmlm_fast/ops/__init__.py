"""Functional API: one module per op."""

from mmlm_fast.ops.concat_linear import concat_linear
from mmlm_fast.ops.fuse_modalities import fuse_modalities

__all__ = ["concat_linear", "fuse_modalities"]
