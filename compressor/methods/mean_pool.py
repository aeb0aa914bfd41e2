"""`mean-pool`: hidden states averaged over equal blocks and mapped to input embeddings (arXiv 2510.20797)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compressor.model.base import Base
from compressor.model.config import CompressorConfig, Layout
from compressor.model.encoder import AdaptedBase, EmbeddingEncoder, encoder_attention
from compressor.model.lora import READER, adapter


class MeanPoolEncoder(EmbeddingEncoder):
    """The adapted base reads the passage; k averages of its last hidden states, mapped linearly, stand in for it."""

    reads_hidden_states = True

    def __init__(self, base: Base, config: CompressorConfig):
        super().__init__(base, config)
        self.map = nn.Linear(base.hidden, base.hidden)
        with torch.no_grad():
            # Normed states are larger than embeddings: start at the embeddings' scale.
            scale = base.embeddings.weight.float().std().item()
            self.map.weight.copy_(torch.eye(base.hidden) * scale)
            self.map.bias.zero_()

    @property
    def memory_layout(self) -> Layout:
        return "spread"

    def embedded(self, model: AdaptedBase, passages: Tensor, lengths: Tensor, tokens: Tensor) -> Tensor:
        batch, width = passages.shape
        positions = torch.arange(width, device=passages.device).expand(batch, -1)
        allowed = encoder_attention(lengths, width, 0, self.config.passage_attention == "bidirectional")
        with adapter(READER):
            states = model.base.hidden_states(model.base.embeddings(passages), positions, allowed)
        pooled = block_means(lengths, width, tokens).to(states.dtype) @ states
        return self.map(pooled.float())


def block_means(lengths: Tensor, width: int, blocks: Tensor) -> Tensor:
    """Weights that average equal blocks of each passage, float32 `[batch, most blocks, width]`.

    Block i of n tokens is `i n / k` to `(i + 1) n / k`, and one token where that is empty (fewer tokens than blocks).
    Rows of fewer blocks, int64 `[batch]`, have the last token again after their own.
    """
    index = torch.arange(int(blocks.max()), device=lengths.device)[None].minimum(blocks[:, None] - 1)
    first = index * lengths[:, None] // blocks[:, None]
    last = torch.maximum(first + 1, (index + 1) * lengths[:, None] // blocks[:, None])
    columns = torch.arange(width, device=lengths.device)
    inside = (columns >= first[..., None]) & (columns < last[..., None])
    return inside / inside.sum(-1, keepdim=True)
