"""The ops. What each means is in its own module: the reference there is the definition."""

from mmlm_fast.ops.add_norm import add_norm
from mmlm_fast.ops.clip_loss import clip_loss
from mmlm_fast.ops.concat_linear import concat_linear
from mmlm_fast.ops.fuse_modalities import fuse_modalities
from mmlm_fast.ops.gated_add import gated_add
from mmlm_fast.ops.glu import bias_act, glu
from mmlm_fast.ops.interval_attention import interval_attention, interval_attention_varlen
from mmlm_fast.ops.linear_cross_entropy import linear_cross_entropy
from mmlm_fast.ops.merge_embeddings import merge_embeddings, scatter_features
from mmlm_fast.ops.norm_pixel_shuffle import norm_pixel_shuffle, patch_merge
from mmlm_fast.ops.patch_embed import patch_embed, patchify
from mmlm_fast.ops.qk_norm_rope import qk_norm_rope, rope_tables
from mmlm_fast.ops.siglip_loss import siglip_loss

__all__ = [
    "add_norm",
    "bias_act",
    "clip_loss",
    "concat_linear",
    "fuse_modalities",
    "gated_add",
    "glu",
    "interval_attention",
    "interval_attention_varlen",
    "linear_cross_entropy",
    "merge_embeddings",
    "norm_pixel_shuffle",
    "patch_embed",
    "patch_merge",
    "patchify",
    "qk_norm_rope",
    "rope_tables",
    "scatter_features",
    "siglip_loss",
]
