"""Which stretch of a context a question is asked of: offsets, whole words, cuts, and what cannot be placed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compressor.data.asked import ask
from compressor.data.prompts import QUESTION, Windows, answer_spans, place_questions, whole_words
from compressor.data.questions import Question, load_questions
from compressor.data.rows import LeftOut
from compressor.errors import CompressorError
from compressor.model.base import Base


def asked(context: str, *answers: str, question: str = "What?", spans: Any = ()) -> Question:
    return Question("q", context, question, answers, "d", spans)


@pytest.mark.parametrize(
    ("text", "answer", "places"),
    [
        ("fourteen or four", "four", [12]),
        ("fourscore and four.", "four", [14]),
        ("unfour four_ four's", "four", [13]),
        ("the 3.5 or 3", "3", [11]),
        ("1,500 or 500", "500", [9]),
        ("in 1990. Or 1990, 5", "1990", [3, 12]),
        ("C++ and C", "C++", [0]),
        ("f(x) = (x)", "(x)", [1, 7]),
        ("New\nYork and New  York", "New York", [0, 13]),
        ("aa aa aa", "aa aa", [0, 3]),
        ("naïve naï", "naï", [6]),
        ("我住在北京市", "北京", [3]),  # no spaces between words
        ("서울에서 왔다", "서울", [0]),  # a particle follows the word
        ("nothing", " ", []),
    ],
)
def test_answers_are_whole_words(text: str, answer: str, places: list[int]) -> None:
    assert [start for start, _ in whole_words(text, answer)] == places


@pytest.mark.parametrize(
    ("question", "place"),
    [
        (asked("Ada met Bob. Ada met Eve.", "Ada", spans=((13, 16),)), 13),  # the source knows
        (asked("Ada met Bob. Ada met Eve.", "Ada", "Ada met Eve"), 13),  # all right answers agree
        (asked("Ada met Bob. Ada met Eve.", "Ada", question="Who met Eve?"), 13),  # words of the question
        (asked("Ada met Bob. Ada met Eve.", "Ada"), 0),
        (asked("Ada met Bob.", "Zoe", "Bob"), 8),  # another right answer
        (asked("Ada met Bob.", "bob"), 8),  # in another case, where none is in the same
        (asked("Ada met Bobby.", "Bob"), None),
    ],
)
def test_the_likeliest_place_of_an_answer_comes_first(question: Question, place: int | None) -> None:
    spans = answer_spans(question)
    assert (spans[0][0] if spans else None) == place


def words(context: str, question: Question, most: int) -> str:
    """The window of a question among tokens that are words."""
    offsets, place = [], 0
    for word in context.split(" "):
        offsets.append((place, place + len(word)))
        place += len(word) + 1
    found = Windows(context, range(len(offsets)), offsets, most).of(question)
    return found if isinstance(found, str) else context[offsets[found[0]][0] : offsets[found[1] - 1][1]]


CONTEXT = "a b c d e f g h i j"


@pytest.mark.parametrize(
    ("answers", "most", "window"),
    [
        (("c",), 5, "a b c d e"),
        (("h",), 5, "f g h i j"),
        (("e f",), 5, "c d e f g"),  # a cut goes through it: a window centred on it
        (("b c",), 2, "b c"),
        (("b c d",), 4, "a b c d"),  # longer than the three segments, not than a window
        (("i j",), 9, "f g h i j"),
        (("b c d",), 2, "answer_too_long"),
        (("b c d", "e"), 2, "answer_too_long"),
        (("x",), 5, "answer_not_found"),
        (("x",), 10, CONTEXT),  # the whole context may imply it
        ((), 5, "f g h i j"),  # unanswerable: where the words of the question are
    ],
)
def test_windows_hold_the_answer(answers: tuple[str, ...], most: int, window: str) -> None:
    assert words(CONTEXT, asked(CONTEXT, *answers, question="What of h and i?"), most) == window


def test_questions_of_a_window_share_it_and_what_is_nowhere_is_counted(tiny_base: Base) -> None:
    context = "The start names Ada. " + "Nothing happens here for a while. " * 6 + "The end names Bob."
    questions = [
        Question(f"q{i}", context, "Who?", answers, "d")
        for i, answers in enumerate((("Ada",), ("start",), ("Bob",), ("Zoe",), ("Bobby", "names Bob"), ()))
    ]
    left_out = LeftOut()
    placed = list(place_questions(questions, tiny_base.tokenizer, 24, left_out))
    assert left_out.record() == {"answer_not_found": {"count": 1, "first": "q3"}}
    assert placed[0].ids is placed[1].ids
    assert placed[2].ids is placed[3].ids
    for one in placed[:-1]:
        assert any(answer in tiny_base.tokenizer.decode(one.ids) for answer in one.question.answers)
    parts = ask(questions, tiny_base.tokenizer, QUESTION, 24, LeftOut())
    assert [len(part.prompts) for part in parts] == [3, 2, 1]
    assert parts[0].answers[2] == []  # of the unanswerable one: EOS follows at once
    # What stands nowhere, and an instruction, is about the whole context, in segments.
    (whole,) = ask([questions[3], replace(questions[0], whole=True)], tiny_base.tokenizer, QUESTION, 24)
    assert len(whole.prompts) == 2
    assert [token for segment in whole.segments(24) for token in segment] == whole.ids
    assert len(whole.segments(24)) == -(-len(whole.ids) // 24)
    with pytest.raises(CompressorError, match=r"no question to train on: left out 1 of 1 questions: 1: the context is"):
        ask(questions[3:4], tiny_base.tokenizer, QUESTION, 24, longest=20)


def test_every_window_of_the_shipped_questions_holds_a_right_answer(tiny_base: Base) -> None:
    """Of the 303, 13 had no window with their answer when segments were searched for it as a substring."""
    questions, left_out = load_questions("squad-dev"), LeftOut()
    placed = list(place_questions(questions, tiny_base.tokenizer, 96, left_out))
    assert len(placed) + left_out.total == len(questions)
    assert left_out.total == 0
    for one in placed:
        text = tiny_base.tokenizer.decode(one.ids)
        assert len(one.ids) <= 96
        assert any(whole_words(text, answer, 2) for answer in one.question.answers), one.question


@pytest.mark.parametrize(
    ("record", "spans"),
    [
        ({"answers": {"text": ["b", "b c"], "answer_start": [2, 2]}}, ((2, 3), (2, 5))),
        ({"answers": [{"text": "b", "answer_start": 2}]}, ((2, 3),)),
        ({"answers": {"text": ["b"], "answer_start": [1]}}, ()),  # something else stands there
        ({"answers": {"text": ["b"], "answer_start": [-4]}}, ()),
        ({"answers": ["b"], "detected_answers": [{"text": "B", "char_spans": [[2, 2], [6, 6]]}]}, ((2, 3), (6, 7))),
        (
            {
                "answers": ["b"],
                "detected_answers": {"text": ["b"], "char_spans": [{"start": [2, 6], "end": [2, 6]}]},
            },
            ((2, 3), (6, 7)),
        ),
        ({"answers": ["b"]}, ()),
    ],
)
def test_offsets_of_every_source_are_read(tmp_path: Path, record: dict[str, Any], spans: Any) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"context": "A b c b", "question": "q?", **record}) + "\n")
    assert load_questions(path)[0].spans == spans
