import numpy as np
import pytest
import transformers

import mmlm_fast
from mmlm_fast.audio import SeamlessM4TFeatureExtractor, WhisperFeatureExtractor
from mmlm_fast.hf import NothingReplaced
from support.speech import WAVEFORMS

CLIP = WAVEFORMS[0]


@pytest.fixture
def processor():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    return transformers.WhisperProcessor(transformers.WhisperFeatureExtractor(feature_size=128), fast)


def test_processor(processor):
    before = processor.feature_extractor(CLIP, sampling_rate=16000, return_tensors="np")["input_features"]
    done = mmlm_fast.accelerate(processor)
    assert type(processor.feature_extractor) is WhisperFeatureExtractor
    assert [r.path for r in done.replaced] == ["feature_extractor"]
    assert done.replaced[0].max_difference < 1e-4
    assert not done.refused
    assert "replaced feature_extractor: WhisperFeatureExtractor" in str(done)
    after = processor.feature_extractor(CLIP, sampling_rate=16000, return_tensors="np")["input_features"]
    np.testing.assert_allclose(after, before, rtol=0, atol=7e-5)
    assert not np.array_equal(after, before)
    again = mmlm_fast.accelerate(processor)
    assert not again.replaced
    assert again.refused[0].reason == "accelerated already"
    done.undo()
    assert type(processor.feature_extractor) is transformers.WhisperFeatureExtractor
    undone = processor.feature_extractor(CLIP, sampling_rate=16000, return_tensors="np")["input_features"]
    assert np.array_equal(undone, before)


def test_processor_takes_saves_and_loads_the_drop_in(processor, tmp_path):
    made = transformers.WhisperProcessor(WhisperFeatureExtractor(feature_size=128), processor.tokenizer)
    made.save_pretrained(tmp_path)
    loaded = transformers.WhisperProcessor.from_pretrained(tmp_path)
    assert type(loaded.feature_extractor) is transformers.WhisperFeatureExtractor
    assert mmlm_fast.accelerate(loaded).replaced
    options = dict(sampling_rate=16000, return_tensors="np")
    assert np.array_equal(loaded(CLIP, **options)["input_features"], made(CLIP, **options)["input_features"])


def test_extractor_itself_and_saving(tmp_path):
    extractor = transformers.SeamlessM4TFeatureExtractor(num_mel_bins=40)
    state = extractor.to_dict().keys()
    mmlm_fast.accelerate(extractor)
    assert type(extractor) is SeamlessM4TFeatureExtractor
    assert extractor.to_dict().keys() == state
    extractor.save_pretrained(tmp_path)
    assert type(transformers.AutoFeatureExtractor.from_pretrained(tmp_path)) is transformers.SeamlessM4TFeatureExtractor


def test_an_extractor_that_draws_noise():
    """UnivNet's comes from a generator that nobody seeds: both sides of the proof get the same."""
    extractor = transformers.UnivNetFeatureExtractor()
    accelerated = mmlm_fast.accelerate(extractor)
    assert len(accelerated.replaced) == 1, accelerated
    assert type(extractor).__module__ == "mmlm_fast.audio"
    accelerated.undo()
    assert type(extractor) is transformers.UnivNetFeatureExtractor


def test_what_is_left_is_said():
    with pytest.raises(NothingReplaced, match="left     this object: Wav2Vec2FeatureExtractor"):
        mmlm_fast.accelerate(transformers.Wav2Vec2FeatureExtractor())
    done = mmlm_fast.accelerate(transformers.Wav2Vec2FeatureExtractor(), strict=False)
    assert not done.replaced
    assert "waveform, normalised" in str(done)

    class WhisperFeatureExtractor(transformers.WhisperFeatureExtractor):
        pass

    done = mmlm_fast.accelerate(WhisperFeatureExtractor(), strict=False)
    assert "a subclass of its own" in done.refused[0].reason
    extractor = transformers.WhisperFeatureExtractor()
    assert not mmlm_fast.accelerate(extractor, exclude=["WhisperFeatureExtractor"], strict=False).replaced
    assert not mmlm_fast.accelerate(extractor, only=["ParakeetFeatureExtractor"], strict=False).replaced
    assert mmlm_fast.accelerate(extractor, verify=False).replaced[0].max_difference is None


def test_a_wrong_replacement_is_refused(monkeypatch):
    InklingFeatureExtractor = pytest.importorskip(
        "transformers.models.inkling.feature_extraction_inkling"
    ).InklingFeatureExtractor
    from mmlm_fast.audio.extractors.torch_family import InklingMixin

    right = InklingMixin._torch_extract_fbank_features

    def one_bin_off(self, *a):
        out = right(self, *a)
        out[0, 3, 5] += 0.5
        return out

    for wrong, reason in (
        (lambda self, *a: right(self, *a).exp(), "input_features differs by up to"),
        (one_bin_off, "input_features differs by up to"),
        (lambda self, *a: right(self, *a)[:, :-1], "where the original has"),
        (lambda self, *a: right(self, *a).double(), "is float64"),
        (lambda self, *a: 1 / 0, "fails on a test clip: ZeroDivisionError"),
    ):
        monkeypatch.setattr(InklingMixin, "_torch_extract_fbank_features", wrong)
        extractor = InklingFeatureExtractor()
        done = mmlm_fast.accelerate(extractor, strict=False)
        assert not done.replaced
        assert reason in done.refused[0].reason
        assert type(extractor) is InklingFeatureExtractor


@pytest.mark.parametrize("thing", [None, 3, "openai/whisper-tiny"])
def test_other_objects(thing):
    with pytest.raises(ValueError, match="takes a module, a transformers processor or feature extractor, got"):
        mmlm_fast.accelerate(thing)


def test_names_must_be_a_collection():
    with pytest.raises(ValueError, match="only must be a collection"):
        mmlm_fast.accelerate(transformers.WhisperFeatureExtractor(), only="WhisperFeatureExtractor")
