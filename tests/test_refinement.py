"""Gradient steps on memories: what they bring, and what they must leave alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compressor.api import Compressor
from compressor.data.prompts import question_ids
from compressor.data.records import load_texts
from compressor.errors import CompressorError
from compressor.model.base import Base
from compressor.model.config import CompressorConfig
from compressor.model.decoder import decode
from compressor.model.fidelity import fidelities, passage_scores
from compressor.model.memory import Memory, memory_prefix
from compressor.model.refinement import KEEP, random_start, refine

Make = Callable[..., Compressor]


@pytest.fixture
def passages(tiny_compressor: Compressor, texts: list[str]) -> list[list[int]]:
    encoded = tiny_compressor.base.tokenizer(texts[:3], add_special_tokens=False)["input_ids"]
    return [ids[:length] for ids, length in zip(encoded, (40, 17, 29), strict=True)]


@pytest.fixture(scope="module")
def mini(project: Path) -> Compressor:
    """The bundled compressor: random weights hold nothing."""
    return Compressor.from_pretrained(project / "models" / "arxiv-mini" / "compressor")


def nats(model: Compressor, memories: Sequence[Memory], passages: Sequence[Sequence[int]]) -> list[float]:
    scored = passage_scores(model.base, memory_prefix(model.base, memories), passages)
    return [-float(one[:, 0].sum()) for one in scored]


def test_every_passage_becomes_likelier_and_nothing_else_changes(
    tiny_compressor: Compressor, passages: list[list[int]]
) -> None:
    model = tiny_compressor
    frozen = {name: p.detach().clone() for name, p in model.named_parameters()}
    plain = model.compress_ids(passages, 4)
    refined = model.compress_ids(passages, 4, refine_steps=20)
    before, after = nats(model, plain, passages), nats(model, refined, passages)
    assert all(late < 0.98 * early for early, late in zip(before, after, strict=True)), (before, after)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, frozen[name]), name
        assert parameter.grad is None, name
    for one, other in zip(plain, refined, strict=True):
        assert replace(other, keys=one.keys, values=one.values, made=one.made) == one
        assert other.made == {**one.made, "refine_steps": 20}
        assert not other.keys.requires_grad
        assert other.keys.dtype == one.keys.dtype


def test_a_step_too_large_does_not_lose_what_is_held(mini: Compressor) -> None:
    """Two steps, both large, from memories that hold their short passages almost whole."""
    model = mini
    passages = model.base.tokenise(["We study graphs.", "We show that the sum of two such numbers is even."])
    plain = model.compress_ids(passages, 4)
    refined = model.compress_ids(passages, 4, refine_steps=2)
    before, after = nats(model, plain, passages), nats(model, refined, passages)
    assert all(late <= early + 1e-3 for early, late in zip(before, after, strict=True)), (before, after)


def test_what_is_answered_from_a_memory_is_kept(mini: Compressor) -> None:
    """Of questions that it is not held to; regeneration gains all the same."""
    model = mini
    passages = model.base.tokenise(load_texts("arxiv-test")["text"][3:5])
    passages = [ids[:48] for ids in passages]
    prompts = question_ids(model.base.tokenizer, ["Which method is used?", "What is shown?", "Where is it found?"])

    def distributions(memories: Sequence[Memory]) -> torch.Tensor:
        """Log-probabilities `[questions, memories, vocabulary]` of an answer's first token."""
        prefix, found = memory_prefix(model.base, memories), []
        for prompt in prompts:
            ids = torch.tensor([prompt] * len(memories))
            found.append(decode(model.base, prefix, ids)[:, -1].log_softmax(-1))
        return torch.stack(found).detach()

    plain = model.compress_ids(passages, 4)
    before, wanted = nats(model, plain, passages), distributions(plain)
    far = {}
    for keep in (0.0, KEEP):
        refined = refine(model.base, plain, passages, 6, keep=keep)
        after = nats(model, refined, passages)
        assert all(late < 0.8 * early for early, late in zip(before, after, strict=True)), (keep, before, after)
        found = distributions(refined)
        far[keep] = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    assert far[KEEP] < 0.6 * far[0.0], far


