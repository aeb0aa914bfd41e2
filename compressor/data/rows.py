"""Rows: the records of files, each knowing its line, and what of them is left out.

Every reader here names the file and the line (row, item) of what it cannot read, as a `CompressorError`. Records that
cannot be used are errors that name the first, or they are left out and counted.
"""

from __future__ import annotations

import csv
import datetime
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from compressor.data.sources import KINDS, MOST_LINE, kind_of, raw_lines, read_text, text_lines
from compressor.errors import CompressorError
from compressor.files import unreadable
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
P = ParamSpec("P")


class Row(NamedTuple):
    """One record as it was read: `where` names its file and place, `values` maps fields to values."""

    number: int
    where: str
    values: dict[str, Any]

    def string(self, field: str, *, blank: bool = True) -> str:
        """The text in `field`. A `BadRecord` if it is missing, no text, not storable, or blank."""
        if field not in self.values:
            fields = ", ".join(map(repr, self.values)) or "none"
            raise BadRecord(f"{self.where}: the field {field!r} is missing; its fields are {fields}")
        value = self.values[field]
        if not isinstance(value, str):
            raise BadRecord(f"{self.where}: the field {field!r} must be text but is {type_name(value)}")
        if not blank and not value.strip():
            raise BadRecord(f"{self.where}: the field {field!r} is blank")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadRecord(
                f"{self.where}: the field {field!r} holds half a surrogate pair at character {error.start + 1}"
            ) from None
        return value

    def text(self, field: str) -> str:
        """The passage in `field`: text that is not blank."""
        return self.string(field, blank=False)

    def id(self, field: str = "id", *, default: str | None = None) -> str:
        """The id as text; `default` where there is no such field."""
        if field not in self.values and default is not None:
            return default
        value = self.values.get(field)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, float):
            # 0704.0010 read as a number is 704.001: another paper.
            raise BadRecord(f"{self.where}: the {field} {value!r} is a number; store ids as text")
        return self.text(field)

    def date(self, field: str) -> str:
        """A date as text: dates and times become yyyy-mm-dd, null becomes "", text stays as it is."""
        value = self.values[field]
        if isinstance(value, datetime.date):
            return value.isoformat()[:10]
        return "" if value is None else self.string(field)


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

    def caught(self, make: Callable[P, Iterable[T]], *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        """What `make` gives, up to where it raises `BadRecord`; does not count what is good."""
        try:
            yield from make(*args, **kwargs)
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


def read_rows(path: Path, *, documents: bool = False, bad: BadRecords | None = None) -> Iterator[Row]:
    """Read a data file record by record, in constant memory (a JSON array is read whole).

    JSON lines (also under the name .json), JSON arrays of objects, CSV and TSV with a header line,
    Parquet, and text, where each paragraph (separated by blank lines) becomes `{"text": ...}`.
    All but Parquet may be compressed with gzip.

    Args:
        documents: a text file is one record, as `read_text` reads it, and not its paragraphs.
        bad: takes lines and items that are no records; by default the first of them is an error.

    Raises:
        CompressorError: names the file and line of whatever is broken; also when there is no record.
    """
    bad = BadRecords() if bad is None else bad
    readers: dict[str, Callable[[Path], Iterator[Row]]] = {
        **dict.fromkeys((".jsonl", ".ndjson", ".json"), partial(_json_rows, bad=bad)),
        **dict.fromkeys((".csv", ".tsv"), partial(_csv_rows, bad=bad)),
        ".parquet": _parquet_rows,
        ".txt": _document_rows if documents else _text_rows,
    }
    kind = kind_of(path)
    if kind is None:
        raise CompressorError(f"{path} is not a kind of file that can be read: {KINDS}")
    try:
        if path.stat().st_size == 0:
            raise CompressorError(f"{path} is empty")
        row = None
        for row in readers[kind](path):
            yield row
        if row is None:
            raise CompressorError(f"{path} holds no records")
    except OSError as error:
        raise CompressorError(f"{path} cannot be read: {error.strerror or error}") from None


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"character {error.colno}" if error.lineno == 1 else f"line {error.lineno} of it"
        raise CompressorError(f"{where} is not valid JSON: {error.msg} at {place}") from None
    except (ValueError, RecursionError) as error:
        raise CompressorError(f"{where} is not valid JSON: {error}") from None


def read_document(path: Path) -> Any:
    """The one JSON value that a file (also .gz) holds."""
    return _parse_json("".join(line for _, line in raw_lines(path)), str(path))


def _json_rows(path: Path, bad: BadRecords) -> Iterator[Row]:
    lines = raw_lines(path)
    first = True
    for number, line in lines:
        where = f"{path} line {number}"
        if not line.strip():
            continue
        if first and line.lstrip().startswith("[") and kind_of(path) == ".json":
            items = _parse_json(line + "".join(rest for _, rest in lines), f"the array from {where} on")
            for index, item in enumerate(items, start=1):
                yield from bad.caught(_object_row, index, f"{path} item {index}", item)
            return
        first = False
        yield from bad.caught(_line_row, number, where, line)


def _line_row(number: int, where: str, line: str) -> list[Row]:
    try:
        return _object_row(number, where, _parse_json(line, where))
    except CompressorError as error:
        raise BadRecord(str(error)) from None


def _object_row(number: int, where: str, value: Any) -> list[Row]:
    if not isinstance(value, dict):
        raise BadRecord(f"{where} is {type_name(value)}, not an object of fields like {{'text': ...}}")
    return [Row(number, where, value)]


def _csv_rows(path: Path, bad: BadRecords) -> Iterator[Row]:
    # The csv module refuses fields of more than 128 KiB by default; a long passage is no error.
    csv.field_size_limit(max(csv.field_size_limit(), MOST_LINE))
    delimiter = "\t" if kind_of(path) == ".tsv" else ","
    reader = csv.reader((line for _, line in raw_lines(path)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        first = reader.line_num + 1
        where = f"{path} line {first}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise CompressorError(f"{where} is not valid CSV: {error}") from None
        if not cells:
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            if len(set(header)) < len(header):
                raise CompressorError(f"{where}: the header names a column twice: {', '.join(header)}")
        elif len(cells) != len(header):
            bad.add(
                f"{where} has {len(cells)} cells but the header has {len(header)} ({', '.join(header)}); "
                "quote cells that hold the separator or a line break"
            )
        else:
            yield Row(first, where, dict(zip(header, cells, strict=True)))


def _text_rows(path: Path) -> Iterator[Row]:
    for written, lines in groupby(text_lines(path), lambda one: bool(one[1].strip())):
        if written:
            (start, *_), texts = zip(*lines, strict=True)
            yield Row(start, f"{path} line {start}", {"text": "".join(texts).rstrip("\n")})


def _document_rows(path: Path) -> Iterator[Row]:
    yield Row(1, str(path), {"id": path.name, "text": read_text(path)})


def _parquet_rows(path: Path) -> Iterator[Row]:
    number = 0
    with _open_parquet(path) as file:
        try:
            for batch in file.iter_batches(batch_size=2048):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(number, f"{path} row {number}", values)
        except (pa.ArrowException, OSError, ValueError) as error:
            if isinstance(error, CompressorError):
                raise
            raise CompressorError(f"{path} is damaged after row {number}: {error}") from None


def _open_parquet(path: Path) -> Any:
    """`pyarrow.parquet.ParquetFile`, or a `CompressorError` when `path` is not one."""
    try:
        return pq.ParquetFile(path)
    except PermissionError as error:
        raise unreadable(path, error) from None
    except (pa.ArrowException, OSError) as error:
        raise CompressorError(f"{path} is not a readable Parquet file: {error}") from None


def type_name(value: Any) -> str:
    """The type of a value as people name it, for messages."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"a number ({value!r})"[:60]
    names = {dict: "an object", list: "a list", str: "text", type(None): "null", bool: "a boolean"}
    return names.get(type(value), type(value).__name__)
