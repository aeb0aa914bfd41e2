"""`compressor entities`: instructions that ask for the names in texts."""

from __future__ import annotations

from typing import Any

from compressor.data.builders.entities import EntitiesConfig, build_entities


def run(config: EntitiesConfig, switches: Any) -> None:
    """Make them, and say how many of each kind."""
    counts = build_entities(config)
    print(f"{', '.join(f'{count:,} about {kind}' for kind, count in counts.items())}: {config.output}")
