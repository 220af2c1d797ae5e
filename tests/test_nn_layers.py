"""Each layer beside the module it replaces: the original's state dict, the same outputs and gradients."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    Gemma3TextConfig,
    Idefics3Config,
    InternVLConfig,
    LlamaConfig,
    LlavaConfig,
    Phi3Config,
    PixtralVisionConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3Config,
    Qwen3VLConfig,
)
from transformers.models.clip.modeling_clip import CLIPMLP
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP, Gemma3RMSNorm
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.models.pixtral.modeling_pixtral import PixtralVisionRotaryEmbedding
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPatchMerger, Qwen2_5_VLRotaryEmbedding
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    PatchMerger as Qwen2VLPatchMerger,
)
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VLVisionRotaryEmbedding,
    VisionMlp,
    apply_rotary_pos_emb_vision,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding, Qwen3VLVisionPatchMerger

from mmlm_fast import nn as fast
from mmlm_fast import testing
from mmlm_fast.masks import IntervalMask
from mmlm_fast.positions import vision_positions

pytestmark = pytest.mark.usefixtures("native")


def same(ours: nn.Module, theirs: nn.Module, *inputs, dtype=torch.float32) -> None:
    """`ours` after loading `theirs`: outputs and every gradient within the accuracy rule."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn(p.shape) * (p.shape[-1] ** -0.5 if p.dim() > 1 else 1.0))
    ours.load_state_dict(theirs.state_dict())
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
    exact_module = copy.deepcopy(theirs).double()
    results = []
    for module in (ours, theirs, exact_module):
        wide = module is exact_module
        args = [x.double() if wide and x.is_floating_point() else x.clone() for x in inputs]
        for a in args:
            if a.is_floating_point():
                a.requires_grad_()
        out = module(*args)
        out = out[0] if isinstance(out, tuple) else out
        torch.manual_seed(2)
        grad = torch.randn(out.shape).to(dtype).to(out.dtype)
        leaves = [*(a for a in args if a.requires_grad), *module.parameters()]
        results.append((out.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(out, leaves, grad)])))
    mine, twin, exact = results
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]  # gradients in one order
    assert testing.difference(mine[0], twin[0], exact[0]).ok
    assert testing.difference(mine[1], twin[1], exact[1]).ok


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@DTYPES
def test_norms(dtype):
    x = torch.randn(3, 5, 48)
    same(fast.RMSNorm(48, 1e-5), LlamaRMSNorm(48, 1e-5), x, dtype=dtype)
    same(fast.RMSNorm(48, 1e-6, offset=1.0), Gemma3RMSNorm(48, 1e-6), x, dtype=dtype)
    same(fast.RMSNorm(48, 1e-6), Qwen3RMSNorm(48, 1e-6), x, dtype=dtype)
    same(fast.LayerNorm(48, eps=1e-6), nn.LayerNorm(48, eps=1e-6), x, dtype=dtype)


def test_norms_keep_the_promotion_of_the_original():
    x = torch.randn(4, 16, dtype=torch.bfloat16)
    for ours, theirs in ((fast.RMSNorm(16), LlamaRMSNorm(16)), (fast.RMSNorm(16, offset=1.0), Gemma3RMSNorm(16))):
        wide = x.double()
        exact = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        assert testing.difference(ours(x), theirs(x), exact).ok  # which compares dtypes too; both weights are 1
    with torch.autocast("cpu", torch.bfloat16):
        assert fast.LayerNorm(16)(x).dtype == nn.LayerNorm(16)(x).dtype


def test_norms_with_residual():
    x, residual = torch.randn(2, 8), torch.randn(2, 8)
    for norm in (fast.RMSNorm(8), fast.LayerNorm(8)):
        out, total = norm(x, residual)
        torch.testing.assert_close(total, x + residual)
        torch.testing.assert_close(out, norm(x + residual))


