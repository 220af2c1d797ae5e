"""What is hung on a submodule works: adapters, hooks, parametrizations, pruning, quantisation. A fusion that reads a
submodule's parameters in place of calling it would pass them by."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from mmlm_fast import nn as fast
from mmlm_fast.models import MMLMForConditionalGeneration, MMLMForPreTraining, presets
from mmlm_fast.models.classification import MMLMClassificationHead
from mmlm_fast.models.configuration import MMLMConfig
from mmlm_fast.models.encoders import Encoded, MMLMJoin
from mmlm_fast.models.fusion import MMLMFusion, MMLMProjector
from mmlm_fast.models.towers import MMLMLSTMConfig, MMLMLSTMModel

peft = pytest.importorskip("peft", reason="peft is not installed")

H = 16
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:.*quantize_per_tensor"),
    pytest.mark.usefixtures("native"),
]


class Called(nn.Module):
    """A module with inputs of its own."""

    def __init__(self, inner, function):
        super().__init__()
        self.inner, self.function = inner, function

    def forward(self):
        return self.function(self.inner)


class Rotated(nn.Module):
    """Queries and keys of heads with a norm each, as a layer of Qwen3 has them."""

    def __init__(self):
        super().__init__()
        self.rotary, self.q_norm, self.k_norm = fast.RotaryEmbedding(H), fast.RMSNorm(H), fast.RMSNorm(H)

    def forward(self, query, key):
        tables = self.rotary(torch.arange(query.shape[2])[None])
        return torch.cat(self.rotary.rotate(query, key, *tables, q_norm=self.q_norm, k_norm=self.k_norm), 1)


def drawn(*shape):
    return torch.arange(math.prod(shape), dtype=torch.float32).mul(7.3).sin().mul(2).view(shape)


def join():
    text = dict(model_type="mmlm_lstm", hidden_size=H)
    image = dict(model_type="mmlm_mean", hidden_size=3)
    return MMLMJoin(MMLMConfig(text_config=text, vision_config=image, fusion="sequence", hidden_size=H))


def masked_language_modeling(inner):
    torch.manual_seed(5)  # draws what is hidden
    return inner(input_ids=torch.arange(40).view(2, 20) + 10).loss[None]


def pretraining():
    config = MMLMConfig(
        text_config=dict(model_type="mmlm_lstm", hidden_size=H, vocab_size=64),
        fusion="sequence",
        mask_token_id=5,
        text_mask_ratio=0.5,
    )
    return MMLMForPreTraining(config)


CASES = {
    "projector": lambda: Called(MMLMProjector(8, H, "gelu"), lambda m: m(drawn(2, 3, 8))),
    "concat": lambda: Called(
        MMLMFusion("concat", H, 1), lambda m: m(drawn(2, 3, H), drawn(2, 1, H), torch.ones(2, 2, dtype=torch.bool))
    ),
    "lstm": lambda: Called(
        MMLMLSTMModel(MMLMLSTMConfig(vocab_size=9, hidden_size=H, add_cross_attention=True)),
        lambda m: m(torch.tensor([[1, 2, 8]]), encoder_hidden_states=drawn(1, 4, H)).last_hidden_state,
    ),
    "join": lambda: Called(
        join(), lambda m: m({k: Encoded(drawn(2, n, H), torch.ones(2, n, dtype=torch.bool)) for k, n in ITEMS})[0]
    ),
    "pretraining": lambda: Called(pretraining(), masked_language_modeling),
    "head": lambda: Called(
        MMLMClassificationHead(MMLMConfig(num_labels=3), H), lambda m: m(drawn(4, H))
    ),
    "internvl": lambda: Called(fast.InternVLProjector(8, H), lambda m: m(drawn(2, 16, 8))),
    "idefics": lambda: Called(fast.IdeficsProjector(8, H, 2), lambda m: m(drawn(2, 16, 8))),
    "llava": lambda: Called(fast.LlavaProjector(8, H), lambda m: m(drawn(2, 3, 8))),
    "merger": lambda: Called(fast.PatchMerger(8, H), lambda m: m(drawn(16, 8))),
    "merger of sizes": lambda: Called(fast.PatchMerger(8, H), lambda m: m(drawn(24, 8), [(4, 4), (2, 4)])),
    "merger rms": lambda: Called(fast.PatchMerger(8, H, norm="rms"), lambda m: m(drawn(16, 8))),
    "merger after": lambda: Called(fast.PatchMerger(8, H, norm_at="after"), lambda m: m(drawn(16, 8))),
    "merger rms after": lambda: Called(
        fast.PatchMerger(8, H, norm="rms", norm_at="after"), lambda m: m(drawn(16, 8))
    ),
    "rotated": lambda: Called(Rotated(), lambda m: m(drawn(1, 2, 5, H), drawn(1, 2, 5, H) + 1)),
    "gated mlp": lambda: Called(fast.GatedMLP(H, 24), lambda m: m(drawn(3, H))),
    "packed mlp": lambda: Called(fast.GatedMLP(H, 24, packed=True), lambda m: m(drawn(3, H))),
    "mlp": lambda: Called(fast.MLP(H, 24), lambda m: m(drawn(3, H))),
    "self-attention": lambda: Called(fast.MultiheadSelfAttention(H, 2), lambda m: m(drawn(2, 5, H))),
    "gated layer": lambda: Called(
        fast.GatedCrossAttentionLayer(H, 2, 24), lambda m: m(drawn(2, 3, H), drawn(2, 5, H) - 1)
    ),
    "gated": lambda: Called(fast.GatedCrossAttention(H, 2), lambda m: m(drawn(2, 3, H), drawn(2, 5, H) - 1)),
}  # fmt: skip
ITEMS = (("text", 2), ("image", 3))
EVERY = pytest.mark.parametrize("name", CASES)


def build(name):
    torch.manual_seed(0)
    model = CASES[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # gates start closed, norms at 1
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def leaves(model, *kinds):
    """Paths of the layers that adapters and tools look for."""
    kinds = kinds or (nn.Linear, nn.Embedding, nn.LayerNorm, fast.RMSNorm)
    return [path for path, module in model.named_modules() if isinstance(module, kinds)]


def changed(model, path, change):
    """What a copy computes whose weight at `path` was changed in place."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        weight = other.get_submodule(path).weight
        weight.copy_(change(weight))
        return other()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@EVERY
