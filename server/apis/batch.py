"""One batch: its record, and its life from `validating` to its last status.

An answer is appended to its file as it comes, so that a server that starts again computes none twice: the record is
written when the status changes, and what is done is read off the answers. While the disk is full a batch waits with
what it has: its record never says more than the disk does.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

import orjson
from aiohttp import web

from engine.declared import convert
from engine.errors import EngineError, InvalidRequest, QueueFull
from server.apis.batch_files import AnswerFile, BatchLine, answer_line, check_lines, error_entry, lines_of, read_line
from server.apis.file_store import (
    FileStore,
    LineFile,
    StorageUnavailable,
    check_fields,
    new_id,
    write_atomically,
)
from server.http.bodies import BodyBudget, HeldBody
from server.http.owners import CLIENT, EVERYBODY, Client
from server.reading.error_shapes import INTERNAL_ERROR, error_response, openai_error
from server.reading.protocol import JSON, Owner, json_response

logger = logging.getLogger(__name__)
T = TypeVar("T")

RETRY_S = 1.0
DISK_RETRY_S = 1.0
FINAL = ("failed", "completed", "expired", "cancelled")
STATUSES = (*FINAL, "validating", "in_progress", "finalizing", "cancelling")
RECORD_FIELDS: Mapping[str, type | tuple[type, ...]] = {
    "endpoint": str, "input_file_id": str, "status": str, "expires_at": int, "in_progress_at": (int, NoneType),
    "request_counts": dict,
}  # fmt: skip
COUNTS = {"total": int, "completed": int, "failed": int}


def check_record(record: JSON) -> None:
    """Raise `ValueError` if a batch cannot be taken up from its record."""
    check_fields(record, RECORD_FIELDS)
    check_fields(record["request_counts"], COUNTS)
    if record["status"] not in STATUSES:
        raise ValueError(f"its status is {record['status']!r:.100}")


@dataclass(frozen=True, slots=True)
class LineHandler:
    """Read an endpoint's lines, and answer them: `EngineError` if they cannot be."""

    kind: type[Any]
    answer: Callable[[Owner, Any], Awaitable[web.StreamResponse]]


