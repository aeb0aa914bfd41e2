"""The one place that decodes from a prefix: masks, positions, scoring, greedy and sampled generation, streaming.

Every function runs the base as it is: adapters run inside an encoder alone (`lora.adapter`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from compressor.data.batches import IGNORED
from compressor.data.prompts import QUESTION, question_ids
from compressor.errors import CompressorError, require_whole
from compressor.model.base import Base
from compressor.model.encoder import encoder_attention, pad
from compressor.model.memory import Memory, Prefix, empty_prefix, memory_prefix
from compressor.progress import Progress, counted

HEAD_ROWS = 128
"""Positions whose logits are held at a time in training."""
ANSWER_TOKENS = 48
"""Most tokens of an answer."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        numbers = all(isinstance(value, Real) for value in (self.temperature, self.top_p))
        if not numbers or not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise CompressorError(
                f"sampling needs temperature >= 0 and 0 < top_p <= 1, got temperature = {self.temperature!r}, top_p = "
                f"{self.top_p!r}"
            )
        if self.top_k is not None:
            require_whole("top_k", self.top_k)
        require_whole("seed", self.seed, -(1 << 63), (1 << 63) - 1)


@dataclass
class Generation:
    """What was generated for one prefix."""

    ids: list[int] = field(default_factory=list)
    """Token ids, without EOS."""
    logprobs: list[float] = field(default_factory=list)
    """Natural log-probability of each token under the base, EOS included where it came."""
    finished: bool = False
    """Whether EOS (or another of `Base.ends`) came before the limit."""


def decode(base: Base, prefix: Prefix, ids: Tensor) -> Tensor:
    """Next-token logits for `ids` after a prefix.

    Args:
        ids: int64 `[batch, width]`, padded on the right (causal attention keeps padding from mattering).

    Returns:
        `[batch, width, vocabulary]`; differentiable with respect to the prefix.
    """
    return _read(base, base.model, prefix, ids).logits


def logits_at(base: Base, prefix: Prefix, ids: Tensor, where: Tensor) -> Tensor:
    """`decode` at some places alone, bool `[batch, width]`: float `[places, vocabulary]`."""
    if not base.plain_head:
        return decode(base, prefix, ids)[where]
    return base.logits(_read(base, base.model.get_decoder(), prefix, ids).last_hidden_state[where])


def label_nats(base: Base, prefix: Prefix, ids: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of labels after a prefix, summed over each row.

    Args:
        ids, labels: int64 `[batch, width]`; labels of `IGNORED` do not count.

    Returns:
        Nats, float32 `[batch]`; differentiable with respect to the prefix. Logits are made only where there is a label,
        a few rows at a time, and none are kept.
    """
    where = labels != IGNORED
    if base.plain_head:
        states = _read(base, base.model.get_decoder(), prefix, ids).last_hidden_state[where]
        nats: Tensor = _HeadNats.apply(states, labels[where], base)
    else:
        nats = nn.functional.cross_entropy(decode(base, prefix, ids)[where].float(), labels[where], reduction="none")
    return torch.zeros(labels.shape, device=ids.device).masked_scatter(where, nats).sum(1)


class _HeadNats(torch.autograd.Function):
    """Cross-entropy of a frozen output layer, whose gradient is taken in the forward pass, chunk by chunk.

    So neither pass holds the logits of more than `HEAD_ROWS` positions, and no product is computed twice (as in Liger,
    arXiv 2410.10989).
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, labels: Tensor, base: Base) -> Tensor:
        """Nats float32 `[places]` of last hidden states `[places, hidden]` and labels int64 `[places]`."""
        nats, gradients = [], []
        for chunk, wanted in zip(states.split(HEAD_ROWS), labels.split(HEAD_ROWS), strict=True):
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                chunk = chunk.detach().requires_grad_(ctx.needs_input_grad[0])
                found = nn.functional.cross_entropy(base.logits(chunk).float(), wanted, reduction="none")
                if ctx.needs_input_grad[0]:
                    # Not `autograd.grad`, which hooks on modules (FLOP counters, sharding) do not bear.
                    found.sum().backward()
                    gradients.append(chunk.grad)
            nats.append(found.detach())
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(nats)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None].to(gradient.dtype), None, None


def _read(base: Base, part: nn.Module, prefix: Prefix, ids: Tensor, **options: bool) -> Any:
    """What the base's model, or its decoder, gives for `ids` after a prefix, as for `decode`."""
    width = ids.shape[1]
    base.check_window(0, prefix.start + width - 1)
    columns = torch.arange(width, device=ids.device)
    causal = (columns[:, None] >= columns[None, :]).expand(len(ids), -1, -1)
    context = prefix.mask[:, None, :].expand(-1, width, -1)
    return part(
        input_ids=ids,
        position_ids=prefix.start[:, None] + columns[None],
        attention_mask=base.attention_mask(torch.cat([context, causal], dim=2)),
        past_key_values=prefix.to_cache(),
        use_cache=True,
        **options,
    )


