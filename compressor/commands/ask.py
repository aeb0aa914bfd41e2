"""`compressor ask`: an answer from a memory, or from records of a store that are like the question."""

from __future__ import annotations

from typing import Any

from compressor.commands.loading import memory_and_base
from compressor.commands.options import AskOptions
from compressor.data import speech
from compressor.data.instructions import Prompt, load_prompt
from compressor.data.prompts import QUESTION, answer_ids, question_ids
from compressor.errors import CompressorError, require
from compressor.methods.recite import recite
from compressor.model.cartridge import text_prefix
from compressor.model.config import BaseConfig
from compressor.model.decoder import label_scores, token_prefix
from compressor.model.generation import Sampling, after, answer
from compressor.model.load import load_base
from compressor.model.memory import memory_prefix, warn_of_many
from compressor.progress import note
from compressor.storage.store import Hit, Reading, Store
from compressor.streams import check_output, write_output


def run(options: AskOptions, switches: Any) -> None:
    """Write the answer to standard output; of a store, the records that it is from behind it."""
    sampling = Sampling(temperature=options.temperature, seed=options.seed)  # what is wrong with it shows at once
    prompt = Prompt() if options.prompt is None else load_prompt(options.prompt)
    asked = what_is_asked(options, prompt)
    check_output()
    template, hits = prompt.template or options.template, list[Hit]()
    # A cartridge is trained for questions, and spoils what other instructions ask for.
    of_texts = text_prefix if options.prompt is None else token_prefix
    if options.store is not None:
        store = Store.open(options.store, base_mismatch=options.base_mismatch)
        most, asked_for = store.manifest["most"], options.tokens
        fits = asked_for is None or 1 <= asked_for <= most
        require(fits, "tokens", asked_for, f"1 to {most}, which the memories of {options.store} have for a segment")
        path = options.base or store.manifest["base"]["name"]
        store.base = base = load_base(BaseConfig(path=path, dtype=options.base_dtype), options.device)
        hits = store.search(asked, options.top)
        read: Reading = "texts" if options.texts else "recite" if options.recite else "memories"
        prefix = store.together(hits, read, options.tokens, of_texts)
        template = store.manifest["template"] if template == QUESTION else template
    else:
        memory, base = memory_and_base(options)
        if not options.recite:
            warn_of_many([memory])
        prefix = of_texts(base, recite(base, [memory])) if options.recite else memory_prefix(base, [memory])
    if prompt.answer == "label":
        prompts = after(base, prefix, question_ids(base.tokenizer, [asked], template))
        labels = answer_ids(base.tokenizer, [[label] for label in prompt.labels])
        (found,) = label_scores(base, prefix, prompts, [labels])
        written = prompt.labels[found.index(max(found))]
    else:
        limit = options.new_tokens if options.prompt is None else prompt.new_tokens
        written = answer(base, prefix, [asked], template, limit, sampling)[0].text
    if not written.strip():
        note("note: the answer is empty")
    write_output(written)
    for hit in hits:
        share = "" if hit.fidelity is None else f", {hit.fidelity:.0%} comes back"
        write_output(f"{hit.score:8.3f}  {hit.id}{share}")


def what_is_asked(options: AskOptions, prompt: Prompt) -> str:
    """The question, transcribed if it is spoken, or the instruction of a preset."""
    asked = options.question
    if speech.is_speech(asked):
        asked = speech.transcribe(asked, options.speech, options.device)
    asked = prompt.asks(dict.fromkeys([*prompt.places, "question"], asked))
    if not asked.strip() or not prompt.places <= ({"labels"} if not options.question else prompt.places):
        raise CompressorError("give a question: --question 'Which data is used?'")
    if prompt.answer == "label" and not prompt.labels:
        raise CompressorError(f"the labels of {options.prompt} are those of its data: give a prompt that names them")
    return asked