def test_asking_a_memory_that_was_refined_for_regeneration_alone_warns(
    tiny_compressor: Compressor, passages: list[list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    model, plain = tiny_compressor, tiny_compressor.compress_ids(passages, 4)
    for keep in (KEEP, 0.0):
        model.answer(refine(model.base, plain, passages, 1, keep=keep)[0], "What?", limit=2)
        assert ("answers worse than before" in capsys.readouterr().err) == (not keep)


def test_a_memory_does_not_depend_on_its_batch(tiny_compressor: Compressor, passages: list[list[int]]) -> None:
    together = tiny_compressor.compress_ids(passages, 4, batch_size=3, refine_steps=5)
    for ids, one in zip(passages, together, strict=True):
        alone = tiny_compressor.compress_ids([ids], 4, refine_steps=5)[0]
        torch.testing.assert_close(one.keys, alone.keys, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(one.values, alone.values, atol=2e-3, rtol=2e-3)


def test_no_steps_change_nothing(tiny_compressor: Compressor, passages: list[list[int]]) -> None:
    memories = tiny_compressor.compress_ids(passages, 4)
    for one, other in zip(memories, refine(tiny_compressor.base, memories, passages, 0), strict=True):
        assert one is other


def test_inference_mode_does_not_stand_in_the_way(tiny_compressor: Compressor, passages: list[list[int]]) -> None:
    expected = tiny_compressor.compress_ids(passages, 4, refine_steps=2)
    with torch.inference_mode():
        found = tiny_compressor.compress_ids(passages, 4, refine_steps=2)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.keys, other.keys)


def test_segments_are_refined_apart(tiny_compressor: Compressor, texts: list[str]) -> None:
    model = tiny_compressor
    ids = model.base.tokenizer(texts[0], add_special_tokens=False)["input_ids"][:50]
    whole = model.compress_ids([ids], 4, segment_tokens=20, refine_steps=4)[0]
    assert [segment.tokens for segment in whole.segments] == [4, 4, 4]
    start = 0
    for part in whole.split():
        cut = ids[start : start + part.passage_tokens]
        start += part.passage_tokens
        alone = model.compress_ids([cut], 4, refine_steps=4)[0]
        torch.testing.assert_close(part.keys, alone.keys, atol=2e-3, rtol=2e-3)


def test_refined_memories_are_saved_and_read_like_others(tiny_compressor: Compressor, tmp_path: Path) -> None:
    memory = tiny_compressor.compress("A passage of a few words.", 2, refine_steps=2)
    memory.save(tmp_path / "memory.kvm", "float32")
    loaded = Memory.load(tmp_path / "memory.kvm")
    assert torch.equal(loaded.keys, memory.keys)
    assert tiny_compressor.regenerate(loaded) == tiny_compressor.regenerate(memory)


def test_fewer_tokens_suffice_for_a_fidelity(mini: Compressor, texts: list[str]) -> None:
    model = mini
    text = " ".join(texts[0].split()[:14])
    ids = model.base.tokenizer(text, add_special_tokens=False)["input_ids"]
    plain = model.compress(text, target_fidelity=0.95)
    refined = model.compress(text, target_fidelity=0.95, refine_steps=6)
    assert refined.tokens < plain.tokens
    assert fidelities(model, [refined], [ids])[0] >= 0.95


@pytest.mark.parametrize("method", ["icae", "mean-pool", "anchor"])
def test_memories_of_every_method_can_be_refined(make_tiny_compressor: Make, method: str) -> None:
    layouts = {"icae": "nested", "mean-pool": "spread", "anchor": "spread"}
    model = make_tiny_compressor(method=method, layout=layouts[method])
    ids = [list(range(5, 30))]
    before, after = (model.compress_ids(ids, 4, refine_steps=steps) for steps in (0, 8))
    assert nats(model, after, ids)[0] < nats(model, before, ids)[0]


def test_refinement_in_every_family(family: str, make_family_base: Callable[..., Base]) -> None:
    """A base that the decoder cannot be differentiated through, or whose layers are scaled apart, would show here."""
    base = make_family_base(family)
    model = Compressor(base, CompressorConfig(memory_tokens=4, lora_rank=2, max_passage_tokens=32))
    ids = [list(range(10, 34))]
    before, after = (model.compress_ids(ids, 4, refine_steps=steps) for steps in (0, 4))
    assert nats(model, after, ids)[0] < nats(model, before, ids)[0]


def test_what_cannot_be_refined_is_refused(tiny_compressor: Compressor) -> None:
    memory = tiny_compressor.compress("A passage of a few words.", 2)
    ids = [[5] * memory.passage_tokens]
    with pytest.raises(CompressorError, match="refine_steps = -1 is out of range"):
        refine(tiny_compressor.base, [memory], ids, -1)
    with pytest.raises(CompressorError, match=f"of {memory.passage_tokens} tokens with one of 1"):
        refine(tiny_compressor.base, [memory], [[5]], 1)


def test_refinement_from_random_vectors(tiny_compressor: Compressor, texts: list[str]) -> None:
    ids = tiny_compressor.base.tokenizer(texts[:2], add_special_tokens=False)["input_ids"]
    ids = [one[:20] for one in ids]
    start = [random_start(memory) for memory in tiny_compressor.compress_ids(ids, 4)]
    assert not torch.equal(start[0].keys, tiny_compressor.compress_ids(ids[:1], 4)[0].keys)
    assert random_start(start[0]).segments == start[0].segments
    spreads = [one.keys.flatten(1).std(1) for one in (start[0], tiny_compressor.compress_ids(ids[:1], 4)[0])]
    torch.testing.assert_close(spreads[0], spreads[1], rtol=0.4, atol=0)
    before, after = (
        nats(tiny_compressor, start, ids),
        nats(tiny_compressor, refine(tiny_compressor.base, start, ids, 20), ids),
    )
    assert all(less < more for less, more in zip(after, before, strict=True))
