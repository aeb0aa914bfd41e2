"""Task `regeneration`: write the passage back from its memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compressor.data.batches import by_length
from compressor.data.records import load_texts
from compressor.evaluation.items import Item, Result, Task, tokenised
from compressor.evaluation.metrics import (
    BLEU_COLUMNS,
    CHRF_COLUMNS,
    CORPUS_BLEU,
    CORPUS_CHRF,
    FigureOf,
    bleu_signature,
    bleu_statistics,
    chrf_signature,
    chrf_statistics,
    ratio,
    rouge_l,
    unspaced,
    words,
)
from compressor.methods.interface import Method, Piece
from compressor.model.decoder import score
from compressor.model.fidelity import rewrite
from compressor.model.generation import after, regeneration_limit


def says(tokenizer: Any, ids: Sequence[int], text: str) -> bool:
    """Whether the first tokens of a text say how it begins, but for a character that they end within."""
    return text.startswith(tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd"))


class Regeneration(Task):
    """Write the passage back from its memory, greedily, and score the passage under its memory.

    For a length L the passages of at least L tokens are taken and cut to their first L tokens, as in the published
    evaluation (arXiv 2408.03094); the text of the cut passage is what must come back. Passages over the compressor's
    limit are compressed, written and scored in segments, each of which ends with an EOS that counts as a token.
    """

    default_data = ("arxiv-test",)
    figures: Mapping[str, FigureOf] = {
        "bleu": CORPUS_BLEU,
        "chrf": CORPUS_CHRF,
        "rouge_l": ratio("rouge_l", "passages"),
        "exact_match": ratio("exact_match", "passages"),
        "token_accuracy": ratio("correct_tokens", "target_tokens"),
        "nll_per_token": ratio("nats", "target_tokens"),
        "token_ratio": ratio("passage_tokens", "memory_tokens"),
        "byte_ratio": ratio("passage_bytes", "memory_bytes"),
    }

    def load(self, source: str, config: Any) -> Any:
        """Passages with `id` and `text`."""
        return load_texts(
            source,
            split=config.split,
            field=config.text_field,
            skip_bad_records=config.skip_bad_records,
            left_out=self.left_out,
        )

    def items(self, records: Any, tokenizer: Any, config: Any) -> list[Item]:
        """The first `limit` long enough passages for each length."""
        found: dict[int | None, list[Item]] = {length: [] for length in self.lengths(config)}
        for place, ids in tokenised(records["text"], tokenizer):
            record = records[place]
            if not ids:
                self.left_out.add("no_tokens", record["id"])
            for length, row in found.items():
                if len(row) != config.limit and (item := self.item(record, ids, length, tokenizer)):
                    row.append(item)
            if config.limit is not None and all(len(row) == config.limit for row in found.values()):
                break
        return [item for row in found.values() for item in row]

    def item(self, record: Any, ids: list[int], length: int | None, tokenizer: Any) -> Item | None:
        """The item of a text at a length; None where it is too short."""
        if not ids or len(ids) < (length or 1):
            return None
        lossy = not says(tokenizer, ids[:length], record["text"])
        return Item(record["id"], ids[:length], length, asked={"lossy": lossy})

    def beyond(self, method: Method, items: Sequence[Item], contexts: Sequence[list[Piece]]) -> list[bool]:
        """Pieces are written back apart: each must fit."""
        most = method.base.positions
        return [
            most is not None
            and any(method.reach([piece]) + 1 + regeneration_limit(len(piece.ids)) > most for piece in pieces)
            for pieces in contexts
        ]

    def run(self, method: Method, items: Sequence[Item], contexts: Sequence[list[Piece]]) -> list[Result]:
        base = method.base
        flat = [piece for pieces in contexts for piece in pieces]
        written: list[list[int]] = [[] for _ in flat]
        finished = [False] * len(flat)
        scores: list[list[float]] = [[] for _ in flat]
        # Segments of similar length end together; a batch of long passages has more segments than passages.
        for chosen in by_length([len(piece.ids) for piece in flat], len(items)):
            prefix = method.prefix([[flat[i]] for i in chosen])
            prompts = after(base, prefix, [[base.bos]] * len(chosen))
            targets = score(base, prefix, prompts, [[*flat[i].ids, base.eos] for i in chosen])
            generations = rewrite(base, prefix, [flat[i].ids for i in chosen], targets)
            for i, generation, target in zip(chosen, generations, targets, strict=True):
                written[i], finished[i] = generation.ids, generation.finished
                scores[i] = [-float(target[:, 0].double().sum()), float(target[:, 1].sum()), len(target)]
        results, place = [], 0
        for item, pieces in zip(items, contexts, strict=True):
            mine = range(place, place + len(pieces))
            place += len(pieces)
            reference = base.tokenizer.decode(item.passage, skip_special_tokens=True)
            prediction = base.tokenizer.decode([t for i in mine for t in written[i]], skip_special_tokens=True)
            results.append(
                {
                    "reference": reference,
                    "lossy": bool(item.asked.get("lossy")),
                    "prediction": prediction,
                    "finished": all(finished[i] for i in mine),
                    "rouge_l": rouge_l(prediction, reference),
                    "exact_match": prediction == reference,
                    "nats": sum(scores[i][0] for i in mine),
                    "correct_tokens": int(sum(scores[i][1] for i in mine)),
                    "target_tokens": int(sum(scores[i][2] for i in mine)),
                    "passage_tokens": len(item.passage),
                    "memory_tokens": sum(piece.tokens for piece in pieces),
                    "passage_bytes": len(reference.encode()),
                    "memory_bytes": sum(piece.nbytes for piece in pieces),
                    **bleu_statistics(prediction, reference),
                    **chrf_statistics(prediction, reference),
                }
            )
        return results

    def columns(self, result: Result) -> dict[str, float]:
        names = (
            *("rouge_l", "exact_match", "nats", "correct_tokens", "target_tokens"),
            *("passage_tokens", "memory_tokens", "passage_bytes", "memory_bytes"),
            *(*BLEU_COLUMNS, *CHRF_COLUMNS),
        )
        return {"passages": 1.0, **{name: float(result[name]) for name in names}}

    def cautions(self, results: Sequence[Result]) -> dict[str, int]:
        references = [result["reference"] for result in results]
        return {
            "are in a script without spaces, a stretch of which is one word to BLEU: read chrF and ROUGE-L": sum(
                unspaced(text) for text in references
            ),
            "have no word that ROUGE-L could count: it is 1 for a copy and 0 for anything else": sum(
                not words(text) for text in references
            ),
            "lose something in the tokenizer already: figures are against what its tokens say, not the text": sum(
                result["lossy"] for result in results
            ),
        }

    def note(self) -> str:
        return (
            f"BLEU: {bleu_signature()}. chrF: {chrf_signature()}. "
            "nats/token and token accuracy: teacher-forced, EOS included. token ratio: "
            "passage tokens / memory tokens. byte ratio: UTF-8 bytes of the passage / bytes of its memory held in "
            "bfloat16."
        )
