"""Memories on the shelf and in requests; and (slow, where vLLM is installed) a server of it, asked as its clients ask.

`runs/serving.sh` makes an environment with vLLM and runs the slow ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compressor.api import Compressor
from compressor.commands.cli import main
from compressor.commands.serve import chat_template
from compressor.errors import CompressorError
from compressor.model.decoder import Prefix, decode
from compressor.model.generation import generate
from compressor.model.memory import Memory, memory_prefix, place
from compressor.serving.front import CANARIES, CHAT, COMPLETIONS, Desk, Front, _reply
from compressor.serving.shelf import Catalogue, Missing, Shelf
from compressor.storage.making import Making
from compressor.storage.store import Store

Make = Callable[..., Compressor]
TEXTS = [
    "We study the spectrum of a random matrix and show that its largest eigenvalue concentrates.",
    "Neural networks learn features of images; we give a bound on the number of samples they need.",
    "A telescope in the south saw the afterglow of the burst for three nights.",
]


QUESTION = "What do we study?"


@pytest.fixture
def desk(make_tiny_compressor: Make, tmp_path: Path) -> Desk:
    """A desk without a server, over a tiny compressor."""
    model = make_tiny_compressor()
    return Desk(model, Catalogue(tmp_path / "memories"), Shelf(tmp_path / "shelf", 1 << 24), model.base.eos, "tiny")


@pytest.mark.parametrize("layout", ["nested", "after", "spread", "front"])
def test_placed_keys_give_the_decoders_logits_at_the_positions_vllm_counts(
    make_tiny_compressor: Make, layout: str
) -> None:
    model = make_tiny_compressor(layout=layout)
    memory, ids = Memory.concatenate(model.compress(TEXTS[:2], 4)), torch.tensor([[5, 6, 7]])
    keys, values = (one.transpose(1, 2)[:, None] for one in place(model.base, memory))
    mask = torch.ones(1, memory.tokens, dtype=torch.bool)
    moved = Prefix(list(keys), list(values), mask, torch.tensor([memory.tokens]))
    with torch.no_grad():
        wanted = decode(model.base, memory_prefix(model.base, [memory]), ids)
        torch.testing.assert_close(decode(model.base, moved, ids), wanted, rtol=1e-3, atol=1e-3)


def test_the_shelf_decodes_once_stays_within_its_bound_and_keeps_what_is_read(
    tiny_compressor: Compressor, tmp_path: Path
) -> None:
    base, loaded = tiny_compressor.base, []
    memories = dict(zip("abc", tiny_compressor.compress(TEXTS), strict=True))

    def load(name: str) -> Callable[[], Memory]:
        return lambda: loaded.append(name) or memories[name]  # type: ignore[func-returns-value]

    def files() -> int:
        return len(list((tmp_path / "shelf").iterdir()))

    shelf = Shelf(tmp_path / "shelf", 1)
    first = shelf.take(("a",), base, load("a"))
    assert shelf.take(("a",), base, load("a")) == first
    others = [shelf.take((name,), base, load(name)) for name in "bc"]
    assert (files(), loaded) == (3, ["a", "b", "c"])
    for one in (first, *others):
        shelf.give_back(one)
    shelf.take(("b",), base, load("b"))
    assert (files(), loaded) == (2, ["a", "b", "c"])  # that of the first is read once still
    shelf.give_back(first)
    (tmp_path / "shelf" / f"{others[0].name}.safetensors").unlink()
    shelf.take(("b",), base, load("b"))
    assert (files(), loaded[3:]) == (1, ["b"])
    assert shelf.take(("a",), base, load("a")) == first
    assert loaded[4:] == ["a"]


def test_names_that_lead_elsewhere_are_refused(tmp_path: Path) -> None:
    folder = Catalogue(tmp_path)
    for name in ("../secret", "/etc/passwd", ".hidden", "", "a/b", "no\n", "x" * 300):
        with pytest.raises(Missing, match="there is no memory"):
            folder.state(name)


def test_making_a_memory_twice_makes_it_once(desk: Desk) -> None:
    made = desk.create({"text": TEXTS[0], "tokens": 4})
    written = next(desk.catalogue.folder.iterdir()).stat().st_mtime_ns
    assert desk.create({"text": TEXTS[0], "tokens": 4}) == made
    assert next(desk.catalogue.folder.iterdir()).stat().st_mtime_ns == written
    assert made["tokens"] == 4
    assert made["ratio"] == made["passage_tokens"] / 4
    assert 0 <= made["fidelity"] <= 1
    assert made["bytes"] > 0
    other = desk.create({"text": TEXTS[0], "tokens": 2, "measure": False})
    assert (other["id"] != made["id"], other["fidelity"]) == (True, None)
    for wrong in ({}, {"text": 3}, {"text": ""}, {"text": "a", "tokens": 99}, {"text": "a", "speed": 1}):
        with pytest.raises(CompressorError):
            desk.create(wrong)


class _Store:
    """What a catalogue asks of a store: the memories given, the last of which is nearest."""

    def __init__(self, memories: dict[str, Memory]):
        self.memories = memories

    def _rows(self, names: list[str], *_: str) -> list[dict[str, Any]]:
        if names[0] not in self.memories:
            raise CompressorError("has no memory")
        return [{"coded": 1, "digest": name} for name in names]

    def load(self, names: list[str]) -> list[Memory]:
        return [self.memories[name] for name in names]

    def search(self, question: str, top: int) -> list[Any]:
        return [SimpleNamespace(id=name) for name in reversed(self.memories)][:top]


def test_a_request_gets_placeholders_and_a_salt_of_its_memory(desk: Desk) -> None:
    one, two = (desk.create({"text": text})["id"] for text in TEXTS[:2])

    def prepared(path: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
        asyncio.run(desk.prepare(body, path))
        return body

    again = prepared(prompt="", memories=[one])
    assert again["prompt"] == [desk.placeholder] * 8 + [desk.model.base.bos]
    assert again["max_tokens"] > 0
    other, both = prepared(prompt="Why?", memories=[two]), prepared(prompt=["Why?", [7]], memories=[one, two])
    assert len({again["cache_salt"], other["cache_salt"], both["cache_salt"]}) == 3
    assert both["prompt"][1] == [desk.placeholder] * 16 + [7]
    assert prepared(prompt="a", memories=[one], memory_tokens=2)["kv_transfer_params"]["tokens"] == 2
    assert prepared(prompt="a", memories=[one], cache_salt="mine")["cache_salt"].endswith(":mine")
    assert prepared(CHAT, messages=[], memories=[one])["chat_template_kwargs"] == {"memory_tokens": 8}
    assert prepared(prompt="as it is") == {"prompt": "as it is"}
    desk.catalogue.store = _Store({"far": desk.catalogue.load(one), "near": desk.catalogue.load(two)})
    found = prepared(prompt="Why?", retrieve={"question": "Why?", "top": 2})
    assert found["cache_salt"] == both["cache_salt"]
    assert prepared(prompt="Why?", memories=["near"])["cache_salt"] == other["cache_salt"]


def test_wrong_requests_say_what_is_wrong(desk: Desk, make_family_base: Any, make_tiny_compressor: Make) -> None:
    one = desk.create({"text": TEXTS[0]})["id"]
    foreign = make_tiny_compressor(base=make_family_base("qwen2")).compress(TEXTS[0])
    desk.catalogue.add("foreign", foreign)
    whole = desk.catalogue.path(one).read_bytes()
    (desk.catalogue.folder / "cut.memory").write_bytes(whole[: len(whole) // 2])
    (desk.catalogue.folder / "turned.memory").write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    cases: list[tuple[int, str, dict[str, Any]]] = [
        (404, "there is no memory 'gone'", {"memories": ["gone"]}),
        (404, "1 segments", {"memories": [f"{one}:1"]}),
        (422, "made with another base", {"memories": ["foreign"]}),
        (422, "memory 'cut'", {"memories": ["cut"]}),
        (422, "memory 'turned'", {"memories": ["turned"]}),
        (422, "cannot concatenate", {"memories": [one, "foreign"]}),
        (400, "must be a list of ids", {"memories": one}),
        (400, "cannot truncate to 9", {"memories": [one], "memory_tokens": 9}),
        (400, "echo cannot be used", {"memories": [one], "echo": True}),
        (400, "name the memories", {"kv_transfer_params": {"memory": one, "tokens": 7}}),
        (400, "name the memories", {"memory_tokens": 4}),
        (400, "there is no store", {"retrieve": {"question": "Why?"}}),
        (400, "retrieve is", {"retrieve": "Why?"}),
        (400, "nothing like this question", {"retrieve": {"question": "Why?"}, "store": True}),
        (400, "reads no memories", {"memories": [one], "path": "/v1/responses"}),
        (400, "prompt must be", {"memories": [one], "prompt": [None]}),
    ]
    for status, message, body in cases:
        desk.catalogue.store = _Store({}) if body.pop("store", False) else None
        with pytest.raises(CompressorError, match=message) as caught:
            asyncio.run(desk.prepare({"prompt": "a", **body}, body.get("path", COMPLETIONS)))
        assert json.loads(_reply(caught.value).body)["error"]["code"] == status, body


def test_the_chat_template_asks_as_the_compressor_was_trained_to() -> None:
    from jinja2 import Environment

    text = chat_template(None, '\nQuestion "x": {question} Answer:', "<eos>", "<bos>")
    turns = [{"role": "system", "content": "A text."}, {"role": "user", "content": " Why? "}]
    template = Environment().from_string(text)
    assert template.render(messages=turns[1:], memory_tokens=3) == '<eos><eos><eos>\nQuestion "x": Why? Answer:'
    assert template.render(messages=turns) == '<bos>A text.\nQuestion "x": Why? Answer:'
    assert (
        Environment().from_string(chat_template("own", "chat", "<eos>", "<bos>")).render(memory_tokens=1) == "<eos>own"
    )
    with pytest.raises(CompressorError, match="no chat template"):
        chat_template(None, "chat", "<eos>", "<bos>")


def test_without_vllm_the_command_says_how_to_get_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = ["serve", "--checkpoint", "models/arxiv-mini/compressor", "--memories", str(tmp_path)]
    assert main([*argv, "--dry-run", "--", "--max-model-len", "512"]) == 0
    shown = capsys.readouterr().out
    assert "vllm.entrypoints.openai.api_server" in shown
    assert shown.strip().endswith("--max-model-len 512")
    (tmp_path / "a.txt").write_text("no memory")
    for wrong, message in {
        f"--memories={tmp_path / 'a.txt'}": "is a file",
        f"--files={tmp_path / 'a.txt'}": "is not a memory file",
        f"--files={tmp_path / 'gone.memory'}": "does not exist",
        f"--store={tmp_path}": "is no store of memories",
        "--codec=int5": "no codec 'int5'",
    }.items():
        assert main([*argv[:3], wrong, "--dry-run"]) == 2
        assert message in capsys.readouterr().err
    if importlib.util.find_spec("vllm") is None:
        assert main(argv) == 2
        assert "pip install" in capsys.readouterr().err


class _Said:
    """An API server that answers every completion with the same log-probabilities."""

    def __init__(self, right: bool):
        self.right, self.desk = right, None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.responses import JSONResponse

        from compressor.model.decoder import score

        body = json.loads((await receive())["body"])
        model, memory = self.desk.model, self.desk.canaries[body["memories"][0]]
        (ours,) = score(model.base, memory_prefix(model.base, [memory]), [[model.base.bos]], [[3, 4]])
        said = (ours[:, 0] - (0 if self.right else 0.1)).tolist()
        choice = {"token_ids": [3, 4], "logprobs": {"token_logprobs": said}}
        await JSONResponse({"choices": [choice], "usage": {"prompt_tokens": 9}})(scope, receive, send)


def test_a_canary_that_differs_from_our_decoder_keeps_the_server_shut(desk: Desk) -> None:
    for right in (True, False):
        app: Any = _Said(right)
        app.state = SimpleNamespace(args=SimpleNamespace(api_key=None))
        front = Front(app)
        front.desk = app.desk = desk
        if right:
            asyncio.run(front.try_canaries(app, 0.02))
        else:
            with pytest.raises(CompressorError, match="vLLM reads memories otherwise"):
                asyncio.run(front.try_canaries(app, 0.02))


# -- the real server ---------------------------------------------------------------------------------------------


PATIENCE = 1800
"""Seconds that a server has to start: 90 on two free cores, many more on a busy one."""


class Server:
    """`compressor serve` in a process of its own, on loopback, with an API key."""

    KEY = "secret"

    def __init__(self, checkpoint: str, folder: Path, port: int, *more: str):
        self.checkpoint, self.folder, self.port, self.more = checkpoint, folder, port, more
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "compressor", "serve", "--checkpoint", self.checkpoint]
        command += ["--memories", str(self.folder / "memories"), "--port", str(self.port), *self.more]
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"} | os.environ
        self.log = open(self.folder / "log", "ab")  # noqa: SIM115
        more = ["--", "--api-key", self.KEY] if "--" not in self.more else ["--api-key", self.KEY]
        self.process = subprocess.Popen(
            [*command, *more], env=environment, stdout=self.log, stderr=self.log, start_new_session=True
        )
        patience = time.monotonic() + PATIENCE
        while True:
            if self.process.poll() is not None or time.monotonic() > patience:
                self.stop(signal.SIGKILL)
                raise AssertionError((self.folder / "log").read_text()[-3000:])
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
                return
            except OSError:
                time.sleep(1)

    def stop(self, number: int = signal.SIGTERM) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(self.process.pid, number)
        self.process.wait(60)
        self.log.close()

    def ask(self, method: str, path: str, body: Any = None, key: str = KEY) -> tuple[int, Any]:
        """Status and JSON of a reply."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", method=method)
        request.add_header("Authorization", f"Bearer {key}")
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, None if body is None else json.dumps(body).encode(), 300) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    @property
    def client(self) -> Any:
        from openai import OpenAI

        return OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=self.KEY, timeout=300, max_retries=0)

    @property
    def model(self) -> str:
        return self.ask("GET", "/v1/models")[1]["data"][0]["id"]

    def make(self, text: str, **settings: Any) -> dict[str, Any]:
        status, made = self.ask("POST", "/v1/memories", {"text": text, **settings})
        assert status == 200, made
        return made

    def regenerate(self, *names: str, **body: Any) -> Any:
        """A completion of memories alone, greedy."""
        extra = {"memories": list(names), **body}
        return self.client.completions.create(model=self.model, prompt="", temperature=0, extra_body=extra)

    def answer(self, *names: str, max_tokens: int) -> Any:
        """A chat of one question about memories, greedy."""
        asked = [{"role": "user", "content": QUESTION}]
        options = {"temperature": 0, "max_tokens": max_tokens, "extra_body": {"memories": list(names)}}
        return self.client.chat.completions.create(model=self.model, messages=asked, **options)


needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(scope="module")
def mini(project: Path) -> Compressor:
    return Compressor.from_pretrained(project / "models" / "arxiv-mini" / "compressor")


@pytest.fixture(scope="module")
def server(mini: Compressor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serves arxiv-mini's memories, with a store of `TEXTS` beside its folder."""
    folder = tmp_path_factory.mktemp("serving")
    store = Store.open(folder / "store", mini, making=Making(codec="int4+ans", no_measure=True), encoder="bm25")
    store.add({f"paper-{number}": text for number, text in enumerate(TEXTS)})
    started = Server("models/arxiv-mini/compressor", folder, 8471, "--store", str(folder / "store"))
    yield started
    started.stop()


@pytest.mark.slow
@needs_vllm
def test_every_checkpoint_of_the_base_regenerates_and_answers_as_here(
    server: Server, mini: Compressor, project: Path
) -> None:
    text, template, wanted = TEXTS[0], mini.config.question_template, {}
    for checkpoint in (project / "models/arxiv-mini/compressor", *(project / "models/arxiv-mini/methods").iterdir()):
        model = Compressor.from_pretrained(checkpoint)
        for tokens in (16, 4, 1):
            try:
                memory = model.compress(text, tokens)
            except CompressorError:  # a method of one number of tokens
                continue
            name = f"{checkpoint.name}-{tokens}"
            memory.save(server.folder / "memories" / f"{name}.memory")
            answer = model.answer(memory, QUESTION, template=template, limit=16)
            wanted[name] = (memory.tokens, model.regenerate(memory), answer)
    assert {"compressor-16", "compressor-4", "compressor-1", "kv-16", "icae-16"} <= set(wanted)
    with ThreadPoolExecutor(64) as pool:
        regenerated = dict(zip(wanted, pool.map(server.regenerate, wanted), strict=True))
        answered = dict(zip(wanted, pool.map(lambda name: server.answer(name, max_tokens=16), wanted), strict=True))
    for name, (tokens, back, answer) in wanted.items():
        reply = regenerated[name]
        assert reply.choices[0].text == back, name
        assert reply.usage.prompt_tokens == tokens + 1
        assert reply.usage.prompt_tokens_details.cached_tokens >= tokens
        assert answered[name].choices[0].message.content.strip() == answer, name


@pytest.mark.slow
@needs_vllm
def test_many_requests_at_once_and_streams_equal_one_after_the_other(server: Server, mini: Compressor) -> None:
    names = [server.make(text)["id"] for text in TEXTS]
    alone = [server.regenerate(name).choices[0].text for name in names]
    assert alone == mini.regenerate(mini.compress(TEXTS))
    with ThreadPoolExecutor(64) as pool:
        found = list(pool.map(lambda i: server.regenerate(names[i % 3]).choices[0].text, range(64)))
    assert found == [alone[i % 3] for i in range(64)]
    chunks = server.client.completions.create(
        model=server.model, prompt="", temperature=0, stream=True, extra_body={"memories": [names[1]]}
    )
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == alone[1]


@pytest.mark.slow
@needs_vllm
def test_several_memories_lie_in_one_context(server: Server, mini: Compressor) -> None:
    memories = mini.compress(TEXTS)
    names = [server.make(text)["id"] for text in TEXTS]
    chat = server.answer(*names, max_tokens=48)
    assert chat.choices[0].message.content.strip() == mini.answer(Memory.concatenate(memories), QUESTION)
    assert chat.usage.prompt_tokens > 48
    long = server.make(" ".join(TEXTS), segment_tokens=30)
    assert long["segments"] > 1
    with ThreadPoolExecutor(8) as pool:
        names = [f"{long['id']}:{i}" for i in range(long["segments"])]
        parts = [reply.choices[0].text for reply in pool.map(server.regenerate, names)]
    assert "".join(parts) == mini.regenerate(mini.compress(" ".join(TEXTS), segment_tokens=30))


@pytest.mark.slow
@needs_vllm
def test_two_memories_behind_the_same_placeholders_never_meet(server: Server, mini: Compressor) -> None:
    # A prompt longer than a block, so that the block with the memory is kept in the prefix cache.
    base, memories = mini.base, mini.compress(TEXTS)
    prompt = [base.bos, *base.tokenise(TEXTS[1:2])[0][:16]]
    body = {"model": server.model, "prompt": prompt, "temperature": 0, "max_tokens": 16}
    wanted = generate(base, memory_prefix(base, memories), [prompt] * 3, [16] * 3)
    texts = [base.tokenizer.decode(one.ids, skip_special_tokens=True) for one in wanted]
    assert len(set(texts)) > 1
    names = [server.make(text)["id"] for text in TEXTS]
    for _ in range(2):
        said = [server.ask("POST", COMPLETIONS, {**body, "memories": [name]})[1] for name in names]
        assert [one["choices"][0]["text"].strip() for one in said] == [text.strip() for text in texts]
    assert all(one["usage"]["prompt_tokens_details"]["cached_tokens"] > 16 for one in said)
    plain = server.ask("POST", COMPLETIONS, body)[1]
    assert plain["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


@pytest.mark.slow
@needs_vllm
def test_wrong_memories_are_refused_and_the_engine_lives(
    server: Server, mini: Compressor, tiny_compressor: Compressor
) -> None:
    made = server.make(TEXTS[2])
    folder = server.folder / "memories"
    whole = (folder / f"{made['id']}.memory").read_bytes()
    (folder / "cut.memory").write_bytes(whole[:-100])
    (folder / "turned.memory").write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    tiny_compressor.compress(TEXTS[0]).save(folder / "foreign.memory")
    body = {"model": server.model, "prompt": "", "temperature": 0}
    for name, status in (("cut", 422), ("turned", 422), ("foreign", 422), ("gone", 404), ("../x", 404)):
        code, reply = server.ask("POST", COMPLETIONS, {**body, "memories": [name]})
        assert (code, reply["error"]["code"]) == (status, status), reply
        chat = {"model": server.model, "messages": [{"role": "user", "content": "Why?"}], "memories": [name]}
        assert server.ask("POST", CHAT, chat)[0] == status
    for wrong in ({"memory_tokens": 17}, {"memories": None, "kv_transfer_params": {"memory": made["id"], "tokens": 5}}):
        assert server.ask("POST", COMPLETIONS, {**body, "memories": [made["id"]], **wrong})[0] == 400
    assert server.ask("POST", COMPLETIONS, {**body, "memories": [made["id"]]}, key="wrong")[0] == 401
    assert server.ask("GET", f"/v1/memories/{made['id']}", key="wrong")[0] == 401
    assert server.ask("GET", f"/v1/memories/{made['id']}")[1] == made
    # Deleted while it is read: what is under way goes on, what comes after is refused.
    stream = server.client.completions.create(
        model=server.model, prompt="", temperature=0, stream=True, extra_body={"memories": [made["id"]]}
    )
    first = next(iter(stream)).choices[0].text
    assert server.ask("DELETE", f"/v1/memories/{made['id']}") == (
        200,
        {"id": made["id"], "object": "memory", "deleted": True},
    )
    rest = "".join(chunk.choices[0].text for chunk in stream if chunk.choices)
    assert first + rest == mini.regenerate(mini.compress(TEXTS[2]))
    assert server.ask("POST", COMPLETIONS, {**body, "memories": [made["id"]]})[0] == 404
    # A file that goes between the front and the workers fails its request alone.
    name = server.make(CANARIES[0] + TEXTS[0])["id"]
    for file in Path(f"/dev/shm/kv-compressor-{os.getuid()}-{server.port}").iterdir():
        file.rename(file.with_suffix(".away"))
    assert server.make(TEXTS[2]) == made
    assert server.regenerate(name).choices[0].text


@pytest.mark.slow
@needs_vllm
def test_requests_name_a_store_to_retrieve_from(server: Server, mini: Compressor) -> None:
    store = Store.open(server.folder / "store", base=mini.base)
    question = "Do neural networks need samples of a telescope?"
    wanted = store.ask(question, 2)
    assert len(wanted.hits) == 2
    body = {"model": server.model, "messages": [{"role": "user", "content": question}], "temperature": 0}
    body |= {"max_tokens": 48, "retrieve": {"question": question, "top": 2}}
    status, reply = server.ask("POST", CHAT, body)
    assert status == 200, reply
    assert reply["choices"][0]["message"]["content"].strip() == wanted.text
    assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] >= wanted.positions
    nearest = wanted.hits[0].id
    assert server.regenerate(nearest).choices[0].text == mini.regenerate(store.load([nearest])[0])
    assert server.ask("POST", CHAT, {**body, "retrieve": {"question": "zyzzyva"}})[0] == 400
    assert server.ask("DELETE", f"/v1/memories/{nearest}")[0] == 400
    store.delete([nearest])
    assert server.ask("POST", CHAT, {**body, "retrieve": None, "memories": [nearest]})[0] == 404
    assert server.ask("POST", CHAT, body)[1]["choices"][0]["message"]["content"].strip() == store.ask(question, 2).text


@pytest.mark.slow
@needs_vllm
def test_after_kill_9_a_new_start_serves_the_memories_that_were_made(server: Server, mini: Compressor) -> None:
    name = server.make(TEXTS[1])["id"]
    server.stop(signal.SIGKILL)
    server.start()
    assert server.regenerate(name).choices[0].text == mini.regenerate(mini.compress(TEXTS[1]))


@pytest.mark.slow
@needs_vllm
def test_smollm2_regenerates_and_answers_as_here_64_at_once_too(project: Path, tmp_path: Path) -> None:
    from compressor.model.bases import NAMED, cached

    if not cached(NAMED["smollm2-135m"].sha256):
        pytest.skip("`compressor fetch smollm2-135m` has not been run")
    checkpoint = project / "models" / "smollm2-135m" / "compressor"
    model, wanted = Compressor.from_pretrained(checkpoint), {}
    started = Server(str(checkpoint), tmp_path, 8472)
    try:
        for tokens in (16, 4, 1):
            memory, name = model.compress(TEXTS[0], tokens), started.make(TEXTS[0], tokens=tokens)["id"]
            wanted[name] = model.regenerate(memory), model.answer(memory, QUESTION, limit=16)
            assert started.regenerate(name).choices[0].text == wanted[name][0]
            assert started.answer(name, max_tokens=16).choices[0].message.content.strip() == wanted[name][1]
        names = (list(wanted) * 22)[:64]
        with ThreadPoolExecutor(64) as pool:
            found = list(pool.map(lambda name: started.regenerate(name).choices[0].text, names))
        assert found == [wanted[name][0] for name in names]
    finally:
        started.stop()
