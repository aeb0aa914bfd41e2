"""From text to packed rows of tokens for training the base.

A document is `BOS text EOS`. Four kinds are mixed: plain abstracts; a passage followed by itself
(`BOS passage BOS passage EOS`), which teaches in-context copying; the same of random tokens; and a context with its
questions and answers.
Rows are filled one after the other: a repeated passage is cut so that both copies fit in the rest of its row, and
only plain documents are split at a row's end. Tokens of answers carry a mark, so that their loss can be weighted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from compressor.config import MixtureConfig
from compressor.errors import CompressorError
from compressor.prompts import QUESTION, answer_text

Encode = Callable[[Sequence[str]], list[list[int]]]
SHORTEST_REPEAT = 8
LONGEST_RANDOM = 128
COPYING_TOKENS = 16
ANSWER_MARK = 1 << 16
"""Added to the ids of an answer's tokens in packed rows; ids themselves are smaller."""


def shuffled_forever(texts: Sequence[str], encode: Encode, rng: np.random.Generator) -> Iterator[list[int]]:
    """Token ids of `texts` in a new random order each round, encoded a chunk at a time."""
    while True:
        order = rng.permutation(len(texts))
        for start in range(0, len(order), 512):
            yield from encode([texts[int(i)] for i in order[start : start + 512]])


def copying_rows(rng: np.random.Generator, count: int, ordinary: np.ndarray, bos: int) -> np.ndarray:
    """Rows `BOS tokens BOS tokens` of 16 random ordinary tokens, int64 `[count, 34]`."""
    tokens = rng.choice(ordinary, size=(count, COPYING_TOKENS))
    start = np.full((count, 1), bos)
    return np.concatenate([start, tokens, start, tokens], axis=1)


def window(context: str, answer: str, words: int, rng: np.random.Generator) -> str:
    """`words` consecutive words of `context` with the answer somewhere among them; all of a shorter context.

    An answer of more words is left whole; without the answer in it, the context is cut anywhere.
    """
    spans = [match.span() for match in re.finditer(r"\S+", context)]
    if len(spans) <= words:
        return context
    start = context.find(answer)
    held = [
        place for place, (low, high) in enumerate(spans) if start <= low < start + len(answer) or low <= start < high
    ]
    first, last = (held[0], held[-1]) if start >= 0 else [int(rng.integers(len(spans)))] * 2
    lowest, highest = max(0, last + 1 - words), min(first, len(spans) - words)
    begin = int(rng.integers(lowest, highest + 1)) if lowest <= highest else first
    end = max(begin + words, last + 1)
    return context[spans[begin][0] : spans[end - 1][1]]


class RowPacker:
    """Fills rows of fixed length from the mixture."""

    def __init__(
        self,
        texts: Sequence[str],
        questions: Sequence[tuple[str, list[tuple[str, str]]]],
        encode: Encode,
        bos: int,
        eos: int,
        vocabulary: int,
        mixture: MixtureConfig,
        seed: int,
    ):
        self.rng = np.random.default_rng(seed)
        self.plain = shuffled_forever(texts, encode, self.rng)
        self.questions = questions
        self.encode, self.bos, self.eos = encode, bos, eos
        self.ordinary = np.setdiff1d(np.arange(vocabulary), [bos, eos])
        shares = np.array([mixture.plain, mixture.repeat, mixture.qa if questions else 0.0, mixture.random])
        if shares.sum() == 0:
            raise CompressorError(
                f"mixture.qa = {mixture.qa} is the only share of the mixture that is not 0, but there are no "
                "questions: name question-answer files with data.qa, or give mixture.plain a share"
            )
        self.shares = shares / shares.sum()
        self.question_words = mixture.question_words

    def repeated(self, room: int, random: bool = False) -> list[int]:
        """`BOS passage BOS passage EOS` in at most `room` tokens, of text or of random tokens.

        The passage length is log-uniform: copying is learned from short passages first.
        """
        passage = self.rng.choice(self.ordinary, size=LONGEST_RANDOM).tolist() if random else next(self.plain)
        longest = min(len(passage), (room - 3) // 2)
        shortest = min(SHORTEST_REPEAT, longest)
        length = min(longest, int(np.exp(self.rng.uniform(np.log(shortest), np.log(longest + 1)))))
        start = int(self.rng.integers(0, len(passage) - length + 1))
        cut = passage[start : start + length]
        return [self.bos, *cut, self.bos, *cut, self.eos]

    def asked(self, room: int) -> list[int]:
        """A context and as many of its question-answer pairs as fit in `room` tokens; nothing if none does.

        A context alone would end without EOS, and BOS after that asks for a repetition.
        """
        context, pairs = self.questions[int(self.rng.integers(len(self.questions)))]
        if self.question_words is not None and self.rng.random() < 0.5:
            answer = pairs[int(self.rng.integers(len(pairs)))][1]
            words = int(self.rng.integers(self.question_words // 2, self.question_words + 1))
            context = window(context, answer, max(1, words), self.rng)
            pairs = [pair for pair in pairs if pair[1] in context]
        order = self.rng.permutation(len(pairs)).tolist()
        prompts = [QUESTION.format(question=pairs[i][0]) for i in order]
        answers = [answer_text(pairs[i][1]) for i in order]
        passage, *encoded = self.encode([context, *prompts, *answers])
        ids = context_only = [self.bos, *passage]
        for prompt, answer_ids in zip(encoded[: len(order)], encoded[len(order) :], strict=True):
            if len(ids) + len(prompt) + len(answer_ids) + 1 > room:
                break
            ids = [*ids, *prompt, *(ANSWER_MARK + token for token in [*answer_ids, self.eos])]
        return [] if ids is context_only else ids

    def rows(self, count: int, length: int) -> Iterator[np.ndarray]:
        """Yield `count` rows, uint32 `[length]`; tokens of answers carry `ANSWER_MARK`."""
        carry: list[int] = []
        for _ in range(count):
            row = carry[:length]
            carry = carry[length:]
            while len(row) < length:
                room = length - len(row)
                kind = int(self.rng.choice(4, p=self.shares))
                document: list[int] = []
                if kind in (1, 3) and room >= 2 * SHORTEST_REPEAT + 3:
                    document = self.repeated(room, random=kind == 3)
                elif kind == 2 and room >= 256:
                    document = self.asked(room)
                if not document or len(document) > room:
                    document = [self.bos, *next(self.plain), self.eos]
                row += document[:room]
                carry = document[room:]
            yield np.asarray(row, dtype=np.uint32)


def pack_rows(packer: RowPacker, path: Path, count: int, length: int) -> np.ndarray:
    """Write `count` packed rows to `path` (a .npy file, uint32 `[count, length]`) and map it read-only."""
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint32, shape=(count, length))
    for index, row in enumerate(packer.rows(count, length)):
        rows[index] = row
    rows.flush()
    return np.load(path, mmap_mode="r")
