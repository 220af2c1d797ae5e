"""Benchmark cases of the audio front end, one module a family; `cases(device)` each."""

AUDIO = ("log_mel", "kaldi", "mel_spectrogram", "resample", "streaming")
