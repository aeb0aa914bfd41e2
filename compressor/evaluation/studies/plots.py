"""Plots of the studies: heat maps and bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from compressor.evaluation.report import Row


def _panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    """A figure with a grid of axes, apart from pyplot's state."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    return figure, [list(line) for line in figure.subplots(rows, columns, squeeze=False)]


def _heat(
    figure: Figure, axes: Axes, values: Any, labels: tuple[str, str, str], extent: Sequence[float] | None
) -> None:
    """A heat map; differences of both signs get a colour scale with white at 0."""
    table = np.array(values, dtype=float)
    most = float(np.nanmax(np.abs(table))) or 1.0
    signed = bool((table < 0).any())
    image = axes.imshow(
        table,
        aspect="auto",
        origin="lower",
        cmap="RdBu_r" if signed else "viridis",
        vmin=-most if signed else 0,
        vmax=most,
        extent=None if extent is None else (extent[0], extent[1], extent[2], extent[3]),
        interpolation="nearest",
    )
    axes.set(xlabel=labels[0], ylabel=labels[1])
    figure.colorbar(image, ax=axes, label=labels[2])


def utilisation_plots(rows: Sequence[Row], maps: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """`utilisation.png` (loss added by each token and layer), `attention.png` (layer by token) and `reading.png` (part
    of the text by token: attention, and loss added by removing the token)."""
    figure, grid = _panels(len(maps), 2, 6.0, 3.2)
    for line, one in zip(grid, maps, strict=True):
        for axes, part in zip(line, ("token", "layer"), strict=True):
            for offset, kind in ((-0.2, "removed"), (0.2, "shuffled")):
                key = {"task": one["task"], "dataset": one["dataset"], "change": kind, "part": part}
                chosen = [row for row in rows if all(row[name] == value for name, value in key.items())]
                values = np.array([row["loss_increase"] for row in chosen])
                # A percentile interval need not hold the estimate where few items dominate it.
                below = np.maximum(values - [row["loss_increase_low"] for row in chosen], 0)
                above = np.maximum([row["loss_increase_high"] for row in chosen] - values, 0)
                places = np.arange(len(chosen)) + offset
                axes.bar(places, values, 0.4, yerr=[below, above], label=kind, error_kw={"linewidth": 0.8})
            unit = "nats/token" if one["task"] == "regeneration" else "nats/answer"
            axes.set(xlabel=f"memory {part}" if part == "token" else part, ylabel=f"loss added ({unit})")
            axes.set_title(f"{one['task']}, {one['dataset']}", fontsize="small")
            axes.legend(fontsize="small", frameon=False)
    figure.savefig(folder / "utilisation.png")

    figure, grid = _panels(1, len(maps), 5.0, 3.6)
    for axes, one in zip(grid[0], maps, strict=True):
        _heat(figure, axes, one["attention"], ("memory token", "layer", "attention mass"), None)
        axes.set_title(f"{one['task']}, {one['dataset']}", fontsize="small")
    figure.savefig(folder / "attention.png")

    written = [one for one in maps if "attention_parts" in one]
    if not written:
        return
    figure, grid = _panels(len(written), 2, 5.5, 3.8)
    for line, one in zip(grid, written, strict=True):
        extent = (0.0, 1.0, -0.5, len(one["attention_parts"]) - 0.5)
        for axes, name, label in (
            (line[0], "attention_parts", "attention mass"),
            (line[1], "removed_parts", "nats/token added by removing it"),
        ):
            _heat(figure, axes, one[name], ("position written (share of passage)", "memory token", label), extent)
            axes.set_title(f"{one['task']}, {one['dataset']}", fontsize="small")
    figure.savefig(folder / "reading.png")


def efficiency_plot(rows: Sequence[Row], tokens: int, folder: Path) -> None:
    """`efficiency.png`: what is saved with so many memory tokens against the full passage, by prompt and new tokens."""
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    figure, grid = _panels(1, len(prompts), 5.2, 3.8)
    names = {
        "flops_saved": "FLOPs",
        "kv_saved": "KV bytes",
        "time_saved": "time, measured",
        "peak_saved": "peak memory, measured",
    }
    for axes, prompt in zip(grid[0], prompts, strict=True):
        chosen = [row for row in rows if row["prompt"] == prompt and row["tokens"] == tokens]
        bases = list(dict.fromkeys(row["base"] for row in chosen))
        bars = [
            (base, name)
            for base in bases
            for name in names
            if any(row["base"] == base and row.get(name) is not None for row in chosen)
        ]
        steps = sorted({row["new_tokens"] for row in chosen})
        for number, (base, name) in enumerate(bars):
            of_base = {row["new_tokens"]: row[name] for row in chosen if row["base"] == base}
            places = np.arange(len(steps)) + (number - (len(bars) - 1) / 2) * 0.8 / len(bars)
            axes.bar(places, [of_base[step] for step in steps], 0.8 / len(bars), label=f"{names[name]}, {base}")
        axes.set_xticks(np.arange(len(steps)), [str(step) for step in steps])
        axes.set(xlabel="new tokens", ylabel=f"saved by {tokens} memory tokens (%)")
        axes.set_title(prompt, fontsize="small")
        axes.axhline(0, color="0.3", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(folder / "efficiency.png")
