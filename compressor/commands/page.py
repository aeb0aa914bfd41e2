"""What the page does, as generators of what changes on it.

So words show while they are decoded, and a run can be stopped. Where memories can be truncated (the layout `nested`),
one compression serves every k.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from compressor.api import Compressor
from compressor.commands.fragments import WAYS, answers, busy, card, failed, said, texts
from compressor.commands.shown import tokens_named
from compressor.errors import CompressorError, require_texts
from compressor.evaluation.flops import Setting
from compressor.evaluation.metrics import rouge_l
from compressor.evaluation.studies.efficiency import shape_of
from compressor.methods.interface import token_prefix
from compressor.methods.recite import recited_prefix
from compressor.model.cartridge import text_prefix
from compressor.model.checkpoint import compressor_name
from compressor.model.fidelity import edits
from compressor.model.generation import answer, regeneration_limit, stream
from compressor.model.memory import Memory, check_base, memory_prefix, signed
from compressor.model.refinement import refine
from compressor.packing.lossless import unpack_passage

AT_ONCE = 4
"""Segments that are compressed, or written, together: between two batches of them a run can be stopped."""
EVERY = 0.1
"""Seconds between two pictures of a text that is being written."""
NEW_TOKENS = 50
"""Tokens of the answer whose cost the panel shows."""
Steps = Iterator[dict[str, Any]]


@dataclass
class Session:
    """What one visitor's page holds."""

    ticket: int = 0
    """Number of the newest run; older ones end when they see it."""
    clock: float = 0.0
    """When the slider was last moved, in the browser's milliseconds: its events may arrive in another order."""
    page: dict[str, Any] = field(default_factory=dict)
    """What the newest run last put on the page."""
    passage: str | None = None
    """None where only its memory was loaded."""
    ids: list[int] = field(default_factory=list)
    segment_tokens: int = 0
    memory: Memory | None = None
    """With as many tokens as there are, not refined."""
    shown: Memory | None = None
    """Truncated and refined as the page says."""
    written: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    """Token ids that came back, by memory tokens and gradient steps."""


