"""Text, pictures and sound to model inputs."""

import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoFeatureExtractor, AutoImageProcessor, BatchFeature, ProcessorMixin

from mmlm_fast.models.tokenization import image_processor, tower_tokenizer

HAS_BACKENDS = find_spec("transformers.image_processing_backends") is not None  # else they are called slow and fast


class MMLMProcessor(ProcessorMixin):
    """Tokenizer, image processor and audio feature extractor in one call.

    Args:
        image_processor, feature_extractor, tokenizer: Of transformers, or drop-ins. In the place of transformers'
            feature extractors come mmlm-fast's of the same name, where there are some. The tokenizer must know the two
            placeholder tokens.
        image_seq_length, audio_seq_length: Tokens a picture or a chunk of sound becomes, the length of its tower's
            output; the placeholder is repeated that often. 0 for every fusion but ``merge``: placeholders are then
            left out.
        image_token, audio_token: The placeholders.
        chunk_seconds: A longer clip becomes several chunks of that length, the last filled with silence; None: the
            feature extractor's ``chunk_length`` where it has one, else no chunks.
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
        chunk_seconds: float | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.image_seq_length, self.audio_seq_length = image_seq_length, audio_seq_length
        self.image_token, self.audio_token = image_token, audio_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.audio_token_id = tokenizer.convert_tokens_to_ids(audio_token)
        self.chunk_seconds = chunk_seconds
        super().__init__(image_processor, _feature_extractor(feature_extractor), tokenizer, chat_template=chat_template)

    def to_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return what is saved; also which library resizes pictures, which transformers does not keep."""
        return super().to_dict(*args, **kwargs) | {"image_backend": _backend_of(self.image_processor)}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> "MMLMProcessor":
        """Load what `save_pretrained` saved, with the image processor of the library that was saved.

        transformers takes torchvision's wherever that is installed; its resizing differs from Pillow's by a step here
        and there, so a model would see other pictures than it was trained on.
        """
        processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        saved, _ = cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)
        wanted = kwargs.get("backend") or saved.get("image_backend", "pil")
        if _backend_of(processor.image_processor) not in (None, wanted):
            how = {"backend": wanted} if HAS_BACKENDS else {"use_fast": wanted == "torchvision"}
            again = AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, **(kwargs | how))
            processor.image_processor = again
            if _backend_of(again) != wanted:
                warnings.warn(
                    f"saved with pictures resized by {wanted}, which is not to be had here: pixels may differ slightly",
                    stacklevel=2,
                )
        return processor

    @classmethod
    def from_towers(
        cls,
        model: Any,
        *,
        text: str | None = None,
        image: str | None = None,
        audio: str | None = None,
        decoder: str | None = None,
        like: "MMLMProcessor | None" = None,
    ) -> "MMLMProcessor":
        """Make the processor of a model that `from_towers` made, with the same checkpoints.

        Args:
            text, image, audio, decoder: As they were given to the model's `from_towers`.
            like: Of which the parts are taken that are of no checkpoint.

        Raises:
            ValueError: if there is no tokenizer, or a tower without its processor.
        """
        from mmlm_fast.audio import WhisperFeatureExtractor

        source = decoder or text
        if source is None and like is None:
            raise ValueError("a processor needs a tokenizer: name text or decoder, or a processor as like, got none")
        writes = hasattr(model, "generate") and not model.config.is_encoder_decoder
        places_tokens = model.config.fusion_kind.places_tokens
        if source is not None:
            tokenizer = tower_tokenizer(source, "left" if writes else "right", places_tokens)
        else:
            assert like is not None
            tokenizer = like.tokenizer
        seeing, hearing = (None, None) if like is None else (like.image_processor, like.feature_extractor)
        if image is not None:
            seeing = AutoImageProcessor.from_pretrained(image)
        if audio is not None:
            hearing = AutoFeatureExtractor.from_pretrained(audio)
        for modality, part in (("image", seeing), ("audio", hearing)):
            if part is None and modality in (model.config.modalities or ()):
                raise ValueError(f"the model has a tower for {modality}: name its checkpoint, or a processor as like")
        if seeing is None:  # for no tower, but transformers' processors have all their parts
            seeing = image_processor(224)
        if hearing is None:
            hearing = WhisperFeatureExtractor()
        processor = cls(image_processor=seeing, feature_extractor=hearing, tokenizer=tokenizer)
        if like is not None:
            processor.chat_template, processor.chunk_seconds = like.chat_template, like.chunk_seconds
        if places_tokens:
            for name in ("image_token_id", "audio_token_id"):
                wanted, got = getattr(model.config, name), getattr(processor, name)
                if wanted not in (None, got):
                    raise ValueError(f"{name} of the tokenizer must be the model's, {wanted}, got {got}")
            processor.image_seq_length, processor.audio_seq_length = _tokens_per_item(model, processor)
        return processor

    def __call__(  # type: ignore[override]
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        audio: Any = None,
        *,
        sampling_rate: int | None = None,
        suffix: str | Sequence[str] | None = None,
        text_target: str | Sequence[str] | None = None,
        return_labels: bool = False,
        padding: bool | str = True,
        return_tensors: str = "pt",
        **tokenizer_kwargs: Any,
    ) -> BatchFeature:
        """Prepare a batch.

        Args:
            images: Picture or list of pictures, in the order of their placeholders; or one entry a text: a picture, a
                list of pictures or frames of a video, or None. For a list a text has one placeholder, which stands for
                all of them, or one each.
            text: One text or a list, with ``<image>`` and ``<audio>`` where features go (``merge``). None for pictures
                or sound alone, but for ``merge``.
            audio: Clip or list of clips (1-D float arrays), likewise; a list is of several clips.
            sampling_rate: Of the clips, in hertz. Required with audio.
            suffix: What a causal decoder is to write behind each text: it goes behind it in ``input_ids``, with the end
                token, and ``labels`` are of it alone.
            text_target: What the decoder of a sequence-to-sequence model is to write: ``labels`` are of it. The
                tokenizer then pads on the right.
            return_labels: ``labels`` of the texts themselves: ``input_ids`` but for padding and placeholders.
            padding, tokenizer_kwargs: For the tokenizer. Truncation cuts texts that nothing follows, but neither
                placeholders nor what is to be learnt.
            return_tensors: Only ``"pt"``.

        Returns:
            ``input_ids``, ``attention_mask``, and as given ``pixel_values``, ``input_features``; for every fusion but
            ``merge``, also ``image_mask`` or ``audio_mask`` where entries are None or differ in number. ``labels``
            where asked for, -100 for what is not to be learnt.

        Raises:
            ValueError: for placeholders that do not match what is given, are in ``suffix`` or ``text_target``, or would
                be cut; for what is to be learnt and longer than ``max_length``; for empty clips, texts that are none,
                and a missing or wrong sampling rate.
        """
        if (suffix is not None) + (text_target is not None) + return_labels > 1:
            raise ValueError("labels are of one of suffix, text_target and return_labels, got several")
        if text is None and (
            self.image_seq_length or self.audio_seq_length or (images is None and audio is None) or suffix is not None
        ):
            raise ValueError("text is required, got None")
        if return_tensors != "pt":
            raise ValueError(f"return_tensors must be 'pt', got {return_tensors!r}")
        texts = None if text is None else _texts("text", text)
        if text_target is not None and self.tokenizer.padding_side == "left":
            raise ValueError(
                "text_target is for sequence-to-sequence models, whose tokenizer pads on the right; a causal decoder's "
                "pads on the left and takes suffix"
            )
        targets = self._targets("suffix", suffix) or self._targets("text_target", text_target)
        if targets and texts is not None and len(targets) != len(texts):
            name = "suffix" if suffix is not None else "text_target"
            raise ValueError(f"{name} must be one a text, got {len(targets)} for {len(texts)} texts")
        data: dict[str, Any] = {}
        if images is not None:
            items = list(images) if isinstance(images, (list, tuple)) else [images]
            groups, texts = self._groups([_listed(x) for x in items], texts, "image")
            data |= _encode(groups, self.pixel_values, "pixel_values", "image_mask", bool(self.image_seq_length))
        if audio is not None:
            if sampling_rate is None:
                raise ValueError("audio needs its sampling_rate in hertz, got None")
            items = [audio] if isinstance(audio, (np.ndarray, torch.Tensor)) and audio.ndim == 1 else list(audio)
            chunked = [self._chunks(x, sampling_rate) for x in items]
            encode = lambda batch: self.feature_extractor(batch, sampling_rate=sampling_rate, return_tensors="pt")[
                "input_features"
            ]
            groups, texts = self._groups(chunked, texts, "audio")
            data |= _encode(groups, encode, "input_features", "audio_mask", bool(self.audio_seq_length))
        for modality, given in (("image", images), ("audio", audio)):
            token = getattr(self, f"{modality}_token")
            if given is None and getattr(self, f"{modality}_seq_length") and any(token in t for t in texts or ()):
                raise ValueError(f"text has {token} but no {modality} was given")
            texts = [t.replace(token, token * getattr(self, f"{modality}_seq_length")) for t in texts or ()]
        if suffix is not None:
            if padding not in (True, "longest"):
                raise ValueError(f"padding with suffix must be True or 'longest', got {padding!r}")
            data |= self._with_suffix(texts or [], targets, tokenizer_kwargs)
        elif text is not None:
            data |= self.tokenizer(texts, padding=padding, return_tensors="pt", **tokenizer_kwargs)
            self._check_placeholders(texts or [], data["input_ids"], tokenizer_kwargs)
        if return_labels:
            learnt = data["attention_mask"].bool()
            for token_id in (self.image_token_id, self.audio_token_id):
                learnt &= data["input_ids"] != token_id
            data["labels"] = data["input_ids"].masked_fill(~learnt, -100)
        if text_target is not None:
            _check_cut("text_target", targets, tokenizer_kwargs)
            data["labels"] = _padded(targets, -100, "right", tokenizer_kwargs.get("pad_to_multiple_of"))
        return BatchFeature(data)

    def pixel_values(self, pictures: list) -> Tensor:
        """Make the values of pictures, ``[N, C, height, width]``."""
        # Of a picture 1 or 3 pixels high transformers takes the rows for the channels.
        pil = all(hasattr(picture, "mode") for picture in pictures)
        how = {"input_data_format": "channels_last"} if pil and _backend_of(self.image_processor) == "pil" else {}
        return self.image_processor(pictures, return_tensors="pt", **how)["pixel_values"]

    def _targets(self, name: str, targets: str | Sequence[str] | None) -> list[list[int]]:
        """Tokenize what is to be written, with the end token."""
        if targets is None:
            return []
        if self.tokenizer.eos_token_id is None:
            raise ValueError("targets end with the tokenizer's eos_token, got a tokenizer without one")
        listed = _texts(name, targets)
        for i, target in enumerate(listed):
            for token in (self.image_token, self.audio_token):
                if token in target:
                    raise ValueError(f"{name}[{i}] has {token}, which stands for what goes in and cannot be written")
        ids = self.tokenizer(listed, add_special_tokens=False)["input_ids"]
        return [[*row, self.tokenizer.eos_token_id] for row in ids]

    def _with_suffix(
        self, texts: list[str], targets: list[list[int]], tokenizer_kwargs: dict[str, Any]
    ) -> dict[str, Tensor]:
        others = {k: v for k, v in tokenizer_kwargs.items() if k not in ("truncation", "max_length")}
        multiple = others.pop("pad_to_multiple_of", None)
        prompts = self.tokenizer(texts, **others)["input_ids"]
        pairs, side = list(zip(prompts, targets, strict=True)), self.tokenizer.padding_side
        _check_cut("text with its suffix", [p + t for p, t in pairs], tokenizer_kwargs)
        return {
            "input_ids": _padded([p + t for p, t in pairs], self.tokenizer.pad_token_id, side, multiple),
            "attention_mask": _padded([[1] * len(p + t) for p, t in pairs], 0, side, multiple),
            "labels": _padded([[-100] * len(p) + t for p, t in pairs], -100, side, multiple),
        }

    def _check_placeholders(self, texts: list[str], input_ids: Tensor, tokenizer_kwargs: dict[str, Any]) -> None:
        """Raise where truncation cut placeholders off."""
        for modality in ("image", "audio"):
            token = getattr(self, f"{modality}_token")
            if not getattr(self, f"{modality}_seq_length") or len(input_ids) != len(texts):
                continue
            counts = (input_ids == getattr(self, f"{modality}_token_id")).sum(1).tolist()
            for i, (text, got) in enumerate(zip(texts, counts, strict=True)):
                if got != text.count(token):
                    raise ValueError(
                        f"text[{i}] has {text.count(token)} {token}, of which {got} are left within max_length "
                        f"{tokenizer_kwargs.get('max_length')}: features need all of them"
                    )

    def _chunks(self, entry: Any, sampling_rate: int) -> list | None:
        """Cut a clip, or each of a list of clips, into chunks; None for none."""
        if entry is None:
            return None
        seconds = self.chunk_seconds or getattr(self.feature_extractor, "chunk_length", None)
        chunks = []
        for clip in entry if isinstance(entry, (list, tuple)) and len(entry) and np.ndim(entry[0]) else [entry]:
            clip = np.asarray(clip)
            if clip.ndim != 1:
                raise ValueError(f"audio must be mono, [samples], got shape {clip.shape}")
            if not len(clip):
                raise ValueError("a clip is empty: say None for none")
            length = len(clip) if seconds is None else max(1, round(seconds * sampling_rate))
            chunks += [clip[at : at + length] for at in range(0, len(clip), length)]
        return chunks

    def _groups(
        self, groups: list[list | None], texts: list[str] | None, modality: str
    ) -> tuple[list[list | None], list[str] | None]:
        """Check entries against the texts, and give every item its placeholder in the texts (`merge`)."""
        token, seq_length = getattr(self, f"{modality}_token"), getattr(self, f"{modality}_seq_length")
        if texts is None:
            return groups, texts
        if seq_length == 0:
            if len(groups) != len(texts):
                raise ValueError(
                    f"one {modality} entry a text (None for none): got {len(groups)} for {len(texts)} texts"
                )
            return groups, texts
        counts = [t.count(token) for t in texts]
        by_text = len(groups) == len(texts) and all(
            n == (0 if g is None else len(g)) or (g is not None and n == 1) for n, g in zip(counts, groups, strict=True)
        )
        if by_text:
            spread = []
            for text, count, group in zip(texts, counts, groups, strict=True):
                one_for_all = group is not None and count == 1
                spread.append(text.replace(token, token * len(group)) if one_for_all else text)  # type: ignore[arg-type]
            return groups, spread
        if any(group is None for group in groups):
            if len(groups) != len(texts):
                raise ValueError(f"with None among the {modality} entries, give one a text: got {len(groups)}")
            wrong = next(i for i, g in enumerate(groups) if counts[i] != (0 if g is None else len(g)))
            got = None if groups[wrong] is None else f"with {len(groups[wrong] or ())} items"
            raise ValueError(f"text {wrong} has {counts[wrong]} {token} for {modality} entry {got}")
        if sum(counts) != len(groups):
            raise ValueError(
                f"texts have {sum(counts)} {token} in all, but {len(groups)} {modality} entries were given"
            )
        # In the order of the placeholders, each of which stands for all items of its entry.
        left = iter(groups)
        spread = []
        for text in texts:
            first, *rest = text.split(token)
            spread.append(first + "".join(token * len(next(left) or ()) + part for part in rest))
        return groups, spread


