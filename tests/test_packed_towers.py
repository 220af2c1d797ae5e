"""Towers that pack images or clips into one sequence give it whole to our attention, from the first call on."""

import copy
import importlib
import threading
import warnings

import pytest
import torch
import transformers
from torch.utils import _pytree as pytree

from mmlm_fast.hf import attention as attention_module
from mmlm_fast.testing import difference
from support import tiny_models

QWEN = tiny_models.QWEN_TOWER
GRID = torch.tensor([[1, 8, 8], [2, 4, 8]])


def patches(numbers=3 * 2 * 4 * 4, name="hidden_states", **more):
    return {name: torch.randn(128, numbers), "grid_thw": GRID} | more


def clips():
    lengths = torch.tensor([37, 24])
    return {"input_features": torch.randn(16, 61), "feature_lens": lengths}


QWEN3 = dict(num_position_embeddings=64, deepstack_visual_indexes=[0], **QWEN)
WINDOWS = dict(window_size=16, fullatt_block_indexes=[2], **QWEN)
PLAIN = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, patch_size=4)
AUDIO = dict(d_model=32, encoder_layers=3, encoder_attention_heads=4, encoder_ffn_dim=48, num_mel_bins=16, n_window=6,
             max_source_positions=40)  # fmt: skip
# module and class -> configuration, inputs
TOWERS = {
    "qwen2_vl.Qwen2VisionTransformerPretrainedModel": (
        dict(depth=3, embed_dim=32, hidden_size=32, num_heads=4, patch_size=4, mlp_ratio=2), patches),
    "qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel": (WINDOWS, patches),
    "qwen3_vl.Qwen3VLVisionModel": (QWEN3, patches),
    "qwen3_5.Qwen3_5VisionModel": (dict(num_position_embeddings=64, **QWEN), patches),
    "qwen2_5_omni.Qwen2_5OmniVisionEncoder": (WINDOWS, patches),
    "qwen2_5_omni.Qwen2_5OmniAudioEncoder": (dict(output_dim=32, **AUDIO), clips),
    "qwen3_omni_moe.Qwen3OmniMoeVisionEncoder": (QWEN3, patches),
    "glm_ocr.GlmOcrVisionModel": (dict(image_size=32, **QWEN), patches),
    "exaone4_5.Exaone4_5_VisionModel": (dict(num_key_value_heads=2, **WINDOWS), patches),
    "kimi_k25.Kimi_K25VisionModel": (
        PLAIN | dict(pos_emb_height=8, pos_emb_width=8),
        lambda: dict(pixel_values=torch.randn(96, 3, 4, 4), grid_thw=torch.tensor([[1, 8, 8], [1, 4, 8]]))),
    "video_llama_3.VideoLlama3VisionModel": (
        PLAIN, lambda: patches(3 * 4 * 4, "pixel_values", merge_sizes=torch.tensor([2, 2]))),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet():
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


def build(name, implementation, dtype=torch.float32):
    """The tower and its inputs, a configuration of its own."""
    module, _, cls = name.partition(".")
    try:
        cls = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), cls)
    except (ImportError, AttributeError):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    changes, inputs = TOWERS[name]
    torch.manual_seed(0)
    model = cls._from_config(cls.config_class(**changes), attn_implementation=implementation).to(dtype)
    return model, {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs().items()}


def run(model, inputs):
    out = model(**inputs).last_hidden_state
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return out.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.fixture
def calls(monkeypatch):
    """Lengths of the queries of each call of our attention."""
    seen, inner = [], attention_module.interval_attention
    monkeypatch.setattr(
        attention_module, "interval_attention", lambda *a, **k: (seen.append(a[0].shape[2]), inner(*a, **k))[1]
    )
    return seen


@pytest.mark.parametrize("name", TOWERS)
def test_first_call_checkpointed(name, calls):
    model, inputs = build(name, "mmlm_fast")
    assert model.config._attn_implementation == "mmlm_fast"
    before = copy.deepcopy(vars(model.config))
    model.train().gradient_checkpointing_enable()
    actual = run(model, inputs)
    assert len(set(calls)) == 1, "in pieces"
    assert len(calls) == 6, "three layers, and again in the backward pass"
    assert vars(model.config) == before
    twin, exact = (run(*build(name, "sdpa", dtype)) for dtype in (torch.float32, torch.float64))
    for a, t, e in zip(actual, twin, exact, strict=True):
        assert difference(a, t, e).ok