@DTYPES
def test_gated_mlps(dtype):
    x = torch.randn(2, 5, 32)
    llama = LlamaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4)
    same(fast.GatedMLP(32, 48), LlamaMLP(llama), x, dtype=dtype)
    gemma = Gemma3TextConfig(hidden_size=32, intermediate_size=48, hidden_activation="gelu_pytorch_tanh")
    same(fast.GatedMLP(32, 48, "gelu_pytorch_tanh"), Gemma3MLP(gemma), x, dtype=dtype)
    phi = Phi3Config(hidden_size=32, intermediate_size=48, pad_token_id=0)
    same(fast.GatedMLP(32, 48, packed=True), Phi3MLP(phi), x, dtype=dtype)


def test_gated_mlp_loads_either_layout():
    x = torch.randn(3, 16)
    packed, apart = fast.GatedMLP(16, 24, packed=True), fast.GatedMLP(16, 24)
    apart.load_state_dict(packed.state_dict())
    torch.testing.assert_close(apart(x), packed(x))
    again = fast.GatedMLP(16, 24, packed=True)
    again.load_state_dict(apart.state_dict())
    assert again.gate_up_proj.weight.equal(packed.gate_up_proj.weight)


@DTYPES
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_pytorch_tanh"])
def test_mlps(dtype, activation):
    x = torch.randn(2, 5, 32)
    clip = CLIPVisionConfig(hidden_size=32, intermediate_size=48, hidden_act=activation, num_attention_heads=4)
    same(fast.MLP(32, 48, activation), CLIPMLP(clip), x, dtype=dtype)
    same(fast.MLP(32, 48, activation), VisionMlp(32, 48, activation), x, dtype=dtype)


@DTYPES
def test_projectors(dtype):
    vision = dict(hidden_size=32, image_size=28, patch_size=14, num_attention_heads=2, num_hidden_layers=1)
    llava = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision), text_config=LlamaConfig(hidden_size=48, num_attention_heads=4)
    )
    same(fast.LlavaProjector(32, 48), LlavaMultiModalProjector(llava), torch.randn(2, 9, 32), dtype=dtype)
    idefics = Idefics3Config(
        vision_config={"hidden_size": 32, "num_attention_heads": 4},
        text_config={"hidden_size": 48, "num_attention_heads": 4},
        scale_factor=2,
    )
    same(fast.IdeficsProjector(32, 48, 2), Idefics3Connector(idefics), torch.randn(2, 36, 32), dtype=dtype)


@DTYPES
def test_internvl_projector(dtype):
    config = InternVLConfig(
        vision_config={"hidden_size": 32, "num_attention_heads": 4},
        text_config={"hidden_size": 48, "num_attention_heads": 4, "model_type": "qwen2"},
    )

    class Original(nn.Module):
        """InternVLModel.get_image_features behind the tower."""

        def __init__(self):
            super().__init__()
            self.inner = InternVLMultiModalProjector(config)

        def forward(self, x):
            side = int(x.shape[1] ** 0.5)
            x = InternVLModel.pixel_shuffle(None, x.reshape(x.shape[0], side, side, -1), 0.5)
            return self.inner(x.reshape(x.shape[0], -1, x.shape[-1]))

        def state_dict(self, *args, **options):
            return self.inner.state_dict(*args, **options)

    same(fast.InternVLProjector(32, 48), Original(), torch.randn(2, 16, 32), dtype=dtype)


@DTYPES
def test_patch_mergers(dtype):
    x = torch.randn(24, 32)
    same(fast.PatchMerger(32, 48), Qwen2VLPatchMerger(48, 32), x, dtype=dtype)
    same(fast.PatchMerger(32, 48, norm="rms"), Qwen2_5_VLPatchMerger(48, 32), x, dtype=dtype)
    config = Qwen3VLConfig(vision_config={"hidden_size": 32, "out_hidden_size": 48}).vision_config
    same(fast.PatchMerger(32, 48), Qwen3VLVisionPatchMerger(config), x, dtype=dtype)
    same(fast.PatchMerger(32, 48, norm_at="after"), Qwen3VLVisionPatchMerger(config, True), x, dtype=dtype)


