"""Generated parts about regeneration, training and the bundled compressors."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import yaml
from readme_shared import FLAGSHIP, ROOT, interval, log_rows, regenerated, results, table

from compressor.evaluation.report import markdown_table

REFINED_STEPS = 20
"""Gradient steps of the headline's refined memories."""

LONG, LONG_STEPS = 480, 50
"""A long passage in few memory tokens: its length and gradient steps."""

RANDOM_STEPS = (20, 50)
"""Gradient steps from random vectors that the encoder's memories are compared with."""


def headline() -> str:
    """ROUGE-L and BLEU by length and number of memory tokens, in one pass and refined."""
    rows = results("regeneration.json")["rows"]
    lengths = sorted({row["length"] for row in rows})
    tokens = sorted({row["tokens"] for row in rows}, reverse=True)
    header = ["ROUGE-L, BLEU: unseen 2026 abstracts", *(f"{length} tokens" for length in lengths)]
    body = []
    for steps in (0, REFINED_STEPS):
        rows = [row for length in lengths for row in refined_rows(steps, length)]
        by = {(row["tokens"], row["length"]): row for row in rows}
        how = f", {steps} gradient steps on them" if steps else ""
        for k in tokens:
            name = f"{k} memory token{'s' * (k > 1)}{how if k > 1 else how.replace('them', 'it')}"
            body.append([name, *(regenerated(by[k, length]) for length in lengths)])
        body.append(["n", *(str(by[tokens[0], length]["n"]) for length in lengths)])
    return table(header, body)


TRAINED_UP_TO = 192
"""Tokens of the flagship's longest passages in training; longer ones are in the table of details."""


def flagship() -> str:
    """ROUGE-L and BLEU of SmolLM2-135M-Instruct's compressor, in one pass, and what it was trained on."""
    by, tokens, lengths = flagship_rows()
    lengths = [length for length in lengths if length <= TRAINED_UP_TO]
    body = [
        [f"{k} memory token{'s' * (k > 1)}", *(regenerated(by[k, length]) for length in lengths)]
        for k in reversed(tokens)
    ]
    ends = [[row for row in rows if "passages" in row][-1] for rows in flagship_logs()]
    passages, steps, seconds = (sum(end[name] for end in ends) for name in ("passages", "step", "seconds"))
    return table(["ROUGE-L, BLEU", *(f"{length} tokens" for length in lengths)], body) + (
        f"\n\nSmolLM2-135M-Instruct, {by[tokens[0], lengths[0]]['n']} unseen abstracts of 2026 a cell, one pass, "
        "one memory each, 95% bootstrap intervals; a\nROUGE-L of 1 is every word, in its order. "
        f"Trained on {passages:,} passages in "
        f"{steps:,} steps, {seconds / 3600:.1f} hours of a CPU core or two.\nDashed and dotted in the picture: the "
        "published figures of an 8B base."
    )


STAGES = ("regenerate", "answer", "cued", "low", "again", "together", "average", "eight")


def flagship_logs() -> list[list[dict[str, Any]]]:
    """Rows of the training logs of the flagship's stages, in their order."""
    names = [f"{FLAGSHIP}/{stage}-log.jsonl" for stage in STAGES]
    return [log_rows(name) for name in names if (ROOT / "results" / name).exists()]


def flagship_stages() -> list[tuple[int, dict[tuple[int, int], dict[str, Any]]]]:
    """For the end of each stage the passages seen until then, and rows of unseen abstracts by tokens and length."""
    before = sorted(
        (ROOT / "results" / FLAGSHIP / "earlier").glob("regeneration-*.json"), key=lambda path: int(path.stem[13:])
    )
    seen = sum([row for row in rows if "passages" in row][-1]["passages"] for rows in flagship_logs())
    kept = [(int(path.stem[13:]), json.loads(path.read_text(encoding="utf-8"))["rows"]) for path in before]
    kept.append((seen, results(f"{FLAGSHIP}/regeneration.json")["rows"]))
    return [(count, {(row["tokens"], row["length"]): row for row in rows}) for count, rows in kept]


def flagship_curve() -> str:
    """What the ends of the stages say about more training."""
    stages = flagship_stages()
    keys = sorted(stages[-1][1], reverse=True)
    header = ["passages", *(f"k = {tokens}, {length}" for tokens, length in keys if length == 96)]
    body = [[f"{seen:,}", *(f"{by[key]['nll_per_token']:.2f}" for key in keys if key[1] == 96)] for seen, by in stages]
    (seen, first), (seen_last, last) = stages[0], stages[-1]
    said = []
    for key in (key for key in keys if key[1] == 96):
        power = math.log(first[key]["nll_per_token"] / last[key]["nll_per_token"]) / math.log(seen_last / seen)
        said.append(f"{last[key]['nll_per_token'] * 2**-power:.2f}")
    body.append(["twice as many", *said])
    return table(header, body) + (
        "\n\nNats a token of unseen abstracts of 96 tokens at the end of each stage. The third began at a high rate "
        "again and spent two\nin five passages on cues: it learned to answer, not to regenerate. Of the last two "
        "stages the mean of the weights is kept.\nThe last row goes on as the power of the passages between the first "
        "stage's end and the last's."
    )


