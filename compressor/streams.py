"""Where a command meets the system: how it ends, and standard streams that are closed, full, or lack a letter."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import IO, ParamSpec

from compressor.errors import FULL, MORE_SPACE, NO_WRITE, CompressorError, Stopped, WriteError

P = ParamSpec("P")

_NAMES = ("stdin", "stdout", "stderr")
_closed: set[str] = set()


def prepare() -> None:
    """Make the standard streams usable, whatever they are; a command calls it first.

    A letter that a stream cannot show is replaced by a question mark. A stream that was closed becomes one without
    content; its number is taken, so that no library writes its messages into a file that happens to get it.
    """
    for number, name in enumerate(_NAMES):
        stream = getattr(sys, name)
        if stream is None:
            _closed.add(name)
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
            setattr(sys, name, open(os.devnull, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115
        elif number and getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def usable_home() -> None:
    """Give the caches of data sets a place where the home cannot be written; called before `datasets` is imported.

    A folder in the temporary one stands in, and a line says so.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = Path(os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")).expanduser()
    places = {"HF_DATASETS_CACHE": "datasets", "HF_MODULES_CACHE": "modules"}
    if not (home / "hub").is_dir():  # where it is, what it holds can be read
        places["HF_HUB_CACHE"] = "hub"
    missing = {name: part for name, part in places.items() if name not in os.environ}
    if not missing or _takes_files(home):
        return
    instead = temporary_home()
    instead = (
        instead if made_ours(instead) and _takes_files(instead) else Path(tempfile.mkdtemp(prefix="kv-compressor-"))
    )
    os.environ.update({name: str(instead / part) for name, part in missing.items()})
    if os.environ.get("RANK", "0") == "0":
        print(
            f"note: {home} cannot be written: caches are in {instead} ($HF_HOME names another place)", file=sys.stderr
        )


def temporary_home() -> Path:
    """This user's folder in the temporary one, for what has no other place."""
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "")
    return Path(tempfile.gettempdir()) / f"kv-compressor-{user}"


def made_ours(folder: Path) -> bool:
    """Whether a folder, which is made if there is none, is this user's: another's of its name is not trusted."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        return not folder.is_symlink() and (not hasattr(os, "getuid") or folder.stat().st_uid == os.getuid())
    except OSError:
        return False


def _takes_files(folder: Path) -> bool:
    """Whether `folder`, or the one that exists above it, takes new files."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            return True
    except OSError:
        return False


def input_stream() -> IO[bytes]:
    """Standard input.

    Raises:
        CompressorError: it is closed.
    """
    if "stdin" in _closed or sys.stdin is None:
        raise CompressorError("standard input is closed: name a file")
    return sys.stdin.buffer


def write_output(data: str | bytes) -> None:
    """Write a command's product to standard output: text and a line end, or bytes as they are.

    Raises:
        WriteError: it is closed, or takes no more.
    """
    check_output()
    try:
        if isinstance(data, str):
            print(data)
        else:
            sys.stdout.flush()
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise output_error(error) from None


def check_output() -> None:
    """Raise a `WriteError` if standard output is closed; before the work whose result it is to take."""
    if "stdout" in _closed or sys.stdout is None:
        raise WriteError("standard output", "it is closed", errno.EBADF, "open it, or write to a file")


def flush() -> None:
    """Write what is buffered.

    Raises:
        WriteError: standard output takes no more.
    """
    try:
        if sys.stdout is not None and not sys.stdout.closed:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise output_error(error) from None


def output_error(error: OSError) -> WriteError:
    """What is said when standard output cannot be written."""
    kept = MORE_SPACE if error.errno in FULL else "check where it leads"
    return WriteError("standard output", error.strerror or str(error), error.errno, kept)


def abandon_if_full() -> None:
    """Write what is buffered; where that fails let it go nowhere, since it would fail at exit again."""
    try:
        flush()
        return
    except (WriteError, BrokenPipeError):
        pass
    try:
        number = sys.stdout.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)
    except (OSError, ValueError, AttributeError):  # a stream without a file behind it
        return


def shows_unicode() -> bool:
    """Whether standard output can show any letter."""
    return (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "").replace("_", "") == "utf8"


def exits_cleanly(command: Callable[P, int | None]) -> Callable[P, int]:
    """Wrap a command's `main` so that expected failures print one message and return a status.

    Returns 2 after a `CompressorError` or a file that cannot be used, 130 after Ctrl-C (143 after a
    SIGTERM that the command handles); otherwise what the command
    returns.
    """

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        prepare()
        usable_home()
        try:
            status = command(*args, **kwargs) or 0
            flush()
            return status
        except CompressorError as error:
            abandon_if_full()
            print(f"error: {error}", file=sys.stderr)
            return 2
        except BrokenPipeError:
            # The reader of our output (head, less) left; there is nobody to tell.
            sys.stderr.close()
            return 141
        except OSError as error:
            if error.filename is None and error.errno not in NO_WRITE:  # a write knows no file name
                raise
            abandon_if_full()
            if error.filename is None:  # files have names: this is what was printed
                print(f"error: {output_error(error)}", file=sys.stderr)
                return 2
            advice = MORE_SPACE if error.errno in FULL else "check the path and its permissions"
            what = f"cannot use {error.filename} ({error.strerror or error})"
            print(f"error: {what}: {advice}, or give another path", file=sys.stderr)
            return 2
        except Stopped as error:
            if str(error):
                print(error, file=sys.stderr)
            return 128 + error.number
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return run
