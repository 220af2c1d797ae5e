"""`accelerate` on whole models: the same numbers in every loop, nothing left behind, a line for each kind of place."""

import copy
import importlib
import io
import pickle
import re
import sys
import time

import pytest
import torch
import transformers
from torch import nn

import mmlm_fast
from mmlm_fast.hf import NothingReplaced, proof
from mmlm_fast.hf.changing import is_changed_by
from mmlm_fast.hf.fingerprint import fingerprint
from mmlm_fast.hf.kinds import mlps, norms, rotary
from mmlm_fast.nn.lazy_logits import LazyLogits
from mmlm_fast.ops.paths import Path, forced
from mmlm_fast.testing import difference
from support import tiny_models
from support.tiny_families import FAMILIES

MODELS = tiny_models.MODELS | FAMILIES
NAMES = list(MODELS)
DECODERS = [n for n in NAMES if MODELS[n]().generates]
# Measured over all that is compared with it: up to 1.8e-6, at numbers of 2.6. It is rounding in float32.
SAME = {"rtol": 1e-6, "atol": 2e-6}
# What transformers' own models fail at.
NO_CHECKPOINTING = {"granite_speech"}
# What of ours does not fit, beside heads of models without a loss.
LEFT = {
    "qwen2_5_omni_thinker": {"M-RoPE positions"},  # of sounds, too
    "qwen2_5_vl": {"M-RoPE positions"},  # in 5.17, which rounds the seconds of a frame
    "idefics3": {"placeholder merge"},  # in 5.17, by index
    "smolvlm": {"placeholder merge"},  # the same
    "granite_speech": {"attention"},  # of its speech encoder, which looks nothing up
}


@pytest.fixture(autouse=True)
def _quiet():
    with tiny_models.quiet():
        yield


def accelerated(model, **options):
    return mmlm_fast.accelerate(model, quiet=True, **options)


def run(model, inputs, labels=None, autocast=None):
    """Output and gradients of a step, of a tree of tensors."""
    model.zero_grad()
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        out = model(**inputs) if labels is None else model(**inputs, labels=labels)
    if labels is None:
        tensor = out.logits if out.get("logits") is not None else out[0]
        tensor = tensor.float().square().mean()
    else:
        tensor = out.loss
    tensor.backward()
    return [tensor.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def labels_of(tiny):
    labels = tiny.inputs.get("input_ids", tiny.inputs.get("decoder_input_ids")).clone()
    labels[:, :3] = -100
    return labels


def need_the_original(tiny, labels):
    try:
        run(tiny.build("sdpa").train(tiny.generates), tiny.inputs, labels)
    except AttributeError as error:  # Llama 4 of 5.24
        pytest.skip(f"transformers' own fails: {error}")


def assert_no_worse(ours, theirs, truth):
    """The accuracy rule over all gradients together."""
    assert len(ours) == len(theirs) == len(truth)
    a, b, c = (torch.cat([x.flatten() for x in g]) for g in (ours, theirs, truth))
    found = difference(a, b, c)
    assert found.ok, found


def exact(tiny, labels):
    model = tiny.build("sdpa", torch.float64)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in tiny.inputs.items()}
    return run(model.train(tiny.generates), inputs, labels)


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [
        pytest.param(name, how, marks=() if how is not True or name in ("llama", "qwen2_5_vl") else pytest.mark.slow)
        for name in NAMES
        for how in (None, True, False)  # True: the reentrant kind
    ],
)
def test_training_step(name, checkpointing):
    if checkpointing is not None and name in NO_CHECKPOINTING:
        pytest.skip("transformers' own has none")
    tiny = MODELS[name]()
    labels = labels_of(tiny) if name in DECODERS else None
    need_the_original(tiny, labels)
    plain, model, wide = (tiny.build("sdpa", dtype) for dtype in (torch.float32, torch.float32, torch.float64))
    keys = list(model.state_dict())
    done = accelerated(model)
    assert list(model.state_dict()) == keys
    for m in (plain, model, wide):
        m.train(tiny.generates)
        if checkpointing is not None:
            m.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            m.enable_input_require_grads()
    with forced(Path.NATIVE):
        ours = run(model, tiny.inputs, labels)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in tiny.inputs.items()}
    assert_no_worse(ours, run(plain, tiny.inputs, labels), run(wide, inputs, labels))
    assert {"attention", "sum and norm"} <= {r.kind for r in done.replaced}
    left = {r.kind for r in done.refused if r.kind != "language-model head"}
    assert left <= LEFT.get(name, set()), str(done)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_generation(name, cache):
    tiny = MODELS[name]()
    inputs = {k: v for k, v in tiny.inputs.items() if k != "decoder_input_ids"}
    options = dict(max_new_tokens=6, do_sample=False, cache_implementation=cache)
    try:
        expected = tiny.build("sdpa").generate(**inputs, **options)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        pytest.skip(f"transformers' own fails: {error}")
    model = tiny.build("sdpa")
    accelerated(model)
    assert torch.equal(model.generate(**inputs, **options), expected)
    with forced(Path.NATIVE):
        assert torch.equal(model.generate(**inputs, **options), expected)


