"""Put a client's grammar of a text where that text stands in an answer.

Most models write the text as a JSON string: a line break is a backslash and an n there. Escaping changes each character
on its own, and no character's escape begins another's. So the grammar of the escaped text is that of the text with each
literal, and each character of each regular expression, escaped.

The library reads terminals greedily and never goes back. So terminals must not begin alike where one may end, as
escapes do. Hence rules that do not refer to themselves become terminals, mostly all of them: one terminal has no such
places within it.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from llguidance import LLMatcher, LLTokenizer

Token = tuple[str, str]  # its kind, its text

TOKEN = re.compile(
    r"""(?P<space>[^\S\n]+|//[^\n]*|\#[^\n]*)
    |(?P<newline>\n)
    |(?P<import>%import\s+common\.\w+(?:\s*->\s*\w+)?|%import\s+common\s*\([^)]*\))
    |(?P<options>%llguidance\s*\{[^}]*\})
    |(?P<alias>->\s*\w+)
    |(?P<range>"(?:\\.|[^"\\\n])+"\s*\.\.\s*"(?:\\.|[^"\\\n])+")
    |(?P<string>"(?:\\.|[^"\\\n])*"i?)
    |(?P<regex>/(?:\\.|[^/\\\n])+/[a-z]*)
    |(?P<repeat>~\s*\d+(?:\s*\.\.\s*\d+)?|\{[\d,\s]*\})
    |(?P<name>[?!]?[A-Za-z_][\w-]*)
    |(?P<operator>[:|&()\[\]*+?])
    |(?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)
ATOM = re.compile(  # of a regular expression
    r"""(?P<group>\(\?(?P<flags>[a-zA-Z]*)[:)]|\(\?P?<\w+>|\(\??|\))
    |(?P<repeat>\{[\d,\s]*\})
    |(?P<operator>[|*+?^$])
    |(?P<set>\.|\\[pP](?:\{[^}]*\}|.)|\\[uUx]\{[^}]*\}|\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\U[0-9a-fA-F]{8}|\\.)
    |(?P<bracket>\[)
    |(?P<plain>.)""",
    re.VERBOSE | re.DOTALL,
)
ASSERTIONS = frozenset((r"\A", r"\b", r"\B", r"\z", r"\Z"))
FLAGS = frozenset("ims")
ESCAPED = {chr(code): json.dumps(chr(code))[1:-1] for code in (*range(0x20), ord('"'), ord("\\"))}  # as most write it
UNESCAPED = r"[^\x00-\x1f\x22\x5c]"  # characters that stand for themselves
LITERAL_PART = re.compile(r'[\x00-\x1f"\\]|[^\x00-\x1f"\\]+')
ANY_STRING = r"/(?:[^\x00-\x1f\x22\x5c]|\\(?:[\x22\x5c\/bfnrt]|u[0-9a-fA-F]{4}))*/"  # a JSON string's inside
EXPONENT, FLOAT = "[eE][+-]?[0-9]+", r"[0-9]+\.[0-9]*|\.[0-9]+"
COMMON = {
    "CNAME": "[_A-Za-z][_A-Za-z0-9]*", "CPP_COMMENT": r"\/\/[^\n]*", "CR": r"\r",
    "C_COMMENT": r"\/\*[^*]*\*+(?:[^\/*][^*]*\*+)*\/", "DECIMAL": FLOAT, "DIGIT": "[0-9]",
    "ESCAPED_STRING": r'"(?:[^"\\]|\\.)*"', "FLOAT": f"(?:{FLOAT})(?:{EXPONENT})?|[0-9]+{EXPONENT}",
    "HEXDIGIT": "[a-fA-F0-9]", "INT": "[0-9]+", "LCASE_LETTER": "[a-z]", "LETTER": "[A-Za-z]", "LF": r"\n",
    "NEWLINE": r"(?:\r?\n)+", "NUMBER": f"(?:[0-9]+|{FLOAT})(?:{EXPONENT})?", "SH_COMMENT": r"#[^\n]*",
    "SIGNED_FLOAT": f"[+-]?(?:(?:{FLOAT})(?:{EXPONENT})?|[0-9]+{EXPONENT})", "SIGNED_INT": "[+-]?[0-9]+",
    "SIGNED_NUMBER": f"[+-]?(?:[0-9]+|{FLOAT})(?:{EXPONENT})?", "SQL_COMMENT": r"--[^\n]*", "UCASE_LETTER": "[A-Z]",
    "WORD": "[A-Za-z]+", "WS": r"[ \t\f\r\n]+", "WS_INLINE": r"[ \t]+", "_EXP": EXPONENT,
}  # fmt: skip
"""Terminals that grammars may import from `common`."""


