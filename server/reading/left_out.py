"""Report what answers do without though requests ask for it: hints, tools and content made for another server.

Agents send all that their own provider knows. Where this server can answer well without a part of it, the part is left
out, never silently: a response header names it, a counter counts it, and the log has a line for the first of a kind.
"""

import logging
import re
from collections import Counter
from collections.abc import MutableMapping
from typing import Any

from aiohttp import web

logger = logging.getLogger(__name__)

HEADER = "X-Left-Out"
HINT, TOOL, CONTENT, VOLATILE = "hint", "tool", "content", "volatile"  # kinds of what is left out
MAX_NAMES = 32  # in one header
MAX_LOGGED = 256  # names in the log, over the server's life
UNSAFE = re.compile(r"[^\w.:/-]")  # in a header's value, and in a line of the log


class LeftOut:
    """Collect what one request is answered without: (kind, name) of each part, in order, each once."""

    def __init__(self) -> None:
        self.parts: dict[tuple[str, str], int] = {}  # to how often

    def add(self, kind: str, name: str) -> None:
        part = kind, UNSAFE.sub("_", name[:64])
        self.parts[part] = self.parts.get(part, 0) + 1

    @property
    def header(self) -> str:
        """Names of the parts, as the header has them; empty if nothing was left out."""
        return ", ".join(name for _, name in list(self.parts)[:MAX_NAMES])


class LeftOutBook:
    """Counts what all requests were answered without, by kind."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter({kind: 0 for kind in (HINT, TOOL, CONTENT, VOLATILE)})
        self._logged: set[tuple[str, str]] = set()

    def enter(self, owner: MutableMapping[Any, Any], left_out: LeftOut) -> None:
        """Count `left_out`, and have the response to `owner` name it."""
        owner[LEFT_OUT] = left_out
        for part, count in left_out.parts.items():
            kind, name = part
            self.counts[kind] += count
            if part not in self._logged and len(self._logged) < MAX_LOGGED:
                self._logged.add(part)
                logger.info("left out of requests from now on: %s %s; each answer's %s names it", kind, name, HEADER)


LEFT_OUT: web.RequestKey[LeftOut] = web.RequestKey("left_out", LeftOut)


async def name_left_out(request: web.Request, response: web.StreamResponse) -> None:
    """Set the header of a response that is about to begin: a handler of `on_response_prepare`."""
    left_out = request.get(LEFT_OUT)
    if left_out is not None and left_out.parts:
        response.headers[HEADER] = left_out.header
