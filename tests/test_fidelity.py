"""compress(text, target_fidelity=...): the fewest memory tokens that keep enough of a passage."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import compressor.model.fidelity
from compressor.api import Compressor
from compressor.commands.cli import main as cli
from compressor.errors import CompressorError
from compressor.model.fidelity import compress_to_fidelity, edits, fidelities, passage_scores, sizes_to_try
from compressor.model.generation import regenerate_ids
from compressor.model.memory import Memory, memory_prefix
from compressor.storage.codec import Codec
from compressor.storage.memory_file import as_stored

Make = Callable[..., Compressor]


def _ids(model: Compressor, text: str) -> list[int]:
    return model.base.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def bundled(project: Path) -> Compressor:
    """The bundled compressor: fidelities of random weights are all about 0."""
    return Compressor.from_pretrained(project / "models" / "arxiv-mini" / "compressor")


def _plain_edits(wanted: Sequence[int], found: Sequence[int]) -> int:
    """Levenshtein distance from its recurrence."""
    row = list(range(len(found) + 1))
    for i, token in enumerate(wanted, 1):
        last, row = row, [i]
        for j, other in enumerate(found, 1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (token != other)))
    return row[-1]


def test_edits_are_the_fewest() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(4, (size,), generator=generator).tolist() for size in (0, 1, 2, 5, 9, 17, 30)]
    for wanted in drawn:
        for found in drawn:
            assert edits(wanted, found) == _plain_edits(wanted, found)


def _shares(model: Compressor, memories: Sequence[Memory], passages: Sequence[list[int]]) -> list[float]:
    """Share of each passage, of one or more segments, that comes back, from what `regenerate` writes."""
    parts = [(place, *pair) for place, one in enumerate(memories) for pair in one.split_with(passages[place])]
    wrong, total = [0] * len(memories), [0] * len(memories)
    backs = regenerate_ids(model.base, [part for _, part, _ in parts])
    for (place, _, segment), back in zip(parts, backs, strict=True):
        wrong[place] += _plain_edits(segment, back)
        total[place] += max(len(segment), len(back))
    return [1 - one / all_ for one, all_ in zip(wrong, total, strict=True)]


def _share(model: Compressor, memory: Memory, ids: list[int]) -> float:
    return _shares(model, [memory], [ids])[0]


@pytest.fixture(scope="module")
def measured(bundled: Compressor, texts: list[str]) -> tuple[list[list[int]], list[Memory], list[float]]:
    """Passages, one of them in segments, their memories, and what share of each `regenerate` brings back."""
    passages = [_ids(bundled, texts[1])[:130], _ids(bundled, texts[5])[:20], _ids(bundled, " ".join(texts[6:8]))[:150]]
    memories = bundled.compress_ids(passages, 16, segment_tokens=140)
    assert [len(memory.segments) for memory in memories] == [1, 1, 2]
    return passages, memories, _shares(bundled, memories, passages)


def test_fidelity_is_the_share_that_comes_back_in_regeneration(bundled: Compressor, measured: Any) -> None:
    passages, memories, shares = measured
    assert min(shares) < max(shares) == 1
    assert fidelities(bundled, memories, passages) == pytest.approx(shares, abs=0.001)


def test_a_fidelity_that_only_right_tokens_before_would_reach_is_not_accepted(
    bundled: Compressor, measured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compressor.model.fidelity, "sizes_to_try", lambda *_: [16])
    ids, memory, share = (column[0] for column in measured)
    with torch.no_grad():
        scores = passage_scores(bundled.base, memory_prefix(bundled.base, [memory]), [ids])[0]
    teacher_forced = float(scores[:, 1].mean())
    assert share < teacher_forced - 0.01
    with pytest.warns(UserWarning, match=f"reach a fidelity of {share:.3f}"):
        found = compress_to_fidelity(bundled, [ids], (share + teacher_forced) / 2)[0]
    assert found.fidelity == pytest.approx(share, abs=0.001)


def test_what_the_tokenizer_cannot_spell_does_not_come_back(
    bundled: Compressor, measured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, ids, memory = bundled.base, measured[0][1], measured[1][1]
    monkeypatch.setattr(
        base, "tokenizer", SimpleNamespace(unk_token_id=ids[3], bos_token_id=base.bos, eos_token_id=base.eos)
    )
    assert fidelities(bundled, [memory], [ids]) == [1 - ids.count(ids[3]) / 20]


def test_python_says_what_does_not_come_back_without_being_asked(
    bundled: Compressor, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = KINDS["English"], KINDS["Chinese"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory = bundled.compress(good)
        assert memory.fidelity == pytest.approx(_share(bundled, memory, _ids(bundled, good)), abs=0.001)
        assert bundled.compress(bad, measure=False).fidelity is None
        assert bundled.compress([]) == []
    share = _share(bundled, bundled.compress(bad, measure=False), _ids(bundled, bad))
    with pytest.warns(UserWarning, match=f"only {share:.1%} of it comes back"):
        assert bundled.compress(bad).fidelity == pytest.approx(share, abs=0.001)

    # Of many segments as many are tried as fit one batch; all if that is asked for.
    tried: list[int] = []
    honest = compressor.model.fidelity._shares
    monkeypatch.setattr(compressor.model.fidelity, "_shares", lambda *all: tried.append(len(all[1])) or honest(*all))
    with pytest.warns(
        UserWarning,
        match="of 1 of the 2 passages .* under 90% comes back, at worst .*%, from the memory",
    ):
        memories = bundled.compress([good, good, bad], 16, batch_size=2)
    assert (tried, [memory.fidelity is None for memory in memories]) == ([2], [False, True, False])


KINDS = {
    "English": "We measure the thermal conductivity of graphene ribbons with rough edges.",
    "Chinese": "我们测量了边缘粗糙的石墨烯带的热导率。",
    "emoji": "🙂🚀🎉 done 🤖📈🧪",
    "code": "def mean(xs):\n    if not xs:\n        raise ValueError\n    return sum(xs) / len(xs)",
    "table": "| n | BLEU |\n|--:|--:|\n| 16 | 92.1 |\n| 4 | 26.8 |",
    "LaTeX": r"\begin{equation} E = \frac{1}{2} \sum_{i \ne j} \frac{q_i q_j}{4 \pi \epsilon_0 r_{ij}} \end{equation}",
}


def test_a_fidelity_that_is_asked_for_is_kept_or_refused_with_a_warning(
    bundled: Compressor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On languages, code, tables and LaTeX, in what `regenerate` writes."""
    monkeypatch.setattr(compressor.model.fidelity, "sizes_to_try", lambda *_: [8, 16])
    with pytest.warns(UserWarning, match="16 memory tokens reach a fidelity") as caught:
        memories = bundled.compress(list(KINDS.values()), target_fidelity=0.85)
    written = _shares(bundled, memories, [_ids(bundled, text) for text in KINDS.values()])
    shares = dict(zip(KINDS, written, strict=True))
    assert [memory.fidelity for memory in memories] == pytest.approx(list(shares.values()), abs=0.001)
    short = [kind for kind, share in shares.items() if share < 0.85]
    assert f"for {len(short)} of {len(KINDS)} passages" in str(caught[0].message)
    assert {"Chinese", "emoji"} <= set(short)
    assert not {"English", "LaTeX"} & set(short)


