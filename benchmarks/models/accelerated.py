"""Time Hugging Face models as they are, and accelerated: ``python -m mmlm_benchmarks.models.accelerated [CASE ...]``.

Real configurations with fewer layers and random weights; sizes are named with each case. Both models share their
parameters, and run in turns.
"""

import argparse
import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import nn

import mmlm_fast
from mmlm_benchmarks.harness import environment, goes_on, interval, peak_memory_mib, spread, timed
from mmlm_benchmarks.report import schema

PICTURE = 49_001  # token


class Job(NamedTuple):
    """Describe what is timed: a call of a model or a processor and a model, whose results can be compared."""

    name: str
    shape: str
    parts: list[Any]  # that are accelerated
    call: Callable[..., list[torch.Tensor]]  # of the parts
    same: bool  # results must be equal, not close


def _training(model: nn.Module, **inputs: Any) -> Callable[..., list[torch.Tensor]]:
    def call(model: Any) -> list[torch.Tensor]:
        model.zero_grad(set_to_none=True)
        loss = model(**inputs).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    return call


def qwen2_5_vl() -> Job:
    """Build Qwen2.5-VL-3B with 2 of 36 text layers and 4 of 32 vision layers."""
    return _qwen2_5_vl("2 of 36 text layers and 4 of 32 vision layers of Qwen2.5-VL-3B", 1, 2, 4)


def qwen2_5_vl_narrow() -> Job:
    """Build Qwen2.5-VL-3B at a quarter of its widths, with 9 of 36 text layers and 8 of 32 vision layers."""
    return _qwen2_5_vl("a quarter of the widths, 9 of 36 text and 8 of 32 vision layers of Qwen2.5-VL-3B", 4, 9, 8)


def qwen2_5_vl_short() -> Job:
    """Build Qwen2.5-VL-3B at a quarter of its widths, with 2 of 36 text and 2 of 32 vision layers, 2 small pictures."""
    shape = "a quarter of the widths, 2 of 36 text and 2 of 32 vision layers of Qwen2.5-VL-3B"
    return _qwen2_5_vl(shape, 4, 2, 2, side=16)


def _qwen2_5_vl(shape: str, part: int, layers: int, depth: int, side: int = 32) -> Job:
    """Build it with `side` patches along the side of each of two pictures."""
    text = dict(
        vocab_size=50_000, hidden_size=2048 // part, intermediate_size=11008 // part, num_hidden_layers=layers,
        num_attention_heads=16 // part, num_key_value_heads=max(1, 2 // part), max_position_embeddings=4096,
        layer_types=["full_attention"] * layers,
        rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]),
    )  # fmt: skip
    vision = dict(
        depth=depth, hidden_size=1280 // part, intermediate_size=3420 // part, num_heads=16 // part,
        out_hidden_size=2048 // part, fullatt_block_indexes=[depth - 1],
    )  # fmt: skip
    tokens = dict(
        image_token_id=PICTURE, video_token_id=49_002, vision_start_token_id=49_003, vision_end_token_id=49_004
    )
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    merged = side * side // 4
    ids = torch.randint(10, 40_000, (1, 4 * merged))
    ids[0, 20 : 20 + merged] = ids[0, 44 + merged : 44 + 2 * merged] = PICTURE
    inputs = dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.where(ids == PICTURE, -100, ids),
        pixel_values=torch.randn(2 * side * side, 3 * 2 * 14 * 14), image_grid_thw=torch.tensor([[1, side, side]] * 2),
        mm_token_type_ids=(ids == PICTURE).int(),
    )  # fmt: skip
    model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(config).train()
    shape = f"{shape}, 2 images of {side * side:,} patches, {2 * merged} text tokens, 50,000 classes, float32"
    return Job("Qwen2.5-VL, training step", shape, [model], _training(model, **inputs), False)


def gemma3() -> Job:
    """Build Gemma3-4B with 3 of 34 text layers and 2 of 27 vision layers."""
    text = dict(
        vocab_size=50_000, hidden_size=2560, intermediate_size=10240, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=4, head_dim=256, sliding_window=512, max_position_embeddings=4096, pad_token_id=0,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"], query_pre_attn_scalar=256,
    )  # fmt: skip
    vision = dict(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=2, num_attention_heads=16, image_size=448,
        patch_size=14,
    )  # fmt: skip
    tokens = dict(image_token_id=PICTURE, boi_token_id=49_002, eoi_token_id=49_003)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=256, **tokens)
    ids = torch.randint(10, 40_000, (1, 1024))
    ids[0, 20:276] = ids[0, 300:556] = PICTURE
    inputs = dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.where(ids == PICTURE, -100, ids),
        pixel_values=torch.randn(2, 3, 448, 448), token_type_ids=(ids == PICTURE).long(),
    )  # fmt: skip
    model = transformers.Gemma3ForConditionalGeneration._from_config(config).train()
    shape = "3 of 34 text layers and 2 of 27 vision layers of Gemma3-4B, 2 images of 1,024 patches, 512 text tokens"
    return Job("Gemma3, training step", f"{shape}, 50,000 classes, float32", [model], _training(model, **inputs), False)


