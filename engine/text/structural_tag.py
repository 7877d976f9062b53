"""Translate structural tags, which say where in a free text constrained parts stand, to Lark grammars.

They are SGLang's and xgrammar's. Two shapes: the older
{"structures": [{"begin", "schema", "end"}], "triggers": [...]}, and {"type": "structural_tag", "format": {...}}, whose
formats nest.
"""

import json
import logging
import re
from collections.abc import Callable
from typing import Any

from engine.text.lark import ANY_STRING, ended_rules, escaped_rules, plain_rules

logger = logging.getLogger(__name__)

LARK, LARK_STRING = "lark", "lark_string"
"""Formats of a text by a client's grammar in `definition`: a tag's content as it stands, a JSON string's inside."""
MAX_DEPTH = 32
ANY_TEXT = r"/(.|\n)*/"


def structural_tag_to_lark(
    tag: Any,
    special_tokens: dict[str, int],
    form_of: Callable[[Any, str], dict[str, Any]],
    check_lark: Callable[[str, str], None],
) -> str:
    """Return `tag` as a grammar in llguidance's Lark. Raises `ValueError` if it cannot be one.

    special_tokens: text -> id of the tokens that are no text to the tokenizer; literals may hold them. form_of: return
    a JSON schema as the library is to read it, given the schema and its format's `field`, the client's name of it.
    check_lark: raise an error that names the field if the library does not take a grammar, given both.
    """
    if not isinstance(tag, dict):
        raise ValueError("a structural tag must be an object")
    if "structures" in tag:
        tags = [
            {
                "begin": _text(structure, "begin"),
                "content": {"type": "json_schema", "json_schema": structure.get("schema", {})},
                "end": _text(structure, "end"),
            }
            for structure in _list(tag, "structures")
        ]
        tag = {"format": {"type": "triggered_tags", "triggers": _list(tag, "triggers"), "tags": tags}}
    if "format" not in tag:
        raise ValueError("a structural tag needs format, or structures and triggers")
    writer = _Writer(special_tokens, form_of, check_lark)
    start = writer.write(tag["format"])
    return "\n".join(["%llguidance {}", f"start: {start}", *writer.rules])


def _text(format: Any, name: str) -> str:
    value = format.get(name) if isinstance(format, dict) else None
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string")
    return value


def _list(format: dict[str, Any], name: str) -> list[Any]:
    value = format.get(name)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} must be a non-empty list")
    return value


