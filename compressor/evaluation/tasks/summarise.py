"""Task `summarise`: one sentence on what a text says, written from its memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compressor.data.prompts import QUESTION, answer_text, question_ids
from compressor.data.records import record_id
from compressor.data.sources import Row
from compressor.evaluation.metrics import FigureOf, ratio, retained, rouge_scores
from compressor.evaluation.tasks.interface import Item, Result, Task, tokenised
from compressor.evaluation.tasks.records import field_of, task_records, texts_of
from compressor.methods.interface import Method, Piece
from compressor.model.generation import after, generate, score

if TYPE_CHECKING:
    from compressor.evaluation.settings import EvaluationConfig

NEEDS = (
    "The task summarise reads records with the fields text and targets (one summary or a list of them): name files "
    "with --data. SciTLDR is SciTLDR-Data/SciTLDR-A/test.jsonl of https://github.com/allenai/scitldr (arXiv "
    "2004.15011); the hub's allenai/scitldr is a script, which current versions of datasets do not run"
)
ASKED = "What is the main point of this text, in one sentence?"
SUMMARY_TOKENS = 64
"""Most tokens of a written summary."""


class Summarise(Task):
    """Write a one-sentence summary greedily, as the answer to `ASKED` in the checkpoint's question template.

    ROUGE-1, ROUGE-2 and ROUGE-L are F-measures, each the best over the references, as SciTLDR reports them (Cachola et
    al. 2020). A small base hardly writes summaries, so the likelihood of the first reference is reported too.
    """

    default_data = ()
    needs = NEEDS
    figures: Mapping[str, FigureOf] = {
        "rouge_1": ratio("rouge_1", "items"),
        "rouge_2": ratio("rouge_2", "items"),
        "rouge_l": ratio("rouge_l", "items"),
        "retention_rouge_l": ratio("rouge_l", "full_rouge_l"),
        "nll_per_token": ratio("nats", "target_tokens"),
        "normalised_nats": retained("nats", "none_nats", "full_nats", -1),
        "token_ratio": ratio("passage_tokens", "memory_tokens"),
    }

    def load(self, source: str, config: EvaluationConfig) -> list[dict[str, Any]]:
        """`id`, `text` and `targets` of the first `limit` records."""
        return task_records(source, config, NEEDS, lambda row: _record(row, source), self.left_out)

    def items(self, records: Sequence[dict[str, Any]], tokenizer: Any, config: EvaluationConfig) -> list[Item]:
        """One item for each text."""
        prompt = question_ids(tokenizer, [ASKED], config.question_template or QUESTION)[0]
        return [
            Item(records[place]["id"], ids, asked={"prompt": prompt, "targets": records[place]["targets"]})
            for place, ids in tokenised([record["text"] for record in records], tokenizer)
            if ids
        ]

    def room(self, item: Item) -> int:
        return 1 + len(item.asked["prompt"]) + SUMMARY_TOKENS

    def run(self, method: Method, items: Sequence[Item], contexts: Sequence[list[Piece]]) -> list[Result]:
        base = method.base
        firsts = [answer_text(item.asked["targets"][0]) for item in items]
        wanted = base.tokenizer(firsts, add_special_tokens=False, verbose=False)["input_ids"]
        prefix = method.prefix(contexts)
        prompts = after(base, prefix, [item.asked["prompt"] for item in items])
        written = generate(base, prefix, prompts, [SUMMARY_TOKENS] * len(items))
        scored = score(base, prefix, prompts, [[*ids, base.eos] for ids in wanted])
        results = []
        for item, pieces, generation, target in zip(items, contexts, written, scored, strict=True):
            prediction = base.tokenizer.decode(generation.ids, skip_special_tokens=True).strip()
            results.append(
                {
                    "targets": item.asked["targets"],
                    "prediction": prediction,
                    "finished": generation.finished,
                    **rouge_scores(prediction, item.asked["targets"]),
                    "nats": -float(target[:, 0].double().sum()),
                    "target_tokens": len(target),
                    "passage_tokens": len(item.passage),
                    "memory_tokens": sum(piece.tokens for piece in pieces),
                }
            )
        return results

    def columns(self, result: Result) -> dict[str, float]:
        names = ("rouge_1", "rouge_2", "rouge_l", "nats", "target_tokens", "passage_tokens", "memory_tokens")
        return {"items": 1.0, **{name: float(result[name]) for name in names}}

    def cautions(self, results: Sequence[Result]) -> dict[str, int]:
        longer = sum(result["target_tokens"] - 1 > SUMMARY_TOKENS for result in results)
        return {f"have a first reference of more than {SUMMARY_TOKENS} tokens, where summaries are cut": longer}

    def note(self) -> str:
        return (
            f'ROUGE: F-measure without stemming, the best over the references, of the greedy answer to "{ASKED}" (at '
            f"most {SUMMARY_TOKENS} tokens). nats/token: of the first reference, EOS included."
        )


def _record(row: Row, source: str) -> dict[str, Any]:
    name = "id" if "id" in row.values else "paper_id"
    return {
        "id": record_id(row, name, default=f"{source}:{row.number}"),
        # SciTLDR's own files hold a text as a list of its sentences.
        "text": " ".join(texts_of(row, field_of(row, ("text", "abstract", "source"), NEEDS))),
        "targets": texts_of(row, field_of(row, ("targets", "target", "summary"), NEEDS)),
    }
