"""Configuration of the thin multimodal model."""

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

FUSIONS = ("merge", "concat", "mean", "weighted", "gated", "attention")
OBJECTIVE_WEIGHTS = ("language_modeling_weight", "contrastive_weight", "reconstruction_weight")

try:
    from transformers.configuration_utils import SubConfigSpec

    _SUB_CONFIGS: dict[str, Any] = {
        "sub_configs_defaults": {
            "text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen3"),
            "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="siglip_vision_model", optional=True),
            "audio_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2_audio_encoder", optional=True),
        }
    }
except ImportError:  # transformers before 5.2x
    _SUB_CONFIGS = {"sub_configs": dict.fromkeys(("text_config", "vision_config", "audio_config"), AutoConfig)}


class MMLMConfig(PretrainedConfig):
    """Configuration of `MMLMForConditionalGeneration`: towers from transformers, and how they are joined.

    Args:
        text_config: Causal decoder, any config `AutoModel` knows, or its dict with ``model_type``. Default: qwen3.
        vision_config: Vision tower taking ``pixel_values``, likewise; None for a model without pictures.
        audio_config: Audio tower taking ``input_features``, likewise; None for a model without sound.
        fusion: How modalities meet the text.

            - ``merge``: projected features replace the placeholder tokens (LLaVA).
            - ``concat``: a linear layer over every token embedding joined with the pooled features of each modality.
            - ``mean``, ``weighted``, ``attention``: of the token embedding and the pooled features.
            - ``gated``: between the token embedding and the mean of the pooled features.
        image_token_id, audio_token_id: Placeholders in ``input_ids``, for ``merge``.
        projector_hidden_act: Activation between the two layers of a projector; see `concat_linear`.
        language_modeling_weight, contrastive_weight, reconstruction_weight: Of the parts of the loss. The second aligns
            each modality with the text of its sample, and costs a pass of the decoder over the text alone; the third
            predicts hidden patches and stretches of sound, and costs a pass of each tower. Without a weight a part is
            neither built nor computed.
        contrastive_loss: ``clip`` or ``siglip``.
        projection_dim: Width of the space in which modalities are aligned.
        mask_ratio: Share of patches, and of stretches of sound, that are hidden.
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
    fusion: str = "merge"
    image_token_id: int | None = None
    audio_token_id: int | None = None
    projector_hidden_act: str = "gelu"
    tie_word_embeddings: bool = False
    language_modeling_weight: float = 1.0
    contrastive_weight: float = 0.0
    reconstruction_weight: float = 0.0
    contrastive_loss: str = "clip"
    projection_dim: int = 256
    mask_ratio: float = 0.5
    audio_frames_per_token: int = 4

    def __post_init__(self, **kwargs: Any) -> None:
        if self.text_config is None:
            self.text_config = CONFIG_MAPPING["qwen3"]()
        for name in ("text_config", "vision_config", "audio_config"):
            value = getattr(self, name)
            if isinstance(value, dict):
                if value.get("model_type") not in CONFIG_MAPPING:
                    raise ValueError(
                        f"{name} needs a model_type that transformers knows, got {value.get('model_type')!r}"
                    )
                setattr(
                    self,
                    name,
                    CONFIG_MAPPING[value["model_type"]](**{k: v for k, v in value.items() if k != "model_type"}),
                )
        if self.fusion not in FUSIONS:
            raise ValueError(f"fusion must be one of {', '.join(FUSIONS)}, got {self.fusion!r}")
        for modality, tower in (("image", self.vision_config), ("audio", self.audio_config)):
            if self.fusion == "merge" and tower is not None and getattr(self, f"{modality}_token_id") is None:
                raise ValueError(f"fusion 'merge' with a tower for {modality} needs {modality}_token_id, got None")
        self._check_objectives()
        super().__post_init__(**kwargs)

    def _check_objectives(self) -> None:
        weights = {name: getattr(self, name) for name in OBJECTIVE_WEIGHTS}
        if any(w < 0 for w in weights.values()) or not any(weights.values()):
            raise ValueError(f"weights of the loss must be at least 0 and not all 0, got {weights}")
        towers = self.vision_config is not None or self.audio_config is not None
        if (self.contrastive_weight or self.reconstruction_weight) and not towers:
            raise ValueError("contrastive_weight and reconstruction_weight need a vision or audio tower, got neither")
        if self.contrastive_loss not in ("clip", "siglip"):
            raise ValueError(f"contrastive_loss must be clip or siglip, got {self.contrastive_loss!r}")
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio must be between 0 and 1, got {self.mask_ratio}")
        if self.projection_dim < 1 or self.audio_frames_per_token < 1:
            raise ValueError(
                f"projection_dim and audio_frames_per_token must be at least 1, got {self.projection_dim} and "
                f"{self.audio_frames_per_token}"
            )


def width_of(config: Any) -> int:
    """Of a tower's states."""
    return getattr(config, "hidden_size", None) or config.d_model
