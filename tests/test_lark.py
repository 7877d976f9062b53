"""Grammars of custom tools: a text has the form that its tool says, wherever it stands in a call."""

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from engine.errors import InvalidRequest
from engine.text.grammar import GrammarCompiler
from engine.text.lark import ended_rules, escaped_rules, lark_of_regex
from engine.text.structural_tag import structural_tag_to_lark

# The shape of the grammar of Codex's patches.
PATCH = r"""
start: begin hunk+ end
begin: "*** Begin Patch" LF
end: "*** End Patch" LF?
hunk: added | changed
added: "*** Add File: " name LF added_line+
changed: "*** Update File: " name LF change?
name: /(.+)/
added_line: "+" /(.*)/ LF -> line
change: (context | changed_line)+
context: ("@@" | "@@ " /(.+)/) LF
changed_line: ("+" | "-" | " ") /(.*)/ LF

%import common.LF
"""
A_PATCH = '*** Begin Patch\n*** Update File: a "b".py\n@@ \\d\t+\n-é\n+\n*** End Patch\n'
SOURCE = "start: line? REST\nline: /\\/\\/ [^\\n]*/ NL\nNL: /\\r?\\n/\nREST: /[\\s\\S]*/"
NESTED = r"""
start: sum
sum: item ("+" item)*
item: INT | quoted | "(" sum ")"
quoted: "\"" /[^"]*/ "\""
%import common.INT
"""
ENDS = ("\n</parameter>\n", "</arg_value>")

CASES: list[tuple[str, list[str], list[str]]] = [  # a grammar, texts of it, texts that are not
    (PATCH, [A_PATCH, A_PATCH.rstrip()], [A_PATCH[4:], A_PATCH.replace("\n-", "\n!"), "*** Begin Patch\n"]),
    (SOURCE, ["// x\nlet a = '\\n\"';\n", ""], []),
    (lark_of_regex(r"[^a-z/\"]+/?"), ['A\n/', "\\é\x01"], ['A"', "a", ""]),
    (r"start: /(?i:n|\n)(?s:.)b/i", ["N\nB", "\n.b"], ["nb", "t.b"]),
    (r"start: /(?s)(?P<x>.)\x0a\u{22}[]\\]+/", ['\t\n"]\\'], ['\t\n"', "\n"]),
    ('start: "a\\n\\"B"i ["\\t".."\\x0b"]', ['A\n"b\n', 'a\n"B'], ["an", 'a\n"Ba']),
    ("start: /[[:cntrl:]]/ | /[\\d&&[^3]\\n]/", ["\x1f", "\n", "2"], ["3", "a"]),
    ("%llguidance {}\n?start: WS ~ 1..2 -> x // no\n  | CNAME{2} # no\n%import common (WS, CNAME)",
     [" \t\n", "ab"], ["a"]),
    ('start: A | B & C\nA: "a" "b"*\nB: /[xy]/\nC: /[yz]/', ["abb", "y"], ["x", "b"]),
]  # fmt: skip


