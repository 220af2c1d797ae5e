"""A turn on the cache of earlier ones gives what the whole conversation gives at once, pictures and sound with it."""

import contextlib
import copy
import pickle

import peft
import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache

from mmlm_fast.data import load_image
from mmlm_fast.models import MMLMForConditionalGeneration, MMLMForSeq2SeqLM, presets
from mmlm_fast.models.configuration import DECODER_FUSIONS, SEQ2SEQ_FUSIONS
from mmlm_fast.models.turns import keep_context, turn_context
from support.speech import WAVEFORMS

IMAGE = load_image()[0]
MIRRORED = IMAGE.transpose(0)
SOUND = [w[:32000] for w in WAVEFORMS]
GREEDY = dict(do_sample=False, eos_token_id=None, pad_token_id=0, max_new_tokens=3)
FUSED = [f for f in DECODER_FUSIONS if f != "merge"]
EVERY = pytest.mark.parametrize("fusion", DECODER_FUSIONS)
SOME = pytest.mark.parametrize("fusion", ["merge", "gated_cross_attention", "attention"])
EVERY_FUSED = pytest.mark.parametrize("fusion", FUSED)
WORDS = torch.tensor([[40, 41, 42], [43, 44, 45]])
MODELS = {}


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()


def build(fusion):
    """A model in float64, where what should be equal is, whose fusion is far from its neutral start."""
    if fusion not in MODELS:
        torch.manual_seed(0)
        config, processor = presets.token_merge_vlm(fusion, audio_seconds=2)
        model = MMLMForConditionalGeneration(config).double().eval()
        for name, parameter in model.named_parameters():
            if any(part in name for part in (".fusion.", "projector", "cross_attention_layers")):
                torch.nn.init.normal_(parameter, std=0.3)
        MODELS[fusion] = model, processor
    return MODELS[fusion]


def make_batch(processor, images=(IMAGE, MIRRORED), audio=(SOUND[0], None), texts=("what is this?", "describe it all")):
    if processor.image_seq_length:
        marks = [
            ("<image>" if i else "") + ("<audio>" if a is not None else "") for i, a in zip(images, audio, strict=True)
        ]
        texts = [mark + text for mark, text in zip(marks, texts, strict=False)]
    given = {}
    if any(i is not None for i in images):
        given["images"] = list(images)
    if any(a is not None for a in audio):
        given |= dict(audio=list(audio), sampling_rate=16000)
    batch = processor(text=list(texts[: len(images)]), **given)
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def started(model, batch, **options):
    return model.generate(**batch, return_dict_in_generate=True, **GREEDY | options)


def continued(sequences, mask, words=WORDS):
    """The conversation so far and the user's next words, with its mask."""
    turn = torch.cat([sequences, words[: len(sequences)]], 1)
    return dict(
        input_ids=turn, attention_mask=torch.nn.functional.pad(mask, (0, turn.shape[1] - mask.shape[1]), value=1)
    )


def whole(model, batch, turn, **options):
    others = {k: v for k, v in batch.items() if k not in turn}
    return model.generate(**others, **turn, use_cache=False, **GREEDY | options)


def blind(model, turn):
    return model.generate(**turn, use_cache=False, **GREEDY)


@EVERY
def test_turns(fusion):
    """Three of two conversations, which differ in what is there; without pictures it is another one."""
    model, processor = build(fusion)
    batch = make_batch(processor)
    out = started(model, batch)
    for _ in range(2):
        turn = continued(out.sequences, batch["attention_mask"])
        expected = whole(model, batch, turn)
        out = model.generate(**turn, past_key_values=out.past_key_values, return_dict_in_generate=True, **GREEDY)
        assert torch.equal(out.sequences, expected)
    if fusion != "merge":
        assert not torch.equal(blind(model, turn), expected)


@EVERY
def test_conversations_take_turns(fusion):
    model, processor = build(fusion)
    batches = [make_batch(processor, (i,), (a,)) for i, a in ((IMAGE, None), (MIRRORED, SOUND[1]), (IMAGE, SOUND[2]))]
    outs = [started(model, batch) for batch in batches]
    turns = [continued(o.sequences, b["attention_mask"]) for o, b in zip(outs, batches, strict=True)]
    for i in (1, 0, 2):
        made = model.generate(**turns[i], past_key_values=outs[i].past_key_values, **GREEDY)
        assert torch.equal(made, whole(model, batches[i], turns[i]))


