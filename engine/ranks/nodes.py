"""Ranks on other hosts. Each host runs the same command with its own --node-rank; only the first one serves.

The first host tells the others its configuration, so that all ranks agree, and then every step, over one TCP
connection each; what arrives goes into the host's own ring, as on the first. The connections, as those of the ranks,
are for a trusted network.
"""

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import select
import socket
import struct
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

from engine.config import EngineConfig
from engine.errors import ModelError
from engine.ranks.channel import Payload

logger = logging.getLogger(__name__)

LENGTH_BYTES = 8
START_TIMEOUT = timedelta(minutes=10)  # for all hosts to be started
ADDRESS_KEY = "radixloop/steps"
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"  # the one way to tell gloo
SIOCGIFADDR = 0x8915  # linux/sockios.h


def open_store(config: EngineConfig) -> dist.TCPStore:
    """Where ranks meet: on the first host, at --dist-init-addr."""
    host, port = init_address(config)
    is_master = config.node_rank == 0 and not config.join_dist_store
    try:
        return dist.TCPStore(host, port, is_master=is_master, wait_for_workers=False, timeout=START_TIMEOUT)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise ModelError(f"--dist-init-addr {host}:{port}: {error}") from None


def init_address(config: EngineConfig) -> tuple[str, int]:
    host, _, port = (config.dist_init_addr or "").rpartition(":")
    if not host or not port.isdigit():
        raise ModelError(f"--dist-init-addr must be HOST:PORT of the first node, got {config.dist_init_addr!r}")
    return host, int(port)


class NodeLinks:
    """The first host's connections to the others."""

    def __init__(self, config: EngineConfig, store: dist.TCPStore) -> None:
        """Waits until all are there."""
        host, _ = init_address(config)
        self._links: list[socket.socket] = []
        with socket.create_server((host, 0)) as listener:
            listener.settimeout(START_TIMEOUT.total_seconds())
            store.set(ADDRESS_KEY, f"{host}:{listener.getsockname()[1]}")
            for i in range(1, config.nnodes):
                try:
                    link, _ = listener.accept()
                except TimeoutError:
                    raise ModelError(f"only {i} of {config.nnodes} nodes have come (--nnodes)") from None
                _set_up(link, config.dist_timeout)
                self._links.append(link)
        # The engine's options alone: a server's hold its keys.
        options = {one.name: getattr(config, one.name) for one in dataclasses.fields(EngineConfig)}
        self.send(json.dumps(options).encode())

    def send(self, *parts: Payload) -> None:
        """One message to every node. Waits while a node's connection is full."""
        message = b"".join(bytes(memoryview(part).cast("B")) for part in parts)  # type: ignore[arg-type]
        for link in self._links:
            link.sendall(len(message).to_bytes(LENGTH_BYTES, "little") + message)

    def find_lost(self) -> str | None:
        """Nodes never send: what can be read is the connection's end."""
        readable, _, _ = select.select(self._links, [], [], 0)
        return f"node {1 + self._links.index(readable[0])} is gone; its own log says more" if readable else None

    def close(self) -> None:
        for link in self._links:
            link.close()


class NodeLink:
    """Another host's connection to the first."""

    def __init__(self, config: EngineConfig, store: dist.TCPStore) -> None:
        host, _, port = store.get(ADDRESS_KEY).decode().rpartition(":")
        self._socket = socket.create_connection((host, int(port)))
        _set_up(self._socket, config.dist_timeout)
        self._file = self._socket.makefile("rb")

    def receive(self) -> bytes:
        """The next message, waited for. `EOFError` at the end."""
        length = int.from_bytes(self._read(LENGTH_BYTES), "little")
        return self._read(length)

    def close(self) -> None:
        """From any thread: `receive` ends then."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _read(self, size: int) -> bytes:
        try:
            data = self._file.read(size)
        except OSError:  # such as a reset, or silence for too long
            data = b""
        if len(data) < size:
            raise EOFError("the first node has gone")
        return data


def _set_up(link: socket.socket, timeout_s: float) -> None:
    """Messages go out at once; a host that has lost power or its network is noticed after `timeout_s`."""
    link.settimeout(None)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    interval_s = max(1, int(timeout_s / 3))
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, interval_s)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval_s)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(timeout_s * 1e3))


@contextlib.contextmanager
def gloo_interface(host: str, port: int) -> Iterator[None]:
    """Have gloo use the network interface that leads to `host`, unless the user has named one.

    By itself it takes the one of the address that this host's name resolves to. That may be the loopback, through
    which no other host finds it.
    """
    name = None if GLOO_INTERFACE in os.environ else interface_to(host, port)
    if name is None:
        yield
        return
    os.environ[GLOO_INTERFACE] = name
    try:
        yield
    finally:
        del os.environ[GLOO_INTERFACE]


def interface_to(host: str, port: int) -> str | None:
    """The network interface whose IPv4 address this host has towards `host`, if there is one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, port))  # sends nothing
        except OSError:
            return None
        wanted = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has none
                continue
            if answer[20:24] == wanted:
                return name
    return None