def accepts(rules: list[str], text: str, after: str = "") -> bool:
    """Return whether what `rules` say, the first of them, and then `after`, is `text`."""
    name = rules[0].split(":")[0].split("[")[0]
    grammar = "\n".join([f"start: {name} {json.dumps(after)}" if after else f"start: {name}", *rules])
    matcher = LLMatcher(LLTokenizer("byte"), LLMatcher.grammar_from_lark(grammar), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    data = list(text.encode())
    return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()


def escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


@pytest.mark.parametrize(("grammar", "right", "wrong"), CASES)
def test_an_escaped_grammar_accepts_the_escaped_texts_and_no_others(
    grammar: str, right: list[str], wrong: list[str]
) -> None:
    rules = escaped_rules(grammar, "x")
    assert all(accepts(rules, escaped(text) + '"', '"') for text in right)
    assert not any(accepts(rules, escaped(text) + '"', '"') for text in wrong)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize(("grammar", "right", "wrong"), CASES)
def test_a_text_ends_with_the_first_mark_after_it(grammar: str, right: list[str], wrong: list[str], end: str) -> None:
    rules = ended_rules(grammar, end, "x")
    assert all(accepts(rules, f"{text}{end}.", ".") for text in right)
    assert not any(accepts(rules, f"{text}{end}.", ".") for text in [*wrong, f"{right[0]}{end}"])


def test_rules_that_refer_to_themselves_are_held_in_json_and_not_elsewhere() -> None:
    rules = escaped_rules(NESTED, "x")
    assert accepts(rules, escaped('(1+"a\n")+23') + '"', '"')
    assert not accepts(rules, escaped('(1+"a\n"+23') + '"', '"')
    with pytest.raises(ValueError, match="refers to itself"):
        ended_rules(NESTED, "</x>", "x")


@pytest.mark.parametrize(
    "grammar",
    [
        'start: A\nA: "a" ~"b"', "start: %json {}", 'start: A B\nA: "a"\nB: "b"\n%ignore " "', "start: <|end|>",
        "start: x\nx[lazy]: /a/", "start: /a/x", 'start: e\ne: "(" e ")" | "\\"" /[^"]*/ "\\""',
    ],
)  # fmt: skip
def test_what_cannot_be_held_is_said_and_never_misread(grammar: str) -> None:
    with pytest.raises(ValueError):
        escaped_rules(grammar, "x")


def test_what_a_masked_choice_of_bytes_writes_is_a_text_of_the_grammar() -> None:
    """Draw answers at random: what masks let through is JSON of a text that the client's own grammar accepts."""
    rules = escaped_rules(PATCH, "x")
    tokenizer = LLTokenizer("byte")
    grammar = LLMatcher.grammar_from_lark("\n".join(['start: "{" x_start "}"', *rules]))
    plain = LLMatcher.grammar_from_lark(PATCH)
    for seed in range(5):
        drawn = bytes(drawn_bytes(LLMatcher(tokenizer, grammar, log_level=0), random.Random(seed)))
        text = json.loads(b'"' + drawn[1:-1] + b'"').encode()
        matcher = LLMatcher(tokenizer, plain, log_level=0)
        assert matcher.try_consume_tokens(list(text)) == len(text) and matcher.is_accepting()


def drawn_bytes(matcher: Any, rng: random.Random) -> Iterator[int]:
    while not matcher.is_stopped():
        mask = matcher.compute_bitmask()
        allowed = [code for code in range(0x80) if mask[code // 8] >> code % 8 & 1]
        if not allowed:
            return
        code = ord("\\") if ord("\\") in allowed and rng.random() < 0.5 else rng.choice(allowed)
        matcher.consume_token(code)
        yield code


def test_a_broken_grammar_is_refused_by_the_clients_name_of_it() -> None:
    compiler = GrammarCompiler(None, 256, [255], {}, lambda _: b"")
    compiler._made_tokenizer = LLTokenizer("byte")
    for definition in ("start: nope", 'start: "a" }\nb: "c"', "x" * 70_000):
        tag = {"format": {"type": "lark_string", "definition": definition, "field": "tools[1].format.definition"}}
        with pytest.raises(InvalidRequest) as caught:
            compiler.compile("structural_tag", json.dumps(tag))
        assert caught.value.field == "tools[1].format.definition" and "schema" not in str(caught.value)


def test_what_cannot_be_held_is_any_text_of_its_place() -> None:
    def nothing(*_: Any) -> Any:
        return {}

    content = {"type": "lark", "definition": NESTED}
    formats = (
        ({"type": "tag", "begin": "<", "content": content, "end": "</"}, "<any\n</"),
        ({"type": "lark_string", "definition": "start: /a/x"}, r"any\u00e9 \""),
    )
    for format_, text in formats:
        grammar = LLMatcher.grammar_from_lark(structural_tag_to_lark({"format": format_}, {}, nothing, nothing))
        matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0)
        data = list(text.encode())
        assert matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()


def test_with_xgrammar_a_text_is_any_of_its_place() -> None:
    pytest.importorskip("xgrammar")
    from engine.text.xgrammar import XGrammarCompiler

    compiler = XGrammarCompiler(None, 257, [256], {}, lambda token: bytes([token]) if token < 256 else b"")
    string = {"type": "lark_string", "definition": 'start: "a"', "field": "x"}
    quote = {"type": "const_string", "value": '"'}
    formats: list[tuple[Any, str, bool]] = [
        ({"type": "sequence", "elements": [quote, string, quote]}, r'"any \n \" text"', True),
        ({"type": "sequence", "elements": [quote, string, quote]}, '"a"b"', False),
        ({"type": "tag", "begin": "<p>", "content": {**string, "type": "lark"}, "end": "</p>"}, "<p>any\n</p>", True),
    ]
    for format_, text, is_right in formats:
        grammar = compiler.compile("structural_tag", json.dumps({"type": "structural_tag", "format": format_}))
        matcher = grammar.start.deep_copy()
        assert (all(map(matcher.consume_token, text.encode())) and matcher.is_accepting()) == is_right
