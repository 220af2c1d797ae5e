"""Every drop-in and the class it replaces, side by side: same keys, types, shapes, masks, errors; features whose error
against float64 is no larger."""

import copy
import importlib
import inspect
import json
import pickle
import warnings

import numpy as np
import pytest
import torch
import transformers
from transformers.utils import import_utils, is_torchaudio_available, requires_backends

import mmlm_fast.audio
from mmlm_fast import reference
from mmlm_fast.audio.extractors import EXTRACTORS, NOT_REPLACED, drop_in
from support.speech import WAVEFORMS

RATES = {"ClapFeatureExtractor": 48000, "ClvpFeatureExtractor": 22050, "UnivNetFeatureExtractor": 24000,
         "Pop2PianoFeatureExtractor": 22050}  # fmt: skip
NEEDS_TORCHAUDIO = ("Granite", "FunAsr", "NeuCodec", "Xcodec2")
# Whisper's has a file of its own, Pop2Piano's call needs essentia.
NAMES = [n for n in EXTRACTORS if not n.startswith(("Whisper", "Pop2Piano"))]


def original(name):
    module = EXTRACTORS[name].module
    try:
        cls = getattr(importlib.import_module(f"transformers.models.{module}.feature_extraction_{module}"), name)
    except (ImportError, AttributeError):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    try:
        requires_backends(cls, getattr(cls, "__backends", ()))
    except ImportError as error:
        pytest.skip(f"{str(error).strip().splitlines()[0]}: nothing to compare with")
    return cls


def pair(name, **constructor):
    theirs = original(name)
    if name.startswith(NEEDS_TORCHAUDIO) and not is_torchaudio_available():
        pytest.skip("the original needs torchaudio (see PEERS in .ci/bootstrap.py)")
    return drop_in(name)(**constructor), theirs(**constructor)


def call(extractor, clips, name=None, **options):
    """Whatever a class (of this name) calls its argument, and rates only where it takes one."""
    name = name or type(extractor).__name__
    np.random.seed(0)
    torch.manual_seed(0)
    if name.startswith("GraniteSpeechF"):
        return extractor(clips)
    if name == "SpeechT5FeatureExtractor":
        return extractor(audio_target=clips, sampling_rate=16000, **options)
    if name.startswith("Gemma"):
        # Gemma4's original takes a clip that is not in a list for one sample of as many channels.
        return extractor([clips] if isinstance(clips, np.ndarray) and name.startswith("Gemma4") else clips, **options)
    if name == "UnivNetFeatureExtractor":
        options["generator"] = np.random.default_rng(0)
    return extractor(clips, sampling_rate=RATES.get(name, 16000), **options)


def both(name, clips, constructor=None, **options):
    ours, theirs = pair(name, **(constructor or {}))
    results = []
    for extractor in (ours, theirs):
        try:
            results.append(call(extractor, copy.deepcopy(clips), **options))
        except Exception as exception:
            results.append(exception)
    return results


def flat(value):
    """Arrays of a nested value."""
    if isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.dtype == object):
        return [x for v in value for x in flat(v)]
    return [] if value is None else [value.numpy() if isinstance(value, torch.Tensor) else np.asarray(value)]


def assert_same(ours, theirs, atol=2e-3, mean=1e-4):
    """Kinds, shapes and masks exactly; features as near as two float32 computations of a log can be: single bins that
    nearly cancel differ by a thousandth, the mean by a thousandth of that (errors are compared below)."""
    assert not isinstance(ours, Exception), repr(ours)
    assert list(ours) == list(theirs)
    for key in theirs:
        assert type(ours[key]) is type(theirs[key]), key
        a, b = flat(ours[key]), flat(theirs[key])
        assert len(a) == len(b), key
        for x, y in zip(a, b, strict=True):
            assert x.dtype == y.dtype, key
            assert x.shape == y.shape, key
            if x.dtype.kind != "f":
                assert np.array_equal(x, y), key
                continue
            assert np.array_equal(np.isfinite(x), np.isfinite(y)), key
            difference = np.abs(x - y)[np.isfinite(y)]
            scale = max(1.0, np.abs(y[np.isfinite(y)]).max(initial=0))
            assert difference.max(initial=0) <= atol * scale, (key, difference.max())
            assert difference.size == 0 or difference.mean() <= mean * scale, (key, difference.mean())


