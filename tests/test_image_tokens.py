"""Pictures as tokens."""

import pytest
import torch

from mmlm_fast.models import (
    MMLMForConditionalGeneration,
    MMLMImageTokenizer,
    MMLMImageTokenizerConfig,
    codes_as_text,
    generate_images,
    presets,
)
from mmlm_fast.training.builtin import digits
from mmlm_fast.training.samples import load


def pictures(count=128):
    _, processor = presets.image_tokens(codebook_size=16)
    images = [load(s).images[0] for s in digits("picture", "train", count=count)]
    return processor.image_processor(images, return_tensors="pt")["pixel_values"]


def test_learns_to_paint_real_digits(tmp_path):
    """Better than the mean picture by far, with most codes in use; codes are what is painted; saved and loaded."""
    torch.manual_seed(0)
    pixels = pictures()
    model = MMLMImageTokenizer(MMLMImageTokenizerConfig(codebook_size=16, hidden_size=32)).train()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(150):
        optimizer.zero_grad()
        model(pixels[torch.arange(32) + 32 * (step % 4)]).loss.backward()
        optimizer.step()
    model.eval()
    out = model(pixels)
    assert out.reconstruction_loss < 0.5 * (pixels - pixels.mean(0)).square().mean()
    assert len(out.codes.unique()) > 8
    assert torch.equal(model.encode(pixels), out.codes)
    torch.testing.assert_close(model.decode(out.codes), out.reconstruction)
    codebook = model.codebook.clone()
    model(pixels)
    assert torch.equal(model.codebook, codebook)  # in eval mode nothing moves
    model.save_pretrained(tmp_path)
    again = MMLMImageTokenizer.from_pretrained(tmp_path)
    assert torch.equal(again.encode(pixels), out.codes)


def test_encoder_and_decoder_get_gradients():
    """Straight through: the encoder's gradient comes from the picture too, not from its distance to the code alone."""
    torch.manual_seed(0)
    model = MMLMImageTokenizer(MMLMImageTokenizerConfig(commitment_weight=0.0)).train()
    model(pictures(8)).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_codebook_is_a_moving_average():
    torch.manual_seed(0)
    model = MMLMImageTokenizer(MMLMImageTokenizerConfig(codebook_size=2, code_dim=1)).train()
    model._learn(torch.tensor([[0.0], [0.0], [10.0], [10.0]]))
    model.codebook.copy_(torch.tensor([[0.0], [10.0]]))
    model.counts.copy_(torch.tensor([2.0, 2.0]))
    model.sums.copy_(torch.tensor([[0.0], [20.0]]))
    model._learn(torch.tensor([[1.0], [1.0], [11.0], [11.0]]))
    torch.testing.assert_close(model.codebook, torch.tensor([[0.05], [10.05]]))
    model.counts[1] = 0.01  # out of use: starts anew from what is encoded
    model._learn(torch.tensor([[0.5], [0.5]]))
    assert model.codebook[1] == 0.5


def test_text_to_picture():
    torch.manual_seed(0)
    config, processor = presets.image_tokens(codebook_size=16)
    model = MMLMForConditionalGeneration(config).eval()
    painter = MMLMImageTokenizer(MMLMImageTokenizerConfig(codebook_size=16)).eval()
    torch.nn.init.normal_(painter.codebook)
    made = generate_images(model, painter, processor, ["a seven", "今天天气很好"])
    assert made.shape == (2, 3, 16, 16)
    assert made.isfinite().all()
    ids = processor.tokenizer(codes_as_text(torch.tensor([[3, 15, 0]])))["input_ids"][0]
    first = processor.tokenizer.convert_tokens_to_ids("<i0>")
    assert [i - first for i in ids] == [3, 15, 0]


def test_image_token_errors():
    model = MMLMImageTokenizer(MMLMImageTokenizerConfig())
    with pytest.raises(ValueError, match=r"\[N, 3, 16, 16\], got \(1, 3, 16, 8\)"):
        model(torch.zeros(1, 3, 16, 8))
    with pytest.raises(ValueError, match=r"codes must be \[N, 16\], got \(1, 3\)"):
        model.decode(torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="multiple of 2"):
        MMLMImageTokenizerConfig(image_size=10)
    config, processor = presets.token_merge_vlm()
    with pytest.raises(ValueError, match="the tokenizer must have <i0> to <i63>"):
        generate_images(MMLMForConditionalGeneration(config), model, processor, ["x"])
