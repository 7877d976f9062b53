"""Who may call which route, and on whose account."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from engine.state import RequestState
from server.config import ServerConfig
from server.reading.protocol import Owner

OPEN_PATHS = frozenset(
    {"/health", "/ping", "/dashboard"}
)  # the page is empty: it asks for a key, then for /dashboard/data
ADMIN_PATHS = frozenset(
    {
        "/flush_cache", "/abort_request", "/dashboard/data", "/start_profile", "/stop_profile", "/pause_generation",
        "/continue_generation", "/update_weights_from_disk", "/update_weight_version", "/get_weights_by_name",
        "/release_memory_occupation", "/resume_memory_occupation", "/configure_logging",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Client:
    """A client, for whom requests run. Waiting clients are served round robin, in proportion to their weights."""

    name: str
    weight: float = 1.0
    priority: int = 0  # added to its requests' own


CLIENT = web.RequestKey("client", Client)


def load_keys(file: str) -> dict[str, Client]:
    """Return clients by key, from the lines of a YAML file: `name: key` or `name: {key: ..., weight: 2}`.

    `ValueError` if it cannot be read or is wrong.
    """
    try:
        entries = yaml.safe_load(Path(file).read_bytes())
    except OSError as error:
        raise ValueError(f"--api-key-file {file}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"--api-key-file {file} is not YAML: {error}") from None
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"--api-key-file {file} must hold `name: key` lines")
    clients: dict[str, Client] = {}
    for name, entry in entries.items():
        values: dict[str, Any] = entry if isinstance(entry, dict) else {"key": entry}
        key, weight = values.get("key"), values.get("weight", 1.0)
        if not isinstance(key, str) or not key or values.keys() - {"key", "weight"}:
            raise ValueError(f"--api-key-file {file}: {name} needs a key in quotes, and may have a weight")
        if not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            raise ValueError(f"--api-key-file {file}: the weight of {name} must be a number above 0")
        if key in clients:
            raise ValueError(f"--api-key-file {file}: {name} has the key of {clients[key].name}")
        clients[key] = Client(str(name), float(weight))
    return clients


class KeyRing:
    """The keys that open the server. Looked up by their digests, so that the time it takes reveals nothing."""

    def __init__(self, config: ServerConfig) -> None:
        users = load_keys(config.api_key_file) if config.api_key_file else {}
        if config.api_key:
            users.setdefault(config.api_key, Client("api-key"))
        admins = {config.admin_api_key: Client("admin")} if config.admin_api_key else {}
        self._users = {_digest(key): client for key, client in users.items()}
        self._admins = {_digest(key): client for key, client in admins.items()}
        # With one key for all, or none, addresses distinguish clients, and without an admin key all are admins.
        self._is_by_address = not config.api_key_file
        self._needs_admin = bool(config.admin_api_key or config.api_key_file)

    def is_open(self, path: str) -> bool:
        return path in OPEN_PATHS or not (self._users or (path in ADMIN_PATHS and self._needs_admin))

    def client_of(self, request: web.Request) -> Client | None:
        """Return the client that sent the request; None: it does not have the key that its route needs."""
        if not (self._users or self._admins):
            return Client(request.remote or "")
        digest = _digest(_key_of(request))
        if request.path in ADMIN_PATHS and self._needs_admin:
            client = self._admins.get(digest)
        else:
            client = self._users.get(digest) or self._admins.get(digest)
        if client is None and not self.is_open(request.path):
            return None
        if client is None or self._is_by_address:
            return Client(request.remote or "")
        return client


def _key_of(request: web.Request) -> str:
    """Return the key, sent as OpenAI's clients do, or as Anthropic's; empty if none."""
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    return given.strip() if scheme.lower() == "bearer" else request.headers.get("X-Api-Key", "").strip()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def require_key(keys: KeyRing) -> Middleware:
    """Demand a key on every route but the open ones; on routes that reach into the server, the admin's."""

    @web.middleware
    async def check_key(request: web.Request, handler: Handler) -> web.StreamResponse:
        client = keys.client_of(request)
        if client is None:
            raise web.HTTPUnauthorized(
                text=f"{_key_kind(request.path)} is required: send the header `Authorization: Bearer KEY`",
                headers={"WWW-Authenticate": "Bearer"},
            )
        request[CLIENT] = client
        return await handler(request)

    return check_key


def _key_kind(path: str) -> str:
    return "a valid key (--admin-api-key if there are several)" if path in ADMIN_PATHS else "a valid key"


def bill(owner: Owner, states: Sequence[RequestState]) -> None:
    """Put requests that are not submitted yet on the account of the client that `owner` names."""
    client = owner.get(CLIENT)
    if client is not None:
        for state in states:
            asked = state.request
            state.request = replace(
                asked, client=client.name, weight=client.weight, priority=asked.priority + client.priority
            )
