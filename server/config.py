"""The server's options, and a command line made from them and the engine's."""

import argparse
import contextlib
import dataclasses
import datetime
import difflib
import math
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import orjson
import yaml

from engine.config import DEBUG, EngineConfig, option, option_type
from server.commands import COMMANDS
from server.fleet.torchrun import torchrun_options
from server.foreign_flags import (
    MODELSCOPE_VARIABLES,
    ForeignFlag,
    describe,
    find,
    translate,
    uses_modelscope,
)
from server.foreign_tables import SERVER_FLAGS
from server.media.limits import DEFAULT_COUNTS, MediaLimits, read_limits
from server.parser_names import REASONING_ALIASES, REASONING_NAMES, TOOL_ALIASES, TOOL_NAMES

HTTP, API = "HTTP server", "API"
DEFAULT_PORT = 30000
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
TOOL_CALL_PARSERS = ("none", *TOOL_NAMES, *TOOL_ALIASES)
REASONING_PARSERS = ("none", *REASONING_NAMES, *REASONING_ALIASES)
SECRETS = ("api_key", "api_key_file", "admin_api_key")
# Keys that need not stand on the command line, which every user of the machine can read.
SECRET_VARIABLES = {"api_key": "RADIXLOOP_API_KEY", "admin_api_key": "RADIXLOOP_ADMIN_API_KEY"}


