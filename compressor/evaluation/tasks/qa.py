"""Task `qa`: answer questions about a passage from its memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compressor.data.asked import answered_by
from compressor.data.questions import Question, load_questions
from compressor.evaluation.metrics import FigureOf, answer_scores, difference, ratio, retained
from compressor.evaluation.tasks.interface import Item, Result, Task, tokenised
from compressor.evaluation.tasks.quality import passage_nats
from compressor.evaluation.words import answer_words
from compressor.generation import ANSWER_TOKENS, after, generate, score
from compressor.methods.encoder import equal_segments
from compressor.methods.interface import Method, Piece
from compressor.prompts import QUESTION, answer_text, question_ids

if TYPE_CHECKING:
    from compressor.evaluation.command import EvaluationConfig


class QuestionAnswering(Task):
    """Answer greedily after the passage's memory and a prompt; exact match and F1 as SQuAD's official script.

    Every question is one item. A passage over the compressor's limit is compressed in segments, whose memories the
    decoder sees one after the other.
    """

    default_data = ("squad-dev", "arxivqa-test")
    settings = ("question_columns", "question_tokens")
    figures: Mapping[str, FigureOf] = {
        "em": ratio("em", "questions", 100),
        "f1": ratio("f1", "questions", 100),
        "f1_difference": difference("f1", "full_f1", "questions", 100),
        "retention_em": ratio("em", "full_em"),
        "retention_f1": ratio("f1", "full_f1"),
        "normalised_f1": retained("f1", "none_f1", "full_f1"),
        "answer_nats": ratio("answer_nats", "questions"),
        "normalised_nats": retained("answer_nats", "none_answer_nats", "full_answer_nats", -1),
        "token_ratio": ratio("passage_tokens", "memory_tokens"),
    }

    def load(self, source: str, config: EvaluationConfig) -> list[Question]:
        """The first `limit` questions of a data set."""
        return load_questions(source, split=config.split, limit=config.limit, columns=config.question_columns or None)

    def items(self, records: Sequence[Question], tokenizer: Any, config: EvaluationConfig) -> list[Item]:
        """One item for each question; questions about one context share its token ids.

        With `question_tokens` a question is about the segment of its context that holds the answer.
        """
        contexts = list(dict.fromkeys(record.context for record in records))
        ids = {contexts[place]: ids for place, ids in tokenised(contexts, tokenizer)}
        parts = {context: [one] for context, one in ids.items()}
        if config.question_tokens is not None:
            parts = {context: equal_segments(one, config.question_tokens) for context, one in ids.items() if one}
        prompts = question_ids(tokenizer, [r.question for r in records], config.question_template or QUESTION)
        return [
            Item(
                record.id,
                parts[record.context][answered_by(parts[record.context], tokenizer, record.answers[0])],
                asked={"question": record.question, "answers": list(record.answers), "prompt": prompt},
            )
            for record, prompt in zip(records, prompts, strict=True)
            if ids[record.context]
        ]

    def room(self, item: Item) -> int:
        return 1 + len(item.asked["prompt"]) + ANSWER_TOKENS

    def run(self, method: Method, items: Sequence[Item], contexts: Sequence[list[Piece]]) -> list[Result]:
        base = method.base
        texts = [answer_text(item.asked["answers"][0]) for item in items]
        answers = base.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        prefix = method.prefix(contexts)
        prompts = after(base, prefix, [item.asked["prompt"] for item in items])
        with method.decoding():
            written = generate(base, prefix, prompts, [ANSWER_TOKENS] * len(items))
            scored = score(base, prefix, prompts, [[*answer, base.eos] for answer in answers])
        nats = passage_nats(method, contexts)
        results = []
        for row, item in enumerate(items):
            prediction = base.tokenizer.decode(written[row].ids, skip_special_tokens=True).strip()
            exact, f1 = answer_scores(prediction, item.asked["answers"])
            results.append(
                {
                    "question": item.asked["question"],
                    "answers": item.asked["answers"],
                    "prediction": prediction,
                    "em": exact,
                    "f1": f1,
                    "answer_nats": -float(scored[row][:, 0].double().sum()),
                    "answer_tokens": len(scored[row]),
                    "prediction_logprob": sum(written[row].logprobs),
                    "passage_nats_per_token": nats[row],
                    "passage_tokens": len(item.passage),
                    "memory_tokens": sum(piece.tokens for piece in contexts[row]),
                }
            )
        return results

    def columns(self, result: Result) -> dict[str, float]:
        names = ("em", "f1", "answer_nats", "passage_tokens", "memory_tokens")
        return {"questions": 1.0, **{name: float(result[name]) for name in names}}

    def quality(self, results: Sequence[Result]) -> dict[str, tuple[list[float], list[float]]]:
        """Flags known without the right answer, each beside the F1 it should predict."""
        flags = {}
        for name in ("passage_nats_per_token", "prediction_logprob"):
            known = [result for result in results if result[name] is not None]
            flags[f"{name}~f1"] = ([result[name] for result in known], [result["f1"] for result in known])
        return flags

    def cautions(self, results: Sequence[Result]) -> dict[str, int]:
        longer = sum(result["answer_tokens"] - 1 > ANSWER_TOKENS for result in results)
        bare = sum(not answer_words(one) for result in results for one in result["answers"][:1])
        return {
            f"have a first right answer of more than {ANSWER_TOKENS} tokens, where written ones are cut": longer,
            "have a first right answer of punctuation or articles alone, which is compared as it stands": bare,
        }

    def note(self) -> str:
        return (
            "EM, F1: SQuAD's official normalisation, best of the right answers; scripts without spaces by characters. "
            "F1 - full: paired difference to the full passage. EM / full, F1 / full: retention as published. "
            "nats/answer: negative log-likelihood of the first right answer, EOS included. token ratio: "
            "passage tokens / memory tokens."
        )
