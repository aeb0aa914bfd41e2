"""`summary`: a summary of the passage, by TextRank offline or by any seq2seq summariser."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from compressor.data.builders.cloze import split_sentences
from compressor.errors import CompressorError
from compressor.methods.interface import MethodSettings, TextMethod
from compressor.model.base import Base
from compressor.processes import bars_on_terminals

DAMPING = 0.85


class Summary(TextMethod):
    """A summary, cut to k tokens.

    By default whole sentences in the order of their importance (TextRank), else what a seq2seq summariser writes with
    its own generation settings, of a text over its limit for one window after the other.

    Args:
        summariser: folder or hub id of a seq2seq model that transformers loads, for instance facebook/bart-large-cnn.

    Raises:
        CompressorError: the summariser cannot be loaded.
    """

    name = "summary"

    def __init__(self, base: Base, summariser: str | None = None):
        super().__init__(base)
        self.summariser = None if summariser is None else load_summariser(summariser, base.device)

    @classmethod
    def from_settings(cls, base: Base, settings: MethodSettings) -> Summary:
        return cls(base, settings.summariser)

    def stand_ins(self, texts: Sequence[str], tokens: int) -> list[str]:
        if self.summariser is not None:
            return [self._written(text) for text in texts]
        found = []
        for text in texts:
            split = split_sentences(text)
            ranks = textrank(split)
            # A stable sort: sentences that matter alike stay in the order of the text.
            found.append(" ".join(split[i] for i in sorted(range(len(split)), key=lambda i: -ranks[i])))
        return found

    @torch.no_grad()
    def _written(self, text: str) -> str:
        """The summariser's own summary. One text at a time, so that it does not depend on the others' padding."""
        assert self.summariser is not None
        model, tokenizer = self.summariser
        limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or 1024)
        windows = tokenizer(text, truncation=True, max_length=limit, return_overflowing_tokens=True)["input_ids"]
        # Slow tokenizers give one list and the overflow apart.
        windows = windows if windows and isinstance(windows[0], list) else [windows]
        parts = []
        for window in windows:
            ids = torch.tensor([window], device=model.device)
            written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False)
            parts.append(tokenizer.decode(written[0], skip_special_tokens=True).strip())
        return " ".join(part for part in parts if part)


def textrank(split: Sequence[str]) -> np.ndarray:
    """Importance of each sentence, float64 `[sentences]`, which sums to 1.

    PageRank over sentences that are joined by their shared words, divided by the logarithms of both lengths; equations
    1 and 2 of Mihalcea and Tarau, TextRank: Bringing Order into Texts (EMNLP 2004), solved directly.
    """
    words = [set(re.findall(r"\w+", sentence.lower())) for sentence in split]
    count = len(words)
    weights = np.zeros((count, count))
    for i in range(count):
        for j in range(i):
            # Two sentences of one word each have lengths whose logarithms are 0.
            scale = math.log(len(words[i]) or 1) + math.log(len(words[j]) or 1)
            weights[i, j] = weights[j, i] = len(words[i] & words[j]) / scale if scale else 0.0
    out = weights.sum(axis=1, keepdims=True)
    # A sentence that shares no word passes its importance to all alike.
    moves = np.where(out > 0, weights / np.where(out > 0, out, 1), 1 / max(1, count))
    return np.linalg.solve(np.eye(count) - DAMPING * moves.T, np.full(count, (1 - DAMPING) / max(1, count)))


def load_summariser(name: str, device: torch.device) -> tuple[Any, Any]:
    """A seq2seq model and its tokenizer, from a folder or the hub.

    Raises:
        CompressorError: neither has it.
    """
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer  # start-up

    try:
        with bars_on_terminals():
            model = AutoModelForSeq2SeqLM.from_pretrained(name).eval().requires_grad_(False)
        return model.to(device), AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the hub client raises many kinds
        raise CompressorError(
            f"cannot load the summariser {name!r} ({type(error).__name__}): give a folder or hub id of a seq2seq model "
            "that transformers loads, for instance facebook/bart-large-cnn, or leave summariser out"
        ) from None
