"""`icae`: output embeddings of memory tokens, read as input embeddings (In-context Autoencoder, arXiv 2307.06945)."""

from __future__ import annotations

from torch import Tensor, nn

from compressor.model.base import Base
from compressor.model.config import CompressorConfig, Layout
from compressor.model.encoder import AdaptedBase, Encoder, initial_memory, memory_pass, prefill
from compressor.model.table import LAYOUTS


class ICAEEncoder(Encoder):
    """The adapted base's last hidden states at k memory tokens stand in for the passage's embeddings."""

    reads_hidden_states = True
    writes = True

    def __init__(self, base: Base, config: CompressorConfig):
        super().__init__(base, config)
        self.memory_embeddings = nn.Parameter(initial_memory(base, config))

    def values_per_token(self, base: Base) -> int:
        return base.hidden

    @property
    def truncatable(self) -> bool:
        return LAYOUTS[self.config.layout].truncatable

    @property
    def memory_layout(self) -> Layout:
        return "front"

    def encode(self, model: AdaptedBase, passages: Tensor, lengths: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """See `Encoder.encode`."""
        with memory_pass(model, self.memory_embeddings[:tokens], passages, lengths) as reading:
            states = model.base.hidden_states(*reading)[:, -tokens:]
        return prefill(model, states, lengths, self.memory_layout, self.config.memory_tokens)
