"""Codecs: how the keys and values of a memory become bytes, and come back.

| codec                  | bits a value | what it stores                                                        |
|------------------------|--------------|-----------------------------------------------------------------------|
| float32, float16, bf16 | 32, 16, 16   | the values as they are                                                |
| int8, int4, int3, int2 | 8, 4, 3, 2   | integers, and a step for each channel unless a calibration has it     |
| lowrank:RATE           | about RATE   | principal components (needs a calibration), entropy coded             |

`int4+ans`, `int4+range`, `int4+huffman` entropy-code the integers. An option leaves out layers
(`drop_layers`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from compressor.errors import CompressorError
from compressor.storage import entropy, quantise
from compressor.storage.calibration import Calibration, flatten_tokens, unflatten_tokens
from compressor.storage.entropy import Coder

if TYPE_CHECKING:
    from compressor.model.memory import Memory

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bf16": torch.bfloat16}
BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
NAMES = (*FLOATS, *BITS, "lowrank")
DEFAULT_RATE = 0.25
_GROUPS = 64 * entropy.SHAPES


@dataclass(frozen=True)
class Codec:
    """A way of coding memories; `parse` makes one from a name.

    Attributes:
        name: one of `NAMES`.
        coder: entropy coder of the integers.
        calibration: fitted statistics; `lowrank` needs them, integers without them store a step for each channel.
        level: step of `lowrank` is 2^(level/4).
        drop_layers: layers that are not stored: they come back as the calibration's means, or zeros.
    """

    name: str
    coder: Coder = "none"
    calibration: Calibration | None = None
    level: int = 0
    drop_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise CompressorError(f"there is no codec {self.name!r}: choose one of {', '.join(NAMES)}")
        entropy.check_coder(self.coder)
        if self.name in FLOATS and self.coder != "none":
            raise CompressorError(f"{self.name} is not entropy-coded: leave +{self.coder} out, or choose int8")
        if self.name == "lowrank" and (self.calibration is None or self.coder == "none" or self.drop_layers):
            raise CompressorError(
                "lowrank needs a calibration (`compressor calibrate`) and an entropy coder, and chooses by itself what "
                "to drop in which layer"
            )

    @staticmethod
    def parse(
        text: str,
        calibration: Calibration | str | Path | None = None,
        drop_layers: Sequence[int] = (),
    ) -> Codec:
        """The codec of a name such as `bf16`, `int4`, `int3+ans`, `lowrank`, `lowrank:0.2+range`.

        Args:
            text: NAME[:RATE][+CODER]; RATE is the most bits a value on the calibration's passages.
            calibration: or the path of its file.

        Raises:
            CompressorError: there is no such codec, or it does not go with the options.
        """
        if isinstance(calibration, str | Path):
            calibration = Calibration.load(calibration)
        head, _, coder = text.partition("+")
        name, _, rate = head.partition(":")
        level = 0
        if name == "lowrank":
            coder = coder or "ans"
            if calibration is not None:
                try:
                    level = calibration.level(float(rate) if rate else DEFAULT_RATE)
                except ValueError as error:
                    if isinstance(error, CompressorError):
                        raise
                    raise CompressorError(f"the rate of codec {text!r} is no number: write lowrank:0.25") from None
        elif name in FLOATS and not drop_layers:
            calibration = None  # nothing in the file would depend on it
        if rate and name != "lowrank":
            raise CompressorError(f"codec {text!r}: only lowrank takes a rate")
        drop = tuple(sorted(set(drop_layers)))
        return Codec(name, cast("Coder", coder or "none"), calibration, level, drop)

    def record(self) -> dict[str, Any]:
        """What a file says about the codec."""
        named = self.calibration.digest if self.calibration is not None else None
        return {
            "name": self.name,
            "coder": self.coder,
            "calibration": named,
            "level": self.level,
            "drop_layers": list(self.drop_layers),
        }

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
        drop = tuple(record["drop_layers"])
        if any(type(layer) is not int for layer in (record["level"], *drop)) or abs(record["level"]) > 127:
            raise CompressorError("damaged: the codec's settings are no whole numbers")
        return Codec(record["name"], record["coder"], calibration if named else None, record["level"], drop)

    def prepare(self, memory: Memory) -> Memory:
        """The memory that is stored, checked against the calibration."""
        layers = memory.keys.shape[0]
        if any(not 0 <= layer < layers for layer in self.drop_layers) or len(self.drop_layers) == layers:
            raise CompressorError(f"drop_layers = {list(self.drop_layers)}: the memory has layers 0 to {layers - 1}")
        if self.calibration is not None:
            self.calibration.check(memory)
        if not bool(torch.isfinite(memory.keys).all() and torch.isfinite(memory.values).all()):
            raise CompressorError("this memory holds values that are not finite, so it cannot be stored")
        return memory

    def encode(self, memory: Memory) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors that hold a prepared memory, and what a reader needs to know besides shape and codec."""
        pair = torch.stack([memory.keys, memory.values]).detach().cpu()
        kept = self._kept(pair.shape[1])
        if self.name in FLOATS:
            keys, values = pair[:, kept].to(FLOATS[self.name])
            if not bool(torch.isfinite(keys).all() and torch.isfinite(values).all()):
                raise CompressorError(f"this memory has values too large for {self.name}: use bf16 or float32")
            return {"keys": keys, "values": values}, {}
        pair = pair.float()
        if self.name == "lowrank":
            transform = self._fitted().transform
            tokens = flatten_tokens(pair - self._fitted().means(memory))
            integers = transform.quantise(transform.project(tokens), self.level)
            models = np.broadcast_to(transform.models(self.level), integers.shape)
            data = entropy.encode(integers.reshape(-1), models.reshape(-1), self.coder)
            return {"payload": torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)}, {"sizes": [len(data)]}
        return self._encode_integers(pair, memory, kept)

    def _encode_integers(
        self, pair: Tensor, memory: Memory, kept: list[int]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        bits = BITS[self.name]
        half = 1 << (bits - 1)
        tensors: dict[str, Tensor] = {}
        if self.calibration is not None:
            pair = (pair - self.calibration.means(memory))[:, kept]
            steps = self._steps()[:, kept]
        else:
            pair = pair[:, kept]
            tensors["steps"] = quantise.fit_steps(pair, bits)
            steps = quantise.step_of(tensors["steps"])
        integers = quantise.symbols(pair, steps, bits)  # [2, kept layers, heads, tokens, head size]
        models = None
        if self.coder != "none":
            if self.calibration is None:
                grouped = integers.flatten(3).flatten(0, 2).T.numpy()
                chosen = torch.from_numpy(entropy.choose_models(grouped, (-half, half - 1)))
                tensors["models"] = chosen.reshape(integers.shape[:3])
            models = self._models(tensors.get("models"), integers.shape, kept)
        if self.calibration is not None:
            # Channels that do not vary: nothing to code, with or without a coder.
            integers[self._models(None, integers.shape, kept) == entropy.DROPPED] = 0
        streams = []
        for layer in range(len(kept)):
            values = integers[:, layer].flatten().numpy()
            if models is None:
                streams.append(quantise.pack(values, bits).tobytes())
            else:
                here = models[:, layer].flatten().numpy()
                streams.append(entropy.encode(values, here, self.coder, (-half, half - 1)))
        # An empty tensor has no bytes to point to; readers go by `sizes`.
        tensors["payload"] = torch.frombuffer(bytearray(b"".join(streams) or b"\0"), dtype=torch.uint8)
        return tensors, {"sizes": [len(stream) for stream in streams]}

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
        kept = self._kept(layers)
        if self.calibration is not None:
            wanted = (layers, heads, size)
            if (*self.calibration.mean.shape[1:3], self.calibration.mean.shape[4]) != wanted or (
                max(slots) >= self.calibration.slots
            ):
                raise CompressorError("damaged: the memory's shape is not the calibration's")
        full = torch.zeros(2, layers, heads, tokens, size)
        if self.calibration is not None:
            full = self.calibration.mean[:, :, :, list(slots)].clone()
        if self.name in FLOATS:
            wanted_shape = (len(kept), heads, tokens, size)
            for name in ("keys", "values"):
                _check_tensor(tensors, name, FLOATS[self.name], wanted_shape)
            full = full.to(FLOATS[self.name])
            full[:, kept] = torch.stack([tensors["keys"], tensors["values"]])
        elif self.name == "lowrank":
            (data,) = _streams(tensors, details, 1)
            transform = self._fitted().transform
            models = np.tile(transform.models(self.level), tokens)
            integers = entropy.decode(data, models, self.coder).reshape(tokens, -1)
            centred = unflatten_tokens(transform.reconstruct(integers, self.level), shape)
            full = (full.double() + centred).float()
        else:
            restored = self._decode_integers(tensors, details, (2, len(kept), heads, tokens, size), kept)
            full[:, kept] = full[:, kept] + restored if self.calibration is not None else restored
        if not bool(torch.isfinite(full).all()):
            raise CompressorError("damaged: it holds values that are not finite")
        return full[0], full[1]

    def _decode_integers(
        self, tensors: Mapping[str, Tensor], details: Mapping[str, Any], shape: tuple[int, ...], kept: list[int]
    ) -> Tensor:
        bits = BITS[self.name]
        half = 1 << (bits - 1)
        if self.calibration is None:
            _check_tensor(tensors, "steps", torch.int8, (*shape[:3], shape[4]))
            steps = quantise.step_of(tensors["steps"])
        else:
            steps = self._steps()[:, kept]
        models = None
        if self.coder != "none":
            if self.calibration is None:
                _check_tensor(tensors, "models", torch.uint8, shape[:3])
                if not bool(((tensors["models"] < _GROUPS) & (tensors["models"] % 64 < entropy.SCALES)).all()):
                    raise CompressorError("damaged: it names entropy models that do not exist")
            models = self._models(tensors.get("models"), shape, kept)
        count = shape[0] * shape[2] * shape[3] * shape[4]
        integers = torch.empty(shape, dtype=torch.int64)
        for layer, data in enumerate(_streams(tensors, details, len(kept))):
            if models is None:
                if len(data) != -(-count * bits // 8):
                    raise CompressorError(f"damaged: layer {kept[layer]} has {len(data)} bytes for {count} integers")
                values = quantise.unpack(np.frombuffer(data, dtype=np.uint8), bits, count)
            else:
                here = models[:, layer].flatten().numpy()
                values = entropy.decode(data, here, self.coder, (-half, half - 1))
            integers[:, layer] = torch.from_numpy(values).reshape(shape[0], *shape[2:])
        return quantise.dequantise(integers, steps)

    def _kept(self, layers: int) -> list[int]:
        if any(not 0 <= layer < layers for layer in self.drop_layers) or len(self.drop_layers) >= layers:
            raise CompressorError(f"damaged: layers {list(self.drop_layers)} of {layers} are left out")
        return [layer for layer in range(layers) if layer not in self.drop_layers]

    def _fitted(self) -> Calibration:
        assert self.calibration is not None  # __post_init__ refuses lowrank without one
        return self.calibration

    def _steps(self) -> Tensor:
        return self._fitted().deviation * quantise.STEPS[BITS[self.name]]

    def _models(self, stored: Tensor | None, shape: Sequence[int], kept: list[int]) -> Tensor:
        """The entropy model of every integer, uint8 `[2, kept layers, heads, tokens, head_size]`."""
        if stored is not None:
            return stored[..., None, None].expand(*shape)
        place = list(quantise.STEPS).index(BITS[self.name])
        return self._fitted().models[place][:, kept].unsqueeze(3).expand(*shape)


def _check_tensor(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, shape: Sequence[int]) -> None:
    found = tensors.get(name)
    if found is None or found.dtype != dtype or tuple(found.shape) != tuple(shape):
        got = "missing" if found is None else f"{found.dtype} {tuple(found.shape)}"
        raise CompressorError(f"damaged: {name} is {got}, not {dtype} {tuple(shape)}")


def _streams(tensors: Mapping[str, Tensor], details: Mapping[str, Any], count: int) -> list[bytes]:
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
