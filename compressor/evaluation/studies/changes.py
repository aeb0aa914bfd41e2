"""What a memory is worth to its reader: change a part of it and see what the right text then costs.

A part is a memory token (in every layer), a layer (of every token) or the whole memory. It is *removed*: nothing
attends to it; or *shuffled*: the same part of another passage's memory stands in its place, at this passage's
positions. A passage of several segments has each token once a segment; they are changed together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from compressor.base import Base
from compressor.errors import CompressorError
from compressor.evaluation.tasks import Item, QuestionAnswering, Regeneration, Result
from compressor.generation import attention, score
from compressor.memory import Prefix
from compressor.methods.interface import Method, Piece
from compressor.prompts import answer_text

PARTS_OF_TEXT = 20
"""Equal parts that the positions of a text are counted in."""
ATTENTION_TOGETHER = 4
"""Texts whose attention weights are held at once: they take layers x heads x length^2 numbers each."""


@dataclass(frozen=True)
class Change:
    """One change of a memory."""

    kind: str
    """removed or shuffled"""
    part: str
    """token, layer or memory"""
    index: int | None = None


def all_changes(tokens: int, layers: int) -> list[Change]:
    """Every change of a memory of so many tokens."""
    return [
        change
        for kind in ("removed", "shuffled")
        for change in (
            *(Change(kind, "token", token) for token in range(tokens)),
            *(Change(kind, "layer", layer) for layer in range(layers)),
            Change(kind, "memory"),
        )
    ]


@contextmanager
def hidden_from(base: Base, layer: int, slots: int) -> Iterator[None]:
    """Let nothing in one layer attend to the first `slots` keys, for the block.

    Raises:
        CompressorError: the layer is not given an attention mask by name, so that nothing could be hidden.
    """
    layers = next((m for m in base.model.get_decoder().children() if isinstance(m, nn.ModuleList)), None)
    if layers is None or len(layers) != base.layers:
        raise CompressorError(f"{base.name} ({base.model.config.model_type}) has no list of {base.layers} layers")

    def hide(_module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        mask = named.get("attention_mask")
        if mask is None:
            raise CompressorError(
                f"{base.name} ({base.model.config.model_type}) gives its layers no attention_mask, so a layer's memory "
                "cannot be removed: use a base of another family"
            )
        mask = mask.clone()
        mask[..., :slots] = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return arguments, {**named, "attention_mask": mask}

    handle = layers[layer].register_forward_pre_hook(hide, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def foreign(method: Method, rows: Sequence[Sequence[Piece]], donors: Sequence[Sequence[Piece]]) -> Prefix:
    """The prefix of `rows` with the keys and values of `donors`, whose segments are taken in turn."""
    exchanged = []
    for row, donor in zip(rows, donors, strict=True):
        given = [donor[place % len(donor)].held for place in range(len(row))]
        exchanged.append(
            [
                replace(piece, held=replace(piece.held, keys=memory.keys, values=memory.values))
                for piece, memory in zip(row, given, strict=True)
            ]
        )
    return method.prefix(exchanged)


def changed(own: Prefix, other: Prefix, tokens: int, change: Change) -> Prefix:
    """The prefix after a change; a removed layer is left to `hidden_from`.

    Args:
        own, other: the memory's prefix, and the same with another passage's keys and values.
        tokens: memory tokens of a segment.
    """
    chosen = torch.ones(own.slots, dtype=torch.bool, device=own.mask.device)
    if change.part == "token":
        chosen &= (torch.arange(own.slots, device=own.mask.device) % tokens).eq(change.index or 0)
    if change.kind == "removed":
        return own if change.part == "layer" else replace(own, mask=own.mask & ~chosen)
    touched = [change.part != "layer" or layer == change.index for layer in range(len(own.keys))]

    def mixed(mine: list[Tensor], theirs: list[Tensor]) -> list[Tensor]:
        where = chosen[None, None, :, None]
        return [torch.where(where, b, a) if yes else a for a, b, yes in zip(mine, theirs, touched, strict=True)]

    return replace(own, keys=mixed(own.keys, other.keys), values=mixed(own.values, other.values))


def parts_of(values: Tensor) -> Tensor:
    """Sums of the columns `[..., length]` over the equal parts of a text, `[..., PARTS_OF_TEXT]`."""
    length = values.shape[-1]
    part = torch.arange(length) * PARTS_OF_TEXT // length
    return torch.zeros(*values.shape[:-1], PARTS_OF_TEXT, dtype=torch.float64).index_add_(-1, part, values.double())


def probe(
    method: Method,
    rows: Sequence[Sequence[Piece]],
    donors: Sequence[Sequence[Piece]],
    prompts: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
) -> list[dict[str, Any]]:
    """Loss of each target under its memory and under every change of it, and what the memory was attended to.

    Returns:
        For each row float64 tensors: `nats` [1 + changes], the unchanged memory first; `removed_parts`
        [tokens, PARTS_OF_TEXT], what removing each token adds in each part of the text; `attention` [layers, tokens]
        summed over target tokens; `attention_parts` [tokens, PARTS_OF_TEXT], mean over layers; `tokens_parts`
        [PARTS_OF_TEXT] and `tokens`, how many target tokens these are sums over.
    """
    base, count = method.base, rows[0][0].tokens
    own, other = method.prefix(rows), foreign(method, rows, donors)
    changes = all_changes(count, base.layers)

    def losses(prefix: Prefix) -> list[Tensor]:
        return [-one[:, 0].double() for one in score(base, prefix, prompts, targets)]

    with method.decoding():
        before = losses(own)
        nats = [[float(loss.sum())] for loss in before]
        removed: list[list[Tensor]] = [[] for _ in before]
        found: list[dict[str, Any]] = [
            {"tokens": len(loss), "tokens_parts": parts_of(torch.ones(len(loss)))} for loss in before
        ]
        for change in changes:
            prefix = changed(own, other, count, change)
            if change.kind == "removed" and change.part == "layer":
                assert change.index is not None
                with hidden_from(base, change.index, own.slots):
                    after = losses(prefix)
            else:
                after = losses(prefix)
            for row, loss in enumerate(after):
                nats[row].append(float(loss.sum()))
                if change.kind == "removed" and change.part == "token":
                    removed[row].append(parts_of(loss - before[row]))
        for start in range(0, len(rows), ATTENTION_TOGETHER):
            few = range(start, min(start + ATTENTION_TOGETHER, len(rows)))
            prefix = own.select(torch.tensor(list(few), device=own.mask.device))
            weights = attention(base, prefix, [prompts[i] for i in few], [targets[i] for i in few])
            for row, mass in zip(few, weights, strict=True):
                # A batch pads its prefixes; padding gets no attention. Segments add up.
                layers, length, slots = mass.shape
                by_token = mass.double().view(layers, length, slots // count, count).sum(2)
                found[row]["attention"] = by_token.sum(1)
                found[row]["attention_parts"] = parts_of(by_token.mean(0).T)
    for row, one in enumerate(found):
        one |= {"nats": torch.tensor(nats[row], dtype=torch.float64), "removed_parts": torch.stack(removed[row])}
    return found


def _donors(method: Method, items: Sequence[Item], contexts: Sequence[list[Piece]]) -> list[list[Piece]]:
    """Pieces of the passage that stands in for each item's (`asked["donor"]`), of the same number of tokens."""
    passages = {id(item.asked["donor"]): item.asked["donor"] for item in items}
    compressed = method.compress(list(passages.values()), [contexts[0][0].tokens])[0]
    found = dict(zip(passages, compressed, strict=True))
    return [found[id(item.asked["donor"])] for item in items]


