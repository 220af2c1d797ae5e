"""Small towers that transformers lacks, registered with its Auto classes, and how any tower is made and read."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPast

from mmlm_fast.masks import IntervalMask
from mmlm_fast.models.turns import CACHE, takes_cache
from mmlm_fast.nn.fusion import linear_of_parts
from mmlm_fast.ops import interval_attention


class MMLMLSTMConfig(PretrainedConfig):
    """Configuration of `MMLMLSTMModel`.

    Args:
        vocab_size: 0 for a model that takes no ``input_ids``.
        embedding_size: Of its tokens; `hidden_size` by default.
        num_hidden_layers: 0 for the token embeddings alone.
        add_cross_attention: Whether it attends to an encoder.
    """

    model_type = "mmlm_lstm"

    vocab_size: int = 10000
    embedding_size: int | None = None
    hidden_size: int = 256
    num_hidden_layers: int = 1
    dropout: float = 0.0
    add_cross_attention: bool = False
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None


class MMLMConvImageConfig(PretrainedConfig):
    """Configuration of `MMLMConvImageModel`."""

    model_type = "mmlm_conv_image"

    image_size: int = 224
    num_channels: int = 3
    hidden_sizes: list[int] | None = None
    hidden_size: int = 128

    def __post_init__(self, **kwargs: Any) -> None:
        self.hidden_sizes = list(self.hidden_sizes or [64])
        if self.image_size % 2 ** len(self.hidden_sizes):
            raise ValueError(
                f"image_size must be a multiple of {2 ** len(self.hidden_sizes)} for {len(self.hidden_sizes)} pools, "
                f"got {self.image_size}"
            )
        super().__post_init__(**kwargs)


class MMLMConvAudioConfig(PretrainedConfig):
    """Configuration of `MMLMConvAudioModel`. `hidden_sizes`: of its convolutions, possibly none; `recurrent`: end with
    an LSTM."""

    model_type = "mmlm_conv_audio"

    num_mel_bins: int = 80
    hidden_sizes: list[int] | None = None
    hidden_size: int = 128
    recurrent: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.hidden_sizes = [64] if self.hidden_sizes is None else list(self.hidden_sizes)
        super().__post_init__(**kwargs)


class MMLMMeanConfig(PretrainedConfig):
    """Configuration of `MMLMMeanModel`. `hidden_size`: channels of a picture, features of a spectrogram."""

    model_type = "mmlm_mean"

    hidden_size: int = 3


class _Tower(PreTrainedModel):
    base_model_prefix = "model"
    _no_split_modules: list[str] = []

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.LSTM, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding, nn.GroupNorm, nn.LayerNorm)):
            module.reset_parameters()  # torch's own start, which small networks learn from
        else:
            super()._init_weights(module)


class MMLMLSTMModel(_Tower):
    """Token embedding and LSTM: a text encoder, a decoder (with a cache: its state), an encoder of any sequence.

    Padding, wherever it is, changes no state. With `add_cross_attention` the states attend to an encoder's by dot
    products (Luong et al. 2015).
    """

    config_class = MMLMLSTMConfig

    def __init__(self, config: MMLMLSTMConfig) -> None:
        super().__init__(config)
        size = config.embedding_size or config.hidden_size
        if config.num_hidden_layers == 0 and size != config.hidden_size:
            raise ValueError(f"without layers embedding_size must be hidden_size, {config.hidden_size}, got {size}")
        self.embed_tokens = nn.Embedding(config.vocab_size, size) if config.vocab_size else None
        widths = [size, *[config.hidden_size] * (config.num_hidden_layers - 1)][: config.num_hidden_layers]
        self.layers = nn.ModuleList(nn.LSTM(width, config.hidden_size, batch_first=True) for width in widths)
        self.dropout = nn.Dropout(config.dropout)
        if config.add_cross_attention:
            self.attention = nn.Linear(2 * config.hidden_size, config.hidden_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding | None:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    @takes_cache
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Compute states ``[B, T, H]`` of ``input_ids [B, T]`` or of ``inputs_embeds``; `kwargs` of transformers are
        ignored.

        Args:
            attention_mask: ``[B, past + T]``, 0 for padding.
            past_key_values: A cache of transformers; it holds the states as if they were keys and values.
            encoder_hidden_states: ``[B, N, H]``, with ``encoder_attention_mask [B, N]``.
        """
        if inputs_embeds is None:
            if self.embed_tokens is None or input_ids is None:
                raise ValueError(
                    "pass inputs_embeds: this LSTM has no vocabulary"
                    if self.embed_tokens is None
                    else "pass input_ids or inputs_embeds, got neither"
                )
            inputs_embeds = self.embed_tokens(input_ids)
        states, length = self.dropout(inputs_embeds), inputs_embeds.shape[1]
        mask = None if attention_mask is None or attention_mask.dim() != 2 else attention_mask[:, -length:].bool()
        cache = getattr(past_key_values, "self_attention_cache", past_key_values)
        order = None
        if mask is not None and length > 1:  # real tokens first, in order
            order = mask.int().argsort(dim=1, descending=True, stable=True)
            states = _rows(states, order)
        for i, layer in enumerate(self.layers):
            states = self._run(
                layer,
                states,
                mask if length > 1 else None,
                cache,
                i,
            )
        if order is not None:
            states = torch.where(mask[..., None], _rows(states, order.argsort(1)), 0)  # type: ignore[index]
        if encoder_hidden_states is not None:
            attended = _attend(states, encoder_hidden_states, encoder_attention_mask)
            states = torch.tanh(linear_of_parts(self.attention, states, attended))
        return BaseModelOutputWithPast(last_hidden_state=self.dropout(states), **{CACHE: past_key_values})

    def _run(self, layer: Any, x: Tensor, mask: Tensor | None, cache: Any, index: int) -> Tensor:
        if cache is None:
            return layer(x)[0]
        state = _last_state(cache, index)
        if mask is None:
            out, (_, cell) = layer(x, state)
        else:  # the cell's state at the end is of each row's own last token: lengths have to be known
            lengths = mask.sum(1)
            packed = nn.utils.rnn.pack_padded_sequence(
                x, lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False
            )
            out, (hidden, cell) = layer(packed, state)
            out, _ = nn.utils.rnn.pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])
            empty = (lengths == 0)[None, :, None]
            if state is not None:
                cell = torch.where(empty, state[1], cell)
                hidden = torch.where(empty, state[0], hidden)
            else:
                cell, hidden = cell.masked_fill(empty, 0), hidden.masked_fill(empty, 0)
            cell_steps = torch.zeros_like(out)
            cell_steps[:, -1] = cell[0]
            kept = torch.cat([out[:, :-1], hidden.transpose(0, 1)], 1)
            _cache_states(cache, index, kept, cell_steps)
            return out
        cell_steps = torch.zeros_like(out)
        cell_steps[:, -1] = cell[0]
        _cache_states(cache, index, out, cell_steps)
        return out


