"""A client for OAI-PMH 2.0 (https://www.openarchives.org/OAI/openarchivesprotocol.html), as arXiv serves it.

A harvest is a chain of pages joined by resumption tokens. Every page is stored as it came, so a
harvest that was interrupted goes on after its last page, and a finished one is read without a network.
"""

from __future__ import annotations

import email.utils
import gzip
import http.client
import random
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from compressor import __version__
from compressor.errors import CompressorError
from compressor.files import atomic_file, read_json, write_json

PREFIXES = ("arXiv", "arXivRaw")


@dataclass(frozen=True)
class Harvest:
    """One ListRecords request and how to behave while making it."""

    url: str
    """Base URL, such as https://oaipmh.arxiv.org/oai."""
    metadata_prefix: str = "arXiv"
    """`arXiv` or `arXivRaw`; both state the date of the first version."""
    set: str | None = None
    """Only this set, such as "cs" or "physics:hep-th"."""
    from_date: str | None = None
    """Only records changed on or after this day (yyyy-mm-dd). Not the day they were written."""
    until_date: str | None = None
    """Only records changed on or before this day."""
    delay: float = field(default=3.0, kw_only=True)
    """Seconds between two requests; arXiv asks for at least 3."""
    retries: int = field(default=8, kw_only=True)
    """How often one request is repeated after a failure that may pass."""
    backoff: float = field(default=2.0, kw_only=True)
    """Seconds before the first repetition, doubled each time (with jitter) up to five minutes."""
    timeout: float = field(default=120.0, kw_only=True)
    """Seconds without an answer after which a request counts as failed."""
    longest_wait: float = field(default=3600.0, kw_only=True)
    """Give up when the server asks (Retry-After) for a longer pause than this, in seconds."""

    def __post_init__(self) -> None:
        if urllib.parse.urlsplit(self.url).scheme not in ("http", "https"):
            raise CompressorError(f"OAI base URL {self.url!r} must start with http:// or https://")
        if self.metadata_prefix not in PREFIXES:
            raise CompressorError(
                f"OAI metadata prefix {self.metadata_prefix!r} is not read here: it must be one of {PREFIXES}"
            )
        for name, value in (("from", self.from_date), ("until", self.until_date)):
            if value is not None and not re.fullmatch(r"\d{4}-\d\d-\d\d", value):
                raise CompressorError(f"OAI {name} date {value!r} must be written yyyy-mm-dd")
        for name in ("delay", "retries", "backoff"):
            if getattr(self, name) < 0:
                raise CompressorError(f"OAI {name} = {getattr(self, name)} must be at least 0")
        for name in ("timeout", "longest_wait"):
            if getattr(self, name) <= 0:
                raise CompressorError(f"OAI {name} = {getattr(self, name)} must be positive")

    def arguments(self) -> dict[str, str]:
        """The arguments of the first request."""
        wanted = {"set": self.set, "from": self.from_date, "until": self.until_date}
        given = {name: value for name, value in wanted.items() if value is not None}
        return {"verb": "ListRecords", "metadataPrefix": self.metadata_prefix, **given}


@dataclass
class Page:
    """What one stored response holds: records as flat fields, and the token of the next page."""

    records: list[dict[str, Any]]
    """`id, title, abstract, categories, comments, date`, or `id, deleted` for a deleted record."""
    token: str | None
    error: tuple[str, str] | None = None
    """The OAI error code and its text."""


