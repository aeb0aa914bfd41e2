"""A task of evaluation, and its items on their way: batches on every process, results, rows with intervals."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from compressor.data.batches import tokenise
from compressor.data.questions import HUB_NAMES
from compressor.data.rows import LeftOut
from compressor.data.sources import resolve as resolve_data
from compressor.data.sources import stem_of
from compressor.evaluation.metrics import FigureOf, interval, resampled_figures
from compressor.evaluation.settings import ItemSettings
from compressor.files import sha256
from compressor.methods.interface import Method, Piece
from compressor.progress import Progress
from compressor.unfinished import Unfinished

Result = dict[str, Any]
"""What an item left at one size, ready for JSON: a line of `predictions.jsonl` and the columns of its figures. Of an
item that was not run it holds the reason under `LEFT_OUT` and nothing else."""
LEFT_OUT = "left_out"
BEYOND = "beyond_positions"
"""Reason: what the decoder would read does not fit into the positions of the base."""
TOKENISED_TOGETHER = 256
Results = Mapping[int | None, Sequence[Result]]
"""Results of a method: for each size (None where it has none), one for each item."""
BOUNDS = ("full", "none", "full-tuned", "none-tuned")
"""Methods that the others are compared with, item by item."""
MACRO = "macro"
"""Name of the rows that average the figures of all data sets, each of which counts the same."""


@dataclass(frozen=True)
class Item:
    """A passage to compress, what is asked about it, and the row of the table it belongs to."""

    id: str
    passage: list[int]
    """Token ids, already cut."""
    length: int | None = None
    """Tokens it was cut to, None for a whole passage."""
    dataset: str = ""
    """Name of the data set it is from."""
    asked: Mapping[str, Any] = field(default_factory=dict)
    """What the task asks about the passage."""


class Task:
    """What the runner needs to know of a task. A new one is a subclass in `tasks/` and a line in `TASKS`.

    Args:
        config: settings of the task, where it is another one by them.
    """

    figures: Mapping[str, FigureOf]
    """Figures of a row in the order of the table. Columns named `full_X`, `none_X`, `full_tuned_X` and `none_tuned_X`
    are column X of the same item under these methods; figures that need them are left out where the method was not
    run."""
    default_data: Sequence[str]
    """Data sets that are measured where none is named."""
    needs: str = ""
    """What to name with `--data`, of a task without such."""
    bounds: Sequence[str] = ()
    """Methods that are run beside the checkpoint's own where none is named; tuned ones where their prefixes are."""

    template: str | None = None
    """The task's own prompt of a question, before the checkpoint's; see `question_ids`."""

    def __init__(self, config: Any = None) -> None:
        self.left_out = LeftOut()
        """What `load` and `items` count as left out; the runner keeps one for each data set."""

    def load(self, source: str, config: Any) -> Any:
        """The records of a data set, in their order."""
        raise NotImplementedError

    def items(self, records: Any, tokenizer: Any, config: Any) -> list[Item]:
        """Items from what `load` returned."""
        raise NotImplementedError

    def lengths(self, config: Any) -> list[int | None]:
        """Lengths that rows are reported for, apart for each data set; None for whole passages."""
        return list(getattr(config, "lengths", [])) or [None]

    def batches(self, items: Sequence[Item], batch_size: int) -> list[list[int]]:
        """Indices of the items that are run together: of similar length, the longest first, so that too little memory
        shows at once."""
        order = sorted(range(len(items)), key=lambda i: -len(items[i].passage))
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def room(self, item: Item) -> int:
        """Positions that the decoder takes after the item's context: prompt, and what is written or scored."""
        raise NotImplementedError

    def beyond(self, method: Method, items: Sequence[Item], contexts: Sequence[list[Piece]]) -> list[bool]:
        """Which items of a batch do not fit into the base's positions, where it would write noise."""
        most = method.base.positions
        return [
            most is not None and method.reach(pieces) + self.room(item) > most
            for item, pieces in zip(items, contexts, strict=True)
        ]

    def run(self, method: Method, items: Sequence[Item], contexts: Sequence[list[Piece]]) -> list[Result]:
        """Results of a batch at one size; `contexts` holds the pieces of each item's passage."""
        raise NotImplementedError

    def columns(self, result: Result) -> dict[str, float]:
        """The numbers of one result that are summed over a row."""
        raise NotImplementedError

    def note(self) -> str:
        """What a reader of the table must know about its figures."""
        return ""

    def cautions(self, results: Sequence[Result]) -> dict[str, int]:
        """Of the results of a data set, how many give a reason not to trust a figure: a sentence's end, and a count."""
        return {}


