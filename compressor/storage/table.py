"""The memory codecs by name: a new one is a subclass of `Codec` in a file here, and a line in this table."""

from __future__ import annotations

CODECS: dict[str, str] = {
    "float32": "codecs:Floats",
    "float16": "codecs:Floats",
    "bf16": "codecs:Floats",
    "int8": "codecs:Integers",
    "int4": "codecs:Integers",
    "int3": "codecs:Integers",
    "int2": "codecs:Integers",
    "lowrank": "codecs:LowRank",
}
"""Where each is. Files know a codec by its name."""
