"""Every method of the registry under the same tests, then what is particular to some."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from compressor.api import Compressor
from compressor.data.batches import pad, regeneration_pair, stack_pairs
from compressor.errors import CompressorError
from compressor.methods import table as registry
from compressor.methods.interface import MemoryMethod, Method, MethodSettings, Piece, TokenMethod
from compressor.methods.keywords import Keywords, with_new_words
from compressor.methods.recite import recited_prefix
from compressor.methods.summary import Summary, textrank
from compressor.methods.table import (
    READINGS,
    TRAINED,
    TUNED,
    UNTRAINED,
    memory_method,
    untrained_method,
)
from compressor.model import generation
from compressor.model.base import Base
from compressor.model.bases import FLAGSHIP_BASE, NAMED
from compressor.model.config import BaseConfig
from compressor.model.decoder import label_nats, score, token_prefix
from compressor.model.generation import after, generate
from compressor.model.layouts import memory_positions
from compressor.model.load import load_base
from compressor.model.memory import Memory, memory_prefix
from compressor.model.table import METHODS, layouts_of

Make = Callable[..., Compressor]
MAKING = [name for name in TRAINED if name not in TUNED]
"""Trained methods that make memories."""
PARTS = [("kv", "overlay parts"), ("kv", "spread parts")]
LAYOUTS = [(method, layout) for method in MAKING for layout in layouts_of(method)] + PARTS
"""Every trained method with every layout it can work with, and what memory tokens see where that is not the default."""
LIMIT = 64
"""Passage tokens of the tiny compressors."""


class FakeLLMLingua:
    """The package's interface: of a text's words the longest are kept, at a share of them."""

    def __init__(self, **options: Any):
        self.options = options

    def compress_prompt(self, context: list[str], rate: float) -> dict[str, str]:
        words = context[0].split()
        ranked = sorted(range(len(words)), key=lambda i: -len(words[i]))[: math.floor(len(words) * rate)]
        return {"compressed_prompt": " ".join(words[i] for i in sorted(ranked))}


@pytest.fixture
def make_method(
    make_tiny_compressor: Make, tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Method]:
    """Builds a method of the registry over the tiny base."""
    package = types.SimpleNamespace(PromptCompressor=FakeLLMLingua)
    monkeypatch.setitem(sys.modules, "llmlingua", package)  # type: ignore[arg-type]

    def make(name: str) -> Method:
        if name in TRAINED:
            return MemoryMethod(make_tiny_compressor(method=name, layout=layouts_of(name)[-1]))
        if name == "recite-tuned":
            make_tiny_compressor(method="full-tuned").save_pretrained(tmp_path / "cartridge")
            named = replace(NAMED[FLAGSHIP_BASE], cartridge=str(tmp_path / "cartridge"))
            monkeypatch.setitem(NAMED, FLAGSHIP_BASE, named)
        if name in READINGS:
            return memory_method(name)(make_tiny_compressor())
        base = load_base(BaseConfig(path=str(tiny_base_folder)))
        return untrained_method(name, base, MethodSettings())

    return make


def settings(name: str, layout: str) -> dict[str, str]:
    """Of a compressor of an entry of `LAYOUTS`."""
    layout, _, attention = layout.partition(" ")
    return {"method": name, "layout": layout} | ({"memory_attention": attention} if attention else {})


@pytest.fixture
def passages(tiny_base: Base, texts: list[str]) -> list[list[int]]:
    """Token ids of real passages: 3 tokens, fewer than there are memory tokens; some; over the limit of a segment."""
    ids = tiny_base.tokenizer(texts[:4], add_special_tokens=False)["input_ids"]
    return [ids[0][:3], ids[1][:40], ids[2][:17], ids[3][:150]]


def nats(method: Method, contexts: list[list[Piece]]) -> list[float]:
    """Negative log-likelihood of a fixed text after each context: what the decoder makes of the memory."""
    prefix = method.prefix(contexts)
    prompts = after(method.base, prefix, [[7, 8]] * len(contexts))
    scored = score(method.base, prefix, prompts, [[9, 10, 11, 12]] * len(contexts))
    return [-float(one[:, 0].sum()) for one in scored]


@pytest.mark.parametrize("name", [*MAKING, *READINGS, *UNTRAINED])
def test_passages_of_any_length_are_held_decoded_and_independent_of_their_batch(
    make_method: Callable[[str], Method], passages: list[list[int]], name: str
) -> None:
    method = make_method(name)
    asked = method.sizes([8, 2, 1])
    assert asked == ([8] if name in ("reference-500x", "full", "none") else [8, 2, 1])
    sizes = method.compress(passages, asked)
    assert [len(of_size) for of_size in sizes] == [len(passages)] * len(asked)
    for count, of_size in zip(asked, sizes, strict=True):
        for ids, pieces in zip(passages, of_size, strict=True):
            assert [token for piece in pieces for token in piece.ids] == ids  # in order, nothing lost
            for piece in pieces:
                assert piece.nbytes >= 0
                if name in TRAINED:
                    assert piece.tokens == count
                elif name in READINGS:
                    assert piece.tokens == len(piece.held)
                else:
                    assert piece.tokens == {"full": len(ids), "none": 0}.get(name, piece.tokens)
                    assert piece.tokens <= count or name == "full"
                    assert piece.tokens >= 1 or name == "none"
        assert [len(pieces) for pieces in of_size] == ([1, 1, 1, 3] if name in (*TRAINED, *READINGS) else [1] * 4)

        prefix = method.prefix(of_size)
        written = generate(method.base, prefix, after(method.base, prefix, [[method.base.bos]] * 4), [5] * 4)
        assert all(1 <= len(one.logprobs) <= 5 for one in written)
        assert all(math.isfinite(value) for one in written for value in one.logprobs)

        # A memory does not depend on the other passages, which are longer or shorter and pad it differently.
        together = nats(method, of_size)
        alone = [method.compress([ids], [count])[0] for ids in passages]
        assert [nats(method, one)[0] for one in alone] == pytest.approx(together, abs=2e-3)
        for one, pieces in zip(alone, of_size, strict=True):
            for mine, theirs in zip(one[0], pieces, strict=True):
                assert (mine.ids, mine.tokens, mine.nbytes) == (theirs.ids, theirs.tokens, theirs.nbytes)
                if isinstance(mine.held, Memory):
                    for kind in ("keys", "values"):
                        torch.testing.assert_close(
                            getattr(mine.held, kind), getattr(theirs.held, kind), atol=2e-4, rtol=1e-3
                        )
                else:
                    assert mine.held == theirs.held


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_padding_never_reaches_a_memory(make_tiny_compressor: Make, name: str, layout: str) -> None:
    """Neither its ids nor its width matter, also for passages of fewer tokens than the memory has."""
    model = make_tiny_compressor(**settings(name, layout))
    passages = [[(7 * i + j) % 400 + 5 for i in range(n)] for j, n in enumerate((30, 1, 17))]
    ids, lengths = pad(passages, fill=0)
    other, _ = pad(passages, fill=77)
    with torch.no_grad():
        keys, values = model.encode(ids, lengths, 8)
        for again in model.encode(other, lengths, 8), model.encode(torch.cat([ids, ids[:, :5]], dim=1), lengths, 8):
            torch.testing.assert_close((keys, values), again, atol=1e-4, rtol=1e-3)
        for row, passage in enumerate(passages):
            alone = model.encode(torch.tensor([passage]), lengths[row : row + 1], 8)
            torch.testing.assert_close(
                (keys[:, row], values[:, row]), (alone[0][:, 0], alone[1][:, 0]), atol=1e-4, rtol=1e-3
            )
    assert not torch.allclose(keys[:, 0], keys[:, 2], atol=1e-2)  # it does depend on the passage


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_rows_of_a_batch_have_their_own_numbers_of_tokens(make_tiny_compressor: Make, name: str, layout: str) -> None:
    """What decodes from each is what it gives alone, whatever the others have."""
    model = make_tiny_compressor(**settings(name, layout))
    passages = [[(7 * i + j) % 400 + 5 for i in range(n)] for j, n in enumerate((30, 30, 3, 17))]
    tokens = torch.tensor([2, 8, 4, 1])
    ids, lengths = pad(passages)
    pairs = stack_pairs([regeneration_pair(model.base.bos, model.base.eos, one) for one in passages])
    with torch.no_grad():
        prefix = model.prefix(*model.encode(ids, lengths, tokens), lengths, tokens)
        together = label_nats(model.base, prefix, pairs["inputs"], pairs["labels"])
        for row, (passage, count) in enumerate(zip(passages, tokens.tolist(), strict=True)):
            memory = model.compress_ids([passage], count)
            shown = [pairs[kind][row : row + 1] for kind in ("inputs", "labels")]
            alone = label_nats(model.base, memory_prefix(model.base, memory), *shown)
            torch.testing.assert_close(together[row : row + 1], alone, atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "layout", "attention"),
    [(*one, "bidirectional") for one in LAYOUTS] + [(name, layouts_of(name)[-1], "causal") for name in METHODS],
)
def test_gradients_reach_all_that_trains_and_the_base_stays(
    make_tiny_compressor: Make, tiny_base_folder: Path, name: str, layout: str, attention: str
) -> None:
    model = make_tiny_compressor(**settings(name, layout), passage_attention=attention).train()
    base = model.base
    passages = [list(range(20, 50)), list(range(90, 101)), [5, 6]]
    ids, lengths = pad(passages)
    pairs = stack_pairs([regeneration_pair(base.bos, base.eos, one) for one in passages])
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == set(model.trainable_state())
    assert all(n.startswith("encoder.") or "lora_" in n for n in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.1)
    for step in range(2):
        prefix = model.prefix(*model.encode(ids, lengths, 8), lengths)
        label_nats(model.base, prefix, pairs["inputs"], pairs["labels"]).sum().backward()
        if step == 0:
            for n, parameter in trained.items():
                assert parameter.grad is not None, n
                assert bool(parameter.grad.any()), n
            assert all(p.grad is None for n, p in model.named_parameters() if n not in trained)
        optimizer.step()
        optimizer.zero_grad()
    disk = load_base(BaseConfig(path=str(tiny_base_folder))).model.state_dict()
    ours = {n.replace(".base_layer", ""): value for n, value in base.model.state_dict().items()}
    assert all(torch.equal(ours[n], value) for n, value in disk.items())


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_truncating_equals_compressing_where_the_method_says_so(
    make_tiny_compressor: Make, passages: list[list[int]], name: str, layout: str
) -> None:
    model = make_tiny_compressor(**settings(name, layout))
    largest = model.compress_ids(passages, 8)
    for size in (4, 2, 1):
        smaller = model.compress_ids(passages, size)
        if model.encoder.truncatable:
            for cut, direct in zip([memory.truncate(size) for memory in largest], smaller, strict=True):
                assert cut.segments == direct.segments
                torch.testing.assert_close((cut.keys, cut.values), (direct.keys, direct.values), atol=1e-4, rtol=1e-3)
        else:
            # The claim that it cannot be truncated is true: the first slots are others.
            assert not torch.allclose(largest[1].keys[:, :, :size], smaller[1].keys, atol=1e-3)


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_training_prefix_equals_the_memory_that_is_kept(make_tiny_compressor: Make, name: str, layout: str) -> None:
    """What the decoder is trained after is what it reads later."""
    model = make_tiny_compressor(**settings(name, layout)).eval()
    passages = [list(range(20, 50)), list(range(90, 101))]
    ids, lengths = pad(passages)
    with torch.no_grad():
        trained = model.prefix(*model.encode(ids, lengths, 8), lengths)
        kept = memory_prefix(model.base, model.compress_ids(passages, 8))
        assert torch.equal(trained.start, kept.start)
        for ours, theirs in zip([*trained.keys, *trained.values], [*kept.keys, *kept.values], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", MAKING)
def test_a_saved_checkpoint_is_loaded_exactly(
    make_tiny_compressor: Make, tmp_path: Path, passages: list[list[int]], name: str
) -> None:
    model = make_tiny_compressor(method=name, layout=layouts_of(name)[-1])
    model.save_pretrained(tmp_path / "saved")
    loaded = Compressor.from_pretrained(tmp_path / "saved")
    assert loaded.config == model.config
    ours, theirs = model.trainable_state(), loaded.trainable_state()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    for one, other in zip(model.compress_ids(passages, 8), loaded.compress_ids(passages, 8), strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)


# -- one method or another -----------------------------------------------------------------------------------------


def test_segments_that_stand_in_for_a_passage_follow_each_other(make_tiny_compressor: Make) -> None:
    """Layout `front`: slots take the places after those before them, and the decoder starts after all of them."""
    memory = make_tiny_compressor(method="icae", layout="nested").compress_ids([list(range(5, 155))], 4)[0]
    assert len(memory.segments) == 3
    placed, start = memory.positions()
    assert placed.tolist() == list(range(12))
    assert int(start) == 12


def test_sentence_embedding_by_a_text_encoder(
    make_tiny_compressor: Make, passages: list[list[int]], text_encoder: str, tmp_path: Path
) -> None:
    """DistilBERT's mean last hidden state, over windows where it is too long; padding and batch do not matter."""
    from transformers import AutoModel, AutoTokenizer

    model = make_tiny_compressor(method="sentence-embedding", layout="front", text_encoder=text_encoder)
    ids, lengths = pad([*passages[:3], passages[3][:60]])
    embedded = model.encoder.embed(model, ids, lengths)
    assert embedded.shape == (4, 24)
    encoder, tokenizer = AutoModel.from_pretrained(text_encoder).eval(), AutoTokenizer.from_pretrained(text_encoder)
    windowed = False
    for row, length in enumerate(lengths.tolist()):
        text = model.base.tokenizer.decode(ids[row, :length])
        inner = tokenizer(text, add_special_tokens=False)["input_ids"]
        windowed |= len(inner) > 30
        states = []
        for start in range(0, len(inner), 30):
            with torch.no_grad():
                states += list(encoder(torch.tensor([[2, *inner[start : start + 30], 3]])).last_hidden_state[0])
        torch.testing.assert_close(embedded[row], torch.stack(states).mean(0), atol=1e-5, rtol=1e-4)
    assert windowed

    assert not any("_frozen" in name or "distil" in name for name in model.trainable_state())
    memories = model.compress_ids(passages, 8)
    alone = [model.compress_ids([one], 8)[0] for one in passages]
    for one, other in zip(memories, alone, strict=True):
        torch.testing.assert_close(one.keys, other.keys, atol=1e-4, rtol=1e-3)
    model.save_pretrained(tmp_path / "saved")
    loaded = Compressor.from_pretrained(tmp_path / "saved")
    for one, other in zip(memories, loaded.compress_ids(passages, 8), strict=True):
        assert torch.equal(one.keys, other.keys)
    for parameter in encoder.parameters():
        parameter.data.add_(0.01)
    encoder.save_pretrained(text_encoder)
    with pytest.raises(CompressorError, match="trained with another text encoder"):
        Compressor.from_pretrained(tmp_path / "saved")


