"""Memories: truncation, concatenation, segments, positions, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.api import Compressor
from compressor.commands.cli import main
from compressor.commands.options import AskOptions
from compressor.errors import CompressorError
from compressor.methods.interface import MemoryMethod
from compressor.model.decoder import decode, empty_prefix
from compressor.model.memory import Memory, Segment, memory_prefix
from compressor.storage.making import Making
from compressor.storage.store import Store

PASSAGE = [(7 * i) % 400 + 5 for i in range(40)]
OTHER = [(11 * i) % 400 + 5 for i in range(23)]


def close(a: Memory, b: Memory) -> None:
    torch.testing.assert_close(a.keys, b.keys, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(a.values, b.values, atol=1e-5, rtol=1e-4)
    assert replace(a, keys=b.keys, values=b.values) == b


@pytest.fixture
def make(make_tiny_compressor: Callable[..., Any]) -> Callable[..., Compressor]:
    return make_tiny_compressor


@pytest.mark.parametrize("layout", ["nested", "after", "restart"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 8])
def test_truncating_equals_compressing_with_fewer_tokens(
    make: Callable[..., Compressor], layout: str, tokens: int
) -> None:
    model = make(layout=layout)
    for memory, fewer in zip(
        model.compress_ids([PASSAGE, OTHER]), model.compress_ids([PASSAGE, OTHER], tokens), strict=True
    ):
        cut = memory.truncate(tokens)
        close(cut, fewer)
        assert cut.tokens == tokens
        for ours, theirs in zip(cut.positions(), fewer.positions(), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("layout", ["spread", "overlay"])
def test_layouts_that_move_with_k_refuse_truncation_and_say_what_to_do(
    make: Callable[..., Compressor], layout: str
) -> None:
    memory = make(layout=layout).compress_ids([PASSAGE])[0]
    with pytest.raises(CompressorError, match=rf"layout {layout} cannot be truncated.*compress again with 4.*nested"):
        memory.truncate(4)
    assert torch.equal(memory.truncate(8).keys, memory.keys)


@pytest.mark.parametrize("tokens", [0, -1, 9])
def test_truncating_to_an_impossible_number_is_refused(tiny_compressor: Compressor, tokens: int) -> None:
    with pytest.raises(CompressorError, match=rf"{tokens} (memory tokens: the memory has 8|is out of range)"):
        tiny_compressor.compress_ids([PASSAGE])[0].truncate(tokens)


def test_segments_can_be_shorter_than_the_compressor_takes(make: Callable[..., Compressor]) -> None:
    model = make()
    text = "one two three four five six seven eight"
    ids = model.base.tokenizer(text)["input_ids"]
    memory = model.compress(text, segment_tokens=4)
    assert [part.passage_tokens for part in memory.segments] == [len(part) for part in model.segment(ids, 4)]
    assert len(memory.segments) == -(-len(ids) // 4) > 1
    assert torch.equal(memory.keys, model.compress_ids([ids], segment_tokens=4)[0].keys)
    with pytest.raises(CompressorError, match="segment_tokens = 0 is out of range"):
        model.compress(text, segment_tokens=0)
    with pytest.raises(CompressorError, match="segment_tokens = 65 is out of range: it must be at most 64"):
        model.compress(text, segment_tokens=65)  # 64 would be taken, and nobody told


def test_a_long_text_is_segments_compressed_apart_and_joined(make: Callable[..., Compressor]) -> None:
    model = make(max_passage_tokens=16)
    memory = model.compress_ids([PASSAGE])[0]
    assert memory.segments == (Segment(8, 13), Segment(8, 13), Segment(8, 14))
    assert (memory.tokens, memory.passage_tokens) == (24, 40)
    alone = model.compress_ids([PASSAGE[:13], PASSAGE[13:26], PASSAGE[26:]])
    close(memory, Memory.concatenate(alone))
    for part, one in zip(memory.split(), alone, strict=True):
        close(part, one)
    close(memory.truncate(2), Memory.concatenate([one.truncate(2) for one in alone]))


def test_segments_are_as_long_as_the_settings_say_and_evaluated_whole(make: Callable[..., Compressor]) -> None:
    model = make(max_passage_tokens=40, segment_tokens=16)
    (memory,) = model.compress_ids([PASSAGE])
    assert memory.segments == (Segment(8, 13), Segment(8, 13), Segment(8, 14))
    assert memory.made["segment_tokens"] == 16
    assert len(model.segment(PASSAGE)) == 3
    whole = model.compress_ids([PASSAGE], segment_tokens=40)[0]
    assert whole.segments == (Segment(8, 40),)
    # A table's k is of a passage, unless segments are asked for.
    (((piece,),),) = MemoryMethod(model).compress([PASSAGE], [8])
    close(piece.held, whole)
    assert len(MemoryMethod(model, segment_tokens=20).compress([PASSAGE], [8])[0][0]) == 2


CONCATENATED = {
    # Two passages of 16 and 8 tokens with 2 of 2 memory tokens each.
    "restart": ([16, 17, 24, 25], 4),
    "after": ([16, 17, 26, 27], 28),  # the first memory's own tokens count as text before the second passage
    "spread": ([4, 12, 18, 22], 24),
    "overlay": ([4, 12, 18, 22], 0),
    "nested": ([4, 12, 18, 22], 0),
}


@pytest.mark.parametrize("layout", list(CONCATENATED))
def test_concatenated_memories_lie_one_after_the_other(make: Callable[..., Compressor], layout: str) -> None:
    model = make(layout=layout, memory_tokens=2)
    first, second = model.compress_ids([PASSAGE[:16], PASSAGE[16:24]])
    both = Memory.concatenate([first, second])
    positions, start = both.positions()
    assert (positions.tolist(), int(start)) == CONCATENATED[layout]
    prefix = memory_prefix(model.base, [both])
    placed = model.base.rotate(torch.stack(prefix.keys), positions[None], inverse=True)[:, 0]
    torch.testing.assert_close(placed, both.keys, atol=1e-5, rtol=1e-4)
    assert torch.equal(torch.stack(prefix.values)[:, 0], both.values)
    assert int(prefix.start) == int(start)


def test_memories_of_unequal_size_share_a_batch(tiny_compressor: Compressor) -> None:
    base = tiny_compressor.base
    long, short = tiny_compressor.compress_ids([PASSAGE, OTHER])
    short = short.truncate(3)
    prefix = memory_prefix(base, [long, short])
    assert prefix.mask.tolist() == [[True] * 8, [True] * 3 + [False] * 5]
    ids = torch.tensor([[base.bos, 9, 8], [base.bos, 9, 8]])
    with torch.no_grad():
        together = decode(base, prefix, ids)
        for row, memory in enumerate((long, short)):
            torch.testing.assert_close(
                together[row : row + 1],
                decode(base, memory_prefix(base, [memory]), ids[row : row + 1]),
                atol=1e-4,
                rtol=1e-4,
            )
        chosen = decode(base, prefix.select(torch.tensor([1])), ids[1:])
        torch.testing.assert_close(chosen, together[1:], atol=1e-4, rtol=1e-4)


def test_keys_are_stored_without_position(make: Callable[..., Compressor]) -> None:
    # In the first layer a memory token's key comes from its embedding alone, wherever the token lies.
    for layout in ("after", "spread"):
        long, short = make(layout=layout).compress_ids([PASSAGE, OTHER])
        torch.testing.assert_close(long.keys[0], short.keys[0], atol=1e-5, rtol=1e-4)
        assert not torch.allclose(long.values[1], short.values[1], atol=1e-3)


def test_a_decoder_does_not_change_the_memory_or_the_prefix(tiny_compressor: Compressor) -> None:
    memory = tiny_compressor.compress_ids([PASSAGE])[0]
    prefix = memory_prefix(tiny_compressor.base, [memory])
    before = [memory.keys.clone(), memory.values.clone(), *[keys.clone() for keys in prefix.keys]]
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        first = decode(tiny_compressor.base, prefix, ids)
        second = decode(tiny_compressor.base, prefix, ids)
    assert torch.equal(first, second)
    after = [memory.keys, memory.values, *prefix.keys]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_no_context_equals_the_plain_model(tiny_base: Any) -> None:
    ids = torch.tensor([[1, 5, 9, 4], [1, 7, 7, 7]])
    with torch.no_grad():
        torch.testing.assert_close(
            decode(tiny_base, empty_prefix(tiny_base, 2), ids), tiny_base.model(ids).logits, atol=1e-5, rtol=1e-4
        )


def test_size_and_type(tiny_compressor: Compressor) -> None:
    memory = tiny_compressor.compress_ids([PASSAGE])[0]
    assert memory.nbytes == 2 * 3 * 2 * 8 * 8 * 4  # keys and values, layers, heads, tokens, head size, float32
    half = memory.to(dtype=torch.bfloat16)
    assert (half.keys.dtype, half.nbytes, half.segments) == (torch.bfloat16, memory.nbytes // 2, memory.segments)


def test_what_does_not_fit_together_is_refused(make: Callable[..., Compressor], make_family_base: Any) -> None:
    model = make()
    memory = model.compress_ids([PASSAGE])[0]
    with pytest.raises(CompressorError, match="empty list"):
        Memory.concatenate([])
    with pytest.raises(CompressorError, match="different layout: nested and after"):
        Memory.concatenate([memory, replace(memory, layout="after")])
    with pytest.raises(CompressorError, match="different base"):
        Memory.concatenate([memory, replace(memory, base="f" * 64)])
    with pytest.raises(CompressorError, match="needs keys and values"):
        replace(memory, keys=memory.keys[:, :, :3])
    with pytest.raises(CompressorError, match="needs keys and values"):
        replace(memory, segments=(Segment(7, 40),))
    with pytest.raises(CompressorError, match="another base"):
        memory_prefix(make_family_base("llama"), [memory])


def test_a_memory_as_a_cache_gives_the_decoders_logits(tiny_compressor: Compressor) -> None:
    base = tiny_compressor.base
    memory = tiny_compressor.compress("We measure the spectrum of dust.", tokens=4)
    ids = torch.tensor([[base.bos, 7, 9]])
    start = int(memory.positions()[1])
    with torch.no_grad():
        wanted = decode(base, memory_prefix(base, [memory]), ids)
        found = base.model(
            input_ids=ids,
            position_ids=torch.arange(start, start + 3)[None],
            attention_mask=torch.ones(1, memory.tokens + 3, dtype=torch.long),
            past_key_values=memory.to_cache(base),
        ).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_answers_from_more_segments_than_are_read_together_are_warned_of(
    make: Callable[..., Compressor], capsys: pytest.CaptureFixture[str]
) -> None:
    model = make()
    few, many = (model.compress_ids([PASSAGE], segment_tokens=most)[0] for most in (10, 8))
    assert (len(few.segments), len(many.segments)) == (4, 5)
    model.answer(few, "Why?", limit=2)
    assert "segments" not in capsys.readouterr().err
    model.answer(many, "Why?", limit=2)
    assert "from up to 4 segments" in capsys.readouterr().err


def test_a_memory_shows_itself_in_a_line(make: Callable[..., Compressor]) -> None:
    shown = repr(make().compress_ids([PASSAGE])[0])
    assert shown.startswith("Memory(40 tokens in 8, 1 segment(s), layout ")
    assert len(shown) < 120


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "say what to ask: --memory FILE, or --store STORE$"),
        ({"memory": "a", "store": "s", "question": "Why?"}, r"not both \(a, s\)"),
        ({"memory": "a", "new_tokens": 0}, "new_tokens = 0 is out of range"),
        ({"memory": "a", "top": 0}, "top = 0 is out of range"),
        ({"store": "s", "question": "Why?", "id": "a"}, "give --memory s --id a, or leave --id out"),
        ({"memory": "a", "texts": True}, "--texts is of records that are found in a store"),
        ({"memory": "a", "top": 3}, "--top 3 is of records that are found in a store"),
    ],
)
def test_what_cannot_be_asked_is_told_before_anything_is_loaded(given: dict[str, Any], message: str) -> None:
    with pytest.raises(CompressorError, match=message):
        AskOptions(**given)


def test_settings_that_no_base_could_mend_are_refused_before_it_is_loaded(
    tiny_compressor: Compressor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A large base takes long to load."""
    folder, store, kept = str(tmp_path / "checkpoint"), str(tmp_path / "store"), str(tmp_path / "a.memory")
    tiny_compressor.save_pretrained(folder)
    Store.open(store, tiny_compressor, making=Making(codec="bf16", no_measure=True), encoder="bm25").add({"a": "heat"})
    tiny_compressor.compress("heat", measure=False).save(kept)
    (tmp_path / "text.txt").write_text("What conducts heat?")

    def load_base(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the base is loaded")

    for place in ("commands.loading", "commands.ask", "model.checkpoint", "commands.packer"):
        monkeypatch.setattr(f"compressor.{place}.load_base", load_base)
    text, output = str(tmp_path / "text.txt"), str(tmp_path / "out")
    compress = ["compress", text, "-o", output, "--checkpoint", folder]
    most = f"it must be 1 to 8 with {folder}"
    for argv, message in (
        ([*compress, "--tokens", "9"], f"tokens = 9 is out of range: {most}"),
        ([*compress, "--tokens", "0"], f"tokens = 0 is out of range: {most}"),
        ([*compress, "--segment-tokens", "65"], "segment_tokens = 65 is out of range: it must be 1 to 64"),
        (["demo", "--text", text, "--tokens", "9", "--checkpoint", folder], f"tokens = 9 is out of range: {most}"),
        (["index", text, "--output", output, "--tokens", "9", "--checkpoint", folder], "tokens = 9 is out of range"),
        (["ask", "--store", store, "What?", "--tokens", "9"], "tokens = 9 is out of range: it must be 1 to 8, which"),
        (["ask", kept, "What?", "--temperature", "-1"], "got temperature = -1.0"),
        (["regenerate", kept, "--temperature", "-1"], "got temperature = -1.0"),
    ):
        assert main(argv) == 2
        assert message in capsys.readouterr().err
    assert main(["pack", "--codec", "keywords", "--temperature", "-1", "-c", text]) == 1
    assert "got temperature = -1.0" in capsys.readouterr().err


def test_the_plain_argument_beside_a_store_is_the_question() -> None:
    asked = AskOptions(memory="What is measured?", store="records")
    assert (asked.memory, asked.question) == (None, "What is measured?")
    with pytest.raises(CompressorError, match="say what to ask"):
        AskOptions(memory="one.memory", store="records", question="What is measured?")
