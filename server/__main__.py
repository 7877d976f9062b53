"""`python -m server`, and the console script `radixloop`."""

if __name__ == "__main__":
    import sys

    from server.dispatch import dispatch
    from server.quiet import end_silently

    end_silently()  # on Ctrl-C, while the imports below take their seconds
    words = dispatch(sys.argv[1:])
    if isinstance(words, int):
        sys.exit(words)
    sys.argv[1:] = words

import asyncio
import dataclasses
import errno
import functools
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import uvloop
from aiohttp import web
from aiohttp.web_log import AccessLogger
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from engine.engine import Engine, TokenizerFacade
from engine.errors import EngineError
from engine.ranks.children import settle_garbage_collector
from engine.request import Request, SamplingParams
from engine.state import RequestState
from engine.step.first_start import start_compilers_at_first_start
from engine.watchdog import Watchdog
from server.apis.file_store import FILE_STORE
from server.app import build_app
from server.command_line import parse_args
from server.config import ServerConfig
from server.http.access_log import JsonAccessLogger
from server.http.connections import Connections
from server.http.intake import Acceptor
from server.http.keys import KeyRing
from server.http.live import new_rid
from server.http.malformed import shorten_malformed
from server.http.tracing import TracingUnavailable, check_tracing
from server.reading.chat import CHATS, Chats
from server.reading.named_template import load_chat_template, names_missing_file
from server.watch.heap import use_one_arena
from server.watch.recorder import RECORDER

logger = logging.getLogger(__name__)

ACCESS_LOG = "aiohttp.access"
# Seconds that the event loop waits for a thread that runs Python code to let it go on, five times as often as usual:
# an answer takes several passes of the loop, and each would wait so long while a long text is read on a thread.
SWITCH_S = 0.001
FAILURE_NOTICE_S = 2.0  # for clients to hear of a failure that ends the process
END_NOTICE_S = 2.0  # likewise, of the end of what the drain was too short for


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM. Returns the exit status: 0 after a signal, 1 if the server cannot start."""
    config = parse_args(sys.argv[1:] if argv is None else argv, os.environ)
    # Before torch is imported: its OpenMP threads must not spin while they wait, or they starve the event loop.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    use_one_arena()  # before those, too
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))  # a connection takes one
    sys.setswitchinterval(SWITCH_S)
    set_up_logging(config)
    console = Console(stderr=True)
    try:
        if config.node_rank > 0:
            join_node(config, console)
            return 0
        check_keys(config)
        check_paths(config)
        with bind(config.host, config.port) as listener:  # before minutes go into loading
            config = dataclasses.replace(config, port=listener.getsockname()[1])  # --port 0: any
            start_compilers_at_first_start(config)
            # Imports torch, which takes seconds, in which a signal ends the process; of `serve` it would wait for them.
            import engine.new_engine  # noqa: F401

            uvloop.run(serve(config, listener, console))
    except (EngineError, StartError) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def join_node(config: ServerConfig, console: Console) -> None:
    """Run this host's ranks for the server on the first one, until that ends."""
    from engine.build import run_rank  # imports torch, as in `serve`
    from engine.ranks.leader import run_node
    from engine.sizes import check_sizes

    check_sizes(config)
    run_node(config, run_rank, functools.partial(show_progress, console))


def show_progress(console: Console, step: str) -> None:
    console.print(step, style="dim", markup=False, highlight=False, soft_wrap=True)


class StartError(Exception):
    """The server cannot start, for a reason the user can act on."""


def set_up_logging(config: ServerConfig) -> None:
    logging.basicConfig(
        level=config.log_level.upper(), format="[%(asctime)s] %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S"
    )
    shorten_malformed()
    access_log = logging.getLogger(ACCESS_LOG)
    access_log.setLevel((config.log_level_http or config.log_level).upper())
    if config.access_log == "json":  # a line is a JSON object and nothing else
        access_log.addHandler(logging.StreamHandler())
        access_log.propagate = False


def check_keys(config: ServerConfig) -> None:
    """Find now, and not after the model has been loaded, that keys or the sender of spans are missing."""
    try:
        KeyRing(config)
        check_tracing(config.traces_endpoint)
    except (ValueError, TracingUnavailable) as error:
        raise StartError(str(error)) from None


