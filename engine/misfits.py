"""Errors about values that are not of their declared type, in our words: the field, what it must be, what it is."""

import re
from functools import cache
from typing import Any

import msgspec
from msgspec import inspect

from engine.errors import InvalidRequest, shown

# What msgspec says, and where.
PLACE = re.compile(r"(.*) - at (?:`key` in )?`\$(.*)`", re.DOTALL)
STEP = re.compile(r"\.([^.\[]+)|\[(\d+)\]")
FIELD_OF = re.compile(r"Object (?:missing required|contains unknown) field `(.*)`")
MANY_BYTES = 1 << 10  # of JSON, which an error quotes as it stands
NAMES = {
    inspect.StrType: ("a string", "strings"),
    inspect.BoolType: ("true or false", "booleans"),
    inspect.IntType: ("an integer", "integers"),
    inspect.FloatType: ("a number", "numbers"),
    inspect.DictType: ("an object", "objects"),
    inspect.StructType: ("an object", "objects"),
    inspect.ListType: ("a list", "lists"),
    inspect.AnyType: ("a value", "values"),
}
OBJECTS = (inspect.StructType, inspect.DictType, inspect.AnyType)


@cache
def type_info(kind: Any) -> inspect.Type:
    return inspect.type_info(kind)


def refusal(error: msgspec.ValidationError, kind: Any, value: Any, path: str) -> InvalidRequest:
    """Return the error that names the field. value: what was read, or its JSON as `Raw`. path: of it in the body."""
    found = PLACE.fullmatch(str(error))
    what, place = found.groups() if found else (str(error), "")
    steps: list[str | int] = [name or int(number) for name, number in STEP.findall(place)]
    if named := FIELD_OF.fullmatch(what):
        steps.append(named[1])
    info = type_info(kind)
    for step in steps:
        inner = _inner(info, step, value)
        if inner is None:
            break
        info, value = inner, _item(value, step)
        path = f"{path}[{step}]" if isinstance(step, int) else f"{path}.{step}" if path else step
    if "unknown field" in what:
        return InvalidRequest(f"unknown field: {path}", path)
    if error.__cause__ is not None:
        return InvalidRequest(f"{path} {what}", path)
    if "of length <=" in what and (limit := _longest(info)):
        items = msgspec.json.decode(value, type=list[msgspec.Raw]) if isinstance(value, msgspec.Raw) else value
        return InvalidRequest(f"{path} has {len(items)} entries, the limit is {limit}", path)
    value = _plain(value)
    if not path:
        return InvalidRequest(f"the body must be a JSON object, got {shown(value)}")
    return InvalidRequest(f"{path} must be {rule_of(info, value)}, got {shown(value)}", path)


def members(info: inspect.Type, *, keeps_rules: bool = True) -> list[inspect.Type]:
    """Return what a value of a type may be, null apart. keeps_rules: a type that has a rule of its own is one."""
    if isinstance(info, inspect.Metadata):
        return [info] if info.extra and keeps_rules else members(info.type, keeps_rules=keeps_rules)
    if isinstance(info, inspect.UnionType):
        return [member for one in info.types for member in members(one, keeps_rules=keeps_rules)]
    return [] if isinstance(info, inspect.NoneType) else [info]


def _bare(info: inspect.Type) -> inspect.Type:
    return info.type if isinstance(info, inspect.Metadata) else info


def _inner(info: inspect.Type, step: str | int, value: Any) -> inspect.Type | None:
    """Return the type of a field of `value`, or of an object in it. None: the value is named as a whole."""
    found = members(info, keeps_rules=False)
    for member in found:
        if isinstance(member, inspect.ListType) and isinstance(step, int):
            items = members(member.item_type)
            is_named = any(isinstance(item, (*OBJECTS, inspect.Metadata)) for item in items)
            return member.item_type if is_named else None
        if isinstance(member, inspect.StructType) and isinstance(step, str):
            if step == member.tag_field:
                return inspect.LiteralType(tuple(one.tag for one in found if isinstance(one, inspect.StructType)))
            if member.tag_field is None or _plain(_item(value, member.tag_field)) == member.tag:
                fields = {field.encode_name: field.type for field in member.fields}
                return fields.get(step, inspect.AnyType())
    return None


def _item(value: Any, step: str | int) -> Any:
    """Return a field, or an item of a list; None if it is not there. Of JSON the rest is passed over."""
    if isinstance(value, msgspec.Raw):
        kind: Any = list[msgspec.Raw] if isinstance(step, int) else dict[str, msgspec.Raw]
        value = msgspec.json.decode(value, type=kind)
    return value[step] if isinstance(step, int) else value.get(step)


def _plain(value: Any) -> Any:
    """Return a value of which there is the JSON, unless that is long."""
    if not isinstance(value, msgspec.Raw):
        return value
    text = memoryview(value)
    return msgspec.json.decode(text) if len(text) <= MANY_BYTES else Long(bytes(text[:MANY_BYTES]))


class Long:
    """A long value, shown as the JSON it begins with."""

    def __init__(self, begin: bytes) -> None:
        self._begin = begin.decode(errors="replace").lstrip()

    def __repr__(self) -> str:
        return self._begin


def _longest(info: inspect.Type) -> int | None:
    lengths = [one.max_length for one in members(info, keeps_rules=False) if isinstance(one, inspect.ListType)]
    return lengths[0] if lengths else None


def rule_of(info: inspect.Type, value: Any = None) -> str:
    """Return what a value must be. Limits of numbers are named where `value` is a number."""
    rules = [_rule(member, value) for member in members(info)]
    return " or ".join(dict.fromkeys(rule for rule in rules if rule))


def _rule(info: inspect.Type, value: Any) -> str:
    if isinstance(info, inspect.Metadata):
        return str((info.extra or {})["rule"])
    if isinstance(info, inspect.LiteralType):
        return " or ".join(map(repr, sorted(info.values, key=str)))
    name = NAMES[type(info)][0]
    if isinstance(info, (inspect.IntType, inspect.FloatType)):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        is_right = isinstance(value, int) or isinstance(info, inspect.FloatType)
        return name + _limits(info) if is_number and is_right else name
    if isinstance(info, inspect.StrType) and info.min_length:
        return "a non-empty string"
    if isinstance(info, inspect.ListType):
        items = [NAMES[type(item)][1] for item in map(_bare, members(info.item_type)) if type(item) in NAMES]
        kind = "a non-empty list" if info.min_length else "a list"
        return f"{kind} of {' or '.join(dict.fromkeys(items))}" if items else f"{kind} of {rule_of(info.item_type)}"
    return name


def _limits(info: inspect.IntType | inspect.FloatType) -> str:
    low, high = (f"{bound:g}" if isinstance(bound, float) else bound for bound in (info.ge, info.le))
    if low is not None and high is not None:
        return f" between {low} and {high}"
    return "" if low is None else f" of at least {low}"