@pytest.mark.parametrize("name", NAMES)
def test_undo_gives_the_same_bits(name):
    tiny = MODELS[name]()
    labels = labels_of(tiny) if name in DECODERS else None
    need_the_original(tiny, labels)
    plain, model = tiny.build("sdpa"), tiny.build("sdpa")
    classes = [type(m) for m in model.modules()]
    before = plain.train(tiny.generates), run(plain, tiny.inputs, labels)
    done = accelerated(model)
    with forced(Path.NATIVE):
        run(model.train(tiny.generates), tiny.inputs, labels)
    model.eval().double().float()
    model.load_state_dict(plain.state_dict())
    done.undo()
    assert [type(m) for m in model.modules()] == classes
    after = run(model.train(tiny.generates), tiny.inputs, labels)
    assert all(torch.equal(a, b) for a, b in zip(after, before[1], strict=True))
    assert not any("_old_forward" in vars(m) or "forward" in vars(m) for m in model.modules())
    done.undo()  # nothing more to do


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "clip"])
def test_only_this_model_changes(name):
    """Not another of the same class, nor one that is built of the same configuration, before or after."""
    tiny = MODELS[name]()
    expected = tiny_models.output_of(tiny.build("sdpa"), tiny.inputs)
    config = copy.deepcopy(tiny.config)
    modules = [sys.modules[name] for name in sorted({type(m).__module__ for m in tiny.build("sdpa").modules()})]
    names = [set(vars(module)) for module in modules]  # with what Dynamo left there
    models = []
    for i in range(3):
        torch.manual_seed(0)
        models.append(tiny.cls(config).eval())  # which shares it
        if i == 1:
            accelerated(models[1])
    for i in (0, 2):
        assert models[i].config._attn_implementation == "sdpa"
        assert not any(hasattr(type(m), "_mmlm_fast_layers") for m in models[i].modules())
        with forced(Path.NATIVE):
            assert torch.equal(tiny_models.output_of(models[i], tiny.inputs), expected)
    assert [set(vars(module)) for module in modules] == names


