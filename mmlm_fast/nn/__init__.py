"""Layers over mmlm_fast.ops: drop-ins, state_dict-compatible with what they replace."""

from mmlm_fast.nn.fusion import ConcatLinear, FuseModalities

__all__ = ["ConcatLinear", "FuseModalities"]