class Page:
    """What the page does with a compressor.

    Args:
        model: shared by all visitors; its calls do not disturb each other.
        folder: where memory files lie until they are downloaded.
    """

    def __init__(self, model: Compressor, folder: Path):
        self.model, self.base, self.folder = model, model.base, folder
        self.name = compressor_name(model, "compressor")

    def run(self, work: Callable[..., Steps], session: Session, *values: Any, clock: float = 0.0) -> Steps:
        """Do one piece of work: what a person can mend becomes a message, and what a newer run replaces ends.

        Args:
            clock: when it was asked for; what was asked for before what came last does not begin.
        """
        if not clock or clock >= session.clock:
            session.clock = max(clock, session.clock)
            session.ticket += 1
            mine = session.ticket
            try:
                for step in work(session, *values):
                    if session.ticket != mine:
                        break
                    session.page |= step
                    yield step
            except CompressorError as error:
                session.page["status"] = failed(error)
        yield dict(session.page)  # all of it: a step that was under way may arrive after those of a newer run

    def stop(self, session: Session) -> Steps:
        """End the run that is going on, by being newer."""
        yield {"status": said("Stopped. What is on the page stays; Compress starts again.")}

    def compress(self, session: Session, text: str, tokens: int, segment_tokens: int, refine_steps: int) -> Steps:
        """Compress a passage, and write it back."""
        model, started, text = self.model, time.perf_counter(), text.strip()
        require_texts("the passage", [text])
        if not text:
            raise CompressorError("the passage is empty: give at least one word")
        ids = self.tokens_of(text)
        segments = model.segment(ids, segment_tokens)
        most = model.config.memory_tokens if model.encoder.truncatable else tokens
        parts: list[Memory] = []
        for start in range(0, len(segments), AT_ONCE):
            which = f"segment {start + 1} of {len(segments)}" if len(segments) > 1 else "the passage"
            yield {"status": busy(f"Compressing {which}", start / len(segments))}
            parts += model.compress_ids(segments[start : start + AT_ONCE], most, AT_ONCE, segment_tokens)
        session.passage, session.ids, session.segment_tokens, session.written = text, ids, segment_tokens, {}
        session.memory = type(parts[0]).concatenate(parts)
        yield {"answers": ""}
        yield from self.show(session, tokens, refine_steps, f"compressed in {time.perf_counter() - started:.1f} s, ")

    def resize(self, session: Session, tokens: int, refine_steps: int) -> Steps:
        """Use another number of memory tokens, or of gradient steps, of the same compression."""
        if session.memory is None:
            yield {"status": said("Nothing is compressed yet.")}
        elif session.passage is not None and not self.model.encoder.truncatable:
            yield from self.compress(session, session.passage, tokens, session.segment_tokens, refine_steps)
        else:
            yield from self.show(session, tokens, refine_steps)

    def load(self, session: Session, path: str, text: str, tokens: int) -> Steps:
        """Take a memory from a file, and write its passage back; `text` is compared with it if it is as long."""
        try:
            memory = Memory.load(path)
        except CompressorError as error:
            raise CompressorError(str(error).replace(path, Path(path).name)) from None
        check_base(memory, self.base)
        kept = text.strip() if memory.text is None else unpack_passage(memory.text, self.base)
        ids = self.tokens_of(kept)
        fits = len(ids) == memory.passage_tokens
        session.memory, session.written = memory, {}
        session.passage, session.ids = (kept, ids) if fits else (None, [])
        did = "loaded, compared with the text above, which is as long, " if fits and memory.text is None else "loaded, "
        yield {"answers": ""}
        yield from self.show(session, tokens, 0, did)

    def tokens_of(self, text: str) -> list[int]:
        """Token ids of a text."""
        return list(self.base.tokenise([text])[0])

    def show(self, session: Session, tokens: int, refine_steps: int, did: str = "") -> Steps:
        """Truncate and refine the session's memory, and write its passage back."""
        assert session.memory is not None
        memory = session.memory
        tokens = min(tokens, *(segment.tokens for segment in memory.segments))
        memory = memory.truncate(tokens)
        session.shown = memory
        if session.passage is None and refine_steps:
            did += "not refined, which needs the passage, "
        elif refine_steps:
            whole = refine_steps * -(-len(memory.segments) // AT_ONCE)
            work = partial(refine, self.base, [memory], [session.ids], refine_steps, AT_ONCE)
            for done in (refining := Followed(work)):
                yield {"status": busy(f"Gradient steps on {tokens_named(memory.tokens)}", done / whole)}
            session.shown = refining.result[0]
        yield {
            "costs": self.costs(session),
            "texts": texts(session.passage, "", False, session.shown),
            "file": self.saved(session),
        }
        yield from self.write(session, (tokens, refine_steps), did)

    def write(self, session: Session, key: tuple[int, int], did: str = "") -> Steps:
        """Write the passage back, a picture at a time."""
        assert session.shown is not None
        base, memory, started = self.base, session.shown, time.perf_counter()
        ids: list[int] = list(session.written.get(key, []))
        parts = memory.split() if key not in session.written else []
        told = pause = 0.0
        for start in range(0, len(parts), AT_ONCE):
            some = parts[start : start + AT_ONCE]
            rows: list[list[int]] = [[] for _ in some]
            limits = [regeneration_limit(part.passage_tokens) for part in some]
            for step in stream(base, memory_prefix(base, some), [[base.bos]] * len(some), limits):
                for row, new in zip(rows, step, strict=True):
                    if new is not None and new[0] not in base.ends:
                        row.append(new[0])
                if (now := time.perf_counter()) - told > pause:
                    yield self._picture(session, memory, [*ids, *(one for row in rows for one in row)])
                    told = time.perf_counter()
                    pause = max(EVERY, 4 * (told - now))  # comparing a long text takes long
            ids += [one for row in rows for one in row]
        session.written[key] = ids
        back = self.base.tokenizer.decode(ids, skip_special_tokens=True)
        did += f"written in {time.perf_counter() - started:.1f} s" if parts else "written before"
        yield {
            "texts": texts(session.passage, back, True, memory),
            "status": said(f"{self.share(session, ids, back)}; {did}."),
        }

    def _picture(self, session: Session, memory: Memory, ids: list[int]) -> dict[str, Any]:
        back = self.base.tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd")
        done = f"Writing: {len(ids)} of about {memory.passage_tokens} tokens"
        return {
            "texts": texts(session.passage, back, False, memory),
            "status": busy(done, len(ids) / memory.passage_tokens),
        }

    def share(self, session: Session, ids: Sequence[int], back: str) -> str:
        """How much of the passage came back, in words."""
        if session.passage is None:
            return "The file keeps no text, so there is nothing to compare with"
        if back == session.passage:
            return "<b>All of it came back</b>, letter for letter"
        share = 1 - edits(session.ids, list(ids)) / max(len(ids), len(session.ids))
        return f"<b>{share:.0%} of the tokens came back</b> (ROUGE-L {rouge_l(back, session.passage):.2f})"

    def ask(self, session: Session, question: str) -> Steps:
        """Answer a question from the memory, from what it gives back, from the passage, and from nothing."""
        memory, base = session.shown, self.base
        if memory is None:
            raise CompressorError("nothing is compressed yet: give a passage, and press Compress")
        if not question.strip():
            raise CompressorError("the question is empty: ask something about the passage")
        key = (memory.segments[0].tokens, int(memory.made.get("refine_steps", 0)))
        ids = session.written.get(key)
        back = None if ids is None else base.tokenizer.decode(ids, skip_special_tokens=True)
        prefixes: dict[str, Callable[[], Any]] = {
            "memory": lambda: memory_prefix(base, [memory]),
            "recited": lambda: (
                recited_prefix(base, [memory]) if back is None else text_prefix(base, [self.tokens_of(back)])
            ),
            "full": lambda: text_prefix(base, [session.ids]),
            "none": lambda: token_prefix(base, [[]]),
        }
        found: dict[str, tuple[str, str]] = {}
        for number, (way, label) in enumerate(WAYS.items()):
            yield {"answers": answers(question, found), "status": busy(f"Answering from {label}", number / len(WAYS))}
            if way == "full" and session.passage is None:
                found[way] = ("", "the memory file keeps no text")
                continue
            try:
                (given,) = answer(base, prefixes[way](), [question], self.model.config.question_template)
                found[way] = (given.text, f"log-probability {given.logprob:.1f}")
            except CompressorError as error:  # a passage longer than the base reads at once
                found[way] = ("", str(error))
        yield {"answers": answers(question, found), "status": said("Answered.")}

    def saved(self, session: Session) -> str:
        """The memory shown, as a file."""
        assert session.shown is not None
        holder = Path(tempfile.mkdtemp(dir=self.folder))
        path = holder / f"passage-{session.shown.tokens}-tokens.memory"
        size = None if session.passage is None else len(session.passage.encode())
        signed(session.shown, self.base, self.name).save(path, "bf16", size)
        return str(path)

    def costs(self, session: Session) -> str:
        """The panel of what the memory costs beside its passage."""
        assert session.shown is not None
        memory = session.shown
        tokens, cached = memory.passage_tokens, memory.keys.numel() * 4  # two bytes for a key and a value
        cards = [
            card("Positions in the context", tokens, memory.tokens, [""]),
            card("Cache of keys and values", cached // memory.tokens * tokens, cached, ["B", "kB", "MB", "GB"]),
        ]
        note = "Keys and values in bfloat16. "
        try:
            setting = Setting(shape_of(self.model), tokens, NEW_TOKENS)
            flops = setting.full(True).flops, setting.memory(memory.tokens, False, 0, False).flops
            cards.append(
                card(f"Computing an answer of {NEW_TOKENS} tokens", *flops, ["", "", "MFLOP", "GFLOP", "TFLOP"])
            )
            note += "Computing: the passage is read anew, the memory is at hand. "
        except CompressorError as error:
            note += f"{error}. "
        if session.passage is not None:
            bytes_ = len(session.passage.encode())
            note += f"As text the passage takes {bytes_:,} bytes: a memory saves positions and computing, not disk."
        return f'<div class="kv-costs">{"".join(cards)}</div><p class="kv-note">{escape(note)}</p>'


class Followed:
    """Work in a thread, which iteration follows: the steps done so far, until it is done. Who leaves ends it.

    Args:
        work: takes a function that it calls with each count of steps done.
    """

    def __init__(self, work: Callable[[Callable[[int], object]], Any]):
        self.work, self.done, self.left = work, 0, False
        self.result: Any = None

    def advance(self, count: int) -> None:
        self.done += count
        if self.left:
            raise InterruptedError

    def __iter__(self) -> Iterator[int]:
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(self.work, self.advance)
            try:
                while not wait([future], EVERY).done:
                    yield self.done
            finally:
                self.left = True
        self.result = future.result()