@pytest.mark.parametrize("sizes", [[(28, 42)], [(28, 28), (56, 30), (28, 84)], [(28, 41), (45, 44)]])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_patches_of_pictures_of_any_size(sizes, as_tensor):
    """Mistral3's merger: rows and columns that make no whole patch are left out."""
    from transformers.models.mistral3.modeling_mistral3 import Mistral3PatchMerger

    vision = transformers.PixtralVisionConfig(hidden_size=8, patch_size=7, num_hidden_layers=1, num_attention_heads=1)
    torch.manual_seed(0)
    module = Mistral3PatchMerger(transformers.Mistral3Config(vision_config=vision, spatial_merge_size=2))
    x = torch.randn(sum((h // 7) * (w // 7) for h, w in sizes), 8, requires_grad=True)
    given = torch.tensor(sizes) if as_tensor else sizes

    def run() -> list[torch.Tensor]:
        out = module(x, given)
        return [out, *torch.autograd.grad(out.square().sum(), [x, module.merging_layer.weight])]

    expected = run()
    done = accelerated(module)
    assert [r.kind for r in done.replaced] == ["patch merger"]
    assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))  # the same numbers in the same places
    with pytest.raises(RuntimeError, match="split"):
        module(x[1:], given)


def test_a_tiny_call_is_the_originals(monkeypatch):
    """A step of decoding looks at no op; forced it does, and compiled code has no sizes in its guards."""
    from mmlm_fast.hf import site

    model, _ = llama()
    layer = model.model.layers[0]
    accelerated(model)
    seen = []
    monkeypatch.setattr(norms, "normalised", lambda *args: seen.append(args))
    x, tables = torch.randn(1, 3, 32), model.model.rotary_emb(torch.randn(1, 3, 32), torch.arange(3)[None])
    layer(x, position_embeddings=tables)
    assert not seen
    with forced(Path.NATIVE):
        layer.input_layernorm(x)
    assert len(seen) == 1

    class Plain(torch.nn.Module):
        def forward(self, x):
            return x + 1

    ours = site.unless_tiny(Plain, 10**6, lambda self, x: x + 2)
    assert torch.equal(ours(Plain(), x), x + 1)
    compiled = torch.compile(ours, backend="eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(Plain(), x), x + 2)


def test_merge_in_a_method_of_its_own():
    """Idefics3's: too few or too many features are the original's error."""
    tiny = MODELS["idefics3"]()
    model = tiny.build("sdpa")
    if "placeholder merge" not in {r.kind for r in accelerated(model).replaced}:
        pytest.skip("this version of transformers merges by index")
    inner = next(m for m in model.modules() if hasattr(m, "inputs_merger"))
    ids = torch.zeros(2, 6, dtype=torch.int64)
    ids[0, 1:4] = ids[1, 2] = inner.config.image_token_id
    embeddings, features = torch.randn(2, 6, 32), torch.randn(2, 2, 32, requires_grad=True)
    with forced(Path.NATIVE):
        merged = inner.inputs_merger(ids, embeddings, features)
    mask = ids == inner.config.image_token_id
    assert torch.equal(merged[mask], features.flatten(0, 1))
    assert torch.equal(merged[~mask], embeddings[~mask])
    assert torch.equal(torch.autograd.grad(merged.sum(), features)[0], torch.ones(2, 2, 32))
    for wrong in (features[:1], torch.randn(3, 2, 32)):
        with pytest.raises(ValueError, match="do not match"):
            inner.inputs_merger(ids, embeddings, wrong)


def test_twice_and_in_parts():
    tiny = tiny_models.llava()
    model = tiny.build("sdpa")
    first = accelerated(model, only=["RMS norm", "sum and norm"])
    assert {r.kind for r in first.replaced} == {"RMS norm", "sum and norm"}
    second = accelerated(model)
    assert "RMS norm" not in {r.kind for r in second.replaced}
    assert {r.reason for r in second.refused if r.kind == "RMS norm"} == {"accelerated already"}
    third = accelerated(model)
    assert not third.replaced
    first.undo()
    assert not any(is_changed_by(m, norms.methods) for m in model.modules())
    theirs = tiny_models.output_of(tiny.build("sdpa"), tiny.inputs)
    with forced(Path.NATIVE):
        torch.testing.assert_close(tiny_models.output_of(model, tiny.inputs), theirs, **SAME)
    second.undo()
    assert not any(hasattr(type(m), "_mmlm_fast_layers") for m in model.modules())
    assert torch.equal(tiny_models.output_of(model, tiny.inputs), theirs)


def test_only_and_exclude_by_kind_class_and_path():
    build = tiny_models.llava().build
    done = accelerated(build("sdpa"), only=["model.language_model.layers.0"])
    assert {r.path.split(".")[2:4] == ["layers", "0"] for r in done.replaced} == {True}
    done = accelerated(build("sdpa"), exclude=["LlamaMLP", "attention", "model.vision_tower"])
    assert not [r for r in done.replaced if r.name == "LlamaMLP" or r.kind == "attention" or "vision" in r.path]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_half_precision(name, dtype):
    tiny = MODELS[name]()
    tiny.inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny.inputs.items()}
    theirs = tiny.build("sdpa", dtype)
    model = tiny.build("sdpa", dtype)
    done = accelerated(model)
    with forced(Path.NATIVE), torch.no_grad():
        a, b = model(**tiny.inputs).logits, theirs(**tiny.inputs).logits
        wide = {k: v.double() if v.is_floating_point() else v for k, v in tiny.inputs.items()}
        truth = copy.deepcopy(theirs).double()(**wide).logits
    assert a.dtype == dtype
    keep = slice(None) if tiny.valid is None else tiny.valid
    assert difference(a[keep], b[keep], truth[keep]).ok
    if dtype == torch.float16:
        assert "the original runs in float16 on cpu" in str(done)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_autocast(name):
    tiny = MODELS[name]()
    labels = labels_of(tiny)
    theirs = run(tiny.build("sdpa").train(), tiny.inputs, labels, torch.bfloat16)
    model = tiny.build("sdpa").train()
    accelerated(model)
    with forced(Path.NATIVE):
        ours = run(model, tiny.inputs, labels, torch.bfloat16)
    assert_no_worse(ours, theirs, exact(tiny, labels))


def test_before_and_after_a_change_of_dtype():
    tiny = tiny_models.llava()
    model = tiny.build("sdpa", torch.float16)
    accelerated(model)
    model.float()
    with forced(Path.NATIVE):
        out = tiny_models.output_of(model, tiny.inputs)
    expected = tiny_models.output_of(tiny.build("sdpa", torch.float16).float(), tiny.inputs)
    torch.testing.assert_close(out, expected, **SAME)


def test_adapters():
    """On projections inside what is replaced, before and after; merging too."""
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "gate_proj", "up_proj", "down_proj", "fc1"]
    tiny = tiny_models.llava()
    labels, found = labels_of(tiny), []
    for when in ("never", "before", "after"):
        model = tiny.build("sdpa").train()
        if when == "before":
            accelerated(model)
        torch.manual_seed(2)
        tuned = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).train()
        done = accelerated(tuned) if when == "after" else None
        with forced(Path.NATIVE):
            found.append(run(tuned, tiny.inputs, labels))
            merged = tuned.eval().merge_and_unload()
            with torch.no_grad():
                found[-1].append(merged(**tiny.inputs).logits)
        if done is not None:
            assert "gated MLP" in {r.kind for r in done.replaced}
            done.undo()
            assert not any(hasattr(type(m), "_mmlm_fast_layers") for m in tuned.modules())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], **SAME)


