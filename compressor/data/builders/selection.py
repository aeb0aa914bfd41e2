"""Which records enter a corpus, and which split each belongs to."""

from __future__ import annotations

import hashlib
from collections import Counter

from compressor.data.builders.abstracts import base_id, comparable
from compressor.data.builders.choice import CorpusConfig
from compressor.data.sources import SPLITS
from compressor.errors import CompressorError


class Selection:
    """Decides which split a record belongs to, or why it is dropped, and counts.

    Of several equal records the first is kept, in whatever split it is, so that no text is in two.
    """

    def __init__(self, rules: CorpusConfig, cuts: tuple[str, str, str]) -> None:
        """`cuts` are the first days after train, validation and test (yyyy-mm-dd)."""
        self.rules, self.cuts = rules, cuts
        self.kept: Counter[str] = Counter()
        self.month_dates: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self._ids: set[int] = set()
        self._texts: set[int] = set()

    def split_of(self, found: dict[str, str] | str, source_split: str | None, where: str) -> str | None:
        """The split of a record; None if it is dropped. `found` is the record, or the reason to drop it."""
        verdict = found if isinstance(found, str) else self._verdict(found, source_split, where)
        if verdict in SPLITS and isinstance(found, dict):
            self.kept[verdict] += 1
            if len(found["date"]) == len("yyyy-mm"):
                # The schema has days; that the day is unknown is counted for the manifest.
                self.month_dates[verdict] += 1
                found["date"] += "-01"
            return verdict
        self.dropped[verdict] += 1
        return None

    def _verdict(self, record: dict[str, str], source_split: str | None, where: str) -> str:
        rules = self.rules
        words = record["abstract"].count(" ") + 1
        if words < rules.min_words:
            return "too_short"
        if rules.max_words is not None and words > rules.max_words:
            return "too_long"
        split = self._split_of_date(record, where)
        if split not in SPLITS:
            return split
        if rules.keep_source_splits and source_split not in (None, split):
            return "date_of_other_split"
        # Keys are kept only for records that are: a dropped one must not make its twin a duplicate.
        id_key, text_key = _hash(base_id(record["id"])), _hash(comparable(record["abstract"]))
        if id_key in self._ids:
            return "duplicate_id"
        if text_key in self._texts:
            return "duplicate_text"
        self._ids.add(id_key)
        self._texts.add(text_key)
        return split

    def _split_of_date(self, record: dict[str, str], where: str) -> str:
        if record["date"]:
            date = record["date"]
            first, last = (f"{date}-01", f"{date}-31") if len(date) == len("yyyy-mm") else (date, date)
            if self._split_of_day(first) != self._split_of_day(last):
                # A cut lies within the month: the record could be on either side of it.
                return "month_holds_a_cut"
            return self._split_of_day(first)
        if self.rules.undated == "error":
            raise CompressorError(
                f"{where} has no date and its id {record['id']!r} states none: name the field (date_field), "
                "or the split of records without a date (undated)"
            )
        return self.rules.undated

    def _split_of_day(self, day: str) -> str:
        pairs = zip(SPLITS, self.cuts, strict=True)
        return next((name for name, cut in pairs if day < cut), "after_test")


def _hash(text: str) -> int:
    """64 bits: among 2.7 million texts two different ones collide with a chance of 2 in 10 million."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
