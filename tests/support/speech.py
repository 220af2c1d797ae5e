"""The recordings that ship with the package, read once; without soundfile, synthetic voices in their place.

Most tests want sound that rises, falls and pauses, whatever it says: they run on a machine without soundfile too. What
is about the words calls `need_recordings`.
"""

from importlib.util import find_spec

import numpy as np

from mmlm_fast.data import Speech, load_speech

ARE_RECORDINGS = find_spec("soundfile") is not None
RATE = 16000


def synthetic(language: str, num_samples: int, pitch_hz: float) -> Speech:
    """Vowels that change twice a second, with pauses, in 16 bits: harmonics of a gliding pitch under two formants."""
    t = np.arange(num_samples) / RATE
    pitch = pitch_hz * (1 + 0.15 * np.sin(2 * np.pi * 0.7 * t))
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    first, second = (centre * (1 + 0.4 * np.sin(2 * np.pi * hz * t)) for centre, hz in ((600, 1.9), (1700, 1.3)))
    voice = np.zeros(num_samples)
    for k in range(1, 25):
        weight = np.exp(-(((k * pitch - first) / 200) ** 2)) + 0.4 * np.exp(-(((k * pitch - second) / 300) ** 2))
        voice += (weight + 0.05 / k) * np.sin(k * phase)
    loudness = np.clip(np.sin(2 * np.pi * 0.9 * t) + 0.6, 0, 1) ** 2
    breath = np.random.default_rng(num_samples).standard_normal(num_samples)
    samples = 0.5 * loudness * (voice / np.abs(voice).max() + 0.02 * breath) + 1e-3 * breath
    return Speech(language, "", (np.round(samples * 32768) / 32768).astype(np.float32), RATE)


SPEECH = (
    load_speech()
    if ARE_RECORDINGS
    else [synthetic("en", 168196, 110.0), synthetic("es", 175924, 160.0), synthetic("fr", 152500, 210.0)]
)
WAVEFORMS = [s.waveform for s in SPEECH]


def need_recordings() -> None:
    """Skip a test, or a file of tests, that is about what is said, or about files."""
    import pytest  # not by workers that need the sound alone

    if not ARE_RECORDINGS:
        pytest.skip("soundfile is not installed here: no recordings", allow_module_level=True)