@EVERY
def test_rows_of_the_cache(fusion):
    """Branched, saved, exchanged, chosen, repeated."""
    model, processor = build(fusion)
    batch = make_batch(processor)
    out = started(model, batch)
    turn = continued(out.sequences, batch["attention_mask"])
    expected = whole(model, batch, turn)
    original = copy.deepcopy(out.past_key_values)

    def go_on(cache, rows):
        return model.generate(**{k: v[rows] for k, v in turn.items()}, past_key_values=cache, **GREEDY)

    assert torch.equal(go_on(copy.deepcopy(original), [0, 1]), expected)
    assert torch.equal(go_on(pickle.loads(pickle.dumps(original)), [0, 1]), expected)
    cache = copy.deepcopy(original)
    assert type(copy.deepcopy(cache)) is type(cache)
    assert isinstance(cache, DynamicCache)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(go_on(cache, [1, 0]), expected[[1, 0]])
    cache = copy.deepcopy(original)
    cache.batch_select_indices(torch.tensor([1]))
    assert torch.equal(go_on(cache, [1]), expected[[1]])
    cache = copy.deepcopy(original)
    cache.batch_repeat_interleave(2)
    assert torch.equal(go_on(cache, [0, 0, 1, 1]), expected[[0, 0, 1, 1]])


@EVERY
def test_cropped(fusion):
    """Back to an earlier place, and on from there; nothing left, or reset: a new conversation."""
    model, processor = build(fusion)
    batch = make_batch(processor)
    out = started(model, batch)
    cache, length = out.past_key_values, batch["input_ids"].shape[1]
    cache.crop(length - cache.get_seq_length())
    turn = continued(batch["input_ids"], batch["attention_mask"])
    made = model.generate(**turn, past_key_values=cache, **GREEDY)
    assert torch.equal(made, whole(model, batch, turn))
    other = make_batch(processor, (MIRRORED, None), (None, SOUND[1]))
    for forget, new in ((lambda: cache.crop(-cache.get_seq_length()), other), (cache.reset, batch)):
        forget()
        if cache.get_seq_length() and forget == cache.reset:
            return  # transformers 5.17 resets a dynamic cache to as many tokens of zeros
        made = started(model, new, past_key_values=cache).sequences
        assert torch.equal(made, whole(model, new, {k: new[k] for k in ("input_ids", "attention_mask")}))


@SOME
def test_a_cache_by_its_other_name(fusion):
    """`cache`, as transformers calls it from 5.24 on."""
    model, processor = build(fusion)
    batch = make_batch(processor)
    out = started(model, batch)
    turn = continued(out.sequences, batch["attention_mask"])
    turn["input_ids"] = turn["input_ids"][:, out.past_key_values.get_seq_length() :]
    with torch.no_grad():
        one, two = (
            model(**turn, **{name: copy.deepcopy(out.past_key_values)}).logits for name in ("past_key_values", "cache")
        )
    assert torch.equal(one, two)
    with pytest.raises(ValueError, match="pass one, got both"):
        model(**turn, cache=DynamicCache(), past_key_values=DynamicCache())


@EVERY
def test_caches_of_other_kinds(fusion):
    model, processor = build(fusion)
    batch = make_batch(processor)
    for cache in (
        DynamicCache(),
        DynamicCache(config=model.config),
        StaticCache(config=model.config, max_cache_len=200),
    ):
        out = started(model, batch, past_key_values=cache)
        assert out.past_key_values is cache
        turn = continued(out.sequences, batch["attention_mask"])
        made = model.generate(**turn, past_key_values=cache, **GREEDY)
        assert torch.equal(made, whole(model, batch, turn))


@SOME
def test_a_static_cache_of_the_model_starts_anew(fusion):
    model, processor = build(fusion)
    for batch in (make_batch(processor), make_batch(processor, (MIRRORED, None), (None, SOUND[1]))):
        expected = whole(model, batch, {k: batch[k] for k in ("input_ids", "attention_mask")})
        assert torch.equal(started(model, batch, cache_implementation="static").sequences, expected)


