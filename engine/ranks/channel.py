"""Messages from one process to others of the same host, through a ring in shared memory.

The ring is an anonymous file (memfd_create(2)): without a name, nothing of it is left behind however its processes
end. Each reader has a pipe that brings it one byte a message. So readers sleep in the kernel and never poll, the
message is in memory before its byte is there to be read, and the pipe's end tells that the other side has gone.
"""

import mmap
import os
import time
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np

CAPACITY = 16 << 20
ALIGNMENT = 64  # of messages, for arrays to be looked at in place; and a cache line for each reader's state
LENGTH_BYTES = 8
WRAP = -1  # in place of a length: the next message is at the ring's beginning
FULL_POLL_S = 1e-4
READ_BYTES, NUM_RECEIVED = 0, 1  # a reader's state

Payload = bytes | bytearray | memoryview | np.ndarray


def open_channel(num_readers: int, capacity: int = CAPACITY) -> "tuple[ChannelWriter, list[ChannelReader]]":
    """Both sides. Any of them may be an argument of a process that is being spawned; it is to be closed here then.

    capacity: bytes, a multiple of 64. The longest message has half of it.
    """
    memory = os.memfd_create("radixloop-channel")
    os.ftruncate(memory, num_readers * ALIGNMENT + capacity)
    pipes = [os.pipe() for _ in range(num_readers)]
    for _, write_end in pipes:
        os.set_blocking(write_end, False)
    readers = [ChannelReader(os.dup(memory), pipes[i][0], i, num_readers, capacity) for i in range(num_readers)]
    return ChannelWriter(memory, [write_end for _, write_end in pipes], capacity), readers


class ChannelWriter:
    """The side that sends."""

    def __init__(self, memory_fd: int, pipe_fds: list[int], capacity: int) -> None:
        self.num_sent = 0
        self._capacity = capacity
        # Since the beginning, as are the readers' own counts: the ring holds the difference.
        self._written_bytes = 0
        self._read_bytes = 0  # by all readers, when last looked
        self._memory_fd, self._pipe_fds = memory_fd, pipe_fds
        self._states, self._ring = _map(memory_fd, len(pipe_fds), capacity)

    def __getstate__(self) -> tuple[Any, ...]:
        return DupFd(self._memory_fd), [DupFd(fd) for fd in self._pipe_fds], self._capacity

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        memory_fd, pipe_fds, capacity = state
        self.__init__(memory_fd.detach(), [fd.detach() for fd in pipe_fds], capacity)  # type: ignore[misc]
        for fd in self._pipe_fds:
            os.set_blocking(fd, False)

    def send(self, *parts: Payload, timeout_s: float = 10.0) -> None:
        """Send `parts` as one message. Waits while a slow reader has the ring full.

        `TimeoutError` after `timeout_s` of waiting; `BrokenPipeError` if a reader has gone.
        """
        buffers = [memoryview(part).cast("B") for part in parts]  # type: ignore[arg-type] # numpy's arrays are buffers
        length = sum(buffer.nbytes for buffer in buffers)
        size = _aligned(LENGTH_BYTES + length)
        if size > self._capacity // 2:
            raise ValueError(f"a message has {length} bytes, the channel takes {self._capacity // 2 - LENGTH_BYTES}")
        deadline = time.monotonic() + timeout_s
        at = self._written_bytes % self._capacity
        skipped = self._capacity - at if at + size > self._capacity else 0
        if not self._pipe_fds:
            return
        written_bytes = self._written_bytes + skipped + size
        while written_bytes - self._read_bytes > self._capacity:
            self._read_bytes = int(self._states[:, READ_BYTES].min())
            if written_bytes - self._read_bytes > self._capacity:
                self._wait(deadline, timeout_s)
        if skipped:
            self._put_length(at, WRAP)
            at = 0
        self._put_length(at, length)
        at += LENGTH_BYTES
        for buffer in buffers:
            self._ring[at : at + buffer.nbytes] = buffer
            at += buffer.nbytes
        self._written_bytes = written_bytes
        self.num_sent += 1
        for fd in self._pipe_fds:
            while True:
                try:
                    os.write(fd, b"\0")
                    break
                except BlockingIOError:  # 65536 tiny messages wait
                    self._wait(deadline, timeout_s)

    def num_unread(self, i: int) -> int:
        """Messages that reader i has not taken up yet."""
        return self.num_sent - int(self._states[i, NUM_RECEIVED])

    def close(self) -> None:
        """Readers get what is in the ring, then `EOFError`."""
        for fd in (*self._pipe_fds, self._memory_fd):
            os.close(fd)
        self._pipe_fds = []

    def _wait(self, deadline: float, timeout_s: float) -> None:
        if time.monotonic() > deadline:
            slowest = int(self._states[:, READ_BYTES].argmin())
            raise TimeoutError(f"reader {slowest} has not read for {timeout_s:g} s")
        time.sleep(FULL_POLL_S)

    def _put_length(self, at: int, length: int) -> None:
        self._ring[at : at + LENGTH_BYTES] = length.to_bytes(LENGTH_BYTES, "little", signed=True)


class ChannelReader:
    """A side that receives."""

    def __init__(self, memory_fd: int, pipe_fd: int, index: int, num_readers: int, capacity: int) -> None:
        self._memory_fd, self._pipe_fd = memory_fd, pipe_fd
        self._layout = index, num_readers, capacity
        states, self._ring = _map(memory_fd, num_readers, capacity)
        self._state = states[index]
        self._capacity = capacity
        self._end = 0  # of the last message, which may still be looked at

    def __getstate__(self) -> tuple[Any, ...]:
        return DupFd(self._memory_fd), DupFd(self._pipe_fd), *self._layout

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        memory_fd, pipe_fd, *layout = state
        self.__init__(memory_fd.detach(), pipe_fd.detach(), *layout)  # type: ignore[misc]

    def fileno(self) -> int:
        """Readable while there is a message, or nothing more to come."""
        return self._pipe_fd

    def receive(self) -> memoryview:
        """The next message, waited for; a view of the ring that is valid until the next call. `EOFError` at the end."""
        self._state[READ_BYTES] = self._end
        if not os.read(self._pipe_fd, 1):
            raise EOFError("the channel's writer has gone")
        at = self._end % self._capacity
        length = self._length_at(at)
        if length == WRAP:
            self._end += self._capacity - at
            at = 0
            length = self._length_at(at)
        self._end += _aligned(LENGTH_BYTES + length)
        self._state[NUM_RECEIVED] += 1
        return self._ring[at + LENGTH_BYTES : at + LENGTH_BYTES + length]

    def close(self) -> None:
        os.close(self._pipe_fd)
        os.close(self._memory_fd)

    def _length_at(self, at: int) -> int:
        return int.from_bytes(self._ring[at : at + LENGTH_BYTES], "little", signed=True)


def _map(fd: int, num_readers: int, capacity: int) -> tuple[np.ndarray, memoryview]:
    """(the readers' states, int64 [num_readers, 8]; the ring)."""
    # Populated now: the first message to touch a page would wait for it, at 10 µs a page.
    flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
    memory = memoryview(mmap.mmap(fd, num_readers * ALIGNMENT + capacity, flags=flags))
    states = np.frombuffer(memory[: num_readers * ALIGNMENT], np.int64).reshape(num_readers, ALIGNMENT // 8)
    return states, memory[num_readers * ALIGNMENT :]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
