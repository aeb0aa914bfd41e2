"""Writing files so that a reader never sees half of one, and nothing is replaced but what the command itself writes.

A file never replaces a folder, and a folder is replaced only where it holds the same kind of output and nothing else
(`FolderKind`). Links are followed: what they point to is replaced, not they. Devices and FIFOs are written to.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from compressor.errors import NO_WRITE, CompressorError, WriteError, as_path

_PACKAGE = Path(__file__).resolve().parent
PROJECT = shipped if (shipped := _PACKAGE / "shipped").is_dir() else _PACKAGE.parent
"""Where models/, data/ and results/ are: this checkout, or what a wheel carries of it."""
_SHOWN = 3
_OPEN_FILE = re.compile(r"/dev/(std(in|out|err)|fd/\d+)|/proc/\w+/fd/\d+")


def bundled(path: str) -> str:
    """A bundled model's path relative to the project, wherever the command runs; else `path` as it is."""
    return str(PROJECT / path) if not Path(path).exists() and (PROJECT / path).exists() else path


class FolderKind(NamedTuple):
    """What a folder that a command writes holds, so that it can be told from other people's folders."""

    what: str
    """For messages, with its article."""
    files: tuple[str, ...]
    """Patterns of paths in the folder; the first is a file that is in every such folder."""


