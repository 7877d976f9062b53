"""Test JSON schemas beyond what the grammar library takes as they are: the same answers, or a reason at once."""

import json
import logging
import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from engine.errors import InvalidRequest
from engine.text.grammar import GrammarCompiler
from engine.text.schemas import FORMATS
from engine.text.tokenizer import Tokenizer

EOS = 2
FLAGS = {"a": {"type": "boolean"}, "b": {"type": "boolean"}}


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Tokenizer:
    return Tokenizer.load(tiny_llama)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    specials = tokenizer.backend.special_tokens
    return GrammarCompiler(tokenizer.to_json(), tokenizer.vocab_size, (EOS,), specials, tokenizer.token_bytes)


def is_allowed(compiler: GrammarCompiler, tokenizer: Tokenizer, schema: Any, value: Any) -> bool:
    """Return whether an answer under the schema may be `value`, keys in its order."""
    matcher = compiler.compile("json_schema", json.dumps(schema)).start.deep_copy()
    text = json.dumps(value, separators=(",", ":"))
    return all(map(matcher.consume_token, tokenizer.encode(text, False))) and matcher.is_accepting()


def tag_of(*schemas: Any) -> str:
    """Return a structural tag of calls, a schema each, named tools[i]."""
    contents = [
        {"type": "json_schema", "json_schema": schema, "field": f"tools[{i}]"} for i, schema in enumerate(schemas)
    ]
    tags = [{"type": "tag", "begin": f"<{i}>", "content": content, "end": ";"} for i, content in enumerate(contents)]
    return json.dumps({"type": "structural_tag", "format": {"type": "or", "elements": tags}})


# ---- said in other words ----

