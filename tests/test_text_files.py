"""One door for text: every encoding, line end and kind of damage, through every way that text comes in."""

from __future__ import annotations

import gzip
import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compressor.commands.demonstration import passage_of
from compressor.commands.loading import is_corpus
from compressor.commands.options import DemoConfig
from compressor.data.records import load_texts
from compressor.data.rows import read_rows
from compressor.data.sources import read_text, text_lines
from compressor.errors import CompressorError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def paragraphs(path: Path) -> str:
    return "\n\n".join(row.values["text"] for row in read_rows(path))


DOORS: dict[str, Callable[[Path], str]] = {
    "a passage": read_text,
    "the demo": lambda path: passage_of(DemoConfig(text=str(path)))[0],
    "lines": lambda path: "".join(line for _, line in text_lines(path)).strip(),
    "paragraphs": paragraphs,
    "a folder of documents": lambda path: load_texts(path.parent, documents=True)["text"][0],
    "a document": lambda path: load_texts(path, documents=True)["text"][0],
}
TEXT = "Erste Zeile: Schrödinger\nzweite\n\nein Absatz"


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode(),
        TEXT.encode("utf-8-sig"),
        TEXT.encode("utf-16"),
        "\ufeff".encode("utf-16-be") + TEXT.encode("utf-16-be"),
        TEXT.encode("utf-32"),
        TEXT.replace("\n", "\r\n").encode(),
        TEXT.replace("\n", "\r").encode(),
        b"\n" + TEXT.encode() + b"\r\n\r\n",
        gzip.compress(TEXT.encode("utf-8-sig"), mtime=0),
    ],
    ids=["utf-8", "mark", "utf-16", "utf-16-be", "utf-32", "crlf", "cr", "blank around", "gzip"],
)
def test_a_text_is_the_same_through_every_door(door: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    assert DOORS[door](path) == TEXT


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\r\n", "is empty|holds no records"),
        (b"fine\n\xff\xfa", "line 2 is not UTF-8"),
        (b"zero\0", "line 1 holds a zero byte"),
        (TEXT.encode("utf-16-le"), "line 1 holds a zero byte: .*UTF-16 without a byte order mark"),
        (TEXT.encode("utf-16")[:-1], "is not UTF-16"),
        (gzip.compress(TEXT.encode() * 99, mtime=0)[:-9], "is a damaged gzip file"),
    ],
)
def test_what_is_not_text_is_refused_by_every_door(door: str, content: bytes, message: str, tmp_path: Path) -> None:
    if door == "lines" and not content.strip():
        pytest.skip("no line is no fault there")
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(CompressorError, match=message) as caught:
        DOORS[door](path)
    assert "a.txt" in str(caught.value)


def test_standard_input_and_text_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(TEXT.encode("utf-16"))))
    assert read_text("-") == TEXT
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf a\r\nb \r\n")
    assert read_text(tmp_path / "a.txt", as_written=True) == "\ufeff a\r\nb \r\n"
    assert read_text(tmp_path / "a.txt") == "a\nb"
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbf\n")
    with pytest.raises(CompressorError, match=r"mark\.txt is empty"):
        read_text(tmp_path / "mark.txt", as_written=True)
    with pytest.raises(CompressorError, match=r"cannot read .*gone\.txt: No such file"):
        read_text(tmp_path / "gone.txt")


def test_a_text_file_is_one_passage_to_compress_alone_or_in_a_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\n\n{name}")
    (tmp_path / "c.jsonl").write_text('{"passage": "x"}\n{"passage": "y"}\n')
    loaded = load_texts(tmp_path, field="passage", documents=True)
    assert list(zip(loaded["id"], loaded["text"], strict=True)) == [
        ("a.txt", "a\n\na"),
        ("b.txt", "b\n\nb"),
        ("c.jsonl:1", "x"),
        ("c.jsonl:2", "y"),
    ]
    kinds: dict[Any, bool] = {
        tmp_path: True,
        tmp_path / "a.txt": False,
        tmp_path / "c.jsonl": True,
        tmp_path / "*.txt": True,
        f"{tmp_path / 'a.txt'},{tmp_path / 'b.txt'}": True,
        "-": False,
        "arxiv-test": True,
        tmp_path / "gone.md": False,
        tmp_path / "gone.jsonl": False,  # what is wrong is that it is not there
    }
    assert {source: is_corpus(str(source)) for source in kinds} == kinds
    # As data to train or evaluate on, a text file is a list of passages.
    assert list(load_texts(tmp_path / "a.txt")["text"]) == ["a", "a"]
