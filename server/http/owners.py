"""Who owns what, where several clients have keys of their own (`--api-key-file`).

Every stored or running thing has an owner, the digest of its maker's key: files, batches, responses, sessions.
Nobody else finds it, and an admin finds all. Prefixes are cached by owner too, and a request's priority counts among
its owner's. Where clients have no keys of their own, they all are one owner: "".
"""

import hashlib
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from aiohttp import web

from engine.state import RequestState

EVERYBODY = ""  # the owner of all there is without keys of several clients
MAX_OWN_PRIORITY = 100  # of a client with a key of its own
# The maker of requests, as a mapping of facts about them: an HTTP request, or a line of a batch.
Caller = MutableMapping[Any, Any]


@dataclass(frozen=True, slots=True)
class Client:
    """A client, for whom requests run. Waiting clients are served round robin, in proportion to their weights."""

    name: str
    weight: float = 1.0
    priority: int = 0  # added to its requests' own
    owner: str = EVERYBODY  # of what it makes
    is_admin: bool = False  # finds what anybody owns
    shares_cache: bool = False  # with other owners


CLIENT = web.RequestKey("client", Client)


def owner_of_key(key: str) -> str:
    return hashlib.sha256(b"owner " + key.encode(errors="surrogateescape")).hexdigest()[:32]


def owner_of(caller: Caller) -> str:
    """Return the owner of what `caller` makes."""
    client = caller.get(CLIENT)
    return EVERYBODY if client is None else client.owner


def may_find(caller: Caller, owner: str) -> bool:
    """Return whether what `owner` has made exists for `caller`."""
    client = caller.get(CLIENT)
    return client is None or client.is_admin or client.owner == owner


def bill(caller: Caller, states: Sequence[RequestState]) -> None:
    """Put requests that are not submitted yet on the account of their maker.

    That is: its turns and weight, its priorities, its part of the cache.
    """
    client = caller.get(CLIENT)
    if client is None:
        return
    for state in states:
        asked = state.request
        priority, own_priority, extra_key = asked.priority, asked.own_priority, asked.extra_key
        if client.owner:
            priority, own_priority = 0, max(-MAX_OWN_PRIORITY, min(priority, MAX_OWN_PRIORITY))
            if not client.shares_cache:
                extra_key = client.owner + extra_key
        state.request = replace(
            asked, client=client.name, weight=client.weight, priority=priority + client.priority,
            own_priority=own_priority, extra_key=extra_key,
        )  # fmt: skip
        state.extra_key = extra_key
