"""The page of `compressor demo --web`: what it does, over HTTP, and in a browser."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scripts import load_script

from compressor.api import Compressor
from compressor.commands.cli import demo_main
from compressor.commands.fragments import card, sides
from compressor.commands.page import Followed, Page, Session
from compressor.commands.shown import differences
from compressor.commands.web import look, page, reach_this_machine
from compressor.errors import CompressorError
from compressor.model.memory import Memory
from compressor.model.refinement import refine

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


def test_sides_mark_what_is_missing_added_and_still_to_come() -> None:
    def stripped(runs: list[tuple[str, str | None]]) -> list[tuple[str, str | None]]:
        return [(words.strip(), kind) for words, kind in runs]

    left, right = sides("a b c d e f", "a x c")
    assert stripped(left) == [("a", None), ("b", "missing"), ("c", None), ("d e f", "missing")]
    assert stripped(right) == [("a", None), ("x", "added"), ("c", None)]
    left, right = sides("a b c d e f", "a x c y", finished=False)
    assert stripped(left) == [("a", None), ("b", "missing"), ("c", None), ("d e f", "coming")]
    assert stripped(right)[-1] == ("y", None)
    assert stripped(sides("a b c d e f", "a x c y z", finished=False)[0])[-2:] == [("d", "missing"), ("e f", "coming")]
    assert "".join(words for words, _ in left) == "a b c d e f"
    assert sides("a b", "", finished=False) == ([("a b", "coming")], [])


def test_costs_are_named_in_one_unit_and_may_be_more() -> None:
    assert "<strong>2x less</strong>" in card("x", 3_000_000, 1_500_000, ["B", "kB", "MB"])
    assert "3.00 MB" in card("x", 3_000_000, 1_500, ["B", "kB", "MB"])
    assert "<strong>2x more</strong>" in card("x", 8, 16, [""])


def last(steps: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """What the page shows when a run is done."""
    shown: dict[str, Any] = {}
    for step in steps:
        shown |= step
    return shown


def test_one_compression_serves_every_k(
    make_tiny_compressor: Make, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, session = make_tiny_compressor(), Session()
    does, text = Page(model, tmp_path), texts[0][:250]
    shown = last(does.run(does.compress, session, text, 8, 32, 0))
    memory = model.compress(text, segment_tokens=32, measure=False)
    assert session.shown is not None
    assert session.shown.segments == memory.segments
    assert f"in {len(memory.segments)} segments alone" in shown["texts"]
    assert "of the tokens came back" in shown["status"]
    assert "Positions in the context" in shown["costs"]
    assert Memory.load(shown["file"]).segments == memory.segments

    monkeypatch.setattr(model, "compress_ids", None)
    shown = last(does.run(does.resize, session, 2, 0))
    assert "from 2 memory tokens" in shown["texts"].replace(f"{2 * len(memory.segments)} memory", "2 memory")
    back = model.base.tokenizer.decode(session.written[2, 0], skip_special_tokens=True)
    assert back == model.regenerate(memory.truncate(2))
    assert "written before" in last(does.run(does.resize, session, 8, 0))["status"]
    last(does.run(does.resize, session, 2, 3))
    assert session.shown.made["refine_steps"] == 3
    wanted = refine(model.base, [memory.truncate(2)], [session.ids], 3, 4)[0]
    assert session.shown.keys.equal(wanted.keys)

    shown = last(does.run(does.ask, session, "What is it?"))
    for way in ("memory", "recited", "full", "none"):
        assert f'class="kv-{way}"' in shown["answers"]
    assert shown["answers"].count("log-probability") == 4


def test_a_memory_file_is_loaded_and_what_is_wrong_becomes_a_message(
    make_tiny_compressor: Make, tmp_path: Path
) -> None:
    model, session = make_tiny_compressor(), Session()
    does, file = Page(model, tmp_path), tmp_path / "a.memory"
    model.compress("We study <b>thin</b> films.", 4, measure=False).save(file)
    shown = last(does.run(does.load, session, str(file), "", 8))
    assert "keeps no text" in shown["texts"]
    assert session.shown is not None
    assert session.shown.tokens == 4
    assert "keeps no text" in last(does.run(does.ask, session, "What?"))["answers"]
    shown = last(does.run(does.load, session, str(file), "We study <b>thin</b> films.", 8))
    assert "compared with the text above" in shown["status"]
    assert "&lt;b&gt;thin" in shown["texts"]

    file.write_text("something else")
    for work, values, message in (
        (does.load, (str(file), "", 8), "a.memory is not a memory file"),
        (does.compress, ("  ", 8, 64, 0), "the passage is empty"),
        (does.compress, ("half \ud83d", 8, 64, 0), "half of a surrogate pair"),
        (does.ask, (" ",), "the question is empty"),
    ):
        status = last(does.run(work, session, *values))["status"]
        assert 'role="alert"' in status
        assert message in status
        assert str(tmp_path) not in status
    status = last(does.run(does.ask, Session(), "What?"))["status"]
    assert "nothing is compressed yet" in status


def test_a_newer_run_ends_an_older_one_and_keeps_the_page(make_tiny_compressor: Make, tmp_path: Path) -> None:
    model, session = make_tiny_compressor(), Session()
    does = Page(model, tmp_path)
    running = does.run(does.compress, session, "Some words of a passage. " * 200, 8, 16, 0)
    assert "Compressing segment 1 of" in next(running)["status"]
    assert "Stopped" in last(does.run(does.stop, session))["status"]
    assert "Stopped" in last(running)["status"]
    assert session.memory is None
    # Two moves of the slider that arrive in the other order.
    last(does.run(does.compress, session, "Some words.", 8, 16, 0))
    last(does.run(does.resize, session, 3, 0, clock=2.0))
    assert "from 3 memory tokens" in last(does.run(does.resize, session, 5, 0, clock=1.0))["texts"]
    # Gradient steps end where they are.
    steps = does.run(does.resize, session, 3, 50)
    assert "Gradient steps" in next(steps)["status"]
    last(does.run(does.stop, session))
    assert "Stopped" in last(steps)["status"]


def test_work_that_is_followed_gives_its_result_and_its_error() -> None:
    followed = Followed(lambda advance: [advance(2), "made"])
    list(followed)
    assert (followed.done, followed.result) == (2, [None, "made"])
    with pytest.raises(CompressorError, match="wrong"):
        list(Followed(lambda advance: (_ for _ in ()).throw(CompressorError("wrong"))))


@pytest.fixture
def served(make_tiny_compressor: Make, texts: list[str], tmp_path: Path) -> Iterator[str]:
    """Address of a page with a tiny compressor."""
    made = page(make_tiny_compressor(), tmp_path, texts[0][:100])
    reach_this_machine()
    _, url, _ = made.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, inbrowser=False, **look())
    yield url
    made.close()


def test_the_page_answers_over_http(served: str, texts: list[str]) -> None:
    from gradio_client import Client

    client = Client(served, verbose=False)
    status, shown, costs, _, file = client.predict(texts[1][:150], 2, 64, 0, api_name="/compress")
    assert "came back" in status
    assert "Written back" in shown
    assert "Cache of keys and values" in costs
    assert Memory.load(file["value"] if isinstance(file, dict) else file).segments[0].tokens == 2
    assert "What?" in client.predict("What?", api_name="/ask")[3]
    assert "the passage is empty" in client.predict(" ", 2, 64, 0, api_name="/compress")[0]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_the_page_in_a_browser(served: str, tmp_path: Path, project: Path) -> None:
    pytest.importorskip("playwright")
    screenshots = load_script(project / "runs" / "screenshots.py")
    with screenshots.Visit(served) as visit:
        visit.status("came back")
        visit.type("A text that somebody wrote, of a few more words than there are memory tokens.")
        visit.press("Control+Enter")
        visit.status("Compressing|Writing")
        visit.status("came back")
        assert "A text that somebody wrote" in visit.text("#kv-texts")
        visit.slide(-5)
        visit.status("came back")
        assert "from 3 memory tokens" in visit.text("#kv-texts")
        visit.slide(5)
        visit.status("written before")
        assert "from 8 memory tokens" in visit.text("#kv-texts")
        visit.ask("What is it?")
        visit.status("Answered")
        assert visit.page.locator(".kv-answers section").count() == 4
        file = visit.download(tmp_path)
        assert Memory.load(file).tokens == 8
        visit.upload(file)
        visit.status("loaded")
        (tmp_path / "bad.memory").write_text("nothing")
        visit.upload(tmp_path / "bad.memory")
        visit.status("bad.memory is not a memory file")
        visit.type("One sentence after the other. " * 3000)
        visit.press("Control+Enter")
        visit.status(r"segment \d+ of \d+")
        visit.press("Escape")
        visit.status("Stopped")
        visit.example(0)
        visit.status("came back")
        assert not visit.errors
        visit.page.set_viewport_size({"width": 360, "height": 800})
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= 360
        question, ask = (visit.page.locator(part).bounding_box() for part in ("#kv-question", "#kv-ask"))
        assert ask["y"] >= question["y"] + question["height"]  # below it, so that the question has the whole width
        # By keys alone: from the passage on, every control is reached.
        visit.page.locator("#kv-passage textarea").focus()
        reached = set()
        for _ in range(40):
            visit.page.keyboard.press("Tab")
            reached.add(visit.page.evaluate("document.activeElement.closest('[id^=kv-]')?.id"))
        assert {"kv-tokens", "kv-compress", "kv-stop", "kv-save", "kv-load", "kv-question", "kv-ask"} <= reached


def test_without_the_extra_the_page_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "compressor.commands.web")
    assert demo_main(["--web"]) == 2
    assert "pip install 'kv-compressor[web]'" in capsys.readouterr().err
    assert demo_main(["--web", "--port", "0"]) == 2
    assert "port = 0 is out of range" in capsys.readouterr().err


def test_a_port_that_is_taken_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Taken:
        def launch(self, **options: Any) -> None:
            raise OSError("Cannot find empty port in range: 80-80")

    monkeypatch.setattr("compressor.commands.web.page", lambda *_: Taken())
    assert demo_main(["--web", "--port", "80"]) == 2
    assert "Give another --port" in capsys.readouterr().err
