"""JSON objects that are declared once: a class's annotations say how they are read, checked and described.

Null means that a field is absent, wherever it has a default. Fields that nobody declared are passed over without being
made. A wrong value is an `InvalidRequest` that names the field, what it must be, and what it is.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import cache
from typing import Annotated, Any, Optional, TypeVar, Union, cast, dataclass_transform

import msgspec
from msgspec import Meta

from engine.errors import InvalidRequest, shown
from engine.misfits import refusal

T = TypeVar("T")
MAX_INT = 1 << 53  # beyond it JSON numbers are not exact
Int = Annotated[int, Meta(ge=-MAX_INT, le=MAX_INT)]
Count = Annotated[int, Meta(ge=0, le=MAX_INT)]


class Unsupported:
    """The type of fields that would change the answer: better refused than ignored. What is empty or false may be."""


NOTHING = Unsupported()  # stands for what was empty or false


@dataclass_transform(kw_only_default=True, field_specifiers=(msgspec.field,))
class Declared(msgspec.StructMeta):
    """Make classes of objects: fields with a default may be null, which is the default."""

    def __new__(
        mcls,
        name: str,
        bases: tuple[type, ...],
        namespace: dict[str, Any],
        *,
        unsupported: Iterable[str] = (),
        like: type | None = None,
        names: Mapping[str, str] | None = None,
        **options: Any,
    ) -> "Declared":
        """Make a class. unsupported: names of such fields. like, names: a class, and fields that are as its fields."""
        types: dict[str, Any] = namespace.setdefault("__annotations__", {})
        for field in unsupported:
            types[field], namespace[field] = Unsupported, None
        declared = {} if like is None else {field.name: field.type for field in msgspec.structs.fields(like)}
        for field, source in (names or {}).items():
            types[field], namespace[field] = declared[source], None
        for field in types.keys() & namespace.keys():
            types[field] = Optional[types[field]]  # noqa: UP045 - of a type that is known only here
            if namespace[field] is not None:
                namespace["__post_init__"] = _fill
        return super().__new__(mcls, name, bases, namespace, **{"kw_only": True, **options})


class Object(msgspec.Struct, metaclass=Declared):
    """A JSON object."""

    def given(self, names: Iterable[str]) -> dict[str, Any]:
        """Return the fields among `names` that are not null."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def wrong(self, name: str, rule: str, path: str = "") -> InvalidRequest:
        """Return the error that says what a field must be. path: of this object in the body."""
        field = f"{path}.{name}" if path else name
        return InvalidRequest(f"{field} must be {rule}, got {shown(getattr(self, name))}", field)


def tagged(base: type[Object], kinds: Iterable[str]) -> Any:
    """Return the union of classes that are as `base`, one for each kind: its `type` in JSON."""
    return Union[tuple(Declared(kind.title().replace("_", ""), (base,), {}, tag=kind) for kind in kinds)]  # noqa: UP007


def _fill(read: Object) -> None:
    """Put defaults in place of nulls. Classes without such defaults are made in half the time without it."""
    for name, new_default in _defaults(type(read)):
        if getattr(read, name) is None:
            setattr(read, name, new_default())


@cache
def _defaults(kind: type[Object]) -> tuple[tuple[str, Callable[[], Any]], ...]:
    """Return (name, maker of the default) of the fields that are never None."""
    return tuple(
        (field.name, _maker(field.default) if field.default_factory is msgspec.NODEFAULT else field.default_factory)
        for field in msgspec.structs.fields(kind)
        if not field.required and field.default is not None
    )


def _maker(value: Any) -> Callable[[], Any]:
    return lambda: value


def decode(text: bytes, kind: type[T], path: str = "") -> T:
    """Read JSON as a `kind`. `msgspec.DecodeError` or `RecursionError` if it is no JSON."""
    try:
        read: T = _decoder(cast(Hashable, kind)).decode(text)
    except msgspec.ValidationError as error:
        raise refusal(error, kind, msgspec.Raw(text), path) from None
    return read


def convert(value: Any, kind: type[T], path: str = "") -> T:
    """Read a value that was JSON as a `kind`. path: of the value in the body."""
    try:
        return msgspec.convert(value, kind, dec_hook=_hook, str_keys=True)
    except msgspec.ValidationError as error:
        raise refusal(error, kind, value, path) from None


@cache
def _decoder(kind: Hashable) -> "msgspec.json.Decoder[Any]":
    return msgspec.json.Decoder(kind, dec_hook=_hook)


def _hook(kind: type, value: Any) -> Unsupported:
    """Read a value of a type that is ours."""
    assert kind is Unsupported
    if value:
        raise ValueError("is not supported by this server")
    return NOTHING
