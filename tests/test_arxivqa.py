"""Building questions about abstracts: by rules, by a model here, and by a server that misbehaves."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from compressor.cli import main
from compressor.data.arxivqa import ArxivQAConfig, build_questions
from compressor.data.cloze import cloze_questions
from compressor.data.endpoint import EndpointConfig, EndpointGenerator, retry_after
from compressor.data.generators import (
    SCHEMA,
    Pair,
    TransformersConfig,
    TransformersGenerator,
    check_pair,
    read_pairs,
)
from compressor.data.questions import load_questions
from compressor.data.sources import read_rows
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
        elif behaviour == "drip":
            self.reply(200, b"", {"Content-Length": "100000"})
            for _ in range(40):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.1)
        elif behaviour == "slow":
            time.sleep(1.2)
            self.reply(200, completion(good(number)))
        elif behaviour == "cut":
            self.reply(200, completion(good(number))[:20], {"Content-Length": "500"})
            self.close_connection = True
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
        settings = {"url": server.url, "model": "m", "concurrency": 4, "retries": 3, "backoff": 0.01, "timeout": 0.8}
        return ArxivQAConfig(
            source=str(write_abstracts(tmp_path / "abstracts.jsonl", count)),
            output=str(tmp_path / "out"),
            generator="endpoint",
            questions=questions,
            format="jsonl.gz",
            endpoint=EndpointConfig(**(settings | endpoint)),
            **DATES,  # type: ignore[arg-type]
        )

    return make


def test_a_server_that_misbehaves(server: Server, config: Callable[..., ArxivQAConfig]) -> None:
    server.behaviours = {
        0: [(429, b"", {"Retry-After": "0.5"})],
        1: [(500, b"oops"), (503, b"")],
        2: ["slow"],
        3: ["drop", "cut"],
        4: [(200, b"{not json")],
        5: ["no JSON at all"],
        6: ["still", "no JSON"],
        7: [{"pairs": [{"question": "Not there?", "answer": "Method8X"}, *good(7)["pairs"]]}],
        8: [{"pairs": []}],
        9: ["drip"],
        10: [
            {"pairs": [*good(10)["pairs"], *good(10)["pairs"], {"question": "Is it Method10X?", "answer": "Method10X"}]}
        ],
        11: [f"```json\n{json.dumps(good(11))}\n```"],
        12: [
            {"pairs": [{"question": f"{n}?", "answer": str(x)} for n, x in enumerate(["In paper", "x y", "12", "we"])]}
        ],
    }
    manifest = build_questions(config(15))
    answered = [0, 1, 2, 3, 4, 5, 7, 9, 10, 11, 13, 14]
    accepted = 2 + len(answered)
    assert manifest["pairs"] == {
        "accepted": accepted,
        "rejected": {
            "answer_in_question": 1,
            "broken_json": 1,
            "duplicate": 1,
            "more_than_asked": 1,
            "no_pairs": 1,
            "not_a_span": 2,
        },
    }
    assert manifest["abstracts"] == {"asked": 15, "no_reply": 0}
    asked = server.asked()
    assert {number: count - 1 for number, count in asked.items() if count > 1} == {
        0: 1, 1: 2, 2: 1, 3: 2, 4: 1, 5: 1, 6: 1, 9: 1,
    }  # fmt: skip
    first, second = (moment for number, moment in server.requests if number == 0)
    assert second - first >= 0.5
    assert 2 <= server.most_under_way <= 4
    assert server.bodies[0]["response_format"]["json_schema"]["schema"] == SCHEMA
    assert {body["model"] for body in server.bodies} == {"m"}
    found = load_questions(Path(config(15).output), split="train")
    assert {item.dataset for item in found} == {"arxivqa"}
    # In the order of the abstracts, whatever order the replies came in.
    assert [item.id for item in found if item.id[1:3] != "12"] == ["a0#1", "a3#1", "a9#1"]


def test_retry_after_holds_for_everyone(server: Server, config: Callable[..., ArxivQAConfig]) -> None:
    server.behaviours = {0: [(429, b"", {"Retry-After": "0.6"})]}
    build_questions(config(8, concurrency=1))
    first, second = server.requests[:2]
    assert first[0] == second[0] == 0
    assert second[1] - first[1] >= 0.6
    later = [moment for _, moment in server.requests[1:]]
    assert all(moment - first[1] >= 0.6 for moment in later)
    assert retry_after("Fri, 31 Dec 1999 23:59:59 GMT") == 0
    assert retry_after("soon") is None


def test_an_abstract_without_a_reply_is_counted_and_asked_about_again(
    server: Server, config: Callable[..., ArxivQAConfig]
) -> None:
    server.behaviours = {1: [(500, b"")] * 4}
    assert build_questions(config(6))["abstracts"] == {"asked": 6, "no_reply": 1}
    before = server.asked()
    assert build_questions(config(6), overwrite=True)["abstracts"] == {"asked": 6, "no_reply": 0}
    assert server.asked() - before == {1: 1}


def test_a_server_that_is_gone_stops_the_run_and_keeps_the_replies(
    server: Server, config: Callable[..., ArxivQAConfig], tmp_path: Path
) -> None:
    server.behaviours = {number: [(502, b"")] * 9 for number in range(20) if number % 3}  # not of train
    with pytest.raises(
        CompressorError, match=r"no reply for 2 abstracts in a row, each after 2 requests.* answered 502"
    ):
        build_questions(config(20, concurrency=1, retries=1, give_up_after=2))
    assert not (tmp_path / "out").exists()
    server.behaviours.clear()
    before = server.asked()
    assert build_questions(config(20, concurrency=1))["pairs"]["accepted"] == 20
    assert server.asked() - before == Counter(number for number in range(20) if number % 3)


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ((400, b"unknown response_format"), "answered 400: unknown response_format.* set endpoint.response_format"),
        ((401, b"who are you"), "answered 401: who are you.*endpoint.api_key_variable"),
        ((404, b""), "answered 404: nothing. Check endpoint.url"),
        ((429, b"", {"Retry-After": "3600"}), "asks to wait 3600 s, more than endpoint.longest_wait"),
    ],
)
def test_a_refusal_says_what_to_do(
    server: Server, config: Callable[..., ArxivQAConfig], behaviour: Any, message: str
) -> None:
    server.behaviours = {0: [behaviour]}
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
    with pytest.raises(
        CompressorError, match=r"another request \(.*temperature.* differ\): delete it, or choose another"
    ):
        build_questions(config(1, temperature=0.1), overwrite=True)
    with pytest.raises(CompressorError, match=r"endpoint\.model = '' is out of range"):
        EndpointGenerator(EndpointConfig(), 2)
    with pytest.raises(CompressorError, match=r"endpoint\.url = 'localhost:80'"):
        EndpointConfig(url="localhost:80")
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(CompressorError, match=r"pip install 'kv-compressor\[endpoint\]'"):
        EndpointGenerator(EndpointConfig(model="m"), 2)


def test_a_killed_run_asks_nothing_twice(server: Server, tmp_path: Path) -> None:
    source, output = write_abstracts(tmp_path / "abstracts.jsonl", 30), tmp_path / "out"
    server.delay = 0.05
    command = [sys.executable, "-m", "compressor.cli", "questions", "--source", source, "--output", output]
    command += ["--generator", "endpoint", "--endpoint.url", server.url, "--endpoint.model", "m"]
    command += ["--endpoint.concurrency", "2", *(x for name, day in DATES.items() for x in (f"--{name}", day))]
    journal = tmp_path / "out.journal.jsonl"
    running = subprocess.Popen(
        list(map(str, command)), cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 8) and time.monotonic() < deadline:
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert not output.exists()
    kept = journal.read_bytes().count(b"\n") - 1
    assert 8 <= kept < 30
    before = server.asked()
    with open(journal, "ab") as file:
        file.write(b'{"key": "cut sho')  # as a kill in the middle of a write leaves it
    assert main(list(map(str, command[3:]))) == 0
    asked = server.asked()
    # Only what was under way at the kill, and so has no reply, is asked for again.
    assert sum((asked - before).values()) == 30 - kept
    assert max(asked.values()) <= 2
    assert sum(count == 2 for count in asked.values()) <= 2
    assert read_json(output / "manifest.json")["pairs"] == {"accepted": 30, "rejected": {}}
    again = server.asked()
    assert main([*map(str, command[3:]), "--overwrite"]) == 0
    assert server.asked() == again


def test_a_damaged_journal_is_named_by_line(config: Callable[..., ArxivQAConfig], tmp_path: Path) -> None:
    build_questions(config(3))
    path = tmp_path / "out.journal.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "junk", *lines[2:]]) + "\n")
    with pytest.raises(CompressorError, match=r"journal\.jsonl line 2 is damaged"):
        build_questions(config(3), overwrite=True)


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


@pytest.fixture
def instruct_model(tiny_base_folder: Path, tmp_path: Path) -> Path:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base_folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    tokenizer.save_pretrained(tmp_path / "instruct")
    AutoModelForCausalLM.from_pretrained(tiny_base_folder).save_pretrained(tmp_path / "instruct")
    return tmp_path / "instruct"


def test_a_model_run_here(
    instruct_model: Path, tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    local = TransformersConfig(
        model=str(instruct_model), batch_size=2, max_new_tokens=12, device="cpu", dtype="float32"
    )
    texts = [abstract(number) for number in range(3)]
    generator = TransformersGenerator(local, 2)
    replies = list(generator.replies(texts))
    assert [index for index, _ in replies] == [0, 1, 2]
    # A batch says what each would say alone: padding is on the left and masked.
    alone = [next(TransformersGenerator(local, 2).replies([text]))[1] for text in texts]
    assert [text for _, text in replies] == alone
    settings: dict[str, Any] = {
        "source": str(write_abstracts(tmp_path / "abstracts.jsonl", 3)),
        "output": str(tmp_path / "out"),
        "generator": "transformers",
        "transformers": local,
        **DATES,
    }
    with pytest.raises(CompressorError, match=r"no question about 3 abstracts was accepted \(broken_json 3\)"):
        build_questions(ArxivQAConfig(**settings))

    def generate(self: Any, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        """What a trained model would write, behind the prompt it was given."""
        said = [re.findall(r"In paper (\d+)", generator.tokenizer.decode(row))[0] for row in input_ids]
        new = generator.tokenizer([json.dumps(good(int(number))) for number in said], padding=True, return_tensors="pt")
        return torch.cat([input_ids, new["input_ids"]], dim=1)

    monkeypatch.setattr(type(generator.model), "generate", generate)
    settings["journal"] = str(tmp_path / "other.jsonl")
    manifest = build_questions(ArxivQAConfig(**settings))
    assert manifest["pairs"] == {"accepted": 3, "rejected": {}}
    assert manifest["model"] == str(instruct_model)
    with pytest.raises(CompressorError, match="has no chat template, so it is no instruct model"):
        TransformersGenerator(TransformersConfig(model=str(tiny_base_folder)), 2)
    with pytest.raises(CompressorError, match="cannot be loaded"):
        TransformersGenerator(TransformersConfig(model=str(tmp_path / "none")), 2)


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
    for kind in ("parquet", "jsonl.gz"):
        for name in ("one", "two"):
            output = tmp_path / f"{name}-{kind}"
            assert main([*command, *cuts, "--format", kind, "--output", str(output)]) == 0
        one, two = read_json(tmp_path / f"one-{kind}/manifest.json"), read_json(tmp_path / f"two-{kind}/manifest.json")
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
    assert "the split has only 4 abstracts" in capsys.readouterr().err
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


@pytest.mark.parametrize("name", ["rules", "endpoint", "transformers"])
def test_recipes_are_valid(name: str) -> None:
    from compressor.parsing import parse_config

    config, _ = parse_config(ArxivQAConfig, ["--config", str(PROJECT / f"configs/corpora/arxivqa-{name}.yaml")], "")
    assert config.generator == name
