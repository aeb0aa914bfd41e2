"""What training on a CPU computes in another way than transformers: attention and RMSNorm, both tested equal.

Attention, which transformers knows as `grouped`: torch's fused kernel takes six times as long for its backward pass in
bfloat16 on a CPU as plain products do (12 x 9 heads of 96 x 96 positions: 30 against 5 ms;
`benchmarks/training_step.py`). These keep the scores, which at a compressor's widths are small, and heads that share
keys and values are one product rather than copies of them. Where nothing is to be differentiated torch's kernel is the
faster one, two to four times from 128 positions on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED = "grouped"
"""Name of `grouped_attention` among transformers' implementations."""


@dataclass(frozen=True)
class Sharing:
    """Which rows read which context."""

    place: Tensor
    """Rows of each context, int64 `[contexts, most]`, filled up with any."""
    back: Tensor
    """Where each row is in `place`, flattened, int64 `[rows]`."""

    @staticmethod
    def of(owners: Tensor, contexts: int) -> Sharing:
        """Of the contexts of rows, int64 `[rows]`."""
        counts = torch.bincount(owners, minlength=contexts)
        order = owners.argsort(stable=True)
        rank = torch.arange(len(owners), device=owners.device) - (counts.cumsum(0) - counts)[owners[order]]
        most = int(counts.max())
        flat = torch.zeros(contexts * most, dtype=torch.int64, device=owners.device)
        where = owners[order] * most + rank
        flat[where] = order
        back = torch.empty_like(owners)
        back[order] = where
        return Sharing(flat.view(contexts, most), back)


@dataclass(frozen=True)
class Context:
    """One layer's keys and values `[contexts, kv_heads, slots, head_size]`, each read by several rows."""

    keys: Tensor
    values: Tensor
    sharing: Sharing

    def scores(self, queries: Tensor) -> Tensor:
        """Products of queries `[rows, kv_heads, n, head_size]` with keys, `[rows, kv_heads, n, slots]`."""
        return self._each(queries, self.keys.transpose(2, 3))

    def read(self, weights: Tensor) -> Tensor:
        """Values by their weights `[rows, kv_heads, n, slots]`: `[rows, kv_heads, n, head_size]`."""
        return self._each(weights, self.values)

    def _each(self, of_rows: Tensor, of_contexts: Tensor) -> Tensor:
        """The product of each row's matrices with its context's, without a copy of these."""
        place, back = self.sharing.place, self.sharing.back
        count, most = place.shape
        _, heads, width, size = of_rows.shape
        apart = of_rows[place].transpose(1, 2).reshape(count, heads, most * width, size)
        found = (apart @ of_contexts).view(count, heads, most, width, -1)
        return found.transpose(1, 2).flatten(0, 1)[back]


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
    context: Context | None = getattr(key, "context", None)
    batch, heads, queries, size = query.shape
    if context is None and softcap is None:
        if query.device.type != "cpu":
            return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
        differentiated = torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, value))
        # In float64, for lossless coding, what is computed stays as it is.
        if not differentiated and query.dtype != torch.float64 and attention_mask is not None:
            read = nn.functional.scaled_dot_product_attention(
                query, key, value, attention_mask, scale=scaling, enable_gqa=True
            )
            return read.transpose(1, 2), None
    groups = heads // key.shape[1]
    grouped = (query * (size**-0.5 if scaling is None else scaling)).reshape(batch, -1, groups * queries, size)
    scores = grouped @ key.transpose(2, 3)
    if context is not None:
        scores = torch.cat([context.scores(grouped), scores], dim=-1)
    scores = scores.view(batch, -1, groups, queries, scores.shape[-1])
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
    if dropout and module.training:  # even without effect the call would cost as much as a product of a single token
        weights = nn.functional.dropout(weights, dropout)
    weights = weights.view(batch, -1, groups * queries, scores.shape[-1])
    if context is None:
        read = weights @ value
    else:
        read = weights[..., -key.shape[2] :] @ value + context.read(weights[..., : -key.shape[2]])
    return read.view(batch, heads, queries, value.shape[3]).transpose(1, 2), None


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """`x / rms(x) * weight` of `[..., hidden]` and `1 / rms(x)`; sums in float32, as transformers has them."""
    wide = x.float()
    scale = wide.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
    return weight * (wide * scale).to(x.dtype), scale


class _FrozenRMSNorm(torch.autograd.Function):
    """`x / rms(x) * weight` for a weight without a gradient, in two passes over the input rather than six."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """See `_rms_norm`."""
        normalised, scale = _rms_norm(x, weight, epsilon)
        ctx.save_for_backward(x, weight, scale)
        return normalised

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        direction, gradient = x.float() * scale, (upstream * weight).float()
        along = (gradient * direction).mean(-1, keepdim=True)
        return gradient.addcmul_(direction, along, value=-1).mul_(scale).to(x.dtype), None, None


@torch.no_grad()
def lighten_norms(model: nn.Module) -> int:
    """Give the model's plain RMSNorms, whose weights must be frozen, a lighter backward pass; returns how many.

    Which are plain is tried: those that give what `_FrozenRMSNorm` gives, to the last digit.
    """
    changed = 0
    for module in model.modules():
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        weight = getattr(module, "weight", None)
        if not type(module).__name__.endswith("RMSNorm") or weight is None or not isinstance(epsilon, float):
            continue
        sample = torch.linspace(-3, 2, 3 * len(weight), dtype=weight.dtype, device=weight.device).view(3, -1)
        if torch.equal(module(sample), _FrozenRMSNorm.apply(sample, weight, epsilon)):
            module.forward = partial(_normalised, module, epsilon)
            changed += 1
    return changed


def _normalised(module: Any, epsilon: float, x: Tensor) -> Tensor:
    if not x.requires_grad:  # an autograd function takes as long as the norm of a few rows
        return _rms_norm(x, module.weight, epsilon)[0]
    return _FrozenRMSNorm.apply(x, module.weight, epsilon)


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)
