"""Generated parts about files, stores, serving and speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from readme_shared import FLAGSHIP, ROOT, interval, results, table


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
    *("int2+ans, calibrated", "lowrank:0.4", "lowrank:0.15", "lowrank:0.1", "lowrank:0.07", "lowrank:0.04"),
)
"""Codecs of the table; codecs.json has more."""


def codecs() -> str:
    """Memory codecs: rate against ROUGE-L."""
    data = results(f"{FLAGSHIP}/codecs.json")
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
        f"\n\nSmolLM2-135M, {rows[0]['n']} unseen passages of 96 tokens in 16 memory tokens; 95% bootstrap intervals. "
        f"More codecs,\nand 4 memory tokens, in `results/{FLAGSHIP}/codecs.json`; arxiv-mini's: `results/codecs.json` "
        "(`runs/codecs.sh`)."
    )


def sent() -> str:
    """A text sent in several ways: bytes, and what comes back."""
    if not (ROOT / "results" / "sent.json").exists():
        return "Not measured yet: `python runs/sent.py`."
    found = results("sent.json")
    body = [
        [
            row["way"],
            f"{row['bytes']:,}",
            f"{row['rouge_1']:.2f}",
            f"{row['rouge_l']:.2f}",
            " ".join(row["text"].split())[:120].replace("|", "\\|"),
        ]
        for row in found["rows"]
    ]
    shown = table(["what is sent", "bytes", "ROUGE-1", "ROUGE-L", "what comes back begins with"], body)
    return f"One abstract of {found['bytes']:,} bytes (`runs/sent.py`): an illustration, no measurement.\n\n{shown}"


def speech() -> str:
    """Word error rates of a synthetic voice's transcript and of what its memories write back."""
    found = results("speech.json")
    body = [
        [row["way"], f"{100 * row['wer']:.1f} [{100 * row['wer_low']:.1f}, {100 * row['wer_high']:.1f}]"]
        for row in found["rows"]
    ]
    said = f"{found['rows'][0]['n']} sentences of abstracts in a synthetic voice (espeak-ng), heard by Whisper tiny.en"
    return f"{table(['text', 'word error rate, % ↓'], body)}\n\n{said} (`runs/speech.py`); 95% bootstrap intervals."


def serving() -> str:
    """Time to first token and throughput of vLLM, from memories and from text."""
    found = results(f"{FLAGSHIP}/serving.json")
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
        cells = [interval(row, "f1", 1), f"{row['em']:.1f}", nats, f"{row['positions']:.0f}"]
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
        [row["codec"], f"{row['bytes_a_passage']:,.0f}", interval(row, "f1", 1), f"{row['nats']:.2f}"] for row in rows
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
        one = found["indexing"]
        total = one["passages"]
        lines += [
            f"\n{total:,} paragraphs ({one['tokens_a_passage']:.0f} tokens each) took "
            f"{one['processor_seconds_a_passage']:.2f} s of one core's time each on SmolLM2-135M in {one['dtype']}, "
            f"{total * one['processor_seconds_a_passage'] / 3600:.1f} hours in\nall ("
            f"{one['processor_seconds_a_passage_measured']:.1f} s each with the share that comes back, of "
            f"{one['passages_measured']}), and {one['bytes_a_passage']:,.0f} bytes on the disk, "
            f"{total * one['bytes_a_passage'] / 1e9:.2f} GB\n(`{one['codec']}`, vectors included)."
        ]
    return "\n".join(lines) or "Not measured yet: `runs/store.sh DATA`."


