"""Study `utilisation`: what each memory token, and each layer of the memory, is used for.

Every part of the memory is removed or exchanged (`changes.py`), and the loss that this adds is measured while the
passage is written back (nats a token) and while questions are answered (nats of the right answer). Attention says which
token is read where. The claim of 500xCompressor, "not all the compressed tokens are equally utilized" (arXiv
2408.03094v1, abstract), is tested on the added losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from compressor.errors import CompressorError
from compressor.evaluation.command import EvaluationConfig
from compressor.evaluation.methods import checkpoint_fingerprint
from compressor.evaluation.metrics import LEVEL, bootstrap, ratio, spearman
from compressor.evaluation.runner import data_names, describe_data, items_hash, run_batches
from compressor.evaluation.studies import Findings
from compressor.evaluation.studies.changes import AnswerProbe, RegenerationProbe, all_changes
from compressor.evaluation.studies.equal_use import ALPHA, CLAIM, PERMUTATIONS, added, statement, verdict
from compressor.evaluation.studies.plots import utilisation_plots
from compressor.evaluation.tasks import Item, Result, Task
from compressor.evaluation.tasks.interface import LEFT_OUT
from compressor.layouts import memory_positions
from compressor.methods.interface import MemoryMethod, check_tokens
from compressor.model import Compressor
from compressor.prompts import QUESTION
from compressor.unfinished import Unfinished

DEFAULT_DATA = ("arxiv-test", "squad-dev", "arxivqa-test")
KEYS = ["task", "dataset", "change", "part", "index", "n"]
PLACES = 1000
"""Length of the passage that positions of memory tokens are given for, as shares of it."""


def utilisation(config: EvaluationConfig, accelerator: Accelerator, parts: Unfinished) -> Findings | None:
    """Run the study; data sets with questions are answered, others are written back.

    Raises:
        CompressorError: settings that mean nothing here, data that is neither, or too few passages to exchange.
    """
    check_settings(config)
    sources = list(config.data) or list(DEFAULT_DATA)
    with accelerator.main_process_first():
        loaded = {source: load(source, config) for source in sources}
    names = data_names(sources)
    model = Compressor.from_pretrained(
        config.checkpoint,
        base=config.base,
        device=accelerator.device,
        dtype=config.dtype,
        attention="eager",
        base_mismatch=config.base_mismatch,
    )
    check_tokens(config.tokens or [1], model.config.memory_tokens, config.checkpoint)
    tokens = config.tokens[0] if config.tokens else model.config.memory_tokens
    if not model.encoder.trained_for(tokens):
        raise CompressorError(f"{config.checkpoint} is not meant to compress to {tokens} tokens: leave tokens out")
    config.question_template = config.question_template or model.config.question_template or QUESTION
    method = MemoryMethod(model, config.batch_size, config.segment_tokens, config.refine_steps)
    measured: dict[str, tuple[str, list[Result] | None]] = {}
    for source, (task, records) in loaded.items():
        items = with_donors(task.items(records, method.base.tokenizer, config), source)
        parts.expect({f"items of {source}": items_hash(items), "weights": checkpoint_fingerprint(model)})
        found = run_batches(task, method, items, [tokens], config.batch_size, accelerator, parts, f", {names[source]}")
        measured[names[source]] = (
            kind_of(task),
            [one for one in found[tokens] if LEFT_OUT not in one] if found else None,
        )
    if not accelerator.is_main_process:
        return None

    rows: list[dict[str, Any]] = []
    verdicts, maps = [], []
    for number, (name, (kind, results)) in enumerate(measured.items()):
        assert results is not None
        rows += make_rows(kind, name, results, tokens, method.base.layers, config, number)
        # A single token cannot be used more or less than others.
        if tokens > 1:
            verdicts.append(verdict(kind, name, results, tokens, config))
        maps.append(heat_maps(kind, name, results))
    places = memory_places(model, tokens)
    metrics = {
        "keys": KEYS,
        "figures": ["loss", "loss_increase", "attention_mass"],
        "rows": rows,
        "equal_use": {"claim": CLAIM, "permutations": PERMUTATIONS, "alpha": ALPHA, "tests": verdicts},
        "places": places,
        "maps": maps,
        "intervals": {"level": LEVEL, "resamples": config.resamples, "seed": config.seed, "over": "items"},
        "notes": [*notes(tokens), *map(statement, verdicts), *(reading(one, places) for one in maps)],
        "checkpoint": {"path": config.checkpoint, "fingerprint": checkpoint_fingerprint(model)},
        "base": {"path": model.base.name, "fingerprint": model.base.fingerprint, "dtype": config.dtype},
        "data": [describe_data(source, config, records) for source, (_, records) in loaded.items()],
    }
    return Findings(metrics, lambda folder: utilisation_plots(rows, maps, folder))


def check_settings(config: EvaluationConfig) -> None:
    """Raise a `CompressorError` for settings that this study cannot follow."""
    for name, most in (("methods", 0), ("tokens", 1), ("lengths", 1)):
        values = getattr(config, name)
        if len(values) > most:
            advice = "the checkpoint's own method is studied: leave it out" if most == 0 else "give one"
            raise CompressorError(f"{name} = {values} cannot be used with --task utilisation: {advice}")
    for name in ("split_date", "published"):
        if getattr(config, name):
            raise CompressorError(f"{name} cannot be used with --task utilisation: leave it out")


def load(source: str, config: EvaluationConfig) -> tuple[Task, Any]:
    """The records of a data set and what is done with them: questions if it has them, else texts."""
    answer, regenerate = AnswerProbe(), RegenerationProbe()
    try:
        return answer, answer.load(source, config)
    except CompressorError as no_questions:
        try:
            return regenerate, regenerate.load(source, config)
        except CompressorError as no_texts:
            if str(no_questions) == str(no_texts):
                raise
            raise CompressorError(
                f"{source} holds neither questions nor texts. As questions: {no_questions}. As texts: {no_texts}"
            ) from None


def kind_of(task: Task) -> str:
    """Name of what a task does."""
    return "qa" if isinstance(task, AnswerProbe) else "regeneration"


def with_donors(items: Sequence[Item], source: str) -> list[Item]:
    """The items, each with the next different passage of the data set in `asked["donor"]`.

    Raises:
        CompressorError: there are no two different passages.
    """
    passages = list(dict.fromkeys(tuple(item.passage) for item in items))
    if len(passages) < 2:
        raise CompressorError(
            f"{source} has {len(passages)} passages here, and utilisation exchanges the memories of different ones: "
            "give more data, or a larger limit"
        )
    following = dict(zip(passages, [*passages[1:], passages[0]], strict=True))
    # One list for each passage: the runner and the encoder tell passages apart by it.
    lists = {passage: list(passage) for passage in passages}
    return [
        Item(
            item.id,
            lists[tuple(item.passage)],
            item.length,
            item.part,
            source,
            {**item.asked, "donor": lists[following[tuple(item.passage)]]},
        )
        for item in items
    ]


def make_rows(
    kind: str, dataset: str, results: Sequence[Result], tokens: int, layers: int, config: EvaluationConfig, number: int
) -> list[dict[str, Any]]:
    """One row for the unchanged memory (its loss itself) and one for each change, with intervals over items."""
    count = [float(result["tokens"]) for result in results]
    columns: dict[str, Any] = {"tokens": count, "per": count if kind == "regeneration" else [1.0] * len(results)}
    columns["before"] = [float(result["nats"][0]) for result in results]
    increase = added(results)
    mass = torch.stack([result["attention"] for result in results]).numpy()
    changes = all_changes(tokens, layers)
    for place in range(len(changes)):
        columns[f"change_{place}"] = increase[:, place]
    for token in range(tokens):
        columns[f"token_{token}"] = mass[:, :, token].mean(1)
    for layer in range(layers):
        columns[f"layer_{layer}"] = mass[:, layer].sum(1)
    columns["memory_None"] = mass.mean(1).sum(1)
    figures = {
        name: ratio(name, "per" if name == "before" or name.startswith("change_") else "tokens")
        for name in columns
        if name not in ("tokens", "per")
    }
    found = bootstrap(columns, figures, config.resamples, config.seed + number)
    key = {"task": kind, "dataset": dataset}
    bounds = found["before"]
    before = {"loss": bounds.value, "loss_low": bounds.low, "loss_high": bounds.high}
    unchanged: dict[str, Any] = {**key, "change": "none", "part": "memory", "index": None, "n": len(results), **before}
    rows = [unchanged]
    for place, change in enumerate(changes):
        row: dict[str, Any] = {
            **key,
            "change": change.kind,
            "part": change.part,
            "index": change.index,
            "n": len(results),
        }
        shown = {"loss_increase": found[f"change_{place}"]}
        if change.kind == "removed":
            shown["attention_mass"] = found[f"{change.part}_{change.index}"]
        for name, one in shown.items():
            row |= {name: one.value, f"{name}_low": one.low, f"{name}_high": one.high}
        rows.append(row)
    return rows


def heat_maps(kind: str, dataset: str, results: Sequence[Result]) -> dict[str, Any]:
    """Means over target tokens of all items: attention `[layers][tokens]`; attention and the loss that removal adds by
    part of the text, `[tokens][PARTS_OF_TEXT]` (None where no text was so long)."""
    total = float(sum(result["tokens"] for result in results))
    in_part = torch.stack([result["tokens_parts"] for result in results]).sum(0)

    def by_part(name: str) -> list[list[float | None]]:
        summed = torch.stack([result[name] for result in results]).sum(0) / in_part
        return [[None if np.isnan(value) else value for value in row] for row in summed.tolist()]

    attention = torch.stack([result["attention"] for result in results]).sum(0) / total
    key = {"task": kind, "dataset": dataset, "attention": attention.tolist()}
    # An answer is too short to have parts.
    if kind == "qa":
        return key
    return key | {"attention_parts": by_part("attention_parts"), "removed_parts": by_part("removed_parts")}


def memory_places(model: Compressor, tokens: int) -> list[float]:
    """Where each token's keys stand, as a share of the passage; beyond 1 in layouts that put them after it."""
    positions = memory_positions(
        model.encoder.memory_layout, torch.tensor([PLACES]), tokens, model.config.memory_tokens
    )
    return [round(float(place) / PLACES, 3) for place in positions[0]]


