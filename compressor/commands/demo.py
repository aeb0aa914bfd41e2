"""What `demo.py` does: compress a passage, regenerate it or answer a question about it, and print both."""

from __future__ import annotations

import json
import sys
from typing import Any

from compressor.commands.demonstration import DemoConfig, answers_of, differences, run_demo, tokens_named
from compressor.parsing import parse_config
from compressor.streams import check_output, exits_cleanly, shows_unicode, write_output


def mark_differences(passage: str, regeneration: str, colour: bool) -> str:
    """The regeneration with its differences to the passage, word by word.

    Words that are missing stand in [-...-], words that were added in {+...+}; on a terminal also red and green.
    """
    marks = {"missing": ("\033[31m", "[-{}-]"), "added": ("\033[32m", "{{+{}+}}")}
    pieces = []
    for words, kind in differences(passage, regeneration):
        if kind is None:
            pieces.append(words)
            continue
        start, mark = marks[kind]
        marked = mark.format(words.strip())
        pieces.append(f"{start}{marked}\033[0m " if colour else f"{marked} ")
    return "".join(pieces).strip()


def show(result: dict[str, Any], colour: bool) -> str:
    """The result for people."""
    ratio = result["passage_tokens"] / result["tokens"]
    cut = result["text_tokens"] - result["passage_tokens"]
    segments = f" in {result['segments']} segments" if result["segments"] > 1 else ""
    lines = [
        f"Passage: {result['source']}"
        + (f"; the first {result['passage_tokens']} of {result['text_tokens']} tokens (--length)" if cut else ""),
        "",
        result["passage"],
        "",
        f"{result['passage_tokens']} tokens -> {tokens_named(result['tokens'])}{segments} ({ratio:.3g}x); "
        f"{len(result['passage'].encode()):,} bytes of text -> {result['memory_bytes']:,} bytes of keys and values",
        "",
        *(_shown_regeneration(result, colour) if "regeneration" in result else []),
        *(_shown_answers(result) if "question" in result else []),
        "   ".join(f"{name} {value:.2f} s" for name, value in result["timings"].items()),
    ]
    return "\n".join(lines)


def _shown_regeneration(result: dict[str, Any], colour: bool) -> list[str]:
    refined = result.get("refined")
    wanting = result["regeneration"] != result["passage"] and not result["refine_steps"] and not refined
    lines = [
        "Regenerated from the memory alone, [-missing-] {+added+}:",
        *_shown_text(result, colour),
        *(["More comes back after gradient steps on the memory: --refine_steps 20", ""] if wanting else []),
    ]
    if refined:
        took = f"{refined['timings']['compress']:.1f} s"
        lines += [
            f"After {refined['refine_steps']} gradient steps on the memory ({took}):",
            *_shown_text(refined, colour),
        ]
    return lines


def _shown_text(result: dict[str, Any], colour: bool) -> list[str]:
    return [
        "",
        mark_differences(result["passage"], result["regeneration"], colour),
        "",
        f"BLEU {result['bleu']:.1f}   chrF {result['chrf']:.1f}   ROUGE-L {result['rouge_l']:.3f}   "
        f"exact match {'yes' if result['regeneration'] == result['passage'] else 'no'}",
        "",
    ]


def _shown_answers(result: dict[str, Any]) -> list[str]:
    return [
        f"Question: {result['question']}",
        "",
        *(
            f"  from {label + ':':24} {answer}   (log-probability {logprob:.1f})"
            for label, answer, logprob in answers_of(result)
        ),
        "",
    ]


@exits_cleanly
def demo_main(argv: list[str] | None = None) -> int:
    """Entry point of `demo.py`; returns the exit status."""
    flags = {"json": "print one JSON object instead of text", "web": "open a page in the browser (extra web)"}
    config, options = parse_config(
        DemoConfig, argv, "Compress a passage and regenerate it from its memory.", flags, ["text"]
    )
    if options.web:
        from compressor.commands.web import serve

        serve(config)
        return 0
    check_output()
    result = run_demo(config)
    shown = json.dumps(result, ensure_ascii=not shows_unicode()) if options.json else show(result, sys.stdout.isatty())
    write_output(shown)
    return 0
