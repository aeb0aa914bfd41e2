"""Reading passages from files: formats, ids, splits, and errors that name file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from compressor.data import sources
from compressor.data.records import load_texts
from compressor.errors import CompressorError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def parquet(path: Path, **columns: list) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def pairs(source: object, **options: object) -> list[tuple[str, str]]:
    return [(row["id"], row["text"]) for row in load_texts(source, **options)]  # type: ignore[arg-type]


def test_jsonl_takes_ids_or_names_lines_and_skips_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "one\\ntwo"}\n\n{"text": "x", "id": 7}\n')
    assert pairs(path) == [("a.jsonl:1", "one\ntwo"), ("7", "x")]


def test_gzip_is_recognised_and_abstract_is_a_text(tmp_path: Path) -> None:
    path = write(tmp_path / "b.jsonl.gz", gzip.compress(b'{"abstract": "zz"}\n'))
    assert pairs(path) == [("b.jsonl.gz:1", "zz")]


def test_json_array_and_json_lines_under_the_same_suffix(tmp_path: Path) -> None:
    array = write(tmp_path / "array.json", '[\n {"text": "q"},\n {"text": "r"}\n]')
    lines = write(tmp_path / "lines.json", '{"text": "q"}\n{"text": "r"}\n')
    assert [text for _, text in pairs(array)] == [text for _, text in pairs(lines)] == ["q", "r"]


def test_csv_with_line_breaks_and_long_cells(tmp_path: Path) -> None:
    path = write(tmp_path / "c.csv", '\ufeffid,text\r\n1,"a\nb"\r\n2,' + "w " * 100_000 + "\r\n")
    rows = pairs(path)
    assert rows[0] == ("1", "a\nb")
    assert len(rows[1][1]) == 200_000


def test_text_is_cut_into_paragraphs(tmp_path: Path) -> None:
    path = write(tmp_path / "d.txt", "\none\nmore\n \n\ntwo\n")
    assert pairs(path) == [("d.txt:2", "one\nmore"), ("d.txt:6", "two")]


def test_parquet_keeps_dates_and_is_memory_mapped(tmp_path: Path) -> None:
    path = parquet(tmp_path / "e.parquet", id=["a", "b"], abstract=["x", "y"], date=["2020-01-01", ""])
    loaded = load_texts(path)
    assert loaded.column_names == ["id", "text", "date"]
    assert loaded["date"][:] == ["2020-01-01", ""]
    assert loaded.cache_files


def test_parquet_without_ids_or_with_another_field(tmp_path: Path) -> None:
    path = parquet(tmp_path / "f.parquet", body=["x", "y"])
    assert pairs(path, field="body") == [("f.parquet:1", "x"), ("f.parquet:2", "y")]


def test_lists_and_globs_and_limit(tmp_path: Path) -> None:
    one, two = write(tmp_path / "1.jsonl", '{"text": "a"}\n'), write(tmp_path / "2.txt", "b\n\nc\n")
    expected = ["a", "b", "c"]
    for source in ([one, two], [Path(one), Path(two)], str(tmp_path / "[12].*")):
        assert [text for _, text in pairs(source)] == expected
        assert [text for _, text in pairs(source, limit=2)] == expected[:2]


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, '{"text": "old"}\n')
    assert pairs(path) == [("a.jsonl:1", "old")]
    write(path, '{"text": "newer"}\n')
    assert pairs(path) == [("a.jsonl:1", "newer")]


def test_a_folder_of_several_splits_must_be_asked_for_one(tmp_path: Path) -> None:
    for name in ("train-00000", "train-00001", "test"):
        parquet(tmp_path / f"{name}.parquet", id=[name], text=[name])
    assert [text for _, text in pairs(tmp_path, split="train")] == ["train-00000", "train-00001"]
    with pytest.raises(CompressorError, match=r"several splits and none was named: choose one of test, train"):
        load_texts(tmp_path)
    with pytest.raises(CompressorError, match="has no 'validation'"):
        load_texts(tmp_path, split="validation")


def test_what_a_folder_holds_beside_data_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a.txt", "one")
    for name in ("notes.md", "b.png", ".hidden"):
        write(tmp_path / name, "x")
    (tmp_path / "more").mkdir()
    for _ in range(2):
        load_texts(tmp_path)
    error = capsys.readouterr().err
    assert error.count("note: 3 of what") == 1
    assert "is not read" in error
    assert error.rstrip().endswith(": b.png, more/, notes.md")


def test_shipped_sets_have_names() -> None:
    for name, count in (("arxiv-train", 2000), ("arxiv-validation", 300), ("arxiv-test", 500)):
        loaded = load_texts(name)
        assert len(loaded) == count
        low, high = min(loaded["date"]), max(loaded["date"])
        if name == "arxiv-train":
            assert high < "2026-01-01"
        else:
            assert low >= "2026-01-01"
    texts = [text for name in ("arxiv-train", "arxiv-validation", "arxiv-test") for text in load_texts(name)["text"]]
    assert len(set(texts)) == len(texts)


def test_an_unknown_name_lists_those_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CompressorError, match=r"'arxiv-tset' is not there: .*arxiv-test, arxiv-train"):
        load_texts("arxiv-tset")
    monkeypatch.setattr(sources, "SHIPPED", Path("/nowhere"))
    with pytest.raises(CompressorError, match="none here"):
        load_texts("arxiv-test")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": "b"\n', "line 2 is not valid JSON"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"id": "b"}\n',
            "line 2: the field 'text' is missing; its fields are 'id'",
        ),
        ("a.jsonl", '{"text": "a"}\n{"text": 3}\n', "line 2: the field 'text' must be text but is a number"),
        ("a.jsonl", '{"text": null}\n', "line 1: the field 'text' must be text but is null"),
        ("a.jsonl", '{"text": "  "}\n', "line 1: the field 'text' is blank"),
        ("a.jsonl", '{"text": "a", "id": 1.5}\n', "line 1: the id 1.5 is a number; store ids as text"),
        ("a.jsonl", '{"text": "\\ud800"}\n', "line 1: the field 'text' holds half a surrogate pair"),
        ("a.jsonl", '["a"]\n', "line 1 is a list, not an object"),
        ("a.jsonl", '{"body": "a"}\n', "line 1 has no field 'text' or 'abstract'; its fields are 'body'"),
        ("a.jsonl", "[" * 100_000 + "\n", "line 1 is not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n\xff\xff\n', "line 2 is not UTF-8"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16-le"), "line 1 holds a zero byte"),
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", "\n\n", "holds no records"),
        ("a.json", '[{"text": "a"}, 3]', "item 2 is a number"),
        (
            "a.json",
            '[{"text": "a"},\n{"text": }]',
            "from .*a.json line 1 on is not valid JSON: .* line 2 of it",
        ),
        ("a.csv", "id,text\n1,a\n2\n", "line 3 has 1 cells but the header has 2"),
        ("a.csv", 'id,text\n1,"a', "line 2 is not valid CSV"),
        ("a.csv", "text,text\na,b\n", "names a column twice"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)[:-12], "is a damaged gzip file"),
        ("a.parquet", b"PAR1" + bytes(100), "is not a readable Parquet file"),
        ("a.xyz", "a", "is not a kind of file that can be read"),
    ],
)
def test_broken_files_are_named_with_the_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(CompressorError, match=message) as caught:
        load_texts(path)
    assert name in str(caught.value)


def test_parquet_errors_name_the_row(tmp_path: Path) -> None:
    blank = parquet(tmp_path / "blank.parquet", id=["a", "b"], text=["x", " "])
    with pytest.raises(CompressorError, match="row 2: the field 'text' is blank"):
        load_texts(blank)
    null = parquet(tmp_path / "null.parquet", id=["a", None], text=["x", "y"])
    with pytest.raises(CompressorError, match="row 2: the field 'id' must be text but is null"):
        load_texts(null)
    number = parquet(tmp_path / "number.parquet", id=["a"], text=[1])
    with pytest.raises(CompressorError, match="row 1: the field 'text' must be text but is a number"):
        load_texts(number)
    whole = parquet(tmp_path / "damaged.parquet", id=["a"] * 5000, text=[str(n) * 9 for n in range(5000)])
    content = bytearray(Path(whole).read_bytes())
    content[2000:2600] = b"\xff" * 600
    Path(whole).write_bytes(content)
    with pytest.raises(CompressorError, match=r"damaged\.parquet"):
        load_texts(whole)


def test_hub_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    content = datasets.Dataset.from_list([{"abstract": "a", "n": 1}, {"abstract": "b", "n": 2}])
    splits = datasets.DatasetDict({"train": content, "test": content})

    def load(name: str, config: str | None, *, split: str | None, streaming: bool) -> Any:
        if name == "owner/none":
            raise RuntimeError("no such data set\nmore")
        return splits if split is None else splits[split]

    monkeypatch.setattr("datasets.load_dataset", load)
    assert pairs("owner/name", split="test") == [("owner/name:1", "a"), ("owner/name:2", "b")]
    with pytest.raises(CompressorError, match="several splits and none was named: choose one of train, test"):
        load_texts("owner/name")
    with pytest.raises(CompressorError, match="owner/name row 1: the field 'n' must be text"):
        load_texts("owner/name", split="test", field="n")
    with pytest.raises(CompressorError, match=r"could not be loaded from the hub: no such data set\."):
        load_texts("owner/none")


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(CompressorError, match="limit is 0"):
        load_texts("arxiv-test", limit=0)
    with pytest.raises(CompressorError, match="no data file matches"):
        load_texts(str(tmp_path / "*.jsonl"))
    with pytest.raises(CompressorError, match="no data source was given"):
        load_texts([])
    with pytest.raises(CompressorError, match="holds no data"):
        load_texts(tmp_path)


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    write(tmp_path / "manifest.json", json.dumps({"splits": [1]}))
    with pytest.raises(CompressorError, match=r"manifest\.json is not the manifest of a corpus"):
        load_texts(tmp_path)
    listed = {"splits": {"train": {"shards": [{"file": "gone.parquet"}]}}}
    write(tmp_path / "manifest.json", json.dumps(listed))
    with pytest.raises(CompressorError, match=r"gone\.parquet is listed in .* but is not there"):
        load_texts(tmp_path)
