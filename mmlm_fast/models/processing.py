"""Text, pictures and sound to model inputs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin


class MMLMProcessor(ProcessorMixin):
    """Tokenizer, image processor and audio feature extractor in one call.

    Args:
        image_processor, feature_extractor, tokenizer: Of transformers, or drop-ins. The tokenizer must know the two
            placeholder tokens.
        image_seq_length, audio_seq_length: Tokens a picture or a clip becomes, the length of its tower's output; the
            placeholder is repeated that often. 0 for every fusion but ``merge``: placeholders are then left out, and a
            sample has at most one picture and one clip.
        image_token, audio_token: The placeholders.
    """

    def __init__(
        self,
        image_processor: Any = None,
        feature_extractor: Any = None,
        tokenizer: Any = None,
        image_seq_length: int = 0,
        audio_seq_length: int = 0,
        image_token: str = "<image>",
        audio_token: str = "<audio>",
        chat_template: str | None = None,
    ) -> None:
        self.image_seq_length, self.audio_seq_length = image_seq_length, audio_seq_length
        self.image_token, self.audio_token = image_token, audio_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.audio_token_id = tokenizer.convert_tokens_to_ids(audio_token)
        super().__init__(image_processor, feature_extractor, tokenizer, chat_template=chat_template)

    def __call__(  # type: ignore[override]
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        audio: Any = None,
        *,
        sampling_rate: int | None = None,
        padding: bool | str = True,
        return_tensors: str = "pt",
        **tokenizer_kwargs: Any,
    ) -> BatchFeature:
        """Prepare a batch.

        Args:
            images: Picture or list of pictures, in the order of their placeholders; or one entry a text, None where
                a text has none.
            text: One text or a list, with ``<image>`` and ``<audio>`` where features go (``merge``).
            audio: Clip or list of clips (1-D float arrays), likewise.
            sampling_rate: Of the clips, in hertz. Required with audio.
            padding, tokenizer_kwargs: For the tokenizer.
            return_tensors: Only ``"pt"``.

        Returns:
            ``input_ids``, ``attention_mask``, and as given ``pixel_values``, ``input_features``; where entries are
            None and the fusion is not ``merge``, also ``image_mask`` or ``audio_mask``.

        Raises:
            ValueError: for placeholders that do not match what is given, or a missing or wrong sampling rate.
        """
        if text is None:
            raise ValueError("text is required, got None")
        if return_tensors != "pt":
            raise ValueError(f"return_tensors must be 'pt', got {return_tensors!r}")
        texts = [text] if isinstance(text, str) else list(text)
        data: dict[str, Any] = {}
        if images is not None:
            items = list(images) if isinstance(images, (list, tuple)) else [images]
            kept = self._keep(items, texts, "image", self.image_token, self.image_seq_length)
            encode = lambda batch: self.image_processor(batch, return_tensors="pt")["pixel_values"]
            data |= _encode(kept, encode, "pixel_values", "image_mask", bool(self.image_seq_length))
        if audio is not None:
            if sampling_rate is None:
                raise ValueError("audio needs its sampling_rate in hertz, got None")
            one = isinstance(audio, (np.ndarray, torch.Tensor)) and audio.ndim == 1
            items = [audio] if one else list(audio)
            kept = self._keep(items, texts, "audio", self.audio_token, self.audio_seq_length)
            encode = lambda batch: self.feature_extractor(batch, sampling_rate=sampling_rate, return_tensors="pt")[
                "input_features"
            ]
            data |= _encode(kept, encode, "input_features", "audio_mask", bool(self.audio_seq_length))
        for modality, given in (("image", images), ("audio", audio)):
            token = getattr(self, f"{modality}_token")
            length = getattr(self, f"{modality}_seq_length")
            if given is None and length and any(token in t for t in texts):
                raise ValueError(f"text has {token} but no {modality} was given")
            texts = [t.replace(token, token * length) for t in texts]
        data |= self.tokenizer(texts, padding=padding, return_tensors="pt", **tokenizer_kwargs)
        return BatchFeature(data)

    def _keep(self, items: list, texts: list[str], modality: str, token: str, seq_length: int) -> list:
        """Check items against the texts; for `merge` drop what is None."""
        if seq_length == 0:
            if len(items) != len(texts):
                raise ValueError(
                    f"one {modality} entry a text (None for none): got {len(items)} for {len(texts)} texts"
                )
            return items
        counts = [t.count(token) for t in texts]
        if any(item is None for item in items):
            if len(items) != len(texts):
                raise ValueError(f"with None among the {modality} entries, give one a text: got {len(items)}")
            wrong = [i for i, item in enumerate(items) if counts[i] != (item is not None)]
            if wrong:
                raise ValueError(
                    f"text {wrong[0]} has {counts[wrong[0]]} {token} for {modality} entry {items[wrong[0]]!r}"
                )
            items = [item for item in items if item is not None]
        if sum(counts) != len(items):
            raise ValueError(f"texts have {sum(counts)} {token} in all, but {len(items)} {modality} entries were given")
        return items


def _encode(items: list, encode: Any, name: str, mask_name: str, merge: bool) -> dict[str, Any]:
    there = [item for item in items if item is not None]
    if not there:
        return {}
    values = encode(there)
    if merge or len(there) == len(items):
        return {name: values}
    mask = torch.tensor([item is not None for item in items])
    filled = values.new_zeros(len(items), *values.shape[1:])
    filled[mask] = values
    return {name: filled, mask_name: mask}
