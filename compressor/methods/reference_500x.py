"""`reference-500x`: the published recipe as it is (arXiv 2408.03094, its published code), to be compared with.

Every passage is extended to 500 tokens with EOS, which encoder and loss treat as text; positions restart for the
decoder inside the passage. The rest of the recipe is settings: LoRA on queries and values, standard normal memory
tokens, causal attention, one number of memory tokens for each checkpoint (`configs/arxiv-mini/methods/`).
"""

from __future__ import annotations

from torch import Tensor

from compressor.errors import CompressorError
from compressor.methods.kv import KVEncoder
from compressor.model.base import Base
from compressor.model.config import CompressorConfig
from compressor.model.encoder import AdaptedBase
from compressor.model.layouts import PUBLISHED_LENGTH


class Reference500xEncoder(KVEncoder):
    """`kv` with passages padded to 500 by EOS without a mask."""

    writes = False
    padded_to = PUBLISHED_LENGTH

    def __init__(self, base: Base, config: CompressorConfig):
        super().__init__(base, config)
        if config.max_passage_tokens > PUBLISHED_LENGTH:
            raise CompressorError(
                f"compressor.max_passage_tokens = {config.max_passage_tokens} is out of range: the method "
                f"reference-500x pads passages to {PUBLISHED_LENGTH} tokens, so it takes at most as many"
            )

    def trained_for(self, tokens: int) -> bool:
        return tokens == self.config.memory_tokens  # the published code trains a checkpoint for each number

    def encode(self, model: AdaptedBase, passages: Tensor, lengths: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        batch, width = passages.shape
        padded = passages.new_full((batch, PUBLISHED_LENGTH), model.base.eos)
        shared = min(width, PUBLISHED_LENGTH)
        padded[:, :shared] = passages[:, :shared]
        for row, length in enumerate(lengths.tolist()):
            padded[row, length:] = model.base.eos
        return super().encode(model, padded, lengths.new_full((batch,), PUBLISHED_LENGTH), tokens)
