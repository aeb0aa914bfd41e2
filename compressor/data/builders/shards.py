"""Writing the splits of a corpus: Parquet shards, and random samples of a stream."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from compressor.files import sha256

FIELDS = ("id", "title", "abstract", "categories", "date")

_ROWS_AT_ONCE = 10_000


class SplitWriter:
    """Writes the records of one split as Parquet shards, keeping at most a row group in memory."""

    def __init__(self, folder: Path, split: str, shard_records: int) -> None:
        self.folder, self.split, self.shard_records = folder, split, shard_records
        self.records = self.words = 0
        self.first_date = self.last_date = ""
        self._rows: list[dict[str, str]] = []
        self._counts: list[int] = []
        self._writer: Any = None

    def add(self, record: dict[str, str]) -> None:
        """Write one record (all of `FIELDS`, text)."""
        self._rows.append(record)
        self.records += 1
        self.words += record["abstract"].count(" ") + 1
        if date := record["date"]:
            self.first_date = min(self.first_date or date, date)
            self.last_date = max(self.last_date, date)
        in_shard = (self._counts[-1] if self._writer else 0) + len(self._rows)
        if in_shard == self.shard_records or len(self._rows) == _ROWS_AT_ONCE:
            self._flush()
            if in_shard == self.shard_records:
                self._end_shard()

    def _part(self, index: int) -> Path:
        return self.folder / f"{self.split}-{index:05d}.part"

    def _flush(self) -> None:
        if not self._rows:
            return
        schema = pa.schema([(name, pa.string()) for name in FIELDS])
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._part(len(self._counts)), schema, compression="zstd")
            self._counts.append(0)
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=schema))
        self._counts[-1] += len(self._rows)
        self._rows.clear()

    def _end_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def close(self) -> dict[str, Any]:
        """Finish the last shard, give the shards their names, and describe the split for the manifest."""
        self._flush()
        self._end_shard()
        shards = []
        for index, records in enumerate(self._counts):
            # The names `datasets` knows: the total is in them, so they are given at the end.
            path = self.folder / f"{self.split}-{index:05d}-of-{len(self._counts):05d}.parquet"
            self._part(index).rename(path)
            size = path.stat().st_size
            shards.append({"file": path.name, "records": records, "bytes": size, "sha256": sha256(path)})
        dates = {"first": self.first_date, "last": self.last_date} if self.first_date else None
        return {"records": self.records, "words": self.words, "dates": dates, "shards": shards}


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
