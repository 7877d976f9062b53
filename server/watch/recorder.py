"""Remembers the last requests, and writes them into a file when something goes wrong, to be replayed.

A file has a JSON object a line: first why and when, with the configuration; then the requests, oldest first.
`bench/replay.py` sends them to a server again.
"""

import asyncio
import dataclasses
import datetime
import logging
import os
import time
from collections import deque
from pathlib import Path
from typing import Any

import orjson
from aiohttp import web

from engine.state import RequestState, Status

logger = logging.getLogger(__name__)

MAX_REQUESTS = 1000
MAX_TOKENS = 1 << 20  # of all prompts remembered: some tens of megabytes
MIN_INTERVAL_S = 60.0  # between two files that failed requests cause


class RequestRecorder:
    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        """Make the folder. `OSError` if it cannot be made."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.config = folder, config
        self._states: deque[RequestState] = deque()
        self._num_tokens = 0
        self._last_dump_at = -MIN_INTERVAL_S
        self._writing: asyncio.Future[Path] | None = None

    def remember(self, state: RequestState) -> None:
        """Remember a request that was accepted."""
        self._states.append(state)
        self._num_tokens += state.prompt_len
        while len(self._states) > MAX_REQUESTS or (self._num_tokens > MAX_TOKENS and len(self._states) > 1):
            self._num_tokens -= self._states.popleft().prompt_len

    def observe(self, state: RequestState) -> None:
        """Note that a request has ended. If the server is to blame, the file is written, off the event loop."""
        reason = state.finish_reason
        if reason is None or reason.status_code != 500:
            return
        now = time.monotonic()
        if now - self._last_dump_at >= MIN_INTERVAL_S:
            self._last_dump_at = now
            loop = asyncio.get_running_loop()
            self._writing = loop.run_in_executor(None, self.dump, f"request {state.rid} failed: {reason.message}")
            self._writing.add_done_callback(_log_failure)

    def dump(self, reason: str) -> Path:
        """Write the file now. From any thread; `OSError` if it cannot be written."""
        states = self._states.copy()  # in one go, under the interpreter's lock
        now, at = time.perf_counter(), datetime.datetime.now(datetime.UTC)
        path = self.folder / f"requests-{at:%Y%m%d-%H%M%S-%f}-{os.getpid()}.jsonl"
        partial = path.with_suffix(".part")
        with partial.open("wb") as file:
            file.write(orjson.dumps({"reason": reason, "at": at, "config": self.config}) + b"\n")
            for state in states:
                file.write(orjson.dumps(as_record(state, now), option=orjson.OPT_NON_STR_KEYS) + b"\n")
        partial.rename(path)
        logger.error("the last %d requests are in %s: %s", len(states), path, reason)
        return path


RECORDER = web.AppKey("recorder", RequestRecorder)


def as_record(state: RequestState, now: float) -> dict[str, Any]:
    """Return the fields to send a request again, and its outcome. `arrived_s` is relative to the file's time."""
    reason = state.finish_reason
    request, times = state.request, dataclasses.asdict(state.times)
    return {
        "rid": state.rid,
        "arrived_s": state.times.arrived - now,
        "input_ids": request.input_ids,
        "sampling_params": dataclasses.asdict(state.resolved_params()),
        "stream": request.stream,
        "return_logprob": request.return_logprob,
        "logprob_start_len": request.logprob_start_len,
        "top_logprobs_num": request.top_logprobs_num,
        "token_ids_logprob": request.token_ids_logprob,
        "priority": request.priority,
        "extra_key": request.extra_key,
        "client": request.client,
        "status": state.status.name.lower(),
        "output_ids": state.output_ids if state.status is Status.FINISHED else [],
        "finish_reason": reason and reason.to_dict(len(state.output_ids)),
        "num_cached_tokens": state.num_cached_tokens,
        "num_retractions": state.num_retractions,
        "times": {name: at - now for name, at in times.items() if at},
    }


def _log_failure(writing: "asyncio.Future[Path]") -> None:
    if not writing.cancelled() and (error := writing.exception()) is not None:
        logger.error("the crash dump could not be written: %s", error)
