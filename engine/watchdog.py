"""The watchdog: ends a process that hangs, after writing what it was doing.

It runs on a thread of its own, so that it also sees an event loop that is blocked. A hang: there is work and no step
has come back for `timeout_s`, or the event loop has not run a callback for `timeout_s`. If a call into C holds the
interpreter's lock, not even this thread runs: for that case the C timer of `faulthandler`, restarted at every check,
writes the stacks and ends the process.
"""

import asyncio
import contextlib
import faulthandler
import io
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Self, TextIO

logger = logging.getLogger(__name__)

EXIT_STATUS = 70  # sysexits.h: an internal error
CHECKS_PER_TIMEOUT = 20
MAX_INTERVAL_S = 1.0  # between two checks
LOCK_GRACE_S = 5.0  # beyond twice the timeout, for the C timer


class Watchdog:
    """Watches while it is entered as a context manager, on the event loop's thread. A timeout of 0 watches nothing.

    progress: returns a value that differs after each step; None while there is nothing to do.
    describe: returns what the engine is doing, as text.
    Both are called from the watchdog's thread, as is `on_hang`.
    """

    def __init__(
        self,
        timeout_s: float,
        progress: Callable[[], Any],
        describe: Callable[[], str],
        *,
        exit_process: Callable[[int], object] = os._exit,
        output: TextIO | None = None,
    ) -> None:
        self.timeout_s, self.progress, self.describe = timeout_s, progress, describe
        self.on_hang: list[Callable[[str], object]] = []  # called with the reason before the process ends
        self.interval_s = min(timeout_s / CHECKS_PER_TIMEOUT, MAX_INTERVAL_S)
        self._exit, self._output = exit_process, output
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._has_answered = True
        self._silent_s = self._stalled_s = 0.0
        self._last_progress: Any = None

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        if self.timeout_s > 0:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        last_check = time.monotonic()
        with _stderr_of_the_process() as stderr:
            while not self._stopped.wait(self.interval_s):
                if stderr is not None:
                    faulthandler.dump_traceback_later(2 * self.timeout_s + LOCK_GRACE_S, exit=True, file=stderr)
                now = time.monotonic()
                # A process that was itself stopped for an hour has not been hanging for an hour.
                reason = self.check(min(now - last_check, 2 * self.interval_s))
                last_check = now
                if reason is not None:
                    self._end(reason)
                    return

    def check(self, elapsed_s: float) -> str | None:
        """Return why the process must end, or None. elapsed_s: seconds since the last check."""
        if self._has_answered:
            self._has_answered, self._silent_s = False, 0.0
            try:
                self._loop.call_soon_threadsafe(self._answer)
            except RuntimeError:  # the loop is closed: the process is ending by itself
                return None
        else:
            self._silent_s += elapsed_s
        try:
            progress = self.progress()
        except RuntimeError:  # it changed while it was read: there is progress
            progress = None
        if progress is None or progress != self._last_progress:
            self._last_progress, self._stalled_s = progress, 0.0
        else:
            self._stalled_s += elapsed_s
        if self._silent_s >= self.timeout_s:
            return f"the event loop has not run for {self._silent_s:.1f} s"
        if self._stalled_s >= self.timeout_s:
            return f"there is work, and no step has come back for {self._stalled_s:.1f} s"
        return None

    def _answer(self) -> None:
        self._has_answered = True

    def _end(self, reason: str) -> None:
        output = self._output or sys.stderr
        try:
            output.write(self.report(reason))
            output.flush()
            for act in self.on_hang:
                try:
                    act(reason)
                except Exception as error:  # noqa: BLE001 - whatever it is, the process ends
                    output.write(f"{type(error).__name__}: {error}\n")
            logging.shutdown()
        finally:
            self._exit(EXIT_STATUS)

    def report(self, reason: str) -> str:
        """Return the stacks of all threads and tasks, and the engine's state, as text."""
        report = io.StringIO()
        report.write(f"\nWATCHDOG: {reason}; ending the process (--watchdog-timeout {self.timeout_s:g})\n")
        for title, write in (
            ("engine", lambda: report.write(self.describe())),
            ("tasks", lambda: self._write_tasks(report)),
            ("threads", lambda: _write_threads(report)),
        ):
            report.write(f"\n--- {title} ---\n")
            try:
                write()
            except Exception as error:  # noqa: BLE001 - it may change while it is read: report the rest
                report.write(f"({type(error).__name__}: {error})\n")
        report.write("\n")
        return report.getvalue()

    def _write_tasks(self, report: TextIO) -> None:
        for task in sorted(asyncio.all_tasks(self._loop), key=lambda task: task.get_name()):
            task.print_stack(file=report)


def _write_threads(report: TextIO) -> None:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        report.write(f"Thread {names.get(ident, ident)}:\n")
        report.writelines(traceback.format_stack(frame))


@contextlib.contextmanager
def _stderr_of_the_process() -> Iterator[TextIO | None]:
    """Yield a copy of standard error that `faulthandler` can write to; None if there is no standard error."""
    try:
        copy = os.dup(2)
    except OSError:
        yield None
        return
    with os.fdopen(copy, "w") as file:
        yield file
        faulthandler.cancel_dump_traceback_later()
