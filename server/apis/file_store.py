"""Files on the disk: what clients upload, what batches write, and the records of both.

A folder holds each file's bytes under its id, and what is known of it as `<id>.json`, written last: a file without that
is half an upload, or a batch's answers so far, and is not listed. What is damaged is moved to the folder `damaged`.
"""

import errno
import fcntl
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import orjson
from aiohttp import web

from engine.errors import EngineError
from server.http.owners import EVERYBODY, Caller, may_find
from server.reading.protocol import JSON

logger = logging.getLogger(__name__)

LOCK_NAME = "lock"


class NotFound(EngineError):
    status_code = 404

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


class StorageUnavailable(EngineError):
    status_code = 503


def write_atomically(path: Path, content: bytes) -> None:
    """Write so that a killed process leaves the old content or the new. For small contents, on the event loop."""
    unfinished = path.with_name(path.name + ".part")
    with storing(path.parent):
        try:
            unfinished.write_bytes(content)
            unfinished.rename(path)
        except OSError:
            with suppress(OSError):  # it may not have come into being
                unfinished.unlink()
            raise


@contextmanager
def storing(folder: Path) -> Iterator[None]:
    """Raise `StorageUnavailable`, which the client sees, for errors of the disk: it is full, say."""
    try:
        yield
    except ConnectionError:  # the client's own end
        raise
    except OSError as error:
        raise StorageUnavailable(f"no files can be kept in {folder}: {error.strerror}") from error


def read_records(folder: Path, pattern: str, check: Callable[[JSON], None]) -> list[JSON]:
    """Read the records whose file names match `pattern`, oldest first.

    check: raises `ValueError` for a record that cannot be used. A damaged record must not keep the server from
    starting: it is put aside, and the log names it.
    """
    records = []
    for path in folder.glob(pattern):
        try:
            record = orjson.loads(path.read_bytes())
            check_fields(record, {"id": str, "created_at": int})
            if record["id"] != path.stem:
                raise ValueError(f"its id is {record['id']!r}")
            check(record)
        except (OSError, ValueError) as error:
            put_aside(path, error)
        else:
            records.append((record["created_at"], path.stem, record))
    return [record for *_, record in sorted(records)]


def check_fields(record: Any, kinds: Mapping[str, type | tuple[type, ...]]) -> None:
    """Raise `ValueError` unless `record` is an object with these fields, each of its kind."""
    if not isinstance(record, dict):
        raise ValueError("it is no JSON object")
    for name, kind in kinds.items():
        if name not in record:
            raise ValueError(f"it has no {name}")
        if not isinstance(record[name], kind):
            raise ValueError(f"its {name} is {record[name]!r:.100}")


def put_aside(path: Path, error: Exception) -> None:
    """Move a damaged file, or a folder in a file's place, into the folder `damaged` beside it, and log both names."""
    reason = error.strerror if isinstance(error, OSError) else str(error)
    aside = path.parent / "damaged" / f"{path.name}.{uuid.uuid4().hex[:8]}"
    try:
        aside.parent.mkdir(exist_ok=True)
        path.rename(aside)
    except OSError as refusal:
        logger.error("%s is damaged and left out: %s; it stays there: %s", path, reason, refusal.strerror)
    else:
        logger.error("%s is damaged and left out: %s; it was moved to %s", path, reason, aside)


def new_id(prefix: str) -> str:
    return prefix + uuid.uuid4().hex


FILE_FIELDS = {"bytes": int, "filename": str, "purpose": str}


