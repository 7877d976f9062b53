"""Responses that are kept in memory, to be continued or fetched later."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import orjson

from server.reading.protocol import JSON

MAX_STORED = 4096
MAX_STORED_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class StoredResponse:
    response: JSON
    messages: list[JSON]  # the conversation that it ends, without instructions
    items: list[JSON]  # its own input


class ResponseStore:
    """The responses used last, as many as fit, in memory. Kept as JSON text, whose length is what they cost."""

    def __init__(self, max_count: int = MAX_STORED, max_bytes: int = MAX_STORED_BYTES) -> None:
        self.max_count, self.max_bytes = max_count, max_bytes
        self.num_bytes = 0
        self._entries: OrderedDict[str, tuple[str, bytes]] = OrderedDict()  # id -> owner, JSON; least used first

    def put(self, owner: str, response: JSON, messages: list[JSON], items: Sequence[JSON] = ()) -> None:
        text = orjson.dumps([response, messages, items])
        self._entries[response["id"]] = owner, text
        self.num_bytes += len(text)
        while len(self._entries) > self.max_count or self.num_bytes > self.max_bytes:
            self.remove(next(iter(self._entries)))

    def owner(self, response_id: str) -> str | None:
        """Return the owner of a response; None if there is no such."""
        entry = self._entries.get(response_id)
        return None if entry is None else entry[0]

    def get(self, owner: str, response_id: str) -> StoredResponse | None:
        entry = self._entries.get(response_id)
        if entry is None or entry[0] != owner:
            return None
        self._entries.move_to_end(response_id)
        return StoredResponse(*orjson.loads(entry[1]))

    def remove(self, response_id: str) -> None:
        _, text = self._entries.pop(response_id)
        self.num_bytes -= len(text)
