"""Calls of the audio front end, and a data set that makes them; importable, so that a spawned worker finds them."""

import numpy as np
import torch

from mmlm_fast.audio import (
    SeamlessM4TFeatureExtractor,
    StreamingFbank,
    kaldi_fbank,
    log_mel,
    mel_spectrogram,
    mfcc,
    resample,
)
from support.speech import WAVEFORMS

TAPE = torch.from_numpy(np.concatenate(WAVEFORMS))
CALLS = {
    "log_mel": log_mel,
    "kaldi_fbank": lambda x: kaldi_fbank(x, num_mel_bins=80),
    "mfcc": mfcc,
    "mel_spectrogram": lambda x: mel_spectrogram(x, n_fft=1024),
    "log_mel float64": lambda x: log_mel(x, dtype=torch.float64),
    "fused": lambda x: log_mel(x, orig_freq=22050),
    "resample": lambda x: resample(x, 44100, 16000),
}


class Clips(torch.utils.data.Dataset):
    def __init__(self):
        self.extractor = SeamlessM4TFeatureExtractor()

    def __len__(self):
        return 12

    def __getitem__(self, i):
        x = TAPE[i * 1000 : i * 1000 + 40000]
        features = [call(x).numpy() for call in CALLS.values()]
        features.append(np.asarray(self.extractor(x.numpy(), sampling_rate=16000)["input_features"]))
        stream = StreamingFbank(num_mel_bins=80)
        features.append(torch.cat([stream.accept(x[:777]), stream.accept(x[777:]), stream.flush()]).numpy())
        return features
