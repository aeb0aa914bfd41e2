"""The generated parts of README.md and docs/: each a function from results/ to Markdown, and a line in `PARTS`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from compressor.evaluation.report import markdown_table

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
            body.append([name, *(_regenerated(by[k, length]) for length in lengths)])
        body.append(["n", *(str(by[tokens[0], length]["n"]) for length in lengths)])
    return table(header, body)


FLAGSHIP = "smollm2-135m"
"""Folder of results/ and models/ with the flagship's figures and adapters."""


def flagship() -> str:
    """ROUGE-L and BLEU of SmolLM2-135M-Instruct's compressor, in one pass, and what it was trained on."""
    by, tokens, lengths = _flagship_rows()
    body = [
        [f"{k} memory token{'s' * (k > 1)}", *(_regenerated(by[k, length]) for length in lengths)]
        for k in reversed(tokens)
    ]
    ends = [[row for row in rows if "passages" in row][-1] for rows in flagship_logs()]
    passages, steps, seconds = (sum(end[name] for end in ends) for name in ("passages", "step", "seconds"))
    return table(["ROUGE-L, BLEU", *(f"{length} tokens" for length in lengths)], body) + (
        f"\n\nSmolLM2-135M-Instruct, {by[tokens[0], lengths[0]]['n']} unseen abstracts of 2026 a cell, one pass, 95% "
        f"bootstrap intervals. Trained on\n{passages:,} passages in {steps:,} steps, {seconds / 3600:.1f} hours of one "
        "CPU core. Dashed and dotted in the picture: the published\nfigures of an 8B base."
    )


def flagship_logs() -> list[list[dict[str, Any]]]:
    """Rows of the training logs of the flagship's stages, in their order."""
    names = [f"{FLAGSHIP}/{stage}-log.jsonl" for stage in ("regenerate", "answer", "cued")]
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
        "\n\nNats a token of unseen abstracts of 96 tokens at the end of each stage. The last began at a high rate "
        "again and spent two\nin five passages on cues: it learned to answer, not to regenerate. The last row goes on "
        "as the power of the passages between the\nfirst stage's end and the last's."
    )


def _flagship_rows() -> tuple[dict[tuple[int, int], dict[str, Any]], list[int], list[int]]:
    """The flagship's rows by tokens and length, and both of these in rising order."""
    by = {(row["tokens"], row["length"]): row for row in results(f"{FLAGSHIP}/regeneration.json")["rows"]}
    tokens, lengths = (sorted({key[place] for key in by}) for place in (0, 1))
    return by, tokens, lengths


def flagship_details() -> str:
    """All figures of the flagship's regeneration."""
    data = results(f"{FLAGSHIP}/regeneration.json")
    return markdown_table(data["rows"], data["figures"], intervals=False)


def which_k() -> str:
    """What comes back of the flagship's passages of 96 tokens for each k."""
    by, tokens, _ = _flagship_rows()
    body = [
        [str(k), f"{96 / k:.0f}x", *_figures(by[k, 96], ("rouge_l", 3), ("bleu", 1), ("token_accuracy", 3))]
        for k in reversed(tokens)
    ]
    return table(["k", "fewer positions", "ROUGE-L", "BLEU", "tokens predicted right"], body)


def _figures(row: dict[str, Any], *wanted: tuple[str, int]) -> list[str]:
    return [f"{row[name]:.{decimals}f}" for name, decimals in wanted]


def bytes_kept() -> str:
    """Bytes of the flagship's memories for each byte of text."""
    by, tokens, _ = _flagship_rows()
    shares = ", ".join(f"{1 / by[k, 96]['byte_ratio']:.0f} (k = {k})" for k in reversed(tokens))
    return f"Bytes of keys and values for each byte of a passage of 96 tokens on SmolLM2-135M, uncoded: {shares}."


