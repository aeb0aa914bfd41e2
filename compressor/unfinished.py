"""Parts of long work on disk as they are made, so that what was interrupted goes on from there."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from compressor.errors import CompressorError, Stopped
from compressor.files import FolderKind, read_json, remove_folder, strangers, write_errors, write_json

MADE_WITH = "made_with.json"
PART_FILES = (MADE_WITH, f".{MADE_WITH}.*", "parts-*.jsonl", "*.safetensors")
"""Files of the folder."""
KIND = FolderKind("work that was interrupted", PART_FILES)


class Unfinished:
    """The parts of a piece of work that are done.

    Parts are JSON, and tensors in it: a line each in `parts-PROCESS.jsonl`, so that no two processes write to one
    file. All are read at the start, so that another number of processes may go on. What shapes them is beside them:
    parts that were made with anything else are refused.

    Args:
        folder: where the parts are kept until the work is done. It is made when there is the first one.
        resume: go on with what is there; else it is an error that there is something.
        again: start again, whatever is there.
        process: number of this process; process 0 writes what the parts were made with.

    Raises:
        CompressorError: there are parts and neither `resume` nor `again` is given, or they cannot be read.
    """

    def __init__(self, folder: Path, resume: bool = False, again: bool = False, process: int = 0):
        if resume and again:
            raise CompressorError("--resume goes on with what is there, --overwrite starts again: give one of them")
        self.folder, self.process = folder, process
        self.made_with: dict[str, Any] = {}
        self._written: dict[str, Any] | None = None
        self.parts: list[dict[str, Any]] = []
        """What earlier runs did."""
        if not self.exists:
            return
        if not (resume or again):
            raise CompressorError(
                f"{folder} holds work that was interrupted: add --resume to go on with it, or --overwrite to start "
                "again"
            )
        if resume:
            self.made_with = read_json(folder / MADE_WITH)
            for path in sorted(folder.glob("parts-*.jsonl")):
                self.parts += _read_lines(path)

    @property
    def exists(self) -> bool:
        """Whether there is anything to go on with."""
        return (self.folder / MADE_WITH).exists()

    def start(self) -> None:
        """Delete what is not gone on with (as `remove`); on one process, before any adds parts."""
        if not self.made_with:
            self.remove()

    def expect(self, settings: Mapping[str, Any]) -> None:
        """State what shapes the parts that follow.

        Raises:
            CompressorError: the parts that are there were made with something else.
        """
        settings = json.loads(json.dumps(settings, default=str))
        for name, value in settings.items():
            if name in self.made_with and self.made_with[name] != value:
                name, before, now = _difference(name, self.made_with[name], value)
                raise CompressorError(
                    f"{self.folder} was made with {name} = {before}, and now it is {now}: give what it was made with, "
                    "or --overwrite to start again"
                )
        self.made_with |= settings

    def add(self, parts: Sequence[Mapping[str, Any]]) -> None:
        """Write parts that are done."""
        self._open()
        path = self.folder / f"parts-{self.process}.jsonl"
        with write_errors(path), path.open("ab") as file:
            if file.tell() and not _ends_with_newline(path):
                file.write(b"\n")  # a line was cut off; `_read_lines` passes over it
            file.write("".join(json.dumps(part, default=_encoded) + "\n" for part in parts).encode())

    def tensors(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The tensors of a part of that name, read or made and written; for parts that are too large for JSON."""
        from safetensors.torch import load_file, save_file  # start-up

        path = self.folder / f"{name}.safetensors"
        if path.exists():
            return load_file(path)
        found = make()
        self._open()
        temporary = self.folder / f".{path.name}"
        with write_errors(path):
            save_file(found, temporary)
            os.replace(temporary, path)
        return found

    def keep(self, path: Path) -> None:
        """Write all parts, of every process, into one file, from which `take` goes on; when the work is done."""
        parts = [part for one in sorted(self.folder.glob("parts-*.jsonl")) for part in _read_lines(one)]
        path.write_text(
            "".join(json.dumps(part, default=_encoded) + "\n" for part in parts or self.parts), encoding="utf-8"
        )

    def take(self, path: Path) -> None:
        """Take up the parts of finished work, if it kept them."""
        if path.exists():
            self.parts += _read_lines(path)

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        # Written again when more is known: each method's weights when it is loaded.
        if self.process == 0 and self.made_with != self._written:
            write_json(self.folder / MADE_WITH, self.made_with)
            self._written = dict(self.made_with)

    def remove(self) -> None:
        """Delete the parts, when the work is done.

        Raises:
            CompressorError: other files are among them.
        """
        if self.folder.is_dir():
            if other := next(strangers(self.folder, KIND), None):
                raise CompressorError(f"{self.folder} holds {other}, which is no part of the work: move it elsewhere")
            remove_folder(self.folder, KIND)

    @contextmanager
    def interruptible(self, advice: str) -> Iterator[None]:
        """While the block runs, Ctrl-C and SIGTERM end it with a message that says how to go on.

        Args:
            advice: what to do to go on.
        """
        stopped: list[int] = []

        def stop(number: int, frame: FrameType | None) -> None:
            stopped.append(number)
            raise Stopped(number)

        with _handling(stop):
            try:
                yield
            except BaseException as error:
                # What another process's end broke here (a connection, say) is the signal's doing, too.
                if stopped and not isinstance(error, CompressorError):
                    kept = f"what is done is in {self.folder}: {advice}" if self.exists else "nothing was done yet"
                    raise Stopped(stopped[0], kept if self.process == 0 else "") from None
                raise


@contextmanager
def _handling(handler: Any) -> Iterator[None]:
    """Handle Ctrl-C and SIGTERM; only the main thread can."""
    try:
        before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:
        before = {}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _read_lines(path: Path) -> Iterator[Any]:
    """The JSON of each line; one that was cut off is passed over, and its part done again."""
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with suppress(json.JSONDecodeError):
            yield json.loads(line, object_hook=_decoded)


def _encoded(value: Any) -> Any:
    """A tensor as JSON; floats of any width come back to the last bit."""
    return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}


def _decoded(value: dict[str, Any]) -> Any:
    if value.keys() == {"tensor", "dtype"}:
        import torch  # start-up

        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]))
    return value


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _difference(name: str, before: Any, now: Any) -> tuple[str, str, str]:
    """The first place at which settings differ, and both values there."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            if before.get(key) != now.get(key):
                return _difference(f"{name}.{key}", before.get(key), now.get(key))
    return name, _shown(before), _shown(now)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
