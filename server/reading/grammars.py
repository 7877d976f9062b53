"""The form of the answer in an OpenAI body: OpenAI's field, SGLang's and vLLM's, as sampling fields."""

from typing import Any

from engine.errors import InvalidRequest
from engine.text.schemas import NOT_STRICT
from server.reading.protocol import JSON, Fields, refuse

ANY_OBJECT = {"type": "object"}
FORMATS = ("text", "json_object", "json_schema", "structural_tag")
# vLLM's names within `structured_outputs`, and before that `guided_...`, under the engine's.
STRUCTURED_OUTPUTS = {
    "json": "json_schema",
    "regex": "regex",
    "choice": "choice",
    "grammar": "ebnf",
    "structural_tag": "structural_tag",
}
GUIDED = ("json", "regex", "choice", "grammar")
OWN = ("json_schema", "regex", "ebnf", "structural_tag")  # SGLang's extra fields, which have the engine's names
IN_FORMAT = ("response_format.schema", "response_format.json_schema.schema")
FIELDS = frozenset(("response_format", "structured_outputs", *OWN, *(f"guided_{name}" for name in GUIDED)))


def constraint_of(body: Fields) -> JSON:
    """Return the one sampling field that constrains the answer, or {}. `InvalidRequest` if the body has two of them."""
    found = _found(body)
    if len(found) > 1:
        names = [name if name not in IN_FORMAT else "response_format" for name in found]
        raise InvalidRequest(f"{' and '.join(names)} contradict each other: give one of them", names[1])
    return dict(found.values())


def names_of_constraint(body: Fields) -> dict[str, str]:
    """Return the sampling field that `constraint_of` makes, and what the client calls it."""
    return {ours: theirs for theirs, (ours, _) in _found(body).items()}


def _found(body: Fields) -> dict[str, tuple[str, Any]]:
    """Return the client's name -> (sampling field, value) of each constraint in the body."""
    if FIELDS.isdisjoint(body.values):
        return {}
    found: dict[str, tuple[str, Any]] = {name: (name, body.get(name)) for name in OWN if body.has(name)}
    if (format := body.object("response_format")) is not None:
        kind = format.one_of("type", FORMATS, "text")
        if kind != "text":
            name, field, value = _response_format(kind, format)
            found[name] = field, value
    if (outputs := body.object("structured_outputs")) is not None:
        for theirs, ours in STRUCTURED_OUTPUTS.items():
            if outputs.has(theirs):
                found[f"structured_outputs.{theirs}"] = ours, outputs.get(theirs)
        refuse(outputs, ("whitespace_pattern", "disable_additional_properties"))
        if outputs.flag("json_object"):
            found["structured_outputs.json_object"] = "json_schema", ANY_OBJECT
    for theirs in GUIDED:
        if body.has(f"guided_{theirs}"):
            found[f"guided_{theirs}"] = STRUCTURED_OUTPUTS[theirs], body.get(f"guided_{theirs}")
    return found


def _response_format(kind: str, format: Fields) -> tuple[str, str, Any]:
    """Return (the client's name, the sampling field, its value) of a `response_format`."""
    if kind == "structural_tag":
        return "response_format", "structural_tag", format.values
    described = format.object("json_schema")
    schema = format.object("schema") if described is None else described.object("schema")
    if kind == "json_object":  # with a schema, as llama.cpp's clients and others send it
        schema = schema or Fields({})
        return IN_FORMAT[0], "json_schema", {**ANY_OBJECT, **schema.values}
    if schema is None:
        (format if described is None else described).fail(
            "json_schema" if described is None else "schema", "a JSON schema"
        )
    is_strict = (described or format).get("strict")
    (described or format).flag("strict")
    name = IN_FORMAT[described is not None]
    # Unless the client says that it need not be: the answer always follows all of the schema.
    return name, "json_schema", {**schema.values, NOT_STRICT: False} if is_strict is False else schema.values
