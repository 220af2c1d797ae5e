"""Configuration of the thin multimodal model."""

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

FUSIONS = ("merge", "concat", "mean", "weighted", "gated", "attention")

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
        super().__post_init__(**kwargs)
