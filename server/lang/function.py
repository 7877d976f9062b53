"""A program, and the ways to run it."""

import asyncio
import inspect
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import fields
from typing import Any, overload

from rich.progress import Progress

from .backends.base import JSON, BaseBackend
from .executor import Executor
from .expressions import GenParams, Variable
from .prefix import BatchPrefix
from .state import ProgramState
from .trace import TracerState, TraceStopped, prefix_of, trace_program

MAX_AHEAD = 200  # programs that a generator-style batch runs before its reader asks for them
RUN_PARAMS = frozenset(item.name for item in fields(GenParams)) - {"dtype", "regex", "json_schema", "n"}


class DefaultBackend:
    """The backend of calls that name none."""

    def __init__(self) -> None:
        self._backend: BaseBackend | None = None

    def set(self, backend: Any) -> None:
        """Set the default: a backend, or a `Runtime` or `Engine`, which have one."""
        self._backend = None if backend is None else endpoint_of(backend)

    def resolve(self, given: Any) -> BaseBackend:
        if given is not None:
            return endpoint_of(given)
        if self._backend is None:
            raise ValueError("no backend: call set_default_backend, or give backend=")
        return self._backend


def endpoint_of(backend: Any) -> BaseBackend:
    endpoint = getattr(backend, "endpoint", backend)
    if not isinstance(endpoint, BaseBackend):
        raise TypeError(f"a backend is a RuntimeEndpoint(url), an Engine or the like, not {backend!r}")
    return endpoint


DEFAULT_BACKEND = DefaultBackend()