ONE = "qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel"


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "reentrant", "autocast", "threads"])
def test_first_call(how, calls):
    model, inputs = build(ONE, "mmlm_fast")
    twin, exact = (build(ONE, "sdpa", dtype) for dtype in (torch.float32, torch.float64))
    expected = exact[0](**exact[1]).last_hidden_state
    if how == "reentrant":
        model.train().gradient_checkpointing_enable({"use_reentrant": True})
        inputs["hidden_states"].requires_grad_()
        actual = run(model, inputs)[0]
    elif how == "threads":
        out = [None] * 4

        def call(i):
            out[i] = model(**inputs).last_hidden_state.detach()

        threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(out[0], x) for x in out)
        actual = out[0]
    else:
        with torch.autocast("cpu", torch.bfloat16) if how == "autocast" else getattr(torch, how)():
            actual = model(**inputs).last_hidden_state.detach()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        twin = twin[0](**twin[1]).last_hidden_state.detach()
    assert difference(actual, twin, expected.detach()).ok
    assert set(calls) == {128}


def test_first_call_compiled():
    """In one graph: no list of lengths is read."""
    model, inputs = build(ONE, "mmlm_fast")
    twin, exact = (build(ONE, "sdpa", dtype) for dtype in (torch.float32, torch.float64))
    attention = model.blocks[0].attn
    seen = {}
    hook = attention.register_forward_pre_hook(lambda m, a, k: seen.update(k, hidden_states=a[0]), with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
        hook.remove()
        out = torch.compile(attention, fullgraph=True, backend="aot_eager")(**seen)
        twin = twin[0].blocks[0].attn(**seen)
        double = pytree.tree_map_only(torch.Tensor, lambda x: x.double() if x.is_floating_point() else x, seen)
        assert difference(out, twin, exact[0].blocks[0].attn(**double)).ok


def test_configurations_and_models_live_on(tmp_path):
    """A second model of the configuration, copies, saved ones, and other implementations: nothing was left behind."""
    tiny = tiny_models.qwen2_5_vl()
    model = tiny.build("mmlm_fast")
    names = [c._attn_implementation for c in (model.config, model.config.text_config, model.config.vision_config)]
    first = tiny_models.output_of(model, tiny.inputs)
    for config in (model.config, copy.deepcopy(model.config)):
        assert [c._attn_implementation for c in (config, config.text_config, config.vision_config)] == names
        again = type(model)(config).eval()
        again.load_state_dict(model.state_dict())
        assert torch.equal(tiny_models.output_of(again, tiny.inputs), first)
    assert torch.equal(tiny_models.output_of(copy.deepcopy(model), tiny.inputs), first)
    model.save_pretrained(tmp_path)
    assert "mmlm" not in (tmp_path / "config.json").read_text()
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="mmlm_fast").eval()
    assert torch.equal(tiny_models.output_of(loaded, tiny.inputs), first)
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        assert model.config.vision_config._attn_implementation == name
        assert torch.equal(
            tiny_models.output_of(model, tiny.inputs), tiny_models.output_of(tiny.build(name), tiny.inputs)
        )


def test_the_other_name_is_the_same(calls):
    """Of which transformers would load a package: models are built of it all the same, and say the first name."""
    tiny = tiny_models.qwen3_vl()
    model = tiny.build("eager")
    model.set_attn_implementation({"": "mmlm_fast", "text_config": "mmlm_fast", "vision_config": "mmlm_flash"})
    assert model.config.vision_config._attn_implementation == "mmlm_fast"
    out = tiny_models.output_of(model, tiny.inputs)
    assert calls[:3] == [96] * 3
    tower, inputs = build(ONE, "mmlm_flash")
    assert tower.config._attn_implementation == "mmlm_fast"
    assert tower(**inputs).last_hidden_state.isfinite().all()
    assert torch.equal(out, tiny_models.output_of(tiny.build("mmlm_fast"), tiny.inputs))


def test_only_towers_are_asked():
    """What else asks for a flash attention, in these files and others, gets transformers' answer."""
    tiny = tiny_models.qwen2_5_vl()
    config = tiny.build("mmlm_fast").config
    file = importlib.import_module("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    asked = file.is_flash_attention_requested
    assert [asked(c) for c in (config, config.text_config, config.vision_config)] == [False, False, True]
    assert asked(requested_attention_implementation="flash_attention_2")
    assert not asked(requested_attention_implementation="mmlm_fast")
    assert not asked(config.vision_config, version=2)
    assert not transformers.utils.generic.is_flash_attention_requested(config.vision_config)
    config.vision_config._attn_implementation = "sdpa"
    assert not asked(config.vision_config)
    attention_module.register()
    assert file.is_flash_attention_requested is asked, "once"


def test_packed_calls_with_dropout(monkeypatch):
    """Where torch's attention runs, with a dense mask: the pieces stay apart."""
    model, inputs = build(ONE, "mmlm_fast")
    for block in model.train().blocks:
        block.attn.attention_dropout = 1e-9  # drops nothing, and takes that way
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model(**inputs).last_hidden_state
    torch.testing.assert_close(out, build(ONE, "sdpa")[0](**inputs).last_hidden_state)
