"""Layers over the ops, with the state dict of what they replace."""

from mmlm_fast.nn.attention import CrossAttention, GatedCrossAttention, GatedCrossAttentionLayer, MultiheadSelfAttention
from mmlm_fast.nn.embedding import MergedEmbedding, PatchEmbedding
from mmlm_fast.nn.fusion import ConcatLinear, DecisionFusion, FuseModalities
from mmlm_fast.nn.lazy_logits import LazyLinear, LazyLogits
from mmlm_fast.nn.losses import ClipLoss, LinearCrossEntropyLoss, SiglipLoss
from mmlm_fast.nn.mlp import MLP, GatedMLP
from mmlm_fast.nn.norms import LayerNorm, RMSNorm
from mmlm_fast.nn.projectors import IdeficsProjector, InternVLProjector, LlavaProjector, PatchMerger
from mmlm_fast.nn.rotary import RotaryEmbedding, VisionRotaryEmbedding

__all__ = [
    "MLP",
    "ClipLoss",
    "ConcatLinear",
    "CrossAttention",
    "DecisionFusion",
    "FuseModalities",
    "GatedCrossAttention",
    "GatedCrossAttentionLayer",
    "GatedMLP",
    "IdeficsProjector",
    "InternVLProjector",
    "LayerNorm",
    "LazyLinear",
    "LazyLogits",
    "LinearCrossEntropyLoss",
    "LlavaProjector",
    "MergedEmbedding",
    "MultiheadSelfAttention",
    "PatchEmbedding",
    "PatchMerger",
    "RMSNorm",
    "RotaryEmbedding",
    "SiglipLoss",
    "VisionRotaryEmbedding",
]
