"""A file of replies that grows by whole lines, so that work that was paid for outlives a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any

from compressor.errors import CompressorError


class Journal:
    """Replies by key, one JSON line each, after a first line that says what was asked.

    A last line that a kill cut short is dropped when the file is opened again.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        """Opens or makes the file.

        Raises:
            CompressorError: it holds replies to something else than `identity`, or is damaged (names the line).
        """
        self.path = path
        self.entries: dict[str, str] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = self._read(identity) if path.exists() else 0
        self._file: IO[bytes] = open(path, "ab")  # noqa: SIM115
        self._file.truncate(whole)
        if whole == 0:
            self._write({"asked": identity})

    def _read(self, identity: dict[str, Any]) -> int:
        """Read what is there; returns the bytes of the whole lines, or 0 to begin anew."""
        asked: Any = None
        whole = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    value = json.loads(line)
                    if number == 1:
                        asked = dict(value["asked"])
                    else:
                        self.entries[value["key"]] = str(value["reply"])
                except (ValueError, KeyError, TypeError):
                    raise CompressorError(
                        f"{self.path} line {number} is damaged: delete the lines from there on, or the file"
                    ) from None
                whole += len(line)
        if asked == identity:
            return whole
        if not self.entries:
            return 0
        changed = [name for name in {**asked, **identity} if asked.get(name) != identity.get(name)]
        raise CompressorError(
            f"{self.path} holds replies to another request ({', '.join(changed)} differ): delete it, or choose another "
            "--journal"
        )

    def add(self, key: str, reply: str) -> None:
        """Keep a reply. It is with the operating system when this returns."""
        self._write({"key": key, "reply": reply})
        self.entries[key] = reply

    def _write(self, value: dict[str, Any]) -> None:
        self._file.write(json.dumps(value).encode() + b"\n")
        self._file.flush()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
