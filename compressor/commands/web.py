"""The page of `demo.py --web`: compress a text, regenerate it, ask about it. Needs the extra `web`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from compressor.commands.demonstration import (
    EXAMPLE_TOKENS,
    DemoConfig,
    answers_of,
    demonstrate,
    differences,
    load_model,
    read_passage,
    tokens_named,
)
from compressor.errors import CompressorError

if TYPE_CHECKING:
    from compressor.api import Compressor

COLOURS = {"missing": "#d62728", "added": "#2ca02c"}


def serve(config: DemoConfig) -> None:
    """Serve the page to this machine until Ctrl-C.

    Raises:
        CompressorError: gradio is not installed, the port is taken, or there is no such checkpoint or text.
    """
    text, _, asked = read_passage(config)
    model = load_model(config)
    if config.text is None:
        (ids,) = model.base.tokenise([text])
        text = model.base.tokenizer.decode(ids[: config.length or EXAMPLE_TOKENS], skip_special_tokens=True)
    made = page(model, text, config.question or asked or "")
    reach_this_machine()
    try:
        made.launch(server_name="127.0.0.1", server_port=config.port, inbrowser=True)
    except OSError as error:
        raise CompressorError(f"cannot serve the page: {error}. Give another --port") from None


def reach_this_machine() -> None:
    """Keep requests to this machine, by which the page asks itself, from a proxy in the environment."""
    for name in ("NO_PROXY", "no_proxy"):
        kept = [host for host in os.environ.get(name, "").split(",") if host.strip()]
        os.environ[name] = ",".join(dict.fromkeys([*kept, "127.0.0.1", "localhost"]))


def page(model: Compressor, text: str, question: str = "") -> Any:
    """The page as `gradio.Blocks`, which starts with a text and a question.

    Raises:
        CompressorError: gradio is not installed.
    """
    try:
        import gradio
    except ImportError:
        raise CompressorError("the page needs gradio: pip install -e '.[web]'") from None

    most = model.config.memory_tokens

    def shown(text: str, tokens: float, segment_tokens: float, refine_steps: float, question: str) -> tuple[Any, ...]:
        try:
            return described(model, text, int(tokens), int(segment_tokens), int(refine_steps), question)
        except CompressorError as error:
            raise gradio.Error(str(error), print_exception=False) from None

    with gradio.Blocks(title="KV prompt compressor", analytics_enabled=False) as made:
        gradio.Markdown("# KV prompt compressor\nA passage becomes a few memory tokens, and comes back from them.")
        with gradio.Row():
            with gradio.Column():
                passage = gradio.Textbox(text, label="Passage", lines=8, max_lines=20)
                tokens = gradio.Slider(1, most, value=most, step=1, label="Memory tokens of each segment")
                limit = model.config.max_passage_tokens
                segment_tokens = gradio.Slider(
                    8, limit, value=min(EXAMPLE_TOKENS, limit), step=8, label="Most tokens of a segment"
                )
                refine_steps = gradio.Slider(0, 50, value=0, step=5, label="Gradient steps on the memory")
                asked = gradio.Textbox(question, label="Question (optional)")
                button = gradio.Button("Compress", variant="primary")
            with gradio.Column():
                summary = gradio.Markdown()
                written = gradio.HighlightedText(
                    label="Regenerated from the memory alone",
                    color_map=COLOURS,
                    show_legend=True,
                    combine_adjacent=False,
                )
                answers = gradio.Dataframe(
                    headers=["read", "answer", "log-probability"],
                    column_widths=["26%", "52%", "22%"],
                    label="Answers",
                    interactive=False,
                    wrap=True,
                )
        inputs, outputs = [passage, tokens, segment_tokens, refine_steps, asked], [summary, written, answers]
        button.click(shown, inputs, outputs, api_name="compress")
        asked.submit(shown, inputs, outputs, api_visibility="private")
        made.load(shown, inputs, outputs, api_visibility="private")
    return made


def described(
    model: Compressor, text: str, tokens: int, segment_tokens: int, refine_steps: int, question: str
) -> tuple[str, list[tuple[str, str | None]], list[list[Any]]]:
    """Summary, regeneration with its differences, and answers (none without a question), as the page shows them."""
    if not text.strip():
        raise CompressorError("the passage is empty: give at least one word")
    asked = question.strip() or None
    back = demonstrate(
        model,
        text.strip(),
        tokens,
        segment_tokens=segment_tokens,
        question=asked,
        refine_steps=refine_steps,
        both=True,
    )
    ratio = back["passage_tokens"] / back["tokens"]
    segments = f" in {back['segments']} segments" if back["segments"] > 1 else ""
    summary = (
        f"**{back['passage_tokens']} tokens → {tokens_named(back['tokens'])}**{segments} ({ratio:.3g}x). "
        f"ROUGE-L {back['rouge_l']:.3f}, BLEU {back['bleu']:.1f}, chrF {back['chrf']:.1f}; "
        f"compressed in {back['timings']['compress']:.2f} s, "
        f"regenerated in {back['timings']['regenerate']:.2f} s."
    )
    answers = answers_of(back) if asked else []
    rows = [[label, answer, round(logprob, 2)] for label, answer, logprob in answers]
    return summary, differences(back["passage"], back["regeneration"]), rows