@contextmanager
def atomic_file(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `target`; rename it to `target` if the block succeeds.

    On an exception the temporary file is removed and `target` is left as it was. A device or FIFO gets the bytes
    written to it when the block ends.

    Raises:
        CompressorError: as `check_file`.
        WriteError: the disk is full, a limit is reached, or permission is missing.
    """
    target = as_path(target)
    check_file(target)
    if is_special(target):
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder, target.name)
            yield temporary
            # Appending keeps what a shell's `>>` found in the file behind /dev/stdout.
            append = os.O_WRONLY | os.O_APPEND
            with write_errors(target), open(temporary, "rb") as data, open(os.open(target, append), "wb") as sink:
                shutil.copyfileobj(data, sink)
        return
    with _beside(target) as (temporary, final):
        if final.exists():
            temporary.touch()
            shutil.copymode(final, temporary)
        yield temporary
        os.replace(temporary, final)


@contextmanager
def atomic_folder(target: str | os.PathLike[str], kind: FolderKind) -> Iterator[Path]:
    """Yield a new folder beside `target`; rename it to `target` if the block succeeds.

    An existing `target` is replaced if it is empty, or an output of this kind and nothing else. On an exception the
    new folder is removed and `target` is left as it was.

    Raises:
        CompressorError: as `check_folder`.
        WriteError: as `atomic_file`.
    """
    check_folder(target, kind)
    with _beside(target) as (temporary, final):
        temporary.mkdir()
        yield temporary
        readers = stat.S_IMODE(temporary.stat().st_mode) & 0o666
        for path in temporary.rglob("*"):
            if path.is_file():  # safetensors writes for the owner alone
                path.chmod(stat.S_IMODE(path.stat().st_mode) | readers)
        if final.is_dir():
            check_folder(target, kind)  # the work may have taken hours
            # rename() cannot replace a folder: the old one is moved aside first.
            aside = temporary.with_name(temporary.name + ".replaced")
            os.rename(final, aside)
            try:
                os.rename(temporary, final)
            except OSError:
                os.rename(aside, final)
                raise
        else:
            os.rename(temporary, final)


@contextmanager
def _beside(target: str | os.PathLike[str]) -> Iterator[tuple[Path, Path]]:
    """A path to write, in a temporary folder beside `target`, and `target` with its links followed."""
    final = Path(os.path.realpath(target))
    make_folder(final.parent)
    with write_errors(Path(target)):
        holder = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        with write_errors(Path(target), holder):
            yield holder / final.name, final
    finally:
        shutil.rmtree(holder, ignore_errors=True)


@contextmanager
def write_errors(target: Path, holder: Path | None = None) -> Iterator[None]:
    """Raise a `WriteError` about `target` for what the operating system refused to write.

    Args:
        holder: errors about other paths than those in this folder, as of reading, pass unless they can only come from
            writing.
    """
    try:
        yield
    except WriteError as error:
        if holder is None or holder not in error.target.parents:
            raise
        reason, number = error.reason, error.errno
    except (OSError, SafetensorError) as error:
        number, reason = _reason(error)
        named = getattr(error, "filename", None)
        ours = holder is None or (named is not None and str(named).startswith(str(holder)))
        if isinstance(error, BrokenPipeError) or not (ours or number in NO_WRITE):
            raise
    else:
        return
    raise WriteError(target, reason, number)


def _reason(error: OSError | SafetensorError) -> tuple[int | None, str]:
    """Number and words of the operating system's error; safetensors has them in its message."""
    found = re.search(r"os error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    return number, os.strerror(number) if number else str(error)


def is_special(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a device, a FIFO or a socket, or an open file by its name in /dev or /proc."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    if stat.S_ISREG(mode):
        return _OPEN_FILE.fullmatch(os.path.abspath(path)) is not None
    return not stat.S_ISDIR(mode)


def check_file(
    target: str | os.PathLike[str], overwrite: bool = True, inputs: Iterable[str | os.PathLike[str]] = ()
) -> None:
    """Refuse an output file that would destroy something; to be called before the work.

    Args:
        overwrite: whether a file that exists may be replaced.
        inputs: files that the work reads; those that do not exist are passed over.

    Raises:
        CompressorError: `target` is a folder, a disk or a socket, is write-protected, is one of the inputs, or exists.
    """
    target = Path(target)
    if target.is_dir():
        raise CompressorError(f"{target} is a folder, and a file does not replace it: name a file")
    if os.path.islink(os.path.realpath(target)):
        raise CompressorError(f"{target} is a link that leads to itself: give another path")
    if not target.exists():
        return
    mode = target.stat().st_mode
    if what := "socket" if stat.S_ISSOCK(mode) else "disk" if stat.S_ISBLK(mode) else "":
        raise CompressorError(f"{target} is a {what}, which is not written to: give another path")
    if is_special(target):
        return
    for source in inputs:
        if os.path.exists(source) and os.path.samefile(source, target):
            raise CompressorError(f"{target} is what is read: give another path for the output")
    if not overwrite:
        raise CompressorError(f"{target} exists: choose another --output, or give --overwrite")
    # A superuser may write anything: the missing permission still says that the file is to stay.
    if not mode & 0o222 or not os.access(target, os.W_OK):
        raise CompressorError(f"{target} is write-protected: give another path, or change its permissions")


def check_folder(
    target: str | os.PathLike[str], kind: FolderKind, overwrite: bool = True, inputs: Iterable[Path] = ()
) -> None:
    """Refuse an output folder that would destroy something; to be called before the work.

    Args:
        overwrite: whether an output of this kind may be replaced.
        inputs: files and folders that the work reads.

    Raises:
        CompressorError: `target` is no folder, holds something else than this kind of output or one of the inputs, or
            exists.
    """
    target = as_path(target)
    check_no_file(target)
    if not target.is_dir() or not any(target.iterdir()):
        return
    for source in inputs:
        if target.resolve() in (source.resolve(), *source.resolve().parents):
            raise CompressorError(f"{source}, which is read, would be replaced by the output {target}: choose another")
    if not (target / kind.files[0]).exists():
        raise CompressorError(
            f"{target} holds something that is not {kind.what} (it has no {kind.files[0]}) and is not replaced: choose "
            "another folder"
        )
    if not overwrite:
        raise CompressorError(
            f"{target} exists already and holds {kind.what}: choose another folder, or give --overwrite to replace it"
        )
    if foreign := list(islice(strangers(target, kind), _SHOWN + 1)):
        more = ", ..." if len(foreign) > _SHOWN else ""
        raise CompressorError(
            f"{target} holds {kind.what} and other files ({', '.join(foreign[:_SHOWN])}{more}), so it is not replaced: "
            "move them elsewhere, or choose another folder"
        )


def make_folder(target: str | os.PathLike[str]) -> None:
    """Make a folder, its parents too, if there is none; links are followed.

    Raises:
        CompressorError: `target` is a file, or the folder cannot be made.
    """
    check_no_file(target)
    with write_errors(Path(target)):
        Path(os.path.realpath(target)).mkdir(parents=True, exist_ok=True)


def check_no_file(target: str | os.PathLike[str]) -> None:
    """Raise a `CompressorError` if `target` exists and is not a folder."""
    if os.path.exists(target) and not os.path.isdir(target):
        raise CompressorError(f"{target} is a file, and a folder does not replace it: name a folder")


@contextmanager
def owned(output: str | os.PathLike[str]) -> Iterator[None]:
    """Hold an output for this process alone while the block runs, so that no two write into one.

    The lock is the operating system's: it ends with the process, however that ends. Beside it stands who holds it.

    Raises:
        CompressorError: another process holds it; names it.
        WriteError: there is no place for the lock.
    """
    if is_special(output):
        yield
        return
    final = Path(os.path.realpath(output))
    make_folder(final.parent)
    lock, owner = FileLock(final.with_name(f".{final.name}.lock")), final.with_name(f".{final.name}.owner")
    with write_errors(Path(output)):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise CompressorError(
                f"{output} is being written by {_holder(owner)}: wait until it has ended, or choose another output"
            ) from None
    try:
        with suppress(WriteError):  # a full disk is told of where the output is written
            since = time.strftime("%Y-%m-%d %H:%M")
            write_json(owner, {"pid": os.getpid(), "host": socket.gethostname(), "since": since})
        yield
    finally:
        # Deleted while it is held: who has opened it finds it gone, and is refused once more. Windows keeps the file.
        for path in (owner, Path(lock.lock_file)):
            with suppress(OSError):
                path.unlink()
        lock.release()


def _holder(owner: Path) -> str:
    try:
        return "process {pid} on {host} since {since}".format(**read_json(owner))
    except (CompressorError, OSError, KeyError, TypeError):  # it is just starting or ending
        return "another process"


def strangers(folder: Path, kind: FolderKind) -> Iterator[str]:
    """Paths in `folder`, relative to it, that are not of this kind of output."""
    for place, folders, files in os.walk(folder):
        below = Path(place).relative_to(folder)
        for name in sorted([*(f"{name}/" for name in folders), *files]):
            path = f"{below.as_posix()}/{name}".removeprefix("./")
            if not any(fnmatch(path, pattern) or pattern.startswith(path) for pattern in kind.files):
                yield path


def remove_folder(folder: Path, kind: FolderKind) -> None:
    """Delete an output of this kind, unless something else is in it."""
    if next(strangers(folder, kind), None) is None:
        shutil.rmtree(folder, ignore_errors=True)


def write_json(target: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_file(target) as path:
        path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def unreadable(path: str | os.PathLike[str], error: OSError) -> CompressorError:
    """What is said of a file that may be whole, but cannot be opened."""
    return CompressorError(
        f"{error.filename or path} cannot be opened ({os.strerror(error.errno or 0)}): it may be whole; ask its owner, "
        "or change its permissions"
    )


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file; a missing or broken one is a `CompressorError` that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CompressorError(f"{path} does not exist") from None
    except PermissionError as error:
        raise unreadable(path, error) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CompressorError(f"{path} is not valid JSON ({error}); it may be damaged") from None


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file as lower-case hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
