"""What all thin models share: towers that may be frozen, and features of any number of items a sample."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, GenerationMixin, PreTrainedModel

from mmlm_fast.models.configuration import FUSION_KINDS, MMLMConfig, width_of
from mmlm_fast.models.fusion import MMLMProjector
from mmlm_fast.models.tokenization import tower_tokenizer
from mmlm_fast.models.towers import freeze_poolers, make_tower, tokens_of, with_lone_values
from mmlm_fast.nn import ClipLoss, DecisionFusion, FuseModalities, GatedCrossAttentionLayer, SiglipLoss

TOWERS = {
    "text": ("text_tower", "language_model"),
    "image": ("vision_tower",),
    "audio": ("audio_tower",),
    "decoder": ("decoder",),
}
CONFIG_OF = {"text": "text_config", "image": "vision_config", "audio": "audio_config", "decoder": "decoder_config"}
VALUES = {"image": "pixel_values", "audio": "input_features"}
ITEM_DIMS = {"image": 3, "audio": 2}


class MMLMPreTrainedModel(PreTrainedModel):
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
        """The towers that `config.frozen` names."""
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
        told_too = kwargs.pop("output_loading_info", False)
        model, told = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        parts = {part for key in told["missing_keys"] for part in key.split(".")}
        lost = sorted(parts & {*TOWERS["text"], *TOWERS["decoder"]})
        if lost:
            raise ValueError(
                f"{pretrained_model_name_or_path} was saved by {', '.join(model.config.architectures or ['another'])}, "
                f"got {cls.__name__}, of whose {' and '.join(lost)} it has no weights"
            )
        return (model, told) if told_too else model

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
        """A model whose towers come from checkpoints; what joins them starts at random.

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
    """The tower of a modality in a checkpoint, and the configuration that makes it again."""
    config: Any = AutoConfig.from_pretrained(source)
    config = getattr(config, CONFIG_OF[name], None) or config  # CLIP's towers
    tower, told = AutoModel.from_pretrained(source, config=config, output_loading_info=True)
    missing = sorted(k for k in told["missing_keys"] if "pooler" not in k)
    if missing:
        raise ValueError(f"{source} lacks weights of the {name} tower: {', '.join(missing[:5])}")
    return with_lone_values(tower.get_encoder() if config.is_encoder_decoder else tower), config


def make_projector(config: MMLMConfig, width: int) -> nn.Module:
    """From a tower's width to that in which modalities meet."""
    assert config.hidden_size is not None
    if config.projector_layers == 2:
        return MMLMProjector(width, config.hidden_size, config.projector_hidden_act)
    if config.projector_layers == 1:
        return nn.Linear(width, config.hidden_size)
    if width != config.hidden_size:
        raise ValueError(f"projector_layers=0 needs towers of width {config.hidden_size}, got one of {width}")
    return nn.Identity()


def add_towers(module: nn.Module, config: MMLMConfig) -> None:
    """Give `module` the towers of pictures and sound and their projectors, by the names LLaVA uses."""
    for modality, tower, projector in (
        ("image", "vision_tower", "multi_modal_projector"),
        ("audio", "audio_tower", "audio_projector"),
    ):
        if modality in (config.modalities or ()):
            tower_config: Any = getattr(config, CONFIG_OF[modality])
            setattr(module, tower, make_tower(tower_config))
            setattr(module, projector, make_projector(config, width_of(tower_config)))


def encode_items(
    tower: nn.Module, projector: nn.Module, values: Tensor, mask: Tensor | None, modality: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Features of pictures or clips, one or several a sample.

    Args:
        values: ``[B, *item]`` or ``[B, F, *item]``: F frames, pictures or chunks of sound.
        mask: Bool ``[B]`` or ``[B, F]``, False for fillers; None: all are there.

    Returns:
        The tower's tokens ``[B·F, n, width]``, the projected ones ``[B, F·n, H]``, and which are there,
        bool ``[B, F·n]``.
    """
    name, dims = VALUES[modality], ITEM_DIMS[modality]
    if values.dim() not in (dims + 1, dims + 2):
        raise ValueError(f"{name} must have {dims + 1} or {dims + 2} dimensions, got {tuple(values.shape)}")
    leading = values.shape[: values.dim() - dims]
    mask = as_mask(mask, leading, values.device, modality)
    states = tokens_of(tower, values.flatten(0, 1) if len(leading) == 2 else values)
    features = projector(states)
    there = mask.reshape(-1, 1).expand(-1, features.shape[1]).reshape(leading[0], -1)
    return states, features.reshape(leading[0], -1, features.shape[-1]), there


def as_mask(mask: Tensor | None, shape: Iterable[int], device: torch.device, modality: str) -> Tensor:
    shape = tuple(shape)
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    if mask.shape != shape or mask.dtype != torch.bool:
        raise ValueError(f"{modality}_mask must be bool of shape {shape}, got {mask.dtype} {tuple(mask.shape)}")
    return mask


def masked_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that are there: ``[B, N, H]`` and bool ``[B, N]`` to ``[B, H]``; zeros for none."""
    weight = mask.to(tokens.dtype) / mask.sum(1, keepdim=True).clamp(min=1).to(tokens.dtype)
    return (weight[:, None] @ torch.where(mask[..., None], tokens, 0))[:, 0]


def last_token(states: Tensor, mask: Tensor | None) -> Tensor:
    """State of the last token that is there: ``[B, N, H]`` to ``[B, H]``."""
    if mask is None:
        return states[:, -1]
    positions = torch.arange(states.shape[1], device=states.device)
    last = torch.where(mask.bool(), positions, -1).amax(1).clamp(min=0)
    return states[torch.arange(states.shape[0], device=states.device), last]


def join_tokens(parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Tokens ``[B, N, H]`` of several modalities end to end; what is missing goes behind what is there.

    Returns:
        ``[B, ΣN, H]``, zeros where nothing is, and bool ``[B, ΣN]``, True in front.
    """
    parts = list(parts)
    tokens = torch.cat([torch.where(mask[..., None], x, 0) for x, mask in parts], 1)
    mask = torch.cat([mask for _, mask in parts], 1)
    order = mask.int().argsort(dim=1, descending=True, stable=True)
    return tokens.gather(1, order[..., None].expand_as(tokens)), mask.gather(1, order)
