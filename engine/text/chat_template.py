"""Render chat templates: Jinja text of whoever made the model, in a sandbox, within limits of time and memory.

The sandbox keeps a template away from Python. The limits end one that would never: two nested loops over a long range,
a macro that calls itself twice, a text that doubles with each message.
"""

import json
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.runtime
import jinja2.visitor
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Errors of code in a template, which adds, indexes, formats and calls values of any kind; Jinja's own come first.
TEMPLATE_ERRORS = (
    jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError,
)  # fmt: skip
MAX_RENDER_S = 2.0  # CPU seconds; a conversation of a thousand messages takes some 0.02
MAX_TEXT_CHARS = 1 << 26  # of a prompt, and of each text on the way to it
MAX_EXPONENT = 1000
TICKS_PER_LOOK = 16  # loop bodies and macros between two looks at the clock
TICK, JOIN = "__tick__", "__join__"  # names that a compiled template calls


class Environment(ImmutableSandboxedEnvironment):
    """Sandbox in which no single operation makes a text longer than `MAX_TEXT_CHARS`."""

    intercepted_binops = frozenset({"+", "*", "**"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            if isinstance(right, (int, float)) and right > MAX_EXPONENT:
                raise jinja2.TemplateError(f"the exponent {right} is larger than {MAX_EXPONENT}")
        elif max(_len(left), _len(right)):  # the sum or the multiple of texts or lists
            size = _len(left) + _len(right)
            if operator == "*":
                size *= next((value for value in (left, right) if isinstance(value, int)), 1)
            check_length(size)
        return super().call_binop(context, operator, left, right)


def _len(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple)) else 0


def check_length(num_chars: int) -> None:
    """Raise `jinja2.TemplateError` if a text is too long."""
    if num_chars > MAX_TEXT_CHARS:
        raise jinja2.TemplateError(f"makes a text of {num_chars} characters, {MAX_TEXT_CHARS} are the limit")


class GenerationTag(jinja2.ext.Extension):
    """Render the content of {% generation %} ... {% endgeneration %}, which marks an assistant's text for training."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Limiter(jinja2.visitor.NodeTransformer):
    """Have each loop's body and each macro call `TICK` first, and each `~` call `JOIN`."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:
        return self._ticking(node)

    def visit_Macro(self, node: jinja2.nodes.Macro) -> jinja2.nodes.Node:
        return self._ticking(node)

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return _call(JOIN, node.nodes, node.lineno)

    def _ticking(self, node: Any) -> jinja2.nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, jinja2.nodes.ExprStmt(_call(TICK, [], node.lineno), lineno=node.lineno))
        limited: jinja2.nodes.Node = node
        return limited


def _call(name: str, args: list[Any], lineno: int) -> jinja2.nodes.Call:
    function = jinja2.nodes.Name(name, "load", lineno=lineno)
    return jinja2.nodes.Call(function, args, [], None, None, lineno=lineno)


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return `value` as JSON. Replaces Jinja's own filter, which escapes HTML and sorts keys."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def join(*parts: Any) -> str:
    """Return the texts of `parts` in one. Raises `jinja2.TemplateError` if it is too long."""
    texts = [str(part) for part in parts]
    check_length(sum(map(len, texts)))
    return "".join(texts)


def ticker() -> Callable[[], None]:
    """Return a function that raises `jinja2.TemplateError` once it is called after `MAX_RENDER_S` CPU seconds."""
    deadline, num_ticks = time.thread_time() + MAX_RENDER_S, 0

    def tick() -> None:
        nonlocal num_ticks
        num_ticks += 1
        if num_ticks % TICKS_PER_LOOK == 0 and time.thread_time() > deadline:
            raise jinja2.TemplateError(f"does not come to an end within {MAX_RENDER_S:g} s")

    return tick


@lru_cache(maxsize=16)
def compile_template(source: str) -> jinja2.Template:
    """Compile a template. Raises `jinja2.TemplateSyntaxError`, or SyntaxError for Python's own limits."""
    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now, JOIN: join}
    tree = Limiter().visit(environment.parse(source))
    return jinja2.Template.from_code(environment, environment.compile(tree), environment.make_globals(None))


def render(source: str, variables: Mapping[str, Any]) -> str:
    """Render the template `source`. Raises one of `TEMPLATE_ERRORS` if it cannot be, or not within the limits."""
    texts, num_chars = [], 0
    for text in compile_template(source).generate({**variables, TICK: ticker()}):
        texts.append(text)
        num_chars += len(text)
        check_length(num_chars)
    return "".join(texts)