class SglFunction:
    """A program, made by `@function` of its body, whose first parameter is the state `s`.

    The body is plain or `async def`. A plain body runs in the caller's thread, or in a pool's for a batch, and only
    while it writes or waits for a variable; what it appended goes on without it. An asynchronous body reads with
    `await s.get(name)` and needs no thread at all.
    """

    def __init__(
        self,
        func: Callable[..., Any],
        num_api_spec_tokens: int | None = None,
        bound: dict[str, Any] | None = None,
    ) -> None:
        self.func, self.num_api_spec_tokens = func, num_api_spec_tokens
        self.bind_arguments = bound or {}
        self.__name__, self.__doc__ = getattr(func, "__name__", "program"), func.__doc__
        parameters = inspect.signature(func).parameters
        self.arg_names = list(parameters)[1:]
        if list(parameters)[:1] != ["s"]:
            raise TypeError(f"the first parameter of {self.__name__} must be named s")
        self.required_names = [name for name in self.arg_names if parameters[name].default is inspect.Parameter.empty]
        self.is_async = inspect.iscoroutinefunction(func)

    def bind(self, **arguments: Any) -> "SglFunction":
        """Return the program with some arguments given."""
        unknown = arguments.keys() - set(self.arg_names)
        if unknown:
            raise TypeError(f"{self.__name__} has no argument {', '.join(sorted(unknown))}")
        return SglFunction(self.func, self.num_api_spec_tokens, {**self.bind_arguments, **arguments})

    def __call__(self, *args: Any, **kwargs: Any) -> ProgramState:
        return self.run(*args, **kwargs)

    # ---- one ----

    def run(self, *args: Any, stream: bool = False, backend: Any = None, **kwargs: Any) -> ProgramState:
        """Run the program to its end; with `stream`, return at once: read it with `text_iter`.

        `kwargs`: the program's arguments, and SGLang's sampling defaults of its gens (`temperature=1.0`,
        `max_new_tokens=128`, ...). What the body raises is raised here; what a backend raises, where a variable is
        read.
        """
        params, arguments = self._split(kwargs)
        chosen = DEFAULT_BACKEND.resolve(backend)
        state = self._state(chosen, params, is_stream=stream)
        if stream:
            threading.Thread(target=self._run_in_thread, args=(state, args, arguments), daemon=True).start()
            return state
        if self.is_async:
            chosen.loop.run(self._run_async(state, args, arguments))
        else:
            self._run_body(state, args, arguments)
        chosen.loop.wait(state.end())
        return state

    async def arun(self, *args: Any, stream: bool = False, backend: Any = None, **kwargs: Any) -> ProgramState:
        """Run for asynchronous callers, any number at once. A plain body runs on a thread of the loop's pool."""
        params, arguments = self._split(kwargs)
        state = self._state(DEFAULT_BACKEND.resolve(backend), params, is_stream=stream)
        if stream:
            threading.Thread(target=self._run_in_thread, args=(state, args, arguments), daemon=True).start()
            return state
        if self.is_async:
            await self._run_async(state, args, arguments)
        else:
            await asyncio.to_thread(self._run_body, state, args, arguments)
        await asyncio.wrap_future(state.end())
        return state

    def _state(
        self,
        backend: BaseBackend,
        params: GenParams,
        *,
        is_stream: bool = False,
        batch_prefix: BatchPrefix | None = None,
    ) -> ProgramState:
        if is_stream and self.num_api_spec_tokens is not None:
            raise ValueError("a program with num_api_spec_tokens cannot stream")
        return ProgramState(
            Executor(
                backend,
                params,
                is_stream=is_stream,
                num_api_spec_tokens=self.num_api_spec_tokens,
                batch_prefix=batch_prefix,
            )
        )

    def _run_body(self, state: ProgramState, args: Sequence[Any], arguments: JSON) -> None:
        try:
            state.ret_value = self.func(state, *args, **{**self.bind_arguments, **arguments})
        except BaseException as error:
            state._executor.abort(error)
            raise

    async def _run_async(self, state: ProgramState, args: Sequence[Any], arguments: JSON) -> None:
        try:
            state.ret_value = await self.func(state, *args, **{**self.bind_arguments, **arguments})
        except BaseException as error:
            state._executor.abort(error)
            raise

    def _run_in_thread(self, state: ProgramState, args: Sequence[Any], arguments: JSON) -> None:
        with suppress(Exception):  # nobody waits here: it is raised where the state is read
            if self.is_async:
                asyncio.run(self._run_async(state, args, arguments))
            else:
                self._run_body(state, args, arguments)
        state.end()

    def _split(self, kwargs: JSON) -> tuple[GenParams, JSON]:
        """Split into sampling defaults and the program's arguments. A name that the program has is its own."""
        given = {name: value for name, value in kwargs.items() if name in RUN_PARAMS and name not in self.arg_names}
        arguments = {name: value for name, value in kwargs.items() if name not in given and name != "use_thread"}
        return GenParams().override(given), arguments

    # ---- many ----

    def run_batch(
        self,
        batch_kwargs: Sequence[JSON | Sequence[Any]],
        *,
        backend: Any = None,
        num_threads: int | str = "auto",
        progress_bar: bool = False,
        generator_style: bool = False,
        **sampling: Any,
    ) -> Any:
        """Run for each of `batch_kwargs` (arguments by name, or a tuple by position); return states in that order.

        `num_threads` bounds the bodies that run at once; a number also bounds the programs, so that an API's rate is
        kept. "auto": max(96, 16 for each core) bodies and any number of programs. `generator_style`: an iterator.
        """
        if num_threads != "auto" and not (isinstance(num_threads, int) and num_threads > 0):
            raise ValueError(f'num_threads must be "auto" or a number above 0, got {num_threads!r}')
        batch = [self._arguments(i, item) for i, item in enumerate(batch_kwargs)]
        params, unknown = self._split(sampling)
        if unknown:
            raise TypeError(f"run_batch has no argument {', '.join(sorted(unknown))}")
        chosen = DEFAULT_BACKEND.resolve(backend)
        run = _BatchRun(self, batch, params, chosen, num_threads)
        states = run.states(progress_bar, MAX_AHEAD if generator_style else len(batch) + 1)
        return states if generator_style else list(states)

    def _arguments(self, i: int, item: JSON | Sequence[Any]) -> JSON:
        if isinstance(item, dict):
            return item
        if not isinstance(item, (list, tuple)):
            raise TypeError(f"item {i} of a batch must be a dict or a tuple of arguments, not {type(item).__name__}")
        names = [name for name in self.arg_names if name not in self.bind_arguments]
        num_required = len(set(self.required_names) - self.bind_arguments.keys())
        if not num_required <= len(item) <= len(names):
            takes = len(names) if num_required == len(names) else f"{num_required} to {len(names)}"
            raise TypeError(
                f"Given arguments mismatch: item {i} has {len(item)}, {self.__name__} takes {takes}: {names}"
            )
        return dict(zip(names, item, strict=False))

    # ---- what it is ----

    def trace(self, *, backend: Any = None, **kwargs: Any) -> TracerState:
        """Trace what the body appends, with placeholders for arguments not given.

        `TraceStopped` if the body looks into one.
        """
        del backend  # SGLang's
        state = TracerState()
        self._trace(state, {**self.bind_arguments, **kwargs})
        return state

    def _trace(self, state: TracerState, known: JSON) -> None:
        trace_program(self.func, {name: Variable(name) for name in self.arg_names} | known, state)

    def cache(self, backend: Any = None) -> str:
        """Have the server cache the text that every run starts with; returns it."""
        chosen, state = DEFAULT_BACKEND.resolve(backend), TracerState()
        with suppress(TraceStopped):  # what comes before is the same in every run
            self._trace(state, self.bind_arguments)
        prefix = chosen.loop.run(prefix_of(state, chosen))
        if prefix:
            chosen.cache_prefix(prefix)
        return prefix


