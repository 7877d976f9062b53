"""Send messages from one process to others of the same host, through a ring in shared memory.

The ring is an anonymous file (memfd_create(2)): it has no name, so nothing of it is left behind however its processes
end. Each reader has a pipe that carries one byte per message. So readers sleep in the kernel and never poll, a message
is in memory before its byte can be read, and the pipe's end of file reports that the other side has gone.
"""

import mmap
import os
import time
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np

CAPACITY = 16 << 20  # bytes of a ring
ALIGNMENT = 64  # bytes: messages can hold arrays that are read in place, and each reader's state has a cache line
LENGTH_BYTES = 8  # before each message
WRAP = -1  # in place of a length: the next message is at the ring's beginning
FULL_POLL_S = 1e-4  # seconds between looks at a full ring
READ_BYTES, NUM_RECEIVED = 0, 1  # indices into a reader's state

Payload = bytes | bytearray | memoryview | np.ndarray


def open_channel(num_readers: int, capacity: int = CAPACITY) -> "tuple[ChannelWriter, list[ChannelReader]]":
    """Open a channel and return both sides.

    A side may be an argument of a process that is being spawned; the caller must close its own copy then.
    capacity: bytes, a multiple of 64. The longest message has half the capacity.
    """
    memory = os.memfd_create("radixloop-channel")
    os.ftruncate(memory, num_readers * ALIGNMENT + capacity)
    pipes = [os.pipe() for _ in range(num_readers)]
    for _, write_end in pipes:
        os.set_blocking(write_end, False)
    readers = [ChannelReader(os.dup(memory), pipes[i][0], i, num_readers, capacity) for i in range(num_readers)]
    return ChannelWriter(memory, [write_end for _, write_end in pipes], capacity), readers


class ChannelWriter:
    """Send messages: the writing side of a channel."""

    def __init__(self, memory_fd: int, pipe_fds: list[int], capacity: int) -> None:
        self.num_sent = 0
        self._capacity = capacity
        # Both counts run from the start, as do the readers' own: the ring holds the difference.
        self._written_bytes = 0
        self._read_bytes = 0  # bytes that all readers have read, when last looked at
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
        """Send `parts` as one message. Waits while the ring is full because of a slow reader.

        Raises `TimeoutError` after waiting for `timeout_s`, `BrokenPipeError` if a reader has gone.
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
                except BlockingIOError:  # 65536 tiny messages are unread
                    self._wait(deadline, timeout_s)

    def num_unread(self, i: int) -> int:
        """Return the number of messages that reader i has not received yet."""
        return self.num_sent - int(self._states[i, NUM_RECEIVED])

    def close(self) -> None:
        """Close the channel: readers receive the messages still in the ring, then `EOFError`."""
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
    """Receive messages: a reading side of a channel."""

    def __init__(self, memory_fd: int, pipe_fd: int, index: int, num_readers: int, capacity: int) -> None:
        self._memory_fd, self._pipe_fd = memory_fd, pipe_fd
        self._layout = index, num_readers, capacity
        states, self._ring = _map(memory_fd, num_readers, capacity)
        self._state = states[index]
        self._capacity = capacity
        self._end = 0  # end of the last message, which may still be in use

    def __getstate__(self) -> tuple[Any, ...]:
        return DupFd(self._memory_fd), DupFd(self._pipe_fd), *self._layout

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        memory_fd, pipe_fd, *layout = state
        self.__init__(memory_fd.detach(), pipe_fd.detach(), *layout)  # type: ignore[misc]

    def fileno(self) -> int:
        """Return a file descriptor that is readable while there is a message, or when the channel has ended."""
        return self._pipe_fd

    def receive(self) -> memoryview:
        """Wait for the next message and return it, a view of the ring that is valid until the next call.

        Raises `EOFError` at the channel's end.
        """
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
        """Close this side's file descriptors."""
        os.close(self._pipe_fd)
        os.close(self._memory_fd)

    def _length_at(self, at: int) -> int:
        return int.from_bytes(self._ring[at : at + LENGTH_BYTES], "little", signed=True)


def _map(fd: int, num_readers: int, capacity: int) -> tuple[np.ndarray, memoryview]:
    """Map the file and return (the readers' states, int64 [num_readers, 8]; the ring)."""
    # Populated now: otherwise the first message to touch a page would wait for it, 10 µs per page.
    flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
    memory = memoryview(mmap.mmap(fd, num_readers * ALIGNMENT + capacity, flags=flags))
    states = np.frombuffer(memory[: num_readers * ALIGNMENT], np.int64).reshape(num_readers, ALIGNMENT // 8)
    return states, memory[num_readers * ALIGNMENT :]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
