"""A program's state, as its body sees it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Self

from .executor import End, Executor, Fork, Item, SetVariable
from .expressions import (
    Concat,
    Expr,
    RoleBegin,
    RoleEnd,
    VarScopeBegin,
    VarScopeEnd,
    as_expr,
    assistant,
    system,
    user,
)


class BaseState:
    """The interface that a program writes with, whether it runs or is traced."""

    def submit(self, expr: Expr) -> None:
        raise NotImplementedError

    def __iadd__(self, value: Expr | str) -> Self:
        self.submit(as_expr(value))
        return self

    def system(self, expr: Expr | str | None = None) -> Any:
        """Append a whole message, or, without `expr`, be the context manager around one.

        `s += s.system(expr)` is the same.
        """
        return self._role("system", None if expr is None else system(expr))

    def user(self, expr: Expr | str | None = None) -> Any:
        return self._role("user", None if expr is None else user(expr))

    def assistant(self, expr: Expr | str | None = None) -> Any:
        return self._role("assistant", None if expr is None else assistant(expr))

    def _role(self, role: str, expr: Expr | None) -> Any:
        if expr is None:
            return self._around(RoleBegin(role), RoleEnd(role))
        self.submit(expr)
        return Concat([])  # nothing more to append

    def var_scope(self, name: str) -> Any:
        """Make variable `name` of what is appended within: a context manager."""
        return self._around(VarScopeBegin(name), VarScopeEnd(name))

    @contextmanager
    def _around(self, begin: Expr, end: Expr) -> Iterator[None]:
        self.submit(begin)
        yield
        self.submit(end)


class ProgramState(BaseState):
    """Appending returns at once; reading waits. Whatever went wrong is raised where a variable is read.

    A state that nobody refers to any more is aborted, because nobody can read what it would become.
    """

    def __init__(self, executor: Executor, parent: "ProgramState | None" = None) -> None:
        self._executor = executor
        self._parent = parent  # kept: it must live to the fork
        self._is_joined = False
        self.ret_value: Any = None  # what the program's body returned

    def __del__(self) -> None:
        if self._executor.is_busy and not self._is_joined:
            self._executor.abort()

    def submit(self, expr: Item) -> None:
        self._executor.submit(expr)

    # ---- reading ----

    def __getitem__(self, name: str) -> Any:
        return self.get_var(name)

    def __setitem__(self, name: str, value: Any) -> None:
        self.set_var(name, value)

    def __contains__(self, name: str) -> bool:
        if self._executor.future_of(name) is not None:
            return True
        self.sync()
        return name in self._executor.transcript.variables

    def get_var(self, name: str) -> Any:
        """Wait for a variable and return it. `KeyError` if there is none; or the error that kept it from being."""
        future = self._executor.future_of(name)
        if future is not None:
            return self._wait(future)
        self.sync()  # a join may bring it
        return self._known(name)

    async def get(self, name: str) -> Any:
        """Wait for a variable and return it, in asynchronous programs."""
        future = self._executor.future_of(name)
        if future is not None:
            return await asyncio.wrap_future(future)
        await asyncio.wrap_future(self._executor.sync())
        return self._known(name)

    def _known(self, name: str) -> Any:
        if self._executor.error is not None and name not in self._executor.transcript.variables:
            raise self._executor.error
        return self._executor.transcript.variables[name]

    def set_var(self, name: str, value: Any) -> None:
        self._executor.submit(SetVariable(name, value))

    def get_meta_info(self, name: str) -> Any:
        """Return the server's account of the answer: token counts, `finish_reason`, log-probabilities."""
        self.get_var(name)
        return self._executor.transcript.meta_info[name]

    def text(self) -> str:
        """Return everything so far: the prompt and the model's answers."""
        self.sync()
        return self._executor.transcript.text

    def messages(self) -> list[dict[str, Any]]:
        """Return the ended messages, in OpenAI's shape."""
        self.sync()
        return [*self._executor.transcript.messages]

    def sync(self) -> None:
        """Wait for everything appended so far."""
        self._wait(self._executor.sync())

    def error(self) -> BaseException | None:
        """Return the error of the program, if it failed."""
        self.sync()
        return self._executor.error

    def abort(self) -> None:
        """End the state, and its request at the server. Its variables raise `ProgramAborted`."""
        self._executor.abort()

    def wait(self) -> None:
        """Wait until the program has ended, well or not."""
        self._wait(self._executor.finished)

    def _wait(self, future: "Future[Any]") -> Any:
        return self._executor.backend.loop.wait(future)

    # ---- streaming ----

    def text_iter(self, var_name: str | None = None) -> Iterator[str]:
        """Yield new text as it comes: all of it, or that of one variable."""
        if not self._executor.is_stream:
            yield self.text() if var_name is None else self.get_var(var_name)
        elif var_name is None:
            yield from self._executor.backend.loop.iterate(self._executor.pieces())
        else:
            for piece, _ in self._executor.backend.loop.iterate(self._executor.pieces_of(var_name)):
                yield piece

    async def text_async_iter(self, var_name: str | None = None, return_meta_data: bool = False) -> AsyncIterator[Any]:
        """Yield new text, for `async for`. `return_meta_data`: (new text, meta_info so far) of a variable."""
        if return_meta_data and var_name is None:
            raise ValueError("return_meta_data needs a var_name: only an answer has meta_info")
        executor = self._executor
        if not executor.is_stream:
            await asyncio.wrap_future(executor.sync())
            if var_name is None:
                yield executor.transcript.text
            else:
                text = await self.get(var_name)
                yield (text, executor.transcript.meta_info[var_name]) if return_meta_data else text
        elif var_name is None:
            async for piece in executor.backend.loop.aiterate(executor.pieces()):
                yield piece
        else:
            async for piece, meta_info in executor.backend.loop.aiterate(executor.pieces_of(var_name)):
                yield (piece, meta_info) if return_meta_data else piece

    # ---- branches ----

    def fork(self, size: int = 1, position_ids_offset: list[int] | None = None) -> "ProgramStateGroup":
        """Return `size` states that go on from here. Their common text is cached before they part.

        `position_ids_offset` is accepted for SGLang's sake; its own servers ignore it too.
        """
        del position_ids_offset
        if size < 1:
            raise ValueError(f"fork makes at least 1 state, got {size}")
        executor = self._executor
        children = [
            Executor(executor.backend, executor.defaults, is_stream=executor.is_stream, is_child=True)
            for _ in range(size)
        ]
        self.submit(Fork(children))
        return ProgramStateGroup([ProgramState(child, self) for child in children], self)

    @contextmanager
    def copy(self, position_ids_offset: list[int] | None = None) -> Iterator["ProgramState"]:
        """Yield one branch, joined at the end."""
        group = self.fork(1, position_ids_offset)
        yield group[0]
        group.join()

    def _join(self, states: "Sequence[ProgramState]", is_text: bool) -> None:
        for state in states:
            state._is_joined = True
        self._executor.join([state._executor for state in states], is_text)

    # ---- the program ----

    def end(self) -> "Future[None]":
        """Note that the body has returned; the future is done when all that it appended is."""
        self.submit(End())
        return self._executor.finished