def test_a_fidelity_is_that_of_what_is_stored(
    bundled: Compressor, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compressor.model.fidelity, "sizes_to_try", lambda *_: [16])
    ids, codec = _ids(bundled, texts[3])[:60], Codec.parse("int2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        memory = compress_to_fidelity(bundled, [ids], 1.0, stored=lambda memory: as_stored(memory, codec))[0]
    back = as_stored(memory, codec)
    assert not torch.equal(back.keys, memory.keys)
    assert memory.fidelity == fidelities(bundled, [back], [ids])[0]
    assert memory.fidelity < fidelities(bundled, [memory], [ids])[0]


SENTENCES = {"en": "We study graphene ribbons with rough edges.", "zh": "我们研究边缘粗糙的石墨烯带。"}
COMMANDS: dict[str, tuple[str, list[str], list[str], str]] = {
    "all comes back": ("en", [], ["100.0% of the text comes back"], ""),
    "much is lost": (
        "zh",
        [],
        [],
        r"warning: only \d+\.\d% of \S*zh.txt comes back, where 90% is asked for: .*--keep-text",
    ),
    "a low threshold": ("zh", ["--warn-below=0"], ["% of the text comes back"], ""),
    "the text is kept": ("zh", ["--keep-text"], ["are the text"], "comes back.* the text is kept too"),
    "a fidelity": ("en", ["--target-fidelity=0.9"], ["8 memory tokens", "100.0% of the text"], ""),
    "one that cannot be had": ("zh", ["--target-fidelity=0.8"], ["16 memory tokens"], "where 80% is asked for"),
    "not measured": ("zh", ["--no-measure"], ["16 memory tokens"], ""),
}


@pytest.mark.parametrize("case", list(COMMANDS))
def test_the_command_says_how_much_comes_back(
    bundled: Compressor, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    language, options, shown, warned = COMMANDS[case]
    monkeypatch.setattr(Compressor, "from_pretrained", lambda *_, **__: bundled)
    monkeypatch.setattr(compressor.model.fidelity, "sizes_to_try", lambda *_: [8, 16])
    path, memory = tmp_path / f"{language}.txt", tmp_path / "text.memory"
    path.write_text(SENTENCES[language])
    assert cli(["compress", str(path), "-o", str(memory), *options]) == 0
    printed = capsys.readouterr()
    assert all(text in printed.out for text in shown), printed.out
    assert bool(printed.err) == bool(warned)
    assert re.search(warned, printed.err)
    loaded = Memory.load(memory)
    if case == "not measured":
        assert loaded.fidelity is None
    else:
        expected = fidelities(bundled, [loaded], [_ids(bundled, SENTENCES[language])])
        assert [loaded.fidelity] == pytest.approx(expected, abs=1e-4)
        assert cli(["inspect", str(memory)]) == 0
        assert f"{loaded.fidelity:.1%} of the text" in capsys.readouterr().out
        monkeypatch.setattr("compressor.commands.loading.load_base", lambda *_: bundled.base)
        assert cli(["ask", "--memory", str(memory), "--question", "What?"]) == 0
        assert ("of the text comes back from this memory" in capsys.readouterr().err) == (loaded.fidelity < 0.9)


def test_the_command_names_the_texts_of_a_corpus_of_which_little_comes_back(
    bundled: Compressor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Compressor, "from_pretrained", lambda *_, **__: bundled)
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"id": k, "text": v}) + "\n" for k, v in SENTENCES.items()))
    assert cli(["index", str(corpus), "-o", str(tmp_path / "c"), "--encoder", "bm25"]) == 0
    printed = capsys.readouterr()
    assert re.search(r"of 1 of 2 texts less than 90% comes back \(\d+\.\d% of zh\)", printed.err)
    assert "of a text (median of 2), at least " in printed.out


