import copy

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from mmlm_fast import reference
from mmlm_fast.data import load_image, load_prompts
from mmlm_fast.models import MMLMConfig, MMLMForConditionalGeneration, presets
from mmlm_fast.models.configuration import DECODER_FUSIONS
from mmlm_fast.models.fusion import merge_tokens
from mmlm_fast.testing import difference
from support.speech import WAVEFORMS

SPEECH = [w[:160000] for w in WAVEFORMS]  # one chunk each
IMAGE = load_image()[0]
MIRRORED = IMAGE.transpose(0)
POOLED = [f for f in DECODER_FUSIONS if f != "merge"]


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()


def build(fusion):
    """A tiny model whose fusion parameters are not at their neutral start, and its processor."""
    torch.manual_seed(0)
    config, processor = presets.token_merge_vlm(fusion)
    model = MMLMForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if any(part in name for part in (".fusion.", "projector", "cross_attention_layers")):
            torch.nn.init.normal_(parameter, std=0.2)
    return model, processor


def make_batch(processor, images=(IMAGE, MIRRORED), audio=(SPEECH[0], SPEECH[1])):
    merge = bool(processor.image_seq_length)
    texts = []
    for image, clip, prompt in zip(images, audio, load_prompts(), strict=False):
        marks = ("<image>" if image is not None else "") + ("<audio>" if clip is not None else "")
        texts.append((marks if merge else "") + prompt)
    return processor(text=texts, images=list(images), audio=list(audio), sampling_rate=16000)


def loss_and_gradients(model, batch):
    model.zero_grad()
    out = model(**batch, labels=batch["input_ids"])
    out.loss.backward()
    return out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_merge_is_masked_scatter():
    """Against what transformers' models do, with placeholders anywhere."""
    ids = (torch.rand(3, 20) < 0.4).long() * 7
    features = torch.randn(int((ids == 7).sum()), 1, 5)
    embeds = torch.randn(3, 20, 5)
    expected = embeds.masked_scatter((ids == 7)[..., None].expand_as(embeds), features)
    assert torch.equal(merge_tokens(embeds, ids, 7, features, "image"), expected)
    assert torch.equal(merge_tokens(embeds, ids * 0, 7, features[:0], "image"), embeds)


@pytest.mark.parametrize("fusion", DECODER_FUSIONS)
def test_fast_is_reference(fusion):
    """Logits, and all gradients taken together, within the accuracy rule."""
    model, processor = build(fusion)
    batch = make_batch(processor)
    logits, grads = loss_and_gradients(model, batch)
    with reference():
        twin_logits, twin_grads = loss_and_gradients(model, batch)
        double = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        exact_logits, exact_grads = loss_and_gradients(copy.deepcopy(model).double(), double)
    assert difference(logits, twin_logits, exact_logits).ok
    assert grads.keys() == twin_grads.keys() == exact_grads.keys()
    flat = [torch.cat([g[n].flatten() for n in grads]) for g in (grads, twin_grads, exact_grads)]
    assert difference(*flat).ok


@pytest.mark.parametrize("fusion", DECODER_FUSIONS)
def test_generate(fusion):
    """Greedy, beams, sampling, static cache; with the cache the same tokens as without; fast as reference."""
    model, processor = build(fusion)
    batch = make_batch(processor)
    length = batch["input_ids"].shape[1]
    greedy = model.generate(**batch, max_new_tokens=6, do_sample=False)
    assert greedy.shape[0] == 2
    assert greedy.shape[1] > length
    with reference():
        assert torch.equal(model.generate(**batch, max_new_tokens=6, do_sample=False), greedy)
    assert torch.equal(
        model.generate(**batch, max_new_tokens=6, do_sample=False, cache_implementation="static"), greedy
    )
    assert torch.equal(model.generate(**batch, max_new_tokens=6, do_sample=False, use_cache=False), greedy)
    model.generate(**batch, max_new_tokens=3, num_beams=3)
    sampled = model.generate(**batch, max_new_tokens=3, do_sample=True, num_return_sequences=2)
    assert sampled.shape[0] == 4


@pytest.mark.parametrize("fusion", DECODER_FUSIONS)
def test_every_modality_matters(fusion):
    model, processor = build(fusion)
    with torch.no_grad():
        base = model(**make_batch(processor)).logits
        other_image = model(**make_batch(processor, images=(MIRRORED, IMAGE))).logits
        other_audio = model(**make_batch(processor, audio=(SPEECH[2], SPEECH[1]))).logits
    assert not torch.allclose(base, other_image, atol=1e-4)
    assert not torch.allclose(base[0], other_audio[0], atol=1e-4)
    torch.testing.assert_close(base[1], other_audio[1])


