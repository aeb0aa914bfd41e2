"""Codecs: how the keys and values of a memory become bytes, and come back.

| codec                  | bits a value | what it stores                                                        |
|------------------------|--------------|-----------------------------------------------------------------------|
| float32, float16, bf16 | 32, 16, 16   | the values as they are                                                |
| int8, int4, int3, int2 | 8, 4, 3, 2   | integers, and a step for each channel unless a calibration has it     |
| lowrank:RATE           | about RATE   | principal components (needs a calibration), entropy coded             |

`int4+ans` and `int4+huffman` entropy-code the integers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from compressor.errors import CompressorError
from compressor.model.table import load
from compressor.storage import entropy, quantise
from compressor.storage.calibration import Calibration, flatten_tokens, unflatten_tokens
from compressor.storage.entropy import Coder
from compressor.storage.table import CODECS

if TYPE_CHECKING:
    from compressor.model.memory import Memory

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bf16": torch.bfloat16}
BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
_GROUPS = 64 * entropy.SHAPES


def codec_class(name: str) -> type[Codec]:
    """The class of a codec's name in `CODECS`; another name is a `CompressorError`."""
    if name not in CODECS:
        known = [one + ":RATE" * (codec_class(one).usual_rate is not None) for one in CODECS]
        raise CompressorError(f"there is no codec {name!r}: choose one of {', '.join(known)} (lowrank:0.1, say)")
    return load(CODECS[name], "compressor.storage")


@dataclass(frozen=True)
class Codec:
    """A way of coding memories; `parse` makes one from a name. Subclasses code (`_encode`, `_decode`).

    Attributes:
        name: one of `CODECS`.
        coder: entropy coder of the integers.
        calibration: fitted statistics; `lowrank` needs them, integers without them store a step for each channel.
        level: step of `lowrank` is 2^(level/4).
        rate: most bits a value that were asked for, of which the level follows; None where none were.
    """

    name: str
    coder: Coder = "none"
    calibration: Calibration | None = None
    level: int = 0
    rate: float | None = None

    usual_coder: ClassVar[Coder] = "none"
    usual_rate: ClassVar[float | None] = None
    """Bits a value where the name has none; None for codecs that take no rate."""
    fitted: ClassVar[bool] = True
    """Whether what is stored depends on the calibration."""

    def __post_init__(self) -> None:
        entropy.check_coder(self.coder)
        self._check()

    def _check(self) -> None:
        """Raise a `CompressorError` for settings that do not go together."""

    @staticmethod
    def parse(text: str, calibration: Calibration | str | Path | None = None) -> Codec:
        """The codec of a name such as `bf16`, `int4`, `int3+ans`, `lowrank`, `lowrank:0.2+huffman`.

        Args:
            text: NAME[:RATE][+CODER]; RATE is the most bits a value on the calibration's passages.
            calibration: or the path of its file.

        Raises:
            CompressorError: there is no such codec, or it needs a calibration.
        """
        if not isinstance(text, str):
            raise CompressorError(f"the codec is {type(text).__name__}, not text: give a name such as bf16 or int4+ans")
        if calibration is not None and not isinstance(calibration, Calibration):
            calibration = Calibration.load(calibration)
        head, _, coder = text.partition("+")
        name, _, rate = head.partition(":")
        kind, level, most = codec_class(name), 0, None
        if kind.usual_rate is None and rate:
            raise CompressorError(f"codec {text!r}: only lowrank takes a rate")
        if kind.usual_rate is not None and calibration is not None:
            try:
                most = float(rate) if rate else kind.usual_rate
                level = calibration.level(most)
            except ValueError as error:
                if isinstance(error, CompressorError):
                    raise
                raise CompressorError(f"the rate of codec {text!r} is no number: write lowrank:0.25") from None
        if not kind.fitted:
            calibration = None  # nothing in the file would depend on it
        return kind(name, cast("Coder", coder or kind.usual_coder), calibration, level, most)

    def record(self) -> dict[str, Any]:
        """What a file says about the codec."""
        named = self.calibration.digest if self.calibration is not None else None
        rate = {} if self.rate is None else {"rate": self.rate}  # for people: what is read by is the level
        return {"name": self.name, "coder": self.coder, "calibration": named, "level": self.level, **rate}

    @staticmethod
    def from_record(record: Mapping[str, Any], calibration: Calibration | None) -> Codec:
        """The codec that `record` described; the calibration must be the one it names.

        Raises:
            CompressorError: the record is damaged, or another calibration is needed.
        """
        named = record["calibration"]
        if named is not None and (calibration is None or calibration.digest != named):
            got = "none was given" if calibration is None else f"another was given ({calibration.digest[:12]})"
            raise CompressorError(
                f"this memory needs the calibration {str(named)[:12]} to be read, and {got}: give its file with "
                "--calibration (Memory.load(path, calibration=...)), or put it beside the memory as "
                "calibration.safetensors"
            )
        if type(record["level"]) is not int or abs(record["level"]) > 127:
            raise CompressorError("damaged: the codec's level is no whole number")
        if record.get("drop_layers"):
            raise CompressorError("layers are left out of it, which versions before 0.2.0 could: compress again")
        return codec_class(record["name"])(
            record["name"], record["coder"], calibration if named else None, record["level"]
        )

    def prepare(self, memory: Memory) -> Memory:
        """The memory that is stored, checked against the calibration."""
        if self.calibration is not None:
            self.calibration.check(memory)
        if not bool(torch.isfinite(memory.keys).all() and torch.isfinite(memory.values).all()):
            raise CompressorError("this memory holds values that are not finite, so it cannot be stored")
        return memory

    def encode(self, memory: Memory) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors that hold a prepared memory, and what a reader needs to know besides shape and codec."""
        return self._encode(torch.stack([memory.keys, memory.values]).detach().cpu(), memory)

    def _encode(self, pair: Tensor, memory: Memory) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """`encode`: `pair` is `[2, layers, kv_heads, tokens, head_size]`."""
        raise NotImplementedError

    def decode(
        self, tensors: Mapping[str, Tensor], details: Mapping[str, Any], shape: Sequence[int], slots: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Keys and values, `[layers, kv_heads, tokens, head_size]`: float types as stored, others float32.

        Args:
            tensors, details: what `encode` returned.
            shape: of keys and values.
            slots: place of each memory token in its segment.

        Raises:
            CompressorError: they do not fit together.
        """
        layers, heads, tokens, size = shape
        if self.calibration is not None:
            wanted = (layers, heads, size)
            if (*self.calibration.mean.shape[1:3], self.calibration.mean.shape[4]) != wanted or (
                max(slots) >= self.calibration.slots
            ):
                raise CompressorError("damaged: the memory's shape is not the calibration's")
        full = torch.zeros(2, layers, heads, tokens, size)
        if self.calibration is not None:
            full = self.calibration.mean[:, :, :, list(slots)].clone()
        full = self._decode(tensors, details, full)
        if not bool(torch.isfinite(full).all()):
            raise CompressorError("damaged: it holds values that are not finite")
        return full[0], full[1]

    def _decode(self, tensors: Mapping[str, Tensor], details: Mapping[str, Any], full: Tensor) -> Tensor:
        """`decode`: keys and values `[2, layers, kv_heads, tokens, head_size]`, `full` being the means, or zeros."""
        raise NotImplementedError

    def _fitted(self) -> Calibration:
        assert self.calibration is not None  # __post_init__ refuses lowrank without one
        return self.calibration


