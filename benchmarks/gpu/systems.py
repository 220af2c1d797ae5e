"""Stage `check`, the jobs that are no single op: audio features, decoding, models of transformers, the thin model."""

import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mmlm_fast
from mmlm_benchmarks.gpu.correctness import against_float64, guarded, same_bits
from mmlm_benchmarks.gpu.device import Device
from mmlm_benchmarks.gpu.facts import Facts
from mmlm_fast import audio
from mmlm_fast.ops import interval_attention

RATE = 16000


def clips(device: str, lengths: tuple[int, ...]) -> list[Tensor]:
    """Noise that swells and fades, as loud as speech."""
    made = []
    for n in lengths:
        time_ = torch.arange(n, device=device) / RATE
        made.append(0.1 * torch.randn(n, device=device) * (1.1 + torch.sin(3 * time_)))
    return made


def audio_features(device: Device, facts: Facts) -> bool:
    """Each family on the device, against plain PyTorch there and in float64."""
    torch.manual_seed(0)
    lengths = (RATE, 3000) if device.is_stand_in else (30 * RATE, 30 * RATE, 7 * RATE + 13)
    waveforms = clips(device.type, lengths)
    families: dict[str, Callable[[Tensor, torch.dtype], Tensor]] = {
        "log_mel 80": lambda x, dtype: audio.log_mel(x, dtype=dtype),
        "log_mel 128": lambda x, dtype: audio.log_mel(x, num_mel_bins=128, dtype=dtype),
        "kaldi_fbank": lambda x, dtype: audio.kaldi_fbank(x[None] * 32768, num_mel_bins=80, dtype=dtype),
        "mfcc": lambda x, dtype: audio.mfcc(x[None] * 32768, dtype=dtype),
        "mel_spectrogram": lambda x, dtype: audio.mel_spectrogram(x, n_fft=1024, hop_length=256, dtype=dtype),
        "resample 16k to 24k": lambda x, dtype: audio.resample(x, RATE, 24000),
    }

    def one(family: Callable) -> dict[str, Any]:
        worst: dict[str, Any] = {}
        for waveform in waveforms:
            actual = family(waveform, torch.float32)
            with mmlm_fast.reference():
                twin, exact = family(waveform, torch.float32), family(waveform.double(), torch.float64)
            found = against_float64(actual, twin, exact)
            if not worst or found["of_allowed"] > worst["of_allowed"]:
                worst = found
        return worst

    good = True
    for name, family in families.items():
        good &= guarded(facts, name, torch.float32, "forward", partial(one, family))
    if device.type == "cuda":

        def without_sync() -> dict[str, Any]:
            first = audio.log_mel(waveforms[0])
            torch.cuda.set_sync_debug_mode("error")
            try:
                second = audio.log_mel(waveforms[0])
            finally:
                torch.cuda.set_sync_debug_mode("default")
            return same_bits(second, first)

        good &= guarded(facts, "log_mel", torch.float32, "no sync", without_sync)
    return good


