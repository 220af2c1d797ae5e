"""Data that needs no download."""

import numpy as np
import pytest
import transformers
from PIL import Image

from mmlm_fast.data import load_spoken_digits
from mmlm_fast.training import load
from mmlm_fast.training.builtin import digits, stamps, stamps_folder


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()


def test_digits_are_real_and_split():
    spoken = load_spoken_digits()
    assert {k: len(v) for k, v in spoken.items()} == {"en": 10, "es": 10, "fr": 10}
    assert all(
        0.3 < len(x.waveform) / x.sampling_rate < 1.2 and abs(x.waveform).max() > 0.05
        for v in spoken.values()
        for x in v
    )
    training, held_out = digits("question", "train"), digits("question", "eval")
    assert (len(training), len(held_out)) == (1397, 400)
    pixels = {np.asarray(s.images[0]).tobytes() for s in training}
    shared = sum(np.asarray(s.images[0]).tobytes() in pixels for s in held_out)
    assert shared <= 1  # two writers may draw the same
    assert {s.text.split()[0] for s in training} >= {"Which", "¿Qué", "Quel"}
    again = digits("question", "eval")
    assert [s.text for s in again] == [s.text for s in held_out]
    assert [s.text for s in digits("question", "eval", seed=1)] != [s.text for s in held_out]
    with pytest.raises(ValueError, match="kind must be among question, caption"):
        digits("sums", "train")


def test_stamps_where_they_are_installed():
    if stamps_folder() is None:
        pytest.skip("Tux Paint's stamps are not installed (apt install tuxpaint-stamps-default)")
    for kind in ("topic", "caption", "pair"):
        training, held_out = stamps(kind, "train"), stamps(kind, "eval")
        assert len(training) > 3 * len(held_out) > 300
        assert not {s.images for s in training} & {s.images for s in held_out}
        assert load(held_out[0]).images[0].mode == "RGB"


def test_stamps_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("MMLM_FAST_STAMPS", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="apt install tuxpaint-stamps-default"):
        stamps("topic", "train")


def test_stamps_folder_is_read(monkeypatch, tmp_path):
    """Captions by language, readings, transparency on white, mirrored copies left out."""
    import soundfile

    for i in range(12):
        base = tmp_path / ("animals" if i % 2 else "food") / f"thing{i}"
        base.parent.mkdir(exist_ok=True)
        Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(base.with_suffix(".png"))
        Image.new("RGBA", (8, 8)).save(base.with_name(f"thing{i}_mirror.png"))
        base.with_suffix(".txt").write_text(f"Thing {i}.\nes.utf8=Cosa {i}.\nfr.utf8=Chose {i}.\n", encoding="utf-8")
        soundfile.write(f"{base}_desc_es.ogg", np.zeros(800), 8000)
    monkeypatch.setenv("MMLM_FAST_STAMPS", str(tmp_path))
    training, held_out = stamps("topic", "train"), stamps("topic", "eval")
    assert (len(training), len(held_out)) == (10, 2)
    assert {s.label for s in training} == {"animals", "food"}
    assert all(s.text.startswith("Cosa") and len(s.audio) == 1 for s in training)
    assert np.asarray(load(training[0]).images[0]).min() == 255
    captions = stamps("caption", "train")
    assert len(captions) == 30
    assert {s.text for s in captions} == {"Describe the picture.", "Describe la imagen.", "Décris l'image."}