class FileStore:
    """The files of one folder. Only one server at a time has it: another's answers are `StorageUnavailable`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problem = "the server is starting"  # why no files can be kept; empty: they can
        self._lock_fd = -1
        self._has_made_folder = False
        self._files: dict[str, JSON] = {}  # oldest first

    def open(self) -> bool:
        """Take the folder and read what it holds. False if it cannot be had; every use then says why."""
        try:
            self._has_made_folder = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock_fd = os.open(self.folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(self._lock_fd).st_nlink:  # the server that had it has just removed the folder
                raise FileNotFoundError(errno.ENOENT, "it was removed at the same time")
            for unfinished in self.folder.glob("*.part"):
                if unfinished.is_file():
                    unfinished.unlink()
            self._files = {file["id"]: file for file in read_records(self.folder, "file-*.json", self._check)}
        except BlockingIOError:
            self.problem = f"another server uses {self.folder}: give this one its own --file-storage-path"
        except OSError as error:
            self.problem = f"no files can be kept in {self.folder}: {error.strerror}"
        else:
            self.problem = ""
        return not self.problem

    def make_folder(self, folder: Path) -> bool:
        """Make `folder`, inside this one; what stands in its place is put aside. False if it cannot be had."""
        try:
            if folder.exists() and not folder.is_dir():
                put_aside(folder, ValueError("it is no folder"))
            folder.mkdir(exist_ok=True)
        except OSError as error:
            self.problem = f"no files can be kept in {folder}: {error.strerror}"
        return not self.problem

    def _check(self, record: JSON) -> None:
        check_fields(record, FILE_FIELDS)
        if not self.path(record["id"]).is_file():
            raise ValueError(f"the file {record['id']} itself is missing")

    def close(self) -> None:
        """Let go of the folder. One that this server made and nobody has used is removed."""
        if self._lock_fd < 0:
            return
        if self._has_made_folder and not self.problem and self._is_unused():
            with suppress(OSError):
                (self.folder / "batches").rmdir()
                (self.folder / LOCK_NAME).unlink()
                self.folder.rmdir()
        os.close(self._lock_fd)
        self._lock_fd = -1

    def _is_unused(self) -> bool:
        return not any(path.is_file() and path.name != LOCK_NAME for path in self.folder.rglob("*"))

    def check(self) -> None:
        if self.problem:
            raise StorageUnavailable(self.problem)

    def path(self, file_id: str) -> Path:
        return self.folder / file_id

    def get(self, caller: Caller, file_id: str, field: str = "file_id") -> JSON:
        """Return the record of a file, one of the caller's own."""
        self.check()
        file = self._files.get(file_id)
        if file is None or not may_find(caller, file.get("owner", EVERYBODY)):
            raise NotFound(f"no such file: {file_id[:100]!r}", field)
        return file

    def find_path(self, caller: Caller, file_id: str, field: str) -> Path:
        """Return where the bytes of a file are, one of the caller's own. field: where the client names it."""
        return self.path(self.get(caller, file_id, field)["id"])

    def list(self, caller: Caller) -> list[JSON]:
        """Return the caller's files, oldest first."""
        self.check()
        return [file for file in self._files.values() if may_find(caller, file.get("owner", EVERYBODY))]

    def add(self, owner: str, file_id: str, filename: str, purpose: str) -> JSON:
        """Make the bytes under `file_id` a file that clients see."""
        file = {
            "id": file_id, "object": "file", "bytes": self.path(file_id).stat().st_size,
            "created_at": int(time.time()), "filename": filename, "purpose": purpose, "status": "processed",
            "owner": owner,
        }  # fmt: skip
        write_atomically(self.folder / f"{file_id}.json", orjson.dumps(file))
        self._files[file_id] = file
        return file

    def remove(self, file_id: str) -> None:
        self.check()
        (self.folder / f"{file_id}.json").unlink(missing_ok=True)
        self.path(file_id).unlink(missing_ok=True)
        del self._files[file_id]


class LineFile:
    """A file that grows line by line: each is there as a whole, or not at all."""

    def __init__(self, path: Path) -> None:
        """Open or create the file. Raises `StorageUnavailable`."""
        self._folder = path.parent
        with storing(self._folder):
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def __enter__(self) -> "LineFile":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def append(self, line: bytes) -> None:
        """Append a line, which must end with its newline. It is on its way to the disk when this returns.

        Raises `StorageUnavailable`; the file is then as it was.
        """
        end = os.fstat(self._fd).st_size
        with storing(self._folder):
            try:
                left = memoryview(line)
                while left:
                    left = left[os.write(self._fd, left) :]
            except OSError:
                os.ftruncate(self._fd, end)
                raise


def shown(record: JSON) -> JSON:
    """Return a record of a file or a batch as clients see it."""
    return {name: value for name, value in record.items() if name != "owner"}


FILE_STORE = web.AppKey("file_store", FileStore)
