"""Questions asked of an instruct model behind any OpenAI-compatible server (vLLM, llama.cpp, ...), several at a time.

What it is told, what it must answer (`read_pairs`), and what is accepted of that (`check_pair`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from compressor.errors import CompressorError, lacking, require

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
_ASKS = 2
"""How often an abstract is put to the model when its reply is not the JSON that was asked for."""
_GIVE_UP_AFTER = 5
"""Abstracts in a row without a reply after which a run stops."""


class Pair(NamedTuple):
    """A question and its answer, as a model wrote them or as they were accepted."""

    question: str
    answer: str


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
class EndpointConfig:
    """An OpenAI-compatible server and how to behave towards it."""

    url: str = "http://localhost:8000/v1"
    """Base URL; /chat/completions is appended."""
    model: str = ""
    """Name of the model as the server knows it."""
    api_key_variable: str | None = None
    """Environment variable that holds the key; by default none is sent."""
    concurrency: int = 8
    """Requests under way at the same time."""
    retries: int = 6
    """How often one request is repeated after a failure that may pass (429, 5xx, a broken connection, no answer)."""
    timeout: float = 120.0
    """Seconds without an answer after which a request counts as failed."""
    response_format: Literal["json_schema", "json_object", "none"] = "json_schema"
    """How the form of the reply is asked for; older servers know only json_object, or nothing."""
    temperature: float = 0.0
    max_tokens: int = 600

    def __post_init__(self) -> None:
        require(urlsplit(self.url).scheme in ("http", "https"), "endpoint.url", self.url, "http://... or https://...")
        require(1 <= self.concurrency <= 1024, "endpoint.concurrency", self.concurrency, "1 to 1024")
        require(0 <= self.retries <= 100, "endpoint.retries", self.retries, "0 to 100")
        require(self.temperature >= 0, "endpoint.temperature", self.temperature, "at least 0")
        for name in ("timeout", "max_tokens"):
            require(getattr(self, name) > 0, f"endpoint.{name}", getattr(self, name), "above 0")


def replies(config: EndpointConfig, abstracts: Sequence[str], count: int) -> Iterator[str | None]:
    """What the model says about each abstract, in order; None where the server kept failing.

    Args:
        count: questions asked for about each abstract.

    Raises:
        CompressorError: no model is named, the key or the library is missing, the server refuses a request as such, or
            it keeps failing.
    """
    try:
        import openai  # optional
    except ImportError:
        raise lacking("generator = endpoint", "openai", "endpoint") from None
    require(bool(config.model), "endpoint.model", config.model, "the name the server knows the model by")
    key = os.environ.get(config.api_key_variable or "", "")
    if config.api_key_variable is not None and not key:
        raise CompressorError(
            f"endpoint.api_key_variable names {config.api_key_variable}, which is not set in the environment"
        )
    client = openai.OpenAI(
        base_url=config.url, api_key=key or "none", timeout=config.timeout, max_retries=config.retries
    )
    complete: Any = client.chat.completions.create
    settings: dict[str, Any] = {"temperature": config.temperature, "max_tokens": config.max_tokens}
    if config.response_format != "none":
        settings["response_format"] = {"type": config.response_format}
    if config.response_format == "json_schema":
        settings["response_format"]["json_schema"] = {"name": "questions", "strict": True, "schema": SCHEMA}

    def reply(abstract: str) -> str | Exception:
        request = REQUEST.format(abstract=abstract, count=count)
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": request}]
        text = ""
        try:
            for _ in range(_ASKS):
                chat = complete(model=config.model, messages=messages, **settings)
                text = (chat.choices[0].message.content or "") if chat.choices else ""
                if read_pairs(text) is not None:
                    break
        except (openai.APIError, ValueError) as error:
            return error
        return text

    failed = 0
    pool = ThreadPoolExecutor(config.concurrency, thread_name_prefix="endpoint")
    try:
        for found in pool.map(reply, abstracts):
            failed = failed + 1 if isinstance(found, Exception) else 0
            status = getattr(found, "status_code", 0)
            if 400 <= status < 500 and status not in (408, 409, 429):
                said = found.response.text.strip()[:300]  # type: ignore[union-attr]
                raise CompressorError(f"{config.url} answered {status}: {said or 'nothing'}. {_advice(status)}")
            if failed >= _GIVE_UP_AFTER:
                raise CompressorError(
                    f"{config.url} gave no reply for {failed} abstracts in a row, each after {config.retries + 1} "
                    f"requests, the last time: {found}. Is the server running, and endpoint.url right?"
                )
            yield found if isinstance(found, str) else None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        client.close()


def _advice(status: int) -> str:
    if status in (401, 403):
        return "Name the environment variable with the key: endpoint.api_key_variable"
    if status == 404:
        return "Check endpoint.url (it ends in /v1 for most servers) and endpoint.model"
    return "If it does not know the response format, set endpoint.response_format to json_object or none"
