"""Prepare every command of this package, before the imports that take its first second."""

import signal


def end_silently() -> None:
    """Have Ctrl-C end the process without a word, until the command says what else it does."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
