"""Where data comes from: names become files, and files of text become lines.

All text is read here: encodings, gzip, line ends, and errors that name file and line.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import io
import os
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, NamedTuple, cast

from compressor.errors import CompressorError
from compressor.files import PROJECT, read_json
from compressor.streams import input_stream

SHIPPED = PROJECT / "data"
SPLITS = ("train", "validation", "test")
MANIFEST = "manifest.json"
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
KINDS = f"known: {', '.join(SUFFIXES)}, each also with .gz except .parquet"
"""For messages."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")
MOST_LINE = 1 << 26
"""A longer line is not text; without a limit, binary junk is read into memory whole."""
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_ADVICE = "binary data, or UTF-16 without a byte order mark; give UTF-8 text"


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
            raise CompressorError(f"{path} is not a kind of file that can be read: {KINDS}")
        return [path]
    if any(mark in text for mark in "*?["):
        matches = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        files: list[Path | Hub] = [match for match in matches if match.is_file() and kind_of(match)]
        if not files:
            raise CompressorError(f"no data file matches {text!r} ({KINDS})")
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
        raise CompressorError(f"{folder} holds no data ({KINDS})")
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
    print(f"note: {len(names)} of what {folder} holds is not read ({KINDS}): {shown}", file=sys.stderr)


def read_text(path: str | Path, *, as_written: bool = False) -> str:
    """The text of a file (also .gz), or of standard input for "-".

    Args:
        as_written: keep line ends (otherwise all become "\\n"), the white space around the text, and a byte order
            mark of UTF-8.

    Raises:
        CompressorError: the file is missing, blank or not text.
    """
    name = "standard input" if str(path) == "-" else str(path)
    try:
        lines = _decoded(input_stream(), name, as_written) if str(path) == "-" else raw_lines(Path(path), as_written)
        text = "".join(line for _, line in lines)
    except OSError as error:
        there = "" if Path(path).exists() else "; name a text file, or give - and the text on standard input"
        raise CompressorError(f"cannot read {name}: {error.strerror or error}{there}") from None
    if not text.strip().strip("\ufeff"):
        raise CompressorError(f"{name} is empty: give a text of at least one word")
    return text if as_written else _plain_ends(text).strip()


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbers (from 1) and lines of a text file, whose ends are all "\\n"."""
    before = ""
    number = 0
    for _, line in raw_lines(path):
        # A file may end its lines with "\\r" alone: for the reader of bytes it is all one line.
        *whole, rest = _plain_ends(before + line).split("\n")
        for one in whole:
            number += 1
            yield number, one + "\n"
        before = rest
    if before:
        yield number + 1, before


def raw_lines(path: Path, marked: bool = False) -> Iterator[tuple[int, str]]:
    """Numbers (from 1) and lines of a text file (also .gz), with their ends as they are, without a byte order mark.

    Args:
        marked: leave the byte order mark of UTF-8 where it is.

    Raises:
        CompressorError: not UTF-8 (UTF-16 and UTF-32 have a byte order mark), or not text; names file and line.
        OSError: it cannot be read.
    """
    with open(path, "rb") as probe:
        compressed = probe.read(2) == b"\x1f\x8b"
    with cast("IO[bytes]", gzip.open(path, "rb") if compressed else open(path, "rb")) as file:
        yield from _decoded(file, str(path), marked)


def _decoded(file: IO[bytes], name: str, marked: bool) -> Iterator[tuple[int, str]]:
    """Lines, decoded one by one so that errors have a line."""
    number = 0
    try:
        first = file.readline(MOST_LINE + 1)
        for mark, encoding in _MARKS.items():
            if first.startswith(mark):
                whole = io.StringIO((first + file.read()).decode(encoding), newline="")
                yield from enumerate(whole, start=1)
                return
        line = first
        while line:
            number += 1
            if len(line) > MOST_LINE:
                raise CompressorError(f"{name} line {number} is longer than {MOST_LINE:,} bytes: not text?")
            if b"\0" in line:
                raise CompressorError(f"{name} line {number} holds a zero byte: {_ADVICE}")
            yield number, line.decode("utf-8-sig" if number == 1 and not marked else "utf-8")
            line = file.readline(MOST_LINE + 1)
    except UnicodeDecodeError as error:
        encoding = "UTF-8" if error.encoding.startswith("utf-8") else error.encoding.upper()
        where = f"line {number} " if encoding == "UTF-8" else ""
        raise CompressorError(
            f"{name} {where}is not {encoding} (byte {error.start + 1}: {error.reason}); convert the file, or it is "
            "damaged"
        ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CompressorError(f"{name} is a damaged gzip file after line {number}: {error}") from None


def _plain_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")
