"""The one door for files of text: encodings, gzip, line ends, and errors that name file and line."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from compressor.errors import CompressorError
from compressor.streams import input_stream

MOST_LINE = 1 << 26
"""A longer line is not text; without a limit, binary junk is read into memory whole."""
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_ADVICE = "binary data, or UTF-16 without a byte order mark; give UTF-8 text"


def read_text(path: str | Path, *, as_written: bool = False) -> str:
    """The text of a file (also .gz), or of standard input for "-".

    Args:
        as_written: keep line ends (otherwise all become "\\n") and the white space around the text.

    Raises:
        CompressorError: the file is missing, blank or not text.
    """
    name = "standard input" if str(path) == "-" else str(path)
    try:
        lines = _decoded(input_stream(), name) if str(path) == "-" else raw_lines(Path(path))
        text = "".join(line for _, line in lines)
    except OSError as error:
        raise CompressorError(f"cannot read {name}: {error.strerror or error}") from None
    if not text.strip():
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


def raw_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbers (from 1) and lines of a text file (also .gz), with their ends as they are, without a byte order mark.

    Raises:
        CompressorError: not UTF-8 (UTF-16 and UTF-32 have a byte order mark), or not text; names file and line.
        OSError: it cannot be read.
    """
    with open(path, "rb") as probe:
        compressed = probe.read(2) == b"\x1f\x8b"
    with cast("IO[bytes]", gzip.open(path, "rb") if compressed else open(path, "rb")) as file:
        yield from _decoded(file, str(path))


def _decoded(file: IO[bytes], name: str) -> Iterator[tuple[int, str]]:
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
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
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
