"""What the page shows, as HTML: lines of status, texts side by side, answers and costs."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from html import escape

from compressor.commands.shown import MANNER, tokens_named
from compressor.errors import CompressorError
from compressor.model.memory import Memory

WAYS = {
    "memory": "the memory tokens",
    "recited": "the text they give back",
    "full": "the whole passage",
    "none": "no passage",
}
"""What questions are answered from, side by side."""


def busy(what: str, share: float) -> str:
    """A line about work that is going on, with a bar."""
    width = f"{100 * min(max(share, 0), 1):.0f}%"
    return (
        f'<div class="kv-status kv-busy"><span>{escape(what)}</span><div class="kv-bar" role="progressbar" '
        f'aria-valuenow="{width[:-1]}" aria-valuemin="0" aria-valuemax="100"><i style="width:{width}"></i></div></div>'
    )


def said(what: str) -> str:
    """A line that stays; `what` is HTML."""
    return f'<div class="kv-status">{what}</div>'


def failed(error: CompressorError) -> str:
    """What a person can mend."""
    return f'<div class="kv-status kv-error" role="alert"><b>That did not work.</b> {escape(str(error))}</div>'


def sides(
    passage: str, regeneration: str, finished: bool = True
) -> tuple[list[tuple[str, str | None]], list[tuple[str, str | None]]]:
    """Stretches of words of a passage and of what came back of it.

    Returns:
        Of the passage, in both (None), "missing", or "coming" where the other is not `finished`; of the regeneration,
        in both or "added".
    """
    old, new = re.findall(r"\s*\S+", passage), re.findall(r"\s*\S+", regeneration)
    begun = "" if finished or not new else new.pop()  # half a word is neither right nor wrong
    left: list[tuple[str, str | None]] = []
    right: list[tuple[str, str | None]] = []
    matcher = difflib.SequenceMatcher(a=[w.strip() for w in old], b=[w.strip() for w in new], autojunk=False)
    steps = matcher.get_opcodes()
    for place, (kind, a, b, c, d) in enumerate(steps, 1):
        equal, last = kind == "equal", place == len(steps) and not finished
        if last and not equal:  # as many words as were written stand against each other
            middle = min(b, a + d - c)
            left += [("".join(old[a:middle]), "missing"), ("".join(old[middle:b]), "coming")]
        else:
            left.append(("".join(old[a:b]), None if equal else "missing"))
        right.append(("".join(new[c:d]), None if equal else "added"))
    return [one for one in left if one[0]], [one for one in [*right, (begun, None)] if one[0]]


def texts(passage: str | None, regeneration: str, finished: bool, memory: Memory) -> str:
    """Passage and regeneration side by side, as HTML."""
    left, right = sides(passage or "", regeneration, finished) if passage else ([], [(regeneration, None)])
    names = {"missing": "del", "added": "ins", "coming": "span"}

    def marked(runs: Sequence[tuple[str, str | None]]) -> str:
        pieces = []
        for words, kind in runs:
            text = escape(words.lstrip())
            mark = text if kind is None else f'<{names[kind]} class="kv-{kind}">{text}</{names[kind]}>'
            pieces.append(words[: len(words) - len(words.lstrip())] + mark)
        return "".join(pieces)

    kept = marked(left) if passage else "<i>The memory file keeps no text.</i>"
    caret = "" if finished else '<span class="kv-caret"></span>'
    segments = f" in {len(memory.segments)} segments" if len(memory.segments) > 1 else ""
    return (
        f'<div class="kv-texts"><section><h3>Passage <small>{memory.passage_tokens} tokens</small></h3>'
        f"<p>{kept}</p></section><section><h3>Written back <small>from {tokens_named(memory.tokens)}{segments} alone"
        f"</small></h3><p>{marked(right)}{caret}</p></section></div>"
        '<p class="kv-note"><del class="kv-missing">missing</del> <ins class="kv-added">added</ins> '
        "words are marked; the others came back.</p>"
    )


def answers(question: str, found: dict[str, tuple[str, str]]) -> str:
    """The answers so far, side by side, as HTML."""
    cards = []
    for way, label in WAYS.items():
        text, note = found.get(way, ("", ""))
        shown = escape(text) or ("<i>no answer</i>" if way in found else '<span class="kv-caret"></span>')
        cards.append(
            f'<section class="kv-{way}"><h4>from {label}</h4><p>{shown}</p><small>{escape(note)}</small></section>'
        )
    return (
        f'<p class="kv-asked">{escape(question.strip())}</p><div class="kv-answers">{"".join(cards)}</div>'
        f'<p class="kv-note">{MANNER}</p>'
    )


def card(label: str, full: float, small: float, units: Sequence[str]) -> str:
    """A cost of the passage and of its memory, and how many times less that is, as HTML.

    Args:
        units: names of one, of a thousand, of a million, ...
    """
    times = f"{full / small:.3g}x less" if full >= small else f"{small / full:.3g}x more"
    most, scale = max(full, small), 1.0
    while most / scale >= 1000 and len(units) > 1:
        scale, units = scale * 1000, units[1:]
    bars = "".join(
        f'<div class="kv-cost"><span>{who}</span><div><i style="width:{max(1, 100 * value / most):.1f}%"></i></div>'
        f"<b>{value / scale:.{0 if scale == 1 else 2}f} {units[0]}</b></div>"
        for who, value in (("passage", full), ("memory", small))
    )
    return f"<section><h4>{label}</h4><strong>{times}</strong>{bars}</section>"
