"""The form of the answer in an OpenAI body: OpenAI's field, SGLang's and vLLM's, as sampling fields."""

from typing import Any

from engine.declared import Object, convert
from engine.errors import InvalidRequest
from engine.text.schemas import NOT_STRICT
from server.reading.openai_body import GUIDED, OWN_CONSTRAINTS, STRUCTURED_OUTPUTS, OpenAIFields, ResponseFormat
from server.reading.protocol import JSON

ANY_OBJECT = {"type": "object"}
IN_FORMAT = ("response_format.schema", "response_format.json_schema.schema")
ALONE = OWN_CONSTRAINTS | GUIDED


def constraint_of(body: OpenAIFields) -> JSON:
    """Return the one sampling field that constrains the answer, or {}. `InvalidRequest` if the body has two of them."""
    found = _found(body)
    if len(found) > 1:
        names = [name if name not in IN_FORMAT else "response_format" for name in found]
        raise InvalidRequest(f"{' and '.join(names)} contradict each other: give one of them", names[1])
    return dict(found.values())


def names_of_constraint(body: OpenAIFields) -> dict[str, str]:
    """Return the sampling field that `constraint_of` makes, and what the client calls it."""
    return {ours: theirs for theirs, (ours, _) in _found(body).items()}


def names_beside_format(body: Object) -> dict[str, str]:
    """Return the sampling fields of the constraints beside an API's own, and what the client calls each."""
    names = {ALONE[name]: name for name in body.given(ALONE)}
    for outputs in body.given(("structured_outputs",)).values():
        names |= {STRUCTURED_OUTPUTS[name]: f"structured_outputs.{name}" for name in outputs.given(STRUCTURED_OUTPUTS)}
    return names


def _found(body: OpenAIFields) -> dict[str, tuple[str, Any]]:
    """Return the client's name -> (sampling field, value) of each constraint in the body."""
    alone = body.given(ALONE)
    if not alone and body.response_format is None and body.structured_outputs is None:
        return {}
    found = {name: (ALONE[name], value) for name, value in alone.items() if name in OWN_CONSTRAINTS}
    if body.response_format is not None:
        format_ = convert(body.response_format, ResponseFormat, "response_format")
        if format_.type != "text":
            name, field, value = _response_format(format_, body.response_format)
            found[name] = field, value
    if (outputs := body.structured_outputs) is not None:
        for name, value in outputs.given(STRUCTURED_OUTPUTS).items():
            found[f"structured_outputs.{name}"] = STRUCTURED_OUTPUTS[name], value
        if outputs.json_object:
            found["structured_outputs.json_object"] = "json_schema", ANY_OBJECT
    return found | {name: (ALONE[name], value) for name, value in alone.items() if name in GUIDED}


def _response_format(format_: ResponseFormat, written: JSON) -> tuple[str, str, Any]:
    """Return (the client's name, the sampling field, its value) of a `response_format`."""
    if format_.type == "structural_tag":
        return "response_format", "structural_tag", written
    described = format_.json_schema
    schema = format_.schema if described is None else described.schema
    if format_.type == "json_object":  # with a schema, as llama.cpp's clients and others send it
        return IN_FORMAT[0], "json_schema", {**ANY_OBJECT, **(schema or {})}
    if schema is None:
        field = "response_format.json_schema" if described is None else IN_FORMAT[1]
        raise InvalidRequest(f"{field} must be a JSON schema, got None", field)
    is_strict = (described or format_).strict
    # Unless the client says that it need not be: the answer always follows all of the schema.
    return (
        IN_FORMAT[described is not None],
        "json_schema",
        {**schema, NOT_STRICT: False} if is_strict is False else schema,
    )
