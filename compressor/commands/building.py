"""`compressor corpus`, `questions` and `entities`: data, built, and what was kept of it."""

from __future__ import annotations

from typing import Any

from compressor.data.builders.arxivqa import ArxivQAConfig, build_questions
from compressor.data.builders.choice import CorpusConfig
from compressor.data.builders.corpora import build_corpus
from compressor.data.builders.entities import EntitiesConfig, build_entities


def corpus(config: CorpusConfig, switches: Any) -> None:
    """Build it, and say what was kept."""
    manifest = build_corpus(config, overwrite=switches.overwrite)
    print(f"read {manifest['read']:,} records, kept {sum(manifest['kept'].values()):,}")
    for reason, count in manifest["dropped"].items():
        print(f"  dropped {count:,}: {reason}")
    for name, split in manifest["splits"].items():
        dates = f", {split['dates']['first']} to {split['dates']['last']}" if split["dates"] else ""
        print(f"  {name}: {split['records']:,} records, {split['words']:,} words{dates}")
    print(f"wrote {config.output}")


def questions(config: ArxivQAConfig, switches: Any) -> None:
    """Build the set, and say what was accepted."""
    manifest = build_questions(config, overwrite=switches.overwrite)
    asked, pairs = manifest["abstracts"], manifest["pairs"]
    print(f"asked about {asked['asked']:,} abstracts, {pairs['accepted']:,} questions accepted")
    for reason, count in pairs["rejected"].items():
        print(f"  rejected {count:,}: {reason}")
    if asked["no_reply"]:
        print(f"  no reply for {asked['no_reply']:,}: run again with --overwrite to ask about those alone")
    for name, split in manifest["splits"].items():
        print(f"  {name}: {split['records']:,} questions")
    print(f"wrote {config.output}")


def entities(config: EntitiesConfig, switches: Any) -> None:
    """Make them, and say how many of each kind."""
    counts = build_entities(config)
    print(f"{', '.join(f'{count:,} about {kind}' for kind, count in counts.items())}: {config.output}")
