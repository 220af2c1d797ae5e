"""How often the host waits for a GPU to know a mask, and what layers share. No GPU needed: looks are counted."""

import threading

import pytest
import torch
import transformers
from transformers import masking_utils

from mmlm_fast.hf import attention as attention_module
from mmlm_fast.hf import interval_mask as mask_module
from mmlm_fast.hf import looks
from mmlm_fast.hf.interval_mask import interval_mask
from mmlm_fast.hf.looks import Seen, Shape, continued
from mmlm_fast.masks import IntervalMask
from support import tiny_models

LOOKS = (
    "tolist", "item", "__bool__", "__int__", "__float__", "__index__", "__contains__", "nonzero", "cpu", "numpy",
    "equal", "allclose", "masked_select", "unique", "is_nonzero",
)  # fmt: skip


class Looks(torch.overrides.TorchFunctionMode):
    """Counts what makes the host wait for a tensor's values."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += getattr(function, "__name__", "") in LOOKS
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(looks, "looking_is_free", lambda device: False)
    monkeypatch.setattr(looks, "_state", looks._State())
    mask_module.say_once.cache_clear()


def look(**arguments):
    """The mask, and how often its values were looked at."""
    with Looks() as mode:
        mask = interval_mask(**arguments)
    return mask, mode.count


def prompt(mask, **changes):
    length = mask.shape[1]
    return dict(batch_size=mask.shape[0], q_length=length, kv_length=length, attention_mask=mask) | changes


def step(mask, **changes):
    """Of one token behind those before."""
    return prompt(mask, q_length=1, q_offset=mask.shape[1] - 1, **changes)


def grown(mask, *columns):
    return torch.cat([mask, torch.tensor(columns or [[True]] * len(mask))], dim=1)


def is_right(mask, arguments):
    dense = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    if mask is None:
        assert dense.all()
    elif mask.dtype == torch.bool:
        assert torch.equal(mask, dense)
    else:
        mask = IntervalMask(mask[:, 0, :, 0], mask[:, 0, :, 1])
        assert torch.equal(mask.dense(dense.shape[-1])[:, None], dense)
    return True


MASKS = {
    "full": [[1, 1, 1, 1, 1, 1]] * 2,
    "one, full": [[1, 1, 1, 1, 1, 1]],
    "left": [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]],
    "one, left": [[0, 0, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]],
    "holes": [[1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]],
    "nothing": [[0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]],
}
MASKS = {name: torch.tensor(rows, dtype=torch.bool) for name, rows in MASKS.items()}


def test_a_prompt_with_pictures_is_looked_at_once():
    """Gemma 3: causal or in one picture, and the same in a window; padding, ids and gaps were asked one by one."""
    ids = torch.tensor([[-1, 0, 0, -1, 1, 1]] * 2)
    block = masking_utils.blockwise_overlay(ids)
    causal = masking_utils.causal_mask_function
    window = masking_utils.sliding_window_causal_mask_function(3)
    total = 0
    for function in (causal, window):
        arguments = prompt(MASKS["left"], mask_function=masking_utils.or_masks(function, block))
        mask, count = look(**arguments)
        assert mask.dtype == torch.int32
        assert is_right(mask, arguments)
        total += count
    assert total == 1
    assert look(**prompt(MASKS["left"].clone(), mask_function=masking_utils.or_masks(causal, block)))[1] == 1
    assert look(**prompt(MASKS["full"].clone()))[1] == 1
    ids[:, 5] = 0
    mask, count = look(**prompt(MASKS["left"], mask_function=masking_utils.or_masks(causal, block)))
    assert count == 1, "changed in place"
    assert mask.dtype == torch.bool, "and in two places"


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("static", [False, True])
def test_decoding_does_not_look(name, window, static):
    """Six steps behind each kind of padding, with two kinds of layers: the right mask each time."""
    mask, function = MASKS[name], masking_utils.causal_mask_function
    if window is not None:
        function = masking_utils.sliding_window_causal_mask_function(window)
    cache = {"kv_length": 20} if static else {}
    assert look(**prompt(mask, **cache))[1] == 1
    for _ in range(6):
        mask = grown(mask)
        for arguments in (step(mask, **cache), step(mask.clone(), mask_function=function, **cache)):
            made, count = look(**arguments)
            assert count == 0
            assert is_right(made, arguments)
            dense = made is not None and made.dtype == torch.bool
            assert dense == (name in ("right", "holes", "nothing"))
    if name == "one, full" and not static:
        assert look(**step(mask))[0] is None, "torch's mask-free attention"


def test_a_window_cache_holds_the_last_keys_only():
    """The mask of all tokens, keys of the last four."""
    mask = MASKS["left"]
    look(**prompt(mask))
    for _ in range(4):
        mask = grown(mask)
        arguments = step(mask, kv_length=4, kv_offset=mask.shape[1] - 4)
        made, count = look(**arguments)
        assert count == 0
        assert is_right(made, arguments)


def test_holes_outside_the_window_of_the_first_mask():
    """It is intervals; of the whole mask, which the next kind of layer sees in the same step, that is not known."""
    mask = MASKS["holes"]
    made, _ = look(**prompt(mask, q_length=2, q_offset=4, kv_length=3, kv_offset=3))
    assert made.dtype == torch.int32
    made, count = look(**step(mask))
    assert count == 0
    assert made.dtype == torch.bool
    assert is_right(made, step(mask))


def test_a_caller_may_mask_the_steps_of_samples_that_have_ended():
    mask = MASKS["full"]
    look(**prompt(mask))
    for _ in range(3):
        mask = grown(mask, [True], [False])
        made, count = look(**step(mask))
        assert count == 0
        assert is_right(made, step(mask))


@pytest.mark.parametrize("name", ["full", "left", "one, full"])
def test_another_mask_than_said_is_an_error(name):
    """A hole made while decoding: never taken for an interval."""
    look(**prompt(MASKS[name]))
    mask = grown(MASKS[name])
    mask[0, 4] = False
    with pytest.raises(RuntimeError, match="attention_mask of a decoding step must be that of the last step"):
        look(**step(mask))


@pytest.mark.parametrize(
    "before", [None, "another batch", "another length", "somebody's single query", "another thread's"]
)
def test_a_step_that_follows_nothing_is_looked_at(before):
    """Batches that shrink, caches that are cut, poolers with one query: read, and right."""
    mask = grown(MASKS["left"])
    if before == "another batch":
        look(**prompt(torch.ones(5, 6, dtype=torch.bool)))
    elif before == "another length":
        look(**prompt(torch.ones(2, 3, dtype=torch.bool)))
    elif before == "somebody's single query":
        assert look(**step(torch.ones(2, 7, dtype=torch.bool)))[1] == 1
    elif before == "another thread's":
        state = looks._state
        thread = threading.Thread(target=lambda: look(**prompt(MASKS["full"])))
        thread.start()
        thread.join()
        assert state.last is None
    holes = mask.clone()
    holes[0, 4] = False
    made, count = look(**step(holes))
    assert count == 1
    assert made.dtype == torch.bool
    assert is_right(made, step(holes))


CPU, FULL, LEFT, RUN, HOLES = torch.device("cpu"), *Shape


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (None, None),
        (Seen(CPU, 2, 6, FULL, True), FULL),
        (Seen(CPU, 2, 6, LEFT, False), LEFT),
        (Seen(CPU, 2, 6, RUN, True), HOLES),
        (Seen(CPU, 2, 6, HOLES, True), HOLES),
        (Seen(CPU, 2, 7, RUN, True), RUN),
        (Seen(CPU, 2, 7, HOLES, True), HOLES),
        (Seen(CPU, 2, 7, FULL, False), None),
        (Seen(CPU, 2, 5, FULL, True), None),
        (Seen(CPU, 2, 8, FULL, True), None),
        (Seen(CPU, 3, 6, FULL, True), None),
        (Seen(torch.device("meta"), 2, 6, FULL, True), None),
    ],
)
def test_what_a_step_continues(last, expected):
    assert continued(last, CPU, 2, 7) is expected


def test_generated_text_behind_an_image_in_two_places():
    """Ids that the model hands over in each step: the prompt's mask was dense, generated text sees no image."""
    ids = torch.tensor([[0, -1, 0, -1, -1, -1, -1]])
    function = masking_utils.or_masks(masking_utils.causal_mask_function, masking_utils.blockwise_overlay(ids))
    arguments = step(grown(MASKS["one, full"]), mask_function=function)
    look(**prompt(MASKS["one, full"]))
    made, count = look(**arguments)
    assert count == 0
    assert is_right(made, arguments)
    ids[0, 6] = 0
    with pytest.raises(RuntimeError, match="stands in two places"):
        look(**arguments)


