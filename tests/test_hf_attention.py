"""Attention inside transformers' models, against eager: outputs, gradients, generation, masks, compilation."""

import copy
import itertools
import warnings

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LlamaConfig, masking_utils
from transformers.cache_utils import DynamicCache, StaticCache

import mmlm_fast.hf
from mmlm_fast.hf import attention as attention_module
from mmlm_fast.hf.interval_mask import interval_mask, say_once
from mmlm_fast.masks import IntervalMask
from mmlm_fast.testing import difference
from support import tiny_models
from support.speech import need_recordings

STATIC_MLLAMA = Version(transformers.__version__) >= Version("5.18")


@pytest.fixture(autouse=True)
def _quiet():
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    say_once.cache_clear()
    yield
    transformers.logging.set_verbosity(before)


def run(model, tiny, double=False):
    """Output where it means something, and the gradients of all parameters in one tensor.

    Exact is sdpa in float64: eager computes its softmax in float32 even then.
    """
    inputs = {k: v.double() if double and v.is_floating_point() else v for k, v in tiny.inputs.items()}
    model.zero_grad()
    out = tiny_models.output_of(model, inputs)
    if tiny.valid is not None and out.dim() == 3 and out.shape[:2] == tiny.valid.shape:
        out = out[tiny.valid]
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    (out * weights).sum().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return out.detach(), torch.cat(gradients)


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_outputs_and_gradients(name):
    tiny = tiny_models.MODELS[name]()
    eager, ours = tiny.build("eager"), tiny.build("mmlm_fast")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        actual = run(ours, tiny)
        run(ours, tiny)
    said = [str(w.message) for w in said if "mmlm_fast" in str(w.message)]
    assert len(said) == len(tiny.says), said
    assert all(any(part in message for message in said) for part in tiny.says)
    twin, exact = run(eager, tiny), run(tiny.build("sdpa", torch.float64), tiny, double=True)
    for what, a, t, e in zip(("output", "gradients"), actual, twin, exact, strict=True):
        found = difference(a, t, e)
        assert found.ok, f"{what}: error {found.error:.2e}, allowed {found.allowed:.2e}"


@pytest.mark.parametrize("name", [n for n, build in tiny_models.MODELS.items() if build().generates])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_generation_token_by_token(name, cache):
    tiny = tiny_models.MODELS[name]()
    inputs = {k: v for k, v in tiny.inputs.items() if k != "decoder_input_ids"}
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    if cache == "static":
        options["cache_implementation"] = "static"
    if name == "mllama" and cache == "static" and not STATIC_MLLAMA:
        # Before 5.18 Mllama gives its cross-attention a static cache's whole room for keys: nobody can do it.
        for implementation in ("eager", "sdpa", "mmlm_fast"):
            with pytest.raises(RuntimeError, match="must match the size"):
                tiny.build(implementation).generate(**inputs, **options)
        return
    expected = tiny.build("eager").generate(**inputs, **options)
    assert torch.equal(tiny.build("mmlm_fast").generate(**inputs, **options), expected)
    assert expected.shape[1] >= 8


def test_bfloat16_and_float16():
    for dtype in (torch.bfloat16, torch.float16):
        tiny = tiny_models.gemma3()
        tiny.inputs["pixel_values"] = tiny.inputs["pixel_values"].to(dtype)
        actual, twin = (run(tiny.build(name, dtype), tiny) for name in ("mmlm_fast", "eager"))
        exact = run(tiny.build("sdpa", torch.float64), tiny, double=True)
        for a, t, e in zip(actual, twin, exact, strict=True):
            assert difference(a, t, e).ok


def test_image_blocks_reach_the_kernel_as_intervals(monkeypatch):
    """Which transformers' flash path drops."""
    tiny, seen = tiny_models.gemma3(), []
    inner = attention_module.interval_attention
    monkeypatch.setattr(attention_module, "interval_attention", lambda *a, **k: (seen.append(a[3]), inner(*a, **k))[1])
    tiny_models.output_of(tiny.build("mmlm_fast"), tiny.inputs)
    masks = [m for m in seen if m is not None]
    assert len(masks) == 2
    sliding, full = masks
    assert full.hi[0, 4:8].tolist() == [8] * 4
    assert full.hi[0, 8:12].tolist() == [9, 10, 11, 12]
    assert sliding.lo[0, 20] == 13


