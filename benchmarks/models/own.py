"""Measure a user's own model, by its folder, configuration or name on the hub: where its time goes, what is gained."""

import inspect
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

import mmlm_fast
from mmlm_benchmarks.models.accelerated import Job, sharing, timing_of
from mmlm_benchmarks.report import schema
from mmlm_fast.hf.planning import model_class

MOST_PARAMETERS = 120_000_000  # that a step on two cores does in a second or two
TOKENS, NEW_TOKENS, PAIRS = 256, 16, 8
DEPTHS = ("num_hidden_layers", "depth", "encoder_layers", "decoder_layers", "num_layers", "n_layer", "n_layers")
FEWEST_CLASSES = 32_768
COPIES = 4  # of the weights: themselves, gradients before and after, and what passes
TOKENIZERS = ("tokenizer*", "vocab*", "spiece*", "*.model", "*.tiktoken")
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


class Own(NamedTuple):
    """Hold a model that is ready to be measured.

    Args:
        model: The model with its weights, or random ones.
        inputs: What its forward takes, without labels.
        labels: What it takes beside them in a training step.
        notes: What was left out or made up, in sentences.
    """

    model: Any
    inputs: dict[str, Tensor]
    labels: dict[str, Any]
    notes: list[str]


class Measured(NamedTuple):
    """Hold what results.json says of a model: of itself, and its jobs before and after `accelerate`."""

    about: schema.Own
    rows: list[schema.Accelerated]


def measure(
    name: str,
    *,
    seconds: float = 4.0,
    layers: int | None = None,
    dtype: str = "auto",
    data: Path | None = None,
    device: str = "cpu",
    step: Callable[[str], None] = lambda what: None,
) -> Measured:
    """Measure everything that the report says of a user's model.

    Args:
        name: A folder, a ``config.json`` or a name on the hub; without weights they are random.
        seconds: Timed for each of forward, training step and generation.
        layers: At most so many layers of each stack; by default as many as fit into two seconds a step.
        dtype: Of the weights, such as bfloat16; by default as they are saved.
        device: Where it runs.
        data: Lines of text, or of JSON with a "text" each, in place of random tokens; needs the model's tokenizer.
        step: Called with what is done next, in words.

    Raises:
        ValueError, OSError: where there is no such model, or none that can be run.
    """
    step("building the model")
    own = load(name, layers, dtype, data, device)
    model, notes = own.model, own.notes
    step("what accelerate does")
    acceleration = mmlm_fast.accelerate(sharing(model), strict=False, quiet=True)
    step("shares of time and memory")
    shares = list(shares_of(own, {r.path: r.kind for r in acceleration.replaced}))
    kinds = sorted({r.kind for r in acceleration.replaced})
    rows: list[schema.Accelerated] = []
    for job in jobs(own):
        step(job.name)
        fast = sharing(model)
        mmlm_fast.accelerate(fast, strict=False, quiet=True)
        try:
            rows.append(
                {
                    "case": job.name,
                    "shape": job.shape,
                    "kinds": kinds,
                    **compared(job, model, fast),
                    **timing_of(job, [fast], seconds),
                }
            )
        except Exception as error:  # what a model cannot do must not lose what it can
            notes.append(f"{job.name}: not run, {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    if not rows:
        raise ValueError("; ".join(notes))
    about: schema.Own = {
        "name": name,
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix("torch."),
        "inputs": {k: list(v.shape) for k, v in own.inputs.items()},
        "notes": notes,
        "accelerate": str(acceleration).splitlines(),
        "shares": shares,
    }
    return Measured(about, rows)


# ---- the model -------------------------------------------------------------------------------------------------------


def load(name: str, layers: int | None, dtype: str, data: Path | None, device: str = "cpu") -> Own:
    """Load or build the model, cut until it fits, and make inputs for it."""
    folder = Path(name)
    folder = folder.parent if folder.is_file() else folder
    config = AutoConfig.from_pretrained(name)
    cls = model_class(config)
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype must be auto or a dtype of torch such as bfloat16, got {dtype!r}")
    wanted: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    notes: list[str] = []
    has_weights = not folder.is_dir() or any(next(folder.glob(pattern), None) for pattern in WEIGHTS)
    if has_weights and layers is None and not Path(name).is_file():
        model = cls.from_pretrained(name, dtype=wanted)
    else:
        saved = getattr(config, "dtype", None) if wanted == "auto" else wanted
        left = _shrink(config, cls, layers, torch.empty(0, dtype=saved or torch.float32).element_size())
        notes.append("The weights are random." + (f" {left}" if left else ""))
        torch.manual_seed(0)
        options = {} if wanted == "auto" else {"dtype": wanted}
        make = cls.from_config if cls.__name__.startswith("Auto") else cls._from_config
        model = make(config, **options)
    texts = None if data is None else _texts(data)
    inputs, labels, more = inputs_of(model.eval(), name, texts)
    inputs = {key: value.to(device) for key, value in inputs.items()}
    labels = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in labels.items()}
    return Own(model=model.to(device), inputs=inputs, labels=labels, notes=notes + more)


