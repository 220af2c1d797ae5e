"""Figures of the report, as PNG bytes."""

import io
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

COLOURS = {"mmlm_fast": "#0b6e4f", "torch.compile": "#d98e04", "eager": "#777777", "transformers": "#777777"}
OTHER = ["#4c78a8", "#b279a2", "#9d755d", "#e45756", "#72b7b2"]
Rows = list[dict[str, Any]]


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


def _cases(rows: Rows) -> list[str]:
    return list(dict.fromkeys(r["case"] for r in rows))


def _colour(provider: str, providers: list[str]) -> str:
    others = [p for p in providers if p not in COLOURS]
    return COLOURS.get(provider) or OTHER[others.index(provider) % len(OTHER)]


def speedups(rows: Rows, title: str) -> bytes:
    """Horizontal bars: how many times as fast ours is as each alternative, with the 20th to 80th percentile."""
    shown = [r for r in rows if not r["ours"]]
    providers = list(dict.fromkeys(r["provider"] for r in shown))
    labels, y = [], 0.0
    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.34 * (len(shown) + 0.6 * len(_cases(rows)))))
    for case in _cases(rows):
        for r in (r for r in shown if r["case"] == case):
            value, low, high = r["ours_faster"], r["ours_faster_p20"], r["ours_faster_p80"]
            colour = _colour(r["provider"], providers)
            axes.barh(y, value, color=colour, height=0.85, xerr=[[value - low], [high - value]], ecolor="#333")
            axes.text(high, y, f"  {value:.2f}×", va="center", fontsize=8)
            labels.append((y, f"{case}, against {r['provider']}"))
            y -= 1
        y -= 0.6
    axes.set_yticks([p for p, _ in labels], [t for _, t in labels], fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlim(0, 1.15 * max(r["ours_faster_p80"] for r in shown))
    axes.set_xlabel("times as fast as the alternative; below 1, left of the line, ours is slower")
    axes.set_title(title)
    return _png(figure)


def peers(rows: Rows) -> bytes:
    """Milliseconds of every audio provider, logarithmic."""
    cases = _cases(rows)
    providers = list(dict.fromkeys(r["provider"] for r in rows))
    figure, axes = plt.subplots(figsize=(9, 0.8 + 0.32 * (len(rows) + len(cases))))
    labels, y = [], 0.0
    for case in cases:
        for r in sorted((r for r in rows if r["case"] == case), key=lambda r: r["median_ms"]):
            whisker = [[r["median_ms"] - r["p20_ms"]], [r["p80_ms"] - r["median_ms"]]]
            axes.barh(
                y, r["median_ms"], color=_colour(r["provider"], providers), height=0.85, xerr=whisker, ecolor="#333"
            )
            axes.text(r["p80_ms"], y, f"  {r['median_ms']:.3g} ms", va="center", fontsize=8)
            labels.append((y, f"{case} — {r['provider']}"))
            y -= 1
        y -= 0.6
    axes.set_yticks([p for p, _ in labels], [t for _, t in labels], fontsize=8)
    axes.set_xscale("log")
    axes.margins(y=0.01)
    axes.set_xlim(right=4 * max(r["p80_ms"] for r in rows))
    axes.set_xlabel("milliseconds a call, one thread, logarithmic; shorter is better")
    axes.set_title("Audio features of real speech")
    return _png(figure)


def learning_curves(trainings: Rows) -> bytes:
    """Loss over epochs, of training and on held-out samples, one panel a training."""
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
    return _png(figure)


def roofline(rows: Rows, machine: dict[str, float]) -> bytes:
    """Achieved rate over arithmetic intensity, under the rates measured on this machine."""
    figure, axes = plt.subplots(figsize=(8, 4.5))
    shown = [r for r in rows if r["bytes_moved"] and r["flops"]]
    flat, copy = machine["matmul_gflop_per_s"], machine["copy_gb_per_s"]
    x = np.logspace(np.log10(min(r["flops"] / r["bytes_moved"] for r in shown) / 3), 3, 100)
    axes.plot(x, np.minimum(flat, copy * x), color="black", linewidth=1, label="limit measured here, all threads")
    names = ("eager", "transformers", "torch.compile", "mmlm_fast")
    for provider in names:
        points = [
            (r["flops"] / r["bytes_moved"], r["flops"] / r["median_ms"] / 1e6)
            for r in shown
            if r["provider"] == provider
        ]
        if points:
            marker = "o" if provider == "mmlm_fast" else "x"
            axes.scatter(*zip(*points, strict=True), color=COLOURS[provider], marker=marker, label=provider, s=28)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("flops per byte that must be moved")
    axes.set_ylabel("GFLOP/s reached")
    axes.set_title("Roofline")
    axes.legend(fontsize=8)
    return _png(figure)


def memory(rows: Rows) -> bytes:
    """Peak memory of baseline, torch.compile and ours."""
    rows = [r for r in rows if r["peak_mib"] is not None and r["provider"] in COLOURS]
    cases = _cases(rows)
    names = [p for p in COLOURS if any(r["provider"] == p for r in rows)]
    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.3 * len(cases) * len(names)))
    ticks = []
    for i, case in enumerate(cases):
        group = [r for r in rows if r["case"] == case]
        for j, r in enumerate(group):
            y = -i - 0.8 * j / max(1, len(group))
            axes.barh(y, max(r["peak_mib"], 0.01), height=0.8 / len(group), color=COLOURS[r["provider"]])
            axes.text(max(r["peak_mib"], 0.01), y, f"  {r['peak_mib']:.1f}", va="center", fontsize=7)
        ticks.append((-i - 0.25, case))
    axes.set_yticks([p for p, _ in ticks], [t for _, t in ticks], fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(right=4 * max(r["peak_mib"] for r in rows))
    axes.set_xlabel("MiB beyond what is held before the call, logarithmic")
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[p]) for p in names]
    axes.legend(handles, names, fontsize=8)
    axes.set_title("Peak memory of a call")
    return _png(figure)


def scaling(points: Rows) -> bytes:
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
    return _png(figure)


def batch_memory(points: Rows) -> bytes:
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
    return _png(figure)


def features(arrays: dict[str, np.ndarray]) -> bytes:
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 4.6), sharex=True)
    image = top.imshow(arrays["features"], origin="lower", aspect="auto", cmap="magma")
    figure.colorbar(image, ax=top, fraction=0.03)
    top.set_title("Features of the English sample, 80 mel bins")
    image = bottom.imshow(arrays["error"], origin="lower", aspect="auto", cmap="viridis")
    figure.colorbar(image, ax=bottom, fraction=0.03, format="%.0e")
    bottom.set_title("Absolute error against float64")
    bottom.set_xlabel("frame, 10 ms each")
    return _png(figure)