def test_hooks_see_what_they_saw():
    """Of norms: a fused sum would hide the call of the norm from its hook."""
    tiny = tiny_models.llava()
    seen = {}
    for fast in (False, True):
        model = tiny.build("sdpa")
        if fast:
            accelerated(model)
        kept = seen[fast] = []
        for module in model.modules():
            if type(module).__name__ in ("LlamaRMSNorm", "LlamaMLP", "LlamaDecoderLayer", "LayerNorm"):
                module.register_forward_hook(
                    lambda m, i, o, kept=kept: kept.append((type(m).__name__, i[0].detach(), o.detach()))
                )
        with forced(Path.NATIVE):
            tiny_models.output_of(model, tiny.inputs)
    assert len(seen[True]) == len(seen[False])
    for (a, i, o), (b, j, p) in zip(seen[True], seen[False], strict=True):
        assert a == b
        torch.testing.assert_close((i, o), (j, p), **SAME)


def test_recorded_outputs():
    tiny = tiny_models.llava()
    model, plain = tiny.build("sdpa"), tiny.build("sdpa")
    accelerated(model)
    with forced(Path.NATIVE):
        ours, theirs = (m(**tiny.inputs, output_hidden_states=True) for m in (model, plain))
    torch.testing.assert_close(ours.hidden_states, theirs.hidden_states, **SAME)
    torch.testing.assert_close(ours.image_hidden_states, theirs.image_hidden_states, **SAME)


def test_copies_and_pickles():
    tiny = tiny_models.llava()
    model = tiny.build("sdpa")
    accelerated(model)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    with forced(Path.NATIVE):
        expected = tiny_models.output_of(model, tiny.inputs)
        for twin in copies:
            assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
            assert torch.equal(tiny_models.output_of(twin, tiny.inputs), expected)
    buffer.seek(0)
    tiny.build("sdpa").load_state_dict(torch.load(buffer))


def test_saved_checkpoints_do_not_name_us(tmp_path):
    model = tiny_models.llava().build("sdpa")
    accelerated(model)
    model.save_pretrained(tmp_path)
    texts = [p.read_text() for p in tmp_path.glob("*.json")]
    assert texts
    assert not [text for text in texts if "mmlm" in text]
    loaded = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"


