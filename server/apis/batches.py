"""/v1/batches, in OpenAI's shapes: the lines of an uploaded file, answered when nothing more urgent is to be done.

Lines run through the handlers of the endpoint that they name, a bounded number at once, below every other request's
priority. An answer is appended to its file as it comes, so that a server that starts again computes none twice: a
batch's record is written when its status changes, and what is done is read off its answers. While the disk is full a
batch waits with what it has: its record never says more than the disk does.
"""

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar

import orjson
from aiohttp import web
from msgspec import Meta

from engine.declared import Object, convert
from engine.errors import EngineError, InvalidRequest, QueueFull
from server.apis.files import (
    FileStore,
    LineFile,
    NotFound,
    StorageUnavailable,
    check_fields,
    new_id,
    page_of,
    put_aside,
    read_records,
    shown,
    storing,
    write_atomically,
)
from server.http.bodies import BodyBudget, BodyTooLarge, HeldBody
from server.http.owners import CLIENT, EVERYBODY, Client, may_find, owner_of
from server.reading.protocol import (
    JSON,
    Owner,
    error_response,
    json_response,
    openai_error,
    parse,
    read_body,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LineHandler:
    """Read an endpoint's lines, and answer them: `EngineError` if they cannot be."""

    kind: type[Any]
    answer: Callable[[Owner, Any], Awaitable[web.StreamResponse]]


class BatchRequest(Object, kw_only=True):
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
    input_file_id: str = ""
    completion_window: Annotated[str, Meta(description="such as 24h; lines not answered by then are errors")] = "24h"
    metadata: (
        Annotated[dict[str, str], Meta(max_length=16, extra={"rule": "an object of at most 16 strings"})] | None
    ) = None


class BatchLine(Object, kw_only=True):
    custom_id: Annotated[str, Meta(min_length=1)]
    method: Literal["POST"]
    url: str
    body: JSON


BATCH_CLIENT = Client("batches", priority=-(1 << 40))  # whoever waits goes first
MAX_LINES = 50_000  # OpenAI's, as the next
MAX_ERRORS = 100  # of a file that is no batch, reported to its client
MAX_CONCURRENT_LINES = 256  # of all batches
RETRY_S = 1.0
DISK_RETRY_S = 1.0
DEFAULT_LIMIT = 20  # batches listed
WINDOW = re.compile(r"([1-9]\d{0,5})([smhd])")
WINDOW_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
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


@dataclass(eq=False)
class Batch:
    record: JSON  # OpenAI's object, as it is stored
    task: asyncio.Task[None] | None = None
    done: set[str] = field(default_factory=set)  # custom_ids with an answer or an error
    awaits_disk: bool = False

    @property
    def id(self) -> str:
        return str(self.record["id"])

    @property
    def owner(self) -> str:
        return str(self.record.get("owner", EVERYBODY))

    @property
    def output_id(self) -> str:
        """Id of the file of answers. Derived, as `errors_id`, so that a crash between file and record is harmless."""
        return self.id.replace("batch_", "file-") + "-output"

    @property
    def errors_id(self) -> str:
        return self.id.replace("batch_", "file-") + "-errors"

    @property
    def counts(self) -> dict[str, int]:
        counts: dict[str, int] = self.record["request_counts"]
        return counts


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
        self._line_client = replace(BATCH_CLIENT, shares_cache=shares_cache)
        self.store, self.handlers, self.max_line_bytes = store, handlers, max_line_bytes
        self._budget = BodyBudget(max_held_bytes)
        self.folder = store.folder / "batches"
        self._batches: dict[str, Batch] = {}  # oldest first
        # Half of what may run: who comes while long answers are under way must find a place.
        self._slots = asyncio.Semaphore(max(1, min(MAX_CONCURRENT_LINES, max_running_requests // 2)))

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/batches", self.create),
            web.get("/v1/batches", self.list),
            web.get("/v1/batches/{batch_id}", self.retrieve),
            web.post("/v1/batches/{batch_id}/cancel", self.cancel),
        ]

    async def running(self, _: web.Application) -> AsyncIterator[None]:
        """Resume what an earlier server left, and leave what is not done to a later one: a cleanup context."""
        if self.store.open() and self.store.make_folder(self.folder):
            for record in read_records(self.folder, "batch_*.json", check_record):
                batch = self._batches[record["id"]] = Batch(record)
                if record["status"] not in FINAL:
                    self._start(batch)
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
        return next(
            (
                batch.id
                for batch in self._batches.values()
                if batch.record["input_file_id"] == file_id and batch.record["status"] not in FINAL
            ),
            None,
        )

    # ---- routes ----

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
            }
        )  # fmt: skip
        self._save(batch.record)
        self._batches[batch.id] = batch
        self._start(batch)
        return json_response(shown(batch.record))

    async def list(self, http_request: web.Request) -> web.Response:
        self.store.check()
        newest_first = [shown(batch.record) for batch in self._batches.values() if may_find(http_request, batch.owner)][
            ::-1
        ]
        return json_response(page_of(newest_first, http_request, DEFAULT_LIMIT))

    async def retrieve(self, http_request: web.Request) -> web.Response:
        return json_response(shown(self._get(http_request).record))

    async def cancel(self, http_request: web.Request) -> web.Response:
        """Abort the lines that run. The answers that exist become the batch's files."""
        batch = self._get(http_request)
        if batch.record["status"] in (*FINAL, "finalizing"):
            raise InvalidRequest(f"{batch.id} is {batch.record['status']}: there is nothing to cancel", "batch_id")
        if batch.record["status"] != "cancelling":
            self._enter(batch, "cancelling")
            assert batch.task is not None
            batch.task.cancel()
        return json_response(shown(batch.record))

    def _get(self, http_request: web.Request) -> Batch:
        self.store.check()
        batch_id = http_request.match_info["batch_id"]
        batch = self._batches.get(batch_id)
        if batch is None or not may_find(http_request, batch.owner):
            raise NotFound(f"no such batch: {batch_id[:100]!r}", "batch_id")
        return batch

    # ---- the life of a batch ----

    def _start(self, batch: Batch) -> None:
        batch.task = asyncio.create_task(self._live(batch), name=batch.id)

    async def _live(self, batch: Batch) -> None:
        """Take `batch` from its status to its last. Cancelled: by its client, or because the server stops."""
        try:
            await self._or_fail(batch, self._run(batch))
        except asyncio.CancelledError:
            if batch.record["status"] == "cancelling":
                await self._or_fail(batch, self._finalize(batch, "cancelled"))

    async def _or_fail(self, batch: Batch, life: Awaitable[None]) -> None:
        """Await that part of the batch's life; an error, as of a deleted input file, is its failure alone."""
        try:
            await life
        except Exception as error:
            logger.error("batch %s failed", batch.id, exc_info=error)
            batch.record["errors"] = _errors([_error("internal_error", f"{type(error).__name__}: {error}")])
            await self._until_stored(batch, lambda: self._keep_answers(batch))
            await self._reach(batch, "failed")

    async def _run(self, batch: Batch) -> None:
        self.store.get({}, batch.record["input_file_id"], "input_file_id")  # its maker may have been an admin
        if batch.record["status"] == "validating":
            endpoint, path = batch.record["endpoint"], self.store.path(batch.record["input_file_id"])
            num_lines, errors = await asyncio.to_thread(
                check_lines, path, endpoint, self.max_line_bytes, self._budget.max_bytes
            )
            batch.counts["total"] = num_lines
            if errors:
                batch.record["errors"] = _errors(errors)
                return await self._reach(batch, "failed")
            await self._reach(batch, "in_progress")
        else:
            for name, file_id in (("completed", batch.output_id), ("failed", batch.errors_id)):
                batch.counts[name] = await self._until_stored_off_loop(batch, partial(self._take_up, batch, file_id))
        if batch.record["status"] == "in_progress":
            try:
                async with asyncio.timeout(batch.record["expires_at"] - time.time()):
                    await self._answer_lines(batch)
            except TimeoutError:
                return await self._finalize(batch, "expired")
        if batch.record["status"] == "cancelling":
            raise asyncio.CancelledError
        await self._finalize(batch, "completed")

    def _take_up(self, batch: Batch, file_id: str) -> int:
        """Note what a file of answers holds, and return its number of lines.

        A line that a crash left unfinished is cut off. A file with a damaged line is put aside, and goes on without it.
        """
        path, count, is_damaged = self.store.path(file_id), 0, False
        if path.exists() and not path.is_file():
            put_aside(path, ValueError("it is no file"))
        if not path.exists():
            return 0
        with storing(self.store.folder), open(path, "r+b") as file:
            while (line := file.readline()).endswith(b"\n"):
                custom_id = _custom_id_of(line)
                if custom_id is None:
                    is_damaged = True
                else:
                    batch.done.add(custom_id)
                    count += 1
            file.truncate(file.tell() - len(line))
        if is_damaged:
            self._repair(path)
        return count

    def _repair(self, path: Path) -> None:
        """Put a file of answers aside, and make it anew of those of its lines that are answers."""
        unfinished = path.with_name(path.name + ".part")
        with storing(self.store.folder), open(path, "rb") as file, open(unfinished, "wb") as repaired:
            repaired.writelines(line for line in file if _custom_id_of(line) is not None)
        with storing(self.store.folder):
            put_aside(path, ValueError("a line of it is no answer"))
            unfinished.rename(path)

    async def _answer_lines(self, batch: Batch) -> None:
        paths = [self.store.path(file_id) for file_id in (batch.output_id, batch.errors_id)]
        opened = [await self._until_stored(batch, partial(LineFile, path)) for path in paths]
        with opened[0] as output, opened[1] as errors:
            async with asyncio.TaskGroup() as group:
                lines = self._lines(batch)
                while (text := await asyncio.to_thread(next, lines, None)) is not None:
                    line = _read_line(text)
                    if line.custom_id in batch.done:
                        continue
                    held = await self._room_for(text)
                    try:
                        await self._slots.acquire()
                    except asyncio.CancelledError:
                        held.drop()
                        raise
                    task = group.create_task(self._answer_line(batch, line, output, errors))
                    task.add_done_callback(partial(self._leave, held))

    def _leave(self, held: HeldBody, _: asyncio.Task[None]) -> None:
        held.drop()
        self._slots.release()

    async def _room_for(self, line: bytes) -> HeldBody:
        """Wait until the lines at work leave room for another."""
        while True:
            held = HeldBody(self._budget)
            try:
                held.add(line)
                return held
            except QueueFull:
                await asyncio.sleep(RETRY_S)

    def _lines(self, batch: Batch) -> Iterator[bytes]:
        with open(self.store.path(batch.record["input_file_id"]), "rb") as file:
            for text in file:
                if text.strip():
                    yield text

    async def _answer_line(self, batch: Batch, line: BatchLine, output: LineFile, errors: LineFile) -> None:
        response = await self._response_to(batch, line.body)
        is_ok = response.status == 200
        body = orjson.Fragment(response.body) if isinstance(response.body, bytes) else None
        answer = {"status_code": response.status, "request_id": new_id("req_"), "body": body}
        text = _answer_text(line.custom_id, answer, None)
        await self._until_stored(batch, lambda: (output if is_ok else errors).append(text))
        batch.counts["completed" if is_ok else "failed"] += 1
        batch.done.add(line.custom_id)

    async def _response_to(self, batch: Batch, values: JSON) -> web.Response:
        """Return the endpoint's answer, or the error as its client would see it."""
        endpoint, client = batch.record["endpoint"], replace(self._line_client, owner=batch.owner)
        handler = self.handlers[endpoint]
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
                logger.exception("a line of batch %s failed", batch.id)
                return json_response(openai_error(500, "internal server error; the server's log says more"), 500)
            await asyncio.sleep(RETRY_S)

    async def _finalize(self, batch: Batch, status: str) -> None:
        """Make files of the answers, errors of lines without one, and give the batch its last status."""
        await self._reach(batch, "cancelling" if status == "cancelled" else "finalizing")
        await self._until_stored_off_loop(batch, lambda: self._write_errors(batch, status))
        await self._until_stored(batch, lambda: self._keep_answers(batch))
        await self._reach(batch, status)

    def _write_errors(self, batch: Batch, status: str) -> None:
        """Write an error for each line without an answer."""
        error = {"code": f"batch_{status}", "message": f"the batch was {status} before this line had its answer"}
        with LineFile(self.store.path(batch.errors_id)) as errors:
            # Before it was in progress nobody had looked whether these are lines.
            for line in map(_read_line, self._lines(batch) if batch.record["in_progress_at"] else ()):
                if line.custom_id not in batch.done:
                    errors.append(_answer_text(line.custom_id, None, error))
                    batch.done.add(line.custom_id)

    def _keep_answers(self, batch: Batch) -> None:
        """Make files of the answers and errors that there are."""
        for name, file_id in (("output_file_id", batch.output_id), ("error_file_id", batch.errors_id)):
            path = self.store.path(file_id)
            if path.exists() and path.stat().st_size:
                self.store.add(batch.owner, file_id, f"{file_id}.jsonl", "batch_output")
                batch.record[name] = file_id
            else:
                path.unlink(missing_ok=True)

    async def _reach(self, batch: Batch, status: str) -> None:
        """Enter `status` as soon as the disk takes it."""
        await self._until_stored(batch, lambda: self._enter(batch, status))

    def _enter(self, batch: Batch, status: str) -> None:
        """Give the batch that status, first on the disk. Raises `StorageUnavailable`; its status is then as before."""
        record = {**batch.record, "status": status, f"{status}_at": int(time.time())}
        self._save(record)
        batch.record = record

    def _save(self, record: JSON) -> None:
        write_atomically(self.folder / f"{record['id']}.json", orjson.dumps(record))

    # ---- a disk that is full ----

    async def _until_stored(self, batch: Batch, write: Callable[[], T]) -> T:
        """Call `write` until it raises no `StorageUnavailable`, and return what it returns. The batch waits meanwhile.

        A server that ends while it waits leaves the batch to the next one, as it is on the disk.
        """
        while True:
            try:
                result = write()
            except StorageUnavailable as error:
                await self._wait_for_disk(batch, error)
            else:
                batch.awaits_disk = False
                return result

    async def _until_stored_off_loop(self, batch: Batch, write: Callable[[], T]) -> T:
        """Do as `_until_stored`, in a thread: for what grows with the number of lines."""
        while True:
            try:
                return await asyncio.to_thread(write)
            except StorageUnavailable as error:
                await self._wait_for_disk(batch, error)

    async def _wait_for_disk(self, batch: Batch, error: StorageUnavailable) -> None:
        if not batch.awaits_disk:
            logger.error("%s waits until the disk takes its answers: %s", batch.id, error)
        batch.awaits_disk = True
        await asyncio.sleep(DISK_RETRY_S)


def _answer_text(custom_id: str, response: JSON | None, error: JSON | None) -> bytes:
    """Return a line of a batch's output or errors."""
    line = {"id": new_id("batch_req_"), "custom_id": custom_id, "response": response, "error": error}
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


def _custom_id_of(line: bytes) -> str | None:
    """Return the custom_id of a line of answers; None if it is none."""
    try:
        values = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    custom_id = values.get("custom_id") if isinstance(values, dict) else None
    return custom_id if isinstance(custom_id, str) else None


def _error(code: str, message: str, line: int | None = None, param: str | None = None) -> JSON:
    return {"code": code, "message": message, "line": line, "param": param}


def _errors(errors: list[JSON]) -> JSON:
    return {"object": "list", "data": errors}


def bounded_lines(path: Path, max_bytes: int) -> Generator[bytes, None, None]:
    """Yield the lines of a file. Of a line that is longer than `max_bytes`, only a head that is longer."""
    with open(path, "rb") as file:
        while text := file.readline(max_bytes + 1):
            yield text
            while len(text) > max_bytes and not text.endswith(b"\n"):
                text = file.readline(max_bytes + 1)


def check_lines(path: Path, endpoint: str, max_line_bytes: int, max_held_bytes: int) -> tuple[int, list[JSON]]:
    """Return the number of lines of a batch's input, and their errors (the first MAX_ERRORS)."""
    num_lines, custom_ids, errors = 0, set[str](), []
    with contextlib.closing(bounded_lines(path, max_line_bytes)) as lines:
        for number, text in enumerate(lines, start=1):
            if not text.strip():
                continue
            num_lines += 1
            try:
                if len(text) > max_line_bytes:
                    raise InvalidRequest(f"the line is longer than {max_line_bytes} bytes, the limit of a request")
                HeldBody(BodyBudget(max_held_bytes)).add(text)
                custom_id = _check_line(text, endpoint)
                if custom_id in custom_ids:
                    raise InvalidRequest(f"custom_id {custom_id[:100]!r} was used before", "custom_id")
                custom_ids.add(custom_id)
            except (InvalidRequest, BodyTooLarge) as error:
                message = str(error).replace("the body", "the line", 1)
                errors.append(_error("invalid_request", message, number, getattr(error, "field", None)))
            if len(errors) >= MAX_ERRORS:
                break
    if not num_lines:
        errors.append(_error("empty_file", "the file has no lines"))
    if num_lines > MAX_LINES:
        errors.append(_error("too_many_lines", f"the file has {num_lines} lines, the limit is {MAX_LINES}"))
    return num_lines, errors


def _read_line(text: bytes) -> BatchLine:
    """Read a line of a batch's input, the same way when it is checked and when it is answered."""
    return parse(text, BatchLine, "the line")


def _check_line(text: bytes, endpoint: str) -> str:
    line = _read_line(text)
    if line.url != endpoint:
        raise line.wrong("url", repr(endpoint))
    return line.custom_id