@DTYPES
def test_gated_cross_attention_layer(dtype):
    config = MllamaTextConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, num_hidden_layers=1,
        cross_attention_layers=[0], hidden_act="silu",
    )  # fmt: skip
    config._attn_implementation = "sdpa"

    class Original(MllamaCrossAttentionDecoderLayer):
        def forward(self, hidden_states, context):
            mask = hidden_states.new_zeros(2, 1, hidden_states.shape[1], context.shape[1])  # all is visible
            return super().forward(hidden_states, context, mask, None, None)

    ours = fast.GatedCrossAttentionLayer(32, 4, 48, num_key_value_heads=2, eps=config.rms_norm_eps)
    same(ours, Original(config, 0), torch.randn(2, 5, 32), torch.randn(2, 7, 32), dtype=dtype)


def test_layers_train_under_autocast():
    """Branches come in bfloat16 there, the residual stream stays in float32, as with the originals."""
    x, context = torch.randn(2, 5, 32, requires_grad=True), torch.randn(2, 7, 32)
    ids = torch.tensor([[1, 9, 2, 3, 4]] * 2)
    embedding, projector = fast.MergedEmbedding(9, 32), fast.LlavaProjector(16, 32)
    rotary, norm = fast.RotaryEmbedding(8), fast.RMSNorm(8)
    with torch.autocast("cpu", torch.bfloat16):
        out = fast.GatedCrossAttentionLayer(32, 4, 48)(x, context) + fast.GatedCrossAttention(32, 4)(x, context)
        out = fast.MLP(32, 64)(out) + fast.GatedMLP(32, 64)(out) + out
        out, total = fast.RMSNorm(32)(fast.GatedMLP(32, 64)(out), out)
        assert total.dtype == torch.float32
        merged = embedding(ids, {9: projector(torch.randn(2, 16))})
        assert merged.dtype == torch.float32
        query = nn.Linear(32, 32)(out).unflatten(-1, (4, 8)).transpose(1, 2)
        query, _ = rotary.rotate(query, query * 2, *rotary(torch.arange(5)[None]), q_norm=norm, k_norm=norm)
        loss = out.square().sum() + merged.square().sum() + query.float().square().sum()
    loss.backward()
    assert x.grad.isfinite().all()
    assert projector.linear_1.weight.grad.abs().sum() > 0


def test_a_token_that_sees_no_picture_passes_unchanged():
    layer = fast.GatedCrossAttentionLayer(16, 2, 24)
    with torch.no_grad():
        layer.cross_attn_attn_gate.fill_(0.7)
        layer.cross_attn_mlp_gate.fill_(0.7)
    mask = IntervalMask(torch.tensor([[0, 0, 0]], dtype=torch.int32), torch.tensor([[0, 4, 4]], dtype=torch.int32))
    x = torch.randn(2, 3, 16)
    out = layer(x, torch.randn(2, 4, 16), mask)
    assert out[:, 0].equal(x[:, 0])
    assert not torch.allclose(out[:, 1:], x[:, 1:])


@DTYPES
def test_rotary_embeddings(dtype):
    query = torch.randn(2, 3, 6, 32).to(dtype)
    axes = torch.randint(0, 40, (3, 2, 6))
    llama = LlamaConfig(hidden_size=128, num_attention_heads=4)
    yarn = Qwen3Config(
        hidden_size=128, num_attention_heads=4, head_dim=32, max_position_embeddings=64,
        rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16},
    )  # fmt: skip
    text = dict(hidden_size=128, num_attention_heads=4, head_dim=32)
    qwen2_5 = Qwen2_5_VLConfig(
        text_config=text | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}}
    ).text_config
    qwen3 = Qwen3VLConfig(
        text_config=text | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 4, 4]}}
    ).text_config
    for theirs, positions in (
        (LlamaRotaryEmbedding(llama), axes[0]),
        (LlamaRotaryEmbedding(yarn), axes[0]),
        (Qwen2_5_VLRotaryEmbedding(qwen2_5), axes),
        (Qwen3VLTextRotaryEmbedding(qwen3), axes),
    ):
        ours = fast.RotaryEmbedding.from_transformers(theirs)
        exact = apply_rotary_pos_emb(query.double(), query.double(), *theirs(query.double(), positions))[0]
        twin = apply_rotary_pos_emb(query, query, *theirs(query, positions))[0]
        out = ours.rotate(query, None, *ours(positions))[0]
        assert testing.difference(out, twin, exact).ok, type(theirs).__name__
        wrong = ours.rotate(query, None, *ours(positions + 1))[0]
        assert not testing.difference(wrong, twin, exact).ok
    assert "inv_freq" not in ours.state_dict()


