"""Processes that this one starts, and that end when it does, however it ends.

They are spawned, not forked: a fork would take a copy of CUDA's state and of threads' locks. A child notices its
parent's end twice over: by a signal from the kernel, and by the end of a pipe that a thread of it waits at.
"""

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
from typing import Any

from engine.errors import EngineError, ModelError

logger = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1  # linux/prctl.h
LOOK_S = 1.0
OWN_FAILURE_GRACE_S = 1.0  # a child that has died makes this process fail too: its message says more
LAST_WORDS_S = 0.2  # a child's message may come right after its end of the pipe
GC_THRESHOLD = 50_000  # objects more than before; what serves a request leaves no cycles to be found


def settle_garbage_collector() -> None:
    """When all is loaded: what exists now stays, and what comes is seldom looked through.

    A walk over 200,000 objects would hold up the streams for a tenth of a second.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, *gc.get_threshold()[1:])


@dataclass(slots=True)
class Parent:
    """A child's way to its parent; the first argument of what the child runs."""

    pid: int
    name: str  # the child's
    log_level: int
    pipe: Connection

    def tell(self, event: str, detail: Any = None) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.pipe.send((event, detail))


@dataclass(slots=True)
class Child:
    name: str
    process: SpawnProcess
    pipe: Connection

    def __str__(self) -> str:
        return f"{self.name} (pid {self.process.pid})"


class Children:
    """Children that are all needed: the first that ends, or says that it cannot go on, is a failure of all."""

    def __init__(self, on_failure: Callable[[str], object]) -> None:
        """on_failure: called once at most, from a thread, with what happened to whom."""
        self._on_failure = on_failure
        self._children: list[Child] = []
        self._news = threading.Condition()
        self._ready: dict[str, Any] = {}
        self.failure: str | None = None
        self._own_failure: tuple[float, str] | None = None
        self._is_closing = False
        self._watcher = threading.Thread(target=self._watch, name="children", daemon=True)
        self.checks: list[Callable[[], str | None]] = []  # called every second; each may find a failure

    def spawn(self, name: str, target: Callable[..., None], *args: Any, is_daemon: bool = True) -> None:
        """Run target(Parent, *args) in a new process. Only before `watch`.

        The kernel's signal comes when the *thread* that called this ends: it must be one that stays.
        """
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        parent = Parent(os.getpid(), name, logging.getLogger().getEffectiveLevel(), theirs)
        process = context.Process(target=_run_child, args=(parent, target, args), name=name, daemon=is_daemon)
        process.start()
        theirs.close()
        self._children.append(Child(name, process, ours))

    def watch(self) -> None:
        self._watcher.start()

    def wait_ready(self) -> list[Any]:
        """What each child told with its "ready", in order. `ModelError` with what happened if one cannot."""
        with self._news:
            self._news.wait_for(lambda: self.failure is not None or len(self._ready) == len(self._children))
        if self.failure is not None:
            raise ModelError(self.failure)
        return [self._ready[child.name] for child in self._children]

    def fail(self, message: str) -> None:
        """This process cannot go on, for a reason that may be a child's end: that one is told if there is one."""
        self._own_failure = self._own_failure or (time.monotonic(), message)

    def abandon(self, error: BaseException) -> BaseException:
        """Kill all. Returns `error`, or what happened to a child if that may be why."""
        if not isinstance(error, EngineError):
            with self._news:
                self._news.wait_for(lambda: self.failure is not None, OWN_FAILURE_GRACE_S)
        self.kill()
        return error if self.failure is None else ModelError(self.failure)

    def describe(self, i: int) -> str:
        """The i-th child's name and process."""
        return str(self._children[i])

    def stop_watching(self) -> None:
        """Children may end from now on."""
        self._is_closing = True

    def close(self, timeout_s: float = 5.0) -> None:
        """Wait for children that were told to end, and kill those that do not within `timeout_s`."""
        self._is_closing = True
        deadline = time.monotonic() + timeout_s
        for child in self._children:
            child.process.join(max(deadline - time.monotonic(), 0.0))
        self.kill()

    def kill(self) -> None:
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
            child.process.kill()  # of no use without the one that failed
        self._on_failure(message)


def _run_child(parent: Parent, target: Callable[..., None], args: tuple[Any, ...]) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent.pid:  # it was gone before the kernel was asked to tell
        os._exit(1)
    threading.Thread(target=_end_with, args=(parent.pipe,), name="parent", daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent says when to end
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
    os._exit(1)  # at once: the others wait for what will not come


def _end_with(pipe: Connection) -> None:
    """Nothing is ever sent this way: what can be read is the pipe's end."""
    with contextlib.suppress(EOFError, OSError):
        pipe.recv()
    os._exit(1)
