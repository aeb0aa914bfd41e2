"""Packed files: any bytes in, the same bytes out, text coded under the base's next-token distribution.

Text is cut into lanes (`token_coder.py`) that are decoded side by side. Blocks (`blocks.py`) of text are kept only if
they are smaller than what zstd and bzip2 make of them; everything else is theirs, or stays as it is.
"""

from __future__ import annotations

import codecs
import zlib
from collections.abc import Callable, Iterator, Sequence

from compressor.errors import CompressorError
from compressor.model.base import Base
from compressor.packing.blocks import (
    MAGIC,
    RAW,
    TEXT,
    Block,
    Damaged,
    Reader,
    pack_plain,
    parse,
    serialise,
    unpack_plain,
)
from compressor.packing.float64 import ExactBase
from compressor.packing.token_coder import LANE_SYMBOLS, Document, Unencodable, code_length, decode_lanes, encode_lane
from compressor.storage.entropy import varint

TEXT_BLOCK = 1 << 18
SEPARATORS = ("", "\n", "\n\n", "\r\n")
"""What lies between a text block's documents. With "" the lanes' tokens are one text."""
MOST_KEPT = 1 << 26
"""Most bytes of a text that is kept without a base's predictions."""
_SHORTEST_DOCUMENT = 100
_SAMPLE = 6_000
_PAGE = 4_096
_LANES = 256

Progress = Callable[[str, int, int], None]
"""Called with what is going on, bytes done and bytes in all."""


def pack_bytes(
    data: bytes,
    base: Base | ExactBase,
    lane_tokens: int = 1024,
    batch: int = 32,
    progress: Progress | None = None,
) -> bytes:
    """Pack `data`, unpack what came out, and return it only if that gave `data` again.

    Args:
        data: any bytes; UTF-8 text packs best.
        base: predicts the text. It is evaluated in float64, whatever type it is held in.
        lane_tokens: tokens that are decoded one after the other; fewer of them unpack faster and pack less.
        batch: lanes decoded at a time.

    Raises:
        CompressorError: zstandard is missing, the base cannot code, or the result does not unpack.
    """
    if not 16 <= lane_tokens <= LANE_SYMBOLS // 2 or batch < 1:
        raise CompressorError(
            f"lane_tokens must be 16 to {LANE_SYMBOLS // 2:,} and batch at least 1, got {lane_tokens} and {batch}"
        )
    exact = base if isinstance(base, ExactBase) else ExactBase(base)
    blocks: list[tuple[Block, bytes]] = []
    plain = bytearray()
    done = 0
    for is_text, piece in split_text(data):

        def within(share: float, done: int = done, size: int = len(piece)) -> None:
            if progress is not None:
                progress("packing", done + int(share * size), len(data))

        coded = _pack_text(piece, exact, lane_tokens, within) if is_text else None
        if coded is None:
            plain += piece
        else:
            blocks += [*pack_plain(plain), (coded, piece)]
            plain.clear()
        done += len(piece)
        within(0.0, done)
    blocks += pack_plain(plain)
    if not blocks:
        blocks = [(Block(RAW, b""), b"")]
    if len({block.kind for block, _ in blocks}) > 1:
        # A plain coder that sees all of it may do better than several that see parts.
        whole = pack_plain(data)
        blocks = min(blocks, whole, key=lambda found: sum(len(block.body) for block, _ in found))
    blob = serialise(blocks, exact.identity)

    def checking(stage: str, done: int, total: int) -> None:
        if progress is not None:
            progress("checking", done, total)

    # The coded bytes are decoded as ever; being told what is in them only lets many tokens be read in one step.
    told = [block.lanes for block, _ in blocks if block.kind == TEXT]
    if unpack_bytes(blob, exact, batch, len(data), checking, told) != data:
        raise CompressorError("what was packed does not unpack to the same bytes; nothing was written: report this")
    return blob


