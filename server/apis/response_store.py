"""Responses that are kept in memory, to be continued or fetched later."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import orjson

from server.reading.protocol import JSON

MAX_STORED = 4096
MAX_STORED_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class StoredResponse:
    response: JSON
    messages: list[JSON]  # the conversation that it ends, without instructions
    items: list[JSON]  # its own input


@dataclass(slots=True)
class Shelf:
    """One owner's responses."""

    texts: OrderedDict[str, bytes] = field(default_factory=OrderedDict)  # JSON by id, the least used first
    events: dict[str, list[bytes]] = field(default_factory=dict)  # by id, of those that can be streamed again
    num_bytes: int = 0


class ResponseStore:
    """The responses used last, as many as fit, in memory. Kept as JSON text, whose length is what they cost.

    Where they do not fit, those go of the owner who has the most: nobody loses theirs to another's many.
    """

    def __init__(self, max_count: int = MAX_STORED, max_bytes: int = MAX_STORED_BYTES) -> None:
        self.max_count, self.max_bytes = max_count, max_bytes
        self.num_bytes = 0
        self._owners: dict[str, str] = {}  # by id
        self._shelves: dict[str, Shelf] = {}  # by owner, none of them empty

    def put(
        self, owner: str, response: JSON, messages: list[JSON], items: Sequence[JSON] | orjson.Fragment = ()
    ) -> None:
        text = orjson.dumps([response, messages, items])
        shelf = self._shelves.setdefault(owner, Shelf())
        self._owners[response["id"]], shelf.texts[response["id"]] = owner, text
        shelf.num_bytes += len(text)
        self.num_bytes += len(text)
        self._make_room()

    def _make_room(self) -> None:
        while len(self._owners) > self.max_count:
            self._remove_oldest(max(self._shelves.values(), key=lambda shelf: len(shelf.texts)))
        while self.num_bytes > self.max_bytes:
            self._remove_oldest(max(self._shelves.values(), key=lambda shelf: shelf.num_bytes))

    def owner(self, response_id: str) -> str | None:
        """Return the owner of a response; None if there is no such."""
        return self._owners.get(response_id)

    def get(self, owner: str, response_id: str) -> StoredResponse | None:
        if self._owners.get(response_id) != owner:
            return None
        texts = self._shelves[owner].texts
        texts.move_to_end(response_id)
        return StoredResponse(*orjson.loads(texts[response_id]))

    def keep_events(self, response_id: str, events: list[bytes]) -> None:
        """Keep the events of a response as well, if there is such."""
        if (owner := self._owners.get(response_id)) is None:
            return
        shelf, num_bytes = self._shelves[owner], sum(map(len, events))
        shelf.events[response_id] = events
        shelf.num_bytes += num_bytes
        self.num_bytes += num_bytes
        self._make_room()

    def events(self, response_id: str) -> list[bytes] | None:
        """Return the events of a response; None if they were not kept."""
        owner = self._owners.get(response_id)
        return None if owner is None else self._shelves[owner].events.get(response_id)

    def remove(self, response_id: str) -> None:
        owner = self._owners.pop(response_id)
        shelf = self._shelves[owner]
        num_bytes = len(shelf.texts.pop(response_id)) + sum(map(len, shelf.events.pop(response_id, ())))
        shelf.num_bytes -= num_bytes
        self.num_bytes -= num_bytes
        if not shelf.texts:
            del self._shelves[owner]

    def _remove_oldest(self, shelf: Shelf) -> None:
        self.remove(next(iter(shelf.texts)))