def lark_of_regex(pattern: str) -> str:
    """Return the grammar of texts that match `pattern` from end to end."""
    return f"start: TEXT\nTEXT: /{_slashed(pattern)}/"


def escaped_rules(grammar: str, prefix: str) -> list[str]:
    """Return the rules of what `grammar` accepts, escaped as within a JSON string. The first is the whole text's.

    Each text has one spelling there: of several escapes of a character, the short one. grammar: one that the library
    takes. prefix: what the names of the rules begin with. Raises `ValueError` if such a text cannot be held.
    """
    rules, escape = _read(grammar), _Escape()
    for rule in rules.values():
        rule.body = [(kind, escape.token(kind, text)) for kind, text in rule.body]
    written = _written(rules, prefix)
    _check_ends(written)
    return written


def plain_rules(grammar: str, prefix: str) -> list[str]:
    """Return the rules of what `grammar` accepts, as it stands; see `escaped_rules`."""
    return _written(_read(grammar), prefix)


def ended_rules(grammar: str, end: str, prefix: str) -> list[str]:
    """Return the rules of a text that `grammar` accepts, and of the first `end` after it; see `escaped_rules`.

    Raises `ValueError` for a grammar that refers to itself, too: it could not be kept from holding `end`.
    """
    first, *others = _written(_read(grammar), prefix)
    name, _, whole = first.partition(": ")
    if not whole.isupper():
        raise ValueError("a rule refers to itself")
    holding = f"/(?s:.*){_pattern_of(end)}(?s:.*)/"
    text = f"{whole}_ALONE"
    return [f"{name}[lazy]: {text} {_quoted(end)}", f"{text}: {whole} & ~{holding}", *others]


@dataclass(slots=True)
class _Rule:
    """A rule or a terminal."""

    body: list[Token] = field(default_factory=list)
    is_terminal: bool = False


def _read(grammar: str) -> dict[str, _Rule]:
    """Return the rules of a grammar by name. Raises `ValueError` for what is more than rules of characters."""
    rules: dict[str, _Rule] = {}
    tokens = [token for token in _tokens(grammar) if token[0] not in ("space", "options", "alias")]
    body: list[Token] = []
    for i, (kind, text) in enumerate(tokens):
        is_first = i == 0 or tokens[i - 1][0] in ("newline", "import")
        if kind == "import":
            rules.update(_imported(text))
        elif kind == "other":
            raise ValueError(f"{text!r} at this place is more than a grammar of characters")
        elif kind == "name" and is_first:
            body = []
            if tokens[i + 1 : i + 2] != [("operator", ":")]:
                raise ValueError(f"options of {text} are not supported")
            name = text.lstrip("?!")
            rules[name] = _Rule(body, name.upper() == name)
        elif kind != "newline":
            body.append((kind, text.lstrip("?!") if kind == "name" else text))
    for rule in rules.values():
        del rule.body[:1]  # the colon
    return rules


def _tokens(grammar: str) -> Iterator[Token]:
    for found in TOKEN.finditer(grammar):
        assert found.lastgroup is not None
        yield found.lastgroup, found[0]


