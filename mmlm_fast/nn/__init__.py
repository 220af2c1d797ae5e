"""Layers over the ops, with the state dict of what they replace."""

from mmlm_fast.nn.attention import CrossAttention, GatedCrossAttention, MultiheadSelfAttention
from mmlm_fast.nn.fusion import ConcatLinear, FuseModalities

__all__ = ["ConcatLinear", "CrossAttention", "FuseModalities", "GatedCrossAttention", "MultiheadSelfAttention"]
