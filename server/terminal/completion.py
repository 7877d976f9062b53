"""`radixloop completion SHELL`: completions of every flag, made by shtab from the server's own parser."""

import argparse
import sys
from collections.abc import Sequence

SHELLS = ("bash", "zsh", "tcsh")
INSTALL = {
    "bash": "radixloop completion bash > ~/.local/share/bash-completion/completions/radixloop",
    "zsh": "radixloop completion zsh > a folder of $fpath, as _radixloop",
    "tcsh": "radixloop completion tcsh > a file that ~/.tcshrc sources",
}


def main(argv: Sequence[str]) -> int:
    """Print a script for a shell. Returns 1 if shtab is not installed."""
    parser = argparse.ArgumentParser(
        prog="radixloop completion",
        description="Print completions for a shell. To install them:",
        epilog="\n".join(f"  {line}" for line in INSTALL.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=SHELLS)
    shell = parser.parse_args(argv).shell
    try:
        import shtab
    except ImportError:
        print("radixloop completion needs shtab: pip install 'radixloop[completion]'", file=sys.stderr)
        return 1
    print(shtab.complete(command_parser(), shell=shell))
    return 0


def command_parser() -> argparse.ArgumentParser:
    """Return a parser of every command and of the server's flags, to be read and not to parse with."""
    from server.command_line import server_parser
    from server.commands import COMMANDS
    from server.terminal.chat import argument_parser as chat_parser

    parser = server_parser()
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, meaning in COMMANDS.items():
        parents = {"serve": [server_parser(add_help=False)], "chat": [chat_parser(add_help=False)]}.get(name, [])
        command = commands.add_parser(name, parents=parents, help=meaning)
        if name == "completion":
            command.add_argument("shell", choices=SHELLS)
    return parser
