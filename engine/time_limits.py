"""Ends requests that have waited or run longer than the server allows."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

from engine.state import RequestState, Status

logger = logging.getLogger(__name__)

CHECK_S = 0.5  # seconds between two looks


class TimeLimits:
    """Looks at all requests twice a second; without limits, never."""

    def __init__(
        self,
        states: Mapping[str, RequestState],
        abort: Callable[[str, str, int], object],
        waiting_s: float | None,
        running_s: float | None,
    ) -> None:
        """states: the live requests by rid; abort: as of `Engine`; None: no limit."""
        self._states, self._abort = states, abort
        self._waiting_s, self._running_s = waiting_s, running_s
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._waiting_s is not None or self._running_s is not None:
            self._task = asyncio.create_task(self._run(), name="time-limits")
            self._task.add_done_callback(_report_end)

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(CHECK_S)
            self.check(time.perf_counter())

    def check(self, now: float) -> None:
        """End what is beyond its limit at time.perf_counter() `now`. One that was retracted waits without a limit."""
        for rid, state in list(self._states.items()):
            times = state.times
            if state.status is Status.WAITING and not times.scheduled:
                self._end_beyond(rid, "waited", now - times.arrived, self._waiting_s, "waiting")
            elif state.status is Status.RUNNING:
                self._end_beyond(rid, "run", now - times.scheduled, self._running_s, "running")

    def _end_beyond(self, rid: str, what: str, age_s: float, limit_s: float | None, name: str) -> None:
        if limit_s is not None and age_s > limit_s:
            message = f"the request has {what} for {age_s:.1f} s, the limit is {limit_s:g} s (--request-{name}-timeout)"
            self._abort(rid, message, 503)


def _report_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        logger.error("requests are not limited in time any more", exc_info=task.exception())
