"""Runs a task over data sets and methods: batches, processes, progress and the output folder."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from compressor.base import Base, load_base
from compressor.base import resolve as resolve_path
from compressor.config import BaseConfig
from compressor.data.questions import HUB_NAMES
from compressor.data.sources import resolve as resolve_data
from compressor.data.sources import stem_of
from compressor.errors import CompressorError
from compressor.evaluation.command import EvaluationConfig
from compressor.evaluation.metrics import LEVEL, bleu_signature
from compressor.evaluation.report import load_published, markdown_table, regeneration_plot
from compressor.evaluation.rows import MACRO, Results, make_rows, quality_flags, row_key
from compressor.evaluation.studies import STUDIES, load_study
from compressor.evaluation.tasks import TASKS, Item, Result, Task
from compressor.files import atomic_path, sha256
from compressor.methods.interface import MemoryMethod, Method, check_tokens
from compressor.methods.registry import TRAINED, MethodSettings, split_spec, untrained_method
from compressor.model import Compressor
from compressor.pretrained import read_settings
from compressor.provenance import versions

LINES = 10
"""Progress lines of a run without a terminal."""


def evaluate(
    config: EvaluationConfig,
    accelerator: Accelerator | None = None,
    overwrite: bool = False,
    command: str | None = None,
) -> dict[str, Any] | None:
    """Measure methods on a task and write the output folder; call on every process.

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
    if config.task in STUDIES:
        return run_study(config, accelerator, command, started)
    task = make_task(config.task)
    published = load_published() if config.published else None
    specs = [split_spec(spec) for spec in config.methods]
    sources = list(config.data) or list(task.default_data)
    if not sources:
        raise CompressorError(f"the task {config.task} comes without data. {task.needs}")
    with accelerator.main_process_first():
        records = {source: task.load(source, config) for source in sources}
    names = data_names(sources)
    methods = Methods(config, specs, accelerator)
    config.question_template = config.question_template or methods.question_template()
    items: list[Item] = []
    results: dict[str, Results] = {}
    described: dict[str, Any] = {}
    for method in methods:
        if not items:
            for source in sources:
                items += [
                    Item(item.id, item.passage, item.length, item.part, names[source], item.asked)
                    for item in task.items(records[source], method.base.tokenizer, config)
                ]
            if not items:
                wanted = f"at least {min(config.lengths)} tokens" if config.lengths else "at least one token"
                raise CompressorError(
                    f"{', '.join(sources)} has no passage of {wanted}: ask for smaller lengths or give other data"
                )
        tokens = method.sizes(methods.tokens)
        if not tokens and accelerator.is_main_process:
            print(f"note: {method.name} cannot compress to {' or '.join(map(str, methods.tokens))} tokens: left out")
        found = run_batches(task, method, items, tokens, config.batch_size, accelerator) if tokens else None
        if found is not None:
            shown: list[int | None] = list(tokens) if method.sized else [None]
            results[method.name] = dict(zip(shown, found, strict=True))
        described[method.name] = methods.describe(method)
    if not accelerator.is_main_process:
        return None

    data = list(names.values())
    rows = make_rows(task, items, data, results, config)
    metrics = {
        "task": config.task,
        "figures": [name for name in task.figures if any(row.get(name) is not None for row in rows)],
        "rows": rows,
        "quality": quality_flags(task, results),
        "intervals": {"level": LEVEL, "resamples": config.resamples, "seed": config.seed, "over": "items"},
        "sacrebleu": bleu_signature(),
        "notes": notes(task, config, rows),
        "methods": described,
        "checkpoint": methods.checkpoint_record(),
        "base": methods.base_record(),
        "data": [describe_data(source, config, records[source]) for source in sources],
        **run_entries(config, accelerator, command, started),
    }
    with output_folder(config, metrics) as path:
        with (path / "predictions.jsonl").open("w", encoding="utf-8") as file:
            for name, sizes in results.items():
                for count, of_size in sizes.items():
                    for item, result in zip(items, of_size, strict=True):
                        line = {**row_key(name, item.dataset, item.part, count, item.length), "id": item.id, **result}
                        file.write(json.dumps(line, ensure_ascii=False) + "\n")
        if config.task == "regeneration":
            regeneration_plot([row for row in rows if row["dataset"] != MACRO], path / "regeneration.png", published)
    return metrics


