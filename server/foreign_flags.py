"""Flags of SGLang's and vLLM's servers that this one spells otherwise, does not need, or refuses.

A flag whose effect this server has anyway, or whose lack changes only how fast it is, is accepted, and a line says
why it has no effect. One whose lack would change answers, memory or who is served is refused, with what to do instead.
The flags themselves: `foreign_tables.py`.
"""

import json
import re
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ANY = "*"  # in place of a flag's end, or of a value
FLAG = re.compile(r"-[^\d.]")  # a word that begins so is no value
OBJECT_FLAGS = frozenset({
    "--default-chat-template-kwargs", "--override-generation-config", "--preferred-sampling-params", "--hf-overrides",
    "--json-model-override-args", "--mm-process-config", "--limit-mm-per-prompt",
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ForeignFlag:
    """Say what becomes of a flag, by its value."""

    flag: str
    """Ends with ANY: all flags that begin so."""
    num_values: int | None = 1
    """None: all words up to the next flag."""
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By value, in small letters: the words that stand for it here; ANY among them stands for the value itself."""
    reason: str = ""
    """Why it has no effect; with no `words`, or none for its value, why it is refused."""
    is_refused: bool = False
    is_shared: bool = False
    """The flag is this server's, too: values without `words` are its own."""

    def translate(self, name: str, values: Sequence[str], note: Callable[[str], None]) -> list[str]:
        """Return the words for it. Raises `ValueError` if it is refused; calls `note` with why it has no effect."""
        if self.num_values == 0 and values:
            raise ValueError(f"{name} takes no value, got {values[0]!r}")
        value = " ".join(values).lower() if self.num_values != 0 else ANY
        words = self.words.get(value, self.words.get(ANY))
        if words:
            return [one for word in words for one in (values if word == ANY else [word])]
        if words is None and self.is_shared:
            return [name, *values]
        if words is None and self.is_refused:
            raise ValueError(f"{name} is refused: {self.reason}")
        if self.reason and not self.is_refused:
            note(f"{' '.join([name, *values]) if self.is_shared else name} has no effect: {self.reason}")
        return []

    def describe(self) -> str:
        """Return what becomes of it: the right side of its line in --help."""
        no_effect = f"no effect: {self.reason}" if self.reason and not self.is_refused else "no effect"
        values_of: dict[str, list[str]] = {}
        for value, words in self.words.items():
            meaning = " ".join(word for word in words if word != ANY) or no_effect
            values_of.setdefault(meaning, []).append(value or '""')
        meanings = [f"{', '.join(values)}: {meaning}" for meaning, values in values_of.items() if values != [ANY]]
        others = [meaning for meaning, values in values_of.items() if values == [ANY]]
        if self.is_refused:
            others = [f"refused: {self.reason}"]
        elif not self.words:
            others = [no_effect]
        return "; ".join([*meanings, *(f"else {other}" if meanings else other for other in others)])


def alias(flag: str, *words: str, but: Iterable[str] = (), num_values: int | None = 1) -> ForeignFlag:
    """Return a flag that means what `words` mean here, ANY among them being its value. but: values of no effect."""
    meanings = {**dict.fromkeys(but, ()), ANY: words}
    return ForeignFlag(flag=flag, num_values=num_values if ANY in words else 0, words=meanings)


def by_value(flag: str, reason: str = "", **words: tuple[str, ...]) -> ForeignFlag:
    """Return a flag some of whose values have a meaning here, and whose others are refused."""
    return ForeignFlag(flag=flag, words=words, reason=reason, is_refused=True)


def no_effect(flag: str, reason: str) -> ForeignFlag:
    return ForeignFlag(flag=flag, num_values=None, reason=reason)


def refused(flag: str, reason: str, but: Iterable[str] = ()) -> ForeignFlag:
    """Return a flag that is refused, unless its value is one of `but`, which ask for nothing."""
    return ForeignFlag(flag=flag, num_values=None, reason=reason, words=dict.fromkeys(but, ()), is_refused=True)


def own_values(flag: str, reason: str = "", /, **values: str | None) -> ForeignFlag:
    """Return a flag of this server's that others give other values, too; None: one has no effect, for `reason`."""
    words = {value: () if own is None else (flag, own) for value, own in values.items()}
    return ForeignFlag(flag=flag, words=words, reason=reason, is_shared=True)


MODELSCOPE_VARIABLES = ("SGLANG_USE_MODELSCOPE", "VLLM_USE_MODELSCOPE")


def find(flag: str, table: Collection[ForeignFlag]) -> ForeignFlag | None:
    """Return the entry of a flag, which vLLM also takes with underscores, and as `--flag.key`."""
    flag = flag.replace("_", "-").partition("." if flag.startswith("--") else " ")[0]
    return next(
        (one for one in table if one.flag == flag or (one.flag[-1] == ANY and flag.startswith(one.flag[:-1]))), None
    )


def with_objects(argv: Sequence[str]) -> list[str]:
    """Return a command line with vLLM's `--flag.key value`, of flags that take an object, as `--flag {...}`.

    Keys add to an object that is given whole, wherever it stands. Raises `ValueError` for keys of what is no object.
    """
    words, left = list[str](), list(argv)
    settings: list[tuple[list[str], str, Any]] = []
    with_keys = {flag for flag, *keys in map(_path, argv) if keys and flag in OBJECT_FLAGS}
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        flag, *keys = _path(word)
        if flag not in with_keys:
            words.append(word)
            continue
        if not equals:
            value = left.pop(0) if left and not FLAG.match(left[0]) else "true"
        settings.append(([flag, *keys], name, _value(value)))
    objects: dict[str, Any] = {}
    for path, name, given in sorted(settings, key=lambda setting: len(setting[0]) > 1):
        place = objects
        for key in path[:-1]:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise ValueError(f"{name}: {key.lstrip('-')} is no object, it was said to be {json.dumps(place)}")
        place[path[-1]] = given
    return words + [word for flag, value in objects.items() for word in (flag, json.dumps(value))]


def _path(word: str) -> list[str]:
    """Return the flag that a word names, by its usual spelling, and the keys after it."""
    flag, *keys = word.partition("=")[0].split(".")
    return [flag.replace("_", "-"), *keys]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def translate(argv: Sequence[str], table: Collection[ForeignFlag], note: Callable[[str], None]) -> list[str]:
    """Return a command line with the flags of `table` in this server's own words.

    note: called with a line for each flag without effect. Raises `ValueError` for a flag that is refused.
    """
    translated, left = list[str](), with_objects(argv)
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        foreign = find(name, table) if word.startswith("-") else None
        if foreign is None:
            if not (table and is_switched_off(name, table)):
                translated.append(word)
            continue
        values = [value] if equals else []
        while not equals and left and not FLAG.match(left[0]):
            if foreign.num_values is not None and len(values) >= foreign.num_values:
                break
            values.append(left.pop(0))
        translated += foreign.translate(name, values, note)
    return translated


def is_switched_off(name: str, table: Collection[ForeignFlag]) -> bool:
    """Return whether a flag is vLLM's `--no-FLAG`, of one in `table`: every one of them is off unless it is given."""
    return name.startswith("--no-") and find(f"--{name.removeprefix('--no-')}", table) is not None


def uses_modelscope(environ: Mapping[str, str]) -> bool:
    """Return whether the environment says, as SGLang and vLLM read it, that hub ids are ModelScope's."""
    return any(environ.get(name, "").lower() in ("1", "true") for name in MODELSCOPE_VARIABLES)


def by_meaning(table: Iterable[ForeignFlag]) -> dict[str, list[str]]:
    """Return the flags of a table by what becomes of them."""
    flags: dict[str, list[str]] = {}
    for one in table:
        flags.setdefault(one.describe(), []).append(one.flag)
    return flags


def describe(table: Iterable[ForeignFlag]) -> str:
    """Return the table as text, for --help."""
    lines = ["flags of SGLang and vLLM that are spelled otherwise, not needed, or refused, and values of theirs:"]
    for meaning, flags in by_meaning(table).items():
        names = textwrap.fill(", ".join(flags), 78, break_on_hyphens=False)
        lines += [textwrap.indent(names, "  "), f"      {meaning}"]
    return "\n".join(lines)
