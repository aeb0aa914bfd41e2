"""Records that cannot be used: named, or left out where that is asked for, counted and recorded, by every command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from compressor.commands.cli import evaluate_main, train_main
from compressor.commands.cli import main as cli
from compressor.data.questions import load_questions
from compressor.data.records import load_texts
from compressor.data.rows import LeftOut
from compressor.errors import CompressorError
from compressor.storage.store import Store


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


ROWS: list[dict[str, Any]] = [{"id": f"r{n}", "text": f"Passage number {n} says something."} for n in range(1, 41)]


def write(path: Path, rows: list[Any]) -> Path:
    """Rows in the format of the suffix; a text is written as a line of its own."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        lines = [row if isinstance(row, str) else f'{row["id"]},"{row["text"] or ""}"' for row in rows]
        path.write_text("\n".join(["id,text", *lines]) + "\n")
    else:
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def with_bad(*bad: Any, place: int = 3) -> list[Any]:
    return [*ROWS[:place], *bad, *ROWS[place:]]


@pytest.mark.parametrize(
    ("suffix", "bad", "message"),
    [
        ("jsonl", {"id": "x", "text": None}, "line 4: the field 'text' must be text but is null"),
        ("jsonl", {"id": "x", "text": " \n"}, "line 4: the field 'text' is blank"),
        ("jsonl", {"id": "x"}, "line 4: the field 'text' is missing"),
        ("jsonl", {"id": 0.5, "text": "a"}, "line 4: the id 0.5 is a number"),
        ("jsonl", {"id": "x", "text": "half \ud800"}, "line 4: the field 'text' holds half a surrogate pair"),
        ("jsonl", '{"id": "x", "text": ', "line 4 is not valid JSON"),
        ("jsonl", "[1]", "line 4 is a list, not an object"),
        ("csv", {"id": "x", "text": None}, "line 5: the field 'text' is blank"),
        ("csv", "x", "line 5 has 1 cells but the header has 2"),
        ("parquet", {"id": "x", "text": None}, "row 4: the field 'text' must be text but is null"),
        ("parquet", {"id": None, "text": "a"}, "row 4: the field 'id' must be text but is null"),
        ("parquet", {"id": "x", "text": "  "}, "row 4: the field 'text' is blank"),
    ],
)
def test_a_bad_record_is_named_or_left_out(tmp_path: Path, suffix: str, bad: Any, message: str) -> None:
    path = write(tmp_path / f"a.{suffix}", with_bad(bad))
    with pytest.raises(CompressorError, match=rf"a\.{suffix} {message}.*\. Correct it, .*--skip-bad-records"):
        load_texts(path)
    for _ in range(2):  # the second time from the cache
        left_out = LeftOut()
        loaded = load_texts(path, skip_bad_records=True, left_out=left_out)
        assert list(loaded["id"]) == [row["id"] for row in ROWS]
        assert loaded.column_names == ["id", "text"]
        assert left_out.counts == {"bad_record": 1}
        assert message in left_out.first["bad_record"]
        assert left_out.record()["bad_record"]["first"].startswith(f"a.{suffix} ")  # no folder of this machine
    assert len(load_texts(path, skip_bad_records=True, limit=5)) == 5


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_the_first_and_the_last_may_be_bad_and_over_5_percent_are_refused(tmp_path: Path, suffix: str) -> None:
    bad = {"id": "x", "text": None}
    path = write(tmp_path / f"a.{suffix}", [bad, *ROWS, bad])
    assert list(load_texts(path, skip_bad_records=True)["id"]) == [row["id"] for row in ROWS]
    write(path, [bad, *ROWS, bad, bad])
    with pytest.raises(CompressorError, match=r"3 of 43 records are bad, more than 5%: .* The first: .*a\."):
        load_texts(path, skip_bad_records=True)
    write(path, [{"id": "x", "text": None}] * 2 if suffix != "parquet" else [{"id": "x", "text": " "}] * 2)
    with pytest.raises(CompressorError, match="2 of 2 records are bad"):
        load_texts(path, skip_bad_records=True)


def question(number: int, **other: Any) -> dict[str, Any]:
    text = f"Passage number {number} says something."
    return {"id": f"q{number}", "context": text, "question": "Which?", "answers": [str(number)], **other}


@pytest.mark.parametrize(
    "bad",
    [
        question(0, context=None),
        question(0, question=" "),
        question(0, answers=[""]),
        question(0, answers=None),
        {"id": "x"},
        {"context": "A", "qas": []},
        "not json",
    ],
)
def test_bad_questions(tmp_path: Path, bad: Any) -> None:
    path = write(tmp_path / "q.jsonl", [question(n) for n in range(3)] + [bad] + [question(n) for n in range(3, 30)])
    with pytest.raises(CompressorError, match=r"q\.jsonl line 4.*--skip-bad-records"):
        load_questions(path)
    left_out = LeftOut()
    assert len(load_questions(path, skip_bad_records=True, left_out=left_out)) == 30
    assert left_out.counts == {"bad_record": 1}
    write(path, [question(1), bad])
    with pytest.raises(CompressorError, match="1 of 2 records are bad"):
        load_questions(path, skip_bad_records=True)


BAD = {"id": "x", "text": None, "abstract": None, "date": "2023-01-01"}


