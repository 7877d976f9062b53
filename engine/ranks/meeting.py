"""Wait for other ranks and hosts: a line every few seconds says who is missing, and a limit ends it."""

import logging
import socket
import threading
import time
from collections.abc import Callable

from engine.errors import ModelError

logger = logging.getLogger(__name__)

LINE_S = 5.0  # seconds between two lines about who is missing
POLL_S = 0.05
PROBE_S = 2.0  # seconds for a host to accept a connection


class Waiting:
    """Write a line every `LINE_S` seconds of waiting, and end it with `ModelError` after `limit_s`."""

    def __init__(self, limit_s: float | None = None) -> None:
        """limit_s: None: whatever ends the wait is found elsewhere."""
        self._limit_s, self._started_at = limit_s, time.monotonic()
        self._next_line_at = self._started_at + LINE_S

    @property
    def left_s(self) -> float:
        """Seconds left; `LINE_S` if there is no limit."""
        return LINE_S if self._limit_s is None else self._started_at + self._limit_s - time.monotonic()

    def go_on(self, what: str) -> None:
        """Note that `what`, such as "node 1", is still missing. Raises `ModelError` when that has taken too long."""
        now = time.monotonic()
        waited_s = now - self._started_at
        if self._limit_s is not None and waited_s >= self._limit_s:
            raise ModelError(f"waited {waited_s:.0f} s for {what} (--dist-timeout)")
        if now >= self._next_line_at:
            logger.warning("waiting for %s, for %.0f s now", what, waited_s)
            self._next_line_at = now + LINE_S


def names(kind: str, numbers: list[int]) -> str:
    """Return "rank 1", or "ranks 1, 2 and 3"."""
    *others, last = map(str, numbers)
    return f"{kind}s {', '.join(others)} and {last}" if others else f"{kind} {last}"


def resolve(host: str, port: int, waiting: Waiting) -> None:
    """Wait until `host` has an address: a name may come into being only when that host does. Raises `ModelError`."""
    reasons = [""]
    while True:
        looking = _in_thread(_look_up, host, port, reasons)
        while looking.is_alive():  # a name server that is silent may take a minute
            looking.join(max(min(waiting.left_s, POLL_S), 0.0))
            waiting.go_on(f"{host!r} to be found by its name" + (f": {reasons[-1]}" if reasons[-1] else ""))
        if not reasons[-1]:
            return
        waiting.go_on(f"{host!r} to be found by its name: {reasons[-1]}")
        time.sleep(min(POLL_S * 10, max(waiting.left_s, 0.0)))


def _look_up(host: str, port: int, reasons: list[str]) -> None:
    try:
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        reasons.append(error.strerror or str(error))
    except UnicodeError:
        reasons.append("not the name of a host")
    else:
        reasons.append("")


def _in_thread(target: Callable[..., None], *args: object) -> threading.Thread:
    """Start a thread that does not keep the process from ending."""
    thread = threading.Thread(target=target, args=args, daemon=True)
    thread.start()
    return thread


def reach(host: str, port: int, what: str, waiting: Waiting) -> None:
    """Wait until somebody accepts connections there. Raises `ModelError`."""
    while True:
        try:
            socket.create_connection((host, port), timeout=max(min(PROBE_S, waiting.left_s), POLL_S)).close()
            return
        except OSError as error:
            waiting.go_on(f"{what} at {host}:{port}: {error.strerror or error}")
            time.sleep(POLL_S)
