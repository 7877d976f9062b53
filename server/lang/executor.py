"""One state of a program: its expressions, worked off in order on the backend's event loop.

Appending never waits and costs no thread: expressions queue, and a task on the loop takes them one after the other
while there are any. Whoever reads a variable waits for its future. So a state at rest is a few small objects, and
thousands of them run on one thread.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from .backends.base import JSON, BaseBackend
from .expressions import Expr, GenParams, leaves, names_of
from .interpreter import Futures, Interpreter, News
from .prefix import BatchPrefix
from .speculation import set_error
from .transcript import Transcript

logger = logging.getLogger(__name__)


class ProgramAborted(Exception):
    """The state was aborted, or nobody was left to read it."""


@dataclass(eq=False)
class SetVariable:
    name: str
    value: Any


@dataclass(eq=False)
class Fork:
    children: "list[Executor]"


@dataclass(eq=False)
class Join:
    children: "list[Executor]"
    is_text: bool  # append the children's texts; otherwise gather their variables


@dataclass(eq=False)
class Barrier:
    reached: "Future[None]"


@dataclass(eq=False)
class End:
    """The program's body has returned."""


Item = Expr | SetVariable | Fork | Join | Barrier | End


class Executor:
    """Any thread may call `submit`, `future_of`, `sync` and `abort`; the rest belongs to the loop."""

    def __init__(
        self,
        backend: BaseBackend,
        defaults: GenParams,
        *,
        is_stream: bool = False,
        num_api_spec_tokens: int | None = None,
        batch_prefix: BatchPrefix | None = None,
        is_child: bool = False,
    ) -> None:
        self.backend, self.defaults, self.is_stream = backend, defaults, is_stream
        self.error: BaseException | None = None
        self.finished: Future[None] = Future()  # everything the body appended is done, well or not
        self._news = News(is_stream)
        self.interpreter = Interpreter(
            backend,
            defaults,
            self._news,
            is_stream=is_stream,
            num_api_spec_tokens=num_api_spec_tokens,
            batch_prefix=batch_prefix,
        )
        self._batch_prefix = batch_prefix
        self._lock = threading.Lock()
        self._queue: deque[tuple[Item, Futures]] = deque()
        self._futures: Futures = {}  # the latest of each variable
        self._is_child = is_child
        self._is_active = is_child  # a task works, or will when the parent reaches the fork
        self._joined: list[Executor] = []  # children that nobody but this state reads
        self._task: asyncio.Task[None] | None = None

    @property
    def transcript(self) -> Transcript:
        return self.interpreter.transcript

    # ---- from any thread ----

    def submit(self, item: Item) -> None:
        """Append an item. Its variables have futures when this returns."""
        steps: list[tuple[Item, Futures]] = [(item, {})]
        if isinstance(item, Expr):
            steps = [(leaf, {name: Future() for name in names_of(leaf)}) for leaf in leaves(item)]
        elif isinstance(item, SetVariable):
            known: Future[Any] = Future()
            known.set_result(item.value)
            self._futures[item.name] = known
        for _, futures in steps:
            self._futures.update(futures)
        with self._lock:
            self._queue.extend(steps)
            if self._is_active:
                return
            self._is_active = True
        self.backend.loop.call(self._start)

    def future_of(self, name: str) -> "Future[Any] | None":
        """Return the future of the value last written to the variable; None if no expression of this state names it."""
        return self._futures.get(name)

    def sync(self) -> "Future[None]":
        """Return a future that is done once everything appended so far is."""
        barrier = Barrier(Future())
        self.submit(barrier)
        return barrier.reached

    @property
    def is_busy(self) -> bool:
        return self._is_active

    def join(self, children: "list[Executor]", is_text: bool) -> None:
        """Take in what `children` wrote, once they have. They end with this state."""
        self._joined += children
        self.submit(Join(children, is_text))

    def abort(self, error: BaseException | None = None) -> None:
        """End the state now, and its request at the server. Readers get `error` if it is an `Exception`."""
        with suppress(RuntimeError):  # the backend has been shut down, which ended everything
            self.backend.loop.call(self._abort, error)

    # ---- on the loop ----

    def _start(self) -> None:
        asyncio.create_task(self._work())  # noqa: RUF006 - it keeps itself, once it has begun

    def _abort(self, error: BaseException | None = None) -> None:
        if self.error is None and not self.finished.done():
            self.fail(error if isinstance(error, Exception) else ProgramAborted("the program was aborted"))
            if self._task is not None:
                self._task.cancel()
            for child in self._joined:
                child._abort()
            self._finish()

    def fail(self, error: BaseException) -> None:
        """Execute nothing more; raise `error` where a variable is read."""
        if self.error is None:
            self.error = error
            self.interpreter.recording.fail(error)
            if not isinstance(error, ProgramAborted):
                logger.warning("a program failed: %s: %s", type(error).__name__, error)
        self._news.notify()

    def _finish(self) -> None:
        if self._batch_prefix is not None:
            self._batch_prefix.leave(self.interpreter)
        if not self.finished.done():
            self.finished.set_result(None)
        self._news.notify()

    async def _work(self) -> None:
        """Take items until there are none."""
        # A task that is cancelled before it has begun never runs, and would leave who waits for its items waiting.
        self._task = asyncio.current_task()
        while (step := self._next()) is not None:
            item, futures = step
            try:
                await self._execute(item, futures)
            except asyncio.CancelledError:
                self.fail(ProgramAborted("the program was aborted"))
            except Exception as error:  # noqa: BLE001 - whatever a backend raises is raised where a variable is read
                self.fail(error)
            if self.error is not None:
                for future in futures.values():
                    set_error(future, self.error)
                if isinstance(item, Fork):
                    for child in item.children:
                        child.begin(self)
        self._news.notify()

    def _next(self) -> "tuple[Item, Futures] | None":
        """Take the next item off the queue, or note that none is left."""
        with self._lock:
            if self._queue:
                return self._queue.popleft()
            self._is_active = False
            return None

    async def _execute(self, item: Item, futures: Futures) -> None:
        match item:
            case Barrier(reached):
                if not reached.cancelled():
                    reached.set_result(None)
            case End():
                if self.interpreter.recording.parts:
                    self.fail(ValueError("the program ended inside the assistant's message"))
                self._finish()
            case _ if self.error is not None:
                return
            case SetVariable(name, value):
                self.transcript.variables[name] = value
            case Fork(children):
                await self.interpreter.before_fork(sum(child.error is None for child in children))
                for child in children:
                    child.begin(self)
            case Join(children, is_text):
                await self._join(children, is_text)
            case Expr():
                await self.interpreter.execute(item, futures)

    # ---- fork and join ----

    def begin(self, parent: "Executor") -> None:
        """Start with the transcript that `parent` has now."""
        self.interpreter.transcript = parent.transcript.branch()
        if parent.error is not None:
            self.fail(parent.error)
        self._start()

    async def _join(self, children: "list[Executor]", is_text: bool) -> None:
        await asyncio.gather(*[asyncio.wrap_future(child.sync()) for child in children])
        for child in children:
            if child.error is not None:
                raise child.error
        gathered: dict[str, list[Any]] = {}
        metas: dict[str, list[Any]] = {}
        for child in children:
            written = child.transcript
            if is_text:
                self.interpreter.add_text(written.text[written.fork_position :])
            for name in written.variables.keys() - written.fork_variables:
                gathered.setdefault(name, []).append(written.variables[name])
                metas.setdefault(name, []).append(written.meta_info.get(name))
        if is_text:
            self.transcript.num_committed = 0
        else:
            self.transcript.variables |= gathered
            self.transcript.meta_info |= metas

    # ---- streaming ----

    @property
    def _is_over(self) -> bool:
        """True if nothing more will be written. A child has no body of its own: it is over when idle."""
        return self.finished.done() or self.error is not None or (self._is_child and not self._is_active)

    async def pieces(self) -> AsyncIterator[str]:
        """Yield the text, piece by piece, to the end of the program. Raises the error that ended it early."""
        position = 0
        while True:
            changed, is_over = self._news.event, self._is_over
            text = self.transcript.text
            if len(text) > position:
                start, position = position, len(text)
                yield text[start:position]
            elif is_over:
                if self.error is not None:
                    raise self.error
                return
            else:
                await changed.wait()

    async def pieces_of(self, name: str) -> AsyncIterator[tuple[str, JSON]]:
        """Yield the text of a variable, piece by piece, each with the meta_info so far."""
        position = 0
        while True:
            changed, is_over = self._news.event, self._is_over
            stream, written = self.interpreter.streams.get(name), self.transcript
            if stream is None and name in written.variables:  # written at once
                yield str(written.variables[name]), written.meta_info.get(name) or {}
                return
            if stream is not None and len(stream.text) > position:
                start, position = position, len(stream.text)
                yield stream.text[start:position], stream.meta_info
            elif stream is not None and stream.is_done:
                return
            elif is_over:
                if self.error is not None:
                    raise self.error
                raise KeyError(name)
            else:
                await changed.wait()
