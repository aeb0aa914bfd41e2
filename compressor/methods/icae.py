"""`icae`: output embeddings of memory tokens, read as input embeddings (In-context Autoencoder, arXiv 2307.06945)."""

from __future__ import annotations

from torch import Tensor, nn

from compressor.model.base import Base
from compressor.model.config import CompressorConfig
from compressor.model.encoder import AdaptedBase, EmbeddingEncoder, initial_memory, memory_pass


class ICAEEncoder(EmbeddingEncoder):
    """The adapted base's last hidden states at k memory tokens stand in for the passage's embeddings."""

    reads_hidden_states = True
    writes = True

    def __init__(self, base: Base, config: CompressorConfig):
        super().__init__(base, config)
        self.memory_embeddings = nn.Parameter(initial_memory(base, config))

    def embedded(self, model: AdaptedBase, passages: Tensor, lengths: Tensor, tokens: Tensor) -> Tensor:
        with memory_pass(model, self.memory_embeddings, passages, lengths, tokens) as reading:
            return model.base.hidden_states(*reading)[:, -int(tokens.max()) :]
