"""What the demo and its page found, in words and marks."""

from __future__ import annotations

import difflib
import re
import textwrap
from typing import Any

SHOWN_ANSWER = 120
"""Most characters of an answer on the terminal: a base that chats goes on."""

MANNER = (
    "The language model is frozen: a text it reads after a short trained prefix where one ships for it (SmolLM2); else "
    "it answers in its own manner, which may be to chat or to repeat itself."
)
"""Why the whole passage may give a worse answer than its memory."""


def differences(passage: str, regeneration: str) -> list[tuple[str, str | None]]:
    """Stretches of words that the passage and its regeneration share (None), or that are "missing" or "added"."""
    old, new = re.findall(r"\S+\s*", passage), re.findall(r"\S+\s*", regeneration)
    runs: list[tuple[str, str | None]] = []
    matcher = difflib.SequenceMatcher(a=[w.strip() for w in old], b=[w.strip() for w in new], autojunk=False)
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "equal":
            runs.append(("".join(new[c:d]), None))
            continue
        if a < b:
            runs.append(("".join(old[a:b]), "missing"))
        if c < d:
            runs.append(("".join(new[c:d]), "added"))
    return runs


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
    steps = f", after {steps_named(result['refine_steps'])}" if result["refine_steps"] else ""
    lines = [
        f"Passage: {result['source']}"
        + (f"; the first {result['passage_tokens']} of {result['text_tokens']} tokens (--length)" if cut else ""),
        "",
        result["passage"],
        "",
        f"{result['passage_tokens']} tokens -> {tokens_named(result['tokens'])}{segments} ({ratio:.3g}x){steps}; "
        f"{len(result['passage'].encode()):,} bytes of text -> {result['memory_bytes']:,} bytes of keys and values",
        "",
        *(_shown_regeneration(result, colour) if "regeneration" in result else []),
        *(_shown_answers(result) if "question" in result else []),
        "   ".join(f"{name} {value:.2f} s" for name, value in result["timings"].items()),
    ]
    return "\n".join(lines)


def _shown_regeneration(result: dict[str, Any], colour: bool) -> list[str]:
    refined, before = result.get("refined"), result.get("one_pass")
    wanting = result["regeneration"] != result["passage"] and not result["refine_steps"] and not refined
    lines = [
        "Regenerated from the memory alone, [-missing-] {+added+}:",
        *_shown_text(result, colour),
        *([f"{_scores(before)}   in one pass, without the gradient steps", ""] if before else []),
        *(["More comes back after gradient steps on the memory: --refine-steps 20", ""] if wanting else []),
    ]
    if refined:
        took = f"{refined['timings']['compress']:.1f} s"
        lines += [
            f"After {steps_named(refined['refine_steps'])} on the memory ({took}):",
            *_shown_text(refined, colour),
        ]
    return lines


def _shown_text(result: dict[str, Any], colour: bool) -> list[str]:
    return [
        "",
        mark_differences(result["passage"], result["regeneration"], colour),
        "",
        _scores(result),
        "",
    ]


def _scores(result: dict[str, Any]) -> str:
    return (
        f"BLEU {result['bleu']:.1f}   chrF {result['chrf']:.1f}   ROUGE-L {result['rouge_l']:.3f}   "
        f"exact match {'yes' if result['regeneration'] == result['passage'] else 'no'}"
    )


def _shown_answers(result: dict[str, Any]) -> list[str]:
    return [
        f"Question: {result['question']}",
        "",
        *(
            f"  from {label + ':':24} {textwrap.shorten(answer, SHOWN_ANSWER) or '(nothing)'}"
            f"   (log-probability {logprob:.1f})"
            for label, answer, logprob in answers_of(result)
        ),
        "",
        MANNER,
        "",
    ]


def tokens_named(count: int) -> str:
    """1 memory token, 16 memory tokens."""
    return f"{count} memory token" + "s" * (count > 1)


def steps_named(count: int) -> str:
    """1 gradient step, 10 gradient steps."""
    return f"{count} gradient step" + "s" * (count > 1)


def answers_of(result: dict[str, Any]) -> list[tuple[str, str, float]]:
    """What the base read, its answer, and the answer's log-probability, of each answer in `result`."""
    read = {
        "": tokens_named(result["tokens"]),
        "_recite": "what they regenerate",
        "_full": "the whole passage",
        "_none": "no passage",
    }
    return [
        (label, result[f"answer{suffix}"], result[f"logprob{suffix}"])
        for suffix, label in read.items()
        if f"answer{suffix}" in result
    ]