@EVERY
def test_step_by_step(fusion):
    """Without `generate`: logits of each step, given nothing but its token and the cache."""
    model, processor = build(fusion)
    batch = make_batch(processor)
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        turn = continued(batch["input_ids"], batch["attention_mask"])
        expected = model(**batch | turn, use_cache=False).logits[:, -3:]
        length = batch["input_ids"].shape[1]
        for i in range(3):
            mask = turn["attention_mask"][:, : length + i + 1]
            step = model(WORDS[:, i : i + 1], attention_mask=mask, past_key_values=cache).logits
            torch.testing.assert_close(step[:, 0], expected[:, i])


@SOME
def test_beams_in_the_second_turn(fusion):
    model, processor = build(fusion)
    batch = make_batch(processor, (IMAGE,), (SOUND[0],))
    out = started(model, batch)
    out.past_key_values.batch_repeat_interleave(3)
    turn = continued(out.sequences, batch["attention_mask"])
    made = model.generate(**turn, past_key_values=out.past_key_values, **GREEDY | dict(num_beams=3))
    assert torch.equal(made, whole(model, batch, turn, num_beams=3))


@EVERY
def test_after_assisted_generation(fusion):
    """By looking in the prompt, and by a model that sees what the first sees. (The second turn is not assisted:
    transformers 5.23 then gives other tokens for plain Qwen3, too.)"""
    model, processor = build(fusion)
    batch = make_batch(processor, (IMAGE,), (SOUND[0],))
    expected = started(model, batch).sequences
    for options in (dict(prompt_lookup_num_tokens=2), dict(assistant_model=copy.deepcopy(model))):
        out = started(model, batch, **options)
        assert torch.equal(out.sequences, expected)
        turn = continued(out.sequences, batch["attention_mask"])
        made = model.generate(**turn, past_key_values=out.past_key_values, **GREEDY)
        assert torch.equal(made, whole(model, batch, turn))


@SOME
def test_a_turn_in_chunks(fusion):
    model, processor = build(fusion)
    batch = make_batch(processor)
    out = started(model, batch)
    turn = continued(out.sequences, batch["attention_mask"])
    fed = []
    note = lambda _, args, kwargs: fed.append(kwargs["input_ids"].shape[1])
    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    made = model.generate(**turn, past_key_values=out.past_key_values, prefill_chunk_size=2, **GREEDY)
    hook.remove()
    if sum(fed) >= turn["input_ids"].shape[1]:
        pytest.skip("this transformers feeds the tokens of a filled cache again, in chunks: wrong for every model")
    assert torch.equal(made, whole(model, batch, turn))


@EVERY_FUSED
def test_the_same_pictures_again(fusion):
    """May be given, and change nothing; others would change what the tokens in the cache are."""
    model, processor = build(fusion)
    batch = make_batch(processor)
    out = started(model, batch)
    turn = continued(out.sequences, batch["attention_mask"])
    again = copy.deepcopy(out.past_key_values)
    assert torch.equal(model.generate(**batch | turn, past_key_values=again, **GREEDY), whole(model, batch, turn))
    for images, audio in (((MIRRORED, IMAGE), (SOUND[0], None)), ((IMAGE, None), (SOUND[0], None))):
        other = make_batch(processor, images, audio) | turn
        with pytest.raises(ValueError, match="must be those of the first turn, got others"):
            model.generate(**other, past_key_values=copy.deepcopy(out.past_key_values), **GREEDY)


