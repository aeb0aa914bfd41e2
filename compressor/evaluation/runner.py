"""Runs a task over data sets and methods: batches, processes, progress and the output folder."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator

from compressor.data.rows import LeftOut
from compressor.errors import CompressorError
from compressor.evaluation.items import (
    MACRO,
    Item,
    Results,
    Task,
    data_names,
    describe_data,
    items_hash,
    left_out_of,
    make_rows,
    row_key,
    run_batches,
)
from compressor.evaluation.methods import Methods
from compressor.evaluation.metrics import LEVEL, bleu_signature, chrf_signature
from compressor.evaluation.notes import (
    beyond_notes,
    cautions,
    left_out_counts,
    left_out_notes,
    row_notes,
    segment_notes,
    surroundings_note,
)
from compressor.evaluation.report import load_published, markdown_table, regeneration_plot
from compressor.evaluation.settings import EvaluationConfig, TaskSettings
from compressor.evaluation.table import STUDIES, entry
from compressor.files import FolderKind, atomic_folder, check_folder, read_json
from compressor.processes import make_accelerator
from compressor.provenance import versions
from compressor.unfinished import PART_FILES, Unfinished

UNFINISHED = "unfinished"
"""Folder in the output of what is done, until all is."""
KEPT = "parts.jsonl"
"""File of what a study measured, in its finished output."""
PREDICTION_KEYS = ("method", "dataset", "tokens", "length", "id")
"""What a line of `predictions.jsonl` holds besides its result."""
PLOTS = tuple(f"{name}.png" for name in ("regeneration", "utilisation", "attention", "reading", "efficiency"))
PARTS = tuple(f"{UNFINISHED}/{name}" for name in ("", *PART_FILES))
EVALUATION = FolderKind(
    "an evaluation",
    ("metrics.json", "predictions.jsonl", KEPT, "config.yaml", "table.md", *PLOTS, "rate-distortion.png", *PARTS),
)
INTERRUPTED = FolderKind("an interrupted evaluation", PARTS)


def evaluate(
    config: EvaluationConfig,
    accelerator: Accelerator | None = None,
    overwrite: bool = False,
    command: str | None = None,
    resume: bool = False,
) -> dict[str, Any] | None:
    """Measure methods on a task and write the output folder; call on every process.

    Batches are formed before they are shared out, so that every passage is computed in the same company however many
    processes there are, and results are put back in order before they are summed: figures do not depend on them. The
    results of a batch are written when it is done, so that what was interrupted goes on, by any number of processes.

    Args:
        overwrite: replace `config.output` if it holds an earlier evaluation.
        command: the command line to record.
        resume: go on with what an interrupted evaluation left in `config.output`; a finished one is checked and its
            table made again.

    Returns:
        What `metrics.json` holds, on the main process; None on the others.

    Raises:
        CompressorError: bad settings, data or checkpoint; nothing is written then.
    """
    started = time.monotonic()
    wanted = entry(config.task).settings
    if type(config) is not wanted:
        raise CompressorError(
            f"{type(config).__name__} has not the settings of --task {config.task}: give {wanted.__name__}"
        )
    accelerator = accelerator or make_accelerator()
    output = Path(config.output)
    check_output(output, overwrite, resume)
    parts = Unfinished(output / UNFINISHED, resume, overwrite, accelerator.process_index)
    if resume and not parts.exists and (output / "metrics.json").exists():
        finished_parts(output, parts)
    if accelerator.is_main_process:
        parts.start()
    accelerator.wait_for_everyone()  # what is there is read by all before anything is added or deleted
    parts.expect({"settings": {name: value for name, value in asdict(config).items() if name != "output"}})
    parts.made_with.setdefault("surroundings", surroundings(accelerator))
    with parts.interruptible("the same command with --resume goes on"):
        work: Any = run_study if config.task in STUDIES else run_task
        return work(config, accelerator, parts, command, started)


def run_task(
    config: TaskSettings, accelerator: Accelerator, parts: Unfinished, command: str | None, started: float
) -> dict[str, Any] | None:
    """Run a task and write the output folder; see `evaluate`."""
    task: Task = entry(config.task).load()(config)
    published = load_published() if getattr(config, "published", False) else None
    sources = list(config.data) or list(task.default_data)
    if not sources:
        raise CompressorError(f"the task {config.task} comes without data. {task.needs}")
    methods = Methods(config, accelerator, task.bounds)
    ledgers = {source: LeftOut() for source in sources}
    records = {}
    with accelerator.main_process_first():
        for source, task.left_out in ledgers.items():
            records[source] = task.load(source, config)
    names = data_names(sources)
    if getattr(config, "question_template", "") is None:
        chosen: Any = {"question_template": task.template or methods.question_template()}
        config = replace(config, **chosen)
    items, results, left_out = measure(task, methods, records, ledgers, names, config, accelerator, parts)
    if not accelerator.is_main_process:
        return None
    if not results:
        raise CompressorError(f"{' '.join(left_out)} Nothing is left to measure: ask for other tokens")
    if len(left_out_of(results)) == len(items):
        raise CompressorError(
            f"{' '.join(beyond_notes(items, results, methods))} Nothing is left to measure: ask for windows "
            "(--question-tokens) or lengths that fit, or leave out the methods that read whole passages"
        )

    order = [name for name, _ in methods.specs]
    results = {name: results[name] for name in order if name in results}
    data = list(names.values())
    rows = make_rows(task, items, data, results, config)
    metrics = {
        "task": config.task,
        "figures": [name for name in task.figures if any(row.get(name) is not None for row in rows)],
        "rows": rows,
        "intervals": {"level": LEVEL, "resamples": config.resamples, "seed": config.seed, "over": "items"},
        "sacrebleu": bleu_signature(),
        "chrf": chrf_signature(),
        "notes": [
            *row_notes(task, rows),
            *cautions(task, items, results),
            *segment_notes(items, methods.segment_tokens()),
            *left_out,
            *left_out_notes(items, names, ledgers),
            *beyond_notes(items, results, methods),
            *surroundings_note(parts.made_with["surroundings"], surroundings(accelerator)),
        ],
        "left_out": {
            names[source]: ledger.record() | left_out_counts(items, results).get(names[source], {})
            for source, ledger in ledgers.items()
        },
        "methods": {name: methods.describe(name) for name in order},
        "checkpoint": methods.checkpoint_record(),
        "base": methods.base_record(),
        "data": [describe_data(source, config, records[source]) for source in sources],
        **run_entries(config, accelerator, command, started),
        "made_with": parts.made_with,
    }
    with output_folder(config, metrics) as path:
        write_predictions(path / "predictions.jsonl", items, results)
        if config.task == "regeneration":
            regeneration_plot([row for row in rows if row["dataset"] != MACRO], path / "regeneration.png", published)
    return metrics


def measure(
    task: Task,
    methods: Methods,
    records: dict[str, Any],
    ledgers: dict[str, LeftOut],
    names: dict[str, str],
    config: TaskSettings,
    accelerator: Accelerator,
    parts: Unfinished,
) -> tuple[list[Item], dict[str, Results], list[str]]:
    """Run every method on every item.

    Args:
        records: what the task loaded of each source.
        ledgers: count what is left out of each source.
        names: the short name of each source.
        parts: results of batches that are done.

    Returns:
        The items; on the main process the results of each method in the order of the items; and a sentence for each
        method that cannot compress to all the numbers of tokens asked for.

    Raises:
        CompressorError: no item, or a method that cannot be loaded.
    """
    items: list[Item] = []
    results: dict[str, Results] = {}
    left_out: list[str] = []
    for method in methods:
        # The first method's tokenizer cuts the passages: all methods are of one base.
        items = items or items_of(task, records, ledgers, names, method.base.tokenizer, config)
        weights = {"base": method.base.fingerprint, "method": methods.describe(method.name).get("fingerprint")}
        parts.expect({"items": items_hash(items), f"weights of {method.name}": weights})
        tokens = method.sizes(methods.tokens)
        if method.sized and (without := [count for count in methods.tokens if count not in tokens]):
            left_out.append(f"{method.name} cannot compress to {' or '.join(map(str, without))} tokens.")
        found = run_batches(task, method, items, tokens, config.batch_size, accelerator, parts) if tokens else None
        if found is not None:
            results[method.name] = found
        del method  # before the next one is loaded: each may hold a base of its own
    return items, results, left_out


def items_of(
    task: Task,
    records: dict[str, Any],
    ledgers: dict[str, LeftOut],
    names: dict[str, str],
    tokenizer: Any,
    config: TaskSettings,
) -> list[Item]:
    """The task's items of all sources, under the sources' short names; none is a `CompressorError`."""
    items = []
    for source, loaded in records.items():
        task.left_out = ledgers[source]
        items += [
            Item(item.id, item.passage, item.length, names[source], item.asked)
            for item in task.items(loaded, tokenizer, config)
        ]
    if not items:
        lengths = getattr(config, "lengths", None)
        wanted = f"at least {min(lengths)} tokens" if lengths else "at least one token"
        raise CompressorError(
            f"{', '.join(records)} has no passage of {wanted}: ask for smaller lengths or give other data"
        )
    return items


def write_predictions(path: Path, items: Sequence[Item], results: dict[str, Results]) -> None:
    """One line for each method, number of tokens and item."""
    with path.open("w", encoding="utf-8") as file:
        for name, sizes in results.items():
            for count, of_size in sizes.items():
                for item, result in zip(items, of_size, strict=True):
                    # The keys are `PREDICTION_KEYS`.
                    line = {**row_key(name, item.dataset, count, item.length), "id": item.id, **result}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")


def finished_parts(output: Path, parts: Unfinished) -> None:
    """Take up a finished evaluation's predictions, a study's parts, so that they are compared with what is made now."""
    parts.made_with = read_json(output / "metrics.json").get("made_with", {})
    if not parts.made_with:
        raise CompressorError(f"{output} does not say what it was made with: name another folder, or add --overwrite")
    places: Counter[tuple[str, int | None]] = Counter()
    parts.take(output / KEPT)
    if (output / "predictions.jsonl").exists():
        # Line by line: `splitlines` also cuts at U+2028 and its like, which JSON leaves as they are in texts.
        with (output / "predictions.jsonl").open(encoding="utf-8") as file:
            for line in file:
                values = json.loads(line)
                key = values["method"], values["tokens"]
                result = {name: value for name, value in values.items() if name not in PREDICTION_KEYS}
                parts.parts.append({"method": key[0], "tokens": key[1], "place": places[key], "result": result})
                places[key] += 1


def run_study(
    config: EvaluationConfig, accelerator: Accelerator, parts: Unfinished, command: str | None, started: float
) -> dict[str, Any] | None:
    """Run a study and write the output folder; see `evaluate`."""
    findings = entry(config.task).load()(config, accelerator, parts)
    if findings is None:
        return None
    entries = {**run_entries(config, accelerator, command, started), "made_with": parts.made_with}
    metrics = {"task": config.task, **findings.metrics, **entries}
    with output_folder(config, metrics) as path:
        findings.draw(path)
        parts.keep(path / KEPT)
    return metrics


def surroundings(accelerator: Accelerator) -> dict[str, Any]:
    """Versions and device, on which last digits depend."""
    on_gpu = accelerator.device.type == "cuda"
    device = torch.cuda.get_device_name(accelerator.device) if on_gpu else accelerator.device.type
    return {"versions": versions(), "device": device}


def run_entries(
    config: EvaluationConfig, accelerator: Accelerator, command: str | None, started: float
) -> dict[str, Any]:
    """What every `metrics.json` says of the run itself."""
    return {
        "seed": config.seed,
        "command": command,
        **surroundings(accelerator),
        "processes": accelerator.num_processes,
        "seconds": round(time.monotonic() - started, 2),
    }


@contextmanager
def output_folder(config: EvaluationConfig, metrics: dict[str, Any]) -> Iterator[Path]:
    """The output folder, complete when the block ends: metrics, settings and table, and what the block writes."""
    with atomic_folder(config.output, folder_kind(Path(config.output))) as path:
        (path / "metrics.json").write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (path / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False), encoding="utf-8")
        table = markdown_table(metrics["rows"], metrics["figures"], keys=metrics.get("keys"))
        (path / "table.md").write_text("\n\n".join([table, *metrics["notes"]]) + "\n", encoding="utf-8")
        yield path


def folder_kind(output: Path) -> FolderKind:
    """What an output folder that is there should hold."""
    finished = (output / "metrics.json").exists() or not (output / UNFINISHED).is_dir()
    return EVALUATION if finished else INTERRUPTED


def check_output(output: Path, overwrite: bool, resume: bool = False) -> None:
    """Refuse an output folder that would lose something, or that cannot be written."""
    interrupted = (output / UNFINISHED).is_dir()  # `Unfinished` says what may be done with it
    check_folder(output, folder_kind(output), overwrite or resume or interrupted)
    existing = next(parent for parent in output.absolute().parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise CompressorError(f"output = {output} cannot be written: {existing} is no folder that takes new files")