def out_of_domain() -> str:
    """The flagship's regeneration of other text beside that of abstracts."""
    other, (by, tokens, _) = results(f"{FLAGSHIP}/out-of-domain.json")["rows"], _flagship_rows()
    apart = {row["tokens"]: row for row in other if row["length"] == 96}
    body = [[f"k = {k}", _regenerated(by[k, 96]), _regenerated(apart[k])] for k in reversed(tokens)]
    return table(["ROUGE-L, BLEU at 96 tokens", "abstracts", "SQuAD's paragraphs"], body)


def share() -> str:
    """Trained parameters of the bundled compressors, as their cards have them."""
    lines = []
    for name in (FLAGSHIP, "arxiv-mini"):
        card = (ROOT / "models" / name / "compressor" / "README.md").read_text(encoding="utf-8")
        found = re.search(r"[\d,]+ trained parameters, [\d.]+% of the base's", card)
        lines.append(f"- `models/{name}/compressor`: {found[0] if found else 'its card does not say'}.")
    return "\n".join(lines)


def qa_short() -> str:
    """Answers from memories of windows of 96 tokens between the bounds, of the flagship where it has been measured."""
    try:
        rows, base = results(f"{FLAGSHIP}/qa-windows.json")["rows"], "SmolLM2-135M-Instruct"
    except FileNotFoundError:
        rows, base = results("qa-windows.json")["rows"], "arxiv-mini, the 7M base"
    shown = {"kv": (16, 4, 1), "recite": (16,)} | dict.fromkeys(("full", "none", "full-tuned", "none-tuned"), (None,))
    body = []
    for method, sizes in shown.items():
        for k in sizes:
            mine = {row["dataset"]: row for row in rows if (row["method"], row["tokens"]) == (method, k)}
            cells = (
                [c for d in DATA for c in (_interval(mine[d], "f1", 1), _interval(mine[d], "em", 1))] if mine else []
            )
            body += [[LABELS[method], str(k or "-"), *cells]] if cells else []
    header = ["what the base reads", "k", *(f"{label} {figure}" for label in DATA.values() for figure in ("F1", "EM"))]
    n = {row["dataset"]: row["n"] for row in rows}
    counts = " and ".join(f"{n[name]} questions of {label}" for name, label in DATA.items())
    return f"{table(header, body)}\n\n{base}; {counts}; F1 and exact match, 95% bootstrap intervals."


REFINED_STEPS = 20
"""Gradient steps of the headline's refined memories."""


LONG, LONG_STEPS = 480, 50
"""A long passage in few memory tokens: its length and gradient steps."""
RANDOM_STEPS = (20, 50)
"""Gradient steps from random vectors that the encoder's memories are compared with."""


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
        cells = [cell for k in sizes for cell in (_interval(found[k], "rouge_l", 3), f"{found[k]['exact_match']:.0%}")]
        body.append([str(steps), f"{timed['compress'][str(steps)]:.2f}", *cells])
    long = next(row for row in refined_rows(LONG_STEPS, LONG) if row["tokens"] == 4)
    for steps in RANDOM_STEPS:
        found = {row["tokens"]: row for row in results(f"refinement/random-{steps}-steps-96.json")["rows"]}
        cells = ["-", "-"] * len(sizes)
        for place, k in enumerate(sizes):
            if k in found:
                cells[2 * place : 2 * place + 2] = [_interval(found[k], "rouge_l", 3), f"{found[k]['exact_match']:.0%}"]
        body.append([f"{steps}, from random vectors", "", *cells])
    return table(header, body) + (
        f"\n\n{rows[0][sizes[0]]['n']} unseen passages of 96 tokens ({found[sizes[-1]]['n']} from random vectors), "
        f"95% bootstrap intervals. Seconds:\nto compress one passage to {timed['tokens']} memory tokens on "
        f"{timed['threads']} CPU core; writing it back takes {timed['regenerate']:.2f}. Of {LONG} tokens, {LONG_STEPS} "
        f"steps keep a ROUGE-L of\n{_interval(long, 'rouge_l', 3)} in {long['tokens']} memory tokens (n = {long['n']})."
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
    "refined": "**text they regenerate, refined (ours)**",
    "reference-500x": "published 500x recipe",
    "icae": "ICAE",
    "anchor": "anchor tokens (SAC)",
    "mean-pool": "mean pooling",
    "sentence-embedding": "sentence embedding (xRAG)",
}