@pytest.mark.parametrize("fusion", DECODER_FUSIONS)
def test_missing_modalities(fusion):
    """A sample without a picture in a batch with one gives what it gives alone."""
    model, processor = build(fusion)
    images, audio = (IMAGE, None), (None, SPEECH[1])
    with torch.no_grad():
        together = model(**make_batch(processor, images, audio)).logits
        merge = bool(processor.image_seq_length)
        alone = [
            processor(text=("<image>" if merge else "") + load_prompts()[0], images=[IMAGE]),
            processor(text=("<audio>" if merge else "") + load_prompts()[1], audio=[SPEECH[1]], sampling_rate=16000),
        ]
        for i, batch in enumerate(alone):
            logits = model(**batch).logits[0]
            torch.testing.assert_close(together[i, -len(logits) :], logits, rtol=1e-4, atol=1e-4)
        model(**processor(text=["nothing but text"]))


@pytest.mark.parametrize("fusion", POOLED)
def test_a_filler_may_hold_anything(fusion):
    model, processor = build(fusion)
    batch = make_batch(processor, images=(IMAGE, None))
    with torch.no_grad():
        expected = model(**batch).logits
        batch["pixel_values"][1] = 7.0
        assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("fusion", ["merge", "gated"])
def test_save_and_load(fusion, tmp_path):
    model, processor = build(fusion)
    batch = make_batch(processor)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(again) is MMLMForConditionalGeneration
    assert type(AutoConfig.from_pretrained(tmp_path)) is MMLMConfig
    assert again.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    reloaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(reloaded.image_processor) is type(processor.image_processor)  # with torchvision installed, too
    same = make_batch(reloaded)
    for key, value in batch.items():
        # transformers' own feature extractor comes back, unless ours is registered: equal up to rounding.
        torch.testing.assert_close(same[key], value, rtol=0, atol=7e-5)


def test_image_processor_of_either_library_comes_back(tmp_path):
    """torchvision's resizing is not Pillow's: what a model was trained with is what it gets."""
    pytest.importorskip("torchvision")
    _, processor = build("merge")
    pixels = processor(text="<image>", images=IMAGE)["pixel_values"]
    processor.image_processor = transformers.SiglipImageProcessor(size={"height": 56, "width": 56})
    expected = processor(text="<image>", images=IMAGE)["pixel_values"]
    assert not torch.equal(pixels, expected)
    processor.save_pretrained(tmp_path)
    reloaded = AutoProcessor.from_pretrained(tmp_path)
    assert torch.equal(reloaded(text="<image>", images=IMAGE)["pixel_values"], expected)
    config = tmp_path / "processor_config.json"
    config.write_text(config.read_text().replace('"image_backend": "torchvision"', '"image_backend": "pil"'))
    reloaded = AutoProcessor.from_pretrained(tmp_path)
    assert torch.equal(reloaded(text="<image>", images=IMAGE)["pixel_values"], pixels)
    assert reloaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab()


def test_tied_embeddings(tmp_path):
    config, _ = presets.token_merge_vlm()
    config.tie_word_embeddings = True
    model = MMLMForConditionalGeneration(config)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = MMLMForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_attention_implementation_reaches_the_towers():
    model, processor = build("merge")
    batch = make_batch(processor)
    with torch.no_grad():
        expected = model(**batch).logits
        model.set_attn_implementation("eager")
        actual = model(**batch).logits
    real = batch["attention_mask"].bool()  # rows of padding see no key: each implementation fills them its way
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-4, atol=1e-4)
    assert model.config.vision_config._attn_implementation == "eager"


@pytest.mark.parametrize("fusion", ["merge", "attention"])
def test_trainer_learns(fusion, tmp_path):
    """Two samples by heart, through Trainer with checkpointing and gradient accumulation."""
    model, processor = build(fusion)
    batch = make_batch(processor)
    labels = batch["input_ids"].clone()
    labels[labels < 5] = -100
    data = [{k: v[i] for k, v in (dict(batch) | {"labels": labels}).items()} for i in range(2)] * 8
    args = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=8,
        learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=True, save_strategy="no",
        gradient_checkpointing=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model.train(), args=args, train_dataset=data)
    trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]


def test_several_pictures_a_sample_with_beams():
    """Beams repeat a sample's pictures as a group: beam 0 of several equals greedy when scores say so, and the
    expanded order is sample by sample."""
    model, processor = build("merge")
    batch = processor(text=["<image> and <image>", "<image>"], images=[IMAGE, MIRRORED, IMAGE])
    ids, kwargs = model._expand_inputs_for_generation(
        2, input_ids=batch["input_ids"], pixel_values=batch["pixel_values"]
    )
    assert ids.shape[0] == 4
    expected = batch["pixel_values"][[0, 1, 0, 1, 2, 2]]
    assert torch.equal(kwargs["pixel_values"], expected)
    model.generate(**batch, max_new_tokens=2, num_beams=2)


