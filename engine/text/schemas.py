"""Rewrite JSON schemas into ones that llguidance can hold answers to.

First without what the library would round, or fail at in the middle of an answer (`exact`); then in other words that
it knows (`rewritten`); then with oneOf as anyOf. What is left is refused, or left out if the schema is not strict.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

Schema = dict[str, Any]

NOT_STRICT = "x-strict"  # false, at a schema's top: what cannot be enforced is left out
OPTIONS = "x-guidance"  # the library's own options, at a schema's top

ONE = {
    "additionalItems", "additionalProperties", "contains", "else", "if", "items", "not", "propertyNames", "then",
    "unevaluatedItems", "unevaluatedProperties",
}  # fmt: skip
SEVERAL = {"allOf", "anyOf", "items", "oneOf", "prefixItems"}
NAMED = {"$defs", "definitions", "dependencies", "dependentSchemas", "patternProperties", "properties"}
ANNOTATIONS = {
    "$comment", "default", "defaultSnippets", "deprecated", "description", "enumDescriptions", "errorMessage",
    "examples", "externalDocs", "markdownDescription", "readOnly", "title", "writeOnly", "xml",
}  # fmt: skip
FORMATS = {
    "date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "unknown", "uri", "uuid",
}  # fmt: skip
"""String formats that the library knows. Others are annotations, as JSON Schema says."""
UNHELD = {"additionalItems", "format", "maxProperties", "minProperties", "pattern", "patternProperties"}
"""Keywords that are left out, with references to other places, where the library's leniency is not enough."""
MAX_TEXT_BYTES = 64 << 10  # of a grammar, without the annotations in its schemas
BOUNDS = {
    "minimum": 1,
    "exclusiveMinimum": 1,
    "maximum": -1,
    "exclusiveMaximum": -1,
}  # the direction of what is allowed
MAX_EXACT = 1 << 53  # integers from it on are rounded by the library, which reads them as doubles
MAX_INTEGER = (1 << 63) - 1024  # the largest double that its 64-bit integers hold
MAX_NUMBER = 1 << 62  # the library fails at larger bounds of numbers
ENDLESS = re.compile(r"[*+]|,}")  # in patterns that match names of any length
MAX_CASES = 16  # alternatives that one keyword may become


def change_all(schema: Any, change: Callable[[Schema], Schema]) -> Any:
    """Return a copy of `schema` in which `change` was applied to every schema, inner ones first.

    Values that only look like schemas, those of enum, const and default, stay as they are.
    """
    if not isinstance(schema, dict):
        return schema
    changed = {}
    for keyword, value in schema.items():
        if isinstance(value, list) and keyword in SEVERAL:
            value = [change_all(inner, change) for inner in value]
        elif isinstance(value, dict) and keyword in ONE:
            value = change_all(value, change)
        elif isinstance(value, dict) and keyword in NAMED:
            value = {name: change_all(inner, change) for name, inner in value.items()}
        changed[keyword] = value
    return change(changed)


def with_options(schema: Schema, **options: bool) -> Schema:
    """Return `schema` with options of the library, beside those that it has. No spaces stand between parts."""
    given = schema.get(OPTIONS)
    known = given if isinstance(given, dict) else {}
    return {**schema, OPTIONS: {"whitespace_flexible": False, **known, **options}}


def is_strict(schema: Schema) -> bool:
    return schema.get(NOT_STRICT) is not False


# ---- what must be so before the library reads it ----


def exact(schema: Schema, is_covered: Callable[[str, list[str]], bool]) -> Schema:
    """Return `schema` without what the library would round, or fail at in the middle of an answer.

    is_covered: return whether a pattern matches none but the given names. Raises `ValueError` for an integer that no
    answer could have exactly.
    """

    def change(inner: Schema) -> Schema:
        return _without_covered_patterns(_with_exact_bounds(inner), is_covered)

    changed: Schema = change_all(schema, change)
    return changed


def without_annotations(schema: Schema) -> Schema:
    """Return `schema` without the keywords that say nothing about answers, those that are null among them.

    No keyword but const may be null: libraries that write every field that they have say so of those that are not set.
    """

    def change(inner: Schema) -> Schema:
        return {
            name: _without_nulls(value) if name in NAMED else value
            for name, value in inner.items()
            if not _is_annotation(name) and (value is not None or name == "const")
        }

    changed: Schema = change_all(schema, change)
    return changed


def _without_nulls(schemas: Any) -> Any:
    """Return schemas by name, with any value where there is null for one."""
    if not isinstance(schemas, dict):
        return schemas
    return {name: {} if schema is None else schema for name, schema in schemas.items()}