def _imported(text: str) -> dict[str, _Rule]:
    """Return the common terminals that a directive imports."""
    listed, alias = re.fullmatch(r"%import\s+common(.*?)(?:->\s*(\w+))?", text, re.DOTALL).groups()  # type: ignore[union-attr]
    return {
        alias or name: _Rule([("operator", ":"), ("regex", f"/{COMMON[name]}/")], True)
        for name in re.findall(r"\w+", listed)
    }


def _written(rules: dict[str, _Rule], prefix: str) -> list[str]:
    """Return the rules as text, `start` first. Those that do not refer to themselves are terminals."""
    _flatten(rules)
    numbers = {name: i for i, name in enumerate(rules)}

    def new_name(name: str) -> str:
        named = f"{prefix}_{numbers[name]}"
        return named.upper() if rules[name].is_terminal else named

    def written(name: str) -> str:
        body = (new_name(text) if kind == "name" else text for kind, text in rules[name].body)
        return f"{new_name(name)}: {' '.join(body)}"

    return [f"{prefix}_start: {new_name('start')}", *map(written, rules)]


def _flatten(rules: dict[str, _Rule]) -> None:
    """Make terminals of the rules that refer to none but terminals, until there are no more of them."""
    waiting = {name: rule for name, rule in rules.items() if not rule.is_terminal}
    has_changed = True
    while has_changed:
        has_changed = False
        for name, rule in list(waiting.items()):
            if not any(kind == "name" and text in waiting for kind, text in rule.body):
                rule.is_terminal = has_changed = True
                del waiting[name]


def _check_ends(rules: list[str]) -> None:
    """Raise `ValueError` if a terminal may go on with a backslash where it may end, and another begin with one."""
    named = [tuple(rule.split(": ", 1)) for rule in rules[1:]]
    terminals = "\n".join(f"{name}: {body}" for name, body in named if name.isupper())
    in_rules = (token for name, body in named if not name.isupper() for token in _tokens(body))
    words = {text for kind, text in in_rules if kind in ("string", "regex") or (kind == "name" and text.isupper())}
    begins = any(ord("\\") in _first_bytes(f"start: PROBE\nPROBE: {word}\n{terminals}") for word in words)
    if begins and any(
        _first_bytes(f"start: PROBE\nPROBE: ({word}) & (({word}) /\\\\(?s:.+)/)\n{terminals}") for word in words
    ):
        raise ValueError("a rule refers to itself, and it cannot be said where an escape in its texts belongs")


