"""Start child processes that end when their parent does, however it ends.

Children are spawned, not forked: a fork would copy CUDA's state and threads' locks. A child notices its parent's end
in two ways: by a signal from the kernel, and by the end of a pipe at which one of its threads waits.
"""

import atexit
import contextlib
import ctypes
import gc
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from engine.errors import EngineError, ModelError
from engine.ranks.meeting import LINE_S, Waiting

logger = logging.getLogger(__name__)

PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15  # linux/prctl.h
LOOK_S = 1.0  # most seconds between two runs of `Children.checks`
OWN_FAILURE_GRACE_S = 1.0  # seconds: a child's death makes this process fail too, and its message says more
LAST_WORDS_S = 0.2  # seconds: a child's message may come right after its end of the pipe
GC_THRESHOLD = 50_000  # new objects before a collection; serving a request leaves no cycles to find


def settle_garbage_collector() -> None:
    """Exempt all existing objects from garbage collection and make collections rare; to be called once all is loaded.

    A walk over 200,000 objects would hold up the streams for a tenth of a second.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # or what is frozen outlives Triton's bindings, which print hundreds of lines about it
    gc.set_threshold(GC_THRESHOLD, *gc.get_threshold()[1:])


@dataclass(slots=True)
class Parent:
    """Report from a child to its parent; the first argument of the function that the child runs."""

    pid: int
    name: str  # name of the child
    log_level: int
    pipe: Connection

    def tell(self, event: str, detail: Any = None) -> None:
        """Send the parent an event, "ready" or "failed"; ignored if the parent is gone."""
        with contextlib.suppress(BrokenPipeError):
            self.pipe.send((event, detail))


@dataclass(slots=True)
class Child:
    """Hold a child process and its pipe."""

    name: str
    process: SpawnProcess
    pipe: Connection

    def __str__(self) -> str:
        return f"{self.name} (pid {self.process.pid})"


class Children:
    """Start and watch children that are all needed.

    The first that ends, or reports that it cannot go on, is a failure of all.
    """

    def __init__(self, on_failure: Callable[[str], object]) -> None:
        """Hold no children yet.

        on_failure: called at most once, from a thread, with a message that says what happened to which child.
        """
        self._on_failure = on_failure
        self._children: list[Child] = []
        self._news = threading.Condition()
        self._ready: dict[str, Any] = {}
        self.failure: str | None = None
        self._own_failure: tuple[float, str] | None = None
        self._is_closing = False
        self._watcher = threading.Thread(target=self._watch, name="children", daemon=True)
        self.checks: list[Callable[[], str | None]] = []  # called every `LOOK_S`; each may return a failure's message

    def spawn(self, name: str, target: Callable[..., None], *args: Any, is_daemon: bool = True) -> None:
        """Run target(Parent, *args) in a new process. To be called only before `watch`.

        The kernel signals the child when the calling *thread* ends: it must be one that stays.
        """
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        parent = Parent(os.getpid(), name, logging.getLogger().getEffectiveLevel(), theirs)
        process = context.Process(target=_run_child, args=(parent, target, args), name=name, daemon=is_daemon)
        process.start()
        theirs.close()
        self._children.append(Child(name, process, ours))

    def watch(self) -> None:
        """Start the thread that watches the children."""
        self._watcher.start()

    def wait_ready(self) -> list[Any]:
        """Wait until all children are ready and return the details they reported, in order of spawning.

        Raises `ModelError` with the failure if one cannot get ready.
        """
        waiting = Waiting()
        with self._news:
            while not self._news.wait_for(lambda: self.failure is not None or not self.unready(), LINE_S):
                waiting.go_on(f"{' and '.join(map(str, self.unready()))} to get ready")
        if self.failure is not None:
            raise ModelError(self.failure)
        return [self._ready[child.name] for child in self._children]

    def unready(self) -> list[Child]:
        """Return the children that have not reported that they are ready."""
        return [child for child in self._children if child.name not in self._ready]

    def fail(self, message: str) -> None:
        """Report that this process cannot go on.

        A child's end may be the cause: if one is found within `OWN_FAILURE_GRACE_S`, it is reported instead.
        """
        self._own_failure = self._own_failure or (time.monotonic(), message)

    def abandon(self, error: BaseException) -> BaseException:
        """Kill all children. Returns `error`, or a child's failure that may be its cause."""
        if not isinstance(error, EngineError):
            with self._news:
                self._news.wait_for(lambda: self.failure is not None, OWN_FAILURE_GRACE_S)
        self.kill()
        return error if self.failure is None else ModelError(self.failure)

    def describe(self, i: int) -> str:
        """Return the name and process id of the i-th child."""
        return str(self._children[i])

    def stop_watching(self) -> None:
        """Stop treating a child's end as a failure."""
        self._is_closing = True

    def close(self, timeout_s: float = 5.0) -> None:
        """Wait for children that were asked to end, and kill those that do not within `timeout_s`."""
        self._is_closing = True
        deadline = time.monotonic() + timeout_s
        for child in self._children:
            child.process.join(max(deadline - time.monotonic(), 0.0))
        self.kill()

    def kill(self) -> None:
        """Kill all children and wait for their end."""
        self._is_closing = True
        for child in self._children:
            child.process.kill()
        for child in self._children:
            child.process.join()
            child.pipe.close()
        self._children = []

    def _watch(self) -> None:
        children = {child.process.sentinel: child for child in self._children}
        pipes = {child.pipe: child for child in self._children}
        while not self._is_closing:
            for source in wait([*children, *pipes], LOOK_S):
                if self._is_closing:
                    return
                if isinstance(source, Connection):
                    try:
                        event, detail = source.recv()
                    except (EOFError, OSError):
                        del pipes[source]
                        continue
                    child = pipes[source]
                    if event == "ready":
                        with self._news:
                            self._ready[child.name] = detail
                            self._news.notify_all()
                    else:
                        return self._report(f"{child} failed: {detail}")
                else:
                    assert isinstance(source, int)
                    return self._report(self._obituary(children[source]))
            for check in self.checks:
                if found := check():
                    return self._report(found)
            if self._own_failure and time.monotonic() - self._own_failure[0] > OWN_FAILURE_GRACE_S:
                return self._report(self._own_failure[1])

    def _obituary(self, child: Child) -> str:
        """Return how a child ended: the failure it reported, else its signal or exit status."""
        with contextlib.suppress(EOFError, OSError):
            while child.pipe.poll(LAST_WORDS_S):
                event, detail = child.pipe.recv()
                if event == "failed":
                    return f"{child} failed: {detail}"
        child.process.join()
        status = child.process.exitcode or 0
        if status < 0:
            return f"{child} was ended by {signal.Signals(-status).name}"
        return f"{child} has ended with status {status}"

    def _report(self, message: str) -> None:
        with self._news:
            if self._is_closing:
                return
            self.failure = message
            self._news.notify_all()
        for child in self._children:
            child.process.kill()  # useless without the one that failed
        self._on_failure(message)


