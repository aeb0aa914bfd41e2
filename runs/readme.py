"""Fill the README's generated parts from results/*.json, or check that they are current.

    python runs/readme.py           rewrite README.md
    python runs/readme.py --check   exit with status 1 if README.md and results/ differ
    python runs/readme.py --snippet print the README's Python, for running it

A generated part lies between `<!-- begin: NAME -->` and `<!-- end: NAME -->`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def results(name: str) -> Any:
    """A file of results/."""
    return json.loads((ROOT / "results" / name).read_text())


def log_rows(name: str) -> list[dict[str, Any]]:
    """Rows of a training log kept in results/."""
    return [json.loads(line) for line in (ROOT / "results" / name).read_text().splitlines()]


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, aligned as text too; the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    cells = [[row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))] for row in [header, *rows]]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in [cells[0], rule, *cells[1:]])


def headline() -> str:
    """ROUGE-L by length and number of memory tokens."""
    rows = results("regeneration.json")["rows"]
    lengths = sorted({row["length"] for row in rows})
    tokens = sorted({row["tokens"] for row in rows}, reverse=True)
    by = {(row["tokens"], row["length"]): row for row in rows}
    header = ["ROUGE-L, unseen 2026 abstracts", *(f"{length} tokens" for length in lengths)]
    body = []
    for k in tokens:
        cells = [
            f"{by[k, length]['rouge_l']:.3f} [{by[k, length]['rouge_l_low']:.3f}, {by[k, length]['rouge_l_high']:.3f}]"
            for length in lengths
        ]
        body.append([f"{k} memory token{'s' * (k > 1)}", *cells])
    body.append(["n", *(str(by[tokens[0], length]["n"]) for length in lengths)])
    return table(header, body)


def details() -> str:
    """All figures of the regeneration evaluation."""
    names = {
        "bleu": ("BLEU", 1), "rouge_l": ("ROUGE-L", 3), "exact_match": ("exact", 3),
        "token_accuracy": ("token acc.", 3), "nll_per_token": ("nats/token", 3),
        "token_ratio": ("token ratio", 1), "byte_ratio": ("byte ratio", 4),
    }  # fmt: skip
    data = results("regeneration.json")
    header = ["memory tokens", "passage", "n", *(label for label, _ in names.values())]
    body = [
        [str(row["tokens"]), str(row["length"]), str(row["n"]), *(f"{row[key]:.{d}f}" for key, (_, d) in names.items())]
        for row in data["rows"]
    ]
    return table(header, body)


def base() -> str:
    """The base's held-out figures."""
    data = results("base.json")
    copying = ", ".join(f"{value:.1%} at {length} tokens" for length, value in data["copying"].items())
    return (
        f"{data['parameters'] / 1e6:.1f}M parameters, {data['bits_per_byte']:.3f} bits per byte on {data['n']} unseen 2026 "
        f"abstracts; in-context copying accuracy {copying}."
    )


def mini() -> str:
    """The ten-minute run: validation loss at its start and end."""
    rows = [row for row in log_rows("train-mini-log.jsonl") if "validation_nats_16" in row]
    seconds = [row["seconds"] for row in log_rows("train-mini-log.jsonl") if "seconds" in row][-1]
    first, last = rows[0], rows[-1]
    return (
        f"In {seconds / 60:.0f} minutes on two cores, validation loss with 16 memory tokens fell from "
        f"{first['validation_nats_16']:.2f} nats a token at step {first['step']} to {last['validation_nats_16']:.2f} at step "
        f"{last['step']} (16-48 tokens; reading another passage's memory instead: {last['validation_nats_swapped']:.2f})."
    )


def snippet() -> str:
    """What the README's Python prints; results/snippet.txt is written by running it (runs/evaluate.sh)."""
    return "```\n" + (ROOT / "results" / "snippet.txt").read_text().rstrip() + "\n```"


PARTS: dict[str, Callable[[], str]] = {
    "headline": headline,
    "snippet": snippet,
    "base": base,
    "mini": mini,
    "details": details,
}


def snippet_code() -> str:
    """The README's first Python block."""
    match = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    if match is None:
        raise SystemExit("README.md has no Python block")
    return match.group(1)


def fill(text: str) -> str:
    """README text with every generated part current."""
    for name, make in PARTS.items():
        pattern = re.compile(rf"(<!-- begin: {name} -->\n).*?(<!-- end: {name} -->)", re.S)
        if not pattern.search(text):
            raise SystemExit(f"README.md has no part <!-- begin: {name} -->")
        text = pattern.sub(lambda match, make=make: match.group(1) + make() + "\n" + match.group(2), text)
    return text


def main() -> int:
    if "--snippet" in sys.argv[1:]:
        print(snippet_code())
        return 0
    path = ROOT / "README.md"
    current = path.read_text()
    wanted = fill(current)
    if "--check" in sys.argv[1:]:
        if current != wanted:
            print("README.md differs from results/: run `make readme`", file=sys.stderr)
            return 1
        return 0
    path.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