CLIPS = {
    "one": WAVEFORMS[0],
    "short": WAVEFORMS[0][3000:9000],
    "batch": [WAVEFORMS[0], WAVEFORMS[1][:50000], WAVEFORMS[2][:7777]],
    "equal": [WAVEFORMS[0][:16000], WAVEFORMS[1][:16000]],
    "quiet": np.concatenate([np.zeros(20000, np.float32), WAVEFORMS[2][:30000], np.zeros(9000, np.float32)]),
    "long": np.tile(np.concatenate(WAVEFORMS), 2)[: 31 * 16000],
}
OPTIONS = {
    "default": {},
    "tensors": dict(return_tensors="pt"),
    "mask": dict(return_attention_mask=True, return_tensors="np", padding="longest"),
    "max_length": dict(padding="max_length", max_length=64000, truncation=True, return_tensors="pt"),
    "multiple": dict(padding=True, pad_to_multiple_of=800, return_tensors="np"),
}


def usable(name, clip, options):
    """The originals fail on these themselves, in ways that are not ours to copy."""
    if name.startswith("GraniteSpeechF"):
        return options == "default"
    if name.startswith(("GraniteSpeech5", "Inkling")) and clip in ("batch", "equal") and options == "default":
        return True
    if name in ("ClapFeatureExtractor", "ASTFeatureExtractor", "Dots3NoteFeatureExtractor",
                "MossTranscribeDiarizeFeatureExtractor"):  # fmt: skip
        return options in ("default", "tensors")
    return True


def _sweep():
    """Every class with every clip and every option; the combinations that repeat most are marked slow."""
    for name in NAMES:
        for clip in CLIPS:
            for options in OPTIONS:
                repeats = clip in ("quiet", "equal", "long") and options not in ("default", "mask")
                repeats |= clip != "batch" and options == "max_length"
                yield pytest.param(name, clip, options, marks=[pytest.mark.slow] if repeats else [])


@pytest.mark.parametrize(("name", "clip", "options"), _sweep())
def test_same_output(name, clip, options):
    if not usable(name, clip, options):
        pytest.skip("not an option of this class")
    ours, theirs = both(name, CLIPS[clip], **OPTIONS[options])
    if isinstance(theirs, Exception):
        assert type(ours) in (type(theirs), ValueError), (repr(ours), repr(theirs))
        return
    assert_same(ours, theirs)


CONSTRUCTORS = [
    ("ClapFeatureExtractor", dict(truncation="rand_trunc", padding="repeat", max_length_s=2)),
    ("ClapFeatureExtractor", dict(truncation="fusion", max_length_s=3, frequency_min=50)),
    ("ClvpFeatureExtractor", dict(mel_norms=list(np.linspace(1, 2, 80)), n_fft=512, hop_length=128)),
    ("CohereAsrFeatureExtractor", dict(dither=0.0, feature_size=80)),
    ("CohereAsrFeatureExtractor", dict(max_audio_clip_s=4.0, overlap_chunk_second=1.0)),
    ("Dots3NoteFeatureExtractor", dict(chunk_length=5, dither=1e-3)),
    ("FunAsrNanoFeatureExtractor", dict(feature_size=40, frame_length=30, window="povey")),
    ("Gemma3nAudioFeatureExtractor", dict(per_bin_mean=[0.1] * 128, per_bin_stddev=[2.0] * 128, dither=1e-4)),
    ("Gemma3nAudioFeatureExtractor", dict(preemphasis_htk_flavor=False, fft_overdrive=False, input_scale_factor=0.5)),
    ("Gemma3nAudioFeatureExtractor", dict(preemphasis=0.0, frame_length_ms=25.0)),
    ("Gemma4AudioFeatureExtractor", dict(preemphasis=0.97, preemphasis_htk_flavor=False)),
    ("Gemma4AudioFeatureExtractor", dict(preemphasis=0.97, per_bin_mean=[1.0] * 128, fft_overdrive=True)),
    ("GraniteSpeechFeatureExtractor", dict(n_mels=64, n_fft=400)),
    ("GraniteSpeech5FeatureExtractor", dict(num_mel_bins=64, delta_win_length=5, logmel_floor_db=6.0)),
    ("InklingFeatureExtractor", dict(n_fft=2048, feature_size=40)),
    ("LasrFeatureExtractor", dict(feature_size=64, hop_length=200)),
    ("MossTranscribeDiarizeFeatureExtractor", dict(chunk_length=3, n_fft=512)),
    ("NemotronAsrStreamingFeatureExtractor", dict(mel_filters_dtype="bfloat16")),
    ("ParakeetFeatureExtractor", dict(preemphasis=None, feature_size=128, win_length=320)),
    ("Phi4MultimodalFeatureExtractor", dict(preemphasis=0.9, feature_size=40)),
    ("Qwen3ASRFeatureExtractor", dict(dither=1e-4)),
    ("SeamlessM4TFeatureExtractor", dict(num_mel_bins=40, feature_size=40)),
    ("Speech2TextFeatureExtractor", dict(num_mel_bins=40, feature_size=40, normalize_vars=False)),
    ("Speech2TextFeatureExtractor", dict(do_ceptral_normalize=False)),
    ("ASTFeatureExtractor", dict(num_mel_bins=64, max_length=300, do_normalize=False)),
    ("SpeechT5FeatureExtractor", dict(num_mel_bins=40, win_length=50, mel_floor=1e-5)),
    ("SpeechT5FeatureExtractor", dict(hop_length=10)),
    ("UnivNetFeatureExtractor", dict(center=True, do_normalize=True)),
    ("UnivNetFeatureExtractor", dict(win_length=800, filter_length=1024)),
    ("VoxtralRealtimeFeatureExtractor", dict(global_log_mel_max=None)),
    ("VoxtralRealtimeFeatureExtractor", dict(feature_size=80, global_log_mel_max=2.5)),
]


