"""Give a compressor that shares one adapter a writer's of its own and the tree mask, to train on from there.

    python runs/add-writer.py CHECKPOINT OUTPUT

The writer begins as a copy of the shared adapter, so that what was learnt is kept; what the tree mask hides from memory
tokens is what training has to make good.
"""

import argparse
import sys
from dataclasses import replace

import torch

from compressor.api import Compressor
from compressor.errors import CompressorError
from compressor.model.config import BaseConfig
from compressor.model.load import load_base
from compressor.model.lora import READER, WRITER
from compressor.streams import exits_cleanly


@exits_cleanly
def main() -> int:
    """Write OUTPUT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("output")
    options = parser.parse_args()
    before = Compressor.from_pretrained(options.checkpoint)
    if before.has_writer or not before.encoder.writes:
        raise CompressorError(
            f"{options.checkpoint} has a writer's adapter, or its method ({before.config.method}) takes none: give a "
            "compressor of a method with memory tokens that was trained with compressor.writer_rank 0"
        )
    config = replace(before.config, memory_attention="tree", writer_rank=before.config.lora_rank)
    after = Compressor(load_base(BaseConfig(path=before.base.name)), config)
    known = before.trainable_state()
    with torch.no_grad():
        for name, weight in after.trainable_state().items():
            weight.copy_(known[name.replace(f".{WRITER}.", f".{READER}.")])
    after.save_pretrained(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