def _cache_states(cache: Any, index: int, hidden: Tensor, cell: Tensor) -> None:
    before = cache.get_seq_length(index)
    cache.update(hidden[:, None], cell[:, None], index)
    if isinstance(before, int) and not torch.compiler.is_compiling():  # a static cache is not cropped
        layer = cache.layers[index]
        layer.ends = {end for end in getattr(layer, "ends", ()) if end <= before} | {before + hidden.shape[1]}


def _last_state(cache: Any, index: int) -> tuple[Tensor, Tensor] | None:
    """Return the state after the last token, which is the last of what a layer caches."""
    length = cache.get_seq_length(index)
    if isinstance(length, int) and length == 0:
        return None
    layer = cache.layers[index]
    if not layer.is_initialized:
        return None
    if isinstance(length, int) and not torch.compiler.is_compiling() and length not in getattr(layer, "ends", {length}):
        raise ValueError(
            f"an LSTM goes on from the ends of its calls only, whose cells are cached, got a cache cropped to {length} "
            f"tokens, which is none of {sorted(layer.ends)}: assisted generation is not for it"
        )
    last = torch.as_tensor(length, device=layer.keys.device).reshape(1) - 1
    states = tuple(
        x.index_select(2, last.clamp(min=0))[:, 0].transpose(0, 1).contiguous() for x in (layer.keys, layer.values)
    )
    return states  # type: ignore[return-value]


