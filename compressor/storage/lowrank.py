"""A linear transform over layers and heads, and bits by water-filling.

A memory token is one vector: its keys and values in every layer and head. A memory's vectors lie close to a plane of
few dimensions (layers read the same hidden state), so principal components hold them in few numbers. This is the
transform of KVTC (Staniszewski and Łańcucki, arXiv 2511.01815), with two changes: channels are weighted by how much the
decoder's loss depends on them, and one quantiser step for all components replaces the search for bit widths. With
entropy coding that is reverse water-filling: components whose variance lies under the water level (step^2 / 12) get no
bits, the others log2(deviation / step) each (Cover and Thomas, Elements of Information Theory, section 10.3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compressor.errors import CompressorError
from compressor.storage import entropy
from compressor.storage.quantise import CODES, MANTISSAS

_FIT_STEP = -8
"""Quarter octaves between a component's deviation and the step its model is fitted at."""
_FIT_ALPHABET = (-64, 63)
_RESOLUTION = 14
_LARGEST = 1 << 34
FEWEST_STEPS = 1
"""Scale of the first model that is coded: below it a deviation is at most .25 steps, under the water level."""


def step_size(level: int) -> float:
    """The quantiser's step at a level, about 2^(level/4)."""
    return MANTISSAS[level % 4] * 2.0 ** (level // 4 - _RESOLUTION)


@dataclass(frozen=True)
class Transform:
    """Components of centred memory tokens.

    Attributes:
        synthesis: components as integers, int16 `[rank, channels]`.
        exponents: power of two that a channel's integers stand for, int8 `[channels]`.
        weights: sensitivity of the decoder to each channel, float32 `[channels]`.
        codes: deviation of each component in quarter octaves, int16 `[rank]`.
        shapes: shape of each component's distribution (`entropy`), uint8 `[rank]`.
    """

    synthesis: Tensor
    exponents: Tensor
    weights: Tensor
    codes: Tensor
    shapes: Tensor

    def project(self, centred: Tensor) -> Tensor:
        """Components of centred tokens, float64 `[tokens, rank]`, from float `[tokens, channels]`."""
        return centred.double() @ (self._basis() * self.weights.double().square()).T

    def quantise(self, components: Tensor, level: int) -> np.ndarray:
        """Integers of components (`project`) at step 2^(level/4), int64 `[tokens, rank]`."""
        steps = components.cpu().numpy() / step_size(level)
        integers = np.rint(steps).clip(-_LARGEST, _LARGEST).astype(np.int64)
        integers[:, self.models(level) == entropy.DROPPED] = 0
        return integers

    def reconstruct(self, integers: np.ndarray, level: int) -> Tensor:
        """Centred tokens of integers, float64 `[tokens, channels]`, the same on every machine.

        All factors are integers held in float64, and no sum reaches 2^53, so the product is exact in any order.
        """
        if int(np.abs(integers).max(initial=0)) * MANTISSAS[-1] * (1 << 15) * max(1, integers.shape[1]) >= 1 << 53:
            # Far out of the calibrated range: exact still, in whole numbers.
            exact = integers.astype(object) * MANTISSAS[level % 4] @ self.synthesis.numpy().astype(object)
            total = torch.from_numpy(exact.astype(np.float64))
        else:
            scaled = torch.from_numpy(integers * MANTISSAS[level % 4]).double()
            total = scaled @ self.synthesis.cpu().double()
        return torch.ldexp(total, self.exponents.cpu().to(torch.int64) + (level // 4 - _RESOLUTION))

    def models(self, level: int) -> np.ndarray:
        """Entropy model of each component at step 2^(level/4), uint8 `[rank]`; integer arithmetic only."""
        scales = self.codes.cpu().numpy().astype(np.int64) - level + entropy.UNIT_SCALE
        models = self.shapes.cpu().numpy().astype(np.int64) * 64 + np.clip(scales, 0, entropy.SCALES - 1)
        return np.where(scales < FEWEST_STEPS, entropy.DROPPED, models).astype(np.uint8)

    def bits(self, components: Tensor, level: int) -> float:
        """Bits a value of tokens with these components at a step, as the models count them."""
        integers, models = self.quantise(components, level), self.models(level)
        total = 0.0
        for column in np.flatnonzero(models != entropy.DROPPED).tolist():
            model, limit = int(models[column]), entropy.reach(int(models[column]))
            places = np.clip(integers[:, column], -limit, limit) + limit
            total += float((entropy.PRECISION - np.log2(entropy.table(model)[places])).sum())
        return total / (len(components) * self.synthesis.shape[1])

    def _basis(self) -> Tensor:
        return torch.ldexp(self.synthesis.double(), self.exponents.to(torch.int64))


def fit(centred: Tensor, weights: Tensor, rank: int) -> Transform:
    """Principal components of weighted tokens.

    Args:
        centred: tokens with their slots' means subtracted, float32 `[samples, channels]`.
        weights: how much a channel's error matters, float32 `[channels]`, all above 0.
        rank: most components.

    Raises:
        CompressorError: fewer than two samples, or none varies.
    """
    samples, channels = centred.shape
    rank = min(rank, channels, samples - 1)
    weighted = centred * weights
    if rank < 1:
        raise CompressorError(f"cannot fit principal components to {samples} memory token: give more passages")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if channels <= 1024:
            _, vectors = torch.linalg.eigh((weighted.T @ weighted).double())
            basis = vectors.flip(1)[:, :rank].float()
        else:  # randomised: a full decomposition takes memory and time with the square and cube of the channels
            basis = torch.svd_lowrank(weighted, q=min(rank + 32, channels, samples), niter=4)[2][:, :rank]
    deviations = (weighted @ basis).square().mean(dim=0).sqrt()
    # What hardly varies at all is rounding noise of the decomposition.
    kept = deviations > 2.0**-20 * deviations.max()
    basis, deviations = basis[:, kept], deviations[kept]
    rows = (basis / weights[:, None]).T  # back to channels
    largest = rows.abs().amax(dim=0).clamp(min=2.0**-60)
    exponents = torch.ceil(torch.log2(largest) - 15 + 1e-6).clamp(-128, 127)
    integers = torch.ldexp(rows, -exponents.to(torch.int32)).round().clamp(-32767, 32767)
    codes, shapes = _fit_models((weighted @ basis).numpy(), deviations.numpy())
    return Transform(
        integers.to(torch.int16), exponents.to(torch.int8), weights, torch.from_numpy(codes), torch.from_numpy(shapes)
    )


def _fit_models(components: np.ndarray, deviations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Deviation codes and shapes of components `[samples, rank]`, by the cost of coding them at a quarter-deviation."""
    steps = np.round(4 * np.log2(np.maximum(deviations, 1e-30))) + _FIT_STEP
    integers = np.floor(components / 2.0 ** (steps / 4)).clip(*_FIT_ALPHABET).astype(np.int64)
    models = entropy.choose_models(integers, _FIT_ALPHABET).astype(np.int64)
    codes = np.clip(steps + models % 64 - entropy.UNIT_SCALE, *CODES)
    return codes.astype(np.int16), (models // 64).astype(np.uint8)
