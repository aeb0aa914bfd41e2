"""Codecs `float32`, `float16` and `bf16`: the values as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compressor.errors import CompressorError
from compressor.storage.codec import Codec, check_tensor

if TYPE_CHECKING:
    from compressor.model.memory import Memory

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bf16": torch.bfloat16}


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
