"""Items through methods, a batch at a time: on every process, kept as they are made; and what data they are of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from compressor.data.questions import HUB_NAMES
from compressor.data.sources import resolve as resolve_data
from compressor.data.sources import stem_of
from compressor.evaluation.rows import MACRO
from compressor.evaluation.settings import ItemSettings
from compressor.evaluation.tasks.interface import BEYOND, LEFT_OUT, Item, Result, Task
from compressor.files import sha256
from compressor.methods.interface import Method, Piece
from compressor.progress import Progress
from compressor.unfinished import Unfinished


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


def items_hash(items: Sequence[Item]) -> str:
    """SHA-256 over all that is measured."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(asdict(item), sort_keys=True, default=str).encode())
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
    digest = hashlib.sha256()
    for record in records:
        shown = record if isinstance(record, dict) else asdict(record)
        digest.update(json.dumps(shown, sort_keys=True, default=str).encode())
    return described | {"sha256": digest.hexdigest(), "sha256_of": "records"}
