"""The blocks of a packed file: their layout, their checks, and the plain coders for what is not text.

    magic, version | base's identity, if any block is text | block | block | ... | last block

A block is a byte that says what it is (kind, last or not, how its text is split), a CRC-32, the length of its body
unless it is the last, and the body. The CRC covers the block's number, its head, the body and the original bytes: a
block that was damaged, moved or decoded by other arithmetic is refused.
"""

from __future__ import annotations

import bz2
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from compressor.errors import CompressorError, lacking
from compressor.packing.float64 import IDENTITY_BYTES
from compressor.storage import entropy

MAGIC, VERSION = 0xCE, 0x71
_WITH_TEXT = 0x08  # in the version byte: the base's identity follows
RAW, ZSTD, TEXT, BZIP2 = 0, 1, 2, 3
PLAIN_BLOCK = 1 << 22
_BZIP2 = b"BZh9"  # how every bzip2 stream of level 9 begins


@dataclass(frozen=True)
class Block:
    """A block of a packed file."""

    kind: int
    body: bytes
    check: int = 0
    separator: int = 0
    """Index into `lossless.SEPARATORS`."""
    closed: bool = False
    """Whether a separator follows the last document."""
    one_lane: bool = False
    last: bool = False
    lanes: Sequence[Sequence[list[int]]] = field(default=(), compare=False)
    """Documents of each lane, of a block of text that is being packed."""

    @property
    def head(self) -> int:
        """The byte that says what the block is."""
        flags = self.last << 2 | self.one_lane << 3 | self.separator << 4 | self.closed << 6
        return self.kind | flags

    def checksum(self, number: int, original: bytes) -> int:
        """CRC-32 over the block's number and head, its body and what it stands for."""
        return zlib.crc32(original, zlib.crc32(self.body, zlib.crc32(bytes([number & 255, self.head]))))


class Damaged(CompressorError):
    """What is wrong with a block; the caller says which."""


def zstandard() -> Any:
    """The library, or a `CompressorError` that says how to install it."""
    try:
        import zstandard  # optional
    except ImportError:
        raise lacking("packing", "zstandard", "codecs") from None
    return zstandard


def zstd_frame(data: bytes) -> bytes:
    """A zstd frame without magic, length and checksum, which the block has."""
    zstd = zstandard()
    settings = zstd.ZstdCompressionParameters.from_level(
        19, format=zstd.FORMAT_ZSTD1_MAGICLESS, write_content_size=False, source_size=len(data)
    )
    return zstd.ZstdCompressor(compression_params=settings).compress(data)


def pack_plain(data: bytes | bytearray) -> list[tuple[Block, bytes]]:
    """Blocks for what no text block holds, each with what it stands for: zstd, bzip2 or as it is."""
    blocks = []
    for start in range(0, len(data), PLAIN_BLOCK):
        piece = bytes(data[start : start + PLAIN_BLOCK])
        coded = [Block(RAW, piece), Block(ZSTD, zstd_frame(piece)), Block(BZIP2, bz2.compress(piece)[len(_BZIP2) :])]
        blocks.append((min(coded, key=lambda block: len(block.body)), piece))
    return blocks


def unpack_plain(block: Block) -> bytes:
    """What a block that is not text stands for.

    Raises:
        Damaged: it is no stream of its kind, or holds more than a block may.
    """
    if block.kind == RAW:
        return block.body
    # Read as streams, so that nothing is allocated because a header says so.
    try:
        if block.kind == BZIP2:
            original = bz2.BZ2Decompressor().decompress(_BZIP2 + block.body, PLAIN_BLOCK + 1)
        else:
            zstd = zstandard()
            coder = zstd.ZstdDecompressor(format=zstd.FORMAT_ZSTD1_MAGICLESS, max_window_size=PLAIN_BLOCK * 2)
            with coder.stream_reader(block.body) as reader:
                original = reader.read(PLAIN_BLOCK + 1)
    except (OSError, ValueError, EOFError) as error:
        raise Damaged(str(error)) from None
    except Exception as error:
        if type(error).__name__ != "ZstdError":  # known only once the library is there
            raise
        raise Damaged(str(error)) from None
    if len(original) > PLAIN_BLOCK:
        raise Damaged(f"it holds more than {PLAIN_BLOCK:,} bytes")
    return original


def read_varint(data: bytes, place: int) -> tuple[int, int]:
    """`entropy.read_varint`, of a block."""
    try:
        return entropy.read_varint(data, place)
    except CompressorError:
        raise Damaged("a length in it is cut off or absurd") from None


class Reader:
    """Reads numbers and bytes one after the other; a `Damaged` error where they end."""

    def __init__(self, data: bytes):
        self.data, self.place = data, 0

    def number(self, low: int, high: int) -> int:
        value, self.place = read_varint(self.data, self.place)
        if not low <= value <= high:
            raise Damaged(f"a number in it is {value:,}, not {low:,} to {high:,}")
        return value

    def bytes(self, size: int) -> bytes:
        if self.place + size > len(self.data):
            raise Damaged("it ends early")
        self.place += size
        return self.data[self.place - size : self.place]

    def end(self) -> None:
        if self.place != len(self.data):
            raise Damaged("something follows its end")


def serialise(blocks: Sequence[tuple[Block, bytes]], identity: bytes) -> bytes:
    """The file that holds these blocks, each given with what it stands for."""
    with_text = any(block.kind == TEXT for block, _ in blocks)
    out = bytearray([MAGIC, VERSION | (_WITH_TEXT if with_text else 0)])
    out += identity if with_text else b""
    for number, (block, original) in enumerate(blocks):
        block = replace(block, last=number == len(blocks) - 1)
        out.append(block.head)
        out += block.checksum(number, original).to_bytes(4, "little")
        out += (b"" if block.last else entropy.varint(len(block.body))) + block.body
    return bytes(out)


def parse(blob: bytes) -> tuple[bytes, list[tuple[Block, str]]]:
    """The identity of the base, and the blocks with their names for messages.

    Raises:
        CompressorError: not a packed file, of another version, or a block's head is damaged.
    """
    if len(blob) < 2 or blob[0] != MAGIC or blob[1] & 0xF0 != VERSION & 0xF0:
        raise CompressorError("this is not a packed file: it does not begin as one; give a file that was packed here")
    version, with_text = blob[1] & 7, bool(blob[1] & _WITH_TEXT)
    if version != VERSION & 7:
        raise CompressorError(f"this file has version {version}, this program reads {VERSION & 7}: update the package")
    place = 2 + (IDENTITY_BYTES if with_text else 0)
    identity = blob[2:place]
    blocks: list[tuple[Block, str]] = []
    while not (blocks and blocks[-1][0].last):
        name, start = f"block {len(blocks) + 1}", place
        try:
            if place + 5 > len(blob):
                raise Damaged("the file ends before it")
            head, check = blob[place], int.from_bytes(blob[place + 1 : place + 5], "little")
            last = bool(head & 4)
            length, place = (len(blob) - place - 5, place + 5) if last else read_varint(blob, place + 5)
            if place + length > len(blob):
                raise Damaged("the file ends inside it")
            if head & 0x80 or (head & 3 == TEXT and not with_text):
                raise Damaged("it is of no known kind")
        except Damaged as error:
            raise CompressorError(f"{name} (from byte {start:,} of the packed file) is damaged: {error}") from None
        body = blob[place : place + length]
        place += length
        block = Block(head & 3, body, check, head >> 4 & 3, bool(head & 0x40), bool(head & 8), last)
        blocks.append((block, f"{name} (bytes {start:,} to {place:,} of the packed file)"))
    return identity, blocks