def test_offloading_hooks_of_accelerate():
    """They keep a module's forward and call it from one of their own."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    tiny = tiny_models.llava()
    expected = tiny_models.output_of(tiny.build("sdpa"), tiny.inputs)
    model = tiny.build("sdpa")
    for module in list(model.modules()):
        if type(module).__name__ in ("LlamaRMSNorm", "LlamaMLP", "LlamaDecoderLayer"):
            add_hook_to_module(module, ModelHook())
    done = accelerated(model, only=["RMS norm"])  # all of which have a hook
    with forced(Path.NATIVE):
        out = tiny_models.output_of(model, tiny.inputs)
    assert not torch.equal(out, expected)
    torch.testing.assert_close(out, expected, **SAME)
    remove_hook_from_module(model, recurse=True)
    with forced(Path.NATIVE):
        assert not torch.equal(tiny_models.output_of(model, tiny.inputs), expected)
    done.undo()
    assert torch.equal(tiny_models.output_of(model, tiny.inputs), expected)


@pytest.mark.parametrize(
    ("name", "backend"),
    [*(pytest.param(n, "aot_eager", marks=pytest.mark.slow) for n in ("llava", "qwen2_5_vl")), ("llama", "eager")],
)
def test_compiled(name, backend):
    tiny = MODELS[name]()
    model = tiny.build("sdpa")
    expected = tiny_models.output_of(model, tiny.inputs)
    accelerated(model)
    torch._dynamo.reset()
    out = tiny_models.output_of(torch.compile(model, backend=backend), tiny.inputs)
    torch.testing.assert_close(out, expected, **SAME)


def test_a_resized_vocabulary():
    tiny = tiny_models.llava()
    model, plain = tiny.build("sdpa").train(), tiny.build("sdpa").train()
    done = accelerated(model)
    for m in (model, plain):
        torch.manual_seed(3)
        m.resize_token_embeddings(150)
    with forced(Path.NATIVE):
        torch.testing.assert_close(
            run(model, tiny.inputs, labels_of(tiny)), run(plain, tiny.inputs, labels_of(tiny)), **SAME
        )
    done.undo()
    assert not any(hasattr(type(m), "_mmlm_fast_layers") for m in model.modules())


# ---- single places ---------------------------------------------------------------------------------------------------


def classes_of_norms():
    from transformers.models.cohere.modeling_cohere import CohereLayerNorm
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
    from transformers.models.helium.modeling_helium import HeliumRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.llama4.modeling_llama4 import Llama4TextRMSNorm
    from transformers.models.moshi.modeling_moshi import MoshiRMSNorm
    from transformers.models.nanochat.modeling_nanochat import NanoChatRMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    sized = (
        LlamaRMSNorm, GemmaRMSNorm, Gemma4RMSNorm, HeliumRMSNorm, Llama4TextRMSNorm, MoshiRMSNorm, Olmo2RMSNorm,
        T5LayerNorm, CohereLayerNorm,
    )  # fmt: skip
    return {cls.__name__: lambda cls=cls: cls(40) for cls in sized} | {"NanoChatRMSNorm": lambda: NanoChatRMSNorm()}


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(classes_of_norms()))
def test_norms_of_two_dtypes(name, dtype, weight):
    """The result has the dtype of the original's, whatever the weight's; so has the norm of a sum of two."""
    torch.manual_seed(0)
    plain = classes_of_norms()[name]()
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    ours, theirs, wide = copy.deepcopy(plain).to(weight), copy.deepcopy(plain).to(weight), None
    wide = copy.deepcopy(theirs).double()
    accelerated(nn.Sequential(ours))
    x, y = (torch.randn(3, 5, 40).to(t) for t in (dtype, torch.float32))
    with forced(Path.NATIVE):
        out, (summed, total) = ours(x), norms.sum_and_norm(ours, x, y)
    for found, given in ((out, x), (summed, x + y)):
        expected = theirs(given)
        assert found.dtype == expected.dtype
        assert difference(found, expected, wide(given.double())).ok
    assert torch.equal(total, x + y)
    if list(plain.parameters()):
        with pytest.raises(RuntimeError):
            ours(torch.randn(3, 41))


def test_a_norm_of_a_strange_tensor_is_the_originals():
    norm = classes_of_norms()["LlamaRMSNorm"]()
    accelerated(nn.Sequential(norm))
    with forced(Path.NATIVE):
        assert norm(torch.empty(0, 40)).shape == (0, 40)
        assert norm(hidden_states=torch.ones(2, 40)).shape == (2, 40)
        assert norm(torch.ones(2, 40, dtype=torch.float64)).dtype == torch.float64
        batched = torch.func.vmap(norm)(torch.ones(3, 2, 40))
    assert batched.shape == (3, 2, 40)


def test_rotations_of_unusual_tables():
    from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as glm
    from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as neox
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama

    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 6, 16), torch.randn(2, 2, 6, 16)
    angles = torch.randn(2, 6, 8)
    cos, sin = (torch.cat([t, t], -1) for t in (angles.cos(), angles.sin()))

    def same(function, *args, **kwargs):
        with forced(Path.NATIVE):
            found = rotary.rotated(function, *args, **kwargs)
        torch.testing.assert_close(found, function(*args, **kwargs))
        return found

    same(llama, q, k, cos, sin)
    same(llama, q, k, cos=cos, sin=sin)
    same(llama, q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2)
    same(llama, q[0], k[0], cos[0], sin[0], unsqueeze_dim=0)
    same(llama, q, k, cos[:1], sin[:1])
    assert same(llama, q.bfloat16(), k.bfloat16(), cos, sin)[0].dtype == torch.float32
    same(neox, q, k, cos[..., :8], sin[..., :8])
    same(glm, q, k, cos, sin)
    cos.mul_(2)  # in place: what was known of the table holds no more
    same(llama, q, k, cos, sin)
    cos[..., 3] += 1  # its halves differ
    assert same(llama, q, k, cos, sin)[0].equal(llama(q, k, cos, sin)[0])
    table = torch.cat([angles.cos()] * 2, -1).requires_grad_()
    same(llama, q, k, table, sin)[0].sum().backward()
    assert table.grad is not None
    with torch.inference_mode():
        same(llama, q, k, cos.clone(), sin.clone())


def test_a_patch_convolution_whose_input_learns():
    """A product of pictures' gradients errs more than a convolution does: the original computes them."""
    conv = nn.Conv3d(3, 8, (2, 4, 4), (2, 4, 4))
    plain = copy.deepcopy(conv)
    accelerated(nn.Sequential(conv))
    x = torch.randn(5, 3, 2, 4, 4)
    torch.testing.assert_close(conv(x), plain(x))
    grads = []
    for m in (conv, plain):
        y = x.clone().requires_grad_()
        m(y).square().sum().backward()
        grads.append(y.grad)
    assert torch.equal(*grads)
    assert conv(torch.randn(1, 3, 5, 9, 9)).shape == (1, 8, 2, 2, 2)  # not divisible: the rest is left out
    assert conv(torch.randn(2, 3, 4, 8, 8)).is_contiguous()
    with pytest.raises(RuntimeError):
        conv(x.double())


