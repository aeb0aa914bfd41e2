"""The one place that writes after a prefix: greedy and sampled generation, streaming, answers, regeneration.

Every function runs the base as it is: adapters run inside an encoder alone (`lora.adapter`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Real

import torch
from torch import Tensor

from compressor.data.batches import by_length
from compressor.data.prompts import QUESTION, question_ids
from compressor.errors import CompressorError, require_whole
from compressor.model.base import Base
from compressor.model.decoder import Prefix, logprobs_of
from compressor.model.decoding import Rows
from compressor.model.memory import Memory, memory_prefix
from compressor.progress import Progress, counted

DECODED_TOGETHER = 64
"""Rows of a batch: on a CPU, too, a step of so many takes little longer than one of 16."""
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
    compiled: bool = False,
) -> Iterator[list[tuple[int, float] | None]]:
    """Generate after prefix and prompt, a token a step for every row.

    Args:
        prompts: token ids for each row, at least one each; lengths may differ.
        limits: most new tokens for each row.
        ends: whether `Base.ends` end a row; without, every row is as long as its limit, which timings need.
        compiled: compile the step (`torch.compile`), which takes a minute and pays on GPUs.

    Yields:
        For each row the new token and its log-probability, or None when the row has ended. EOS is yielded too.
    """
    sampling = sampling or Sampling()
    if not isinstance(sampling, Sampling):
        raise CompressorError(f"sampling is {type(sampling).__name__}: give a Sampling(temperature=...)")
    if any(not prompt for prompt in prompts):
        raise CompressorError("generation needs at least one prompt token for each row (BOS asks for regeneration)")
    longest = [len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)]
    base.check_window(0, prefix.start + torch.tensor(longest, device=base.device) - 2)  # the last is not read again
    alive = [row for row, limit in enumerate(limits) if limit > 0]
    """Rows that go on, among those that are computed."""
    computed = list(range(len(prompts)))
    if not alive:
        return
    rows = Rows(base, prefix, prompts, max(limits) - 1, compiled)
    generators = [torch.Generator().manual_seed(sampling.seed) for _ in prompts]
    stops, written = base.ends if ends else (), 0
    while alive:
        # Copies cost a few steps: rows that have ended are dropped a quarter at a time.
        if len(alive) <= 0.75 * len(computed) and not compiled:
            rows.keep(torch.tensor([computed.index(row) for row in alive], device=base.device))
            computed = list(alive)
        logits = rows.logits()
        chosen = _choose(logits, sampling, [generators[row] for row in computed])
        found = dict(
            zip(computed, zip(chosen.tolist(), logprobs_of(logits, chosen).tolist(), strict=True), strict=True)
        )
        going = set(alive)
        yield [found[row] if row in going else None for row in range(len(prompts))]
        written += 1
        alive = [row for row in alive if written < limits[row] and found[row][0] not in stops]
        if alive:
            rows.add(chosen)


def generate(
    base: Base,
    prefix: Prefix,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    sampling: Sampling | None = None,
    compiled: bool = False,
) -> list[Generation]:
    """`stream`, collected."""
    results, ends = [Generation() for _ in prompts], base.ends
    steps = stream(base, prefix, prompts, limits, sampling, compiled=compiled)
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
    batch_size: int = DECODED_TOGETHER,
    compiled: bool = False,
) -> list[Answer]:
    """Answer a question for each row of a prefix, so many together.

    Args:
        prefix: contexts, for instance of `memory_prefix`; without slots the prompts start with BOS.
        template: prompt with `{question}` in it, or `chat` (`compressor/data/prompts.py`).
        limit: most tokens of an answer.
    """
    if any(not question.strip() for question in questions):
        raise CompressorError("a question is empty: ask something")
    require_whole("limit", limit)
    prompts = after(base, prefix, question_ids(base.tokenizer, questions, template))
    written = []
    for rows in torch.arange(len(prompts), device=base.device).split(batch_size):
        chosen = [prompts[row] for row in rows.tolist()]
        written += generate(base, prefix.select(rows), chosen, [limit] * len(rows), sampling, compiled)
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


def rewrite(
    base: Base, prefix: Prefix, passages: Sequence[Sequence[int]], scores: Sequence[Tensor]
) -> list[Generation]:
    """What greedy regeneration writes for passages that are known, without log-probabilities.

    Only what comes from the first token on that the base would write otherwise is generated.

    Args:
        scores: what `score` says of each passage and EOS after BOS.
    """
    written = [Generation(list(ids), finished=True) for ids in passages]
    right = {row: int(one[:, 1].argmin()) for row, one in enumerate(scores) if not bool(one[:, 1].all())}
    if right:
        rest = generate(
            base,
            prefix.select(torch.tensor(list(right), device=base.device)),
            [[base.bos, *passages[row][:place]] for row, place in right.items()],
            [regeneration_limit(len(passages[row])) - place for row, place in right.items()],
        )
        for (row, place), one in zip(right.items(), rest, strict=True):
            written[row] = Generation([*passages[row][:place], *one.ids], finished=one.finished)
    return written


def regenerate_ids(
    base: Base,
    memories: Sequence[Memory],
    sampling: Sampling | None = None,
    batch_size: int = DECODED_TOGETHER,
    compiled: bool = False,
) -> list[list[int]]:
    """Token ids of the passages, written back from their memories; segments are decoded apart and joined."""
    require_whole("batch_size", batch_size)
    pieces = [(owner, part) for owner, memory in enumerate(memories) for part in memory.split()]
    written: list[list[int]] = [[] for _ in pieces]
    # Of one batch, its tokens are shown.
    with Progress("writing", len(pieces), "segments", shown=len(pieces) > batch_size) as progress:
        for chosen in by_length([part.passage_tokens for _, part in pieces], batch_size):
            parts = [pieces[i][1] for i in chosen]
            generations = generate(
                base,
                memory_prefix(base, parts),
                [[base.bos]] * len(parts),
                [regeneration_limit(part.passage_tokens) for part in parts],
                sampling,
                compiled,
            )
            for i, generation in zip(chosen, generations, strict=True):
                written[i] = generation.ids
            progress.add(len(chosen))
    joined: list[list[int]] = [[] for _ in memories]
    for (owner, _), ids in zip(pieces, written, strict=True):
        joined[owner] += ids
    return joined


def regenerate(
    base: Base,
    memories: Sequence[Memory],
    sampling: Sampling | None = None,
    batch_size: int = DECODED_TOGETHER,
    compiled: bool = False,
) -> list[str]:
    """Texts of the passages, written back from their memories."""
    written = regenerate_ids(base, memories, sampling, batch_size, compiled)
    return [base.tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
