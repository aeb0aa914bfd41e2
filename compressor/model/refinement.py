"""Refinement: a few gradient steps on a memory's own keys and values, from where the compressor left them.

The encoder makes a memory in one pass; the decoder's likelihood of the passage then says how to better it, as in
semi-amortised variational autoencoders (Kim et al., arXiv 1802.02550). What Cramming (arXiv 2502.13063) does with
thousands of steps from a start of random vectors takes ten or twenty from here. Each step costs a forward and a
backward pass of the decoder over the passage; the memory is as large as before, and is read as before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from compressor.data.batches import regeneration_pair, stack_pairs
from compressor.errors import CompressorError
from compressor.model.base import Base
from compressor.model.likelihood import label_nats
from compressor.model.memory import Memory, memory_prefix
from compressor.progress import Progress

RATE = 0.4
"""First step of one memory token, as a share of the spread of a layer's keys (or values)."""
MOMENTUM = 0.8


def refine(
    base: Base,
    memories: Sequence[Memory],
    passages: Sequence[Sequence[int]],
    steps: int,
    batch_size: int = 16,
    advance: Callable[[int], object] | None = None,
) -> list[Memory]:
    """Memories from which the base is more likely to write their passages.

    Gradient descent with Nesterov momentum on the negative log-likelihood of each passage and its EOS. In every layer
    the gradient of the keys, and of the values, is scaled to one norm, which falls linearly to 0; Adam, with a rate for
    each number, needs twice the steps (docs/log.md). Steps of one size lead away from a memory that holds its passage
    already: the best of all that were passed is returned, the start among them. No memory depends on the others of its
    batch. Segments are refined apart. The first tokens of a refined memory are not what compressing to fewer gives:
    truncate first, then refine.

    Args:
        passages: token ids that the memories were compressed from.
        steps: gradient steps; 0 returns the memories as they are.
        advance: called with the steps that a batch has just done; what it raises ends the work.

    Raises:
        CompressorError: fewer than 0 steps, a memory of another base, or a passage of another length than its memory's.
    """
    if steps < 0:
        raise CompressorError(f"refine_steps = {steps} is out of range: give 0 (none) or more")
    if not steps:
        return list(memories)
    if len(memories) != len(passages):
        raise CompressorError(f"got {len(memories)} memories and {len(passages)} passages: give one passage for each")
    parts: list[tuple[Memory, Sequence[int]]] = []
    for memory, ids in zip(memories, passages, strict=True):
        if memory.passage_tokens != len(ids):
            raise CompressorError(
                f"cannot refine the memory of a passage of {memory.passage_tokens} tokens with one of {len(ids)}: "
                "give the tokens it was compressed from"
            )
        parts += memory.split_with(ids)
    better: dict[int, Memory] = {}
    order = sorted(range(len(parts)), key=lambda i: (len(parts[i][1]), parts[i][0].tokens))
    groups = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    with Progress("refining", len(groups) * steps, "steps") as progress:
        for chosen in groups:
            found = _refined(
                [parts[i][0] for i in chosen], base, [parts[i][1] for i in chosen], steps, advance or progress.add
            )
            better.update(zip(chosen, found, strict=True))
    place, refined = iter(range(len(parts))), []
    for memory in memories:
        whole = Memory.concatenate([better[next(place)] for _ in memory.segments])
        made = {**memory.made, "refine_steps": memory.made.get("refine_steps", 0) + steps}
        refined.append(replace(memory, keys=whole.keys, values=whole.values, made=made, fidelity=None))
    return refined


@torch.inference_mode(False)
@torch.enable_grad()
def _refined(
    memories: Sequence[Memory],
    base: Base,
    passages: Sequence[Sequence[int]],
    steps: int,
    advance: Callable[[int], object],
) -> list[Memory]:
    stacked = stack_pairs([regeneration_pair(base.bos, base.eos, list(ids)) for ids in passages])
    inputs, labels = stacked["inputs"].to(base.device), stacked["labels"].to(base.device)
    # Clones: what was made in the caller's inference mode takes no part in autograd.
    starts = [kind.clone().to(base.device, torch.float32) for m in memories for kind in (m.keys, m.values)]
    scales = [_spread(start) for start in starts]
    changes = [nn.Parameter(torch.zeros_like(start)) for start in starts]
    momenta = [torch.zeros_like(start) for start in starts]
    best, least = [start.clone() for start in starts], torch.full((len(memories),), math.inf, device=base.device)

    def loss() -> Tensor:
        """Nats of the passages after the memories as they are now, summed; the best of each is kept."""
        moved = [start + scale * change for start, scale, change in zip(starts, scales, changes, strict=True)]
        pairs = zip(memories, moved[::2], moved[1::2], strict=True)
        prefix = memory_prefix(base, [replace(memory, keys=keys, values=values) for memory, keys, values in pairs])
        nats = label_nats(base, prefix, inputs, labels)
        for row in (nats.detach() < least).nonzero()[:, 0].tolist():
            least[row] = nats[row].detach()
            for place in (2 * row, 2 * row + 1):
                best[place] = moved[place].detach()
        return nats.sum()

    for step in range(steps):
        gradients = torch.autograd.grad(loss(), changes)
        for change, momentum, gradient in zip(changes, momenta, gradients, strict=True):
            # The norm of a step does not depend on the number of memory tokens.
            rate = RATE * (1 - step / steps) / math.sqrt(change.shape[2])
            size = gradient.flatten(1).square().mean(1).sqrt().clamp(min=1e-12)[:, None, None, None]
            unit = gradient / size
            momentum.lerp_(unit, 1 - MOMENTUM)
            change.data.sub_(rate * unit.lerp(momentum, MOMENTUM))
        advance(1)
    with torch.no_grad():
        loss()
    ends = [one.to(memories[0].keys.device, memories[0].keys.dtype) for one in best]
    return [
        replace(memory, keys=keys, values=values)
        for memory, keys, values in zip(memories, ends[::2], ends[1::2], strict=True)
    ]


def _spread(start: Tensor) -> Tensor:
    """Standard deviation of each layer of `[layers, kv_heads, tokens, head_size]`."""
    return start.flatten(1).std(1).clamp(min=1e-6)[:, None, None, None]


def random_start(memory: Memory, seed: int = 0) -> Memory:
    """Random vectors in a memory's place, as widely spread in each layer, to refine from."""
    noise = torch.randn((2, *memory.keys.shape), generator=torch.Generator().manual_seed(seed))
    keys, values = (
        one.to(held) * held.float().flatten(1).std(1).to(held.dtype)[:, None, None, None]
        for one, held in zip(noise, (memory.keys, memory.values), strict=True)
    )
    return replace(memory, keys=keys, values=values)