def in_float32(model, batch, dtype=torch.float32):
    return copy.deepcopy(model).to(dtype), {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


def same_from(model, cache, turn, given, context=contextlib.nullcontext):
    """A turn that is `given` its pictures and sound again goes on as one that is not, from what the cache holds."""
    with torch.no_grad(), context():
        turn = dict(attention_mask=turn["attention_mask"], input_ids=turn["input_ids"][:, cache.get_seq_length() :])
        expected = model(**turn, past_key_values=copy.deepcopy(cache))
        again = copy.deepcopy(cache)
        out = model(**turn, **given, past_key_values=again)
    assert torch.equal(out.logits, expected.logits)
    assert again.fusion[0].equal(cache.fusion[0])


@EVERY_FUSED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_pictures_again_but_for_rounding(fusion, dtype):
    """Of one conversation of two, under autocast, by another implementation of attention; others stay refused."""
    model, processor = build(fusion)
    model, batch = in_float32(model, make_batch(processor), dtype)
    out = started(model, batch)
    cache = out.past_key_values
    turn = continued(out.sequences, batch["attention_mask"])
    given = {k: v for k, v in batch.items() if k not in turn}
    same_from(model, cache, turn, given)
    if dtype == torch.float32:
        same_from(model, cache, turn, given, lambda: torch.autocast("cpu", torch.bfloat16))
        model.set_attn_implementation("eager")
        same_from(model, cache, turn, given)
        model.set_attn_implementation("sdpa")
    for row in (0, 1):
        chosen = copy.deepcopy(cache)
        chosen.batch_select_indices(torch.tensor([row]))
        one, its = ({k: v[row : row + 1] for k, v in x.items()} for x in (turn, given))
        same_from(model, chosen, one, its)
        other = {k: v[1 - row :][:1] for k, v in given.items()}
        refused = [other, given | {"image_mask": torch.tensor([True, False])}]
        if row:  # has no sound
            same_from(model, chosen, one, dict(pixel_values=its["pixel_values"]))
            refused.append(dict(pixel_values=its["pixel_values"], input_features=its["input_features"]))
        for x, which, c in zip(refused, (one, turn, one), (chosen, cache, chosen), strict=False):
            with pytest.raises(ValueError, match="must be those of the first turn, got others"):
                model.generate(**which, **x, past_key_values=copy.deepcopy(c), **GREEDY)


@pytest.mark.slow
@pytest.mark.parametrize("fusion", ["mean", "gated_cross_attention"])
def test_the_same_pictures_again_compiled(fusion):
    model, processor = build(fusion)
    model, batch = in_float32(model, make_batch(processor))
    out = started(model, batch)
    turn = continued(out.sequences, batch["attention_mask"])
    seen = out.past_key_values.get_seq_length()
    turn["input_ids"] = turn["input_ids"][:, seen:]
    step = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        expected = model(**turn, past_key_values=copy.deepcopy(out.past_key_values)).logits
        made = step(**batch | turn, past_key_values=copy.deepcopy(out.past_key_values)).logits
        torch.testing.assert_close(made, expected)
        other = make_batch(processor, (MIRRORED, IMAGE))["pixel_values"].float()
        with pytest.raises(ValueError, match="must be those of the first turn, got others"):
            step(**batch | turn | {"pixel_values": other}, past_key_values=copy.deepcopy(out.past_key_values))


def test_the_same_pictures_again_after_adapters_are_merged():
    model, processor = build("mean")
    model, batch = in_float32(model, make_batch(processor))
    adapters = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(model, adapters).eval()
    out = started(model, batch)
    turn = continued(out.sequences, batch["attention_mask"])
    model.merge_adapter()
    same_from(model, out.past_key_values, turn, {k: v for k, v in batch.items() if k not in turn})


def test_one_other_picture_among_many():
    """Is found, however little it weighs in the whole."""
    held = torch.randn(1, 500, 8), torch.ones(1, 500, dtype=torch.bool)
    cache = DynamicCache()
    keep_context(cache, held)
    near = held[0] * (1 + 1e-3 * torch.randn(1, 500, 8))
    assert turn_context(cache, 1, (near, held[1])) is held
    near[0, 77] = torch.randn(8)
    with pytest.raises(ValueError, match="must be those of the first turn, got others"):
        turn_context(cache, 1, (near, held[1]))


@EVERY_FUSED
def test_prefix_tuning_of_a_batch_without_pictures(fusion):
    """Its virtual tokens are in a cache of another origin; the error names the way out, which works."""
    model, processor = build(fusion)
    model, batch = in_float32(model, make_batch(processor, (IMAGE, IMAGE), (None, None)))
    text = model.config.get_text_config()
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=3,
        num_layers=text.num_hidden_layers,
        token_dim=text.num_key_value_heads * text.head_dim,
        num_attention_heads=text.num_key_value_heads,
    )
    model = peft.get_peft_model(model, config)
    turn = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="pass fillers with image_mask=False or audio_mask=False"):
        model(**turn)
    fillers = dict(pixel_values=torch.zeros_like(batch["pixel_values"]), image_mask=torch.tensor([False, False]))
    loss = model(**turn, **fillers, labels=batch["input_ids"]).loss
    loss.backward()
    assert loss.isfinite()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


