"""Tokens to bytes and back by arithmetic coding under the base's next-token distribution.

The unit is a *lane*: documents coded one after the other into bytes of their own. Each document is read from BOS on
and ends with EOS. A document longer than the base's window goes on in a new context that begins with BOS and the last
`OVERLAP` tokens. The coder evaluates a lane in parallel; the decoder runs all lanes in lockstep, a token a step, or
several where it is told what they probably are: what it then reads must agree with them, or they are taken back.

A lane's bytes hold: the scale of its logits, 3 bits; before every `offset_period` symbols the grid's offset, 5 bits;
the symbols; and, where a lane can have several documents, after each EOS whether another follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import torch

from compressor.errors import CompressorError
from compressor.model.base import Base
from compressor.packing import frequencies
from compressor.packing.float64 import ExactBase, Lockstep
from compressor.packing.ranges import RangeDecoder, RangeEncoder

OVERLAP = 64
LANE_SYMBOLS = 16_384
"""Most symbols (tokens and ends) of a lane: a damaged file cannot make the decoder run on."""
_MORE_BITS = 4
_MORE = (1 << _MORE_BITS) - 1  # of 16, the share that says that another document follows
_SAMPLED = 512
_TICKS = 32
_TOGETHER = 128
"""Tokens that all lanes together are fed in one step, of those that are known or told: more are no faster."""

Document = list[int]


class Unencodable(CompressorError):
    """These tokens cannot be coded so that every machine decodes them."""


def _windows(exact: ExactBase, document: Document) -> Iterator[tuple[list[int], list[int]]]:
    """Contexts (BOS and what is known) and the symbols that follow each of them, EOS at the end of the last."""
    base, symbols, start = exact.base, [*document, exact.base.eos], 0
    while start < len(symbols):
        context = [base.bos, *symbols[max(0, start - OVERLAP) : start]]
        room = exact.window + 1 - len(context)
        yield context, symbols[start : start + room]
        start += room


def _lane_logits(exact: ExactBase, documents: Sequence[Document]) -> tuple[np.ndarray, np.ndarray]:
    """Logits `[symbols, vocabulary]` before each symbol of a lane, and the symbols."""
    pieces = [piece for document in documents for piece in _windows(exact, document)]
    rows = [[*context, *symbols[:-1]] for context, symbols in pieces]
    logits = exact.logits(rows)
    kept = [found[len(context) - 1 :] for found, (context, _) in zip(logits, pieces, strict=True)]
    return torch.cat(kept).numpy(), np.array([symbol for _, symbols in pieces for symbol in symbols])


def code_length(exact: ExactBase, documents: Sequence[Document]) -> float:
    """Bits that the documents would take, ends included, at the best scale."""
    logits, symbols = _lane_logits(exact, documents)
    return float(frequencies.code_length(logits, symbols).min())


def encode_lane(exact: ExactBase, documents: Sequence[Document], several: bool) -> bytes:
    """Code a lane: one document, or with `several` one or more.

    Raises:
        Unencodable: EOS within a document, a lane that is too long, or no offset keeps logits off the boundaries.
    """
    size = sum(map(len, documents)) + len(documents)
    if any(exact.base.eos in document for document in documents) or size > LANE_SYMBOLS:
        raise Unencodable(
            f"a document has the end-of-text token inside it, or there are {size:,} tokens to code in one lane "
            f"(at most {LANE_SYMBOLS:,}): split the text"
        )
    logits, symbols = _lane_logits(exact, documents)
    sample = slice(None, None, max(1, len(symbols) // _SAMPLED))
    scale = int(frequencies.code_length(logits[sample], symbols[sample]).argmin())
    period = frequencies.offset_period(exact.vocabulary)
    coder = RangeEncoder()
    coder.encode(scale, 1, frequencies.SCALE_BITS)
    ended = 0
    for start in range(0, len(symbols), period):
        part = slice(start, start + period)
        steps, unusable = frequencies.to_steps(logits[part], scale)
        usable = np.flatnonzero(~unusable.any(axis=0))
        if not len(usable):
            raise Unencodable("every offset of the grid has a logit too near a boundary: split the text elsewhere")
        offset = int(usable[0])
        coder.encode(offset, 1, frequencies.OFFSET_BITS)
        starts, widths = frequencies.interval(frequencies.to_depths(steps, offset), symbols[part])
        for symbol, low, width in zip(symbols[part].tolist(), starts.tolist(), widths.tolist(), strict=True):
            coder.encode(low, width, frequencies.TOTAL_BITS)
            if several and symbol == exact.base.eos:
                ended += 1
                coder.encode(*((0, _MORE) if ended < len(documents) else (_MORE, 1)), _MORE_BITS)
    return coder.finish()


@dataclass
class _Lane:
    """A lane while it is decoded."""

    coder: RangeDecoder
    scale: int
    pending: list[int]
    """Tokens to feed before the next symbol is read."""
    most: int
    told: Sequence[Document]
    documents: list[Document] = field(default_factory=lambda: [[]])
    context: int = 0
    symbols: int = 0
    offset: int = 0

    def guess(self, room: int) -> list[int]:
        """The next tokens of this document as they were told, as many as fit after those that are pending."""
        number, room = len(self.documents) - 1, room - len(self.pending)
        if number >= len(self.told) or room <= 0:
            return []
        start = len(self.documents[-1])
        return list(self.told[number][start : start + room])

    def restart(self, pending: list[int]) -> None:
        """Begin a new context with these tokens."""
        self.pending, self.context = pending, 0


def decode_lanes(
    exact: ExactBase,
    coded: Sequence[bytes],
    several: bool,
    progress: Callable[[int], None] | None = None,
    told: Sequence[Sequence[Document]] | None = None,
) -> list[list[Document]]:
    """The documents of each lane, all lanes in one batch.

    Args:
        progress: called now and then with the number of bytes taken in.
        told: what the documents of each lane probably are. The result is that of the bytes whatever is told, and comes
            many times as soon where it is true.

    Raises:
        CompressorError: a lane's bytes are damaged.
    """
    base: Base = exact.base
    lanes = []
    for number, data in enumerate(coded):
        coder = RangeDecoder(data)
        scale = coder.number(frequencies.SCALE_BITS)
        lanes.append(_Lane(coder, scale, [base.bos], LANE_SYMBOLS, told[number] if told else ()))
    cache = Lockstep(exact, len(lanes))
    alive = list(lanes)
    for tick in count():
        if not alive:
            break
        if progress is not None and tick % _TICKS == 0:
            progress(sum(lane.coder.position for lane in lanes))
        width = max(1, _TOGETHER // len(alive))
        guesses = [lane.guess(min(width, exact.window - lane.context)) for lane in alive]
        fed = [lane.pending[:width] for lane in alive]
        for lane, known in zip(alive, fed, strict=True):
            lane.pending = lane.pending[len(known) :]
            lane.context += len(known)
        found = cache.step(
            [[*known, *guess] for known, guess in zip(fed, guesses, strict=True)],
            [len(known) - (not lane.pending) for lane, known in zip(alive, fed, strict=True)],
        )
        ready, ended = [row for row, lane in enumerate(alive) if not lane.pending], set()
        for place in count():
            if not ready:
                break
            logits = np.stack([found[row][place].numpy() for row in ready])
            read = _read([alive[row] for row in ready], logits, exact.vocabulary)
            going = []
            for row, symbol in zip(ready, read, strict=True):
                lane, guess = alive[row], guesses[row]
                if symbol == base.eos and not (several and _more(lane.coder)):
                    ended.add(row)
                elif symbol == base.eos:
                    lane.documents.append([])
                    lane.restart([base.bos])
                    cache.restart(row)
                else:
                    lane.documents[-1].append(symbol)
                    if place < len(guess) and symbol == guess[place]:
                        lane.context += 1
                        going.append(row)
                    elif lane.context == exact.window:
                        lane.restart([base.bos, *lane.documents[-1][-OVERLAP:]])
                        cache.restart(row)
                    else:
                        lane.pending = [symbol]
                        cache.rewind(row, len(guess) - place)
            ready = going
        if ended:
            left = [row for row in range(len(alive)) if row not in ended]
            alive = [alive[row] for row in left]
            if alive:
                cache.select(left)
    return [lane.documents for lane in lanes]


def _read(lanes: Sequence[_Lane], logits: np.ndarray, vocabulary: int) -> list[int]:
    """The next symbol of each lane, from logits `[lanes, vocabulary]`."""
    period = frequencies.offset_period(vocabulary)
    for lane in lanes:
        if lane.symbols >= lane.most:
            raise CompressorError("the coded bytes are damaged: they do not end")
        if lane.symbols % period == 0:
            lane.offset = lane.coder.number(frequencies.OFFSET_BITS)
        lane.symbols += 1
    steps = np.empty(logits.shape, dtype=np.int32)
    for scale in {lane.scale for lane in lanes}:
        rows = [row for row, lane in enumerate(lanes) if lane.scale == scale]
        steps[rows] = frequencies.to_steps(logits[rows], scale)[0]
    found = frequencies.frequencies(frequencies.to_depths(steps, np.array([lane.offset for lane in lanes])))
    ends = found.cumsum(axis=1)
    symbols = []
    for row, lane in enumerate(lanes):
        target = lane.coder.target(frequencies.TOTAL_BITS)
        symbol = int(np.searchsorted(ends[row], target, side="right"))
        width = int(found[row, symbol])
        lane.coder.consume(int(ends[row, symbol]) - width, width)
        symbols.append(symbol)
    return symbols


def _more(coder: RangeDecoder) -> bool:
    """Whether another document follows."""
    more = coder.target(_MORE_BITS) < _MORE
    coder.consume(*((0, _MORE) if more else (_MORE, 1)))
    return more
