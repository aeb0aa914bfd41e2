"""Passages: what a record must look like, and `load_texts`, which reads them from anywhere.

A passage is `{"id": str, "text": str}`, with `"date"` (yyyy-mm-dd) where the source has one.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from compressor.data.bad_records import REASON, BadRecord, BadRecords
from compressor.data.left_out import LeftOut
from compressor.data.sources import Hub, Row, kind_of, open_parquet, read_rows, resolve, type_name
from compressor.errors import CompressorError
from compressor.processes import bars_on_terminals

TEXT_FIELDS = ("text", "abstract")

# Part of the cache key: raise it when the rows made from the same file change.
_READER_VERSION = 3


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
            "owner/name:config"), or several of these in a list or with commas.
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
    parts: list[datasets.Dataset] = []
    left = limit
    with bars_on_terminals():
        reading = _Reading(field, limit, documents, skip_bad_records)
        for part in _parts(resolve(source, split=split), split, reading, bad):
            part = part if left is None else part.select(range(min(left, len(part))))
            parts.append(part)
            left = None if left is None else left - len(part)
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


class _Reading(NamedTuple):
    """What is asked for of every source; see `load_texts`."""

    field: str | None
    limit: int | None
    documents: bool
    skip: bool


def _parts(
    places: list[Path | Hub], split: str | None, reading: _Reading, bad: BadRecords
) -> Iterator[datasets.Dataset]:
    for is_hub, group in groupby(places, key=lambda place: isinstance(place, Hub)):
        if is_hub:
            for place in group:
                yield _hub(cast("Hub", place), split, reading.field, bad)
        else:
            yield from _files([cast("Path", place) for place in group], reading, bad)


class _Plan(NamedTuple):
    """How one file is read: by `datasets` straight from Parquet, or row by row."""

    direct: bool
    field: str
    has_date: bool


def _files(paths: list[Path], reading: _Reading, bad: BadRecords) -> Iterator[datasets.Dataset]:
    """One data set for each run of files that can be read alike, up to about `limit` records."""
    planned = [(path, _plan(path, reading)) for path in paths]
    for plan, group in groupby(planned, key=lambda pair: pair[1]):
        files = [path for path, _ in group]
        names = ["id", plan.field, "date"] if plan.has_date else ["id", plan.field]
        if plan.direct:
            files = _first_files(files, reading.limit)
            usable = np.concatenate([_usable_rows(path, names, bad) for path in files])
            features = datasets.Features({name: datasets.Value("string") for name in names})
            part = datasets.Dataset.from_parquet([str(path) for path in files], features=features, columns=names)
            part = part if usable.all() else part.select(np.flatnonzero(usable))
            yield part if plan.field == "text" else part.rename_column(plan.field, "text")
        else:
            yield _generated(files, plan, reading, bad)


def _plan(path: Path, reading: _Reading) -> _Plan:
    if path.suffix == ".parquet":
        with open_parquet(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
        if rows == 0:
            raise CompressorError(f"{path} holds no records")
        name = text_field(schema.names, reading.field, str(path))
        strings = {
            column.name for column in schema if pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        }
        dated = "date" in schema.names
        return _Plan({"id", name} <= strings and (not dated or "date" in strings), name, dated)
    # A text has no other fields to choose from, whatever is asked of the files beside it.
    field = None if kind_of(path) == ".txt" else reading.field
    row = next(read_rows(path, documents=reading.documents, bad=BadRecords(reading.skip)))
    return _Plan(False, text_field(row.values, field, row.where), "date" in row.values)


def _first_files(files: list[Path], limit: int | None) -> list[Path]:
    """As many of `files` as `limit` records need: the loading layer converts whole files."""
    if limit is None:
        return files
    total, taken = 0, []
    for path in files:
        taken.append(path)
        with open_parquet(path) as file:
            total += file.metadata.num_rows
        if total >= limit:
            break
    return taken


def _usable_rows(path: Path, names: list[str], bad: BadRecords) -> np.ndarray:
    """Which rows of a Parquet file have an id and a text, bool `[rows]`. Reads in batches."""
    usable: list[np.ndarray] = []
    seen = 0
    with open_parquet(path) as file:
        try:
            for batch in file.iter_batches(batch_size=16_384, columns=names):
                good = np.ones(len(batch), dtype=bool)
                for name in names[:2]:  # a date may be blank
                    column = batch.column(name)
                    without = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(column), ""), True)
                    for index in np.flatnonzero(without.to_numpy(zero_copy_only=False) & good).tolist():
                        what = "null" if column[index].as_py() is None else "blank"
                        bad.add(f"{path} row {seen + index + 1}: the field {name!r} is {what}")
                        good[index] = False
                bad.good += int(good.sum())
                usable.append(good)
                seen += len(batch)
        except (pa.ArrowException, OSError) as error:
            raise CompressorError(f"{path} is damaged after row {seen}: {error}") from None
    return np.concatenate(usable)


def _generated(files: list[Path], plan: _Plan, reading: _Reading, bad: BadRecords) -> datasets.Dataset:
    """Rows checked one by one and kept in the loading layer's cache."""
    names = ["id", "text", "bad", *(["date"] if plan.has_date else [])]
    # A key of our own: the layer's would not notice that a file changed under the same name.
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = hashlib.sha256(repr((_READER_VERSION, states, plan, reading)).encode()).hexdigest()[:32]
    try:
        made = datasets.Dataset.from_generator(
            _passages,
            features=datasets.Features({name: datasets.Value("string") for name in names}),
            gen_kwargs={"files": [str(path) for path in files], "field": plan.field, "reading": reading},
            fingerprint=key,
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, CompressorError):
            raise error.__cause__ from None
        raise
    told = made[-1]["bad"]
    if told:
        bad.counted(*json.loads(told))
        made = made.select(range(len(made) - 1))
    bad.good += len(made)
    return made.remove_columns("bad")


