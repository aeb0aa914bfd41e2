"""The page of `compressor demo --web`, laid out with gradio (extra `web`): compress a text, watch it come back, ask."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr

from compressor.api import Compressor
from compressor.commands.demonstration import passage_of
from compressor.commands.fragments import said
from compressor.commands.loading import load_model
from compressor.commands.options import DemoConfig
from compressor.commands.page import Page, Session, Steps
from compressor.data.examples import EXAMPLE_TOKENS, example
from compressor.errors import CompressorError

PARTS = ("status", "texts", "costs", "answers", "file")
"""What a step of a run may change on the page."""


def serve(config: DemoConfig) -> None:
    """Serve the page to this machine until Ctrl-C.

    Raises:
        CompressorError: the port is taken, or there is no such checkpoint or text.
    """
    with tempfile.TemporaryDirectory(prefix="kv-compressor-page-") as folder:
        made = page_of(config, Path(folder))
        reach_this_machine()
        try:
            made.launch(server_name="127.0.0.1", server_port=config.port, inbrowser=True, **look())
        except OSError as error:
            raise CompressorError(f"cannot serve the page: {error}. Give another --port") from None


def page_of(config: DemoConfig, folder: Path) -> gr.Blocks:
    """The page as the command's options ask for it; memory files lie in `folder` until they are downloaded."""
    text, _, asked, most = passage_of(config)
    model = load_model(config)
    if length := config.length or most:
        text = beginning(model, text, length)
    return page(model, folder, text, config.question or asked or "")


def beginning(model: Compressor, text: str, tokens: int) -> str:
    """The first tokens of a text."""
    (ids,) = model.base.tokenise([text])
    return model.base.tokenizer.decode(ids[:tokens], skip_special_tokens=True).strip()


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
        (label, beginning(model, one.text, one.length) if one.length else one.text, one.question or "")
        for label, one in shipped
    ]
    asked = (
        "Marie Curie was born in Warsaw in 1867. She shared the Nobel Prize in Physics in 1903, and received the one "
        "in Chemistry alone in 1911. During the war she drove a van with X-ray equipment to the hospitals at the front."
    )
    code = (
        "def mean(values):\n    if not values:\n        raise ValueError('none')\n    return sum(values) / len(values)"
    )
    return [*chosen, ("A question", asked, "Where was Marie Curie born?"), ("Code", code, "")]


def page(model: Compressor, folder: Path, text: str, question: str = "") -> gr.Blocks:
    """The page, which starts with a text and a question; launch it with `look()`."""
    with gr.Blocks(title="Prompt compressor", analytics_enabled=False, delete_cache=(3600, 3600)) as made:
        connect(made, laid_out(model, text, question), Page(model, folder))
    return made


