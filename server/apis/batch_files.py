"""The files of a batch: the lines that its client uploaded, and those with the answers and the errors."""

import contextlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Annotated, Literal

import orjson
from msgspec import Meta

from engine.declared import Object
from engine.errors import InvalidRequest
from server.apis.file_store import FileStore, LineFile, new_id, put_aside, storing
from server.http.bodies import BodyBudget, BodyTooLarge, HeldBody
from server.reading.protocol import JSON, parse

MAX_LINES = 50_000  # OpenAI's
MAX_ERRORS = 100  # of a file that is no batch, reported to its client


# ---- what is asked ----


class BatchLine(Object, kw_only=True):
    custom_id: Annotated[str, Meta(min_length=1)]
    method: Literal["POST"]
    url: str
    body: JSON


def read_line(text: bytes) -> BatchLine:
    """Read a line of a batch's input, the same way when it is checked and when it is answered."""
    return parse(text, BatchLine, "the line")


def lines_of(path: Path) -> Iterator[bytes]:
    """Yield the lines of a batch's input but the empty ones."""
    with open(path, "rb") as file:
        for text in file:
            if text.strip():
                yield text


def check_lines(path: Path, endpoint: str, max_line_bytes: int, max_held_bytes: int) -> tuple[int, list[JSON]]:
    """Return the number of lines of a batch's input, and their errors (the first MAX_ERRORS)."""
    num_lines, custom_ids, errors = 0, set[str](), []
    with contextlib.closing(_bounded_lines(path, max_line_bytes)) as lines:
        for number, text in enumerate(lines, start=1):
            if not text.strip():
                continue
            num_lines += 1
            try:
                if len(text) > max_line_bytes:
                    raise InvalidRequest(f"the line is longer than {max_line_bytes} bytes, the limit of a request")
                HeldBody(BodyBudget(max_held_bytes)).add(text)
                line = read_line(text)
                if line.url != endpoint:
                    raise line.wrong("url", repr(endpoint))
                if line.custom_id in custom_ids:
                    raise InvalidRequest(f"custom_id {line.custom_id[:100]!r} was used before", "custom_id")
                custom_ids.add(line.custom_id)
            except (InvalidRequest, BodyTooLarge) as error:
                message = str(error).replace("the body", "the line", 1)
                errors.append(error_entry("invalid_request", message, number, getattr(error, "field", None)))
            if len(errors) >= MAX_ERRORS:
                break
    if not num_lines:
        errors.append(error_entry("empty_file", "the file has no lines"))
    if num_lines > MAX_LINES:
        errors.append(error_entry("too_many_lines", f"the file has {num_lines} lines, the limit is {MAX_LINES}"))
    return num_lines, errors


def _bounded_lines(path: Path, max_bytes: int) -> Generator[bytes, None, None]:
    """Yield the lines of a file. Of a line that is longer than `max_bytes`, only a head that is longer."""
    with open(path, "rb") as file:
        while text := file.readline(max_bytes + 1):
            yield text
            while len(text) > max_bytes and not text.endswith(b"\n"):
                text = file.readline(max_bytes + 1)


def error_entry(code: str, message: str, line: int | None = None, param: str | None = None) -> JSON:
    """Return an entry of a batch's `errors`."""
    return {"code": code, "message": message, "line": line, "param": param}


# ---- what is answered ----


class AnswerFile:
    """A line for each answer, or each error, that a batch has so far."""

    def __init__(self, store: FileStore, file_id: str) -> None:
        self.id = file_id
        self._store, self._path = store, store.path(file_id)

    def open(self) -> LineFile:
        """Open or create the file. Raises `StorageUnavailable`."""
        return LineFile(self._path)

    def take_up(self) -> list[str]:
        """Return the custom_ids of the lines that an earlier server wrote.

        A line that a crash left unfinished is cut off. A file with a damaged line is put aside, and goes on without it.
        """
        path, found = self._path, list[str | None]()
        if path.exists() and not path.is_file():
            put_aside(path, ValueError("it is no file"))
        if not path.exists():
            return []
        with storing(path.parent), open(path, "r+b") as file:
            while (line := file.readline()).endswith(b"\n"):
                found.append(_custom_id_of(line))
            file.truncate(file.tell() - len(line))
        if None in found:
            self._repair()
        return [custom_id for custom_id in found if custom_id is not None]

    def _repair(self) -> None:
        """Put the file aside, and make it anew of those of its lines that are answers."""
        path, unfinished = self._path, self._path.with_name(self._path.name + ".part")
        with storing(path.parent), open(path, "rb") as file, open(unfinished, "wb") as repaired:
            repaired.writelines(line for line in file if _custom_id_of(line) is not None)
        with storing(path.parent):
            put_aside(path, ValueError("a line of it is no answer"))
            unfinished.rename(path)

    def keep(self, owner: str) -> str | None:
        """List the file among those of `owner`, and return its id. An empty one is removed instead: None."""
        if self._path.exists() and self._path.stat().st_size:
            self._store.add(owner, self.id, f"{self.id}.jsonl", "batch_output")
            return self.id
        self._path.unlink(missing_ok=True)
        return None


def answer_line(custom_id: str, response: JSON | None, error: JSON | None) -> bytes:
    """Return a line of a batch's answers or errors."""
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
