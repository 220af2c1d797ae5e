"""Audio features for numpy alone: importing this needs neither torch nor transformers.

The functions and streams are those of `mmlm_fast.audio`, which take arrays and give arrays::

    import mmlm_fast.audio.np as anp

    features = anp.log_mel(samples, num_samples=480000)  # float32 [80, 3000], as Whisper's encoder takes them

Threads: `OMP_NUM_THREADS`, by default the CPUs that the process may use; see Serving in README.
"""

from mmlm_fast.audio.kaldi import kaldi_fbank, kaldi_mfcc, mfcc
from mmlm_fast.audio.log_mel import log_mel
from mmlm_fast.audio.mel_spectrogram import mel_mfcc, mel_spectrogram, spectrogram
from mmlm_fast.audio.nemo import nemo_log_mel
from mmlm_fast.audio.resample import resample
from mmlm_fast.audio.standardize import standardize
from mmlm_fast.audio.streaming import StreamingFbank, StreamingLogMel, StreamingMfcc, StreamingResample

__all__ = [
    "StreamingFbank",
    "StreamingLogMel",
    "StreamingMfcc",
    "StreamingResample",
    "kaldi_fbank",
    "kaldi_mfcc",
    "log_mel",
    "mel_mfcc",
    "mel_spectrogram",
    "mfcc",
    "nemo_log_mel",
    "resample",
    "spectrogram",
    "standardize",
]