# ---- masks -----------------------------------------------------------------------------------------------------------


def compared(config_changes, build):
    """Every mask that `build` makes, as intervals and as transformers' dense mask."""
    made = []

    def both(**arguments):
        ours = interval_mask(**arguments)
        arguments |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        made.append((ours, masking_utils.sdpa_mask(**arguments), arguments))
        return ours

    transformers.AttentionMaskInterface.register("compared", both)
    transformers.AttentionInterface.register("compared", lambda *a, **k: None)
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, **config_changes)
    config._attn_implementation = "compared"
    build(config)
    assert made
    for ours, dense, arguments in made:
        if ours is None:
            plain = masking_utils.sdpa_mask(
                **(arguments | {"allow_is_causal_skip": True, "allow_is_bidirectional_skip": True})
            )
            assert plain is None
        else:
            assert ours.dtype == torch.int32, "went dense"
            assert ours.shape == (*dense.shape[:3], 2)
            mask = IntervalMask(ours[:, 0, :, 0], ours[:, 0, :, 1])
            assert torch.equal(mask.dense(dense.shape[-1])[:, None], dense)
    return made


LENGTH = 37
EMBEDS = torch.zeros(3, LENGTH, 32)
PADDING = {name: torch.ones(3, LENGTH, dtype=torch.long) for name in ("full", "left", "right", "empty")}
PADDING["left"][0, :5] = PADDING["left"][2, :9] = PADDING["right"][1, 30:] = PADDING["empty"][1] = 0
BLOCK_IDS = torch.full((3, LENGTH), -1)
BLOCK_IDS[:, 4:10], BLOCK_IDS[:, 20:29] = 0, 1
PACKED = torch.cat([torch.arange(11), torch.arange(20), torch.arange(6)])[None].expand(3, -1)
BUILDERS = {
    "causal": ({}, masking_utils.create_causal_mask),
    "sliding": ({"sliding_window": 8}, masking_utils.create_sliding_window_causal_mask),
    "chunked": ({"attention_chunk_size": 8}, masking_utils.create_chunked_causal_mask),
}


@pytest.mark.parametrize("padding", [None, *PADDING])
@pytest.mark.parametrize("kind", BUILDERS)
def test_masks_of_decoders(kind, padding):
    changes, create = BUILDERS[kind]
    mask = None if padding is None else PADDING[padding]
    compared(changes, lambda config: create(config, EMBEDS, mask, None))
    if kind != "chunked":
        compared(changes, lambda config: create(config, EMBEDS, mask, None, block_sequence_ids=BLOCK_IDS))


@pytest.mark.parametrize("padding", [None, *PADDING])
def test_masks_of_encoders(padding):
    mask = None if padding is None else PADDING[padding]
    compared({}, lambda config: masking_utils.create_bidirectional_mask(config, EMBEDS, mask))
    window = {"sliding_window": 6}
    compared(window, lambda config: masking_utils.create_bidirectional_sliding_window_mask(config, EMBEDS, mask))
    keys = torch.zeros(3, 19, 32)
    compared(
        {}, lambda config: masking_utils.create_bidirectional_mask(config, EMBEDS, None, encoder_hidden_states=keys)
    )


@pytest.mark.parametrize("kind", ["causal", "sliding"])
def test_masks_of_packed_sequences(kind):
    changes, create = BUILDERS[kind]
    compared(changes, lambda config: create(config, EMBEDS, None, None, position_ids=PACKED))


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
@pytest.mark.parametrize("kind", ["causal", "sliding"])
def test_masks_with_caches(kind, cache_class):
    changes, create = BUILDERS[kind]
    layers = {"layer_types": ["sliding_attention"] * 2} if kind == "sliding" else {}
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, **changes, **layers)
    cache = cache_class(config=config, **({"max_cache_len": 64} if cache_class is StaticCache else {}))
    seen = 0
    for step in (37, 1, 1, 3):
        seen += step
        mask = torch.ones(3, seen, dtype=torch.long)
        mask[0, :5] = 0
        for padding in (mask, None):
            compared(changes | layers, lambda c: create(c, torch.zeros(3, step, 32), padding, cache))  # noqa: B023
        for layer in range(2):
            cache.update(torch.zeros(3, 4, step, 8), torch.zeros(3, 4, step, 8), layer)


