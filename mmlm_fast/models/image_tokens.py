"""Pictures as discrete tokens, and pictures from text: a small VQ-VAE, and a decoder that writes its codes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.utils import can_return_tuple

DECAY = 0.95  # of the moving averages that are the codebook
DEAD = 0.05  # a code used less often than this a step starts anew


class MMLMImageTokenizerConfig(PretrainedConfig):
    """Configuration of `MMLMImageTokenizer`.

    Args:
        image_size: Pixels of a side; a multiple of ``2 ** num_stages``.
        num_channels: Of pictures.
        num_stages: Halvings: a picture is ``(image_size / 2 ** num_stages) ** 2`` tokens.
        hidden_size: Channels inside.
        codebook_size, code_dim: Number and width of the codes.
        commitment_weight: Of the distance between what is encoded and its code, in the loss.
    """

    model_type = "mmlm_image_tokenizer"

    image_size: int = 16
    num_channels: int = 3
    num_stages: int = 2
    hidden_size: int = 64
    codebook_size: int = 64
    code_dim: int = 16
    commitment_weight: float = 0.25

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_stages < 1 or self.image_size % 2**self.num_stages or self.codebook_size < 2:
            raise ValueError(
                f"image_size must be a multiple of 2 ** num_stages, num_stages at least 1 and codebook_size 2, "
                f"got {self.image_size}, {self.num_stages} and {self.codebook_size}"
            )
        super().__post_init__(**kwargs)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of a picture."""
        return (self.image_size // 2**self.num_stages) ** 2


@dataclass
class MMLMImageTokenizerOutput(ModelOutput):
    """`loss` is `reconstruction_loss` plus the weighted commitment; `codes` are ``[N, tokens]``."""

    loss: Tensor | None = None
    reconstruction_loss: Tensor | None = None
    reconstruction: Tensor | None = None
    codes: Tensor | None = None


class MMLMImageTokenizer(PreTrainedModel):
    """VQ-VAE (van den Oord et al. 2017) whose codebook follows moving averages; codes out of use start anew from what
    is encoded (Razavi et al. 2019, appendix; Dhariwal et al. 2020).

    transformers' own (Janus, Chameleon, Emu3) are frozen parts of larger models and pass no gradient to their encoders.
    """

    config_class = MMLMImageTokenizerConfig
    main_input_name = "pixel_values"
    base_model_prefix = "model"
    accepts_loss_kwargs = False

    def __init__(self, config: MMLMImageTokenizerConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        down: list[nn.Module] = [nn.Conv2d(config.num_channels, width, 3, padding=1)]
        up: list[nn.Module] = [nn.Conv2d(config.code_dim, width, 3, padding=1)]
        for _ in range(config.num_stages):
            down += [nn.ReLU(), nn.Conv2d(width, width, 4, stride=2, padding=1)]
            up += [nn.ReLU(), nn.ConvTranspose2d(width, width, 4, stride=2, padding=1)]
        self.encoder = nn.Sequential(*down, nn.ReLU(), nn.Conv2d(width, config.code_dim, 1))
        self.decoder = nn.Sequential(*up, nn.ReLU(), nn.Conv2d(width, config.num_channels, 3, padding=1))
        self.codebook: Tensor
        self.counts: Tensor
        self.sums: Tensor
        self.register_buffer("codebook", torch.zeros(config.codebook_size, config.code_dim))
        self.register_buffer("counts", torch.zeros(config.codebook_size))
        self.register_buffer("sums", torch.zeros(config.codebook_size, config.code_dim))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.reset_parameters()

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Make codes ``[N, tokens]``, row by row, int64, of pictures ``[N, C, size, size]``."""
        return self._nearest(self._features(pixel_values))

    def decode(self, codes: Tensor) -> Tensor:
        """Make pictures ``[N, C, size, size]`` of codes ``[N, tokens]``.

        Raises:
            ValueError: for another number of codes a picture.
        """
        if codes.dim() != 2 or codes.shape[1] != self.config.num_tokens:
            raise ValueError(f"codes must be [N, {self.config.num_tokens}], got {tuple(codes.shape)}")
        return self._paint(F.embedding(codes, self.codebook))

    @can_return_tuple
    def forward(self, pixel_values: Tensor, return_loss: bool = True, **kwargs: Any) -> MMLMImageTokenizerOutput:
        """Reconstruct pictures, with the loss; in training mode the codebook moves. `return_loss` tells Trainer of the
        loss."""
        features = self._features(pixel_values)
        if self.training:
            self._learn(features.detach().flatten(0, 1).float())
        codes = self._nearest(features)
        quantized = F.embedding(codes, self.codebook).to(features.dtype)
        painted = self._paint(features + (quantized - features).detach())
        error = F.mse_loss(painted.float(), pixel_values.float())
        commitment = F.mse_loss(features.float(), quantized.detach().float())
        return MMLMImageTokenizerOutput(
            loss=error + self.config.commitment_weight * commitment,
            reconstruction_loss=error,
            reconstruction=painted,
            codes=codes,
        )

    def _features(self, pixel_values: Tensor) -> Tensor:
        size, channels = self.config.image_size, self.config.num_channels
        if pixel_values.shape[1:] != (channels, size, size):
            raise ValueError(f"pixel_values must be [N, {channels}, {size}, {size}], got {tuple(pixel_values.shape)}")
        return self.encoder(pixel_values).flatten(2).mT

    def _paint(self, features: Tensor) -> Tensor:
        side = self.config.image_size // 2**self.config.num_stages
        return self.decoder(features.mT.unflatten(2, (side, side)))

    def _nearest(self, features: Tensor) -> Tensor:
        book = self.codebook.to(features.dtype)
        return (book.square().sum(1) - 2 * features @ book.mT).argmin(-1)

    @torch.no_grad()
    def _learn(self, features: Tensor) -> None:
        """Take one step of the moving averages; `features` are ``[M, code_dim]``."""
        drawn = features[torch.randint(len(features), (len(self.codebook),), device=features.device)]
        fresh = (self.counts == 0).all()  # the first step: codes are what is encoded
        self.codebook.copy_(torch.where(fresh, drawn, self.codebook))
        chosen = F.one_hot(self._nearest(features), len(self.codebook)).to(features.dtype)
        keep = torch.where(fresh, 0.0, DECAY)
        self.counts.copy_(keep * self.counts + (1 - keep) * chosen.sum(0))
        self.sums.copy_(keep * self.sums + (1 - keep) * (chosen.mT @ features))
        dead = self.counts < DEAD
        self.codebook.copy_(torch.where(dead[:, None], drawn, self.sums / self.counts.clamp(min=DEAD)[:, None]))
        self.counts.masked_fill_(dead, 1.0)
        self.sums.copy_(torch.where(dead[:, None], drawn, self.sums))


def codes_as_text(codes: Tensor) -> list[str]:
    """Write codes ``[N, tokens]`` as the tokens that ``byte_tokenizer(codebook_size=…)`` has for them."""
    return ["".join(f"<i{code}>" for code in row) for row in codes.tolist()]


@torch.no_grad()
def generate_images(
    model: Any, image_tokenizer: MMLMImageTokenizer, processor: Any, texts: Sequence[str], **options: Any
) -> Tensor:
    """Generate pictures ``[N, C, size, size]`` from texts.

    Args:
        model: `MMLMForConditionalGeneration` of the preset ``image_tokens``, trained on texts followed by
            `codes_as_text`.
        texts: As in training.
        options: For ``generate``, such as ``do_sample`` and ``temperature``.

    Raises:
        ValueError: if the processor's tokenizer lacks the codes.
    """
    config = image_tokenizer.config
    tokenizer = processor.tokenizer
    first = tokenizer.convert_tokens_to_ids("<i0>")
    last = tokenizer.convert_tokens_to_ids(f"<i{config.codebook_size - 1}>")
    if None in (first, last) or last - first != config.codebook_size - 1 or first == tokenizer.unk_token_id:
        raise ValueError(f"the tokenizer must have <i0> to <i{config.codebook_size - 1}>")
    allowed = list(range(first, last + 1))
    batch = processor(text=list(texts)).to(model.device)
    length = batch["input_ids"].shape[1]
    tokens = model.generate(
        **batch,
        **({"do_sample": False} | options),
        min_new_tokens=config.num_tokens,
        max_new_tokens=config.num_tokens,
        prefix_allowed_tokens_fn=lambda row, ids: allowed,
    )
    return image_tokenizer.decode(tokens[:, length:] - first)
