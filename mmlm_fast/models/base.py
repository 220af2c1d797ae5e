"""What all thin models share: checkpoints, of whole models and of towers, and towers that may be frozen."""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, GenerationMixin, PreTrainedModel

from mmlm_fast.models.configuration import CONFIG_OF, FUSION_KINDS, MMLMConfig
from mmlm_fast.models.tokenization import tower_tokenizer
from mmlm_fast.models.towers import freeze_poolers, with_lone_values
from mmlm_fast.nn import ClipLoss, DecisionFusion, FuseModalities, GatedCrossAttentionLayer, SiglipLoss

TOWERS = {
    "text": ("text_tower", "language_model"),
    "image": ("vision_tower",),
    "audio": ("audio_tower",),
    "decoder": ("decoder",),
}


class MMLMPreTrainedModel(PreTrainedModel):
    """Base of all thin models."""

    config: MMLMConfig
    config_class = MMLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "audio", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "cache"]  # transformers has had both names
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        is_head = isinstance(self, GenerationMixin) and module is self.lm_head
        if isinstance(module, nn.Linear) and not is_head:
            module.reset_parameters()  # torch's own: a normal of 0.02 makes narrow projectors and heads silent
            return
        super()._init_weights(module)
        if isinstance(module, (FuseModalities, DecisionFusion, GatedCrossAttentionLayer, ClipLoss, SiglipLoss)):
            module.reset_parameters()

    def frozen_towers(self) -> list[nn.Module]:
        """Return the towers that `config.frozen` names."""
        attributes = {a for name in self.config.frozen or [] for a in TOWERS[name]}
        return [m for name, m in self.named_modules() if name.rpartition(".")[2] in attributes]

    def post_init(self) -> None:
        super().post_init()
        self._freeze()

    def train(self, mode: bool = True) -> "MMLMPreTrainedModel":
        super().train(mode)
        self._freeze()  # from_pretrained, which ends with eval(), makes new parameters
        return self

    def _freeze(self) -> None:
        for tower in self.frozen_towers():
            tower.requires_grad_(False)
            for module in tower.modules():  # not eval(): a tower of ours would come back here
                module.training = False
        for module in self.modules():
            if isinstance(module, PreTrainedModel) and not isinstance(module, MMLMPreTrainedModel):
                freeze_poolers(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load what `save_pretrained` saved; also as another class, whose new parts then start at random.

        Raises:
            ValueError: if what was saved has no weights of the text model of this class.
        """
        returns_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        parts = {part for key in info["missing_keys"] for part in key.split(".")}
        lost = sorted(parts & {*TOWERS["text"], *TOWERS["decoder"]})
        if lost:
            raise ValueError(
                f"{pretrained_model_name_or_path} was saved by {', '.join(model.config.architectures or ['another'])}, "
                f"got {cls.__name__}, of whose {' and '.join(lost)} it has no weights"
            )
        return (model, info) if returns_info else model

    @classmethod
    def from_towers(
        cls,
        *,
        text: str | None = None,
        image: str | None = None,
        audio: str | None = None,
        decoder: str | None = None,
        **options: Any,
    ) -> "MMLMPreTrainedModel":
        """Make a model whose towers come from checkpoints; what joins them starts at random.

        Args:
            text, image, audio, decoder: Names or folders that ``from_pretrained`` takes. Of CLIP and SigLIP the tower
                of that modality is taken, of Whisper and other encoder–decoders the encoder.
            options: Of `MMLMConfig`, such as ``fusion`` and ``frozen``, and configurations of towers without a
                checkpoint. For ``merge``, placeholders that the text model's tokenizer lacks are added to its tokens.

        `MMLMProcessor.from_towers` makes the processor.

        Raises:
            ValueError: if a checkpoint lacks weights of the tower, naming them.
        """
        sources = {"text": text, "image": image, "audio": audio, "decoder": decoder}
        tokenizer = None
        kind = FUSION_KINDS.get(options.get("fusion", MMLMConfig.fusion))
        places_tokens = kind is not None and kind.places_tokens
        if text is not None and places_tokens and "image_token_id" not in options:
            tokenizer = tower_tokenizer(text, "left", True)
            options |= {f"{m}_token_id": tokenizer.convert_tokens_to_ids(f"<{m}>") for m in ("image", "audio")}
        towers = {}
        for name, source in sources.items():
            if source is not None:
                towers[name] = load_tower(name, source)
                options[CONFIG_OF[name]] = towers[name][1].to_dict()
        model = cls(MMLMConfig(**options))
        for name, (tower, _) in towers.items():
            targets = [m for n, m in model.named_modules() if n.rpartition(".")[2] in TOWERS[name]]
            if not targets:
                raise ValueError(f"{cls.__name__} has no {name} tower with these options")
            for target in targets:
                target.load_state_dict(tower.state_dict())
        if tokenizer is not None and len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer))
        return model


def load_tower(name: str, source: str) -> tuple[nn.Module, Any]:
    """Load the tower of a modality from a checkpoint, with the configuration that makes it again."""
    config: Any = AutoConfig.from_pretrained(source)
    config = getattr(config, CONFIG_OF[name], None) or config  # CLIP's towers
    tower, info = AutoModel.from_pretrained(source, config=config, output_loading_info=True)
    missing = sorted(k for k in info["missing_keys"] if "pooler" not in k)
    if missing:
        raise ValueError(f"{source} lacks weights of the {name} tower: {', '.join(missing[:5])}")
    return with_lone_values(tower.get_encoder() if config.is_encoder_decoder else tower), config
