"""What codecs know beforehand: statistics of a compressor's memories, fitted once on passages it is like to see.

A calibration is a small checked safetensors file. Memory files name the calibration they need by its digest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compressor.errors import CompressorError
from compressor.model.table import LAYOUTS
from compressor.provenance import VERSION
from compressor.storage import container, entropy
from compressor.storage.lowrank import Transform
from compressor.storage.quantise import STEPS

if TYPE_CHECKING:
    from compressor.model.memory import Memory

FORMAT = 1
_WHAT = "a calibration (`compressor calibrate` writes one)"
_TENSORS = ("mean", "deviation", "models", "synthesis", "exponents", "weights", "codes", "shapes", "levels", "rates")


@dataclass(frozen=True)
class Calibration:
    """Statistics of memory tokens.

    Attributes:
        mean: of each memory token's keys and values, float32 `[2, layers, kv_heads, slots, head_size]`.
        deviation: of each channel about its mean, float32 `[2, layers, kv_heads, head_size]`.
        models: entropy model of each channel's integers with as many bits as `STEPS` lists, uint8
            `[len(STEPS), 2, layers, kv_heads, head_size]`; `entropy.DROPPED` for channels that do not vary.
        transform: principal components.
        levels, rates: steps of the low-rank codec (2^(level/4)) and the bits a value they take, finest first.
        base, layout, most, compressor: of the memories it was fitted on, as in `Memory`.
        passages: how many it was fitted on.
    """

    mean: Tensor
    deviation: Tensor
    models: Tensor
    transform: Transform
    levels: tuple[int, ...]
    rates: tuple[float, ...]
    base: str
    layout: str
    most: int
    compressor: str
    passages: int

    @cached_property
    def digest(self) -> str:
        """SHA-256 by which memory files name this calibration."""
        return self._serialise()[1]

    @property
    def slots(self) -> int:
        """Memory tokens of a segment that it knows."""
        return self.mean.shape[3]

    def _serialise(self) -> tuple[bytes, str]:
        settings = {
            "format": FORMAT,
            "version": VERSION,
            **{name: getattr(self, name) for name in ("base", "layout", "most", "compressor", "passages")},
        }
        tensors = {name: getattr(self, name) for name in _TENSORS[:3]}
        tensors |= {name: getattr(self.transform, name) for name in _TENSORS[3:8]}
        tensors |= {"levels": torch.tensor(self.levels, dtype=torch.int16), "rates": torch.tensor(self.rates)}
        return container.serialise("calibration", settings, tensors)

    def save(self, path: str | Path) -> None:
        """Write it as a safetensors file, atomically."""
        container.write(path, self._serialise()[0])

    @staticmethod
    def load(path: str | Path) -> Calibration:
        """Read a file that `save` wrote.

        Raises:
            CompressorError: missing, foreign, newer or damaged.
        """
        content = container.read(path, "calibration", _WHAT, FORMAT)
        settings, tensors = content.settings, content.tensors
        try:
            found = Calibration(
                tensors["mean"],
                tensors["deviation"],
                tensors["models"],
                Transform(*(tensors[name] for name in _TENSORS[3:8])),
                tuple(tensors["levels"].tolist()),
                tuple(tensors["rates"].tolist()),
                str(settings["base"]),
                str(settings["layout"]),
                int(settings["most"]),
                str(settings["compressor"]),
                int(settings["passages"]),
            )
            found._check()
        except (KeyError, TypeError, ValueError) as error:
            raise CompressorError(f"{path} is not a calibration, or is damaged: {error}") from None
        # What names a file is what it says: serialised again it might differ in another version.
        found.__dict__["digest"] = settings["sha256"]
        return found

    def _check(self) -> None:
        kinds, layers, heads, slots, size = self.mean.shape
        channels, (rank, wide) = kinds * layers * heads * size, self.transform.synthesis.shape
        shapes = {
            "mean": (2, layers, heads, slots, size),
            "deviation": (2, layers, heads, size),
            "models": (len(STEPS), 2, layers, heads, size),
        }
        parts = {"synthesis": (rank, channels), "exponents": (wide,), "weights": (wide,), "codes": (rank,)}
        types = {"mean": torch.float32, "deviation": torch.float32, "models": torch.uint8, "synthesis": torch.int16}
        types |= {"exponents": torch.int8, "weights": torch.float32, "codes": torch.int16, "shapes": torch.uint8}
        for name, shape in {**shapes, **parts, "shapes": (rank,)}.items():
            tensor = getattr(self if name in shapes else self.transform, name)
            if tensor.shape != shape or tensor.dtype != types[name]:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}")
        if not all(bool(torch.isfinite(t).all()) for t in (self.mean, self.deviation, self.transform.weights)):
            raise ValueError("it holds numbers that are not finite")
        coded = self.models[self.models != entropy.DROPPED]
        known = bool((coded % 64 < entropy.SCALES).all() and (coded < 64 * entropy.SHAPES).all())
        if not known or not bool((self.transform.shapes < entropy.SHAPES).all()):
            raise ValueError("it names entropy models that do not exist")
        if len(self.levels) != len(self.rates) or not self.levels:
            raise ValueError("it lists no rates")

    def check(self, memory: Memory) -> None:
        """Raise a `CompressorError` unless it was fitted on memories of this kind."""
        layers, heads, _, size = memory.keys.shape
        for name in ("base", "layout", "most"):
            if getattr(self, name) != getattr(memory, name):
                raise CompressorError(
                    f"the calibration was fitted on memories of another {name} ({str(getattr(self, name))[:12]}) than "
                    f"this one ({str(getattr(memory, name))[:12]}): run `compressor calibrate` for this compressor"
                )
        # Of NAME@HASH the hash counts: one compressor goes by several names.
        ours, theirs = (one.rpartition("@")[2] for one in (self.compressor, memory.compressor))
        if self.compressor and memory.compressor and ours != theirs:
            raise CompressorError(
                f"the calibration was fitted on memories of another compressor ({self.compressor}) than this one "
                f"({memory.compressor}): run `compressor calibrate` for this compressor"
            )
        tokens = {segment.tokens for segment in memory.segments}
        fits = max(tokens) <= self.slots if LAYOUTS[self.layout].truncatable else tokens == {self.slots}
        if (layers, heads, size) != (*self.mean.shape[1:3], self.mean.shape[4]) or not fits:
            raise CompressorError(
                f"the calibration was fitted on memories of {self.slots} tokens a segment in {self.mean.shape[1]} "
                f"layers, this one has {max(tokens)} in {layers}: run `compressor calibrate --tokens {max(tokens)}`"
            )

    def means(self, memory: Memory) -> Tensor:
        """The mean of each of the memory's tokens, float32 `[2, layers, kv_heads, tokens, head_size]`."""
        slots = [slot for segment in memory.segments for slot in range(segment.tokens)]
        return self.mean[:, :, :, slots]

    def level(self, rate: float) -> int:
        """The finest step of the low-rank codec that takes at most `rate` bits a value."""
        for level, bits in zip(self.levels, self.rates, strict=True):
            if bits <= rate:
                return level
        raise CompressorError(
            f"the low-rank codec cannot code in {rate} bits a value: with this calibration the least is "
            f"{self.rates[-1]:.4f}"
        )


def flatten_tokens(pair: Tensor) -> Tensor:
    """`[..., 2, layers, kv_heads, tokens, head_size]` as a vector for each memory token, `[..., tokens, channels]`."""
    return pair.movedim(-2, -5).flatten(-4)


def unflatten_tokens(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `flatten_tokens` for keys and values of `shape` `[layers, kv_heads, tokens, head_size]`."""
    layers, heads, count, size = shape
    return tokens.reshape(*tokens.shape[:-2], count, 2, layers, heads, size).movedim(-5, -2)
