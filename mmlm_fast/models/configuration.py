"""Configuration of the thin multimodal model."""

from dataclasses import dataclass
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig


@dataclass(frozen=True)
class FusionKind:
    """What a fusion does, as far as code asks; `MMLMConfig` describes each.

    Attributes:
        name: ``MMLMConfig.fusion``.
        places_tokens: Features take the places of placeholder tokens in a decoder's text.
        cross_attends: Layers added to a decoder attend to the features.
        is_pooled: One pooled feature of each modality is fused.
        decision: How decisions are fused, each of a classifier of one modality; None where features are fused.
    """

    name: str
    places_tokens: bool = False
    cross_attends: bool = False
    is_pooled: bool = False
    decision: str | None = None

    @property
    def is_decoder_based(self) -> bool:
        """Whether only a causal decoder has it, also as a classifier."""
        return self.places_tokens or self.cross_attends


FUSION_KINDS = {
    kind.name: kind
    for kind in (
        FusionKind("merge", places_tokens=True),
        FusionKind("gated_cross_attention", cross_attends=True),
        *(FusionKind(name, is_pooled=True) for name in ("concat", "mean", "weighted", "gated", "attention")),
        FusionKind("cross_attention"),
        FusionKind("sequence"),
        *(FusionKind(f"late_{decision}", decision=decision) for decision in ("mean", "weighted", "vote")),
    )
}
FUSIONS = tuple(FUSION_KINDS)
POOLED_FUSIONS = tuple(name for name, kind in FUSION_KINDS.items() if kind.is_pooled)
LATE_FUSIONS = tuple(name for name, kind in FUSION_KINDS.items() if kind.decision is not None)
DECODER_BASED_FUSIONS = tuple(name for name, kind in FUSION_KINDS.items() if kind.is_decoder_based)
DECODER_FUSIONS = (*DECODER_BASED_FUSIONS, *POOLED_FUSIONS)
SEQ2SEQ_FUSIONS = ("cross_attention", *POOLED_FUSIONS)
ENCODER_FUSIONS = (*POOLED_FUSIONS, "sequence", *LATE_FUSIONS)  # of classifiers on encoders
CLASSIFICATION_FUSIONS = (*DECODER_BASED_FUSIONS, *ENCODER_FUSIONS)
MODALITIES = ("text", "image", "audio")
OBJECTIVE_WEIGHTS = ("language_modeling_weight", "contrastive_weight", "reconstruction_weight")
TOWER_CONFIGS = {
    "text_config": "qwen3",
    "vision_config": "siglip_vision_model",
    "audio_config": "qwen2_audio_encoder",
    "decoder_config": "gpt2",
    "joint_config": "bert",
}
CONFIG_OF = {"text": "text_config", "image": "vision_config", "audio": "audio_config", "decoder": "decoder_config"}

try:
    from transformers.configuration_utils import SubConfigSpec

    _SUB_CONFIGS: dict[str, Any] = {
        "sub_configs_defaults": {
            name: SubConfigSpec(config_class=AutoConfig, model_type=default, optional=name != "text_config")
            for name, default in TOWER_CONFIGS.items()
        }
    }
except ImportError:  # transformers before 5.2x
    _SUB_CONFIGS = {"sub_configs": dict.fromkeys(TOWER_CONFIGS, AutoConfig)}


