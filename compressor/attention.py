"""Attention for training on CPUs, registered with transformers under the name `grouped`.

torch's fused kernel takes six times as long for its backward pass in bfloat16 on a CPU as plain products do (12 x 9
heads of 96 x 96 positions: 30 against 5 ms; `benchmarks/training_step.py`). These keep the scores, which at a
compressor's widths are small, and heads that share keys and values are one product rather than copies of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

GROUPED = "grouped"


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Softmax attention, as transformers calls it.

    Args:
        query: `[batch, heads, queries, head_size]`.
        key, value: `[batch, kv_heads, keys, head_size]`.
        attention_mask: bool (True = may attend) or additive, `[batch, 1, queries, keys]`; None for causal.

    Returns:
        `[batch, queries, heads, head_size]`, and no weights.
    """
    batch, heads, queries, size = query.shape
    groups = heads // key.shape[1]
    grouped = (query * (size**-0.5 if scaling is None else scaling)).reshape(batch, -1, groups * queries, size)
    scores = (grouped @ key.transpose(2, 3)).view(batch, -1, groups, queries, key.shape[2])
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if attention_mask is None:
        causal = torch.ones(queries, key.shape[2], dtype=torch.bool, device=query.device)
        attention_mask = causal.tril(key.shape[2] - queries)[None, None]
    if attention_mask.dtype == torch.bool:
        lowest = torch.finfo(scores.dtype).min
        attention_mask = torch.zeros_like(attention_mask, dtype=scores.dtype).masked_fill(~attention_mask, lowest)
    # torch sums a bfloat16 softmax in float32.
    weights = (scores + attention_mask[:, :, None]).softmax(-1)
    weights = nn.functional.dropout(weights, dropout, module.training)
    read = weights.view(batch, -1, groups * queries, key.shape[2]) @ value
    return read.view(batch, heads, queries, value.shape[3]).transpose(1, 2), None


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)
