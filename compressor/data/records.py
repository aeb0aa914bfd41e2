"""Passages: what a record must look like, `load_texts`, which reads them from anywhere, and their tokens.

A passage is `{"id": str, "text": str}`, with `"date"` (yyyy-mm-dd) where the source has one.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np

from compressor.data.batches import tokenise
from compressor.data.rows import REASON, BadRecords, LeftOut, Row, read_rows
from compressor.data.sources import Hub, kind_of, resolve
from compressor.errors import CompressorError, first_line
from compressor.processes import bars_on_terminals

TEXT_FIELDS = ("text", "abstract")
DIGESTED = 20_000
"""Records whose tokens a digest reads at least, where there are so many."""

# Part of the cache key: raise it when the rows made from the same file change.
_READER_VERSION = 4


def load_texts(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    split: str | None = None,
    field: str | None = None,
    limit: int | None = None,
    documents: bool = False,
    skip_bad_records: bool = False,
    left_out: LeftOut | None = None,
) -> datasets.Dataset:
    """Read passages from a corpus folder, files or the hub.

    Args:
        source: a folder built by `compressor corpus`, any JSONL / JSON / CSV / TSV / Parquet / TXT file
            (".gz" too), a glob, the name of a shipped set ("arxiv-test"), a hub id ("owner/name" or
            "owner/name:config"), or a list of several.
        split: the split of a folder or hub data set that has several; plain files have none.
        field: the field that holds the passage; by default `text`, else `abstract`.
        limit: read only the first `limit` passages.
        documents: a .txt file is one passage, called as the file is, and not its paragraphs.
        skip_bad_records: leave records out that are null, blank or broken, up to `MOST_BAD` of them.
        left_out: counts them; without it a line on standard error says so.

    Returns:
        A memory-mapped `datasets.Dataset` with the columns `id`, `text` and, where every part of the
        source has it, `date`. Texts are as written, except that a .txt file is cut into paragraphs.
        A record without an id is called "<file name>:<line>".

    Raises:
        CompressorError: a source is not there, or a record is broken; names the file and line.
    """
    if limit is not None and limit < 1:
        raise CompressorError(f"limit is {limit}; give 1 or more, or leave it out to read everything")
    bad = BadRecords(skip_bad_records, left_out)
    reading = _Reading(split, field, documents, skip_bad_records)
    parts: list[datasets.Dataset] = []
    left = limit
    with bars_on_terminals():
        for place in resolve(source, split=split):
            parts.append(_part(place, reading, left, bad))
            left = None if left is None else left - len(parts[-1])
            if left == 0:
                break
    bad.finish(source, limit is not None)
    if left_out is None and bad.bad:
        print(f"note: {bad.left_out.line('records', sum(map(len, parts)))}", file=sys.stderr)
    if not any(map(len, parts)):
        raise CompressorError(f"{source} holds no usable records")
    common = [name for name in ("id", "text", "date") if all(name in part.column_names for part in parts)]
    parts = [part.select_columns(common) for part in parts]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def load_passages(
    sources: Sequence[str],
    tokenizer: Any,
    split: str | None = None,
    field: str | None = None,
    limit: int | None = None,
    workers: int = 1,
    skip_bad_records: bool = False,
    left_out: LeftOut | None = None,
) -> datasets.Dataset:
    """Tokenise passages, in parallel and cached by `datasets` on disk, from where they are memory-mapped.

    Args:
        sources: corpus folders, files or hub ids (`load_texts`).
        split: the split of those that have several.
        skip_bad_records, left_out: see `load_texts`.

    Returns:
        A data set with `id`, `input_ids` (no special tokens) and `tokens` (their number).
    """
    texts = load_texts(
        sources, split=split, field=field, limit=limit, skip_bad_records=skip_bad_records, left_out=left_out
    ).select_columns(["id", "text"])

    def tokenised(batch: dict[str, list[str]]) -> dict[str, Any]:
        ids = tokenise(tokenizer, batch["text"])
        return {"id": batch["id"], "input_ids": ids, "tokens": [len(one) for one in ids]}

    with bars_on_terminals():
        return texts.map(
            tokenised,
            batched=True,
            num_proc=workers if workers > 1 else None,
            remove_columns=texts.column_names,
            desc="tokenising",
        )


def passages_digest(passages: datasets.Dataset) -> str:
    """Number of records, and a hash over their token counts and the tokens of evenly spaced ones (at least 20,000)."""
    found = hashlib.sha256(np.asarray(passages["tokens"], dtype=np.int64).tobytes())
    chosen = passages.select(range(0, len(passages), max(1, len(passages) // DIGESTED)))
    for batch in chosen.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=1000):
        found.update(batch["input_ids"].combine_chunks().flatten().to_numpy().astype(np.int64).tobytes())
    return f"{len(passages):,} records {found.hexdigest()[:16]}"


class _Reading(NamedTuple):
    """What is asked for of every source; see `load_texts`."""

    split: str | None
    field: str | None
    documents: bool
    skip: bool


def _part(place: Path | Hub, reading: _Reading, limit: int | None, bad: BadRecords) -> datasets.Dataset:
    """The passages of a file or hub data set, checked one by one and kept in the loading layer's cache."""
    if isinstance(place, Hub):
        loaded = load_hub(place, reading.split)
        where = place.name if place.config is None else f"{place.name}:{place.config}"
        fields, field, state = loaded.column_names, reading.field, (where, loaded._fingerprint)
        rows = partial(hub_rows, loaded, where)
    else:
        first = next(read_rows(place, documents=reading.documents, bad=BadRecords(reading.skip)))
        where, fields, size = first.where, list(first.values), place.stat()
        # A text has no other fields to choose from, whatever is asked of the files beside it.
        field = None if kind_of(place) == ".txt" else reading.field
        state = (str(place.resolve()), f"{size.st_size} {size.st_mtime_ns}")
        rows = partial(read_rows, place, documents=reading.documents)
    name = text_field(fields, field, where)
    columns = ["id", "text", "bad", *(["date"] if "date" in fields else [])]
    # A key of our own: the layer's would not notice that a file changed under the same name.
    key = hashlib.sha256(repr((_READER_VERSION, state, name, columns, limit, reading)).encode()).hexdigest()[:32]
    default = where if isinstance(place, Hub) else place.name
    try:
        made = datasets.Dataset.from_generator(
            partial(_passages, rows, name, default, limit, reading.skip),
            features=datasets.Features({column: datasets.Value("string") for column in columns}),
            fingerprint=key,
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, CompressorError):
            raise error.__cause__ from None
        raise
    if told := made[-1]["bad"] if len(made) else "":
        bad.counted(*json.loads(told))
        made = made.select(range(len(made) - 1))
    bad.good += len(made)
    return made.remove_columns("bad")


