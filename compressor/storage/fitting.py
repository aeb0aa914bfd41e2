"""Fitting a calibration: compress passages, take statistics, measure what the decoder is sensitive to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compressor.data.batches import regeneration_pair, stack_pairs
from compressor.errors import CompressorError
from compressor.model.decoder import label_nats
from compressor.model.memory import Memory, memory_prefix
from compressor.model.network import Network
from compressor.progress import Progress
from compressor.storage import entropy
from compressor.storage.calibration import Calibration, flatten_tokens
from compressor.storage.lowrank import FEWEST_STEPS, Transform, fit
from compressor.storage.quantise import CODES, STEPS, symbols

if TYPE_CHECKING:
    from compressor.unfinished import Unfinished

_FLOOR = 0.1
"""Least weight of a channel, as a share of the mean: what did not matter to these passages may matter to others."""
_ROUNDING = 2.0**-14
"""Share of a channel's size below which its variation is taken for rounding."""


def fit_calibration(memories: Sequence[Memory], sensitivity: Tensor | None = None, rank: int = 384) -> Calibration:
    """Fit a calibration to memories of one compressor.

    Args:
        memories: all with the same number of tokens in a segment.
        sensitivity: how much an error in a channel costs, float `[2, layers, kv_heads, head_size]`
            (`measure_sensitivity`); by default all the same.
        rank: most principal components.

    Raises:
        CompressorError: too few memories, or of different kinds.
    """
    parts = [part for memory in memories for part in memory.split()]
    if len(parts) < 8:
        raise CompressorError(f"a calibration needs memories of at least 8 passages, got {len(parts)}")
    first = parts[0]
    if any((part.keys.shape, part.base, part.layout) != (first.keys.shape, first.base, first.layout) for part in parts):
        raise CompressorError("a calibration needs memories of one compressor and one size, these differ")
    stacked = torch.stack([torch.stack([part.keys, part.values]) for part in parts]).float().cpu()
    mean = stacked.mean(dim=0)
    centred = stacked.sub_(mean)
    deviation = centred.square().mean(dim=(0, 4)).sqrt()
    if float(deviation.max()) <= 1e-6 * float(mean.abs().max()):
        raise CompressorError("every passage has the same memory, so there is nothing to fit: give different passages")
    # Channels that vary no more than rounding does (the first layer's, which see no passage) need some step, no bits.
    size = (mean.square().mean(dim=3) + deviation.square()).sqrt()
    constant = deviation <= _ROUNDING * size
    deviation = torch.maximum(deviation, _ROUNDING * size).clamp(min=2.0**-40)
    models = []
    for bits, width in STEPS.items():
        half = 1 << (bits - 1)
        integers = symbols(centred, deviation * width, bits).movedim(4, 1).flatten(0, 1)
        chosen = entropy.choose_models(integers.flatten(1).numpy(), (-half, half - 1))
        fitted = torch.from_numpy(chosen).reshape(deviation.shape)
        models.append(fitted.masked_fill(constant, entropy.DROPPED))
    tokens = flatten_tokens(centred).flatten(0, 1)
    weights = torch.ones_like(deviation) if sensitivity is None else sensitivity.cpu().float()
    weights = weights / weights.mean().clamp(min=1e-30)
    transform = fit(tokens, weights.clamp(min=_FLOOR).flatten(), rank)
    levels, rates = _levels(transform, tokens[:: max(1, len(tokens) // 2000)])
    return Calibration(
        mean,
        deviation,
        torch.stack(models),
        transform,
        levels,
        rates,
        first.base,
        first.layout,
        first.most,
        first.compressor,
        len(parts),
    )


def _levels(transform: Transform, tokens: Tensor) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Steps from the finest useful one (every component coded) to the coarsest, and the bits they take."""
    components = transform.project(tokens)
    codes = transform.codes.to(torch.int64)
    finest = max(CODES[0], int(codes.min()) - 8, int(codes.max()) - entropy.SCALES + entropy.UNIT_SCALE + 1)
    coarsest = min(CODES[1], int(codes.max()) + entropy.UNIT_SCALE - FEWEST_STEPS)
    levels = tuple(range(finest, coarsest + 1))
    return levels, tuple(transform.bits(components, level) for level in levels)


def measure_sensitivity(
    model: Network,
    passages: Sequence[Sequence[int]],
    memories: Sequence[Memory],
    batch_size: int = 16,
    parts: Unfinished | None = None,
) -> Tensor:
    """Root mean square of the gradient of a passage's negative log-likelihood under its memory.

    To second order, squared errors weighted by it squared are what quantising costs the decoder (the diagonal of the
    empirical Fisher information).

    Args:
        passages: token ids, at least one.
        memories: theirs, of one segment each.
        parts: what an interrupted run has measured.

    Returns:
        float32 `[2, layers, kv_heads, head_size]`.
    """
    whole = list(zip(passages, memories, strict=True))
    total: Any = 0.0
    with Progress("measuring the decoder's sensitivity", len(whole), "passages") as progress:
        for start in range(0, len(whole), batch_size):
            measured = partial(_squared_gradients, model, whole[start : start + batch_size])
            found = parts.tensors(f"sensitivity-{start}", measured) if parts is not None else measured()
            for row in range(len(found["squares"])):
                total = total + found["squares"][row]
            progress.add(len(found["squares"]))
    return (total / len(whole)).sqrt()


def _squared_gradients(model: Network, chosen: Sequence[tuple[Sequence[int], Memory]]) -> dict[str, Tensor]:
    """`squares` of a batch: mean over tokens of the squared gradients, `[batch, 2, layers, kv_heads, head_size]`."""
    base = model.base
    leaves = [
        replace(m, keys=m.keys.detach().requires_grad_(), values=m.values.detach().requires_grad_()) for _, m in chosen
    ]
    pairs = stack_pairs([regeneration_pair(base.bos, base.eos, ids) for ids, _ in chosen])
    inputs, labels = pairs["inputs"].to(base.device), pairs["labels"].to(base.device)
    loss = label_nats(base, memory_prefix(base, leaves), inputs, labels).sum()
    gradients = torch.autograd.grad(loss, [tensor for leaf in leaves for tensor in (leaf.keys, leaf.values)])
    both = zip(gradients[::2], gradients[1::2], strict=True)
    return {"squares": torch.stack([torch.stack(pair).float().square().mean(dim=3).cpu() for pair in both])}


def calibrate(
    model: Network,
    passages: Sequence[Sequence[int]],
    tokens: int | None = None,
    rank: int = 384,
    sensitivity_passages: int = 256,
    compressor_name: str = "",
    parts: Unfinished | None = None,
) -> Calibration:
    """Compress passages and fit a calibration to their memories.

    Args:
        passages: token ids, of the lengths the calibration is for, not used for evaluation. Those over the compressor's
            limit are cut into segments.
        tokens: memory tokens; by default all the compressor has, which serves fewer too where the layout can be
            truncated.
        sensitivity_passages: how many of them to measure the sensitivity on; 0 weighs all channels alike.
        compressor_name: see `signed`.
        parts: what an interrupted run has done, and where what is done is written.
    """
    most = model.config.max_passage_tokens
    passages = [segment for ids in passages for segment in model.segment(list(ids), most)]
    memories: list[Memory] = []
    with Progress("compressing", len(passages), "passages") as progress:
        for start in range(0, len(passages), 32):
            chosen = passages[start : start + 32]
            compressed = partial(_compressed, model, chosen, tokens)
            found = parts.tensors(f"memories-{start}", compressed) if parts is not None else compressed()
            memories += [
                model.memory(keys, values, len(ids))
                for keys, values, ids in zip(found["keys"], found["values"], chosen, strict=True)
            ]
            progress.add(len(chosen))
    sensitivity = None
    if sensitivity_passages:
        count = min(sensitivity_passages, len(passages))
        some = [len(passages) * i // count for i in range(count)]
        sensitivity = measure_sensitivity(model, [passages[i] for i in some], [memories[i] for i in some], parts=parts)
    return replace(fit_calibration(memories, sensitivity, rank), compressor=compressor_name)


def _compressed(model: Network, passages: Sequence[Sequence[int]], tokens: int | None) -> dict[str, Tensor]:
    """`keys` and `values` of passages of one segment each, `[passages, layers, kv_heads, tokens, head_size]`."""
    memories = [
        memory.to("cpu")
        for memory in model.compress_ids(passages, tokens, segment_tokens=model.config.max_passage_tokens)
    ]
    return {
        "keys": torch.stack([memory.keys for memory in memories]),
        "values": torch.stack([memory.values for memory in memories]),
    }
