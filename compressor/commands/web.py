"""The page of `compressor demo --web`: compress a text, watch it come back, ask about it. Needs the extra `web`.

`Page` holds what the page does, as generators of what changes on it, so that words show while they are decoded and a
run can be stopped; `page` lays it out with gradio. One compression serves every k: a nested memory is truncated.
"""

from __future__ import annotations

import difflib
import os
import re
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
from compressor.commands.demonstration import EXAMPLE_TOKENS, read_passage
from compressor.commands.loading import load_model
from compressor.commands.options import DemoConfig
from compressor.commands.shown import tokens_named
from compressor.data.examples import example
from compressor.errors import CompressorError, require_texts
from compressor.evaluation.flops import Setting
from compressor.evaluation.metrics import rouge_l
from compressor.evaluation.studies.efficiency import shape_of
from compressor.methods.interface import token_prefix
from compressor.methods.recite import recited_prefix
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
WAYS = {
    "memory": "the memory tokens",
    "recited": "the text they give back",
    "full": "the whole passage",
    "none": "no passage",
}
"""What questions are answered from, side by side."""
PARTS = ("status", "texts", "costs", "answers", "file")
"""What a step of a run may change on the page."""
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
                recited_prefix(base, [memory]) if back is None else token_prefix(base, [self.tokens_of(back)])
            ),
            "full": lambda: token_prefix(base, [session.ids]),
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
    return f'<p class="kv-asked">{escape(question.strip())}</p><div class="kv-answers">{"".join(cards)}</div>'


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


def serve(config: DemoConfig) -> None:
    """Serve the page to this machine until Ctrl-C.

    Raises:
        CompressorError: gradio is not installed, the port is taken, or there is no such checkpoint or text.
    """
    text, _, asked = read_passage(config)
    model = load_model(config)
    if config.text is None and not asked:
        text = beginning(model, text, config.length)
    with tempfile.TemporaryDirectory(prefix="kv-compressor-page-") as folder:
        made = page(model, Path(folder), text, config.question or asked or "")
        reach_this_machine()
        try:
            made.launch(server_name="127.0.0.1", server_port=config.port, inbrowser=True, **look())
        except OSError as error:
            raise CompressorError(f"cannot serve the page: {error}. Give another --port") from None


def beginning(model: Compressor, text: str, tokens: int | None = None) -> str:
    """The first tokens of a text."""
    (ids,) = model.base.tokenise([text])
    return model.base.tokenizer.decode(ids[: tokens or EXAMPLE_TOKENS], skip_special_tokens=True).strip()


def reach_this_machine() -> None:
    """Keep requests to this machine, by which the page asks itself, from a proxy in the environment."""
    for name in ("NO_PROXY", "no_proxy"):
        kept = [host for host in os.environ.get(name, "").split(",") if host.strip()]
        os.environ[name] = ",".join(dict.fromkeys([*kept, "127.0.0.1", "localhost"]))


def examples(model: Compressor) -> list[tuple[str, str, str]]:
    """Label, passage and question of each example to click; the question may be blank."""
    named = {"Unseen abstract": "abstract", "Another one": "2", "Published": "published"}
    shipped = [(label, example(name)) for label, name in named.items()]
    chosen = [
        (label, one.text if one.question else beginning(model, one.text), one.question or "") for label, one in shipped
    ]
    asked = (
        "Marie Curie was born in Warsaw in 1867. She shared the Nobel Prize in Physics in 1903, and received the one "
        "in Chemistry alone in 1911. During the war she drove a van with X-ray equipment to the hospitals at the front."
    )
    code = (
        "def mean(values):\n    if not values:\n        raise ValueError('none')\n    return sum(values) / len(values)"
    )
    return [*chosen, ("A life, a question", asked, "Where was Marie Curie born?"), ("Code", code, "")]


