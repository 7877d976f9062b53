"""Prepare every command of this package, before the imports that take its first second."""

import os
import signal
import sys
from collections.abc import Callable


def end_silently() -> None:
    """Have Ctrl-C end the process without a word, until the command says what else it does."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def until_read(run: Callable[[], int | None]) -> int:
    """Run what prints a long text, until its reader has enough: `| head` closes the pipe. Returns the exit status."""
    try:
        status = run()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains as it ends
        return 0
    return status or 0