def _interval(row: dict[str, Any], figure: str, decimals: int) -> str:
    value, low, high = (row[figure + end] for end in ("", "_low", "_high"))
    return f"{value:.{decimals}f} [{low:.{decimals}f}, {high:.{decimals}f}]"


def _regenerated(row: dict[str, Any]) -> str:
    """ROUGE-L with its interval, and BLEU."""
    return f"{_interval(row, 'rouge_l', 3)}, {row['bleu']:.1f}"


ANSWERED = ("F1", "EM", "nats")
"""What tables show of the answers to each data set."""
YARDSTICKS = {
    "F1 / full": "retention_f1",
    "EM / full": "retention_em",
    "(F1 - none) / (full - none)": "normalised_f1",
    "nats kept": "normalised_nats",
    "F1 / full (tuned)": "retention_f1_tuned",
    "EM / full (tuned)": "retention_em_tuned",
    "(F1 - none) / (full - none) (tuned)": "normalised_f1_tuned",
    "nats kept (tuned)": "normalised_nats_tuned",
}
"""Both yardsticks of answers over all data sets: share of the whole passage's score, and of what it adds to none.
Columns that no row has are left out."""


def _answered(rows: list[dict[str, Any]]) -> list[str]:
    """What `ANSWERED` names of one method at one size, for each data set."""
    by = {row["dataset"]: row for row in rows}
    return [
        cell
        for name in DATA
        for cell in (_interval(by[name], "f1", 1), f"{by[name]['em']:.1f}", f"{by[name]['answer_nats']:.2f}")
    ]


def _questions(rows: list[dict[str, Any]]) -> str:
    """Methods and sizes of an evaluation of question answering."""
    header = ["what the base reads", "k", "ratio"]
    header += [f"{name} {figure}" for name in DATA.values() for figure in ANSWERED]
    yardsticks = {label: name for label, name in YARDSTICKS.items() if any(row.get(name) is not None for row in rows)}
    header += list(yardsticks)
    body = []
    for method, tokens in dict.fromkeys((row["method"], row["tokens"]) for row in rows):
        mine = [row for row in rows if (row["method"], row["tokens"]) == (method, tokens)]
        macro = next(row for row in mine if row["dataset"] == "macro")
        ratio = f"{macro['token_ratio']:.0f}x" if macro["token_ratio"] else "-"
        shares = ["-" if macro.get(name) is None else f"{macro[name]:.2f}" for name in yardsticks.values()]
        body.append([LABELS[method], "-" if tokens is None else str(tokens), ratio, *_answered(mine), *shares])
    n = {row["dataset"]: row["n"] for row in rows}
    counts = ", ".join(f"{n[name]} questions of {label}" for name, label in DATA.items())
    return f"{table(header, body)}\n\n{counts}; 95% bootstrap intervals."


def qa() -> str:
    """Questions about windows of 96 tokens, from memories, beside the bounds and hard prompts."""
    return _questions([*results("qa-windows.json")["rows"], *_refined_answers("windows")])


def _refined_answers(name: str) -> list[dict[str, Any]]:
    """Rows of answers from what refined memories regenerate."""
    rows = results(f"refinement/qa-{name}.json")["rows"]
    return [row | {"method": "refined"} for row in rows if row["method"] == "recite"]


def qa_whole() -> str:
    """Questions about whole contexts, from one memory each and from one for each 96 tokens."""
    rows = results("qa.json")["rows"]
    apart = [
        row | {"tokens": f"{row['tokens']} for each 96"}
        for row in results("qa-segments.json")["rows"]
        if row["method"] in ("kv", "recite") and row["tokens"] in (16, 4)
    ]
    chosen = [row for row in rows if row["method"] in ("kv", "full", "none") or row["tokens"] == 16]
    return _questions([*chosen, *apart, *_refined_answers("whole")])


