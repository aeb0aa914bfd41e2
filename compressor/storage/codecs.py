"""The codecs: values as they are (`float32`, `float16`, `bf16`), integers of a step for each channel, packed or
entropy-coded (`int8`, `int4`, `int3`, `int2`), and principal components by a calibration (`lowrank:RATE`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from compressor.errors import CompressorError
from compressor.storage import entropy, quantise
from compressor.storage.calibration import flatten_tokens, unflatten_tokens
from compressor.storage.codec import Codec, check_tensor, streams_of

if TYPE_CHECKING:
    from compressor.model.memory import Memory

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bf16": torch.bfloat16}
BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
_GROUPS = 64 * entropy.SHAPES


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
