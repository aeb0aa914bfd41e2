"""Runs a task over a data set: batches, processes, progress, intervals and the output folder."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from compressor.base import resolve as resolve_path
from compressor.data.records import load_texts
from compressor.data.sources import resolve as resolve_data
from compressor.errors import CompressorError
from compressor.evaluation.command import EvaluationConfig
from compressor.evaluation.contexts import MemoryMethod, Method, check_tokens
from compressor.evaluation.metrics import LEVEL, bleu_signature, bootstrap
from compressor.evaluation.report import load_published, markdown_table, regeneration_plot
from compressor.evaluation.tasks import TASKS, Item, Result, Task, parts
from compressor.files import atomic_path, sha256
from compressor.model import Compressor, read_settings
from compressor.provenance import versions

LINES = 10
"""Progress lines of a run without a terminal."""


def evaluate(
    config: EvaluationConfig,
    accelerator: Accelerator | None = None,
    overwrite: bool = False,
    command: str | None = None,
) -> dict[str, Any] | None:
    """Measure a checkpoint and write the output folder; call on every process.

    Batches are formed before they are shared out, so that every passage is computed in the same company however many
    processes there are, and results are put back in order before they are summed: figures do not depend on them.

    Args:
        overwrite: replace `config.output` if it holds an earlier evaluation.
        command: the command line to record.

    Returns:
        What `metrics.json` holds, on the main process; None on the others.

    Raises:
        CompressorError: bad settings, data or checkpoint; nothing is written then.
    """
    started = time.monotonic()
    accelerator = accelerator or Accelerator()
    output = Path(config.output)
    check_output(output, overwrite)
    task = make_task(config.task)
    published = load_published() if config.published else None
    with accelerator.main_process_first():
        records = load_texts(config.data, split=config.split, field=config.text_field)
    if config.split_date is not None and "date" not in records.column_names:
        raise CompressorError(f"{config.data} has no field 'date', which split_date needs: leave split_date out")
    folder = Path(resolve_path(config.checkpoint))
    if config.tokens and folder.is_dir():
        # Known without the weights: loading a large base takes minutes.
        check_tokens(config.tokens, read_settings(folder)["config"]["memory_tokens"], config.checkpoint)
    model = Compressor.from_pretrained(
        config.checkpoint, base=config.base, device=accelerator.device, dtype=config.dtype
    )
    method = MemoryMethod(model, config.batch_size)
    tokens = config.tokens or [model.config.memory_tokens]
    check_tokens(tokens, method.most, config.checkpoint)
    items = task.items(records, method.base.tokenizer, config)
    if not items:
        wanted = f"at least {min(config.lengths)} tokens" if config.lengths else "at least one token"
        raise CompressorError(f"{config.data} has no passage of {wanted}: ask for smaller lengths or give other data")
    results = run_batches(task, method, items, tokens, config.batch_size, accelerator)
    if results is None:
        return None

    rows = make_rows(task, method, items, tokens, results, config)
    metrics = {
        "task": config.task,
        "figures": list(task.figures),
        "rows": rows,
        "intervals": {"level": LEVEL, "resamples": config.resamples, "seed": config.seed, "over": "passages"},
        "sacrebleu": bleu_signature(),
        "notes": notes(config, rows),
        "checkpoint": {"path": config.checkpoint, "fingerprint": checkpoint_fingerprint(model)},
        "base": {"path": model.base.name, "fingerprint": model.base.fingerprint, "dtype": config.dtype},
        "data": describe_data(config, records),
        "seed": config.seed,
        "command": command,
        "versions": versions(),
        "device": torch.cuda.get_device_name(accelerator.device)
        if accelerator.device.type == "cuda"
        else accelerator.device.type,
        "processes": accelerator.num_processes,
        "seconds": round(time.monotonic() - started, 2),
    }
    with atomic_path(output) as path:
        path.mkdir()
        (path / "metrics.json").write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (path / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False), encoding="utf-8")
        table = markdown_table(rows, metrics["figures"]) + "\n\n" + "\n\n".join(metrics["notes"]) + "\n"
        (path / "table.md").write_text(table, encoding="utf-8")
        with (path / "predictions.jsonl").open("w", encoding="utf-8") as file:
            for count, of_size in zip(tokens, results, strict=True):
                for item, result in zip(items, of_size, strict=True):
                    line = {**row_key(method, item.part, count, item.length), "id": item.id, **result}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
        if config.task == "regeneration":
            regeneration_plot(rows, path / "regeneration.png", published)
    return metrics


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse an output folder that would lose something, or that cannot be written."""
    if output.exists() and not output.is_dir():
        raise CompressorError(f"output = {output} is a file: name a folder")
    if output.is_dir() and any(output.iterdir()):
        if not (output / "metrics.json").exists():
            raise CompressorError(f"output = {output} holds something that is not an evaluation: name another folder")
        if not overwrite:
            raise CompressorError(f"output = {output} holds an evaluation: name another folder, or add --overwrite")
    existing = next(parent for parent in output.absolute().parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise CompressorError(f"output = {output} cannot be written: {existing} is no folder that takes new files")


def make_task(name: str) -> Task:
    """The task of that name; an unknown one is a `CompressorError` that names the nearest."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)
        hint = f"did you mean {near[0]}? " if near else ""
        raise CompressorError(f"there is no task {name!r}; {hint}There are: {', '.join(TASKS)}")
    return TASKS[name]()


def make_batches(items: Sequence[Item], batch_size: int) -> list[list[int]]:
    """Indices of the items in batches of similar length, the longest first so that too little memory shows at once."""
    order = sorted(range(len(items)), key=lambda i: -len(items[i].passage))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@torch.no_grad()
def run_batches(
    task: Task,
    method: Method,
    items: Sequence[Item],
    tokens: Sequence[int],
    batch_size: int,
    accelerator: Accelerator,
) -> list[list[Result]] | None:
    """Results for each size and item on the main process, None on the others."""
    batches = make_batches(items, batch_size)
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    done: list[tuple[int, int, Result]] = []
    progress = Progress(len(mine), accelerator.is_main_process)
    for batch in mine:
        chosen = [items[i] for i in batch]
        sizes = method.compress([item.passage for item in chosen], tokens)
        for size, contexts in enumerate(sizes):
            results = task.run(method, chosen, contexts)
            done += [(size, i, result) for i, result in zip(batch, results, strict=True)]
        progress.advance()
    progress.close()
    gathered = gather_object(done)
    if not accelerator.is_main_process:
        return None
    found = {(size, i): result for size, i, result in gathered}
    return [[found[size, i] for i in range(len(items))] for size in range(len(tokens))]


class Progress:
    """A bar on a terminal, about ten plain lines elsewhere, nothing on processes that do not speak."""

    def __init__(self, total: int, speaks: bool):
        self.total, self.done, self.started = total, 0, time.monotonic()
        self.speaks = speaks
        terminal = speaks and sys.stderr.isatty()
        self.bar = tqdm(total=total, unit="batch", dynamic_ncols=True) if terminal else None

    def advance(self) -> None:
        self.done += 1
        if self.bar is not None:
            self.bar.update()
        elif self.speaks and self.done * LINES // self.total > (self.done - 1) * LINES // self.total:
            spent = time.monotonic() - self.started
            left = spent / self.done * (self.total - self.done)
            print(f"batch {self.done}/{self.total}, {spent:.0f} s, {left:.0f} s left", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def row_key(method: Method, part: str | None, tokens: int, length: int | None) -> dict[str, Any]:
    """What tells rows apart; `part` only where the data is split."""
    return {
        "method": method.name,
        **({} if part is None else {"part": part}),
        "tokens": tokens,
        "length": length,
    }


def make_rows(
    task: Task,
    method: Method,
    items: Sequence[Item],
    tokens: Sequence[int],
    results: Sequence[Sequence[Result]],
    config: EvaluationConfig,
) -> list[dict[str, Any]]:
    """One row for each size, part and length: n, and every figure with its bounds (null where n is 0)."""
    rows = []
    lengths: list[int | None] = list(config.lengths) or [None]
    for count, of_size in zip(tokens, results, strict=True):
        for part in parts(config):
            for length in lengths:
                scored = [
                    task.columns(result)
                    for item, result in zip(items, of_size, strict=True)
                    if item.part == part and item.length == length
                ]
                row = {**row_key(method, part, count, length), "n": len(scored)}
                columns = {name: [one[name] for one in scored] for name in (scored[0] if scored else ())}
                figures = bootstrap(columns, task.figures, config.resamples, config.seed) if scored else {}
                for name in task.figures:
                    found = figures.get(name)
                    row[name] = found and found.value
                    row[f"{name}_low"], row[f"{name}_high"] = found and found.low, found and found.high
                rows.append(row)
    return rows


def notes(config: EvaluationConfig, rows: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader of the table must know."""
    lines = [
        f"n: passages; [low, high]: {LEVEL:.0%} bootstrap interval over passages (without width where all "
        f"passages score the same, which says little about others); BLEU: {bleu_signature()}.",
        "nats/token and token accuracy: teacher-forced, EOS included. token ratio: passage tokens / memory tokens. "
        "byte ratio: UTF-8 bytes of the passage / bytes of its memory held in bfloat16.",
    ]
    empty = sorted({row["length"] or 0 for row in rows if row["n"] == 0})
    if empty:
        lines.append(f"{config.data} has no passages for some rows of length {', '.join(map(str, empty))}.")
    return lines


def checkpoint_fingerprint(model: Compressor) -> str:
    """SHA-256 over the settings and trained weights of a compressor."""
    digest = hashlib.sha256(json.dumps(asdict(model.config), sort_keys=True).encode())
    for name, tensor in sorted(model.trainable_state().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def describe_data(config: EvaluationConfig, records: Any) -> dict[str, Any]:
    """Source and SHA-256 of the data: of the file if there is one, else of all records' ids and texts."""
    places = resolve_data(config.data, split=config.split)
    described = {"source": config.data, "split": config.split, "records": len(records)}
    if len(places) == 1 and isinstance(places[0], Path):
        return described | {"sha256": sha256(places[0]), "sha256_of": "file"}
    digest = hashlib.sha256()
    for batch in records.select_columns(["id", "text"]).iter(batch_size=1000):
        for name, text in zip(batch["id"], batch["text"], strict=True):
            digest.update(json.dumps([name, text]).encode())
    return described | {"sha256": digest.hexdigest(), "sha256_of": "records"}