def check_paths(config: ServerConfig) -> None:
    """Find now, and not after the model has been loaded, that a file is missing or that a folder cannot be made."""
    template = config.chat_template
    if template is not None and names_missing_file(template):
        raise StartError(f"--chat-template {template}: no such file")
    folders = {"--crash-dump-folder": config.crash_dump_folder}
    if config.file_storage_path != ServerConfig.file_storage_path:  # without the default one, most still works
        folders["--file-storage-path"] = config.file_storage_path
    for flag, folder in folders.items():
        if not folder:
            continue
        path = Path(folder).expanduser()
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StartError(f"{flag} {folder}: {error.strerror}") from None
        if not os.access(path, os.W_OK | os.X_OK):
            raise StartError(f"{flag} {folder}: not writable")


def check_template(config: ServerConfig, tokenizer: TokenizerFacade) -> None:
    """Find before the weights are loaded that there is no such chat template, or that it does not parse."""
    try:
        load_chat_template(config.chat_template, tokenizer)
    except (OSError, ValueError) as error:
        raise StartError(str(error)) from None


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to the address, not yet listening."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise StartError(f"cannot listen on --host {host!r}: {error.strerror}") from None
    except UnicodeError:  # of the encoding of names, for an empty or a long part between dots
        raise StartError(f"cannot listen on --host {host!r}: not the name of a host") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _cannot_listen(host, port, error) from None
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> StartError:
    flag = "--host" if error.errno == errno.EADDRNOTAVAIL else "--port"
    return StartError(f"cannot listen on {host}:{port}: {error.strerror}. Choose another with {flag}.")


async def serve(config: ServerConfig, listener: socket.socket, console: Console) -> None:
    """Load the model, serve until a signal, let running answers end."""
    stop = asyncio.Event()
    is_loading = True

    def on_signal() -> None:
        if is_loading:
            os._exit(0)  # the thread that loads cannot be interrupted, and there is nothing to drain
        elif not stop.is_set():
            stop.set()
        else:  # the second signal
            end_answers(engine)

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    from engine.new_engine import new_engine  # not for --help, nor before OMP_WAIT_POLICY is set: see `main`

    engine = new_engine(config)
    try:
        await engine.start(
            functools.partial(show_progress, console),
            functools.partial(check_template, config),
        )
        is_loading = False
        with Watchdog(config.watchdog_timeout, engine.progress, engine.describe) as watchdog:
            for _ in range(0 if config.skip_server_warmup else config.dp_size):  # idle replicas take turns
                await warm_up(engine, reads_text=not config.skip_tokenizer_init)
            settle_garbage_collector()
            await serve_http(engine, config, listener, console, stop, watchdog)
    except (EngineError, StartError) as error:
        if engine.has_failed:
            end_failed(console, str(error))
        raise
    finally:
        is_loading = False
        await engine.stop()


def end_answers(engine: Engine) -> None:
    engine.abort_all("the server is shutting down", status_code=503)


async def wait_for_end(engine: Engine, stop: asyncio.Event) -> str | None:
    """Wait for a signal, or for the engine's failure, and return the failure."""
    stopped, failed = asyncio.create_task(stop.wait()), asyncio.create_task(engine.failed())
    await asyncio.wait([stopped, failed], return_when=asyncio.FIRST_COMPLETED)
    for task in (stopped, failed):
        task.cancel()
    return failed.result() if failed.done() else None


def end_failed(console: Console, message: str) -> NoReturn:
    """End the process although threads of it wait for a rank that is gone."""
    console.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    logging.shutdown()
    os._exit(1)


async def warm_up(engine: Engine, *, reads_text: bool = True) -> None:
    """Generate a few tokens, so that no client pays for what happens once; a model that cannot is found now."""
    some_ids = list(range(min(8, engine.model_config.vocab_size)))
    input_ids = await engine.encode("The capital city of France is") if reads_text else some_ids
    input_ids = input_ids[: engine.context_length]
    num_tokens = min(8, engine.context_length - len(input_ids)) if engine.is_generation else 0
    params = SamplingParams(max_new_tokens=num_tokens, temperature=0.0)
    pooling = None if engine.is_generation else "last"
    request = Request(rid=f"WARMUP_{new_rid()}", input_ids=input_ids, sampling_params=params, pooling=pooling)
    async for delta in engine.generate(RequestState(request)):
        if delta.finish_reason is not None and delta.finish_reason.type == "abort":
            raise StartError(f"the first tokens could not be generated: {delta.finish_reason.message}")


