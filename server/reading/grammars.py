"""The form of the answer in an OpenAI body: OpenAI's field, SGLang's and vLLM's, as sampling fields."""

from typing import Any

from engine.errors import InvalidRequest
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
FIELDS = frozenset(("response_format", "structured_outputs", *OWN, *(f"guided_{name}" for name in GUIDED)))


def constraint_of(body: Fields) -> JSON:
    """Return the one sampling field that constrains the answer, or {}. `InvalidRequest` if the body has two of them."""
    if FIELDS.isdisjoint(body.values):
        return {}
    found: dict[str, tuple[str, Any]] = {name: (name, body.get(name)) for name in OWN if body.has(name)}
    if (format := body.object("response_format")) is not None:
        kind = format.one_of("type", FORMATS, "text")
        if kind != "text":
            found["response_format"] = _response_format(kind, format)
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
    if len(found) > 1:
        raise InvalidRequest(f"{' and '.join(found)} contradict each other: give one of them", list(found)[1])
    return dict(found.values())


def _response_format(kind: str, format: Fields) -> tuple[str, Any]:
    if kind == "json_object":
        return "json_schema", ANY_OBJECT
    if kind == "structural_tag":
        return "structural_tag", format.values
    described = format.object("json_schema")
    if described is None:
        format.fail("json_schema", "an object with a schema")
    described.flag("strict")  # whichever it says: the answer always follows the schema
    schema = described.object("schema")
    if schema is None:
        described.fail("schema", "a JSON schema")
    return "json_schema", schema.values