def test_a_text_encoder_that_is_not_there_is_refused(make_tiny_compressor: Make, tmp_path: Path) -> None:
    with pytest.raises(CompressorError, match="distilbert-base-uncased"):
        make_tiny_compressor(method="sentence-embedding", layout="front", text_encoder=str(tmp_path / "nothing"))


def test_reference_500x_reads_its_padding(make_tiny_compressor: Make) -> None:
    """Its memory is that of `kv` over the passage extended to 500 tokens with EOS, all of which is text."""
    reference = make_tiny_compressor(method="reference-500x", layout="published", passage_attention="causal")
    plain = make_tiny_compressor(
        method="kv", layout="restart", passage_attention="causal", max_passage_tokens=500, writer_rank=0
    )
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(dict(reference.named_parameters())[name])
    base, passage = plain.base, list(range(20, 50))
    extended = passage + [base.eos] * 470
    ours, theirs = reference.compress_ids([passage], 8)[0], plain.compress_ids([extended], 8)[0]
    torch.testing.assert_close((ours.keys, ours.values), (theirs.keys, theirs.values), atol=1e-5, rtol=1e-4)
    # The decoder places both at 500 and starts at k: `published` knows the length that `restart` is told.
    assert [x.tolist() for x in ours.positions()] == [x.tolist() for x in theirs.positions()]
    assert ours.positions()[0].tolist() == list(range(500, 508))
    assert (ours.passage_tokens, theirs.passage_tokens) == (30, 500)
    # Without the padding it is another memory.
    bare = plain.compress_ids([passage], 8)[0]
    assert not torch.allclose(bare.values, ours.values, atol=1e-2)


