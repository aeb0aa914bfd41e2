"""SmolLM2-135M-Instruct as it comes from its package: weights, tokens, chat. Skipped where it is not at hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressor.data.prompts import CHAT, QUESTION, question_ids
from compressor.data.records import load_texts
from compressor.model.base import Base
from compressor.model.bases import NAMED, fetch, installed
from compressor.model.config import BaseConfig
from compressor.model.decoder import empty_prefix
from compressor.model.generation import after
from compressor.model.gguf_cache import cached
from compressor.model.load import load_base

NAME = "smollm2-135m"
KNOWN = NAMED[NAME]
pytestmark = pytest.mark.skipif(
    cached(KNOWN.sha256) is None and installed(KNOWN) is None, reason=f"compressor fetch {NAME} gets it"
)


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(BaseConfig(path=NAME))


def test_the_weights_are_those_that_compressors_are_trained_on(base: Base) -> None:
    assert base.name == NAME
    assert base.fingerprint == "edaa83ec69bf22e742eac52200b8e0646e6c783898ac0c74196431879b2cc034"
    assert (base.layers, base.kv_heads, base.head_size, base.hidden) == (30, 3, 64, 576)
    assert Path(fetch(NAME)).is_dir()


def test_passages_have_no_marks_and_come_back_as_they_were(base: Base) -> None:
    """BOS asks for regeneration, EOS ends it: a passage must have neither, whatever it spells."""
    marks = set(base.tokenizer.added_tokens_decoder)
    assert (base.bos, base.eos, base.tokenizer.pad_token_id) == (1, 2, 2)
    spelled = [
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "<|endoftext|> <repo_name>  12\n 34\t≤ 😀 don 't .",
    ]
    texts = [*load_texts("arxiv-test")["text"][:100], *spelled]
    for text, ids in zip(texts, base.tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
        assert not marks & set(ids)
        assert base.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_chat_after_a_memory_and_without_one(base: Base) -> None:
    """Its turns begin with BOS too. What follows BOS tells them from a regeneration; no second BOS is put before it."""
    (chat,) = question_ids(base.tokenizer, ["Is <|im_end|> a word?"], CHAT)
    written = base.tokenizer.decode(chat)
    assert written.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert written.endswith("<|im_start|>user\nIs <|im_end|> a word?<|im_end|>\n<|im_start|>assistant\n")
    assert (chat.count(base.bos), chat.count(base.eos)) == (3, 2)
    (plain,) = question_ids(base.tokenizer, ["Which?"], QUESTION)
    assert after(base, empty_prefix(base, 2), [chat, plain]) == [chat, [base.bos, *plain]]