def laid_out(model: Compressor, text: str, question: str) -> SimpleNamespace:
    """The parts of the page, from above to below."""
    at = SimpleNamespace(session=gr.State(Session()), clock=gr.Number(0, visible=False))
    most, limit = model.config.memory_tokens, model.config.max_passage_tokens
    gr.HTML(
        "<header class='kv-head'><h1>A passage in a few memory tokens</h1><p>The compressor turns a text into the "
        f"keys and values of {most} memory tokens or fewer. The frozen language model <b>{escape(named(model))}</b> "
        "writes it back from these alone, and answers questions about it.</p></header>"
    )
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=320):
            at.passage = gr.Textbox(text, label="Passage", lines=7, max_lines=14, elem_id="kv-passage")
            with gr.Row(elem_classes="kv-examples"):
                shipped = examples(model)
                at.examples = [(gr.Button(label, size="sm", min_width=95), rest) for label, *rest in shipped]
        with gr.Column(scale=2, min_width=300):
            truncates = model.encoder.truncatable
            does = "truncates what is compressed already" if truncates else "compresses again"
            label, note = "Memory tokens (k)", f"Moving it {does}."
            at.tokens = gr.Slider(1, most, most, step=1, label=label, info=note, elem_id="kv-tokens")
            with gr.Row():
                at.start = gr.Button("Compress", variant="primary", elem_id="kv-compress", min_width=120)
                at.stop = gr.Button("Stop", variant="stop", elem_id="kv-stop", min_width=80)
            with gr.Row():
                at.file = gr.DownloadButton(
                    "Save the memory", size="sm", interactive=False, elem_id="kv-save", min_width=110
                )
                at.load = gr.UploadButton("Load a memory", size="sm", elem_id="kv-load", min_width=110)
            with gr.Accordion("Segments and gradient steps", open=False):
                label = "Most tokens of a segment"
                chosen = model.config.segment_tokens or min(EXAMPLE_TOKENS, limit)
                at.segment_tokens = gr.Slider(8, limit, chosen, step=8, label=label)
                at.steps = gr.Slider(0, 50, 0, step=5, label="Gradient steps on the memory: slower, and keeps more")
            gr.HTML("<p class='kv-note kv-keys'><kbd>Ctrl</kbd> <kbd>Enter</kbd> compresses, <kbd>Esc</kbd> stops.</p>")
    at.status = gr.HTML(said("Ready."), elem_id="kv-status")
    at.texts = gr.HTML(elem_id="kv-texts")
    at.costs = gr.HTML(elem_id="kv-costs")
    with gr.Row(equal_height=False, elem_classes="kv-asking"):
        label, hint = "Ask about the passage", "Which data is used?"
        at.question = gr.Textbox(question, label=label, placeholder=hint, elem_id="kv-question", scale=9)
        at.ask = gr.Button("Ask", elem_id="kv-ask", scale=1, min_width=90)
    at.answers = gr.HTML(elem_id="kv-answers")
    return at


def connect(made: gr.Blocks, at: SimpleNamespace, does: Page) -> None:
    """Let the parts of a page do what they are for."""

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

    outputs = [getattr(at, name) for name in PARTS]
    quiet: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "trigger_mode": "multiple"}
    private: dict[str, Any] = {**quiet, "api_visibility": "private"}
    inputs = [at.session, at.passage, at.tokens, at.segment_tokens, at.steps]
    compress, ask = showing(does.compress), showing(does.ask)
    at.start.click(compress, inputs, outputs, api_name="compress", **quiet)
    made.load(compress, inputs, outputs, **private)
    for button, chosen in at.examples:
        button.click(lambda chosen=chosen: chosen, None, [at.passage, at.question], **private).then(
            compress, inputs, outputs, **private
        )
    resized = [at.session, at.tokens, at.steps, at.clock]
    now = "(session, k, steps, clock) => [session, k, steps, Date.now()]"
    at.tokens.input(showing(does.resize, True), resized, outputs, js=now, api_name="resize", **quiet)
    at.stop.click(showing(does.stop), [at.session], outputs, api_name="stop", **quiet)
    loaded = [at.session, at.load, at.passage, at.tokens]
    at.load.upload(showing(does.load), loaded, outputs, api_name="load", **quiet)
    at.ask.click(ask, [at.session, at.question], outputs, api_name="ask", **quiet)
    at.question.submit(ask, [at.session, at.question], outputs, **private)


def named(model: Compressor) -> str:
    """The base's name, short."""
    path = Path(model.base.name)
    return path.parent.name if path.name == "base" else path.name


def look() -> dict[str, Any]:
    """How the page looks and which keys it knows: arguments of `gradio.Blocks.launch`."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]  # no download
    theme = gr.themes.Soft(primary_hue="indigo", font=fonts, font_mono=["ui-monospace", "monospace"])
    return {"theme": theme, "css_paths": Path(__file__).with_name("page.css"), "head": _KEYS, "footer_links": []}


_KEYS = """<script>
document.addEventListener("keydown", event => {
  const id = {Escape: "kv-stop", Enter: event.ctrlKey || event.metaKey ? "kv-compress" : ""}[event.key];
  if (id) { event.preventDefault(); document.getElementById(id)?.click(); }
});
</script>"""
