"""The console script `radixloop`: `python -m server` under another name."""

import sys
from collections.abc import Sequence

from server.dispatch import dispatch
from server.quiet import end_silently


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first word names, or the server. Returns the exit status."""
    end_silently()
    words = dispatch(sys.argv[1:] if argv is None else argv)
    if isinstance(words, int):
        return words
    from server.__main__ import main as serve  # takes a second

    return serve(words)