class _Measured:
    """Stands in for the measurement: the fidelity of a memory of each size, and what was asked."""

    def __init__(self, by_size: dict[int, float]):
        self.by_size, self.asked = by_size, list[int]()

    def __call__(self, _model: Any, memories: Sequence[Memory], _ids: Any, _batch_size: int = 16) -> list[float]:
        sizes = [memory.segments[0].tokens for memory in memories]
        self.asked += sizes
        return [self.by_size[size] for size in sizes]


@pytest.mark.parametrize("layout", ["nested", "spread"])
def test_the_smallest_sufficient_power_of_two_is_taken(
    make_tiny_compressor: Make, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    model = make_tiny_compressor(layout=layout)
    text = "One passage that is compressed to as few tokens as will do."
    measured = _Measured({1: 0.3, 2: 0.9, 4: 0.7, 8: 1.0})
    monkeypatch.setattr(compressor.model.fidelity, "fidelities", measured)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for target, size in ((0.3, 1), (0.31, 2), (0.95, 8)):
            found = model.compress(text, target_fidelity=target)
            plain = model.compress(text, size, measure=False)
            assert found.segments == plain.segments
            torch.testing.assert_close((found.keys, found.values), (plain.keys, plain.values), atol=1e-5, rtol=1e-4)
    assert measured.asked == [1, 1, 2, 1, 2, 4, 8]  # no size above the one that suffices


@pytest.mark.parametrize(("layout", "times"), [("nested", 1), ("spread", 4)])
def test_encodes_once_where_memories_can_be_truncated(
    make_tiny_compressor: Make, monkeypatch: pytest.MonkeyPatch, layout: str, times: int
) -> None:
    model = make_tiny_compressor(layout=layout)
    calls = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda *arguments: calls.append(arguments) or encode(*arguments))
    monkeypatch.setattr(compressor.model.fidelity, "fidelities", _Measured({1: 0.0, 2: 0.0, 4: 0.0, 8: 1.0}))
    model.compress("Some words.", target_fidelity=1.0)
    assert len(calls) == times


