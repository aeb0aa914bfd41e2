"""A client for chat completions of any OpenAI-compatible server (vLLM, llama.cpp, ...), for long unattended runs."""

from __future__ import annotations

import email.utils
import os
import random
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from json import JSONDecodeError, loads
from typing import Any, Literal
from urllib.parse import urlsplit

from compressor import __version__
from compressor.data.generators import SCHEMA, messages, read_pairs
from compressor.errors import CompressorError, require

_ASKS = 2
"""How often an abstract is put to the model when its reply is not the JSON that was asked for."""
_LONGEST_BACKOFF = 120.0


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
    backoff: float = 1.0
    """Seconds before the first repetition, doubled each time, with jitter. A Retry-After of the server goes first."""
    timeout: float = 120.0
    """Seconds within which a request must be answered in full."""
    longest_wait: float = 600.0
    """Give up when the server asks (Retry-After) for a longer pause than this, in seconds."""
    give_up_after: int = 5
    """Stop when so many abstracts in a row got no reply at all."""
    response_format: Literal["json_schema", "json_object", "none"] = "json_schema"
    """How the form of the reply is asked for; older servers know only json_object, or nothing."""
    temperature: float = 0.0
    max_tokens: int = 600

    def __post_init__(self) -> None:
        require(urlsplit(self.url).scheme in ("http", "https"), "endpoint.url", self.url, "http://... or https://...")
        require(1 <= self.concurrency <= 1024, "endpoint.concurrency", self.concurrency, "1 to 1024")
        require(0 <= self.retries <= 100, "endpoint.retries", self.retries, "0 to 100")
        for name in ("backoff", "temperature"):
            require(getattr(self, name) >= 0, f"endpoint.{name}", getattr(self, name), "at least 0")
        for name in ("timeout", "longest_wait", "give_up_after", "max_tokens"):
            require(getattr(self, name) > 0, f"endpoint.{name}", getattr(self, name), "above 0")


