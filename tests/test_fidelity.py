"""compress(text, target_fidelity=...): the fewest memory tokens that keep enough of a passage."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import compressor.fidelity
from compressor.errors import CompressorError
from compressor.fidelity import compress_to_fidelity, fidelities, sizes_to_try
from compressor.generation import decode
from compressor.memory import Memory, memory_prefix
from compressor.model import Compressor

Make = Callable[..., Compressor]


def _ids(model: Compressor, text: str) -> list[int]:
    return model.base.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def bundled(project: Path) -> Compressor:
    """The bundled compressor: fidelities of random weights are all about 0."""
    return Compressor.from_pretrained(project / "models" / "arxiv-mini" / "compressor")


def test_fidelity_is_the_token_accuracy_of_the_passage_under_its_memory(bundled: Compressor, texts: list[str]) -> None:
    """Against logits of the plain decoder, one passage and segment at a time."""
    passages = [_ids(bundled, " ".join(texts[:5]))[:600], _ids(bundled, texts[5])[:20]]
    memories = bundled.compress_ids(passages, 16)
    assert [len(memory.segments) for memory in memories] == [2, 1]
    expected = []
    with torch.no_grad(), bundled.adapters(on=False):
        for ids, memory in zip(passages, memories, strict=True):
            right = total = start = 0
            for part in memory.split():
                segment = ids[start : start + part.passage_tokens]
                start += part.passage_tokens
                inputs = torch.tensor([[bundled.base.bos, *segment]])
                logits = decode(bundled.base, memory_prefix(bundled.base, [part]), inputs)
                right += int((logits[0].argmax(-1) == torch.tensor([*segment, bundled.base.eos])).sum())
                total += len(segment) + 1
            expected.append(right / total)
    assert min(expected) > 0
    for batch_size in (1, 16):
        assert fidelities(bundled, memories, passages, batch_size) == pytest.approx(expected, abs=0.01)


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
    monkeypatch.setattr(compressor.fidelity, "fidelities", measured)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for target, size in ((0.3, 1), (0.31, 2), (0.95, 8)):
            found = model.compress(text, target_fidelity=target)
            plain = model.compress(text, size)
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
    monkeypatch.setattr(compressor.fidelity, "fidelities", _Measured({1: 0.0, 2: 0.0, 4: 0.0, 8: 1.0}))
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
