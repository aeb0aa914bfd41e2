"""The text formats that the base, the training stages and the decoder share."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from compressor.errors import CompressorError

QUESTION = "\nQuestion: {question} Answer:"
"""Follows a passage (or its memory). The answer comes after it, with a leading space, then EOS."""
CHAT = "chat"
"""Template that stands for the base's own chat template; arguments may follow: chat {"enable_thinking": false}."""
_PLACE = "\ue000question\ue001"
"""Stands for a question while a chat template is rendered; of private characters, which no template has."""


def question_ids(tokenizer: Any, questions: Sequence[str], template: str = QUESTION) -> list[list[int]]:
    """Token ids of the prompts that ask questions after a passage or its memory.

    Args:
        template: text with `{question}` in it, or `chat` for the tokenizer's chat template, followed by its arguments
            as a JSON object where it takes any.

    Raises:
        CompressorError: the tokenizer has no chat template, or the template has no place for the question.
    """
    if not isinstance(template, str):
        raise CompressorError(
            f"the question template is {type(template).__name__}, not text: give one with {{question}}"
        )
    arguments = chat_arguments(template)
    if arguments is not None:
        return [_chat_ids(tokenizer, question.strip(), arguments) for question in questions]
    if "{question}" not in template:
        raise CompressorError(f"the question template {template!r} has no {{question}} in it: say where questions go")
    texts = [template.replace("{question}", question.strip()) for question in questions]
    return _ids(tokenizer, texts)


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    from compressor.data.batches import tokenise  # imports torch, without which settings are read

    return tokenise(tokenizer, texts)


def chat_arguments(template: str) -> dict[str, Any] | None:
    """Arguments for the chat template in `chat {...}`; None where `template` is another one.

    Raises:
        CompressorError: what follows `chat` is no JSON object.
    """
    rest = template.removeprefix(CHAT).strip()
    if not template.startswith(CHAT) or (rest and not rest.startswith("{")) or "{question}" in template:
        return None
    try:
        return json.loads(rest or "{}")
    except json.JSONDecodeError as error:
        raise CompressorError(
            f"the question template {template!r} has no JSON object after {CHAT}: {error.msg} at its character "
            f"{error.pos + 1}"
        ) from None


def _chat_ids(tokenizer: Any, question: str, arguments: dict[str, Any]) -> list[int]:
    """The chat's marks are special tokens; a question that spells one, or another that the template writes, is text."""
    if not getattr(tokenizer, "chat_template", None):
        raise CompressorError("the base's tokenizer has no chat template: give a template with {question} in it")
    from jinja2 import TemplateError  # commands that ask nothing start without it

    def render(content: str) -> str:
        turn = [{"role": "user", "content": content}]
        try:
            return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, **arguments)
        except (TemplateError, TypeError) as error:
            raise CompressorError(f"the base's chat template fails with the arguments {arguments}: {error}") from None

    def ids_of(text: str, split: bool) -> list[int]:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=split, verbose=False)["input_ids"]

    spelled = [token for token in _control_tokens(tokenizer) if token in question]
    if not spelled:
        return ids_of(render(question), split=False)
    before, *between = render(_PLACE).split(_PLACE)
    # A cut after the first character keeps even tokens that are not special from being read as one.
    pattern = "|".join(re.escape(token) for token in sorted(spelled, key=len, reverse=True))
    pieces = re.sub(pattern, lambda match: match[0][0] + _PLACE + match[0][1:], question).split(_PLACE)
    written = [token for piece in pieces for token in ids_of(piece, split=True)]
    return [*ids_of(before, split=False), *(one for rest in between for one in [*written, *ids_of(rest, split=False)])]


def _control_tokens(tokenizer: Any) -> list[str]:
    """Special tokens, and added ones that the chat template writes (`<think>`)."""
    added = {one.content: one.special for one in tokenizer.added_tokens_decoder.values()}
    template = str(tokenizer.chat_template)
    return [text for text, special in added.items() if len(text.strip()) > 1 and (special or text in template)]


def answer_text(answer: str) -> str:
    """The answer as the model is trained to write it after `QUESTION`."""
    return " " + answer.strip()


def answer_ids(tokenizer: Any, answers: Sequence[Sequence[str]]) -> list[list[int]]:
    """Token ids of the first of each question's right answers; none where there is no answer: EOS follows at once."""
    texts = [answer_text(right[0]) if right else "" for right in answers]
    return _ids(tokenizer, texts)


# Regeneration needs no words: after a passage or its memory, BOS (without an EOS before it) means "the passage
# again". It is the trigger of the published method, and the base learns it from its repeated passages.
