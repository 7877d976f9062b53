"""A client of OpenAI's chat API on the standard library: a terminal should answer before aiohttp is imported."""

import http.client
import json
import socket
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

JSON = dict[str, Any]
CONNECT_S, ANSWER_S = 10.0, 3600.0
EVENT = b"data:"


class ChatError(Exception):
    """The server cannot be reached, or has refused; the message is for the person at the terminal."""


@dataclass(slots=True)
class Piece:
    """Hold what one event of a streamed answer brings."""

    text: str = ""
    reasoning: str = ""
    usage: JSON | None = None
    finish_reason: str | None = None


@dataclass(slots=True)
class Timing:
    """Record an answer's times, in time.perf_counter() seconds; 0.0: not yet."""

    sent: float = 0.0
    first: float = 0.0
    last: float = 0.0


class ChatClient:
    """Sends chats to one server, a connection each: to close it is to stop the answer."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ChatError(f"{url} is no address of a server: it begins with http:// or https://")
        try:
            self.host, self.port, self.is_secure = parts.hostname, parts.port, parts.scheme == "https"
        except ValueError as error:
            raise ChatError(f"{url}: {error}") from None
        self.prefix = parts.path.rstrip("/").removesuffix("/v1")
        self.url = f"{parts.scheme}://{parts.netloc}{self.prefix}"
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def models(self) -> list[str]:
        """Return the names of the models that are served."""
        connection, answer = self._ask("GET", "/v1/models")
        try:
            return [str(card["id"]) for card in _json_of(answer.read())["data"]]
        except (KeyError, TypeError, ValueError):
            raise ChatError(f"{self.url} does not speak OpenAI's API") from None
        finally:
            connection.close()

    def stream(self, body: JSON, timing: Timing) -> Generator[Piece, None, None]:
        """Yield an answer piece by piece. Closing the iterator ends the request on the server."""
        timing.sent = time.perf_counter()
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        connection, answer = self._ask("POST", "/v1/chat/completions", body)
        has_ended = False
        try:
            while line := answer.readline():
                data = line.strip().removeprefix(EVENT).strip()
                if not line.startswith(EVENT):
                    continue
                if data == b"[DONE]":
                    has_ended = True
                    continue
                piece = _piece_of(_json_of(data))
                if piece.text or piece.reasoning:
                    timing.last = time.perf_counter()
                    timing.first = timing.first or timing.last
                has_ended |= piece.finish_reason is not None
                yield piece
            if not has_ended:  # a process that is killed closes its connections, which http.client takes for an end
                raise ChatError("the answer broke off: the server is gone")
        except (OSError, http.client.HTTPException) as error:
            raise ChatError(f"the answer broke off: {error}") from None
        finally:
            answer.close()  # holds the socket, too
            connection.close()

    def _ask(self, method: str, path: str, body: JSON | None = None) -> tuple[Any, http.client.HTTPResponse]:
        kind = http.client.HTTPSConnection if self.is_secure else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=CONNECT_S)
        data = None if body is None else json.dumps(body).encode()
        headers = self.headers | ({"Content-Type": "application/json"} if data else {})
        try:
            connection.connect()
            connection.sock.settimeout(ANSWER_S)
            # Events are small: each goes out, and comes in, at once.
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.request(method, self.prefix + path, data, headers)
            answer = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise ChatError(f"no server answers at {self.url}: {error}") from None
        if answer.status != 200:
            text = answer.read().decode(errors="replace")
            connection.close()
            raise ChatError(f"{answer.status}: {_message_of(text)}")
        return connection, answer


def _json_of(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        raise ChatError(f"the server sent no JSON: {data[:100]!r}") from None


def _piece_of(event: JSON) -> Piece:
    """Read an event; an error in the middle of an answer ends it."""
    if error := event.get("error"):
        raise ChatError(error.get("message", str(error)) if isinstance(error, dict) else str(error))
    piece = Piece(usage=event.get("usage"))
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        piece.text += delta.get("content") or ""
        piece.reasoning += delta.get("reasoning_content") or delta.get("reasoning") or ""
        piece.finish_reason = choice.get("finish_reason") or piece.finish_reason
    return piece


def _message_of(text: str) -> str:
    """Return what a refusal says, in OpenAI's shape or any other."""
    try:
        content = json.loads(text)
        error = content.get("error", content)
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, AttributeError):
        return text[:300]
