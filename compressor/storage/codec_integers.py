"""Codecs `int8`, `int4`, `int3` and `int2`: integers of a step for each channel, packed or entropy-coded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from compressor.errors import CompressorError
from compressor.storage import entropy, quantise
from compressor.storage.codec import Codec, check_tensor, streams_of

if TYPE_CHECKING:
    from compressor.model.memory import Memory

BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
_GROUPS = 64 * entropy.SHAPES


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
