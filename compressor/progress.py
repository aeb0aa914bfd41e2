"""How commands show that they are at work: one rule for all.

A bar on a terminal. Elsewhere nothing for the first ten seconds, then a line every half minute. `-q` shows nothing,
`-v` a line every second. Whoever uses the library from Python sees nothing: a command chooses its level.
"""

from __future__ import annotations

import functools
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

QUIET, NORMAL, VERBOSE = 0, 1, 2
FIRST, EVERY = 10.0, 30.0
"""Seconds until the first line and between two."""
VERBOSE_EVERY = 1.0
FLAGS = {
    "quiet": "show no progress, no notes and no warnings",
    "verbose": "show progress in lines, and more about the result",
}
"""Switches that every command takes."""
SHORT = {f"-{name[0]}": name for name in FLAGS}

_level: int | None = None  # nobody has chosen: the library is used from Python
_shown: Progress | None = None


def set_level(quiet: bool, verbose: bool) -> None:
    """Choose what is shown from here on; a command does."""
    global _level, _shown
    _level, _shown = QUIET if quiet else VERBOSE if verbose else NORMAL, None
    if quiet:
        warnings.simplefilter("ignore")


def is_quiet() -> bool:
    """Whether `-q` was given."""
    return _level == QUIET


def note(line: str) -> None:
    """Print a line about the work to standard error: by one of processes started together, unless `-q` is given."""
    if not is_quiet() and _first_process():
        print(line, file=sys.stderr, flush=True)


@functools.cache
def note_once(line: str) -> None:
    """`note`, the first time that this line comes."""
    note(line)


class Progress:
    """Progress of one piece of work; a piece within another that is shown is not shown.

    Args:
        what: what is being done, "packing notes.txt".
        total: how much there is to do, None if that is not known.
        unit: of which things.
        shown: whether this process shows it.
    """

    def __init__(self, what: str, total: int | None = None, unit: str = "", shown: bool = True):
        global _shown
        self.what, self.total, self.unit, self.done = what, total, unit, 0
        self.started = self.said = time.monotonic()
        self.bar: Any = None
        self.shows = shown and _level in (NORMAL, VERBOSE) and _shown is None and _first_process()
        if self.shows:
            _shown = self
            if sys.stderr.isatty() and _level == NORMAL:
                from tqdm import tqdm  # start-up

                scaled = {"unit": "B", "unit_scale": True} if unit == "bytes" else {"unit": f" {unit}"}
                self.bar = tqdm(total=total, desc=what, delay=1, leave=False, dynamic_ncols=True, **scaled)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def add(self, count: int = 1) -> None:
        """Count work done."""
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        elif self.shows:
            self._say()

    def reach(self, done: int) -> None:
        """Count up to `done`, if that is more than was counted."""
        self.add(max(0, done - self.done))

    def _say(self) -> None:
        now = time.monotonic()
        if _level == VERBOSE:
            due = now - self.said >= VERBOSE_EVERY
        else:
            due = now - self.said >= (FIRST if self.said == self.started else EVERY)
        if due:
            self.said = now
            print(self.line(now - self.started), file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        """What a line says after so many seconds."""
        if not self.total:
            return f"{self.what}: {self.done:,} {self.unit}, {self.done / max(seconds, 1e-9):,.0f} a second"
        left = seconds / self.done * (self.total - self.done) if self.done else 0.0
        share = self.done / self.total
        return f"{self.what}: {self.done:,} of {self.total:,} {self.unit} ({share:.0%}), {left:,.0f} s left"

    def close(self) -> None:
        """End it; what comes after it may be shown."""
        global _shown
        if self.bar is not None:
            self.bar.close()
        if _shown is self:
            _shown = None


def counted(items: Iterable[T], what: str, total: int, unit: str) -> Iterator[T]:
    """Pass items on and show how many are done."""
    with Progress(what, total, unit) as progress:
        for item in items:
            yield item
            progress.add()


def _first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
