"""The thin model on real speech, a real picture and real text: reference, torch.compile, ours."""

from collections.abc import Callable
from typing import Any

import torch
import transformers

from mmlm_benchmarks.harness import Case
from mmlm_fast import reference
from mmlm_fast.data import load_image, load_prompts, load_speech
from mmlm_fast.models import MMLMForConditionalGeneration, presets
from mmlm_fast.testing import Difference, difference

SIZE = {"hidden_size": 256, "num_hidden_layers": 4, "image_size": 224}


def build(fusion: str, device: str) -> tuple[MMLMForConditionalGeneration, Any, dict[str, torch.Tensor]]:
    """Model with random weights, processor, and a batch of two real samples."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config, processor = presets.token_merge_vlm(fusion, **SIZE)
    model = MMLMForConditionalGeneration(config).to(device).eval()
    image, prompts, speech = load_image()[0], load_prompts(), load_speech()
    marks = "<image><audio>" if fusion == "merge" else ""
    batch = processor(
        text=[marks + prompts[0], marks + prompts[1]],
        images=[image, image.transpose(0)],
        audio=[speech[0].waveform, speech[1].waveform],
        sampling_rate=speech[0].sampling_rate,
    ).to(device)
    return model, processor, dict(batch)


def cases(device: str) -> list[Case]:
    made = []
    for fusion in ("merge", "concat", "attention"):
        model, _, batch = build(fusion, device)
        labels = batch["input_ids"].clone()

        def loss(m: Callable = model, labels: torch.Tensor = labels, **inputs: torch.Tensor) -> torch.Tensor:
            return m(**inputs, labels=labels, use_cache=False).loss

        def eager(batch: dict, m: Any = model, loss: Callable = loss) -> None:
            m.zero_grad()
            with reference():
                loss(**batch).backward()

        def fast(batch: dict, m: Any = model, loss: Callable = loss) -> None:
            m.zero_grad()
            loss(**batch).backward()

        def check(
            providers: dict[str, Callable], args: tuple, m: Any = model, labels: torch.Tensor = labels
        ) -> dict[str, list[Difference]]:
            inputs = args[0]
            with torch.no_grad(), reference():
                twin = m(**inputs).logits
                m.double()
                exact = m(**{k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}).logits
                m.float()
            with torch.no_grad():
                ours = m(**inputs).logits
            return {"eager": [difference(twin, twin, exact)], "mmlm_fast": [difference(ours, twin, exact)]}

        providers: dict[str, Callable] = {"eager": eager, "mmlm_fast": fast}
        made.append(
            Case(
                group="model",
                name=f"thin model, fusion {fusion}, training step",
                shape_from="SigLIP, Whisper-style encoder, Qwen3 of 4 layers, width 256; batch of 2",
                inputs=lambda batch=batch: [(batch,)],
                providers=providers,
                check=check,
            )
        )
    return made


def generation_agrees(fusion: str, device: str) -> dict[str, Any]:
    """Greedy generation in reference and fast form, token by token."""
    model, processor, batch = build(fusion, device)
    fast = model.generate(**batch, max_new_tokens=12, do_sample=False)
    with reference():
        expected = model.generate(**batch, max_new_tokens=12, do_sample=False)
    return {"fusion": fusion, "tokens": int(fast.shape[1]), "equal": bool(torch.equal(fast, expected))}
