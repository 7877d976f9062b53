"""Constrain answers with xgrammar: other masks under engine.text.grammar's compiler and matcher.

xgrammar forces no tokens, so there is no jump-forward. It silently ignores many constraints that it cannot enforce:
schemas and patterns with such constraints are found and refused here. As in other engines that use xgrammar, a
structural tag that names a special token lets special tokens into its free texts.
"""

import copy
import json
import re
from collections.abc import Iterator
from typing import Any, Self

import numpy as np
import torch
import xgrammar

from engine.errors import InvalidRequest
from engine.text.grammar import WORD_BITS, GrammarCompiler, MaskFiller
from engine.text.schemas import change_all, is_strict, without_annotations
from engine.text.structural_tag import LARK, LARK_STRING, MAX_DEPTH

KEYWORDS_OF = {
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties", "minProperties", "maxProperties"},
}
EXCLUSIVE = ("$ref", "const", "enum", "anyOf", "allOf")  # xgrammar ignores all other keywords beside one of these
IGNORED = {
    "$dynamicRef", "$recursiveRef", "additionalItems", "contains", "dependencies", "dependentRequired",
    "dependentSchemas", "else", "if", "maxContains", "minContains", "not", "oneOf", "patternProperties",
    "propertyNames", "then", "unevaluatedItems", "unevaluatedProperties",
}  # fmt: skip
"""Keywords that xgrammar does not enforce, or not in every case: oneOf may turn into anyOf."""
CONSTRAINING = set().union(*KEYWORDS_OF.values(), EXCLUSIVE, {"type"})
FORMATS = {
    "date", "date-time", "duration", "hostname", "ipv4", "ipv6", "time", "uri", "uri-reference", "uuid"
}  # fmt: skip
"""String formats that xgrammar knows and that cannot hold a quote, which it would not escape."""
STANDARD_FORMATS = FORMATS | {
    "email", "idn-email", "idn-hostname", "iri", "iri-reference", "json-pointer", "regex", "relative-json-pointer",
    "uri-template",
}  # fmt: skip
"""Formats that JSON Schema defines. Others are annotations."""
MAX_REPEAT = 1000  # repetitions in a pattern: the cost of compiling grows with their square
JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}
PATTERN_PART = re.compile(r"\\.|\[(?:\\.|[^]\\])*]|\(\?.?|.", re.DOTALL)
KNOWN_ESCAPE = re.compile(r"\\(?:[dDwWsSnrtfvxu0]|[^a-zA-Z0-9])")
ANY_STRING = r"([^\x00-\x1f\x22\x5c]|\\([\x22\x5c/bfnrt]|u[0-9a-fA-F]{4}))*"  # a JSON string's inside
CODED = re.compile(r'["\x00-\x1f]|\\[\\nrtfvxu0]')  # characters that a JSON string must or may have to escape