def studies() -> str:
    """What the memory tokens do and what they save, in the words of the studies' notes."""
    used = next(
        note for note in results("utilisation.json")["notes"] if note.startswith("regeneration") and "claim" in note
    )
    return f"- Use: {used}\n- Savings: {results('efficiency.json')['notes'][2]}"


def compared() -> str:
    """Every trained method after the same training."""
    written, answered = results("methods-regeneration.json")["rows"], results("methods-qa.json")["rows"]
    stepped = {(row["method"], row["tokens"]): row for row in results("methods-refined.json")["rows"]}
    header = ["method", "k", "passages", "minutes", "ROUGE-L 48", "ROUGE-L 96", "10 steps", "nats/token 96"]
    header += [f"{name} {figure}" for name in DATA.values() for figure in ANSWERED]
    body = []
    for method, tokens in dict.fromkeys((row["method"], row["tokens"]) for row in written):
        by = {row["length"]: row for row in written if (row["method"], row["tokens"]) == (method, tokens)}
        mine = [row for row in answered if (row["method"], row["tokens"]) == (method, tokens)]
        ends = [
            [row for row in log_rows(f"methods/{method}-{stage}.jsonl") if "passages" in row][-1]
            for stage in ("regenerate", "answer")
        ]
        cells = [f"{sum(end['passages'] for end in ends):,}", f"{sum(end['seconds'] for end in ends) / 60:.0f}"]
        cells += [_interval(row, "rouge_l", 3) for row in (by[48], by[96], stepped[method, tokens])]
        body.append(
            [LABELS.get(method, method), str(tokens), *cells, f"{by[96]['nll_per_token']:.2f}", *_answered(mine)]
        )
    n = {row["dataset"]: row["n"] for row in answered}
    return table(header, body) + (
        f"\n\nRegeneration of {written[0]['n']} unseen abstracts cut to 48 and 96 tokens, of 96 also after 10 gradient "
        f"steps on each memory;\n{n['squad-dev']} and {n['arxivqa-test']} questions; 95% bootstrap intervals."
    )


def flagship_compared() -> str:
    """Methods on the flagship's base after the same short training."""
    written, answered = (results(f"{FLAGSHIP}/methods{end}.json")["rows"] for end in ("-regeneration", ""))
    body = []
    for row, asked in zip(written, (one for one in answered if one["tokens"] is not None), strict=True):
        method = row["method"]
        assert (method, row["tokens"]) == (asked["method"], asked["tokens"])
        end = [one for one in log_rows(f"{FLAGSHIP}/methods/{method}.jsonl") if "passages" in one][-1]
        cells = [str(row["tokens"]), f"{end['passages']:,}", f"{end['seconds'] / 60:.0f}", _interval(row, "rouge_l", 3)]
        cells += [f"{row['nll_per_token']:.2f}", _interval(asked, "f1", 1), f"{asked['answer_nats']:.2f}"]
        body.append([LABELS.get(method, method), *cells])
    header = ["method", "k", "passages", "minutes", "ROUGE-L 48", "nats/token 48", "SQuAD dev F1", "nats/answer"]
    return table(header, body) + (
        f"\n\n{written[0]['n']} unseen abstracts cut to 48 tokens, {answered[0]['n']} questions about windows of 72; "
        "95% bootstrap intervals."
    )


