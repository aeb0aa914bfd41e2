"""`kv`: the keys and values that memory tokens leave in every layer, as in 500xCompressor (arXiv 2408.03094)."""

from __future__ import annotations

from torch import Tensor, nn

from compressor.model.base import Base
from compressor.model.config import CompressorConfig
from compressor.model.encoder import AdaptedBase, Encoder, initial_memory, memory_pass


class KVEncoder(Encoder):
    """The adapted base reads the passage, then k memory tokens; keys and values of the memory tokens are the memory."""

    writes = True

    def __init__(self, base: Base, config: CompressorConfig):
        super().__init__(base, config)
        self.memory_embeddings = nn.Parameter(initial_memory(base, config))

    def encode(self, model: AdaptedBase, passages: Tensor, lengths: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        with memory_pass(model, self.memory_embeddings, passages, lengths, tokens) as reading:
            slots = int(tokens.max())
            keys, values = model.base.keys_and_values(*reading[:3], slots, reading.cache)
        return model.base.rotate(keys, reading.positions[:, -slots:], inverse=True), values