def test_hooks_fire(name):
    model = build(name)
    expected = model()
    for path in leaves(model):
        seen, module = [], model.get_submodule(path)
        for register in (
            module.register_forward_pre_hook,
            module.register_forward_hook,
            module.register_full_backward_pre_hook,
            module.register_full_backward_hook,
        ):
            handle = register(lambda *_, seen=seen: seen.append("seen"))
            out = model()
            close(out, expected)
            out.sum().backward()
            handle.remove()
            assert seen, (path, register)
            seen.clear()
        handle = nn.modules.module.register_module_forward_hook(
            lambda m, *_, module=module, seen=seen: seen.append(m) if m is module else None
        )
        model()
        handle.remove()
        assert seen, path


@EVERY
def test_subclasses_are_called(name):
    model = build(name)
    expected = model()
    for path in leaves(model):
        seen, module = [], model.get_submodule(path)
        cls = type(module)

        def forward(self, *args, cls=cls, seen=seen):
            seen.append(self)
            return cls.forward(self, *args)

        module.__class__ = type("Own", (cls,), {"forward": forward})
        close(model(), expected)
        assert seen, path
        module.__class__ = cls


class Bent(nn.Module):
    def forward(self, weight):
        return weight + weight.cos()


@EVERY
def test_parametrizations_are_honoured(name):
    model = build(name)
    with torch.no_grad():
        original = model()
        for path in leaves(model):
            expected = changed(model, path, Bent())
            assert not torch.allclose(expected, original, rtol=1e-4), path
            module = model.get_submodule(path)
            parametrize.register_parametrization(module, "weight", Bent())
            close(model(), expected)
            close(copy.deepcopy(model)(), expected)
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
            assert torch.equal(model(), original), path


@EVERY
def test_weight_norm(name):
    """As a parametrization, and as the hook it was before."""
    model = build(name)
    with torch.no_grad():
        original = model()
        for path in leaves(model, nn.Linear):
            expected = changed(model, path, lambda w: 2 * w)
            other = copy.deepcopy(model)
            module = parametrizations.weight_norm(other.get_submodule(path))
            close(other(), original)
            module.parametrizations.weight.original0.mul_(2)  # the length of every row
            close(other(), expected)
            parametrize.remove_parametrizations(module, "weight")
            close(other(), expected)
            other = copy.deepcopy(model)
            with pytest.warns(FutureWarning):
                module = nn.utils.weight_norm(other.get_submodule(path))
            close(other(), original)
            module.weight_g.mul_(2)
            close(other(), expected)
            nn.utils.remove_weight_norm(module)
            close(other(), expected)


