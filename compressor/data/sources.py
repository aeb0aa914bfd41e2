"""Where records come from: names become files, and files become rows that know their line.

Every reader here names the file and the line (row, item) of what it cannot read, as a `CompressorError`.
"""

from __future__ import annotations

import csv
import glob
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from compressor.data.left_out import BadRecord, BadRecords
from compressor.data.text_files import MOST_LINE, raw_lines, read_text, text_lines
from compressor.errors import CompressorError
from compressor.files import PROJECT, read_json, unreadable

SHIPPED = PROJECT / "data"
SPLITS = ("train", "validation", "test")
MANIFEST = "manifest.json"
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")


class Row(NamedTuple):
    """One record as it was read: `where` names its file and place, `values` maps fields to values."""

    number: int
    where: str
    values: dict[str, Any]


class Hub(NamedTuple):
    """A data set on the hub: `name` is owner/name, `config` its configuration if one was named."""

    name: str
    config: str | None


def kind_of(path: Path) -> str | None:
    """The data suffix of `path` (".jsonl" for "x.jsonl.gz"), or None if it is not a data file."""
    name = path.name.lower().removesuffix(".gz")
    suffix = Path(name).suffix
    return suffix if suffix in SUFFIXES else None


def stem_of(path: Path) -> str:
    """The name of `path` without folder, data suffix and ".gz"."""
    return Path(path.name[:-3] if path.name.lower().endswith(".gz") else path.name).stem


def split_of(path: Path) -> str | None:
    """The split that a file name states, as `datasets` reads it: "train-00000.parquet" is "train"."""
    match = re.match(rf"({'|'.join(SPLITS)})(?![A-Za-z0-9])", stem_of(path))
    return match.group(1) if match else None


def shipped_names() -> list[str]:
    """Names of the small sets that come with the project, such as "arxiv-test"."""
    if not SHIPPED.is_dir():
        return []
    return sorted(stem_of(path) for path in SHIPPED.iterdir() if kind_of(path))


def resolve(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    split: str | None = None,
    every_split: bool = False,
) -> list[Path | Hub]:
    """Turn what the user wrote into files (and hub ids), in the order written.

    Args:
        source: a file, a folder (a built corpus, or data files), a glob, a shipped name, a hub id
            ("owner/name" or "owner/name:config"), or a list of several.
        split: which split to take of a folder that holds several. Plain files have no splits.
        every_split: take all files of a folder, whatever their splits.

    Raises:
        CompressorError: nothing matches, or a folder needs `split`.
    """
    items = [source] if isinstance(source, str | os.PathLike) else source
    found = [part for item in items for part in _resolve_one(os.fspath(item).strip(), split, every_split)]
    if not found:
        raise CompressorError("no data source was given: name a file, a folder, a glob or a hub id")
    return found


def _resolve_one(text: str, split: str | None, every_split: bool) -> list[Path | Hub]:
    path = Path(text).expanduser()
    if text and path.is_dir():
        return list(_folder_files(path, split, every_split))
    if text and path.exists():
        if kind_of(path) is None:
            raise CompressorError(f"{path} is not a kind of file that can be read: {_kinds()}")
        return [path]
    if any(mark in text for mark in "*?["):
        matches = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        files: list[Path | Hub] = [match for match in matches if match.is_file() and kind_of(match)]
        if not files:
            raise CompressorError(f"no data file matches {text!r} ({_kinds()})")
        return files
    if text in (names := shipped_names()):
        return [next(path for path in sorted(SHIPPED.iterdir()) if kind_of(path) and stem_of(path) == text)]
    if _HUB_ID.fullmatch(text) and kind_of(path) is None and not Path(text.split("/")[0]).exists():
        name, _, config = text.partition(":")
        return [Hub(name, config or None)]
    raise CompressorError(
        f"{text!r} is not there: it is neither a file nor a folder, nor one of the sets that come with the "
        f"project ({', '.join(names) or 'none here'}), nor a hub id (owner/name)"
    )


def _kinds() -> str:
    return f"known: {', '.join(SUFFIXES)}, each also with .gz except .parquet"


def _folder_files(folder: Path, split: str | None, every_split: bool) -> list[Path]:
    """Data files of a folder: the shards its manifest lists, or the files that lie in it."""
    if (folder / MANIFEST).exists():
        manifest = read_json(folder / MANIFEST)
        try:
            by_split = {
                name: [folder / shard["file"] for shard in value["shards"]]
                for name, value in manifest["splits"].items()
            }
        except (TypeError, KeyError, AttributeError):
            raise CompressorError(
                f"{folder / MANIFEST} is not the manifest of a corpus: no splits.<name>.shards[].file"
            ) from None
    else:
        by_split = {}
        others = []
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                continue
            if path.is_file() and kind_of(path):
                by_split.setdefault(split_of(path) or "", []).append(path)
            else:
                others.append(path.name + "/" * path.is_dir())
        if by_split and others:
            _say_not_read(folder, tuple(others))
    by_split = {name: files for name, files in by_split.items() if files}
    if not by_split:
        raise CompressorError(f"{folder} holds no data ({_kinds()})")
    if split is None and len(by_split) == 1:
        split = next(iter(by_split))
    if not every_split and (split is None or split not in by_split):
        # Mixing splits by default would train on the test set without a word.
        names = ", ".join(name or "(files of no split)" for name in by_split)
        got = "none was named" if split is None else f"it has no {split!r}"
        raise CompressorError(f"{folder} holds several splits and {got}: choose one of {names}")
    chosen = [path for name, files in by_split.items() if every_split or name == split for path in files]
    missing = [path for path in chosen if not path.exists()]
    if missing:
        raise CompressorError(f"{missing[0]} is listed in {folder / MANIFEST} but is not there; build it again")
    return chosen


@lru_cache
def _say_not_read(folder: Path, names: tuple[str, ...]) -> None:
    """A line, once, on what lies in a folder of data and is none."""
    shown = ", ".join(names[:3]) + ("" if len(names) <= 3 else ", ...")
    print(f"note: {len(names)} of what {folder} holds is not read ({_kinds()}): {shown}", file=sys.stderr)


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
        raise CompressorError(f"{path} is not a kind of file that can be read: {_kinds()}")
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
                yield from bad.caught(partial(_object_row, index, f"{path} item {index}", item))
            return
        first = False
        yield from bad.caught(partial(_line_row, number, where, line))


def _line_row(number: int, where: str, line: str) -> Row:
    try:
        return _object_row(number, where, _parse_json(line, where))
    except CompressorError as error:
        raise BadRecord(str(error)) from None


def _object_row(number: int, where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise BadRecord(f"{where} is {type_name(value)}, not an object of fields like {{'text': ...}}")
    return Row(number, where, value)


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
    paragraph: list[str] = []
    start = 1
    for number, line in text_lines(path):
        if line.strip():
            if not paragraph:
                start = number
            paragraph.append(line)
        elif paragraph:
            yield Row(start, f"{path} line {start}", {"text": "".join(paragraph).rstrip("\n")})
            paragraph = []
    if paragraph:
        yield Row(start, f"{path} line {start}", {"text": "".join(paragraph).rstrip("\n")})


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
