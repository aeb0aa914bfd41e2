"""Generated parts about questions, tasks and the comparison of methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from readme_shared import DATA, FLAGSHIP, LABELS, ROOT, interval, log_rows, results, table

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


def qa_short() -> str:
    """Answers from memories of windows of 96 tokens between the bounds, of the flagship where it has been measured."""
    try:
        rows, base = results(f"{FLAGSHIP}/qa-windows.json")["rows"], "SmolLM2-135M-Instruct"
    except FileNotFoundError:
        rows, base = results("qa-windows.json")["rows"], "arxiv-mini, the 7M base"
    shown: dict[str, tuple[int | None, ...]] = {"kv": (16, 4, 1), "recite-tuned": (16, 4), "recite": (16,)}
    shown |= dict.fromkeys(("full", "none", "full-tuned", "none-tuned"), (None,))
    body = []
    for method, sizes in shown.items():
        for k in sizes:
            mine = {row["dataset"]: row for row in rows if (row["method"], row["tokens"]) == (method, k)}
            cells = [c for d in DATA for c in (interval(mine[d], "f1", 1), interval(mine[d], "em", 1))] if mine else []
            body += [[LABELS[method], str(k or "-"), *cells]] if cells else []
    header = ["what the base reads", "k", *(f"{label} {figure}" for label in DATA.values() for figure in ("F1", "EM"))]
    n = {row["dataset"]: row["n"] for row in rows}
    counts = " and ".join(f"{n[name]} questions of {label}" for name, label in DATA.items())
    said = f"{table(header, body)}\n\n{base}; {counts}; F1 and exact match, 95% bootstrap intervals."
    f1 = {(row["method"], row["tokens"], row["dataset"]): row["f1"] for row in rows}
    if ("full-tuned", None, next(iter(DATA))) in f1:
        kept = {}
        for way in ("kv", "recite-tuned"):
            shares = []
            for name, label in DATA.items() if (way, 16, next(iter(DATA))) in f1 else ():
                of = ((way, 16), ("full-tuned", None), ("none-tuned", None))
                ours, high, low = (f1[method, tokens, name] for method, tokens in of)
                shares.append(f"{(ours - low) / (high - low):.0%} ({label})")
            kept[way] = " and ".join(shares)
        said += f"\nOf the F1 between the two trained prefixes, 16 memory tokens keep {kept['kv']}"
        said += f",\nthe text that they regenerate {kept['recite-tuned']}." if kept["recite-tuned"] else "."
    if (ROOT / "results" / FLAGSHIP / "qa-sets.json").exists():
        shares = [f"{_kept_of_sets('kv', k):.0%} (k = {k})" for k in (16, 4, 1)]
        said += (
            f"\nOn sets that nothing was trained on ([NaturalQuestions, SleepQA, PolicyQA]({SETS_PAGE})) memories keep"
        )
        said += f"\n{', '.join(shares)} of it on average, of some 40 questions each."
    return said


SETS_PAGE = "docs/evaluating.md#sets-that-nothing-was-trained-on"
SETS = {"nq-dev": "NaturalQuestions", "sleepqa-test": "SleepQA", "policyqa-test": "PolicyQA"}
"""Sets of which no part was trained on, and of which windows hold the answers."""


def _kept_of_sets(method: str, tokens: int | None) -> float:
    """Mean over `SETS` of the share of F1 between the trained bounds."""
    rows = results(f"{FLAGSHIP}/qa-sets.json")["rows"]
    mine = [row for row in rows if (row["method"], row["tokens"]) == (method, tokens) and row["dataset"] in SETS]
    return sum(row["normalised_f1_tuned"] for row in mine) / len(mine)


def qa_sets() -> str:
    """Questions of sets that nothing was trained on, about windows, between the trained bounds."""
    rows = results(f"{FLAGSHIP}/qa-sets.json")["rows"]
    header = ["what the base reads", "k", *(f"{label} {one}" for label in SETS.values() for one in ("F1", "EM"))]
    body = []
    for method, k in dict.fromkeys((row["method"], row["tokens"]) for row in rows):
        by = {row["dataset"]: row for row in rows if (row["method"], row["tokens"]) == (method, k)}
        cells = [cell for name in SETS for cell in (interval(by[name], "f1", 1), f"{by[name]['em']:.1f}")]
        body.append([LABELS[method], str(k or "-"), *cells, f"{_kept_of_sets(method, k):.2f}"])
    n = {row["dataset"]: row["n"] for row in rows}
    counts = ", ".join(f"{n[name]} of {label}" for name, label in SETS.items())
    said = f"Questions: {counts}; 95% bootstrap intervals."
    return f"{table([*header, 'mean share of F1 between the bounds'], body)}\n\n{said}"


def qa_contexts() -> str:
    """The same about whole contexts: one memory each, and one for each 96 tokens."""
    names = {"squad-dev": "SQuAD dev", "nq-dev": "NaturalQuestions", "pubmedqa": "PubMedQA"}
    whole, apart = (results(f"{FLAGSHIP}/qa-{part}.json")["rows"] for part in ("whole", "segments"))
    shown = [("kv", "16", whole), ("kv", "16 for each 96", apart)]
    shown += [(bound, "-", whole) for bound in ("full-tuned", "none-tuned")]
    body = []
    for method, k, rows in shown:
        by = {row["dataset"]: row for row in rows if row["method"] == method}
        cells = [cell for name in names for cell in (interval(by[name], "f1", 1), f"{by[name]['em']:.1f}")]
        body.append([LABELS[method], k, *cells])
    header = ["what the base reads", "k", *(f"{label} {one}" for label in names.values() for one in ("F1", "EM"))]
    n = {row["dataset"]: row["n"] for row in whole}
    counts = ", ".join(f"{n[name]} of {label}" for name, label in names.items())
    return f"{table(header, body)}\n\nQuestions: {counts}; 95% bootstrap intervals."


def _answered(rows: list[dict[str, Any]]) -> list[str]:
    """What `ANSWERED` names of one method at one size, for each data set."""
    by = {row["dataset"]: row for row in rows}
    return [
        cell
        for name in DATA
        for cell in (interval(by[name], "f1", 1), f"{by[name]['em']:.1f}", f"{by[name]['answer_nats']:.2f}")
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
        note
        for note in results(f"{FLAGSHIP}/utilisation.json")["notes"]
        if note.startswith("regeneration") and "claim" in note
    )
    return f"- Use: {used}\n- Savings: {results(f'{FLAGSHIP}/efficiency.json')['notes'][2]}"


PROMPTS = {
    "new": "neither: read, or compressed",
    "reused": "its cache, or its memory",
    "reread": "its memory alone",
}
"""What of a passage is there already when it is asked about."""


def savings() -> str:
    """What memories of 500 tokens save of the whole passage, 100 tokens written."""
    found = results(f"{FLAGSHIP}/efficiency.json")
    rows = [row for row in found["rows"] if row["new_tokens"] == min(one["new_tokens"] for one in found["rows"])]
    percent = ("pairs_saved", "kv_saved", "flops_saved", "time_saved")
    body = []
    for row in rows:
        sooner = f"{row['first_token_speedup']:.1f}x"
        body.append([PROMPTS[row["prompt"]], str(row["tokens"]), sooner, *(f"{row[name]:.0f}%" for name in percent)])
    header = ["what is there already", "k", "first token sooner", "query-key pairs saved", "KV bytes", "FLOPs", "time"]
    said = (
        f"{rows[0]['length']} tokens read, {rows[0]['new_tokens']} written, by one thread; medians of {rows[0]['n']}."
    )
    return f"{table(header, body)}\n\nSmolLM2-135M-Instruct, {said}"


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
        cells += [interval(row, "rouge_l", 3) for row in (by[48], by[96], stepped[method, tokens])]
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
        cells = [str(row["tokens"]), f"{end['passages']:,}", f"{end['seconds'] / 60:.0f}", interval(row, "rouge_l", 3)]
        cells += [f"{row['nll_per_token']:.2f}", interval(asked, "f1", 1), f"{asked['answer_nats']:.2f}"]
        body.append([LABELS.get(method, method), *cells])
    header = ["method", "k", "passages", "minutes", "ROUGE-L 48", "nats/token 48", "SQuAD dev F1", "nats/answer"]
    return table(header, body) + (
        f"\n\n{written[0]['n']} unseen abstracts cut to 48 tokens, {answered[0]['n']} questions about windows of 72; "
        "95% bootstrap intervals."
    )


def flagship_compared_sets() -> str:
    """The same training's memories and ICAE's on sets that nothing was trained on."""
    rows = results(f"{FLAGSHIP}/methods-qa-sets.json")["rows"]
    body = []
    for method, k in dict.fromkeys((row["method"], row["tokens"]) for row in rows):
        by = {row["dataset"]: row for row in rows if (row["method"], row["tokens"]) == (method, k)}
        cells = [(interval(by[one], "f1", 1), f"{by[one]['em']:.1f}", f"{by[one]['answer_nats']:.1f}") for one in SETS]
        body.append([LABELS.get(method, method), str(k), *(cell for three in cells for cell in three)])
    header = ["method", "k", *(f"{label} {one}" for label in SETS.values() for one in ("F1", "EM", "nats"))]
    return table(header, body)


def refined_answers() -> str:
    """What gradient steps do to answers, without and with what keeps them."""
    data = results(f"{FLAGSHIP}/refined-answers.json")
    body = []
    for row in data["rows"]:
        how = "one pass" if not row["steps"] else f"{row['steps']} steps" + (", answers kept" if row["keep"] else "")
        cells = [interval(row, name, d) for name, d in (("f1", 1), ("answer_nats", 2), ("rouge_l", 3))]
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
        + [interval(row, name, decimals) for name, decimals in names]
        for row in rows
    ]
    return table(["in the context", "k", "nats/answer", "+ nats", "F1", "agreement"], body) + (
        f"\n\n{rows[0]['n']} questions of SQuAD dev after memories of other contexts; 95% bootstrap intervals."
    )


TASKS = {
    "continuation": ("the text after the passage", "nats/token ↓", "nll_per_token", 2),
    "retrieve": ("the passage a title belongs to", "MRR ↑", "mrr", 3),
}

PRESETS = {
    "summarise": ("one-sentence summary (SciTLDR)", "ROUGE-L ↑", "rouge_l", 3),
    "entities": ("names in a paragraph (SQuAD, silver labels)", "set F1 ↑", "list_f1", 1),
    "asked": ("the same, of answers that people gave", "recall ↑", "list_recall", 1),
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
TUNED = READINGS | {
    "recited, k = 16": ("recite-tuned", 16),
    "whole passage, after the prefix": ("full-tuned", None),
    "the prefix alone": ("none-tuned", None),
}
"""The same on a base whose texts are read after a trained prefix."""


def _tasks(shown: dict[str, tuple[str, str, str, int]], found: Callable[[str], Any], read: dict[str, Any]) -> str:
    """A row a task, from nothing, from memories and from the whole passage."""
    body = []
    for name, (label, figure, column, decimals) in shown.items():
        if (metrics := found(name)) is not None:
            rows = {(row["method"], row["tokens"]): row for row in metrics["rows"]}
            chosen = [rows.get(cell) for cell in read.values()]
            shown_as = ["-" if row is None else interval(row, column, decimals) for row in chosen]
            body.append([label, str(metrics["rows"][0]["n"]), figure, *shown_as])
    return table(["task", "n", "figure", *read], body)


def tasks() -> str:
    """Tasks that are no instructions, on arxiv-mini."""
    return _tasks(TASKS, lambda name: results(f"tasks/{name}.json"), READINGS)


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
    return f"{_tasks(PRESETS, found.get, TUNED)}\n\n{said}".rstrip()


def instructed() -> str:
    """What training on instructions brings to memories, against those that saw questions alone."""
    before, after = results("tasks.json"), results("tasks-instructed.json")
    header = ["task", "n", "figure", *(f"k = {k}{when}" for k in (16, 4, 1) for when in ("", ", instructed"))]
    body = []
    for name, (label, figure, column, decimals) in PRESETS.items():
        if name in after:
            rows = [
                next(row for row in one[name]["rows"] if (row["method"], row["tokens"]) == ("kv", k))
                for k in (16, 4, 1)
                for one in (before, after)
            ]
            body.append([label, str(rows[1]["n"]), figure, *(interval(row, column, decimals) for row in rows)])
    end = [row for row in log_rows(f"{FLAGSHIP}/instruct-log.jsonl") if "passages" in row][-1]
    said = f"{end['step']} steps, {end['passages']:,} passages, {end['seconds'] / 60:.0f} minutes of a core."
    return f"{table(header, body)}\n\n{said}"