@EVERY_FUSED
def test_a_picture_after_a_first_turn_without(fusion):
    model, processor = build(fusion)
    batch = make_batch(processor, (None, None), (None, None))
    out = started(model, batch)
    turn = continued(out.sequences, batch["attention_mask"])
    with pytest.raises(ValueError, match="must be those of the first turn, got others"):
        model.generate(**make_batch(processor) | turn, past_key_values=copy.deepcopy(out.past_key_values), **GREEDY)
    made = model.generate(**turn, past_key_values=out.past_key_values, **GREEDY)
    assert torch.equal(made, blind(model, turn))


def test_a_new_picture_in_a_later_turn():
    """With `merge` it has a place of its own, and is seen from there on."""
    model, processor = build("merge")
    batch = make_batch(processor, (IMAGE,), (None,))
    out = started(model, batch)
    words = processor(text=["<image> and this?"], images=[MIRRORED])
    turn = continued(out.sequences, batch["attention_mask"], words["input_ids"])
    pixels = words["pixel_values"].double()
    both = dict(pixel_values=torch.cat([batch["pixel_values"], pixels]))
    made = model.generate(**turn, pixel_values=pixels, past_key_values=out.past_key_values, **GREEDY)
    assert torch.equal(made, whole(model, both, turn))


@EVERY_FUSED
def test_what_does_not_continue_is_refused(fusion):
    model, processor = build(fusion)
    batch = make_batch(processor)
    cache = started(model, batch).past_key_values
    with torch.no_grad(), pytest.raises(ValueError, match="holds 2 conversations, got a batch of 1"):
        model(WORDS[:1], past_key_values=cache)
    emptied = DynamicCache([(layer.keys, layer.values) for layer in cache.layers])  # of some other model, as it were
    with torch.no_grad(), pytest.raises(ValueError, match="must hold what its tokens were fused with"):
        model(WORDS, past_key_values=emptied)


def test_after_a_compiled_first_turn():
    model, processor = build("gated_cross_attention")
    batch = make_batch(processor, audio=(None, None))
    turn = continued(batch["input_ids"], batch["attention_mask"])
    with torch.no_grad():
        expected = model(**batch | turn, use_cache=False).logits[:, -3:]
        cache = DynamicCache()
        torch.compile(model, backend="eager", fullgraph=True)(**batch, past_key_values=cache)
        out = model(WORDS, attention_mask=turn["attention_mask"], past_key_values=cache)
        torch.testing.assert_close(out.logits, expected)


SEQ2SEQ = [(name, fusion) for name in ("transformer_encoder_decoder", "mmlm_basic") for fusion in SEQ2SEQ_FUSIONS]
SEQ2SEQ += [("two_encoder_seq2seq", "cross_attention")]