def _is_annotation(keyword: str) -> bool:
    return keyword in ANNOTATIONS or (keyword.startswith("x-") and keyword not in (NOT_STRICT, OPTIONS))


def _with_exact_bounds(schema: Schema) -> Schema:
    """Move bounds that the library would round inwards, to the next number that it holds; nearer if it fails there."""
    for value in [schema.get("const"), *(schema["enum"] if isinstance(schema.get("enum"), list) else [])]:
        if isinstance(value, int) and abs(value) > MAX_EXACT and not (abs(value) < 1e300 and float(value) == value):
            raise ValueError(f"{value} is an integer beyond 2^53, which would be rounded")
    kinds = schema.get("type")
    is_integer = kinds == "integer" or (isinstance(kinds, list) and "integer" in kinds and "number" not in kinds)
    changed = dict(schema)
    for keyword, inwards in BOUNDS.items():
        bound = schema.get(keyword)
        if not _is_number(bound) or abs(bound) < MAX_EXACT:
            continue
        if keyword.startswith("exclusive") and is_integer:
            del changed[keyword]
            keyword, bound = keyword.removeprefix("exclusive").lower(), bound + inwards
            if _is_number(other := changed.get(keyword)):
                bound = max(bound, other) if inwards > 0 else min(bound, other)
        changed[keyword] = _inwards(bound, inwards, MAX_INTEGER if is_integer else MAX_NUMBER)
    if is_integer and _is_number(low := changed.get("minimum")) and low >= MAX_EXACT and "maximum" not in changed:
        changed["maximum"] = MAX_INTEGER  # the library fails at some of these minimums alone
    return changed


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _inwards(bound: float, inwards: int, limit: int) -> float:
    """Return the double nearest to `bound` in the direction of `inwards`, at most `limit` away from 0."""
    if bound * inwards > limit:
        raise ValueError(f"a bound of {bound} is beyond {limit}, the last number that can be held")
    read = float(max(-limit, min(limit, bound)))
    if int(read) * inwards < bound * inwards:
        read = math.nextafter(read, math.inf * inwards)
    return int(read)


def _without_covered_patterns(schema: Schema, is_covered: Callable[[str, list[str]], bool]) -> Schema:
    """Move patterns that only match names of properties to these: no other name is left for them."""
    properties, patterns = schema.get("properties"), schema.get("patternProperties")
    if not (isinstance(properties, dict) and isinstance(patterns, dict) and properties and patterns):
        return schema
    properties, left = dict(properties), {}
    for pattern, inner in patterns.items():
        is_finite = "^" in pattern and "$" in pattern and not ENDLESS.search(pattern)
        if not (is_finite and is_covered(pattern, list(properties))):
            left[pattern] = inner
            continue
        for name in properties:
            if re.search(pattern, name):
                properties[name] = {"allOf": [properties[name], inner]}
    return {**schema, "properties": properties, "patternProperties": left}


# ---- the same in other words ----


def rewritten(schema: Schema) -> Schema:
    """Return a schema of the same answers, in keywords that the library knows where there are some."""

    def change(inner: Schema) -> Schema:
        for rule in RULES:
            inner = rule(inner)
        return inner

    changed: Schema = change_all(schema, change)
    return changed


def _format(schema: Schema) -> Schema:
    """Drop a format that nobody defined: JSON Schema calls it an annotation."""
    return _without(schema, "format") if schema.get("format", "unknown") not in FORMATS else schema


def _idle(schema: Schema) -> Schema:
    """Drop keywords that have no effect in this schema."""
    idle = {"if"} if not {"then", "else"} & schema.keys() else set()
    if "if" not in schema:
        idle |= {"then", "else"}
    if schema.get("minContains") == 0:
        idle |= {"contains", "minContains"}
    most = schema.get("maxItems")
    if schema.get("uniqueItems") is False or (isinstance(most, int) and most <= 1):
        idle.add("uniqueItems")
    if "unevaluatedProperties" in schema and not _is_combined(schema):
        schema = {"additionalProperties": schema["unevaluatedProperties"], **schema}
        idle.add("unevaluatedProperties")
    if schema.get("unevaluatedProperties") is True:
        idle.add("unevaluatedProperties")
    return _without(schema, *idle) if idle & schema.keys() else schema


def _is_combined(schema: Schema) -> bool:
    return any(name in schema for name in ("$ref", "allOf", "anyOf", "dependentSchemas", "else", "if", "oneOf", "then"))


