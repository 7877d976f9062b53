"""Taking in connections and requests: bursts, and a system that refuses."""

import asyncio
import errno
import itertools
import socket

import pytest
import uvloop

from server.http import intake
from server.http.intake import COST_OF_REQUEST, MAX_COST_A_PASS, Acceptor, Gate

LOOPS = pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])


class Greeter(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(b"hello")
        transport.close()


def bound() -> tuple[socket.socket, int]:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    return listener, listener.getsockname()[1]


async def greeting_of(port: int) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        return await reader.read()
    finally:
        writer.close()


@LOOPS
def test_a_burst_of_connections_takes_few_turns_of_the_loop(new_loop: type) -> None:
    async def main() -> None:
        listener, port = bound()
        num_made = 0

        class Counter(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                nonlocal num_made
                num_made += 1

        with Acceptor(listener, Counter):
            clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(64)]
            for _ in range(20):
                await asyncio.sleep(0)
            assert num_made == 64
            for client in clients:
                client.close()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main())


async def test_no_connection_is_taken_after_leaving() -> None:
    listener, port = bound()
    with Acceptor(listener, Greeter):
        assert await greeting_of(port) == b"hello"
    with pytest.raises(ConnectionRefusedError):
        await greeting_of(port)


async def test_connections_are_taken_again_after_the_system_refused_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "RETRY_S", 0.01)
    listener, port = bound()

    class Exhausted:
        """A listener for which no file descriptor is free, once."""

        is_exhausted = True

        def __getattr__(self, name: str) -> object:
            return getattr(listener, name)

        def accept(self) -> object:
            if self.is_exhausted:
                self.is_exhausted = False
                raise OSError(errno.EMFILE, "Too many open files")
            return listener.accept()

    asked = []
    with Acceptor(Exhausted(), Greeter, lambda: asked.append("room")):  # type: ignore[arg-type]
        assert await greeting_of(port) == b"hello"
    assert asked == ["room"]


async def test_a_burst_of_requests_passes_a_few_a_turn_and_in_order() -> None:
    gate, passed = Gate(), []

    async def request(i: int) -> None:
        await gate.wait(0)
        passed.append(i)

    tasks = [asyncio.create_task(request(i)) for i in range(100)]
    num_passed = [0]
    while len(passed) < 100:
        await asyncio.sleep(0)
        num_passed.append(len(passed))
    assert passed == list(range(100))
    most_in_a_turn = max(after - before for before, after in itertools.pairwise(num_passed))
    assert most_in_a_turn <= 2 * MAX_COST_A_PASS // COST_OF_REQUEST
    await asyncio.gather(*tasks)


async def test_a_request_that_was_cancelled_in_the_queue_holds_nobody_up() -> None:
    gate = Gate()
    tasks = [asyncio.create_task(gate.wait(MAX_COST_A_PASS)) for _ in range(4)]
    await asyncio.sleep(0)
    tasks[1].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert [task.cancelled() for task in tasks] == [False, True, False, False]
    await asyncio.wait_for(gate.wait(0), 60)
