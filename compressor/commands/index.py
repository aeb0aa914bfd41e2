"""`compressor index`: the texts of a corpus into a store."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from compressor.commands.compress import warn_of_losses
from compressor.commands.loading import load_model
from compressor.commands.options import IndexOptions
from compressor.data.records import load_texts
from compressor.data.rows import LeftOut
from compressor.files import check_no_file
from compressor.model.fingerprints import public_name
from compressor.processes import make_accelerator
from compressor.progress import Progress, note
from compressor.storage.inspection import describe
from compressor.storage.memory_table import owned_store, text_hash
from compressor.storage.store import Store


def run(options: IndexOptions, switches: Any) -> None:
    """Add the records of a corpus to a store, on all processes, and print lines about it."""
    check_no_file(options.output)
    accelerator = make_accelerator()
    with owned_store(options.output) if accelerator.is_main_process else nullcontext():
        if printed := index(options, accelerator):
            print(printed)


def index(options: IndexOptions, accelerator: Accelerator) -> str:
    """Add this process's share; returns the lines on the main process."""
    left_out = LeftOut()
    with accelerator.main_process_first():
        records = load_texts(
            options.source,
            field=options.text_field,
            limit=options.limit,
            documents=True,
            skip_bad_records=options.skip_bad_records,
            left_out=left_out,
        )
    if left_out.total and accelerator.is_main_process:
        note(f"note: {left_out.line('records', len(records))}")
    names, texts = list(records["id"]), list(records["text"])
    model = load_model(options, accelerator.device if accelerator.num_processes > 1 else options.device)
    with accelerator.main_process_first():  # which makes the store
        store = Store.open(
            options.output,
            model,
            name=options.checkpoint,
            making=options,
            encoder=options.encoder,
            keep_text=options.keep_text,
        )
    source: dict[str, Any] = {"name": public_name(options.source), "field": options.text_field, "limit": options.limit}
    source |= {"records": len(texts), "sha256": text_hash("\0".join([*names, *map(text_hash, texts)]))}
    store.source = json.dumps(source | ({"left_out": left_out.record()} if left_out.total else {}))
    # Every process reads what is there before any of them adds to it.
    todo = store.missing(names, texts)
    accelerator.wait_for_everyone()
    mine = todo[accelerator.process_index :: accelerator.num_processes]
    with Progress("compressing", len(mine), "passages", accelerator.is_main_process) as progress:
        chosen = [names[i] for i in mine], [texts[i] for i in mine]
        respelled = gather_object(store.fill(*chosen, options.commit_every, progress.add))
    if not accelerator.is_main_process:
        return ""
    store.finish()
    shares = dict(zip(*store.columns("id", "fidelity"), strict=True))
    warn_of_losses({names[i]: shares.get(names[i]) for i in todo}, respelled, options)
    done = f"compressed {len(todo):,} passages, {len(names) - len(todo):,} were there already\n"
    return done + describe(options.output)