def decoding(device: Device, facts: Facts) -> bool:
    """A growing cache without a mask: milliseconds a token, ours beside torch's with repeated keys."""
    heads, kv_heads, size, tokens = (4, 2, 16, 6) if device.is_stand_in else (28, 4, 128, 96)
    start = 10 if device.is_stand_in else 1000
    dtype = torch.float32 if device.is_stand_in else torch.bfloat16

    def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def run() -> dict[str, Any]:
        seconds: dict[str, list[float]] = {"mmlm_fast": [], "SDPA, repeated keys": []}
        worst = 0.0
        for n in range(start, start + tokens):
            q = torch.randn(1, heads, 1, size, device=device.type, dtype=dtype)
            k, v = (torch.randn(1, kv_heads, n, size, device=device.type, dtype=dtype) for _ in range(2))
            outs = {}
            for name, call in (("mmlm_fast", interval_attention), ("SDPA, repeated keys", repeated)):
                device.synchronize()
                begin = time.perf_counter()
                outs[name] = call(q, k, v)
                device.synchronize()
                seconds[name].append(time.perf_counter() - begin)
            a, b = (out.double() for out in outs.values())
            worst = max(worst, float((a - b).norm() / b.norm()))
        told: dict[str, Any] = {"ok": worst < 4 * torch.finfo(dtype).eps, "relative": worst}
        for name, values in seconds.items():
            late = sorted(values[len(values) // 2 :])
            told[name] = {
                "first_ms": 1e3 * values[0],
                "median_ms": 1e3 * late[len(late) // 2],
                "max_ms": 1e3 * max(values[1:]),
            }
        return told

    return guarded(facts, "growing cache, no mask", dtype, "decode", run)


def language_model(device: Device, facts: Facts) -> bool:
    """A small Qwen2 of transformers: logits, loss, gradients and generated tokens, ours beside sdpa."""
    import transformers

    import mmlm_fast.hf

    torch.manual_seed(0)
    sizes = (
        dict(hidden_size=64, intermediate_size=96)
        if device.is_stand_in
        else dict(hidden_size=512, intermediate_size=1024)
    )
    config = transformers.Qwen2Config(
        vocab_size=999, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, **sizes
    )
    model = transformers.Qwen2ForCausalLM(config).to(device.type).eval()
    length = 21 if device.is_stand_in else 301
    ids = torch.randint(1, 999, (2, length), device=device.type)
    there = torch.ones_like(ids)
    there[1, : length // 3] = 0
    batch = {"input_ids": ids.masked_fill(there == 0, 0), "attention_mask": there}
    labels = ids.masked_fill(there == 0, -100)

    def of(implementation: str, f: Callable[[], Any]) -> Any:
        model.set_attn_implementation(implementation)
        return f()

    def logits() -> Tensor:
        with torch.no_grad():
            return model(**batch).logits[there.bool()]

    def compare_logits() -> dict[str, Any]:
        actual, twin = of("mmlm_fast", logits), of("sdpa", logits)
        model.double()
        exact = of("sdpa", logits)
        model.float()
        return against_float64(actual, twin, exact)

    def step() -> list[Tensor]:
        model.zero_grad()
        loss = model(**batch, labels=labels, use_cache=False).loss
        loss.backward()
        # Copies: a model that is moved to float64 takes its gradients along.
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    def compare_steps() -> dict[str, Any]:
        twin = of("sdpa", step)
        accelerated = mmlm_fast.accelerate(model, verify=True)
        actual = of("mmlm_fast", step)
        accelerated.undo()
        model.double()
        exact = of("sdpa", step)
        model.float()
        flat = [torch.cat([t.flatten() for t in part]) for part in (actual, twin, exact)]
        return against_float64(*flat) | {"accelerated": str(accelerated)}

    def generate() -> dict[str, Any]:
        options = {"max_new_tokens": 8, "do_sample": False}
        actual, expected = (of(name, lambda: model.generate(**batch, **options)) for name in ("mmlm_fast", "sdpa"))
        return same_bits(actual, expected)

    def decode() -> dict[str, Any]:
        """Eight tokens by hand: every wait for the device that torch warns of, and whose line it is."""
        model.set_attn_implementation("mmlm_fast")
        cache, mask, token = transformers.DynamicCache(config=config), there, batch["input_ids"]
        waits: Counter[str] = Counter()
        for step_number in range(9):
            with warnings.catch_warnings(record=True) as seen, torch.no_grad():
                warnings.simplefilter("always")
                if step_number:  # the prompt may look
                    torch.cuda.set_sync_debug_mode("warn")
                try:
                    logits = model(input_ids=token, attention_mask=mask, past_key_values=cache).logits
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            waits.update(f"{Path(w.filename).name}:{w.lineno}" for w in seen if "synchroniz" in str(w.message))
            token = logits[:, -1:].argmax(-1)
            mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        ours = [name for name in waits if name.startswith(("interval_", "attention.py", "looks.py", "masks.py"))]
        return {"ok": not ours, "waits": dict(waits)}

    good = guarded(facts, "Qwen2, left padding", torch.float32, "logits", compare_logits)
    if device.type == "cuda":
        good &= guarded(facts, "Qwen2, left padding", torch.float32, "no sync while decoding", decode)
    good &= guarded(facts, "Qwen2, left padding", torch.float32, "training step", compare_steps)
    return good & guarded(facts, "Qwen2, left padding", torch.float32, "generate", generate)


def thin_model(device: Device, facts: Facts) -> bool:
    """The thin model on real speech, picture and text, in reference and fast form."""
    from mmlm_benchmarks.models import thin

    def fusion(name: str) -> dict[str, Any]:
        model, _, batch = thin.build(name, device.type, num_hidden_layers=1)
        wide = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        with torch.no_grad():
            actual = model(**batch).logits
            with mmlm_fast.reference():
                twin, exact = model(**batch).logits, model.double()(**wide).logits
        return against_float64(actual, twin, exact)

    good = True
    for name in ("merge",) if device.is_stand_in else ("merge", "concat", "attention"):
        good &= guarded(facts, f"thin model, fusion {name}", torch.float32, "forward", partial(fusion, name))
    return good


JOBS: dict[str, Callable[[Device, Facts], bool]] = {
    "audio": audio_features,
    "decoding": decoding,
    "language_model": language_model,
    "thin_model": thin_model,
}
