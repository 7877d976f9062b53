"""/v1/files, in OpenAI's shapes: files that clients upload, lines of batches or pictures, and that batches write."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiohttp import BodyPartReader, web

from engine.errors import EngineError, InvalidRequest
from server.apis.file_store import FileStore, StorageUnavailable, new_id, shown, storing
from server.http.forms import as_utf8, form_of, name_of
from server.http.owners import owner_of
from server.reading.protocol import JSON, json_response

CHUNK_BYTES = 1 << 20
MAX_LISTED = 10_000
PURPOSES = ("batch", "vision", "user_data")  # the others: pictures that chats show
MAX_PURPOSE_BYTES = 64


class FilesApi:
    def __init__(self, store: FileStore, max_bytes: int, is_in_use: Callable[[str], str | None]) -> None:
        """`is_in_use`: returns the id of the batch that still reads a file, if one does."""
        self.store, self.max_bytes, self.is_in_use = store, max_bytes, is_in_use

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/files", self.upload),
            web.get("/v1/files", self.list),
            web.get("/v1/files/{file_id}", self.retrieve),
            web.delete("/v1/files/{file_id}", self.delete),
            web.get("/v1/files/{file_id}/content", self.content),
        ]

    async def upload(self, http_request: web.Request) -> web.Response:
        """Receive a form with `file` and `purpose`. The file goes to disk as it comes."""
        self.store.check()
        file_id = new_id("file-")
        unfinished = self.store.folder / f"{file_id}.part"
        try:
            filename, purpose = await self._receive(http_request, unfinished)
            if filename is None:
                raise InvalidRequest("the form has no file", "file")
            if purpose not in PURPOSES:
                raise InvalidRequest(f"purpose must be one of {', '.join(PURPOSES)}, got {purpose!r}", "purpose")
            unfinished.rename(self.store.path(file_id))
            return json_response(shown(self.store.add(owner_of(http_request), file_id, filename, purpose)))
        except StorageUnavailable:
            self.store.path(file_id).unlink(missing_ok=True)
            raise
        finally:
            unfinished.unlink(missing_ok=True)

    async def _receive(self, http_request: web.Request, to: Path) -> tuple[str | None, str]:
        """Return (name of the file, now in `to`; purpose), as far as the form has them."""
        filename, purpose = None, ""
        with form_of(http_request) as form:
            async for part in form:
                name = name_of(part)
                if name == "file":
                    if filename is not None:
                        raise InvalidRequest("the form has more than one file", name)
                    await self._receive_file(part, to)
                    filename = as_utf8(part.filename or "upload")
                elif name == "purpose":
                    if purpose:
                        raise InvalidRequest("the form has more than one purpose", name)
                    purpose = (await part.read_chunk(MAX_PURPOSE_BYTES)).decode(errors="replace")
                else:
                    raise InvalidRequest(f"unknown field of the form: {name!r}", name)
        return filename, purpose

    async def _receive_file(self, part: BodyPartReader, to: Path) -> None:
        num_bytes = 0
        with storing(to.parent), await asyncio.to_thread(open, to, "wb") as file:
            while chunk := await part.read_chunk(CHUNK_BYTES):
                num_bytes += len(chunk)
                if num_bytes > self.max_bytes:
                    raise FileTooLarge(f"the file is longer than {self.max_bytes} bytes, the limit of --max-file-bytes")
                await asyncio.to_thread(file.write, chunk)

    async def list(self, http_request: web.Request) -> web.Response:
        purpose = http_request.query.get("purpose")
        files = [shown(file) for file in self.store.list(http_request) if purpose in (None, file["purpose"])]
        is_ascending = http_request.query.get("order") == "asc"
        return json_response(page_of(files if is_ascending else files[::-1], http_request, MAX_LISTED))

    async def retrieve(self, http_request: web.Request) -> web.Response:
        return json_response(shown(self.store.get(http_request, http_request.match_info["file_id"])))

    async def delete(self, http_request: web.Request) -> web.Response:
        file_id = http_request.match_info["file_id"]
        self.store.get(http_request, file_id)
        if batch_id := self.is_in_use(file_id):
            raise InvalidRequest(f"{file_id} is being read by {batch_id}: cancel that first", "file_id")
        self.store.remove(file_id)
        return json_response({"id": file_id, "object": "file", "deleted": True})

    async def content(self, http_request: web.Request) -> web.FileResponse:
        file = self.store.get(http_request, http_request.match_info["file_id"])
        return web.FileResponse(self.store.path(file["id"]), headers={"Content-Type": "application/octet-stream"})


class FileTooLarge(EngineError):
    status_code = 413


def page_of(items: list[Any], http_request: web.Request, default_limit: int) -> JSON:
    """Return OpenAI's page of a list: the `limit` items behind the one whose id is `after`."""
    text = http_request.query.get("limit", str(default_limit))
    if not text.isdecimal() or len(text) > 9 or not 1 <= int(text) <= MAX_LISTED:  # int() refuses thousands of digits
        raise InvalidRequest(f"limit must be between 1 and {MAX_LISTED}, got {text[:20]!r}", "limit")
    after = http_request.query.get("after")
    if after is not None:
        start = next((i for i, item in enumerate(items) if item["id"] == after), None)
        if start is None:
            raise InvalidRequest(f"after names nothing in the list: {after[:100]!r}", "after")
        items = items[start + 1 :]
    page = items[: int(text)]
    return {
        "object": "list", "data": page, "has_more": len(page) < len(items),
        "first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None,
    }  # fmt: skip
