"""Which bases and tokenizers a compressor can work with, told by their configuration before anything is run."""

from __future__ import annotations

import json
import warnings
from typing import Any

from tokenizers import Tokenizer

from compressor.errors import CompressorError

UNSUPPORTED_ROPE = {
    "dynamic": "its frequencies change with the length of the input, so keys cannot be moved",
    "longrope": "its frequencies change with the length of the input, so keys cannot be moved",
}
NO_ROPE = (
    "it has no rotary position embedding, so memory keys cannot be moved; use a base with RoPE (Llama, Qwen2/2.5/3, "
    "Mistral, SmolLM2/3, OLMo2/3, Gemma 1 to 3, Phi-3, GPT-NeoX, Granite, GLM)"
)
ATTENTION = {"full_attention", "sliding_attention"}
"""Kinds of layers that keep plain keys and values of every position; sliding ones must not have to forget any."""


def fit_tokenizer(tokenizer: Any, rows: int, name: str) -> None:
    """See to it that no text becomes a token without one of the base's `rows` embeddings; warns of what is left out.

    Tokens that were added to a tokenizer, but not to the base, are read as the text that spells them.

    Raises:
        CompressorError: tokens of the vocabulary itself, or BOS or EOS, have no embedding.
    """
    # By number: the vocabulary comes in another order in every process.
    ordered = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    beyond = {token: number for token, number in ordered if number >= rows}
    if not beyond:
        return
    added = tokenizer.added_tokens_decoder
    needed = [token for token in (tokenizer.bos_token, tokenizer.eos_token) if token in beyond]
    own = [token for token, number in beyond.items() if number not in added]
    if needed or own or getattr(tokenizer, "backend_tokenizer", None) is None:
        some = ", ".join(list(dict.fromkeys([*needed, *own, *beyond]))[:3]) + ", ..." * (len(beyond) > 3)
        raise CompressorError(
            f"the tokenizer of {name} has {len(beyond):,} tokens ({some}) for which the base has no embedding (it "
            f"has {rows:,}): give the tokenizer that belongs to it, or add the embeddings to the base "
            "(model.resize_token_embeddings)"
        )
    plain = [token for token, number in beyond.items() if not added[number].special]
    if plain:
        settings = json.loads(tokenizer.backend_tokenizer.to_str())
        settings["added_tokens"] = [one for one in settings["added_tokens"] if one["id"] < rows]
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(settings))
        warnings.warn(
            f"the tokenizer of {name} has {len(beyond):,} added tokens ({', '.join(plain[:3])}, ...) for which the "
            "base has no embedding: they are left out, and read as the text that spells them",
            stacklevel=3,
        )
    template = getattr(tokenizer, "chat_template", None)
    if template and any(token in str(template) for token in beyond):
        tokenizer.chat_template = None
        warnings.warn(
            f"the chat template of {name} uses tokens for which the base has no embedding: it is left out", stacklevel=3
        )


def refuse_unsupported(config: Any, name: str) -> None:
    """Raise a `CompressorError` with the reason if a base of this configuration cannot work."""
    kind = getattr(config, "model_type", "unknown")
    reason = ""
    encoder_decoder = getattr(config, "is_encoder_decoder", False)
    # What surrounds a text model (images, sound) keeps the text model's settings inside.
    config = config if encoder_decoder else config.get_text_config()
    layer_types = set(getattr(config, "layer_types", None) or [])
    if encoder_decoder:
        reason = "it is an encoder-decoder; a causal LM is needed"
    elif layer_types - ATTENTION:
        others = ", ".join(sorted(layer_types - ATTENTION))
        reason = f"it has layers of type {others}; every layer must keep keys and values of all positions"
    elif getattr(config, "num_kv_shared_layers", None):
        reason = f"its last {config.num_kv_shared_layers} layers have no keys and values of their own"
    elif getattr(config, "kv_lora_rank", None):
        reason = "multi-head latent attention keeps no plain keys and values"
    elif not hasattr(config, "rope_parameters"):
        reason = NO_ROPE
    rope = getattr(config, "rope_parameters", None) or {}
    # Either one set of settings or, where kinds of layers differ, one for each kind.
    sets = [rope, *rope.values()] if isinstance(rope, dict) else []
    for rope_type in [one.get("rope_type") for one in sets if isinstance(one, dict)]:
        if not reason and rope_type in UNSUPPORTED_ROPE:
            reason = f"RoPE type {rope_type}: {UNSUPPORTED_ROPE[rope_type]}"
    if reason:
        raise CompressorError(f"{name} ({kind}) is not supported: {reason}")


def window_of(config: Any) -> int | None:
    """Positions that the layers with a sliding window of a base of this configuration attend over, if it has any."""
    config = config.get_text_config()
    size, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    windowed = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    return size if windowed else None
