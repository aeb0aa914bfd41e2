"""From logits to 24-bit integer frequencies that every machine computes alike.

The coder and the decoder of a text run the same model, but not the same kernels: sums are ordered by thread count,
batch size, processor and library version, so that logits agree only up to rounding (about 1e-13 in float64 here). An
arithmetic decoder that is off by one in one frequency writes nonsense from there on. So logits are rounded down to a
grid of `1 / UNITS` bits, and everything after that is integer arithmetic with a table.

Rounding alone would fail where a logit lies on a boundary of the grid. The grid can be shifted by one of `OFFSETS`
steps; the coder takes one for which no logit that matters lies within `GUARD` of a boundary, and writes down which.

What it costs: rounding to 1/8 bit spreads a symbol's log-probability uniformly over 1/8 bit, which adds about
`ln 2 / 2 * (1/8)**2 / 12` = 0.0005 bits a token; every symbol keeps at least 1 of 2**24, which costs
`vocabulary / 2**24`. For `vocabulary` logits over `n` tokens an offset is unusable with probability
`1 - exp(-2 * GUARD * n * vocabulary * UNITS / ln 2)`: .3 for 1,024 tokens of 4,096 symbols, and all 32 never.
"""

from __future__ import annotations

from math import isqrt

import numpy as np
from numpy.typing import NDArray

from compressor.errors import CompressorError

TOTAL_BITS = 24
TOTAL = 1 << TOTAL_BITS
UNITS = 8
"""Grid units in a bit."""
OFFSET_BITS = 5
OFFSETS = 1 << OFFSET_BITS
GUARD = 2.0**-28
"""Nats by which two machines' logits may differ: some 10,000 times the rounding noise of float64 that was seen."""
SCALES = (0.6875, 0.75, 0.8125, 0.875, 0.9375, 1.0, 1.0625, 1.125)
"""Inverse temperatures; multiples of 1/16, so that they are exact."""
SCALE_BITS = 3
LARGEST_VOCABULARY = 1 << 20

_STEPS_A_NAT = 11.541560327111707 * OFFSETS  # 8 / ln 2, the nearest float64, in steps of an offset
_DEEPEST = TOTAL_BITS * UNITS

# floor(2**32 * 2**(-d / 8)): nested integer square roots give the floor of the eighth root exactly.
_WEIGHTS = np.array([isqrt(isqrt(isqrt(1 << (256 - d)))) for d in range(_DEEPEST)] + [0], dtype=np.int64)

Steps = NDArray[np.int32]
Depths = NDArray[np.uint8]


def check_vocabulary(size: int) -> None:
    """Raise a `CompressorError` if 24 bits cannot hold a frequency for so many symbols."""
    if size > LARGEST_VOCABULARY:
        raise CompressorError(
            f"this base has {size:,} tokens, which is more than 24-bit frequencies serve well "
            f"({LARGEST_VOCABULARY:,}): pack with a base of a smaller vocabulary"
        )


def offset_period(vocabulary: int) -> int:
    """After how many symbols a new offset is chosen, so that one without a logit near a boundary is there to choose."""
    return max(16, (1 << 22) // vocabulary)


def to_steps(logits: NDArray[np.float64], scale: int) -> tuple[Steps, NDArray[np.bool_]]:
    """Round logits down to steps, of which a grid unit has `OFFSETS`.

    Args:
        logits: `[rows, vocabulary]`, nats.
        scale: index into `SCALES`.

    Returns:
        Steps `[rows, vocabulary]`, and which offsets `[rows, OFFSETS]` have a logit within the guard of a boundary.

    Raises:
        CompressorError: a row's highest logit is not finite or beyond what a step can count.
    """
    steps_a_nat = _STEPS_A_NAT * SCALES[scale]
    exact = logits * steps_a_nat
    top = exact.max(axis=1, keepdims=True)
    if not (np.abs(top) < 2**30).all():
        raise CompressorError("the base gives logits that are not finite or beyond a million: it cannot code text")
    exact = np.maximum(exact, top - (_DEEPEST + 8) * OFFSETS)  # far below what matters; -inf for padding is welcome
    nearest = np.rint(exact)
    near = (np.abs(exact - nearest) < GUARD * steps_a_nat) & (exact > top - (_DEEPEST + 2) * OFFSETS)
    unusable = np.zeros((len(logits), OFFSETS), dtype=bool)
    rows, columns = np.nonzero(near)
    unusable[rows, (-nearest[rows, columns].astype(np.int64)) % OFFSETS] = True
    return np.floor(exact).astype(np.int32), unusable


def to_depths(steps: Steps, offset: NDArray[np.int64] | int) -> Depths:
    """Grid units below each row's most probable symbol, at most 24 bits' worth, `[rows, vocabulary]`."""
    grid = (steps + np.asarray(offset, dtype=np.int32).reshape(-1, 1)) >> OFFSET_BITS
    below = grid.max(axis=1, keepdims=True) - grid
    return np.minimum(below, _DEEPEST).astype(np.uint8)


def frequencies(depths: Depths) -> NDArray[np.int64]:
    """Frequencies `[rows, vocabulary]`, each at least 1, that sum to `TOTAL` in every row.

    A symbol gets 1 and its share of the rest, rounded down; what is left over goes to the first of the most probable.
    """
    rows, vocabulary = depths.shape
    shares = np.empty((rows, _DEEPEST + 1), dtype=np.int64)
    for row in range(rows):
        counts = np.bincount(depths[row], minlength=_DEEPEST + 1)
        # At most 2**32 * 2**20 in the sum and 2**32 * 2**24 in the product: both fit 63 bits.
        weight = int((counts * _WEIGHTS).sum())
        shares[row] = 1 + _WEIGHTS * (TOTAL - vocabulary) // weight
    found = np.take_along_axis(shares, depths, axis=1)
    first = (depths == 0).argmax(axis=1)
    found[np.arange(rows), first] += TOTAL - found.sum(axis=1)
    return found


def interval(depths: Depths, symbols: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each row's symbol starts in `[0, TOTAL)`, and its frequency; each `[rows]`."""
    found = frequencies(depths)
    widths = found[np.arange(len(found)), symbols]
    before = np.arange(found.shape[1]) < symbols[:, None]
    return (found * before).sum(axis=1), widths


def code_length(logits: NDArray[np.float64], symbols: NDArray[np.int64]) -> NDArray[np.float64]:
    """Bits of the symbols at each scale, `[len(SCALES)]`; an estimate to choose by, not part of the coding."""
    top = logits.max(axis=1, keepdims=True)
    shifted = logits - top
    chosen = shifted[np.arange(len(logits)), symbols]
    # All scales are multiples of 1/16: one exponential, and its powers.
    root = np.exp(shifted / 16)
    power = root ** int(SCALES[0] * 16)
    sums = []
    for scale in SCALES:
        sums.append(np.log(power.sum(axis=1)) - chosen * scale)
        power *= root
    return np.array([value.sum() for value in sums]) / np.log(2)