def page(model: Compressor, folder: Path, text: str, question: str = "") -> Any:
    """The page as `gradio.Blocks`, which starts with a text and a question; launch it with `look()`.

    Raises:
        CompressorError: gradio is not installed.
    """
    try:
        import gradio as gr
    except ImportError:
        raise CompressorError("the page needs gradio: pip install -e '.[web]'") from None

    does, most, limit = Page(model, folder), model.config.memory_tokens, model.config.max_passage_tokens

    def showing(work: Callable[..., Steps], clocked: bool = False) -> Callable[..., Iterator[list[Any]]]:
        """A run as gradio takes it: values for `PARTS`."""

        def run(session: Session, *given: Any) -> Iterator[list[Any]]:
            values = [int(value) if isinstance(value, float) else value for value in given]
            clock = values.pop() if clocked else 0
            for step in does.run(work, session, *values, clock=clock):
                if "file" in step:
                    step = {**step, "file": gr.DownloadButton(value=step["file"], interactive=True)}
                yield [step.get(name, gr.skip()) for name in PARTS]

        return run

    with gr.Blocks(title="Prompt compressor", analytics_enabled=False, delete_cache=(3600, 3600)) as made:
        session, clock = gr.State(Session()), gr.Number(0, visible=False)
        gr.HTML(
            "<header class='kv-head'><h1>A passage in a few memory tokens</h1><p>The compressor turns a text into the "
            f"keys and values of {most} memory tokens or fewer. The frozen language model "
            f"<b>{escape(named(model))}</b> writes it back from these alone, and answers questions about "
            "it.</p></header>"
        )
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=320):
                passage = gr.Textbox(text, label="Passage", lines=7, max_lines=14, elem_id="kv-passage")
                with gr.Row(elem_classes="kv-examples"):
                    shipped = examples(model)
                    clicked = [(gr.Button(label, size="sm", min_width=95), rest) for label, *rest in shipped]
            with gr.Column(scale=2, min_width=300):
                label, note = "Memory tokens (k)", "Moving it truncates what is compressed already."
                tokens = gr.Slider(1, most, most, step=1, label=label, info=note, elem_id="kv-tokens")
                with gr.Row():
                    start = gr.Button("Compress", variant="primary", elem_id="kv-compress", min_width=120)
                    stop = gr.Button("Stop", variant="stop", elem_id="kv-stop", min_width=80)
                with gr.Row():
                    save = gr.DownloadButton("Save the memory", size="sm", interactive=False, elem_id="kv-save")
                    load = gr.UploadButton("Load a memory", size="sm", elem_id="kv-load")
                with gr.Accordion("Segments and gradient steps", open=False):
                    segment_tokens = gr.Slider(
                        8, limit, min(EXAMPLE_TOKENS, limit), step=8, label="Most tokens of a segment"
                    )
                    steps = gr.Slider(0, 50, 0, step=5, label="Gradient steps on the memory: slower, and keeps more")
                gr.HTML("<p class='kv-note'><kbd>Ctrl</kbd> <kbd>Enter</kbd> compresses, <kbd>Esc</kbd> stops.</p>")
        status = gr.HTML(said("Ready."), elem_id="kv-status")
        shown = gr.HTML(elem_id="kv-texts")
        costs = gr.HTML(elem_id="kv-costs")
        with gr.Row(equal_height=True):
            hint = "Which data is used?"
            asked = gr.Textbox(
                question, label="Ask about the passage", placeholder=hint, elem_id="kv-question", scale=9
            )
            ask = gr.Button("Ask", elem_id="kv-ask", scale=1, min_width=90)
        found = gr.HTML(elem_id="kv-answers")

        outputs = [status, shown, costs, found, save]
        quiet: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "trigger_mode": "multiple"}
        private: dict[str, Any] = {**quiet, "api_visibility": "private"}
        inputs = [session, passage, tokens, segment_tokens, steps]
        compress = showing(does.compress)
        start.click(compress, inputs, outputs, api_name="compress", **quiet)
        made.load(compress, inputs, outputs, **private)
        for button, example in clicked:
            button.click(lambda example=example: example, None, [passage, asked], **private).then(
                compress, inputs, outputs, **private
            )
        resized, now = [session, tokens, steps, clock], "(session, k, steps, clock) => [session, k, steps, Date.now()]"
        tokens.input(showing(does.resize, True), resized, outputs, js=now, api_name="resize", **quiet)
        stop.click(showing(does.stop), [session], outputs, api_name="stop", **quiet)
        load.upload(showing(does.load), [session, load, passage, tokens], outputs, api_name="load", **quiet)
        ask.click(showing(does.ask), [session, asked], outputs, api_name="ask", **quiet)
        asked.submit(showing(does.ask), [session, asked], outputs, **private)
    return made


def named(model: Compressor) -> str:
    """The base's name, short."""
    path = Path(model.base.name)
    return path.parent.name if path.name == "base" else path.name


def look() -> dict[str, Any]:
    """How the page looks and which keys it knows: arguments of `gradio.Blocks.launch`."""
    import gradio as gr

    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]  # no download
    theme = gr.themes.Soft(primary_hue="indigo", font=fonts, font_mono=["ui-monospace", "monospace"])
    return {"theme": theme, "css_paths": Path(__file__).with_name("page.css"), "head": _KEYS, "footer_links": []}


_KEYS = """<script>
document.addEventListener("keydown", event => {
  const id = {Escape: "kv-stop", Enter: event.ctrlKey || event.metaKey ? "kv-compress" : ""}[event.key];
  if (id) { event.preventDefault(); document.getElementById(id)?.click(); }
});
</script>"""
