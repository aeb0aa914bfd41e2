"""What is asked of a base: the passage that holds a question's answer, and question and answer as token ids.

A context over a number of tokens is cut into equal segments, and a question goes to the one that holds its answer; an
answer that a cut goes through gets a window of its own, centred on it. Where an answer stands is known from offsets of
the source, or else found as whole words. Settings name prompts, so that torch is not imported here.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from math import exp
from typing import TYPE_CHECKING, Any, NamedTuple

from compressor.errors import CompressorError

if TYPE_CHECKING:
    from compressor.data.questions import Question
    from compressor.data.rows import LeftOut

QUESTION = "\nQuestion: {question} Answer:"
"""Follows a passage (or its memory). The answer comes after it, with a leading space, then EOS."""
CHAT = "chat"
"""Template that stands for the base's own chat template; arguments may follow: chat {"enable_thinking": false}."""
_PLACE = "\ue000question\ue001"
"""Stands for a question while a chat template is rendered; of private characters, which no template has."""
NEAR = 100
"""Characters over which the weight of a question's word beside an answer falls to 1/e."""
TOGETHER = 256
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]")
"""Letters of scripts that write words, or words and what follows them, without spaces."""
_NUMBER = re.compile(r"\d[.,]\|\d|\d\|[.,]\d")
"""An edge (|) at the point or comma within a number: 3 does not stand in 3.5, nor 500 in 1,500."""


def question_ids(tokenizer: Any, questions: Sequence[str], template: str = QUESTION) -> list[list[int]]:
    """Token ids of the prompts that ask questions after a passage or its memory.

    Args:
        template: text with `{question}` in it, or `chat` for the tokenizer's chat template, followed by its arguments
            as a JSON object where it takes any.

    Raises:
        CompressorError: the tokenizer has no chat template, or the template has no place for the question.
    """
    if not isinstance(template, str):
        raise CompressorError(
            f"the question template is {type(template).__name__}, not text: give one with {{question}}"
        )
    arguments = chat_arguments(template)
    if arguments is not None:
        return [_chat_ids(tokenizer, question.strip(), arguments) for question in questions]
    if "{question}" not in template:
        raise CompressorError(f"the question template {template!r} has no {{question}} in it: say where questions go")
    texts = [template.replace("{question}", question.strip()) for question in questions]
    return _ids(tokenizer, texts)


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    from compressor.data.batches import tokenise  # imports torch, without which settings are read

    return tokenise(tokenizer, texts)


def chat_arguments(template: str) -> dict[str, Any] | None:
    """Arguments for the chat template in `chat {...}`; None where `template` is another one.

    Raises:
        CompressorError: what follows `chat` is no JSON object.
    """
    rest = template.removeprefix(CHAT).strip()
    if not template.startswith(CHAT) or (rest and not rest.startswith("{")) or "{question}" in template:
        return None
    try:
        return json.loads(rest or "{}")
    except json.JSONDecodeError as error:
        raise CompressorError(
            f"the question template {template!r} has no JSON object after {CHAT}: {error.msg} at its character "
            f"{error.pos + 1}"
        ) from None


def _chat_ids(tokenizer: Any, question: str, arguments: dict[str, Any]) -> list[int]:
    """The chat's marks are special tokens; a question that spells one, or another that the template writes, is text."""
    if not getattr(tokenizer, "chat_template", None):
        raise CompressorError("the base's tokenizer has no chat template: give a template with {question} in it")
    from jinja2 import TemplateError  # commands that ask nothing start without it

    def render(content: str) -> str:
        turn = [{"role": "user", "content": content}]
        try:
            return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, **arguments)
        except (TemplateError, TypeError) as error:
            raise CompressorError(f"the base's chat template fails with the arguments {arguments}: {error}") from None

    def ids_of(text: str, split: bool) -> list[int]:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=split, verbose=False)["input_ids"]

    spelled = [token for token in _control_tokens(tokenizer) if token in question]
    if not spelled:
        return ids_of(render(question), split=False)
    before, *between = render(_PLACE).split(_PLACE)
    # A cut after the first character keeps even tokens that are not special from being read as one.
    pattern = "|".join(re.escape(token) for token in sorted(spelled, key=len, reverse=True))
    pieces = re.sub(pattern, lambda match: match[0][0] + _PLACE + match[0][1:], question).split(_PLACE)
    written = [token for piece in pieces for token in ids_of(piece, split=True)]
    return [*ids_of(before, split=False), *(one for rest in between for one in [*written, *ids_of(rest, split=False)])]


