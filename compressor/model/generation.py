"""The one place that writes after a prefix: greedy and sampled generation, streaming, answers, regeneration.

Every function runs the base as it is: adapters run inside an encoder alone (`lora.adapter`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import StaticLayer

from compressor.data.batches import by_length
from compressor.data.prompts import QUESTION, question_ids
from compressor.errors import CompressorError, first_line, require_whole
from compressor.model.base import Base
from compressor.model.decoder import BLOCK, Prefix, RoomyLayer, logprobs_of, roomy_cache, shares, up
from compressor.model.kernels import Sharing
from compressor.model.memory import Memory, memory_prefix
from compressor.progress import Progress, counted, note

DECODED_TOGETHER = 64
"""Rows of a batch: on a CPU, too, a step of so many takes little longer than one of 16."""
ANSWER_TOKENS = 48
"""Most tokens of an answer."""

STATIC_BLOCK = 128
"""Columns by which static caches grow: steps attend to all that there will be, and are compiled for each number."""


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


class Rows:
    """Rows of a batch, each with its context and its prompt; a step reads their newest tokens.

    Contexts that rows share are held once if the base's attention is ours. With `Base.decoding` of `static` and
    `compiled` caches have a fixed width instead, so that nothing but the contents of tensors changes from step to step.

    Args:
        room: most tokens that are read after a prompt.
    """

    def __init__(self, base: Base, prefix: Prefix, prompts: Sequence[Sequence[int]], room: int):
        self.base, device = base, base.device
        self.static, self.compiled = base.decoding != "auto", base.decoding == "compiled"
        prefix = prefix.whole() if self.static or not shares(base, prefix) else prefix
        self.owners = prefix.owners
        widest, count = max(map(len, prompts)), len(prompts)
        self.ids = torch.full((count, widest), base.eos, device=device)
        real = torch.zeros(count, widest, dtype=torch.bool, device=device)
        for row, prompt in enumerate(prompts):
            self.ids[row, widest - len(prompt) :] = torch.tensor(list(prompt), device=device)
            real[row, widest - len(prompt) :] = True
        self.positions = (prefix.start[:, None] + real.cumsum(1) - 1).clamp(min=0)
        self.contexts = len(prefix.keys[0])
        if self.static:
            self.cache, columns = DynamicCache(), up(prefix.slots + widest + room, STATIC_BLOCK)
            # Of full attention in every layer: what is read fits into a sliding window (`Base.check_window`).
            layers = [StaticLayer(columns) for _ in prefix.keys]
            for layer, keys, values in zip(layers, prefix.keys, prefix.values, strict=True):
                layer.update(keys, values)
            self.cache.layers = [*layers]
        else:
            self.cache, columns = roomy_cache(base, prefix, widest + room)
        self.apart = 0 if self.owners is None else prefix.slots
        """Columns of contexts that are shared."""
        self.read = prefix.slots
        """Columns before the newest tokens."""
        self.allowed = torch.zeros(count, columns, dtype=torch.bool, device=device)
        self.allowed[:, : self.read] = prefix.mask
        self.allowed[:, self.read : self.read + widest] = real

    def logits(self) -> Tensor:
        """What the base makes of the newest tokens: float32 `[rows, vocabulary]`."""
        width, device = self.ids.shape[1], self.ids.device
        end = self.read + width
        columns = self.allowed.shape[1]
        if not self.static:
            columns = self.apart + up(end - self.apart, BLOCK)
        allowed = self.allowed[:, None, :columns].expand(-1, width, -1).clone()
        # Causal among the newest; padding before a prompt sees itself, to keep its softmax finite.
        newest = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        allowed[:, :, self.read : end] &= newest
        allowed[:, :, self.read : end] |= torch.eye(width, dtype=torch.bool, device=device)
        inputs = {
            "input_ids": self.ids,
            "position_ids": self.positions,
            "attention_mask": self.base.additive_mask(allowed),
            "past_key_values": self.cache,
        }
        found = None
        if self.compiled and width == 1:
            found = self._compiled(inputs)
        if found is None:
            found = self.base.model(**inputs, use_cache=True, logits_to_keep=1)
        self.read = end
        return found.logits[:, -1].float()

    def _compiled(self, inputs: dict[str, Any]) -> Any:
        """What the compiled model makes of one token a row; None where it cannot be compiled, from then on."""
        try:
            return self.base.compiled_model()(**inputs, use_cache=True, logits_to_keep=1)
        except (CompressorError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the compiler's own, of many kinds
            self.base.decoding, self.compiled = "static", False
            note(
                f"note: torch {torch.__version__} cannot compile a step of {self.base.name} ({type(error).__name__}: "
                f"{first_line(error)[:300]}): it is written without, as with --decoding static"
            )
        for layer in self.cache.layers:  # those before the fault may have read the token
            assert isinstance(layer, StaticLayer)
            layer.cumulative_length.fill_(self.read)
        return None

    def add(self, chosen: Tensor) -> None:
        """Take the rows' next tokens, int64 `[rows]`."""
        self.ids, self.positions = chosen[:, None], self.positions[:, -1:] + 1
        self.allowed[:, self.read] = True

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone, int64 `[rows]`; in static caches all stay."""
        self.ids, self.positions, self.allowed = self.ids[rows], self.positions[rows], self.allowed[rows]
        sharing = None
        if self.owners is not None:
            self.owners = self.owners[rows]
            sharing = Sharing.of(self.owners, self.contexts)
        for layer in self.cache.layers:
            assert isinstance(layer, RoomyLayer)
            layer.keep(rows, sharing)


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
    longest = [len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)]
    base.check_window(0, prefix.start + torch.tensor(longest, device=base.device) - 2)  # the last is not read again
    alive = [row for row, limit in enumerate(limits) if limit > 0]
    """Rows that go on, among those that are computed."""
    computed = list(range(len(prompts)))
    if not alive:
        return
    rows = Rows(base, prefix, prompts, max(limits) - 1)
    generators = [torch.Generator().manual_seed(sampling.seed) for _ in prompts]
    stops, written = base.ends if ends else (), 0
    while alive:
        # Copies cost a few steps: rows that have ended are dropped a quarter at a time.
        if len(alive) <= 0.75 * len(computed) and not rows.static:
            rows.keep(torch.tensor([computed.index(row) for row in alive], device=base.device))
            computed = list(alive)
        logits = rows.logits()
        chosen = _choose(logits, sampling, [generators[row] for row in computed])
        logprobs = logprobs_of(logits, chosen).tolist()
        found = dict(zip(computed, zip(chosen.tolist(), logprobs, strict=True), strict=True))
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
    batch_size: int = DECODED_TOGETHER,
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
        written += generate(base, prefix.select(rows), chosen, [limit] * len(rows), sampling)
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
    base: Base,
    memories: Sequence[Memory],
    sampling: Sampling | None = None,
    batch_size: int = DECODED_TOGETHER,
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
) -> list[str]:
    """Texts of the passages, written back from their memories."""
    written = regenerate_ids(base, memories, sampling, batch_size)
    return [base.tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