class ProgramStateGroup:
    """The states of a fork. As a context manager it joins them at the end."""

    def __init__(self, states: list[ProgramState], parent: ProgramState) -> None:
        self.states, self.parent = states, parent

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, i: int) -> ProgramState:
        return self.states[i]

    def __setitem__(self, i: int, state: ProgramState) -> None:
        """Accept the end of `group[i] += ...`. `TypeError` for another state."""
        if state is not self.states[i]:
            raise TypeError("a state of a group can be appended to, not replaced")

    def __iter__(self) -> Iterator[ProgramState]:
        return iter(self.states)

    def __iadd__(self, other: "Expr | Callable[[int], Expr | str] | Sequence[Expr | str]") -> "ProgramStateGroup":
        """Append the same expression to each state, what a function gives for its index, or one of a list to each."""
        if isinstance(other, str):
            raise ValueError("a group takes an expression, a function of the index or a list, not a lone string")
        if isinstance(other, Expr):
            values: Sequence[Expr | str] = [other] * len(self)
        elif callable(other):
            values = [other(i) for i in range(len(self))]
        else:
            values = other
        if len(values) != len(self):
            raise ValueError(f"{len(values)} expressions for {len(self)} states")
        for state, value in zip(self.states, values, strict=True):
            state.submit(as_expr(value))
        return self

    def __enter__(self) -> "ProgramStateGroup":
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        if error_type is None:
            self.join()

    def join(self, mode: str = "gather_variable") -> None:
        """Bring the branches back to their parent, in order, without waiting for them.

        `gather_variable`: each variable that is new since the fork becomes a list, an entry a branch.
        `concate_and_append`: the parent's text goes on with what each branch wrote.
        """
        if mode not in ("gather_variable", "concate_and_append"):
            raise ValueError(f"join's mode is gather_variable or concate_and_append, got {mode!r}")
        self.parent._join(self.states, mode == "concate_and_append")

    def abort(self) -> None:
        """Give the branches up."""
        for state in self.states:
            state.abort()
