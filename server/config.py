"""The server's options, beside the engine's."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import DEBUG, EngineConfig, option
from server.media.limits import DEFAULT_COUNTS, MediaLimits, read_limits
from server.parser_names import REASONING_ALIASES, REASONING_NAMES, TOOL_ALIASES, TOOL_NAMES
from server.reading.template_variables import JSON, read_defaults

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
    default_chat_template_kwargs: str | None = option(
        None, API, 'variables of the chat template unless requests say them, as JSON: {"enable_thinking": false}'
    )
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
    enable_force_include_usage: bool = option(
        False, API, "streams of OpenAI's routes end with their usage, whether or not stream_options ask for it",
        aliases=("--stream-response-default-include-usage",),
    )  # fmt: skip
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

    @property
    def template_defaults(self) -> JSON:
        """Variables of the chat template of requests that do not say them. `ValueError` if the flag is wrong."""
        return read_defaults(self.default_chat_template_kwargs)

    def public_values(self) -> dict[str, Any]:
        """Return every option but the keys."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in SECRETS}