def test_half_precision_and_other_widths():
    model, processor = build("concat")
    model = model.to(torch.bfloat16)
    batch = make_batch(processor)
    batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}
    assert model(**batch).logits.dtype == torch.bfloat16


def test_towers_are_optional():
    config, _ = presets.token_merge_vlm()
    config = MMLMConfig(
        text_config=config.text_config.to_dict(), vision_config=config.vision_config.to_dict(), image_token_id=3
    )
    model = MMLMForConditionalGeneration(config)
    assert not hasattr(model.model, "audio_tower")
    assert model.config.audio_config is None
    with pytest.raises(ValueError, match="input_features given, but this model has no audio tower"):
        model(torch.zeros(1, 4, dtype=torch.long), input_features=torch.zeros(1, 80, 1000))


def test_text_round_trip():
    tokenizer = presets.byte_tokenizer()
    for text in ("今天天气很好", "Décris la photo", "¡Qué tal!\n🙂"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_model_errors():
    model, processor = build("merge")
    batch = make_batch(processor)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(
        ValueError, match=r"image \(1 items of 16 tokens\): features of token \d+: 16 rows for 32 placeholders"
    ):
        model(**(dict(batch) | {"pixel_values": batch["pixel_values"][:1]}))
    with pytest.raises(ValueError, match="takes no image_mask"):
        model(**batch, image_mask=torch.ones(2, dtype=torch.bool))
    model, processor = build("mean")
    batch = make_batch(processor)
    with pytest.raises(ValueError, match="takes one image a sample: got 1 for a batch of 2"):
        model(**(dict(batch) | {"pixel_values": batch["pixel_values"][:1]}))
    with pytest.raises(ValueError, match=r"image_mask must be bool of shape \(2,\), got torch.int64 \(2,\)"):
        model(**batch, image_mask=torch.ones(2, dtype=torch.long))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(fusion="add"), "fusion must be one of merge, gated_cross_attention, concat"),
        (dict(vision_config={"hidden_size": 3}), "vision_config needs a model_type"),
        (dict(vision_config={"model_type": "siglip_vision_model"}), "needs image_token_id, got None"),
    ],
)
def test_config_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MMLMConfig(**kwargs)


@pytest.mark.parametrize(
    ("fusion", "kwargs", "message"),
    [
        ("merge", dict(), "text is required"),
        ("merge", dict(text="<image>"), "text has <image> but no image was given"),
        ("merge", dict(text="hi", images=[IMAGE]), "texts have 0 <image> in all, but 1 image entries were given"),
        ("merge", dict(text=["<image>", "a"], images=[None, IMAGE]), "text 0 has 1 <image> for image entry None"),
        ("merge", dict(text="<audio>", audio=SPEECH[0]), "audio needs its sampling_rate"),
        ("merge", dict(text="<audio>", audio=SPEECH[0], sampling_rate=8000), "sampling rate of 16000"),
        ("merge", dict(text="<audio>", audio=np.zeros((16000, 2), np.float32), sampling_rate=16000), "audio"),
        ("merge", dict(text="a", return_tensors="np"), "return_tensors must be 'pt'"),
        ("mean", dict(text=["a", "b"], images=[IMAGE]), "one image entry a text"),
    ],
)
def test_processor_errors(fusion, kwargs, message):
    _, processor = presets.token_merge_vlm(fusion)
    with pytest.raises(ValueError, match=message):
        processor(**kwargs)


def test_preset_errors():
    with pytest.raises(ValueError, match="hidden_size must be a multiple of 64"):
        presets.token_merge_vlm(hidden_size=100)


