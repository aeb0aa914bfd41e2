"""Token ids, what the decoder reads and is asked for, and micro-batches: which items are in number 0, 1, 2, ...

The last is a pure function of data, settings and seed, so that a resumed run repeats them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from compressor.data.config import DataConfig
from compressor.errors import CompressorError

IGNORED = -100
"""Label of positions without a loss."""
ROUND = 2048
"""Items drawn and sorted by length at a time."""
CUED = 48
"""Most tokens that are written after a cue."""


def tokenise(tokenizer: Any, texts: Iterable[str]) -> list[list[int]]:
    """Token ids of texts, without special tokens."""
    texts = list(texts)
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return [list(ids) for ids in encoded]


def start_token(tokenizer: Any) -> int:
    """BOS or, where there is none, the end-of-text token."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def padded_width(longest: int) -> int:
    """The width of a training batch whose longest row has so many tokens.

    A multiple of 8, from 128 tokens on of 16, from 256 of 32, and so on. Kernels are built and kept for each shape, so
    that a process which trains for hours grows with every new width: up to 512 tokens there are 32 of these, at most an
    eighth of a row is padding, and tensor cores like them too.
    """
    step = max(8, 1 << max(0, longest - 1).bit_length() >> 4)
    return -(-longest // step) * step


def by_length(sizes: Sequence[Any], together: int) -> list[list[int]]:
    """Places of items of these sizes, at most so many together: those of similar size, which end together."""
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    return [order[start : start + together] for start in range(0, len(order), together)]


def equal_segments(ids: Sequence[int], most: int) -> list[list[int]]:
    """Cut token ids into the fewest segments of at most `most` tokens, as equal as can be."""
    count = -(-len(ids) // most)
    return [list(ids[len(ids) * i // count : len(ids) * (i + 1) // count]) for i in range(count)]


def pad(
    sequences: Sequence[Sequence[int]],
    device: torch.device | str = "cpu",
    fill: int = 0,
    width: Callable[[int], int] = int,
) -> tuple[Tensor, Tensor]:
    """Right-pad token ids: int64 `[batch, width]`, as wide as `width` makes of the longest, and lengths `[batch]`."""
    lengths = torch.tensor([len(ids) for ids in sequences], dtype=torch.int64)
    padded = torch.full((len(sequences), width(int(lengths.max()))), fill, dtype=torch.int64)
    for row, ids in zip(padded, sequences, strict=True):
        row[: len(ids)] = torch.as_tensor(ids, dtype=torch.int64)
    return padded.to(device), lengths.to(device)


def regeneration_pair(bos: int, eos: int, passage: Sequence[int]) -> tuple[list[int], list[int]]:
    """Decoder input and labels for writing the passage: `BOS passage` gives `passage EOS`.

    Regeneration needs no words: after a memory BOS (without an EOS before it) means "the passage again". It is the
    trigger of the published method, and the base learns it from its repeated passages.
    """
    return [bos, *passage], [*passage, eos]


def cued_pair(rng: np.random.Generator, eos: int, passage: Sequence[int]) -> tuple[list[int], list[int]]:
    """Decoder input and labels for going on from a few tokens of the passage's middle, which have no labels themselves.

    What is asked of a memory is found by what it says, not by counting from its beginning: the cue is 4 to 8 tokens
    long and begins anywhere, `CUED` tokens follow at most.
    """
    cue = max(1, min(int(rng.integers(4, 9)), len(passage) // 2))
    start = int(rng.integers(0, max(1, len(passage) - cue - 4)))
    prompt, rest = passage[start : start + cue], passage[start + cue :]
    pair = answer_pair(prompt, rest, eos)
    return pair[0][: cue + CUED], pair[1][: cue + CUED]


def continuation_pair(last: int, following: Sequence[int]) -> tuple[list[int], list[int]]:
    """Decoder input and labels for what follows the passage, whose last token starts the decoder."""
    return [last, *following[:-1]], list(following)


def answer_pair(prompt: Sequence[int], answer: Sequence[int], eos: int) -> tuple[list[int], list[int]]:
    """Decoder input and labels for an answer: `prompt answer` gives `answer EOS` after the prompt."""
    return [*prompt, *answer], [*[IGNORED] * (len(prompt) - 1), *answer, eos]


def stack_pairs(pairs: Sequence[tuple[list[int], list[int]]]) -> dict[str, Any]:
    """Pad decoder inputs and labels: int64 `[batch, width]` each, and the number of targets."""
    inputs, _ = pad([ids for ids, _ in pairs], width=padded_width)
    labels, _ = pad([wanted for _, wanted in pairs], fill=IGNORED, width=padded_width)
    return {"inputs": inputs, "labels": labels, "targets": int((labels != IGNORED).sum())}


class Sized(Protocol):
    """What is put into micro-batches."""

    @property
    def length(self) -> int: ...


T = TypeVar("T", bound=Sized)


class Rounds(Generic[T]):
    """Draws a round of items, sorts it by length and cuts it into micro-batches, which are shuffled.

    Args:
        batch_tokens: most padded passage tokens of a micro-batch (one item may have more).
        batch_passages: most items of a micro-batch.
    """

    def __init__(self, batch_tokens: int, batch_passages: int, seed: int):
        self.batch_tokens, self.batch_passages, self.seed = batch_tokens, batch_passages, seed
        self._ends: list[int] = []  # micro-batches up to and including each round
        self._cached: tuple[int, list[list[T]]] = (-1, [])

    def draw_round(self, rng: np.random.Generator, number: int) -> list[T]:
        """The items of round `number`."""
        raise NotImplementedError

    def _round(self, number: int) -> list[list[T]]:
        rng = np.random.default_rng([self.seed, number])
        batches: list[list[T]] = [[]]
        for item in sorted(self.draw_round(rng, number), key=lambda item: item.length):
            batch = batches[-1]
            if batch and (len(batch) == self.batch_passages or (len(batch) + 1) * item.length > self.batch_tokens):
                batch = []
                batches.append(batch)
            batch.append(item)
        rng.shuffle(batches)
        return batches

    def batch(self, index: int) -> list[T]:
        """Items of micro-batch `index`."""
        while not self._ends or self._ends[-1] <= index:
            batches = self._round(len(self._ends))
            self._cached = (len(self._ends), batches)
            self._ends.append((self._ends[-1] if self._ends else 0) + len(batches))
        number = int(np.searchsorted(self._ends, index, side="right"))
        if self._cached[0] != number:
            self._cached = (number, self._round(number))
        return self._cached[1][index - (self._ends[number - 1] if number else 0)]


class Piece(NamedTuple):
    """A stretch of a record: tokens `start .. start + length - 1`."""

    record: int
    start: int
    length: int


class BatchPlan(Rounds[Piece]):
    """Which pieces make up micro-batch 0, 1, 2, ...: a pure function of data, configuration and seed.

    A length is drawn from the configured mixture, then a record among those that are long enough, so that the mixture
    of lengths is what the configuration says whatever the corpus. Micro-batches are made by `Rounds`.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        data: DataConfig,
        batch_tokens: int,
        batch_passages: int,
        seed: int,
        source: str = "data.train",
    ):
        """`lengths` is the number of tokens of each record, int `[records]`; `source` names them in messages."""
        if not len(lengths) or int(lengths.max()) < 1:
            raise CompressorError("there is no passage with at least one token to train on")
        longest, least = int(lengths.max()), min(share.low for share in data.lengths)
        if longest < least:
            raise CompressorError(
                f"none of the {len(lengths):,} passages of {source} is as long as data.lengths asks for: the longest "
                f"has {longest} tokens, the shortest range begins at {least}. Give longer passages or shorter ranges"
            )
        self.order = np.argsort(lengths, kind="stable")
        self.sorted = lengths[self.order]
        super().__init__(batch_tokens, batch_passages, seed)
        self.data = data

    def draw(self, rng: np.random.Generator, count: int) -> list[Piece]:
        """`count` pieces at random."""
        weights = np.array([share.weight for share in self.data.lengths])
        kind = rng.choice(len(weights), size=count, p=weights / weights.sum())
        low = np.array([share.low for share in self.data.lengths])[kind]
        high = np.array([share.high for share in self.data.lengths])[kind]
        wanted = np.minimum(rng.integers(low, high + 1), self.sorted[-1])
        first = np.searchsorted(self.sorted, wanted)
        place = first + (rng.random(count) * (len(self.sorted) - first)).astype(np.int64)
        spare = self.sorted[place] - wanted
        start = np.where(
            rng.random(count) < self.data.random_start, (rng.random(count) * (spare + 1)).astype(np.int64), 0
        )
        columns = (self.order[place].tolist(), start.tolist(), wanted.tolist())
        return [Piece(*row) for row in zip(*columns, strict=True)]

    def draw_round(self, rng: np.random.Generator, number: int) -> list[Piece]:
        return self.draw(rng, ROUND)
