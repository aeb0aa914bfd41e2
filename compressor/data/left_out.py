"""What is left out of data: how often for which reason, and where first; records that cannot be used among it.

Such records are errors that name the first, or they are left out and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from compressor.errors import CompressorError
from compressor.provenance import without_folders

REASONS = {
    "unanswerable": "the data says that the context does not answer it",
    "answer_not_found": "no right answer stands in the context as a word or words of it",
    "answer_too_long": "the answer is longer than a window",
    "beyond_positions": "the context is about as long as the base's positions, or longer",
    "too_short": "it is shorter than every range of data.lengths",
    "bad_record": "the record cannot be used",
    "no_tokens": "the text has no tokens",
}
"""Reasons as messages state them."""
MOST_BAD = 0.05
"""Share of bad records above which data is not what it seems, and is refused."""
REASON = "bad_record"

R = TypeVar("R")
T = TypeVar("T")


class LeftOut:
    """Counts what is left out, for messages, `run.json`, `metrics.json` and manifests."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, reason: str, where: str, count: int = 1) -> None:
        """Count one (or several, of which it is the first); `where` names it (file and line, or id)."""
        self.counts[reason] += count
        self.first.setdefault(reason, f"{where}")

    def merge(self, other: LeftOut) -> None:
        """Add what another one counted."""
        self.counts.update(other.counts)
        self.first = {**other.first, **self.first}

    @property
    def total(self) -> int:
        return self.counts.total()

    def record(self) -> dict[str, Any]:
        """For JSON: count and first place of each reason."""
        return {
            reason: {"count": count, "first": without_folders(self.first[reason])}
            for reason, count in self.counts.items()
        }

    def line(self, what: str, kept: int) -> str:
        """One sentence on all of it, "" where nothing was left out; `kept` is the number of `what` that are used."""
        if not self.total:
            return ""
        reasons = "; ".join(
            f"{count:,}: {REASONS.get(reason, reason)} (first: {self.first[reason]})"
            for reason, count in self.counts.items()
        )
        return f"left out {self.total:,} of {self.total + kept:,} {what}: {reasons}"


class BadRecord(CompressorError):
    """A record that cannot be used, where the others may: null, blank, of a wrong type, no valid line."""


class BadRecords:
    """Strict, it raises the first `BadRecord` it is given; otherwise it counts them.

    Args:
        skip: leave bad records out.
        left_out: where they are counted.
    """

    def __init__(self, skip: bool = False, left_out: LeftOut | None = None):
        self.skip, self.left_out = skip, LeftOut() if left_out is None else left_out
        self.bad = self.good = 0

    def add(self, error: BadRecord | str) -> None:
        """Count a bad record, or raise."""
        if not self.skip:
            raise BadRecord(f"{error}. Correct it, or leave such records out: --skip-bad-records") from None
        self.bad += 1
        self.left_out.add(REASON, str(error))

    def counted(self, bad: int, first: str) -> None:
        """Take over what was counted elsewhere."""
        self.bad += bad
        self.left_out.add(REASON, first, bad)

    def usable(self, rows: Iterable[R], convert: Callable[[R], T]) -> Iterator[T]:
        """What `convert` makes of each row that it does not raise `BadRecord` for."""
        for row in rows:
            try:
                found = convert(row)
            except BadRecord as error:
                self.add(error)
                continue
            self.good += 1
            yield found

    def caught(self, make: Callable[[], T]) -> Iterator[T]:
        """What `make` returns, or nothing where it raises `BadRecord`; does not count what is good."""
        try:
            yield make()
        except BadRecord as error:
            self.add(error)

    def finish(self, source: object, limited: bool = False) -> None:
        """Refuse data of which too much is bad; called when all that is wanted was read.

        Args:
            limited: only the first records were read, of which one may be bad however few they are.

        Raises:
            CompressorError: more than `MOST_BAD` of the records are bad.
        """
        if self.bad > max(int(limited), MOST_BAD * (self.bad + self.good)):
            raise CompressorError(
                f"{source}: {self.bad:,} of {self.bad + self.good:,} records are bad, more than {MOST_BAD:.0%}: they "
                f"are not what they seem. The first: {self.left_out.first[REASON]}"
            )