def _rows(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(1, order[..., None].expand_as(x))


def _attend(states: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
    intervals = None
    if mask is not None:  # `join_tokens` puts what is there first
        hi = mask.sum(1, dtype=torch.int32)[:, None].expand(-1, states.shape[1])
        intervals = IntervalMask(torch.zeros_like(hi), hi)
    out = interval_attention(states[:, None], context[:, None], context[:, None], intervals)
    assert isinstance(out, Tensor)
    return out[:, 0]


class MMLMConvImageModel(_Tower):
    """Stages of 3×3 convolution, ReLU and 2×2 max-pooling, then a linear layer over everything: one state a picture."""

    config_class = MMLMConvImageConfig
    main_input_name = "pixel_values"

    def __init__(self, config: MMLMConvImageConfig) -> None:
        super().__init__(config)
        stages: list[nn.Module] = []
        width = config.num_channels
        for out in config.hidden_sizes or ():
            stages += [nn.Conv2d(width, out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            width = out
        self.stages = nn.Sequential(*stages)
        side = config.image_size // 2 ** len(config.hidden_sizes or ())
        self.linear = nn.Linear(width * side**2, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        """Compute states ``[N, 1, H]`` of pictures ``[N, C, height, width]``."""
        size, channels = self.config.image_size, self.config.num_channels
        if pixel_values.shape[1:] != (channels, size, size):
            raise ValueError(f"pixel_values must be [N, {channels}, {size}, {size}], got {tuple(pixel_values.shape)}")
        states = self.linear(self.stages(pixel_values).flatten(1))
        return BaseModelOutput(last_hidden_state=self.norm(states)[:, None])


class MMLMConvAudioModel(_Tower):
    """Stages of convolution along time, normalisation, ReLU and max-pooling by 2, then a linear layer or an LSTM: a
    state every few frames."""

    config_class = MMLMConvAudioConfig
    main_input_name = "input_features"

    def __init__(self, config: MMLMConvAudioConfig) -> None:
        super().__init__(config)
        stages: list[nn.Module] = []
        width = config.num_mel_bins
        for out in config.hidden_sizes or ():
            stages += [nn.Conv1d(width, out, 3, padding=1), nn.GroupNorm(1, out), nn.ReLU(), nn.MaxPool1d(2)]
            width = out
        self.stages = nn.Sequential(*stages)
        if config.recurrent:
            self.lstm = nn.LSTM(width, config.hidden_size, batch_first=True)
        else:
            self.linear = nn.Linear(width, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def forward(self, input_features: Tensor, **kwargs: Any) -> BaseModelOutput:
        """Compute states ``[N, frames / 2^stages, H]`` of spectrograms ``[N, mel, frames]``."""
        if input_features.dim() != 3 or input_features.shape[1] != self.config.num_mel_bins:
            raise ValueError(
                f"input_features must be [N, {self.config.num_mel_bins}, frames], got {tuple(input_features.shape)}"
            )
        states = self.stages(input_features).mT
        states = self.lstm(states)[0] if self.config.recurrent else self.linear(states)
        return BaseModelOutput(last_hidden_state=self.norm(states))


class MMLMMeanModel(_Tower):
    """Mean over all but channels: of a picture over height and width, of a spectrogram over time."""

    config_class = MMLMMeanConfig
    main_input_name = "pixel_values"

    def __init__(self, config: MMLMMeanConfig) -> None:
        super().__init__(config)
        self.post_init()

    def forward(self, values: Tensor, **kwargs: Any) -> BaseModelOutput:
        """Compute the means, ``[N, 1, C]``, of values ``[N, C, …]``."""
        if values.dim() < 2 or values.shape[1] != self.config.hidden_size:
            raise ValueError(f"values must be [N, {self.config.hidden_size}, …], got {tuple(values.shape)}")
        return BaseModelOutput(last_hidden_state=values.flatten(2).mean(-1)[:, None])


for _config, _model in (
    (MMLMLSTMConfig, MMLMLSTMModel),
    (MMLMConvImageConfig, MMLMConvImageModel),
    (MMLMConvAudioConfig, MMLMConvAudioModel),
    (MMLMMeanConfig, MMLMMeanModel),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)


def make_tower(config: PretrainedConfig) -> nn.Module:
    """Make the model of a configuration; of an encoder–decoder (Whisper, T5, BART), its encoder.

    Its batch normalisations use their running statistics where a batch in training has one value a channel, of which
    there is no variance: the last stage of a ResNet sees that of the only picture of a batch.
    """
    tower = AutoModel.from_config(config)
    return with_lone_values(tower.get_encoder() if getattr(config, "is_encoder_decoder", False) else tower)


def with_lone_values(tower: nn.Module) -> nn.Module:
    """Make a tower's batch normalisations take one value a channel in training; see `make_tower`."""
    for module in tower.modules():
        if type(module) in _LONE_VALUES:
            module.__class__ = _LONE_VALUES[type(module)]
    return tower


class _LoneValues:
    def forward(self: Any, input: Tensor) -> Tensor:
        if self.training and input.numel() == self.num_features and self.running_mean is not None:
            return nn.functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        return super().forward(input)  # type: ignore[misc]


class _BatchNorm1d(_LoneValues, nn.BatchNorm1d):
    pass


class _BatchNorm2d(_LoneValues, nn.BatchNorm2d):
    pass


_LONE_VALUES: dict[type[nn.Module], type[nn.Module]] = {nn.BatchNorm1d: _BatchNorm1d, nn.BatchNorm2d: _BatchNorm2d}


def freeze_poolers(tower: nn.Module) -> None:
    """Keep what makes one vector of a tower's states, which nothing here reads, out of training: DDP refuses parameters
    without gradients."""
    for name in ("pooler", "head"):
        if isinstance(getattr(tower, name, None), nn.Module):
            getattr(tower, name).requires_grad_(False)


def tokens_of(tower: nn.Module, *args: Tensor, **kwargs: Any) -> Tensor:
    """Return the states a tower makes, ``[N, tokens, H]``; maps ``[N, H, height, width]`` become tokens row by row."""
    states = tower(*args, return_dict=True, **kwargs).last_hidden_state
    return states.flatten(2).mT if states.dim() == 4 else states
