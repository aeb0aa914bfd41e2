"""The one exception that stands for "the user can fix this"."""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the operating system's errors that more space, or a higher limit, mends."""
NO_WRITE = (*FULL, errno.EIO, errno.EROFS)
"""Numbers of errors that come from writing alone."""
MORE_SPACE = "free some space, or raise the limit on the size of files"


class CompressorError(ValueError):
    """Bad input or configuration.

    The message says what was got, why it is wrong and what to do. Commands print it
    without a traceback and exit with status 2.
    """


class WriteError(CompressorError):
    """An output that the machine would not take: a full disk, a limit, a missing permission.

    Args:
        target: what was to be written.
        reason: the operating system's words.
        number: its `errno`, None where a library does not tell.
        kept: what is left and how to go on; by default what is known of a file that is written whole or not at all.
    """

    def __init__(self, target: str | os.PathLike[str], reason: str, number: int | None = None, kept: str | None = None):
        target = Path(target)
        if kept is None:
            left = "what was there is unchanged" if target.exists() else "nothing is left there"
            check = f"check {target.absolute().parent} and its permissions"
            kept = f"{left}: {MORE_SPACE if number in FULL else check}, or give another path"
        super().__init__(f"{target} could not be written ({reason}); {kept}")
        self.target, self.reason, self.errno = target, reason, number


class Stopped(KeyboardInterrupt):
    """A signal ended the work.

    Args:
        number: the signal's.
        kept: what is left of the work and how to go on; "" on a process that does not speak.
    """

    def __init__(self, number: int, kept: str | None = None):
        super().__init__(f"stopped; {kept}" if kept else kept if kept == "" else "interrupted")
        self.number = number


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its kind if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like `name`; "" where none is known."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)), "")


def unknown(kind: str, name: str, known: Iterable[str]) -> CompressorError:
    """The error for a name that no thing of this kind has."""
    known = list(known)
    hint = f"did you mean {nearest(name, known)}? " if known else ""
    return CompressorError(f"there is no {kind} {name!r}; {hint}There are: {', '.join(known)}")


def lacking(what: str, package: str, extra: str, otherwise: str = "") -> CompressorError:
    """The error for an optional package, of the extra of this name, that is not installed.

    Args:
        what: what needs it.
        otherwise: what can be done without it.
    """
    return CompressorError(
        f"{what} needs {package}, which is not installed: pip install 'kv-compressor[{extra}]'"
        + (f", or {otherwise}" if otherwise else "")
    )


def require(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Raise a `CompressorError` that names the key, the value got and the allowed range."""
    if not condition and value == "":
        raise CompressorError(f"{key} is not given: it must be {allowed}")
    if not condition:
        raise CompressorError(f"{key} = {value!r} is out of range: it must be {allowed}")


def require_whole(name: str, value: Any, low: int = 1, high: int | None = None) -> None:
    """Raise a `CompressorError` unless `value` is a whole number from `low` to `high`, both included."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise CompressorError(f"{name} = {value!r} is not a whole number: give one of at least {low}")
    allowed = f"at least {low}" if high is None else f"{low} to {high}"
    require(low <= int(value) and (high is None or int(value) <= high), name, value, allowed)


def as_path(value: Any) -> Path:
    """A `Path` from a str or one; anything else, or one that no file can have, is a `CompressorError`."""
    name = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(name, str):
        raise CompressorError(f"the path is {type(value).__name__}: give a str or a Path")
    if "\0" in name:
        raise CompressorError(f"the path {name!r} holds a NUL, which no file's name has: give another")
    return Path(name)


def require_texts(name: str, values: Sequence[Any]) -> None:
    """Raise a `CompressorError` unless all are text that UTF-8 can hold."""
    for number, value in enumerate(values):
        which = name if len(values) == 1 else f"{name} {number}"
        if isinstance(value, os.PathLike):
            raise CompressorError(f"{which} is a path ({value}): read the file and give its text")
        if not isinstance(value, str):
            raise CompressorError(f"{which} is {type(value).__name__}, not text: give a str")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise CompressorError(
                f"{which} holds half of a surrogate pair at character {error.start}, which is no letter: decode the "
                "text again from its bytes"
            ) from None
