"""`compressor inspect`: what is in a file."""

from __future__ import annotations

from typing import Any

from compressor.commands.options import InspectOptions
from compressor.storage.inspection import describe
from compressor.streams import write_output


def run(options: InspectOptions, switches: Any) -> None:
    """Print it."""
    write_output(describe(options.file))