def test_each_passage_of_a_list_gets_its_own_size(bundled: Compressor, texts: list[str]) -> None:
    """With real measurements: each memory suffices, and no smaller one does."""
    chosen = [text[:100] for text in texts[:6]]
    ids = [_ids(bundled, text) for text in chosen]
    sizes = (1, 2, 4, 8, 16)
    of_size = {size: fidelities(bundled, bundled.compress_ids(ids, size), ids) for size in sizes}
    assert sum(of_size[16]) > sum(of_size[1])
    target = sum(of_size[8]) / len(ids)
    expected = [next((size for size in sizes if of_size[size][i] >= target), 16) for i in range(len(ids))]
    assert len(set(expected)) > 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        memories = bundled.compress(chosen, target_fidelity=target)
    assert [memory.segments[0].tokens for memory in memories] == expected


def test_the_largest_memory_comes_with_a_warning_where_none_suffices(make_tiny_compressor: Make) -> None:
    model = make_tiny_compressor()
    text = "A passage that random weights do not bring back."
    reached = fidelities(model, [model.compress(text)], [_ids(model, text)])[0]
    with pytest.warns(
        UserWarning, match=f"8 memory tokens reach a fidelity of {reached:.3f}, less than the 1 asked"
    ) as w:
        assert model.compress(text, target_fidelity=1.0).tokens == 8
    assert w[0].filename == __file__  # it points to the caller
    with pytest.warns(UserWarning, match="4 memory tokens reach .* for 2 of 2 passages, at worst"):
        assert [m.tokens for m in model.compress([text, text + " Nor this."], 4, target_fidelity=1.0)] == [4, 4]


def test_segments_get_the_same_size(make_tiny_compressor: Make, texts: list[str]) -> None:
    model = make_tiny_compressor()
    with pytest.warns(UserWarning, match="fidelity"):
        memory = model.compress(" ".join(texts[:2]), target_fidelity=1.0)
    assert len(memory.segments) > 1
    assert {segment.tokens for segment in memory.segments} == {8}


def test_sizes_to_try(make_tiny_compressor: Make) -> None:
    model = make_tiny_compressor(memory_tokens=12, layout="spread")
    assert sizes_to_try(model) == [1, 2, 4, 8, 12]
    assert sizes_to_try(model, 8) == [1, 2, 4, 8]
    assert sizes_to_try(model, 1) == [1]
    published = make_tiny_compressor(method="reference-500x", layout="published")
    assert sizes_to_try(published) == [8]  # trained for one size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_fidelity": 0.0}, "above 0 and at most 1"),
        ({"target_fidelity": 95}, "above 0 and at most 1"),
        ({"target_fidelity": 0.5, "tokens": 9}, "1 to 8"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(
    tiny_compressor: Compressor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CompressorError, match=message):
        tiny_compressor.compress("Words.", **options)
    with pytest.raises(CompressorError, match="empty passage"):
        tiny_compressor.compress("", target_fidelity=0.5)
    assert compress_to_fidelity(tiny_compressor, [], 0.5) == []