@pytest.mark.parametrize(
    "reason", ["padding with holes", "an image that stands in two places", "not transformers' own"]
)
def test_what_is_no_interval_goes_dense_and_says_so_once(reason):
    mask, changes = None, {}
    if reason == "padding with holes":
        mask = PADDING["full"].clone()
        mask[1, 10:12] = 0
    elif reason.startswith("an image"):
        changes["block_sequence_ids"] = torch.where(BLOCK_IDS >= 0, 0, -1)
    else:
        changes["and_mask_function"] = lambda b, h, q, k: (q + k) % 2 == 0
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2)
    results = []
    for name in ("mmlm_fast", "sdpa"):
        config._attn_implementation = name
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(2):
                results.append(masking_utils.create_causal_mask(config, EMBEDS, mask, None, **changes))
        said = [w for w in said if "mmlm_fast" in str(w.message)]
        assert len(said) == (name == "mmlm_fast")
        assert all(reason in str(w.message) for w in said)
    assert results[0].dtype == torch.bool
    assert torch.equal(results[0], results[2])


class Layer(torch.nn.Module):
    is_causal = True
    num_key_value_groups = 2


def call(name, *args, **kwargs):
    return transformers.AttentionInterface()[name](Layer(), *args, **kwargs)[0]


@pytest.mark.parametrize(
    "what", ["dropout", "position_bias", "float mask", "softcap with a float mask", "sinks with dropout"]
)
def test_dense_paths(what):
    """What no kernel does: the same as transformers' sdpa, or eager for caps and sinks."""
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    bounds = interval_mask(2, 9, 9, attention_mask=torch.tensor([[1] * 9, [0] * 3 + [1] * 6]).bool())
    dense = IntervalMask(bounds[:, 0, :, 0], bounds[:, 0, :, 1]).dense(9)[:, None]
    bias = torch.randn(2, 4, 9, 9)
    with pytest.warns(UserWarning, match=r"mmlm_fast: Layer: .*dense mask"):  # noqa: PT031
        if what == "dropout":
            torch.manual_seed(3)
            ours = call("mmlm_fast", q, k, v, bounds, dropout=0.5)
            torch.manual_seed(3)
            assert torch.equal(ours, call("sdpa", q, k, v, dense, dropout=0.5))
        elif what == "position_bias":
            ours = call("mmlm_fast", q, k, v, bounds, position_bias=bias)
            assert torch.equal(ours, call("sdpa", q, k, v, dense, position_bias=bias))
        elif what == "float mask":
            assert torch.equal(call("mmlm_fast", q, k, v, bias), call("sdpa", q, k, v, bias))
        elif what.startswith("softcap"):
            additive = torch.where(dense, 0.0, -torch.inf)
            ours = call("mmlm_fast", q, k, v, additive, softcap=2.0)
            torch.testing.assert_close(ours[:, 3:], call("mmlm_fast", q, k, v, bounds, softcap=2.0)[:, 3:])
        else:
            sinks = torch.randn(4)
            torch.manual_seed(3)
            ours = call("mmlm_fast", q, k, v, bounds, s_aux=sinks, dropout=0.5)
            torch.manual_seed(3)
            scores = (q @ k.repeat_interleave(2, 1).mT * 8**-0.5).masked_fill(~dense, -torch.inf)
            weights = torch.cat([scores, sinks[None, :, None, None].expand(2, 4, 9, 1)], -1).softmax(-1)[..., :9]
            expected = torch.nn.functional.dropout(weights, 0.5) @ v.repeat_interleave(2, 1)
            torch.testing.assert_close(ours, expected.transpose(1, 2))


def test_without_a_mask():
    """Causal by the module's word or the call's; a static cache's empty room is cut off; a single query sees all."""
    q, k, v = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 12, 8), torch.randn(1, 2, 12, 8)
    for is_causal in (None, True, False):
        torch.testing.assert_close(
            call("mmlm_fast", q, k, v, None, is_causal=is_causal), call("sdpa", q, k, v, None, is_causal=is_causal)
        )
    torch.testing.assert_close(call("mmlm_fast", q[:, :, :1], k, v, None), call("sdpa", q[:, :, :1], k, v, None))
    with torch.inference_mode():
        inside = call("mmlm_fast", q, k, v, None)
    q.requires_grad_()
    assert torch.equal(call("mmlm_fast", q, k, v, None).detach(), inside)


