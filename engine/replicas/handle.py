"""The front end's side of a replica."""

import asyncio
import dataclasses
import time
from dataclasses import dataclass, field
from typing import Any

from cache.radix import Prefix
from engine.errors import EngineStopped
from engine.ranks.channel import ChannelReader, ChannelWriter
from engine.replicas.messages import (
    ABORT,
    BRANCHES,
    PREFIXES,
    REPORT,
    REQUESTS,
    SUBMIT,
    Report,
    decode_answer,
    receive_long,
    send_command,
)
from engine.state import RequestState
from engine.views import BranchView, RequestView

TICKET_MARK = "#"  # between a request's rid and the number of the message that submits it


@dataclass(slots=True)
class ReplicaHandle:
    """A replica as the front end knows it: its channels, its live requests and its last report.

    A request goes there under a ticket, not under its rid: a client may use that again once it has gone, while the
    replica's last news of the request before are still on their way.
    """

    name: str
    commands: ChannelWriter
    answers: ChannelReader
    report: Report = field(init=False)  # exists once the replica is ready
    states: dict[str, RequestState] = field(default_factory=dict)  # by ticket
    tickets: dict[str, str] = field(default_factory=dict)  # by rid
    # As they were when somebody last asked.
    prefixes: list[Prefix] = field(default_factory=list)
    branches: list[BranchView] = field(default_factory=list)
    requests: list[RequestView] = field(default_factory=list)
    num_sent: int = 0  # messages
    num_received: int = 0
    last_sign_at: float = 0.0  # time.monotonic() of the last message, or of the first request after a pause
    profiles: asyncio.Queue[tuple[str, str]] = field(default_factory=asyncio.Queue)  # (path, why there is none)
    pieces: bytearray = field(default_factory=bytearray)

    def send(self, kind: int, *args: Any) -> None:
        """Send a command. `EngineStopped` if nobody reads it."""
        try:
            send_command(self.commands, kind, *args)
        except OSError as error:
            raise EngineStopped(f"{self.name} does not answer: {error}") from None
        self.num_sent += 1

    def submit(self, state: RequestState) -> None:
        """Send a request, and keep its state; the time without a message counts from here if it is the only one."""
        if not self.states:
            self.last_sign_at = time.monotonic()
        ticket = f"{state.rid}{TICKET_MARK}{self.num_sent}"
        self.send(SUBMIT, dataclasses.replace(state.request, rid=ticket), state.times.arrived)
        self.states[ticket] = state
        self.tickets[state.rid] = ticket

    def abort(self, rid: str) -> None:
        self.send(ABORT, self.tickets[rid])

    def forget(self, state: RequestState) -> None:
        """Take in no more news of `state`."""
        del self.states[self.tickets.pop(state.rid)]

    def receive(self) -> list[tuple[Any, ...]]:
        """Return the encoded deltas of the next message, by ticket, and keep the rest of it. `EOFError` at the end."""
        message = receive_long(self.answers, self.pieces)
        if message is None:
            return []
        self.num_received += 1
        self.last_sign_at = time.monotonic()
        deltas, answer = decode_answer(message)
        if answer is not None:
            kind, value = answer
            if kind == REPORT:
                self.report = value
            elif kind == PREFIXES:
                self.prefixes = value
            elif kind == BRANCHES:
                self.branches = value
            elif kind == REQUESTS:
                self.requests = [dataclasses.replace(one, rid=one.rid.rpartition(TICKET_MARK)[0]) for one in value]
            else:
                self.profiles.put_nowait(value)
        return deltas

    def describe(self) -> str:
        silent_s = time.monotonic() - self.last_sign_at
        return f"{self.name}: {len(self.states)} requests, last message {silent_s:.1f} s ago, {self.report}"
