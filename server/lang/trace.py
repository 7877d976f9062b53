"""Traces: the expressions that a program appends, found by running its body with nothing behind it."""

import inspect
from collections.abc import Callable, Coroutine, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

from .backends.base import BaseBackend
from .expressions import Expr, RoleBegin, RoleEnd, Text, Variable, as_expr, leaves
from .state import BaseState


class TraceStopped(Exception):
    """The body needs a value that only a run can give."""


class TracerState(BaseState):
    """Records expressions. Variables are placeholders that can be appended but not looked into."""

    def __init__(self, parent: "TracerState | None" = None) -> None:
        self.parent = parent
        self.nodes: list[Expr] = []
        self.children: list[TracerState] = []

    def submit(self, expr: Expr) -> None:
        self.nodes.append(expr)

    def __getitem__(self, name: str) -> Variable:
        return Variable(name)

    get_var = __getitem__

    async def get(self, name: str) -> Variable:
        return Variable(name)

    def __setitem__(self, name: str, value: Any) -> None:
        """Ignore the value: a trace knows variables by name only."""

    set_var = __setitem__

    def fork(self, size: int = 1, position_ids_offset: list[int] | None = None) -> "TracerGroup":
        del position_ids_offset  # ProgramState has it
        children = [TracerState(self) for _ in range(size)]
        self.children += children
        return TracerGroup(children)

    @contextmanager
    def copy(self, position_ids_offset: list[int] | None = None) -> Iterator["TracerState"]:
        yield self.fork(1, position_ids_offset)[0]

    def flatten_nodes(self) -> list[Expr]:
        """Return this state's expressions, without nesting."""
        return [leaf for node in self.nodes for leaf in leaves(node)]

    def __getattr__(self, name: str) -> Any:
        raise TraceStopped(f"a trace has no {name}")


class TracerGroup:
    def __init__(self, states: list[TracerState]) -> None:
        self.states = states

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, i: int) -> TracerState:
        return self.states[i]

    def __setitem__(self, i: int, state: TracerState) -> None:
        """Accept the end of `group[i] += ...`."""

    def __iadd__(self, other: Any) -> "TracerGroup":
        for i, state in enumerate(self.states):
            if isinstance(other, Expr):
                state.submit(other)
            else:
                state.submit(as_expr(other(i) if callable(other) else other[i]))
        return self

    def __enter__(self) -> "TracerGroup":
        return self

    def __exit__(self, *_: object) -> None:
        """Join nothing: the branches' values are unknown."""

    def join(self, mode: str = "gather_variable") -> None:
        """Join nothing: the branches' values are unknown."""


def trace_program(body: Callable[..., Any], arguments: dict[str, Any], state: TracerState) -> None:
    """Record in `state` what the body appends.

    `TraceStopped` where its course depends on what the model would write; `state` has then what comes before.
    """
    try:
        written = body(state, **arguments)
        if inspect.iscoroutine(written):
            _step(written)
    except (TypeError, AttributeError) as error:  # a placeholder was used as the value that it stands for
        raise TraceStopped(str(error)) from error


def _step(body: Coroutine[Any, Any, Any]) -> None:
    """Run an asynchronous body, which has nothing to wait for but its state."""
    with suppress(RuntimeError), closing(body):  # asyncio's: there is no running event loop
        try:
            body.send(None)
        except StopIteration:
            return
    raise TraceStopped("a trace waits for nothing but the state's variables")


async def prefix_of(state: TracerState, backend: BaseBackend) -> str:
    """Return the constant text that the trace starts with, in `backend`'s chat template."""
    prefix = ""
    roles: tuple[str, ...] = ()
    for node in state.flatten_nodes():
        match node:
            case Text(text):
                prefix += text
            case RoleBegin(role):
                prefix += await backend.chat_template.begin(roles, role)
            case RoleEnd(role):
                roles = (*roles, role)
                prefix += await backend.chat_template.end(roles)
            case _:
                break
    return prefix
