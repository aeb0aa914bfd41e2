"""From results to the rows of a table: figures with intervals for each method, data set, size and length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from compressor.evaluation.metrics import interval, resampled_figures
from compressor.evaluation.settings import ItemSettings
from compressor.evaluation.tasks.interface import LEFT_OUT, Item, Result, Task

Results = Mapping[int | None, Sequence[Result]]
"""Results of a method: for each size (None where it has none), one for each item."""
BOUNDS = ("full", "none", "full-tuned", "none-tuned")
"""Methods that the others are compared with, item by item."""
MACRO = "macro"
"""Name of the rows that average the figures of all data sets, each of which counts the same."""


def row_key(method: str, dataset: str, tokens: int | None, length: int | None) -> dict[str, Any]:
    """What tells rows apart."""
    return {"method": method, "dataset": dataset, "tokens": tokens, "length": length}


def left_out_of(results: Mapping[str, Results]) -> dict[int, tuple[str, str]]:
    """Reason and first method of each item that some method did not run: no row has it, so that all rows are alike."""
    found: dict[int, tuple[str, str]] = {}
    for method, sizes in results.items():
        for of_size in sizes.values():
            for place, result in enumerate(of_size):
                if LEFT_OUT in result:
                    found.setdefault(place, (result[LEFT_OUT], method))
    return found


def make_rows(
    task: Task, items: Sequence[Item], datasets: Sequence[str], results: Mapping[str, Results], config: ItemSettings
) -> list[dict[str, Any]]:
    """One row for each method, size, data set and length: n, and every figure with its bounds (null without).

    Of several data sets there is also the macro average, whose resamples are those of the data sets.
    """
    without = left_out_of(results)
    columns = {
        method: {
            count: [{} if place in without else task.columns(result) for place, result in enumerate(of_size)]
            for count, of_size in sizes.items()
        }
        for method, sizes in results.items()
    }
    bounds = {name: next(iter(columns[name].values())) for name in BOUNDS if name in columns}
    rows = []
    for method, sizes in columns.items():
        for count, of_size in sizes.items():
            for length in task.lengths(config):
                of_data = []
                for number, dataset in enumerate(datasets):
                    places = [
                        i
                        for i, item in enumerate(items)
                        if (item.dataset, item.length) == (dataset, length) and i not in without
                    ]
                    found = _resampled(task, of_size, bounds, places, config, number)
                    of_data.append((len(places), found))
                    rows.append(_row(task, row_key(method, dataset, count, length), len(places), found))
                if len(datasets) > 1 and all(n for n, _ in of_data):
                    shared = [name for name in task.figures if all(name in found for _, found in of_data)]
                    macro = {name: np.mean([found[name] for _, found in of_data], axis=0) for name in shared}
                    key = row_key(method, MACRO, count, length)
                    rows.append(_row(task, key, sum(n for n, _ in of_data), macro))
    return rows


def _resampled(
    task: Task,
    results: Sequence[dict[str, float]],
    bounds: Mapping[str, Sequence[dict[str, float]]],
    places: Sequence[int],
    config: ItemSettings,
    number: int,
) -> dict[str, np.ndarray]:
    """Every figure that can be had, on all items of a row and on each resample."""
    if not places:
        return {}
    columns = {name: [results[i][name] for i in places] for name in results[places[0]]}
    for bound, of_bound in bounds.items():
        columns |= {
            f"{bound.replace('-', '_')}_{name}": [of_bound[i][name] for i in places] for name in of_bound[places[0]]
        }
    figures = {name: figure for name, figure in task.figures.items() if set(figure.needs) <= set(columns)}
    # Data sets of one size must not be resampled alike: their macro average would look too certain or too uncertain.
    return resampled_figures(columns, figures, config.resamples, config.seed + number)


def _row(task: Task, key: dict[str, Any], count: int, found: Mapping[str, np.ndarray]) -> dict[str, Any]:
    row = {**key, "n": count}
    for name in task.figures:
        # A share of nothing (of the F1 of a full passage that answers nothing, say) is null, as what was not run is.
        defined = name in found and not np.isnan(found[name][0])
        bounds = interval(found[name] + 0.0) if defined else None  # + 0.0: no -0.0
        row[name] = bounds and bounds.value
        row[f"{name}_low"], row[f"{name}_high"] = bounds and bounds.low, bounds and bounds.high
    return row