def clip() -> Job:
    """Build CLIP ViT-B/32 with 1 of 12 layers each, batch 1,024."""
    text = dict(num_hidden_layers=1, vocab_size=49_408)
    config = transformers.CLIPConfig(text_config=text, vision_config=dict(num_hidden_layers=1))
    model = transformers.CLIPModel._from_config(config).train()
    ids = torch.randint(10, 40_000, (1024, 16))
    ids[:, -1] = 49_407
    inputs = dict(input_ids=ids, pixel_values=torch.randn(1024, 3, 224, 224), return_loss=True)
    shape = "1 of 12 layers each of CLIP ViT-B/32, 1,024 pairs of a picture and 16 tokens, float32"
    return Job("CLIP, training step", shape, [model], _training(model, **inputs), False)


def whisper() -> Job:
    """Build Whisper-tiny, from samples to tokens."""
    config = transformers.WhisperConfig(
        d_model=384, encoder_layers=4, decoder_layers=4, encoder_attention_heads=6, decoder_attention_heads=6,
        encoder_ffn_dim=1536, decoder_ffn_dim=1536, suppress_tokens=[], begin_suppress_tokens=[],
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration._from_config(config).eval()
    extractor = transformers.WhisperFeatureExtractor()
    clips = [np.random.default_rng(i).standard_normal(16_000 * 30).astype(np.float32) for i in range(4)]

    @torch.no_grad()
    def call(model: Any, extractor: Any) -> list[torch.Tensor]:
        features = extractor(clips, sampling_rate=16_000, return_tensors="pt").input_features
        return [model.generate(input_features=features, max_new_tokens=24, do_sample=False, num_beams=1)]

    return Job(
        "Whisper, 4 clips to 24 tokens each", "Whisper-tiny, 30 s clips, float32", [model, extractor], call, True
    )


def _text(layers: int) -> Any:
    config = transformers.Qwen2Config(
        vocab_size=50_000, hidden_size=1536, intermediate_size=8960, num_hidden_layers=layers, num_attention_heads=12,
        num_key_value_heads=2, max_position_embeddings=4096, pad_token_id=0, eos_token_id=49_999,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM._from_config(config).eval()


def prefill() -> Job:
    """Build Qwen2-1.5B with 4 of 28 layers."""
    ids = torch.randint(10, 40_000, (1, 1024))

    @torch.no_grad()
    def call(model: Any) -> list[torch.Tensor]:
        return [model(input_ids=ids, logits_to_keep=1).logits]

    return Job("Qwen2, prefill of 1,024 tokens", "4 of 28 layers of Qwen2-1.5B, float32", [_text(4)], call, False)


def decode() -> Job:
    """Build Qwen2-1.5B with 4 of 28 layers, 32 steps."""
    ids = torch.randint(10, 40_000, (4, 16))

    @torch.no_grad()
    def call(model: Any) -> list[torch.Tensor]:
        return [model.generate(input_ids=ids, max_new_tokens=32, min_new_tokens=32, do_sample=False)]

    return Job("Qwen2, 32 steps of a batch of 4", "4 of 28 layers of Qwen2-1.5B, float32", [_text(4)], call, True)


def small_decode() -> Job:
    """Build SmolLM2-135M's shape, one sample: where every microsecond of a call shows."""
    config = transformers.LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=2048, pad_token_id=0, eos_token_id=49_151,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM._from_config(config).eval()
    ids = torch.randint(10, 40_000, (1, 16))

    @torch.no_grad()
    def call(model: Any) -> list[torch.Tensor]:
        return [model.generate(input_ids=ids, max_new_tokens=24, min_new_tokens=24, do_sample=False)]

    return Job("SmolLM2, 24 steps of one sample", "SmolLM2-135M, float32", [model], call, True)


JOBS = {
    f.__name__: f
    for f in (qwen2_5_vl_short, qwen2_5_vl, qwen2_5_vl_narrow, gemma3, clip, whisper, prefill, decode, small_decode)
}
SHORT = ("qwen2_5_vl_short",)  # of a report of three minutes


def sharing(part: Any) -> Any:
    """Return a copy that shares parameters and buffers."""
    tensors = [*part.parameters(), *part.buffers()] if isinstance(part, nn.Module) else []
    return copy.deepcopy(part, {id(t): t for t in tensors})


def measure(name: str, seconds: float, ladder: bool = False) -> Iterator[schema.Accelerated]:
    """Yield a row for the accelerated model; with `ladder` one for each kind of place before it, added one by one."""
    torch.manual_seed(0)
    job = JOBS[name]()
    reports = [mmlm_fast.accelerate(sharing(p), quiet=True, strict=False) for p in job.parts]
    kinds = list(dict.fromkeys(r.kind for report in reports for r in report.replaced))
    stages = [kinds[: i + 1] for i in range(len(kinds))] if ladder else [kinds]
    for stage in stages:
        fast = [sharing(part) for part in job.parts]
        for part in fast:
            mmlm_fast.accelerate(part, only=stage, quiet=True, strict=False)
        yield {
            "case": job.name,
            "shape": job.shape,
            "kinds": stage,
            **_compared(job, fast),
            **timing_of(job, fast, seconds),
        }


def _compared(job: Job, fast: list[Any]) -> schema.Comparison:
    theirs = [t.clone() for t in job.call(*job.parts)]
    ours = [t.clone() for t in job.call(*fast)]
    if job.same:
        return {"equal": all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))}
    assert len(ours) == len(theirs)
    error = sum((a.double() - b.double()).square().sum() for a, b in zip(ours, theirs, strict=True)) ** 0.5
    return {"difference": float(error / sum(b.double().square().sum() for b in theirs) ** 0.5)}


