"""A range coder: integers with exact frequencies to bytes and back.

Written here because constriction's Python interface takes a categorical distribution as floating-point probabilities
and rounds them to 24 bits itself: what it makes of given integer frequencies depends on its float arithmetic, and its
version. Beside the model, whose evaluation takes about a millisecond a token, these few integer operations are free.

The state has 64 bits and is renormalised by bytes (Martin 1979, "Range encoding"), with carries passed on into the
bytes already written, so that no range is wasted: at least 32 bits of precision stand above a 24-bit frequency, and the
loss is below 1e-7 bits a symbol.
"""

from __future__ import annotations

from compressor.errors import CompressorError

_BITS = 64
_MASK = (1 << _BITS) - 1
_LEAST = 1 << (_BITS - 8)


class RangeEncoder:
    """Turns symbols into the shortest bytes that name their interval; zeros at the end are left out, of the last 8."""

    def __init__(self) -> None:
        self._low, self._range = 0, _MASK + 1
        self._bytes = bytearray()

    def encode(self, start: int, width: int, bits: int) -> None:
        """Code a symbol that takes `[start, start + width)` of `[0, 2**bits)`."""
        unit = self._range >> bits
        self._low += unit * start
        self._range = unit * width
        if self._low > _MASK:
            self._carry()
        while self._range < _LEAST:
            self._bytes.append(self._low >> (_BITS - 8))
            self._low = (self._low << 8) & _MASK
            self._range <<= 8

    def _carry(self) -> None:
        self._low &= _MASK
        place = len(self._bytes) - 1
        while self._bytes[place] == 0xFF:
            self._bytes[place] = 0
            place -= 1
        self._bytes[place] += 1

    def finish(self) -> bytes:
        """The bytes; the decoder reads zeros after them."""
        for kept in range(0, _BITS + 8, 8):
            spare = _BITS - kept
            value = -(-self._low >> spare) << spare  # the least multiple of 2**spare from low on
            if value < self._low + self._range:
                break
        self._low = value
        if self._low > _MASK:
            self._carry()
        return bytes(self._bytes) + self._low.to_bytes(8, "big").rstrip(b"\0")


class RangeDecoder:
    """Reads what a `RangeEncoder` wrote: `target`, then `consume` of the symbol that holds it."""

    def __init__(self, data: bytes):
        self._data, self._next = data, 8
        self._code = int.from_bytes(data[:8].ljust(8, b"\0"), "big")
        self._range, self._unit = _MASK + 1, 0

    @property
    def position(self) -> int:
        """Bytes taken in."""
        return min(self._next, len(self._data))

    def target(self, bits: int) -> int:
        """A number in the next symbol's part of `[0, 2**bits)`.

        Raises:
            CompressorError: no coder writes such bytes.
        """
        self._unit = self._range >> bits
        value = self._code // self._unit
        if value >> bits:
            raise CompressorError("the coded bytes are damaged")
        return value

    def consume(self, start: int, width: int) -> None:
        """Take the symbol that `[start, start + width)` belongs to off the bytes.

        Raises:
            CompressorError: more is read than a coder can have left out at the end.
        """
        self._code -= self._unit * start
        self._range = self._unit * width
        while self._range < _LEAST:
            if self._next >= len(self._data) + 8:
                raise CompressorError("the coded bytes are damaged: they end too early")
            byte = self._data[self._next] if self._next < len(self._data) else 0
            self._code = (self._code << 8) | byte
            self._next += 1
            self._range <<= 8

    def number(self, bits: int) -> int:
        """An integer coded with equal probabilities."""
        value = self.target(bits)
        self.consume(value, 1)
        return value
