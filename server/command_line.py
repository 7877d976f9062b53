"""Command lines made from the options of a dataclass, the server's above all, and files of options."""

import argparse
import contextlib
import dataclasses
import datetime
import difflib
import math
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import orjson
import yaml

from engine.config import option_type
from server.commands import COMMANDS
from server.config import SECRET_VARIABLES, SECRETS, ServerConfig
from server.fleet.torchrun import torchrun_options
from server.foreign_flags import MODELSCOPE_VARIABLES, ForeignFlag, describe, find, translate, uses_modelscope
from server.foreign_tables import SERVER_FLAGS


def parse_args(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> ServerConfig:
    """Return the configuration of a command line; its `--config` file gives the rest. Exits on errors.

    environ: this process's environment, for what torchrun says in it, and SGLANG_USE_MODELSCOPE.
    """
    parser = server_parser()
    given = {**keys_from(environ or {}), **read_options(parser, argv)}
    if uses_modelscope(environ or {}):
        given["use_modelscope"] = True
    try:
        config = ServerConfig(**{**given, **torchrun_options(environ or {}, given)})
        _ = config.media_limits, config.template_defaults  # told before a model is loaded
    except ValueError as error:
        parser.error(str(error))
    if not 0 <= config.log_requests_level <= 3:
        parser.error(f"--log-requests-level must be between 0 and 3, got {config.log_requests_level}")
    return config


def server_parser(*, add_help: bool = True) -> argparse.ArgumentParser:
    """Return the parser of the server's command line."""
    parser = make_parser(
        ServerConfig,
        "radixloop",
        "[serve MODEL | --model-path MODEL] [options]",
        "Serve a large language model from one process. Or, by the first word:\n\n"
        + "\n".join(f"  {name:<12}{meaning}" for name, meaning in COMMANDS.items()),
        SERVER_FLAGS,
        add_help=add_help,
    )
    parser.epilog = f"{parser.epilog}\n  {' or '.join(MODELSCOPE_VARIABLES)}=true in the environment: --use-modelscope"
    return parser


def keys_from(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the keys that this process's environment has."""
    return {name: environ[variable] for name, variable in SECRET_VARIABLES.items() if environ.get(variable)}


def read_options(parser: argparse.ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """Return the fields that a command line of `make_parser` gives, or else its `--config` file. Exits on errors."""
    given = _parse_known(parser, argv)
    if file := given.pop("config", None):
        given = {**_parse_known(parser, _file_arguments(parser, file)), **given}
    if not 0 <= given.get("port", 0) <= 65535:
        parser.error(f"--port must be between 0 and 65535, got {given['port']}")
    for name in ("max_body_bytes", "max_held_bytes", "max_file_bytes"):
        if given.get(name, 1) < 1:
            parser.error(f"{_flag(name)} must be at least 1, got {given[name]}")
    for name in ("drain_timeout", "watchdog_timeout", "request_waiting_timeout", "request_running_timeout"):
        if not 0 <= given.get(name, 0) < math.inf:
            parser.error(f"{_flag(name)} must be a number of seconds, at least 0, got {given[name]}")
    for name in SECRETS:
        if given.get(name) == "":  # an unset variable of a shell's: to serve everyone is not what was meant
            parser.error(f"{_flag(name)} is empty: leave it out to serve without a key")
    return given


class _Parser(argparse.ArgumentParser):
    foreign: Collection[ForeignFlag] = ()

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n{self.prog} --help lists every option.\n")


def make_parser(
    config_class: type,
    prog: str,
    usage: str,
    description: str,
    foreign: Collection[ForeignFlag] = (),
    *,
    add_help: bool = True,
) -> argparse.ArgumentParser:
    """Make flags of every field made by `option`, in groups. Unset flags are absent from the result.

    A unique prefix of a flag is enough (`--tp`). foreign: what becomes of other servers' flags.
    """
    parser = _Parser(
        prog=prog,
        usage=f"%(prog)s {usage}",
        description=description,
        epilog=describe(foreign).replace("%", "%%") if foreign else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        add_help=add_help,
    )
    parser.foreign = foreign
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; the command line goes before it")
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        name = field.metadata["group"]
        group = groups.get(name) or groups.setdefault(name, parser.add_argument_group(name))
        scalar, is_list = option_type(field.type)
        text = field.metadata["help"]
        settings: dict[str, Any] = {"dest": field.name, "help": text.replace("%", "%%")}
        if scalar is bool:
            settings["action"] = "store_true"
        else:
            settings |= {"type": whole_number if scalar is int else scalar, "metavar": scalar.__name__.upper()}
            if field.metadata["choices"]:
                settings |= {"choices": field.metadata["choices"], "metavar": None}
            if is_list:
                settings["nargs"] = "+"
            if field.default not in (None, dataclasses.MISSING):
                settings["help"] += f" (default: {field.default})".replace("%", "%%")
        group.add_argument(_flag(field.name), *field.metadata["aliases"], **settings)
    return parser


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _parse_known(parser: argparse.ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    try:
        argv = translate(argv, _foreign(parser), lambda text: print(f"{parser.prog}: {text}", file=sys.stderr))
    except ValueError as error:
        parser.error(str(error))
    values, unknown = parser.parse_known_args(argv)
    switches = {flag for action in parser._actions if action.nargs == 0 for flag in action.option_strings}
    unknown = [word for word in unknown if "--" + word.removeprefix("--no-") not in switches]  # all are off by default
    if unknown:
        flag = unknown[0].partition("=")[0]
        parser.error(f"unknown argument: {flag}{_hint(flag, _known_flags(parser))}")
    return {name: _listed(value) for name, value in vars(values).items()}


def _listed(value: Any) -> Any:
    """Return a list of texts that is written as JSON, as vLLM takes some, as a list; anything else as it is."""
    if isinstance(value, list) and len(value) == 1 and str(value[0]).startswith("["):
        with contextlib.suppress(orjson.JSONDecodeError):
            return [str(one) for one in orjson.loads(value[0])]
    return value


def whole_number(text: str) -> int:
    """Return a number as vLLM reads it, too: `8k` is 8,000 and `8K` 8,192."""
    if (found := re.fullmatch(r"([-+]?[0-9.]+)([kmgKMG])", text)) is None:
        return int(text)
    step = 1000 if found[2].islower() else 1024
    return int(float(found[1]) * step ** (1 + "kmg".index(found[2].lower())))


whole_number.__name__ = "int"  # as argparse names it in an error


def _foreign(parser: argparse.ArgumentParser) -> Collection[ForeignFlag]:
    return parser.foreign if isinstance(parser, _Parser) else ()


def _known_flags(parser: argparse.ArgumentParser) -> list[str]:
    return [flag for action in parser._actions for flag in action.option_strings]


def _hint(flag: str, known: Sequence[str], dashes: str = "--") -> str:
    """Return a hint at the known flag that a slip of the keys may have made `flag` of; empty if there is none.

    Word by word, and short words must be right: `--ep-size` is no slip for `--tp-size`.
    """
    words = flag.strip("-").replace("_", "-").split("-")
    for other in known:
        others = other.strip("-").split("-")
        if "".join(words) == "".join(others) or (len(words) == len(others) and all(map(_may_be, words, others))):
            return f"; did you mean {dashes}{other.strip('-')}?"
    return ""


def _may_be(word: str, meant: str) -> bool:
    is_close = difflib.SequenceMatcher(None, word, meant).ratio() >= 0.75
    return word == meant or (min(len(word), len(meant)) >= 3 and word[0] == meant[0] and is_close)


def _file_arguments(parser: argparse.ArgumentParser, file: str) -> list[str]:
    """Return the options of a YAML file as if they stood on the command line."""
    try:
        text = Path(file).read_bytes()
        values, as_written = yaml.safe_load(text), yaml.load(text, yaml.BaseLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(f"--config {file}: {error}")
    if not isinstance(values, dict):
        parser.error(f"--config {file}: the file must hold `option: value` lines")
    for key, value in values.items():
        if _is_number_or_date(value):
            values[key] = as_written.get(key, value)  # a key of digits keeps its zeros
    return to_arguments(parser, values, f"--config {file}")


def _is_number_or_date(value: Any) -> bool:
    return isinstance(value, (int, float, datetime.date)) and not isinstance(value, bool)


def to_arguments(parser: argparse.ArgumentParser, values: Mapping[str, Any], source: str) -> list[str]:
    """Return options by name as if they stood on the command line. Exits on those that `parser` does not know."""
    known = _known_flags(parser)
    arguments: list[str] = []
    for key, value in values.items():
        flag = _flag(str(key))
        if (flag not in known and find(flag, _foreign(parser)) is None) or flag == "--config":
            parser.error(f"{source}: unknown option {key}{_hint(flag, known, dashes='')}")
        if isinstance(value, list):
            arguments += [flag, *map(_word, value)]
        elif value is True:
            arguments.append(flag)
        elif value is not False and value is not None:
            arguments.append(f"{flag}={_word(value)}")
    return arguments


def _word(value: Any) -> str:
    """Return a value as it stands on a command line: what is structured as JSON."""
    return orjson.dumps(value).decode() if isinstance(value, (dict, list)) else str(value)