def unpack_bytes(
    blob: bytes,
    base: Base | ExactBase | Callable[[], Base | ExactBase],
    batch: int = 32,
    limit: int | None = None,
    progress: Progress | None = None,
    told: Sequence[Sequence[Sequence[Document]]] = (),
) -> bytes:
    """The bytes that were packed.

    Args:
        blob: what `pack_bytes` returned.
        base: the base it was packed with, or a function that loads it, called if a block needs it.
        batch: lanes decoded at a time; any number gives the same bytes.
        limit: refuse to give more bytes than this.
        told: what the lanes of each block of text probably hold (`decode_lanes`).

    Raises:
        CompressorError: not a packed file, a newer version, another base, or a damaged block, which is named.
    """
    identity, blocks = parse(blob)
    exact: ExactBase | None = None
    parts: list[bytes] = []
    done = size = 0
    guesses = iter(told)
    for number, (block, where) in enumerate(blocks):

        def within(seen: int, done: int = done) -> None:
            if progress is not None:
                progress("unpacking", done + seen, len(blob))

        try:
            if block.kind == TEXT:
                if exact is None:
                    given = base if isinstance(base, Base | ExactBase) else base()
                    exact = given if isinstance(given, ExactBase) else ExactBase(given)
                    _check_identity(identity, exact)
                original = _unpack_text(block, exact, batch, within, next(guesses, ()))
            else:
                original = unpack_plain(block)
        except Damaged as error:
            raise CompressorError(f"{where} is damaged: {error}") from None
        if block.checksum(number, original) != block.check:
            reason = "it is damaged, or this machine's arithmetic differs by more than the format allows for"
            raise CompressorError(
                f"{where} does not unpack to what was packed (checksum): "
                f"{reason if block.kind == TEXT else 'it is damaged'}"
            )
        size += len(original)
        if limit is not None and size > limit:
            raise CompressorError(f"{where} leads beyond {limit:,} bytes: this is not what was packed")
        parts.append(original)
        done += len(block.body)
        within(0, done)
    return b"".join(parts)


def pack_passage(text: str, base: Base | ExactBase | None = None) -> bytes:
    """A passage as a memory keeps it: packed under the base's predictions, or without a base by zlib.

    Raises:
        CompressorError: no valid Unicode, or see `pack_bytes`.
    """
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise CompressorError("the text holds lone surrogates, which no file of text can: remove them") from None
    return zlib.compress(data, 9) if base is None else pack_bytes(data, base)


def unpack_passage(kept: bytes, base: Base | ExactBase | Callable[[], Base | ExactBase]) -> str:
    """The text that `pack_passage` packed, exactly.

    Raises:
        CompressorError: damaged, or packed under another base.
    """
    if kept[0] == MAGIC:
        return unpack_bytes(kept, base).decode()
    try:
        stream = zlib.decompressobj()
        text = stream.decompress(kept, MOST_KEPT).decode()
    except (zlib.error, UnicodeDecodeError) as error:
        raise CompressorError(f"the text kept with this memory is damaged: {error}") from None
    if not stream.eof:
        raise CompressorError(f"the text kept with this memory is cut off, or has more than {MOST_KEPT:,} bytes")
    return text