def token_prefix(base: Base, rows: Sequence[Sequence[int]]) -> Prefix:
    """Keys and values of `BOS tokens` in every layer; an empty prefix where no row has a token."""
    if not any(rows):
        return empty_prefix(base, len(rows))
    ids, lengths = pad([[base.bos, *row] for row in rows], base.device)
    width = ids.shape[1]
    columns = torch.arange(width, device=base.device)
    allowed = encoder_attention(lengths, width, 0, bidirectional=False)
    keys, values = base.keys_and_values(base.embeddings(ids), columns.expand(len(rows), -1), allowed)
    return Prefix(list(keys), list(values), columns[None] < lengths[:, None], lengths)


@torch.no_grad()
def score(
    base: Base, prefix: Prefix, prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Log-probability of each target token after prefix and prompt.

    Returns:
        For each row float32 `[target tokens, 2]`: log-probability in nats, and 1 where the token is the first choice.
    """
    logits = decode(base, prefix, _inputs(base, prompts, targets)).float()
    scores = []
    for row, prompt, target in zip(range(len(logits)), prompts, targets, strict=True):
        wanted = torch.tensor(list(target), device=base.device)
        ours = logits[row, len(prompt) - 1 : len(prompt) - 1 + len(target)]
        logprobs = ours.log_softmax(-1).gather(1, wanted[:, None])[:, 0]
        scores.append(torch.stack([logprobs, (ours.argmax(-1) == wanted).float()], dim=1).cpu())
    return scores


def label_scores(
    base: Base, prefix: Prefix, prompts: Sequence[Sequence[int]], labels: Sequence[Sequence[Sequence[int]]]
) -> list[list[float]]:
    """Mean log-probability a token of each row's labels (token ids, without EOS) after prefix and prompt."""
    found: list[list[float]] = [[] for _ in prompts]
    for place in range(max(map(len, labels))):
        rows = [row for row, own in enumerate(labels) if place < len(own)]
        chosen = prefix.select(torch.tensor(rows, device=base.device))
        scored = score(base, chosen, [prompts[row] for row in rows], [labels[row][place] for row in rows])
        for row, one in zip(rows, scored, strict=True):
            found[row].append(float(one[:, 0].double().mean()))
    return found


def _inputs(base: Base, prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> Tensor:
    """`prompt target` of each row without its last token, which nothing follows, int64 `[batch, width]`."""
    rows = [[*prompt, *target][:-1] for prompt, target in zip(prompts, targets, strict=True)]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for place, one in zip(ids, rows, strict=True):
        place[: len(one)] = torch.tensor(one)
    return ids.to(base.device)


def _choose(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """Next token for each row, int64 `[batch]`. Each row has its own random numbers, so that batches equal singles."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scaled = logits.cpu().double() / sampling.temperature  # on the CPU first: MPS has no float64
    if sampling.top_k is not None and sampling.top_k < scaled.shape[-1]:
        scaled = scaled.masked_fill(scaled < scaled.topk(sampling.top_k, dim=-1).values[:, -1:], -torch.inf)
    ordered, order = scaled.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(-1)
    # Keep the smallest set that holds top_p of the probability: drop a token if those before it already do.
    probabilities[probabilities.cumsum(-1) - probabilities >= sampling.top_p] = 0
    drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(probabilities, generators, strict=True)]
    return order.gather(1, torch.stack(drawn))[:, 0].to(logits.device)


@torch.no_grad()
def stream(
    base: Base,
    prefix: Prefix,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    sampling: Sampling | None = None,
    ends: bool = True,
) -> Iterator[list[tuple[int, float] | None]]:
    """Generate after prefix and prompt, a token a step for every row.

    Args:
        prompts: token ids for each row, at least one each; lengths may differ.
        limits: most new tokens for each row.
        ends: whether `Base.ends` end a row; without, every row is as long as its limit, which timings need.

    Yields:
        For each row the new token and its log-probability, or None when the row has ended. EOS is yielded too.
    """
    sampling = sampling or Sampling()
    if not isinstance(sampling, Sampling):
        raise CompressorError(f"sampling is {type(sampling).__name__}: give a Sampling(temperature=...)")
    if any(not prompt for prompt in prompts):
        raise CompressorError("generation needs at least one prompt token for each row (BOS asks for regeneration)")
    batch, device = len(prompts), base.device
    generators = [torch.Generator().manual_seed(sampling.seed) for _ in range(batch)]
    widest = max(map(len, prompts))
    longest = [len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)]
    base.check_window(0, prefix.start + torch.tensor(longest, device=device) - 2)  # the last token is not read again
    ids = torch.full((batch, widest), base.eos, device=device)
    real = torch.zeros(batch, widest, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        ids[row, widest - len(prompt) :] = torch.tensor(list(prompt), device=device)
        real[row, widest - len(prompt) :] = True
    positions = (prefix.start[:, None] + real.cumsum(1) - 1).clamp(min=0)
    context = torch.cat([prefix.mask, real], dim=1)
    columns = torch.arange(widest, device=device)
    causal = columns[:, None] >= columns[None, :]
    allowed = torch.cat(
        [
            prefix.mask[:, None, :].expand(-1, widest, -1),
            causal[None] & real[:, None, :] | torch.eye(widest, dtype=torch.bool, device=device),
        ],
        dim=2,
    )
    cache = prefix.to_cache()
    left = torch.tensor(list(limits), device=device)
    alive = left > 0
    stops = torch.tensor(base.ends, device=device)
    while bool(alive.any()):
        logits = (
            base.model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=base.attention_mask(allowed),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            .logits[:, -1]
            .float()
        )
        chosen = _choose(logits, sampling, generators)
        logprobs = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
        yield [
            (token, logprob) if going else None
            for token, logprob, going in zip(chosen.tolist(), logprobs.tolist(), alive.tolist(), strict=True)
        ]
        left = left - 1
        alive = alive & (left > 0) & (~torch.isin(chosen, stops) | (not ends))
        ids = chosen[:, None]
        positions = positions[:, -1:] + 1
        context = torch.cat([context, torch.ones(batch, 1, dtype=torch.bool, device=device)], dim=1)
        allowed = context[:, None, :]


def generate(
    base: Base,
    prefix: Prefix,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    sampling: Sampling | None = None,
) -> list[Generation]:
    """`stream`, collected."""
    results, ends = [Generation() for _ in prompts], base.ends
    steps = stream(base, prefix, prompts, limits, sampling)
    for step in counted(steps, "writing", max(limits, default=0), "tokens"):
        for result, new in zip(results, step, strict=True):
            if new is not None:
                result.logprobs.append(new[1])
                if new[0] in ends:
                    result.finished = True
                else:
                    result.ids.append(new[0])
    return results


@dataclass(frozen=True)
class Answer:
    """An answer and how sure the base is of it."""

    text: str
    logprob: float
    """Natural log-probability of the answer's tokens under the base, EOS included where it came."""
    finished: bool
    """Whether it ended before the limit."""


def answer(
    base: Base,
    prefix: Prefix,
    questions: Sequence[str],
    template: str = QUESTION,
    limit: int = ANSWER_TOKENS,
    sampling: Sampling | None = None,
) -> list[Answer]:
    """Answer a question for each row of a prefix.

    Args:
        prefix: contexts, for instance of `memory_prefix`; without slots the prompts start with BOS.
        template: prompt with `{question}` in it, or `chat` (`compressor/data/prompts.py`).
        limit: most tokens of an answer.
    """
    if any(not question.strip() for question in questions):
        raise CompressorError("a question is empty: ask something")
    require_whole("limit", limit)
    prompts = after(base, prefix, question_ids(base.tokenizer, questions, template))
    written = generate(base, prefix, prompts, [limit] * len(prompts), sampling)
    texts = [base.tokenizer.decode(one.ids, skip_special_tokens=True).strip() for one in written]
    return [Answer(text, sum(one.logprobs), one.finished) for text, one in zip(texts, written, strict=True)]


def after(base: Base, prefix: Prefix, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Prompts to be read after a prefix: a text starts with BOS, so where there is no context a prompt does."""
    if prefix.slots:
        return [list(prompt) for prompt in prompts]
    return [list(prompt) if list(prompt[:1]) == [base.bos] else [base.bos, *prompt] for prompt in prompts]


def regeneration_limit(passage_tokens: int) -> int:
    """Most tokens to generate for a passage: a tenth more than it had, so that a late EOS shows as an error."""
    return passage_tokens + max(8, passage_tokens // 10)


def regenerate_ids(
    base: Base, memories: Sequence[Memory], sampling: Sampling | None = None, batch_size: int = 16
) -> list[list[int]]:
    """Token ids of the passages, written back from their memories; segments are decoded apart and joined."""
    require_whole("batch_size", batch_size)
    pieces = [(owner, part) for owner, memory in enumerate(memories) for part in memory.split()]
    written: list[list[int]] = [[] for _ in pieces]
    # Rows of similar length end together, so that few steps run for rows that have ended.
    order = sorted(range(len(pieces)), key=lambda i: pieces[i][1].passage_tokens)
    # Of one batch, its tokens are shown.
    with Progress("writing", len(order), "segments", shown=len(order) > batch_size) as progress:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            parts = [pieces[i][1] for i in chosen]
            generations = generate(
                base,
                memory_prefix(base, parts),
                [[base.bos]] * len(parts),
                [regeneration_limit(part.passage_tokens) for part in parts],
                sampling,
            )
            for i, generation in zip(chosen, generations, strict=True):
                written[i] = generation.ids
            progress.add(len(chosen))
    joined: list[list[int]] = [[] for _ in memories]
    for (owner, _), ids in zip(pieces, written, strict=True):
        joined[owner] += ids
    return joined


def regenerate(
    base: Base, memories: Sequence[Memory], sampling: Sampling | None = None, batch_size: int = 16
) -> list[str]:
    """Texts of the passages, written back from their memories."""
    written = regenerate_ids(base, memories, sampling, batch_size)
    return [base.tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
