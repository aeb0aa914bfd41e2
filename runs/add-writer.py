"""Give a compressor that shares one adapter a writer's of its own and the tree mask, to train on from there.

    python runs/add-writer.py CHECKPOINT OUTPUT

The writer begins as a copy of the shared adapter, so that what was learnt is kept; what the tree mask hides from memory
tokens is what training has to make good. Layers that no reader's output reaches are the writer's alone.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from compressor.api import Compressor
from compressor.model.config import BaseConfig
from compressor.model.load import load_base
from compressor.streams import exits_cleanly


@exits_cleanly
def main() -> int:
    """Write OUTPUT."""
    source, output = sys.argv[1:3]
    before = Compressor.from_pretrained(source)
    config = replace(before.config, memory_attention="tree", writer_rank=before.config.lora_rank)
    after = Compressor(load_base(BaseConfig(path=before.base.name)), config)
    known = before.trainable_state()
    state = after.trainable_state()
    with torch.no_grad():
        for name, weight in state.items():
            weight.copy_(known[name.replace(".writer.", ".default.")])
    after.save_pretrained(Path(output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
