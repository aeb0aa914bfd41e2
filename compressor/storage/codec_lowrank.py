"""Codec `lowrank:RATE`: principal components by a calibration, entropy-coded at about RATE bits a value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from compressor.errors import CompressorError
from compressor.storage import entropy
from compressor.storage.calibration import flatten_tokens, unflatten_tokens
from compressor.storage.codec import Codec, streams_of

if TYPE_CHECKING:
    from compressor.model.memory import Memory


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
