"""Task `retrieve`: find the passage that a query belongs to, by the query's likelihood under each memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch

from compressor.data.instructions import Prompt
from compressor.data.questions import HUB_NAMES, load_questions
from compressor.data.records import TEXT_FIELDS, rows_of
from compressor.data.rows import BadRecords
from compressor.data.sources import resolve
from compressor.errors import CompressorError
from compressor.evaluation.items import Item, Result, Task, tokenised
from compressor.evaluation.metrics import FigureOf, ratio
from compressor.methods.interface import Method, Piece
from compressor.model.decoder import score
from compressor.model.generation import after

QUESTION_STARTS, TITLE_STARTS = "\nQuestion:", "\nTitle:"
"""What stands between a memory and the query."""
ROWS = 32
"""Memories that a query is scored under at once."""
TIE = 1e-4
"""Nats by which likelihoods must differ to count as different: `none` ranks all passages alike."""


class Retrieve(Task):
    """Rank passages by the log-likelihood of a query after each one's memory.

    Passages compete within groups of neighbours in the data set, of equal size as far as can be and at most
    `candidates` each. A passage's query is its first question, or its title where the data has no questions. Passages
    that make a query equally likely share the mean of their reciprocal ranks.
    """

    default_data = ("squad-dev", "arxiv-test")
    figures: Mapping[str, FigureOf] = {
        "mrr": ratio("reciprocal_rank", "items"),
        "hit_1": ratio("hit_1", "items"),
        "chance_mrr": ratio("chance", "items"),
        "candidates": ratio("candidates", "items"),
        "token_ratio": ratio("passage_tokens", "memory_tokens"),
    }

    def load(self, source: str, config: Any) -> list[dict[str, str]]:
        """`id`, `text`, `query` and what `starts` the query, of the first `limit` passages that differ."""
        titled = source not in HUB_NAMES and _titled(source, config)
        columns = {"context": [config.text_field] if config.text_field else list(TEXT_FIELDS), "answers": ["title"]}
        records = load_questions(
            source,
            split=config.split,
            limit=config.limit if titled else None,
            columns=config.question_columns or None,
            skip_bad_records=config.skip_bad_records,
            left_out=self.left_out,
            prompt=Prompt(instruction="Title?", columns=columns) if titled else None,
        )
        found: dict[str, dict[str, str]] = {}
        for one in records:
            asked, starts = (one.answers[0], TITLE_STARTS) if titled else (one.question, QUESTION_STARTS)
            found.setdefault(one.context, {"id": one.id, "text": one.context, "query": asked, "starts": starts})
            if len(found) == config.limit:
                break
        if len(found) < 2:
            raise CompressorError(f"{source} has one passage: retrieval needs two to tell apart")
        return list(found.values())

    def items(self, records: Sequence[dict[str, str]], tokenizer: Any, config: Any) -> list[Item]:
        """One item for each passage, with its query."""
        passages = {place: ids for place, ids in tokenised([record["text"] for record in records], tokenizer) if ids}
        queries = dict(tokenised([" " + record["query"].strip() for record in records], tokenizer))
        starts = {text: ids for text in (QUESTION_STARTS, TITLE_STARTS) for _, ids in tokenised([text], tokenizer)}
        groups = -(-len(passages) // config.candidates)
        return [
            Item(
                records[place]["id"],
                ids,
                asked={
                    "text": records[place]["query"],
                    "query": queries[place],
                    "prompt": starts[records[place]["starts"]],
                    "group": number * groups // len(passages),
                },
            )
            for number, (place, ids) in enumerate(passages.items())
        ]

    def batches(self, items: Sequence[Item], batch_size: int) -> list[list[int]]:
        """The passages of a group together, whatever the batch size."""
        order = range(len(items))
        return [list(group) for _, group in groupby(order, key=lambda i: (items[i].dataset, items[i].asked["group"]))]

    def room(self, item: Item) -> int:
        return 1 + len(item.asked["prompt"]) + len(item.asked["query"])

    def beyond(self, method: Method, items: Sequence[Item], contexts: Sequence[list[Piece]]) -> list[bool]:
        """A group as a whole: every passage is read with every query, and ranks are among as many."""
        longest, most = max(self.room(item) for item in items), method.base.positions
        over = most is not None and any(method.reach(pieces) + longest > most for pieces in contexts)
        return [over] * len(items)

    def run(self, method: Method, items: Sequence[Item], contexts: Sequence[list[Piece]]) -> list[Result]:
        """Results of a group, whose passages are the candidates of each other's queries."""
        base = method.base
        found = torch.zeros(len(items), len(items), dtype=torch.float64)  # [query, candidate]
        for start in range(0, len(items), ROWS):
            prefix = method.prefix(contexts[start : start + ROWS])
            rows = len(contexts[start : start + ROWS])
            for place, item in enumerate(items):
                prompts = after(base, prefix, [item.asked["prompt"]] * rows)
                scored = score(base, prefix, prompts, [item.asked["query"]] * rows)
                found[place, start : start + rows] = torch.stack([one[:, 0].double().sum() for one in scored])
        results = []
        for place, (item, pieces) in enumerate(zip(items, contexts, strict=True)):
            reciprocal, hit = reciprocal_rank(found[place].tolist(), place)
            results.append(
                {
                    "query": item.asked["text"],
                    "best": items[int(found[place].argmax())].id,
                    "reciprocal_rank": reciprocal,
                    "hit_1": hit,
                    "chance": sum(1 / rank for rank in range(1, len(items) + 1)) / len(items),
                    "candidates": len(items),
                    "query_nats": -float(found[place, place]),
                    "passage_tokens": len(item.passage),
                    "memory_tokens": sum(piece.tokens for piece in pieces),
                }
            )
        return results

    def columns(self, result: Result) -> dict[str, float]:
        names = ("reciprocal_rank", "hit_1", "chance", "candidates", "passage_tokens", "memory_tokens")
        return {"items": 1.0, **{name: float(result[name]) for name in names}}

    def note(self) -> str:
        return (
            "MRR, hit@1: rank of a query's own passage among the candidates by the query's likelihood after each one's "
            "memory; ties share ranks. chance: MRR of a random order."
        )


def reciprocal_rank(scores: Sequence[float], own: int) -> tuple[float, float]:
    """Reciprocal rank of one of the scores and whether it is the highest, in the mean over the orders of ties."""
    better = sum(score > scores[own] + TIE for score in scores)
    tied = sum(abs(score - scores[own]) <= TIE for score in scores)  # itself included
    ranks = range(better + 1, better + tied + 1)
    return sum(1 / rank for rank in ranks) / tied, (0.0 if better else 1 / tied)


def _titled(source: str, config: Any) -> bool:
    """Whether a source is passages with titles, and not questions."""
    place = resolve(source, split=config.split)[0]
    try:
        fields = next(rows_of(place, config.split, BadRecords(skip=True))).values
    except CompressorError:  # such as a document of questions; whoever reads it says what is wrong
        return False
    return "title" in fields and not {"question", "qas", "context"} & set(fields)
