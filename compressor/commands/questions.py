"""`compressor questions`: extractive questions about abstracts."""

from __future__ import annotations

from typing import Any

from compressor.data.builders.arxivqa import ArxivQAConfig, build_questions


def run(config: ArxivQAConfig, switches: Any) -> None:
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
