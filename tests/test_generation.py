"""Decoding from a prefix: scoring, greedy and sampled generation, batches, streaming, ends and limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from compressor.api import Compressor
from compressor.data.batches import IGNORED
from compressor.errors import CompressorError
from compressor.model.base import Base
from compressor.model.config import CompressorConfig
from compressor.model.decoder import (
    BLOCK,
    Prefix,
    decode,
    empty_prefix,
    label_nats,
    logits_at,
    roomy_cache,
    score,
    shared,
)
from compressor.model.fidelity import rewrite
from compressor.model.generation import Sampling, generate, regenerate, regenerate_ids, regeneration_limit, stream
from compressor.model.memory import Memory, memory_prefix

PASSAGES = [[(7 * i + j) % 400 + 5 for i in range(n)] for j, n in enumerate((30, 9, 17))]
PROMPTS = [[1], [5, 6, 7, 8], [1, 9]]
LIMITS = [12, 5, 20]
HOT = Sampling(temperature=1.0, seed=3)


@pytest.fixture
def decoder(tiny_compressor: Compressor) -> tuple[Base, list[Memory]]:
    """The tiny base, on which no adapter runs by itself, and three memories of unequal size."""
    memories = tiny_compressor.compress_ids(PASSAGES)
    memories[1] = memories[1].truncate(3)
    return tiny_compressor.base, memories


def passage_prefix(base: Base, passage: list[int]) -> Prefix:
    """The passage itself as a context: its own keys and values."""
    cache = DynamicCache()
    with torch.no_grad():
        base.model(torch.tensor([passage]), past_key_values=cache, use_cache=True)
    return Prefix(
        [layer.keys for layer in cache.layers],
        [layer.values for layer in cache.layers],
        torch.ones(1, len(passage), dtype=torch.bool),
        torch.tensor([len(passage)]),
    )


# -- against the plain model ---------------------------------------------------------------------------------------


def test_decoding_after_a_passage_equals_the_plain_model(tiny_base: Base) -> None:
    following = [4, 8, 15, 16, 23]
    with torch.no_grad():
        ours = decode(tiny_base, passage_prefix(tiny_base, PASSAGES[0]), torch.tensor([following]))
        plain = tiny_base.model(torch.tensor([[*PASSAGES[0], *following]])).logits[:, len(PASSAGES[0]) :]
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)


def test_greedy_generation_equals_transformers_own(tiny_base: Base) -> None:
    for prompt in PROMPTS:
        inputs = torch.tensor([[*PASSAGES[0], *prompt]])
        theirs = tiny_base.model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=15, do_sample=False, eos_token_id=2
        )
        ours = generate(tiny_base, passage_prefix(tiny_base, PASSAGES[0]), [prompt], [15])[0]
        expected = theirs[0, inputs.shape[1] :].tolist()
        assert ours.ids == [token for token in expected if token != 2]


def test_generation_without_context_equals_the_plain_model(tiny_base: Base) -> None:
    ours = generate(tiny_base, empty_prefix(tiny_base, 2), [[1, 7], [1, 9, 30]], [4, 4])
    for prompt, one in zip(([1, 7], [1, 9, 30]), ours, strict=True):
        ids = list(prompt)
        for token in one.ids:
            with torch.no_grad():
                assert int(tiny_base.model(torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)
        assert len(one.ids) == 4


# -- contexts that rows share, compiled steps ------------------------------------------------------------------------


OWNERS = [0, 2, 0, 0, 2, 1, 0]
ASKED = [[1], [5, 6, 7, 8], [1, 9], [4], [1, 3, 3], [2], [6, 6]]


def test_rows_that_share_a_context_read_it_without_a_copy(decoder: tuple[Base, list[Memory]]) -> None:
    base, memories = decoder
    apart = memory_prefix(base, [memories[owner] for owner in OWNERS])
    together = shared([memories[owner] for owner in OWNERS], partial(memory_prefix, base))
    assert len(together.keys[0]) == 3
    assert len(together.mask) == len(OWNERS)
    cache = roomy_cache(base, together, 8)[0]
    assert all(
        layer.context.keys.data_ptr() == keys.data_ptr()
        for layer, keys in zip(cache.layers, together.keys, strict=True)
    )
    assert cache.layers[0].keys.shape[2] == BLOCK  # room for what is written alone
    # Rows end at other times, so that some are dropped; sampled, so that many of them go on.
    limits = [40, 3, 9, 40, 20, 2, 33]
    for sampling in (Sampling(), HOT):
        wanted, found = (generate(base, prefix, ASKED, limits, sampling) for prefix in (apart, together))
        assert [one.ids for one in found] == [one.ids for one in wanted]
        for one, other in zip(found, wanted, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    targets = [[4, 8, 15]] * len(ASKED)
    for one, other in zip(score(base, together, ASKED, targets), score(base, apart, ASKED, targets), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    some = torch.tensor([1, 4, 5])
    torch.testing.assert_close(together.select(some).whole().keys[0], apart.select(some).keys[0])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_other_implementations_of_attention_read_copies(attention: str, decoder: tuple[Base, list[Memory]]) -> None:
    base, memories = decoder
    chosen = [memories[owner] for owner in OWNERS]
    wanted = generate(base, memory_prefix(base, chosen), ASKED, [5] * len(ASKED))
    base.model.set_attn_implementation(attention)
    found = generate(base, shared(chosen, partial(memory_prefix, base)), ASKED, [5] * len(ASKED))
    assert [one.ids for one in found] == [one.ids for one in wanted]


@pytest.mark.parametrize("limit", [BLOCK - 9, BLOCK - 8, BLOCK - 7, 2 * BLOCK])
def test_caches_grow_past_their_blocks(limit: int, decoder: tuple[Base, list[Memory]]) -> None:
    base, memories = decoder
    prefix = memory_prefix(base, memories[:1])  # of 8 slots
    steps = list(stream(base, prefix, [[1]], [limit], HOT, ends=False))
    ids = [step[0][0] for step in steps if step[0]]
    assert len(ids) == limit
    scored = score(base, prefix, [[1]], [ids])[0]
    assert scored[:, 0].tolist() == pytest.approx([step[0][1] for step in steps if step[0]], abs=1e-3)


def test_what_is_known_is_not_generated_again(
    decoder: tuple[Base, list[Memory]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, memories = decoder
    prefix = memory_prefix(base, memories)
    limits = [regeneration_limit(len(ids)) for ids in PASSAGES]
    wanted = generate(base, prefix, [[base.bos]] * 3, limits)
    # The first passage is what the base writes, the second up to its fifth token.
    passages = [wanted[0].ids[:30], [*wanted[1].ids[:5], 3, 3, 3, 3], PASSAGES[2]]
    limits = [regeneration_limit(len(ids)) for ids in passages]
    wanted = generate(base, prefix, [[base.bos]] * 3, limits)
    scores = score(base, prefix, [[base.bos]] * 3, [[*ids, base.eos] for ids in passages])
    assert [int(one[:, 1].argmin()) for one in scores[:2]] == [30, 5]
    assert [one.ids for one in rewrite(base, prefix, passages, scores)] == [one.ids for one in wanted]
    for one in scores:
        one[:, 1] = 1
    monkeypatch.setattr("compressor.model.generation.generate", None)
    assert [one.ids for one in rewrite(base, prefix, passages, scores)] == passages


def test_questions_about_one_memory_are_answered_together(tiny_compressor: Compressor) -> None:
    memory = tiny_compressor.compress("The spectrum of a graph is computed.")
    questions = ["What?", "Why is that so?", "Whose spectrum?"]
    wanted = [tiny_compressor.answer(memory, question, limit=6) for question in questions]
    assert tiny_compressor.answer(memory, questions, limit=6) == wanted
    assert tiny_compressor.answer(memory, questions, limit=6, batch_size=2) == wanted


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_static_caches_give_the_same_tokens(kind: str, make_family_base: Callable[..., Base]) -> None:
    base = make_family_base(kind)
    model = Compressor(base, CompressorConfig(memory_tokens=4, lora_rank=2, max_passage_tokens=64))
    memories = [one.truncate(k) for one, k in zip(model.compress_ids(PASSAGES), (4, 2, 1), strict=True)]
    for sampling in (Sampling(), HOT):
        # Rows end at other times, one of them by a token that ends what is written.
        free = generate(base, memory_prefix(base, memories), PROMPTS, LIMITS, sampling)
        base.model.generation_config.eos_token_id = [base.eos, free[0].ids[3]]
        found = []
        for base.decoding in ("auto", "static"):
            apart = generate(base, memory_prefix(base, memories), PROMPTS, LIMITS, sampling)
            together = generate(base, shared([memories[0]] * 3, partial(memory_prefix, base)), PROMPTS, LIMITS)
            nothing = generate(base, empty_prefix(base, 3), PROMPTS, LIMITS)
            found.append([*apart, *together, *nothing])
        base.decoding = "auto"
        assert found[0][0].finished
        assert [(one.ids, one.finished) for one in found[1]] == [(one.ids, one.finished) for one in found[0]]
        for one, other in zip(found[1], found[0], strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)


def test_decoding_is_one_setting_of_a_base(
    tiny_compressor: Compressor, make_tiny_base: Callable[[], Base], tmp_path: Path
) -> None:
    checkpoint, base = tmp_path / "checkpoint", make_tiny_base()
    tiny_compressor.save_pretrained(checkpoint)
    assert Compressor.from_pretrained(checkpoint, decoding="static").base.decoding == "static"
    base.decoding = "static"
    assert Compressor.from_pretrained(checkpoint, base=base).base.decoding == "static"  # a base keeps its own
    with pytest.raises(CompressorError, match=r"decoding = 'fast' .*auto, static, compiled"):
        Compressor.from_pretrained(checkpoint, decoding="fast")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's own import of its compiler
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # its compiler does, to trace our backward pass
def test_compiled_steps_equal_plain_ones(decoder: tuple[Base, list[Memory]]) -> None:
    base, memories = decoder
    found = []
    for base.decoding in ("auto", "compiled"):
        found.append(generate(base, memory_prefix(base, memories), PROMPTS, LIMITS, HOT))
    plain, compiled = found
    assert base.decoding == "compiled"  # it was not given up
    assert [one.ids for one in compiled] == [one.ids for one in plain]
    for one, other in zip(compiled, plain, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)


def test_what_cannot_be_compiled_is_written_without(
    decoder: tuple[Base, list[Memory]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, memories = decoder
    wanted = generate(base, memory_prefix(base, memories), PROMPTS, LIMITS)

    def broken(**inputs: Any) -> None:
        """Fails where a part of the layers has read the token, as after a break of the graph."""
        base.model.model.layers[0](
            torch.zeros(3, 1, 32),
            position_embeddings=(torch.ones(3, 1, 8), torch.zeros(3, 1, 8)),
            past_key_values=inputs["past_key_values"],
        )
        raise ZeroDivisionError("no kernel")

    monkeypatch.setattr(base, "compiled_model", lambda: broken)
    base.decoding = "compiled"
    found = generate(base, memory_prefix(base, memories), PROMPTS, LIMITS)
    assert [one.ids for one in found] == [one.ids for one in wanted]
    assert base.decoding == "static"
    assert "cannot compile a step" in (said := capsys.readouterr().err)
    assert "ZeroDivisionError: no kernel" in said


# -- batches, streams ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [Sampling(), HOT, Sampling(0.7, top_k=20, top_p=0.9, seed=8)])
def test_a_batch_gives_each_row_what_it_gets_alone(decoder: tuple[Base, list[Memory]], sampling: Sampling) -> None:
    base, memories = decoder
    together = generate(base, memory_prefix(base, memories), PROMPTS, LIMITS, sampling)
    assert [len(one.ids) for one in together if not one.finished] == [
        limit for limit, one in zip(LIMITS, together, strict=True) if not one.finished
    ]
    for memory, prompt, limit, expected in zip(memories, PROMPTS, LIMITS, together, strict=True):
        alone = generate(base, memory_prefix(base, [memory]), [prompt], [limit], sampling)[0]
        assert (alone.ids, alone.finished) == (expected.ids, expected.finished)
        assert alone.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def test_streaming_gives_what_generate_collects(decoder: tuple[Base, list[Memory]]) -> None:
    base, memories = decoder
    whole = generate(base, memory_prefix(base, memories), PROMPTS, LIMITS, HOT)
    steps = list(stream(base, memory_prefix(base, memories), PROMPTS, LIMITS, HOT))
    assert len(steps) == max(len(one.logprobs) for one in whole)
    for row, one in enumerate(whole):
        column = [step[row] for step in steps]
        rows = [pair for pair in column if pair is not None]
        assert column == rows + [None] * (len(column) - len(rows))  # nothing after a row's end
        assert [token for token, _ in rows] == one.ids + [base.eos] * one.finished
        assert [logprob for _, logprob in rows] == one.logprobs


def test_the_first_token_comes_before_the_rest_is_computed(decoder: tuple[Base, list[Memory]]) -> None:
    base, memories = decoder
    calls = []
    handle = base.model.register_forward_hook(lambda *_: calls.append(1))
    next(stream(base, memory_prefix(base, memories), PROMPTS, LIMITS))
    handle.remove()
    assert len(calls) == 1


# -- ends and limits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["tokenizer", "generation settings"])
def test_generation_stops_at_eos_and_leaves_it_out(decoder: tuple[Base, list[Memory]], where: str) -> None:
    """Chat models end a turn by tokens that only their generation settings list beside EOS."""
    base, memories = decoder
    free = generate(base, memory_prefix(base, memories), PROMPTS, [20] * 3, HOT)
    token = free[0].ids[4]
    if where == "tokenizer":
        base.tokenizer.eos_token = base.tokenizer.convert_ids_to_tokens(token)
    else:
        base.model.generation_config.eos_token_id = [base.eos, token]
    assert token in base.ends
    stopped = generate(base, memory_prefix(base, memories), PROMPTS, [20] * 3, HOT)
    for one, whole in zip(stopped, free, strict=True):
        ids = [*whole.ids, *([2] if whole.finished else [])]
        end = ids.index(token) if token in ids else len(ids)
        assert one.ids[: len(ids)] == ids[:end]
        assert one.finished == (token in ids)
        assert len(one.logprobs) == end + one.finished
    assert stopped[0].finished


def test_limits_are_kept_row_by_row(decoder: tuple[Base, list[Memory]]) -> None:
    base, memories = decoder
    results = generate(base, memory_prefix(base, memories), PROMPTS, [0, 1, 7])
    assert [len(one.ids) for one in results] == [0, 1, 7]
    assert generate(base, memory_prefix(base, memories), PROMPTS, [0, 0, 0])[1].ids == []


def test_an_empty_prompt_is_refused(decoder: tuple[Base, list[Memory]]) -> None:
    base, memories = decoder
    with pytest.raises(CompressorError, match="at least one prompt token"):
        generate(base, memory_prefix(base, memories[:2]), [[1], []], [5, 5])


# -- scores --------------------------------------------------------------------------------------------------------


def test_log_probabilities_are_the_models_own(decoder: tuple[Base, list[Memory]]) -> None:
    base, memories = decoder
    for sampling in (Sampling(), Sampling(0.5, top_k=5, seed=1)):
        results = generate(base, memory_prefix(base, memories), PROMPTS, LIMITS, sampling)
        scores = score(base, memory_prefix(base, memories), PROMPTS, [one.ids for one in results])
        for one, scored in zip(results, scores, strict=True):
            assert scored[:, 0].tolist() == pytest.approx(one.logprobs[: len(one.ids)], abs=1e-3)
            if sampling.temperature == 0:
                assert bool((scored[:, 1] == 1).all())


def test_scoring_a_batch_equals_scoring_alone_and_the_full_forward(decoder: tuple[Base, list[Memory]]) -> None:
    base, memories = decoder
    targets = [[3, 4, 5], [9], [7, 2]]
    together = score(base, memory_prefix(base, memories), PROMPTS, targets)
    for memory, prompt, target, expected in zip(memories, PROMPTS, targets, together, strict=True):
        assert expected.shape == (len(target), 2)
        alone = score(base, memory_prefix(base, [memory]), [prompt], [target])[0]
        torch.testing.assert_close(alone, expected, atol=1e-4, rtol=1e-4)
        with torch.no_grad():
            logits = decode(base, memory_prefix(base, [memory]), torch.tensor([[*prompt, *target]]))[0]
        rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        torch.testing.assert_close(
            rows.gather(1, torch.tensor(target)[:, None])[:, 0], expected[:, 0], atol=1e-4, rtol=1e-4
        )


# -- sampling ------------------------------------------------------------------------------------------------------


def test_the_narrowest_sampling_is_greedy(decoder: tuple[Base, list[Memory]]) -> None:
    base, memories = decoder
    greedy = generate(base, memory_prefix(base, memories), PROMPTS, LIMITS)
    for sampling in (Sampling(2.0, top_k=1), Sampling(2.0, top_p=1e-9), Sampling(1e-4)):
        found = generate(base, memory_prefix(base, memories), PROMPTS, LIMITS, sampling)
        assert [one.ids for one in found] == [one.ids for one in greedy]


def test_top_k_and_top_p_bound_what_is_drawn_and_the_seed_decides(decoder: tuple[Base, list[Memory]]) -> None:
    base, memories = decoder
    prefix, ids = memory_prefix(base, memories[:1]), torch.tensor([[1]])
    with torch.no_grad():
        probabilities = decode(base, prefix, ids)[0, -1].softmax(-1)
    ordered = probabilities.argsort(descending=True).tolist()

    def draw(**options: Any) -> set[int]:
        return {
            (generate(base, prefix, [[1]], [1], Sampling(1.0, seed=seed, **options))[0].ids or [2])[0]
            for seed in range(80)
        }

    drawn = draw(top_k=4)
    assert drawn <= set(ordered[:4])
    assert len(drawn) > 1
    nucleus, total = set(), 0.0
    for token in ordered:
        if total >= 0.3:
            break
        nucleus.add(token)
        total += float(probabilities[token])
    drawn = draw(top_p=0.3)
    assert drawn <= nucleus
    assert len(drawn) > 1
    assert len(draw()) > 20
    runs = [generate(base, prefix, [[1]], [12], Sampling(1.0, seed=seed))[0].ids for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": math.inf},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": 0},
        {"seed": 10**20},
    ],
)
def test_impossible_sampling_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(CompressorError, match=r"sampling needs|(top_k|seed) = \d+ is out of range"):
        Sampling(**options)


# -- regeneration --------------------------------------------------------------------------------------------------


def test_segments_are_written_apart_and_joined(make_tiny_compressor: Callable[..., Compressor]) -> None:
    model = make_tiny_compressor(max_passage_tokens=12)
    memories = model.compress_ids(PASSAGES)
    assert [len(memory.segments) for memory in memories] == [3, 1, 2]
    written = regenerate_ids(model.base, memories)
    for size in (1, 2):
        assert regenerate_ids(model.base, memories, batch_size=size) == written
    for memory, ids in zip(memories, written, strict=True):
        parts = [
            generate(
                model.base,
                memory_prefix(model.base, [part]),
                [[model.base.bos]],
                [regeneration_limit(part.passage_tokens)],
            )[0].ids
            for part in memory.split()
        ]
        assert ids == [token for part in parts for token in part]
    texts = regenerate(model.base, memories)
    assert texts == [model.base.tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
    # The public call switches the adapters off by itself, and takes one memory or many.
    assert model.regenerate(memories) == texts
    assert model.regenerate(memories[0]) == texts[0]


def test_the_limit_leaves_room_for_a_late_eos() -> None:
    assert [regeneration_limit(n) for n in (1, 80, 500)] == [9, 88, 550]


def test_the_loss_of_labels_is_that_of_all_logits(decoder: tuple[Base, list[Memory]], monkeypatch: Any) -> None:
    """Values and gradients of `label_nats`, in chunks and with a head that is not plain, against whole logits."""
    base, memories = decoder
    ids = torch.arange(3 * 11).view(3, 11) % 300 + 5
    labels = (ids * 3) % 300
    labels[:, :2], labels[1, 6:] = IGNORED, IGNORED

    def run(loss: Callable[[Prefix], torch.Tensor]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        prefix = memory_prefix(base, memories)
        values = [value.clone().requires_grad_() for value in prefix.values]
        nats = loss(Prefix(prefix.keys, values, prefix.mask, prefix.start))
        return nats.detach(), torch.autograd.grad((nats * torch.tensor([1.0, 2.0, 0.5])).sum(), values)

    def whole(prefix: Prefix) -> torch.Tensor:
        logits = decode(base, prefix, ids)
        losses = nn.functional.cross_entropy(logits.mT, labels, reduction="none", ignore_index=IGNORED)
        return losses.sum(1)

    wanted = run(whole)
    monkeypatch.setattr("compressor.model.decoder.HEAD_ROWS", 4)
    for base.plain_head in (True, False):
        torch.testing.assert_close(run(lambda prefix: label_nats(base, prefix, ids, labels)), wanted)
    with torch.no_grad():
        prefix = memory_prefix(base, memories)
        for base.plain_head in (True, False):
            torch.testing.assert_close(label_nats(base, prefix, ids, labels), wanted[0])
            found = logits_at(base, prefix, ids, labels != IGNORED)
            torch.testing.assert_close(found, decode(base, prefix, ids)[labels != IGNORED])
