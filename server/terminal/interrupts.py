"""Ctrl-C in a conversation: it stops what can be stopped, and nothing else."""

from types import FrameType


class Interrupts:
    """Raises KeyboardInterrupt for the first Ctrl-C inside `with`; any other is passed over.

    So neither a second Ctrl-C nor one that comes too late, such as while a stopped answer is drawn for the last time,
    can lose that answer, leave the cursor hidden or end the conversation. Blocks may be nested: an inner one's end is
    the end of all.
    """

    def __init__(self) -> None:
        self._is_open = False

    def __enter__(self) -> None:
        self._is_open = True

    def __exit__(self, *exc_info: object) -> None:
        self._is_open = False

    def on_signal(self, _number: int, _frame: FrameType | None) -> None:
        """Handle SIGINT."""
        if self._is_open:
            self._is_open = False
            raise KeyboardInterrupt
