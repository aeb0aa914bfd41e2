"""The memory codecs by name: a new one is a subclass of `Codec` in a file here, and a line in this table."""

from __future__ import annotations

CODECS: dict[str, str] = {
    "float32": "codec_floats:Floats",
    "float16": "codec_floats:Floats",
    "bf16": "codec_floats:Floats",
    "int8": "codec_integers:Integers",
    "int4": "codec_integers:Integers",
    "int3": "codec_integers:Integers",
    "int2": "codec_integers:Integers",
    "lowrank": "codec_lowrank:LowRank",
}
"""Where each is. Files know a codec by its name."""
