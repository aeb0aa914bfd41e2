"""Change what a compressor's memory tokens are encoded with, keeping what was learnt, to train on from there.

    python runs/change-encoder.py writer CHECKPOINT OUTPUT
    python runs/change-encoder.py parts CHECKPOINT OUTPUT

writer: a compressor of one adapter gets a writer's of its own, a copy of it, and the tree mask.
parts: each memory token of a nested compressor keeps its place among all of them, and with it its embedding, and sees
the part of the passage it stands in.
What memory tokens no longer see, and where those of smaller memories stand now, training has to make good.
"""

import argparse
import sys
from dataclasses import replace

import torch

from compressor.api import Compressor
from compressor.errors import CompressorError
from compressor.model.config import BaseConfig, CompressorConfig
from compressor.model.layouts import van_der_corput
from compressor.model.load import load_base
from compressor.model.lora import READER, WRITER
from compressor.streams import exits_cleanly


def changed(kind: str, checkpoint: str, before: Compressor) -> CompressorConfig:
    """The settings afterwards; a compressor that cannot be changed so is a `CompressorError`."""
    config = before.config
    if kind == "writer":
        if before.has_writer or not before.encoder.writes:
            raise CompressorError(
                f"{checkpoint} has a writer's adapter, or its method ({config.method}) takes none: give a compressor "
                "of a method with memory tokens that was trained with compressor.writer_rank 0"
            )
        return replace(config, memory_attention="tree", writer_rank=config.lora_rank)
    if (config.method, config.layout) != ("kv", "nested"):
        raise CompressorError(
            f"{checkpoint} is of the method {config.method} in the layout {config.layout}: give a compressor of kv in "
            "nested"
        )
    return replace(config, layout="overlay", memory_attention="parts")


@exits_cleanly
def main() -> int:
    """Write OUTPUT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["writer", "parts"])
    parser.add_argument("checkpoint")
    parser.add_argument("output")
    options = parser.parse_args()
    before = Compressor.from_pretrained(options.checkpoint)
    config = changed(options.kind, options.checkpoint, before)
    after = Compressor(load_base(BaseConfig(path=before.base.name)), config)
    known = before.trainable_state()
    with torch.no_grad():
        for name, weight in after.trainable_state().items():
            if options.kind == "parts" and name == "encoder.memory_embeddings":
                weight[van_der_corput(config.memory_tokens)] = known[name]
            else:
                weight.copy_(known[name] if name in known else known[name.replace(f".{WRITER}.", f".{READER}.")])
    after.save_pretrained(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
