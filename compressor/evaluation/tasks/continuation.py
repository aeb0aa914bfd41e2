"""Task `continuation`: how likely what follows a passage is after its memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from compressor.evaluation.items import Item, Result, Task
from compressor.evaluation.metrics import FigureOf, ratio, retained
from compressor.evaluation.tasks.regeneration import Regeneration
from compressor.methods.interface import Method, Piece
from compressor.model.decoder import score
from compressor.model.generation import after

FOLLOWING = 64
"""Most tokens that are scored after a passage."""


class Continuation(Regeneration):
    """Nats a token of up to 64 tokens that follow the passage in its text.

    Data and lengths are those of `regeneration`: the passage is the first L tokens of the text, or the first
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

    def item(self, record: Any, ids: list[int], length: int | None, tokenizer: Any) -> Item | None:
        """The item of a text that goes on for at least two tokens after the passage."""
        cut = length or len(ids) // 2
        following = ids[cut : cut + 1 + FOLLOWING]
        if not cut or len(following) < 2:
            return None
        return Item(record["id"], ids[:cut], length, asked={"following": following})

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
