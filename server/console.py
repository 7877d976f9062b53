"""The console script `radixloop`, and what every command of this package does first."""

import signal
from collections.abc import Sequence


def end_silently() -> None:
    """Have Ctrl-C end the process without a word, until the command says what else it does."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m server`. Returns the exit status."""
    end_silently()
    from server.__main__ import main as serve  # takes a second

    return serve(argv)
