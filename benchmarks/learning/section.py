"""Write what the report, and README, say of the trainings."""

import html
from collections.abc import Callable

from mmlm_benchmarks.report.schema import Picture, Training
from mmlm_benchmarks.tables import LEFT, markdown_table

INTRODUCTION = (
    "Each training below is a shipped configuration on real data. “Shuffled” repeats the evaluation with one "
    "modality taken from other samples; the interval is of the mean loss of score by that (95 %, bootstrap over "
    "samples). Where it lies above 0 the model uses the modality."
)
DATA = {
    "digits": "Handwritten digits (UCI, by scikit-learn; the last 400 held out) with spoken ones and text in English, "
    "Spanish and French. Each spoken digit has one reading in a language: what is heard in evaluation is that reading "
    "with other noise, level and speed, so that nothing is said about other speakers. “question” asks in one of three "
    "languages after the written digit or the spoken one: without text, picture or sound about 55 % can be right. It "
    "goes on from “pairs”. BLEU needs four words, a spoken digit is one.",
    "stamps": "Tux Paint's stamps with captions and readings in English, Spanish and French; a fifth held out, by "
    "caption. The text tower is MiniLM's, frozen, where the package that carries it is installed.",
}


def first_metric(training: Training) -> tuple[str, float]:
    """Return name and value of what confidence intervals are of."""
    return next((k, v) for k, v in training["metrics"].items() if isinstance(v, float))


def table(trainings: list[Training]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the header, and a line for each training with its controls."""
    header = (
        "training",
        "samples",
        "metric",
        "value (95 %)",
        "chance",
        "shuffled: value, loss (95 %)",
        "seconds",
        "also",
    )
    lines: list[tuple[str, ...]] = []
    for t in trainings:
        name, value = first_metric(t)
        low_high = t["metrics"].get(f"{name}_interval")
        around = f" ({low_high[0]:.3f} – {low_high[1]:.3f})" if low_high else ""
        also = [
            f"{k} {v:.3f}"
            for k, v in t["metrics"].items()
            if isinstance(v, float) and k != name and k not in ("chance_at_1",)
        ]
        for direction, values in t["metrics"].items():
            if isinstance(values, dict):
                also.append(
                    f"{direction.replace('_', ' ')} R@1/5/10 "
                    + "/".join(f"{values[f'recall_at_{k}']:.2f}" for k in (1, 5, 10))
                )
        controls = []
        for modality, control in t["controls"].items():
            low, high = control["loss_interval"] or (float("nan"),) * 2
            controls.append(f"{modality} {control['metrics'][name]:.3f}, {low:.3f} – {high:.3f}")
        counts = t["num_samples"]
        lines.append(
            (
                t["name"],
                f"{counts['train']} / {counts['eval']}",
                name,
                f"{value:.3f}{around}",
                "" if t["chance"] is None else f"{t['chance']:.3f}",
                "; ".join(controls),
                f"{t['seconds']:.0f}",
                "; ".join(also),
            )
        )
    return header, lines


def sentences(trainings: list[Training]) -> list[str]:
    """Say what the data are, and which modality was not used."""
    paragraphs = [INTRODUCTION, *(DATA[d] for d in dict.fromkeys(t["data"] for t in trainings))]
    paragraphs.append(f"Seeds: {', '.join(sorted({str(t['seed']) for t in trainings}))}.")
    unused = [f"{t['name']}: {m}" for t in trainings for m, c in t["controls"].items() if not c["used"]]
    if unused:
        paragraphs.append("Not shown to be used: " + "; ".join(unused) + ".")
    return paragraphs


def markdown(trainings: list[Training]) -> str:
    """Write the table of trainings in Markdown."""
    header, lines = table(trainings)
    return markdown_table(header, lines, alignment=[f" {LEFT} "] * len(header))


def markdown_parts(trainings: list[Training]) -> list[str]:
    """Write the section of report.md."""
    paragraphs = [f"{s}\n" for s in sentences(trainings)]
    return ["## Learning on real data", "", *paragraphs, markdown(trainings), ""]


def html_parts(trainings: list[Training], figure: Callable[[bytes, str], str]) -> list[str]:
    """Write the section of index.html, with figures as `figure` writes them."""
    from mmlm_benchmarks.report import plots

    header, lines = table(trainings)
    head = "".join(f"<th>{c}</th>" for c in header)
    body = "".join("<tr>" + "".join(f"<td>{_cell(c)}</td>" for c in line) + "</tr>" for line in lines)
    parts = ["<h2>Learning on real data</h2>", *(f"<p>{html.escape(s)}</p>" for s in sentences(trainings))]
    parts.append(f'<div class="wide lines"><table><tr>{head}</tr>{body}</table></div>')
    parts.append(figure(plots.learning_curves(trainings), "Loss over epochs"))
    for t in trainings:
        if t["gallery"]:
            parts.append(f"<h3>{html.escape(t['name'])}</h3><div class=gallery>{_gallery(t['gallery'])}</div>")
        if "classification_report" in t["metrics"]:
            classes, name = html.escape(t["metrics"]["classification_report"]), html.escape(t["name"])
            parts.append(f"<details><summary>Classification report: {name}</summary><pre>{classes}</pre></details>")
    return parts


def _cell(text: str) -> str:
    """Write what is listed, one thing a line."""
    return html.escape(text).replace("; ", "<br>")


def _gallery(pictures: list[Picture]) -> str:
    cells = []
    for row in pictures:
        said, text, wanted = html.escape(row["said"]), html.escape(row["text"]), html.escape(row["reference"])
        wrong = " class=bad" if row["said"].strip() != row["reference"].strip() else ""
        answer = f"<b{wrong}>{said}</b>" if row["said"] else ""
        expected = f"<i>{wanted}</i>" if wrong else ""
        image = f'<img alt="{text}" src="data:image/png;base64,{row["png"]}">'
        cells.append(f"<figure>{image}<figcaption>{text}<br>{answer}<br>{expected}</figcaption></figure>")
    return "".join(cells)
