"""Building questions about abstracts: by rules, and by a server that misbehaves."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from compressor.commands.cli import main
from compressor.data.builders.arxivqa import ArxivQAConfig, build_questions
from compressor.data.builders.cloze import cloze_questions
from compressor.data.builders.endpoint import SCHEMA, EndpointConfig, Pair, check_pair, read_pairs
from compressor.data.questions import load_questions
from compressor.data.rows import read_rows
from compressor.errors import CompressorError
from compressor.files import read_json, sha256

PROJECT = Path(__file__).resolve().parents[1]
DATES = {"train_before": "2024-01", "validation_before": "2024-02", "test_until": "2024-03"}


def abstract(number: int) -> str:
    return (
        f"In paper {number} we propose Method{number}X, a framework for nothing in particular, and we show that it is "
        f"{number + 10}.5% better than what was there before it on twelve well known data sets."
    )


def write_abstracts(path: Path, count: int) -> Path:
    months = ["2023-12", "2024-01", "2024-02"]
    rows = (
        {"id": f"a{n}", "title": f"T{n}", "abstract": abstract(n), "date": f"{months[n % 3]}-15"} for n in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def completion(content: Any) -> bytes:
    text = content if isinstance(content, str) else json.dumps(content)
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def good(number: int) -> dict[str, Any]:
    return {"pairs": [{"question": f"What is proposed in {number}?", "answer": f"Method{number}X"}]}


class Server(ThreadingHTTPServer):
    """Answers chat completions; what it does to the n-th request about paper p is `behaviours[p][n]`, then good."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.behaviours: dict[int, list[Any]] = {}
        self.requests: list[tuple[int, float]] = []
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.delay = 0.0
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()

    def asked(self) -> Counter[int]:
        with self.lock:
            return Counter(number for number, _ in self.requests)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed or give up break their connections: that is the test."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        number = int(re.search(r"In paper (\d+)", body["messages"][-1]["content"]).group(1))  # type: ignore[union-attr]
        with server.lock:
            server.requests.append((number, time.monotonic()))
            server.bodies.append(body)
            server.headers.append(self.headers)
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
            planned = server.behaviours.get(number, [])
            behaviour = planned.pop(0) if planned else None
        try:
            time.sleep(server.delay)
            self.behave(behaviour, number)
        finally:
            with server.lock:
                server.under_way -= 1

    def behave(self, behaviour: Any, number: int) -> None:
        if behaviour == "drop":
            self.connection.shutdown(2)
            self.close_connection = True
        elif behaviour == "slow":
            time.sleep(1.2)
            self.reply(200, completion(good(number)))
        elif isinstance(behaviour, tuple):
            self.reply(*behaviour)
        else:
            self.reply(200, completion(good(number) if behaviour is None else behaviour))

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def config(tmp_path: Path, server: Server) -> Callable[..., ArxivQAConfig]:
    def make(count: int, questions: int = 2, **endpoint: Any) -> ArxivQAConfig:
        settings = {"url": server.url, "model": "m", "concurrency": 4, "retries": 3, "timeout": 0.8}
        return ArxivQAConfig(
            source=str(write_abstracts(tmp_path / "abstracts.jsonl", count)),
            output=str(tmp_path / "out"),
            generator="endpoint",
            questions=questions,
            endpoint=EndpointConfig(**(settings | endpoint)),
            **DATES,  # type: ignore[arg-type]
        )

    return make


def test_a_server_that_misbehaves(server: Server, config: Callable[..., ArxivQAConfig]) -> None:
    server.behaviours = {
        0: [(429, b"", {"Retry-After": "0.5"})],
        1: [(500, b"oops"), (503, b"")],
        2: ["slow"],
        3: ["drop"],
        4: [(500, b"")] * 9,
        5: ["no JSON at all"],
        6: ["still", "no JSON"],
        7: [{"pairs": [{"question": "Not there?", "answer": "Method8X"}, *good(7)["pairs"]]}],
        8: [{"pairs": []}],
        9: [{"pairs": [*good(9)["pairs"], *good(9)["pairs"], {"question": "Is it Method9X?", "answer": "Method9X"}]}],
        10: [f"```json\n{json.dumps(good(10))}\n```"],
    }
    manifest = build_questions(config(12))
    assert manifest["pairs"] == {
        "accepted": 9,
        "rejected": {"answer_in_question": 1, "broken_json": 1, "duplicate": 1, "no_pairs": 1, "not_a_span": 1},
    }
    assert manifest["abstracts"] == {"asked": 12, "no_reply": 1}
    assert {number: count - 1 for number, count in server.asked().items() if count > 1} == {
        0: 1, 1: 2, 2: 1, 3: 1, 4: 3, 5: 1, 6: 1,
    }  # fmt: skip
    first, second = (moment for number, moment in server.requests if number == 0)
    assert second - first >= 0.5
    assert 2 <= server.most_under_way <= 4
    assert server.bodies[0]["response_format"]["json_schema"]["schema"] == SCHEMA
    assert {body["model"] for body in server.bodies} == {"m"}
    found = load_questions(Path(config(12).output), split="train")
    assert {item.dataset for item in found} == {"arxivqa"}
    # In the order of the abstracts, whatever order the replies came in.
    assert [item.id for item in found] == ["a0#1", "a3#1", "a9#1"]