def test_rotary_of_llama_without_transformers():
    ours = fast.RotaryEmbedding(32, base=10000.0)
    theirs = LlamaRotaryEmbedding(LlamaConfig(hidden_size=128, num_attention_heads=4))
    torch.testing.assert_close(ours.inv_freq, theirs.inv_freq)
    theirs.rope_type = "dynamic"
    with pytest.raises(ValueError, match="must not change with the length, got rope_type 'dynamic'"):
        fast.RotaryEmbedding.from_transformers(theirs)


@DTYPES
def test_rotate_with_norms(dtype):
    """Qwen3: q_norm and k_norm of the heads, then the rotation."""
    query, key = torch.randn(2, 4, 6, 32).to(dtype), torch.randn(2, 2, 6, 32).to(dtype)
    ours = fast.RotaryEmbedding(32)
    norms = [fast.RMSNorm(32).to(dtype) for _ in range(2)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.normal_()
    cos, sin = (t.to(dtype) for t in ours(torch.arange(6)[None]))
    full = [torch.cat([t, t], -1) for t in (cos, sin)]

    def original(query, key, *weights):
        heads = []
        for x, w in zip((query, key), weights, strict=True):
            norm = Qwen3RMSNorm(32)
            norm.weight = nn.Parameter(w)
            # Qwen3RMSNorm computes in float32 whatever comes: the formula itself in float64.
            wide = x if x.dtype == torch.float64 else x.float()
            unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.variance_epsilon)
            heads.append(w * unit.to(x.dtype))
        return apply_rotary_pos_emb(*heads, *(t.to(query.dtype) for t in full))

    out = ours.rotate(query, key, cos, sin, q_norm=norms[0], k_norm=norms[1])
    testing.assert_close_to_reference(out, original, query, key, *(n.weight.detach() for n in norms))


@DTYPES
def test_vision_rotary_embedding(dtype):
    config = Qwen2VLConfig(vision_config={"embed_dim": 128, "num_heads": 4}).vision_config
    theirs = Qwen2VLVisionRotaryEmbedding(config)
    ours = fast.VisionRotaryEmbedding(32, base=config.rope_parameters["rope_theta"], spatial_merge_size=2)
    grid = torch.tensor([[1, 4, 6], [1, 2, 2]])
    positions = vision_positions(grid, 2)
    query = torch.randn(28, 4, 32).to(dtype)
    tables = theirs(query, positions[:, 0].T)
    twin = apply_rotary_pos_emb_vision(query, query, *tables)[0]
    wide = theirs(query.double(), positions[:, 0].T)
    q = query.double()
    half = torch.cat([-q[..., 16:], q[..., :16]], -1)
    exact = q * wide[0].unsqueeze(-2) + half * wide[1].unsqueeze(-2)  # the function itself computes in float32
    out = ours.rotate(query.transpose(0, 1)[None], None, *ours.from_grid(grid))[0]
    assert testing.difference(out[0].transpose(0, 1), twin, exact).ok


def test_vision_rotary_embedding_of_pixtral():
    config = PixtralVisionConfig(hidden_size=128, num_attention_heads=4, head_dim=32)
    theirs = PixtralVisionRotaryEmbedding(config)
    positions = torch.randint(0, 30, (2, 1, 9))
    ours = fast.VisionRotaryEmbedding(32, base=config.rope_parameters["rope_theta"], alternate=True)
    for table, full in zip(ours(positions), theirs(torch.zeros(1), positions[:, 0].T), strict=True):
        torch.testing.assert_close(table[0], full[:, :16])


