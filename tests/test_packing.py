"""Rows for training the base: exact length, whole repeats, questions only with their answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from compressor.config import MixtureConfig
from compressor.data.packing import ANSWER_MARK, SHORTEST_REPEAT, RowPacker, pack_rows, window
from compressor.errors import CompressorError
from compressor.prompts import QUESTION, answer_text

BOS, EOS = 1, 2


def encode(texts: Sequence[str]) -> list[list[int]]:
    """One token a character, none of them special."""
    return [[ord(letter) % 1000 + 10 for letter in text] for text in texts]


def numbered(count: int, length: int) -> list[str]:
    """Texts in which every character tells text and place, so that repeats cannot arise by chance."""
    return ["".join(chr(20 + (i * 37 + j * 11 + j * j) % 900) for j in range(length)) for i in range(count)]


def packer(
    texts: list[str],
    questions: Sequence[tuple[str, list[tuple[str, str]]]] = (),
    seed: int = 0,
    **settings: float | None,
) -> RowPacker:
    mixture = MixtureConfig(**({"plain": 0.0, "repeat": 0.0, "random": 0.0, "qa": 0.0} | settings))  # type: ignore[arg-type]
    return RowPacker(texts, questions, encode, BOS, EOS, 1010, mixture, seed)


def documents(row: list[int]) -> list[list[int]]:
    """The row cut after each EOS."""
    found: list[list[int]] = [[]]
    for token in row:
        found[-1].append(token)
        if token == EOS:
            found.append([])
    return [one for one in found if one]


@pytest.mark.parametrize("length", [16, 100, 512])
def test_rows_have_exactly_the_length(length: int) -> None:
    source = packer(numbered(9, 130), plain=1, repeat=1)
    rows = list(source.rows(20, length))
    assert len(rows) == 20
    assert {row.shape for row in rows} == {(length,)}
    assert {row.dtype for row in rows} == {np.dtype(np.uint32)}


def test_plain_documents_run_on_from_row_to_row_and_none_is_lost() -> None:
    texts = numbered(5, 130)
    stream = np.concatenate(list(packer(texts, plain=1).rows(30, 100))).tolist()
    found = documents(stream)[:20]
    wanted = sorted([BOS, *ids, EOS] for ids in encode(texts))
    for round_ in range(4):
        assert sorted(found[5 * round_ : 5 * round_ + 5]) == wanted  # each once a round, in a new order
    assert found[:5] != found[5:10]


@pytest.mark.parametrize("share", ["repeat", "random"])
def test_both_copies_of_a_repeat_lie_in_one_row(share: str) -> None:
    rows = [row.tolist() for row in packer(numbered(12, 300), **{share: 1.0}).rows(60, 256)]  # type: ignore[arg-type]
    repeats, lengths = 0, set()
    for row in rows:
        for one in documents(row):
            if one.count(BOS) == 2 and one[0] == BOS and one[-1] == EOS:
                middle = one.index(BOS, 1)
                assert one[1:middle] == one[middle + 1 : -1]
                repeats += 1
                lengths.add(middle - 1)
            else:
                assert one.count(BOS) <= 1  # what fills a row's end is plain, never half a repeat
    assert repeats > 60
    assert SHORTEST_REPEAT <= min(lengths) < 30
    assert 100 < max(lengths) <= (256 - 3) // 2


def test_a_second_bos_always_means_the_passage_again() -> None:
    # BOS without an EOS before it asks for a repetition; nothing else may look like that.
    texts = numbered(8, 90)
    questions = [(text, [("who?", "me"), ("why?", "because")]) for text in numbered(6, 247)]
    for row in packer(texts, questions, plain=1, repeat=1, qa=2).rows(80, 512):
        for one in documents((row % ANSWER_MARK).tolist()):
            starts = [place for place, token in enumerate(one) if token == BOS]
            if len(starts) == 2:
                copy = one[starts[1] + 1 :]
                copy = copy[:-1] if copy and copy[-1] == EOS else copy
                assert copy == one[starts[0] + 1 : starts[1]]
            assert len(starts) <= 2


def test_questions_come_whole_with_answers_after_their_context() -> None:
    context, pairs = "c" * 120, [("who?", "me"), ("why?", "because")]
    rows = [row.tolist() for row in packer(numbered(3, 50), [(context, pairs)], qa=1).rows(20, 512)]
    blocks = []
    for question, answer in pairs:
        prompt, written = encode([QUESTION.format(question=question), answer_text(answer)])
        blocks.append([*prompt, *(ANSWER_MARK + token for token in [*written, EOS])])
    orders = [blocks[0] + blocks[1], blocks[1] + blocks[0]]
    start = [BOS, *encode([context])[0]]
    seen = set()
    for row in rows:
        text = row
        for place in range(len(text) - len(start)):
            if text[place : place + len(start)] == start:
                rest = text[place + len(start) :]
                matching = [i for i, order in enumerate(orders) if rest[: len(order)] == order]
                assert matching
                seen.update(matching)
    assert seen == {0, 1}


def test_a_window_is_so_many_words_with_the_answer_among_them() -> None:
    context = " ".join(f"w{place}" for place in range(40)) + " (the answer) here" + " z" * 30
    rng = np.random.default_rng(0)
    windows = [window(context, "the answer", 12, rng) for _ in range(200)]
    assert all("the answer" in one and one in context and len(one.split()) == 12 for one in windows)
    assert len(set(windows)) == 11  # every place that holds both words
    assert window("a b c", "b", 12, rng) == "a b c"
    assert window("a b c d e", "b c d", 2, rng) == "b c d"
    assert len(window(context, "not in it", 12, rng).split()) == 12


def test_windows_of_a_context_keep_only_the_questions_they_answer() -> None:
    words = [f"word{place}" for place in range(60)]
    pairs = [("first?", "word3"), ("last?", "word57")]
    source = packer(numbered(3, 50), [(" ".join(words), pairs)], qa=1, question_words=10)
    asked = [source.asked(1000) for _ in range(60)]
    prompts = encode([QUESTION.format(question=question) for question, _ in pairs])
    lengths = {len(one) for one in asked}
    assert max(lengths) > 400 > 200 > min(lengths)
    for one in asked:
        text = "".join(map(chr, one))
        found = ["".join(map(chr, prompt)) in text for prompt in prompts]
        assert all(found) if len(one) > 400 else sum(found) == 1


def test_the_question_format_is_fixed() -> None:
    assert QUESTION.format(question="Why?") + answer_text(" because ") == "\nQuestion: Why? Answer: because"


def test_a_context_too_long_for_any_question_is_not_used() -> None:
    rows = packer(["p" * 40], [("c" * 500, [("who?", "me" * 10)])], qa=1).rows(10, 512)
    assert not any(token == encode(["c"])[0][0] for row in rows for token in row.tolist())


def test_the_seed_decides_the_rows() -> None:
    texts = numbered(7, 120)
    one, same, other = (
        [row.tolist() for row in packer(texts, plain=1, repeat=1, seed=seed).rows(5, 200)] for seed in (1, 1, 2)
    )
    assert one == same != other


def test_packed_files_hold_what_was_packed(tmp_path: Path) -> None:
    texts = numbered(7, 120)
    rows = pack_rows(packer(texts, plain=1, repeat=1), tmp_path / "rows.npy", 6, 64)
    assert rows.shape == (6, 64)
    expected = list(packer(texts, plain=1, repeat=1).rows(6, 64))
    assert np.array_equal(np.load(tmp_path / "rows.npy"), np.stack(expected))


def test_a_share_of_questions_without_questions_goes_to_the_rest() -> None:
    assert packer(["some text"], plain=1, repeat=3, qa=4).shares.tolist() == [0.25, 0.75, 0, 0]
    with pytest.raises(CompressorError, match=r"mixture\.qa = 1.*data\.qa"):
        packer(["some text"], qa=1)
