"""`compressor calibrate`: what codecs need to know about a compressor's memories."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from compressor.commands.loading import load_model
from compressor.commands.options import CalibrateOptions
from compressor.data.records import load_texts
from compressor.files import owned
from compressor.model.checkpoint import compressor_name
from compressor.storage.fitting import calibrate
from compressor.storage.inspection import describe
from compressor.unfinished import Unfinished


def run(options: CalibrateOptions, switches: Any) -> None:
    """Fit a calibration, write it, and say what is in it."""
    with owned(options.output):
        fit(options, switches.overwrite)
    print(describe(options.output))


def fit(options: CalibrateOptions, again: bool) -> None:
    """Fit a calibration and write it; `again`: from the beginning where one was interrupted."""
    parts = Unfinished(Path(f"{options.output}.unfinished"), options.resume, again)
    parts.start()
    records = load_texts(options.data, limit=options.limit, skip_bad_records=options.skip_bad_records)
    model = load_model(options)
    encoded = model.base.tokenise(records["text"])
    most = model.config.max_passage_tokens
    asked = options.lengths or ([model.config.segment_tokens] if model.config.segment_tokens else [96, 192, 384])
    lengths = [min(length, most) for length in asked]
    passages = [ids[: lengths[i % len(lengths)]] for i, ids in enumerate(encoded) if ids]
    name = compressor_name(model, options.checkpoint)
    parts.expect(
        {
            "settings": {name: getattr(options, name) for name in ("tokens", "sensitivity", "base_dtype")},
            "passages": hashlib.sha256(json.dumps(passages).encode()).hexdigest(),
            "compressor": name,
        }
    )
    with parts.interruptible("the same command with --resume goes on"):
        fitted = calibrate(model, passages, options.tokens, options.rank, options.sensitivity, name, parts)
        fitted.save(options.output)
    parts.remove()
