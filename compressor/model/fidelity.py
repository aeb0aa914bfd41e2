"""How much of a passage its memory gives back, measured at compression time, and the fewest tokens that give enough.

Fidelity is the share of the passage that comes back in greedy regeneration: 1 less the edits (tokens to insert, delete
or replace) that lead from what is written to the passage, over the tokens of the longer of the two. Tokens that stand
for what the tokenizer cannot spell never count as right.

One forward pass tells where the base, given the right tokens before, would first write a wrong one. Without any, all
comes back; what is left is written from there on, so that good memories cost next to nothing to measure.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressor.data.batches import by_length
from compressor.errors import CompressorError
from compressor.model.base import Base
from compressor.model.decoder import Prefix, score
from compressor.model.generation import Generation, generate, regeneration_limit
from compressor.model.memory import Memory, memory_prefix
from compressor.model.network import Network
from compressor.model.refinement import refine

LITTLE = 0.9
"""Share of a text that comes back from a memory, below which is said so."""


def passage_scores(base: Base, prefix: Prefix, passages: Sequence[Sequence[int]]) -> list[Tensor]:
    """Scores (`decoder.score`) of each passage and its EOS after a prefix, as a regeneration begins: with BOS."""
    return score(base, prefix, [[base.bos]] * len(passages), [[*ids, base.eos] for ids in passages])


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


def fidelities(
    model: Network, memories: Sequence[Memory], passages: Sequence[Sequence[int]], batch_size: int = 16
) -> list[float]:
    """Fidelity of each memory, 0 to 1; of one with several segments that of all of them together.

    Args:
        passages: token ids that the memories were compressed from.
    """
    shares, _ = _shares(model.base, _pieces(memories, passages), batch_size)
    return [shares[i] for i in range(len(memories))]


Piece = tuple[int, Memory, Sequence[int]]
"""Number of the memory that a segment is of, the segment's memory and tokens."""


def _pieces(memories: Sequence[Memory], passages: Sequence[Sequence[int]]) -> list[Piece]:
    pairs = enumerate(zip(memories, passages, strict=True))
    return [(owner, *piece) for owner, (memory, ids) in pairs for piece in memory.split_with(ids)]


def _shares(base: Base, pieces: Sequence[Piece], batch_size: int) -> tuple[dict[int, float], Counter[int]]:
    """By the number of their memory: what share of these segments comes back, and how many they are."""
    wrong, total, segments = Counter[int](), Counter[int](), Counter(owner for owner, *_ in pieces)
    for places in by_length([len(ids) for *_, ids in pieces], batch_size):
        chosen = [pieces[place] for place in places]
        passages = [ids for *_, ids in chosen]
        prefix = memory_prefix(base, [memory for _, memory, _ in chosen])
        written = rewrite(base, prefix, passages, passage_scores(base, prefix, passages))
        for (owner, _, ids), back in zip(chosen, written, strict=True):
            wanted = [-1 if token == base.tokenizer.unk_token_id else token for token in ids]
            wrong[owner] += edits(wanted, back.ids)
            total[owner] += max(len(ids), len(back.ids))
    return {owner: 1 - wrong[owner] / total[owner] for owner in segments}, segments