def test_cu_seqlens():
    cu = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    q, k, v = (torch.randn(1, h, 9, 8) for h in (4, 2, 2))
    ours = call("mmlm_flash", q, k, v, None, is_causal=False, cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=5)
    parts = [call("sdpa", *(x[:, :, a:b] for x in (q, k, v)), None, is_causal=False) for a, b in ((0, 4), (4, 9))]
    torch.testing.assert_close(ours, torch.cat(parts, 1))


@pytest.mark.parametrize("what", ["dropout", "bool mask", "float mask", "softcap", "sinks"])
def test_cu_seqlens_on_dense_paths(what):
    """Samples stay apart whichever way a call goes."""
    cu, pieces = torch.tensor([0, 4, 9], dtype=torch.int32), [slice(0, 4), slice(4, 9)]
    q, k, v = (torch.randn(1, h, 9, 8) for h in (4, 2, 2))
    options, mask = {}, None
    if what.endswith("mask"):
        mask = torch.randn(1, 1, 9, 9) if what == "float mask" else torch.rand(1, 1, 9, 9) + torch.eye(9) > 0.5
    else:
        options["dropout"] = 1e-9  # drops nothing, and takes that way
    if what == "softcap":
        options["softcap"] = 2.0
    if what == "sinks":
        options["s_aux"] = torch.randn(4)
    with pytest.warns(UserWarning, match="dense mask"):
        ours = call("mmlm_fast", q, k, v, mask, cu_seq_lens_q=cu, cu_seq_lens_k=cu, **options)
    parts = []
    for p in pieces:
        part = None if mask is None else mask[..., p, p]
        parts.append(call("mmlm_fast", q[:, :, p], k[:, :, p], v[:, :, p], part, **options))
    torch.testing.assert_close(ours, torch.cat(parts, 1))


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_5_vl", "mllama"])
def test_cu_seqlens_of_the_text_beside_pictures(name):
    """They are handed to every attention of a decoder, and mean its own; each row here is one sample."""
    tiny = tiny_models.MODELS[name]()
    inputs = {k: v for k, v in tiny.inputs.items() if k != "attention_mask"}
    length = inputs["input_ids"].shape[1]
    cu = torch.tensor([0, length, 2 * length], dtype=torch.int32)
    try:
        out = tiny_models.output_of(tiny.build("mmlm_fast"), inputs, cu_seq_lens_q=cu, cu_seq_lens_k=cu)
    except TypeError as error:
        if "multiple values for keyword argument 'cu_seq_lens_q'" not in str(error):
            raise
        pytest.skip("this version's tower gives its attention the text's cu_seqlens beside its own, under any name")
    torch.testing.assert_close(out, tiny_models.output_of(tiny.build("mmlm_fast"), inputs))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("cls", ["Bart", "Marian", "Whisper", "Speech2Text"])
def test_cu_seqlens_of_the_text_in_encoder_decoders(cls, batch):
    """One class of modules is their encoder's, their decoder's and the attention between them."""
    sizes = dict(vocab_size=128, d_model=32, encoder_layers=1, decoder_layers=1, pad_token_id=0, dropout=0.0)
    sizes |= dict(encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48)
    name = {"Marian": "MarianMTModel"}.get(cls, f"{cls}ForConditionalGeneration")
    config = getattr(transformers, f"{cls}Config")(**sizes, decoder_start_token_id=2)
    inputs = {"input_ids": torch.randint(3, 90, (batch, 17))}
    if cls in ("Whisper", "Speech2Text"):
        shape = (batch, 80, 3000) if cls == "Whisper" else (batch, 64, 80)
        inputs = {"input_features": torch.randn(shape)}
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    ids = torch.randint(3, 90, (batch, 6))
    cu = torch.arange(0, 6 * batch + 1, 6, dtype=torch.int32)  # each row one sample: nothing changes
    model.set_attn_implementation("mmlm_fast")
    with torch.no_grad():
        expected = model(**inputs, decoder_input_ids=ids, use_cache=False).logits
        given = model(**inputs, decoder_input_ids=ids, use_cache=False, cu_seq_lens_q=cu, cu_seq_lens_k=cu).logits
    torch.testing.assert_close(given, expected)


