"""Drop-ins for the feature extractors of transformers: same class name, subclass of the original.

Each class overrides the one method in which the original computes its spectrum; padding, truncation, batching, masks
and normalisation stay the original's code. `EXTRACTORS` lists them all; classes are made when first asked for, since
importing an original costs seconds and not every version of transformers has them all.
"""

from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from typing import Any

from mmlm_fast.audio.plain import in_plain_torch


@dataclass(frozen=True)
class Extractor:
    module: str  # in transformers.models
    mixin: str  # "module of this package:class"
    computes: str


EXTRACTORS = {
    "WhisperFeatureExtractor": Extractor("whisper", "whisper:WhisperCallMixin", "log-mel"),
    "ASTFeatureExtractor": Extractor("audio_spectrogram_transformer", "kaldi_family:ASTMixin", "Kaldi fbank"),
    "ClapFeatureExtractor": Extractor("clap", "numpy_family:ClapMixin", "mel in dB, float64"),
    "ClvpFeatureExtractor": Extractor("clvp", "numpy_family:ClvpMixin", "log-mel, float64"),
    "CohereAsrFeatureExtractor": Extractor("cohere_asr", "nemo:ParakeetMixin", "NeMo log-mel"),
    "Dots3NoteFeatureExtractor": Extractor("dots3_note", "whisper_family:WhisperMixin", "log-mel"),
    "FunAsrNanoFeatureExtractor": Extractor("fun_asr_nano", "kaldi_family:FunAsrNanoMixin", "Kaldi fbank, stacked"),
    "Gemma3nAudioFeatureExtractor": Extractor("gemma3n", "numpy_family:Gemma3nAudioMixin", "log-mel magnitude"),
    "Gemma4AudioFeatureExtractor": Extractor("gemma4", "numpy_family:Gemma4AudioMixin", "log-mel magnitude"),
    "GraniteSpeechFeatureExtractor": Extractor("granite_speech", "granite:GraniteSpeechMixin", "log-mel, stacked"),
    "GraniteSpeech5FeatureExtractor": Extractor(
        "granite_speech5", "granite:GraniteSpeech5Mixin", "log-mel and deltas, stacked"
    ),
    "InklingFeatureExtractor": Extractor("inkling", "torch_family:InklingMixin", "log-mel magnitude"),
    "LasrFeatureExtractor": Extractor("lasr", "torch_family:LasrMixin", "log-mel, float64"),
    "MossTranscribeDiarizeFeatureExtractor": Extractor(
        "moss_transcribe_diarize", "whisper_family:WhisperMixin", "log-mel"
    ),
    "NemotronAsrStreamingFeatureExtractor": Extractor("nemotron_asr_streaming", "nemo:ParakeetMixin", "NeMo log-mel"),
    "NeuCodecFeatureExtractor": Extractor("neucodec", "codecs:NeuCodecMixin", "Kaldi fbank, stacked"),
    "ParakeetFeatureExtractor": Extractor("parakeet", "nemo:ParakeetCallMixin", "NeMo log-mel"),
    "Phi4MultimodalFeatureExtractor": Extractor(
        "phi4_multimodal", "torch_family:Phi4MultimodalMixin", "log-mel, float64"
    ),
    "Pop2PianoFeatureExtractor": Extractor("pop2piano", "numpy_family:Pop2PianoMixin", "mel, float64"),
    "Qwen3ASRFeatureExtractor": Extractor("qwen3_asr", "whisper_family:WhisperMixin", "log-mel"),
    "SeamlessM4TFeatureExtractor": Extractor(
        "seamless_m4t", "kaldi_family:SeamlessM4TCallMixin", "Kaldi fbank, float64"
    ),
    "Speech2TextFeatureExtractor": Extractor("speech_to_text", "kaldi_family:Speech2TextMixin", "Kaldi fbank, float64"),
    "SpeechT5FeatureExtractor": Extractor(
        "speecht5", "numpy_family:SpeechT5Mixin", "log-mel magnitude, float64 (targets)"
    ),
    "UnivNetFeatureExtractor": Extractor("univnet", "numpy_family:UnivNetMixin", "log-mel, float64"),
    "VoxtralRealtimeFeatureExtractor": Extractor("voxtral_realtime", "whisper_family:VoxtralRealtimeMixin", "log-mel"),
    "Xcodec2FeatureExtractor": Extractor("xcodec2", "codecs:Xcodec2Mixin", "Kaldi fbank, stacked"),
}
# Feature extractors of transformers that compute no mel features, and why they are left as they are.
NOT_REPLACED = {
    "MusicgenMelodyFeatureExtractor": "chroma, no mel; one-hot of a 16384-point spectrum",
    "DacFeatureExtractor": "waveform, padded",
    "DiaFeatureExtractor": "waveform, padded",
    "EncodecFeatureExtractor": "waveform, padded",
    "Gemma4UnifiedAudioFeatureExtractor": "waveform, cut into frames",
    "KyutaiSpeechToTextFeatureExtractor": "waveform, padded",
    "MuseSparkFeatureExtractor": "waveform, padded",
    "OmniASRFeatureExtractor": "waveform, normalised",
    "PeAudioFeatureExtractor": "waveform, padded",
    "PocketTTSFeatureExtractor": "waveform, padded",
    "VibeVoiceAcousticTokenizerFeatureExtractor": "waveform, loudness normalised",
    "Wav2Vec2FeatureExtractor": "waveform, normalised",
    "WavTokenizerFeatureExtractor": "waveform, padded",
    "MarkupLMFeatureExtractor": "no audio: HTML",
}
_made: dict[str, type] = {}


def drop_in(name: str) -> type:
    """The drop-in of that name; AttributeError where this transformers has no such class."""
    known = _made.get(name)
    if known is None:
        entry = EXTRACTORS[name]
        try:
            module = import_module(f"transformers.models.{entry.module}.feature_extraction_{entry.module}")
            original = getattr(module, name)
        except (ImportError, AttributeError) as error:
            raise AttributeError(f"this version of transformers has no {name}: {error}") from error
        # Only who asks for a drop-in imports transformers.
        from mmlm_fast.audio.extractors import hooks

        module_name, _, mixin = entry.mixin.partition(":")
        bases = (getattr(import_module(f"{__name__}.{module_name}"), mixin), original)
        doc = f"`transformers.{name}` with its {entry.computes} from the native core; see {entry.mixin}."
        known = type(name, bases, {"__module__": "mmlm_fast.audio", "__doc__": doc})
        known = _made.setdefault(name, _saying_what_is_missing(known))
        hooks.remember(known, original)
    return known


def _saying_what_is_missing(cls: type) -> type:
    """Where an original cannot be made for want of a library, as some without librosa: ImportError, not a NameError.

    ``transformers.<name>`` is then a stand-in that raises it. The class itself, which is taken here, knows what it
    needs but does not look. What a drop-in can do without (torchaudio, mostly) it does without.
    """
    from mmlm_fast.audio.extractors.guard import guarded

    make = cls.__init__  # type: ignore[misc]

    @in_plain_torch
    @wraps(make)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            make(self, *args, **kwargs)
        except NameError:
            from transformers.utils import requires_backends

            requires_backends(self, getattr(self, "__backends", ()))
            raise

    cls.__init__ = init  # type: ignore[misc]
    cls.__call__ = guarded(cls.__call__)  # type: ignore[method-assign, operator]
    return cls
