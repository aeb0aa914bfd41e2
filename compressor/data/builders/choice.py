"""Which abstracts a corpus, or questions, are made from: settings, and the dates that divide them."""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass, field
from typing import Literal

from compressor.data.sources import SPLITS
from compressor.errors import CompressorError, require


@dataclass
class SampleConfig:
    """Keep only a random sample of each split; a split of size 0 is left out. All 0: keep everything."""

    train: int = 0
    validation: int = 0
    test: int = 0
    balance: list[str] = field(default_factory=list)
    """Splits drawn evenly from arXiv's archives (cs, math, ...) instead of uniformly."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in SPLITS:
            require(getattr(self, name) >= 0, f"sample.{name}", getattr(self, name), "at least 0")
        require(set(self.balance) <= set(SPLITS), "sample.balance", self.balance, f"some of {list(SPLITS)}")

    def sizes(self) -> dict[str, int]:
        """Records wanted by split; empty when everything is kept."""
        return {name: getattr(self, name) for name in SPLITS if getattr(self, name)}


@dataclass
class CorpusConfig:
    """Which abstracts to take from where, and what for. Dates are yyyy-mm or yyyy-mm-dd."""

    source: str | list[str] = ""
    """arXiv's snapshot, files (JSONL, JSON, CSV, TSV, Parquet, TXT; .gz), folders, shipped names, or a hub id."""
    output: str = ""
    """Folder to write."""
    name: str = "arxiv"
    """Name of what is built, for its manifest."""
    licence: str = "unknown"
    """Licence of the source, for the manifest."""
    train_before: str = "2023-07"
    """Train: records before this day."""
    validation_before: str = "2024-01"
    """Validation: records from `train_before` to before this day. Test: from here on."""
    test_until: str = "2024-04"
    """Last day (or month) of the test split, inclusive; later records are dropped."""
    undated: Literal["error", "train", "validation", "test"] = "error"
    """The split of records without a date."""
    keep_source_splits: bool = False
    """Of files named train*, validation*, test*, drop records whose date belongs to another split."""
    skip_bad_records: bool = False
    """Leave records out that are null or broken, up to one in twenty, and count them in the manifest; otherwise the
    first of them is an error."""
    min_words: int = 20
    """Shorter abstracts are dropped."""
    max_words: int | None = None
    """Longer abstracts are dropped."""
    hub_split: str | None = None
    """Split of a hub data set to read, where it has several."""
    id_field: str = "id"
    text_field: str | None = None
    """Field that holds the abstract; by default `text` or `abstract`."""
    title_field: str = "title"
    categories_field: str = "categories"
    """Categories as text or a list. Title and categories may be absent from a whole file."""
    date_field: str | None = None
    """Field of the date; by default the first of `versions`, else `date`, `created`, an arXiv id's month."""
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        require(bool(self.source), "source", self.source, "a file, a glob, a folder or a hub id")
        require(bool(self.output), "output", self.output, "a folder to write")
        require(self.min_words >= 0, "min_words", self.min_words, "at least 0")
        most = f"at least min_words = {self.min_words}, or null"
        fits = self.max_words is None or self.max_words >= max(self.min_words, 1)
        require(fits, "max_words", self.max_words, most)
        first, second, last = self.cuts()
        require(first <= second, "validation_before", self.validation_before, f"{self.train_before} or later")
        require(second <= last, "test_until", self.test_until, f"not before {self.validation_before}")

    def cuts(self) -> tuple[str, str, str]:
        """First days after train, validation and test (yyyy-mm-dd)."""
        return (
            _cut("train_before", self.train_before),
            _cut("validation_before", self.validation_before),
            _cut("test_until", self.test_until, inclusive=True),
        )


def _cut(name: str, value: str, *, inclusive: bool = False) -> str:
    try:
        if not re.fullmatch(r"\d{4}-\d\d(-\d\d)?", value):
            raise ValueError
        day = datetime.date.fromisoformat(value if len(value) == 10 else f"{value}-01")
        if inclusive:
            # The 28th plus four days is always in the next month.
            month = (day.replace(day=28) + datetime.timedelta(days=4)).replace(day=1)
            day = month if len(value) == 7 else day + datetime.timedelta(days=1)
    except (ValueError, TypeError):
        raise CompressorError(f"{name} = {value!r} is not a date: write yyyy-mm or yyyy-mm-dd") from None
    return day.isoformat()
