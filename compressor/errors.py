"""The one exception that stands for "the user can fix this"."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

P = ParamSpec("P")

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the operating system's errors that more space, or a higher limit, mends."""


class CompressorError(ValueError):
    """Bad input or configuration.

    The message says what was got, why it is wrong and what to do. Commands print it
    without a traceback and exit with status 2.
    """


class WriteError(CompressorError):
    """An output that the machine would not take: a full disk, a limit, a missing permission.

    Args:
        target: what was to be written; what was there before is unchanged.
        reason: the operating system's words.
        number: its `errno`, None where a library does not tell.
        kept: what is left and how to go on, by default said of the target alone.
    """

    def __init__(self, target: Path, reason: str, number: int | None = None, kept: str | None = None):
        if kept is None:
            kept = "what was there is unchanged" if target.exists() else "nothing is left there"
        full = "free some space, or raise the limit on the size of files"
        advice = full if number in FULL else f"check {target.absolute().parent} and its permissions"
        super().__init__(f"{target} could not be written ({reason}); {kept}: {advice}, or give another path")
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


def require(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Raise a `CompressorError` that names the key, the value got and the allowed range."""
    if not condition:
        raise CompressorError(f"{key} = {value!r} is out of range: it must be {allowed}")


def exits_cleanly(command: Callable[P, int | None]) -> Callable[P, int]:
    """Wrap a command's `main` so that expected failures print one message and return a status.

    Returns 2 after a `CompressorError` or a file that cannot be used, 130 after Ctrl-C (143 after a SIGTERM that the
    command handles); otherwise what the command returns.
    """

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return command(*args, **kwargs) or 0
        except CompressorError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except BrokenPipeError:
            # The reader of our output (head, less) left; there is nobody to tell.
            sys.stderr.close()
            return 141
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)  # a write knows no file name
            if error.filename is None and not full:
                raise
            what = "cannot write" if error.filename is None else f"cannot use {error.filename}"
            advice = "free some space" if full else "check the path and its permissions"
            print(f"error: {what} ({error.strerror or error}): {advice}, or give another path", file=sys.stderr)
            return 2
        except Stopped as error:
            if str(error):
                print(error, file=sys.stderr)
            return 128 + error.number
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return run