def _draft_3_and_4(schema: Schema) -> Schema:
    """Read older drafts: exclusive bounds and required as booleans."""
    for side in ("Minimum", "Maximum"):
        flag, bound = f"exclusive{side}", side.lower()
        if isinstance(schema.get(flag), bool):
            exclusive = schema[flag] and bound in schema
            value = schema.get(bound)
            schema = _without(schema, flag)
            if exclusive:
                schema = {**_without(schema, bound), flag: value}
    return _without(schema, "required") if isinstance(schema.get("required"), bool) else schema


def _property_names(schema: Schema) -> Schema:
    """Say which names may come by patterns, or as properties, where no other is named."""
    names = schema.get("propertyNames")
    if not isinstance(names, dict) or schema.get("patternProperties"):
        return schema
    rest = {name: value for name, value in names.items() if name not in ANNOTATIONS | {"type"}}
    values = schema.get("additionalProperties", {})
    properties = schema.get("properties") or {}
    if (
        rest.keys() == {"enum"}
        and isinstance(names["enum"], list)
        and all(isinstance(name, str) for name in rest["enum"])
    ):
        allowed = {name: properties.get(name, values) for name in rest["enum"]}
        return {**_without(schema, "propertyNames"), "properties": allowed, "additionalProperties": False}
    if rest.keys() == {"pattern"} and not properties:
        patterns = {names["pattern"]: values}
        return {**_without(schema, "propertyNames"), "patternProperties": patterns, "additionalProperties": False}
    return _without(schema, "propertyNames") if not rest else schema


def _dependencies(schema: Schema) -> Schema:
    """Say that a property needs others as: it is absent, or the others are there."""
    cases = []
    for keyword in ("dependentRequired", "dependentSchemas", "dependencies"):
        needs = schema.get(keyword)
        if not isinstance(needs, dict) or len(needs) > MAX_CASES:
            continue
        for name, need in needs.items():
            required = [need] if isinstance(need, str) else need
            then: Any = {"required": [name, *required]} if isinstance(required, list) else need
            if isinstance(then, dict):
                with_name = {**then, "required": list(dict.fromkeys([name, *(then.get("required") or [])]))}
                cases.append({"anyOf": [{"properties": {name: False}}, with_name]})
        schema = _without(schema, keyword)
    return _and(schema, *cases)


def _counted_properties(schema: Schema) -> Schema:
    """Say how many of the known properties there must be as alternatives: one at least, or one at most."""
    properties, least, most = schema.get("properties"), schema.get("minProperties", 0), schema.get("maxProperties")
    if not isinstance(properties, dict) or schema.get("additionalProperties") is not False:
        return schema
    if schema.get("patternProperties") or not isinstance(least, int) or len(properties) > MAX_CASES:
        return schema
    if least > len(schema.get("required") or []):
        if least != 1:
            return schema
        schema = _and(schema, {"anyOf": [{"required": [name]} for name in properties]})
    if isinstance(most, int) and most < len(properties):
        if most != 1:
            return schema
        others = [{name: False for name in properties if name != kept} for kept in properties]
        schema = _and(schema, {"anyOf": [{"properties": absent} for absent in others]})
    return _without(schema, "minProperties", "maxProperties")


def _absent(schema: Schema) -> Schema:
    """Say that properties must not all be there as: one of them is absent."""
    excluded = schema.get("not")
    if not isinstance(excluded, dict) or without_annotations(excluded).keys() - {"type"} != {"required"}:
        return schema
    if excluded.get("type", "object") != "object" or not isinstance(excluded["required"], list):
        return schema
    cases = [{"properties": {name: False}} for name in excluded["required"]]
    return _and(_without(schema, "not"), {"anyOf": cases} if len(cases) != 1 else cases[0])


def _conditions(schema: Schema) -> Schema:
    """Say if, then and else as alternatives, one for each set of values of a property with the same consequences."""
    properties = schema.get("properties") or {}
    parts = [schema, *(part for part in schema.get("allOf") or [] if isinstance(part, dict))]
    conditions = [condition for part in parts if (condition := _condition_of(part)) is not None]
    for name in dict.fromkeys(condition.name for condition in conditions):
        known = _values(properties.get(name))
        together = [condition for condition in conditions if condition.name == name]
        if known is None or not together:
            continue
        changed = _without_conditions(schema, together)
        changed = _and(changed, {"anyOf": _cases(name, known, together, name in (schema.get("required") or []))})
        if len(json.dumps(changed)) <= MAX_TEXT_BYTES:  # consequences are repeated, and may hold conditions
            schema = changed
    return schema


@dataclass(frozen=True, slots=True)
class _Condition:
    """An if about the value of one property."""

    part: Schema  # that has it
    name: str
    wanted: list[str]  # JSON texts of the values
    holds_without: bool  # where the property is absent