def split_text(data: bytes) -> Iterator[tuple[bool, bytes]]:
    """Cut bytes into pieces that are valid UTF-8 text, of at most `TEXT_BLOCK` bytes, and pieces that are not."""
    runs: list[tuple[bool, int]] = []  # whether text, and where the run ends
    start = 0
    while start < len(data):
        page = data[start : start + _PAGE]
        try:
            text, used = codecs.utf_8_decode(page, "strict", False)
        except UnicodeDecodeError:
            text, used = "", 0
        controls = sum(character < " " and character not in "\t\n\r\f" for character in text)
        is_text = used > 0 and controls * 20 <= len(text)
        if not is_text:
            used = len(page)
            while start + used < len(data) and data[start + used] & 0xC0 == 0x80:
                used += 1  # the rest of a character
        start += used
        if runs and runs[-1][0] == is_text:
            runs.pop()
        runs.append((is_text, start))
    start = 0
    for is_text, end in runs:
        while is_text and end - start > TEXT_BLOCK:
            cut = data.rfind(b"\n", start + TEXT_BLOCK * 3 // 4, start + TEXT_BLOCK) + 1
            if not cut:
                cut = start + TEXT_BLOCK
                while data[cut] & 0xC0 == 0x80:
                    cut -= 1
            yield True, data[start:cut]
            start = cut
        yield is_text, data[start:end]
        start = end


def _decode_text(exact: ExactBase, documents: Sequence[Document], separator: str) -> str:
    decode = exact.base.tokenizer.decode
    if not separator:
        documents = [[token for document in documents for token in document]]
    settings = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return separator.join(decode(document, **settings) if document else "" for document in documents)


def _pack_text(data: bytes, exact: ExactBase, lane_tokens: int, progress: Callable[[float], None]) -> Block | None:
    """A text block, or None if the plain coders do better or the text does not tokenise back."""
    text = data.decode()
    small = len(pack_plain(data)[0][0].body)
    ways = []
    for index, separator in enumerate(SEPARATORS):
        pieces = text.split(separator) if separator else [text]
        if separator and (len(pieces) < 2 or len(text) < _SHORTEST_DOCUMENT * len(pieces)):
            continue
        ways.append((pieces, separator, index))
    # A short text is coded in the only way there is: a sample would be all of it.
    estimated = len(ways) > 1 or len(text) > _SAMPLE
    costs = [(_bits_a_character(exact, *way[:2]) if estimated else 0.0, way[2]) for way in ways]
    for bits, index in sorted(costs):
        if bits * len(text) > 8 * 1.1 * small:
            return None
        try:
            block = _pack_documents(text, exact, index, lane_tokens, progress)
        except Unencodable:
            continue
        return block if block is not None and len(block.body) < small else None
    return None


def _bits_a_character(exact: ExactBase, pieces: Sequence[str], separator: str) -> float:
    """What this way of splitting would cost, from the beginning of the text."""
    sample, length = [], 0
    for piece in pieces:
        sample.append(piece[: _SAMPLE - length])
        length += len(sample[-1]) + len(separator)
        if length >= _SAMPLE:
            break
    return code_length(exact, exact.base.tokenise(sample)) / max(1, length)


def _pack_documents(
    text: str, exact: ExactBase, index: int, lane_tokens: int, progress: Callable[[float], None]
) -> Block | None:
    """A text block, split at the separator of this index; None if the text does not tokenise back."""
    separator = SEPARATORS[index]
    closed = bool(separator) and text.endswith(separator)
    inner = text.removesuffix(separator) if closed else text
    documents = exact.base.tokenise(inner.split(separator) if separator else [inner])
    if _decode_text(exact, documents, separator) != inner:
        return None
    tokens = sum(map(len, documents)) + len(documents)
    count = min(_LANES, max(1, tokens // lane_tokens))
    lanes: list[list[Document]] = [[] for _ in range(count)]
    seen = 0
    if separator:
        for document in documents:
            lanes[(seen + len(document) // 2) * count // tokens].append(document)
            seen += len(document) + 1
    else:
        for number in range(count):
            lanes[number].append(documents[0][number * tokens // count : (number + 1) * tokens // count])
    coded, lanes = [], [lane for lane in lanes if lane]
    for number, lane in enumerate(lanes):
        coded.append(encode_lane(exact, lane, bool(separator)))
        progress((number + 1) / len(lanes))
    body = b""
    if len(coded) > 1:
        body = varint(len(coded)) + b"".join(varint(len(lane)) for lane in coded[:-1])
    return Block(TEXT, body + b"".join(coded), separator=index, closed=closed, one_lane=len(coded) == 1, lanes=lanes)


def _unpack_text(
    block: Block,
    exact: ExactBase,
    batch: int,
    progress: Callable[[int], None],
    told: Sequence[Sequence[Document]],
) -> bytes:
    """What a text block stands for, if nothing is wrong with it."""
    reader, lanes = Reader(block.body), list[bytes]()
    if not block.one_lane:
        lengths = [reader.number(0, len(block.body)) for _ in range(reader.number(2, _LANES) - 1)]
        lanes = [reader.bytes(length) for length in lengths]
    lanes.append(block.body[reader.place :])
    separator = SEPARATORS[block.separator]
    documents: list[Document] = []
    try:
        for start in range(0, len(lanes), batch):
            before = sum(map(len, lanes[:start]))

            def within(seen: int, before: int = before) -> None:
                progress(before + seen)

            some = slice(start, start + batch)
            for lane in decode_lanes(exact, lanes[some], bool(separator), within, told[some]):
                documents += lane
    except CompressorError as error:
        raise Damaged(str(error)) from None
    text = _decode_text(exact, documents, separator) + (separator if block.closed else "")
    return text.encode("utf-8", "replace")


def _check_identity(identity: bytes, exact: ExactBase) -> None:
    if identity != exact.identity:
        raise CompressorError(
            f"this file was packed with another base (weights and vocabulary {identity.hex()}) than {exact.base.name} "
            f"({exact.identity.hex()}): give the one it was packed with by --base"
        )
