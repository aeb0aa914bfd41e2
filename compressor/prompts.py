"""The text formats that the base, the training stages and the decoder share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compressor.errors import CompressorError

QUESTION = "\nQuestion: {question} Answer:"
"""Follows a passage (or its memory). The answer comes after it, with a leading space, then EOS."""
CHAT = "chat"
"""Template that stands for the base's own chat template."""


def question_ids(tokenizer: Any, questions: Sequence[str], template: str = QUESTION) -> list[list[int]]:
    """Token ids of the prompts that ask questions after a passage or its memory.

    Args:
        template: text with `{question}` in it, or `chat` for the tokenizer's chat template.

    Raises:
        CompressorError: the tokenizer has no chat template, or the template has no place for the question.
    """
    if template == CHAT:
        return [_chat_ids(tokenizer, question.strip()) for question in questions]
    if "{question}" not in template:
        raise CompressorError(f"the question template {template!r} has no {{question}} in it: say where questions go")
    texts = [template.replace("{question}", question.strip()) for question in questions]
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _chat_ids(tokenizer: Any, question: str) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise CompressorError("the base's tokenizer has no chat template: give a template with {question} in it")
    turn = [{"role": "user", "content": question}]
    split = tokenizer.split_special_tokens
    # The marks of a chat are special tokens; elsewhere text that spells one is text (`compressor/base.py`).
    tokenizer.split_special_tokens = False
    try:
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    finally:
        tokenizer.split_special_tokens = split


def answer_text(answer: str) -> str:
    """The answer as the model is trained to write it after `QUESTION`."""
    return " " + answer.strip()


def answer_ids(tokenizer: Any, answers: Sequence[Sequence[str]]) -> list[list[int]]:
    """Token ids of the first of each question's right answers; none where there is no answer: EOS follows at once."""
    texts = [answer_text(right[0]) if right else "" for right in answers]
    return [list(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


# Regeneration needs no words: after a passage or its memory, BOS (without an EOS before it) means "the passage
# again". It is the trigger of the published method, and the base learns it from its repeated passages.
