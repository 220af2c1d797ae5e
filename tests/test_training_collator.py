"""From samples to batches: prompts, targets, placeholders, chats, and what workers draw."""

import json

import pytest
import torch
import transformers

from mmlm_fast.training import BadSampleError, Sample, train
from mmlm_fast.training.builtin import digits
from support.speech import SPEECH
from support.training import IMAGE, collator, settings_of, write_samples


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()


@pytest.fixture
def folder(tmp_path):
    write_samples(tmp_path)
    return tmp_path


@pytest.mark.parametrize("place", ["target", "messages"])
@pytest.mark.parametrize("token", ["<image>", "<audio>"])
def test_targets_with_placeholders_are_bad_samples(folder, place, token):
    """By file and line before training; skipped, counted and listed where that is asked for."""
    said = f"see {token}"
    messages = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": said}]
    row = {"image": "a.png"} | ({"target": said} if place == "target" else {"messages": messages})
    (folder / "data.jsonl").write_text((folder / "data.jsonl").read_text() + "\n" + json.dumps(row))
    settings = lambda *more: settings_of(
        folder, "model.image_size=56", *more, task="captioning", preset="token_merge_vlm"
    )
    with pytest.raises(BadSampleError, match=rf"data.jsonl:7: target has {token}"):
        train(settings("data.eval=data.jsonl"), progress=False)
    if place == "target":
        skip = ['data.bad_samples="skip"', "data.eval=data.jsonl", "training.max_steps=1"]
        result = train(settings(*skip, "evaluation.generation.max_new_tokens=1"), progress=False, overwrite=True)
        assert len(result["bad_samples"]) == 2
        assert result["num_samples"] == {"train": 6, "eval": 6}


def test_token_counts_that_do_not_match_name_the_sample():
    collate = collator("captioning", "token_merge_vlm")
    good = Sample("good", images=(IMAGE,), text="<image>what?", target="x")
    bad = Sample("bad", images=(IMAGE,), text="<image> and <image>", target="x")
    with pytest.raises(BadSampleError, match=r"bad: text.*2 <image>"):
        collate([good, bad])


def test_dialogue_with_pictures_and_sound():
    """A chat of several turns through the template; only the last answer is a target."""
    collate = collator("dialogue", "token_merge_vlm")
    messages = (
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who?"}]},
        {"role": "assistant", "content": "An astronaut."},
        {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "¿Y aquí?"}]},
        {"role": "assistant", "content": "A voice."},
    )
    sample = Sample("chat", images=(IMAGE,), audio=((SPEECH[0].waveform[:16000], 16000),), messages=messages)
    collate.check(sample)
    batch = collate([sample])
    tokenizer = collate.processor.tokenizer
    target = batch["labels"][0]
    assert tokenizer.decode(target[target != -100]) == "A voice.<eos>"
    said = tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True)
    assert said == "user: Who?\nassistant: An astronaut.\nuser: ¿Y aquí?\nassistant: A voice."
    with pytest.raises(BadSampleError, match="the last message must be the assistant's"):
        collate.check(Sample("chat", images=(IMAGE,), messages=messages[:3]))


def test_targets_follow_prompts_padded_on_the_left():
    collate = collator("question_answering", "token_merge_vlm")
    batch = collate(
        [Sample("a", text="short", target="yes"), Sample("b", text="a longer question", target="no, not so")]
    )
    tokenizer = collate.processor.tokenizer
    for i, (text, target) in enumerate((("short\n", "yes<eos>"), ("a longer question\n", "no, not so<eos>"))):
        real = batch["attention_mask"][i].bool()
        assert tokenizer.decode(batch["input_ids"][i][real]) == text + target
        labels = batch["labels"][i]
        assert tokenizer.decode(labels[labels != -100]) == target


def test_workers_draw_differently():
    collate = collator(augment=["noise"])
    samples = digits("question", "train", count=1) * 4
    batches = torch.utils.data.DataLoader(samples, batch_size=1, num_workers=2, collate_fn=collate)
    drawn = [batch["input_features"] for batch in batches]
    assert not torch.equal(drawn[0], drawn[1])
