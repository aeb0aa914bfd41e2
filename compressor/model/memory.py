"""What a passage became: `Memory`, and its place in a decoder's context."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from compressor.errors import CompressorError, require_whole
from compressor.model.base import Base
from compressor.model.config import Layout
from compressor.model.decoder import Prefix
from compressor.model.fingerprints import public_name, tokenizer_fingerprint
from compressor.model.layouts import decoder_start, memory_positions, placing
from compressor.model.table import LAYOUTS
from compressor.processes import check_device, check_dtype
from compressor.progress import note_once

if TYPE_CHECKING:
    from compressor.storage.calibration import Calibration
    from compressor.storage.codec import Codec


@dataclass(frozen=True)
class Segment:
    """A stretch of a memory that was compressed on its own."""

    tokens: int
    """Memory tokens."""
    passage_tokens: int


@dataclass(frozen=True)
class Memory:
    """Keys and values of the memory tokens of one passage, in every layer of the base.

    Keys are position-free: turned back to position 0, and placed when a decoder's prefix is built. A text longer than
    the compressor's limit has several segments, whose memories lie one after the other.
    """

    keys: Tensor
    """`[layers, kv_heads, tokens, head_size]`"""
    values: Tensor
    """`[layers, kv_heads, tokens, head_size]`"""
    segments: tuple[Segment, ...]
    layout: Layout
    most: int
    """Memory tokens the compressor has for one segment."""
    base: str
    """Fingerprint of the base that can read this memory."""
    compressor: str = ""
    """Name and hash of the compressor that made it, `NAME@SHA256` (`signed`); empty if not recorded."""
    tokenizer: str = ""
    """Fingerprint of the base's tokenizer; empty where not recorded."""
    base_name: str = ""
    """Folder or hub id of the base; empty where not recorded."""
    text: bytes | None = None
    """The passage itself, packed (`packing.lossless.pack_passage`), if it is kept."""
    made: dict[str, float] = field(default_factory=dict)
    """Numbers it was made with (`tokens`, `segment_tokens`, `refine_steps`); empty where not recorded."""
    fidelity: float | None = None
    """Share of the passage that it gives back (`compressor/model/fidelity.py`); None where not measured."""

    def __post_init__(self) -> None:
        if not isinstance(self.keys, Tensor) or not isinstance(self.values, Tensor):
            found = f"{type(self.keys).__name__}, values {type(self.values).__name__}"
            raise CompressorError(f"a memory's keys are {found}: give tensors [layers, heads, tokens, head size]")
        if self.keys.dim() != 4 or self.keys.shape != self.values.shape or self.keys.shape[2] != self.tokens:
            raise CompressorError(
                f"a memory of {self.tokens} tokens needs keys and values [layers, heads, {self.tokens}, head size], "
                f"got {tuple(self.keys.shape)} and {tuple(self.values.shape)}"
            )

    def __repr__(self) -> str:
        back = "" if self.fidelity is None else f", {self.fidelity:.1%} comes back"
        return (
            f"Memory({self.passage_tokens} tokens in {self.tokens}, {len(self.segments)} segment(s), layout "
            f"{self.layout}, {self.nbytes:,} bytes of {str(self.keys.dtype).removeprefix('torch.')}{back})"
        )

    @property
    def tokens(self) -> int:
        """Number of memory tokens."""
        return sum(segment.tokens for segment in self.segments)

    @property
    def passage_tokens(self) -> int:
        """Number of tokens of the passage."""
        return sum(segment.passage_tokens for segment in self.segments)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values as they are held."""
        return self.keys.nbytes + self.values.nbytes

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Memory:
        """This memory on another device or in another floating-point type."""
        if device is not None:
            check_device(device)
        if dtype is not None:
            check_dtype(dtype)
        keys, values = self.keys.to(device=device, dtype=dtype), self.values.to(device=device, dtype=dtype)
        return replace(self, keys=keys, values=values)

    def save(self, path: str | Path, codec: str | Codec | None = None, passage_bytes: int | None = None) -> None:
        """Write a checked memory file (`compressor/storage/memory_file.py`).

        Args:
            codec: a name such as `bf16` or `int4+ans`, or a `Codec`; by default the type the memory is held in.
            passage_bytes: length of the passage's text in UTF-8, which `compressor inspect` compares with.
        """
        from compressor.storage.memory_file import save_memory  # the one import upward, for who holds a memory

        save_memory(self, path, codec, passage_bytes)

    @staticmethod
    def load(path: str | Path, calibration: Calibration | str | Path | None = None) -> Memory:
        """Read a file that `save` wrote; a damaged or foreign one is a `CompressorError`.

        Args:
            calibration: what the codec was fitted with, or its file; by default `calibration.safetensors` beside it.
        """
        from compressor.storage.memory_file import load_memory  # as above

        return load_memory(path, calibration)

    def split(self) -> list[Memory]:
        """One memory for each segment; a kept text is of all segments, and is left out if there are several."""
        if len(self.segments) == 1:
            return [self]
        sizes = [segment.tokens for segment in self.segments]
        parts = zip(self.segments, self.keys.split(sizes, dim=2), self.values.split(sizes, dim=2), strict=True)
        return [
            replace(self, keys=k, values=v, segments=(segment,), text=None, fidelity=None) for segment, k, v in parts
        ]

    def split_with(self, passage: Sequence[int]) -> list[tuple[Memory, Sequence[int]]]:
        """`split`, each segment's memory with its tokens of the passage that was compressed."""
        parts, start = [], 0
        for part in self.split():
            parts.append((part, passage[start : start + part.passage_tokens]))
            start += part.passage_tokens
        return parts

    def truncate(self, tokens: int) -> Memory:
        """The first `tokens` memory tokens of each segment: the memory that compressing to `tokens` gives.

        Raises:
            CompressorError: the layout puts tokens elsewhere when there are fewer, or there are not so many.
        """
        require_whole("tokens", tokens, 0)
        fewest = min(segment.tokens for segment in self.segments)
        if not 1 <= tokens <= fewest:
            raise CompressorError(f"cannot truncate to {tokens} memory tokens: the memory has {fewest} for a segment")
        if tokens < fewest and not LAYOUTS[self.layout].truncatable:
            others = [name for name, one in LAYOUTS.items() if one.truncatable]
            raise CompressorError(
                f"memories of layout {self.layout} cannot be truncated, because its positions depend on the number of "
                f"tokens: compress again with {tokens}, or train with one of {', '.join(others)}"
            )
        if all(segment.tokens == tokens for segment in self.segments):
            return self
        if self.made.get("refine_steps"):
            warnings.warn(
                f"the first {tokens} tokens of a memory that was refined with {fewest} keep far less than a memory "
                f"refined with {tokens}: compress again with tokens={tokens} (--tokens {tokens})",
                stacklevel=2,
            )
        parts = self.split()
        return replace(
            self,
            keys=torch.cat([part.keys[:, :, :tokens] for part in parts], dim=2),
            values=torch.cat([part.values[:, :, :tokens] for part in parts], dim=2),
            segments=tuple(replace(segment, tokens=tokens) for segment in self.segments),
            made={**self.made, "tokens": tokens} if self.made else {},
            fidelity=None,
        )

    @staticmethod
    def concatenate(memories: Sequence[Memory]) -> Memory:
        """The memories one after the other, as if their passages followed each other; kept texts are left out.

        Raises:
            CompressorError: none given, or they are of different bases, layouts or sizes.
        """
        if isinstance(memories, Memory):
            raise CompressorError("got one memory: give a list of those to concatenate")
        for one in memories or ():
            if not isinstance(one, Memory):
                raise CompressorError(f"got {type(one).__name__}, not a memory: give a list of memories")
        if not memories:
            raise CompressorError("cannot concatenate an empty list of memories")
        first = memories[0]
        if len(memories) == 1:
            return first
        for other in memories[1:]:
            for name in ("base", "layout", "most"):
                if getattr(other, name) != getattr(first, name):
                    raise CompressorError(
                        f"cannot concatenate memories of different {name}: "
                        f"{getattr(first, name)} and {getattr(other, name)}"
                    )
        return replace(
            first,
            keys=torch.cat([memory.keys for memory in memories], dim=2),
            values=torch.cat([memory.values for memory in memories], dim=2),
            segments=tuple(segment for memory in memories for segment in memory.segments),
            text=None,
            made=first.made if all(memory.made == first.made for memory in memories) else {},
            fidelity=None,
        )

    def to_cache(self, base: Base) -> DynamicCache:
        """A new cache that holds this memory, its keys placed; the next token's position is `positions()[1]`."""
        if not isinstance(base, Base):
            raise CompressorError(f"the base is {type(base).__name__}: give the Base (of a compressor, model.base)")
        return memory_prefix(base, [self]).to_cache()

    def positions(self) -> tuple[Tensor, Tensor]:
        """Where the keys go in the decoder's context, int64 `[tokens]`, and where the decoder starts, int64 `[]`.

        Each segment's positions begin where the passage tokens of those before it end, or their memory tokens in the
        layout `front`.
        """
        device = self.keys.device
        placed, offset, seen = [], 0, 0
        for segment in self.segments:
            length = torch.tensor([segment.passage_tokens], device=device)
            before = placing(self.layout).before(offset, seen)
            placed.append(memory_positions(self.layout, length, segment.tokens, self.most)[0] + before)
            offset += segment.passage_tokens
            seen += segment.tokens
        start = decoder_start(self.layout, torch.tensor([offset], device=device), self.tokens)[0]
        return torch.cat(placed), start


