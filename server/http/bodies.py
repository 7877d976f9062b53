"""The memory of request bodies: of each while it comes and is read, and of all together."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Iterator

import numpy as np
from aiohttp import web

from engine.declared import Object
from engine.errors import EngineError, QueueFull

SILENCE_S = 60.0  # for which a client may leave a body unfinished: what it takes others cannot have
MAX_CONTAINERS = 1 << 18  # of a body: its objects and lists, counted by their brackets, those in texts too
MAX_VALUES = 1 << 21  # of a body, counted by its commas: 0.1 s of reading
LONG_PIECE = 1 << 12  # bytes
SMALL_TEXT = 256  # characters of a text that is kept once the request is made
# Bytes that the values of a JSON text take in memory, about, by the byte that begins or separates them.
BYTES_OF_MARK = {b"{": 192, b"[": 64, b",": 32, b'"': 32}


class BodyTooLarge(EngineError):
    status_code = 413


class BodyStalled(EngineError):
    status_code = 408


async def next_of_body(reading: Awaitable[bytes]) -> bytes:
    """Return what `reading` a body brings next. `BodyStalled` if nothing comes."""
    try:
        async with asyncio.timeout(SILENCE_S):
            return await reading
    except TimeoutError:
        raise BodyStalled(f"the rest of the body did not come within {SILENCE_S:g} s") from None


class BodyBudget:
    """The bytes that all bodies, and the pictures in them, may take until their requests are made and computed."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._num_bytes = 0
        self._given_back: deque[int] = deque()  # by any thread: it is that of the loop which adds them up

    @property
    def num_bytes(self) -> int:
        """Bytes that are taken now."""
        while self._given_back:
            self._num_bytes -= self._given_back.popleft()
        return self._num_bytes

    def take(self, num_bytes: int) -> None:
        """Take room. `QueueFull` if others leave none, `BodyTooLarge` if there never is so much."""
        if num_bytes > self.max_bytes:
            raise BodyTooLarge(
                f"the request needs {num_bytes} bytes of memory, the limit set by --max-held-bytes is {self.max_bytes}"
            )
        if self.num_bytes + num_bytes > self.max_bytes:
            raise QueueFull(
                f"requests that are being read take {self.num_bytes} bytes of {self.max_bytes}: try again later"
            )
        self._num_bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        """Leave room to others. From any thread."""
        self._given_back.append(num_bytes)

    @contextlib.contextmanager
    def taken(self, num_bytes: int) -> Iterator[None]:
        """Take room for as long as a `with` block runs."""
        self.take(num_bytes)
        try:
            yield
        finally:
            self.give_back(num_bytes)


class HeldBody:
    """The part of a `budget` that one body takes. Give it back with `drop`, which can be called again."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self._num_bytes = self._num_commas = 0
        self.num_containers = 0  # objects and lists, at most: brackets in texts count too
        self._body: Object | None = None

    def add(self, piece: bytes) -> None:
        """Account for more of the body. `BodyTooLarge` if none may be so large, `QueueFull` if others leave no room."""
        counts = _counts(piece)
        self.num_containers += counts[b"{"] + counts[b"["]
        self._num_commas += counts[b","]
        if self.num_containers > MAX_CONTAINERS or self._num_commas > MAX_VALUES:
            raise BodyTooLarge(
                f"the body has more than {MAX_CONTAINERS} objects and lists"
                if self.num_containers > MAX_CONTAINERS
                else f"the body has more than {MAX_VALUES} values"
            )
        # The text is there twice: in pieces and as a whole, or as a whole and as its values.
        cost = 2 * len(piece) + sum(count * BYTES_OF_MARK[mark] for mark, count in counts.items())
        budget = self._budget
        if self._num_bytes + cost > budget.max_bytes:
            raise BodyTooLarge(f"the body takes more than {budget.max_bytes} bytes, the limit set by --max-held-bytes")
        budget.take(cost)
        self._num_bytes += cost

    def hold(self, body: Object) -> None:
        """Hold the body's fields, until `drop`."""
        self._body = body

    def drop(self) -> None:
        """Forget the body's fields but the small ones, and leave its room to others: the requests have been made."""
        self._budget.give_back(self._num_bytes)
        self._num_bytes = 0
        for name in self._body.__struct_fields__ if self._body is not None else ():
            value = getattr(self._body, name)
            if isinstance(value, (dict, list, Object)) or (isinstance(value, str) and len(value) > SMALL_TEXT):
                setattr(self._body, name, DROPPED)
        self._body = None


def _counts(piece: bytes) -> dict[bytes, int]:
    """Return how often each mark is in `piece`. `bytes.count` takes four times as long as vectors do of a long one."""
    if len(piece) < LONG_PIECE:
        return {mark: piece.count(mark) for mark in BYTES_OF_MARK}
    codes = np.frombuffer(piece, np.uint8)
    return {mark: int(np.count_nonzero(codes == mark[0])) for mark in BYTES_OF_MARK}


class Dropped:
    """Stands where a field was: whoever reads it after all has an error, and not the field's default."""


DROPPED = Dropped()
BODY_BUDGET = web.AppKey("body_budget", BodyBudget)
BODY = web.RequestKey("body", HeldBody)