def test_integer_masks_are_no_intervals():
    q = torch.randn(1, 2, 12, 8)
    wrong = torch.tril(torch.ones(1, 1, 12, 12, dtype=torch.int32))
    with pytest.raises(ValueError, match="attention_mask must be bool or floating"):
        call("mmlm_fast", q, q, q, wrong)
    with pytest.raises(ValueError, match="cu_seq_lens_q must be a tensor, got list"):
        call("mmlm_fast", q, q, q, None, cu_seq_lens_q=[0, 12])


def test_chunks_of_packed_samples_behind_padding():
    text = tiny_models.text(head_dim=8, intermediate_size_mlp=48, num_local_experts=2, num_experts_per_tok=1)
    kinds = dict(layer_types=["chunked_attention", "full_attention"], no_rope_layers=[1, 0], moe_layers=[])
    config = transformers.Llama4TextConfig(**text, attention_chunk_size=4, **kinds)
    torch.manual_seed(0)
    model = transformers.Llama4ForCausalLM(config).eval()
    ids = torch.randint(3, 90, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    cu = torch.tensor([0, 12, 24])
    outs = []
    for name, packed in (("eager", {}), ("mmlm_fast", dict(cu_seq_lens_q=cu, cu_seq_lens_k=cu))):
        model.set_attn_implementation(name)
        with torch.no_grad():
            outs.append(model(input_ids=ids, attention_mask=mask, use_cache=False, **packed).logits[mask.bool()])
    torch.testing.assert_close(*outs)


def test_a_buffer_of_cu_seqlens_filled_anew():
    """As a collator's is, by NumPy or through ``data``: no version counts it."""
    q = torch.randn(1, 4, 12, 8)
    buffer = np.array([0, 5, 12], dtype=np.int32)
    cu = torch.from_numpy(buffer)
    for change in (lambda: buffer.__setitem__(1, 9), lambda: cu.data.__setitem__(1, 3)):
        call("mmlm_fast", q, q, q, None, cu_seq_lens_q=cu)
        change()
        found, expected = (call("mmlm_fast", q, q, q, None, cu_seq_lens_q=c) for c in (cu, cu.clone()))
        assert torch.equal(found, expected)


def test_masks_of_fake_tensors_are_not_kept():
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny_models.text())).eval()
    model.set_attn_implementation("mmlm_fast")
    ids = torch.randint(3, 90, (2, 210))
    for _ in range(2):
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            model(input_ids=torch.zeros(2, 210, dtype=torch.long))
        with torch.no_grad():
            assert model(input_ids=ids).logits.isfinite().all()


