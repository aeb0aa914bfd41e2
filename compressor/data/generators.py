"""Asking an instruct model for questions about an abstract: what it is told, what it must answer, what is accepted.

A generator turns abstracts into replies (text); `read_pairs` reads a reply and `check_pair` decides on each pair. The
model runs here, through transformers, or behind an OpenAI-compatible endpoint (`compressor/data/endpoint.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from compressor.errors import CompressorError, require

SYSTEM = (
    "You write reading-comprehension questions about abstracts of scientific papers. Every answer must be copied word "
    "for word from the abstract: a short span of 1 to 10 words, such as a name, a number with its unit or a short "
    "phrase. A question must have exactly one right answer, must be understood without seeing the abstract, must not "
    "contain its answer and must not be answerable with yes or no."
)
REQUEST = (
    "Abstract:\n{abstract}\n\nWrite {count} different questions about this abstract with their answers. Reply with "
    'JSON only, in this form: {{"pairs": [{{"question": "...", "answer": "..."}}]}}'
)
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "pairs": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"question": {"type": "string"}, "answer": {"type": "string"}},
                "required": ["question", "answer"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["pairs"],
    "additionalProperties": False,
}
"""JSON schema of a reply."""

LONGEST_ANSWER = 20


class Pair(NamedTuple):
    """A question and its answer, as a model wrote them or as they were accepted."""

    question: str
    answer: str


class Generator(Protocol):
    """A model that is asked for questions."""

    def replies(self, abstracts: Sequence[str]) -> Iterator[tuple[int, str | None]]:
        """Index of each abstract with the reply, in any order; None where there was none."""


def messages(abstract: str, count: int) -> list[dict[str, str]]:
    """The conversation that asks for `count` questions about an abstract."""
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": REQUEST.format(abstract=abstract, count=count)},
    ]


def read_pairs(reply: str) -> list[Pair] | None:
    """The pairs of a reply, also where it stands in other text; None if it does not keep to `SCHEMA`."""
    start, end = reply.find("{"), reply.rfind("}")
    try:
        value = json.loads(reply[start : end + 1])
        pairs = value["pairs"]
        if not isinstance(pairs, list):
            return None
        found = [Pair(pair["question"], pair["answer"]) for pair in pairs]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if all(isinstance(text, str) for pair in found for text in pair) else None


def check_pair(abstract: str, pair: Pair) -> Pair | str:
    """The pair as it is accepted, its answer written as in the abstract; or the reason why it is rejected.

    Reasons: `question_blank`, `answer_blank`, `answer_too_long` (more than `LONGEST_ANSWER` words), `not_a_span`,
    `answer_in_question`, `not_storable` (half a surrogate pair).
    """
    question = " ".join(pair.question.split())
    answer = " ".join(pair.answer.split())
    if not question:
        return "question_blank"
    if not answer.strip(" .,;:\"'"):
        return "answer_blank"
    if len(answer.split()) > LONGEST_ANSWER:
        return "answer_too_long"
    try:
        (question + answer).encode()
    except UnicodeEncodeError:
        return "not_storable"
    span = _span(abstract, answer) or _span(abstract, answer.strip(" .,;:\"'"))
    if span is None:
        return "not_a_span"
    return "answer_in_question" if _span(question, span) else Pair(question, span)


def _span(text: str, answer: str) -> str | None:
    """Whole words of `text` that are `answer`, as they are written there; the same case is preferred."""
    pattern = rf"(?<!\w){re.escape(answer)}(?!\w)"
    match = re.search(pattern, text) or re.search(pattern, text, re.IGNORECASE)
    return match.group() if match else None


@dataclass
class TransformersConfig:
    """An instruct model run here, in batches."""

    model: str = "Qwen/Qwen2.5-7B-Instruct"
    """Hub id or folder of a causal LM with a chat template."""
    batch_size: int = 16
    max_new_tokens: int = 600
    device: str | None = None
    """By default the first GPU, else the CPU."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        require(bool(self.model), "transformers.model", self.model, "a hub id or a folder")
        require(self.batch_size >= 1, "transformers.batch_size", self.batch_size, "at least 1")
        require(self.max_new_tokens >= 1, "transformers.max_new_tokens", self.max_new_tokens, "at least 1")


class TransformersGenerator:
    """Greedy replies of an instruct model, a batch at a time."""

    def __init__(self, config: TransformersConfig, count: int) -> None:
        """`count`: questions asked for about each abstract.

        Raises:
            CompressorError: the model cannot be loaded or has no chat template.
        """
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.config, self.count = config, count
        self.device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(config.model, padding_side="left")
            model = AutoModelForCausalLM.from_pretrained(config.model, dtype=getattr(torch, config.dtype))
        except (OSError, ValueError) as error:
            raise CompressorError(
                f"transformers.model = {config.model!r} cannot be loaded: {str(error).splitlines()[0]}. Check the name "
                "and the network, or give a folder"
            ) from None
        if not self.tokenizer.chat_template:
            raise CompressorError(
                f"transformers.model = {config.model!r} has no chat template, so it is no instruct model: choose one "
                "that was tuned to follow instructions"
            )
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model = model.eval().to(self.device)

    def replies(self, abstracts: Sequence[str]) -> Iterator[tuple[int, str | None]]:
        """See `Generator`; here in order."""
        import torch

        for start in range(0, len(abstracts), self.config.batch_size):
            batch = [messages(abstract, self.count) for abstract in abstracts[start : start + self.config.batch_size]]
            inputs: Any = self.tokenizer.apply_chat_template(
                batch, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
            )
            inputs = inputs.to(self.device)
            with torch.inference_mode():
                output = self.model.generate(
                    **inputs,
                    max_new_tokens=self.config.max_new_tokens,
                    do_sample=False,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    pad_token_id=self.tokenizer.pad_token_id,
                )
            new = output[:, inputs["input_ids"].shape[1] :]
            yield from enumerate(self.tokenizer.batch_decode(new, skip_special_tokens=True), start=start)