def flagship_rows() -> tuple[dict[tuple[int, int], dict[str, Any]], list[int], list[int]]:
    """The flagship's rows by tokens and length, and these in rising order; not of lengths that few passages have."""
    rows = [row for row in results(f"{FLAGSHIP}/regeneration.json")["rows"] if row["n"] >= 20]
    by = {(row["tokens"], row["length"]): row for row in rows}
    tokens, lengths = (sorted({key[place] for key in by}) for place in (0, 1))
    return by, tokens, lengths


def flagship_details() -> str:
    """All figures of the flagship's regeneration."""
    data = results(f"{FLAGSHIP}/regeneration.json")
    return markdown_table(list(flagship_rows()[0].values()), data["figures"], intervals=False)


def which_k() -> str:
    """What comes back of the flagship's passages of 96 tokens for each k."""
    by, tokens, _ = flagship_rows()
    body = [
        [str(k), f"{96 / k:.0f}x", *_figures(by[k, 96], ("rouge_l", 3), ("bleu", 1), ("token_accuracy", 3))]
        for k in reversed(tokens)
    ]
    return table(["k", "fewer positions", "ROUGE-L", "BLEU", "tokens predicted right"], body)


def _figures(row: dict[str, Any], *wanted: tuple[str, int]) -> list[str]:
    return [f"{row[name]:.{decimals}f}" for name, decimals in wanted]


def bytes_kept() -> str:
    """Bytes of the flagship's memories for each byte of text."""
    by, tokens, _ = flagship_rows()
    shares = ", ".join(f"{1 / by[k, 96]['byte_ratio']:.0f} (k = {k})" for k in reversed(tokens))
    return f"Bytes of keys and values for each byte of a passage of 96 tokens on SmolLM2-135M, uncoded: {shares}."


def out_of_domain() -> str:
    """The flagship's regeneration of other text beside that of abstracts."""
    other, (by, tokens, _) = results(f"{FLAGSHIP}/out-of-domain.json")["rows"], flagship_rows()
    apart = {row["tokens"]: row for row in other if row["length"] == 96}
    body = [[f"k = {k}", regenerated(by[k, 96]), regenerated(apart[k])] for k in reversed(tokens)]
    return table(["ROUGE-L, BLEU at 96 tokens", "abstracts", "SQuAD's paragraphs"], body)


def share() -> str:
    """Trained parameters of the bundled compressors, as their cards have them."""
    lines = []
    for name in (FLAGSHIP, "arxiv-mini"):
        card = (ROOT / "models" / name / "compressor" / "README.md").read_text(encoding="utf-8")
        found = re.search(r"([\d,]+) trained parameters(, [\d.]+% of the base's)?", card)
        assert found is not None, name
        of_base = int(found[1].replace(",", "")) / results("base.json")["parameters"]  # arxiv-mini's, an older card
        share = found[2] or f", {of_base:.1%} of the base's"
        lines.append(f"- `models/{name}/compressor`: {found[1]} trained parameters{share}.")
    return "\n".join(lines)


def refined_rows(steps: int, length: int) -> list[dict[str, Any]]:
    """Rows of an evaluation of regeneration with memories refined by so many steps; 0 is the plain evaluation."""
    if not steps:
        return [row for row in results("regeneration.json")["rows"] if row["length"] == length]
    return list(results(f"refinement/{steps}-steps-{length}.json")["rows"])


def refined() -> str:
    """What the steps on a memory bring at 96 tokens, and what they cost."""
    timed = results("refinement/seconds.json")
    counts = [steps for steps in timed["steps"] if steps]
    rows = {steps: {row["tokens"]: row for row in refined_rows(steps, 96)} for steps in (0, *counts)}
    sizes = sorted(rows[0], reverse=True)
    header = ["gradient steps", "seconds", *(f"{name}, k = {k}" for k in sizes for name in ("ROUGE-L", "exact"))]
    body = []
    for steps, found in rows.items():
        cells = [cell for k in sizes for cell in (interval(found[k], "rouge_l", 3), f"{found[k]['exact_match']:.0%}")]
        body.append([str(steps), f"{timed['compress'][str(steps)]:.2f}", *cells])
    long = next(row for row in refined_rows(LONG_STEPS, LONG) if row["tokens"] == 4)
    for steps in RANDOM_STEPS:
        found = {row["tokens"]: row for row in results(f"refinement/random-{steps}-steps-96.json")["rows"]}
        cells = ["-", "-"] * len(sizes)
        for place, k in enumerate(sizes):
            if k in found:
                cells[2 * place : 2 * place + 2] = [interval(found[k], "rouge_l", 3), f"{found[k]['exact_match']:.0%}"]
        body.append([f"{steps}, from random vectors", "", *cells])
    return table(header, body) + (
        f"\n\n{rows[0][sizes[0]]['n']} unseen passages of 96 tokens ({found[sizes[-1]]['n']} from random vectors), "
        f"95% bootstrap intervals. Seconds:\nto compress one passage to {timed['tokens']} memory tokens on "
        f"{timed['threads']} CPU core; writing it back takes {timed['regenerate']:.2f}. Of {LONG} tokens, {LONG_STEPS} "
        f"steps keep a ROUGE-L of\n{interval(long, 'rouge_l', 3)} in {long['tokens']} memory tokens (n = {long['n']})."
    )


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
    lengths = yaml.safe_load((ROOT / "configs" / "arxiv-mini" / "mini.yaml").read_text(encoding="utf-8"))["data"][
        "lengths"
    ][0]
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
    return "```\n" + (ROOT / "results" / "snippet.txt").read_text(encoding="utf-8").rstrip() + "\n```"
