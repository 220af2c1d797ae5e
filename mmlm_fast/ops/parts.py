"""What ops are made of, for packages of ours that make ops of their own or work with gradients as ops do.

`Op` and `register_op` make an op, `differentiable` a backward pass made of kernels, `with_formed_gradients` a loss
whose gradients are formed in the forward pass.
"""

from mmlm_fast.ops._derivatives import differentiable, is_seen_through
from mmlm_fast.ops._formed import graph_is_kept, with_formed_gradients
from mmlm_fast.ops._op import RECORDS, Op
from mmlm_fast.ops._registry import autocast, num_tokens, register_op

__all__ = [
    "RECORDS",
    "Op",
    "autocast",
    "differentiable",
    "graph_is_kept",
    "is_seen_through",
    "num_tokens",
    "register_op",
    "with_formed_gradients",
]