def signed(memory: Memory, base: Base, compressor_name: str) -> Memory:
    """The memory with the names and hashes of where it came from, which its file then states."""
    return replace(
        memory,
        compressor=compressor_name,
        base_name=public_name(base.name),
        tokenizer=tokenizer_fingerprint(base.tokenizer),
    )


def check_base(memory: Memory, base: Base) -> None:
    """Raise a `CompressorError` unless this base, with this tokenizer, reads the memory."""
    if memory.base != base.fingerprint:
        raise CompressorError(
            f"this memory was made with another base ({memory.base_name or 'unnamed'}, weights {memory.base[:12]}) "
            f"than {base.name} (weights {base.fingerprint[:12]}): load the base it was made with; `compressor ask` and "
            "`regenerate` read it with this one all the same with --base-mismatch allow"
        )
    if memory.tokenizer and memory.tokenizer != (found := tokenizer_fingerprint(base.tokenizer)):
        raise CompressorError(
            f"this memory was made with another tokenizer ({memory.tokenizer[:12]}) than that of {base.name} "
            f"({found[:12]}): load the tokenizer that belongs to the base it was made with"
        )


def on_base(memory: Memory, base: Base) -> Memory:
    """The memory as one of this base, with a warning if it was made with other weights or another tokenizer.

    Raises:
        CompressorError: keys and values of another shape than the base's.
    """
    layers, heads, _, size = memory.keys.shape
    if (layers, heads, size) != (base.layers, base.kv_heads, base.head_size):
        raise CompressorError(
            f"this memory is one of {layers} layers and {heads} heads of {size}, {base.name} has {base.layers} and "
            f"{base.kv_heads} of {base.head_size}: load the base it was made with ({memory.base_name or 'unnamed'})"
        )
    try:
        check_base(memory, base)
    except CompressorError as error:
        note_once(f"warning: {str(error).split(': ')[0]}: what comes back may be worse")
    return replace(memory, base=base.fingerprint, tokenizer=tokenizer_fingerprint(base.tokenizer))


