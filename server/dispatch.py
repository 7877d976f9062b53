"""The first word of a command line: what it runs, imported when it is asked for.

Every other word belongs to the server, so `python -m server --model-path MODEL` is `radixloop serve MODEL`.
"""

import difflib
import importlib.util
import os
import sys
from collections.abc import Sequence

from server.commands import COMMANDS
from server.quiet import until_read


def dispatch(argv: Sequence[str]) -> int | list[str]:
    """Run a command that is not the server, and return its exit status; else return the server's own words.

    Exits on --help, --version and a first word that is no command, before the imports that take a second.
    """
    first, rest = (argv[0], list(argv[1:])) if argv else ("", [])
    if first == "serve":
        return _server_words(["--model-path", *rest] if rest and not rest[0].startswith("-") else rest)
    if first == "chat":
        from server.terminal.chat import main as chat

        return chat(rest)
    if first == "doctor":
        from server.terminal.doctor import main as doctor

        return doctor(rest)
    if first == "completion":
        from server.terminal.completion import main as complete

        return until_read(lambda: complete(rest))
    if first == "models":
        from engine.models.architectures import describe

        return until_read(lambda: print(describe()))
    if first == "router":
        return _route(rest) if has_what_servers_need() else 1
    if first and not first.startswith("-"):
        print(f"radixloop: error: {first} is no command{_hint(first)}", file=sys.stderr)
        return 2
    return _server_words(list(argv))


def _route(rest: Sequence[str]) -> int:
    from server.fleet.router import main as route

    return route(rest)


def _server_words(words: list[str]) -> int | list[str]:
    """Return the server's command line, or 1 where none can run. Exits where it only asks for help or the version."""
    if "--version" in words:
        print(f"radixloop {version()}")
        raise SystemExit(0)
    if {"-h", "--help"} & set(words):
        from server.command_line import parse_args

        parse_args(words, os.environ)
    return words if has_what_servers_need() else 1


def has_what_servers_need() -> bool:
    """Return whether more than the language is installed; if not, say what to do."""
    if importlib.util.find_spec("torch") is not None:
        return True
    print("radixloop: error: a server needs torch and more: pip install 'radixloop[server]'", file=sys.stderr)
    return False


def version() -> str:
    """Return the version that is installed."""
    from importlib import metadata

    try:
        return metadata.version("radixloop")
    except metadata.PackageNotFoundError:
        return "of a checkout that is not installed"


def _hint(word: str) -> str:
    near = difflib.get_close_matches(word, COMMANDS, 1)
    if near:
        return f"; did you mean {near[0]}?"
    return f": they are {', '.join(COMMANDS)}; to serve a model: radixloop serve {word}"
