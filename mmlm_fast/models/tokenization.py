"""Tokenizers and image processors that need no download."""

from collections.abc import Iterable
from typing import Any

SPECIAL = ["<pad>", "<bos>", "<eos>", "<image>", "<audio>", "<mask>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}{{ '<' + part['type'] + '>' }}{% endif %}"
    "{% endfor %}{% endif %}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def byte_tokenizer(
    *, padding_side: str = "left", codebook_size: int = 0, texts: Iterable[str] = (), vocab_size: int | None = None
) -> Any:
    """Make a tokenizer that knows every language: UTF-8 bytes and a few special tokens.

    Args:
        padding_side: ``left`` for causal decoders, ``right`` for encoders.
        codebook_size: Further tokens ``<i0>`` … for pictures.
        texts, vocab_size: With both, byte pairs are merged as often as these texts have them, up to that many tokens.

    Raises:
        ValueError: if `vocab_size` does not leave room for the bytes, or comes without texts.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = SPECIAL + alphabet
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if vocab_size is not None:
        texts = list(texts)
        if vocab_size < len(vocabulary) or not texts:
            raise ValueError(
                f"vocab_size must be at least {len(vocabulary)} and come with texts, got {vocab_size} and "
                f"{len(texts)} texts"
            )
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        mask_token="<mask>",
        additional_special_tokens=["<image>", "<audio>"],
        padding_side=padding_side,
        chat_template=CHAT_TEMPLATE,
    )
    fast.add_tokens([AddedToken(f"<i{i}>", normalized=False) for i in range(codebook_size)])
    return fast


def tower_tokenizer(source: str, padding_side: str, placeholders: bool) -> Any:
    """Load the tokenizer of a checkpoint, able to pad; with `placeholders`, which ``merge`` has among the tokens, it
    knows ``<image>`` and ``<audio>``."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, padding_side=padding_side)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if placeholders:
        tokenizer.add_tokens(["<image>", "<audio>"], special_tokens=True)
    return tokenizer


def image_processor(size: int) -> Any:
    """Make SigLIP's image processor, to squares of `size` pixels."""
    try:  # without torchvision
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil as ImageProcessor
    except ImportError:
        from transformers import SiglipImageProcessor as ImageProcessor
    return ImageProcessor(size={"height": size, "width": size})
