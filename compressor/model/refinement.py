"""Refinement: a few gradient steps on a memory's own keys and values, from where the compressor left them.

The encoder makes a memory in one pass; the decoder's likelihood of the passage then says how to better it, as in
semi-amortised variational autoencoders (Kim et al., arXiv 1802.02550). What Cramming (arXiv 2502.13063) does with
thousands of steps from a start of random vectors takes ten or twenty from here. Each step costs a forward and a
backward pass of the decoder over the passage; the memory is as large as before, and is read as before.

Regeneration alone takes a memory away from what else is read from it. So a step also holds to what the memory answered
to a few fixed questions before the first one, by the divergence of the next-token distributions (after arXiv
2602.21221, whose teacher reads the passage; a base that chats is none for a memory that answers shortly).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from compressor.data.batches import IGNORED, answer_pair, by_length, regeneration_pair, stack_pairs
from compressor.data.prompts import question_ids
from compressor.errors import CompressorError
from compressor.model.base import Base
from compressor.model.decoder import Prefix, label_nats, logits_at
from compressor.model.generation import generate
from compressor.model.memory import Memory, memory_prefix
from compressor.progress import Progress

RATE = 0.4
"""First step of one memory token, as a share of the spread of a layer's keys (or values)."""
MOMENTUM = 0.8
CLOSE = 0.5
"""Nats a token under which a memory holds its passage well enough for a full step to lead away from it."""
KEEP = 0.3
"""Weight of the answers' divergence, a token, beside the passage's nats, a token."""
KEPT_QUESTIONS = ("What is this text about?", "Who or what is named?", "How many, and when?")
KEPT_TOKENS = 6
"""Most tokens of an answer that is held to."""


def refine(
    base: Base,
    memories: Sequence[Memory],
    passages: Sequence[Sequence[int]],
    steps: int,
    batch_size: int = 16,
    advance: Callable[[int], object] | None = None,
    keep: float = KEEP,
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
        keep: weight of what the memories answered before (`KEEP`); 0 leaves answers to themselves, for steps that take
            two thirds of the time.

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
    groups = by_length([(len(ids), memory.tokens) for memory, ids in parts], batch_size)
    with Progress("refining", len(groups) * steps, "steps") as progress:
        for chosen in groups:
            found = _refined(
                [parts[i][0] for i in chosen], base, [parts[i][1] for i in chosen], steps, advance or progress.add, keep
            )
            better.update(zip(chosen, found, strict=True))
    place, refined = iter(range(len(parts))), []
    for memory in memories:
        whole = Memory.concatenate([better[next(place)] for _ in memory.segments])
        made = {**memory.made, "refine_steps": memory.made.get("refine_steps", 0) + steps}
        made |= {} if keep else {"refine_keep": 0.0}
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
    keep: float,
) -> list[Memory]:
    stacked = stack_pairs([regeneration_pair(base.bos, base.eos, list(ids)) for ids in passages])
    inputs, labels = stacked["inputs"].to(base.device), stacked["labels"].to(base.device)
    # Clones: what was made in the caller's inference mode takes no part in autograd.
    starts = [kind.clone().to(base.device, torch.float32) for m in memories for kind in (m.keys, m.values)]
    scales = [_spread(start) for start in starts]
    changes = [nn.Parameter(torch.zeros_like(start)) for start in starts]
    momenta = [torch.zeros_like(start) for start in starts]
    best, least = [start.clone() for start in starts], torch.full((len(memories),), math.inf, device=base.device)

    kept = _Answers(base, memory_prefix(base, memories)) if keep else None
    counts = (labels != IGNORED).sum(1)

    def loss() -> Tensor:
        """Nats of the passages after the memories as they are now, and what they answer; the best of each is kept."""
        moved = [start + scale * change for start, scale, change in zip(starts, scales, changes, strict=True)]
        pairs = zip(memories, moved[::2], moved[1::2], strict=True)
        prefix = memory_prefix(base, [replace(memory, keys=keys, values=values) for memory, keys, values in pairs])
        nats = label_nats(base, prefix, inputs, labels)
        if kept is not None:
            nats = nats + keep * counts * kept.divergence(prefix)
        for row in (nats.detach() < least).nonzero()[:, 0].tolist():
            least[row] = nats[row].detach()
            for place in (2 * row, 2 * row + 1):
                best[place] = moved[place].detach()
        return nats

    for step in range(steps):
        nats = loss()
        gradients = torch.autograd.grad(nats.sum(), changes)
        units = [
            one / one.flatten(1).square().mean(1).sqrt().clamp(min=1e-12)[:, None, None, None] for one in gradients
        ]
        slopes = (
            torch.stack([(one * unit).sum() for one, unit in zip(gradients, units, strict=True)]).view(-1, 2).sum(1)
        )
        # A memory that is close goes no further than where its slope would reach 0 nats (Polyak's step).
        reach = nats.detach() / slopes.clamp(min=1e-12)
        reach = reach.masked_fill(nats.detach() >= CLOSE * counts, math.inf).repeat_interleave(2)
        for change, momentum, unit, most in zip(changes, momenta, units, reach.tolist(), strict=True):
            # The norm of a step does not depend on the number of memory tokens.
            rate = min(RATE * (1 - step / steps) / math.sqrt(change.shape[2]), most)
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


class _Answers:
    """What memories answer to `KEPT_QUESTIONS`, greedily, and how far others are from it."""

    @torch.no_grad()
    def __init__(self, base: Base, prefix: Prefix):
        asked = question_ids(base.tokenizer, KEPT_QUESTIONS)
        self.base, self.rows = base, len(prefix.start)
        self.owners = torch.arange(self.rows, device=base.device).repeat_interleave(len(asked))
        shared, prompts = prefix.share(self.owners), asked * self.rows
        written = generate(base, shared, prompts, [KEPT_TOKENS] * len(prompts))
        pairs = [answer_pair(prompt, one.ids, base.eos) for prompt, one in zip(prompts, written, strict=True)]
        stacked = stack_pairs(pairs)
        self.ids, self.where = stacked["inputs"].to(base.device), stacked["labels"].to(base.device) != IGNORED
        self.wanted = logits_at(base, shared, self.ids, self.where).float().log_softmax(-1)

    def divergence(self, prefix: Prefix) -> Tensor:
        """Mean Kullback-Leibler divergence a token of these answers after another prefix, nats, float32 `[rows]`."""
        found = logits_at(self.base, prefix.share(self.owners), self.ids, self.where).float().log_softmax(-1)
        each = nn.functional.kl_div(found, self.wanted, reduction="none", log_target=True).sum(-1)
        nats = torch.zeros(self.where.shape, device=each.device).masked_scatter(self.where, each)
        sums = [of.view(self.rows, -1).sum(1) for of in (nats, self.where)]
        return sums[0] / sums[1]


def _spread(start: Tensor) -> Tensor:
    """Standard deviation of each layer of `[layers, kv_heads, tokens, head_size]`."""
    return start.flatten(1).std(1).clamp(min=1e-6)[:, None, None, None]


def random_start(memory: Memory) -> Memory:
    """Random vectors in a memory's place, as widely spread in each layer, to refine from."""
    noise = torch.randn((2, *memory.keys.shape), generator=torch.Generator().manual_seed(0))
    keys, values = (
        one.to(held) * _spread(held.float()).to(held.dtype)
        for one, held in zip(noise, (memory.keys, memory.values), strict=True)
    )
    return replace(memory, keys=keys, values=values)