def test_anchors_are_the_passages_own_tokens(make_tiny_compressor: Make) -> None:
    """Without adapters or mark the memory holds the keys and values that the base itself makes of these tokens."""
    model = make_tiny_compressor(stirred=False, method="anchor", layout="spread", passage_attention="causal")
    nn.init.zeros_(model.encoder.anchor_embedding)  # type: ignore[arg-type]
    passage = [list(range(20, 50))]
    base, lengths = model.base, torch.tensor([30])
    with torch.no_grad():
        keys, values = model.encode(torch.tensor(passage), lengths, 4)
        places = torch.arange(30)[None]
        causal = torch.ones(1, 30, 30, dtype=torch.bool).tril()
        full_keys, full_values = base.keys_and_values(base.embeddings(torch.tensor(passage)), places, causal)
    anchors = memory_positions("spread", lengths, 4, 8)
    picked = base.rotate(full_keys[:, :, :, anchors[0]], anchors, inverse=True)
    torch.testing.assert_close(keys, picked, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(values, full_values[:, :, :, anchors[0]], atol=1e-5, rtol=1e-4)


def test_full_truncate_and_none_are_what_a_prompt_would_be(
    make_method: Callable[[str], Method], passages: list[list[int]]
) -> None:
    """Scores after the prefix equal those of a plain forward pass over the same tokens."""
    for name, kept in (("full", passages[1]), ("truncate", passages[1][:8]), ("none", [])):
        method = make_method(name)
        base = method.base
        (contexts,) = method.compress([passages[1], passages[2]], [8])
        plain = base.model(torch.tensor([[base.bos, *kept, 7, 8, 9, 10, 11, 12]])).logits[0].log_softmax(-1)
        expected = -sum(float(plain[-5 + i, token]) for i, token in enumerate((9, 10, 11, 12)))
        assert nats(method, contexts)[0] == pytest.approx(expected, abs=1e-3)


def test_recite_reads_the_texts_that_the_memories_regenerate(
    make_method: Callable[[str], Method], passages: list[list[int]]
) -> None:
    method = make_method("recite")
    assert isinstance(method, MemoryMethod)
    model, base = method.compressor, method.base
    (contexts,) = method.compress(passages, [8])
    memories = model.compress_ids(passages, 8)
    texts = model.regenerate(memories)
    for pieces, memory, text in zip(contexts, memories, texts, strict=True):
        parts = model.regenerate(memory.split())
        assert [piece.held for piece in pieces] == base.tokenizer(parts, add_special_tokens=False)["input_ids"]
        assert "".join(parts) == text
        assert sum(piece.nbytes for piece in pieces) == memory.to(dtype=torch.bfloat16).nbytes  # what is kept
    assert any(piece.held for pieces in contexts for piece in pieces)
    wanted = token_prefix(base, base.tokenizer(texts, add_special_tokens=False)["input_ids"])
    for prefix in (method.prefix(contexts), recited_prefix(base, memories)):
        torch.testing.assert_close(prefix.keys, wanted.keys)
        torch.testing.assert_close(prefix.values, wanted.values)
        assert prefix.start.tolist() == wanted.start.tolist()
    plain = generation.answer(base, wanted, ["Why?"] * 4, model.config.question_template)
    assert model.answer(memories, ["Why?"] * 4, recite=True) == [one.text for one in plain]


def test_keywords_in_the_order_of_importance_fill_the_prompt(tiny_base: Base) -> None:
    method = Keywords(tiny_base)
    text = (
        "We propose a novel face recognition algorithm using a deep convolutional neural network. "
        "The performance of face recognition algorithms has significantly increased with face recognition data."
    )
    passage = tiny_base.tokenizer(text, add_special_tokens=False)["input_ids"]
    sizes = method.compress([passage], [24, 12, 3])
    shown = [tiny_base.tokenizer.decode(of_size[0][0].held) for of_size in sizes]
    assert [of_size[0][0].tokens for of_size in sizes] == [24, 12, 3]
    assert shown[0].startswith(shown[1])
    assert shown[1].startswith(shown[2])
    assert "face recognition" in method.stand_ins([text], 24)[0]
    assert "," in shown[0]
    # A text without keywords stands for itself.
    bare = tiny_base.tokenizer("12 3", add_special_tokens=False)["input_ids"]
    assert method.compress([bare], [2])[0][0][0].held == bare[:2]
    assert with_new_words(["neural network", "deep neural network", "Network", "neural", "deep"]) == [
        *("neural network", "deep neural network")
    ]


def test_keywords_refuse_what_they_cannot_do(tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yake", None)
    with pytest.raises(CompressorError, match=r"kv-compressor\[keywords\]"):
        untrained_method("keywords", tiny_base, MethodSettings())


def test_textrank_puts_the_central_sentence_first(tiny_base: Base) -> None:
    split = [
        "Weather was fine on Sunday.",
        "The compressor reads a long passage and keeps a short memory of the passage.",
        "A long passage costs memory.",
        "The compressor keeps the memory.",
    ]
    ranks = textrank(split)
    assert ranks.sum() == pytest.approx(1)
    assert ranks.argmax() == 1
    assert ranks.argmin() == 0
    # Against PageRank by plain iteration.
    words = [set(s.lower().rstrip(".").split()) for s in split]
    weights = np.array(
        [[0 if a is b else len(a & b) / (math.log(len(a)) + math.log(len(b))) for b in words] for a in words]
    )
    found = np.full(4, 0.25)
    out = weights.sum(1)
    for _ in range(200):
        spread = sum(found[i] * (weights[i] / out[i] if out[i] else 0.25) for i in range(4))
        found = 0.15 / 4 + 0.85 * spread
    np.testing.assert_allclose(ranks, found, rtol=1e-6)

    passage = tiny_base.tokenizer(" ".join(split), add_special_tokens=False)["input_ids"]
    (of_size,) = Summary(tiny_base).compress([passage], [10])
    assert split[1].startswith(tiny_base.tokenizer.decode(of_size[0][0].held))
    for odd in ("word", "?", "A. B. C.", ""):
        assert len(textrank([odd])) == 1
        assert Summary(tiny_base).stand_ins([odd], 4) == [odd]


def test_summary_by_a_seq2seq_model(tiny_base: Base, text_encoder: str, tmp_path: Path, texts: list[str]) -> None:
    """A random BART: what it writes, cut to k tokens; of a long text all windows are summarised."""
    from transformers import AutoTokenizer, BartConfig, BartForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(text_encoder)
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=40, pad_token_id=0,
        bos_token_id=2, eos_token_id=3, decoder_start_token_id=2, forced_eos_token_id=3,
    )  # fmt: skip
    model = BartForConditionalGeneration(config)
    model.generation_config.max_length = 12
    model.save_pretrained(tmp_path / "bart")
    tokenizer.save_pretrained(tmp_path / "bart")
    method = untrained_method("summary", tiny_base, MethodSettings(summariser=str(tmp_path / "bart")))
    assert isinstance(method, Summary)
    short, long = texts[0][:20], texts[1][:150]
    ids = tokenizer(short, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = tokenizer.decode(model.eval().generate(ids, max_length=12)[0], skip_special_tokens=True).strip()
    assert expected
    assert method.stand_ins([short], 8) == [expected]
    (written,) = method.stand_ins([long], 8)
    assert len(written) > len(expected)  # more windows than one
    passage = tiny_base.tokenizer(short, add_special_tokens=False)["input_ids"]
    of_size = method.compress([passage], [8, 2])
    assert [pieces[0][0].tokens for pieces in of_size] == [8, 2]
    wanted = tiny_base.tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert of_size[0][0][0].held == wanted[:8]
    with pytest.raises(CompressorError, match="facebook/bart-large-cnn"):
        untrained_method("summary", tiny_base, MethodSettings(summariser=str(tmp_path / "nothing")))


def test_llmlingua2_keeps_the_largest_share_that_fits(
    make_method: Callable[[str], Method], passages: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    method = make_method("llmlingua2")
    assert isinstance(method, TokenMethod)
    encode = method.base.tokenizer
    text = encode.decode(passages[1])
    # By trying every percentage.
    kept = [
        encode(FakeLLMLingua().compress_prompt([text], p / 100)["compressed_prompt"], add_special_tokens=False)[
            "input_ids"
        ]
        for p in range(1, 100)
    ]
    for tokens in (30, 16, 8):
        assert method.choose(passages[1], tokens) == max((ids for ids in kept if len(ids) <= tokens), key=len)
    first = next(ids for ids in kept if ids)
    assert len(first) > 1
    assert method.choose(passages[1], 1) == first[:1]  # not even a word fits
    assert method.choose(passages[0], 8) == passages[0]
    assert method.compressor.options["model_name"] == MethodSettings().llmlingua  # type: ignore[attr-defined]
    assert method.compressor.options["use_llmlingua2"] is True  # type: ignore[attr-defined]

    monkeypatch.setitem(sys.modules, "llmlingua", None)
    with pytest.raises(CompressorError, match=r"kv-compressor\[llmlingua\]"):
        untrained_method("llmlingua2", method.base, MethodSettings())

    def unreachable(**options: Any) -> None:
        raise OSError("no route to host")

    package = types.SimpleNamespace(PromptCompressor=unreachable)
    monkeypatch.setitem(sys.modules, "llmlingua", package)  # type: ignore[arg-type]
    with pytest.raises(CompressorError, match=r"'some/model' \(OSError\)"):
        untrained_method("llmlingua2", method.base, MethodSettings(llmlingua="some/model"))


def test_a_row_without_tokens_reads_the_same_in_any_batch(tiny_base: Base) -> None:
    """Beside rows with tokens an empty row is BOS alone, and it is masked from nothing else."""
    prefix = token_prefix(tiny_base, [[5, 6, 7], []])
    assert prefix.mask.tolist() == [[True] * 4, [True, False, False, False]]
    assert prefix.start.tolist() == [4, 1]
    assert token_prefix(tiny_base, [[], []]).slots == 0


def test_registry_names_the_nearest_method(tiny_base: Base) -> None:
    assert registry.split_spec("kv=some/folder") == ("kv", "some/folder")
    assert registry.split_spec("truncate") == ("truncate", None)
    assert registry.split_spec("recite=some/folder") == ("recite", "some/folder")
    with pytest.raises(CompressorError, match="did you mean truncate"):
        registry.split_spec("trunkate")
    with pytest.raises(CompressorError, match="no method 'kv'"):
        untrained_method("kv", tiny_base, MethodSettings())
    for name in TRAINED:
        assert issubclass(registry.encoder_class(name), nn.Module)
        assert name in METHODS
    with pytest.raises(CompressorError, match="no method 'full'"):
        registry.encoder_class("full")