def refined_answers() -> str:
    """What gradient steps do to answers, without and with what keeps them."""
    data = results(f"{FLAGSHIP}/refined-answers.json")
    body = []
    for row in data["rows"]:
        how = "one pass" if not row["steps"] else f"{row['steps']} steps" + (", answers kept" if row["keep"] else "")
        cells = [_interval(row, name, d) for name, d in (("f1", 1), ("answer_nats", 2), ("rouge_l", 3))]
        cells += [f"{row['nats_per_token']:.2f}", f"{row['seconds_a_passage']:.1f}"]
        body.append([how, str(row["tokens"]), *cells])
    header = ["memory", "k", "F1", "nats/answer token", "ROUGE-L", "nats/token", "seconds"]
    first = data["rows"][0]
    return table(header, body) + (
        f"\n\nSmolLM2-135M-Instruct's compressor, {first['questions']} questions about {first['passages']} windows of "
        f"{data['length']} tokens; 95% bootstrap intervals;\nprocessor seconds a window."
    )


def interference() -> str:
    """What a memory does to questions that have nothing to do with it."""
    rows = results(f"{FLAGSHIP}/interference.json")["rows"]
    names = (("answer_nats", 2), ("nats_added", 2), ("f1", 1), ("agreement", 1))
    body = [
        [LABELS[row["method"]], "-" if row["tokens"] is None else str(row["tokens"])]
        + [_interval(row, name, decimals) for name, decimals in names]
        for row in rows
    ]
    return table(["in the context", "k", "nats/answer", "+ nats", "F1", "agreement"], body) + (
        f"\n\n{rows[0]['n']} questions of SQuAD dev after memories of other contexts; 95% bootstrap intervals."
    )


def _speed(kilobytes: float) -> str:
    return f"{kilobytes:,.1f}" if kilobytes >= 1 else f"{kilobytes:.2g}"


def lossless(name: str = "lossless.json") -> str:
    """Lossless packing against general-purpose tools."""
    data = results(name)
    header = ["text", "n", "bytes", "pack (bits/byte)", "zstd -19", "best other", "smaller than the best other"]
    header += ["zpaq -m5", "pack, unpack (kB/s)"]
    body = []
    for name, found in data["sets"].items():
        packers = found["packers"]
        ours = packers["compressor pack"]
        best = ours["best_other"]
        body.append(
            [
                name,
                str(found["n"]),
                f"{found['bytes']:,}",
                f"{ours['bits_per_byte']:.2f}",
                f"{packers['zstd -19']['bits_per_byte']:.2f}",
                f"{packers[best]['bits_per_byte']:.2f} ({best})",
                f"{round(ours['smaller_than_best_other'], 2) + 0.0:.0%}",
                f"{packers['zpaq -m5']['bits_per_byte']:.2f}" if "zpaq -m5" in packers else "-",
                f"{_speed(ours['kilobytes_per_second'])}, {_speed(ours['unpack_kilobytes_per_second'])}",
            ]
        )
    return table(header, body) + f"\n\nThe model's {data['model_bytes'] / 1e6:.0f} MB are not counted."


CODECS = (
    *("float32", "bf16", "int8+ans, calibrated", "int4", "int4+ans, calibrated", "int3+ans, calibrated"),
    *("int2+ans, calibrated", "lowrank:0.3", "lowrank:0.15", "lowrank:0.1", "lowrank:0.07", "lowrank:0.04"),
)
"""Codecs of the table; results/codecs.json has more."""


def codecs() -> str:
    """Memory codecs: rate against ROUGE-L."""
    data = results("codecs.json")
    header = ["codec", "bits/value", "bytes of file", "bytes/byte of text", "ROUGE-L", "loss relative to float32"]
    rows = [row for row in data["rows"] if (row["length"], row["tokens"]) == (96, 16) and row["codec"] in CODECS]
    body = [
        [
            row["codec"],
            f"{row['bits_per_value']:.2f}",
            f"{row['bytes']:,.0f}",
            f"{row['bytes_per_passage_byte']:.1f}",
            f"{row['rouge_l']:.3f}",
            f"{row['relative_loss']:.1%} [{row['relative_loss_low']:.1%}, {row['relative_loss_high']:.1%}]",
        ]
        for row in rows
    ]
    return table(header, body) + (
        f"\n\n{rows[0]['n']} unseen passages of 96 tokens in 16 memory tokens; 95% bootstrap intervals; more "
        "codecs, and 4 memory tokens, in `results/codecs.json`."
    )