@dataclass(frozen=True, kw_only=True)
class ServerConfig(EngineConfig):
    """Options of `python -m server`."""

    host: str = option("127.0.0.1", HTTP, "address to listen on; 0.0.0.0: every network interface")
    port: int = option(DEFAULT_PORT, HTTP, "port to listen on; 0: any free one")
    api_key: str | None = option(
        None, HTTP, "clients must send `Authorization: Bearer KEY`, except to /health; or set RADIXLOOP_API_KEY"
    )
    api_key_file: str | None = option(
        None, HTTP, "YAML file of `name: key` or `name: {key: ..., weight: 2, admin: true}` lines, read again when it "
        "changes; clients that wait take turns, and own what they make"
    )  # fmt: skip
    admin_api_key: str | None = option(
        None, HTTP, "key of /flush_cache, /abort_request and the dashboard's data, which then refuse all others; "
        "or set RADIXLOOP_ADMIN_API_KEY"
    )  # fmt: skip
    share_prefix_cache: bool = option(
        False, HTTP, "clients of --api-key-file share cached prompts, whose times tell what others have sent"
    )
    allowed_origins: list[str] | None = option(
        None, HTTP, "web pages that may call the server, such as https://chat.example; default: its own alone; *: all"
    )
    allowed_hosts: list[str] | None = option(
        None,
        HTTP,
        "names it may be called by, beside localhost and addresses; default: any; on loopback: none",
    )
    max_body_bytes: int = option(32 << 20, HTTP, "longest request body; beyond it: 413")
    max_held_bytes: int = option(
        1 << 30, HTTP, "memory of all requests that are being read; beyond it: 429, for one alone: 413"
    )
    max_file_bytes: int = option(512 << 20, HTTP, "longest file of /v1/files; beyond it: 413")
    file_storage_path: str | None = option(
        None, HTTP, "folder of uploaded files and batches, of this server alone; "
        f"default: ~/.cache/radixloop/files, and files-PORT with another port than {DEFAULT_PORT}",
        aliases=("--file-storage-pth",),
    )  # fmt: skip
    drain_timeout: float = option(
        60.0, HTTP, "seconds that running answers may take to end after SIGTERM or Ctrl-C; a second signal ends them"
    )
    disable_web_ui: bool = option(
        False, HTTP, "serve no pages to chat (/) and to read what the API takes (/docs)", aliases=("--disable-webui",)
    )
    skip_server_warmup: bool = option(False, HTTP, "do not generate a few tokens before the first client does")

    allowed_media_domains: list[str] | None = option(
        None, HTTP, "hosts from which pictures are fetched by URL; *: all at public addresses; default: none, "
        "clients send data URIs"
    )  # fmt: skip
    allowed_local_media_path: str | None = option(
        None, HTTP, "folder of pictures and videos that requests may name by their path; default: none"
    )
    limit_mm_per_prompt: str | None = option(
        None, HTTP, f"most pictures and videos of a request, as JSON; default: {DEFAULT_COUNTS}".replace("'", '"')
    )
    mm_process_config: str | None = option(
        None, HTTP, 'how pictures and videos are read unless requests say it, as JSON: {"image": {"max_pixels": '
        '1048576}, "video": {"fps": 1}}'
    )  # fmt: skip

    served_model_name: list[str] | None = option(
        None, API, "names by which clients may ask for the model, the first one its own; default: --model-path"
    )
    chat_template: str | None = option(None, API, "name of a chat template, or a Jinja file; default: the model's own")
    tool_call_parser: str | None = option(
        None, API, "how the model writes tool calls; default: as its chat template shows", choices=TOOL_CALL_PARSERS
    )
    disable_tool_prompt: bool = option(
        False, API, "refuse tools where the chat template shows none, instead of describing them in a system text"
    )
    reasoning_parser: str | None = option(
        None, API, "how the model marks its reasoning; default: as its chat template shows", choices=REASONING_PARSERS
    )
    stream_output: bool = option(
        False, API, "events of a streamed /generate hold new text only", aliases=("--incremental-streaming-output",)
    )
    strict_max_tokens: bool = option(
        False, API, "refuse a chat whose prompt and max_tokens exceed the context; default: its answer ends there"
    )
    keep_volatile_prompts: bool = option(
        False, API, "keep what coding agents change in each prompt (billing header, tokens left), which defeats caching"
    )
    enable_cache_report: bool = option(False, API, "tell in `usage` how many prompt tokens were cached")

    profile_dir: str = option("profiles", DEBUG, "folder of the traces that /start_profile and /stop_profile record")
    enable_metrics: bool = option(False, DEBUG, "serve Prometheus metrics at /metrics")
    otlp_traces_endpoint: str | None = option(
        None, DEBUG, "collector of OpenTelemetry that spans of requests are sent to: HOST:4317 by gRPC, HOST:4318 by "
        "HTTP (with the extra `otlp`)"
    )  # fmt: skip
    enable_trace: bool = option(False, DEBUG, "send spans to localhost:4317, if not to --otlp-traces-endpoint")
    log_level: str = option("info", DEBUG, "of the server's log", choices=LOG_LEVELS)
    log_level_http: str | None = option(None, DEBUG, "of the access log; default: --log-level", choices=LOG_LEVELS)
    access_log: str = option(
        "text", DEBUG, "a line for each HTTP request; json: with its client, tokens and times",
        choices=("text", "json", "none"),
    )  # fmt: skip
    crash_dump_folder: str | None = option(
        None, DEBUG, "where the last requests are written when one fails or a step hangs, for bench/replay.py"
    )
    log_requests: bool = option(False, DEBUG, "write a line for each request that ended")
    log_requests_level: int = option(
        0, DEBUG, "0: sizes and time; 1: also sampling parameters; 2: also prompt and answer, cut; 3: in full"
    )

    @property
    def model_name(self) -> str:
        """Name of the model where it has but one."""
        return self.model_names[0]

    @property
    def model_names(self) -> Sequence[str]:
        """Names by which clients may ask for the model."""
        return self.served_model_name or [self.model_path]

    @property
    def traces_endpoint(self) -> str | None:
        """Address of the collector of spans; None: there are none."""
        return self.otlp_traces_endpoint or ("localhost:4317" if self.enable_trace else None)

    @property
    def files_folder(self) -> Path:
        """Folder of uploaded files and batches. Servers of one user differ in their ports, and so in this."""
        if self.file_storage_path is not None:
            return Path(self.file_storage_path).expanduser()
        name = "files" if self.port == DEFAULT_PORT else f"files-{self.port}"
        return Path.home() / ".cache" / "radixloop" / name

    @property
    def media_limits(self) -> MediaLimits:
        """The limits of pictures and videos. `ValueError` names the flag that is wrong."""
        return read_limits(
            self.limit_mm_per_prompt,
            self.mm_process_config,
            self.allowed_media_domains,
            self.allowed_local_media_path,
        )

    def public_values(self) -> dict[str, Any]:
        """Return every option but the keys."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in SECRETS}


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
        _ = config.media_limits  # told before a model is loaded
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
