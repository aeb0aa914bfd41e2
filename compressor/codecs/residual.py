"""Residuals: what a memory lacks to give its passage back byte for byte.

A residual is the passage's tokens, coded under the base conditioned on the passage's own memory (`token_coder.py`),
and the memory is the one a file gives back: rounded or quantised by its codec first. What does not tokenise back to the
same text, or would come out larger, is coded by zstd or bzip2, or stored as it is.

    kind and version | CRC-32 of the text | CRC-32 of keys and values | length of the text | coded text

The coded text of tokens is the base's identity, the lengths of all segments' bytes but the last, and these bytes.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from compressor.base import Base
from compressor.codecs.artifact import as_held, encode
from compressor.codecs.blocks import PLAIN_BLOCK, TEXT, Block, Damaged, pack_plain, read_varint, unpack_plain, varint
from compressor.codecs.codec import Codec
from compressor.codecs.exact import IDENTITY_BYTES, ExactBase
from compressor.codecs.token_coder import Unencodable, decode_tokens, encode_tokens
from compressor.errors import CompressorError

if TYPE_CHECKING:
    from compressor.memory import Memory
    from compressor.model import Compressor

VERSION = 1
_HEAD = 9
_ROUNDS = 4
_EXACT: WeakKeyDictionary[Base, ExactBase] = WeakKeyDictionary()


def exact_base(base: Base) -> ExactBase:
    """The float64 copy of a base, adapters off; made once and kept as long as the base."""
    if base not in _EXACT:
        found = ExactBase(base)
        for module in found.base.model.modules():
            if isinstance(module, BaseTunerLayer):
                module._disable_adapters = True
        _EXACT[base] = found
    return _EXACT[base]


def as_stored(memory: Memory, codec: Codec) -> Memory:
    """The memory that a file with this codec gives back, and gives back again when that is stored.

    Raises:
        CompressorError: the codec cannot store the memory, or changes it every time.
    """
    memory = codec.prepare(memory)
    for _ in range(_ROUNDS):
        keys, values = round_trip(memory, codec)
        same = keys.dtype == memory.keys.dtype and _equal(keys, values, memory)
        memory = replace(memory, keys=keys, values=values)
        if same:
            return memory
    raise CompressorError(
        f"the codec {codec.name} changes a memory each time it is stored, so nothing exact can be built on it: choose "
        "bf16 or an integer codec"
    )


def round_trip(memory: Memory, codec: Codec) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a prepared memory as they come back from a codec."""
    tensors, details = encode(replace(memory, residual=None), codec)
    slots = [slot for segment in memory.segments for slot in range(segment.tokens)]
    return codec.decode(tensors, {**codec.record(), **details}, tuple(memory.keys.shape), slots)


def _equal(keys: torch.Tensor, values: torch.Tensor, memory: Memory) -> bool:
    pairs = ((keys, memory.keys), (values, memory.values))
    return all(torch.equal(ours.float(), theirs.float().cpu()) for ours, theirs in pairs)


def check_stored(memory: Memory, codec: Codec) -> None:
    """Raise a `CompressorError` if storing with this codec would change a memory that has a residual."""
    if memory.residual is not None and not _equal(*round_trip(memory, codec), memory):
        raise CompressorError(
            f"this memory has a residual, which fits its values as they are, and the codec {codec.name} changes them: "
            f"save it with the codec it was compressed with (--codec, compress(text, exact=True, codec=...)), or with "
            f"{as_held(memory)}"
        )


def check_texts(texts: Sequence[str]) -> None:
    """Raise a `CompressorError` for a text that no residual can hold: no valid Unicode, or too long."""
    for text in texts:
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            raise CompressorError("a text holds lone surrogates, which no file of text can: remove them") from None
        if size > PLAIN_BLOCK:
            raise CompressorError(
                f"a text has {size:,} bytes, and exact memories are for at most {PLAIN_BLOCK:,}: use compressor pack"
            )


def make_exact(
    model: Compressor, texts: Sequence[str], memories: Sequence[Memory], codec: Codec | str | None = None
) -> list[Memory]:
    """Memories of these texts (`check_texts`), as their files will give them back, each with its residual.

    Args:
        codec: by which they will be stored; by default `bf16`.

    Raises:
        CompressorError: the codec cannot hold a memory, or the extra `codecs` is missing.
    """
    if not isinstance(codec, Codec):
        codec = Codec.parse(codec or "bf16")
    exact = exact_base(model.base)
    found = []
    for text, memory in zip(texts, memories, strict=True):
        stored = as_stored(memory, codec)
        ids = model.base.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        found.append(replace(stored, residual=encode_residual(exact, text, segments_of(ids, stored), stored)))
    return found