def _shrink(config: PretrainedConfig, cls: Any, layers: int | None, item: int) -> str:
    """Leave layers out until a step takes seconds, then classes until it takes little more; says what is left.

    Raises:
        ValueError: where even one layer does not fit into memory.
    """
    before = {id(c): dict(_depths(c)) for c in _parts(config)}
    text = config.get_text_config()
    classes = getattr(text, "vocab_size", 0)
    most = layers if layers is not None else max((n for d in before.values() for n in d.values()), default=1)
    while layers is None and most > 1 and _size(config, cls) > MOST_PARAMETERS:
        most = most // 2
        _cut(config, most)
    if layers is not None:
        _cut(config, most)
    while _size(config, cls) > 4 * MOST_PARAMETERS and getattr(text, "vocab_size", 0) > FEWEST_CLASSES:
        _cut_classes(config, text.vocab_size // 2)
    needed, free = COPIES * item * _size(config, cls), _free_memory()
    if needed > 0.8 * free:
        raise ValueError(
            f"the model needs about {needed / 2**30:.0f} GiB "
            f"even with {most} of each stack's layers, and "
            f"{free / 2**30:.0f} GiB are free: a smaller configuration, or --layers"
        )
    cuts = [
        f"{n} of {before[id(c)][key]} layers ({type(c).__name__}.{key})"
        for c in _parts(config)
        for key, n in _depths(c)
        if n != before[id(c)][key]
    ]
    if getattr(text, "vocab_size", 0) != classes:
        cuts.append(f"{text.vocab_size:,} of {classes:,} classes")
    return f"To fit, these are left: {', '.join(cuts)}." if cuts else ""


def _cut_classes(config: PretrainedConfig, most: int) -> None:
    """Keep at most so many classes; tokens with a meaning of their own become the last of these."""
    moved: dict[int, int] = {}
    for part in _parts(config):
        if getattr(part, "vocab_size", 0) > most:
            part.vocab_size = most
        for key, value in list(vars(part).items()):
            if key.endswith(("token_id", "token_index")) and isinstance(value, int) and value >= most:
                setattr(part, key, moved.setdefault(value, most - 1 - len(moved)))


def _free_memory() -> int:
    """Return how many bytes programs can still take; without bounds where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 2**62
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), 2**62)


def _parts(config: PretrainedConfig) -> list[PretrainedConfig]:
    """Return a configuration with all that are inside it."""
    parts, waiting = [], [config]
    while waiting:
        parts.append(waiting.pop())
        waiting += [c for c in vars(parts[-1]).values() if isinstance(c, PretrainedConfig)]
    return parts


def _depths(config: PretrainedConfig) -> Iterator[tuple[str, int]]:
    """Yield name and value of each number of layers, but of attributes alone: some have two names for one."""
    for key in DEPTHS:
        value = vars(config).get(key)
        if isinstance(value, int) and value > 0:
            yield key, value


def _cut(config: PretrainedConfig, most: int) -> None:
    """Keep at most so many layers of each stack, and what is said of these."""
    for part in _parts(config):
        deepest = max((n for _, n in _depths(part)), default=0)
        for key, n in list(_depths(part)):
            setattr(part, key, min(n, most))
        for key, value in list(vars(part).items()):
            if isinstance(value, list) and value and deepest > most:
                if len(value) == deepest:  # one for each layer
                    setattr(part, key, value[:most])
                elif key.endswith(("indexes", "indices", "layers")) and all(isinstance(v, int) for v in value):
                    setattr(part, key, [v for v in value if v < most] or [most - 1])


def _size(config: PretrainedConfig, cls: Any) -> int:
    make = cls.from_config if cls.__name__.startswith("Auto") else cls._from_config
    with torch.device("meta"):
        return sum(p.numel() for p in make(config).parameters())


# ---- its inputs ------------------------------------------------------------------------------------------------------


def inputs_of(model: Any, name: str, texts: list[str] | None) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """Make inputs that the model takes, labels, and notes on what failed.

    They are tokens of `texts`, or random ones, with a picture or sound where the model takes such.
    """
    takes = inspect.signature(model.forward).parameters
    notes: list[str] = []
    generator = torch.Generator().manual_seed(0)
    ids = None if texts is None else _tokens(name, texts)
    for kind, make in {"sound": _sound, "pictures": _pictures, "text": _text}.items():
        try:
            drawn = make(model, takes, generator, ids)
            if drawn is None:
                continue
            inputs, labels = _of_dtype(drawn[0], model), drawn[1]
            with torch.no_grad():
                model(**inputs)
            return inputs, labels, notes
        except Exception as error:  # another model's conventions: said, and the next tried
            notes.append(f"{kind}: not run, {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    raise ValueError("; ".join(notes) or f"{type(model).__name__} takes neither text nor pictures nor sound")


InputsAndLabels = tuple[dict[str, Tensor], dict[str, Any]]


def _of_dtype(inputs: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def _random_ids(model: Any, generator: torch.Generator, length: int) -> Tensor:
    text = model.config.get_text_config()
    most = min(length, getattr(text, "max_position_embeddings", length) or length)
    special = {
        v for k, v in model.config.to_dict().items() if k.endswith(("token_id", "token_index")) and type(v) is int
    }
    ids = torch.randint(3, max(4, text.vocab_size - 1), (1, most), generator=generator)
    plain = next(n for n in range(3, text.vocab_size) if n not in special)
    for token in special:
        ids[ids == token] = plain
    return ids


def _sound(model: Any, takes: Any, generator: torch.Generator, ids: Tensor | None) -> InputsAndLabels | None:
    """Make samples or features of sound, where the model takes either."""
    config = model.config
    if "input_values" in takes and "input_ids" not in takes:
        inputs = {"input_values": torch.randn(1, 80_000, generator=generator)}
        return inputs, {"labels": torch.randint(1, 20, (1, 12))} if "labels" in takes else {}
    if "input_features" not in takes or not getattr(config, "num_mel_bins", None):
        return None
    frames = 2 * getattr(config, "max_source_positions", 1500)
    inputs = {"input_features": torch.randn(1, config.num_mel_bins, frames, generator=generator)}
    transcript = _random_ids(model, generator, 64) if ids is None else ids[:, : config.max_target_positions]
    return inputs | {"decoder_input_ids": transcript}, {"labels": transcript}


def _pictures(model: Any, takes: Any, generator: torch.Generator, ids: Tensor | None) -> InputsAndLabels | None:
    """Make pictures with or without text, where the model takes such."""
    config = model.config
    vision = getattr(config, "vision_config", config if "pixel_values" in takes else None)
    if "pixel_values" not in takes or vision is None:
        return None
    if "image_grid_thw" in takes:
        merge, side = vision.spatial_merge_size, 16
        size = getattr(vision, "in_channels", getattr(vision, "in_chans", 3)) * vision.temporal_patch_size
        pixels = torch.randn(side * side, size * vision.patch_size**2, generator=generator)
        inputs: dict[str, Tensor] = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, side, side]])}
        num = side * side // merge**2
    else:
        edge = vision.image_size
        height, width = edge if isinstance(edge, (list, tuple)) else (edge, edge)
        pixels = torch.randn(1, getattr(vision, "num_channels", 3), height, width, generator=generator)
        if "input_ids" not in takes:
            labels = {"labels": torch.zeros(1, dtype=torch.int64)} if "labels" in takes else {}
            return {"pixel_values": pixels}, labels
        inputs, num = _picture(model, takes, pixels)
    tokens = _random_ids(model, generator, TOKENS) if ids is None else ids[:, :TOKENS]
    picture = next(
        (v for k in ("image_token_id", "image_token_index") if (v := getattr(config, k, None)) is not None), None
    )
    if picture is None:  # two towers: pairs, of which each is another's negative
        tokens = tokens[:, : min(16, config.get_text_config().max_position_embeddings)]
        ids_of_pairs = torch.stack([tokens[0].roll(i) for i in range(PAIRS)])
        inputs = {
            "input_ids": ids_of_pairs,
            **{k: torch.stack([v[0].roll(i) for i in range(PAIRS)]) for k, v in inputs.items()},
        }
        return inputs, {"return_loss": True} if "return_loss" in takes else {}
    start = [s for k in ("boi_token_id", "vision_start_token_id") if (s := getattr(config, k, None)) is not None]
    row = torch.cat([tokens[0, :8], torch.tensor([*start, *[picture] * num], dtype=torch.int64), tokens[0, 8:]])[None]
    inputs = {"input_ids": row, "attention_mask": torch.ones_like(row), **inputs}
    kinds = (row == picture).long()
    for key in ("mm_token_type_ids", "token_type_ids"):
        if key in takes:
            inputs[key] = kinds
    return inputs, _language_labels(takes, torch.where(row == picture, -100, row))


def _picture(model: Any, takes: Any, pixels: Tensor) -> tuple[dict[str, Tensor], int]:
    """Return a picture in the first of the forms in use that the model takes, and how many placeholders it needs."""
    sizes = {"image_sizes": torch.tensor([list(pixels.shape[-2:])])}
    forms: list[dict[str, Tensor]] = [{"pixel_values": pixels}, {"pixel_values": pixels[None]}]
    if "image_sizes" in takes:
        edge = pixels.shape[-1]  # with the whole picture tiles of it: two by two where that is among the shapes
        tiles = pixels[None].expand(1, 5, -1, -1, -1)
        whole = {"image_sizes": torch.tensor([[2 * edge, 2 * edge]])}
        forms += [f | sizes for f in forms] + [{"pixel_values": tiles} | whole]
    for form in forms[:-1]:
        with suppress(Exception):
            return form, _num_features(model, form)
    return forms[-1], _num_features(model, forms[-1])


def _num_features(model: Any, inputs: dict[str, Tensor]) -> int:
    """Count the placeholders that a picture takes: as many as it has features."""
    find = getattr(model, "get_image_features", None)
    if find is None:
        return 0
    with torch.no_grad():
        out = find(**_of_dtype(inputs, model))
    features = getattr(out, "pooler_output", out)
    return sum(f.numel() // f.shape[-1] for f in (features if isinstance(features, (list, tuple)) else [features]))


def _text(model: Any, takes: Any, generator: torch.Generator, ids: Tensor | None) -> InputsAndLabels | None:
    """Make text, where the model takes such."""
    if "input_ids" not in takes:
        return None
    tokens = _random_ids(model, generator, TOKENS) if ids is None else ids
    if "decoder_input_ids" in takes:
        answer = tokens[:, : TOKENS // 4]
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "decoder_input_ids": answer}
        return inputs, _language_labels(takes, answer, model)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, _language_labels(takes, tokens, model)


def _language_labels(takes: Any, labels: Tensor, model: Any = None) -> dict[str, Any]:
    if "labels" not in takes or (model is not None and model.get_output_embeddings() is None):
        return {}
    return {"labels": labels}


def _texts(path: Path) -> list[str]:
    lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    texts = [json.loads(line).get("text") if path.suffix in (".jsonl", ".json") else line for line in lines]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f'{path} must hold lines of text, or of JSON with a "text" each')
    return texts


def _tokens(name: str, texts: list[str]) -> Tensor:
    """Return the first `TOKENS` tokens of all texts, one behind the other."""
    folder = str(Path(name).parent) if Path(name).is_file() else name
    files = [path for pattern in TOKENIZERS for path in Path(folder).glob(pattern)]
    if Path(folder).is_dir() and not files:  # an empty tokenizer would be made of nothing
        raise ValueError(f"{folder} holds no tokenizer, which --data needs")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=not ids)["input_ids"]
    return torch.tensor([ids[:TOKENS]])


# ---- what is measured ------------------------------------------------------------------------------------------------


def _loss(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the loss, the model's or a mean square, and the largest output."""
    out = model(**inputs)
    tensors = [t for t in out.values() if isinstance(t, Tensor) and t.is_floating_point() and t.dim() > 0]
    biggest = out["logits"] if isinstance(out.get("logits"), Tensor) else max(tensors, key=lambda t: t.numel())
    loss = out.get("loss")
    return (biggest.float().square().mean() if loss is None else loss), biggest


def jobs(own: Own) -> Iterator[Job]:
    """Yield a forward pass, a training step, and greedy generation where the model generates."""
    prompt = {k: v for k, v in own.inputs.items() if k != "decoder_input_ids"}
    of = ", ".join(f"{k} {list(v.shape)}" for k, v in own.inputs.items())
    parts = [own.model]

    @torch.no_grad()
    def forward(model: Any) -> list[Tensor]:
        return [_loss(model.eval(), own.inputs)[1]]

    def training(model: Any) -> list[Tensor]:
        model.train()
        model.zero_grad(set_to_none=True)
        torch.manual_seed(0)  # dropout
        loss, _ = _loss(model, own.inputs | own.labels)
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    @torch.no_grad()
    def generation(model: Any) -> list[Tensor]:
        options = dict(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
        return [model.eval().generate(**prompt, **options)]

    yield Job("forward", of, parts, _waited_for(forward), False)
    yield Job("training step", of, parts, _waited_for(training), False)
    if own.model.can_generate():
        yield Job(f"generation of {NEW_TOKENS} tokens", of, parts, _waited_for(generation), True)


def _waited_for(call: Callable[[Any], list[Tensor]]) -> Callable[[Any], list[Tensor]]:
    def waiting(model: Any) -> list[Tensor]:
        results = call(model)
        if results[0].is_cuda:
            torch.cuda.synchronize()
        return results

    return waiting


def compared(job: Job, stock: Any, fast: Any) -> schema.Comparison:
    """Say how far results lie apart: relative, of loss or output, and of all gradients together."""
    theirs, ours = job.call(stock), job.call(fast)  # gradients are dropped before a step, not zeroed
    if job.same:
        return {"equal": all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))}
    comparison: schema.Comparison = {"difference": _apart(ours[:1], theirs[:1])}
    if len(ours) > 1:
        comparison["gradients_difference"] = _apart(ours[1:], theirs[1:])
    return comparison