TASKS = {
    "continuation": ("the text after the passage", "nats/token ↓", "nll_per_token", 2),
    "retrieve": ("the passage a title belongs to", "MRR ↑", "mrr", 3),
}
PRESETS = {
    "summarise": ("one-sentence summary (SciTLDR)", "ROUGE-L ↑", "rouge_l", 3),
    "entities": ("names in a paragraph (SQuAD, silver labels)", "set F1 ↑", "list_f1", 1),
    "roles": ("role of a sentence (CSAbstruct)", "accuracy ↑", "accuracy", 1),
    "sentiment": ("sentiment (SST-2)", "AUC ↑", "auc", 3),
    "paraphrase": ("whether two sentences agree (MRPC)", "AUC ↑", "auc", 3),
    "translate": ("English into French (shipped sentences)", "chrF ↑", "chrf", 1),
}
"""What is asked for, the figure shown, its column and decimals."""
READINGS = {
    "no passage": ("none", None),
    "memory, k = 1": ("kv", 1),
    "k = 4": ("kv", 4),
    "k = 16": ("kv", 16),
    "recited, k = 16": ("recite", 16),
    "whole passage": ("full", None),
}


def _tasks(shown: dict[str, tuple[str, str, str, int]], found: Callable[[str], Any]) -> str:
    """A row a task, from nothing, from memories and from the whole passage."""
    body = []
    for name, (label, figure, column, decimals) in shown.items():
        if (metrics := found(name)) is not None:
            rows = {(row["method"], row["tokens"]): row for row in metrics["rows"]}
            chosen = [rows[cell] for cell in READINGS.values()]
            body.append([label, str(chosen[0]["n"]), figure, *(_interval(row, column, decimals) for row in chosen)])
    return table(["task", "n", "figure", *READINGS], body)


def tasks() -> str:
    """Tasks that are no instructions, on arxiv-mini."""
    return _tasks(TASKS, lambda name: results(f"tasks/{name}.json"))


def prompted() -> str:
    """Tasks that are instructions, on SmolLM2, and where the whole passage does not help."""
    if not (ROOT / "results" / "tasks.json").exists():
        return "Not measured yet: `runs/tasks.sh FOLDER`."
    found = results("tasks.json")
    useless = [
        PRESETS[name][0]
        for name, metrics in found.items()
        if name in PRESETS and any("not better than reading none" in note for note in metrics["notes"])
    ]
    said = f"The whole passage is not better than none for certain in: {'; '.join(useless)}." if useless else ""
    return f"{_tasks(PRESETS, found.get)}\n\n{said}".rstrip()


def sent() -> str:
    """A text sent in several ways: bytes, and what comes back."""
    if not (ROOT / "results" / "sent.json").exists():
        return "Not measured yet: `python runs/sent.py`."
    found = results("sent.json")
    body = [
        [row["way"], f"{row['bytes']:,}", f"{row['rouge_1']:.2f}", f"{row['rouge_l']:.2f}", row["text"][:160].strip()]
        for row in found["rows"]
    ]
    shown = table(["what is sent", "bytes", "ROUGE-1", "ROUGE-L", "what comes back begins with"], body)
    return f"One abstract of {found['bytes']:,} bytes (`runs/sent.py`): an illustration, no measurement.\n\n{shown}"


