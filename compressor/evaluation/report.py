"""Tables and plots of evaluations and training logs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas

from compressor.errors import CompressorError
from compressor.evaluation.figures import FIGURES
from compressor.files import PROJECT, atomic_file, read_json

Row = Mapping[str, Any]

PUBLISHED = PROJECT / "results" / "published.json"
KEYS = ("method", "dataset", "tokens", "length", "n")
ARROWS = {1: " ↑", -1: " ↓", 0: ""}


def _cells(
    rows: Sequence[Row], figures: Sequence[str], intervals: bool = True, keys: Sequence[str] | None = None
) -> list[list[str]]:
    """Heading and one list of cells a row; columns that say nothing (one method, no parts) are left out.

    Args:
        keys: columns that tell rows apart, by default those of a task.
    """
    if keys is None:
        several = {key for key in ("method", "dataset") if len({row.get(key) for row in rows}) > 1}
        found = {key for key in KEYS if any(key in row for row in rows)} - {"method", "dataset"}
        if len(rows) > 1 and all(row.get("length") is None for row in rows):
            found -= {"length"}
        keys = [key for key in KEYS if key in found | several]
    headings = [key.replace("_", " ") for key in keys]
    table = [headings + [FIGURES[f].label + ARROWS[FIGURES[f].direction] for f in figures]]
    for row in rows:
        empty = {"length": "whole"}
        cells = [empty.get(key, "") if row.get(key) is None else str(row[key]) for key in keys]
        for name in figures:
            value, decimals = row.get(name), FIGURES[name].decimals
            cell = "-" if value is None else f"{value:.{decimals}f}"
            low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
            if intervals and FIGURES[name].interval and value is not None and low is not None and high is not None:
                cell += f" [{low:.{decimals}f}, {high:.{decimals}f}]"
            cells.append(cell)
        table.append(cells)
    return table


def _aligned(cells: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _markdown(cells: Sequence[Sequence[str]]) -> str:
    rows = [cells[0], ["---:"] * len(cells[0]), *cells[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def text_table(rows: Sequence[Row], figures: Sequence[str], **options: Any) -> str:
    """Rows of `metrics.json` as aligned text; arrows say which way is better. Options are those of `_cells`."""
    return _aligned(_cells(rows, figures, **options))


def markdown_table(rows: Sequence[Row], figures: Sequence[str], **options: Any) -> str:
    """The same as a Markdown table."""
    return _markdown(_cells(rows, figures, **options))


def load_published() -> dict[str, Any]:
    """The published regeneration figures (`results/published.json`), with their source and base."""
    return read_json(PUBLISHED)


def published_table() -> str:
    """The published figures as a table with a line that says where they are from and on which base."""
    published = load_published()
    cells = [["method", "tokens", *map(str, published["lengths"])]]
    for method, by_tokens in published["methods"].items():
        for tokens, values in by_tokens.items():
            cells.append([method, tokens, *(f"{value:.3f}" for value in values)])
    label = FIGURES[published["figure"]].label
    heading = f"Published {label} by passage length, base {published['base']}. {published['source']}."
    return f"{heading}\n{_aligned(cells)}"


def figure(width: float = 7.0, height: float = 4.5) -> tuple[Canvas, Axes]:
    """A figure of its own, so that nothing depends on pyplot's state or a display."""
    canvas = Canvas(figsize=(width, height), layout="constrained", dpi=150)
    FigureCanvasAgg(canvas)
    axes = canvas.add_subplot()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return canvas, axes