class _Writer:
    """Collect the rules of formats; `write` returns the expression that stands for one."""

    def __init__(
        self,
        special_tokens: dict[str, int],
        form_of: Callable[[Any, str], dict[str, Any]],
        check_lark: Callable[[str, str], None],
    ) -> None:
        self.rules: list[str] = []
        self._special_tokens, self._form_of, self._check_lark = special_tokens, form_of, check_lark
        names = sorted(filter(None, special_tokens), key=len, reverse=True)
        self._specials = re.compile("|".join(map(re.escape, names))) if names else None
        self._depth = 0
        self._formats: dict[str, Callable[[dict[str, Any]], str]] = {
            "const_string": lambda format: self._literal(_text(format, "value")),
            "json_schema": lambda format: f"%json {self._schema(format)}",
            "any_text": lambda _: ANY_TEXT,
            "regex": lambda format: f"/{self._pattern(_text(format, 'pattern'))}/",
            "sequence": lambda format: " ".join(map(self.write, _list(format, "elements"))),
            "or": lambda format: " | ".join(map(self.write, _list(format, "elements"))),
            "tag": self._tag,
            "triggered_tags": self._triggered_tags,
            "tags_with_separator": self._tags_with_separator,
            LARK_STRING: lambda format: self._held(format, escaped_rules) or ANY_STRING,
        }

    def write(self, format: Any) -> str:
        """Add a rule for `format` and return its name."""
        kind = format.get("type") if isinstance(format, dict) else None
        if kind not in self._formats:
            raise ValueError(f"a format's type must be one of {', '.join(self._formats)}, got {kind!r}")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ValueError(f"formats may nest {MAX_DEPTH} deep")
        body = self._formats[kind](format)
        self._depth -= 1
        return self._rule(body)

    def _rule(self, body: str, attributes: str = "") -> str:
        name = f"part_{len(self.rules)}"
        self.rules.append(f"{name}{attributes}: {body}")
        return name

    def _schema(self, format: dict[str, Any]) -> str:
        schema = format.get("json_schema")
        if not isinstance(schema, dict):
            raise ValueError("json_schema must be an object")
        return json.dumps(self._form_of(schema, str(format.get("field", ""))))

    @staticmethod
    def _pattern(pattern: str) -> str:
        return re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", pattern).replace("\n", r"\n")

    def _literal(self, text: str) -> str:
        """Return an expression for `text`, special tokens by id: the tokenizer has other bytes for them."""
        parts = []
        position = 0
        for found in self._specials.finditer(text) if self._specials else ():
            parts += [json.dumps(text[position : found.start()]), f"<[{self._special_tokens[found[0]]}]>"]
            position = found.end()
        parts.append(json.dumps(text[position:]))
        return " ".join(part for part in parts if part != '""') or '""'

    def _text_until(self, end: str) -> str:
        """Return an expression for any text up to and including the first `end`."""
        if not end:
            return ANY_TEXT
        found = self._specials.match(end) if self._specials else None
        if found:  # no text can hold a special token, so the text ends where one stands
            return f"{ANY_TEXT} {self._literal(end)}"
        return self._rule(f"{ANY_TEXT} {json.dumps(end)}", "[lazy]")

    def _tag(self, tag: dict[str, Any]) -> str:
        return f"{self._literal(_text(tag, 'begin'))} {self._after_begin(tag)}"

    def _after_begin(self, tag: dict[str, Any]) -> str:
        content, end = tag.get("content"), _text(tag, "end")
        if isinstance(content, dict) and content.get("type") == "any_text":
            return self._text_until(end)
        if isinstance(content, dict) and content.get("type") == LARK:
            return self._lark_until(content, end)
        return f"{self.write(content)} {self._literal(end)}"

    def _lark_until(self, format: dict[str, Any], end: str) -> str:
        """Return an expression for a text of a grammar up to and including `end`."""
        if not end or (self._specials and self._specials.match(end)):
            held = self._held(format, plain_rules)
            return f"{held} {self._literal(end)}" if held else self._text_until(end)
        return self._held(format, lambda grammar, prefix: ended_rules(grammar, end, prefix)) or self._text_until(end)

    def _held(self, format: dict[str, Any], rules_of: Callable[[str, str], list[str]]) -> str:
        """Add the rules of a client's grammar and return their first name; "" if it cannot be held at this place."""
        definition = _text(format, "definition")
        self._check_lark(definition, str(format.get("field", "")))
        try:
            rules = rules_of(definition, f"text_{len(self.rules)}")
        except ValueError as error:
            logger.info("a tool's grammar is not enforced: %s", error)
            return ""
        self.rules += rules
        return re.split(r"\W", rules[0])[0]

    def _triggered_tags(self, format: dict[str, Any]) -> str:
        """Return an expression for free text in which each trigger starts one of the tags that begin with it."""
        tags_of: dict[str, list[str]] = {}
        triggers = [trigger for trigger in _list(format, "triggers") if isinstance(trigger, str) and trigger]
        for tag in _list(format, "tags"):
            begin = _text(tag, "begin")
            trigger = next((trigger for trigger in triggers if begin.startswith(trigger)), None)
            if trigger is None:
                raise ValueError(f"tag {begin!r} begins with none of the triggers {triggers}")
            rest = begin[len(trigger) :]
            tags_of.setdefault(trigger, []).append(f"{self._literal(rest)} {self._after_begin(tag)}")
        tagged = self._rule(
            " | ".join(f"{self._text_until(trigger)} ({' | '.join(tags)})" for trigger, tags in tags_of.items())
        )
        how_many = "" if format.get("stop_after_first") else "+"
        tail = "" if format.get("stop_after_first") else ANY_TEXT
        some = f"{tagged}{how_many} {tail}"
        return some if format.get("at_least_one") else f"({some}) | {ANY_TEXT}"

    def _tags_with_separator(self, format: dict[str, Any]) -> str:
        """Return an expression for tags and nothing else but the separator between two of them."""
        tag = self._rule(" | ".join(map(self._tag, _list(format, "tags"))))
        separator = self._literal(_text(format, "separator"))
        some = tag if format.get("stop_after_first") else f"{tag} ({separator} {tag})*"
        return some if format.get("at_least_one") else f"({some})?"
