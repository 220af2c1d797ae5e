"""Six real samples in a file, a configuration that trains on them, and collators of small models."""

import json

from mmlm_fast.data import load_image
from mmlm_fast.models import MMLMForClassification, MMLMForConditionalGeneration, presets
from mmlm_fast.training import Collator, read_settings
from support.speech import SPEECH, need_recordings

IMAGE = load_image()[0]
LABELS = [str(i) for i in range(10)]


def write_samples(folder):
    """Write data.jsonl, its pictures and its clip."""
    need_recordings()
    import soundfile

    IMAGE.resize((48, 48)).save(folder / "a.png")
    IMAGE.rotate(90).resize((48, 48)).save(folder / "b.png")
    soundfile.write(folder / "a.wav", SPEECH[0].waveform[:16000], 16000)
    rows = [
        {"image": "a.png", "text": "Qué es?", "label": "up", "target": "an astronaut"},
        {"image": ["b.png", "a.png"], "audio": "a.wav", "text": "今天天气很好", "label": "down", "target": "turned"},
        {"audio": "a.wav", "text": "what is said", "label": "up", "target": "I am"},
    ] * 2
    (folder / "data.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")


def settings_of(folder, *overrides, task="classification", preset="resnet_text_classifier"):
    (folder / "config.toml").write_text(
        f"""
task = "{task}"
preset = "{preset}"
output = "{folder}/out"
[data]
train = "data.jsonl"
[model]
image_size = 32
{"audio = true" if preset == "resnet_text_classifier" else ""}
audio_seconds = 2
[training]
max_steps = 2
per_device_train_batch_size = 2
"""
    )
    return read_settings(folder / "config.toml", overrides)


def collator(task="classification", preset="resnet_text_classifier", **options):
    hearing = {"audio": True} if preset == "resnet_text_classifier" else {}
    config, processor = presets.PRESETS[preset].build(image_size=56, audio_seconds=2, **hearing)
    cls = MMLMForClassification if task == "classification" else MMLMForConditionalGeneration
    return Collator(task, cls(config), processor, **({"labels": LABELS} | options))