class _BatchRun:
    """One program, run with many arguments at once."""

    def __init__(
        self,
        program: SglFunction,
        batch: list[JSON],
        params: GenParams,
        backend: BaseBackend,
        num_threads: int | str,
    ) -> None:
        self._program, self._batch, self._params, self._backend = program, batch, params, backend
        self._is_bounded = num_threads != "auto"
        self._max_threads = int(num_threads) if self._is_bounded else max(96, 16 * (os.cpu_count() or 1))
        self._places = asyncio.Semaphore(self._max_threads)  # of asynchronous bodies
        # A lone thread could not bring the second program to its first prompt while the first one waits.
        has_prefix = backend.caches_prefixes and len(batch) > 1 and self._max_threads > 1
        self._prefix = BatchPrefix(backend) if has_prefix else None

    def states(self, progress_bar: bool, max_ahead: int) -> Iterator[ProgramState]:
        """Yield each ended state, in order, while at most `max_ahead` programs run that were not asked for yet."""
        running: deque[tuple[ProgramState, Future[None]]] = deque()
        with Progress(disable=not progress_bar) as progress, ThreadPoolExecutor(self._max_threads) as pool:
            bar = progress.add_task(self._program.__name__, total=len(self._batch))

            def take() -> ProgramState:
                state, body = running[0]
                body.result()
                state.wait()
                running.popleft()
                progress.advance(bar)
                return state

            scouts = [self._start() for _ in self._batch[:2]]
            if self._prefix is not None:
                for state in scouts:
                    self._prefix.add_scout(state._executor.interpreter)
            try:
                for i, arguments in enumerate(self._batch):
                    state = scouts[i] if i < 2 else self._start()
                    running.append((state, self._submit(pool, state, arguments)))
                    if len(running) == max_ahead:
                        yield take()
                while running:
                    yield take()
            except BaseException:  # a body's error, Ctrl-C, or a reader that has left: nobody will read the others
                pool.shutdown(wait=False, cancel_futures=True)
                for state, body in running:
                    body.cancel()
                    state.abort()
                raise

    def _start(self) -> ProgramState:
        return self._program._state(self._backend, self._params, batch_prefix=self._prefix)

    def _submit(self, pool: ThreadPoolExecutor, state: ProgramState, arguments: JSON) -> "Future[None]":
        if self._program.is_async:
            return self._backend.loop.submit(self._arun(state, arguments))
        return pool.submit(self._run, state, arguments)

    def _run(self, state: ProgramState, arguments: JSON) -> None:
        try:
            self._program._run_body(state, (), arguments)
        finally:
            finished = state.end()
        if self._is_bounded:
            finished.result()

    async def _arun(self, state: ProgramState, arguments: JSON) -> None:
        async with self._places if self._is_bounded else nullcontext():
            try:
                await self._program._run_async(state, (), arguments)
            finally:
                finished = state.end()
            if self._is_bounded:
                await asyncio.wrap_future(finished)


@overload
def function(func: Callable[..., Any], num_api_spec_tokens: int | None = None) -> SglFunction: ...
@overload
def function(
    func: None = None, num_api_spec_tokens: int | None = None
) -> Callable[[Callable[..., Any]], SglFunction]: ...
def function(
    func: Callable[..., Any] | None = None, num_api_spec_tokens: int | None = None
) -> SglFunction | Callable[[Callable[..., Any]], SglFunction]:
    """Make a program of a function whose first parameter is `s`. Usable bare or with arguments."""
    if func is not None:
        return SglFunction(func, num_api_spec_tokens)
    return lambda body: SglFunction(body, num_api_spec_tokens)