def _feature_extractor(feature_extractor: Any) -> Any:
    """Put ours in the place of transformers' of the same name, where there is one."""
    if not type(feature_extractor).__module__.startswith("transformers."):
        return feature_extractor
    import mmlm_fast.audio

    our_class = getattr(mmlm_fast.audio, type(feature_extractor).__name__, None)
    return feature_extractor if our_class is None else our_class(**feature_extractor.to_dict())


@torch.no_grad()
def _tokens_per_item(model: Any, processor: MMLMProcessor) -> tuple[int, int]:
    """Find out by trying how many tokens the towers make of a picture and of a chunk of sound."""
    from PIL import Image

    towers, counts = getattr(model, "model", model), [0, 0]
    if "image" in model.config.modalities:
        pixels = processor.pixel_values([Image.new("RGB", (64, 64))]).to(model.device, model.dtype)
        counts[0] = towers.get_image_features(pixels).pooler_output.shape[1]
    if "audio" in model.config.modalities:
        rate = processor.feature_extractor.sampling_rate
        features = processor.feature_extractor([np.zeros(rate, np.float32)], sampling_rate=rate, return_tensors="pt")
        features = features["input_features"].to(model.device, model.dtype)
        counts[1] = towers.get_audio_features(features).pooler_output.shape[1]
    return counts[0], counts[1]


