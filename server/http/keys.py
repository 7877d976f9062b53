"""Who may call which route, and on whose account."""

import hashlib
import logging
import math
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from server.config import ServerConfig
from server.http.owners import CLIENT, Client, owner_of_key

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset(
    {"/", "/docs", "/health", "/ping", "/dashboard"}
)  # the pages are empty: they ask for a key, then for what they show
ADMIN_PATHS = frozenset(
    {
        "/flush_cache", "/abort_request", "/dashboard/data", "/start_profile", "/stop_profile", "/pause_generation",
        "/continue_generation", "/update_weights_from_disk", "/update_weight_version", "/get_weights_by_name",
        "/release_memory_occupation", "/resume_memory_occupation", "/configure_logging",
    }
)  # fmt: skip


CHECK_INTERVAL_S = 1.0  # between two looks at whether the key file has changed


def load_keys(file: str) -> dict[str, Client]:
    """Return clients by key, from the lines of a YAML file: `name: key`, or `name: {key: ..., weight: 2, admin: true}`.

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
        key, weight, is_admin = values.get("key"), values.get("weight", 1.0), values.get("admin", False)
        if not isinstance(key, str) or not key or values.keys() - {"key", "weight", "admin"}:
            raise ValueError(f"--api-key-file {file}: {name} needs a key in quotes, and may have a weight")
        if not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            raise ValueError(f"--api-key-file {file}: the weight of {name} must be a number above 0")
        if not isinstance(is_admin, bool):
            raise ValueError(f"--api-key-file {file}: admin of {name} must be true or false")
        if key in clients:
            raise ValueError(f"--api-key-file {file}: {name} has the key of {clients[key].name}")
        clients[key] = Client(str(name), float(weight), owner=owner_of_key(key), is_admin=is_admin)
    return clients


class KeyRing:
    """The keys that open the server. Looked up by their digests, so that the time it takes reveals nothing."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        # With one key for all, or none, addresses distinguish clients, and without an admin key all are admins.
        self._is_by_address = not config.api_key_file
        self._needs_admin = bool(config.admin_api_key or config.api_key_file)
        self._checked_at = time.monotonic()
        self._version = self._file_version()
        self._read()

    def _read(self) -> None:
        """Read all keys. `ValueError` if the file is wrong: those read before then stay."""
        config = self._config
        clients = load_keys(config.api_key_file) if config.api_key_file else {}
        if config.api_key:
            owner = "" if self._is_by_address else owner_of_key(config.api_key)
            clients.setdefault(config.api_key, Client("api-key", owner=owner))
        if config.admin_api_key:
            clients[config.admin_api_key] = Client("admin", is_admin=True)
        clients = {key: replace(client, shares_cache=config.share_prefix_cache) for key, client in clients.items()}
        self._users = {_digest(key): client for key, client in clients.items() if not client.is_admin}
        self._admins = {_digest(key): client for key, client in clients.items() if client.is_admin}

    def _file_version(self) -> tuple[int, int, int] | None:
        """Return what changes with the key file; None: there is none now."""
        try:
            found = os.stat(self._config.api_key_file or "")
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _follow_file(self) -> None:
        """Read the key file again if it has changed. One that is wrong, or half written, changes nothing."""
        if time.monotonic() - self._checked_at < CHECK_INTERVAL_S:
            return
        self._checked_at = time.monotonic()
        version = self._file_version()
        if version != self._version:
            self._version = version
            try:
                self._read()
                logger.info("--api-key-file has changed: %d keys", len(self._users) + len(self._admins))
            except ValueError as error:
                logger.error("the keys stay as they were: %s", error)

    def is_open(self, path: str) -> bool:
        return path in OPEN_PATHS or not (self._users or (path in ADMIN_PATHS and self._needs_admin))

    def client_of(self, request: web.Request) -> Client | None:
        """Return the client that sent the request; None: it does not have the key that its route needs."""
        if self._config.api_key_file:
            self._follow_file()
        if not (self._users or self._admins):
            return Client(request.remote or "", is_admin=True)
        digest = _digest(_key_of(request))
        if request.path in ADMIN_PATHS and self._needs_admin:
            client = self._admins.get(digest)
        else:
            client = self._users.get(digest) or self._admins.get(digest)
        if client is None and not self.is_open(request.path):
            return None
        if client is None or self._is_by_address:
            is_admin = client is not None and (client.is_admin or not self._needs_admin)
            return Client(request.remote or "", is_admin=is_admin)
        return client


def _key_of(request: web.Request) -> str:
    """Return the key, sent as OpenAI's clients do, as Anthropic's or as Azure's; empty if none."""
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return given.strip()
    headers = request.headers
    return headers.get("X-Api-Key", headers.get("Api-Key", "")).strip()


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