class XGrammarCompiler(GrammarCompiler):
    """Compile constraints for one tokenizer with xgrammar; see `GrammarCompiler`."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._compilers: dict[bool, Any] = {}
        end_mask = np.zeros((self.vocab_size + WORD_BITS - 1) // WORD_BITS, np.uint32)
        for token in self._eos_token_ids:
            end_mask[token // WORD_BITS] |= np.uint32(1 << token % WORD_BITS)
        self._end_mask = torch.from_numpy(end_mask.view(np.int32))

    def new_mask_filler(self, is_pinned: bool) -> "XGrammarMaskFiller":
        return XGrammarMaskFiller(self.vocab_size, is_pinned)

    def _new_matcher(self, kind: str, text: str) -> "XGrammarMatcher":
        try:
            compiled = self._compile(kind, text)
            matcher = XGrammarMatcher(xgrammar.GrammarMatcher(compiled), self._end_mask)
            if not matcher.mask().any():
                raise ValueError("no answer can follow it")
        except RuntimeError as error:  # "[12:30:00] /file.cc:7: Check failed: ... is false: what is wrong"
            raise ValueError(re.sub(r"^\[\S+\] \S+ (Check failed: .*? is false: )?", "", str(error))) from None
        return matcher

    def _compile(self, kind: str, text: str) -> Any:
        if kind == "json_schema":
            return self._compiler(False).compile_grammar(_held_grammar(json.loads(text)))
        if kind == "regex":
            return self._compiler(False).compile_regex(_checked_pattern(text))
        if kind == "ebnf":
            return self._compiler(False).compile_grammar(text)
        if kind == "choice":
            choices = [{"type": "const_string", "value": choice} for choice in json.loads(text)]
            tag: Any = {"format": {"type": "or", "elements": choices}}
            return self._compiler(False).compile_structural_tag(json.dumps(tag))
        tag = _modern_tag(json.loads(text))
        has_specials = any(
            special and special in string for string in _strings(tag) for special in self._special_tokens
        )
        return self._compiler(has_specials).compile_structural_tag(json.dumps(_compiled_parts(tag)))

    def _compiler(self, specials_are_text: bool) -> Any:
        """Return the compiler of either kind, made once.

        Unless special tokens are text, only the end of an answer may be one.
        """
        with self._tokenizer_lock:
            if specials_are_text not in self._compilers:
                pieces = [self._token_bytes(token) for token in range(self.vocab_size)]
                for text, token in self._special_tokens.items():
                    pieces[token] = text.encode() if specials_are_text else b""
                info = xgrammar.TokenizerInfo(
                    pieces, xgrammar.VocabType.RAW, vocab_size=self.vocab_size, stop_token_ids=self._eos_token_ids
                )
                self._compilers[specials_are_text] = xgrammar.GrammarCompiler(info, cache_enabled=False)
            return self._compilers[specials_are_text]


class XGrammarMatcher:
    """Adapt an xgrammar.GrammarMatcher to the methods of an `LLMatcher` that `Matcher` calls."""

    def __init__(self, matcher: Any, end_mask: torch.Tensor) -> None:
        """Wrap `matcher`. end_mask: the mask where only the end of the answer may come."""
        self._matcher, self._end_mask = matcher, end_mask
        self._error = ""
        self._mask: torch.Tensor | None = None

    def deep_copy(self) -> Self:
        return type(self)(self._matcher.fork(), self._end_mask)

    def mask(self) -> torch.Tensor:
        """Return the mask, int32 [vocab_size / 32 rounded up]: a set bit is a token that may come."""
        if self._mask is None:
            self._mask = torch.zeros_like(self._end_mask)
            try:
                self._matcher.fill_next_token_bitmask(self._mask[None])
            except RuntimeError as error:
                self._error = str(error)
        return self._mask

    def consume_token(self, token: int) -> bool:
        self._mask = None
        if not self._matcher.accept_token(token):
            self._error = f"token {token} cannot come here"
        return not self._error

    def compute_ff_tokens(self) -> list[int]:
        return []

    def is_accepting(self) -> bool:
        return bool(self._matcher.is_completed())

    def is_stopped(self) -> bool:
        return self._matcher.is_terminated() or (self.is_accepting() and torch.equal(self.mask(), self._end_mask))

    def is_error(self) -> bool:
        return bool(self._error)

    def get_error(self) -> str:
        return self._error

    def rollback(self, num_tokens: int) -> bool:
        self._mask = None
        self._matcher.rollback(num_tokens)
        return True

    def reset(self) -> bool:
        self._mask = None
        self._matcher.reset()
        return True


class XGrammarMaskFiller(MaskFiller):
    """Collect the token masks of a step; see `MaskFiller`."""

    def _fill(self, grammars: list[tuple[XGrammarMatcher, int]], masks: torch.Tensor) -> None:
        for grammar, i in grammars:
            masks[i] = grammar.mask()


def _schema_grammar(schema: Any) -> Any:
    """Return the grammar of answers to `schema`, without spaces between their parts."""
    if not isinstance(schema, dict):
        raise ValueError("a JSON schema must be an object")
    _check_schema(schema, 0)
    return xgrammar.Grammar.from_json_schema(
        json.dumps(schema), any_whitespace=False, separators=(",", ":"), strict_mode=False
    )


def _held_grammar(schema: Any, field: str | None = None) -> Any:
    """Return the grammar of a schema; if it is not strict, without what cannot be held of it.

    field: what the client calls the schema. Raises `InvalidRequest` that names it.
    """
    schema = without_annotations(schema) if isinstance(schema, dict) else schema
    forms = [schema]
    if isinstance(schema, dict) and not is_strict(schema):
        forms += [change_all(schema, _held), {"type": "object"} if schema.get("type") == "object" else {}]
    reason: Exception | None = None
    for form in forms:
        try:
            return _schema_grammar(copy.deepcopy(form))
        except (RuntimeError, ValueError) as error:
            reason = reason or error
    assert reason is not None
    if field is None:
        raise reason
    raise InvalidRequest(f"{field} cannot be used: {reason}", field) from None


def _held(schema: dict[str, Any]) -> dict[str, Any]:
    """Return `schema` without the keywords that xgrammar ignores, and without those that it may misread."""
    ignored, _ = _ignored_keywords(schema)
    return {name: value for name, value in schema.items() if name not in ignored | {"pattern", "uniqueItems"}}


def _check_schema(schema: Any, depth: int) -> None:
    """Raise `ValueError` for constraints that the library would not enforce; rewrite lengths as patterns, in place.

    The library reads minLength and maxLength itself in a way that admits control characters.
    """
    if not isinstance(schema, dict):
        return
    if schema.get("format", "date") not in STANDARD_FORMATS:
        del schema["format"]
    if depth > MAX_DEPTH:
        raise ValueError(f"schemas may nest {MAX_DEPTH} deep")
    ignored, exclusive = _ignored_keywords(schema)
    if ignored:
        beside = f" beside {exclusive}" if exclusive else ""
        raise ValueError(f"{', '.join(sorted(ignored))}{beside}: xgrammar cannot hold an answer to that")
    if not str(schema.get("$ref", "#")).startswith("#"):
        raise ValueError(f"$ref must be within the schema, got {schema['$ref']}")
    if len(schema.get("allOf", [])) > 1:
        raise ValueError("xgrammar cannot hold an answer to allOf with more than one schema")
    _rewrite_lengths(schema)
    if "pattern" in schema:
        _checked_pattern(schema["pattern"])
        if coded := CODED.search(schema["pattern"]):
            raise ValueError(f"pattern: xgrammar takes no {coded[0]} there, JSON writes it another way")
    for inner in _inner_schemas(schema):
        _check_schema(inner, depth + 1)


def _ignored_keywords(schema: dict[str, Any]) -> tuple[set[str], str | None]:
    """Return (keywords that xgrammar would ignore, the exclusive keyword that makes it ignore them, if any)."""
    ignored = IGNORED & schema.keys()
    if schema.get("uniqueItems"):
        ignored.add("uniqueItems")
    exclusive = next((keyword for keyword in EXCLUSIVE if keyword in schema), None)
    if exclusive is None:
        return ignored | _ignored_of_type(schema), None
    ignored |= CONSTRAINING & schema.keys() - {exclusive}
    if exclusive in ("const", "enum") and _is_typed(schema):
        ignored.discard("type")
    return ignored, exclusive


def _rewrite_lengths(schema: dict[str, Any]) -> None:
    """Replace minLength and maxLength by a pattern: read as they stand, they admit control characters."""
    if {"minLength", "maxLength"} & schema.keys():
        low, high = schema.pop("minLength", 0), schema.pop("maxLength", "")
        if high != "" and low > high:
            raise ValueError(f"minLength {low} is greater than maxLength {high}")
        schema["pattern"] = f"^.{{{low},{high}}}$"


def _ignored_of_type(schema: dict[str, Any]) -> set[str]:
    """Return the keywords that xgrammar would ignore because they do not constrain the schema's type."""
    kinds = schema.get("type")
    if kinds is None:  # guess as the library does
        kinds = ["object"] if "properties" in schema else ["array"] if {"items", "prefixItems"} & schema.keys() else []
    kinds = [kinds] if isinstance(kinds, str) else kinds
    known = set().union(*(KEYWORDS_OF.get(kind, set()) for kind in kinds), {"type"})
    if "number" in kinds or {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"} & schema.keys():
        known.discard("multipleOf")
    ignored = (CONSTRAINING & schema.keys()) - known
    if "pattern" in schema or "format" in schema:
        ignored |= {"minLength", "maxLength"} & schema.keys()
    if "format" in schema and ("pattern" in schema or schema["format"] not in FORMATS):
        ignored.add("format")
    if not set(schema.get("required", [])) <= set(schema.get("properties", {})):
        ignored.add("required")  # names that are no property
    return ignored


def _is_typed(schema: dict[str, Any]) -> bool:
    """Return whether all values of const or enum are of the type that the schema names beside them."""
    kinds = schema.get("type")
    kinds = {kinds} if isinstance(kinds, str) else set(kinds or [])
    if "number" in kinds:
        kinds.add("integer")
    values = [schema["const"]] if "const" in schema else schema["enum"]
    return all(JSON_TYPES.get(type(value), "null") in kinds for value in values)


def _inner_schemas(schema: dict[str, Any]) -> Iterator[Any]:
    for keyword in ("properties", "$defs", "definitions"):
        yield from schema.get(keyword, {}).values()
    for keyword in ("anyOf", "allOf", "prefixItems"):
        yield from schema.get(keyword, [])
    yield schema.get("items")
    yield schema.get("additionalProperties")


def _checked_pattern(pattern: str) -> str:
    """Return the pattern, with "." not matching a line break, as everywhere.

    Raises `ValueError` for syntax that the library misreads.
    """
    for bound in re.findall(r"\d+", "".join(re.findall(r"\{\d*,?\d*}", pattern))):
        if int(bound) > MAX_REPEAT:
            raise ValueError(f"{bound} repetitions or characters, the limit is {MAX_REPEAT}")
    parts = PATTERN_PART.findall(pattern)
    for i, part in enumerate(parts):
        if (part == "^" and i) or (part == "$" and i < len(parts) - 1):
            raise ValueError(f"xgrammar takes {part} only at the {'start' if part == '^' else 'end'} of a pattern")
        if part.startswith("(?") and part != "(?:":
            raise ValueError(f"xgrammar takes no {part} in a pattern (look-around, named groups, flags)")
        for escape in re.findall(r"\\.", part, re.DOTALL):
            if not KNOWN_ESCAPE.fullmatch(escape):
                raise ValueError(f"xgrammar takes no {escape} in a pattern")
    return "".join(r"[^\n]" if part == "." else part for part in parts)


def _modern_tag(tag: Any) -> Any:
    """Return a structural tag in the newer shape."""
    if not isinstance(tag, dict):
        raise ValueError("a structural tag must be an object")
    if "structures" not in tag:
        return tag
    tags = [
        {
            "type": "tag",
            "begin": structure["begin"],
            "content": {"type": "json_schema", "json_schema": structure.get("schema", {})},
            "end": structure["end"],
        }
        for structure in tag["structures"]
    ]
    return {"format": {"type": "triggered_tags", "triggers": tag["triggers"], "tags": tags}}


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def _compiled_parts(format: Any) -> Any:
    """Return a structural tag with its schemas compiled to grammars.

    The library would read a schema inside a tag otherwise than elsewhere.
    """
    if isinstance(format, list):
        return [_compiled_parts(inner) for inner in format]
    if not isinstance(format, dict):
        return format
    if format.get("type") == "json_schema":
        if extra := format.keys() - {"type", "json_schema", "field"}:
            raise ValueError(f"{', '.join(sorted(extra))} of a json_schema format is not supported")
        return {"type": "grammar", "grammar": str(_held_grammar(format.get("json_schema"), format.get("field")))}
    if format.get("type") in (LARK, LARK_STRING):  # the library has no such grammars
        is_string = format["type"] == LARK_STRING
        return {"type": "regex", "pattern": ANY_STRING} if is_string else {"type": "any_text"}
    if format.get("type") == "regex":
        return {**format, "pattern": _checked_pattern(format.get("pattern", ""))}
    return {name: _compiled_parts(inner) for name, inner in format.items()}