class StoppedChildren:
    """Find children that a signal has stopped (SIGSTOP, say) while they load: the kernel knows.

    Once they are ready, whether they do what they are asked shows it.
    """

    def __init__(self, children: Children, limit_s: float) -> None:
        self._children, self._limit_s = children, limit_s
        self._since: dict[str, float] = {}  # by name

    def find(self) -> str | None:
        """Return the description of a child that has been stopped for `limit_s`: a check of `Children`."""
        now = time.monotonic()
        stopped = [child for child in self._children.unready() if _is_stopped(child.process.pid)]
        self._since = {child.name: self._since.get(child.name, now) for child in stopped}
        for child in stopped:
            if now - self._since[child.name] >= self._limit_s - LOOK_S:  # the next look would be too late
                return f"{child} was stopped by a signal while loading, {self._limit_s:g} s ago (--dist-timeout)"
        return None


def _is_stopped(pid: int | None) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:  # it has ended: seen elsewhere
        return False


def _run_child(parent: Parent, target: Callable[..., None], args: tuple[Any, ...]) -> None:
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    libc.prctl(PR_SET_NAME, parent.name.encode())  # in ps, top and the dashboard
    if os.getppid() != parent.pid:  # the parent ended before the signal was requested
        os._exit(1)
    threading.Thread(target=_end_with, args=(parent.pipe,), name="parent", daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides when to end
    logging.basicConfig(
        level=max(parent.log_level, logging.WARNING),
        format=f"[%(asctime)s] %(levelname)s {parent.name} %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )
    try:
        target(parent, *args)
    except EngineError as error:
        parent.tell("failed", str(error))
    except Exception as error:
        logger.critical("%s failed", parent.name, exc_info=error)
        parent.tell("failed", f"{type(error).__name__}: {error}")
    else:
        return
    sys.stderr.flush()
    os._exit(1)  # at once: other ranks may wait for this one


def _end_with(pipe: Connection) -> None:
    """Exit when the parent does: nothing is ever sent to a child, so reading returns only at the pipe's end."""
    with contextlib.suppress(EOFError, OSError):
        pipe.recv()
    os._exit(1)
