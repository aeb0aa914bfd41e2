"""Questions about a context: what a record must look like, and `load_questions`, which reads them from anywhere.

A record is `{"id", "context", "question", "answers": [...], "dataset"}`. The forms read are those of SQuAD 1.1 and 2.0
(https://rajpurkar.github.io/SQuAD-explorer/), of MRQA 2019 (https://github.com/mrqa/MRQA-Shared-Task-2019), of the sets
that `question_forms.py` names, and any flat record whose columns are named. A context is never cut here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from compressor.data.instructions import Prompt, either
from compressor.data.question_forms import Question, answer_texts, context_text, question_text, rows_of_questions
from compressor.data.records import hub_rows, load_hub
from compressor.data.rows import BadRecord, BadRecords, LeftOut, Row, read_document, read_rows, type_name
from compressor.data.sources import Hub, kind_of, resolve, stem_of
from compressor.errors import CompressorError
from compressor.progress import note

HUB_NAMES = {
    "squad": "rajpurkar/squad",
    "squad_v2": "rajpurkar/squad_v2",
    "mrqa": "mrqa-workshop/mrqa",
    "hotpot_qa": "hotpotqa/hotpot_qa:distractor",
    "arxivqa": "ZongqianLi/ArxivQA",
}
"""Short names of data sets on the hub; `arxivqa` is the one published with 500xCompressor."""

COLUMNS: dict[str, tuple[str, ...]] = {
    "id": (
        *("id", "qid", "_id", "question_id", "query_id", "QuestionId", "pubid"),
        *("abstract_id", "paper_id", "idx"),
    ),
    "context": (
        *("context", "passage", "article", "story", "paragraph", "document", "paragraphs", "document_text"),
        *("positive_ctxs", "entity_pages", "search_results", "text", "source"),
    ),
    "question": ("question", "query", "question_text", "Question", "instruction"),
    "answers": (
        *("answers", "answer", "Answer", "answers_spans", "gold_answers", "final_decision", "annotations"),
        *("targets", "references"),
    ),
    "dataset": ("dataset", "subset"),
}
"""Fields of the schema, each with the names it is looked for under."""


def load_questions(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    split: str | None = None,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    keep_unanswerable: bool = False,
    skip_bad_records: bool = False,
    left_out: LeftOut | None = None,
    prompt: Prompt | None = None,
) -> list[Question]:
    """Read questions from files, shipped sets or the hub, in the order of the source.

    Args:
        source: SQuAD JSON, MRQA or flat JSON lines, Parquet, CSV (each also .gz except Parquet), a folder, a glob, a
            shipped name ("squad-dev"), a hub id ("owner/name:config") or one of `HUB_NAMES`, or several of these.
        split: the split of a folder or hub data set that has several; plain files have none.
        limit: read only the first `limit` questions.
        columns: names of the source's columns by field of the schema, such as `{"context": "abstract"}`. A column
            of answers holds a list of texts, one text, or `{"text": [...]}`.
        keep_unanswerable: keep the questions that SQuAD 2.0 says the context does not answer, with no answers;
            otherwise they are left out and counted.
        skip_bad_records: leave records out that cannot be used, up to `MOST_BAD` of them.
        left_out: counts what is left out; without it a line on standard error says so.
        prompt: makes instructions of the rows; without, rows that hold one under `instruction` are such.

    Raises:
        CompressorError: a source is not there or holds no question, or a record is broken; names file and line.
    """
    if limit is not None and limit < 1:
        raise CompressorError(f"limit is {limit}; give 1 or more, or leave it out to read everything")
    if unknown := sorted(set(columns or {}) - set(COLUMNS)):
        raise CompressorError(f"columns names {unknown[0]!r}, which is no field of a question: {', '.join(COLUMNS)}")
    found: list[Question] = []
    ours = LeftOut()
    bad = BadRecords(skip_bad_records, ours)
    for place in resolve(_hub_ids(source), split=split):
        rows = _rows(place, split, limit is not None, bad)
        if prompt is not None:
            rows = (made for row in rows for made in bad.caught(prompt.rows, row))
        dataset = place.name if isinstance(place, Hub) else stem_of(place)

        def read(row: Row, dataset: str = dataset) -> tuple[Row, Question | None]:
            question = _question(row, dataset, columns or {}, keep_unanswerable)
            if prompt is not None and question is not None:
                question = replace(question, whole=True, spans=(), choices=tuple(row.values.get("choices", ())))
            return row, question

        for row, question in bad.usable(rows, read):
            if question is None:
                ours.add("unanswerable", row.where)
                continue
            found.append(question)
            if len(found) == limit:
                break
        if len(found) == limit:
            break
    bad.finish(source, limit is not None)
    if not found:
        raise CompressorError(
            f"{source} holds no question with an answer"
            + (f" ({ours.counts['unanswerable']:,} are unanswerable)" if ours.counts["unanswerable"] else "")
        )
    if left_out is not None:
        left_out.merge(ours)
    elif ours.total:
        note(f"note: {ours.line('questions', len(found))}")
    return found if prompt is None or prompt.answer != "label" or prompt.options else _with_labels(found, prompt)


def _with_labels(questions: list[Question], prompt: Prompt) -> list[Question]:
    """Instructions with the labels to choose from, which may be those that occur."""
    labels = prompt.labels or sorted({one.answers[0] for one in questions})
    if len(labels) < 2:
        raise CompressorError(
            f"all {len(questions)} texts have the label {labels[0]!r}: there is nothing to tell apart; give more or "
            "other data"
        )
    named = either(labels)
    return [replace(one, question=one.question.replace("{labels}", named), choices=tuple(labels)) for one in questions]


def _hub_ids(source: Any) -> Any:
    """Short names of hub data sets become their ids, unless a file of that name is there."""
    if not isinstance(source, str | os.PathLike):
        return [_hub_ids(item) for item in source]
    text = os.fspath(source)
    return text if Path(text).exists() else HUB_NAMES.get(text, text)


def _rows(place: Path | Hub, split: str | None, streaming: bool, bad: BadRecords) -> Iterator[Row]:
    """One row for each question, under the names of the source."""
    if isinstance(place, Hub):
        loaded = load_hub(place, split, streaming=streaming)
        features = (getattr(loaded, "features", None) or {}).items()
        classes = {name: getattr(getattr(feature, "feature", feature), "names", None) for name, feature in features}
        for row in hub_rows(loaded, place.name):
            named = {name: _named(value, classes.get(name)) for name, value in row.values.items()}
            yield from bad.caught(rows_of_questions, row._replace(values=named), {})
        return
    if kind_of(place) == ".json" and _is_one_object(place):
        yield from _squad_rows(place, bad)
        return
    header: dict[str, Any] = {}
    for row in read_rows(place, bad=bad):
        if row.number == 1 and set(row.values) == {"header"} and isinstance(row.values["header"], dict):
            header = row.values["header"]
            continue
        yield from bad.caught(rows_of_questions, row, header)


def _named(value: Any, classes: Sequence[str] | None) -> Any:
    """The name of a class, or of each of several, by its number."""
    if not classes or value is None:
        return value
    if isinstance(value, list):
        return [_named(one, classes) for one in value]
    return classes[value] if isinstance(value, int) and 0 <= value < len(classes) else value


def _is_one_object(path: Path) -> bool:
    """Whether a .json file is one object, as SQuAD's are, and not lines or a list of records."""
    try:
        row = next(read_rows(path))
    except CompressorError:
        # The first line is no record of its own; a document over several lines may be one.
        try:
            return isinstance(read_document(path), dict)
        except CompressorError:
            return True  # read again by the reader of documents, which says where it is broken
    return "data" in row.values and not {"question", "qas"} & set(row.values)