@pytest.mark.parametrize(("name", "constructor"), CONSTRUCTORS, ids=lambda v: str(v)[:40])
@pytest.mark.parametrize("clip", ["one", "batch"])
def test_same_output_for_constructor_options(name, constructor, clip):
    ours, theirs = both(name, CLIPS[clip], constructor)
    if isinstance(theirs, Exception):
        assert type(ours) in (type(theirs), ValueError), (repr(ours), repr(theirs))
        return
    assert_same(ours, theirs)


def test_voxtral_streams_chunks():
    ours, theirs = pair("VoxtralRealtimeFeatureExtractor")
    for center in (True, False):
        a, b = (e(WAVEFORMS[0], sampling_rate=16000, center=center, return_tensors="pt") for e in (ours, theirs))
        assert_same(a, b)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("center", [False, True])
def test_nemotron_streams_chunks(center, last):
    ours, theirs = pair("NemotronAsrStreamingFeatureExtractor")
    options = dict(sampling_rate=16000, center=center, is_last_audio_chunk=last)
    assert_same(*(e(WAVEFORMS[0][:17000], **options) for e in (ours, theirs)))


def test_speecht5_inputs_are_untouched():
    ours, theirs = pair("SpeechT5FeatureExtractor", do_normalize=True)
    assert_same(*(e(audio=WAVEFORMS[0], sampling_rate=16000, padding=True) for e in (ours, theirs)), atol=0, mean=0)


def test_gemma4_takes_a_single_clip():
    ours = drop_in("Gemma4AudioFeatureExtractor")()
    batch = ours([CLIPS["short"]], return_tensors="np")
    for clip in (CLIPS["short"], torch.from_numpy(CLIPS["short"]), CLIPS["short"].tolist()):
        assert np.array_equal(ours(clip, return_tensors="np")["input_features"], batch["input_features"])


def test_pop2piano_mel():
    ours, theirs = drop_in("Pop2PianoFeatureExtractor")(), original("Pop2PianoFeatureExtractor")()
    clips = np.stack([WAVEFORMS[0][:30000], WAVEFORMS[1][:30000]])
    a, b = ours.mel_spectrogram(clips), theirs.mel_spectrogram(clips)
    assert a.dtype == b.dtype
    np.testing.assert_allclose(a, b, rtol=1e-6)


# The method that computes features, and how to run it in float64 where the original works in float32.
def _exact_parakeet(e, x):
    window = torch.hann_window(e.win_length, periodic=False, dtype=torch.float64)
    spectrum = torch.stft(
        x, e.n_fft, e.hop_length, e.win_length, window=window, return_complex=True, pad_mode="constant"
    )
    return (e.mel_filters.double() @ spectrum.abs() ** 2 + 2.0**-24).log().transpose(1, 2)


def _exact_whisper(e, x):
    window = torch.hann_window(e.n_fft, dtype=torch.float64)
    power = torch.stft(x, e.n_fft, e.hop_length, window=window, return_complex=True)[..., :-1].abs() ** 2
    log_spec = (torch.from_numpy(np.array(e.mel_filters)).T @ power).clamp(min=1e-10).log10()
    return (torch.maximum(log_spec, log_spec.amax((-2, -1), keepdim=True) - 8) + 4) / 4


