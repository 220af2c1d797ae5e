"""Model cards: what was trained on what, and what it is worth."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

TAGS = {
    "classification": "text-classification",
    "retrieval": "feature-extraction",
    "speech_recognition": "automatic-speech-recognition",
    "image_generation": "text-to-image",
    "pretraining": "feature-extraction",
}


def write_card(folder: Path, result: dict[str, Any], examples: Sequence[dict[str, Any]], model: Any) -> None:
    """README.md of a trained model, with the metadata that the hub reads."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    tag = TAGS.get(result["task"], "image-text-to-text")
    numbers = {k: v for k, v in result["metrics"].items() if isinstance(v, float)}
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=tag,
        tags=["mmlm-fast", "multimodal", result["preset"]],
        model_name=folder.resolve().name,
        eval_results=[
            EvalResult(
                task_type=tag, dataset_type="held-out", dataset_name="held-out samples", metric_type=k, metric_value=v
            )
            for k, v in numbers.items()
        ],
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(folder, result, examples)}").save(folder / "README.md")


def _text(folder: Path, result: dict[str, Any], examples: Sequence[dict[str, Any]]) -> str:
    counts = result["num_samples"]
    lines = [
        f"# {folder.resolve().name}",
        "",
        f"Preset `{result['preset']}` of mmlm-fast, task {result['task']}, fusion {result['fusion']}, modalities "
        f"{', '.join(result['modalities'])}; {result['num_parameters']:,} parameters; seed {result['seed']}; trained on"
        " "
        f"{counts['train']} samples, judged on {counts['eval']} others, in {result['seconds']:.0f} s.",
        "",
        "## Metrics",
        "",
        "| metric | value |",
        "|---|---:|",
        *(f"| {k} | {_shown(v)} |" for k, v in result["metrics"].items() if isinstance(v, (float, list))),
    ]
    if result["chance"] is not None:
        lines.append(f"| chance | {result['chance']:.4f} |")
    if result["controls"]:
        lines += ["", "## Shuffled-modality controls", "", control_sentence(), "", *control_table(result)]
    if "classification_report" in result["metrics"]:
        lines += ["", "## Classification report", "", "```", result["metrics"]["classification_report"].rstrip(), "```"]
    if examples:
        lines += ["", "## Examples", "", "| input | reference | model |", "|---|---|---|"]
        lines += [f"| {_cell(e['text'])} | {_cell(e['reference'])} | {_cell(e['prediction'])} |" for e in examples]
    if result["bad_samples"]:
        lines += ["", f"## {len(result['bad_samples'])} bad samples were left out", ""]
        lines += [f"- {problem}" for problem in result["bad_samples"][:50]]
    return "\n".join(lines) + "\n"


def summary_lines(result: dict[str, Any]) -> list[str]:
    """The numbers in a few lines of plain text."""
    lines = [f"{k}: {_shown(v)}" for k, v in result["metrics"].items() if isinstance(v, (float, list))]
    if result["chance"] is not None:
        lines.append(f"chance: {result['chance']:.4f}")
    name = next(iter(result["metrics"]), None)
    for modality, control in result["controls"].items():
        low, high = control["loss_interval"]
        lines.append(f"{modality} shuffled: {name} {control['metrics'][name]:.4f}, loss {low:.4f} – {high:.4f}")
    if result["bad_samples"]:
        lines.append(f"bad samples left out: {len(result['bad_samples'])}")
        lines += [f"  {problem}" for problem in result["bad_samples"][:10]]
    return lines


def control_sentence() -> str:
    return (
        "Each row: the same evaluation with one modality taken from another sample. The interval is of the mean loss "
        "of score (95 %, bootstrap over samples); above 0, the model uses the modality."
    )


def control_table(result: dict[str, Any]) -> list[str]:
    """Markdown lines."""
    name = next(iter(result["metrics"]))
    lines = [f"| shuffled | {name} | intact | loss, interval | used |", "|---|---:|---:|---|---|"]
    for modality, control in result["controls"].items():
        low, high = control["loss_interval"]
        lines.append(
            f"| {modality} | {control['metrics'][name]:.3f} | {result['metrics'][name]:.3f} | {low:.3f} – {high:.3f} | "
            f"{'yes' if control['used'] else 'no'} |"
        )
    return lines


def _shown(value: Any) -> str:
    return " – ".join(f"{x:.4f}" for x in value) if isinstance(value, list) else f"{value:.4f}"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
