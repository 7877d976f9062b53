"""The requests that an engine has accepted and not yet ended."""

import asyncio
import contextlib

from engine.errors import EngineStopped
from engine.state import RequestState


class RequestTable:
    """Live requests by rid, counts of all there were, and the end of intake.

    An aborted request stays in the table until its last delta is sent.
    """

    def __init__(self) -> None:
        self.by_rid: dict[str, RequestState] = {}
        self.is_stopping = False
        self.num_requests = self.num_aborted = self.num_refused = 0
        self._is_drained = asyncio.Event()

    def check_open(self, is_running: bool) -> None:
        """Raise `EngineStopped` if no request can be accepted."""
        if self.is_stopping or not is_running:
            raise EngineStopped("the server is shutting down" if self.is_stopping else "the engine is not running")

    def add(self, state: RequestState) -> None:
        self.by_rid[state.rid] = state
        self.num_requests += 1

    def remove(self, state: RequestState) -> None:
        """Forget `state`, which has ended. Does nothing if it is not in the table."""
        self.by_rid.pop(state.rid, None)
        if self.is_stopping and not self.by_rid:
            self._is_drained.set()

    async def drain(self, timeout_s: float) -> None:
        """Accept nothing from now on, and wait at most `timeout_s` for the live requests to end."""
        self.is_stopping = True
        if self.by_rid and timeout_s:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._is_drained.wait(), timeout_s)
