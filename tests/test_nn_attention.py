"""Each layer beside the module it replaces: its state dict, its outputs, its gradients."""

import pytest
import torch
from torch import nn

from mmlm_fast.masks import IntervalMask
from mmlm_fast.nn import CrossAttention, GatedCrossAttention, GatedCrossAttentionLayer, MultiheadSelfAttention


def same(ours, theirs, *inputs):
    """Outputs and all gradients, parameters' too (by order: names may differ)."""
    results = []
    for f in (ours, theirs):
        copies = [x.clone().requires_grad_() for x in inputs]
        out = f(*copies)
        results.append((out, torch.autograd.grad((out * out.detach().cos()).sum(), copies)))
    torch.testing.assert_close(*results, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["full", "causal", "padded"])
def test_self_attention_is_multihead_attention(name, bias):
    theirs = nn.MultiheadAttention(24, 3, bias=bias, batch_first=True)
    if bias:
        nn.init.normal_(theirs.in_proj_bias)
    ours = MultiheadSelfAttention(24, 3, bias=bias)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    lengths = torch.tensor([11, 6])
    mask, options = None, {}
    if name == "causal":
        mask = IntervalMask.causal(11)
        options = {"attn_mask": ~mask.dense(11)[0]}
    elif name == "padded":
        mask = IntervalMask.padded(lengths, 11)
        options = {"key_padding_mask": torch.arange(11) >= lengths[:, None]}
    x = torch.randn(2, 11, 24)
    same(lambda x: ours(x, mask), lambda x: theirs(x, x, x, need_weights=False, **options)[0], x)
    loss = [f(x).square().sum() for f in (lambda x: ours(x, mask), lambda x: theirs(x, x, x, **options)[0])]
    torch.testing.assert_close(
        torch.autograd.grad(loss[0], list(ours.parameters())), torch.autograd.grad(loss[1], list(theirs.parameters())),
        atol=1e-5, rtol=1e-4,
    )  # fmt: skip


def test_self_attention_loads_separate_projections():
    from transformers.models.siglip.modeling_siglip import SiglipAttention, SiglipVisionConfig

    config = SiglipVisionConfig(hidden_size=24, num_attention_heads=3, attn_implementation="sdpa")
    theirs = SiglipAttention(config)
    ours = MultiheadSelfAttention(24, 3)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 9, 24)
    torch.testing.assert_close(ours(x), theirs(x)[0])
    state = CrossAttention(24, 3).state_dict()  # o_proj
    assert ours.load_state_dict(state).missing_keys == []
    assert "q_proj.weight" in state, "the caller's dict is untouched"


@pytest.mark.parametrize("kv_dim", [None, 40])
def test_cross_attention_is_multihead_attention(kv_dim):
    theirs = nn.MultiheadAttention(24, 3, kdim=kv_dim, vdim=kv_dim, batch_first=True)
    nn.init.normal_(theirs.in_proj_bias)
    ours = CrossAttention(24, 3, kv_dim=kv_dim)
    ours.load_state_dict(theirs.state_dict())
    x, context = torch.randn(2, 7, 24), torch.randn(2, 12, kv_dim or 24)
    same(ours, lambda x, c: theirs(x, c, c, need_weights=False)[0], x, context)
    again = CrossAttention(24, 3, kv_dim=kv_dim)
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again(x, context), ours(x, context))


def test_cross_attention_with_fewer_key_heads():
    layer = CrossAttention(24, 6, kv_dim=10, num_key_value_heads=2, head_dim=8, bias=False)
    assert layer.k_proj.weight.shape == (16, 10)
    x, context = torch.randn(2, 7, 24), torch.randn(2, 12, 10)
    q, k, v = (f(y).unflatten(-1, (-1, 8)).transpose(1, 2)
               for f, y in ((layer.q_proj, x), (layer.k_proj, context), (layer.v_proj, context)))  # fmt: skip
    expected = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(layer(x, context), layer.o_proj(expected.transpose(1, 2).flatten(2)))


def test_gated_cross_attention_of_the_latest_image():
    """The formula, with a dense mask; a token before the first image and a closed gate pass unchanged."""
    layer = GatedCrossAttention(24, 3, kv_dim=10)
    x, context = torch.randn(2, 7, 24), torch.randn(2, 8, 10)
    media = torch.zeros(2, 7, dtype=torch.bool)
    media[0, 2], media[0, 5], media[1, 0] = True, True, True
    mask = IntervalMask.latest_image(media, 4, num_images=2)
    assert torch.equal(layer(x, context, mask), x)
    nn.init.constant_(layer.gate, 0.7)
    normed = nn.functional.layer_norm(x, (24,))
    q, k, v = (f(y).unflatten(-1, (3, 8)).transpose(1, 2) for f, y in (
        (layer.attn.q_proj, normed), (layer.attn.k_proj, context), (layer.attn.v_proj, context)))  # fmt: skip
    scores = (q @ k.mT / 8**0.5).masked_fill(~mask.dense(8)[:, None], -torch.inf)
    attended = (scores.softmax(-1).nan_to_num(0) @ v).transpose(1, 2).flatten(2)
    expected = x + torch.tanh(torch.tensor(0.7)) * layer.attn.o_proj(attended)
    torch.testing.assert_close(layer(x, context, mask), expected)
    assert torch.equal(layer(x, context, mask)[0, :2], x[0, :2])


def test_a_context_with_room_behind_what_the_mask_shows():
    """Hidden context moves nothing, in any layer; a token whose images are all cut off passes unchanged."""
    x, context = torch.randn(1, 3, 24), torch.randn(1, 10, 24)
    filled = torch.cat([context[:, :6], torch.full((1, 4, 24), 1e3)], 1)
    mask = IntervalMask.full(3, 6)
    for layer in (CrossAttention(24, 2), GatedCrossAttention(24, 2), GatedCrossAttentionLayer(24, 2, 32)):
        for name, parameter in layer.named_parameters():
            if "gate" in name and parameter.numel() == 1:
                nn.init.constant_(parameter, 0.5)
        torch.testing.assert_close(layer(x, filled, mask), layer(x, context, mask))
    behind = IntervalMask(torch.full((1, 3), 10).int(), torch.full((1, 3), 12).int())
    assert torch.equal(layer(x, context, behind), x)


def test_compiles():
    layer = GatedCrossAttention(24, 3, norm=nn.RMSNorm(24))
    nn.init.constant_(layer.gate, 0.5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, context = torch.randn(2, 7, 24), torch.randn(2, 8, 24)
    mask = IntervalMask.padded(torch.tensor([3, 8]), 8, q_len=7)
    torch.testing.assert_close(compiled(x, context, mask), layer(x, context, mask))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MultiheadSelfAttention(24, 5), "num_heads must divide embed_dim, got 5 for 24"),
        (lambda: CrossAttention(24, 4, num_key_value_heads=3), "must divide num_heads, got 3 for 4"),
        (lambda: MultiheadSelfAttention(24, 3)(torch.zeros(2, 24)), r"must be \[B, tokens, 24\], got \(2, 24\)"),
        (lambda: CrossAttention(24, 3)(torch.zeros(2, 3, 24), torch.zeros(2, 3, 8)), r"context must be \[B, tokens, 2"),
        (lambda: CrossAttention(24, 3)(torch.zeros(2, 3, 24), None), "got NoneType"),
    ],
)  # fmt: skip
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
