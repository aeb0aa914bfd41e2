"""What the generated parts have in common: results/, tables, names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def results(name: str) -> Any:
    """A file of results/."""
    return json.loads(_kept(name))


def log_rows(name: str) -> list[dict[str, Any]]:
    """Rows of a training log kept in results/."""
    return [json.loads(line) for line in _kept(name).splitlines()]


def _kept(name: str) -> str:
    return (ROOT / "results" / name).read_text(encoding="utf-8")


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, aligned as text too; the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    cells = [
        [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        for row in [header, *rows]
    ]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in [cells[0], rule, *cells[1:]])


FLAGSHIP = "smollm2-135m"
"""Folder of results/ and models/ with the flagship's figures and adapters."""

DATA = {"squad-dev": "SQuAD dev", "arxivqa-test": "ArxivQA cloze"}
"""Names of the data sets of question answering."""

LABELS = {
    "full": "whole passage",
    "none": "no passage",
    "full-tuned": "whole passage after a trained prefix",
    "none-tuned": "a trained prefix alone",
    "truncate": "first k tokens",
    "keywords": "keywords (YAKE)",
    "summary": "extractive summary",
    "kv": "**memory tokens (ours)**",
    "recite": "**text they regenerate (ours)**",
    "recite-tuned": "**text they regenerate, after the prefix (ours)**",
    "refined": "**text they regenerate, refined (ours)**",
    "reference-500x": "published 500x recipe",
    "icae": "ICAE",
    "anchor": "anchor tokens (SAC)",
    "mean-pool": "mean pooling",
    "sentence-embedding": "sentence embedding (xRAG)",
}


def interval(row: dict[str, Any], figure: str, decimals: int) -> str:
    value, low, high = (row[figure + end] for end in ("", "_low", "_high"))
    return f"{value:.{decimals}f} [{low:.{decimals}f}, {high:.{decimals}f}]"


def regenerated(row: dict[str, Any]) -> str:
    """ROUGE-L with its interval, and BLEU."""
    return f"{interval(row, 'rouge_l', 3)}, {row['bleu']:.1f}"
