"""A real Whisper writes the same words from our features as from the original's."""

import re

import numpy as np
import pytest
import torch
import transformers

from mmlm_fast.audio import WhisperFeatureExtractor
from support import real_whisper
from support.peers import need
from support.speech import SPEECH, need_recordings

need_recordings()


def words(text):
    return re.sub(r"[^a-z' ]", "", text.lower().replace("-", " "))


@pytest.fixture(scope="module")
def model():
    return real_whisper.load()


def transcribe(model, extractor, clip):
    whisper, tokenizer = model
    features = extractor(clip, sampling_rate=16000, return_tensors="pt").input_features
    with torch.no_grad():
        tokens = whisper.generate(features)
    return tokens, tokenizer.decode(tokens[0], skip_special_tokens=True)


def test_identical_transcripts_and_word_error_rate(model):
    jiwer = need("jiwer")
    english = SPEECH[0]
    assert english.language == "en"
    clip = english.waveform
    noisy = clip + 0.01 * np.random.default_rng(0).standard_normal(len(clip)).astype(np.float32)
    rates = {}
    for name, samples in {"clean": clip, "noisy": noisy, "half": clip[: len(clip) // 2], "quiet": clip * 0.02}.items():
        ours_tokens, ours = transcribe(model, WhisperFeatureExtractor(), samples)
        theirs_tokens, theirs = transcribe(model, transformers.WhisperFeatureExtractor(), samples)
        assert torch.equal(ours_tokens, theirs_tokens), (name, ours, theirs)
        rates[name] = [jiwer.wer(words(english.text), words(text)) for text in (ours, theirs)]
        assert rates[name][0] == rates[name][1]
    assert rates["clean"][0] <= 0.2, rates  # it understands, so the comparison means something
