"""`compressor corpus`: a corpus of abstracts."""

from __future__ import annotations

from typing import Any

from compressor.data.builders.choice import CorpusConfig
from compressor.data.builders.corpora import build_corpus


def run(config: CorpusConfig, switches: Any) -> None:
    """Build it, and say what was kept."""
    manifest = build_corpus(config, overwrite=switches.overwrite)
    print(f"read {manifest['read']:,} records, kept {sum(manifest['kept'].values()):,}")
    for reason, count in manifest["dropped"].items():
        print(f"  dropped {count:,}: {reason}")
    for name, split in manifest["splits"].items():
        dates = f", {split['dates']['first']} to {split['dates']['last']}" if split["dates"] else ""
        print(f"  {name}: {split['records']:,} records, {split['words']:,} words{dates}")
    print(f"wrote {config.output}")