class _Passing(Exception):
    """A failure that may be gone when the request is repeated; `wait` is the server's wish in seconds."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


def harvest(request: Harvest, folder: Path) -> list[Path]:
    """Fetch what is still missing of a harvest and return all its pages in order.

    Args:
        request: what to fetch, and from where.
        folder: keeps the pages (page-000001.xml.gz ...). It may hold a part of the same harvest, which
            is then continued, but not another one.

    Raises:
        CompressorError: the server refuses the request or keeps failing; the pages so far are kept.
    """
    identity = {"url": request.url, "arguments": request.arguments()}
    if (folder / "request.json").exists():
        if read_json(folder / "request.json") != identity:
            raise CompressorError(
                f"{folder} holds the pages of another harvest (see its request.json); choose another folder "
                "for the pages or delete it"
            )
    else:
        write_json(folder / "request.json", identity)
    pages = _stored(folder)
    token = read_page(pages[-1]).token if pages else None
    seen = {token} if token else set()
    restarted = False
    next_request = time.monotonic()
    while not pages or token:
        time.sleep(max(0.0, next_request - time.monotonic()))
        arguments = {"verb": "ListRecords", "resumptionToken": token} if token else request.arguments()
        body, page = _fetch(request, arguments)
        next_request = time.monotonic() + request.delay
        code = page.error[0] if page.error else None
        if code == "badResumptionToken" and token and not restarted:
            # Tokens expire (arXiv's within a day); the list cannot be entered in its middle without one.
            print(f"the server no longer knows the resumption token; starting {folder} again", file=sys.stderr)
            for path in pages:
                path.unlink()
            pages, token, seen, restarted = [], None, set(), True
            continue
        if page.error and code != "noRecordsMatch":
            raise CompressorError(
                f"{request.url} refused the harvest: {code}: {page.error[1]} (arguments: {arguments})"
            )
        if page.token and page.token in seen:
            raise CompressorError(f"{request.url} sent the resumption token {page.token!r} twice: an endless list")
        path = folder / f"page-{len(pages) + 1:06d}.xml.gz"
        with atomic_file(path) as temporary:
            temporary.write_bytes(gzip.compress(body, mtime=0))
        pages.append(path)
        token = page.token
        if token:
            seen.add(token)
    return pages


def _stored(folder: Path) -> list[Path]:
    pages = sorted(folder.glob("page-*.xml.gz"))
    for number, path in enumerate(pages, start=1):
        if path.name != f"page-{number:06d}.xml.gz":
            raise CompressorError(
                f"{folder} lacks page {number}: delete the pages from {path.name} on and harvest again"
            )
    return pages


def read_page(path: Path) -> Page:
    """Read a stored page; a damaged one is a `CompressorError` that names it."""
    try:
        return _parse(gzip.decompress(path.read_bytes()))
    except (_Passing, OSError, EOFError, zlib.error) as error:
        raise CompressorError(
            f"{path} is damaged ({error}): delete it and the pages after it, then run again"
        ) from None


def _fetch(request: Harvest, arguments: dict[str, str]) -> tuple[bytes, Page]:
    """One page, repeating the request while failures may pass."""
    url = f"{request.url}?{urllib.parse.urlencode(arguments)}"
    for attempt in range(request.retries + 1):
        try:
            body = _get(url, request.timeout)
            return body, _parse(body)
        except _Passing as failure:
            pause = min(300.0, request.backoff * 2**attempt) * random.uniform(0.75, 1.25)
            pause = pause if failure.wait is None else failure.wait
            reason = str(failure)
        if pause > request.longest_wait:
            raise CompressorError(
                f"{request.url} asks to wait {pause:.0f} s: run the same command later, the pages are kept"
            )
        if attempt < request.retries:
            print(f"{reason}; trying again in {pause:.0f} s", file=sys.stderr)
            time.sleep(pause)
    raise CompressorError(
        f"{url} failed {request.retries + 1} times, the last time with: {reason}. "
        "Run the same command later: it goes on after the pages it has"
    )


def _get(url: str, timeout: float) -> bytes:
    headers = {"User-Agent": f"kv-compressor/{__version__} (OAI-PMH harvester)", "Accept-Encoding": "gzip"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout) as answer:
            body: bytes = answer.read()
            return gzip.decompress(body) if answer.headers.get("Content-Encoding") == "gzip" else body
    except urllib.error.HTTPError as error:
        with error:
            if error.code in (408, 429) or error.code >= 500:
                wait = _retry_after(error.headers.get("Retry-After"))
                raise _Passing(f"the server answered {error.code} {error.reason}", wait) from None
            raise CompressorError(f"{url} answered {error.code} {error.reason}: check the base URL") from None
    except (OSError, EOFError, zlib.error, http.client.HTTPException) as error:
        # URLError and timeouts are OSErrors; IncompleteRead is an HTTPException.
        raise _Passing(f"the connection failed ({error or type(error).__name__})") from None
    except ValueError as error:
        raise CompressorError(f"{url} is not a usable URL: {error}") from None


def _retry_after(value: str | None) -> float | None:
    """Seconds to wait: the header holds a number or an HTTP date. None if it holds neither."""
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _parse(body: bytes) -> Page:
    if b"<!DOCTYPE" in body[:1000]:
        # No OAI response has one: it is an HTML page, or an attempt at entity expansion.
        raise _Passing("the answer is a web page, not OAI-PMH XML")
    try:
        root = ElementTree.fromstring(body)
    except ElementTree.ParseError as error:
        raise _Passing(f"the answer is not complete XML ({error})") from None
    if _tag(root) != "OAI-PMH":
        raise _Passing(f"the answer is <{_tag(root)}>, not <OAI-PMH>")
    token = None
    records = []
    for part in root:
        if _tag(part) == "error":
            return Page([], None, (part.get("code", "unknown"), _text(part)))
        if _tag(part) == "ListRecords":
            for item in part:
                if _tag(item) == "record":
                    records.append(_record(item))
                elif _tag(item) == "resumptionToken":
                    # An empty token marks the last page.
                    token = (item.text or "").strip() or None
    return Page(records, token)


def _record(record: ElementTree.Element) -> dict[str, Any]:
    parts = {_tag(part): part for part in record}
    header = parts.get("header")
    if header is None:
        raise _Passing("a record has no header")
    identifier = next((_text(part) for part in header if _tag(part) == "identifier"), "")
    identifier = identifier.rpartition(":")[2]
    if header.get("status") == "deleted":
        return {"id": identifier, "deleted": True}
    fields: dict[str, Any] = {}
    for part in _metadata(parts.get("metadata")):
        if _tag(part) in ("id", "title", "abstract", "categories", "comments"):
            fields[_tag(part)] = _text(part)
        elif _tag(part) == "created":
            fields["date"] = _text(part)
        elif _tag(part) == "version" and part.get("version") == "v1":
            fields["date"] = next((_text(item) for item in part if _tag(item) == "date"), "")
    return {"id": identifier, **fields}


def _metadata(element: ElementTree.Element | None) -> Iterator[ElementTree.Element]:
    for inner in element if element is not None else ():
        yield from inner


def _tag(element: ElementTree.Element) -> str:
    """The tag without its namespace, which differs between arXiv's formats."""
    return element.tag.rpartition("}")[2]


def _text(element: ElementTree.Element) -> str:
    return (element.text or "").strip()