def noted(
    model: Network, memories: Sequence[Memory], passages: Sequence[Sequence[int]], batch_size: int, every: bool
) -> list[Memory]:
    """The memories with their fidelity, and a warning where little comes back.

    Args:
        every: measure all; else as many segments as one batch takes, evenly spread over all, so that it costs one
            greedy pass at most. Memories with segments that are not tried stay without a fidelity.
    """
    pieces = _pieces(memories, passages)
    if not every and len(pieces) > batch_size:
        pieces = [pieces[(2 * i + 1) * len(pieces) // (2 * batch_size)] for i in range(batch_size)]
    try:
        shares, tried = _shares(model.base, pieces, batch_size)
    except CompressorError as error:  # a passage that fits the base, but not after its memory
        warnings.warn(f"how much of the text comes back cannot be measured: {error}", stacklevel=3)
        return list(memories)
    if short := [share for share in shares.values() if share < LITTLE]:
        worst, some = f"{min(short):.1%}", f"of {len(short)} of the {len(shares)} passages that were tried"
        several = f"{some} under {LITTLE:.0%} comes back, at worst {worst},"
        what = f"only {worst} of it comes back" if len(memories) == 1 else several
        more = "more memory tokens, " if memories[0].segments[0].tokens < memories[0].most else ""
        warnings.warn(
            f"{what} from the memory (measure=False does not look): give {more}shorter segments "
            "(segment_tokens=...) or refine_steps=20, or keep the text itself, too",
            stacklevel=3,
        )
    return [
        replace(one, fidelity=shares[i]) if tried[i] == len(one.segments) else one for i, one in enumerate(memories)
    ]


def edits(wanted: Sequence[Any], found: Sequence[Any]) -> int:
    """Fewest tokens, or words, to insert, delete or replace so that one becomes the other (Levenshtein)."""
    columns, target = np.arange(len(found) + 1), np.asarray(found)
    row = columns
    for count, token in enumerate(wanted, 1):
        best = np.concatenate([[count], np.minimum(row[1:] + 1, row[:-1] + (target != token))])
        row = np.minimum.accumulate(best - columns) + columns  # and insertions, all at once
    return int(row[-1])


def sizes_to_try(model: Network, tokens: int | None = None) -> list[int]:
    """Powers of two below `tokens` (by default all the compressor has), then `tokens`, that it is trained for.

    Raises:
        CompressorError: the compressor does not have so many memory tokens.
    """
    most = model.so_many(tokens)
    sizes = [1 << power for power in range(most.bit_length()) if 1 << power < most]
    return [size for size in sizes if model.encoder.trained_for(size)] + [most]


def compress_to_fidelity(
    model: Network,
    passages: Sequence[Sequence[int]],
    target: float,
    tokens: int | None = None,
    batch_size: int = 16,
    segment_tokens: int | None = None,
    refine_steps: int = 0,
    stored: Callable[[Memory], Memory] = lambda memory: memory,
) -> list[Memory]:
    """For each passage the memory of the fewest tokens whose fidelity reaches `target`.

    Sizes are tried from the smallest on: fidelity need not grow with every one. A passage is encoded once where
    memories can be truncated, else once for each size that is tried. All segments of a passage get the same size.

    Args:
        passages: token ids.
        target: fidelity, above 0 and at most 1.
        tokens: most memory tokens for a segment; by default all the compressor has.
        segment_tokens: most tokens of a segment; by default those of the compressor's settings.
        refine_steps: of each size that is tried, see `Compressor.compress`.
        stored: what a file gives back of a memory (`storage.memory_file.as_stored`), whose fidelity then counts.

    Returns:
        Memories in the order of the passages, their fidelity noted: of those that no size suffices for, the largest,
        with a warning that states the fidelity reached.

    Raises:
        CompressorError: a target out of range, an empty passage, or more memory tokens than the compressor has.
    """
    if not isinstance(target, (int, float)) or not 0 < target <= 1:
        raise CompressorError(f"target_fidelity = {target!r} is out of range: it must be above 0 and at most 1")
    sizes = sizes_to_try(model, tokens)
    truncatable = model.encoder.truncatable
    largest = model.compress_ids(passages, sizes[-1], batch_size, segment_tokens) if truncatable else []
    found: dict[int, Memory] = {}
    left = list(range(len(passages)))
    short: list[tuple[int, float]] = []
    for size in sizes:
        texts = [passages[i] for i in left]
        if truncatable:
            memories = refine(model.base, [largest[i].truncate(size) for i in left], texts, refine_steps, batch_size)
        else:
            memories = model.compress_ids(texts, size, batch_size, segment_tokens, refine_steps)
        reached = fidelities(model, [stored(memory) for memory in memories], texts, batch_size)
        memories = [replace(memory, fidelity=value) for memory, value in zip(memories, reached, strict=True)]
        enough = {i: value >= target for i, value in zip(left, reached, strict=True)}
        found |= {i: memory for i, memory in zip(left, memories, strict=True) if enough[i] or size == sizes[-1]}
        short = [(i, value) for i, value in zip(left, reached, strict=True) if not enough[i]]
        left = [i for i in left if not enough[i]]
        if not left:
            break
    if short:
        worst = min(value for _, value in short)
        which = "" if len(passages) == 1 else f" for {len(short)} of {len(passages)} passages, at worst"
        warnings.warn(
            f"{sizes[-1]} memory tokens reach a fidelity of {worst:.3f}{which}, less than the {target:g} asked for",
            stacklevel=3,
        )
    return [found[i] for i in range(len(passages))]