def _first_bytes(grammar: str) -> set[int]:
    """Return the bytes that texts of `grammar` begin with; none if it accepts no text."""
    matcher = LLMatcher(LLTokenizer("byte"), LLMatcher.grammar_from_lark(grammar), log_level=0)
    if matcher.is_error():
        return set()
    mask = matcher.compute_bitmask()
    return set() if matcher.is_error() else {code for code in range(0x100) if mask[code // 8] >> code % 8 & 1}


class _Escape:
    """Escapes the tokens of one grammar. Each set of characters is looked at once."""

    def __init__(self) -> None:
        self._sets: dict[str, str] = {}

    def token(self, kind: str, text: str) -> str:
        """Return a token of the grammar, escaped."""
        if kind == "string":
            return self._string(text)
        if kind == "range":
            low, high = (f"\\u{{{ord(_unquoted(end)):x}}}" for end in re.findall(r'"(?:\\.|[^"\\])+"', text))
            return f"/{self._pattern(f'[{low}-{high}]', '')}/"
        if kind == "regex":
            pattern, _, flags = text[1:].rpartition("/")
            return f"/{self._pattern(pattern, flags)}/"
        return text

    @staticmethod
    def _string(text: str) -> str:
        value = _unquoted(text.removesuffix("i"))
        if not text.endswith("i"):
            return _quoted("".join(ESCAPED.get(character, character) for character in value))
        # The letter of an escape has one case.
        parts = (
            _quoted(ESCAPED[part]) if part in ESCAPED else f"{_quoted(part)}i" for part in LITERAL_PART.findall(value)
        )
        return f"({' '.join(parts)})" if value else text

    def _pattern(self, pattern: str, flags: str) -> str:
        parts, scopes, position = [], [flags], 0  # flags of each open group
        while position < len(pattern):
            found = ATOM.match(pattern, position)
            assert found is not None
            kind, atom = found.lastgroup, found[0]
            if kind == "bracket":
                atom = _bracket(pattern, position)
            position += len(atom)
            if kind == "group":
                atom = _group(atom, found["flags"] or "", scopes)
            elif kind not in ("repeat", "operator") and atom not in ASSERTIONS:
                atom = self._set(atom, scopes[-1])
            parts.append(atom)
        return "".join(parts)

    def _set(self, atom: str, flags: str) -> str:
        """Return a pattern of one character of a set, escaped."""
        if not FLAGS.issuperset(flags):
            raise ValueError(f"flags {flags!r} of a regular expression cannot be held within a JSON string")
        scope = "".join(sorted(set(flags)))
        one = f"(?{scope}:{atom})" if scope else atom
        if one not in self._sets:
            self._sets[one] = self._escaped_set(one, atom, scope)
        return self._sets[one]

    @staticmethod
    def _escaped_set(one: str, atom: str, scope: str) -> str:
        first = _first_bytes(f"start: CHARACTER\nCHARACTER: /{one}/")
        escapes = [escape for character, escape in ESCAPED.items() if ord(character) in first]
        if not escapes:
            return one
        short = "".join(re.escape(escape[-1]) for escape in escapes if len(escape) == 2)
        parts = [rf"\\[{short}]"] if short else []
        for start in (r"\u000", r"\u001"):
            if digits := "".join(escape[-1] for escape in escapes if escape.startswith(start)):
                parts.append(rf"\{start}[{digits}]")
        if len(first) > len(escapes):
            within = r"\s\S" if atom == "." and "s" in scope else r"[^\n]" if atom == "." else atom
            others = f"[[{within}]&&{UNESCAPED}]"
            parts.append(f"(?{scope}:{others})" if scope else others)
        return f"(?:{'|'.join(parts)})"


def _group(atom: str, flags: str, scopes: list[str]) -> str:
    """Return the begin or end of a group, whose flags are left to the characters in it; see `scopes` to it."""
    if atom == "(?":
        raise ValueError("(?...) of this kind in a regular expression cannot be held within a JSON string")
    if atom == ")":
        scopes.pop()
    elif atom.endswith(")"):
        scopes[-1] += flags
        return ""
    else:
        scopes.append(scopes[-1] + flags)
        return "(?:"
    return atom


def _bracket(pattern: str, start: int) -> str:
    """Return the set of characters in brackets, which may nest, that begins at `start`."""
    depth, position = 0, start
    while position < len(pattern):
        opening = re.compile(r"\[\^?\]?").match(pattern, position)
        depth += bool(opening) - (pattern[position] == "]")
        position += len(opening[0]) if opening else 2 if pattern[position] == "\\" else 1
        if not depth:
            break
    return pattern[start:position]


def _unquoted(literal: str) -> str:
    """Return the text of a literal, which has JSON's escapes and that of a byte."""
    return str(json.loads(re.sub(r"(?<!\\)((?:\\\\)*)\\x([0-9a-fA-F]{2})", r"\1\\u00\2", literal)))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _pattern_of(text: str) -> str:
    """Return a regular expression, as it stands between slashes, that matches `text` alone."""
    return "".join(f"\\u{{{ord(character):x}}}" for character in text)


def _slashed(pattern: str) -> str:
    """Return a regular expression as it stands between slashes."""
    return re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\/", pattern).replace("\n", r"\n")