def _exact_kaldi(e, x):
    """ln of Kaldi's filter bank of samples at 16-bit scale, with the extractor's own tables."""
    frames = (x[0] * 2**15).unfold(-1, 400, 160)
    frames = frames - frames.mean(-1, keepdim=True)
    frames = frames - 0.97 * torch.cat([frames[:, :1], frames[:, :-1]], -1)
    power = torch.fft.rfft(frames * torch.from_numpy(np.array(e.window)), n=512).abs() ** 2
    return (power @ torch.from_numpy(np.array(e.mel_filters))).clamp(min=1.192092955078125e-07).log()[None]


def _exact_lasr(e, x):
    frames = x.unfold(-1, e.win_length, e.hop_length)
    window = torch.hann_window(e.win_length, periodic=False, dtype=torch.float64)
    power = torch.fft.rfft(frames * window, n=e.n_fft).abs() ** 2
    return (power @ e.mel_filters).clamp(min=1e-5).log()


def _exact_phi4(e, x):
    frames = x.unfold(-1, e.win_length, e.hop_length)
    frames = (frames - e.preemphasis * torch.cat([frames[..., :1], frames[..., :-1]], -1)) * 32768
    window = torch.hamming_window(e.win_length, periodic=False, dtype=torch.float64)
    power = torch.fft.rfft(frames * window, n=e.n_fft).abs() ** 2
    return (power @ torch.from_numpy(np.array(e.mel_filters))).clamp(min=1.0).log()


def _exact_clap(e, x):
    window = torch.hann_window(e.fft_window_size, dtype=torch.float64)
    power = torch.stft(x, e.fft_window_size, e.hop_length, window=window, return_complex=True).abs() ** 2
    mel = torch.from_numpy(np.array(e.mel_filters)).T @ power
    return 10 * mel.clamp(min=1e-10).log10().transpose(1, 2)


def _exact_speecht5(e, x):
    window = torch.from_numpy(np.array(e.window))
    magnitude = torch.stft(x, e.n_fft, e.sample_stride, window=window, return_complex=True).abs()
    return (torch.from_numpy(np.array(e.mel_filters)).T @ magnitude).clamp(min=e.mel_floor).log10().transpose(1, 2)


EXACT = {
    "ParakeetFeatureExtractor": ("_torch_extract_fbank_features", _exact_parakeet, "tensor"),
    "CohereAsrFeatureExtractor": ("_torch_extract_fbank_features", _exact_parakeet, "tensor"),
    "Qwen3ASRFeatureExtractor": ("_torch_extract_fbank_features", _exact_whisper, "array"),
    "LasrFeatureExtractor": ("_torch_extract_fbank_features", _exact_lasr, "tensor"),
    "SeamlessM4TFeatureExtractor": ("_extract_fbank_features", _exact_kaldi, "clip"),
    "ClapFeatureExtractor": ("_np_extract_fbank_features", _exact_clap, "clip with filters"),
    "SpeechT5FeatureExtractor": ("_extract_mel_features", _exact_speecht5, "clip"),
    "Phi4MultimodalFeatureExtractor": ("_torch_extract_fbank_features", _exact_phi4, "tensor with lengths"),
}


@pytest.mark.parametrize("name", EXACT)
def test_error_is_no_larger(name):
    """Against float64, on the method that computes the features, on speech in three languages: mean and maximum, where
    ours computes in float64. Where both compute in float32, the single largest error sits in whichever bin cancels
    most, and which of the two is luckier there says nothing: mean and 99.9th percentile."""
    method, exact, kind = EXACT[name]
    errors = {True: [], False: []}
    for speech in WAVEFORMS:
        speech = speech[:40000]
        for is_ours, extractor in zip((True, False), pair(name), strict=True):
            expected = exact(extractor, torch.from_numpy(speech).double()[None])
            argument = {"tensor": torch.from_numpy(speech)[None], "array": speech[None]}.get(kind.split()[0], speech)
            extra = {"clip with filters": (extractor.mel_filters,) if name.startswith("Clap") else ()}.get(kind, ())
            if kind == "tensor with lengths":
                extra = (torch.tensor([len(speech)]),)
            actual = torch.as_tensor(np.asarray(getattr(extractor, method)(argument, *extra))).double()
            errors[is_ours].append((actual.reshape(expected.shape) - expected).abs().flatten())
    ours, theirs = torch.cat(errors[True]), torch.cat(errors[False])
    assert ours.mean() <= max(theirs.mean(), 1e-13), (ours.mean(), theirs.mean())  # Lasr is float64 itself
    if exact is _exact_parakeet:
        ours, theirs = (e.kthvalue(int(0.999 * len(e))).values for e in (ours, theirs))
    assert ours.max() <= max(theirs.max(), 1e-11), (ours.max(), theirs.max())