def test_decoding_on_a_device_reads_nothing():
    """Tensors of "meta" have no values to read."""
    block = masking_utils.blockwise_overlay(torch.empty(2, 9, dtype=torch.int64, device="meta"))
    function = masking_utils.or_masks(masking_utils.sliding_window_causal_mask_function(4), block)
    for shape in (FULL, LEFT):
        looks._state.last = Seen(torch.device("meta"), 2, 6, shape, True)
        for length in (7, 8, 9):
            mask = torch.empty(2, length, dtype=torch.bool, device="meta")
            for arguments in ({}, {"mask_function": function}):
                made = interval_mask(**step(mask, device="meta", **arguments))
                assert made.shape == (2, 1, 1, 2)
                assert made.is_meta
    looks._state.last = None
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        interval_mask(**step(mask, device="meta"))


def test_inference_tensors_are_asked_each_time():
    with torch.inference_mode():
        mask = MASKS["left"].clone()
        assert look(**prompt(mask))[1] == 1
        mask[0, 2] = False
        made, count = look(**prompt(mask))
        assert count == 1
        assert is_right(made, prompt(mask))


@pytest.mark.parametrize("name", [n for n, build in tiny_models.MODELS.items() if build().generates])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_looks_at_the_prompt_only(name, cache):
    seen = []

    def counted(**arguments):
        mask, count = look(**arguments)
        seen.append((arguments["q_length"], count))
        assert count <= 1
        return mask

    tiny = tiny_models.MODELS[name]()
    inputs = {k: v for k, v in tiny.inputs.items() if k != "decoder_input_ids"}
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    if cache == "static":
        options["cache_implementation"] = "static"
    try:
        expected = tiny.build("eager").generate(**inputs, **options)
    except RuntimeError as error:  # Mllama with a static cache in transformers 5.17
        pytest.skip(f"not even eager: {error}")
    masks = transformers.AttentionMaskInterface
    try:
        masks.register("mmlm_fast", counted)
        assert torch.equal(tiny.build("mmlm_fast").generate(**inputs, **options), expected)
    finally:
        masks.register("mmlm_fast", interval_mask)
    assert sum(count for q_length, count in seen if q_length == 1) == 0