def reading(one: dict[str, Any], places: Sequence[float]) -> str:
    """Whether a token is read where it stands: its place against the centre of the text it is attended to in."""
    if "attention_parts" not in one or len(places) < 3:
        top = np.array(one["attention"]).sum(1)
        return f"{one['task']}, {one['dataset']}: the memory gets {top.mean():.1%} of attention."
    mass = np.nan_to_num(np.array(one["attention_parts"], dtype=float)) + 1e-30
    total = np.array(one["attention"]).sum(1)
    # What all tokens share is taken off: tokens differ in where they are read more than others.
    surplus = np.maximum(mass / mass.sum(1, keepdims=True) - mass.sum(0) / mass.sum(), 0)
    middles = (np.arange(mass.shape[1]) + 0.5) / mass.shape[1]
    centres = [float((row * middles).sum() / row.sum()) if row.sum() > 0 else 0.5 for row in surplus]
    correlation = spearman(list(places), centres)
    shown = "undefined" if correlation is None else f"{correlation:.2f}"
    return (
        f"{one['task']}, {one['dataset']}: the memory gets {total.mean():.1%} of attention. Rank correlation between "
        f"where a token stands in the passage and where it is read more than the others: {shown}."
    )


def notes(tokens: int) -> list[str]:
    """How the rows are to be read."""
    return [
        "loss + nats: added when a part of the memory is removed (nothing attends to it) or shuffled (another "
        "passage's stands in its place); nats a token for regeneration, nats of the first right answer for qa. "
        "Attention: mass on the part while target tokens are predicted, mean over heads, and over layers for a token.",
        f"n: items; [low, high]: {LEVEL:.0%} bootstrap interval over items; {tokens} memory tokens.",
    ]