def test_per_sample_gradients_with_padding():
    from torch.func import functional_call, grad, vmap

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny_models.text())).eval()
    ids, mask = torch.randint(3, 90, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[1, :3] = 0
    parameters = {k: v.detach() for k, v in model.named_parameters()}

    def loss(p, x, m):
        keywords = dict(input_ids=x[None], attention_mask=m[None], use_cache=False)
        return (functional_call(model, p, kwargs=keywords).logits[0] * m[:, None]).square().mean()

    found = []
    for name in ("eager", "mmlm_fast"):
        model.set_attn_implementation(name)
        found.append(vmap(grad(loss), (None, 0, 0))(parameters, ids, mask))
    torch.testing.assert_close(*found)


def test_cu_seqlens_of_several_rows():
    """As transformers' flash attention counts them: through all rows of the batch."""
    cu = torch.tensor([0, 4, 9, 12, 18], dtype=torch.int32)
    q, k, v = (torch.randn(2, h, 9, 8) for h in (4, 2, 2))
    ours = call("mmlm_fast", q, k, v, None, cu_seq_lens_q=cu, cu_seq_lens_k=cu)
    for row, places in enumerate(((0, 4, 9), (0, 3, 9))):
        for a, b in itertools.pairwise(places):
            alone = call("mmlm_fast", *(x[row : row + 1, :, a:b] for x in (q, k, v)), None)
            torch.testing.assert_close(ours[row : row + 1, a:b], alone)
    with pytest.raises(ValueError, match="a sequence goes over the end of a row"):
        call("mmlm_fast", q, k, v, None, cu_seq_lens_q=torch.tensor([0, 4, 18]))
    for wrong in ([0, 4, 20], [4, 5], [0, 5, 4, 18], [2, 18]):
        with pytest.raises(ValueError, match="cu_seqlens must be the places where sequences begin"):
            call("mmlm_fast", q, k, v, None, cu_seq_lens_q=torch.tensor(wrong))


def test_kept_masks_of_cu_seqlens_are_those_of_their_tensors():
    """Made once for all layers, and again where a tensor changed, or another took its place."""
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    q, k, v = (torch.randn(1, h, 9, 8) for h in (4, 2, 2))
    bounds = interval_mask(1, 9, 9, mask_function=masking_utils.sliding_window_causal_mask_function(3))
    kept = call("mmlm_fast", q, k, v, bounds, cu_seq_lens_q=cu)
    fresh = call("mmlm_fast", q, k, v, bounds.clone(), cu_seq_lens_q=cu.clone())
    assert torch.equal(kept, call("mmlm_fast", q, k, v, bounds, cu_seq_lens_q=cu))
    assert torch.equal(kept, fresh)
    bounds[..., 0] = 0
    changed = call("mmlm_fast", q, k, v, bounds, cu_seq_lens_q=cu)
    assert torch.equal(changed, call("mmlm_fast", q, k, v, None, cu_seq_lens_q=cu))
    cu[1] = 6
    torch.testing.assert_close(call("mmlm_fast", q, k, v, None, cu_seq_lens_q=cu)[:, :6],
                               call("mmlm_fast", *(x[:, :, :6] for x in (q, k, v)), None))  # fmt: skip


def packed_families():
    """Decoders with layers that see a window or a chunk, besides those that see all."""
    sizes, layers = tiny_models.text(head_dim=8), ["sliding_attention", "full_attention"]
    window = dict(sliding_window=4, **sizes)
    chunks = dict(attention_chunk_size=4, intermediate_size_mlp=48, num_local_experts=2, no_rope_layers=[1, 0])
    experts = dict(num_local_experts=2, num_experts_per_tok=1)
    return {
        "Llama": sizes,
        "Mistral": window,
        "Phi3": window,
        "Qwen2": dict(use_sliding_window=True, max_window_layers=1, **window),
        "Gemma2": dict(layer_types=layers, query_pre_attn_scalar=8, **window),
        "Gemma3": dict(layer_types=layers, query_pre_attn_scalar=8, **window),
        "Cohere2": dict(layer_types=layers, **window),
        "GptOss": dict(layer_types=layers, **experts, **window),
        "Llama4": chunks | sizes,
    }


@pytest.mark.parametrize("name", packed_families())
def test_packed_samples_by_cu_seqlens(name):
    """Each as if it were alone, whatever else the layers see, with a mask of ones or a cache, trained or not."""
    text = "Text" if name in ("Gemma3", "Llama4") else ""
    config = getattr(transformers, f"{name}{text}Config")(**packed_families()[name])
    model = tiny_models.Tiny(getattr(transformers, f"{name}ForCausalLM"), config, {}).build("mmlm_fast")
    sizes = [9, 3, 11]
    ids, cu = torch.randint(10, 90, (1, 23)), torch.tensor([0, 9, 12, 23], dtype=torch.int32)
    packed = dict(input_ids=ids, position_ids=torch.cat([torch.arange(n) for n in sizes])[None])
    flash = dict(cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=11, max_length_k=11)
    with torch.no_grad():
        alone = torch.cat([model(input_ids=x).logits for x in ids.split(sizes, 1)], 1)
        cached = dict(use_cache=True, past_key_values=StaticCache(config=model.config, max_cache_len=40))
        for more in (dict(use_cache=False), dict(use_cache=True), dict(attention_mask=torch.ones_like(ids)), cached):
            torch.testing.assert_close(model(**packed, **flash, **more).logits, alone, rtol=1e-4, atol=1e-5)
        by_positions = model(**packed, use_cache=False).logits  # which GptOss's masks are not told, in transformers
        model.set_attn_implementation("eager")
        torch.testing.assert_close(by_positions, model(**packed, use_cache=False).logits, rtol=1e-4, atol=1e-5)
        model.set_attn_implementation("mmlm_fast")
    weights = torch.randn(128)
    gradients = []
    for logits in (
        model(**packed, **flash, attention_mask=torch.ones_like(ids)).logits,
        torch.cat([model(input_ids=x).logits for x in ids.split(sizes, 1)], 1),
    ):
        model.zero_grad()
        (logits @ weights).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


def test_gradient_checkpointing_and_training_step():
    tiny = tiny_models.gemma3()
    pixels, gradients = tiny.inputs["pixel_values"], []
    for implementation, dtype in (("mmlm_fast", torch.float32), ("eager", torch.float32), ("sdpa", torch.float64)):
        model = tiny.build(implementation, dtype).train()
        model.gradient_checkpointing_enable()
        tiny.inputs["pixel_values"] = pixels.to(dtype)
        # A padded row sees nothing; eager averages over everything there. Nor may its prediction count.
        labels = tiny.inputs["input_ids"].masked_fill(~tiny.valid | ~tiny.valid.roll(1, 1), -100)
        model(**tiny.inputs, labels=labels).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    found = difference(*gradients)
    assert found.ok, f"error {found.error:.2e}, allowed {found.allowed:.2e}"


def test_compiles_in_one_graph():
    """The mask built inside the graph; new padding does not compile again."""
    tiny = tiny_models.llava()
    decoder = tiny.build("mmlm_fast").model.language_model
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(decoder, fullgraph=True, backend=counter)
    ids = torch.randint(5, 90, (2, 16))
    for padding in (3, 7):
        mask = torch.ones_like(ids)
        mask[1, :padding] = 0
        ours = compiled(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        twin, exact = (
            tiny.build("sdpa", dtype).model.language_model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
            for dtype in (torch.float32, torch.float64)
        )
        assert difference(ours[mask.bool()], twin[mask.bool()], exact[mask.bool()]).ok
        ours.sum().backward()
    assert counter.frame_count == 1


@pytest.mark.parametrize("fullgraph", [pytest.param(False, marks=pytest.mark.slow), True])
def test_any_padding_compiles(fullgraph):
    """Also what is no interval, with gradients and without, where the lengths change too; as eager computes it."""
    config = LlamaConfig(**tiny_models.text(num_hidden_layers=1))
    twin, exact = (
        tiny_models.Tiny(transformers.LlamaForCausalLM, config, {}).build("sdpa", dtype)
        for dtype in (torch.float32, torch.float64)
    )
    model = tiny_models.Tiny(transformers.LlamaForCausalLM, config, {}).build("mmlm_fast")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=fullgraph, dynamic=True, backend=counter)
    for length, places in ((17, [5, 6]), (17, [0, 1, 2]), (23, [2, 9])):
        ids = torch.randint(3, 90, (2, length))
        mask = torch.ones_like(ids)
        mask[1, places] = 0
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        results = []
        for m in (compiled, twin, exact):
            (model if m is compiled else m).zero_grad()
            out = m(**inputs).logits[mask.bool()]
            out.square().sum().backward()
            grads = [p.grad.flatten() for p in (model if m is compiled else m).parameters()]
            results.append((out.detach(), torch.cat(grads)))
        for a, t, e in zip(*results, strict=True):
            assert difference(a, t, e).ok
    with torch.no_grad():
        assert difference(compiled(**inputs).logits[mask.bool()], results[1][0], results[2][0]).ok
    assert counter.frame_count > 0


def test_an_image_in_two_places_compiles():
    """As eager: with a dense mask."""
    ids = torch.full((1, 12), -1)
    ids[:, 2:4] = ids[:, 7:9] = 0
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2)
    config._attn_implementation = "mmlm_fast"

    def build(embeds, ids):
        return masking_utils.create_causal_mask(config, embeds, None, None, block_sequence_ids=ids)

    embeds = torch.zeros(1, 12, 32)
    for fullgraph in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(build, fullgraph=fullgraph, backend="eager")
        assert torch.equal(compiled(embeds, ids), build(embeds, ids))


