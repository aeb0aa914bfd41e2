"""From pieces of text to the tensors of one micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

WIDTH_MULTIPLE = 8
"""Widths of training batches are multiples of this: kernels are built and kept for each shape (on a CPU, unbounded
shapes cost gigabytes), and tensor cores like it too."""
IGNORED = -100
"""Label of positions without a loss."""


def regeneration_pair(bos: int, eos: int, passage: Sequence[int]) -> tuple[list[int], list[int]]:
    """Decoder input and labels for writing the passage: `BOS passage` gives `passage EOS`."""
    return [bos, *passage], [*passage, eos]


def continuation_pair(last: int, following: Sequence[int]) -> tuple[list[int], list[int]]:
    """Decoder input and labels for what follows the passage, whose last token starts the decoder."""
    return [last, *following[:-1]], list(following)


def answer_pair(prompt: Sequence[int], answer: Sequence[int], eos: int) -> tuple[list[int], list[int]]:
    """Decoder input and labels for an answer: `prompt answer` gives `answer EOS` after the prompt."""
    return [*prompt, *answer], [*[IGNORED] * (len(prompt) - 1), *answer, eos]


def stack_pairs(pairs: Sequence[tuple[list[int], list[int]]]) -> dict[str, Any]:
    """Pad decoder inputs and labels: int64 `[batch, width]` each, and the number of targets."""
    width = -(-max(len(ids) for ids, _ in pairs) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    inputs = torch.zeros(len(pairs), width, dtype=torch.int64)
    labels = torch.full((len(pairs), width), IGNORED, dtype=torch.int64)
    for row, (ids, wanted) in enumerate(pairs):
        inputs[row, : len(ids)] = torch.tensor(ids)
        labels[row, : len(wanted)] = torch.tensor(wanted)
    return {"inputs": inputs, "labels": labels, "targets": int((labels != IGNORED).sum())}
