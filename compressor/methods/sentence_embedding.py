"""`sentence-embedding`: a frozen text encoder's embedding, projected to input embeddings (xRAG, arXiv 2405.13792)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compressor.model.base import Base
from compressor.model.config import CompressorConfig
from compressor.model.encoder import AdaptedBase, EmbeddingEncoder, encoder_attention
from compressor.model.fingerprints import fingerprint
from compressor.model.text_encoder import load_text_encoder, pooled


class SentenceEmbeddingEncoder(EmbeddingEncoder):
    """One vector of a frozen encoder becomes k input embeddings; only the projection is trained.

    The text encoder is any that transformers loads (DistilBERT, a sentence encoder: `compressor.text_encoder`), its
    last hidden states averaged over the text, or by default the base itself.
    """

    adapted = False

    def __init__(self, base: Base, config: CompressorConfig):
        super().__init__(base, config)
        # In a tuple, so that frozen weights are no part of this module: neither saved nor counted.
        self._frozen: tuple[Any, Any] | None = None
        size = base.hidden
        if config.text_encoder is not None:
            self._frozen = load_text_encoder(config.text_encoder)
            size = self._frozen[0].config.hidden_size
        self.norm = nn.LayerNorm(size)
        self.projection = nn.Sequential(
            nn.Linear(size, 4 * base.hidden), nn.GELU(), nn.Linear(4 * base.hidden, config.memory_tokens * base.hidden)
        )

    @property
    def frozen_fingerprint(self) -> str | None:
        return None if self._frozen is None else fingerprint(self._frozen[0])

    @torch.no_grad()
    def embed(self, model: AdaptedBase, passages: Tensor, lengths: Tensor) -> Tensor:
        """The frozen encoder's embeddings of the passages, float32 `[batch, size]`."""
        base = model.base
        if self._frozen is None:
            batch, width = passages.shape
            positions = torch.arange(width, device=passages.device).expand(batch, -1)
            allowed = encoder_attention(lengths, width, 0, bidirectional=False)
            states = base.hidden_states(base.embeddings(passages), positions, allowed)
            weights = (positions < lengths[:, None])[..., None].float()
            return (states.float() * weights).sum(1) / weights.sum(1)
        encoder, tokenizer = self._frozen
        texts = [
            base.tokenizer.decode(ids[:length], skip_special_tokens=True)
            for ids, length in zip(passages, lengths.tolist(), strict=True)
        ]
        return pooled(encoder.to(passages.device), tokenizer, texts)

    def embedded(self, model: AdaptedBase, passages: Tensor, lengths: Tensor, tokens: Tensor) -> Tensor:
        projected = self.projection(self.norm(self.embed(model, passages, lengths)))
        return projected.view(len(passages), self.config.memory_tokens, -1)[:, : int(tokens.max())]