def check_tensor(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, shape: Sequence[int]) -> None:
    found = tensors.get(name)
    if found is None or found.dtype != dtype or tuple(found.shape) != tuple(shape):
        got = "missing" if found is None else f"{found.dtype} {tuple(found.shape)}"
        raise CompressorError(f"damaged: {name} is {got}, not {dtype} {tuple(shape)}")


def streams_of(tensors: Mapping[str, Tensor], details: Mapping[str, Any], count: int) -> list[bytes]:
    """The payload cut into its streams."""
    payload, sizes = tensors.get("payload"), details["sizes"]
    if payload is None or payload.dtype != torch.uint8 or payload.dim() != 1:
        raise CompressorError("damaged: it has no payload")
    if len(sizes) != count or any(type(size) is not int or size < 0 for size in sizes):
        raise CompressorError("damaged: the sizes of its streams are wrong")
    if max(1, sum(sizes)) != len(payload):
        raise CompressorError(f"damaged: streams of {sum(sizes)} bytes in a payload of {len(payload)}")
    data = payload.numpy().tobytes()
    ends = np.cumsum([0, *sizes]).tolist()
    return [data[a:b] for a, b in pairwise(ends)]


class Floats(Codec):
    """Keys and values in a floating-point type."""

    fitted = False

    def _check(self) -> None:
        if self.coder != "none":
            raise CompressorError(f"{self.name} is not entropy-coded: leave +{self.coder} out, or choose int8")

    def _encode(self, pair: Tensor, memory: Memory) -> tuple[dict[str, Tensor], dict[str, Any]]:
        keys, values = pair.to(FLOATS[self.name])
        if not bool(torch.isfinite(keys).all() and torch.isfinite(values).all()):
            raise CompressorError(f"this memory has values too large for {self.name}: use bf16 or float32")
        return {"keys": keys, "values": values}, {}

    def _decode(self, tensors: Mapping[str, Tensor], details: Mapping[str, Any], full: Tensor) -> Tensor:
        for name in ("keys", "values"):
            check_tensor(tensors, name, FLOATS[self.name], full.shape[1:])
        return torch.stack([tensors["keys"], tensors["values"]])


