"""Draw the curves of the report, as SVG, and pictures of features, as PNG."""

import io
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from mmlm_benchmarks.report.schema import CurvePoint, MemoryPoint, Rates, Row, ScalingPoint, Training

COLOURS = {"mmlm_fast": "#0b6e4f", "torch.compile": "#d98e04", "eager": "#777777", "transformers": "#777777"}


def _image(figure: Any, kind: str = "svg") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, bbox_inches="tight", format=kind)
    plt.close(figure)
    return buffer.getvalue()


def learning_curves(trainings: list[Training]) -> bytes:
    """Draw loss over epochs, of training and on held-out samples, one panel a training."""
    columns = 3
    count = -(-len(trainings) // columns)
    figure, panels = plt.subplots(count, columns, figsize=(10, 2.3 * count), squeeze=False)
    for axes in panels.flat[len(trainings) :]:
        axes.set_visible(False)
    for axes, training in zip(panels.flat, trainings, strict=False):
        for key, colour, label in (("loss", "#777777", "training"), ("eval_loss", "#0b6e4f", "held out")):
            points = [(h["epoch"], h[key]) for h in training["history"] if key in h]
            axes.plot(*zip(*points, strict=True), color=colour, label=label, marker="." if key == "eval_loss" else "")
        axes.set_title(training["name"], fontsize=9)
        axes.tick_params(labelsize=7)
        axes.set_ylim(bottom=0)
    panels[0, 0].legend(fontsize=7)
    figure.supxlabel("epochs", fontsize=9)
    figure.supylabel("loss", fontsize=9)
    figure.tight_layout()
    return _image(figure)


def roofline(rows: list[Row], machine: Rates) -> bytes:
    """Draw the rate reached over arithmetic intensity, under the rates measured on this machine."""
    figure, axes = plt.subplots(figsize=(8, 4.5))
    counted = [r for r in rows if r["bytes_moved"] and r["flops"]]
    flat, copy = machine["matmul_gflop_per_s"], machine["copy_gb_per_s"]
    x = np.logspace(np.log10(min(r["flops"] / r["bytes_moved"] for r in counted) / 3), 3, 100)
    axes.plot(x, np.minimum(flat, copy * x), color="black", linewidth=1, label="limit measured here, all threads")
    names = ("eager", "transformers", "torch.compile", "mmlm_fast")
    for provider in names:
        points = [
            (r["flops"] / r["bytes_moved"], r["flops"] / r["median_ms"] / 1e6)
            for r in counted
            if r["provider"] == provider
        ]
        if points:
            marker = "o" if provider == "mmlm_fast" else "x"
            axes.scatter(
                [x for x, _ in points],
                [y for _, y in points],
                color=COLOURS[provider],
                marker=marker,
                label=provider,
                s=28,
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("flops per byte that must be moved")
    axes.set_ylabel("GFLOP/s reached")
    axes.set_title("Roofline")
    axes.legend(fontsize=8)
    return _image(figure)


def scaling(points: list[ScalingPoint]) -> bytes:
    """Draw the time of log-mel over clip length."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for provider in dict.fromkeys(p["provider"] for p in points):
        curve = [p for p in points if p["provider"] == provider]
        x, y = [p["seconds"] for p in curve], [p["ms"] for p in curve]
        spread = [[p["ms"] - p["p20_ms"] for p in curve], [p["p80_ms"] - p["ms"] for p in curve]]
        colour = COLOURS["transformers"] if "transformers" in provider else COLOURS["mmlm_fast"]
        axes.errorbar(
            x, y, yerr=spread, marker="o", color=colour, label=provider, linestyle="--" if "2" in provider else "-"
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("seconds of speech")
    axes.set_ylabel("milliseconds")
    axes.set_title("Log-mel over clip length")
    axes.legend(fontsize=8)
    return _image(figure)


def curve(points: list[CurvePoint]) -> bytes:
    """Draw milliseconds, and beside them peak memory, over what changes."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6))
    for provider in dict.fromkeys(p["provider"] for p in points):
        own = [p for p in points if p["provider"] == provider]
        x = [p["x"] for p in own]
        style = {"marker": "o", "color": COLOURS.get(provider, "#777777"), "label": provider}
        spread = [[p["ms"] - p["p20_ms"] for p in own], [p["p80_ms"] - p["ms"] for p in own]]
        panels[0].errorbar(x, [p["ms"] for p in own], yerr=spread, **style)
        peaks = [p["peak_mib"] for p in own]
        if None not in peaks:
            panels[1].plot(x, [max(0.1, peak) for peak in peaks if peak is not None], **style)
    for panel, what in zip(panels, ("milliseconds", "peak MiB of a call"), strict=True):
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xlabel(points[0]["along"])
        panel.set_ylabel(what)
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    return _image(figure)


def batch_memory(points: list[MemoryPoint]) -> bytes:
    """Draw the memory of contrastive losses over the batch."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for op in dict.fromkeys(p["op"] for p in points):
        for provider in dict.fromkeys(p["provider"] for p in points):
            curve = [p for p in points if p["op"] == op and p["provider"] == provider]
            axes.plot(
                [p["batch"] for p in curve],
                [max(0.1, p["mib"]) for p in curve],
                marker="o" if op == "clip_loss" else "s",
                linestyle="-" if op == "clip_loss" else "--",
                color=COLOURS[provider],
                label=f"{op}, {provider}",
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("batch")
    axes.set_ylabel("MiB beyond inputs and gradients")
    axes.set_title("Memory of a training step of the contrastive losses")
    axes.legend(fontsize=8)
    return _image(figure)


def features(arrays: dict[str, np.ndarray]) -> bytes:
    """Draw features, and their error below."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 4.6), sharex=True)
    image = top.imshow(arrays["features"], origin="lower", aspect="auto", cmap="magma")
    figure.colorbar(image, ax=top, fraction=0.03)
    top.set_title("Features of the English sample, 80 mel bins")
    image = bottom.imshow(arrays["error"], origin="lower", aspect="auto", cmap="viridis")
    figure.colorbar(image, ax=bottom, fraction=0.03, format="%.0e")
    bottom.set_title("Absolute error against float64")
    bottom.set_xlabel("frame, 10 ms each")
    return _image(figure, "png")
