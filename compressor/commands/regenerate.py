"""`compressor regenerate`: the passage of a memory."""

from __future__ import annotations

from typing import Any

from compressor.commands.loading import memory_and_base
from compressor.commands.options import RegenerateOptions
from compressor.errors import CompressorError
from compressor.model.generation import Sampling, regenerate
from compressor.packing.lossless import unpack_passage
from compressor.streams import check_output, write_output


def run(options: RegenerateOptions, switches: Any) -> None:
    """Write it to standard output."""
    check_output()
    sampling = Sampling(temperature=options.temperature, seed=options.seed)  # what is wrong with it shows at once
    memory, base = memory_and_base(options)
    if not options.exact:
        write_output(regenerate(base, [memory], sampling)[0])
        return
    if memory.text is None:
        raise CompressorError(
            f"{options.memory} keeps no text: leave --exact out, or compress the passage again with --keep-text"
        )
    write_output(unpack_passage(memory.text, base).encode())  # without a line end of our own