SAME: dict[str, tuple[dict[str, Any], list[Any], list[Any]]] = {
    "an unknown format": ({"type": "string", "format": "binary"}, ["", "x"], [1]),
    "a named type of integer": ({"type": "integer", "format": "int64"}, [1], ["1"]),
    "a pattern for names that are all there": (
        {"properties": FLAGS, "patternProperties": {"^[ab]$": {}}, "additionalProperties": False, "type": "object"},
        [{}, {"a": True}, {"a": True, "b": False}],
        [{"c": True}, {"a": 1}],
    ),
    "a pattern that says more of a name": (
        {"type": "object", "properties": {"a": {}}, "patternProperties": {"^a$": {"type": "boolean"}}},
        [{"a": True}],
        [{"a": 1}],
    ),
    "exclusive bounds of draft 4": ({"type": "integer", "minimum": 3, "exclusiveMinimum": True}, [4, 50], [2, 3]),
    "property names by pattern": (
        {"type": "object", "propertyNames": {"pattern": "^k[0-9]$"}, "additionalProperties": {"type": "integer"}},
        [{}, {"k1": 1, "k2": 2}],
        [{"k": 1}, {"k1": "x"}],
    ),
    "property names by list": (
        {"type": "object", "propertyNames": {"enum": ["x", "y"]}, "additionalProperties": {"type": "integer"}},
        [{}, {"x": 1}, {"x": 1, "y": 2}],
        [{"z": 1}, {"x": "1"}],
    ),
    "a dependency on properties": (
        {"type": "object", "properties": FLAGS, "dependentRequired": {"a": ["b"]}, "additionalProperties": False},
        [{}, {"b": True}, {"a": True, "b": True}],
        [{"a": True}],
    ),
    "a dependency of draft 4": (
        {"type": "object", "properties": FLAGS, "dependencies": {"a": ["b"]}, "additionalProperties": False},
        [{}, {"b": True}, {"a": True, "b": True}],
        [{"a": True}],
    ),
    "one property at least": (
        {"type": "object", "properties": FLAGS, "minProperties": 1, "additionalProperties": False},
        [{"a": True}, {"b": True}, {"a": True, "b": True}],
        [{}],
    ),
    "one property exactly": (
        {"type": "object", "properties": FLAGS, "minProperties": 1, "maxProperties": 1, "additionalProperties": False},
        [{"a": True}, {"b": True}],
        [{}, {"a": True, "b": True}],
    ),
    "properties not together": (
        {"type": "object", "properties": FLAGS, "not": {"required": ["a", "b"]}, "additionalProperties": False},
        [{}, {"a": True}, {"b": True}],
        [{"a": True, "b": True}],
    ),
    "a condition on a property": (
        {
            "type": "object",
            "properties": {"kind": {"enum": ["x", "y"]}, "size": {"type": "integer"}},
            "if": {"properties": {"kind": {"const": "x"}}, "required": ["kind"]},
            "then": {"required": ["size"]},
            "else": {"properties": {"size": False}},
            "additionalProperties": False,
        },
        [{"kind": "x", "size": 1}, {"kind": "y"}, {}],
        [{"kind": "x"}, {"kind": "y", "size": 1}, {"size": 1}],
    ),
    "conditions in an allOf": (
        {
            "type": "object",
            "properties": {"kind": {"enum": ["x", "y", "z"]}, "size": {"type": "integer"}},
            "required": ["kind"],
            "allOf": [
                {"if": {"properties": {"kind": {"const": "x"}}}, "then": {"required": ["size"]}},
                {"if": {"properties": {"kind": {"enum": ["y"]}}}, "then": {"properties": {"size": False}}},
            ],
            "additionalProperties": False,
        },
        [{"kind": "x", "size": 1}, {"kind": "y"}, {"kind": "z"}, {"kind": "z", "size": 1}],
        [{"kind": "x"}, {"kind": "y", "size": 1}],
    ),
    "no property but these": (
        {"type": "object", "properties": FLAGS, "unevaluatedProperties": False},
        [{"a": True}],
        [{"c": True}],
    ),
    "an if without consequences": ({"type": "integer", "if": {"minimum": 3}}, [1, 5], ["x"]),
    "at most one item, once": ({"type": "array", "items": {}, "maxItems": 1, "uniqueItems": True}, [[], [1]], [[1, 1]]),
    "a oneOf of overlapping objects": (
        {
            "oneOf": [
                {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
                {"type": "object"},
            ]
        },
        [{"a": True}, {}, {"c": 1}],
        [1],
    ),
    "values that look like schemas": (
        {"enum": [{"title": "x", "format": "binary"}]},
        [{"title": "x", "format": "binary"}],
        [{}],
    ),
    "properties named like keywords": (
        {"type": "object", "properties": {"title": {"type": "integer"}, "format": {"type": "integer"}}},
        [{"title": 1, "format": 2}],
        [{"title": "x"}],
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_a_schema_that_the_library_does_not_know_is_held_in_other_words(
    compiler: GrammarCompiler, tokenizer: Tokenizer, name: str
) -> None:
    schema, right, wrong = SAME[name]
    for value in right:
        assert is_allowed(compiler, tokenizer, schema, value), value
    for value in wrong:
        assert not is_allowed(compiler, tokenizer, schema, value), value
        if "oneOf" not in schema:
            assert not jsonschema.Draft202012Validator(schema).is_valid(value) or "draft 4" in name


def test_the_library_knows_the_formats_that_are_kept(compiler: GrammarCompiler) -> None:
    for format_ in FORMATS:
        form, _ = compiler._first_held({"type": "string", "format": format_})
        assert form["format"] == format_


def test_a_oneof_that_is_held_as_anyof_is_noted(compiler: GrammarCompiler, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    compiler.compile("json_schema", json.dumps({"oneOf": [{"const": "a"}, {"const": "b"}]}))
    assert not caplog.messages, "these are proven to be disjoint"
    compiler.compile("json_schema", json.dumps({"oneOf": [{"type": "integer"}, {"type": "number"}]}))
    assert "oneOf" in caplog.text


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("closed", [{}, {"additionalProperties": False}])
def test_patterns_for_names_that_are_all_there_never_fail_an_answer(
    compiler: GrammarCompiler, tokenizer: Tokenizer, seed: int, closed: dict[str, Any]
) -> None:
    schema = {"type": "object", "properties": FLAGS, "patternProperties": {"^(a|b)$": {}}, "required": ["a"], **closed}
    matcher: Any = compiler.compile("json_schema", json.dumps(schema)).start.deep_copy()
    choice = random.Random(seed)
    for _ in range(60):
        mask = matcher.compute_bitmask()
        assert not matcher.is_error(), matcher.get_error()
        tokens = [token for token in range(tokenizer.vocab_size) if mask[token // 8] >> token % 8 & 1]
        matcher.consume_token(choice.choice(tokens))
        if matcher.is_stopped():
            break


# ---- numbers ----


def test_bounds_of_integers_beyond_doubles_are_kept(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    big = 2**53 + 1
    for schema, wrong in (
        ({"minimum": big}, [big - 1, big - 2, 0]),
        ({"maximum": big}, [big + 1, big + 2]),
        ({"exclusiveMinimum": big - 1}, [big - 1]),
        ({"minimum": -(2**63), "maximum": 2**63 - 1}, [2**63, -(2**63) - 1, 10**20]),
        ({"minimum": 0, "maximum": 2**64 - 1}, [-1, 2**64, 10**30]),
        ({"minimum": 2**60 + 1}, [2**60, 1]),
    ):
        allowed = 2**60 + 2**20 if wrong != [big + 1, big + 2] else 2**50
        assert is_allowed(compiler, tokenizer, {"type": "integer", **schema}, allowed)
        for value in wrong:
            assert not is_allowed(compiler, tokenizer, {"type": "integer", **schema}, value), (schema, value)


def test_large_bounds_of_numbers_stay(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    assert is_allowed(compiler, tokenizer, {"type": "number", "maximum": 1e300}, 10**18)
    assert not is_allowed(compiler, tokenizer, {"type": "number", "maximum": 2**53 + 1}, 2**53 + 2)


def test_an_integer_that_would_be_rounded_is_refused(compiler: GrammarCompiler) -> None:
    for schema in ({"const": 2**53 + 1}, {"enum": [1, 2**53 + 1]}, {"type": "integer", "minimum": 2**64}):
        with pytest.raises(InvalidRequest, match=r"9007199254740993|18446744073709551616"):
            compiler.compile("json_schema", json.dumps(schema))


# ---- less than was said ----


def test_a_refusal_says_what_to_do_and_a_schema_that_is_not_strict_needs_none(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    for schema in (
        {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
        {"type": "array", "items": {"type": "integer"}, "contains": {"const": 1}},
        {"type": "array", "items": {"type": "integer", "not": {"const": 5}}},
        {"type": "array", "items": {"type": "integer", "allOf": [{"$ref": "https://example.com/x"}]}},
        {
            "type": "array",
            "items": {"type": "integer"},
            "$defs": {"x": {"pattern": "(?=a)"}},
            "prefixItems": [{"$ref": "#/$defs/x"}],
        },
    ):
        with pytest.raises(InvalidRequest, match='"x-strict": false') as caught:
            compiler.compile("json_schema", json.dumps(schema))
        assert "coerce_one_of" not in str(caught.value)
        loose = {**schema, "x-strict": False}
        assert is_allowed(compiler, tokenizer, loose, [1, 1])
        assert not is_allowed(compiler, tokenizer, loose, {"a": 1})


def test_one_bad_schema_among_fifty_spoils_no_other(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    good = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    for bad in ({"type": "object", "$ref": "#/missing"}, {"type": "object", "properties": {"a": {"type": "nonsense"}}}):
        tag = tag_of(*[{**good, "x-strict": False}] * 25, {**bad, "x-strict": False}, *[good] * 24)
        matcher = compiler.compile("structural_tag", tag).start
        for text, is_right in (
            ('<0>{"a":true};', True),
            ('<49>{"a":true};', True),
            ('<49>{"a":1};', False),
            ('<25>{"b":[1]};', True),
            ("<25>[];", False),
        ):
            following = matcher.deep_copy()
            consumed = all(map(following.consume_token, tokenizer.encode(text, False)))
            assert (consumed and following.is_accepting()) == is_right, text
        with pytest.raises(InvalidRequest) as caught:
            compiler.compile("structural_tag", tag_of(good, bad))
        assert caught.value.field == "tools[1]"
        assert str(caught.value).startswith("tools[1] cannot be used: ")
        assert "%json" not in str(caught.value) and "part_" not in str(caught.value)


def test_descriptions_do_not_count_towards_the_longest_schema(compiler: GrammarCompiler) -> None:
    told = {"type": "object", "properties": {"a": {"type": "string", "description": "x" * 100_000}}}
    compiler.compile("json_schema", json.dumps(told))
    compiler.compile("structural_tag", tag_of(told, told))
    compiler.find("json_schema", json.dumps(told))


# ---- what would fail late ----


def test_a_choice_may_have_thousands_of_words(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    words = [f"w{i}" for i in range(7000)]
    matcher = compiler.compile("choice", json.dumps(words)).start
    for word, is_right in (("w6999", True), ("w70", True), ("w7000", False), ("", False)):
        following = matcher.deep_copy()
        consumed = all(map(following.consume_token, tokenizer.encode(word, False)))
        assert (consumed and following.is_accepting()) == is_right, word


def test_a_grammar_with_too_many_alternatives_is_refused_at_once(compiler: GrammarCompiler) -> None:
    with pytest.raises(InvalidRequest, match="max is 2000"):
        compiler.compile("ebnf", "start: " + " | ".join(f'"w{i}"' for i in range(5000)))
