"""Text codecs that send numbers: a quantised memory, and a quantised embedding."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch

from compressor.base import Base
from compressor.codecs import entropy
from compressor.codecs.artifact import MOST_TOKENS as MOST_MEMORY_TOKENS
from compressor.codecs.artifact import compressor_fingerprint
from compressor.codecs.blocks import Damaged, read_varint, varint
from compressor.codecs.codec import BITS, FLOATS, NAMES, Codec
from compressor.codecs.exact import double_precision
from compressor.codecs.text import MOST_PIECES, MOST_TOKENS, TextCodec
from compressor.errors import CompressorError
from compressor.generation import Sampling, regeneration_limit
from compressor.memory import Memory, Segment
from compressor.model_config import Layout

_CODERS = ("none", "ans", "range", "huffman")
_DIGEST = 8


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


class MemoryCodec(TextCodec):
    """The memory that a compressor makes of the text, coded by a codec for memories; reading needs the base alone.

    Body: codec and coder, level, digest of the calibration if there is one, layout, most tokens, segments, streams.
    """

    name, number = "memory", 3

    def prepare(self, texts: Sequence[str]) -> list[Memory]:
        """A memory for each text."""
        needs = self.needs
        return needs.model.compress(list(texts), needs.tokens, needs.batch, refine_steps=needs.refine_steps)

    def codec(self) -> Codec:
        """The codec that memories are coded with."""
        return Codec.parse(self.needs.memory_codec, self.needs.calibration)

    def encode(self, prepared: Memory) -> bytes:
        """See `TextCodec.encode`."""
        codec = self.codec()
        memory = codec.prepare(prepared)
        tensors, details = codec.encode(memory)
        digest = b"" if codec.calibration is None else bytes.fromhex(codec.calibration.digest)[:_DIGEST]
        body = bytes([NAMES.index(codec.name), _CODERS.index(codec.coder), codec.level & 0xFF, len(digest)]) + digest
        body += bytes([get_args(Layout).index(memory.layout)]) + varint(memory.most) + varint(len(memory.segments))
        for segment in memory.segments:
            body += varint(segment.tokens) + varint(segment.passage_tokens)
        for size in details.get("sizes", ()):
            body += varint(size)
        for name in ("steps", "models", "keys", "values", "payload"):
            if name in tensors:
                body += tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return body

    def read(self, reader: Reader) -> Memory:
        """The memory of a body."""
        base = self.needs.exact.base
        name_number, coder_number, level, digest_size = reader.bytes(4)
        if name_number >= len(NAMES) or coder_number >= len(_CODERS) or digest_size not in (0, _DIGEST):
            raise Damaged("it names a codec that does not exist")
        name, digest = NAMES[name_number], reader.bytes(digest_size)
        calibration = self.needs.calibration if digest else None
        if digest and (calibration is None or bytes.fromhex(calibration.digest)[:_DIGEST] != digest):
            raise CompressorError(
                f"this file needs the calibration {digest.hex()[:12]}, and "
                f"{'none' if calibration is None else 'another'} was given: give its file with --calibration"
            )
        (layout_number,) = reader.bytes(1)
        if layout_number >= len(get_args(Layout)):
            raise Damaged("it has a layout that does not exist")
        most = reader.number(1, MOST_MEMORY_TOKENS)
        segments = tuple(
            Segment(reader.number(1, most), reader.number(1, 1 << 31)) for _ in range(reader.number(1, MOST_PIECES))
        )
        record: dict[str, Any] = {
            "name": name,
            "coder": _CODERS[coder_number],
            "calibration": calibration.digest if calibration is not None else None,
            "level": level - 256 if level > 127 else level,
            "drop_layers": [],
        }
        tokens = sum(segment.tokens for segment in segments)
        shape = (base.layers, base.kv_heads, tokens, base.head_size)
        wanted: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
        if name in FLOATS:
            wanted = [(part, FLOATS[name], shape) for part in ("keys", "values")]
        sizes = [reader.number(0, 1 << 30) for _ in range(0 if wanted else 1 if name == "lowrank" else base.layers)]
        if name in BITS and calibration is None:
            wanted.append(("steps", torch.int8, (2, base.layers, base.kv_heads, base.head_size)))
            if record["coder"] != "none":
                wanted.append(("models", torch.uint8, (2, base.layers, base.kv_heads)))
        if name not in FLOATS:
            wanted.append(("payload", torch.uint8, (max(1, sum(sizes)),)))
        tensors = {}
        for part, dtype, size in wanted:
            raw = reader.bytes(int(np.prod(size)) * torch.empty((), dtype=dtype).element_size())
            tensors[part] = torch.frombuffer(bytearray(raw), dtype=dtype).reshape(size)
        slots = [slot for segment in segments for slot in range(segment.tokens)]
        codec = Codec.from_record(record, calibration)
        keys, values = codec.decode(tensors, {**record, "sizes": sizes}, shape, slots)
        return Memory(keys, values, segments, get_args(Layout)[layout_number], most, base.fingerprint)

    def decode(self, bodies: Sequence[bytes], sampling: Sampling) -> list[str]:
        """See `TextCodec.decode`."""
        return self.written(self.memories(bodies), sampling)

    def memories(self, bodies: Sequence[bytes]) -> list[Memory]:
        """The memories of bodies."""
        memories = []
        for body in bodies:
            reader = Reader(body)
            memories.append(self.read(reader))
            reader.end()
        return memories

    def written(self, memories: Sequence[Memory], sampling: Sampling) -> list[str]:
        """Texts that the base writes from memories."""
        base = self.needs.exact.base
        parts = [(owner, part) for owner, memory in enumerate(memories) for part in memory.split()]
        limits = [regeneration_limit(part.passage_tokens) for _, part in parts]
        if max(limits) > regeneration_limit(MOST_TOKENS):
            raise Damaged(f"it claims a passage of more than {MOST_TOKENS:,} tokens")
        prefix = self.needs.exact.memory_prefix([part for _, part in parts])
        found = self.write(prefix, [[base.bos]] * len(parts), limits, sampling)
        ids: list[list[int]] = [[] for _ in memories]
        for (owner, _), one in zip(parts, found, strict=True):
            ids[owner] += one
        return [base.tokenizer.decode(one, skip_special_tokens=True) for one in ids]

    def decoder_tokens(self, prepared: Memory) -> int:
        return prepared.tokens


@dataclass(frozen=True)
class _Frozen:
    """A float64 base where methods expect a compressor: there are no adapters to switch."""

    base: Base
    config: Any

    def adapters(self, on: bool) -> AbstractContextManager[None]:
        return nullcontext()


@dataclass(frozen=True)
class Embedded:
    """Quantised embeddings of a text's segments, integers `[segments, size]`, and the segments' tokens."""

    integers: np.ndarray
    lengths: list[int]
    tokens: int


class EmbeddingCodec(TextCodec):
    """The embedding of a frozen text encoder, from whose projection the base writes (method `sentence-embedding`).

    The projection begins with a norm, so an embedding's length does not matter and no scale is sent. Reading needs the
    checkpoint. Body: hash of the checkpoint, bits, tokens, segments, entropy model, integers.
    """

    name, number = "sentence-embedding", 4

    def _model(self) -> Any:
        model = self.needs.model
        if model.config.method != self.name:
            raise CompressorError(
                f"the codec {self.name} needs a checkpoint of the method {self.name}, this one is of "
                f"{model.config.method}: name one with --checkpoint"
            )
        return model

    def prepare(self, texts: Sequence[str]) -> list[Embedded]:
        """Quantised embeddings, and lengths of the segments."""
        from compressor.methods.encoder import pad

        model = self._model()
        tokens = self.needs.tokens or model.config.memory_tokens
        if not 1 <= tokens <= model.config.memory_tokens or f"int{self.needs.bits}" not in BITS:
            raise CompressorError(
                f"tokens = {tokens}, bits = {self.needs.bits}: the checkpoint has 1 to {model.config.memory_tokens} "
                "tokens, and bits are 8, 4, 3 or 2"
            )
        half = 1 << (self.needs.bits - 1)
        found = []
        for text in texts:
            ids = model.base.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            padded, lengths = pad(model.segment(ids), model.base.device)
            embedded = model.encoder.embed(model, padded, lengths).double().cpu()
            embedded = embedded - embedded.mean(dim=1, keepdim=True)
            scaled = embedded / embedded.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) * half
            integers = torch.floor(scaled).clamp(-half, half - 1).to(torch.int64).numpy()
            found.append(Embedded(integers, lengths.tolist(), tokens))
        return found

    def encode(self, prepared: Embedded) -> bytes:
        """See `TextCodec.encode`."""
        half = 1 << (self.needs.bits - 1)
        flat = prepared.integers.reshape(-1)
        (chosen,) = entropy.choose_models(flat[:, None], (-half, half - 1))
        data = entropy.encode(flat, np.full(len(flat), chosen, dtype=np.uint8), "ans", (-half, half - 1))
        body = bytes.fromhex(compressor_fingerprint(self._model()))[:_DIGEST]
        body += bytes([self.needs.bits]) + varint(prepared.tokens) + varint(len(prepared.lengths))
        return body + b"".join(varint(length) for length in prepared.lengths) + bytes([chosen]) + data

    def decode(self, bodies: Sequence[bytes], sampling: Sampling) -> list[str]:
        """See `TextCodec.decode`."""
        return MemoryCodec(self.needs).written(self.memories(bodies), sampling)

    def memories(self, bodies: Sequence[bytes]) -> list[Memory]:
        """What the projection makes of the embeddings."""
        model = self._model()
        own = bytes.fromhex(compressor_fingerprint(model))[:_DIGEST]
        return [self._memory(Reader(body), model, own) for body in bodies]

    def _memory(self, reader: Reader, model: Any, own: bytes) -> Memory:
        from compressor.methods.encoder import prefill

        if (theirs := reader.bytes(_DIGEST)) != own:
            raise CompressorError(
                f"this file was packed with another checkpoint ({theirs.hex()[:12]}) than this one ({own.hex()[:12]}): "
                "name it with --checkpoint"
            )
        (bits,) = reader.bytes(1)
        if f"int{bits}" not in BITS:
            raise Damaged(f"it has numbers of {bits} bits")
        half, most = 1 << (bits - 1), model.config.memory_tokens
        tokens = reader.number(1, most)
        lengths = [reader.number(1, MOST_TOKENS) for _ in range(reader.number(1, MOST_PIECES))]
        (chosen,) = reader.bytes(1)
        encoder, exact = model.encoder, self.needs.exact
        size = encoder.norm.normalized_shape[0]
        models = np.full(len(lengths) * size, chosen, dtype=np.uint8)
        integers = entropy.decode(reader.data[reader.place :], models, "ans", (-half, half - 1))
        with double_precision():
            values = torch.from_numpy(integers.reshape(len(lengths), size)).double() + 0.5
            norm, projection = (copy.deepcopy(part).double() for part in (encoder.norm, encoder.projection))
            embedded = projection(norm(values.to(exact.base.device))).view(len(lengths), most, -1)[:, :tokens]
            keys, vals = prefill(
                _Frozen(exact.base, model.config),  # type: ignore[arg-type]
                embedded,
                torch.tensor(lengths, device=exact.base.device),
                encoder.memory_layout,
                most,
            )
        segments = tuple(Segment(tokens, length) for length in lengths)
        layers, _, heads, _, width = keys.shape
        joined = [part.movedim(1, 2).reshape(layers, heads, -1, width) for part in (keys, vals)]
        return Memory(joined[0], joined[1], segments, encoder.memory_layout, most, exact.base.fingerprint)

    def decoder_tokens(self, prepared: Embedded) -> int:
        return prepared.tokens * len(prepared.lengths)