def _control_tokens(tokenizer: Any) -> list[str]:
    """Special tokens, and added ones that the chat template writes (`<think>`)."""
    added = {one.content: one.special for one in tokenizer.added_tokens_decoder.values()}
    template = str(tokenizer.chat_template)
    return [text for text, special in added.items() if len(text.strip()) > 1 and (special or text in template)]


def answer_ids(tokenizer: Any, answers: Sequence[Sequence[str]]) -> list[list[int]]:
    """Token ids of the first of each question's right answers; none where there is no answer: EOS follows at once."""
    return _ids(tokenizer, [" " + right[0].strip() if right else "" for right in answers])


class Placed(NamedTuple):
    """The passage a question is asked of."""

    question: Question
    context: int
    """Number of its context, in the order of the questions."""
    start: int
    """Its first token in the context."""
    ids: list[int]
    """Its token ids, one list for all questions that are asked of it."""


def place_questions(
    questions: Sequence[Question], tokenizer: Any, most: int | None, left_out: LeftOut, whole: bool = False
) -> Iterator[Placed]:
    """The passage of each question, in their order.

    Args:
        most: most tokens of a passage; None leaves contexts whole.
        left_out: counts the questions that no passage holds the answer of, which are not yielded. In a context of one
            segment an answer is not looked for, so that it may be one that the context implies.
        whole: questions whose answer stands nowhere get the whole context, as those about all of it (`Question.whole`)
            always do.
    """
    contexts = list(dict.fromkeys(question.context for question in questions))
    numbers = {context: number for number, context in enumerate(contexts)}
    windows: list[Windows] = []
    passages: dict[tuple[int, int, int], list[int]] = {}
    for question in questions:
        number = numbers[question.context]
        if number == len(windows):
            # Contexts come in the order of their first questions: each is tokenised when it is first needed.
            some = contexts[number : number + TOGETHER]
            encoded = tokenizer(some, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            rows = zip(some, encoded["input_ids"], encoded["offset_mapping"], strict=True)
            windows += [Windows(context, ids, offsets, most) for context, ids, offsets in rows]
        found = windows[number].of(question)
        if found == "answer_not_found" and whole:
            found = 0, len(windows[number].ids)
        if isinstance(found, str):
            left_out.add(found, question.id)
            continue
        key = (number, *found)
        ids = passages.setdefault(key, windows[number].ids[slice(*found)])
        yield Placed(question, number, found[0], ids)


class Windows:
    """The windows of one context.

    Args:
        ids: its token ids.
        offsets: first and last character (exclusive) of each token.
        most: see `place_questions`.
    """

    def __init__(self, context: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]], most: int | None):
        self.context, self.ids, self.offsets = context, list(ids), offsets
        self.most = max(1, len(ids)) if most is None else most
        count = -(-len(ids) // self.most)
        self.segments = list(pairwise(len(ids) * i // count for i in range(count + 1))) if count else []

    def of(self, question: Question) -> tuple[int, int] | str:
        """First and last token (exclusive) of the question's window, or the reason why there is none (`REASONS`)."""
        if not self.segments:
            return "no_tokens"
        if len(self.segments) == 1 or question.whole:
            return 0, len(self.ids)
        if not question.answers:
            return self._most_shared(question.question)
        spans = answer_spans(question)
        if not spans:
            return "answer_not_found"
        fitting = [tokens for tokens in map(self._tokens, spans) if tokens[1] - tokens[0] <= self.most]
        if not fitting:
            return "answer_too_long"
        start, end = fitting[0]
        for segment in self.segments:
            if segment[0] <= start and end <= segment[1]:
                return segment
        width = max(end - start, *(b - a for a, b in self.segments))
        first = min(max(0, (start + end - width) // 2), len(self.ids) - width)
        return first, first + width

    def _tokens(self, span: tuple[int, int]) -> tuple[int, int]:
        """The tokens that hold any of the characters of a span."""
        touched = [i for i, (a, b) in enumerate(self.offsets) if a < span[1] and b > span[0]]
        return (touched[0], touched[-1] + 1) if touched else (0, 0)

    def _most_shared(self, question: str) -> tuple[int, int]:
        """The segment with the most words of a question that has no answer: such a one has to be hard, too."""
        wanted = set(_words(question))

        def shared(segment: tuple[int, int]) -> int:
            text = self.context[self.offsets[segment[0]][0] : self.offsets[segment[1] - 1][1]]
            return len(wanted & set(_words(text)))

        return max(self.segments, key=shared)


def answer_spans(question: Question) -> list[tuple[int, int]]:
    """Where the answer stands in the context (characters, end exclusive), the likeliest place first; [] if nowhere.

    Places that the source gives are taken as they are. Otherwise every right answer is looked for as whole words, in
    the same case before any case. The places are those of the first one found: first where the most other right answers
    stand, too, then the nearest to words of the question. Of 521 answers in SQuAD's development set that occur more
    than once, and whose right place another annotator's answer tells, nearness finds 77% and the first place is right
    for 66%.
    """
    if question.spans:
        return list(question.spans)
    for flags in (0, re.IGNORECASE):
        found = [spans for answer in question.answers if (spans := whole_words(question.context, answer, flags))]
        if found:
            first, others = found[0], found[1:]
            agreeing = {(a, b): sum(any(a < d and c < b for c, d in spans) for spans in others) for a, b in first}
            best = [one for one in first if agreeing[one] == max(agreeing.values())]
            nearest = max(best, key=lambda one: _nearness(question, one)) if len(best) > 1 else best[0]
            return [nearest, *(one for one in first if one != nearest)]
    return []


def whole_words(text: str, answer: str, flags: int = 0) -> list[tuple[int, int]]:
    """Where `answer` stands in `text` (characters, end exclusive) without parts of words or numbers beside it.

    Any white space matches any other. Beside letters of scripts that put no spaces between words anything may stand.
    """
    words = answer.split()
    if not words:
        return []
    spans: Iterable[tuple[int, int]]
    if flags or not text.isprintable() or "  " in text:
        # Looking ahead finds places that overlap, too: a refused one must not hide the next.
        pattern = "(?=(" + r"\s+".join(map(re.escape, words)) + "))"
        spans = (match.span(1) for match in re.finditer(pattern, text, flags))
    else:  # nearly always, and far faster: a pattern of one's own for each answer takes a millisecond to compile
        spans = _places(text, " ".join(words))
    return [span for span in spans if not any(_within_word(text, edge) for edge in span)]


def _places(text: str, part: str) -> Iterator[tuple[int, int]]:
    start = text.find(part)
    while start >= 0:
        yield start, start + len(part)
        start = text.find(part, start + 1)


def _within_word(text: str, edge: int) -> bool:
    """Whether an edge between two characters goes through a word or a number."""
    if not 0 < edge < len(text):
        return False
    if _NUMBER.search(text[max(0, edge - 2) : edge] + "|" + text[edge : edge + 2]):
        return True
    before, after = text[edge - 1], text[edge]
    joined = all(one.isalnum() or one == "_" for one in (before, after))
    return joined and not (_UNSPACED.match(before) or _UNSPACED.match(after))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _nearness(question: Question, span: tuple[int, int]) -> float:
    """How near words of the question stand to a place in the context; words that are frequent there count less."""
    words = [(match.start(), match.group().casefold()) for match in re.finditer(r"\w+", question.context)]
    counts, wanted = Counter(word for _, word in words), set(_words(question.question))
    nearest: dict[str, float] = {}
    for place, word in words:
        if word in wanted and not span[0] <= place < span[1]:
            distance = min(abs(place - span[0]), abs(place - span[1]))
            nearest[word] = max(nearest.get(word, 0.0), exp(-distance / NEAR) / counts[word])
    return sum(nearest.values())