def segments_of(ids: Sequence[int], memory: Memory) -> list[list[int]]:
    """Token ids of a passage, cut into the segments that its memory was made of.

    Raises:
        CompressorError: the memory is of a passage of another length.
    """
    if len(ids) != memory.passage_tokens:
        raise CompressorError(
            f"a text of {len(ids)} tokens and a memory of {memory.passage_tokens}: the memory is of another text"
        )
    ends = list(itertools.accumulate(segment.passage_tokens for segment in memory.segments))
    return [list(ids[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


def encode_residual(exact: ExactBase, text: str, segments: Sequence[Sequence[int]], memory: Memory) -> bytes:
    """The residual of a text, of whose token ids `segments` there is this memory (`segments_of`)."""
    data = text.encode()
    blocks = pack_plain(data)
    kind, body = (blocks[0][0].kind, blocks[0][0].body) if blocks else (0, b"")
    if _text(exact, segments) == text:
        try:
            coded = encode_tokens(exact, exact.memory_prefix(memory.split()), segments)
            tokens = exact.identity + b"".join(varint(len(one)) for one in coded[:-1]) + b"".join(coded)
            if len(tokens) < len(body):
                kind, body = TEXT, tokens
        except Unencodable:
            pass
    checks = (zlib.crc32(data), _memory_check(memory))
    head = bytes([kind | VERSION << 4]) + b"".join(check.to_bytes(4, "little") for check in checks)
    return head + varint(len(data)) + body


def _memory_check(memory: Memory) -> int:
    pair = torch.stack([memory.keys, memory.values]).float().cpu().contiguous()
    return zlib.crc32(pair.numpy().tobytes())


def _text(exact: ExactBase, segments: Sequence[Sequence[int]]) -> str:
    ids = [token for segment in segments for token in segment]
    return exact.base.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def parts(residual: bytes) -> tuple[int, int, int, int, bytes]:
    """Kind, checks of text and memory, length of the text, and coded text.

    Raises:
        CompressorError: damaged, or of a newer version.
    """
    if len(residual) <= _HEAD:
        raise Damaged("the residual is cut off")
    if residual[0] >> 4 != VERSION:
        raise CompressorError(f"the residual has version {residual[0] >> 4}, this program reads {VERSION}: update it")
    length, place = read_varint(residual, _HEAD)
    text, memory = (int.from_bytes(residual[start : start + 4], "little") for start in (1, 5))
    if residual[0] & 15 > 3:
        raise Damaged("the residual is of no known kind")
    return residual[0] & 15, text, memory, length, residual[place:]


def restore_texts(base: Base | ExactBase, memories: Sequence[Memory], batch: int = 16) -> list[str]:
    """The passages of memories that have residuals, exactly.

    Raises:
        CompressorError: a residual is damaged, the memory is not the one it was made for, another base is needed, or
            what comes out is not the text that went in.
    """
    texts: list[str | None] = [None] * len(memories)
    pieces: list[tuple[int, Memory, bytes]] = []
    exact: ExactBase | None = base if isinstance(base, ExactBase) else None
    for place, memory in enumerate(memories):
        if memory.residual is None:
            raise CompressorError("this memory has no residual, so its passage is not known exactly")
        kind, _, check, length, body = parts(memory.residual)
        if check != _memory_check(memory):
            raise CompressorError(
                "the keys and values of this memory are not those its residual was made for (they were rounded, or "
                "changed): load it again from its file, or drop the residual (dataclasses.replace(memory, "
                "residual=None)) to regenerate without it"
            )
        if kind != TEXT:
            texts[place] = _checked(memory, unpack_plain(Block(kind, body)), length)
            continue
        exact = exact or exact_base(base)  # type: ignore[arg-type]
        if body[:IDENTITY_BYTES] != exact.identity:
            raise CompressorError(
                f"this memory's residual was coded with another base (weights and vocabulary "
                f"{body[:IDENTITY_BYTES].hex()}) than {exact.base.name} ({exact.identity.hex()}): give the same base, "
                "in the same data type"
            )
        segments = memory.split()
        ends, at = [], IDENTITY_BYTES
        for _ in segments[1:]:
            size, at = read_varint(body, at)
            ends.append(size)
        for segment, size in zip(segments, [*ends, len(body)], strict=True):
            pieces.append((place, segment, body[at : at + size]))
            at += size
    decoded: dict[int, list[list[int]]] = {}
    for start in range(0, len(pieces), batch):
        assert exact is not None
        some = pieces[start : start + batch]
        prefix = exact.memory_prefix([memory for _, memory, _ in some])
        most = [memory.passage_tokens for _, memory, _ in some]
        found = decode_tokens(exact, prefix, [coded for _, _, coded in some], batch, most)
        for (place, _, _), ids in zip(some, found, strict=True):
            decoded.setdefault(place, []).append(ids)
    for place, segments_ids in decoded.items():
        assert exact is not None
        memory = memories[place]
        data = _text(exact, segments_ids).encode("utf-8", "replace")
        texts[place] = _checked(memory, data, parts(memory.residual or b"")[3])
    return [text or "" for text in texts]


def _checked(memory: Memory, data: bytes, length: int) -> str:
    if len(data) != length or zlib.crc32(data) != parts(memory.residual or b"")[1]:
        raise CompressorError(
            "what this memory and its residual give is not the text that was compressed (checksum): the residual is "
            "damaged, or this machine's arithmetic differs by more than the format allows for"
        )
    return data.decode()
