"""/v1/batches, in OpenAI's shapes: the lines of an uploaded file, answered when nothing more urgent is to be done.

Lines run through the handlers of the endpoint that they name, a bounded number at once, below every other request's
priority.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Annotated, Literal

from aiohttp import web
from msgspec import Meta

from engine.declared import Object
from server.apis.batch import FINAL, Batch, LineHandler, LinesAtWork, Shared, check_record
from server.apis.file_store import FileStore, NotFound, new_id, read_records, shown
from server.apis.files import page_of
from server.http.owners import Client, may_find, owner_of
from server.reading.protocol import json_response, read_body


class BatchRequest(Object, kw_only=True):
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
    input_file_id: str = ""
    completion_window: Annotated[str, Meta(description="such as 24h; lines not answered by then are errors")] = "24h"
    metadata: (
        Annotated[dict[str, str], Meta(max_length=16, extra={"rule": "an object of at most 16 strings"})] | None
    ) = None


BATCH_CLIENT = Client("batches", priority=-(1 << 40))  # whoever waits goes first
MAX_CONCURRENT_LINES = 256  # of all batches
DEFAULT_LIMIT = 20  # batches listed
WINDOW = re.compile(r"([1-9]\d{0,5})([smhd])")
WINDOW_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Batches:
    def __init__(
        self,
        store: FileStore,
        handlers: Mapping[str, LineHandler],
        max_running_requests: int,
        max_line_bytes: int,
        max_held_bytes: int,
        shares_cache: bool = False,
    ) -> None:
        """`handlers`: by endpoint, the function that answers its lines. `max_held_bytes`: of all lines at work.

        `shares_cache`: of batches of different clients.
        """
        self.store = store
        self._batches: dict[str, Batch] = {}  # oldest first
        # Half of what may run: who comes while long answers are under way must find a place.
        max_lines = max(1, min(MAX_CONCURRENT_LINES, max_running_requests // 2))
        self._shared = Shared(
            store,
            store.folder / "batches",
            handlers,
            replace(BATCH_CLIENT, shares_cache=shares_cache),
            LinesAtWork(max_lines, max_held_bytes),
            max_line_bytes,
        )

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/batches", self.create),
            web.get("/v1/batches", self.list),
            web.get("/v1/batches/{batch_id}", self.retrieve),
            web.post("/v1/batches/{batch_id}/cancel", self.cancel),
        ]

    async def running(self, _: web.Application) -> AsyncIterator[None]:
        """Resume what an earlier server left, and leave what is not done to a later one: a cleanup context."""
        folder = self._shared.folder
        if self.store.open() and self.store.make_folder(folder):
            for record in read_records(folder, "batch_*.json", check_record):
                batch = self._batches[record["id"]] = Batch(record, self._shared)
                if batch.status not in FINAL:
                    batch.start()
        yield
        await self.stop()
        self.store.close()

    async def stop(self, _: web.Application | None = None) -> None:
        tasks = [batch.task for batch in self._batches.values() if batch.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def reader_of(self, file_id: str) -> str | None:
        """Return the id of the unfinished batch that reads that file."""
        for batch in self._batches.values():
            if batch.record["input_file_id"] == file_id and batch.status not in FINAL:
                return batch.id
        return None

    async def create(self, http_request: web.Request) -> web.Response:
        body = await read_body(http_request, BatchRequest)
        window = WINDOW.fullmatch(body.completion_window)
        if window is None:
            raise body.wrong("completion_window", "a number of s, m, h or d, such as 24h")
        self.store.get(http_request, body.input_file_id, "input_file_id")
        now = int(time.time())
        batch = Batch(
            {
                "id": new_id("batch_"), "object": "batch", "owner": owner_of(http_request),
                "endpoint": body.endpoint, "errors": None,
                "input_file_id": body.input_file_id, "completion_window": window[0], "status": "validating",
                "output_file_id": None, "error_file_id": None, "created_at": now, "in_progress_at": None,
                "expires_at": now + int(window[1]) * WINDOW_UNITS_S[window[2]], "finalizing_at": None,
                "completed_at": None, "failed_at": None, "expired_at": None, "cancelling_at": None,
                "cancelled_at": None, "request_counts": {"total": 0, "completed": 0, "failed": 0},
                "metadata": body.metadata,
            },
            self._shared,
        )  # fmt: skip
        batch.save(batch.record)
        self._batches[batch.id] = batch
        batch.start()
        return json_response(shown(batch.record))

    async def list(self, http_request: web.Request) -> web.Response:
        self.store.check()
        newest_first = reversed(self._batches.values())
        records = [shown(batch.record) for batch in newest_first if may_find(http_request, batch.owner)]
        return json_response(page_of(records, http_request, DEFAULT_LIMIT))

    async def retrieve(self, http_request: web.Request) -> web.Response:
        return json_response(shown(self._get(http_request).record))

    async def cancel(self, http_request: web.Request) -> web.Response:
        """Abort the lines that run. The answers that exist become the batch's files."""
        batch = self._get(http_request)
        batch.cancel()
        return json_response(shown(batch.record))

    def _get(self, http_request: web.Request) -> Batch:
        self.store.check()
        batch_id = http_request.match_info["batch_id"]
        batch = self._batches.get(batch_id)
        if batch is None or not may_find(http_request, batch.owner):
            raise NotFound(f"no such batch: {batch_id[:100]!r}", "batch_id")
        return batch
