"""The ops. What each means is in its own module: the reference there is the definition."""

from mmlm_fast.ops.concat_linear import concat_linear
from mmlm_fast.ops.fuse_modalities import fuse_modalities
from mmlm_fast.ops.interval_attention import interval_attention, interval_attention_varlen

__all__ = ["concat_linear", "fuse_modalities", "interval_attention", "interval_attention_varlen"]
