"""Pushing a checkpoint to the hub and reading it back, against a stand-in of the hub's HTTP API."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlparse

import pytest
import yaml

from compressor import Compressor
from compressor.errors import CompressorError

COMMIT = "0123456789" * 4


class Hub(BaseHTTPRequestHandler):
    """What `huggingface_hub` asks of a hub to create a repository, commit files to it and download them."""

    repositories: ClassVar[dict[str, dict[str, bytes]]] = {}
    tokens: ClassVar[list[str | None]] = []
    private: ClassVar[list[Any]] = []

    def log_message(self, *_: Any) -> None:
        pass

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length")
        if length is None:  # sent in chunks
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(length))
        path = urlparse(self.path).path
        self.tokens.append(self.headers.get("Authorization"))
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
            self.private.append(asked.get("private") is True or asked.get("visibility") == "private")
            self.repositories.setdefault(name, {})
            self._json({"url": f"http://{self.headers['Host']}/{name}", "name": name})
        elif path == "/api/validate-yaml":
            self._json({})
        elif "/preupload/" in path:
            files = [file["path"] for file in json.loads(body)["files"]]
            self._json({"files": [{"path": file, "uploadMode": "regular", "shouldIgnore": False} for file in files]})
        elif "/commit/" in path:
            name = path.removeprefix("/api/models/").split("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"http://{self.headers['Host']}/{name}/commit/{COMMIT}"
            self._json({"commitUrl": url, "commitOid": COMMIT, "hookOutput": "", "success": True})
        else:
            self._json({"error": path}, 404)

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        if path.startswith("/api/models/"):
            name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
            if name not in self.repositories:
                self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
                return
            files = [{"rfilename": file, "size": len(data)} for file, data in self.repositories[name].items()]
            tree = [{"type": "file", "path": f["rfilename"], "size": f["size"], "oid": COMMIT} for f in files]
            self._json(tree if "/tree/" in path else {"id": name, "modelId": name, "sha": COMMIT, "siblings": files})
            return
        name, _, rest = path.strip("/").partition("/resolve/")
        data = self.repositories.get(name, {}).get(rest.partition("/")[2])
        if data is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            self._send(200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"'})

    do_HEAD = do_GET


@pytest.fixture
def hub() -> Iterator[str]:
    """Address of the stand-in."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


PROGRAM = """
import sys
from compressor import Compressor

made, evaluation = sys.argv[1:]
model = Compressor.from_pretrained(made)
model.save_pretrained(
    made + "-again", evaluation=evaluation, license="cc0-1.0", push_to_hub=True, repo_id="somebody/small", token="hf_x",
    private=True,
)
back = Compressor.from_pretrained("somebody/small")
text = "We study heat in films."
print(model.regenerate(model.compress(text)) == back.regenerate(back.compress(text)), back.about["license"])
"""


def test_a_pushed_checkpoint_comes_back_with_its_card(
    hub: str, tiny_compressor: Compressor, tmp_path: Path, project: Path
) -> None:
    figures = {"rouge_l": 0.5, "bleu": 40.0, "exact_match": 0.1}
    row = {"method": "kv", "dataset": "arxiv-test", "tokens": 4, "length": 96, "n": 7, **figures}
    (tmp_path / "metrics.json").write_text(json.dumps({"task": "regeneration", "rows": [row]}))
    tiny_compressor.save_pretrained(tmp_path / "made", datasets=["arxiv-train"])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(project), "NO_PROXY": "*"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "made"), str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "cc0-1.0"]
    assert "/somebody/small/commit/" in done.stderr
    assert set(Hub.tokens) == {"Bearer hf_x"}
    assert Hub.private == [True]
    files = Hub.repositories["somebody/small"]
    local = tmp_path / "made-again"
    assert {name: (local / name).read_bytes() for name in files} == files
    assert {"compressor.json", "memory_tokens.safetensors", "adapter_model.safetensors", "README.md"} <= set(files)
    card = files["README.md"].decode()
    header = yaml.safe_load(card.split("---")[1])
    assert header["datasets"] == ["arxiv-train"]
    assert (header["license"], header["library_name"], header["metrics"]) == (
        "cc0-1.0",
        "peft",
        ["bleu", "exact_match", "rouge"],
    )
    (result,) = header["model-index"][0]["results"]
    assert {one["type"]: one["value"] for one in result["metrics"]} == {"rouge": 0.5, "bleu": 40.0, "exact_match": 0.1}
    assert "k = 4 | 7 | ROUGE-L | 0.500 |" in card
    assert str(tmp_path) not in card


def test_the_card_of_a_named_base_names_it_on_the_hub(project: Path) -> None:
    from compressor.model.card import model_card

    settings = json.loads((project / "models/smollm2-135m/compressor/compressor.json").read_text())
    settings |= {"parameters": {"trained": 1, "base": 2}}
    header = yaml.safe_load(model_card(settings).split("---")[1])
    assert header["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_what_cannot_be_pushed_is_told_and_stays_here(tiny_compressor: Compressor, tmp_path: Path) -> None:
    """Offline, as all tests are."""
    with pytest.raises(CompressorError, match=r"cannot push .*written here"):
        tiny_compressor.save_pretrained(tmp_path / "made", push_to_hub=True, repo_id="somebody/other")
    assert (tmp_path / "made" / "compressor.json").exists()
    with pytest.raises(CompressorError, match="knows no branch"):
        tiny_compressor.save_pretrained(tmp_path / "made", push_to_hub=True, branch="x")
    with pytest.raises(CompressorError, match="token is of the hub"):
        tiny_compressor.save_pretrained(tmp_path / "made", token="x")
    (tmp_path / "metrics.json").write_text(json.dumps({"task": "efficiency", "rows": [{"tokens": 4}]}))
    with pytest.raises(CompressorError, match="no regeneration or answers"):
        tiny_compressor.save_pretrained(tmp_path / "made", evaluation=tmp_path)