class _Passing(Exception):
    """A failure that may be gone when the request is repeated; `wait` is the server's wish in seconds."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class _Stopped(Exception):
    """The run is being given up."""


class EndpointGenerator:
    """Replies of a model behind an endpoint, several requests at a time."""

    def __init__(self, config: EndpointConfig, count: int) -> None:
        """`count`: questions asked for about each abstract.

        Raises:
            CompressorError: no model is named, the key is not there, or httpx2 is not installed.
        """
        try:
            import httpx2
        except ImportError:
            raise CompressorError(
                "generator = endpoint needs httpx2, which is not installed: pip install 'kv-compressor[endpoint]'"
            ) from None
        require(bool(config.model), "endpoint.model", config.model, "the name the server knows the model by")
        headers = {"User-Agent": f"kv-compressor/{__version__}"}
        if config.api_key_variable is not None:
            key = os.environ.get(config.api_key_variable)
            if not key:
                raise CompressorError(
                    f"endpoint.api_key_variable names {config.api_key_variable}, which is not set in the environment"
                )
            headers["Authorization"] = f"Bearer {key}"
        self.config, self.count = config, count
        self._http = httpx2
        limits = httpx2.Limits(max_connections=config.concurrency, max_keepalive_connections=config.concurrency)
        self._client = httpx2.Client(headers=headers, timeout=config.timeout, limits=limits)
        self._url = f"{config.url.rstrip('/')}/chat/completions"
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._not_before = 0.0

    def replies(self, abstracts: Sequence[str]) -> Iterator[tuple[int, str | None]]:
        """See `Generator`; each reply comes as soon as it is there.

        Raises:
            CompressorError: the server refuses the request as such, or keeps failing.
        """
        pool = ThreadPoolExecutor(self.config.concurrency, thread_name_prefix="endpoint")
        waiting: dict[Future[str], int] = {}
        todo = iter(range(len(abstracts)))
        failed_in_a_row = 0
        fatal: CompressorError | None = None
        try:
            while True:
                while fatal is None and len(waiting) < 2 * self.config.concurrency:
                    index = next(todo, None)
                    if index is None:
                        break
                    waiting[pool.submit(self._reply, abstracts[index])] = index
                if not waiting:
                    break
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    index = waiting.pop(future)
                    try:
                        reply = future.result()
                    except _Stopped:
                        continue
                    except CompressorError as error:
                        fatal = fatal or error
                    except _Passing as failure:
                        failed_in_a_row += 1
                        if failed_in_a_row < self.config.give_up_after:
                            yield index, None
                        else:
                            fatal = fatal or CompressorError(
                                f"{self._url} gave no reply for {failed_in_a_row} abstracts in a row, each after "
                                f"{self.config.retries + 1} requests, the last time: {failure}. Run the same command "
                                "later: it goes on after the replies it has"
                            )
                    else:
                        failed_in_a_row = 0
                        yield index, reply
                if fatal is not None:
                    # What is under way may still bring replies; they are passed on before the run ends.
                    self._stop.set()
                    waiting = {future: index for future, index in waiting.items() if not future.cancel()}
        finally:
            self._stop.set()
            self._client.close()
            pool.shutdown(wait=True, cancel_futures=True)
        if fatal is not None:
            raise fatal

    def _reply(self, abstract: str) -> str:
        """What the model says about an abstract; asked once more when it is not the JSON that was asked for."""
        body: dict[str, Any] = {
            "model": self.config.model,
            "messages": messages(abstract, self.count),
            "temperature": self.config.temperature,
            "max_tokens": self.config.max_tokens,
        }
        if self.config.response_format == "json_schema":
            schema = {"name": "questions", "strict": True, "schema": SCHEMA}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif self.config.response_format == "json_object":
            body["response_format"] = {"type": "json_object"}
        reply = ""
        for _ in range(_ASKS):
            reply = self._completion(body)
            if read_pairs(reply) is not None:
                break
        return reply

    def _completion(self, body: dict[str, Any]) -> str:
        """One completion, repeating the request while failures may pass."""
        for attempt in range(self.config.retries + 1):
            self._pause_until(self._not_before)
            try:
                return self._post(body)
            except _Passing as failure:
                pause = min(_LONGEST_BACKOFF, self.config.backoff * 2**attempt) * random.uniform(0.5, 1.5)
                if failure.wait is not None:
                    if failure.wait > self.config.longest_wait:
                        raise CompressorError(
                            f"{self._url} asks to wait {failure.wait:.0f} s, more than endpoint.longest_wait: run the "
                            "same command later, the replies so far are kept"
                        ) from None
                    pause = failure.wait
                    with self._lock:  # the server means all of us
                        self._not_before = max(self._not_before, time.monotonic() + pause)
                if attempt == self.config.retries:
                    raise
                if pause >= 5:
                    print(f"{failure}; trying again in {pause:.0f} s", file=sys.stderr, flush=True)
            self._pause_until(time.monotonic() + pause)
        raise AssertionError("unreachable")

    def _pause_until(self, moment: float) -> None:
        if self._stop.wait(max(0.0, moment - time.monotonic())):
            raise _Stopped

    def _post(self, body: dict[str, Any]) -> str:
        """One request. The library's timeout is for each read; a server that drips is stopped by the deadline."""
        deadline = time.monotonic() + self.config.timeout
        try:
            with self._client.stream("POST", self._url, json=body) as response:
                chunks = []
                for chunk in response.iter_bytes():
                    chunks.append(chunk)
                    if time.monotonic() > deadline:
                        raise _Passing(f"no full answer within {self.config.timeout:g} s")
                status, headers = response.status_code, response.headers
        except self._http.TimeoutException:
            raise _Passing(f"no answer within {self.config.timeout:g} s") from None
        except (self._http.TransportError, self._http.DecodingError, self._http.StreamError) as error:
            raise _Passing(f"the connection failed ({error or type(error).__name__})") from None
        except RuntimeError:  # the client was closed under us
            if self._stop.is_set():
                raise _Stopped from None
            raise
        content = b"".join(chunks)
        if status in (408, 409, 425, 429) or status >= 500:
            raise _Passing(f"the server answered {status}", retry_after(headers.get("Retry-After")))
        if status != 200:
            said = content.decode(errors="replace").strip()[:300]
            raise CompressorError(f"{self._url} answered {status}: {said or 'nothing'}. {_advice(status)}")
        try:
            reply = loads(content)["choices"][0]["message"]["content"]
        except (JSONDecodeError, UnicodeDecodeError, KeyError, IndexError, TypeError):
            raise _Passing(f"the server's answer is no chat completion: {content[:80]!r}") from None
        return reply if isinstance(reply, str) else ""


def _advice(status: int) -> str:
    if status in (401, 403):
        return "Name the environment variable with the key: endpoint.api_key_variable"
    if status == 404:
        return "Check endpoint.url (it ends in /v1 for most servers) and endpoint.model"
    return "If it does not know the response format, set endpoint.response_format to json_object or none"


def retry_after(value: str | None) -> float | None:
    """Seconds to wait that a Retry-After header states, as a number or an HTTP date; None if it holds neither."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