def _passages(files: list[str], field: str, reading: _Reading) -> Iterator[dict[str, str]]:
    """Passages, and at the end a record in whose `bad` is what was left out: so the cache keeps that, too."""
    bad = BadRecords(reading.skip)

    def passage(row: tuple[Path, Row]) -> dict[str, str]:
        path, values = row
        found = {"id": record_id(values, default=f"{path.name}:{values.number}"), "text": text_value(values, field)}
        return {**found, "bad": "", **({"date": date_value(values, "date")} if "date" in values.values else {})}

    rows = ((Path(file), row) for file in files for row in read_rows(Path(file), documents=reading.documents, bad=bad))
    yield from islice(bad.usable(rows, passage), reading.limit)
    if bad.bad:
        yield {"id": "", "text": "", "date": "", "bad": json.dumps([bad.bad, bad.left_out.first[REASON]])}


def _hub(hub: Hub, split: str | None, field: str | None, bad: BadRecords) -> datasets.Dataset:
    named = hub.name if hub.config is None else f"{hub.name}:{hub.config}"
    loaded = load_hub(hub, split)
    name = text_field(loaded.column_names, field, named)
    if "id" not in loaded.column_names:
        loaded = loaded.add_column("id", [f"{named}:{index + 1}" for index in range(len(loaded))])
    keep = ["id", name, *(["date"] if "date" in loaded.column_names else [])]
    texts = enumerate((text for batch in loaded.select_columns([name]).iter(1000) for text in batch[name]), start=1)

    def place(numbered: tuple[int, Any]) -> int:
        number, text = numbered
        text_value(Row(number, f"{named} row {number}", {name: text}), name)
        return number - 1

    usable = list(bad.usable(texts, place))
    if len(usable) < len(loaded):
        loaded = loaded.select(usable)
    loaded = loaded.select_columns(keep).rename_columns({name: "text"} if name != "text" else {})
    return loaded.cast(datasets.Features({column: datasets.Value("string") for column in loaded.column_names}))


def load_hub(hub: Hub, split: str | None, *, streaming: bool = False) -> Any:
    """A split of a hub data set; without `split` it must have only one. Errors say what was wrong."""
    try:
        loaded = datasets.load_dataset(hub.name, hub.config, split=split, streaming=streaming)
    except Exception as error:  # the hub client raises many kinds, also bare RuntimeError and OSError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CompressorError(
            f"{hub.name!r} is no file here and could not be loaded from the hub: {reason}. Check the name, "
            "the split and the network, or give local files"
        ) from None
    if split is None:
        if len(loaded) != 1:
            raise CompressorError(
                f"{hub.name} has several splits and none was named: choose one of {', '.join(loaded)}"
            )
        loaded = next(iter(loaded.values()))
    return loaded


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


def string_value(row: Row, field: str, *, blank: bool = True) -> str:
    """The text in `field`. A `BadRecord` if it is missing, no text, not storable, or blank."""
    if field not in row.values:
        fields = ", ".join(map(repr, row.values)) or "none"
        raise BadRecord(f"{row.where}: the field {field!r} is missing; its fields are {fields}")
    value = row.values[field]
    if not isinstance(value, str):
        raise BadRecord(f"{row.where}: the field {field!r} must be text but is {type_name(value)}")
    if not blank and not value.strip():
        raise BadRecord(f"{row.where}: the field {field!r} is blank")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(
            f"{row.where}: the field {field!r} holds half a surrogate pair at character {error.start + 1}"
        ) from None
    return value


def text_value(row: Row, field: str) -> str:
    """The passage of a row: text that is not blank."""
    return string_value(row, field, blank=False)


def record_id(row: Row, field: str = "id", *, default: str | None = None) -> str:
    """The id of a row as text; `default` where the row has no such field."""
    if field not in row.values and default is not None:
        return default
    value = row.values.get(field)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float):
        # 0704.0010 read as a number is 704.001: another paper.
        raise BadRecord(f"{row.where}: the {field} {value!r} is a number; store ids as text")
    return string_value(row, field, blank=False)


def date_value(row: Row, field: str) -> str:
    """A date as text: dates and times become yyyy-mm-dd, null becomes "", text stays as it is."""
    value = row.values[field]
    if isinstance(value, datetime.date):
        return value.isoformat()[:10]
    return "" if value is None else string_value(row, field)