def _texts(name: str, given: Any) -> list[str]:
    """Return a text or texts as a list."""
    is_list = isinstance(given, (Sequence, np.ndarray)) and not isinstance(given, (str, bytes))
    listed = list(given) if is_list else [given]
    if not listed or not (is_list or isinstance(given, str)):
        raise ValueError(f"{name} must be a text or a list of one or more, got {given!r}")
    for i, one in enumerate(listed):
        if not isinstance(one, str):
            raise ValueError(f"{name}[{i}] must be a text, got {one!r}")
    return listed


def _check_cut(name: str, rows: list[list[int]], tokenizer_kwargs: dict[str, Any]) -> None:
    """Raise where truncation would cut what is to be learnt."""
    limit = tokenizer_kwargs.get("max_length")
    if limit is None or tokenizer_kwargs.get("truncation") in (None, False, "do_not_truncate"):
        return
    for i, row in enumerate(rows):
        if len(row) > limit:
            raise ValueError(
                f"{name} must have at most max_length, {limit} tokens with the end token, got {len(row)} in place {i}: "
                "what is to be learnt is not cut"
            )


def _padded(rows: list[list[int]], value: int, side: str, multiple: int | None = None) -> Tensor:
    longest = max(map(len, rows))
    longest += -longest % (multiple or 1)
    fill = [[value] * (longest - len(row)) for row in rows]
    return torch.tensor([f + r if side == "left" else r + f for r, f in zip(rows, fill, strict=True)])


