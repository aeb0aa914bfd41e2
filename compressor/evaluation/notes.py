"""What a reader of an evaluation's table must know: intervals, items left out, figures not to trust."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from compressor.data.rows import LeftOut
from compressor.evaluation.figures import FIGURES
from compressor.evaluation.items import BEYOND, Item, Results, Task, left_out_of
from compressor.evaluation.methods import Methods
from compressor.evaluation.metrics import LEVEL


def row_notes(task: Task, rows: Sequence[dict[str, Any]]) -> list[str]:
    """How to read the rows, and which say little."""
    lines = [
        f"n: items; [low, high]: {LEVEL:.0%} bootstrap interval over items (without width where all "
        "items score the same, which says little about others).",
        task.note(),
    ]
    for dataset in dict.fromkeys(row["dataset"] for row in rows if row["n"] == 0):
        lengths = sorted({row["length"] or 0 for row in rows if row["n"] == 0 and row["dataset"] == dataset})
        of_length = f" of length {', '.join(map(str, lengths))}" if any(lengths) else ""
        lines.append(f"{dataset} has no items for some rows{of_length}.")
    for row in rows:
        for name in task.figures if row["method"] == "none" else ():
            if name.endswith("_difference") and row.get(f"{name}_high") is not None and row[f"{name}_high"] >= 0:
                shown = ", ".join(f"{row[name + end]:.{FIGURES[name].decimals}f}" for end in ("", "_low", "_high"))
                lines.append(
                    f"{row['dataset']}: reading the whole passage is not better than reading none for certain "
                    f"({FIGURES[name].label} of none, with its interval: {shown}): shares of what it adds say little."
                )
    return [line for line in lines if line]


def segment_notes(items: Sequence[Item], most: int | None) -> list[str]:
    """What the column `tokens` counts where passages are longer than a segment."""
    several = [math.ceil(len(item.passage) / most) for item in items if most and len(item.passage) > most]
    if not several:
        return []
    return [
        f"tokens: of each segment. {len(several):,} of {len(items):,} passages have more than the {most:,} tokens of a "
        f"segment: they are compressed in {sum(several) / len(several):.2g} on average, "
        "each of which has so many memory tokens."
    ]


def cautions(task: Task, items: Sequence[Item], results: Mapping[str, Results]) -> list[str]:
    """What makes a figure of a data set untrustworthy, with the share of its items."""
    without = left_out_of(results)
    first = next(iter(next(iter(results.values())).values()))  # what a caution is about is the same for all methods
    lines = []
    for dataset in dict.fromkeys(item.dataset for item in items):
        of_data = [
            result
            for place, (item, result) in enumerate(zip(items, first, strict=True))
            if item.dataset == dataset and place not in without
        ]
        lines += [
            f"{dataset}: {share_of(count, len(of_data))} {what}."
            for what, count in task.cautions(of_data).items()
            if count
        ]
    return lines


def left_out_counts(items: Sequence[Item], results: Mapping[str, Results]) -> dict[str, Any]:
    """For each data set how many items no row has, and the first of them, by reason."""
    found: dict[str, Any] = {item.dataset: {} for item in items}
    for place, (reason, method) in left_out_of(results).items():
        counted = found[items[place].dataset].setdefault(reason, {"count": 0, "first": items[place].id, "by": method})
        counted["count"] += 1
    return found


def beyond_notes(items: Sequence[Item], results: Mapping[str, Results], methods: Methods) -> list[str]:
    """A sentence for each data set with items that do not fit into the base."""
    counts = Counter(item.dataset for item in items)
    positions = methods.base_record()["positions"]
    return [
        f"{dataset}: {share_of(one['count'], counts[dataset])} are left out of every row: with {one['by']} they do not "
        f"fit into the base's {positions:,} positions, beyond which it writes noise."
        for dataset, reasons in left_out_counts(items, results).items()
        for one in [reasons.get(BEYOND)]
        if one
    ]


def share_of(count: int, total: int) -> str:
    """3 of 40 items (7.5%)."""
    return f"{count:,} of {total:,} items ({count / total:.1%})"


def left_out_notes(items: Sequence[Item], names: Mapping[str, str], ledgers: Mapping[str, LeftOut]) -> list[str]:
    """A sentence for each data set that something was left out of."""
    kept = Counter(item.dataset for item in items)
    lines = [(names[source], ledger.line("records", kept[names[source]])) for source, ledger in ledgers.items()]
    return [f"{name}: {line}." for name, line in lines if line]


def surroundings_note(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What an evaluation that was interrupted went on with, if it is something else."""
    old, new = ({**one["versions"], "device": one["device"]} for one in (before, now))
    changed = [f"{name} {old.get(name)}, then {new[name]}" for name in new if old.get(name) != new[name]]
    return [f"Made in parts, with {'; '.join(changed)}: last digits may depend on that."] if changed else []