def timing_of(job: Job, fast: list[Any], seconds: float) -> schema.Timing:
    """Measure how long a job takes, and how much memory, as it is and accelerated."""
    pairs: list[tuple[float, float]] = []
    while goes_on(len(pairs), sum(map(sum, pairs)), seconds):
        pairs.append((timed(job.call, tuple(job.parts)), timed(job.call, tuple(fast))))
    ratios = [stock / ours for stock, ours in pairs]
    speedup, certain = spread(ratios), interval(ratios)
    memory = []
    for parts in (job.parts, fast):
        for part in parts:
            if isinstance(part, nn.Module):
                part.zero_grad(set_to_none=True)  # gradients of the step are part of what it takes
        memory.append(peak_memory_mib(job.call, tuple(parts)))
    modules = [part for part in job.parts if isinstance(part, nn.Module)]
    gradients = sum(p.grad.nbytes for m in modules for p in m.parameters() if p.grad is not None)
    return {
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "stock_s": median(stock for stock, _ in pairs),
        "ours_s": median(ours for _, ours in pairs),
        "speedup": speedup.median,
        "speedup_p20": speedup.p20,
        "speedup_p80": speedup.p80,
        "speedup_low": certain.low,
        "speedup_high": certain.high,
        "stock_mib": memory[0],
        "ours_mib": memory[1],
        "gradients_mib": gradients / 2**20,  # part of both
    }


def main(argv: list[str] | None = None) -> int:
    """Print a line a row; with ``--out`` write them as JSON too."""
    parser = argparse.ArgumentParser(prog="python -m mmlm_benchmarks.models.accelerated", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"some of: {', '.join(JOBS)}; all by default")
    parser.add_argument("--seconds", type=float, default=20.0, help="timed per row (default: %(default)s)")
    parser.add_argument("--ladder", action="store_true", help="what each kind of place gives, added one by one")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.cases) - set(JOBS))
    if unknown:
        parser.error(f"CASE must be among {', '.join(JOBS)}, got {', '.join(unknown)}")
    transformers.logging.set_verbosity_error()
    rows = []
    for name in args.cases or JOBS:
        for row in measure(name, args.seconds, args.ladder):
            rows.append(row)
            same = f"equal {row['equal']}" if "equal" in row else f"difference {row['difference']:.1e}"
            memory = "" if row["ours_mib"] is None else f", {row['stock_mib']:.0f} → {row['ours_mib']:.0f} MiB"
            memory += f" ({row['gradients_mib']:.0f} of gradients)" if row["gradients_mib"] else ""
            print(
                f"{row['case']}: {row['stock_s']:.3g} → {row['ours_s']:.3g} s, {row['speedup']:.2f}× "
                f"({row['speedup_p20']:.2f} – {row['speedup_p80']:.2f}){memory}, {same}, load {row['load']:.1f}; "
                f"{', '.join(row['kinds'])}",
                flush=True,
            )
            if args.out is not None:
                results = {"environment": environment("cpu"), "accelerated": rows}
                args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