async def serve_http(
    engine: Engine,
    config: ServerConfig,
    listener: socket.socket,
    console: Console,
    stop: asyncio.Event,
    watchdog: Watchdog,
) -> None:
    try:
        app = build_app(engine, config)
    except (OSError, ValueError) as error:
        raise StartError(str(error)) from error
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=config.drain_timeout + END_NOTICE_S)
    await runner.setup()
    assert runner.server is not None
    if RECORDER in app:
        watchdog.on_hang.append(app[RECORDER].dump)
    connections = Connections(
        runner.server,
        access_log=None if config.access_log == "none" else logging.getLogger(ACCESS_LOG),
        access_log_class=JsonAccessLogger if config.access_log == "json" else AccessLogger,
        access_log_format='%a "%r" %s %Tfs',
    )
    async with connections:
        try:
            try:
                acceptor = Acceptor(listener, connections, connections.make_room)
            except OSError as error:  # a server that was bound to the port at the same time has been ready first
                raise _cannot_listen(config.host, config.port, error) from None
            with acceptor:
                print_ready(console, engine, config, app)
                engine.warm_up_grammars()
                engine.start_canary()
                failure = await wait_for_end(engine, stop)
            if failure:
                await asyncio.wait([asyncio.create_task(runner.cleanup())], timeout=FAILURE_NOTICE_S)
                end_failed(console, failure)
            logger.info(
                "shutting down: running answers have %.0f s to end; a second signal ends them", config.drain_timeout
            )
            # Before aiohttp, which would wait as long once more and then cut the connections.
            asyncio.get_running_loop().call_later(config.drain_timeout, end_answers, engine)
        finally:
            await runner.cleanup()


def print_ready(console: Console, engine: Engine, config: ServerConfig, app: web.Application) -> None:
    host = f"[{config.host}]" if ":" in config.host else config.host
    url, chats, store = f"http://{host}:{config.port}", app[CHATS], app[FILE_STORE]
    table = Table(title="radixloop is ready", title_justify="left", show_header=False, box=None)
    origin = engine.tokenizer.origin
    for name, value in (
        ("address", url),
        ("in a browser", "/dashboard" if config.disable_web_ui else "/ to chat, /docs, /dashboard"),
        ("model", ", ".join(config.model_names)),
        *([("tokenizer", origin)] if origin else []),
        ("context", f"{engine.context_length:,} tokens"),
        ("KV capacity", _capacity(engine)),
        ("tool calls", _tools_in_use(chats, config.tool_call_parser)),
        ("reasoning", _parser_in_use(chats.reasoning_parser, config.reasoning_parser)),
        ("files, batches", f"none: {store.problem}" if store.problem else str(store.folder)),
    ):
        table.add_row(f"[bold]{name}[/]", escape(value))
    console.print(table)
    key = " -H 'Authorization: Bearer KEY'" if config.api_key or config.api_key_file else ""
    path, body = example_request(engine, reads_text=not config.skip_tokenizer_init)
    # On a line of its own that is never wrapped, so that it can be copied.
    console.out(f"\ncurl {url}{path} -H 'Content-Type: application/json'{key} -d '{body}'\n", highlight=False)


def _capacity(engine: Engine) -> str:
    """Return how many tokens the pools of keys and values hold."""
    num_window_tokens = engine.stats().scheduler.num_total_window_tokens
    of_windows = f"; {num_window_tokens:,} in layers that see a window" if num_window_tokens else ""
    return f"{engine.max_total_num_tokens:,} tokens{of_windows}"


def example_request(engine: Engine, *, reads_text: bool = True) -> tuple[str, str]:
    """Return the path and the body of a first request that the model can answer."""
    if not reads_text:
        path = "/generate" if engine.is_generation else "/v1/embeddings"
        return path, f'{{"{"input_ids" if engine.is_generation else "input"}": [1, 2, 3]}}'
    if engine.is_generation:
        return "/generate", '{"text": "The capital of France is", "sampling_params": {"max_new_tokens": 16}}'
    if engine.model_config.is_classifier:
        return "/classify", '{"text": "The capital of France is Paris"}'
    return "/v1/embeddings", '{"input": "The capital of France is Paris"}'


def _tools_in_use(chats: Chats, given: str | None) -> str:
    if chats.describes_tools:
        return f"{chats.tool_call_parser} (tools are described in a system text: the chat template shows none)"
    if not chats.traits.shows_tools:
        return "refused (the chat template shows none)"
    return _parser_in_use(chats.tool_call_parser, given)


def _parser_in_use(name: str | None, given: str | None) -> str:
    origin = "as asked" if given else "as the chat template writes them" if name else "the chat template shows none"
    return f"{name or 'not parsed'} ({origin})"


if __name__ == "__main__":
    sys.exit(main())