def _condition_of(part: Schema) -> _Condition | None:
    condition = part.get("if")
    properties = condition.get("properties") if isinstance(condition, dict) else None
    if not isinstance(condition, dict) or not isinstance(properties, dict) or len(properties) != 1:
        return None
    [(name, value)] = properties.items()
    wanted = _values(value)
    if condition.keys() - {"properties", "required", "type"} or wanted is None:
        return None
    if condition.get("required", [name]) != [name] or condition.get("type", "object") != "object":
        return None
    return _Condition(part, name, list(map(json.dumps, wanted)), "required" not in condition)


def _without_conditions(schema: Schema, conditions: list[_Condition]) -> Schema:
    def left_of(part: Any) -> Any:
        has_one = any(condition.part is part for condition in conditions)
        return _without(part, "if", "then", "else") if has_one else part

    changed: Schema = left_of(schema)
    return {**changed, "allOf": list(map(left_of, schema["allOf"]))} if "allOf" in schema else changed


def _cases(name: str, known: list[Any], conditions: list[_Condition], is_required: bool) -> list[Schema]:
    """Return alternatives that together are all objects, each with its consequences."""
    values_of: dict[tuple[bool, ...], list[Any]] = {}
    for value in known:
        text = json.dumps(value)
        values_of.setdefault(tuple(text in condition.wanted for condition in conditions), []).append(value)
    absent: Schema = {"properties": {name: False}}
    without = tuple(condition.holds_without for condition in conditions)
    if not is_required:
        values_of.setdefault(without, [])
    cases = []
    for holds, values in values_of.items():
        case: Schema = {"properties": {name: {"enum": values}}, "required": [name]} if values else absent
        if values and holds == without and not is_required:
            case = {"properties": {name: {"enum": values}}}
        pairs = zip(holds, conditions, strict=True)
        consequences = [condition.part.get("then" if is_held else "else") for is_held, condition in pairs]
        cases.append({"allOf": [case, *(consequence for consequence in consequences if consequence is not None)]})
    return cases


def _values(schema: Any) -> list[Any] | None:
    """Return all values of `schema` if it names them."""
    if not isinstance(schema, dict):
        return None
    if "const" in schema:
        return [schema["const"]]
    if schema.get("type") == "boolean" and "enum" not in schema:
        return [True, False]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None


RULES = (
    _format, _draft_3_and_4, _idle, _property_names, _dependencies, _counted_properties, _absent, _conditions,
)  # fmt: skip


def _without(schema: Schema, *names: str) -> Schema:
    return {name: value for name, value in schema.items() if name not in names}


def _and(schema: Schema, *more: Schema) -> Schema:
    return {**schema, "allOf": [*(schema.get("allOf") or []), *more]} if more else schema


# ---- less than was said ----


def _known(schema: Schema) -> Schema:
    """Return what is left of `schema` without patterns, counts and references to other places."""
    schema = _without(schema, *UNHELD)
    reference = schema.get("$ref")
    return _without(schema, "$ref") if isinstance(reference, str) and not reference.startswith("#") else schema


# ---- together ----


@dataclass(frozen=True, slots=True)
class Form:
    """A way to write a schema."""

    schema: Schema
    note: str = ""  # what an answer may do that the schema forbids
    is_loose: bool = False  # allowed only where the schema is not strict


def forms_of(schema: Any, is_covered: Callable[[str, list[str]], bool]) -> Iterator[Form]:
    """Yield forms of `schema`, from the most exact to the one that is most likely to be held.

    Raises `ValueError` if it is no schema, or too long. is_covered: see `exact`.
    """
    if not isinstance(schema, dict):
        raise ValueError("a JSON schema must be an object")
    plain = without_annotations(schema)
    check_length(len(json.dumps(plain, separators=(",", ":"))))
    plain = exact(plain, is_covered)
    yield Form(with_options(plain))
    try:
        said = rewritten(plain)
    except (AttributeError, TypeError):  # a keyword has a value of the wrong kind: the library has said so
        return
    yield Form(with_options(said))
    yield Form(with_options(said, coerce_one_of=True), "an answer may fit several alternatives of a oneOf")
    if not is_strict(schema):
        left_out = "keywords that the library does not know are left out"
        yield Form(with_options(said, coerce_one_of=True, lenient=True), left_out, is_loose=True)
        known = change_all(said, _known)
        yield Form(with_options(known, coerce_one_of=True, lenient=True), f"{left_out}, patterns too", is_loose=True)


def check_length(length: int) -> None:
    if length > MAX_TEXT_BYTES:
        raise ValueError(f"it has {length} characters without its descriptions, the limit is {MAX_TEXT_BYTES}")