def run_study(
    config: EvaluationConfig, accelerator: Accelerator, command: str | None, started: float
) -> dict[str, Any] | None:
    """Run a study and write the output folder; see `evaluate`."""
    findings = load_study(config.task)(config, accelerator)
    if findings is None:
        return None
    metrics = {"task": config.task, **findings.metrics, **run_entries(config, accelerator, command, started)}
    with output_folder(config, metrics) as path:
        findings.draw(path)
    return metrics


def run_entries(
    config: EvaluationConfig, accelerator: Accelerator, command: str | None, started: float
) -> dict[str, Any]:
    """What every `metrics.json` says of the run itself."""
    on_gpu = accelerator.device.type == "cuda"
    return {
        "seed": config.seed,
        "command": command,
        "versions": versions(),
        "device": torch.cuda.get_device_name(accelerator.device) if on_gpu else accelerator.device.type,
        "processes": accelerator.num_processes,
        "seconds": round(time.monotonic() - started, 2),
    }


@contextmanager
def output_folder(config: EvaluationConfig, metrics: dict[str, Any]) -> Iterator[Path]:
    """The output folder, complete when the block ends: metrics, settings and table, and what the block writes."""
    with atomic_path(config.output) as path:
        path.mkdir()
        (path / "metrics.json").write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (path / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False), encoding="utf-8")
        table = markdown_table(metrics["rows"], metrics["figures"], keys=metrics.get("keys"))
        (path / "table.md").write_text("\n\n".join([table, *metrics["notes"]]) + "\n", encoding="utf-8")
        yield path


class Methods:
    """The methods of an evaluation, loaded one after the other: each compressor puts adapters into a base of its own.

    Args:
        specs: names and checkpoints (`split_spec`); none means the checkpoint's own method.
    """

    def __init__(
        self, config: EvaluationConfig, specs: Sequence[tuple[str, str | None]], accelerator: Accelerator
    ) -> None:
        self.config, self.accelerator = config, accelerator
        self.folder = Path(resolve_path(config.checkpoint))
        # Known without the weights: loading a large base takes minutes.
        self.settings = read_settings(self.folder) if self.folder.is_dir() else None
        own = self.settings["config"].get("method", "kv") if self.settings else "kv"
        self.specs = [(name, place or self._place(name, own)) for name, place in specs] or [(own, config.checkpoint)]
        if config.tokens and self.settings:
            check_tokens(config.tokens, self.settings["config"]["memory_tokens"], config.checkpoint)
        most = self.settings["config"]["memory_tokens"] if self.settings else 16
        self.tokens = list(config.tokens) or [most]
        self._plain: Base | None = None
        self._fingerprints: dict[str, str] = {}
        self._base: Base | None = None

    def _place(self, name: str, own: str) -> str | None:
        """Where a trained method's checkpoint is, if none is named."""
        if name not in TRAINED:
            return None
        return self.config.checkpoint if name == own else str(Path(self.config.checkpoint).parent / "methods" / name)

    def question_template(self) -> str | None:
        """The checkpoint's prompt of a question."""
        return self.settings["config"].get("question_template") if self.settings else None

    def __iter__(self) -> Iterator[Method]:
        config = self.config
        for name, place in self.specs:
            if name in TRAINED:
                assert place is not None
                model = Compressor.from_pretrained(
                    place, base=config.base, device=self.accelerator.device, dtype=config.dtype
                )
                if model.config.method != name:
                    raise CompressorError(f"{place} holds the method {model.config.method}, not {name}")
                self._fingerprints[name] = checkpoint_fingerprint(model)
                method: Method = MemoryMethod(model, config.batch_size, config.segment_tokens)
            else:
                settings = MethodSettings(
                    config.summariser,
                    config.keyword_language,
                    config.llmlingua,
                    config.optimise_steps,
                    config.seed,
                )
                method = untrained_method(name, self._plain_base(), settings)
            self._base = method.base
            yield method

    def _plain_base(self) -> Base:
        """The base without adapters."""
        if self._plain is None:
            place = self.config.base or (self.settings["base"]["path"] if self.settings else None)
            if place is not None and self.config.base is None and not Path(resolve_path(place)).exists():
                beside = self.folder.parent / "base"
                place = str(beside) if beside.exists() else place
            if place is None:
                raise CompressorError(f"the base of {self.config.checkpoint} is not known: name it with --base")
            self._plain = load_base(BaseConfig(path=place, dtype=self.config.dtype), self.accelerator.device)
            wanted = self.settings["base"]["fingerprint"] if self.settings else self._plain.fingerprint
            if self._plain.fingerprint != wanted:
                raise CompressorError(
                    f"{place} has weights {self._plain.fingerprint[:12]}, but {self.config.checkpoint} was trained on "
                    f"{wanted[:12]}: give the right base"
                )
        return self._plain

    def describe(self, method: Method) -> dict[str, Any]:
        """Checkpoint and its hash, of methods that have one."""
        place = dict(self.specs)[method.name]
        if method.name not in TRAINED:
            return {}
        return {"checkpoint": place, "fingerprint": self._fingerprints[method.name]}

    def checkpoint_record(self) -> dict[str, Any]:
        """The checkpoint that was named, whether or not its method was run."""
        own = self.settings["config"].get("method", "kv") if self.settings else "kv"
        return {"path": self.config.checkpoint, "fingerprint": self._fingerprints.get(own)}

    def base_record(self) -> dict[str, Any]:
        assert self._base is not None
        return {"path": self._base.name, "fingerprint": self._base.fingerprint, "dtype": self.config.dtype}


