"""The forms that well-known question sets come in, told by their fields, each turned into one row a question.

A new form of a field is a branch of `context_text` or `answer_texts`; a set with several questions in a record is a
branch of `rows_of_questions`. The names that fields go by are `questions.COLUMNS`.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from compressor.data.rows import BadRecord, Row, type_name

NO_ANSWER = "CANNOTANSWER"
"""What QuAC says, and ends its contexts with, where the context does not answer."""


@dataclass(frozen=True)
class Question:
    """A question that its context answers."""

    id: str
    context: str
    question: str
    answers: tuple[str, ...]
    """What counts as right; the first is the one to train on. Empty only where unanswerable questions are kept."""
    dataset: str
    spans: tuple[tuple[int, int], ...] = ()
    """Characters (first, and end, exclusive) of the context at which the source says that answers stand."""
    whole: bool = False
    """Whether it is about the whole context, as an instruction is, whatever stretch has words of its answer."""
    choices: tuple[str, ...] = ()
    """Answers to choose from, where each question has its own."""


def rows_of_questions(row: Row, header: Mapping[str, Any]) -> Iterator[Row]:
    """One row for each question of a record: MRQA and SQuAD's paragraphs (qas), QuAC, CoQA and RACE (questions).

    Raises:
        BadRecord: a record of such a form that is broken.
    """
    values = row.values
    dataset = {"dataset": header["dataset"]} if isinstance(header.get("dataset"), str) else {}
    if "qas" in values:
        items = values["qas"]
        if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
            raise BadRecord(f"{row.where}: the field 'qas' must be a list of questions but is {type_name(items)}")
        shared = {**dataset, "context": values.get("context")}
        several = [{**shared, **item} for item in items]
    elif isinstance(values.get("questions"), list) and "question" not in values:
        several = [{**dataset, **item} for item in _turns(row)]
    else:
        yield row._replace(values={**dataset, **values}) if dataset else row
        return
    for index, item in enumerate(several, start=1):
        yield Row(row.number, f"{row.where} question {index}", item)


def _turns(row: Row) -> list[dict[str, Any]]:
    """The questions of a record with lists of questions and of their answers."""
    values = row.values
    questions = [one.get("input_text") if isinstance(one, dict) else one for one in values["questions"]]
    answers = values.get("answers")
    if isinstance(answers, dict):  # QuAC and CoQA on the hub
        if "texts" in answers:
            starts = answers.get("answer_starts") or [None] * len(answers["texts"])
            pairs = zip(answers["texts"], starts, strict=True)
            answers = [{"text": texts, "answer_start": places} for texts, places in pairs]
        else:
            answers = [[one] for one in answers.get("input_text") or []]
    if not isinstance(answers, list) or len(answers) != len(questions):
        got = f"{len(answers)} answers" if isinstance(answers, list) else type_name(answers)
        raise BadRecord(f"{row.where}: {len(questions)} questions have {got}")
    options = values.get("options")
    names = values.get("turn_ids") or values.get("ids")
    shared = {name: value for name, value in values.items() if name not in ("questions", "answers", "options", "id")}
    turns = []
    for place, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        turn = {**shared, "question": question, "answers": answer if _all_answers(answer) else [answer]}
        if isinstance(names, list) and len(names) == len(questions):
            turn["id"] = names[place]
        elif "id" in values:
            turn["id"] = f"{values['id']}:{place + 1}"
        if isinstance(options, list) and len(options) == len(questions):
            turn |= {"options": options[place], "answer": answer}
            del turn["answers"]
        turns.append(turn)
    return turns


def _all_answers(answer: Any) -> bool:
    """Whether this is all right answers to a question, as a list or an object of lists, and not one of them."""
    return isinstance(answer, list) or (isinstance(answer, dict) and isinstance(answer.get("text"), list))


def context_text(row: Row, name: str) -> Any:
    """A context as text, where it is not one: titles with sentences or paragraphs, sections, or pages.

    Raises:
        BadRecord: it is in no known form.
    """
    value = row.values[name]
    try:
        if isinstance(value, dict):
            if "sentences" in value:  # HotpotQA on the hub
                return _titled(zip(value["title"], value["sentences"], strict=True))
            for field in ("contexts", "wiki_context", "search_context"):  # PubMedQA, TriviaQA
                if field in value:
                    return "\n".join(part for part in value[field] if part.strip())
            if "summary" in value:  # NarrativeQA
                return value["summary"]["text"]
            return value["text"]
        if value and all(isinstance(one, dict) for one in value):  # MuSiQue, DPR
            value = value[:1] if name == "positive_ctxs" else value  # each of them holds an answer
            bodies = [next(one[key] for key in ("paragraph_text", "text") if key in one) for one in value]
            titles = [one.get("title") for one in value]
            return "\n".join(f"{t}: {body}" if t else body for t, body in zip(titles, bodies, strict=True))
        return _titled(value)  # HotpotQA
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration):
        raise BadRecord(
            f"{row.where}: the field {name!r} must be text, or titles with their sentences as HotpotQA has them, or of "
            f"another known set, but is {type_name(value)}"
        ) from None


def _titled(pairs: Any) -> str:
    return "\n".join(f"{title}: {''.join(sentences).strip()}" for title, sentences in pairs)


def answer_texts(row: Row, name: str) -> list[Any] | None:
    """The right answers of a row, of any type where they are broken; None where it says that there is none.

    Raises:
        BadRecord: they are in no known form.
    """
    values = row.values
    if values.get("is_impossible") is True or values.get("answerable") is False:
        return None
    value = values[name]
    if name == "annotations":
        return _annotated(row)
    if isinstance(value, bool):  # BoolQ
        return ["yes" if value else "no"]
    options = values.get("options")
    if isinstance(options, list) and options:  # RACE: A, B, C, D
        letter = value[0] if isinstance(value, list) and len(value) == 1 else value
        place = string.ascii_uppercase.find(letter) if isinstance(letter, str) and len(letter) == 1 else -1
        if not 0 <= place < len(options):
            raise BadRecord(f"{row.where}: the answer {value!r} names none of {len(options)} options")
        return [options[place]]
    if isinstance(value, dict):
        if value.get("text") == [] == value.get("answer_start"):
            return None  # SQuAD 2.0 on the hub
        if "value" in value:  # TriviaQA
            value = [value["value"], *(value.get("aliases") or [])]
        else:
            value = next((value[key] for key in ("text", "spans") if key in value), value)  # DROP: spans
    elif isinstance(value, str) and name != "answers":
        # Text under this name is most often a list that some tool printed.
        value = [value, *(values.get("answer_aliases") or [])]
    if not isinstance(value, list):
        raise BadRecord(f"{row.where}: the field {name!r} must be a list of texts but is {type_name(values[name])}")
    found = []
    for one in value:  # SQuAD, CoQA and NarrativeQA hold objects
        key = next((key for key in ("text", "input_text") if isinstance(one, dict) and key in one), None)
        found.append(one if key is None else one[key])
    return None if found and all(one in (NO_ANSWER, "unknown") for one in found) and _dialogue(values) else found


def _annotated(row: Row) -> list[Any] | None:
    """Short answers of NaturalQuestions: words of the document, or yes and no; None where an annotator found none."""
    found = []
    try:
        words = row.values["document_text"].split(" ")
        for one in row.values["annotations"]:
            found += [" ".join(words[span["start_token"] : span["end_token"]]) for span in one["short_answers"]]
            said = str(one.get("yes_no_answer", "NONE")).lower()
            found += [said] if said in ("yes", "no") else []
    except (KeyError, TypeError, AttributeError):
        raise BadRecord(f"{row.where}: 'annotations' are not NaturalQuestions' short answers") from None
    return found or None


def _dialogue(values: Mapping[str, Any]) -> bool:
    """Whether a row is of QuAC or CoQA, where a certain answer says that there is none."""
    return bool({"turn_ids", "followup", "followups", "story", "yesno"} & set(values)) or str(
        values.get("context")
    ).endswith(NO_ANSWER)


def question_text(row: Row, name: str) -> Any:
    """A question as text; one with options names them, without which it often asks nothing."""
    value = row.values.get(name)
    if isinstance(value, dict):  # NarrativeQA
        value = value.get("text")
    options = row.values.get("options")
    if isinstance(value, str) and isinstance(options, list) and options:
        letters = zip(string.ascii_uppercase, options, strict=False)
        value = f"{value.strip()} {' '.join(f'{letter}) {option}' for letter, option in letters)}"
    return value
