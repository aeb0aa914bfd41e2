"""The OAI-PMH client against a local server that misbehaves."""

from __future__ import annotations

import gzip
import threading
import urllib.parse
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from compressor.data.corpora import CorpusConfig, OaiConfig, build_corpus
from compressor.data.oai import Harvest, harvest, read_page
from compressor.errors import CompressorError


def record(number: int, *, deleted: bool = False) -> str:
    status = ' status="deleted"' if deleted else ""
    header = f"<header{status}><identifier>oai:arXiv.org:2401.{number:05d}</identifier></header>"
    if deleted:
        return f"<record>{header}</record>"
    words = " ".join(f"word{number}x{place}" for place in range(25))
    return (
        f'<record>{header}<metadata><arXiv xmlns="http://arxiv.org/OAI/arXiv/"><id>2401.{number:05d}</id>'
        f"<created>2024-01-{number:02d}</created><title>Title {number}</title><categories>cs.CL math.ST"
        f"</categories><abstract>\n  {words} &lt; 3\n</abstract></arXiv></metadata></record>"
    )


def page(records: str, token: str | None = None) -> bytes:
    tail = "" if token is None else f"<resumptionToken>{token}</resumptionToken>"
    return envelope(f"<ListRecords>{records}{tail}</ListRecords>")


def envelope(body: str) -> bytes:
    head = '<?xml version="1.0"?><OAI-PMH xmlns="http://www.openarchives.org/OAI/2.0/">'
    return f"{head}{body}</OAI-PMH>".encode()


def oai_error(code: str) -> bytes:
    return envelope(f'<error code="{code}">no luck</error>')