@pytest.mark.parametrize("name", EXTRACTORS)
def test_is_the_original_to_the_rest_of_transformers(name, tmp_path):
    theirs = original(name)
    if name.startswith("Pop2Piano") or (name.startswith(NEEDS_TORCHAUDIO) and not is_torchaudio_available()):
        pytest.skip("the original's own dependencies are missing")
    cls = getattr(mmlm_fast.audio, name)
    assert issubclass(cls, theirs)
    assert cls.__name__ == name
    ours = cls()
    assert {k: v for k, v in ours.to_dict().items() if isinstance(v, (int, float, str, bool))} == {
        k: v for k, v in theirs().to_dict().items() if isinstance(v, (int, float, str, bool))
    }
    clip = WAVEFORMS[0][:16000]
    expected = call(ours, clip)  # a used extractor saves, copies and pickles like a new one
    ours.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["feature_extractor_type"] == name
    again = cls.from_pretrained(tmp_path)
    assert type(again) is cls
    assert type(theirs.from_pretrained(tmp_path)) is theirs
    for clone in (again, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(clone) is cls
        result = call(clone, clip)
        for key in expected:
            assert all(np.array_equal(a, b) for a, b in zip(flat(result[key]), flat(expected[key]), strict=True))


@pytest.mark.parametrize("name", ["ParakeetFeatureExtractor", "SeamlessM4TFeatureExtractor", "ClapFeatureExtractor"])
def test_reference_switch_runs_the_original(name):
    ours, theirs = pair(name)
    with reference():
        a = call(ours, CLIPS["short"])
    b = call(theirs, CLIPS["short"])
    assert all(np.array_equal(x, y) for key in b for x, y in zip(flat(a[key]), flat(b[key]), strict=True))


def test_own_filters_are_used_also_changed_in_place():
    ours, theirs = pair("ParakeetFeatureExtractor")
    call(ours, CLIPS["short"])
    for extractor in (ours, theirs):
        extractor.mel_filters *= 2  # seen by its version
    assert_same(call(ours, CLIPS["short"]), call(theirs, CLIPS["short"]))


def test_own_filters_are_used():
    ours, theirs = pair("SeamlessM4TFeatureExtractor")
    call(ours, CLIPS["short"])
    for extractor in (ours, theirs):
        extractor.mel_filters = extractor.mel_filters * 2
    assert_same(call(ours, CLIPS["short"]), call(theirs, CLIPS["short"]))
    for extractor in (ours, theirs):
        extractor.mel_filters[40:] *= 3
    assert_same(call(ours, CLIPS["short"]), call(theirs, CLIPS["short"]))


# A change of each attribute by which an original computes.
CHANGES = {
    "numbers": lambda value: value * 2 if isinstance(value, float) else value // 2,
    "smaller": lambda value: value * 0.75 if isinstance(value, float) else value - 1,
    "negative": lambda value: -value,
}


def _changed_in_turn(theirs):
    """Names of attributes and new values for them, and for arrays what changes them in place."""
    for name, value in vars(theirs).items():
        if isinstance(value, (np.ndarray, torch.Tensor)):
            yield name, lambda array: array * 1.25
            yield name, lambda array: array.__imul__(1.25)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            for change in CHANGES.values():
                yield name, change
        elif isinstance(value, bool):
            yield name, lambda flag: not flag


@pytest.mark.parametrize("name", NAMES)
def test_attributes_changed_after_construction(name):
    """Whatever an original makes of it, an error too."""
    compared = 0
    for attribute, change in _changed_in_turn(original(name)()):
        ours, theirs = pair(name)
        call(ours, CLIPS["short"])  # what was kept of the first call must not answer the second
        for extractor in (ours, theirs):
            setattr(extractor, attribute, change(getattr(extractor, attribute)))
        try:
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                expected = call(theirs, CLIPS["short"])
        except Exception:
            with pytest.raises(Exception):  # noqa: B017
                call(ours, CLIPS["short"])
            continue
        floats = [x for x in flat(list(expected.values())) if x.dtype.kind == "f"]
        if any(x.size == 0 or not np.isfinite(x).all() for x in floats):
            continue  # refused, and named: see test_nan_is_an_error
        assert_same(call(ours, CLIPS["short"]), expected)
        compared += 1
    assert compared > 3


def _compared(ours, theirs, clip=CLIPS["short"]):
    """What both give, or that both refuse."""
    try:
        expected = call(theirs, clip)
    except Exception:
        with pytest.raises(Exception):  # noqa: B017
            call(ours, clip)
        return
    assert_same(call(ours, clip), expected)


@pytest.mark.parametrize("name", ["ClvpFeatureExtractor", "LasrFeatureExtractor", "Gemma3nAudioFeatureExtractor"])
@pytest.mark.parametrize("values", [(161.0, 161), (163, 163.0), (None, 160), ("160", 160)])
def test_a_wrong_hop_spoils_no_right_one(name, values):
    for value in values:
        ours, theirs = pair(name)
        ours.hop_length = theirs.hop_length = value
        _compared(ours, theirs)


@pytest.mark.parametrize(
    "name", ["ClvpFeatureExtractor", "SeamlessM4TFeatureExtractor", "SpeechT5FeatureExtractor", "LasrFeatureExtractor"]
)
def test_no_filters(name):
    """Some originals take the spectrum then."""
    ours, theirs = pair(name)
    ours.mel_filters = theirs.mel_filters = None
    _compared(ours, theirs)


@pytest.mark.parametrize("name", ["ParakeetFeatureExtractor", "LasrFeatureExtractor", "ClvpFeatureExtractor"])
def test_negative_filters_are_the_originals(name):
    """Logarithms of negative sums are NaN there, and refused here; floors hide them in others."""
    ours, theirs = pair(name)
    for extractor in (ours, theirs):
        extractor.mel_filters = -extractor.mel_filters
    with np.errstate(all="ignore"):
        expected = call(theirs, CLIPS["short"])
    if all(np.isfinite(x).all() for x in flat(list(expected.values())) if x.dtype.kind == "f"):
        assert_same(call(ours, CLIPS["short"]), expected)
    else:
        with pytest.raises(ValueError, match="NaN"):
            call(ours, CLIPS["short"])


def _granite_changes():
    import torchaudio

    def another(**options):
        return torchaudio.transforms.MelSpectrogram(16000, 512, 400, 160, n_mels=80, **options)

    yield "filters in place", lambda e: e.mel_filters.mel_scale.fb.mul_(torch.linspace(0.1, 2, 80))
    yield "window in place", lambda e: e.mel_filters.spectrogram.window.mul_(0.5)
    yield "power", lambda e: setattr(e.mel_filters.spectrogram, "power", 1.0)
    yield "hook", lambda e: e.mel_filters.register_forward_hook(lambda module, given, out: out * 2)
    yield "in a sequence", lambda e: setattr(e, "mel_filters", torch.nn.Sequential(another()))
    for options in (
        dict(norm="slaney", mel_scale="slaney"), dict(f_min=100.0), dict(f_max=4000.0), dict(power=1.0),
        dict(window_fn=torch.hamming_window), dict(normalized=True), dict(pad=160), dict(center=False),
        dict(pad_mode="constant"),
    ):  # fmt: skip
        yield str(options), lambda e, o=options: setattr(e, "mel_filters", another(**o))


@pytest.mark.parametrize("name", ["GraniteSpeechFeatureExtractor", "GraniteSpeech5FeatureExtractor"])
def test_a_transform_of_ones_own(name):
    pair(name)  # or skip
    for what, change in _granite_changes():
        ours, theirs = pair(name)
        for extractor in (ours, theirs):
            change(extractor)
        for one in (ours, copy.deepcopy(ours)):
            try:
                expected = call(theirs, [CLIPS["short"]])
            except Exception:
                with pytest.raises(Exception):  # noqa: B017
                    call(one, [CLIPS["short"]])
                continue
            try:
                assert_same(call(one, [CLIPS["short"]]), expected)
            except AssertionError as error:
                raise AssertionError(what) from error


@pytest.mark.parametrize("name", ["ASTFeatureExtractor", "Speech2TextFeatureExtractor"])
def test_filters_that_an_original_does_not_look_at(name):
    """With torchaudio they take Kaldi's, whatever `mel_filters` somebody sets."""
    if not transformers.utils.is_speech_available():
        pytest.skip("they do without torchaudio")
    ours, theirs = pair(name)
    for extractor in (ours, theirs):
        extractor.mel_filters, extractor.window = np.ones((257, extractor.num_mel_bins)), np.ones(400)
    assert_same(call(ours, CLIPS["short"]), call(theirs, CLIPS["short"]))


@pytest.mark.parametrize("name", NAMES)
def test_arrays_stay_the_users(name):
    ours, _ = pair(name)
    call(ours, CLIPS["short"])
    for value in vars(ours).values():
        if isinstance(value, np.ndarray):
            assert value.flags.writeable


def test_every_extractor_of_transformers_is_accounted_for():
    """None silently missing: replaced, or listed with the reason."""
    from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES

    known = set(EXTRACTORS) | set(NOT_REPLACED)
    names = {n for n in FEATURE_EXTRACTOR_MAPPING_NAMES.values() if n and n.endswith("FeatureExtractor")}
    assert not names - known, sorted(names - known)
    folder = importlib.import_module("transformers.models").__path__[0]
    spectral = ("mel_filter_bank", "compliance.kaldi", "MelSpectrogram", "torch.stft", "spectrogram(")
    from pathlib import Path

    listed = {entry.module for entry in EXTRACTORS.values()} | {"musicgen_melody"}
    for path in Path(folder).glob("*/feature_extraction_*.py"):
        if any(word in path.read_text(encoding="utf-8") for word in spectral):
            assert path.parent.name in listed, path.name


@pytest.mark.parametrize("name", ["ParakeetFeatureExtractor", "SeamlessM4TFeatureExtractor", "ClapFeatureExtractor"])
def test_nan_is_an_error(name):
    original(name)
    clip = WAVEFORMS[0][:16000].copy()
    clip[700] = np.nan
    with pytest.raises(ValueError, match="NaN, infinity or an overflow in clip 0"):
        call(drop_in(name)(), clip)


def test_a_missing_library_is_the_originals_import_error(monkeypatch):
    """transformers gives a stand-in that raises it; the class behind, which ours derives from, has a NameError."""

    def init(self, **options):
        raise NameError("name 'librosa' is not defined")

    cls, known = original("SeamlessM4TFeatureExtractor"), import_utils.BACKENDS_MAPPING
    monkeypatch.setattr(cls, "__init__", init)
    monkeypatch.setattr(cls, "__backends", ["librosa"], raising=False)
    monkeypatch.setitem(known, "librosa", (lambda: False, known["librosa"][1]))
    monkeypatch.setattr("mmlm_fast.audio.extractors._made", {})
    extractor = drop_in("SeamlessM4TFeatureExtractor")
    for make in (extractor, lambda: extractor.from_dict({})):
        with pytest.raises(ImportError, match="SeamlessM4TFeatureExtractor requires the librosa library"):
            make()
    monkeypatch.setitem(known, "librosa", (lambda: True, ""))
    with pytest.raises(NameError, match="librosa"):
        extractor()


def test_unknown_names():
    with pytest.raises(AttributeError, match="Wav2Vec2FeatureExtractor"):
        _ = mmlm_fast.audio.Wav2Vec2FeatureExtractor
    assert "ParakeetFeatureExtractor" in dir(mmlm_fast.audio)


# ---- what an original calls, and what it refuses ---------------------------------------------------------------------


def _methods_of(cls):
    """The methods that its call may reach."""
    names = {n for c in cls.__mro__[:-1] for n, v in vars(c).items() if inspect.isfunction(v) and n[:2] != "__"}
    return sorted(names - {"to_dict", "to_json_string", "to_json_file", "save_pretrained", "push_to_hub"})


def _spy(method, seen):
    def override(self, *args, **kwargs):
        seen.append(type(self).__name__)
        return method(self, *args, **kwargs)

    return override


PLACES = ("subclass", "mixin", "mixin behind", "instance", "original", "drop-in")


@pytest.mark.parametrize("place", [p if p != "mixin" else pytest.param(p, marks=pytest.mark.slow) for p in PLACES])
@pytest.mark.parametrize("name", [n for n in EXTRACTORS if not n.startswith("Pop2Piano")])
def test_overrides_are_called_as_by_the_original(name, place, monkeypatch):
    """Whatever the original calls, overridden anywhere: ours calls it exactly where the original does."""
    theirs, ours = original(name), drop_in(name)
    if name.startswith(NEEDS_TORCHAUDIO) and not is_torchaudio_available():
        pytest.skip("the original needs torchaudio")
    clip = WAVEFORMS[0][:20000]
    for method in _methods_of(theirs):
        plain, called = getattr(theirs, method), {}
        for key, parent in (("theirs", theirs), ("ours", ours)):
            seen = called[key] = []
            with monkeypatch.context() as patched:
                cls = parent
                if place in ("subclass", "mixin"):
                    over = {method: _spy(getattr(parent, method), seen)}
                    mixin = (type("Mixin", (), over), parent)
                    cls = type("Mine", (parent,), over) if place == "subclass" else type("Mine", mixin, {})
                elif place == "mixin behind":
                    between = type("Between", (theirs,), {method: _spy(plain, seen)})
                    cls = type("Mine", (parent, between), {}) if parent is ours else between
                elif place == "original":
                    owner = next(c for c in theirs.__mro__ if method in vars(c))
                    patched.setattr(owner, method, _spy(vars(owner)[method], seen))
                elif place == "drop-in":
                    patched.setattr(parent, method, _spy(getattr(parent, method), seen))
                extractor = cls()
                if place == "instance":
                    bound = _spy(getattr(parent, method), seen)
                    vars(extractor)[method] = bound.__get__(extractor)
                seen.clear()  # some are called by constructors
                call(extractor, clip, name)
        assert bool(called["ours"]) == bool(called["theirs"]), (method, place)


INPUTS = {
    "tensor of clips": lambda x: torch.from_numpy(np.stack([x, x[::-1]])),
    "array of clips": lambda x: np.stack([x, x[::-1]]),
    "list of tensors": lambda x: [torch.from_numpy(x), torch.from_numpy(x[:4000].copy())],
    "tuple": lambda x: (x, x[:4000]),
    "one of one": lambda x: torch.from_numpy(x[None]),
    "three of two": lambda x: torch.from_numpy(np.stack([x, x])[None].repeat(3, 0)),
    "list of channels": lambda x: [np.stack([x, x])] * 3,
    "list of frames": lambda x: [np.stack([x, x], -1)[:99]] * 3,
    "one is empty": lambda x: [x, x[:0]],
    "one is short": lambda x: [x, x[:100]],
    "one is a frame": lambda x: [x, x[:450]],
    "a frame": lambda x: x[:450],
    "no clips": lambda x: [],
    "no rows": lambda x: np.zeros((0, 6000), np.float32),
    "NaN": lambda x: np.where(np.arange(len(x)) == 3000, np.nan, x).astype(np.float32),
    "int16": lambda x: (x * 32767).astype(np.int16),
    "int32": lambda x: torch.from_numpy((x * 2**31).astype(np.int32)),
    "list of int16": lambda x: [(x * 32767).astype(np.int16)] * 2,
    "uint8": lambda x: (x * 100 + 128).astype(np.uint8),
    "bool": lambda x: x > 0,
    "complex": lambda x: x.astype(np.complex64),
    "half": lambda x: x.astype(np.float16),
    "bfloat16": lambda x: torch.from_numpy(x).bfloat16(),
    "big-endian": lambda x: x.astype(">f4"),
    "read-only": lambda x: np.frombuffer(x.tobytes(), np.float32),
    "masked": lambda x: np.ma.masked_array(x, mask=np.arange(len(x)) < 3000),
    "needs a gradient": lambda x: torch.from_numpy(x).requires_grad_(),
    "objects": lambda x: np.array([x, x[:4000]], dtype=object),
    "numbers": lambda x: list(x[:4000]),
}


@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("name", [n for n in EXTRACTORS if not n.startswith("Pop2Piano")])
def test_as_many_clips_out_as_in_or_a_value_error(name, given):
    """And no NaN, nothing without frames, integers as the original takes them or not at all, floats as float32."""
    ours, theirs = pair(name)
    x = WAVEFORMS[0][20000:26000].copy()
    clips, tensors = INPUTS[given](x), dict(return_tensors="np")
    try:
        out = call(ours, clips, **tensors)
    except ValueError:
        return
    assert given not in ("masked", "needs a gradient", "objects", "NaN", "complex", "no clips", "no rows"), given
    first = next(iter(out.values()))
    is_list = isinstance(clips, (list, tuple)) and not np.isscalar(clips[0])
    if is_list or getattr(clips, "ndim", 1) > 1:
        assert len(first) == len(clips)
    for array in (a for value in out.values() for a in flat(value) if a.dtype.kind == "f"):
        assert array.size
        assert not np.isnan(array).any()
    if given in ("int16", "int32", "list of int16", "uint8", "bool"):
        assert_same(out, call(theirs, copy.deepcopy(clips), **tensors), atol=0, mean=0)
    elif given in ("half", "bfloat16", "big-endian", "read-only"):
        exact = torch.as_tensor(np.ascontiguousarray(clips, np.float32) if isinstance(clips, np.ndarray) else clips)
        assert_same(out, call(theirs, exact.float().numpy(), **tensors))
