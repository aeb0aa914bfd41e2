"""Task `continuation`: how likely what follows a passage is after its memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from compressor.evaluation.metrics import FigureOf, ratio, retained
from compressor.evaluation.tasks.interface import Item, Result, Task, tokenised
from compressor.evaluation.tasks.regeneration import Regeneration, part_of
from compressor.methods.interface import Method, Piece
from compressor.model.generation import after, score

FOLLOWING = 64
"""Most tokens that are scored after a passage."""


class Continuation(Regeneration):
    """Nats a token of up to 64 tokens that follow the passage in its text.

    Data, parts and lengths are those of `regeneration`: the passage is the first L tokens of the text, or the first
    half where no length is asked for. The token that follows it starts the decoder and is not scored, because after a
    memory the decoder needs something to read; so it is for every method.
    """

    figures: Mapping[str, FigureOf] = {
        "nll_per_token": ratio("nats", "target_tokens"),
        "perplexity": FigureOf(
            ("nats", "target_tokens"), lambda sums: np.exp(sums["nats"] / np.maximum(sums["target_tokens"], 1))
        ),
        "token_accuracy": ratio("correct_tokens", "target_tokens"),
        "normalised_nats": retained("nats", "none_nats", "full_nats", -1),
        "token_ratio": ratio("passage_tokens", "memory_tokens"),
    }

    def items(self, records: Any, tokenizer: Any, config: Any) -> list[Item]:
        """The first `limit` texts for each length and part that go on for at least two tokens after the passage."""
        lengths: list[int | None] = list(config.lengths) or [None]
        found: dict[tuple[str | None, int | None], list[Item]] = {group: [] for group in self.groups(config)}
        for place, ids in tokenised(records["text"], tokenizer):
            record = records[place]
            part = part_of(record, config)
            for length in lengths:
                row, cut = found[part, length], length or len(ids) // 2
                following = ids[cut : cut + 1 + FOLLOWING]
                if cut and len(following) > 1 and len(row) != config.limit:
                    row.append(Item(record["id"], ids[:cut], length, part, asked={"following": following}))
            if config.limit is not None and all(len(row) == config.limit for row in found.values()):
                break
        return [item for row in found.values() for item in row]

    def room(self, item: Item) -> int:
        return 1 + len(item.asked["following"])

    def beyond(self, method: Method, items: Sequence[Item], contexts: Sequence[list[Piece]]) -> list[bool]:
        return Task.beyond(self, method, items, contexts)

    def run(self, method: Method, items: Sequence[Item], contexts: Sequence[list[Piece]]) -> list[Result]:
        base = method.base
        following = [item.asked["following"] for item in items]
        prefix = method.prefix(contexts)
        prompts = after(base, prefix, [ids[:1] for ids in following])
        scored = score(base, prefix, prompts, [ids[1:] for ids in following])
        return [
            {
                "following": base.tokenizer.decode(ids, skip_special_tokens=True),
                "nats": -float(one[:, 0].double().sum()),
                "correct_tokens": int(one[:, 1].sum()),
                "target_tokens": len(one),
                "passage_tokens": len(item.passage),
                "memory_tokens": sum(piece.tokens for piece in pieces),
            }
            for item, pieces, ids, one in zip(items, contexts, following, scored, strict=True)
        ]

    def columns(self, result: Result) -> dict[str, float]:
        names = ("nats", "correct_tokens", "target_tokens", "passage_tokens", "memory_tokens")
        return {name: float(result[name]) for name in names}

    def cautions(self, results: Sequence[Result]) -> dict[str, int]:
        return {}

    def note(self) -> str:
        return (
            f"nats/token, perplexity and token accuracy: teacher-forced, of up to {FOLLOWING} tokens that follow the "
            "passage and one more token, which is given."
        )
