"""The small towers, and towers from checkpoints."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, CLIPConfig, CLIPModel, DynamicCache, WhisperConfig, WhisperModel

from mmlm_fast.models import MMLMForClassification, MMLMForContrastive, MMLMForSeq2SeqLM, presets
from mmlm_fast.models.towers import (
    MMLMConvAudioConfig,
    MMLMConvAudioModel,
    MMLMConvImageConfig,
    MMLMConvImageModel,
    MMLMLSTMConfig,
    MMLMLSTMModel,
    MMLMMeanConfig,
    MMLMMeanModel,
    make_tower,
    with_lone_values,
)

TINY_TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=300)


def lstm(**options):
    torch.manual_seed(0)
    return MMLMLSTMModel(MMLMLSTMConfig(vocab_size=20, hidden_size=8, **options)).eval()


def test_lstm_is_torchs():
    model = lstm(num_hidden_layers=2)
    ids = torch.randint(20, (3, 7))
    expected = model.embed_tokens(ids)
    for layer in model.layers:
        expected = layer(expected)[0]
    assert torch.equal(model(ids).last_hidden_state, expected)
    assert torch.equal(lstm(num_hidden_layers=0)(ids).last_hidden_state, lstm(num_hidden_layers=0).embed_tokens(ids))


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_lstm_skips_padding(side):
    """With a cache and without; and what follows after padding is what follows without."""
    model, ids = lstm(num_hidden_layers=2), torch.randint(20, (2, 6))
    where = {"left": [1, 0, 0, 0, 0, 0, 0], "right": [0, 0, 0, 0, 0, 0, 1], "middle": [0, 0, 1, 0, 0, 0, 0]}[side]
    pad = torch.tensor(where).bool()
    padded = torch.full((2, 7), 3)
    padded[:, ~pad] = ids
    mask = (~pad).long().expand(2, 7)
    cache, plain = DynamicCache(), DynamicCache()
    expected = model(ids, past_key_values=plain).last_hidden_state
    torch.testing.assert_close(model(padded, attention_mask=mask).last_hidden_state[:, ~pad], expected)
    states = model(padded, attention_mask=mask, past_key_values=cache).last_hidden_state
    torch.testing.assert_close(states[:, ~pad], expected)
    assert (states[:, pad] == 0).all()
    more = torch.randint(20, (2, 1))
    after = model(more, attention_mask=torch.ones(2, 8), past_key_values=cache).last_hidden_state
    torch.testing.assert_close(after, model(more, past_key_values=plain).last_hidden_state)
    torch.testing.assert_close(after, model(torch.cat([ids, more], 1)).last_hidden_state[:, -1:])


def test_lstm_of_nothing_but_padding():
    model = lstm()
    ids, cache = torch.randint(20, (2, 4)), DynamicCache()
    mask = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]])
    assert (model(ids, attention_mask=mask, past_key_values=cache).last_hidden_state[0] == 0).all()
    more = torch.randint(20, (2, 1))
    after = model(more, past_key_values=cache).last_hidden_state
    torch.testing.assert_close(after[0], model(more).last_hidden_state[0])


def test_lstm_attends_to_what_is_there():
    model = lstm(add_cross_attention=True)
    ids, context = torch.randint(20, (2, 4)), torch.randn(2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    attended = model(ids, encoder_hidden_states=context, encoder_attention_mask=mask).last_hidden_state
    states = model.layers[0](model.embed_tokens(ids))[0]
    scores = (states @ context.mT / 8**0.5).masked_fill(mask[:, None] == 0, -torch.inf)
    expected = torch.tanh(model.attention(torch.cat([states, scores.softmax(-1) @ context], -1)))
    torch.testing.assert_close(attended, expected)


def test_convolutions_and_means():
    torch.manual_seed(0)
    seeing = MMLMConvImageModel(MMLMConvImageConfig(image_size=8, hidden_sizes=[4], hidden_size=6))
    pixels = torch.randn(2, 3, 8, 8)
    maps = nn.functional.max_pool2d(nn.functional.relu(seeing.stages[0](pixels)), 2)
    expected = seeing.norm(seeing.linear(maps.flatten(1)))[:, None]
    torch.testing.assert_close(seeing(pixels).last_hidden_state, expected)
    hearing = MMLMConvAudioModel(MMLMConvAudioConfig(num_mel_bins=5, hidden_sizes=[4, 4], hidden_size=6))
    assert hearing(torch.randn(2, 5, 20)).last_hidden_state.shape == (2, 5, 6)
    recurrent = MMLMConvAudioModel(MMLMConvAudioConfig(num_mel_bins=5, hidden_sizes=[], hidden_size=6, recurrent=True))
    assert recurrent(torch.randn(2, 5, 20)).last_hidden_state.shape == (2, 20, 6)
    mean = MMLMMeanModel(MMLMMeanConfig(hidden_size=3))
    torch.testing.assert_close(mean(pixels).last_hidden_state, pixels.mean((2, 3))[:, None])


@pytest.mark.parametrize(
    ("model", "value", "message"),
    [
        (lambda: MMLMConvImageModel(MMLMConvImageConfig(image_size=8)), torch.zeros(1, 3, 8, 9), r"\[N, 3, 8, 8\]"),
        (lambda: MMLMConvAudioModel(MMLMConvAudioConfig()), torch.zeros(1, 79, 8), r"\[N, 80, frames\], got \(1, 79"),
        (lambda: MMLMMeanModel(MMLMMeanConfig()), torch.zeros(1, 4, 8), r"\[N, 3, …\], got \(1, 4, 8\)"),
        (lambda: lstm(), None, "pass input_ids or inputs_embeds"),
        (lambda: MMLMLSTMModel(MMLMLSTMConfig(vocab_size=0)), None, "no vocabulary"),
        (lambda: MMLMLSTMModel(MMLMLSTMConfig(num_hidden_layers=0, embedding_size=3)), None, "must be hidden_size"),
        (lambda: MMLMConvImageConfig(image_size=9), None, "multiple of 2"),
    ],
)
def test_tower_errors(model, value, message):
    with pytest.raises(ValueError, match=message):
        model()(value)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Small models of transformers as saved by itself: CLIP, Whisper, BERT."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoints")
    vision = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    CLIPModel(CLIPConfig(text_config=TINY_TEXT, vision_config=vision, projection_dim=16)).save_pretrained(
        folder / "clip"
    )
    whisper = WhisperConfig(
        d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=300, max_source_positions=100, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    WhisperModel(whisper).save_pretrained(folder / "whisper")
    AutoModel.from_config(AutoConfig.for_model("bert", **TINY_TEXT)).save_pretrained(folder / "bert")
    return folder


def test_towers_from_checkpoints(checkpoints, tmp_path):
    """CLIP's two towers and Whisper's encoder, bit by bit; frozen ones stay as they are; saved and loaded."""
    model = MMLMForContrastive.from_towers(
        text=str(checkpoints / "clip"),
        image=str(checkpoints / "clip"),
        audio=str(checkpoints / "whisper"),
        frozen=["image", "audio"],
        fusion="mean",
        projection_dim=16,
        hidden_size=48,
    )
    clip, whisper = (
        CLIPModel.from_pretrained(checkpoints / "clip"),
        WhisperModel.from_pretrained(checkpoints / "whisper"),
    )
    pixels, ids = torch.randn(2, 3, 32, 32), torch.randint(3, 299, (2, 9))
    features = torch.randn(2, 80, 200)
    model.eval()
    towers = model.model
    seen = clip.eval().vision_model(pixels).last_hidden_state
    torch.testing.assert_close(towers.vision_tower(pixels).last_hidden_state, seen)
    torch.testing.assert_close(towers.text_tower(ids).last_hidden_state, clip.text_model(ids).last_hidden_state)
    heard = whisper.eval().encoder(features).last_hidden_state
    torch.testing.assert_close(towers.audio_tower(features).last_hidden_state, heard)
    before = {n: p.clone() for n, p in towers.named_parameters()}
    model.train()
    assert not towers.vision_tower.training
    assert towers.text_tower.training
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(input_ids=ids, pixel_values=pixels, input_features=features).loss.backward()
    optimizer.step()
    moved = {n for n, p in towers.named_parameters() if not torch.equal(p, before[n])}
    assert any(n.startswith("text_tower") for n in moved)
    assert any(n.startswith("audio_projector") for n in moved)
    assert not any(n.startswith(("vision_tower", "audio_tower")) for n in moved)
    model.save_pretrained(tmp_path)
    again = MMLMForContrastive.from_pretrained(tmp_path)
    assert not any(p.requires_grad for p in again.model.vision_tower.parameters())
    state = again.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_towers_from_checkpoints_errors(checkpoints):
    with pytest.raises(ValueError, match="has no decoder tower"):
        MMLMForClassification.from_towers(
            text=str(checkpoints / "bert"), decoder=str(checkpoints / "bert"), fusion="mean"
        )
    config, _ = presets.transformer_encoder_decoder()
    config.decoder_config.add_cross_attention = False
    with pytest.raises(ValueError, match="add_cross_attention=True, got a gpt2 without"):
        MMLMForSeq2SeqLM(config)
    decoder = {"model_type": "mmlm_lstm", "vocab_size": 9, "hidden_size": 32, "add_cross_attention": True}
    config, _ = presets.mmlm_basic(hidden_size=64, decoder_config=decoder)
    with pytest.raises(ValueError, match="as wide as what it attends to, 64, got 32"):
        MMLMForSeq2SeqLM(config)
    with pytest.raises(ValueError, match="needs text and another modality, got"):
        MMLMForContrastive(presets.clip_contrastive(modalities=["image"])[0])
    with pytest.raises(ValueError, match="projector_layers=0 needs towers of width 64"):
        MMLMForContrastive(presets.clip_contrastive(projector_layers=0, vision_config={"model_type": "mmlm_mean"})[0])


def test_encoder_of_an_encoder_decoder():
    config = AutoConfig.for_model("t5", d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, vocab_size=50)
    tower = make_tower(config)
    assert tower(input_ids=torch.randint(50, (2, 5))).last_hidden_state.shape == (2, 5, 32)
    assert not hasattr(tower, "decoder")


def test_unused_poolers_take_no_part():
    model = MMLMForContrastive(presets.clip_contrastive()[0])
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert any("text_tower.pooler" in n for n in frozen)
    assert any("vision_tower.head" in n for n in frozen)
    assert all(".pooler." in n or ".head." in n for n in frozen)


def test_lstm_goes_on_from_ends_of_calls_alone():
    """A cache holds the cells at the ends of calls: cropped elsewhere, it has no state to go on from."""
    torch.manual_seed(0)
    model = MMLMLSTMModel(MMLMLSTMConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2)).eval()
    ids = torch.randint(0, 50, (2, 9))
    with torch.no_grad():
        expected = model(ids).last_hidden_state
        for mask in (None, torch.ones_like(ids)):
            cache = DynamicCache()
            model(ids[:, :5], attention_mask=None if mask is None else mask[:, :5], past_key_values=cache)
            for i in range(5, 9):
                model(ids[:, i : i + 1], past_key_values=cache)
            for _ in range(2):  # to the end of a step, and to that of the first call
                cache = copy.deepcopy(cache)
                cache.crop(-2)
                begin = cache.get_seq_length()
                again = copy.deepcopy(cache)
                out = model(ids[:, begin:], past_key_values=again).last_hidden_state
                torch.testing.assert_close(out, expected[:, begin:])
            again.crop(-1)  # within the last call, where an end was before
            with pytest.raises(ValueError, match=r"cropped to 8 tokens, which is none of \[5, 9\]"):
                model(ids[:, 8:], past_key_values=again)
            cache.crop(-2)
            with pytest.raises(ValueError, match=r"a cache cropped to 3 tokens, which is none of \[5, 6, 7, 8, 9\]"):
                model(ids[:, 3:], past_key_values=cache)
            cache.reset()
            if cache.get_seq_length():
                continue  # transformers 5.17 resets a dynamic cache to as many tokens of zeros
            model(ids[:, :7], past_key_values=cache)
            cache.crop(-2)
            with pytest.raises(ValueError, match=r"a cache cropped to 5 tokens, which is none of \[7\]"):
                model(ids[:, 5:], past_key_values=cache)


@pytest.mark.parametrize("size", [(1, 4), (1, 4, 1), (1, 4, 1, 1)])
def test_batch_norm_of_one_value(size):
    """By hand; the running statistics stay, and two values are torch's."""
    norm = torch.nn.BatchNorm2d(4) if len(size) == 4 else torch.nn.BatchNorm1d(4)
    plain = type(norm)(4)
    for layer in (norm, plain):
        with torch.no_grad():
            layer.running_mean.fill_(1.0), layer.running_var.fill_(4.0), layer.weight.fill_(3.0), layer.bias.fill_(0.5)
    with_lone_values(torch.nn.Sequential(norm)).train()
    x = torch.randn(size, requires_grad=True)
    out = norm(x)
    torch.testing.assert_close(out, (x - 1) / (4 + norm.eps) ** 0.5 * 3 + 0.5)
    out.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 3 / (4 + norm.eps) ** 0.5))
    assert norm.running_mean.eq(1).all()
    two = torch.randn(2, *size[1:])
    assert torch.equal(norm(two), plain(two))
    assert torch.equal(norm.running_var, plain.running_var)
    assert norm.state_dict().keys() == plain.state_dict().keys()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        plain(x)