def build_seq2seq(name, fusion):
    torch.manual_seed(0)
    sizes = dict(two_encoder_seq2seq=dict(image_size=32), mmlm_basic=dict(image_size=32, hidden_size=64)).get(name, {})
    config, processor = getattr(presets, name)(fusion=fusion, audio_seconds=2, **sizes)
    model = MMLMForSeq2SeqLM(config).double().eval()
    for key, parameter in model.named_parameters():
        if any(part in key for part in ("projector", ".join.", "cross")):
            torch.nn.init.normal_(parameter, std=0.3)
    given = dict(images=[IMAGE, MIRRORED]) if "image" in config.modalities else {}
    given |= dict(audio=SOUND[:2], sampling_rate=16000) if "audio" in config.modalities else {}
    batch = processor(text=["what is this?", "describe it all"], **given)
    return model, {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


@pytest.mark.parametrize(("name", "fusion"), SEQ2SEQ)
def test_turns_of_a_decoder_with_a_memory(name, fusion):
    """The encoder's inputs are given again, as `generate` wants; without it the cache has them."""
    model, batch = build_seq2seq(name, fusion)
    out = started(model, batch)
    words = torch.cat([out.sequences, WORDS], 1)
    turn = dict(decoder_input_ids=words, decoder_attention_mask=torch.ones_like(words))
    expected = whole(model, batch, turn)

    def go_on(inputs, cache, **options):
        return model.generate(**inputs, **turn, past_key_values=copy.deepcopy(cache), **GREEDY | options)

    original = copy.deepcopy(out.past_key_values)
    assert torch.equal(go_on(batch, original), expected)
    assert torch.equal(go_on(dict(encoder_outputs=model.encoder(**batch)), original), expected)
    exchanged = copy.deepcopy(original)
    exchanged.reorder_cache(torch.tensor([1, 0]))
    other = {k: v.roll(1, 0) for k, v in batch.items()}
    text = {k: batch[k] for k in ("input_ids", "attention_mask")}
    for inputs, cache in ((other, original), (batch, exchanged), (text, original), ({}, original)):
        with pytest.raises(ValueError, match=r"must be those of the first turn, got others|holds 2 conversations"):
            go_on(inputs, cache)
    wider = copy.deepcopy(original)
    wider.batch_repeat_interleave(2)
    assert torch.equal(go_on(batch, wider, num_beams=2), whole(model, batch, turn, num_beams=2))
    with torch.no_grad():
        step = model(decoder_input_ids=words[:, -4:], past_key_values=original).logits
        torch.testing.assert_close(step, model(**batch, **turn, use_cache=False).logits[:, -4:])


def lstm_takes_bfloat16():
    """Before torch 2.13 oneDNN has no such LSTM without gradients, on some CPUs."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        try:
            torch.nn.LSTM(16, 16)(torch.randn(5, 2, 16))
        except RuntimeError:
            return False
    return True


@pytest.mark.parametrize(("name", "fusion"), SEQ2SEQ)
def test_the_same_inputs_of_an_encoder_but_for_rounding(name, fusion):
    """One conversation of two goes on, from the memory that the cache holds."""
    model, batch = build_seq2seq(name, fusion)
    model, batch = in_float32(model, batch)
    out = started(model, batch)
    cache = out.past_key_values
    words = torch.cat([out.sequences, WORDS], 1)
    with torch.no_grad():
        expected = model(decoder_input_ids=words[:, -4:], past_key_values=copy.deepcopy(cache)).logits
        with torch.autocast("cpu", torch.bfloat16) if lstm_takes_bfloat16() else contextlib.nullcontext():
            encoded = model.encoder(**batch)
        encoded.last_hidden_state = encoded.last_hidden_state.float()
        with torch.autocast("cpu", torch.bfloat16) if lstm_takes_bfloat16() else contextlib.nullcontext():
            again = model(**batch, decoder_input_ids=words[:, -4:], past_key_values=copy.deepcopy(cache))
        assert torch.equal(again.encoder_last_hidden_state, cache.fusion[0])
        again = model(**batch, decoder_input_ids=words[:, -4:], past_key_values=copy.deepcopy(cache))
        assert torch.equal(again.logits, expected)
        mask = torch.ones_like(words)
        one = dict(decoder_input_ids=words[:, -4:], decoder_attention_mask=mask)
        expected = model(**one, past_key_values=copy.deepcopy(cache)).logits
    turn = dict(decoder_input_ids=words, decoder_attention_mask=mask)
    again = model.generate(
        encoder_outputs=encoded,
        **turn,
        past_key_values=copy.deepcopy(cache),
        **GREEDY | dict(max_new_tokens=1, return_dict_in_generate=True, output_logits=True),
    )
    assert torch.equal(again.logits[0], expected[:, -1])
    cache.batch_select_indices(torch.tensor([1]))
    one = {k: v[1:] for k, v in batch.items()}
    turn = dict(decoder_input_ids=words[1:], decoder_attention_mask=torch.ones_like(words[1:]))
    made = model.generate(**one, **turn, past_key_values=copy.deepcopy(cache), **GREEDY)
    assert torch.equal(made, whole(model, one, turn))
    other = {k: v[:1] for k, v in batch.items()}
    with pytest.raises(ValueError, match="must be those of the first turn, got others"):
        model.generate(**other, **turn, past_key_values=cache, **GREEDY)
