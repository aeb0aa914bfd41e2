"""The memory codecs by name: a new one is a subclass of `Codec` in a file here, and a line in this table."""

from __future__ import annotations

CODECS: dict[str, str] = {
    "float32": "codec:Floats",
    "float16": "codec:Floats",
    "bf16": "codec:Floats",
    "int8": "codec:Integers",
    "int4": "codec:Integers",
    "int3": "codec:Integers",
    "int2": "codec:Integers",
    "lowrank": "codec:LowRank",
}
"""Where each is. Files know a codec by its name."""
