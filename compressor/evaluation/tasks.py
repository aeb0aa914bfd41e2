"""Evaluation tasks: which items there are, what is done with a compressed passage, what is reported.

A new task is one class here and one line in `TASKS`; loading, batching, sharding, intervals, files and tables are the
runner's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from compressor.errors import CompressorError
from compressor.evaluation.contexts import Method, Piece
from compressor.evaluation.metrics import (
    BLEU_COLUMNS,
    Sums,
    bleu,
    bleu_statistics,
    exact_match,
    ratio,
    rouge_l,
)
from compressor.generation import generate, regeneration_limit, score

if TYPE_CHECKING:
    from compressor.evaluation.command import EvaluationConfig

Result = dict[str, Any]
"""What an item left at one size, ready for JSON: a line of `predictions.jsonl` and the columns of its figures."""

TOKENISED_TOGETHER = 256
BEFORE, AFTER = "before", "from"


@dataclass(frozen=True)
class Item:
    """A passage to compress, and the row of the table it belongs to."""

    id: str
    passage: list[int]
    """Token ids, already cut."""
    length: int | None
    """Tokens it was cut to, None for a whole passage."""
    part: str | None = None
    """Side of `split_date` it is on."""


class Task(Protocol):
    """What the runner needs to know of a task."""

    figures: Mapping[str, Callable[[Sums], Any]]
    """Figures of a row in the order of the table, as functions of summed columns (`compressor.evaluation.metrics`)."""

    def items(self, records: Any, tokenizer: Any, config: EvaluationConfig) -> list[Item]:
        """Items from the records (`id`, `text`, maybe `date`), in their order."""

    def run(self, method: Method, items: Sequence[Item], contexts: Sequence[list[Piece]]) -> list[Result]:
        """Results of a batch at one size; `contexts` holds the pieces of each item's passage."""

    def columns(self, result: Result) -> dict[str, float]:
        """The numbers of one result that are summed over a row."""


def tokenised(records: Any, tokenizer: Any) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Records with their token ids (no special tokens), tokenised a batch at a time as they are asked for."""
    for start in range(0, len(records), TOKENISED_TOGETHER):
        batch = records[start : start + TOKENISED_TOGETHER]
        encoded = tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]
        for row, ids in enumerate(encoded):
            yield {name: batch[name][row] for name in batch}, ids


def parts(config: EvaluationConfig) -> list[str | None]:
    """Names of the parts that rows are reported for."""
    return [None] if config.split_date is None else [f"{side} {config.split_date}" for side in (BEFORE, AFTER)]


def part_of(record: Mapping[str, Any], config: EvaluationConfig) -> str | None:
    """The part a record belongs to.

    Raises:
        CompressorError: `split_date` is given and the record has no full date.
    """
    if config.split_date is None:
        return None
    date = record["date"]
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}.*", date or ""):
        raise CompressorError(
            f"record {record['id']} of {config.data} has the date {date!r}, so split_date cannot place it: "
            "dates must be yyyy-mm-dd; correct it or leave split_date out"
        )
    return f"{BEFORE if date[:10] < config.split_date else AFTER} {config.split_date}"


class Regeneration:
    """Write the passage back from its memory, greedily, and score the passage under its memory.

    For a length L the passages of at least L tokens are taken and cut to their first L tokens, as in the published
    evaluation (arXiv 2408.03094); the text of the cut passage is what must come back. Passages over the compressor's
    limit are compressed, written and scored in segments, each of which ends with an EOS that counts as a token.
    """

    figures: Mapping[str, Callable[[Sums], Any]] = {
        "bleu": bleu,
        "rouge_l": ratio("rouge_l", "passages"),
        "exact_match": ratio("exact_match", "passages"),
        "token_accuracy": ratio("correct_tokens", "target_tokens"),
        "nll_per_token": ratio("nats", "target_tokens"),
        "token_ratio": ratio("passage_tokens", "memory_tokens"),
        "byte_ratio": ratio("passage_bytes", "memory_bytes"),
    }

    def items(self, records: Any, tokenizer: Any, config: EvaluationConfig) -> list[Item]:
        """The first `limit` long enough passages for each length and part."""
        lengths: list[int | None] = list(config.lengths) or [None]
        found: dict[tuple[str | None, int | None], list[Item]] = {
            (part, length): [] for part in parts(config) for length in lengths
        }
        for record, ids in tokenised(records, tokenizer):
            part = part_of(record, config)
            for length in lengths:
                row = found[part, length]
                if ids and len(ids) >= (length or 1) and len(row) != config.limit:
                    row.append(Item(record["id"], list(ids[:length]), length, part))
            if config.limit is not None and all(len(row) == config.limit for row in found.values()):
                break
        return [item for row in found.values() for item in row]

    def run(self, method: Method, items: Sequence[Item], contexts: Sequence[list[Piece]]) -> list[Result]:
        base = method.base
        flat = [piece for pieces in contexts for piece in pieces]
        written: list[list[int]] = [[] for _ in flat]
        finished = [False] * len(flat)
        scores: list[list[float]] = [[] for _ in flat]
        # Segments of similar length end together; a batch of long passages has more segments than passages.
        order = sorted(range(len(flat)), key=lambda i: len(flat[i].ids))
        for start in range(0, len(order), len(items)):
            chosen = order[start : start + len(items)]
            prefix = method.prefix([flat[i] for i in chosen])
            prompts = [[base.bos]] * len(chosen)
            with method.decoding():
                generations = generate(base, prefix, prompts, [regeneration_limit(len(flat[i].ids)) for i in chosen])
                targets = score(base, prefix, prompts, [[*flat[i].ids, base.eos] for i in chosen])
            for i, generation, target in zip(chosen, generations, targets, strict=True):
                written[i], finished[i] = generation.ids, generation.finished
                scores[i] = [-float(target[:, 0].double().sum()), float(target[:, 1].sum()), len(target)]
        results, place = [], 0
        for item, pieces in zip(items, contexts, strict=True):
            mine = range(place, place + len(pieces))
            place += len(pieces)
            reference = base.tokenizer.decode(item.passage, skip_special_tokens=True)
            prediction = base.tokenizer.decode([t for i in mine for t in written[i]], skip_special_tokens=True)
            results.append(
                {
                    "reference": reference,
                    "prediction": prediction,
                    "finished": all(finished[i] for i in mine),
                    "rouge_l": rouge_l(prediction, reference),
                    "exact_match": exact_match(prediction, reference),
                    "nats": sum(scores[i][0] for i in mine),
                    "correct_tokens": int(sum(scores[i][1] for i in mine)),
                    "target_tokens": int(sum(scores[i][2] for i in mine)),
                    "passage_tokens": len(item.passage),
                    "memory_tokens": sum(piece.tokens for piece in pieces),
                    "passage_bytes": len(reference.encode()),
                    "memory_bytes": sum(piece.nbytes for piece in pieces),
                    **bleu_statistics(prediction, reference),
                }
            )
        return results

    def columns(self, result: Result) -> dict[str, float]:
        names = (
            *("rouge_l", "exact_match", "nats", "correct_tokens", "target_tokens"),
            *("passage_tokens", "memory_tokens", "passage_bytes", "memory_bytes", *BLEU_COLUMNS),
        )
        return {"passages": 1.0, **{name: float(result[name]) for name in names}}


TASKS: dict[str, type[Task]] = {"regeneration": Regeneration}
"""Tasks by the name that `--task` takes."""