class MMLMConfig(PretrainedConfig):
    """Configuration of the thin model: towers from transformers, how they are joined, and what comes out.

    Args:
        text_config: Text model, any config `AutoModel` knows, or its dict with ``model_type``: the causal decoder of
            `MMLMForConditionalGeneration`, the text encoder of the others. Default: qwen3.
        vision_config: Vision tower taking ``pixel_values``, likewise; None for a model without pictures.
        audio_config: Audio tower taking ``input_features``, likewise; None for a model without sound.
        decoder_config: Decoder with cross-attention of `MMLMForSeq2SeqLM`, likewise.
        joint_config: Encoder over the joined tokens of all modalities, behind the fused feature where there is one;
            None for none.
        modalities: Those that take part, of ``text``, ``image``, ``audio``; by default text and those with a tower.
            Without ``text`` a classifier has no text tower.
        fusion: How modalities meet.

            - ``merge``: projected features replace placeholder tokens (LLaVA).
            - ``gated_cross_attention``: layers of the decoder look at the features through gates (Flamingo).
            - ``concat``: a linear layer over the features of every modality side by side; in a decoder, over every
              token embedding and the pooled features.
            - ``mean``, ``weighted``, ``attention``: weighted sums of the same.
            - ``gated``: a gate between the text and the mean of the others.
            - ``cross_attention``: the decoder of a sequence-to-sequence model attends to the tokens of all, end to end.
            - ``sequence``: a classifier reads the tokens of all, end to end.
            - ``late_mean``, ``late_weighted``, ``late_vote``: a classifier for each modality, decisions fused.
        image_token_id, audio_token_id: Placeholders in ``input_ids``, for ``merge``.
        mask_token_id: What hides a token from masked language modelling.
        hidden_size: Width in which modalities meet; by default the text model's.
        projector_hidden_act: Activation between the two layers of a projector; see `concat_linear`.
        projector_layers: 2, 1, or 0: none, where a tower has the width already.
        cross_attention_interval: Of ``gated_cross_attention``: before every n-th layer of the decoder.
        frozen: Towers without gradients, always in eval mode: of ``text``, ``image``, ``audio``, ``decoder``.
        pooling: ``mean`` over the tokens of a text (or of what is joined) or its ``last``; by default mean, or last
            where the text model is a causal decoder (``merge``, ``gated_cross_attention``). Pictures and sound are
            averaged.
        classifier_dropout: Of the classification head.
        classifier_hidden: Whether that head has a hidden layer.
        language_modeling_weight, contrastive_weight, reconstruction_weight: Of the parts of the loss. The second aligns
            each modality with the text of its sample, and costs a decoder a pass over the text alone; the third
            predicts hidden patches and stretches of sound, and costs a pass of each tower. Without a weight a part is
            neither built nor computed.
        contrastive_loss: ``clip`` or ``siglip``.
        projection_dim: Width of the space in which modalities are aligned.
        mask_ratio: Share of patches, and of stretches of sound, that are hidden.
        text_mask_ratio: Share of tokens that masked language modelling hides.
        audio_frames_per_token: Frames of ``input_features`` of one token of the audio tower (Whisper 2, Qwen2-Audio 4).
    """

    model_type = "mmlm"
    if "sub_configs_defaults" in _SUB_CONFIGS:
        sub_configs_defaults = _SUB_CONFIGS["sub_configs_defaults"]
    else:
        sub_configs = _SUB_CONFIGS["sub_configs"]

    text_config: dict | PretrainedConfig | None = None
    vision_config: dict | PretrainedConfig | None = None
    audio_config: dict | PretrainedConfig | None = None
    decoder_config: dict | PretrainedConfig | None = None
    joint_config: dict | PretrainedConfig | None = None
    modalities: list[str] | None = None
    fusion: str = "merge"
    image_token_id: int | None = None
    audio_token_id: int | None = None
    mask_token_id: int | None = None
    hidden_size: int | None = None
    projector_hidden_act: str = "gelu"
    projector_layers: int = 2
    cross_attention_interval: int = 1
    frozen: list[str] | None = None
    pooling: str | None = None
    classifier_dropout: float = 0.0
    classifier_hidden: bool = True
    tie_word_embeddings: bool = False
    language_modeling_weight: float = 1.0
    contrastive_weight: float = 0.0
    reconstruction_weight: float = 0.0
    contrastive_loss: str = "clip"
    projection_dim: int = 256
    mask_ratio: float = 0.5
    text_mask_ratio: float = 0.15
    audio_frames_per_token: int = 4

    def __post_init__(self, **kwargs: Any) -> None:
        if self.text_config is None:
            self.text_config = CONFIG_MAPPING["qwen3"]()
        for name in TOWER_CONFIGS:
            value = getattr(self, name)
            if isinstance(value, dict):
                setattr(self, name, _tower_config(name, value))
        if self.fusion not in FUSIONS:
            raise ValueError(f"fusion must be one of {', '.join(FUSIONS)}, got {self.fusion!r}")
        self._check_modalities()
        self._check_objectives()
        if self.hidden_size is None:
            self.hidden_size = width_of(self.text_config)
        if self.pooling is None:
            self.pooling = "last" if self.fusion_kind.is_decoder_based else "mean"
        if self.decoder_config is not None:
            kwargs["is_encoder_decoder"] = True
            for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
                token_id = getattr(self.decoder_config, name, None)
                if token_id is not None:
                    kwargs.setdefault(name, token_id)
            if kwargs.get("decoder_start_token_id") is None:
                kwargs["decoder_start_token_id"] = kwargs.get("bos_token_id")
        super().__post_init__(**kwargs)
        self.architectures = getattr(self, "architectures", None) or []  # AutoModel chooses among classes by them

    @property
    def fusion_kind(self) -> FusionKind:
        """What `fusion` does."""
        return FUSION_KINDS[self.fusion]

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """Return the configuration of what writes: where there is a decoder beside the text encoder, the decoder's."""
        return self.decoder_config if self.decoder_config is not None and not encoder else self.text_config

    def _check_modalities(self) -> None:
        towers = {"image": self.vision_config, "audio": self.audio_config}
        if self.modalities is None:
            self.modalities = ["text", *(m for m, tower in towers.items() if tower is not None)]
        if not self.modalities or len(set(self.modalities)) < len(self.modalities):
            raise ValueError(f"modalities must be different ones of {', '.join(MODALITIES)}, got {self.modalities}")
        for modality in self.modalities:
            if modality not in MODALITIES:
                raise ValueError(f"modalities must be among {', '.join(MODALITIES)}, got {modality!r}")
            if modality in towers and towers[modality] is None:
                name = "vision_config" if modality == "image" else "audio_config"
                raise ValueError(f"modalities has {modality!r}, which needs {name}, got None")
            lacks_placeholder = modality in towers and getattr(self, f"{modality}_token_id") is None
            if self.fusion_kind.places_tokens and lacks_placeholder:
                raise ValueError(f"fusion 'merge' with a tower for {modality} needs {modality}_token_id, got None")
        for name in self.frozen or []:
            if name not in (*MODALITIES, "decoder"):
                raise ValueError(f"frozen must be among {', '.join(MODALITIES)} and decoder, got {name!r}")
        if self.pooling not in (None, "mean", "last"):
            raise ValueError(f"pooling must be mean or last, got {self.pooling!r}")
        if self.projector_layers not in (0, 1, 2) or self.cross_attention_interval < 1:
            raise ValueError(
                "projector_layers must be 0, 1 or 2 and cross_attention_interval at least 1, got "
                f"{self.projector_layers} and {self.cross_attention_interval}"
            )

    def _check_objectives(self) -> None:
        weights = {name: getattr(self, name) for name in OBJECTIVE_WEIGHTS}
        if any(w < 0 for w in weights.values()) or not any(weights.values()):
            raise ValueError(f"weights of the loss must be at least 0 and not all 0, got {weights}")
        towers = self.vision_config is not None or self.audio_config is not None
        if (self.contrastive_weight or self.reconstruction_weight) and not towers:
            raise ValueError("contrastive_weight and reconstruction_weight need a vision or audio tower, got neither")
        if self.contrastive_loss not in ("clip", "siglip"):
            raise ValueError(f"contrastive_loss must be clip or siglip, got {self.contrastive_loss!r}")
        if not (0 < self.mask_ratio < 1 and 0 < self.text_mask_ratio < 1):
            raise ValueError(
                f"mask_ratio and text_mask_ratio must be between 0 and 1, got {self.mask_ratio} and "
                f"{self.text_mask_ratio}"
            )
        if self.projection_dim < 1 or self.audio_frames_per_token < 1:
            raise ValueError(
                f"projection_dim and audio_frames_per_token must be at least 1, got {self.projection_dim} and "
                f"{self.audio_frames_per_token}"
            )


def _tower_config(name: str, value: dict) -> PretrainedConfig:
    import mmlm_fast.models.towers  # noqa: F401  registers the small towers

    if value.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(f"{name} needs a model_type that transformers knows, got {value.get('model_type')!r}")
    return CONFIG_MAPPING[value["model_type"]](**{k: v for k, v in value.items() if k != "model_type"})


def width_of(config: Any) -> int:
    """Return the width of a tower's states."""
    for name in ("hidden_size", "d_model"):
        if getattr(config, name, None):
            return getattr(config, name)
    return config.hidden_sizes[-1]  # ResNet


def check_fusion(config: MMLMConfig, allowed: tuple[str, ...], model: str) -> None:
    """Raise where `model` has no such fusion."""
    if config.fusion not in allowed:
        raise ValueError(f"{model} fuses by one of {', '.join(allowed)}, got {config.fusion!r}")