def training_step() -> str:
    """Passages a second of a training step, its share of the peak and its memory, without each lever."""
    found = results("benchmark-training-step.json")
    ours = found["variants"]["ours"]
    body = []
    for name, row in found["variants"].items():
        shown = [f"{row['passages_per_second']:.2f}", f"{row['median'] / ours['median']:.2f}"]
        shown += [f"{row['share_of_peak']:.0%}", f"{row['bytes'] / 1e9:.1f}" if row["bytes"] else "-"]
        body.append([name, *shown])
    peak = max(found["peaks"]) / 1e9
    lengths = []
    for one in found.get("at", []):
        pair = [one["variants"][name]["passages_per_second"] for name in ("ours", "published recipe")]
        share = one["variants"]["ours"]["share_of_peak"]
        lengths.append([*map(str, one["lengths"]), *(f"{value:.2f}" for value in pair), f"{pair[0] / pair[1]:.1f}x"])
        lengths[-1].append(f"{share:.0%}")
    header = ["tokens of every passage", "ours, passages/s", "published recipe", "ratio", "ours, of the peak"]
    picture = "![seconds of a step against length](../results/benchmark-training-step.png)"
    at = f"\nAll passages of one length:\n\n{table(header, lengths)}\n\n{picture}" if lengths else ""
    plain = results("benchmark-training-step-avx2.json")
    few, published = (plain["variants"][name] for name in ("ours", "published recipe"))
    slower = few["median"] / ours["median"]
    return table(["", "passages/s", "time / ours", "of the peak", "peak memory, GB"], body) + (
        f"\n\nSmolLM2-135M, {found['passages']} unseen abstracts at their own lengths up to 500 tokens, forwards and "
        f"backwards, no optimiser;\n{found['threads']} CPU core{'s' * (found['threads'] > 1)} whose products of 2048 x "
        f"2048 matrices reach {peak:,.0f} GFLOP/s; medians of {len(ours['seconds'])} in turn\n"
        f"(`runs/training-step.sh`). With AVX2 alone, in {plain['dtype']}, they take {slower:.1f} times as long: "
        f"{few['share_of_peak']:.0%} of the\n{max(plain['peaks']) / 1e9:,.0f} GFLOP/s that products reach there, and "
        f"{published['median'] / few['median']:.1f} times the published recipe's passages a second."
        f"{at}"
    )


def speed() -> str:
    """A step beside the published recipe's, and rows written together beside a loop of one, in a sentence."""
    rows = results("benchmark-decoding.json")["rows"]
    # Of two runs on one machine, hours apart: the published recipe's time is not the same in both.
    steps = [results(f"benchmark-training-step{which}.json") for which in ("", "-before")]
    at_48 = [next(one for one in step["at"] if one["lengths"] == [48]) for step in steps]
    natural, short = (
        sorted(one["variants"]["published recipe"]["median"] / one["variants"]["ours"]["median"] for one in runs)
        for runs in (steps, at_48)
    )
    memory = max(step["variants"]["ours"]["bytes"] / step["variants"]["published recipe"]["bytes"] for step in steps)
    written = [one for one in rows if one["base"] == FLAGSHIP and one["variant"] == "ours"]
    many = max(written, key=lambda row: row["batch"])
    return (
        "On a CPU core a step ([details](docs/scale.md#a-training-step)) trains "
        f"{natural[0]:.1f} to {natural[1]:.1f} times the published recipe's passages a second,\n"
        f"{short[0]:.0f} to {short[1]:.0f} times at 48 tokens, in {memory:.0%} of its memory; "
        f"{many['batch']} rows are written {many['times_loop']:.0f} times as fast as one by one."
    )


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


def evaluation_time() -> str:
    """Seconds of an evaluation and the shares of its parts, now and on an earlier commit."""
    try:
        found = results("benchmark-evaluation.json")
    except FileNotFoundError:
        return "Not measured yet: `runs/evaluation-time.sh`."
    rows = found["rows"]
    names = [f"{'now' if row is rows[0] else 'before'} ({row['commit']})" for row in rows]
    body = [["all", *(f"{row['seconds']:,.0f} s" for row in rows)]]
    for part in rows[0]["parts"]:
        shown = [(row["parts"][part], row["parts"][part] / row["seconds"]) for row in rows]
        body.append([part, *(f"{seconds:,.1f} s ({share:.0%})" for seconds, share in shown)])
    lengths, tokens = (", ".join(map(str, found[name])) for name in ("lengths", "tokens"))
    return table(["", *names], body) + (
        f"\n\narxiv-mini, {found['limit']} abstracts at each of {lengths} tokens from {tokens} memory tokens, in "
        f"batches of {found['batch_size']},\nseconds of one core without imports."
    )