def serving() -> str:
    """Time to first token and throughput of vLLM, from memories and from text."""
    found = results("benchmark-serving.json")
    ways = ("memories", "memories, no prefix cache", "passages", "passages, no prefix cache")
    cells = {(row["passages"], row["length"], row["clients"], row["way"]): row for row in found["rows"]}
    header = ["first token, s (requests/s)", "clients", *ways, "text / memory", "no cache"]
    body = []
    for count, length, clients in sorted({key[:3] for key in cells}):
        if any((count, length, clients, way) not in cells for way in ways):
            continue  # the budget was spent in the middle of it
        rows = [cells[count, length, clients, way] for way in ways]
        shown = [f"{row['first_token']:.2f} ({row['per_second']:.2f})" for row in rows]
        ratios = [f"{rows[place + 2]['first_token'] / rows[place]['first_token']:.1f}x" for place in (0, 1)]
        positions = f"{count} x {length} tokens: {rows[0]['positions']} positions, not {rows[2]['positions']}"
        body.append([positions, str(clients), *shown, *ratios])
    machine, settings = found["machine"], found["settings"]
    asked = sorted(row["requests"] for row in found["rows"])
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    cores = f"{machine['cores_used']} core{'s' * (machine['cores_used'] > 1)}"
    busy = f", which had other work, too (load {machine['load_before']:.0f}): the ratios count, not the seconds"
    return table(header, body) + (
        f"\n\n{settings['checkpoint']}, float32; medians of the {asked[0]} to {asked[-1]} requests of a cell; server "
        f"and clients together\non {cores}{busy if machine['load_before'] > machine['cores_used'] else ''}. {versions}."
    )


def _store(part: str) -> dict[str, Any]:
    """What runs/store.sh measured, or nothing where it has not measured this part."""
    try:
        found = results(f"{FLAGSHIP}/store.json")
    except FileNotFoundError:
        return {}
    return found if part in found else {}


def store_together() -> str:
    """Answers from several memories in one context, from their passages as text, and from what memories give back."""
    if not (found := _store("together")):
        return "Not measured yet: `runs/store.sh DATA`."
    readings = {"memories": "memories", "recited": "text they regenerate", "texts": "the passages as text"}
    seconds = {row["count"]: row for row in found.get("first_token", [])}
    body = []
    for row in found["together"]:
        name = readings.get(row["read"], "nothing")
        others = {"random": ", others at random", "similar": ", similar others"}.get(row["others"], "")
        nats = f"{row['nats']:.2f}" if "nats" in row and row["read"] != "texts" else "-"
        first = seconds.get(row["count"], {}).get(f"{row['read']}_seconds")
        cells = [_interval(row, "f1", 1), f"{row['em']:.1f}", nats, f"{row['positions']:.0f}"]
        label = f"{name}, {row['count']}{others}" if row["count"] else name
        body.append([label, *cells, f"{first:.2f}" if first else "-"])
    ways = {(row["template"], row["suffix"]): row for row in found["asking_texts"]}
    best = max(ways, key=lambda way: ways[way]["f1"])
    asked = (
        "the compressor's own prompt"
        if best[0] != "chat"
        else f"the base's chat template{', briefly' if best[1] else ''}"
    )
    back = ""
    if "recite_seconds_a_passage" in found:
        back = f" Writing a passage back takes {found['recite_seconds_a_passage']:.1f} s."
    header = ["what the base reads, how many passages", "F1", "EM", "nats/answer", "positions", "first token, s"]
    return table(header, body) + (
        f"\n\nSmolLM2-135M-Instruct, {found['together'][0]['n']} questions of NaturalQuestions dev and SQuAD dev "
        f"about paragraphs of at most {found['settings']['longest']} tokens;\n95% bootstrap intervals; the right "
        f"passage at a random place; similar ones are found by the question's words. Texts are asked by\n{asked}, "
        f"which answers better from one.{back} Seconds are of one core's time, in bfloat16."
    )


def store_codecs() -> str:
    """Bytes of a passage in a store, and answers, for each codec."""
    if not (found := _store("codecs")):
        return "Not measured yet: `runs/store.sh DATA`."
    rows = found["codecs"]
    body = [
        [row["codec"], f"{row['bytes_a_passage']:,.0f}", _interval(row, "f1", 1), f"{row['nats']:.2f}"] for row in rows
    ]
    return table(["codec", "bytes a passage", "F1", "nats/answer"], body) + (
        f"\n\nThe questions of the table below, each read from its own passage's memory; a text has "
        f"{rows[0]['text_bytes_a_passage']:,.0f} bytes; low rank is fitted on {found['fitted_on']} other paragraphs."
    )


