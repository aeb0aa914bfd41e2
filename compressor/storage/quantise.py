"""Uniform scalar quantisation of keys and values, a step for each channel.

A channel is one dimension of one head of one layer, over the memory tokens. With N bits the levels are
(q + 1/2) * step for q = -2^(N-1) .. 2^(N-1) - 1. Steps are powers of two in quarter octaves (one byte each, stored with
the memory), or come from a calibration, which also subtracts each memory token's mean.

Every function takes keys or values as `[..., tokens, head_size]`. Dequantising multiplies float32 by float32 once, so
every machine with IEEE arithmetic gives the same bits.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

STEPS = {2: 0.9957, 3: 0.5860, 4: 0.3352, 8: 0.0308}
"""Bits to the step, in deviations, that is best for a Gaussian (Max, Quantizing for minimum distortion, 1960)."""
MANTISSAS = (16384, 19484, 23170, 27554)
"""2^(i/4) in units of 2^-14."""
CODES = (-128, 127)
"""Range of step codes: code c is a step of 2^(c/4)."""
_TRIED = 10


def step_of(codes: Tensor) -> Tensor:
    """Steps of codes, float32: code c is 2^(c/4), exactly the same on every machine."""
    codes = codes.to(torch.int64)
    mantissas = torch.tensor(MANTISSAS, dtype=torch.float32, device=codes.device)[codes % 4]
    return torch.ldexp(mantissas, torch.div(codes, 4, rounding_mode="floor") - 14)


def symbols(values: Tensor, steps: Tensor, bits: int) -> Tensor:
    """Integers -2^(bits-1) .. 2^(bits-1) - 1, int64, of values that share steps along the tokens.

    Args:
        values: `[..., tokens, head_size]`.
        steps: `[..., head_size]`.
    """
    half = 1 << (bits - 1)
    return torch.floor(values / steps.unsqueeze(-2)).clamp(-half, half - 1).to(torch.int64)


def dequantise(integers: Tensor, steps: Tensor) -> Tensor:
    """Values of integers, float32."""
    return (integers.to(torch.float32) + 0.5) * steps.unsqueeze(-2)


def fit_steps(values: Tensor, bits: int) -> Tensor:
    """Step codes with the least squared error for each channel, int8 `[..., head_size]`."""
    values = values.detach().float()
    largest = values.abs().amax(dim=-2) / (1 << (bits - 1))
    top = torch.ceil(4 * torch.log2(largest.clamp(min=2.0**-30))).clamp(CODES[0] + _TRIED, CODES[1] - 1).to(torch.int64)
    best = torch.full_like(largest, torch.inf)
    chosen = top.clone()
    # From one step above: values that were quantised before then come back as they are.
    for lower in range(-1, _TRIED):
        steps = step_of(top - lower)
        error = (dequantise(symbols(values, steps, bits), steps) - values).square().sum(dim=-2)
        chosen = torch.where(error < best, top - lower, chosen)
        best = torch.minimum(error, best)
    return chosen.to(torch.int8)


def pack(integers: np.ndarray, bits: int) -> np.ndarray:
    """Integers of a mid-rise quantiser in `bits` bits each, uint8, most significant bit first."""
    shifted = (integers + (1 << (bits - 1))).astype(np.uint8)
    planes = (shifted[:, None] >> np.arange(bits - 1, -1, -1, dtype=np.uint8)) & 1
    return np.packbits(planes.reshape(-1))


def unpack(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The `count` integers that `pack` was given, int64."""
    planes = np.unpackbits(data, count=count * bits).reshape(count, bits)
    return planes @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64)) - (1 << (bits - 1))
