"""What a forward pass of a Llama-like decoder costs: multiplications, and keys and values, by formula.

For a base of L layers, hidden size h, a heads of size d and a vocabulary of V, a pass over s tokens after c cached ones
that asks for logits at t of them takes

    linear      2 s L w                                 w weights in the linear layers of a layer
    attention   4 s (c + s) L a d                       scores and their product with the values
    logits      2 t h V

floating-point operations; a multiplication and its addition are two (Kaplan et al. 2020, arXiv 2001.08361, 2.1).
Attention is counted as it is computed with a mask, over all s (c + s) pairs, seen or not, as `torch.utils.flop_counter`
counts it. Left out are what grows with s alone without a matrix (norms, activations, softmax) and RoPE's angles. LoRA
adapters of P parameters that are not merged add 2 s P (Hu et al. 2021, arXiv 2106.09685).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama-like decoder."""

    layers: int
    hidden: int
    query_size: int
    """Heads times their size."""
    kv_size: int
    """Key-value heads times their size."""
    layer_weights: int
    """Weights of the linear layers of one decoder layer."""
    vocabulary: int

    def kv_bytes(self, positions: int, value_bytes: int) -> int:
        """Bytes of the keys and values of so many positions."""
        return 2 * self.layers * self.kv_size * positions * value_bytes

    def forward_flops(self, tokens: int, context: int = 0, logits: int = 0, adapters: int = 0) -> int:
        """Floating-point operations of a pass over `tokens` after `context` cached positions.

        Args:
            logits: positions whose logits are computed.
            adapters: LoRA parameters that are switched on.
        """
        linear = 2 * tokens * self.layers * self.layer_weights
        attention = 4 * tokens * (context + tokens) * self.layers * self.query_size
        return linear + attention + 2 * logits * self.hidden * self.vocabulary + 2 * tokens * adapters


@dataclass(frozen=True)
class Cost:
    """What a run of the model costs."""

    flops: int
    pairs: int
    """Pairs of a query and a key that it may see: what the attention of one head and layer computes at least."""
    kv_bytes: int
    """Keys and values held when the last token is written."""


@dataclass(frozen=True)
class Setting:
    """What is run: a passage, a BOS after it, and new tokens, the last of which is not read again."""

    shape: Shape
    passage: int
    """Tokens of the passage."""
    new_tokens: int
    value_bytes: int = 2

    def full(self, new: bool) -> Cost:
        """The passage itself, after a BOS; `new` if it must be read first, else its keys and values are there."""
        context = self.passage + 1
        return self._generate(context, self.shape.forward_flops(context) * new, causal_pairs(context) * new)

    def memory(self, tokens: int, new: bool, adapters: int, bidirectional: bool, writer: int | None = None) -> Cost:
        """A memory of `tokens` memory tokens.

        Args:
            new: whether the passage must be compressed first; else the memory is there already.
            adapters: LoRA parameters of the encoder.
            bidirectional: whether passage tokens see later ones while compressing.
            writer: LoRA parameters of memory tokens, where these are read after the passage by an adapter of their own.
        """
        seen = self.passage**2 if bidirectional else causal_pairs(self.passage)
        pairs = seen + tokens * self.passage + causal_pairs(tokens)
        flops = self.shape.forward_flops(self.passage + tokens * (writer is None), adapters=adapters)
        flops += 0 if writer is None else self.shape.forward_flops(tokens, self.passage, adapters=writer)
        return self._generate(tokens, flops * new, pairs * new)

    def _generate(self, context: int, flops: int, pairs: int) -> Cost:
        end = context + self.new_tokens
        flops += sum(self.shape.forward_flops(1, place, 1) for place in range(context, end))
        return Cost(
            flops, pairs + causal_pairs(end) - causal_pairs(context), self.shape.kv_bytes(end, self.value_bytes)
        )


def causal_pairs(tokens: int) -> int:
    """Pairs of a token and itself or an earlier one."""
    return tokens * (tokens + 1) // 2