def hub_rows(loaded: Any, where: str, bad: BadRecords | None = None) -> Iterator[Row]:
    """The rows of a hub data set, none of which is bad by itself."""
    for number, values in enumerate(loaded, start=1):
        yield Row(number, f"{where} row {number}", values)


def _passages(
    rows: Callable[..., Iterator[Row]], field: str, name: str, limit: int | None, skip: bool
) -> Iterator[dict[str, str]]:
    """Passages, and at the end a record in whose `bad` is what was left out: so the cache keeps that, too."""
    bad = BadRecords(skip)

    def passage(row: Row) -> dict[str, str]:
        found = {"id": row.id(default=f"{name}:{row.number}"), "text": row.text(field), "bad": ""}
        return {**found, **({"date": row.date("date")} if "date" in row.values else {})}

    yield from islice(bad.usable(rows(bad=bad), passage), limit)
    if bad.bad:
        yield {"id": "", "text": "", "date": "", "bad": json.dumps([bad.bad, bad.left_out.first[REASON]])}


def load_hub(hub: Hub, split: str | None, *, streaming: bool = False) -> Any:
    """A split of a hub data set; without `split` it must have only one. Errors say what was wrong."""
    try:
        loaded = datasets.load_dataset(hub.name, hub.config, split=split, streaming=streaming)
    except Exception as error:  # the hub client raises many kinds, also bare RuntimeError and OSError
        raise CompressorError(
            f"{hub.name!r} is no file here and could not be loaded from the hub: {first_line(error)}. Check the name, "
            "the split and the network, or give local files"
        ) from None
    if split is None:
        if len(loaded) != 1:
            raise CompressorError(
                f"{hub.name} has several splits and none was named: choose one of {', '.join(loaded)}"
            )
        loaded = next(iter(loaded.values()))
    return loaded


def rows_of(place: Path | Hub, split: str | None, bad: BadRecords) -> Iterator[Row]:
    """The rows of a file, or of a hub data set as a stream; see `read_rows` and `load_hub`."""
    if isinstance(place, Path):
        yield from read_rows(place, bad=bad)
        return
    yield from hub_rows(load_hub(place, split, streaming=True), place.name)


def text_field(names: Any, field: str | None, where: str) -> str:
    """The field that holds the passage among `names`: `field`, or the first of `TEXT_FIELDS`."""
    wanted = TEXT_FIELDS if field is None else (field,)
    for name in wanted:
        if name in names:
            return name
    raise CompressorError(
        f"{where} has no field {' or '.join(repr(name) for name in wanted)}; its fields are "
        f"{', '.join(map(repr, names)) or 'none'}. Name the one that holds the passage"
    )