def _apart(ours: list[Tensor], theirs: list[Tensor]) -> float:
    error = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(ours, theirs, strict=True))
    return float(np.sqrt(error / max(sum(float(b.double().square().sum()) for b in theirs), 1e-300)))


def shares_of(own: Own, kinds: dict[str, str]) -> Iterator[schema.Share]:
    """Measure shares of a forward pass in training by what a module is: time, and memory kept for the backward pass.

    A module's time is what passes in it less what passes in the modules inside it.
    """
    model = own.model.train()
    names = {module: _what(path, module, kinds) for path, module in model.named_modules()}
    with _watched(model, names) as (times, kept_bytes):
        for _ in range(3):
            for what in times:
                times[what].append(0.0)
            kept_bytes.clear()
            loss, _ = _loss(model, own.inputs | own.labels)
            del loss
    model.eval()
    best = {what: min(passed) for what, passed in times.items()}
    all_time, all_kept = sum(best.values()) or 1, sum(kept_bytes.values()) or 1
    for what in sorted(best, key=best.__getitem__, reverse=True):
        count = sum(name == what for name in names.values())
        yield {
            "what": what,
            "modules": count,
            "time": round(best[what] / all_time, 4),
            "memory": round(kept_bytes.get(what, 0) / all_kept, 4),
            "mib": round(kept_bytes.get(what, 0) / 2**20, 2),
        }