def _squad_rows(path: Path, bad: BadRecords) -> Iterator[Row]:
    """Questions of a SQuAD file: data[].paragraphs[].(context, qas[])."""
    document = read_document(path)
    number = 0

    def items(value: Any, name: str, where: str = "") -> list[tuple[str, dict[str, Any]]]:
        """The objects of a list, each with its place in the document."""
        if not isinstance(value, dict) or not isinstance(value.get(name), list):
            raise CompressorError(f"{path} {where}: there is no list {name!r}, as SQuAD's JSON has")
        places = [f"{where}.{name}[{index}]".lstrip(".") for index in range(len(value[name]))]
        for place, item in zip(places, value[name], strict=True):
            if not isinstance(item, dict):
                raise CompressorError(f"{path} {place} is {type_name(item)}, not an object")
        return list(zip(places, value[name], strict=True))

    version = document.get("version") if isinstance(document, dict) else None
    dataset = {} if not isinstance(version, str) else {"dataset": f"squad_v{version.removeprefix('v')}"}
    for count, (place, article) in enumerate(items(document, "data"), start=1):
        if {"questions", "qas", *COLUMNS["question"]} & set(article):
            # CoQA's, and plain records under "data".
            yield from bad.caught(rows_of_questions, Row(count, f"{path} {place}", {**dataset, **article}), {})
            continue
        for of_paragraph, paragraph in items(article, "paragraphs", place):
            for of_question, item in items(paragraph, "qas", of_paragraph):
                number += 1
                yield Row(number, f"{path} {of_question}", {**dataset, "context": paragraph.get("context"), **item})


