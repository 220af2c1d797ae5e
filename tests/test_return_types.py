"""What a call returns follows from its flags, for mypy (`make lint` reads this file) and when it runs."""

from typing import assert_type

import torch
from torch import Tensor

from mmlm_fast import nn, ops
from mmlm_fast.models.fusion import MMLMFusion
from mmlm_fast.ops.interval_attention import interval_attention_ref

X = torch.randn(2, 1, 8)
FLAG = bool(torch.ones(()))


def is_pair(out: object) -> bool:
    return isinstance(out, tuple) and len(out) == 2


def test_attention_with_its_log_sum_exp() -> None:
    heads = torch.randn(1, 2, 3, 8)
    for attend in (ops.interval_attention, interval_attention_ref):
        assert isinstance(attend(heads, heads, heads), Tensor)
        assert is_pair(attend(heads, heads, heads, return_lse=True))
    assert_type(ops.interval_attention(heads, heads, heads), Tensor)
    assert_type(ops.interval_attention(heads, heads, heads, None, return_lse=False), Tensor)
    assert_type(ops.interval_attention(heads, heads, heads, return_lse=True), tuple[Tensor, Tensor])
    assert_type(ops.interval_attention(heads, heads, heads, return_lse=FLAG), Tensor | tuple[Tensor, Tensor])
    assert_type(interval_attention_ref(heads, heads, heads), Tensor)
    assert_type(interval_attention_ref(heads, heads, heads, return_lse=True), tuple[Tensor, Tensor])


def test_fusion_with_its_weights() -> None:
    fused = assert_type(ops.fuse_modalities([X, X], "mean"), Tensor)
    both = assert_type(ops.fuse_modalities([X, X], "mean", return_weights=True), tuple[Tensor, Tensor])
    assert isinstance(fused, Tensor)
    assert is_pair(both)
    assert_type(ops.fuse_modalities([X, X], "mean", return_weights=FLAG), Tensor | tuple[Tensor, Tensor])
    module = nn.FuseModalities("weighted", 8)
    fused = assert_type(module.forward([X, X]), Tensor)
    both = assert_type(module.forward([X, X], return_weights=True), tuple[Tensor, Tensor])
    assert isinstance(fused, Tensor)
    assert is_pair(both)
    assert_type(module.forward([X, X], return_weights=FLAG), Tensor | tuple[Tensor, Tensor])


def test_a_models_fusion_with_its_weights() -> None:
    present = torch.ones(2, 2, dtype=torch.bool)
    for fusion in ("concat", "mean"):
        module = MMLMFusion(fusion, 8, 1)
        fused = assert_type(module.forward(X, X, present), Tensor)
        both = assert_type(module.forward(X, X, present, return_weights=True), tuple[Tensor, Tensor | None])
        assert isinstance(fused, Tensor)
        assert is_pair(both)
        assert (both[1] is None) == (fusion == "concat")


def test_norms_with_a_residual() -> None:
    residual: Tensor | None = X if FLAG else None
    for norm in (nn.RMSNorm(8), nn.LayerNorm(8)):
        assert isinstance(norm.forward(X), Tensor)
        assert is_pair(norm.forward(X, X))
    assert_type(nn.RMSNorm(8).forward(X), Tensor)
    assert_type(nn.RMSNorm(8).forward(X, X), tuple[Tensor, Tensor])
    assert_type(nn.RMSNorm(8).forward(X, residual), Tensor | tuple[Tensor, Tensor])
    assert_type(nn.LayerNorm(8).forward(X), Tensor)
    assert_type(nn.LayerNorm(8).forward(X, X), tuple[Tensor, Tensor])
    assert_type(nn.LayerNorm(8).forward(X, residual), Tensor | tuple[Tensor, Tensor])


def test_a_graph_takes_the_flags() -> None:
    norm = nn.LayerNorm(8)

    def call(x: Tensor) -> Tensor:
        fused, weights = ops.fuse_modalities([x, x], "mean", return_weights=True)
        normed, total = norm.forward(fused, x)
        return normed + total + weights.sum()

    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(X), call(X))