# ---- what people do to models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
def test_a_lazy_head_below_other_changes(name, monkeypatch):
    monkeypatch.setattr(importlib.import_module("mmlm_fast.nn.lazy_logits"), "_is_few", lambda *_: False)
    tiny, kinds = MODELS[name](), []
    need_the_original(tiny, labels_of(tiny))
    for only in (["language-model head"], None):
        model = tiny.build("sdpa").train()
        accelerated(model, only=only)
        kinds.append(type(model(**tiny.inputs, labels=labels_of(tiny)).logits))
    assert kinds == [LazyLogits, LazyLogits]


def llama():
    tiny = MODELS["llama"]()
    return tiny.build("sdpa"), tiny.inputs


def outputs(model, inputs):
    with forced(Path.NATIVE), torch.no_grad():
        return model(**inputs, use_cache=False).logits


def test_classes_that_somebody_patches(monkeypatch):
    """Before, since, and no more: what is called is what the class has at the time."""
    cls = transformers.models.llama.modeling_llama.LlamaDecoderLayer
    original = cls.forward

    def patched(self, *args, **kwargs):
        return original(self, *args, **kwargs) * 2

    plain, inputs = llama()
    expected = outputs(plain, inputs)
    with monkeypatch.context() as patch:
        patch.setattr(cls, "forward", patched)
        twice = outputs(plain, inputs)
        before, _ = llama()
        accelerated(before)
        torch.testing.assert_close(outputs(before, inputs), twice, **SAME)
    torch.testing.assert_close(outputs(before, inputs), expected, **SAME)
    fresh, _ = llama()
    assert "sum and norm" in {r.kind for r in accelerated(fresh).replaced}
    torch.testing.assert_close(outputs(fresh, inputs), expected, **SAME)
    with monkeypatch.context() as patch:
        patch.setattr(cls, "forward", patched)
        torch.testing.assert_close(outputs(fresh, inputs), twice, **SAME)


def test_parts_that_change_afterwards():
    (model, inputs), (plain, _) = llama(), llama()
    done = accelerated(model)
    held = model.model.layers[0].mlp.forward
    for m in (model, plain):
        m.model.layers[0].mlp.act_fn = nn.ReLU()
        m.model.layers[1].post_attention_layernorm.variance_epsilon = 0.5
    torch.testing.assert_close(outputs(model, inputs), outputs(plain, inputs), **SAME)
    model.model.layers[0].mlp.forward = lambda *args: held(*args)
    done.undo()
    assert torch.equal(outputs(model, inputs), outputs(plain, inputs))  # also through what somebody kept


def test_convolutions_that_change_afterwards():
    conv = nn.Conv2d(3, 4, 2, 2)
    accelerated(nn.Sequential(conv))
    conv.padding = (1, 1)
    assert conv(torch.ones(1, 3, 4, 4)).shape == (1, 4, 3, 3)


def test_layers_that_are_copies():
    """With configurations of their own, which PEFT's layer replication makes, too."""
    found = []
    for fast in (False, True):
        model, inputs = llama()
        model.model.layers.append(copy.deepcopy(model.model.layers[-1]))
        model.config.num_hidden_layers = 3
        if fast:
            accelerated(model)
        found.append(outputs(model, inputs)[inputs["attention_mask"].bool()])
    torch.testing.assert_close(*found, **SAME)


def test_attention_that_somebody_chose_for_a_part():
    model = tiny_models.llava().build("sdpa")
    model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
    accelerated(model)
    assert model.config.vision_config._attn_implementation == "eager"
    assert model.config.text_config._attn_implementation == "mmlm_fast"


