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

FUSIONS = ("merge", "concat", "attention")
SIZE = {"hidden_size": 256, "image_size": 224}


def build(
    fusion: str, device: str, num_hidden_layers: int = 2
) -> tuple[MMLMForConditionalGeneration, Any, dict[str, torch.Tensor]]:
    """Model with random weights, processor, and a batch of two real samples."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config, processor = presets.token_merge_vlm(fusion, num_hidden_layers=num_hidden_layers, **SIZE)
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


def _step(model: Any, labels: torch.Tensor) -> Callable[[dict], None]:
    def call(batch: dict) -> None:
        model.zero_grad()
        model(**batch, labels=labels, use_cache=False).loss.backward()

    return call


def _in_reference(call: Callable) -> Callable:
    def wrapped(batch: dict) -> Any:
        with reference():
            return call(batch)

    return wrapped


def _check(model: Any, providers: tuple[str, ...]) -> Callable:
    """Logits against the model in float64."""

    def check(calls: dict[str, Callable], args: tuple) -> dict[str, list[Difference]]:
        (batch,) = args
        double = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        with torch.no_grad():
            ours = model(**batch).logits
            with reference():
                twin = model(**batch).logits
                exact = model.double()(**double).logits
            model.float()
            found = {"eager": [difference(twin, twin, exact)], "mmlm_fast": [difference(ours, twin, exact)]}
            for provider in providers:
                found[provider] = [difference(calls[provider](batch), twin, exact)]
        return found

    return check


def cases(device: str, full: bool = False, fusions: tuple[str, ...] = FUSIONS) -> list[Case]:
    """Training steps for the fusions and a forward pass; with `full` also a compiled training step (minutes)."""
    shape = "SigLIP, Whisper-style encoder, Qwen3, width 256, 10 s clips, batch of 2; 2 layers each (forward: 1 layer)"
    made = []
    for fusion in fusions:
        model, _, batch = build(fusion, device)
        step = _step(model, batch["input_ids"].clone())
        providers: dict[str, Callable] = {"eager": _in_reference(step), "mmlm_fast": step}
        if full:
            providers["torch.compile"] = _in_reference(_step(torch.compile(model, dynamic=False), batch["input_ids"]))
        made.append(
            Case(
                group="model",
                name=f"thin model, fusion {fusion}, training step",
                shape_from=shape,
                inputs=lambda batch=batch: [(batch,)],
                providers=providers,
                check=_check(model, ()),
            )
        )
        if fusion == "concat":
            shallow, _, _ = build(fusion, device, num_hidden_layers=1)  # compiles in half a minute

            @torch.no_grad()
            def forward(batch: dict, model: Any = shallow) -> torch.Tensor:
                return model(**batch, use_cache=False).logits

            compiled = torch.compile(forward, dynamic=False)
            made.append(
                Case(
                    group="model",
                    name=f"thin model of 1 layer, fusion {fusion}, forward",
                    shape_from=shape,
                    inputs=lambda batch=batch: [(batch,)],
                    providers={
                        "eager": _in_reference(forward),
                        "torch.compile": _in_reference(compiled),
                        "mmlm_fast": forward,
                    },
                    check=_check(shallow, ("torch.compile",)),
                )
            )
    return made


def generation_agrees(fusion: str, device: str) -> dict[str, Any]:
    """Greedy generation in reference and fast form, token by token."""
    model, _, batch = build(fusion, device)
    fast = model.generate(**batch, max_new_tokens=12, do_sample=False)
    with reference():
        expected = model.generate(**batch, max_new_tokens=12, do_sample=False)
    return {"fusion": fusion, "tokens": int(fast.shape[1]), "equal": bool(torch.equal(fast, expected))}
