"""The demo and the memory commands, on the bundled model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compressor.api import Compressor
from compressor.commands import demonstration
from compressor.commands.cli import demo_main
from compressor.commands.cli import main as cli
from compressor.commands.shown import mark_differences
from compressor.model.base import Base
from compressor.model.memory import Memory
from compressor.packing.lossless import pack_passage


def demo(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert demo_main(list(arguments)) == 0
    return capsys.readouterr().out


def test_differences_are_marked_word_by_word() -> None:
    assert mark_differences("a b c d", "a x c d e", colour=False) == "a [-b-] {+x+} c d {+e+}"
    assert mark_differences("the same", "the same", colour=False) == "the same"
    assert "\033[31m[-b-]" in mark_differences("a b", "a", colour=True)


def test_the_demo_runs_offline_without_arguments(tmp_path: Path, program: Callable[..., Any]) -> None:
    """Without the flagship's base it takes the compressor whose base ships with the project, and says so."""
    status, shown, errors = program("demo.py", PATH="/usr/bin:/bin", KV_COMPRESSOR_CACHE=str(tmp_path))
    assert status == 0, errors
    assert "models/arxiv-mini/compressor is used" in errors
    assert "compressor fetch smollm2-135m" in errors
    assert "After 10 gradient steps" in shown
    answers = re.findall(r"^  from (.*?): ", shown.partition("Question: ")[2], re.MULTILINE)
    assert answers == ["16 memory tokens", "the whole passage", "no passage"]
    assert "96 tokens -> 16 memory tokens (6x)" in shown
    assert "ROUGE-L" in shown
    assert "Traceback" not in errors