def commands(tmp_path: Path, checkpoint: Path, training_options: list[str]) -> dict[str, Any]:
    """For each command how it is run on a file of records, and where what it left out is recorded."""
    output = tmp_path / "out"
    at = ["--checkpoint", str(checkpoint)]
    train = [option for option in training_options if not option.startswith(("--data.train", "--output"))]

    def manifest(name: str, *keys: Any) -> Callable[[], Any]:
        def read() -> Any:
            found = json.loads((output / name).read_text())
            for key in keys:
                found = found[key]
            return found

        return read

    def run_train(path: Path, *skip: str) -> int:
        data = [f'--data.train=["{path}"]', f"--output={output}", "--training.steps=1"]
        return train_main([*train, *data, *skip])

    def corpus(name: str, path: Path, *skip: str) -> int:
        return cli([name, "--source", str(path), "--output", str(output), "--min_words", "1", *skip])

    return {
        "train": (run_train, manifest("run.json", 0, "left_out", "passages, train")),
        "evaluate": (
            lambda path, *skip: evaluate_main([*at, "--data", str(path), "--output", str(output), *skip]),
            manifest("metrics.json", "left_out", "a"),
        ),
        "index": (
            lambda path, *skip: cli(
                ["index", str(path), "-o", str(output), "--encoder=bm25", "--no-measure", *at, *skip]
            ),
            lambda: json.loads(Store.open(output).columns("source")[0][0])["left_out"],
        ),
        "corpus": (lambda path, *skip: corpus("corpus", path, *skip), manifest("manifest.json", "left_out")),
        "questions": (lambda path, *skip: corpus("questions", path, *skip), manifest("manifest.json", "left_out")),
    }


@pytest.mark.parametrize("command", ["train", "evaluate", "index", "corpus", "questions"])
def test_every_command_names_the_record_and_can_leave_it_out(
    command: str,
    tmp_path: Path,
    tiny_compressor: Any,
    training_options: list[str],
    texts: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny_compressor.save_pretrained(tmp_path / "checkpoint")
    size = 200 if command == "questions" else 60  # a few words are soon written back, but say too little to ask about
    rows = [{"id": f"r{n}", "text": text[:size], "date": "2023-01-01"} for n, text in enumerate(texts[:24])]
    path = write(tmp_path / "a.jsonl", [*rows[:3], BAD, *rows[3:]])
    run, recorded = commands(tmp_path, tmp_path / "checkpoint", training_options)[command]
    assert run(path) == 2
    error = capsys.readouterr().err
    assert "a.jsonl line 4: the field 'text' must be text but is null" in error
    assert "--skip-bad-records" in error
    assert run(path, "--skip-bad-records") == 0
    left_out = recorded()["bad_record"]
    assert left_out["count"] == 1
    assert left_out["first"].startswith("a.jsonl line 4: ")
    write(path, [*rows[:3], BAD, BAD, *rows[3:]])
    again = {"train": ["--training.resume", "true"], "index": []}.get(command, ["--overwrite"])
    assert run(path, "--skip-bad-records", *again) == 2
    assert "2 of 26 records are bad, more than 5%" in capsys.readouterr().err


def test_passages_that_are_too_short_are_an_error_or_counted(
    tmp_path: Path, training_options: list[str], texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Where all were too short training said that none is used, used them and ended with status 0."""
    path = write(tmp_path / "a.jsonl", [{"id": "s", "text": "Too."}, {"id": "t", "text": "Short."}])
    argv = [option for option in training_options if not option.startswith("--data.train")]
    argv += [f'--data.train=["{path}"]', f"--output={tmp_path / 'out'}", "--training.steps=1"]
    assert train_main([*argv, "--data.lengths", '[{"low": 8, "high": 32}]']) == 2
    assert "none of the 2 passages of data.train is as long as data.lengths asks for" in capsys.readouterr().err
    write(path, [{"id": "s", "text": "Too."}, *({"id": f"r{n}", "text": text} for n, text in enumerate(texts[:5]))])
    ranges = '[{"low": 8, "high": 16}, {"low": 30, "high": 32}]'
    assert train_main([*argv, "--data.lengths", ranges]) == 0
    assert "note: left out 1 of 6 passages (train): 1: it is shorter than every range" in capsys.readouterr().out
    (start,) = json.loads((tmp_path / "out" / "run.json").read_text())
    assert start["left_out"] == {"passages, train": {"too_short": {"count": 1, "first": "s"}}}


def test_ranges_of_lengths_that_no_passage_reaches_are_named(
    tmp_path: Path, training_options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.jsonl", [{"id": "s", "text": "A passage of some ten tokens, not more."}] * 2)
    argv = [option for option in training_options if not option.startswith("--data.train")]
    argv += [f'--data.train=["{path}"]', f"--output={tmp_path / 'out'}", "--training.steps=1"]
    assert train_main([*argv, "--data.lengths", '[{"low": 2, "high": 4}, {"low": 31, "high": 32}]']) == 0
    assert "note: no passage is as long as the range 31 to 32 of data.lengths" in capsys.readouterr().out
    assert train_main([*argv, "--objective.tokens", '[{"tokens": 4, "shortest": 99}]']) == 2
    assert "objective.tokens.shortest = 99" in capsys.readouterr().err
