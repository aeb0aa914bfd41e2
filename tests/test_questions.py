"""Questions from every form they come in, and what is said about those that are broken."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from compressor.data.questions import Question, load_questions
from compressor.data.rows import LeftOut
from compressor.errors import CompressorError

RECORD = {"id": "1", "context": "A b c.", "question": "q?", "answers": ["b", "c"], "dataset": "set"}


def write(path: Path, *records: Any) -> Path:
    text = "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def squad(*questions: dict[str, Any], version: str = "v2.0") -> dict[str, Any]:
    first = {"context": "First context.", "qas": list(questions[:1])}
    second = {"context": 'Second {context} with "question": 1.', "qas": list(questions[1:])}
    return {"version": version, "data": [{"title": "t", "paragraphs": [first]}, {"title": "u", "paragraphs": [second]}]}


def asked(name: str, *answers: str, **other: Any) -> dict[str, Any]:
    return {"id": name, "question": f"{name}?", "answers": [{"text": a, "answer_start": 0} for a in answers], **other}


@pytest.mark.parametrize("name", ["q.jsonl", "q.jsonl.gz", "q.json", "q.parquet"])
def test_records_come_as_they_were_written(tmp_path: Path, name: str) -> None:
    other = RECORD | {"id": "2", "answers": ["b", "b"], "dataset": "other", "title": "more"}
    path = tmp_path / name
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([RECORD, other]), path)
    else:
        write(path, RECORD, other)
    assert load_questions(path) == [
        Question("1", "A b c.", "q?", ("b", "c"), "set"),
        Question("2", "A b c.", "q?", ("b",), "other"),
    ]
    assert [question.id for question in load_questions([path, path], limit=3)] == ["1", "2", "1"]


def test_columns_can_have_other_names(tmp_path: Path) -> None:
    path = write(tmp_path / "qa.jsonl", {"abstract": "A b.", "q": "What?", "a": "b"})
    columns = {"context": "abstract", "question": "q", "answers": "a"}
    assert load_questions(path, columns=columns) == [Question("qa:1", "A b.", "What?", ("b",), "qa")]
    with pytest.raises(CompressorError, match=r"qa\.jsonl line 1: the field 'passage' is missing; its fields are 'abs"):
        load_questions(path, columns=columns | {"context": "passage"})
    with pytest.raises(CompressorError, match="columns names 'title', which is no field"):
        load_questions(path, columns={"title": "t"})


@pytest.mark.parametrize("indent", [None, 1])
def test_squad(tmp_path: Path, indent: int | None, capsys: pytest.CaptureFixture[str]) -> None:
    document = squad(asked("a", "First", "context"), asked("b", is_impossible=True), asked("c", "Second"))
    path = tmp_path / "dev-v2.0.json"
    path.write_text(json.dumps(document, indent=indent))
    found, left_out = load_questions(path), LeftOut()
    assert [(item.id, item.answers, item.dataset) for item in found] == [
        ("a", ("First", "context"), "squad_v2.0"),
        ("c", ("Second",), "squad_v2.0"),
    ]
    assert found[1].context == 'Second {context} with "question": 1.'
    assert "note: left out 1 of 3 questions: 1: the data says that the context" in capsys.readouterr().err
    assert load_questions(path, left_out=left_out) == found
    assert left_out.record()["unanswerable"]["count"] == 1
    assert "qas[0]" in left_out.record()["unanswerable"]["first"]
    assert not capsys.readouterr().err  # who counts says so
    kept = load_questions(path, keep_unanswerable=True)
    assert [(item.id, item.answers) for item in kept][1] == ("b", ())


def test_broken_squad_is_named_by_its_place(tmp_path: Path) -> None:
    path = tmp_path / "dev.json"
    text = json.dumps(squad(asked("a", "First"), asked("b", "Second"), asked("c")), indent=1)
    path.write_text(text)
    with pytest.raises(CompressorError, match=r"dev\.json data\[1\]\.paragraphs\[0\]\.qas\[1\]: .*empty"):
        load_questions(path)
    path.write_text(text[:-30])
    with pytest.raises(CompressorError, match=r"dev\.json is not valid JSON: .* at line \d+ of it"):
        load_questions(path)
    path.write_text(json.dumps({"data": [{"paragraphs": "none"}]}))
    with pytest.raises(CompressorError, match=r"dev\.json data\[0\]: there is no list 'paragraphs'"):
        load_questions(path)
    path.write_text(json.dumps({"data": [3]}))
    with pytest.raises(CompressorError, match=r"data\[0\] is a number \(3\), not an object"):
        load_questions(path)


@pytest.mark.parametrize("name", ["HotpotQA.jsonl", "HotpotQA.jsonl.gz"])
def test_mrqa(tmp_path: Path, name: str) -> None:
    line = {"id": "", "context": "[PAR] A b c.", "qas": [{"qid": "x", "question": "q?", "answers": ["b"]}]}
    line["qas"].append({"qid": "y", "question": "r?", "answers": ["c"]})  # type: ignore[attr-defined]
    path = write(tmp_path / name, {"header": {"dataset": "HotpotQA", "split": "dev"}}, line)
    assert load_questions(path) == [
        Question("x", "[PAR] A b c.", "q?", ("b",), "HotpotQA"),
        Question("y", "[PAR] A b c.", "r?", ("c",), "HotpotQA"),
    ]
    line["qas"] = [{"qid": "x", "question": "q?", "answers": ["b"]}, {"qid": "y", "question": " ", "answers": ["c"]}]
    write(path, {"header": {}}, line)
    with pytest.raises(CompressorError, match=rf"{name} line 2 question 2: the field 'question' is blank"):
        load_questions(path)
    write(path, {"header": {}}, line | {"qas": []})
    with pytest.raises(CompressorError, match="line 2: the field 'qas' must be a list of questions"):
        load_questions(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("not json", "is not valid JSON"),
        ("[1]", "is a list, not an object"),
        ({"answers": None}, "'answers' must be a list of texts but is null"),
        ({"answers": []}, "'answers' is empty"),
        ({"answers": "b"}, "'answers' must be a list of texts but is text"),
        ({"answers": {"text": []}}, "'answers' is empty"),
        ({"answers": ["b", 3]}, r"'answers\[1\]' must be text but is a number"),
        ({"answers": ["b", " "]}, r"'answers\[1\]' is blank"),
        ({"question": ""}, "'question' is blank"),
        ({"context": ["no", "pairs"]}, "'context' must be text, or titles"),
        ({"id": 0.5}, "is a number; store ids as text"),
        ({"dataset": 3}, "'dataset' must be text"),
        ({"context": "half \ud800"}, "half a surrogate pair"),
    ],
)
def test_a_broken_record_is_named_by_file_and_line(tmp_path: Path, change: Any, message: str) -> None:
    path = write(tmp_path / "q.jsonl", RECORD, change if isinstance(change, str) else RECORD | change)
    with pytest.raises(CompressorError, match=rf"q\.jsonl line 2.*{message}"):
        load_questions(path)


@pytest.mark.parametrize("field", ["context", "question", "answers"])
def test_a_missing_field_is_named(tmp_path: Path, field: str) -> None:
    path = write(tmp_path / "q.jsonl", {name: value for name, value in RECORD.items() if name != field})
    with pytest.raises(CompressorError, match=rf"q\.jsonl line 1: the field '{field}' is missing"):
        load_questions(path)


def test_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(CompressorError, match=r"gone\.jsonl' is not there"):
        load_questions(tmp_path / "gone.jsonl")
    with pytest.raises(CompressorError, match="limit is 0"):
        load_questions("squad-dev", limit=0)
    path = write(tmp_path / "none.jsonl", RECORD | {"answers": {"text": [], "answer_start": []}})
    with pytest.raises(CompressorError, match=r"holds no question with an answer \(1 are unanswerable\)"):
        load_questions(path)


def test_hub_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"text": ["b", "b"], "answer_start": [2, 2]}
    none: dict[str, list[Any]] = {"text": [], "answer_start": []}
    hotpot = {"title": ["T", "U"], "sentences": [["A b.", " C."], ["D."]]}
    sets: dict[tuple[str, str | None], list[dict[str, Any]]] = {
        ("rajpurkar/squad", None): [{"id": "s", "title": "t", "context": "A b", "question": "q", "answers": answers}],
        ("rajpurkar/squad_v2", None): [
            {"id": "s", "context": "A b", "question": "q", "answers": answers},
            {"id": "n", "context": "A b", "question": "r", "answers": none},
        ],
        ("mrqa-workshop/mrqa", None): [
            {"subset": "SearchQA", "qid": "m", "context": "A b", "question": "q", "answers": ["b"]}
        ],
        ("hotpotqa/hotpot_qa", "distractor"): [{"id": "h", "context": hotpot, "question": "q", "answer": "yes"}],
        ("ZongqianLi/ArxivQA", None): [{"context": "A b", "question": "q", "answer": "b"}],
        ("owner/name", None): [{"passage": "A b", "ask": "q", "short_answer": "b"}],
    }

    def load(name: str, config: str | None, *, split: str | None, streaming: bool) -> Any:
        loaded = datasets.Dataset.from_list(sets[name, config])
        loaded = loaded.to_iterable_dataset() if streaming else loaded
        return {"validation": loaded}[split] if split else {"validation": loaded}

    monkeypatch.setattr("datasets.load_dataset", load)
    first = Question("s", "A b", "q", ("b",), "rajpurkar/squad", ((2, 3),))
    assert load_questions("squad", split="validation") == [first]
    assert [item.id for item in load_questions("squad_v2", limit=5)] == ["s"]
    assert [item.id for item in load_questions("squad_v2", keep_unanswerable=True)] == ["s", "n"]
    assert load_questions("mrqa") == [Question("m", "A b", "q", ("b",), "SearchQA")]
    assert load_questions("hotpot_qa")[0].context == "T: A b. C.\nU: D."
    assert load_questions(["arxivqa", "squad"]) == [
        Question("ZongqianLi/ArxivQA:1", "A b", "q", ("b",), "ZongqianLi/ArxivQA"),
        first,
    ]
    columns = {"context": "passage", "question": "ask", "answers": "short_answer"}
    assert load_questions("owner/name", columns=columns)[0].answers == ("b",)
    with pytest.raises(CompressorError, match="owner/name row 1: the field 'answers' is missing; its fields are 'pass"):
        load_questions("owner/name")


CONTEXT = "Ada wrote notes. Bob read them."
FORMS: dict[str, tuple[dict[str, Any], list[tuple[str, str, str, tuple[str, ...]]]]] = {
    # form: a record, and id, context, question and answers of what it becomes
    "SQuAD on the hub": (
        {
            "id": "s",
            "title": "t",
            "context": CONTEXT,
            "question": "Who?",
            "answers": {"text": ["Ada"], "answer_start": [0]},
        },
        [("s", CONTEXT, "Who?", ("Ada",))],
    ),
    "SQuAD, a line": (
        {"context": CONTEXT, "qas": [{"id": "s", "question": "Who?", "answers": [{"text": "Ada", "answer_start": 0}]}]},
        [("s", CONTEXT, "Who?", ("Ada",))],
    ),
    "NaturalQuestions": (
        {
            "example_id": 7,
            "question_text": "who wrote",
            "document_text": CONTEXT,
            "annotations": [
                {"short_answers": [{"start_token": 0, "end_token": 1}], "yes_no_answer": "NONE"},
                {"short_answers": [], "yes_no_answer": "YES"},
            ],
        },
        [("q:1", CONTEXT, "who wrote", ("Ada", "yes"))],
    ),
    "NaturalQuestions of DPR": (
        {
            "question": "who wrote",
            "answers": ["Ada"],
            "positive_ctxs": [{"title": "T", "text": CONTEXT}, {"text": "x"}],
        },
        [("q:1", f"T: {CONTEXT}", "who wrote", ("Ada",))],
    ),
    "TriviaQA, pages": (
        {
            "question_id": "tc_1",
            "question": "Who?",
            "answer": {"value": "Ada", "aliases": ["Ada L.", "Ada"], "normalized_aliases": ["ada"]},
            "entity_pages": {"title": ["a", "b"], "wiki_context": [CONTEXT, "More."]},
            "search_results": {"search_context": ["Else."]},
        },
        [("tc_1", f"{CONTEXT}\nMore.", "Who?", ("Ada", "Ada L."))],
    ),
    "HotpotQA": (
        {
            "_id": "h",
            "question": "Q?",
            "answer": "Ada",
            "context": [["T", ["Ada wrote.", " Bob read."]], ["U", ["X."]]],
        },
        [("h", "T: Ada wrote. Bob read.\nU: X.", "Q?", ("Ada",))],
    ),
    "MuSiQue": (
        {
            "id": "m",
            "question": "Who?",
            "answer": "Ada",
            "answer_aliases": ["Ada L."],
            "answerable": True,
            "paragraphs": [{"title": "T", "paragraph_text": CONTEXT}, {"title": "U", "paragraph_text": "X."}],
        },
        [("m", f"T: {CONTEXT}\nU: X.", "Who?", ("Ada", "Ada L."))],
    ),
    "MuSiQue, unanswerable": (
        {
            "id": "m",
            "question": "Who?",
            "answer": "Eve",
            "answerable": False,
            "paragraphs": [{"paragraph_text": CONTEXT}],
        },
        [("m", CONTEXT, "Who?", ())],
    ),
    "RACE on the hub": (
        {
            "example_id": "high1.txt",
            "article": CONTEXT,
            "question": "Who wrote?",
            "options": ["Bob", "Ada"],
            "answer": "B",
        },
        [("q:1", CONTEXT, "Who wrote? A) Bob B) Ada", ("Ada",))],
    ),
    "RACE": (
        {
            "id": "high1",
            "article": CONTEXT,
            "questions": ["Who wrote?", "Who read?"],
            "options": [["Bob", "Ada"], ["Bob", "Ada"]],
            "answers": ["B", "A"],
        },
        [
            ("high1:1", CONTEXT, "Who wrote? A) Bob B) Ada", ("Ada",)),
            ("high1:2", CONTEXT, "Who read? A) Bob B) Ada", ("Bob",)),
        ],
    ),
    "QuAC on the hub": (
        {
            "dialogue_id": "d",
            "context": f"{CONTEXT} CANNOTANSWER",
            "turn_ids": ["d_q#0", "d_q#1"],
            "questions": ["Who wrote?", "Why?"],
            "followups": [2, 1],
            "answers": {"texts": [["Ada", "Ada"], ["CANNOTANSWER"]], "answer_starts": [[0, 0], [32]]},
        },
        [
            ("d_q#0", f"{CONTEXT} CANNOTANSWER", "Who wrote?", ("Ada",)),
            ("d_q#1", f"{CONTEXT} CANNOTANSWER", "Why?", ()),
        ],
    ),
    "CoQA on the hub": (
        {
            "story": CONTEXT,
            "questions": ["Who wrote?", "Why?"],
            "answers": {"input_text": ["Ada", "unknown"], "answer_start": [0, -1], "answer_end": [3, -1]},
        },
        [("q:1", CONTEXT, "Who wrote?", ("Ada",)), ("q:1", CONTEXT, "Why?", ())],
    ),
    "CoQA": (
        {
            "id": "c",
            "story": CONTEXT,
            "questions": [{"input_text": "Who wrote?", "turn_id": 1}],
            "answers": [{"input_text": "Ada", "span_start": 0, "span_end": 9, "span_text": "Ada wrote"}],
        },
        [("c:1", CONTEXT, "Who wrote?", ("Ada",))],
    ),
    "BoolQ": (
        {"question": "is it", "passage": CONTEXT, "answer": True},
        [("q:1", CONTEXT, "is it", ("yes",))],
    ),
    "DROP": (
        {
            "query_id": "x",
            "passage": CONTEXT,
            "question": "Who?",
            "answers_spans": {"spans": ["Ada", "Bob"], "types": ["span"]},
        },
        [("x", CONTEXT, "Who?", ("Ada", "Bob"))],
    ),
    "PubMedQA": (
        {"pubid": 3, "question": "Is it?", "context": {"contexts": [CONTEXT, "So."]}, "final_decision": "maybe"},
        [("3", f"{CONTEXT}\nSo.", "Is it?", ("maybe",))],
    ),
    "NarrativeQA": (
        {"document": {"summary": {"text": CONTEXT}}, "question": {"text": "Who?"}, "answers": [{"text": "Ada"}]},
        [("q:1", CONTEXT, "Who?", ("Ada",))],
    ),
}


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize("form", FORMS)
def test_well_known_sets_are_recognised(tmp_path: Path, form: str, suffix: str) -> None:
    record, expected = FORMS[form]
    document = record if suffix == "jsonl" else {"data": [record]}
    found = load_questions(write(tmp_path / f"q.{suffix}", document), keep_unanswerable=True)
    assert [(one.id, one.context, one.question, one.answers) for one in found] == expected
    assert all(one.context[a:b] in one.answers for one in found for a, b in one.spans)
    if any(answers for *_, answers in expected):
        answered = load_questions(tmp_path / f"q.{suffix}", left_out=LeftOut())
        assert [one.answers for one in answered] == [answers for *_, answers in expected if answers]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"article": "A", "question": "q", "options": ["a"], "answer": "C"}, "the answer 'C' names none of 1 options"),
        ({"story": "A", "questions": ["q", "r"], "answers": {"input_text": ["a"]}}, "2 questions have 1 answers"),
        ({"passage": "A", "questions": ["q"], "answers": None}, "1 questions have null"),
        ({"context": {"pages": []}, "question": "q", "answer": "a"}, "'context' must be text, or titles"),
        ({"question": "q", "answers": ["a"], "positive_ctxs": []}, "'positive_ctxs' is blank"),
        ({"question": "q", "document_text": "A", "annotations": [3]}, "are not NaturalQuestions' short answers"),
    ],
)
def test_a_broken_record_of_a_well_known_set_is_named(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "q.jsonl", RECORD, record)
    with pytest.raises(CompressorError, match=rf"q\.jsonl line 2.*{message}"):
        load_questions(path)


@pytest.mark.parametrize(("name", "dataset"), [("squad-dev", "squad_v1.1"), ("arxivqa-test", "arxivqa-cloze")])
def test_shipped_questions_are_answered_by_their_contexts(name: str, dataset: str) -> None:
    found = load_questions(name)
    assert len({item.id for item in found}) == len(found) >= 300
    assert {item.dataset for item in found} == {dataset}
    assert all(answer in item.context for item in found for answer in item.answers)


def test_training_questions_are_about_other_abstracts() -> None:
    train, test = ({item.context for item in load_questions(f"arxivqa-{split}")} for split in ("train", "test"))
    assert len(train) > 1000
    assert not train & test


def test_contexts_become_passages_of_training(tmp_path: Path, program: Callable[..., Any]) -> None:
    """runs/context-passages.py: every context whole, cut at each size, without its repetitions."""
    context = " ".join(f"word{place}" for place in range(60))
    asked = [{"context": text, "question": "q?", "answers": ["b"]} for text in (context, "A short b.", context)]
    path, output = write(tmp_path / "q.jsonl", *asked), tmp_path / "passages.jsonl"
    script = "runs/context-passages.py"
    status, _, errors = program(script, path, "--tokens", "40", "500", "--output", output)
    assert status == 0, errors
    passages = [json.loads(line) for line in output.read_text().splitlines()]
    assert len({one["id"] for one in passages}) == len(passages)
    texts = [one["text"] for one in passages]
    assert texts[-1] == "A short b."
    assert texts.count(context) == 1
    assert "".join(texts[: texts.index(context)]).replace(" ", "") == context.replace(" ", "")
    status, _, errors = program(script, tmp_path / "none.jsonl", "--output", tmp_path / "out.jsonl")
    assert status == 2
    assert "Traceback" not in errors
    assert not (tmp_path / "out.jsonl").exists()