def store_found() -> str:
    """Recall of the index, and what 10,000 passages take."""
    lines = []
    if found := _store("recall"):
        header = ["questions", "found by", "n", *(f"recall@{top}" for top in (1, 2, 4, 8))]
        names = {"squad_v1.1": "SQuAD dev", "nq_open_oracle": "NaturalQuestions dev"}
        ways = {"vectors": "all-MiniLM-L6-v2", "words": "words (BM25)"}
        body = [
            [names.get(row["data"], row["data"]), ways[row["way"]], f"{row['questions']:,}"]
            + [f"{row[f'recall_at_{top}']:.1%}" for top in (1, 2, 4, 8)]
            for row in found["recall"]
        ]
        lines += [table(header, body), f"\nAmong {found['recall'][0]['passages']:,} paragraphs, the index alone."]
    if found := _store("indexing"):
        one, more = found["indexing"], found["indexing"]["extrapolated_to_10000"]
        lines += [
            f"\n{one['passages']} paragraphs ({one['tokens_a_passage']:.0f} tokens each) took "
            f"{one['processor_seconds_a_passage']:.2f} s of one core's time each on SmolLM2-135M, with the share that "
            f"comes back measured {one['processor_seconds_a_passage_measured']:.2f} s ({one['passages_measured']} of "
            f"them), and\n{one['bytes_a_passage']:,.0f} bytes on the disk (`{one['codec']}`, vectors included). "
            f"Extrapolated, not run: 10,000 such passages take {more['processor_hours']:.1f} hours of one core "
            f"({more['processor_hours_measured']:.1f} measured)\nand {more['bytes'] / 1e6:,.0f} MB."
        ]
    return "\n".join(lines) or "Not measured yet: `runs/store.sh DATA`."


def decoding() -> str:
    """Tokens a second against batch size, and how often the batch-1 loop's."""
    rows = results("benchmark-decoding.json")["rows"]
    names = list(dict.fromkeys((row["base"], row["dtype"]) for row in rows))
    sizes = sorted({row["batch"] for row in rows})
    found = {(row["base"], row["variant"], row["batch"]): row for row in rows}
    body = []
    for base, dtype in names:
        for variant in ("batch-1 loop", "generate", "ours"):
            of_size = [found.get((base, variant, size)) for size in sizes]
            shown = [f"{one['tokens_per_second']:,.0f} ({one['times_loop']:.1f}x)" if one else "" for one in of_size]
            body.append([f"{Path(base).parent.name or base}, {dtype}", variant, *shown])
    return table(["base", "", *(f"{size} row{'s' * (size > 1)}" for size in sizes)], body)


PARTS: dict[str, Callable[[], str]] = {
    "decoding": decoding,
    "headline": headline,
    "flagship": flagship,
    "flagship-details": flagship_details,
    "flagship-curve": flagship_curve,
    "qa-short": qa_short,
    "which-k": which_k,
    "bytes": bytes_kept,
    "out-of-domain": out_of_domain,
    "share": share,
    "snippet": snippet,
    "base": base,
    "mini": mini,
    "details": details,
    "refined": refined,
    "qa": qa,
    "qa-whole": qa_whole,
    "methods": compared,
    "studies": studies,
    "lossless": lossless,
    "lossless-flagship": partial(lossless, f"{FLAGSHIP}/lossless.json"),
    "methods-flagship": flagship_compared,
    "refined-answers": refined_answers,
    "interference": interference,
    "codecs": codecs,
    "tasks": tasks,
    "prompted": prompted,
    "sent": sent,
    "serving": serving,
    "store-together": store_together,
    "store-codecs": store_codecs,
    "store-found": store_found,
}
