"""Reading a configuration dataclass from YAML and the command line.

Precedence: defaults < YAML file (`--config`) < command line (`--training.learning-rate 2e-4`). Unknown keys are errors
that name the nearest known one.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from compressor.errors import CompressorError, nearest
from compressor.progress import FLAGS, SHORT, set_level

RENAMED = {
    "base.quantisation": "base.quantization",
    "training.accumulation": "training.gradient_accumulation_steps",
    "training.clip": "training.max_grad_norm",
    "training.schedule": "training.lr_scheduler_type",
}
"""Keys of before 0.2.0 by what they are called now."""


def settings_of(config: type, prefix: str = "") -> dict[str, Any]:
    """All settings of a configuration dataclass: dotted key to type."""
    found: dict[str, Any] = {}
    hints = get_type_hints(config)
    for item in fields(config):
        found[prefix + item.name] = hint = hints[item.name]
        if is_dataclass(hint):
            found |= settings_of(hint, f"{prefix}{item.name}.")  # type: ignore[arg-type]
    return found


def _reject_unknown(mapping: dict[str, Any], config: type, source: str, prefix: str = "") -> None:
    hints = get_type_hints(config)
    names = {item.name for item in fields(config)}
    for key, value in mapping.items():
        if key not in names:
            raise CompressorError(unknown_key(f"{prefix}{key}", config, source, prefix))
        hint = hints[key]
        if is_dataclass(hint) and isinstance(value, dict):
            _reject_unknown(value, hint, source, f"{prefix}{key}.")  # type: ignore[arg-type]
        element = next(iter(get_args(hint)), None)
        if is_dataclass(element) and isinstance(value, list):
            for entry in value:
                if isinstance(entry, dict):
                    _reject_unknown(entry, element, source, f"{prefix}{key}.")  # type: ignore[arg-type]


def unknown_key(key: str, config: type, source: str, prefix: str = "") -> str:
    """Message for a key that does not exist, naming the nearest one that does."""
    candidates = [prefix + item.name for item in fields(config)] if prefix else list(settings_of(config))
    if key in RENAMED:
        return f"{source}: {key} is called {RENAMED[key]} now"
    near = nearest(key, candidates)
    hint = f"; did you mean {near}?" if near else ""
    return f"{source}: there is no setting {key}{hint}"


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted keys."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping; anything else is a `CompressorError` that names the file."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CompressorError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CompressorError(f"{path} is not a readable YAML file: {error}") from None
    if not isinstance(content, dict):
        raise CompressorError(f"{path} must hold `key: value` settings, got {type(content).__name__}")
    return content


def list_types(config: type) -> dict[str, Any]:
    """Dotted keys of the settings that are lists of plain values, with the type of their elements."""
    return {
        key: get_args(kind)[0]
        for key, hint in settings_of(config).items()
        for kind in (hint, *get_args(hint))
        if get_origin(kind) is list and not is_dataclass(get_args(kind)[0])
    }


def _plain_names(config: type, argv: list[str], flags: Iterable[str]) -> list[str]:
    """Underscores for the dashes of option names, and `--exact true` for `--exact`."""
    kinds, switches = settings_of(config), {*flags, "print_config"}
    found = []
    for place, argument in enumerate(argv):
        name, given, value = argument.partition("=")
        key = name[2:].replace("-", "_")
        if name.startswith("--") and (key in kinds or key in switches):
            name = f"--{key}"
            if kinds.get(key) is bool and not given and (argv[place + 1 : place + 2] or ["--"])[0].startswith("--"):
                given, value = "=", "true"
        found.append(name + given + value)
    return found


def name_plain(config: type, argv: list[str], names: Sequence[str], flags: Iterable[str]) -> list[str]:
    """Put an option's name before each plain argument, wherever it stands: the first is `names[0]`, and so on.

    `-o` is `--output`. What follows an option that takes a value is that value.

    Raises:
        CompressorError: more plain arguments than names, or one for an option that is given by name too.
    """
    kinds, lists = settings_of(config), list_types(config)
    known = {*kinds, "config"} - set(flags)
    plain: list[str] = []
    found: list[str] = []
    rest = ["--output" if one == "-o" and "output" in kinds else one for one in argv]
    while rest:
        argument = rest.pop(0)
        if argument == "-" or not argument.startswith("-"):
            plain.append(argument)
            continue
        found.append(argument)
        key, given, _ = argument[2:].partition("=")
        key = key.replace("-", "_").rstrip("+")
        if argument.startswith("--") and key not in {*known, *flags, "help", "print_config"}:
            return argv  # the parser names it
        if given or key not in known or not rest or not argument.startswith("--"):
            continue
        if kinds.get(key) is bool:
            takes = [rest[0].lower() in ("true", "false")]
        elif key in lists:
            number = lists[key] in (int, float)
            takes = [not one.startswith("--") and not (number and one[:1].isalpha()) for one in rest]
        else:
            takes = [not rest[0].startswith("--")]
        count = [*takes, False].index(False)
        found, rest = found + rest[:count], rest[count:]
    for name, value in zip(names, plain, strict=False):
        if any(one == f"--{name}" or one.startswith(f"--{name}=") for one in found):
            raise CompressorError(f"{value!r} stands for --{name}, which is given too: leave one of them out")
    if len(plain) > len(names):
        raise CompressorError(
            f"{plain[len(names)]!r} is one too many: without its name only {', '.join(names)} is given"
        )
    return [*(part for pair in zip(names, plain, strict=False) for part in (f"--{pair[0]}", pair[1])), *found]


def join_lists(config: type, argv: list[str]) -> list[str]:
    """Let lists be written with spaces: `--tokens 16 4 1` becomes `--tokens [16,4,1]`."""
    lists = list_types(config)
    joined: list[str] = []
    rest = list(argv)
    while rest:
        key, given, value = rest.pop(0).partition("=")
        if given and not value.startswith("[") and key[:2] == "--" and key[2:] in lists:
            rest[:0] = [value]  # --train=FILE is --train FILE
            given = ""
        joined.append(f"{key}={value}" if given else key)
        element = lists.get(joined[-1][2:]) if joined[-1].startswith("--") else None
        values = []
        while element is not None and rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        if len(values) == 1 and values[0].startswith("["):
            joined.append(values[0])
        elif values:
            # Numbers go through as they are, so that the parser's message shows what was typed.
            plain = values if element in (int, float) else [json.dumps(value) for value in values]
            joined.append(f"[{','.join(plain)}]")
    return joined


def _typed(config: type, argv: list[str]) -> dict[str, str]:
    """Values of options that are text or nothing, as they were typed.

    The parser takes for nothing whatever is so in YAML: `#1 of what?`, a comment, as well as `null`.
    """
    optional = {key for key, hint in settings_of(config).items() if {*get_args(hint)} == {str, type(None)}}
    found = {}
    for argument, following in zip(argv, [*argv[1:], ""], strict=False):
        key, given, value = argument[2:].partition("=")
        if argument.startswith("--") and key in optional:
            found[key] = value if given else following
    return {key: value for key, value in found.items() if value not in ("null", "~")}


class _Parser(ArgumentParser):
    """Its --help names options as people write them: with dashes, and switches without a value."""

    def format_help(self, *given: Any, **named: Any) -> str:
        text = super().format_help(*given, **named).replace(" {true,false}", "")
        return re.sub(r"--[a-z][\w.]*", lambda found: found[0].replace("_", "-"), text)


@cache
def _parser(config: type, description: str, flags: tuple[tuple[str, str], ...], plain: tuple[str, ...]) -> _Parser:
    # The texts under the fields of a configuration are what --help says about them.
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    needed = [one.name for one in fields(config) if one.default is one.default_factory is MISSING]
    named = ["-o OUTPUT" if name == "output" else f"--{name} {name.upper()}" for name in needed if name not in plain]
    usage = " ".join([description.partition(":")[0], *map(str.upper, plain), *named, "[options]"])
    parser = _Parser(usage=usage, description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with settings")
    for name, text in flags:
        short = [key for key, value in SHORT.items() if value == name]
        parser.add_argument(*short, f"--{name}", action="store_true", help=text)
    # The names of inherited types are those of the module they stand in: unresolved ones would go unchecked.
    config.__init__.__annotations__ |= get_type_hints(config)  # type: ignore[misc]
    parser.add_class_arguments(config)
    return parser


KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "list": "a list"}
"""Types in words."""


def _plainly(said: str, command: str) -> str:
    """What the parser says, in the manner of our own messages; what is not known here stays as it is."""
    if lacking := re.fullmatch(r"the following arguments are required: (.*)", said):
        names = " and ".join(f"--{name.replace('_', '-')}" for name in lacking[1].split(", "))
        return f"{names} must be given: `{command} --help` has an example"
    key, given = re.match(r'Parser key "([^"]+)":', said), re.search(r"G(?:ot|iven) value: (.*)", said)
    kinds = [KINDS.get(kind) for kind in re.findall(r"Expected a <class '(\w+)'>", said) if kind != "NoneType"]
    kinds += [f"one of {names.replace(chr(39), '')}" for names in re.findall(r"typing\.Literal\[(.*?)\]", said)]
    if key is None or given is None or not kinds or None in kinds:
        return said
    return f"{key[1]} = {given[1]!r}: it must be {' or '.join(dict.fromkeys(map(str, kinds)))}"


def parse_config(
    config: type,
    argv: list[str] | None,
    description: str,
    flags: dict[str, str] | None = None,
    plain: Sequence[str] = (),
) -> tuple[Any, Namespace]:
    """Parse `--config FILE` and overrides into `config`.

    Args:
        config: dataclass to fill.
        argv: arguments; None means the process's own. Lists may be written with spaces (`join_lists`).
        description: for `--help`; what stands before its colon is the command.
        flags: extra on/off options, name to help text.
        plain: options that may be given without their names, in this order.

    Returns:
        The validated dataclass and a namespace with the extra flags.

    Raises:
        CompressorError: unknown key or value out of range.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    argv = [f"--{SHORT[argument]}" if argument in SHORT else argument for argument in argv]
    switches = (flags or {}) | FLAGS
    if plain:
        argv = name_plain(config, argv, plain, switches)
    argv = join_lists(config, _plain_names(config, argv, switches))
    parser = _parser(config, description, tuple(switches.items()), tuple(plain))
    known = {*settings_of(config), *switches, "config", "help", "print_config"}
    for position, argument in enumerate(argv):
        name = argument[2:].split("=", 1)[0].rstrip("+") if argument.startswith("--") else ""
        if name and name not in known:
            raise CompressorError(unknown_key(name, config, "command line"))
        if name == "config":
            path = argument.split("=", 1)[1] if "=" in argument else (argv[position + 1 : position + 2] or [""])[0]
            if not path or path.startswith("--"):
                raise CompressorError("--config needs a YAML file after it")
            _reject_unknown(read_yaml(path), config, path)
    try:
        namespace = parser.parse_args(argv)
        for key, text in _typed(config, argv).items():
            namespace[key] = text
        values = parser.instantiate(namespace)
    except CompressorError:
        raise
    except Exception as error:  # jsonargparse raises its own, argparse's and YAML's errors here
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, CompressorError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        raise CompressorError(_plainly(str(error), description.partition(":")[0])) from None
    set_level(values.quiet, values.verbose)
    settings = {item.name: getattr(values, item.name) for item in fields(config)}
    return config(**settings), values