@EVERY
def test_pruning(name):
    model = build(name)
    with torch.no_grad():
        for path in leaves(model):
            module = model.get_submodule(path)
            mask = torch.rand(module.weight.shape, generator=torch.Generator().manual_seed(1)).round()
            expected = changed(model, path, lambda w, mask=mask: w * mask)
            prune.custom_from_mask(module, "weight", mask)
            close(model(), expected)
            prune.remove(module, "weight")
            close(model(), expected)


@EVERY
def test_parts_may_be_frozen(name):
    for path in leaves(build(name)):
        model = build(name)
        everything = [(k, p) for k, p in model.named_parameters() if p.requires_grad]
        found = torch.autograd.grad(model().square().sum(), [p for _, p in everything], allow_unused=True)
        expected = {key: grad for (key, _), grad in zip(everything, found, strict=True) if grad is not None}
        model.get_submodule(path).requires_grad_(False)
        left = [key for key in expected if not key.startswith(f"{path}.")]
        assert len(left) < len(expected), path
        if left:
            model().square().sum().backward()
        for key, parameter in model.named_parameters():
            assert (parameter.grad is not None) == (key in left), key
            if key in left:
                close(parameter.grad, expected[key])


@EVERY
def test_dynamic_quantisation(name):
    model = build(name)
    with torch.no_grad():
        expected = model()
        quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, torch.qint8)
        out = quantized()
        assert (out - expected).norm() < 0.05 * expected.norm()
        assert torch.equal(out, expected) == (not leaves(model, nn.Linear))


class Halved(torch.Tensor):
    """A weight whose products are computed its own way, as those of torchao are."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            x, weight, *bias = args
            return function(x, weight.as_subclass(torch.Tensor) / 2, *bias)
        return super().__torch_function__(function, types, args, kwargs)


@pytest.mark.parametrize("name", ["concat", "lstm", "pretraining", "projector"])
def test_weights_of_other_kinds(name):
    model = build(name)
    with torch.no_grad():
        for path in leaves(model, nn.Linear):
            expected = changed(model, path, lambda w: w / 2)
            module = model.get_submodule(path)
            weight = module.weight
            module.weight = nn.Parameter(weight.as_subclass(Halved))
            close(model(), expected)
            module.weight = weight


@EVERY
def test_offloaded(name):
    """Weights are on the meta device but for the time of their layer's forward."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = build(name)
    with torch.no_grad():
        expected = model()
        for path in leaves(model):
            other = copy.deepcopy(model)
            accelerate.cpu_offload(other.get_submodule(path), execution_device=torch.device("cpu"))
            assert other.get_submodule(path).weight.is_meta
            close(other(), expected)


ADAPTERS = {
    "lora": lambda target: peft.LoraConfig(r=2, target_modules=target, init_lora_weights=False),
    "dora": lambda target: peft.LoraConfig(r=2, target_modules=target, init_lora_weights=False, use_dora=True),
    "ia3": lambda target: peft.IA3Config(target_modules=target, feedforward_modules=[], init_ia3_weights=False),
    "ia3 of inputs": lambda target: peft.IA3Config(
        target_modules=target, feedforward_modules=target, init_ia3_weights=False
    ),
    "lokr": lambda target: peft.LoKrConfig(r=2, target_modules=target, init_weights=False),
    "norms": lambda target: peft.LNTuningConfig(target_modules=target),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@EVERY
def test_adapters_merge(name, adapter):
    """What an adapter adds does not change when it is merged, and is there before."""
    kinds = {"lora": (nn.Linear, nn.Embedding), "norms": (nn.LayerNorm, fast.RMSNorm)}.get(adapter, (nn.Linear,))
    for path in leaves(build(name), *kinds):
        model = build(name)
        with torch.no_grad():
            original = model()
            tuned = peft.get_peft_model(model, ADAPTERS[adapter]([path])).eval()
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape))
            before = tuned()
            assert not torch.allclose(before, original, rtol=1e-3), path
            close(tuned.merge_and_unload()(), before)