def _backend_of(image_processor: Any) -> str | None:
    """Return which library resizes pictures: ``torchvision`` or ``pil``."""
    if image_processor is None:
        return None
    names = {base.__name__ for base in type(image_processor).__mro__}
    return "torchvision" if names & {"TorchvisionBackend", "BaseImageProcessorFast"} else "pil"


def _listed(entry: Any) -> list | None:
    if entry is None:
        return None
    if isinstance(entry, (list, tuple)):
        if not entry:
            raise ValueError("a list of pictures is empty: say None for none")
        return list(entry)
    return [entry]


def _encode(
    groups: list[list | None], encode: Callable[[list], Tensor], name: str, mask_name: str, merge: bool
) -> dict[str, Any]:
    """Make the values of all items; for `merge` in one row after the other, else a row a text, filled up with zeros."""
    items = [item for group in groups for item in group or ()]
    if not items:
        return {}
    values = encode(items)
    counts = [len(group or ()) for group in groups]
    longest = max(counts)
    if merge or counts == [1] * len(counts):
        return {name: values}
    mask = torch.arange(longest)[None] < torch.tensor(counts)[:, None]
    filled = values.new_zeros(len(counts), longest, *values.shape[1:])
    filled[mask] = values
    return {name: filled, mask_name: mask} if longest > 1 else {name: filled[:, 0], mask_name: mask[:, 0]}
