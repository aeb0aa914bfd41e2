"""The page of `demo.py --web`, asked over HTTP as a browser asks it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from compressor.api import Compressor
from compressor.commands.demo import demo_main
from compressor.commands.demonstration import differences
from compressor.commands.web import described, page
from compressor.errors import CompressorError

Make = Callable[..., Compressor]


def test_differences_name_what_is_missing_and_what_was_added() -> None:
    runs = differences("a b c d", "a x c d e")
    assert [(words.strip(), kind) for words, kind in runs] == [
        ("a", None),
        ("b", "missing"),
        ("x", "added"),
        ("c d", None),
        ("e", "added"),
    ]


def test_a_text_is_described_with_answers_where_it_is_asked_about(make_tiny_compressor: Make, texts: list[str]) -> None:
    model = make_tiny_compressor()
    summary, runs, answers = described(model, texts[0][:200], 4, 16, 0, "")
    assert "memory tokens** in " in summary
    assert "".join(words for words, kind in runs if kind != "added").split() == texts[0][:200].split()
    assert answers == []
    _, _, answers = described(model, texts[0][:200], 4, 16, 1, "What is it?")
    assert [row[0] for row in answers[1:]] == ["what they regenerate", "the whole passage", "no passage"]
    assert f"**{answers[0][0]}**" in summary.replace("→ ", "**")
    with pytest.raises(CompressorError, match="the passage is empty"):
        described(model, "  ", 4, 16, 0, "")


def test_the_page_answers_over_http(make_tiny_compressor: Make, texts: list[str]) -> None:
    from gradio_client import Client

    model = make_tiny_compressor()
    made = page(model, texts[0][:100])
    _, url, _ = made.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, inbrowser=False)
    try:
        client = Client(url, verbose=False)
        summary, written, answers = client.predict(texts[1][:150], 2, 64, 0, "Why?", api_name="/compress")
        wanted = described(model, texts[1][:150], 2, 64, 0, "Why?")
        assert [run["token"] for run in written] == [words for words, _ in wanted[1]]
        assert summary.split(";")[0] == wanted[0].split(";")[0]  # seconds differ
        assert answers["data"] == wanted[2]
        with pytest.raises(Exception, match="the passage is empty"):
            client.predict(" ", 2, 64, 0, "", api_name="/compress")
    finally:
        made.close()


def test_without_the_extra_the_page_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert demo_main(["--web"]) == 2
    assert "pip install -e '.[web]'" in capsys.readouterr().err
    assert demo_main(["--web", "--port", "0"]) == 2
    assert "port = 0 is out of range" in capsys.readouterr().err


def test_a_port_that_is_taken_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Taken:
        def launch(self, **options: Any) -> None:
            raise OSError("Cannot find empty port in range: 80-80")

    monkeypatch.setattr("compressor.commands.web.page", lambda *_: Taken())
    assert demo_main(["--web", "--port", "80"]) == 2
    assert "Give another --port" in capsys.readouterr().err
