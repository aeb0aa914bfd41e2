"""Fill the README's generated parts and the model card from results/*.json, or check that they are current.

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

import yaml

from compressor.evaluation.report import loss_curve, markdown_table

ROOT = Path(__file__).resolve().parents[1]
CARD = ROOT / "models" / "arxiv-mini" / "README.md"


def results(name: str) -> Any:
    """A file of results/."""
    return json.loads((ROOT / "results" / name).read_text())


def log_rows(name: str) -> list[dict[str, Any]]:
    """Rows of a training log kept in results/."""
    return [json.loads(line) for line in (ROOT / "results" / name).read_text().splitlines()]


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, aligned as text too; the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    cells = [
        [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        for row in [header, *rows]
    ]
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
    data = results("regeneration.json")
    return markdown_table(data["rows"], data["figures"], intervals=False)


def base() -> str:
    """The base's held-out figures."""
    data = results("base.json")
    copying = ", ".join(f"{value:.1%} at {length} tokens" for length, value in data["copying"].items())
    return (
        f"{data['parameters'] / 1e6:.1f}M parameters, {data['bits_per_byte']:.3f} bits per byte on {data['n']} unseen "
        f"abstracts of 2026; in-context copying accuracy {copying}."
    )


def mini() -> str:
    """The short run: loss at its start and end."""
    rows = log_rows("train-mini-log.jsonl")
    trained = [row for row in rows if "loss" in row]
    checked = [row for row in rows if "validation_nats_16" in row][-1]
    lengths = yaml.safe_load((ROOT / "configs" / "arxiv-mini" / "mini.yaml").read_text())["data"]["lengths"][0]
    nats = {name: checked[f"validation_nats_{name}"] for name in ("16", "4", "swapped")}
    first, last = trained[0], trained[-1]
    return (
        f"In {last['seconds'] / 60:.0f} minutes on one CPU core the training loss of a fresh compressor fell from "
        f"{first['loss']:.2f} nats a token\n(steps 1 to {first['step']}) to {last['loss']:.2f}. Unseen passages of "
        f"{lengths['low']} to {lengths['high']} tokens then cost {nats['16']:.2f} nats a token to write back\n"
        f"from 16 memory tokens, {nats['4']:.2f} from 4, and {nats['swapped']:.2f} from another passage's memory."
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


def card() -> str:
    """README.md of the bundled models."""
    log = [row for row in log_rows("regenerate-log.jsonl") if "passages" in row][-1]
    record = results("regenerate-run.json")[-1]
    recipe = yaml.safe_load((ROOT / "configs" / "arxiv-mini" / "regenerate.yaml").read_text())
    settings, training = recipe["compressor"], recipe["training"]
    return f"""---
license: apache-2.0
library_name: peft
tags: [prompt-compression]
---
# arxiv-mini: a base and its compressor

Generated by `runs/readme.py` from `results/` and `configs/arxiv-mini/`.

- **Base** (`base/`): {base()} Recipe: `configs/arxiv-mini/base.yaml`, `runs/base.sh`.
- **Compressor** (`compressor/`): {settings["memory_tokens"]} memory tokens, layout `{settings["layout"]}`,
  {settings["passage_attention"]} passage attention, LoRA rank {settings["lora_rank"]}, learning rate
  {training["learning_rate"]}; {log["step"]:,} steps, {log["passages"]:,} passages,
  {log["seconds"] / 60:.0f} minutes on one to two CPU cores. Recipe: `configs/arxiv-mini/regenerate.yaml`,
  `runs/regenerate.sh`. Package version {record["versions"]["compressor"]}, commit {record["commit"]}.
- **Data**: arXiv abstracts dated before 2026 (CC0), and SQuAD v1.1 training questions (CC BY-SA 4.0) in the base's
  mixture. Nothing dated 2026 was trained on.

Regeneration of unseen abstracts (February to April 2026), greedy:

{headline()}

Samples drawn from the base: {results("base.json")["sample"]}
"""


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
        stale = [
            str(name)
            for name, (now, then) in {path: (current, wanted), CARD: (CARD.read_text(), card())}.items()
            if now != then
        ]
        if stale:
            print(f"differs from results/: {', '.join(stale)}; run `make readme`", file=sys.stderr)
        return 1 if stale else 0
    path.write_text(wanted)
    CARD.write_text(card())
    loss_curve(
        [ROOT / "results" / "train-mini-log.jsonl", ROOT / "results" / "regenerate-log.jsonl"],
        ["short run (16-48 tokens)", "bundled model (16-500 tokens)"],
        ROOT / "results" / "loss.png",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
