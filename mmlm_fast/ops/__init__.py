"""The ops. What each means is in its own module: the reference there is the definition."""

from types import FunctionType as _FunctionType

from mmlm_fast.ops.add_norm import add_norm as add_norm
from mmlm_fast.ops.clip_loss import clip_loss as clip_loss
from mmlm_fast.ops.concat_linear import concat_linear as concat_linear
from mmlm_fast.ops.fuse_modalities import fuse_modalities as fuse_modalities
from mmlm_fast.ops.gated_add import gated_add as gated_add
from mmlm_fast.ops.glu import bias_act as bias_act
from mmlm_fast.ops.glu import glu as glu
from mmlm_fast.ops.interval_attention import interval_attention as interval_attention
from mmlm_fast.ops.interval_attention import interval_attention_varlen as interval_attention_varlen
from mmlm_fast.ops.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from mmlm_fast.ops.merge_embeddings import merge_embeddings as merge_embeddings
from mmlm_fast.ops.merge_embeddings import scatter_features as scatter_features
from mmlm_fast.ops.norm_pixel_shuffle import norm_pixel_shuffle as norm_pixel_shuffle
from mmlm_fast.ops.norm_pixel_shuffle import patch_merge as patch_merge
from mmlm_fast.ops.patch_embed import patch_embed as patch_embed
from mmlm_fast.ops.patch_embed import patchify as patchify
from mmlm_fast.ops.qk_norm_rope import qk_norm_rope as qk_norm_rope
from mmlm_fast.ops.qk_norm_rope import rope_tables as rope_tables
from mmlm_fast.ops.siglip_loss import siglip_loss as siglip_loss

__all__ = [name for name, thing in list(globals().items()) if isinstance(thing, _FunctionType)]