def test_plainly_causal_masks_are_none_in_a_graph():
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2)
    config._attn_implementation = "mmlm_fast"
    compiled = torch.compile(
        lambda x: masking_utils.create_causal_mask(config, x, None, None), fullgraph=True, backend="eager"
    )
    assert compiled(EMBEDS) is None


@pytest.mark.parametrize("padding", ["holes", "left"])
def test_compiled_generation_with_a_static_cache(padding):
    from transformers.generation.configuration_utils import CompileConfig

    tiny = tiny_models.llava()
    if padding == "holes":
        tiny.inputs["attention_mask"][0, 10:12] = 0
    model = tiny.build("mmlm_fast")
    compile_config = CompileConfig(fullgraph=True, dynamic=False, backend="aot_eager", mode=None)
    compile_config._compile_all_devices = True
    options = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0, cache_implementation="static")
    plain = model.generate(**tiny.inputs, **options)
    assert torch.equal(plain, model.generate(**tiny.inputs, **options, compile_config=compile_config))
    assert torch.equal(plain, tiny.build("sdpa").generate(**tiny.inputs, **options))


@pytest.mark.parametrize("name", ["Llama", "Mistral", "GptOss"])
def test_continuous_batching(name):
    """The tokens of sdpa, or of eager where sdpa has no sinks; afterwards the model runs on our attention again."""
    config = getattr(transformers, f"{name}Config")(**packed_families()[name])
    tiny = tiny_models.Tiny(getattr(transformers, f"{name}ForCausalLM"), config, {})
    options = dict(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)

    few = transformers.ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64)

    def tokens(model):
        results = model.generate_batch(
            inputs=[[5, 6, 7], [8, 9], list(range(10, 25))],
            generation_config=transformers.GenerationConfig(**options),
            continuous_batching_config=few,
        )
        return [r.generated_tokens for r in results.values()]

    model = tiny.build("mmlm_fast")
    expected = tokens(tiny.build("eager" if name == "GptOss" else "sdpa"))
    for _ in range(2):
        assert tokens(model) == expected
        assert model.config._attn_implementation == "mmlm_fast"
    plain = model.generate(torch.tensor([[5, 6, 7]]), **options | {"eos_token_id": None})
    assert plain[0, 3:].tolist() == expected[0]


