"""The expressions that a program may append to its state, and the functions that make them."""

import json
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .choices import ChoicesSamplingMethod, token_length_normalized

INT_REGEX = r"[-+]?[0-9]+[ \n]*"
FLOAT_REGEX = r"[-+]?[0-9]*\.?[0-9]+[ \n]*"
BOOL_REGEX = r"(True|False)"
STR_REGEX = r"\"[\w\d\s]*\""
DTYPE_REGEX: dict[type, str] = {int: INT_REGEX, float: FLOAT_REGEX, bool: BOOL_REGEX, str: STR_REGEX}
NUMBER_STOPS = (" ", "\n")


@dataclass(frozen=True)
class GenParams:
    """Parameters of generation, by SGLang's names and defaults. `run` sets them for a program, `gen` overrides them."""

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    stop_regex: tuple[str, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    ignore_eos: bool = False
    regex: str | None = None
    json_schema: str | None = None
    return_logprob: bool | None = None
    logprob_start_len: int | None = None
    top_logprobs_num: int | None = None
    return_text_in_logprobs: bool | None = None
    dtype: type | None = None

    def override(self, given: dict[str, Any]) -> "GenParams":
        """Return a copy with each of `given` that is not None. A lone stop becomes a tuple of one."""
        known = {name: value for name, value in given.items() if value is not None}
        if not known:
            return self
        for name in ("stop", "stop_token_ids", "stop_regex"):
            if name in known:
                value = known[name]
                known[name] = (value,) if isinstance(value, (str, int)) else tuple(value)
        params = object.__new__(GenParams)  # each gen comes here, and `dataclasses.replace` takes seven times as long
        vars(params).update(vars(self), **known)
        return params

    @property
    def pattern(self) -> str | None:
        """Regular expression that the answer must match; a dtype has one of its own."""
        return self.regex if self.dtype is None else DTYPE_REGEX[self.dtype]

    @property
    def all_stops(self) -> tuple[str, ...]:
        return (*self.stop, *NUMBER_STOPS) if self.dtype in (int, float) else self.stop


class Expr:
    """Something to append to a state. `+` joins expressions and strings."""

    def __add__(self, other: "Expr | str") -> "Concat":
        return Concat([self, as_expr(other)])

    def __radd__(self, other: "Expr | str") -> "Concat":
        return Concat([as_expr(other), self])


def as_expr(value: "Expr | str") -> Expr:
    """Make an expression of a string. `ValueError` for None, `TypeError` for anything else."""
    if isinstance(value, Expr):
        return value
    if isinstance(value, str):
        return Text(value)
    if value is None:
        raise ValueError("None cannot be appended to a state")
    raise TypeError(f"a string or an expression can be appended to a state, not {type(value).__name__}")


@dataclass(eq=False)
class Text(Expr):
    text: str


@dataclass(eq=False)
class Concat(Expr):
    parts: list[Expr]


@dataclass(eq=False)
class Variable(Expr):
    """The value of a variable, or of an argument, that a trace does not know. It can be appended, and no more."""

    name: str

    def _refuse(self, *_: object) -> Any:
        raise TypeError(f"the value of {self.name} is not known in a trace")

    __str__ = __bool__ = __len__ = __iter__ = __getitem__ = __eq__ = _refuse
    __format__ = _refuse
    __hash__ = object.__hash__


@dataclass(eq=False)
class Gen(Expr):
    name: str | None
    overrides: dict[str, Any] = field(default_factory=dict)  # of GenParams, none of them None


@dataclass(eq=False)
class Select(Expr):
    name: str | None
    choices: list[str]
    temperature: float = 0.0
    choices_method: ChoicesSamplingMethod = token_length_normalized


@dataclass(eq=False)
class RoleBegin(Expr):
    role: str


@dataclass(eq=False)
class RoleEnd(Expr):
    role: str


@dataclass(eq=False)
class Image(Expr):
    source: Any  # a path, bytes, or an image of PIL


@dataclass(eq=False)
class Video(Expr):
    path: str
    num_frames: int


@dataclass(eq=False)
class VarScopeBegin(Expr):
    name: str


@dataclass(eq=False)
class VarScopeEnd(Expr):
    name: str


REASONING_SUFFIX = "_reasoning_content"


@dataclass(eq=False)
class SeparateReasoning(Expr):
    expr: Expr
    model_type: str | None


def leaves(expr: Expr) -> Iterator[Expr]:
    """Yield the expressions that `expr` joins, in order."""
    if isinstance(expr, Concat):
        for part in expr.parts:
            yield from leaves(part)
    else:
        yield expr


def names_of(leaf: Expr) -> list[str]:
    """Return the variables that an expression sets."""
    match leaf:
        case Gen(name) | Select(name) | VarScopeEnd(name) if name is not None:
            return [name]
        case SeparateReasoning(expr):
            names = [name for part in leaves(expr) for name in names_of(part)]
            return [*names, *[name + REASONING_SUFFIX for name in names]]
        case _:
            return []


# ---- what a program writes ----


def gen(
    name: str | None = None,
    max_tokens: int | None = None,
    min_tokens: int | None = None,
    n: int | None = None,
    stop: str | list[str] | None = None,
    stop_token_ids: list[int] | None = None,
    stop_regex: str | list[str] | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    frequency_penalty: float | None = None,
    presence_penalty: float | None = None,
    ignore_eos: bool | None = None,
    return_logprob: bool | None = None,
    logprob_start_len: int | None = None,
    top_logprobs_num: int | None = None,
    return_text_in_logprobs: bool | None = None,
    dtype: type | None = None,
    choices: list[str] | None = None,
    choices_method: ChoicesSamplingMethod | None = None,
    regex: str | None = None,
    json_schema: str | dict[str, Any] | type | None = None,
) -> Gen | Select:
    """Let the model write; the text becomes variable `name`. Whatever is None is as `run` says.

    `dtype` (int, float, bool or str) and `regex` constrain the text, dtype first; `choices` makes it a `select`.
    `json_schema` may be a class of Pydantic's, too.
    """
    if choices is not None:
        return select(name, choices, temperature or 0.0, choices_method or token_length_normalized)
    if regex is not None:
        try:
            re.compile(regex)
        except re.error as error:
            raise ValueError(f"regex {regex!r} is not a regular expression: {error}") from None
    if dtype is not None and dtype not in DTYPE_REGEX:
        raise ValueError(f"dtype must be int, float, bool or str, got {dtype!r}")
    if dtype is not None and regex is not None:
        warnings.warn("gen has both dtype and regex; dtype is used", stacklevel=2)
        regex = None
    overrides = {
        "max_new_tokens": max_tokens,
        "min_new_tokens": min_tokens,
        "n": n,
        "stop": stop,
        "stop_token_ids": stop_token_ids,
        "stop_regex": stop_regex,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "frequency_penalty": frequency_penalty,
        "presence_penalty": presence_penalty,
        "ignore_eos": ignore_eos,
        "return_logprob": return_logprob,
        "logprob_start_len": logprob_start_len,
        "top_logprobs_num": top_logprobs_num,
        "return_text_in_logprobs": return_text_in_logprobs,
        "dtype": dtype,
        "regex": regex,
        "json_schema": _schema_text(json_schema),
    }
    return Gen(name, {key: value for key, value in overrides.items() if value is not None})


def _schema_text(schema: Any) -> str | None:
    """Return a JSON schema as text, also that of a Pydantic class."""
    if isinstance(schema, type):
        to_schema = getattr(schema, "model_json_schema", None)
        if to_schema is None:
            raise ValueError(f"json_schema must be a schema or a class of Pydantic's, got {schema!r}")
        schema = to_schema()
    return json.dumps(schema) if isinstance(schema, dict) else schema


def gen_int(name: str | None = None, max_tokens: int | None = None, **params: Any) -> Gen | Select:
    """Generate an integer. `params`: those of `gen` but min_tokens, dtype, choices, regex and json_schema."""
    return _gen_dtype(int, name, max_tokens, params)


def gen_string(name: str | None = None, max_tokens: int | None = None, **params: Any) -> Gen | Select:
    """Generate a string in double quotes. `params`: as of `gen_int`."""
    return _gen_dtype(str, name, max_tokens, params)


NOT_OF_DTYPE = ("min_tokens", "dtype", "choices", "choices_method", "regex", "json_schema")


def _gen_dtype(dtype: type, name: str | None, max_tokens: int | None, params: dict[str, Any]) -> Gen | Select:
    for refused in NOT_OF_DTYPE:
        if refused in params:
            raise TypeError(f"gen_int and gen_string take no {refused}")
    return gen(name, max_tokens, dtype=dtype, **params)


def image(expr: Any) -> Image:
    """Append an image: a path, its bytes, or an image of PIL."""
    return Image(expr)


def video(path: str, num_frames: int) -> Video:
    """Append `num_frames` frames of a video file."""
    return Video(path, num_frames)


def select(
    name: str | None = None,
    choices: Sequence[str] | None = None,
    temperature: float = 0.0,
    choices_method: ChoicesSamplingMethod = token_length_normalized,
) -> Select:
    """Append the likeliest of `choices`, as `choices_method` measures it."""
    if not choices:
        raise ValueError("select needs choices, at least one")
    if isinstance(choices, str) or not all(isinstance(choice, str) for choice in choices):
        raise TypeError(f"choices must be a list of strings, got {choices!r}")
    return Select(name, list(choices), temperature, choices_method)


def _in_role(role: str, expr: Expr | str | None) -> Expr:
    if expr is None:
        return RoleBegin(role)
    return Concat([RoleBegin(role), as_expr(expr), RoleEnd(role)])


def system(expr: Expr | str | None = None) -> Expr:
    return _in_role("system", expr)


def user(expr: Expr | str | None = None) -> Expr:
    return _in_role("user", expr)


def assistant(expr: Expr | str | None = None) -> Expr:
    return _in_role("assistant", expr)


def system_begin() -> Expr:
    return RoleBegin("system")


def system_end() -> Expr:
    return RoleEnd("system")


def user_begin() -> Expr:
    return RoleBegin("user")


def user_end() -> Expr:
    return RoleEnd("user")


def assistant_begin() -> Expr:
    return RoleBegin("assistant")


def assistant_end() -> Expr:
    return RoleEnd("assistant")


def separate_reasoning(expr: Expr | None = None, model_type: str | None = None) -> SeparateReasoning:
    """Keep what the model thinks in `expr` out of the conversation: it becomes `<name>_reasoning_content`."""
    if expr is None:
        raise ValueError("separate_reasoning needs an expression")
    return SeparateReasoning(as_expr(expr), model_type)
