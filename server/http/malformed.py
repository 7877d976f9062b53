"""Log requests that are no HTTP, only now and then: port scanners and other protocols' probes send many of them."""

import logging
import time

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

INTERVAL_S = 10.0  # between two lines
MAX_CHARS = 200
AIOHTTP_LOGGER = "aiohttp.server"


class MalformedRequests(logging.Filter):
    """Make one line, every `INTERVAL_S` at most, of aiohttp's records of requests that it could not read."""

    def __init__(self) -> None:
        super().__init__()
        self._num_requests = 0  # since the last line
        self._last_line_at = float("-inf")

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is to be written; one that is will be a line without a stack trace."""
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, (HttpProcessingError, web.RequestPayloadError)):
            return True
        self._num_requests += 1
        now = time.monotonic()
        if now - self._last_line_at < INTERVAL_S:
            return False
        said = error.message if isinstance(error, HttpProcessingError) else error
        reason = " ".join(str(said).split())[:MAX_CHARS]  # it quotes the client, line by line
        record.msg, record.args = "%d malformed requests; the last: %s", (self._num_requests, reason)
        if record.levelno > logging.WARNING:
            record.levelno, record.levelname = logging.WARNING, "WARNING"
        record.exc_info = record.exc_text = None
        self._num_requests, self._last_line_at = 0, now
        return True


def shorten_malformed() -> None:
    """Apply `MalformedRequests` in this process; to be called once, as logging is set up."""
    logging.getLogger(AIOHTTP_LOGGER).addFilter(MalformedRequests())