def test_statements_that_are_no_sum_of_ours():
    """A call before the norm might change the sum; private names mean something in a class alone; a call of its own."""
    norm = transformers.models.llama.modeling_llama.LlamaRMSNorm

    class Inplace(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.norm = nn.ReLU(inplace=True), norm(8)

        def forward(self, a, b):
            h = a + b
            return self.act(h) + self.norm(h)

    class Private(Inplace):
        def __init__(self):
            super().__init__()
            self.__scale = 3.0

        def forward(self, a, b):
            h = a + b
            return self.norm(h) * self.__scale

    class Twice(norm):
        def __call__(self, x):
            return super().__call__(x) * 2

    class Calls(Inplace):
        def __init__(self):
            super().__init__()
            self.norm = Twice(8)

        def forward(self, a, b):
            h = a + b
            return self.norm(h)

    a, b = torch.randn(2, 3, 8)
    for cls in (Inplace, Private, Calls):
        plain = cls()
        model = copy.deepcopy(plain)
        done = accelerated(nn.Sequential(model))
        with forced(Path.NATIVE):
            torch.testing.assert_close(model(a.clone(), b), plain(a.clone(), b))
        assert ("private names mean something" in str(done)) == (cls is Private)


def test_the_random_state_and_modes_are_left_alone():
    model, _ = llama()
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    accelerated(model)
    assert torch.equal(torch.rand(2), expected)
    model, _ = llama()
    with torch.inference_mode():
        assert not accelerated(model).refused
        built, _ = llama()
        assert not accelerated(built).refused
    model, _ = llama()
    with torch.device("meta"):
        assert not accelerated(model).refused


def test_bound_forwards_of_a_head():
    from accelerate.hooks import ModelHook, add_hook_to_module

    model, inputs = llama()
    expected = outputs(model, inputs)
    done = accelerated(model.train())
    add_hook_to_module(model.lm_head, ModelHook())
    torch.testing.assert_close(outputs(model.eval(), inputs), expected, **SAME)
    done.undo()
    assert torch.equal(outputs(model, inputs), expected)
    model, _ = llama()
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    assert "its model has a forward of its own" in str(accelerated(model))


def test_names_of_nothing_and_classes_themselves():
    cls = transformers.models.llama.modeling_llama.LlamaRMSNorm
    done = accelerated(llama()[0], exclude=[cls, "atention"])
    assert not [r for r in done.replaced if r.kind in ("RMS norm", "sum and norm")]
    assert "nothing here is named atention" in str(done)
    assert {r.kind for r in accelerated(llama()[0], only=iter([cls])).replaced} == {"RMS norm"}
    for wrong in (None, "attention", [3]):
        with pytest.raises(ValueError, match="exclude must"):
            accelerated(llama()[0], exclude=wrong)


def test_a_class_that_says_how_it_is_copied():
    class Own(transformers.models.llama.modeling_llama.LlamaRMSNorm):
        def __reduce__(self):
            return Own, (8,)

    norm = Own(8)
    accelerated(nn.Sequential(norm))
    assert copy.deepcopy(norm)(torch.ones(2, 8)).shape == (2, 8)


# ---- recognising -----------------------------------------------------------------------------------------------------


def test_a_forward_that_changed_is_refused(monkeypatch):
    """As in another version of transformers; the class keeps its name."""
    cls = transformers.models.llama.modeling_llama.LlamaRMSNorm

    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return (1 + self.weight) * hidden_states.to(input_dtype)

    monkeypatch.setattr(cls, "forward", forward)
    done = accelerated(tiny_models.llava().build("sdpa"))
    assert "5 × LlamaRMSNorm (RMS norm): its forward is none of those known" in str(done)
    assert not [r for r in done.replaced if r.kind in ("RMS norm", "sum and norm") and "Llama" in r.name]


def test_a_wrong_replacement_is_refused(monkeypatch):
    add_norm = norms.add_norm
    monkeypatch.setattr(norms, "add_norm", lambda *a, **k: tuple(t * 1.001 for t in add_norm(*a, **k)))
    model = tiny_models.llava().build("sdpa")
    done = accelerated(model)
    assert "5 × LlamaRMSNorm (RMS norm): output 0 errs by" in str(done)
    assert not [r for r in done.replaced if r.kind in ("RMS norm", "sum and norm")]
    assert not any(is_changed_by(m, norms.methods) for m in model.modules())


def test_a_formula_that_is_not_the_originals_is_refused(monkeypatch):
    mark = fingerprint(transformers.models.llama.modeling_llama.LlamaRMSNorm, "forward")
    monkeypatch.setitem(norms.NORMS, mark, norms.Norm(offset=1.0))
    done = accelerated(tiny_models.llava().build("sdpa"))
    assert "the original is not the formula it is known by" in str(done)
    assert not [r for r in done.replaced if r.kind == "RMS norm"]


def test_a_function_that_is_called_counts():
    """A rotation with the statements of Llama's, and another rotate_half."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    names = {}
    exec(compile("def rotate_half(x):\n    return x\n", __file__, "exec"), names)
    import types

    other = types.FunctionType(apply_rotary_pos_emb.__code__, names | {"torch": torch}, "apply_rotary_pos_emb")
    assert rotary.known(apply_rotary_pos_emb) is not None
    assert rotary.known(other) is None


def test_classes_of_the_user_with_a_known_forward():
    class Mine(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(size))
            self.variance_epsilon = 1e-5

        def forward(self, x: torch.Tensor):
            """Names of locals, annotations and docstrings do not count."""
            kind = x.dtype
            x = x.to(torch.float32)
            v = x.pow(2).mean(-1, keepdim=True)
            x = x * torch.rsqrt(v + self.variance_epsilon)
            return self.weight * x.to(kind)

    model = nn.Sequential(nn.Linear(8, 8), Mine(8))
    x = torch.randn(4, 8)
    expected = model(x)
    done = accelerated(model)
    assert [r.path for r in done.replaced] == ["1"]
    with forced(Path.NATIVE):
        torch.testing.assert_close(model(x), expected)


def test_nothing_replaced():
    with pytest.raises(NothingReplaced, match="nothing to replace was found"):
        accelerated(nn.Linear(3, 3))
    assert str(accelerated(nn.Linear(3, 3), strict=False)) == "nothing to replace was found"
    with pytest.raises(NothingReplaced, match="left out by only or exclude"):
        accelerated(tiny_models.clip().build("sdpa"), only=["NoSuchThing"])
    model = tiny_models.clip().build("sdpa")
    accelerated(model)
    accelerated(model)  # accelerated already: fine


def test_an_error_leaves_the_model_as_it_was(monkeypatch):
    model = tiny_models.llava().build("sdpa")
    classes = [type(m) for m in model.modules()]

    def fails(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(mlps, "_prove", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        accelerated(model)
    assert [type(m) for m in model.modules()] == classes
    assert model.config._attn_implementation == "sdpa"


def test_report(capsys):
    model = tiny_models.llava().build("sdpa")
    done = mmlm_fast.accelerate(model)
    assert capsys.readouterr().out.strip() == str(done)
    lines = str(done).splitlines()
    assert re.match(r"replaced 5 × LlamaRMSNorm \(RMS norm; largest error \d.\de-08\)$", lines[2]), lines
    assert len(lines) == len({(r.kind, r.name) for r in done.replaced})


def test_a_plan_needs_no_weights():
    tiny = tiny_models.qwen2_5_vl()
    with torch.device("meta"):
        model = tiny.cls._from_config(copy.deepcopy(tiny.config))
    classes = [type(m) for m in model.modules()]
    plan = accelerated(model, plan_only=True)
    done = accelerated(tiny.build("sdpa"))
    assert {(r.path, r.kind) for r in plan.replaced} == {(r.path, r.kind) for r in done.replaced}
    assert "would replace" in str(plan)
    assert [type(m) for m in model.modules()] == classes
    refused = accelerated(model, strict=False).refused
    assert "on the meta device: call accelerate when the weights are loaded" in str(refused)


def test_the_proof_is_quick(monkeypatch):
    """Of a 7B-shaped model in what memory there is: layers share their weights."""
    layers = 28
    config = transformers.Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=1, num_attention_heads=28, num_key_value_heads=4,
        vocab_size=1000,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).bfloat16()
    model.model.layers.extend([copy.deepcopy(model.model.layers[0]) for _ in range(2)])
    shared = model.model.layers[0]
    for _ in range(3, layers):
        layer = copy.copy(shared)
        layer._modules = {n: copy.copy(m) for n, m in shared._modules.items()}
        model.model.layers.append(layer)
    accelerated(tiny_models.llava().build("sdpa"))  # sources are read once
    seconds, proofs = [], []
    prove = proof.prove
    monkeypatch.setattr(proof, "prove", lambda *a, **k: proofs.append(a) or prove(*a, **k))
    for _ in range(2):
        proofs.clear()
        start = time.process_time()  # not the clock: other jobs run beside this one
        done = accelerated(model)
        seconds.append(time.process_time() - start)
        if len(seconds) < 2:
            done.undo()
    assert min(seconds) < 2.0  # of both cores; 0.9 was measured, 0.7 by the clock on the wall
    assert len(proofs) < 8  # not one a layer
    assert sum(r.kind == "gated MLP" for r in done.replaced) == layers


def test_fingerprints_are_those_of_installed_classes():
    """Every known hash is of a forward that this version of transformers has."""
    from transformers.activations import QuickGELUActivation
    from transformers.models.gemma import modeling_gemma as gemma
    from transformers.models.gemma4 import modeling_gemma4 as gemma4
    from transformers.models.glm import modeling_glm as glm
    from transformers.models.gpt_neox import modeling_gpt_neox as neox
    from transformers.models.lfm2 import modeling_lfm2 as lfm2
    from transformers.models.llama import modeling_llama as llama
    from transformers.models.olmo2 import modeling_olmo2 as olmo2
    from transformers.models.phi3 import modeling_phi3 as phi3
    from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2
    from transformers.models.t5 import modeling_t5 as t5

    for cls in (llama.LlamaRMSNorm, gemma.GemmaRMSNorm, olmo2.Olmo2RMSNorm, t5.T5LayerNorm, gemma4.Gemma4RMSNorm):
        assert fingerprint(cls, "forward") in norms.NORMS, cls
    for cls in (llama.LlamaMLP, phi3.Phi3MLP, lfm2.Lfm2MLP):
        assert fingerprint(cls, "forward") in mlps.GATED, cls
    assert mlps.name_of(QuickGELUActivation()) == "quick_gelu"
    for module in (llama, neox, glm, olmo2, gemma4):
        assert rotary.known(module.apply_rotary_pos_emb) is not None, module
    assert rotary.known(qwen2.apply_rotary_pos_emb_vision) is not None
