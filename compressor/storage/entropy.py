"""Entropy coding of integers under fixed-point models that are the same on every machine.

A model is a table of integer frequencies that sum to 2^24. There is one family of tables, made by correctly rounded
decimal arithmetic from two shapes (Gaussian, Laplace) and a ladder of scales, four to an octave; a channel's model is
one byte. constriction does the coding: an ANS coder, or Huffman codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import ROUND_FLOOR, Decimal, localcontext
from functools import lru_cache
from types import ModuleType
from typing import Literal, get_args

import numpy as np

from compressor.errors import CompressorError, lacking

Coder = Literal["none", "ans", "huffman"]
PRECISION = 24
SCALES = 52
"""Scales of a shape; number s has a standard deviation of 2^((s - 8) / 4) quantiser steps, .25 to 1,700."""
UNIT_SCALE = 8
SHAPES = 2
_SHAPE = 64
DROPPED = 255
"""Model of a channel that is not coded: all its integers are 0."""
MODELS = tuple(shape * _SHAPE + scale for shape in range(SHAPES) for scale in range(SCALES))
Alphabet = tuple[int, int] | None
"""First and last integer, for a mid-rise quantiser (symmetric about -1/2); None: every integer, symmetric about 0."""


def _constriction() -> ModuleType:
    try:
        import constriction  # optional
    except ImportError:
        without = "take a codec without a coder (bf16, int8, int4, int3, int2)"
        raise lacking("entropy coding", "constriction", "codecs", without) from None
    return constriction


def reach(model: int) -> int:
    """Largest magnitude that a model of unbounded integers codes itself; it stands for all beyond it too."""
    shape, scale = divmod(model, _SHAPE)
    return 2 + (9 if shape else 6) * (1 << max(0, -(-(scale - UNIT_SCALE) // 4)))


@lru_cache(maxsize=4096)
def table(model: int, alphabet: Alphabet = None) -> np.ndarray:
    """Frequencies of a model's integers, int64, each at least 1, their sum 2^24.

    Args:
        model: a member of `MODELS`.
        alphabet: see `Alphabet`; None covers -reach..reach.
    """
    shape, scale = divmod(model, _SHAPE)
    if not (0 <= shape < SHAPES and 0 <= scale < SCALES):
        raise CompressorError(f"there is no entropy model {model}: the data are damaged, or of a newer version")
    low, high = alphabet or (-reach(model), reach(model))
    half = Decimal(0) if alphabet is None else Decimal("0.5")
    with localcontext() as context:
        context.prec = 28  # exp and sqrt of the decimal module are correctly rounded, on any machine
        variance = Decimal(2) ** ((scale - UNIT_SCALE) // 2)
        if (scale - UNIT_SCALE) % 2:
            variance *= Decimal(2).sqrt()
        rate = (2 / variance).sqrt()
        by_distance: dict[Decimal, int] = {}
        for value in range(low, high + 1):
            distance = abs(value + half)
            if distance not in by_distance:
                exponent = -distance * rate if shape else -distance * distance / (2 * variance)
                weight = exponent.exp() * (1 << 40)
                by_distance[distance] = int(weight.to_integral_value(ROUND_FLOOR))
    weights = [by_distance[abs(value + half)] for value in range(low, high + 1)]
    spare = (1 << PRECISION) - len(weights)
    total = sum(weights)
    frequencies = [weight * spare // total for weight in weights]
    frequencies[-low] += spare - sum(frequencies)
    return np.array(frequencies, dtype=np.int64) + 1


@lru_cache(maxsize=64)
def costs(alphabet: tuple[int, int]) -> np.ndarray:
    """Bits of every integer of an alphabet under every model, float64 `[models, integers]`; for choosing only."""
    return np.stack([PRECISION - np.log2(table(model, alphabet)) for model in MODELS])


def choose_models(symbols: np.ndarray, alphabet: tuple[int, int]) -> np.ndarray:
    """The model of each channel that codes its integers in the fewest bits.

    Args:
        symbols: integers within the alphabet, `[samples, channels]`.

    Returns:
        uint8 `[channels]`.
    """
    low, high = alphabet
    size, channels = high - low + 1, symbols.shape[1]
    places = (symbols - low) + size * np.arange(channels)
    counts = np.bincount(places.reshape(-1), minlength=size * channels).reshape(channels, size)
    return np.array(MODELS, dtype=np.uint8)[np.argmin(counts @ costs(alphabet).T, axis=1)]


def encode(symbols: np.ndarray, models: np.ndarray, coder: Coder, alphabet: Alphabet = None) -> bytes:
    """Code integers, each under its own model.

    Args:
        symbols: int64 `[count]`.
        models: uint8 `[count]`; integers of model `DROPPED` are not coded and come back as 0.
        alphabet: see `Alphabet`. Integers beyond a model's reach are escaped, so any integer can be coded.

    Raises:
        CompressorError: constriction is not installed.
    """
    escaped: list[int] = []
    runs = []
    for model in np.unique(models[models != DROPPED]).tolist():
        values = symbols[models == model]
        low, high = alphabet or (-reach(model), reach(model))
        if alphabet is None:
            outside = np.abs(values) >= high
            escaped += (np.abs(values[outside]) - high).tolist()
        runs.append(((np.clip(values, low, high) - low).astype(np.int32), table(model, alphabet)))
    return (b"" if alphabet else b"".join(map(varint, [len(escaped), *escaped]))) + _written(runs, coder)


def decode(data: bytes, models: np.ndarray, coder: Coder, alphabet: Alphabet = None) -> np.ndarray:
    """The integers that `encode` was given, int64 `[count]`.

    Raises:
        CompressorError: the data do not fit the models, or constriction is not installed.
    """
    escaped, start = ([], 0) if alphabet else _read_varints(data, len(models))
    words = data[start:]
    if len(words) % 4:
        raise CompressorError(f"damaged coded data: {len(words)} bytes are no whole number of 32-bit words")
    symbols = np.zeros(len(models), dtype=np.int64)
    left = iter(escaped)
    present, counts = np.unique(models[models != DROPPED], return_counts=True)
    wanted = [(count, table(model, alphabet)) for model, count in zip(present.tolist(), counts.tolist(), strict=True)]
    found = _read(np.frombuffer(words, dtype="<u4").astype(np.uint32), wanted, coder)
    for model, places in zip(present.tolist(), found, strict=True):
        low = alphabet[0] if alphabet else -reach(model)
        values = places.astype(np.int64) + low
        if alphabet is None:
            for place in np.flatnonzero(np.abs(values) == -low).tolist():
                values[place] += np.sign(values[place]) * next(left, 0)
        symbols[models == model] = values
    return symbols


def _written(runs: Sequence[tuple[np.ndarray, np.ndarray]], coder: Coder) -> bytes:
    """Runs of places in a table of frequencies, each with its table, as 32-bit words."""
    constriction = _constriction()
    if coder == "huffman":
        queue = constriction.symbol.QueueEncoder()
        for places, frequencies in runs:
            tree = constriction.symbol.huffman.EncoderHuffmanTree(frequencies.astype(np.float64))
            for place in places.tolist():
                queue.encode_symbol(place, tree)
        words = queue.get_compressed()[0]
    else:
        stack = constriction.stream.stack.AnsCoder()
        for places, frequencies in reversed(runs):  # a stack: what is decoded first is encoded last
            stack.encode_reverse(places, constriction.stream.model.Categorical(_leaky(frequencies), perfect=False))
        words = stack.get_compressed()
    return np.asarray(words).astype("<u4").tobytes()


def _read(words: np.ndarray, wanted: Sequence[tuple[int, np.ndarray]], coder: Coder) -> list[np.ndarray]:
    """The runs that `_written` was given, by how many places each has and its table."""
    constriction = _constriction()
    found = []
    try:
        if coder == "huffman":
            queue = constriction.symbol.QueueDecoder(words)
            for count, frequencies in wanted:
                tree = constriction.symbol.huffman.DecoderHuffmanTree(frequencies.astype(np.float64))
                found.append(np.array([queue.decode_symbol(tree) for _ in range(count)]))
            return found
        stack = constriction.stream.stack.AnsCoder(words)
        for count, frequencies in wanted:
            model = constriction.stream.model.Categorical(_leaky(frequencies), perfect=False)
            found.append(stack.decode(model, count))
    except Exception as error:
        raise CompressorError(f"damaged coded data: {error}") from None
    if not stack.is_empty():
        raise CompressorError("damaged coded data: some are left over")
    return found


def _leaky(frequencies: np.ndarray) -> np.ndarray:
    """What makes constriction use exactly these frequencies.

    It gives every symbol 1 and spreads 2^24 - n over n symbols in proportion to floats. These integers sum to
    2^24 - n, so that proportion is 1, every sum is exact, and nothing is ever rounded.
    """
    return (frequencies - 1).astype(np.float64)


def varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def read_varint(data: bytes, place: int) -> tuple[int, int]:
    """A number that `varint` wrote at `place`, and the place after it."""
    value = 0
    for shift in range(0, 35, 7):
        if place >= len(data):
            break
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise CompressorError("damaged coded data: they end within a number, or the number is too large")


def _read_varints(data: bytes, most: int) -> tuple[list[int], int]:
    """Values after their count, and where they end."""
    values: list[int] = []
    count, place = read_varint(data, 0)
    if count > most:
        raise CompressorError(f"damaged coded data: {count} escapes among {most} integers")
    for _ in range(count):
        value, place = read_varint(data, place)
        values.append(value)
    return values, place


def check_coder(coder: str) -> None:
    """Raise a `CompressorError` if there is no such coder."""
    if coder not in get_args(Coder):
        raise CompressorError(f"there is no coder {coder!r}: choose one of {', '.join(get_args(Coder))}")