@DTYPES
def test_merged_embedding(dtype):
    ids = torch.tensor([[1, 9, 9, 2], [0, 9, 3, 3]])
    same(fast.MergedEmbedding(9, 16, 0), nn.Embedding(9, 16, 0), ids.clamp(max=3), dtype=dtype)
    ours = fast.MergedEmbedding(9, 16, scale=4.0).to(dtype)
    rows = torch.randn(3, 16).to(dtype)
    out = ours(ids, {9: rows})
    assert out[ids == 9].equal(rows)
    torch.testing.assert_close(out[0, 0], ours.weight[1] * 4)


@pytest.mark.parametrize("frames", [None, 2])
def test_patch_embedding(frames):
    """Beside the convolution behind an image processor's arithmetic."""
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    size = (4, 4) if frames is None else (frames, 4, 4)
    conv = (nn.Conv2d if frames is None else nn.Conv3d)(3, 8, size, size)

    class Original(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = conv.weight, conv.bias

        def forward(self, pixels):
            wide = self.weight.dtype
            m, s = (torch.tensor(t, dtype=wide).view(3, 1, 1) for t in (mean, std))
            x = (pixels.to(wide) / 255 - m) / s
            if frames is None:
                return nn.functional.conv2d(x, self.weight, self.bias, size).flatten(2).mT
            x = x[:, :, None].expand(-1, -1, frames, -1, -1)
            return nn.functional.conv3d(x, self.weight, self.bias, size).flatten(2).mT

    ours = fast.PatchEmbedding(3, 8, 4, mean=mean, std=std, temporal_patch_size=frames)
    same(ours, Original(), torch.randint(0, 256, (2, 3, 12, 8), dtype=torch.uint8))


def test_decision_fusion():
    logits = [torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.0, 0.5]])]
    likely = [x.softmax(-1) for x in logits]
    torch.testing.assert_close(fast.DecisionFusion("mean")(logits), (likely[0] + likely[1]) / 2)
    weighted = fast.DecisionFusion("weighted")
    with torch.no_grad():
        weighted.weight.copy_(torch.tensor([1.0, -1.0]))
    a = torch.tensor([1.0, -1.0]).softmax(0)
    out = weighted(logits)
    torch.testing.assert_close(out, a[0] * likely[0] + a[1] * likely[1])
    assert torch.autograd.grad(out[0, 0], weighted.weight)[0].abs().sum() > 0
    # One vote each: the surer modality decides; three against one: the majority does, however sure the one is.
    vote = fast.DecisionFusion("vote")(logits)
    assert vote.argmax(-1).tolist() == [1, 1]
    torch.testing.assert_close(vote.sum(-1), torch.ones(2))
    many = [torch.tensor([[0.2, 0.0, 0.0]])] * 3 + [torch.tensor([[0.0, 9.0, 0.0]])]
    assert fast.DecisionFusion("vote", 4)(many).argmax().item() == 0
    present = torch.tensor([[True, False], [False, False]])
    for mode in ("mean", "weighted", "vote"):
        out = fast.DecisionFusion(mode)(logits, present)
        assert (out[1] == 0).all()
        assert out[0].argmax() == 0
    with pytest.raises(ValueError, match="mode must be one of mean, weighted, vote, got 'sum'"):
        fast.DecisionFusion("sum")
    with pytest.raises(ValueError, match="logits must be 2 tensors, got 1"):
        fast.DecisionFusion("mean")(logits[:1])


def test_errors():
    with pytest.raises(ValueError, match="activation must be one of silu"):
        fast.GatedMLP(4, 8, "tanh")
    with pytest.raises(ValueError, match="square of patches"):
        fast.IdeficsProjector(4, 8, 2)(torch.zeros(1, 6, 4))
    with pytest.raises(ValueError, match="norm must be layer or rms"):
        fast.PatchMerger(4, 8, norm="batch")
    with pytest.raises(ValueError, match="rotary_dim must be even and at most head_dim 8, got 10"):
        fast.RotaryEmbedding(8, rotary_dim=10)
    with pytest.raises(ValueError, match="head_dim must be divisible by 4"):
        fast.VisionRotaryEmbedding(6)
