"""What `compressor index` does, and `compressor ask` with a store."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from compressor.commands.memory import MakeOptions, warn_of_losses
from compressor.errors import require
from compressor.progress import Progress, note


@dataclass(kw_only=True)
class IndexOptions(MakeOptions):
    """What `compressor index` takes."""

    source: str
    """Corpus, each record of which becomes a memory, as each text file of a folder does: JSONL, JSON, CSV, TSV,
    Parquet, text files, a folder, a glob, several with commas, or a shipped name."""
    output: str
    """Folder of the store, or URI of object storage; a store that is there is added to."""
    codec: str | None = "int4+ans"
    """float32, float16, bf16, int8, int4, int3, int2 or lowrank:RATE; with +ans or +huffman it is coded."""
    encoder: str | None = None
    """What makes vectors to find texts by: a sentence-transformers id, a folder, all-minilm-l6-v2 (`compressor fetch`
    gets it), or bm25 for their words instead; by default the store's own, else all-minilm-l6-v2 where it is at hand."""
    keep_text: bool = False
    """Keep the texts too, for `ask --texts` and `regenerate --exact`; bm25 always does."""
    commit_every: int = 256
    """Memories written together: what a killed run loses at most, for each process."""
    text_field: str | None = None
    """Field that holds the text; by default text or abstract."""
    limit: int | None = None
    """Only the first so many records."""
    skip_bad_records: bool = False
    """Leave records out that are null, blank or broken, up to one in twenty, and count them in the store; otherwise the
    first of them is an error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.commit_every >= 1, "commit_every", self.commit_every, "at least 1")


def index_corpus(options: IndexOptions) -> str:
    """Add the records of a corpus to a store, on all processes; returns lines about it."""
    from compressor.files import check_no_file
    from compressor.processes import make_accelerator
    from compressor.storage.store import owned_store

    check_no_file(options.output)
    accelerator = make_accelerator()
    with owned_store(options.output) if accelerator.is_main_process else nullcontext():
        return _index(options, accelerator)


def _index(options: IndexOptions, accelerator: Any) -> str:
    import json

    from accelerate.utils import gather_object

    from compressor.api import Compressor
    from compressor.data.left_out import LeftOut
    from compressor.data.records import load_texts
    from compressor.model.fingerprints import public_name
    from compressor.storage.inspection import describe
    from compressor.storage.store import Store, text_hash

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
    device = accelerator.device if accelerator.num_processes > 1 else options.device
    model = Compressor.from_pretrained(
        options.checkpoint, base=options.base, device=device, base_mismatch=options.base_mismatch
    )
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