def test_a_server_that_is_gone_stops_the_run(
    server: Server, config: Callable[..., ArxivQAConfig], tmp_path: Path
) -> None:
    server.behaviours = {number: [(502, b"")] * 9 for number in range(20)}
    with pytest.raises(CompressorError, match=r"no reply for 5 abstracts in a row, each after 1 requests.*502"):
        build_questions(config(20, concurrency=1, retries=0))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ((400, b"unknown response_format"), "answered 400: unknown response_format.* set endpoint.response_format"),
        ((401, b"who are you"), "answered 401: who are you.*endpoint.api_key_variable"),
        ((404, b""), "answered 404: nothing. Check endpoint.url"),
    ],
)
def test_a_refusal_says_what_to_do(
    server: Server, config: Callable[..., ArxivQAConfig], behaviour: Any, message: str
) -> None:
    server.behaviours = {0: [behaviour] * 9}  # a busy machine may ask again
    with pytest.raises(CompressorError, match=message):
        build_questions(config(1))


def test_settings_reach_the_server(
    server: Server, config: Callable[..., ArxivQAConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CompressorError, match="names TEST_KEY, which is not set"):
        build_questions(config(1, api_key_variable="TEST_KEY"))
    monkeypatch.setenv("TEST_KEY", "secret")
    build_questions(config(1, api_key_variable="TEST_KEY", response_format="none", temperature=0.5, max_tokens=7))
    assert server.headers[0]["Authorization"] == "Bearer secret"
    body = server.bodies[0]
    assert "response_format" not in body
    assert (body["temperature"], body["max_tokens"]) == (0.5, 7)
    with pytest.raises(CompressorError, match=r"endpoint\.model is not given"):
        build_questions(config(1, model=""), overwrite=True)
    with pytest.raises(CompressorError, match=r"endpoint\.url = 'localhost:80'"):
        EndpointConfig(url="localhost:80")
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(CompressorError, match=r"pip install 'kv-compressor\[endpoint\]'"):
        build_questions(config(1), overwrite=True)


def test_only_spans_are_accepted() -> None:
    text = "We train BERT on 3.5 million papers of arXiv."
    assert check_pair(text, Pair(" What  model? ", "bert.")) == Pair("What model?", "BERT")
    assert check_pair(text, Pair("How many?", "3.5 million")) == Pair("How many?", "3.5 million")
    assert check_pair(text, Pair("How many?", "5 millions")) == "not_a_span"
    assert check_pair(text, Pair("Where?", "arX")) == "not_a_span"  # part of a word
    assert check_pair(text, Pair("", "BERT")) == "question_blank"
    assert check_pair(text, Pair("What?", " .")) == "answer_blank"
    assert check_pair(text, Pair("What is BERT?", "BERT")) == "answer_in_question"
    assert check_pair(text, Pair("What?", "a " * 21)) == "answer_too_long"
    assert check_pair(text, Pair("What \ud800?", "BERT")) == "not_storable"


@pytest.mark.parametrize("reply", ["", "{}", "[]", '{"pairs": {}}', '{"pairs": [{"question": "q"}]}', '{"pairs": [1]}'])
def test_replies_that_are_not_what_was_asked_for(reply: str) -> None:
    assert read_pairs(reply) is None
    assert read_pairs('{"pairs": [{"question": "q", "answer": 3}]}') is None
    assert read_pairs('Sure: {"pairs": [{"question": "q", "answer": "a"}]} Done.') == [Pair("q", "a")]


ABSTRACT = (
    "Automatic speech recognition (ASR) degrades in noise. We propose RobustNet, a lightweight framework for noise. "
    "Using variational inference, it lowers the word error rate by 12.5% on the LibriSpeech dataset and runs at 30 "
    "fps. We test five noise types. The Fokker-Planck equation explains $40%$ why, where $x (ABC)$ is the state."
)


def test_rules_ask_about_acronyms_numbers_methods_and_names() -> None:
    found = {item.question: item for seed in range(40) for item in cloze_questions(ABSTRACT, 50, str(seed))}
    number = (
        'Which percentage fills the gap in "... inference, it lowers the word error rate by ___ on the '
        'LibriSpeech dataset and runs ..."?'
    )
    means = 'Which method or tool fills the gap in "Using ___, it lowers the word error rate ..."?'
    assert {question: (item.answer, item.kind) for question, item in found.items()} == {
        "What does ASR stand for?": ("Automatic speech recognition", "acronym"),
        'What is the abbreviation of "Automatic speech recognition"?': ("ASR", "acronym"),
        number: ("12.5%", "number"),
        'Which number or quantity fills the gap in "... 12.5% on the LibriSpeech dataset and runs at ___"?': (
            "30 fps",
            "number",
        ),
        "How many noise types are mentioned?": ("five", "number"),
        "What is the name of the lightweight framework?": ("RobustNet", "method"),
        means: ("variational inference", "method"),
        "Which equation is mentioned by name?": ("Fokker-Planck", "named"),
        "Which dataset is mentioned by name?": ("LibriSpeech", "named"),
    }


def test_no_question_gives_another_ones_answer_away() -> None:
    for seed in range(20):
        chosen = cloze_questions(ABSTRACT, 50, str(seed))
        for item in chosen:
            assert not any(item.answer.lower() in other.question.lower() for other in chosen)


def test_rules_take_one_of_each_kind_first_and_do_not_depend_on_chance() -> None:
    assert len({item.kind for item in cloze_questions(ABSTRACT, 4, "id")}) == 4
    assert cloze_questions(ABSTRACT, 3, "id") == cloze_questions(ABSTRACT, 3, "id")
    assert len({tuple(cloze_questions(ABSTRACT, 2, str(seed))) for seed in range(10)}) > 3
    assert cloze_questions("Nothing is asked about here.", 3, "id") == []


@pytest.mark.parametrize(
    ("text", "expansion"),
    [
        ("the use of large eddy simulation (LES) here", "large eddy simulation"),
        ("with deoxyribonucleic acid (DNA).", "deoxyribonucleic acid"),
        ("some of the kernel density estimates (KDEs; new)", "kernel density estimates"),
        ("and the model was run on graphics (GPU)", None),
        ("This is shown (SEE).", None),
    ],
)
def test_expansions(text: str, expansion: str | None) -> None:
    found = [item for item in cloze_questions(text, 9, "id") if item.kind == "acronym"]
    for item in found:
        assert expansion in (item.answer, item.question.partition('"')[2][:-2])
    assert bool(found) == (expansion is not None)


def test_the_command_splits_by_date_and_repeats_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_abstracts(tmp_path / "abstracts.jsonl", 12)
    cuts = [x for name, day in DATES.items() for x in (f"--{name}", day)]
    command = ["questions", "--config", str(PROJECT / "configs/corpora/arxivqa-rules.yaml"), "--source", str(source)]
    for name in ("one", "two"):
        output = tmp_path / name
        assert main([*command, *cuts, "--output", str(output)]) == 0
    one, two = read_json(tmp_path / "one/manifest.json"), read_json(tmp_path / "two/manifest.json")
    assert one == two
    for split in ("train", "validation", "test"):
        (shard,) = one["splits"][split]["shards"]
        assert sha256(output / shard["file"]) == shard["sha256"]
        rows = [row.values for row in read_rows(output / shard["file"])]
        assert len(rows) == shard["records"] == len(load_questions(output, split=split))
        assert {row["generator"] for row in rows} == {"rules"}
        assert {row["dataset"] for row in rows} == {"arxivqa-cloze"}
        month = {"train": "2023-12", "validation": "2024-01", "test": "2024-02"}[split]
        assert {row["date"][:7] for row in rows} == {month}
    assert one["generator"] == "rules"
    assert one["licence"].startswith("CC0")
    assert "asked about 12 abstracts, 24 questions accepted" in capsys.readouterr().out
    assert main([*command, *cuts, "--output", str(output)]) == 2
    assert "exists already" in capsys.readouterr().err
    sampled = ["--sample.train", "2", "--sample.test", "1", "--output", str(tmp_path / "sampled")]
    assert main([*command, *cuts, *sampled]) == 0
    assert read_json(tmp_path / "sampled/manifest.json")["abstracts"]["asked"] == 3
    assert main([*command, *cuts, "--sample.train", "99", "--output", str(tmp_path / "more")]) == 2
    assert "the split has only 4 records" in capsys.readouterr().err
    os.rename(source, tmp_path / "gone")
    assert main([*command, *cuts, "--output", str(tmp_path / "more")]) == 2
    assert "is not there" in capsys.readouterr().err


def test_shipped_cloze_questions_are_what_the_rules_write() -> None:
    """The sample belongs to the rules as they are: runs/sample-data.sh writes it anew."""
    rows = [row.values for row in read_rows(PROJECT / "data/arxivqa-test.parquet")]
    assert len(rows) > 500
    texts = {
        row["id"]: row["abstract"] for row in (row.values for row in read_rows(PROJECT / "data/arxiv-test.parquet"))
    }
    for row in rows[:100]:
        name, _, number = row["id"].partition("#")
        item = cloze_questions(texts[name], 2, name)[int(number) - 1]
        assert (row["question"], row["answers"], row["kind"]) == (item.question, [item.answer], item.kind)


@pytest.mark.parametrize("name", ["rules", "endpoint"])
def test_recipes_are_valid(name: str) -> None:
    from compressor.parsing import parse_config

    config, _ = parse_config(ArxivQAConfig, ["--config", str(PROJECT / f"configs/corpora/arxivqa-{name}.yaml")], "")
    assert config.generator == name