class LinesAtWork:
    """Bounds the lines of all batches that are answered at once, in number and in bytes."""

    def __init__(self, max_lines: int, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._slots = asyncio.Semaphore(max_lines)
        self._budget = BodyBudget(max_bytes)

    async def enter(self, line: bytes) -> HeldBody:
        """Wait until there is room for another line."""
        held = await self._hold(line)
        try:
            await self._slots.acquire()
        except asyncio.CancelledError:
            held.drop()
            raise
        return held

    async def _hold(self, line: bytes) -> HeldBody:
        while True:
            held = HeldBody(self._budget)
            try:
                held.add(line)
                return held
            except QueueFull:
                await asyncio.sleep(RETRY_S)

    def leave(self, held: HeldBody, _: asyncio.Task[None]) -> None:
        held.drop()
        self._slots.release()


@dataclass(frozen=True, slots=True)
class Shared:
    """Hold what all batches have in common."""

    store: FileStore
    folder: Path  # of the records
    handlers: Mapping[str, LineHandler]  # by endpoint
    client: Client  # whom lines are answered for, but for the owner
    at_work: LinesAtWork
    max_line_bytes: int


class Batch:
    """A batch and the task that answers its lines."""

    def __init__(self, record: JSON, shared: Shared) -> None:
        self.record = record  # OpenAI's object, as it is stored
        self.task: asyncio.Task[None] | None = None
        self._shared = shared
        # Their ids are derived, so that a crash between file and record is harmless.
        stem = self.id.replace("batch_", "file-")
        self._output, self._errors = (AnswerFile(shared.store, f"{stem}-{name}") for name in ("output", "errors"))
        self._done: set[str] = set()  # custom_ids with an answer or an error
        self._awaits_disk = False

    @property
    def id(self) -> str:
        return str(self.record["id"])

    @property
    def owner(self) -> str:
        return str(self.record.get("owner", EVERYBODY))

    @property
    def status(self) -> str:
        return str(self.record["status"])

    @property
    def counts(self) -> dict[str, int]:
        counts: dict[str, int] = self.record["request_counts"]
        return counts

    def start(self) -> None:
        self.task = asyncio.create_task(self._live(), name=self.id)

    def cancel(self) -> None:
        """Abort the lines that run. The answers that exist become the batch's files."""
        if self.status in (*FINAL, "finalizing"):
            raise InvalidRequest(f"{self.id} is {self.status}: there is nothing to cancel", "batch_id")
        if self.status != "cancelling":
            self._enter("cancelling")
            assert self.task is not None
            self.task.cancel()

    async def _live(self) -> None:
        """Go from the status that there is to the last. Cancelled: by the client, or because the server stops."""
        try:
            await self._or_fail(self._run())
        except asyncio.CancelledError:
            if self.status == "cancelling":
                await self._or_fail(self._finalize("cancelled"))

    async def _or_fail(self, life: Awaitable[None]) -> None:
        """Await that part of the batch's life; an error, as of a deleted input file, is its failure alone."""
        try:
            await life
        except Exception as error:
            logger.error("batch %s failed", self.id, exc_info=error)
            self._record_errors([error_entry("internal_error", f"{type(error).__name__}: {error}")])
            await self._until_stored(self._keep_answers)
            await self._reach("failed")

    async def _run(self) -> None:
        shared, record = self._shared, self.record
        shared.store.get({}, record["input_file_id"], "input_file_id")  # its maker may have been an admin
        if self.status == "validating":
            num_lines, errors = await asyncio.to_thread(
                check_lines, self._input, record["endpoint"], shared.max_line_bytes, shared.at_work.max_bytes
            )
            self.counts["total"] = num_lines
            if errors:
                self._record_errors(errors)
                return await self._reach("failed")
            await self._reach("in_progress")
        else:
            for name, file in (("completed", self._output), ("failed", self._errors)):
                custom_ids = await self._until_stored(file.take_up, is_long=True)
                self._done.update(custom_ids)
                self.counts[name] = len(custom_ids)
        if self.status == "in_progress":
            try:
                async with asyncio.timeout(record["expires_at"] - time.time()):
                    await self._answer_lines()
            except TimeoutError:
                return await self._finalize("expired")
        if self.status == "cancelling":
            raise asyncio.CancelledError
        await self._finalize("completed")

    @property
    def _input(self) -> Path:
        return self._shared.store.path(self.record["input_file_id"])

    async def _answer_lines(self) -> None:
        at_work = self._shared.at_work
        opened = [await self._until_stored(file.open) for file in (self._output, self._errors)]
        with opened[0] as output, opened[1] as errors:
            async with asyncio.TaskGroup() as group:
                lines = lines_of(self._input)
                while (text := await asyncio.to_thread(next, lines, None)) is not None:
                    line = read_line(text)
                    if line.custom_id in self._done:
                        continue
                    held = await at_work.enter(text)
                    task = group.create_task(self._answer_line(line, output, errors))
                    task.add_done_callback(partial(at_work.leave, held))

    async def _answer_line(self, line: BatchLine, output: LineFile, errors: LineFile) -> None:
        response = await self._response_to(line.body)
        is_ok = response.status == 200
        body = orjson.Fragment(response.body) if isinstance(response.body, bytes) else None
        answer = {"status_code": response.status, "request_id": new_id("req_"), "body": body}
        text = answer_line(line.custom_id, answer, None)
        await self._until_stored(lambda: (output if is_ok else errors).append(text))
        self.counts["completed" if is_ok else "failed"] += 1
        self._done.add(line.custom_id)

    async def _response_to(self, values: JSON) -> web.Response:
        """Return the endpoint's answer, or the error as its client would see it."""
        endpoint, client = self.record["endpoint"], replace(self._shared.client, owner=self.owner)
        handler = self._shared.handlers[endpoint]
        while True:
            try:
                for name in ("stream", "background"):
                    if values.get(name):
                        raise InvalidRequest(f"{name} must be false in a batch", name)
                response = await handler.answer({CLIENT: client}, convert(values, handler.kind))
                assert isinstance(response, web.Response)
                return response
            except EngineError as error:
                if error.status_code not in (429, 503):  # else: not now
                    return error_response(endpoint, error)
            except Exception:
                # The outermost frame of our code, as in a handler: this line fails, and its trace is in the log.
                logger.exception("a line of batch %s failed", self.id)
                return json_response(openai_error(500, INTERNAL_ERROR), 500)
            await asyncio.sleep(RETRY_S)

    async def _finalize(self, status: str) -> None:
        """Make files of the answers, errors of lines without one, and give the batch its last status."""
        await self._reach("cancelling" if status == "cancelled" else "finalizing")
        await self._until_stored(lambda: self._write_errors(status), is_long=True)
        await self._until_stored(self._keep_answers)
        await self._reach(status)

    def _write_errors(self, status: str) -> None:
        """Write an error for each line without an answer."""
        error = {"code": f"batch_{status}", "message": f"the batch was {status} before this line had its answer"}
        with self._errors.open() as errors:
            # Before it was in progress nobody had looked whether these are lines.
            for line in map(read_line, lines_of(self._input) if self.record["in_progress_at"] else ()):
                if line.custom_id not in self._done:
                    errors.append(answer_line(line.custom_id, None, error))
                    self._done.add(line.custom_id)

    def _keep_answers(self) -> None:
        """List the answers and errors that there are among their owner's files."""
        for name, file in (("output_file_id", self._output), ("error_file_id", self._errors)):
            self.record[name] = file.keep(self.owner)

    # ---- the record ----

    def _record_errors(self, errors: list[JSON]) -> None:
        self.record["errors"] = {"object": "list", "data": errors}

    async def _reach(self, status: str) -> None:
        """Enter `status` as soon as the disk takes it."""
        await self._until_stored(lambda: self._enter(status))

    def _enter(self, status: str) -> None:
        """Give the batch that status, first on the disk. Raises `StorageUnavailable`; its status is then as before."""
        self.save({**self.record, "status": status, f"{status}_at": int(time.time())})

    def save(self, record: JSON) -> None:
        """Make `record` the batch's, first on the disk. Raises `StorageUnavailable`."""
        write_atomically(self._shared.folder / f"{self.id}.json", orjson.dumps(record))
        self.record = record

    async def _until_stored(self, write: Callable[[], T], *, is_long: bool = False) -> T:
        """Call `write` until it raises no `StorageUnavailable`, and return what it returns. The batch waits meanwhile.

        is_long: `write` takes longer the more lines there are, and is called in a thread.
        A server that ends meanwhile leaves the batch to the next one, as it is on the disk.
        """
        while True:
            try:
                result = await asyncio.to_thread(write) if is_long else write()
            except StorageUnavailable as error:
                if not self._awaits_disk:
                    logger.error("%s waits until the disk takes its answers: %s", self.id, error)
                self._awaits_disk = True
                await asyncio.sleep(DISK_RETRY_S)
            else:
                self._awaits_disk = False
                return result