def test_modules_to_save_are_used():
    """A layer of cross-attention that is trained as a copy is the one that the decoder's layers call."""
    config, _ = presets.token_merge_vlm("gated_cross_attention")
    torch.manual_seed(0)
    model = MMLMForConditionalGeneration(config).eval()
    inputs = dict(input_ids=torch.arange(10, 16)[None], pixel_values=drawn(1, 3, 56, 56))
    original = model(**inputs).logits
    settings = peft.LoraConfig(target_modules=["o_proj"], modules_to_save=["cross_attention_layers.0"])
    tuned = peft.get_peft_model(model, settings)
    saved = tuned.base_model.model.model.cross_attention_layers[0].modules_to_save["default"]
    with torch.no_grad():
        saved.cross_attn_attn_gate.fill_(1.0)
        before = tuned(**inputs).logits
        assert not torch.allclose(before, original, atol=1e-4)
        close(copy.deepcopy(tuned)(**inputs).logits, before)
        close(tuned.merge_and_unload()(**inputs).logits, before)


def test_what_is_no_linear_layer_is_refused():
    """An activation or several inputs inside, features in the place of tokens: an adapter around it would be wrong."""
    for layer in (fast.ConcatLinear(8, 8, activation="gelu"), fast.ConcatLinear(8, 8), fast.MergedEmbedding(9, 8)):
        assert not isinstance(layer, (nn.Linear, nn.Embedding))
        model = nn.ModuleDict({"inner": layer})
        for adapter in ("lora", "ia3", "lokr"):
            with pytest.raises((ValueError, TypeError), match="not supported"):
                peft.get_peft_model(copy.deepcopy(model), ADAPTERS[adapter](["inner"]))
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear, nn.Embedding}, torch.qint8)
        assert type(quantized["inner"]) is type(layer)


def test_they_start_as_what_they_replace():
    for ours, theirs in (
        (lambda: fast.ConcatLinear(8, 6), lambda: nn.Linear(8, 6)),
        (lambda: fast.ConcatLinear(8, 6, bias=False), lambda: nn.Linear(8, 6, bias=False)),
        (lambda: fast.MergedEmbedding(9, 8, -1), lambda: nn.Embedding(9, 8, -1)),
    ):
        found = []
        for make in (ours, theirs):
            torch.manual_seed(0)
            found.append(make())
        mine, original = found
        assert mine.state_dict().keys() == original.state_dict().keys()
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), original.parameters(), strict=True))
        x = torch.tensor([1, 8]) if isinstance(original, nn.Embedding) else drawn(2, 3, 8)
        close(mine(x), original(x))
        assert "8" in repr(mine)


def test_activations_of_the_projector():
    for name, function in (("none", nn.Identity()), ("silu", nn.SiLU()), ("gelu_pytorch_tanh", nn.GELU("tanh"))):
        projector, x = MMLMProjector(8, H, name), drawn(2, 3, 8)
        close(projector(x), projector.linear_2(function(projector.linear_1(x))))
    with pytest.raises(ValueError, match=r"activation must be one of silu, .*got 'tanh'"):
        MMLMProjector(8, H, "tanh")


def test_norms_of_heads_that_differ():
    """Of two formulas, or of queries alone: each is called."""
    rotary, query, key = fast.RotaryEmbedding(H), drawn(1, 2, 5, H), drawn(1, 2, 5, H).cos()
    tables = rotary(torch.arange(5)[None])
    for q_norm, k_norm in (
        (fast.RMSNorm(H, 1e-6), fast.RMSNorm(H, 1e-1)),
        (fast.RMSNorm(H), None),
        (None, fast.RMSNorm(H)),
    ):
        expected = rotary.rotate(
            query if q_norm is None else q_norm(query), key if k_norm is None else k_norm(key), *tables
        )
        for out, right in zip(rotary.rotate(query, key, *tables, q_norm=q_norm, k_norm=k_norm), expected, strict=True):
            close(out, right)


def test_fused_ways_compile():
    for name in ("concat", "internvl", "merger rms", "rotated"):
        model = build(name)
        with torch.no_grad():
            close(torch.compile(model, fullgraph=True, backend="eager")(), model())
