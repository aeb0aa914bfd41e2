"""`kv`: the keys and values that memory tokens leave in every layer, as in 500xCompressor (arXiv 2408.03094)."""

from __future__ import annotations

from torch import Tensor, nn

from compressor.base import Base
from compressor.layouts import TRUNCATABLE
from compressor.methods.encoder import AdaptedBase, Encoder, initial_memory, with_memory_tokens
from compressor.model_config import CompressorConfig


class KVEncoder(Encoder):
    """The adapted base reads `passage ; k memory tokens`; keys and values of the memory tokens are the memory."""

    def __init__(self, base: Base, config: CompressorConfig):
        super().__init__(base, config)
        self.memory_embeddings = nn.Parameter(initial_memory(base, config))

    @property
    def truncatable(self) -> bool:
        return self.config.layout in TRUNCATABLE

    def encode(self, model: AdaptedBase, passages: Tensor, lengths: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """See `Encoder.encode`."""
        inputs = with_memory_tokens(model, self.memory_embeddings[:tokens], passages, lengths)
        with model.adapters(on=True):
            keys, values = model.base.keys_and_values(*inputs, tokens)
        return model.base.rotate(keys, inputs[1][:, -tokens:], inverse=True), values