class Server:
    """Answers requests in turn from `answers`: (status, headers, body), and remembers what was asked."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, dict[str, str], bytes]] = []
        self.asked: list[dict[str, str]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                query = urllib.parse.urlsplit(self.path).query
                outer.asked.append(dict(urllib.parse.parse_qsl(query)))
                status, headers, body = outer.answers.pop(0)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/oai"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def will_answer(self, *bodies: bytes | tuple[int, dict[str, str], bytes]) -> None:
        self.answers += [body if isinstance(body, tuple) else (200, {}, body) for body in bodies]


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


def quick(server: Server, **options: Any) -> Harvest:
    return Harvest(server.url, **{"delay": 0, "backoff": 0.01, "retries": 3, "timeout": 5, **options})


def ids(pages: list[Path]) -> list[str]:
    return [record["id"] for path in pages for record in read_page(path).records]


def test_follows_resumption_tokens_and_sends_arguments(server: Server, tmp_path: Path) -> None:
    server.will_answer(page(record(1) + record(2), "a|1"), page(record(3), "b"), page(record(4), ""))
    request = quick(server, set="physics:hep-th", from_date="2024-01-01", until_date="2024-01-31")
    pages = harvest(request, tmp_path)
    assert ids(pages) == ["2401.00001", "2401.00002", "2401.00003", "2401.00004"]
    first = {"metadataPrefix": "arXiv", "set": "physics:hep-th", "from": "2024-01-01", "until": "2024-01-31"}
    # A resumption token excludes every other argument.
    assert server.asked == [
        {"verb": "ListRecords", **first},
        {"verb": "ListRecords", "resumptionToken": "a|1"},
        {"verb": "ListRecords", "resumptionToken": "b"},
    ]


def test_a_finished_harvest_asks_nothing_again(server: Server, tmp_path: Path) -> None:
    server.will_answer(page(record(1)))
    assert harvest(quick(server), tmp_path) == harvest(quick(server), tmp_path)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "failure",
    [
        (503, {"Retry-After": "0"}, b"busy"),
        (503, {"Retry-After": formatdate(0, usegmt=True)}, b"busy"),
        (429, {}, b""),
        (500, {}, b"oops"),
        (200, {}, page(record(1))[:-30]),
        (200, {"Content-Length": "100000"}, page(record(1))),
        (200, {"Content-Encoding": "gzip"}, gzip.compress(page(record(1)))[:-9]),
        (200, {}, b"<!DOCTYPE html><html></html>"),
        (200, {}, b""),
    ],
)
def test_passing_failures_are_tried_again(
    server: Server, tmp_path: Path, failure: tuple[int, dict[str, str], bytes], capsys: pytest.CaptureFixture
) -> None:
    server.will_answer(failure, failure, (200, {"Content-Encoding": "gzip"}, gzip.compress(page(record(1)))))
    assert ids(harvest(quick(server), tmp_path)) == ["2401.00001"]
    assert len(server.asked) == 3
    assert capsys.readouterr().err.count("trying again") == 2


def test_retry_after_is_waited_for(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("compressor.data.oai.time.sleep", pauses.append)
    server.will_answer((503, {"Retry-After": "17"}, b""), page(record(1), "t"), page(record(2)))
    harvest(quick(server, delay=3), tmp_path)
    assert 17.0 in pauses
    # The polite pause between two requests.
    assert 2 < pauses[-1] <= 3


def test_a_very_long_retry_after_ends_the_harvest(server: Server, tmp_path: Path) -> None:
    server.will_answer((503, {"Retry-After": "86400"}, b""))
    with pytest.raises(CompressorError, match="asks to wait 86400 s: run the same command later"):
        harvest(quick(server), tmp_path)


def test_lasting_failures_end_it_and_it_goes_on_later(server: Server, tmp_path: Path) -> None:
    server.will_answer(page(record(1), "next"), *[(500, {}, b"")] * 4)
    with pytest.raises(CompressorError, match=r"failed 4 times, the last time with: the server answered 500"):
        harvest(quick(server), tmp_path)
    server.will_answer(page(record(2)))
    assert ids(harvest(quick(server), tmp_path)) == ["2401.00001", "2401.00002"]
    assert server.asked[-1] == {"verb": "ListRecords", "resumptionToken": "next"}


def test_client_errors_and_refusals_are_final(server: Server, tmp_path: Path) -> None:
    server.will_answer((404, {}, b""))
    with pytest.raises(CompressorError, match="answered 404"):
        harvest(quick(server), tmp_path / "a")
    server.will_answer(oai_error("badArgument"))
    with pytest.raises(CompressorError, match="refused the harvest: badArgument: no luck"):
        harvest(quick(server), tmp_path / "b")
    assert len(server.asked) == 2


def test_no_records_is_an_empty_harvest(server: Server, tmp_path: Path) -> None:
    server.will_answer(oai_error("noRecordsMatch"))
    assert ids(harvest(quick(server), tmp_path)) == []
    assert ids(harvest(quick(server), tmp_path)) == []
    assert len(server.asked) == 1


def test_an_expired_token_starts_again_once(server: Server, tmp_path: Path) -> None:
    server.will_answer(page(record(1), "old"), oai_error("badResumptionToken"))
    server.will_answer(page(record(1) + record(2), "new"), page(record(3)))
    assert ids(harvest(quick(server), tmp_path)) == ["2401.00001", "2401.00002", "2401.00003"]
    server.will_answer(*[page(record(1), "t"), oai_error("badResumptionToken")] * 2)
    with pytest.raises(CompressorError, match="badResumptionToken"):
        harvest(quick(server), tmp_path / "again")


def test_an_endless_list_is_noticed(server: Server, tmp_path: Path) -> None:
    server.will_answer(page(record(1), "same"), page(record(2), "same"))
    with pytest.raises(CompressorError, match="'same' twice"):
        harvest(quick(server), tmp_path)


def test_stored_pages_are_checked(server: Server, tmp_path: Path) -> None:
    server.will_answer(page(record(1), "a"), page(record(2), "b"), page(record(3)))
    pages = harvest(quick(server), tmp_path)
    with pytest.raises(CompressorError, match="holds the pages of another harvest"):
        harvest(quick(server, set="cs"), tmp_path)
    pages[2].write_bytes(pages[2].read_bytes()[:50])
    with pytest.raises(CompressorError, match=r"page-000003\.xml\.gz is damaged"):
        harvest(quick(server), tmp_path)
    pages[1].unlink()
    with pytest.raises(CompressorError, match="lacks page 2"):
        harvest(quick(server), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "file:///etc/passwd"}, "must start with http"),
        ({"url": "http://x", "metadata_prefix": "oai_dc"}, "is not read here"),
        ({"url": "http://x", "from_date": "2024"}, "must be written yyyy-mm-dd"),
        ({"url": "http://x", "delay": -1}, "at least 0"),
    ],
)
def test_requests_are_validated(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CompressorError, match=message):
        Harvest(**options)


def test_arxiv_raw_takes_the_first_version(server: Server, tmp_path: Path) -> None:
    raw = (
        "<record><header><identifier>oai:arXiv.org:hep-th/9901001</identifier></header><metadata><arXivRaw>"
        '<id>hep-th/9901001</id><version version="v1"><date>Fri, 1 Jan 1999 10:00:00 GMT</date></version>'
        '<version version="v2"><date>Mon, 1 Feb 1999 10:00:00 GMT</date></version>'
        "<title>T</title><abstract>A</abstract></arXivRaw></metadata></record>"
    )
    server.will_answer(page(raw))
    (path,) = harvest(quick(server, metadata_prefix="arXivRaw"), tmp_path)
    assert read_page(path).records[0]["date"] == "Fri, 1 Jan 1999 10:00:00 GMT"


def test_a_corpus_from_a_harvest(server: Server, tmp_path: Path) -> None:
    server.will_answer(page(record(1) + record(2, deleted=True), "t"), page(record(3)))
    config = CorpusConfig(source=server.url, output=str(tmp_path / "out"), oai=OaiConfig(delay=0))
    manifest = build_corpus(config)
    assert manifest["kept"] == {"train": 0, "validation": 0, "test": 2}
    assert manifest["dropped"] == {"deleted": 1}
    assert manifest["splits"]["test"]["dates"] == {"first": "2024-01-01", "last": "2024-01-03"}
    assert (tmp_path / "out.pages" / "page-000002.xml.gz").exists()
