"""GGUF files as bases: each is dequantised once into a cache folder that loads like any other base.

The cache is `$KV_COMPRESSOR_CACHE`, else `kv-compressor` in `$XDG_CACHE_HOME` or `~/.cache`. A converted file is
`bases/NAME-HASH/` there: bfloat16 safetensors, tokenizer, and `source.json`, which says what it was made from. The same
file gives the same weights everywhere: float32 as dequantised, then bfloat16.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from compressor.errors import CompressorError, WriteError, first_line, lacking
from compressor.files import FolderKind, atomic_folder, read_json, sha256, write_json
from compressor.progress import note_once
from compressor.streams import made_ours, temporary_home

CACHE = "KV_COMPRESSOR_CACHE"
"""Environment variable that names the cache folder."""
FORMAT = 1
"""Of a converted base; one of another format is made anew."""
RECORD = "source.json"
CONVERTED = FolderKind("a converted base", (RECORD, "*"))


class SourceError(CompressorError):
    """A GGUF file cannot be had from where it was looked for; it may be elsewhere."""


def cache_folders() -> list[Path]:
    """Where converted bases are looked for; they are written to the first of these that can be written."""
    if chosen := os.environ.get(CACHE):
        return [Path(chosen).expanduser().absolute() / "bases"]
    home = os.environ.get("XDG_CACHE_HOME", "")
    try:
        places = [Path(home) if os.path.isabs(home) else Path.home() / ".cache"]
    except RuntimeError:  # this user has no home
        places = []
    return [*(place / "kv-compressor" / "bases" for place in places), temporary_home() / "bases"]


def writable_cache() -> Path:
    """The first cache folder that can be written, made if need be."""
    first, *others = cache_folders()
    reason: OSError
    try:
        return _made(first)
    except OSError as error:
        reason = error
    for folder in others:
        if not made_ours(folder.parent):
            continue
        try:
            made = _made(folder)
        except OSError:
            continue
        note_once(
            f"the cache {first} cannot be written ({reason.strerror}): using {folder} (choose another with ${CACHE})"
        )
        return made
    raise CompressorError(
        f"the cache {first} cannot be written ({reason.strerror}): set {CACHE} to a folder with about three times the "
        "size of the GGUF file free"
    )


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        return folder


def cached(digest: str) -> Path | None:
    """The folder that holds the converted file with this SHA-256, whole; None if there is none."""
    for place in cache_folders():
        for folder in place.glob(f"*-{digest[:16]}"):
            try:
                record = read_json(folder / RECORD)
                sizes = {name: (folder / name).stat().st_size for name in record["files"]}
                if (record["format"], record["sha256"], record["files"]) == (FORMAT, digest, sizes):
                    return folder
            except (CompressorError, OSError, KeyError, TypeError):
                continue
    return None


def converted(name: str, digest: str, origin: str, source: Callable[[Path], Path]) -> Path:
    """The folder of a converted GGUF file; converts it if need be, in one process of those that ask at once.

    Args:
        name: of the file, which its folder is called after.
        digest: the file's SHA-256.
        origin: where it is from, for people.
        source: gives the file; it gets a temporary folder, which it may use. The hash is compared.

    Raises:
        SourceError: another hash, or what `source` raises.
        CompressorError: the file cannot be converted, or the cache cannot be written. Nothing half-written is left.
    """
    if (found := cached(digest)) is not None:
        return found
    _require_gguf()
    cache = writable_cache()
    target = cache / f"{Path(name).stem}-{digest[:16]}"
    lock = FileLock(cache / f".{target.name}.lock")
    try:
        lock.acquire(timeout=0.1)
    except Timeout:
        note_once(f"another process is converting {name}: waiting for it")
        lock.acquire()
    try:
        if (found := cached(digest)) is not None:
            return found
        for left in cache.glob(f".{target.name}.*/"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)  # if it is there, it is damaged
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=cache) as temporary:
            path = source(Path(temporary))
            if (actual := sha256(path)) != digest:
                raise SourceError(
                    f"{path.name} ({origin}) is damaged or another file: its SHA-256 is {actual[:12]}…, not "
                    f"{digest[:12]}…: fetch it again"
                )
            note_once(f"converting {name} ({origin}) to {target}: once, for about half a minute")
            _convert(path, target, {"format": FORMAT, "source": origin, "file": name, "sha256": digest})
        return target
    finally:
        lock.release()


def _require_gguf() -> None:
    from transformers.utils import is_gguf_available  # start-up

    if not is_gguf_available():
        raise lacking("a base in a GGUF file", "gguf", "gguf")


def _convert(path: Path, target: Path, record: dict[str, Any]) -> None:
    """Write the model in a GGUF file to the folder `target`, with a record of it."""
    import gguf  # optional
    import torch  # start-up
    import transformers  # start-up
    from transformers import AutoModelForCausalLM, AutoTokenizer  # start-up

    from compressor.model.fingerprints import fingerprint  # start-up

    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        weights = read.bfloat16().state_dict()
        if hasattr(read.config, "quantization_config"):
            del read.config.quantization_config
        # transformers saves no model that it has dequantised: the weights move into one that it knows nothing of.
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(read.config, dtype=torch.bfloat16)
        model.load_state_dict(weights, assign=True)
        model.tie_weights()
        record |= {"fingerprint": fingerprint(model)}
    except Exception as error:  # gguf, numpy, transformers and torch raise many kinds
        raise CompressorError(
            f"cannot read {path.name} ({type(error).__name__}: {first_line(error)}): it may be truncated, or no GGUF "
            "of a causal LM that transformers knows"
        ) from None
    try:
        with atomic_folder(target, CONVERTED) as folder, _quiet():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            files = sorted(folder.iterdir())
            sizes = {file.name: file.stat().st_size for file in files}
            record |= {
                "versions": {"gguf": version(gguf.__name__), "transformers": transformers.__version__},
                "files": sizes,
            }
            write_json(folder / RECORD, record)
    except Exception as error:  # of the disk, also through tokenizers, which raises a kind of its own
        reason = error.reason if isinstance(error, WriteError) else first_line(error)
        raise CompressorError(
            f"cannot write the converted base to {target} ({reason}): free some space there (it takes "
            f"{sum(weight.nbytes for weight in model.parameters()) >> 20:,} MB), or set {CACHE} to another folder"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress bars out of log files; the one of dequantising asks no library whether it may be shown."""
    from compressor.processes import bars_on_terminals  # start-up

    shown = sys.stderr.isatty()
    with (
        bars_on_terminals(),
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        redirect_stderr(sys.stderr if shown else nowhere),
    ):
        yield
