"""Forms with files (multipart/form-data), read part by part within bounds."""

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import BodyPartReader, MultipartReader, StreamReader, web
from aiohttp.http_exceptions import BadHttpMessage

from engine.errors import InvalidRequest
from server.http.bodies import next_of_body

MAX_FORM_LINES = 64  # around its parts' contents


@contextmanager
def form_of(http_request: web.Request) -> Iterator[AsyncIterator[BodyPartReader]]:
    """Give the parts of a form, to be read inside. `InvalidRequest` if the body is none."""
    kind = http_request.content_type
    if kind != "multipart/form-data":
        raise InvalidRequest(f"Content-Type must be multipart/form-data, got {kind}", "Content-Type")
    try:
        yield _parts(http_request)
    except ValueError as error:  # aiohttp's, of a form that is none
        raise InvalidRequest(f"the form cannot be read: {error}") from None
    except BadHttpMessage as error:
        raise InvalidRequest(f"a part's headers cannot be read: {error.message}") from None


async def _parts(http_request: web.Request) -> AsyncIterator[BodyPartReader]:
    content: Any = FormStream(http_request.content)
    async for part in MultipartReader(http_request.headers, content):
        if not isinstance(part, BodyPartReader):
            raise InvalidRequest("a part of the form is itself a form", None)
        yield part


def name_of(part: BodyPartReader) -> str:
    return as_utf8(part.name or "")


def as_utf8(header: str) -> str:
    """Return a part's header as text. aiohttp reads other encodings, Latin-1 say, as halves of surrogate pairs."""
    return header.encode(errors="surrogateescape").decode(errors="replace")


class FormStream:
    """The body of a form for aiohttp's reader, which would go on for any number of lines before, or between, parts."""

    def __init__(self, content: StreamReader) -> None:
        self._content = content
        self._num_lines = 0
        self.unread_data, self.at_eof = content.unread_data, content.at_eof

    async def read(self, num_bytes: int = -1) -> bytes:
        return await next_of_body(self._content.read(num_bytes))

    async def readline(self, **options: Any) -> bytes:
        self._num_lines += 1
        if self._num_lines > MAX_FORM_LINES:
            raise ValueError(f"it has more than {MAX_FORM_LINES} lines around its parts")
        return await next_of_body(self._content.readline(**options))