def test_saved_models_do_not_need_us(tmp_path):
    tiny = tiny_models.llava()
    tiny.build("mmlm_fast").save_pretrained(tmp_path)
    assert "mmlm" not in (tmp_path / "config.json").read_text()
    loaded = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="mmlm_fast")
    assert loaded.config._attn_implementation == "mmlm_fast"
    copy.deepcopy(loaded)


def test_registered_by_import():
    assert mmlm_fast.hf.register is not None
    for name in ("mmlm_fast", "mmlm_flash"):
        assert name in transformers.AttentionInterface().valid_keys()
        assert name in transformers.AttentionMaskInterface().valid_keys()


def test_packed_documents_in_one_row():
    """Position ids that start again: each document sees itself only, as with eager, gradients too."""
    config = LlamaConfig(**tiny_models.text())
    ids = torch.randint(5, 90, (2, LENGTH))
    inputs = {"input_ids": ids, "position_ids": PACKED[:2], "use_cache": False}
    tiny = tiny_models.Tiny(transformers.LlamaForCausalLM, config, inputs)
    eager, ours = tiny.build("eager"), tiny.build("mmlm_fast")
    actual, twin = run_tensors(ours, inputs), run_tensors(eager, inputs)
    exact = run_tensors(tiny.build("sdpa", torch.float64), inputs)
    for a, t, e in zip(actual, twin, exact, strict=True):
        assert difference(a, t, e).ok
    alone = ours(input_ids=ids[:, 11:31], use_cache=False).logits
    assert difference(alone, twin[0][:, 11:31], exact[0][:, 11:31]).ok


def run_tensors(model, inputs):
    out = model(**inputs).logits
    out.square().sum().backward()
    return out.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def test_tokens_behind_the_image_ids_are_text():
    """Ids of the prompt only, whose last token is an image's: what is generated after it is none."""
    function = masking_utils.blockwise_overlay(torch.zeros(1, 5, dtype=torch.long))
    bounds = interval_mask(1, 3, 8, q_offset=4, mask_function=function)
    assert bounds[0, 0].tolist() == [[0, 5], [0, 0], [0, 0]]


def test_the_thin_model():
    from mmlm_benchmarks.models.thin import build

    need_recordings()
    model, _, batch = build("merge", "cpu", num_hidden_layers=1)
    with torch.no_grad():
        before = model(**batch).logits
        model.set_attn_implementation("mmlm_fast")
        after = model(**batch).logits
        model.set_attn_implementation("sdpa")
        double = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        exact = model.double()(**double).logits
    assert difference(after, before, exact).ok
    assert not torch.equal(after, before)