class Integers(Codec):
    """Uniformly quantised keys and values; a step for each channel is stored unless a calibration has it."""

    def _encode(self, pair: Tensor, memory: Memory) -> tuple[dict[str, Tensor], dict[str, Any]]:
        pair = pair.float()
        bits = BITS[self.name]
        half = 1 << (bits - 1)
        tensors: dict[str, Tensor] = {}
        if self.calibration is not None:
            pair, steps = pair - self.calibration.means(memory), self._steps()
        else:
            tensors["steps"] = quantise.fit_steps(pair, bits)
            steps = quantise.step_of(tensors["steps"])
        integers = quantise.symbols(pair, steps, bits)  # [2, layers, heads, tokens, head size]
        models = None
        if self.coder != "none":
            if self.calibration is None:
                grouped = integers.flatten(3).flatten(0, 2).T.numpy()
                chosen = torch.from_numpy(entropy.choose_models(grouped, (-half, half - 1)))
                tensors["models"] = chosen.reshape(integers.shape[:3])
            models = self._models(tensors.get("models"), integers.shape)
        if self.calibration is not None:
            # Channels that do not vary: nothing to code, with or without a coder.
            integers[self._models(None, integers.shape) == entropy.DROPPED] = 0
        streams = []
        for layer in range(pair.shape[1]):
            values = integers[:, layer].flatten().numpy()
            if models is None:
                streams.append(quantise.pack(values, bits).tobytes())
            else:
                here = models[:, layer].flatten().numpy()
                streams.append(entropy.encode(values, here, self.coder, (-half, half - 1)))
        # An empty tensor has no bytes to point to; readers go by `sizes`.
        tensors["payload"] = torch.frombuffer(bytearray(b"".join(streams) or b"\0"), dtype=torch.uint8)
        return tensors, {"sizes": [len(stream) for stream in streams]}

    def _decode(self, tensors: Mapping[str, Tensor], details: Mapping[str, Any], full: Tensor) -> Tensor:
        shape = full.shape
        bits = BITS[self.name]
        half = 1 << (bits - 1)
        if self.calibration is None:
            check_tensor(tensors, "steps", torch.int8, (*shape[:3], shape[4]))
            steps = quantise.step_of(tensors["steps"])
        else:
            steps = self._steps()
        models = None
        if self.coder != "none":
            if self.calibration is None:
                check_tensor(tensors, "models", torch.uint8, shape[:3])
                if not bool(((tensors["models"] < _GROUPS) & (tensors["models"] % 64 < entropy.SCALES)).all()):
                    raise CompressorError("damaged: it names entropy models that do not exist")
            models = self._models(tensors.get("models"), shape)
        count = shape[0] * shape[2] * shape[3] * shape[4]
        integers = torch.empty(shape, dtype=torch.int64)
        for layer, data in enumerate(streams_of(tensors, details, shape[1])):
            if models is None:
                if len(data) != -(-count * bits // 8):
                    raise CompressorError(f"damaged: layer {layer} has {len(data)} bytes for {count} integers")
                values = quantise.unpack(np.frombuffer(data, dtype=np.uint8), bits, count)
            else:
                here = models[:, layer].flatten().numpy()
                values = entropy.decode(data, here, self.coder, (-half, half - 1))
            integers[:, layer] = torch.from_numpy(values).reshape(shape[0], *shape[2:])
        restored = quantise.dequantise(integers, steps)
        return full + restored if self.calibration is not None else restored

    def _steps(self) -> Tensor:
        return self._fitted().deviation * quantise.STEPS[BITS[self.name]]

    def _models(self, stored: Tensor | None, shape: Sequence[int]) -> Tensor:
        """The entropy model of every integer, uint8 `[2, layers, heads, tokens, head_size]`."""
        if stored is not None:
            return stored[..., None, None].expand(*shape)
        place = list(quantise.STEPS).index(BITS[self.name])
        return self._fitted().models[place].unsqueeze(3).expand(*shape)


class LowRank(Codec):
    """A token's keys and values as coefficients of the calibration's components, with bits by water-filling."""

    usual_coder = "ans"
    usual_rate = 0.25

    def _check(self) -> None:
        if self.calibration is None or self.coder == "none":
            raise CompressorError("lowrank needs a calibration (`compressor calibrate`) and an entropy coder")

    def _encode(self, pair: Tensor, memory: Memory) -> tuple[dict[str, Tensor], dict[str, Any]]:
        transform = self._fitted().transform
        tokens = flatten_tokens(pair.float() - self._fitted().means(memory))
        integers = transform.quantise(transform.project(tokens), self.level)
        models = np.broadcast_to(transform.models(self.level), integers.shape)
        data = entropy.encode(integers.reshape(-1), models.reshape(-1), self.coder)
        return {"payload": torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)}, {"sizes": [len(data)]}

    def _decode(self, tensors: Mapping[str, Tensor], details: Mapping[str, Any], full: Tensor) -> Tensor:
        (data,) = streams_of(tensors, details, 1)
        transform, tokens = self._fitted().transform, full.shape[3]
        models = np.tile(transform.models(self.level), tokens)
        integers = entropy.decode(data, models, self.coder).reshape(tokens, -1)
        centred = unflatten_tokens(transform.reconstruct(integers, self.level), full.shape[1:])
        return (full.double() + centred).float()