READ_TOGETHER = 4
"""Most segments of one context that the bundled compressors were trained to answer from."""


def warn_of_many(memories: Sequence[Memory]) -> None:
    """Say where one has more segments than answers are read from well."""
    if max(len(memory.segments) for memory in memories) > READ_TOGETHER:
        note_once(
            f"warning: answers are read well from up to {READ_TOGETHER} segments, and this memory has more: --recite "
            "(recite=True) reads the text that it gives back"
        )


def memory_prefix(base: Base, memories: Sequence[Memory]) -> Prefix:
    """Place the memories' keys and pad them to one batch.

    Raises:
        CompressorError: a memory was made with another base or tokenizer.
    """
    for memory in memories:
        check_base(memory, base)
    slots = max(memory.tokens for memory in memories)
    shape = (base.layers, len(memories), base.kv_heads, slots, base.head_size)
    keys = torch.zeros(shape, device=base.device, dtype=base.dtype)
    values = torch.zeros(shape, device=base.device, dtype=base.dtype)
    positions = torch.zeros(len(memories), slots, dtype=torch.int64, device=base.device)
    mask = torch.zeros(len(memories), slots, dtype=torch.bool, device=base.device)
    start = torch.zeros(len(memories), dtype=torch.int64, device=base.device)
    for row, memory in enumerate(memories):
        placed, first = memory.positions()
        keys[:, row, :, : memory.tokens] = memory.keys.to(keys)
        values[:, row, :, : memory.tokens] = memory.values.to(values)
        positions[row, : memory.tokens] = placed
        mask[row, : memory.tokens] = True
        start[row] = first
    return Prefix(list(base.rotate(keys, positions)), list(values), mask, start)


def place(base: Base, memory: Memory) -> tuple[Tensor, Tensor]:
    """Keys and values for an engine that counts positions on from the memory's tokens, as vLLM does.

    What follows k memory tokens is at position k there, and at the decoder's start here: keys move by the difference.

    Returns:
        Each `[layers, tokens, kv_heads, head_size]`, on the CPU in the base's type.

    Raises:
        CompressorError: the memory was made with another base or tokenizer.
    """
    check_base(memory, base)
    positions, start = memory.positions()
    moved = (positions + memory.tokens - start)[None].to(base.device)
    keys = base.rotate(memory.keys.to(base.device, base.dtype)[:, None], moved)[:, 0]
    values = memory.values.to(base.device, base.dtype)
    return keys.transpose(1, 2).contiguous().cpu(), values.transpose(1, 2).contiguous().cpu()
