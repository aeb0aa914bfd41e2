"""The decoder: the frozen base after a prefix of keys and values, and what it makes of tokens that are given.

Logits, nats of labels, log-probabilities; `generation.py` writes. The base runs as it is: adapters run inside an
encoder alone (`lora.adapter`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from compressor.data.batches import IGNORED, pad
from compressor.model.base import Base
from compressor.model.encoder import encoder_attention
from compressor.model.kernels import GROUPED, Context, Sharing

HEAD_ROWS = 128
"""Positions whose logits are held at a time in training."""
BLOCK = 32
"""Columns by which what a step attends to grows: kernels are built for each width."""


@dataclass
class Prefix:
    """A batch of decoder contexts: rotated keys and values, left-aligned and padded.

    Attributes:
        keys, values: one `[contexts, kv_heads, slots, head_size]` tensor a layer.
        mask: bool `[batch, slots]`, False for padding.
        start: int64 `[batch]`, position of the decoder's next token.
        owners: context of each row, int64 `[batch]`; None where each has its own.
    """

    keys: list[Tensor]
    values: list[Tensor]
    mask: Tensor
    start: Tensor
    owners: Tensor | None = None

    @property
    def slots(self) -> int:
        return self.mask.shape[1]

    def to_cache(self) -> DynamicCache:
        """A new cache that holds the prefix. The decoder appends to it, so every use needs its own."""
        cache, whole = DynamicCache(), self.whole()
        for layer, (keys, values) in enumerate(zip(whole.keys, whole.values, strict=True)):
            cache.update(keys, values, layer)
        return cache

    def select(self, rows: Tensor) -> Prefix:
        """The prefix of some rows, int64 or bool index `[rows]`."""
        if self.owners is not None:
            return replace(self, mask=self.mask[rows], start=self.start[rows], owners=self.owners[rows])
        keys, values = ([one[rows] for one in kind] for kind in (self.keys, self.values))
        return Prefix(keys, values, self.mask[rows], self.start[rows])

    def share(self, owners: Tensor) -> Prefix:
        """A prefix whose rows read these contexts, int64 `[rows]`: `select` without copies of keys and values."""
        assert self.owners is None
        return replace(self, mask=self.mask[owners], start=self.start[owners], owners=owners)

    def whole(self) -> Prefix:
        """The same with keys and values for each row."""
        if self.owners is None:
            return self
        keys, values = ([one[self.owners] for one in kind] for kind in (self.keys, self.values))
        return Prefix(keys, values, self.mask, self.start)


T = TypeVar("T")


def shared(things: Sequence[T], make: Callable[[list[T]], Prefix]) -> Prefix:
    """The prefix that `make` builds of these, one row each; things that occur several times are built once, and shared.

    So many questions may be asked about one memory, or one passage, without a copy for each.
    """
    apart = {id(one): one for one in things}
    prefix = make(list(apart.values()))
    if len(apart) == len(things):
        return prefix
    places = {key: place for place, key in enumerate(apart)}
    return prefix.share(torch.tensor([places[id(one)] for one in things], device=prefix.mask.device))


def empty_prefix(base: Base, batch: int) -> Prefix:
    """No context at all: what the decoder knows of the passage is nothing."""
    shape = (batch, base.kv_heads, 0, base.head_size)
    nothing = [torch.zeros(shape, device=base.device, dtype=base.dtype) for _ in range(base.layers)]
    return Prefix(
        nothing,
        list(nothing),
        torch.zeros(batch, 0, dtype=torch.bool, device=base.device),
        torch.zeros(batch, dtype=torch.int64, device=base.device),
    )


def up(width: int, block: int) -> int:
    """The width in whole blocks."""
    return -(-width // block) * block


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, written where there is room; only what is needed is attended to.

    transformers' own grows by copying all that is there for every token.
    """

    def __init__(self, keys: Tensor, values: Tensor, rows: int, room: int, sharing: Sharing | None):
        super().__init__()
        self.context = None if sharing is None else Context(keys, values, sharing)
        self.used = keys.shape[2] if sharing is None else 0
        self.room = up(self.used + room, BLOCK)
        self.keys, self.values = (one.new_zeros(rows, one.shape[1], self.room, one.shape[3]) for one in (keys, values))
        if sharing is None:
            self.keys[:, :, : self.used], self.values[:, :, : self.used] = keys, values
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Write them; keys and values so far, filled up to whole blocks. `key.context` is what comes before them."""
        assert self.keys is not None
        assert self.values is not None
        start, self.used = self.used, self.used + key_states.shape[2]
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            buffer[:, :, start : self.used] = new
        end = up(self.used, BLOCK)
        keys = self.keys[:, :, :end]
        keys.context = self.context  # type: ignore[attr-defined]
        return keys, self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.used + (0 if self.context is None else self.context.keys.shape[2])

    def keep(self, rows: Tensor, sharing: Sharing | None) -> None:
        """Go on with these rows alone."""
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = self.keys[rows], self.values[rows]
        if sharing is not None and self.context is not None:
            self.context = Context(self.context.keys, self.context.values, sharing)


def shares(base: Base, prefix: Prefix) -> bool:
    """Whether rows read their contexts from one copy: where there are fewer of these, and the attention is ours."""
    return prefix.owners is not None and base.model.config._attn_implementation == GROUPED


def roomy_cache(base: Base, prefix: Prefix, room: int) -> tuple[DynamicCache, int]:
    """A cache of a prefix with room for so many tokens in each row, and the columns that a mask of it has.

    The columns are the prefix's, then those of what is written, filled up to whole blocks.
    """
    owners, cache = prefix.owners, DynamicCache()
    sharing = Sharing.of(owners, len(prefix.keys[0])) if owners is not None and shares(base, prefix) else None
    held = prefix.whole() if sharing is None else prefix
    pairs = zip(held.keys, held.values, strict=True)
    layers = [RoomyLayer(keys, values, len(prefix.mask), room, sharing) for keys, values in pairs]
    cache.layers = list(layers)
    return cache, prefix.slots - layers[0].used + layers[0].room


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


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


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
            # Not under a caller's hooks: those of activation checkpointing would run the base again for every chunk.
            with torch.set_grad_enabled(ctx.needs_input_grad[0]), saved_tensors_hooks(_as_it_is, _as_it_is):
                chunk = chunk.detach().requires_grad_(ctx.needs_input_grad[0])
                logits = base.logits(chunk)
            if not ctx.needs_input_grad[0]:
                nats.append(nn.functional.cross_entropy(logits.float(), wanted, reduction="none"))
                continue
            # Cross-entropy's gradient is softmax less one-hot: half of autograd's passes over the vocabulary.
            # On a CPU `softmax(dtype=float32)` of bfloat16 takes four times as long as a cast and a softmax.
            chances = logits.detach().float().softmax(-1)
            right = chances.gather(1, wanted[:, None])
            nats.append(-right[:, 0].clamp_min(torch.finfo(torch.float32).tiny).log())
            slope = chances.to(logits.dtype).scatter_(1, wanted[:, None], (right - 1).to(logits.dtype))
            # Not `autograd.grad`, which hooks on modules (FLOP counters, sharding) do not bear.
            logits.backward(slope)
            gradients.append(chunk.grad)
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(nats)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None].to(gradient.dtype), None, None


def _read(base: Base, part: nn.Module, prefix: Prefix, ids: Tensor) -> Any:
    """What the base's model, or its decoder, gives for `ids` after a prefix, as for `decode`."""
    width = ids.shape[1]
    base.check_window(0, prefix.start + width - 1)
    columns = torch.arange(width, device=ids.device)
    if shares(base, prefix) and not torch.is_grad_enabled():
        cache, total = roomy_cache(base, prefix, width)
    else:
        cache, total = prefix.to_cache(), prefix.slots + width
    allowed = torch.zeros(len(ids), width, total, dtype=torch.bool, device=ids.device)
    allowed[:, :, : prefix.slots] = prefix.mask[:, None, :]
    allowed[:, :, prefix.slots : prefix.slots + width] = columns[:, None] >= columns[None, :]
    return part(
        input_ids=ids,
        position_ids=prefix.start[:, None] + columns[None],
        attention_mask=base.attention_mask(allowed),
        past_key_values=cache,
        use_cache=True,
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
    # The last token of a row is left out: nothing follows it.
    ids, _ = pad([[*prompt, *target][:-1] for prompt, target in zip(prompts, targets, strict=True)], base.device)
    where = torch.zeros_like(ids, dtype=torch.bool)
    for row, prompt, target in zip(where, prompts, targets, strict=True):
        row[len(prompt) - 1 : len(prompt) - 1 + len(target)] = True
    wanted = torch.tensor([token for target in targets for token in target], device=base.device)
    if base.plain_head:
        states = _read(base, base.model.get_decoder(), prefix, ids).last_hidden_state[where]
        chunks = (base.logits(chunk) for chunk in states.split(HEAD_ROWS))
    else:
        chunks = iter(decode(base, prefix, ids)[where].split(HEAD_ROWS))
    scores = []
    for logits, tokens in zip(chunks, wanted.split(HEAD_ROWS), strict=True):
        scores.append(torch.stack([logprobs_of(logits.float(), tokens), (logits.argmax(-1) == tokens).float()], dim=1))
    return list(torch.cat(scores).cpu().split([len(target) for target in targets]))


def logprobs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Natural log-probabilities `[rows]` of tokens `[rows]` by float32 logits `[rows, vocabulary]`."""
    return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(1)


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
