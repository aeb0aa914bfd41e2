"""Writing the splits of a corpus, and random samples of a stream."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from compressor.files import sha256

_ROWS_AT_ONCE = 10_000


class SplitWriter:
    """Writes the records of one split as a Parquet file, keeping at most a row group in memory.

    Args:
        text: field whose words are counted.
    """

    def __init__(self, path: Path, schema: Any, text: str) -> None:
        self.path, self.schema, self.text = path, schema, text
        self.records = self.words = 0
        self._dates: set[str] = set()
        self._rows: list[dict[str, Any]] = []
        self._writer: Any = None

    def add(self, record: dict[str, Any]) -> None:
        """Write one record."""
        self._rows.append(record)
        self.records += 1
        self.words += record[self.text].count(" ") + 1
        if date := record["date"]:
            self._dates = {min(self._dates | {date}), max(self._dates | {date})}
        if len(self._rows) == _ROWS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        if self._writer is None:
            self._writer = pq.ParquetWriter(self.path, self.schema, compression="zstd")
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self.schema))
            self._rows.clear()

    def close(self) -> dict[str, Any]:
        """Finish the file and describe the split for the manifest."""
        self._flush()
        self._writer.close()
        dates = {"first": min(self._dates), "last": max(self._dates)} if self._dates else None
        shard = {"file": self.path.name, "records": self.records, "bytes": self.path.stat().st_size}
        shard["sha256"] = sha256(self.path)
        return {"records": self.records, "words": self.words, "dates": dates, "shards": [shard]}


class Sample:
    """A random sample of a stream whose size need not be known.

    Each record gets a priority from a hash of seed and id, and the lowest `size` are kept: which records
    are drawn depends neither on their order nor on how the source was cut into files.
    With `balance`, records are drawn evenly from arXiv's archives, as far as each has enough.
    """

    def __init__(self, size: int, seed: int, *, balance: bool = False) -> None:
        self.size, self.seed, self.balance = size, seed, balance
        self.seen = 0
        self._heaps: dict[str, list[tuple[int, str, dict[str, str]]]] = {}

    def add(self, record: dict[str, str]) -> None:
        """Offer a record to the sample."""
        self.seen += 1
        digest = hashlib.blake2b(f"{self.seed}:{record['id']}".encode(), digest_size=8).digest()
        # heapq keeps the smallest in front; the largest priority must leave first, hence the minus.
        entry = (-int.from_bytes(digest, "big"), record["id"], record)
        heap = self._heaps.setdefault(archive(record["categories"]) if self.balance else "", [])
        if len(heap) < self.size:
            heapq.heappush(heap, entry)
        else:
            heapq.heappushpop(heap, entry)

    def records(self) -> Iterator[dict[str, str]]:
        """The sample in random order, so that its first n records are a sample too."""
        heaps = {name: sorted(heap, reverse=True) for name, heap in self._heaps.items()}
        shares = even_shares({name: len(heap) for name, heap in heaps.items()}, self.size)
        drawn = (entry for name, heap in heaps.items() for entry in heap[: shares[name]])
        return (record for _, _, record in sorted(drawn, key=lambda entry: entry[:2], reverse=True))


def archive(categories: str) -> str:
    """arXiv's archive of the primary category: "cs" of "cs.CL math.ST"; "" if there is none."""
    return next(iter(categories.split()), "").partition(".")[0]


def even_shares(available: dict[str, int], total: int) -> dict[str, int]:
    """Share `total` evenly; what a small group cannot give is shared among the others."""
    shares: dict[str, int] = {}
    left = total
    for place, (name, count) in enumerate(sorted(available.items(), key=lambda item: (item[1], item[0]))):
        groups = len(available) - place
        # Rounded up towards the largest groups, which come last.
        shares[name] = min(count, left // groups)
        left -= shares[name]
    return shares
