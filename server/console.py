"""The console script `radixloop`: `python -m server` under another name."""

from collections.abc import Sequence

from server.quiet import end_silently


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m server`. Returns the exit status."""
    end_silently()
    from server.__main__ import main as serve  # takes a second

    return serve(argv)
