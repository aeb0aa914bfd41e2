"""What a task of evaluation is: which items there are, what is done with a compressed passage, what is reported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from compressor.data.batches import tokenise
from compressor.data.rows import LeftOut
from compressor.evaluation.metrics import FigureOf
from compressor.methods.interface import Method, Piece

Result = dict[str, Any]
"""What an item left at one size, ready for JSON: a line of `predictions.jsonl` and the columns of its figures. Of an
item that was not run it holds the reason under `LEFT_OUT` and nothing else."""
LEFT_OUT = "left_out"
BEYOND = "beyond_positions"
"""Reason: what the decoder would read does not fit into the positions of the base."""

TOKENISED_TOGETHER = 256


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
    """What the runner needs to know of a task. A new one is a subclass in a file here and a line in `TASKS`.

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
        """Indices of the items that are run together."""
        return make_batches(items, batch_size)

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


def make_batches(items: Sequence[Item], batch_size: int) -> list[list[int]]:
    """Indices of the items in batches of similar length, the longest first so that too little memory shows at once."""
    order = sorted(range(len(items)), key=lambda i: -len(items[i].passage))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def tokenised(texts: Sequence[str], tokenizer: Any) -> Iterator[tuple[int, list[int]]]:
    """Place and token ids (no special tokens) of each text, tokenised a batch at a time as they are asked for."""
    for start in range(0, len(texts), TOKENISED_TOGETHER):
        yield from enumerate(tokenise(tokenizer, texts[start : start + TOKENISED_TOGETHER]), start)
