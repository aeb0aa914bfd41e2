"""Give each memory token of a nested compressor the part of the passage it stands in to see, to train on from there.

    python runs/to-parts.py CHECKPOINT OUTPUT

Each memory token keeps its place among all of them, and with it its embedding. What it is no longer shown, and where
those of smaller memories stand now, training has to make good.
"""

import argparse
import sys
from dataclasses import replace

import torch

from compressor.api import Compressor
from compressor.errors import CompressorError
from compressor.model.config import BaseConfig
from compressor.model.layouts import van_der_corput
from compressor.model.load import load_base
from compressor.streams import exits_cleanly


@exits_cleanly
def main() -> int:
    """Write OUTPUT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("output")
    options = parser.parse_args()
    before = Compressor.from_pretrained(options.checkpoint)
    if (before.config.method, before.config.layout) != ("kv", "nested"):
        raise CompressorError(
            f"{options.checkpoint} is of the method {before.config.method} in the layout {before.config.layout}: give "
            "a compressor of kv in nested"
        )
    config = replace(before.config, layout="overlay", memory_attention="parts")
    after = Compressor(load_base(BaseConfig(path=before.base.name)), config)
    known = before.trainable_state()
    with torch.no_grad():
        for name, weight in after.trainable_state().items():
            if name == "encoder.memory_embeddings":
                weight[van_der_corput(config.memory_tokens)] = known[name]
            else:
                weight.copy_(known[name])
    after.save_pretrained(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