def test_json_has_the_documented_keys(capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads(demo(capsys, "--json", "--tokens", "4", "--length", "32"))
    assert {"passage", "tokens", "passage_tokens", "regeneration", "bleu", "rouge_l", "seconds"} <= set(result)
    assert (result["tokens"], result["passage_tokens"]) == (4, 32)
    assert 0 <= result["rouge_l"] <= 1
    assert 0 <= result["bleu"] <= 100


def test_a_question_is_answered_from_memory_passage_and_nothing(
    texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demonstration, "answer", partial(demonstration.answer, limit=8))
    asked, text = "Which structures are classified?", ["--text", str(tmp_path / "text.txt")]
    (tmp_path / "text.txt").write_text(" ".join(" ".join(texts[:2]).split()[:90]))
    result = json.loads(demo(capsys, "--json", "--question", asked, "--tokens", "4", *text))
    assert {"question", "answer", "answer_recite", "answer_full", "answer_none", "logprob"} <= set(result)
    assert (result["question"], result["tokens"]) == (asked, 4)
    assert result["passage_tokens"] == result["text_tokens"] > 96  # a question is about all of the text
    assert len({result[f"logprob{suffix}"] for suffix in ("", "_full", "_none")}) == 3
    assert result["logprob"] < 0
    shown = demo(capsys, "--question", asked, "--length", "24", *text)
    for label in (
        "from 16 memory tokens",
        "from what they regenerate",
        "from the whole passage",
        "from no passage",
        "log-probability",
    ):
        assert label in shown
    sizes = ["--tokens", "4", "--segment_tokens", str(result["text_tokens"] // 2 + 1)]
    parts = json.loads(demo(capsys, "--json", "--question", asked, *sizes, *text))
    assert (parts["segments"], parts["tokens"]) == (2, 8)
    assert demo_main(["--question", " "]) == 2
    assert "a question is empty" in capsys.readouterr().err


def test_the_published_example_is_regenerated_and_asked(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--example", "published", "--tokens", "4", "--checkpoint", "models/arxiv-mini/compressor"]
    result = json.loads(demo(capsys, "--json", *argv))
    assert result["passage"].startswith("We show that every reciprocity sheaf gives rise to a cycle (pre)module")
    assert result["passage"].endswith("similar to Rost's cycle complexes.")
    assert "Kato complexes" in result["question"]
    assert {"regeneration", "answer", "answer_full", "answer_none", "refined"} <= set(result)
    assert demo_main(["--example", "other"]) == 2
    assert "abstract, published" in capsys.readouterr().err


def test_own_text_is_taken_whole_and_segmented(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demonstration, "regenerate", lambda *_: {})
    path = tmp_path / "long.txt"
    path.write_text("We measure the spectrum of light scattered by dust. " * 60)
    result = json.loads(demo(capsys, "--text", str(path), "--json"))
    assert result["passage_tokens"] == result["text_tokens"] > 500
    assert result["segments"] == 2
    assert result["tokens"] == 32


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"  \n", "is empty"),
        (b"\xff\x00", "zero byte"),
        (None, "cannot read"),
    ],
)
def test_bad_text_is_refused(
    content: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "passage.txt"
    if content is not None:
        path.write_bytes(content)
    assert demo_main(["--text", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")


def test_what_holds_many_texts_is_refused_with_what_takes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.csv").write_text("id,text\n1,We measure dust.\n")
    for source, why in (("rows.csv", "holds many texts"), (".", "is a folder")):
        path = str(tmp_path / source)
        for command in (partial(demo_main, ["--text", path]), partial(cli, ["compress", path, "-o", "none.memory"])):
            assert command() == 2
            error = capsys.readouterr().err
            assert f"{path} {why}" in error
            assert f"compressor index {path} --output STORE" in error
    assert demo_main(["--text", str(tmp_path / "gone.csv")]) == 2
    assert "gone.csv: No such file or directory; name a text file, or give -" in capsys.readouterr().err


def test_gradient_steps_that_are_asked_for_are_told_beside_one_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("We measure the spectrum of light scattered by dust.")
    sizes = ["--tokens", "1", "--checkpoint", "models/arxiv-mini/compressor"]
    shown = demo(capsys, "--text", str(tmp_path / "text.txt"), "--refine-steps", "20", *sizes)
    assert re.search(r"-> 1 memory token \(\d+x\), after 20 gradient steps;", shown)
    refined, before = re.findall("^BLEU.*", shown, re.MULTILINE)
    assert before.endswith("in one pass, without the gradient steps")
    plain = demo(capsys, "--text", str(tmp_path / "text.txt"), *sizes)
    assert re.findall("^BLEU.*", plain, re.MULTILINE) == [before.partition("   in one")[0]] != [refined]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "99"], "1 to 16"),
        (["--tokens", "0"], "at least 1"),
        (["--checkpoint", "no/such"], "no/such"),
        (["--token", "4"], "did you mean tokens"),
        (["--example", "100000"], "out of range"),
    ],
)
def test_bad_options_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo_main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_memory_file_regenerates_without_the_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, memory = tmp_path / "passage.txt", tmp_path / "passage.memory"
    text.write_text("We study the conductivity of thin films at low temperature.")
    assert cli(["compress", "--text", str(text), "--output", str(memory), "--dtype", "float32"]) == 0
    capsys.readouterr()
    assert cli(["regenerate", "--memory", str(memory)]) == 0
    written = capsys.readouterr().out.strip()
    assert written == json.loads(demo(capsys, "--text", str(text), "--json"))["regeneration"].strip()

    asked = "Which property is studied?"
    assert cli(["ask", "--memory", str(memory), "--question", asked]) == 0
    answer = capsys.readouterr().out.strip()
    same = ["--checkpoint", "models/arxiv-mini/compressor", "--text", str(text), "--json", "--question", asked]
    assert answer == json.loads(demo(capsys, *same))["answer"]
    assert cli(["ask", "--memory", str(memory), "--question", asked, "--recite", "true"]) == 0
    assert capsys.readouterr().out.strip() == json.loads(demo(capsys, *same))["answer_recite"]
    assert cli(["ask", "--memory", str(memory)]) == 2
    assert "give a question" in capsys.readouterr().err
    assert cli(["regenerate", str(memory), "--id", "3"]) == 2
    assert "is one memory: leave --id out" in capsys.readouterr().err

    assert cli(["compress", "--text", str(text), "--output", str(memory)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    damaged = bytearray(memory.read_bytes())
    damaged[-7] ^= 1
    memory.write_bytes(damaged)
    assert cli(["regenerate", "--memory", str(memory)]) == 2
    assert "damaged" in capsys.readouterr().err


def test_commands_compute_in_the_type_that_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, memory = tmp_path / "passage.txt", tmp_path / "passage.memory"
    text.write_text("We study the conductivity of thin films at low temperature.")
    made, mine = ["compress", "--text", str(text), "--output", str(memory), "--dtype", "float32"], "--base-dtype"
    assert cli([*made, mine, "bfloat16"]) == 0
    model = Compressor.from_pretrained("models/arxiv-mini/compressor", dtype="bfloat16")
    half, kept = model.compress(text.read_text()), Memory.load(memory)
    torch.testing.assert_close(kept.keys, half.keys.float())
    whole = Compressor.from_pretrained("models/arxiv-mini/compressor").compress(text.read_text())
    assert not torch.equal(kept.keys, whole.keys)
    capsys.readouterr()
    assert cli(["regenerate", "--memory", str(memory), mine, "bfloat16"]) == 0
    assert capsys.readouterr().out.strip() == model.regenerate(half).strip()
    # A text that is kept comes back whatever type the base is held in later: it is not packed under rounded weights.
    assert cli([*made, mine, "bfloat16", "--keep-text", "--overwrite"]) == 0
    assert pack_passage(text.read_text()) == Memory.load(memory).text
    capsys.readouterr()
    assert cli(["regenerate", "--memory", str(memory), "--exact"]) == 0
    assert capsys.readouterr().out.strip() == text.read_text()
    assert cli(["regenerate", "--memory", str(memory), mine, "half"]) == 2
    assert "bfloat16" in capsys.readouterr().err


def test_a_kept_text_comes_back_with_its_byte_order_mark(
    tiny_compressor: Compressor, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    folder, text, memory = tmp_path / "checkpoint", tmp_path / "passage.txt", str(tmp_path / "passage.memory")
    tiny_compressor.save_pretrained(folder)
    text.write_bytes("\ufeffWe study thin films.\r\n".encode())
    options = ["-o", memory, "--checkpoint", str(folder), "--no-measure", "--keep-text"]
    assert cli(["compress", str(text), *options]) == 0
    capfdbinary.readouterr()
    assert cli(["regenerate", memory, "--exact", "--base", tiny_compressor.base.name]) == 0
    assert capfdbinary.readouterr().out == text.read_bytes()
    (plain,) = tiny_compressor.base.tokenise(["We study thin films.\r\n"])
    assert Memory.load(memory).passage_tokens == len(plain)  # the mark is no part of what the memory says


def test_a_checkpoint_rounded_to_half_the_size_reads_alike(
    tiny_compressor: Compressor, tiny_base: Base, tmp_path: Path
) -> None:
    tiny_compressor.save_pretrained(tmp_path / "half", torch.bfloat16)
    weights = load_file(tmp_path / "half" / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    loaded = Compressor.from_pretrained(tmp_path / "half", base=tiny_base)
    for name, weight in loaded.trainable_state().items():
        assert torch.equal(weight, tiny_compressor.trainable_state()[name].bfloat16().float())
