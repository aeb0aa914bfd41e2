"""What was left out of data: how often for which reason, and where first."""

from __future__ import annotations

from collections import Counter
from typing import Any

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
