"""Who owns what, where several clients have keys of their own (`--api-key-file`).

Every stored or running thing has an owner, the digest of its maker's key: files, batches, responses, sessions.
Nobody else finds it, and an admin finds all. Prefixes are cached by owner too, and a request's priority counts among
its owner's. Where clients have no keys of their own, they all are one owner: "".
"""

import hashlib
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from engine.request import Request

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


def bill(caller: Caller, requests: Sequence[Request]) -> None:
    """Put `requests` on the account of their maker: its turns and weight, its priorities, its part of the cache."""
    client = caller.get(CLIENT)
    if client is None:
        return
    for request in requests:
        request.client, request.weight = client.name, client.weight
        if client.owner:
            request.own_priority = max(-MAX_OWN_PRIORITY, min(request.priority, MAX_OWN_PRIORITY))
            request.priority = 0
            if not client.shares_cache:
                request.extra_key = client.owner + request.extra_key
        request.priority += client.priority