def regeneration_plot(
    rows: Iterable[Row], target: str | os.PathLike[str], published: Mapping[str, Any] | None = None
) -> bool:
    """Draw ROUGE-L against passage length, a line with its band for each number of memory tokens and method.

    Args:
        published: what `load_published` returns, drawn as dashed lines.

    Returns:
        Whether there was anything to draw: rows of whole passages have no place on the axis.
    """
    lines: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["length"] is not None and row.get("rouge_l") is not None:
            lines.setdefault((row.get("method"), row["tokens"]), []).append(row)
    if not lines:
        return False
    canvas, axes = figure()
    several = len({method for method, _ in lines}) > 1
    colours = {tokens: f"C{i}" for i, tokens in enumerate(dict.fromkeys(tokens for _, tokens in lines))}
    markers = dict(zip(dict.fromkeys(method for method, _ in lines), "os^vDPX*" * 8, strict=False))
    for (method, tokens), points in lines.items():
        points = sorted(points, key=lambda row: row["length"])
        x = [row["length"] for row in points]
        name = f"k = {tokens}" + (f", {method}" if several else "")
        axes.plot(x, [row["rouge_l"] for row in points], markers[method] + "-", color=colours[tokens], label=name)
        low, high = ([row[f"rouge_l_{end}"] for row in points] for end in ("low", "high"))
        axes.fill_between(x, low, high, color=colours[tokens], alpha=0.15, linewidth=0)
    if published is not None:
        for (method, by_tokens), dashes in zip(published["methods"].items(), ("--", ":", "-."), strict=False):
            for tokens, values in by_tokens.items():
                colour = colours.get(int(tokens), "0.6")
                name = f"k = {tokens}, {method}"
                axes.plot(published["lengths"], values, dashes, color=colour, alpha=0.6, linewidth=1, label=name)
        axes.set_title(f"dashed and dotted: published, base {published['base']}", fontsize="small")
    axes.set(xlabel="passage length (tokens)", ylabel="ROUGE-L", ylim=(0, 1.02))
    # Beside the axes: lines cross every corner.
    canvas.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize="small", frameon=False)
    canvas.savefig(target)
    return True


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Rows of a training `log.jsonl`, in order.

    Raises:
        CompressorError: the file is missing, or a line of it is not a JSON object with `step`.
    """
    rows = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CompressorError(f"{path} is not a readable training log: {error}") from None
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row["step"]
        except (json.JSONDecodeError, TypeError, KeyError):
            raise CompressorError(f"{path}:{number} is not a row of a training log: {line[:80]!r}") from None
        rows.append(row)
    return rows


def loss_curve(
    log_jsonl_paths: Sequence[str | os.PathLike[str]],
    labels: Sequence[str],
    out_png: str | os.PathLike[str],
    top: float | None = None,
) -> None:
    """Draw training loss (thin) and validation loss of regeneration (dots) in nats a token against passages seen.

    Args:
        top: largest loss that is shown.

    Raises:
        CompressorError: a log cannot be read or has no losses, or there is not one label for each.
    """
    if len(log_jsonl_paths) != len(labels):
        raise CompressorError(f"{len(log_jsonl_paths)} logs need as many labels, got {len(labels)}")
    canvas, axes = figure(height=6.0)
    for number, (path, label) in enumerate(zip(log_jsonl_paths, labels, strict=True)):
        rows = read_log(path)
        trained = [row for row in rows if "loss" in row and "passages" in row]
        if not trained:
            raise CompressorError(f"{path} has no rows with loss and passages: it is no training log, or an empty one")
        axes.plot(
            [row["passages"] for row in trained],
            [row["loss"] for row in trained],
            color=f"C{number}",
            linewidth=0.8,
            alpha=0.6,
            label=label,
        )
        # Validation rows hold the step alone: place them at the passages seen by the last training row before.
        seen, validated = 0, []
        for row in rows:
            seen = row.get("passages", seen)
            if "validation_loss" in row:
                # The answer stage's own loss is the answers'.
                validated.append((seen, row.get("validation_regeneration_loss", row["validation_loss"])))
        if validated:
            axes.plot(
                *zip(*validated, strict=True), "o-", color=f"C{number}", markersize=3, label=f"{label}, validation"
            )
    axes.set(xlabel="passages seen", ylabel="loss (nats/token)")
    if top is not None:
        axes.set_ylim(top=top)
    # Below the axes: lines cross every corner.
    canvas.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small", frameon=False
    )
    with atomic_file(out_png) as path:
        canvas.savefig(path, format=path.suffix[1:] or "png")
