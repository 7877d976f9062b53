"""Name every answer, so that a client's report and a line of the log can be brought together."""

import uuid

from aiohttp import web

from server.http.live import STATES

HEADER = "X-Request-Id"  # where OpenAI's clients look
ANTHROPICS_HEADER = "Request-Id"
MAX_CHARS = 128


async def name_answer(request: web.Request, response: web.StreamResponse) -> None:
    """Set the headers of a response that is about to begin: a handler of `on_response_prepare`.

    The name is the client's own (`X-Request-Id`), else the rid of what it asked for, where a header can hold them, else
    a new one.
    """
    states = request.get(STATES)
    known = (request.headers.get(HEADER, ""), states[0].rid if states else "")
    name = next(filter(_fits, known), None) or f"req_{uuid.uuid4().hex}"
    response.headers[HEADER] = response.headers[ANTHROPICS_HEADER] = name


def _fits(name: str) -> bool:
    return 0 < len(name) <= MAX_CHARS and name.isascii() and name.isprintable()
