"""One state of a program: what was appended to it, worked off in order on the backend's event loop.

Appending never waits and costs no thread: expressions queue, and a task on the loop takes them one after the other
while there are any. Whoever reads a variable waits for its future. So a state at rest is a few small objects, and
thousands of them run on one thread.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

from server.lang.backends.base import JSON, BackendError, BaseBackend
from server.lang.expressions import (
    REASONING_SUFFIX,
    Expr,
    Gen,
    GenParams,
    Image,
    RoleBegin,
    RoleEnd,
    Select,
    SeparateReasoning,
    Text,
    VarScopeBegin,
    VarScopeEnd,
    Video,
    leaves,
    names_of,
)
from server.lang.media import Media, content_of, load_image, load_video
from server.lang.prefix import BatchPrefix
from server.lang.reasoning import split_reasoning
from server.lang.speculation import MAX_TRIES, match_pattern, take

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
        self.backend, self.defaults = backend, defaults
        self.is_stream, self.num_api_spec_tokens = is_stream, num_api_spec_tokens
        self.error: BaseException | None = None
        self.finished: Future[None] = Future()  # everything the body appended is done, well or not

        self.text = ""
        self.messages: list[JSON] = []
        self.roles: tuple[str, ...] = ()  # of messages
        self.role: str | None = None  # that is open
        self.loose_text = ""  # of no message, where a backend is sent messages
        self.images: list[Media] = []
        self.variables: dict[str, Any] = {}
        self.meta_info: dict[str, Any] = {}
        self.streams: dict[str, _Stream] = {}  # of variables that are, or were, being written
        self.fork_position = 0  # where the text parted from the parent's
        self.fork_variables: frozenset[str] = frozenset()  # that the parent had

        self._role_start = 0
        self._role_images: list[Media] = []
        self._scopes: dict[str, int] = {}
        self._committed = 0  # characters that were sent to the server, or came from it: its cache has them
        self._speculated = ""  # written by the API, not yet asked for
        # What an assistant's message is made of, until its end: (part, its stops, its variable's future).
        self._recorded: list[tuple[Text | Gen, Sequence[str], Future[Any] | None]] = []
        self._batch_prefix = batch_prefix
        self._lock = threading.Lock()
        self._queue: deque[tuple[Item, dict[str, Future[Any]]]] = deque()
        self._futures: dict[str, Future[Any]] = {}  # the latest of each variable
        self._is_child = is_child
        self._is_active = is_child  # a task works, or will when the parent reaches the fork
        self._joined: list[Executor] = []  # children that nobody but this state reads
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    # ---- from any thread ----

    def submit(self, item: Item) -> None:
        steps: list[tuple[Item, dict[str, Future[Any]]]] = [(item, {})]
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
        """Holds, or will hold, the value last written to the variable; None if no expression of this state names it."""
        return self._futures.get(name)

    def sync(self) -> "Future[None]":
        """Done once everything appended so far is."""
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
        """Nothing more is executed; whoever reads a variable gets `error`."""
        if self.error is None:
            self.error = error
            for _, _, future in self._recorded:
                if future is not None:
                    _set_error(future, error)
            if not isinstance(error, ProgramAborted):
                logger.warning("a program failed: %s: %s", type(error).__name__, error)
        self._notify()

    def _finish(self) -> None:
        if self._batch_prefix is not None:
            self._batch_prefix.leave(self)
        if not self.finished.done():
            self.finished.set_result(None)
        self._notify()

    async def _work(self) -> None:
        """Take items until there are none."""
        # A task that is cancelled before it has begun never runs, and would leave who waits for its items waiting.
        self._task = asyncio.current_task()
        while True:
            with self._lock:
                if not self._queue:
                    self._is_active = False
                    break
                item, futures = self._queue.popleft()
            try:
                if isinstance(item, Barrier):
                    if not item.reached.cancelled():
                        item.reached.set_result(None)
                elif isinstance(item, End):
                    if self._recorded:
                        self.fail(ValueError("the program ended inside the assistant's message"))
                    self._finish()
                elif self.error is None:
                    await self._execute(item, futures)
            except asyncio.CancelledError:
                self.fail(ProgramAborted("the program was aborted"))
            except Exception as error:  # noqa: BLE001 - whatever a backend raises is raised where a variable is read
                self.fail(error)
            if self.error is not None:
                for future in futures.values():
                    _set_error(future, self.error)
                if isinstance(item, Fork):
                    for child in item.children:
                        child.begin(self)
        self._notify()

    async def _execute(self, item: Item, futures: dict[str, "Future[Any]"]) -> None:
        match item:
            case Text(text):
                self._add(text)
            case Gen():
                await self._generate(item, futures)
            case Select(name, choices, temperature, method):
                await self._before_request()
                decision = await self.backend.select(self, choices, temperature, method)
                self._append(decision.decision)
                self._resolve(name, decision.decision, decision.meta_info, futures)
            case RoleBegin(role):
                await self._begin_role(role)
            case RoleEnd(role):
                await self._end_role(role)
            case Image(source):
                self._add_media(await asyncio.to_thread(load_image, source))
            case Video(path, num_frames):
                self._add_media(await asyncio.to_thread(load_video, path, num_frames))
            case VarScopeBegin(name):
                self._scopes[name] = len(self.text)
            case VarScopeEnd(name):
                self._resolve(name, self.text[self._scopes.pop(name) :], {}, futures)
            case SeparateReasoning(expr, model_type):
                await self._separate_reasoning(expr, model_type, futures)
            case SetVariable(name, value):
                self.variables[name] = value
            case Fork(children):
                await self._fork(children)
            case Join(children, is_text):
                await self._join(children, is_text)
            case _:
                raise TypeError(f"{type(item).__name__} cannot be executed")

    def _add(self, text: str) -> None:
        """Append what the program wrote, not its chat template."""
        if self.role is None and self.backend.is_chat:
            self.loose_text += text.strip()
        self._append(text)

    def _append(self, text: str) -> None:
        if self._speculates_chat:
            self._recorded.append((Text(text), (), None))
            return
        if self._speculated.startswith(text):
            self._speculated = self._speculated[len(text) :]
        else:
            self._speculated = ""
        self._write(text)

    def _write(self, text: str) -> None:
        self.text += text
        self._notify()

    def _resolve(self, name: str | None, value: Any, meta_info: Any, futures: dict[str, "Future[Any]"]) -> None:
        if name is None:
            return
        self.variables[name], self.meta_info[name] = value, meta_info
        if (future := futures.get(name)) is not None and not future.done():
            future.set_result(value)
        self._notify()

    # ---- gen ----

    def _params(self, overrides: JSON) -> GenParams:
        params = self.defaults.override(overrides)
        stops = self.backend.chat_template.stop_str
        if self.role is None or self.backend.is_chat or not stops:
            return params
        return params.override({"stop": (*params.stop, *stops)})

    async def _before_request(self) -> None:
        if self._batch_prefix is not None:
            await self._batch_prefix.arrive(self, "" if self.images else self.text)
        self._committed = len(self.text)

    async def _generate(self, expr: Gen, futures: dict[str, "Future[Any]"]) -> None:
        params = self._params(expr.overrides)
        if self._speculates_chat:
            future = futures.get(expr.name) if expr.name is not None else None
            self._recorded.append((expr, params.all_stops, future))
            return
        await self._before_request()
        if self.is_stream and params.n == 1:
            return await self._generate_stream(expr.name, params, futures)
        if self.num_api_spec_tokens is not None and params.n == 1:
            values, metas = await self._generate_ahead(params, self.num_api_spec_tokens)
        else:
            values, metas = await self.backend.generate(self, params)
        self._write(values[0])
        self._committed = len(self.text)  # all but its last token
        is_one = params.n == 1
        self._resolve(expr.name, values[0] if is_one else values, metas[0] if is_one else metas, futures)

    async def _generate_stream(self, name: str | None, params: GenParams, futures: dict[str, "Future[Any]"]) -> None:
        stream = _Stream()
        if name is not None:
            self.streams[name] = stream
        async with aclosing(self.backend.generate_stream(self, params)) as pieces:  # type: ignore[type-var]
            async for piece, stream.meta_info in pieces:
                stream.text += piece
                self._write(piece)
        stream.is_done = True
        self._resolve(name, stream.text, stream.meta_info, futures)

    async def _generate_ahead(self, params: GenParams, num_tokens: int) -> tuple[list[str], list[JSON]]:
        """From what was speculated, or by a call that asks for at least `num_tokens` and does not stop."""
        meta: JSON = {}
        taken = take(self._speculated, params.all_stops)
        if taken is None:
            further = params.override({"stop": (), "max_new_tokens": max(num_tokens, params.max_new_tokens)})
            values, [meta] = await self.backend.generate(self, further)
            taken = take(values[0], params.all_stops)
            if taken is None:
                self._speculated = ""
                return values, [meta]
        self._speculated = taken.rest
        return [taken.value], [meta]

    @property
    def _speculates_chat(self) -> bool:
        return self.num_api_spec_tokens is not None and self.backend.is_chat and self.role == "assistant"

    async def _generate_recorded(self) -> None:
        """One call for all that the assistant's message is made of."""
        recorded, self._recorded = self._recorded, []
        pattern = [(part, stops) for part, stops, _ in recorded]
        gens = [(part, future) for part, _, future in recorded if isinstance(part, Gen)]
        if not gens:
            return self._write("".join(part.text for part, _ in pattern if isinstance(part, Text)))
        params = self._params({"max_new_tokens": self.num_api_spec_tokens})
        try:
            for _ in range(MAX_TRIES):
                [text], [meta] = await self.backend.generate(self, params)
                if (values := match_pattern(text, pattern)) is not None:
                    break
            else:
                raise BackendError(f"{MAX_TRIES} answers did not follow the program; the last was {text!r}")
        except Exception as error:
            for _, future in gens:
                if future is not None:
                    _set_error(future, error)
            raise
        found = iter(values)
        for part, _, future in recorded:
            if isinstance(part, Text):
                self._write(part.text)
                continue
            value = next(found)
            self._write(value)
            names = {part.name: future} if part.name is not None and future is not None else {}
            self._resolve(part.name, value, meta, names)

    # ---- roles ----

    @property
    def role_text(self) -> str:
        return self.text[self._role_start :]

    async def _begin_role(self, role: str) -> None:
        if self.role is not None:
            raise ValueError(f"a {role} message cannot begin inside the {self.role} message")
        self._append(await self.backend.chat_template.begin(self.roles, role))
        self.role, self._role_start, self._role_images = role, len(self.text), []

    async def _end_role(self, role: str) -> None:
        if self.role != role:
            raise ValueError(f"a {role} message ends, but {self.role or 'none'} has begun")
        if self._recorded:
            await self._generate_recorded()
        content = content_of(self.role_text.lstrip(), self._role_images)
        self.messages.append({"role": role, "content": content})
        self.role, self.roles = None, (*self.roles, role)
        self._append(await self.backend.chat_template.end(self.roles))

    def _add_media(self, media: Media) -> None:
        self.images.append(media)
        self._role_images.append(media)
        if self.backend.is_chat:
            if self.role is None:
                self.loose_text += f"<{media.kind}>"
        else:
            self._append(self.backend.chat_template.image_token)
            if self.role is not None and self.role_text == self.backend.chat_template.image_token:
                self._role_start = len(self.text)  # a message holds its images beside the text

    async def _separate_reasoning(self, expr: Expr, model_type: str | None, futures: dict[str, "Future[Any]"]) -> None:
        inner: dict[str, Future[Any]] = {}  # their values are not known before they are separated
        start = len(self.text)
        for part in leaves(expr):
            await self._execute(part, futures if self.is_stream else inner)
        for name in [name for part in leaves(expr) for name in names_of(part)]:
            reasoning = None
            if not self.is_stream:
                reasoning, content = split_reasoning(self.variables[name], model_type)
                self.text = self.text[:start] + self.text[start:].replace(self.variables[name], content, 1)
                self._committed = start
                self._resolve(name, content, self.meta_info[name], futures)
            self._resolve(name + REASONING_SUFFIX, reasoning, {}, futures)

    # ---- fork and join ----

    async def _fork(self, children: "list[Executor]") -> None:
        num_alive = sum(child.error is None for child in children)
        is_new = len(self.text) > self._committed
        if num_alive > 1 and is_new and self.backend.caches_prefixes:
            await self._before_request()
            await self.backend.commit(self.text, self.images)
        elif self._batch_prefix is not None:  # the children's prompts start with this one
            await self._batch_prefix.arrive(self, self.text)
        for child in children:
            child.begin(self)

    def begin(self, parent: "Executor") -> None:
        """Start as `parent` is now."""
        self.text, self.messages, self.roles, self.role = parent.text, [*parent.messages], parent.roles, parent.role
        self.loose_text = parent.loose_text
        self.images, self.variables, self.meta_info = [*parent.images], {**parent.variables}, {**parent.meta_info}
        self._role_start, self._role_images = parent._role_start, [*parent._role_images]
        self._scopes, self._committed = {**parent._scopes}, parent._committed
        self.fork_position, self.fork_variables = len(parent.text), frozenset(parent.variables)
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
            if is_text:
                self._add(child.text[child.fork_position :])
            for name in child.variables.keys() - child.fork_variables:
                gathered.setdefault(name, []).append(child.variables[name])
                metas.setdefault(name, []).append(child.meta_info.get(name))
        if is_text:
            self._committed = 0
        else:
            self.variables |= gathered
            self.meta_info |= metas

    # ---- streaming ----

    def _notify(self) -> None:
        if self.is_stream:  # nobody else waits for pieces
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()

    @property
    def _is_over(self) -> bool:
        """Will nothing more be written? A child has no body of its own: it is over when idle."""
        return self.finished.done() or self.error is not None or (self._is_child and not self._is_active)

    async def pieces(self) -> AsyncIterator[str]:
        """The text, piece by piece, to the end of the program. Raises what ended it early."""
        position = 0
        while True:
            changed, is_over = self._changed, self._is_over
            if len(self.text) > position:
                start, position = position, len(self.text)
                yield self.text[start:position]
            elif is_over:
                if self.error is not None:
                    raise self.error
                return
            else:
                await changed.wait()

    async def pieces_of(self, name: str) -> AsyncIterator[tuple[str, JSON]]:
        """The text of a variable, piece by piece, each with the meta_info so far."""
        position = 0
        while True:
            changed, is_over = self._changed, self._is_over
            stream = self.streams.get(name)
            if stream is None and name in self.variables:  # written at once
                yield str(self.variables[name]), self.meta_info.get(name) or {}
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


@dataclass(slots=True)
class _Stream:
    text: str = ""
    meta_info: Any = None
    is_done: bool = False


def _set_error(future: "Future[Any]", error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
