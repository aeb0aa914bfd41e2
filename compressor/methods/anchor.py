"""`anchor`: keys and values of some of the passage's own tokens (SAC, arXiv 2510.08907)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compressor.model.base import Base
from compressor.model.config import CompressorConfig
from compressor.model.encoder import AdaptedBase, Encoder
from compressor.model.layouts import memory_positions
from compressor.model.lora import READER, adapter


class AnchorEncoder(Encoder):
    """k tokens, evenly spread over the passage, are marked by a learned embedding; their keys and values are kept."""

    def __init__(self, base: Base, config: CompressorConfig):
        super().__init__(base, config)
        self.anchor_embedding = nn.Parameter(torch.randn(base.hidden) * base.embeddings.weight.float().std().item())

    def encode(self, model: AdaptedBase, passages: Tensor, lengths: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """See `Encoder.encode`. Of a passage of fewer than k tokens some serve as anchors more than once."""
        batch, width = passages.shape
        base = model.base
        slots = int(tokens.max())
        anchors = memory_positions(self.config.layout, lengths, slots, self.config.memory_tokens, tokens)
        used = torch.arange(slots, device=lengths.device)[None] < tokens[:, None]
        embedded = base.embeddings(passages)
        marked = embedded.gather(1, anchors[..., None].expand(-1, -1, embedded.shape[-1]))
        marked = marked + self.anchor_embedding.to(embedded.dtype)
        columns = torch.arange(width, device=passages.device).expand(batch, -1)
        # Attention knows tokens by their positions, not by their columns: anchors move to the end, where the base
        # reads slots, and what stays in their old columns is masked.
        order = torch.cat([columns, anchors], dim=1)
        if self.config.passage_attention == "bidirectional":
            sees = torch.ones(batch, width + slots, width + slots, dtype=torch.bool, device=passages.device)
        else:
            sees = order[:, :, None] >= order[:, None, :]
        gone = torch.zeros(batch, width + slots, dtype=torch.bool, device=passages.device)
        gone[:, :width] = ((columns[..., None] == anchors[:, None]) & used[:, None]).any(-1)
        gone[:, :width] |= columns >= lengths[:, None]
        gone[:, width:] = ~used
        itself = torch.eye(width + slots, dtype=torch.bool, device=passages.device)
        allowed = (sees & ~gone[:, None, :]) | itself
        with adapter(READER):
            keys, values = base.keys_and_values(torch.cat([embedded, marked], dim=1), order, allowed, slots)
        return base.rotate(keys, anchors, inverse=True), values