@contextmanager
def _watched(model: nn.Module, names: dict[nn.Module, str]) -> Iterator[tuple[dict[str, list[float]], dict[str, int]]]:
    times: dict[str, list[float]] = {what: [] for what in names.values()}
    kept_bytes: dict[str, int] = {}
    stack: list[tuple[str, float]] = []
    seen: set[int] = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def passed(now: float) -> None:
        if stack:
            what, since = stack[-1]
            times[what][-1] += now - since

    def enter(module: nn.Module, args: Any) -> None:
        now = time.perf_counter()
        passed(now)
        stack.append((names[module], now))

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        now = time.perf_counter()
        passed(now)
        stack.pop()
        if stack:
            stack[-1] = (stack[-1][0], now)

    def pack(t: Tensor) -> Tensor:
        place = t.untyped_storage().data_ptr()
        if stack and place not in seen:
            kept_bytes[stack[-1][0]] = kept_bytes.get(stack[-1][0], 0) + t.untyped_storage().nbytes()
        return t

    hooks = [m.register_forward_pre_hook(enter) for m in names] + [m.register_forward_hook(leave) for m in names]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            yield times, kept_bytes
    finally:
        for hook in hooks:
            hook.remove()


def _what(path: str, module: nn.Module, kinds: dict[str, str]) -> str:
    """Name what a module's own time is spent on."""
    name = type(module).__name__
    if isinstance(module, nn.Linear) or name.endswith("Linear"):
        return "language-model head" if kinds.get(path) == "language-model head" else "linear layers"
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return "convolutions"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if "Norm" in name:
        return "norms"
    if "Attention" in name:
        return "attention and rotations"
    if "MLP" in name or "Activation" in name or isinstance(module, (nn.GELU, nn.SiLU)):
        return "activations and products of MLPs"
    if name.endswith(("Layer", "Block")):
        return "residual sums"
    return "the rest: masks, merges, positions, loss"
