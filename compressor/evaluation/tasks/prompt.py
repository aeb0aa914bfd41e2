"""Task `prompt`: follow an instruction about a passage from its memory; summaries, labels, lists, translations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from compressor.data.batches import tokenise
from compressor.data.instructions import Prompt, load_prompt
from compressor.data.prompts import QUESTION, answer_ids, question_ids
from compressor.data.questions import Question, load_questions
from compressor.errors import CompressorError
from compressor.evaluation.items import Item, Result, Task
from compressor.evaluation.metrics import ratio, retained
from compressor.evaluation.scores import SCORES, Answered
from compressor.evaluation.table import TASKS
from compressor.evaluation.tasks.qa import QuestionAnswering
from compressor.methods.interface import Method, Piece
from compressor.model.decoder import label_scores, shared
from compressor.model.generation import after

NATS = {
    "answer_nats": ratio("answer_nats", "items"),
    "normalised_nats": retained("answer_nats", "none_answer_nats", "full_answer_nats", -1),
    "normalised_nats_tuned": retained("answer_nats", "none_tuned_answer_nats", "full_tuned_answer_nats", -1),
}


class Prompted(QuestionAnswering):
    """Instructions as `Prompt` makes them: answers are written greedily, or the likeliest label is taken.

    Every instruction is about its whole passage, in however many segments that is compressed.
    """

    bounds = ("recite", "recite-tuned", "full", "none", "full-tuned", "none-tuned")

    def __init__(self, config: Any = None):
        super().__init__()
        preset = "" if config is None or config.task in TASKS else config.task
        if preset and config.prompt:
            raise CompressorError(f"--task {preset} is a prompt by itself: leave --prompt out, or give --task prompt")
        name = preset or (config.prompt if config is not None else "")
        self.prompt = load_prompt(name) if name else Prompt()
        if unknown := [one for one in self.prompt.metrics if one not in SCORES]:
            raise CompressorError(f"{name}: there is no metric {unknown[0]!r}; there are {', '.join(SCORES)}")
        self.scores = [SCORES[one] for one in self.prompt.metrics]
        self.figures = {name: figure for score in self.scores for name, figure in score.figures.items()}
        self.figures |= {} if self.prompt.answer == "label" else NATS
        self.figures |= {"token_ratio": ratio("passage_tokens", "memory_tokens")}
        self.default_data, self.needs = self.prompt.data, self.prompt.needs
        self.new_tokens, self.template = self.prompt.new_tokens, self.prompt.template

    def load(self, source: str, config: Any) -> list[Question]:
        """The first `limit` instructions of a data set."""
        prompt = self.prompt
        try:
            return load_questions(
                source,
                split=config.split or (prompt.split if source in prompt.data else None),
                limit=config.limit,
                skip_bad_records=config.skip_bad_records,
                left_out=self.left_out,
                prompt=prompt,
            )
        except CompressorError as error:
            raise error if prompt.needs in str(error) else CompressorError(f"{error}. {prompt.needs}") from None

    def items(self, records: Sequence[Question], tokenizer: Any, config: Any) -> list[Item]:
        """One item for each instruction; those about one passage share its token ids."""
        texts = list(dict.fromkeys(one.context for one in records))
        passages = dict(zip(texts, tokenise(tokenizer, texts), strict=True))
        template = config.question_template or self.template or QUESTION
        prompts = question_ids(tokenizer, [one.question for one in records], template)
        counts = Counter(one.answers[0] for one in records)
        usual = min(counts, key=lambda label: (-counts[label], label))
        labels = list(dict.fromkeys(label for one in records for label in one.choices))
        spelled = dict(zip(labels, answer_ids(tokenizer, [[label] for label in labels]), strict=True))
        return [
            Item(
                one.id,
                passages[one.context],
                asked={
                    "question": one.question,
                    "answers": list(one.answers),
                    "prompt": prompt,
                    "labels": {label: spelled[label] for label in one.choices},
                    "usual": usual,
                },
            )
            for one, prompt in zip(records, prompts, strict=True)
            if passages[one.context]
        ]

    def room(self, item: Item) -> int:
        longest = max(map(len, item.asked["labels"].values()), default=self.new_tokens)
        return 1 + len(item.asked["prompt"]) + longest

    def beyond(self, method: Method, items: Sequence[Item], contexts: Sequence[list[Piece]]) -> list[bool]:
        """See `QuestionAnswering.beyond`; of labels, they alone are scored."""
        if self.prompt.answer == "label":
            return Task.beyond(self, method, items, contexts)
        return super().beyond(method, items, contexts)

    def run(self, method: Method, items: Sequence[Item], contexts: Sequence[list[Piece]]) -> list[Result]:
        if self.prompt.answer != "label":
            return super().run(method, items, contexts)
        base, prefix = method.base, shared(contexts, method.prefix)
        prompts = after(base, prefix, [item.asked["prompt"] for item in items])
        found = label_scores(base, prefix, prompts, [list(item.asked["labels"].values()) for item in items])
        return [
            {
                "question": item.asked["question"],
                "answers": item.asked["answers"],
                "prediction": (chosen := max(logprobs, key=logprobs.__getitem__)),
                "label_logprobs": logprobs,
                **self.judged(method, item, chosen, logprobs),
                "passage_tokens": len(item.passage),
                "memory_tokens": sum(piece.tokens for piece in pieces),
            }
            for item, pieces, values in zip(items, contexts, found, strict=True)
            for logprobs in [dict(zip(item.asked["labels"], values, strict=True))]
        ]

    def judged(
        self, method: Method, item: Item, written: str, logprobs: dict[str, float] | None = None
    ) -> dict[str, Any]:
        """See `QuestionAnswering.judged`: what all metrics of the prompt add."""
        right, prompt = item.asked["answers"], self.prompt
        passage = method.base.tokenizer.decode(item.passage, skip_special_tokens=True)
        lists = prompt.answer == "list"
        members = (prompt.listed(written), prompt.listed(right[0])) if lists else ((), ())
        one = Answered(written, right, passage, members, logprobs or {}, item.asked["usual"])
        return {name: value for score in self.scores for name, value in score.columns(one).items()}

    def columns(self, result: Result) -> dict[str, float]:
        needed = {name for figure in self.figures.values() for name in figure.needs}
        return {"items": 1.0, **{name: float(result[name]) for name in sorted(needed & set(result))}}

    def cautions(self, results: Sequence[Result]) -> dict[str, int]:
        longer = sum(result.get("answer_tokens", 0) - 1 > self.new_tokens for result in results)
        return {f"have a first right answer of more than {self.new_tokens} tokens, where written ones are cut": longer}

    def note(self) -> str:
        asked = f'Asked: "{self.prompt.instruction}". ' if self.prompt.instruction else ""
        nats = "nats/answer: of the first right answer, EOS included." if self.prompt.answer != "label" else ""
        return " ".join([f"{asked}{' '.join(score.note for score in self.scores if score.note)}", nats]).strip()