class RegenerationProbe(Regeneration):
    """What every change costs in writing the passage back; segments are written apart and added up."""

    def run(self, method: Method, items: Sequence[Item], contexts: Sequence[list[Piece]]) -> list[Result]:
        base = method.base
        donors = _donors(method, items, contexts)
        flat = [(owner, piece) for owner, pieces in enumerate(contexts) for piece in pieces]
        given = [
            donors[owner][place % len(donors[owner])]
            for owner, pieces in enumerate(contexts)
            for place in range(len(pieces))
        ]
        order = sorted(range(len(flat)), key=lambda i: len(flat[i][1].ids))
        results: list[Result] = [{} for _ in items]
        for start in range(0, len(order), len(items)):
            chosen = order[start : start + len(items)]
            found = probe(
                method,
                [[flat[i][1]] for i in chosen],
                [[given[i]] for i in chosen],
                [[base.bos]] * len(chosen),
                [[*flat[i][1].ids, base.eos] for i in chosen],
            )
            for i, one in zip(chosen, found, strict=True):
                total = results[flat[i][0]]
                for name, value in one.items():
                    total[name] = total[name] + value if name in total else value
        return results


class AnswerProbe(QuestionAnswering):
    """What every change costs in the first right answer (its EOS included)."""

    def run(self, method: Method, items: Sequence[Item], contexts: Sequence[list[Piece]]) -> list[Result]:
        base = method.base
        texts = [answer_text(item.asked["answers"][0]) for item in items]
        answers = base.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        prompts = [item.asked["prompt"] for item in items]
        targets = [[*answer, base.eos] for answer in answers]
        return [dict(one) for one in probe(method, contexts, _donors(method, items, contexts), prompts, targets)]