@pytest.mark.parametrize("fusion", ["concat", "attention", "gated_cross_attention"])
def test_several_pictures_and_chunks_a_sample(fusion):
    """Frames and chunks with fillers: a sample in a batch gives what it gives alone, and their order of pooling is the
    mean's, which does not change with it; fillers may hold anything."""
    model, processor = build(fusion)
    model.double()
    double = lambda batch: {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    long = np.concatenate([SPEECH[0], SPEECH[1]])[:250000]  # two chunks, the second half full
    batch = double(
        processor(
            text=load_prompts()[:2],
            images=[[IMAGE, MIRRORED, IMAGE], [MIRRORED]],
            audio=[SPEECH[2], long],
            sampling_rate=16000,
        )
    )
    assert batch["pixel_values"].shape[:2] == (2, 3)
    assert batch["image_mask"].tolist() == [[True, True, True], [True, False, False]]
    assert batch["audio_mask"].tolist() == [[True, False], [True, True]]
    with torch.no_grad():
        together = model(**batch).logits
        alone = double(processor(text=load_prompts()[1], images=[MIRRORED], audio=[long], sampling_rate=16000))
        logits = model(**alone).logits[0]
        torch.testing.assert_close(together[1, -len(logits) :], logits)
        batch["pixel_values"][1, 1:] = torch.nan
        torch.testing.assert_close(model(**batch).logits, together)
        batch["pixel_values"][0, 1] = 0.0
        # in float64 rounding is 1e-15: what differs by 1e-4 was changed by the picture
        assert not torch.allclose(model(**batch).logits[0], together[0], atol=1e-4)
    assert torch.equal(
        *(model.generate(**batch, max_new_tokens=4, do_sample=False, use_cache=c) for c in (True, False))
    )


def test_several_pictures_and_chunks_in_placeholders():
    """One placeholder for all frames, or one each; a long clip becomes several chunks, nothing is cut off."""
    _, processor = presets.token_merge_vlm()
    frames = [IMAGE, MIRRORED, IMAGE]
    one = processor(text=["a <image> b", "<image>"], images=[frames, IMAGE])
    each = processor(text=["a <image><image><image> b", "<image>"], images=[frames, IMAGE])
    assert torch.equal(one["input_ids"], each["input_ids"])
    assert one["pixel_values"].shape[0] == 4
    flat = processor(text=["a <image><image><image> b", "<image>"], images=[*frames, IMAGE])
    assert torch.equal(flat["input_ids"], one["input_ids"])
    long = np.concatenate(SPEECH)  # 30 s
    heard = processor(text="<audio>", audio=[long], sampling_rate=16000)
    assert heard["input_features"].shape[0] == 3
    assert (heard["input_ids"] == 4).sum() == 750
    for i in range(3):
        piece = processor(text="<audio>", audio=[SPEECH[i]], sampling_rate=16000)
        assert torch.equal(heard["input_features"][i], piece["input_features"][0])
    two = processor(text="<audio> then <audio>", audio=[[SPEECH[0], SPEECH[1]]], sampling_rate=16000)
    assert (two["input_ids"] == 4).sum() == 500
    with pytest.raises(ValueError, match="texts have 2 <image> in all, but 1 image entries"):
        processor(text="<image> and <image>", images=[[IMAGE, MIRRORED, IMAGE]])
    with pytest.raises(ValueError, match="a list of pictures is empty"):
        processor(text="<image>", images=[[]])


def test_gated_cross_attention_starts_as_the_decoder_and_can_skip_layers():
    """Gates start at 0: the language model is unchanged. With an interval, every second layer looks."""
    torch.manual_seed(0)
    config, processor = presets.token_merge_vlm("gated_cross_attention", num_hidden_layers=4)
    config.cross_attention_interval = 2
    model = MMLMForConditionalGeneration(config).eval()
    batch = make_batch(processor)
    text = {k: batch[k] for k in ("input_ids", "attention_mask")}
    assert len(model.model.cross_attention_layers) == 2
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, model(**text).logits)
        for layer in model.model.cross_attention_layers:
            layer.cross_attn_attn_gate.fill_(1.0)
        # measured: rounding against float64 moves these logits by 2.4e-7, the context by 0.9
        assert not torch.allclose(model(**batch).logits, model(**text).logits, atol=1e-4)
    keys = {k for k in model.state_dict() if k.startswith("model.language_model.")}
    plain = MMLMForConditionalGeneration(presets.token_merge_vlm("mean", num_hidden_layers=4)[0])
    assert keys == {k for k in plain.state_dict() if k.startswith("model.language_model.")}


def test_gated_cross_attention_needs_layers_it_can_hook():
    config, _ = presets.token_merge_vlm("gated_cross_attention")
    config.text_config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=2)
    with pytest.raises(ValueError, match=r"needs a decoder with `layers` and grouped heads.*got GPT2Model"):
        MMLMForConditionalGeneration(config)


@pytest.mark.parametrize("fusion", ["cross_attention", "sequence", "late_mean"])
def test_fusions_of_other_models_are_refused(fusion):
    config, _ = presets.token_merge_vlm(fusion)
    with pytest.raises(ValueError, match=f"a decoder fuses by one of merge, .*got '{fusion}'"):
        MMLMForConditionalGeneration(config)


def test_placeholders_are_never_written():
    model, processor = build("merge")
    with torch.no_grad():
        model.lm_head.weight[[3, 4]] *= 1000
    batch = make_batch(processor)
    generated = model.generate(**batch, max_new_tokens=20, do_sample=False)[:, batch["input_ids"].shape[1] :]
    assert not ((generated == 3) | (generated == 4)).any()
