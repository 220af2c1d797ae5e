"""A family is one value: equal specs are one plan, a spec survives as text, and nothing of the user's is touched."""

import dataclasses
import gc
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from mmlm_fast import audio
from mmlm_fast.audio.extractors import drop_in
from mmlm_fast.audio.kaldi import KaldiSettings, kaldi_spec
from mmlm_fast.audio.log_mel import WHISPER, below
from mmlm_fast.audio.nemo import NEMO
from mmlm_fast.audio.spec import _PREPARED, Framing, MelFilters, Spec, Window, _read, prepared, spec_of
from mmlm_fast.audio.tables import Table
from support.speech import WAVEFORMS

SPEECH = torch.from_numpy(WAVEFORMS[0][20000:36000])
NUMBERS = np.random.default_rng(0).random((40, 201))
SPECS = {
    "whisper": WHISPER,
    "voxtral": below(WHISPER, 1.5),
    "nemo": NEMO,
    "kaldi": KaldiSettings(num_mel_bins=80).spec(),
    "kaldi, energy last": KaldiSettings(num_ceps=13, use_energy=True, htk_compat=True, snip_edges=False).spec(),
    "own tables": dataclasses.replace(WHISPER, filters=Table(NUMBERS), window=Table(np.linspace(0, 1, 400))),
    "torchaudio's filters": dataclasses.replace(WHISPER, filters=MelFilters(40, norm=None, mel_scale="htk")),
    "no filters": dataclasses.replace(WHISPER, filters=None, dtype="bfloat16"),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_spec_survives_as_text_and_as_a_pickle(name):
    spec = SPECS[name]
    read = _read.__wrapped__(spec.key)  # as in a process that has not made it
    assert dataclasses.asdict(read) == dataclasses.asdict(spec)
    for again in (read, spec_of(spec.key), pickle.loads(pickle.dumps(spec)), dataclasses.replace(spec)):
        assert again == spec
        assert hash(again) == hash(spec)
        assert again.key == spec.key
        assert prepared(again) is prepared(spec)


def test_text_is_read_in_another_process():
    """Where hashes of names differ."""
    for spec in SPECS.values():
        code = "import sys; from mmlm_fast.audio.spec import spec_of; s = sys.stdin.read(); print(spec_of(s).key == s)"
        done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, input=spec.key)
        assert done.stdout.strip() == "True", done.stderr


def test_every_field_tells_specs_apart():
    """What is not part of the value would share a plan that is another's."""
    other = {
        "n_fft": 512, "frame_length": 320, "hop_length": 80, "window": Window("hamming"), "sampling_rate": 8000,
        "framing": Framing.inside(400, 400), "filters": MelFilters(40), "dct": KaldiSettings(num_ceps=5).spec().dct,
        "log": "natural", "energy": "first", "dtype": "float64", "computed_in": "float64",
    }  # fmt: skip
    for field in dataclasses.fields(Spec):
        value = getattr(WHISPER, field.name)
        changed = other[field.name] if field.name in other else not value if isinstance(value, bool) else value + 0.5
        spec = dataclasses.replace(WHISPER, **{field.name: changed})
        assert spec != WHISPER, field.name
        assert spec.key != WHISPER.key, field.name
        assert spec_of(spec.key) == spec, field.name


def test_options_reach_the_core():
    """Every field that the core has an option for, by running with another value."""
    usual = audio.log_mel(SPEECH)
    changes = dict(scale=2.0, signal_preemphasis=0.9, frame_preemphasis=0.9, remove_dc_offset=True, exponent=1.0,
                   power_add=1.0, power_floor=1.0, add=1.0, floor=1.0, multiply=2.0, shift=2.0, dynamic_range=0.1,
                   log="natural", energy="first", bins_first=False, dtype="float64", computed_in="float64",
                   framing=Framing.centered(400, 400, "zero", 1), hop_length=200, n_fft=512,
                   filters=MelFilters(40), window=Window("hamming"))  # fmt: skip
    from mmlm_fast.audio.features import features_of
    from mmlm_fast.audio.reference import by_reference
    from mmlm_fast.audio.waveforms import clips_of

    for name, value in changes.items():
        spec = dataclasses.replace(WHISPER, **{name: value})
        out = features_of(spec, clips_of(SPEECH))
        assert out.shape != usual.shape or out.dtype != usual.dtype or not torch.equal(out, usual), name
        # Two float32 transforms and logarithms: 1.6e-5 apart at most, measured; 2e-14 in float64.
        atol = 1e-12 if out.dtype == torch.float64 else 3e-5
        torch.testing.assert_close(out, by_reference(spec, SPEECH, len(SPEECH), 0), rtol=0, atol=atol, msg=name)