def _question(row: Row, dataset: str, columns: Mapping[str, str], keep_unanswerable: bool) -> Question | None:
    """The record of a row; None if it says that it is unanswerable and such are not kept."""
    names = {field: _column(row, field, columns) for field in COLUMNS}
    answers = _answers(row, names["answers"], keep_unanswerable)
    if not answers and not keep_unanswerable:
        return None
    plain = {names["question"]: question_text(row, names["question"])} if names["question"] in row.values else {}
    if isinstance(row.values.get(names["context"]), dict | list):
        plain[names["context"]] = context_text(row, names["context"])
    row = row._replace(values={**row.values, **plain})
    named = row.values.get(names["dataset"])
    return Question(
        id=row.id(names["id"], default=f"{dataset}:{row.number}"),
        context=row.text(names["context"]),
        question=row.text(names["question"]),
        answers=answers,
        dataset=dataset if named is None else row.text(names["dataset"]),
        spans=_spans(row, names["context"], names["answers"]) if answers else (),
        whole=names["question"] == "instruction",
    )


def _column(row: Row, field: str, columns: Mapping[str, str]) -> str:
    """The column that holds a field: the one that was named, or the first usual one that is there."""
    if field in columns:
        if columns[field] not in row.values:
            row.string(columns[field])  # raises: the field is missing
        return columns[field]
    return next((name for name in COLUMNS[field] if name in row.values), COLUMNS[field][0])


def _answers(row: Row, name: str, keep_unanswerable: bool) -> tuple[str, ...]:
    """The different answers of a row in their order; none if it says that it is unanswerable."""
    if name not in row.values and row.values.get("is_impossible") is not True:
        fields = ", ".join(map(repr, row.values)) or "none"
        raise BadRecord(f"{row.where}: the field 'answers' is missing; its fields are {fields}")
    value = answer_texts(row, name)
    if value is None:
        return ()
    if not value and not keep_unanswerable:
        raise BadRecord(
            f"{row.where}: the field {name!r} is empty: give an answer, or set is_impossible to true in the record"
        )
    for index, answer in enumerate(value):
        row._replace(values={f"{name}[{index}]": answer}).text(f"{name}[{index}]")
    return tuple(dict.fromkeys(value))


def _spans(row: Row, context: str, answers: str) -> tuple[tuple[int, int], ...]:
    """Where the source says that answers stand: SQuAD's `answer_start`, MRQA's `char_spans` (end inclusive).

    A place at which another text stands is not one: it counts bytes, say, or is of the text before it was cleaned.
    """
    places: list[tuple[Any, Any]] = []
    for one in _objects(row.values.get(answers)):
        places += [(one.get("text"), one.get(name)) for name in ("answer_start", "span_start") if name in one]
    for one in _objects(row.values.get("detected_answers")):
        spans = one.get("char_spans")
        spans = [spans] if isinstance(spans, dict) else spans or []
        for span in spans:
            starts = span.get("start") if isinstance(span, dict) else span[:1] if isinstance(span, list) else []
            places += [(one.get("text"), start) for start in (starts if isinstance(starts, list) else [starts])]
    found = [
        (start, start + len(text))
        for text, start in places
        if isinstance(text, str)
        and isinstance(start, int)
        and start >= 0
        and row.values[context][start : start + len(text)].casefold() == text.casefold()
    ]
    return tuple(dict.fromkeys(found))


def _objects(value: Any) -> list[dict[str, Any]]:
    """The objects of a list of them, which the hub holds as one object of lists."""
    if isinstance(value, dict):
        lists = [one for one in value.values() if isinstance(one, list)]
        if not lists or len({len(one) for one in lists}) > 1:
            return []
        names = [name for name in value if isinstance(value[name], list)]
        return [dict(zip(names, row, strict=True)) for row in zip(*lists, strict=True)]
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
