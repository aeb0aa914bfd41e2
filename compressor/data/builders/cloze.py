"""Questions about an abstract by rules alone, for machines without a language model.

Four kinds: acronyms and their expansions (found as by Schwartz and Hearst, "A simple algorithm for identifying
abbreviation definitions in biomedical text", PSB 2003), numbers with their units, methods, and named results. Every
answer is a span of the abstract. Where no plain question fits, the question quotes the words around a gap.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("acronym", "number", "method", "named")
GAP = "___"
BEFORE, AFTER = 8, 6
"""Words quoted on the two sides of a gap."""
LONGEST_ANSWER = 8


def _any(words: str) -> str:
    """A pattern for any of these words."""
    return f"(?:{'|'.join(words.split())})"


class Cloze(NamedTuple):
    """A question, its answer (a span of the abstract) and the rule that made it (one of `KINDS`)."""

    question: str
    answer: str
    kind: str


def cloze_questions(abstract: str, count: int, seed: str) -> list[Cloze]:
    """Up to `count` questions about an abstract (whitespace collapsed), one of each kind before a second of any.

    `seed` (the abstract's id) decides which are taken of those that are possible; the same seed gives the same.
    """
    sentences = split_sentences(abstract)
    rules = {"acronym": _acronyms, "number": _numbers, "method": _methods, "named": _named}
    found: dict[str, list[Cloze]] = {}
    for kind, rule in rules.items():
        usable = {item.question: item for item in rule(abstract, sentences) if _usable(abstract, item)}
        found[kind] = sorted(usable.values(), key=lambda item: _draw(seed, item.question))
    kinds = sorted(KINDS, key=lambda kind: _draw(seed, kind))
    chosen: list[Cloze] = []
    while len(chosen) < count and any(found.values()):
        for kind in kinds:
            item = found[kind].pop(0) if found[kind] else None
            if item is not None and len(chosen) < count and not any(_give_away(item, other) for other in chosen):
                chosen.append(item)
    return chosen


def _give_away(one: Cloze, other: Cloze) -> bool:
    """Whether two questions have one answer, or one of them tells the other's."""
    texts = [text.casefold() for text in (one.answer, other.question, other.answer, one.question)]
    return texts[0] in texts[1] or texts[2] in texts[3] or texts[0] == texts[2]


def _draw(seed: str, text: str) -> bytes:
    return hashlib.blake2b(f"{seed}:{text}".encode(), digest_size=8).digest()


def _usable(abstract: str, item: Cloze) -> bool:
    answer = item.answer
    return (
        0 < len(answer.split()) <= LONGEST_ANSWER
        and answer in abstract
        and not re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", item.question, re.IGNORECASE)
        and not re.search(r"[$\\{}]", answer)
        and not re.search(r"[\\{}]", item.question)
        and item.question.count("$") % 2 == 0
    )


_NO_END = re.compile(r"(?:\b(?:e\.g|i\.e|vs|cf|Fig|Eq|Eqs|Ref|al|resp|approx|no|No|Dr|St|ca|w\.r\.t|[A-Z]))\.$")


def split_sentences(abstract: str) -> list[str]:
    """Sentences, split at . ! ? before a capital; not after initials and common abbreviations."""
    sentences = []
    start = 0
    for match in re.finditer(r"[.!?]['\")]?\s+(?=[A-Z\d$(\"'])", abstract):
        piece = abstract[start : match.end()].strip()
        if not _NO_END.search(piece):
            sentences.append(piece)
            start = match.end()
    return [*sentences, abstract[start:].strip()]


def _outside_formulas(sentence: str, start: int) -> bool:
    return sentence.count("$", 0, start) % 2 == 0


def _window(sentence: str, start: int, end: int) -> str:
    """The words around sentence[start:end] with a gap in its place; dots show where the sentence is cut."""
    before, after = sentence[:start].split(" "), sentence[end:].split(" ")
    left = " ".join(before[-BEFORE - 1 :] if len(before) > BEFORE + 1 else before)
    right = " ".join(after[: AFTER + 1] if len(after) > AFTER + 1 else after)
    if left.count("$") % 2 or right.count("$") % 2:
        # A formula is quoted whole or not at all.
        left = left[left.rindex("$") + 1 :] if left.count("$") % 2 and left.count("$") == 1 else left
        right = right[: right.index("$")] if right.count("$") == 1 else right
    shown = f"{left}{GAP}{right}".strip().rstrip(".,;:").replace('"', "'")
    head = "... " if len(left) < start else ""
    tail = " ..." if len(right) < len(sentence) - end else ""
    return f"{head}{shown}{tail}"


def _gap(sentence: str, start: int, end: int, what: str, kind: str) -> Cloze:
    window = _window(sentence, start, end)
    return Cloze(f'{what} fills the gap in "{window}"?', sentence[start:end], kind)


# Acronyms ------------------------------------------------------------------------------------------------------------

_SHORT = re.compile(r"\(([A-Za-z][\w.&/+-]{1,11})(?:[,;][^()]*)?\)")


# What these stand for is known without the abstract.
_KNOWN = frozenset(("AI", "CNN", "DNN", "GNN", "LLM", "ML", "NLP", "RL"))


def _acronyms(abstract: str, sentences: list[str]) -> Iterator[Cloze]:
    for sentence in sentences:
        for match in _SHORT.finditer(sentence):
            short = match.group(1)
            if sum(letter.isupper() for letter in short) < 2 or not _outside_formulas(sentence, match.start()):
                continue
            stem = short[:-1] if short.endswith("s") and short[:-1].isupper() else short
            long = _expansion(sentence[: match.start()].rstrip(), stem)
            if long is None or "(" in long or ")" in long or stem in _KNOWN:
                continue
            yield Cloze(f"What does {short} stand for?", long, "acronym")
            yield Cloze(f'What is the abbreviation of "{long}"?', short, "acronym")


def _expansion(before: str, short: str) -> str | None:
    """The words at the end of `before` that `short` abbreviates (Schwartz and Hearst 2003, with stricter bounds)."""
    letters = [letter.lower() for letter in short if letter.isalnum()]
    words = before.split(" ")[-min(len(letters) + 5, 2 * len(letters)) :]
    text = " ".join(words)
    place = len(text)
    for index in range(len(letters) - 1, -1, -1):
        place -= 1
        # The first letter must begin a word; the others may be anywhere.
        while place >= 0 and (
            text[place].lower() != letters[index]
            or (index == 0 and place > 0 and (text[place - 1].isalnum() or text[place - 1] == "-"))
        ):
            place -= 1
        if place < 0:
            return None
    long = text[place:]
    inner = re.split(r"[\s-]+", long)
    # Most letters must begin words: by chance they are found anywhere in a long enough text.
    initials = "".join(word[0].lower() for word in inner if word)
    at_starts = _common(initials, "".join(letters))
    if len(long) <= len(short) or short in long or at_starts * 2 < len(letters) or len(inner) > len(letters) + 2:
        return None
    return None if re.search(r"[,;:$]", long) or len(inner) < 2 else long


def _common(one: str, other: str) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for letter in one:
        previous = 0
        for index, second in enumerate(other, start=1):
            previous, row[index] = row[index], previous + 1 if letter == second else max(row[index], row[index - 1])
    return row[-1]


# Numbers -------------------------------------------------------------------------------------------------------------

_UNIT = _any("""
    [kMGT]?Hz [kMGT]?eV [kM]?pc [munkpc]?m [munpf]?s min h hours? minutes? seconds? days? weeks? months? years? m?K
    [mk]?g dBm? [kMGT]?B [KMG]iB [kMG]?bps [kmM]?W [mk]?V [mk]?A [mkMG]?Pa m?T Gyr Myr yr AU au pixels? tokens?
    parameters? bits? qubits? degrees? photons? samples? frames? fps FPS GFLOPs TOPS percentage\\spoints? points?
    percent
""")
_NUMBER = r"(?<![\w.$^_/=-])(?P<number>\d+(?:,\d{3})*(?:\.\d+)?"
_AMOUNT = re.compile(
    rf"{_NUMBER}(?:\s?%|[\s-]?(?:million|billion|trillion|times|[xX×])(?!\w)"
    rf"|\s{_UNIT}(?:/[A-Za-z]+(?:\^?-?\d)?)?(?![\w/-])))"
)
_COUNTED = re.compile(
    rf"{_NUMBER}|{_any('three four five six seven eight nine ten twelve Three Four Five Six Seven Eight Nine Ten')})"
    r"\s(?P<things>(?:[a-z][a-z-]+\s){0,2}?[a-z][a-z-]{2,}s)(?=[\s,.;:)])"
)
_NOT_COUNTED = re.compile(
    _any("""
        is was has this as its thus does plus across times versus previous various us ones classes cases aspects
        others years months days hours minutes seconds points results percentage of \\w+ly \\w+ss \\w+ous \\w+sis
        \\w+ics
    """)
)


def _numbers(abstract: str, sentences: list[str]) -> Iterator[Cloze]:
    for sentence in sentences:
        for match in _AMOUNT.finditer(sentence):
            start, end = match.span("number")
            if _outside_formulas(sentence, start):
                what = "Which percentage" if sentence[end - 1] == "%" else "Which number or quantity"
                yield _gap(sentence, start, end, what, "number")
        for match in _COUNTED.finditer(sentence):
            things = match.group("things")
            if not _outside_formulas(sentence, match.start()) or any(map(_NOT_COUNTED.fullmatch, things.split())):
                continue
            if len(re.findall(rf"\b{re.escape(things)}\b", abstract)) == 1:
                yield Cloze(f"How many {things} are mentioned?", match.group("number"), "number")
            else:
                yield _gap(sentence, *match.span("number"), "Which number", "number")


# Methods -------------------------------------------------------------------------------------------------------------

_PAST = {
    "propose": "proposed",
    "introduce": "introduced",
    "present": "presented",
    "develop": "developed",
    "describe": "described",
    "design": "designed",
    "release": "released",
    "build": "built",
    "construct": "constructed",
}
_ARTEFACT = _any("""
    agent algorithm approach architecture benchmark construction corpus dataset estimator experiment extension
    formalism formula framework generalisation generalization library mechanism method model network package pipeline
    platform protocol scheme strategy suite survey system technique test theory tool toolkit
""")
_PRESENT = (
    r"(?:[Ww]e|[Tt]his (?:paper|work|study|article|letter)|[Tt]he (?:authors?|paper))"
    rf"\s(?:\w+ly\s|first\s|then\s|also\s|here\s|therefore\s)?(?P<verb>{_any(' '.join(_PAST))})s?\s"
)
_NAME = r"(?:[A-Z][\w+-]*[A-Z0-9][\w+-]*|[a-z]+[A-Z][\w+-]*)(?:\s\d(?:\.\d)?)?"
_PROPOSED = re.compile(
    rf"{_PRESENT}(?P<name>{_NAME})(?:\s\([^()]*\))?,\s(?:an?|the first|the)\s"
    rf"(?P<what>(?:[\w-]+\s){{0,5}}?{_ARTEFACT})\b"
)
_DESCRIBED = re.compile(
    rf"{_PRESENT}(?:an?|the)\s(?P<what>(?:[\w-]+\s){{1,6}}?{_ARTEFACT})"
    r"(?=\s(?:for|that|to|of|which|based|in|called|named|with|where|using|on|by|whose|from|and)\b|[,.;:]|\s\()"
)
_SAYS_NOTHING = re.compile(
    _any("novel new simple first unified unique general generic comprehensive efficient effective direct practical and")
)
_MEANS = re.compile(
    r"(?:^|\s)(?:[Bb]y means of|[Uu]sing|[Bb]ased on|via|[Ee]mploying|[Ww]ith the help of)\s(?:the\s|an?\s)?"
    r"(?P<means>(?:[A-Za-z][\w-]*\s){1,3}?"
    + _any("""
        algorithms? analysis approximation calculations? clustering data decomposition diffraction equations? estimation
        imaging inequality inference interferometry learning lemma methods? microscopy models? networks? observations
        optimisation optimization regression sampling simulations? spectroscopy techniques? theorem theory tomography
        transforms?
    """)
    + r")(?=\s(?:to|for|of|in|on|with|and|at|we|that|which|from|is|are)\b|[,.;:]|$)"
)


def _methods(abstract: str, sentences: list[str]) -> Iterator[Cloze]:
    for sentence in sentences:
        for match in _PROPOSED.finditer(sentence):
            yield Cloze(f"What is the name of the {match.group('what')}?", match.group("name"), "method")
        for match in _DESCRIBED.finditer(sentence):
            what, verb = match.group("what"), _PAST[match.group("verb")]
            if sum(not _SAYS_NOTHING.fullmatch(word) for word in what.split()) >= 2:  # "a new method" says nothing
                yield Cloze(f"What is {verb} in this work?", what, "method")
        for match in _MEANS.finditer(sentence):
            if _outside_formulas(sentence, match.start()):
                yield _gap(sentence, *match.span("means"), "Which method or tool", "method")


# Named results -------------------------------------------------------------------------------------------------------

_SPECIFIC = _any("dataset benchmark corpus telescope survey collaboration mission satellite simulator")
_THING = _any("""
    algebra algorithm ansatz approximation benchmark collaboration conjecture constant corpus correspondence criterion
    dataset detector distribution effect equations? estimator experiment formula functional group hypothesis index
    inequality kernel Hamiltonian Lagrangian language law lemma limit manifold method metric mission model operator
    paradox polynomials? principle problem process satellite simulator space survey telescope test theorem transform
""")
_NAMED = re.compile(
    r"(?<![\w$\\-])(?P<name>(?:[A-Z][\w'’-]*[a-z0-9'’](?:--?[A-Z][\w'’-]*)*|[A-Z]{2,}[\w-]*)(?:\s[A-Z][\w'’-]+){0,4})"
    rf"\s(?P<thing>{_THING})(?![\w-])"
)
_NOT_NAMES = re.compile(
    _any("""
        A Additional Against Agentic All Also Although An Another Any As At Based Because Between Beyond Both By
        Classical Computational Current Data Deep Despite Different Dual Each Every Existing Experimental Extensive
        Finally First For Foundation From Full Further Furthermore General Generative Given Graph Here However Human
        If In Its Joint Key Language Large Main Many Modern Moreover Most Multi Neural New No Numerical On One Open
        Optimal Our Previous Proposed Quantum Random Real Recent Second Several Simple Since Some Standard Such That
        The Their Then These This Those Three Through Thus To Traditional Two Under Unlike Using Various We When While
        With Within Across
    """)
)


def _named(abstract: str, sentences: list[str]) -> Iterator[Cloze]:
    names: dict[str, set[str]] = {}
    places = []
    for sentence in sentences:
        for match in _NAMED.finditer(sentence):
            words = match.group("name").split(" ")
            while words and _NOT_NAMES.fullmatch(words[0]):
                words.pop(0)
            if words and _outside_formulas(sentence, match.start()):
                name = " ".join(words)
                names.setdefault(match.group("thing").removesuffix("s"), set()).add(name)
                places.append((sentence, match.end("name"), name, match.group("thing")))
    for sentence, end, name, thing in places:
        # "Which model is mentioned by name?" does not make one think of "DL" in "a DL model".
        plain = not name.isupper() or re.fullmatch(_SPECIFIC, thing)
        if len(names[thing.removesuffix("s")]) == 1 and plain and not re.search(r"['’]s?$", name):
            yield Cloze(f"Which {thing} {'are' if thing.endswith('s') else 'is'} mentioned by name?", name, "named")
        else:
            yield _gap(sentence, end - len(name), end, "Which name", "named")