# ---- what layers share -------------------------------------------------------------------------------------------


def test_bounds_are_read_without_a_copy():
    for arguments in (prompt(MASKS["left"]), prompt(MASKS["one, full"], batch_size=3, attention_mask=None,
                      mask_function=masking_utils.sliding_window_causal_mask_function(3))):  # fmt: skip
        mask, _ = look(**arguments)
        for bound in mask[:, 0].unbind(-1):
            assert bound.is_contiguous()
        assert is_right(mask, arguments)


@pytest.fixture
def made(monkeypatch):
    """Masks that were made of cu_seqlens."""
    calls, packed = [], IntervalMask.packed
    monkeypatch.setattr(IntervalMask, "packed", lambda cu, *a, **k: (calls.append(cu.tolist()), packed(cu, *a, **k))[1])
    monkeypatch.setattr(attention_module, "_masks", attention_module._Masks())
    return calls


def packed(cu, cu_k=None, kv_len=9, is_causal=False):
    return attention_module._packed(cu, cu_k, 9, kv_len, is_causal)


def test_a_tower_makes_its_packed_mask_once(made):
    """Of windows and of whole pictures, not one in each layer."""
    tiny = tiny_models.MODELS["qwen2_5_vl"]()
    model = tiny.build("mmlm_fast")
    tiny_models.output_of(model, tiny.inputs)
    assert 0 < len(made) < 3, "layers"
    assert len({tuple(cu) for cu in made}) == len(made)


def test_a_packed_mask_is_made_again_when_it_must(made):
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    first = packed(cu)
    assert packed(cu) is first
    assert packed(cu, is_causal=True) is not first
    keys = cu.clone()
    crossed = packed(cu, keys)
    assert packed(cu, keys) is crossed
    assert len(made) == 3
    keys[1] = 5
    assert packed(cu, keys).hi.tolist() == [[5] * 4 + [9] * 5]
    cu[1] = 3
    assert packed(cu).hi.tolist() == [[3] * 3 + [9] * 6]
    for n in range(9, 59):
        packed(cu, kv_len=n)
    assert len(attention_module._masks.packed[cu]) <= attention_module.MAX_MASKS
    del cu, keys
    assert len(attention_module._masks.packed) == 0


def test_masks_made_in_inference_mode_serve_training():
    cu = torch.tensor([0, 4, 9])
    q = torch.randn(1, 2, 9, 8)
    layer = torch.nn.Module()
    for options in ({"cu_seq_lens_q": cu, "is_causal": False}, {"softcap": 2.0, "is_causal": True}):
        with torch.inference_mode():
            inside = attention_module.attention(layer, q, q, q, None, **options)[0]
        x = q.clone().requires_grad_()
        out = attention_module.attention(layer, x, x, x, None, **options)[0]
        out.sum().backward()
        assert torch.equal(out.detach(), inside)
    with torch.inference_mode():  # whose changes nobody counts
        cu = torch.tensor([0, 4, 9])
        packed(cu)
        cu[1] = 3
        assert packed(cu).hi.tolist() == [[3] * 3 + [9] * 6]
