"""What becomes of records that cannot be used: an error that names the first, or leaving them out, counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from compressor.data.left_out import LeftOut
from compressor.errors import CompressorError

MOST_BAD = 0.05
"""Share of bad records above which data is not what it seems, and is refused."""
REASON = "bad_record"

R = TypeVar("R")
T = TypeVar("T")


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