def tokenised(texts: Sequence[str], tokenizer: Any) -> Iterator[tuple[int, list[int]]]:
    """Place and token ids (no special tokens) of each text, tokenised a batch at a time as they are asked for."""
    for start in range(0, len(texts), TOKENISED_TOGETHER):
        yield from enumerate(tokenise(tokenizer, texts[start : start + TOKENISED_TOGETHER]), start)


@torch.no_grad()
def run_batches(
    task: Task,
    method: Method,
    items: Sequence[Item],
    tokens: Sequence[int],
    batch_size: int,
    accelerator: Accelerator,
    parts: Unfinished,
    of: str = "",
) -> dict[int | None, list[Result]] | None:
    """Results for each size and item on the main process, None on the others; those in `parts` are not made again.

    Args:
        of: what tells these items from others that the same method is run on.
    """
    name = method.name + of
    sizes: list[int | None] = list(tokens) if method.sized else [None]
    found = {(part["tokens"], part["place"]): part["result"] for part in parts.parts if part["method"] == name}
    batches = [
        batch
        for batch in task.batches(items, batch_size)
        if any((size, place) not in found for size in sizes for place in batch)
    ]
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    done: list[dict[str, Any]] = []
    progress = Progress(method.name, len(mine), "batches", accelerator.is_main_process)
    for batch in mine:
        chosen = [items[i] for i in batch]
        # Several questions may be about one passage.
        passages = list({id(item.passage): item.passage for item in chosen}.values())
        place = {id(passage): number for number, passage in enumerate(passages)}
        of_batch: list[dict[str, Any]] = []
        for size, compressed in zip(sizes, method.compress(passages, tokens), strict=True):
            contexts = [compressed[place[id(item.passage)]] for item in chosen]
            results = run_fitting(task, method, chosen, contexts)
            of_batch += [
                {"method": name, "tokens": size, "place": i, "id": items[i].id, "result": result}
                for i, result in zip(batch, results, strict=True)
            ]
        parts.add(of_batch)
        done += of_batch
        progress.add()
    progress.close()
    gathered = gather_object(done)
    if not accelerator.is_main_process:
        return None
    found |= {(part["tokens"], part["place"]): part["result"] for part in gathered}
    return {size: [found[size, i] for i in range(len(items))] for size in sizes}


def run_fitting(task: Task, method: Method, items: Sequence[Item], contexts: Sequence[list[Piece]]) -> list[Result]:
    """Results of a batch; items beyond the base's positions are not run."""
    beyond = task.beyond(method, items, contexts)
    fitting = [place for place, over in enumerate(beyond) if not over]
    found = iter(task.run(method, [items[i] for i in fitting], [contexts[i] for i in fitting]) if fitting else [])
    return [{LEFT_OUT: BEYOND} if over else next(found) for over in beyond]


def items_hash(items: Any) -> str:
    """SHA-256 over all that is measured: items, or records."""
    digest = hashlib.sha256()
    for item in items:
        shown = item if isinstance(item, dict) else asdict(item)
        digest.update(json.dumps(shown, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def data_names(sources: Sequence[str]) -> dict[str, str]:
    """A short name for each data set: the file's or folder's, or what was written where two would be the same."""
    short = {source: stem_of(Path(source)) if Path(source).exists() else source for source in sources}
    names = list(short.values())
    return {source: name if names.count(name) == 1 and name != MACRO else source for source, name in short.items()}


def describe_data(source: str, config: ItemSettings, records: Any) -> dict[str, Any]:
    """Source and SHA-256 of the data: of the file if there is one, else of all records."""
    named = source if Path(source).exists() else HUB_NAMES.get(source, source)
    places = resolve_data(named, split=config.split)
    described = {"source": source, "split": config.split, "records": len(records)}
    if len(places) == 1 and isinstance(places[0], Path):
        return described | {"sha256": sha256(places[0]), "sha256_of": "file"}
    return described | {"sha256": items_hash(records), "sha256_of": "records"}


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
