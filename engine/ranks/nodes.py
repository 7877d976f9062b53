"""Connect hosts. Each host runs the same command with its own --node-rank; only the first one serves.

The first host sends the others its configuration, so that all ranks agree, and then every step, over one TCP
connection per host; the receiving host puts each message into its own ring, as the first does. These connections, like
those between ranks, are for a trusted network.
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
import time
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

from engine.config import EngineConfig
from engine.errors import ModelError
from engine.ranks.channel import Payload
from engine.ranks.meeting import POLL_S, PROBE_S, Waiting, names, reach, resolve

logger = logging.getLogger(__name__)

LENGTH_BYTES = 8  # before each message
NODE_BYTES = 4  # what a node sends first: which one it is
ADDRESS_KEY = "radixloop/steps"  # key of the store under which the first host announces its address
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"  # environment variable: gloo has no other setting
SIOCGIFADDR = 0x8915  # linux/sockios.h


def open_store(config: EngineConfig) -> dist.TCPStore:
    """Open the store at which ranks meet: on the first host, at --dist-init-addr. Raises `ModelError`."""
    host, port = init_address(config)
    waiting = Waiting(config.start_timeout_s)
    resolve(host, port, waiting)
    is_master = config.node_rank == 0 and not config.join_dist_store
    if not is_master:
        reach(host, port, "torchrun's store" if config.join_dist_store else "node 0", waiting)
    timeout = timedelta(seconds=config.start_timeout_s)
    try:
        return dist.TCPStore(host, port, is_master=is_master, wait_for_workers=False, timeout=timeout)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise ModelError(f"--dist-init-addr {host}:{port}: {error}") from None


def init_address(config: EngineConfig) -> tuple[str, int]:
    """Return host and port of --dist-init-addr. Raises `ModelError`."""
    host, _, port = (config.dist_init_addr or "").rpartition(":")
    if not host or not port.isdigit():
        raise ModelError(f"--dist-init-addr must be HOST:PORT of the first node, got {config.dist_init_addr!r}")
    return host, int(port)


class NodeLinks:
    """Send messages from the first host to the others."""

    def __init__(self, config: EngineConfig, store: dist.TCPStore) -> None:
        """Wait until all hosts are connected, and send them the configuration. Raises `ModelError`."""
        host, _ = init_address(config)
        self._links: list[socket.socket] = []
        self._nodes: list[int] = []  # which node each of them leads to
        waiting, missing = Waiting(config.start_timeout_s), set(range(1, config.nnodes))
        try:
            listener = socket.create_server((host, 0))
        except OSError as error:
            raise ModelError(f"--dist-init-addr {host}: not an address of this host: {error.strerror}") from None
        with listener:
            store.set(ADDRESS_KEY, f"{host}:{listener.getsockname()[1]}")
            while missing:
                node, link = _accept(listener)
                if link is None:
                    waiting.go_on(f"{names('node', sorted(missing))} of {config.nnodes} (--nnodes)")
                elif node not in missing:
                    raise ModelError(f"a second host, or one too many, says that it is node {node} (--node-rank)")
                else:
                    missing.remove(node)
                    _set_up(link, config.answer_timeout_s)
                    self._links.append(link)
                    self._nodes.append(node)
        # The engine's options only: a server's options include its keys.
        options = {one.name: getattr(config, one.name) for one in dataclasses.fields(EngineConfig)}
        self.send(json.dumps(options).encode())

    def send(self, *parts: Payload) -> None:
        """Send `parts` as one message to every node. Waits while a node's connection is full."""
        message = b"".join(bytes(memoryview(part).cast("B")) for part in parts)  # type: ignore[arg-type]
        for link in self._links:
            link.sendall(len(message).to_bytes(LENGTH_BYTES, "little") + message)

    def find_lost(self) -> str | None:
        """Return a message about a node that is gone, if any: nodes send no more, so what is readable has ended."""
        readable, _, _ = select.select(self._links, [], [], 0)
        if not readable:
            return None
        return f"node {self._nodes[self._links.index(readable[0])]} is gone; its own log says more"

    def close(self) -> None:
        """Close all connections."""
        for link in self._links:
            link.close()


class NodeLink:
    """Receive messages from the first host, on another host."""

    def __init__(self, config: EngineConfig, store: dist.TCPStore) -> None:
        """Connect to the first host. Raises `ModelError`."""
        waiting = Waiting(config.start_timeout_s)
        while not store.check([ADDRESS_KEY]):
            waiting.go_on("node 0 to start its ranks")
            time.sleep(POLL_S)
        host, _, port = store.get(ADDRESS_KEY).decode().rpartition(":")
        try:
            self._socket = socket.create_connection((host, int(port)), timeout=config.answer_timeout_s)
            self._socket.sendall(config.node_rank.to_bytes(NODE_BYTES, "little"))
        except OSError as error:
            raise ModelError(f"cannot connect to node 0 at {host}:{port}: {error.strerror or error}") from None
        _set_up(self._socket, config.answer_timeout_s)
        self._file = self._socket.makefile("rb")

    def receive(self) -> bytes:
        """Wait for the next message and return it. Raises `EOFError` at the connection's end."""
        length = int.from_bytes(self._read(LENGTH_BYTES), "little")
        return self._read(length)

    def close(self) -> None:
        """Close the connection, from any thread; `receive` raises `EOFError` then."""
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


def _accept(listener: socket.socket) -> tuple[int, socket.socket | None]:
    """Return which node has connected, and its connection; None if none has within `POLL_S`.

    A connection that does not say which node it is comes from somewhere else, and is closed.
    """
    listener.settimeout(POLL_S)
    try:
        link, _ = listener.accept()
    except TimeoutError:
        return 0, None
    link.settimeout(PROBE_S)
    with contextlib.suppress(OSError):
        greeting = link.recv(NODE_BYTES, socket.MSG_WAITALL)
        if len(greeting) == NODE_BYTES:
            return int.from_bytes(greeting, "little"), link
    link.close()
    return 0, None


def _set_up(link: socket.socket, timeout_s: float) -> None:
    """Set options: messages are sent at once, and a host without power or network is noticed after `timeout_s`."""
    link.settimeout(None)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    interval_s = max(1, int(timeout_s / 3))
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, interval_s)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval_s)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(timeout_s * 1e3))


@contextlib.contextmanager
def gloo_interface(host: str, port: int) -> Iterator[None]:
    """Make gloo use the network interface that leads to `host`, unless the user has named one.

    By default gloo uses the interface of the address that this host's name resolves to. That may be the loopback
    interface, which no other host can reach.
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
    """Return the network interface with the IPv4 address that this host uses towards `host`, if there is one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, port))  # sends nothing
        except OSError:
            return None
        wanted = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # the interface has no address
                continue
            if answer[20:24] == wanted:
                return name
    return None