def data_names(sources: Sequence[str]) -> dict[str, str]:
    """A short name for each data set: the file's or folder's, or what was written where two would be the same."""
    short = {source: stem_of(Path(source)) if Path(source).exists() else source for source in sources}
    names = list(short.values())
    return {source: name if names.count(name) == 1 and name != MACRO else source for source, name in short.items()}


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
        known = [*TASKS, *STUDIES]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        hint = f"did you mean {near[0]}? " if near else ""
        raise CompressorError(f"there is no task {name!r}; {hint}There are: {', '.join(known)}")
    return TASKS[name]()


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
    batches = task.batches(items, batch_size)
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    done: list[tuple[int, int, Result]] = []
    progress = Progress(len(mine), accelerator.is_main_process, method.name)
    for batch in mine:
        chosen = [items[i] for i in batch]
        # Several questions may be about one passage.
        passages = list({id(item.passage): item.passage for item in chosen}.values())
        place = {id(passage): number for number, passage in enumerate(passages)}
        for size, compressed in enumerate(method.compress(passages, tokens)):
            contexts = [compressed[place[id(item.passage)]] for item in chosen]
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

    def __init__(self, total: int, speaks: bool, name: str):
        self.total, self.done, self.started, self.name = total, 0, time.monotonic(), name
        self.speaks = speaks
        terminal = speaks and sys.stderr.isatty()
        self.bar = tqdm(total=total, unit="batch", desc=name, dynamic_ncols=True) if terminal else None

    def advance(self) -> None:
        self.done += 1
        if self.bar is not None:
            self.bar.update()
        elif self.speaks and self.done * LINES // self.total > (self.done - 1) * LINES // self.total:
            spent = time.monotonic() - self.started
            left = spent / self.done * (self.total - self.done)
            line = f"{self.name}: batch {self.done}/{self.total}, {spent:.0f} s, {left:.0f} s left"
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def notes(task: Task, config: EvaluationConfig, rows: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader of the table must know."""
    lines = [
        f"n: items; [low, high]: {LEVEL:.0%} bootstrap interval over items (without width where all "
        "items score the same, which says little about others).",
        task.note(),
    ]
    empty = sorted({row["length"] or 0 for row in rows if row["n"] == 0})
    if empty:
        sources = ", ".join(config.data or task.default_data)
        lines.append(f"{sources} has no passages for some rows of length {', '.join(map(str, empty))}.")
    return [line for line in lines if line]


def checkpoint_fingerprint(model: Compressor) -> str:
    """SHA-256 over the settings and trained weights of a compressor."""
    digest = hashlib.sha256(json.dumps(asdict(model.config), sort_keys=True).encode())
    for name, tensor in sorted(model.trainable_state().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def describe_data(source: str, config: EvaluationConfig, records: Any) -> dict[str, Any]:
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