def test_tables_are_told_apart_by_their_numbers():
    numbers = np.random.default_rng(1).random((80, 201))
    table = Table.of(numbers)
    assert Table.of(numbers.copy()) is table  # another array of the same numbers
    assert Table.of(np.asfortranarray(numbers)) == table
    assert Table.of(numbers.astype(np.float32)) != table
    assert Table.of(numbers.T, transposed=True) == table
    assert Table.of(torch.from_numpy(numbers)) == table
    seen = {table}
    for place in ((0, 0), (79, 200), (40, 100)):
        for change in (1e-16, -0.5):
            changed = numbers.copy()
            changed[place] += change + changed[place] * 2**-52
            seen.add(Table.of(changed))
    assert len(seen) == 7
    assert Table.of(numbers.reshape(40, 402)) != table
    assert Table.from_text(table.text()) == table
    assert numbers.flags.writeable
    for size in (0, 1, 7, 8, 9, 63, 64, 65, 127, 200):
        digests = {Table.of(np.arange(size, dtype=np.float64) + i) for i in range(20)}
        assert len(digests) == (20 if size else 1)


def test_a_user_may_write_to_what_he_gave():
    window = np.hanning(400)
    first = audio.mel_spectrogram(SPEECH, window_fn=window)
    window[:] = 1
    second = audio.mel_spectrogram(SPEECH, window_fn=window)
    assert not torch.equal(first, second)
    assert torch.equal(second, audio.mel_spectrogram(SPEECH, window_fn=np.ones(400)))


def test_one_cache_for_functions_and_drop_ins():
    """Bounded in bytes, and shared: an extractor with filters of its own is one more entry."""
    before = len(_PREPARED)
    extractor = drop_in("WhisperFeatureExtractor")()
    for i in range(1, 4):
        extractor.mel_filters = extractor.mel_filters * (1 + i / 8)
        for _ in range(3):
            extractor(SPEECH.numpy(), sampling_rate=16000, padding="longest")
        assert len(_PREPARED) <= before + i
    for i in range(200):
        extractor.mel_filters[0, 0] = i
        extractor(SPEECH.numpy(), sampling_rate=16000, padding="longest")
        assert _PREPARED.num_bytes <= _PREPARED.max_bytes


def test_what_is_kept_of_large_tables_is_bounded():
    """Tables of the user's own are kept by spec, by plan and by themselves, each up to its number of bytes."""
    from mmlm_fast.audio.spec import _SPECS
    from mmlm_fast.audio.tables import _TABLES

    window, clip = np.hanning(1 << 17), np.zeros(1 << 18, np.float32)
    for i in range(60):
        audio.spectrogram(clip, n_fft=1 << 17, hop_length=1 << 17, window_fn=window * (1 + i / 64))
    for cache in (_SPECS, _TABLES, _PREPARED):
        assert cache.num_bytes <= cache.max_bytes
    held = {id(x.array) for x in gc.get_objects() if type(x) is Table and len(x.array) == 1 << 17}
    assert len(held) <= 64 * 2**20 / (2 * window.nbytes) + 2 * 16 * 2**20 / window.nbytes + 3


def test_undo_leaves_nothing_behind():
    import transformers

    import mmlm_fast

    theirs = transformers.WhisperFeatureExtractor()
    done = mmlm_fast.accelerate(theirs)
    theirs(SPEECH.numpy(), sampling_rate=16000)
    assert done.replaced
    done.undo()
    assert type(theirs) is transformers.WhisperFeatureExtractor
    assert theirs.mel_filters.flags.writeable


def test_keywords_of_another_type_are_not_taken_for_equal_ones():
    audio.log_mel(SPEECH, num_mel_bins=80)
    audio.kaldi_fbank(SPEECH, num_mel_bins=80)
    audio.mel_spectrogram(SPEECH, n_mels=64)
    for call in (
        lambda: audio.log_mel(SPEECH, num_mel_bins=80.0),
        lambda: audio.kaldi_fbank(SPEECH, num_mel_bins=80.0),
        lambda: audio.mel_spectrogram(SPEECH, n_mels=64.0),
        lambda: audio.mel_spectrogram(SPEECH, n_mels=True),
        lambda: audio.log_mel(SPEECH, dtype=None),
        lambda: audio.log_mel(SPEECH, dtype=np.float32(1.5)),
        lambda: audio.log_mel(SPEECH, log_mel_max=float("nan")),
        lambda: audio.log_mel(SPEECH, log_mel_max=512),
        lambda: audio.kaldi_fbank(SPEECH, window_type=["povey"]),
        lambda: audio.kaldi_fbank(SPEECH, preemphasis_coefficient=np.array([80])),
        lambda: audio.kaldi_fbank(SPEECH, low_freq="low"),
    ):
        with pytest.raises(ValueError, match="must be"):
            call()
    assert kaldi_spec(num_mel_bins=np.int64(80), dtype=torch.float32) == kaldi_spec(num_mel_bins=80, dtype="float32")
