"""API speculative execution: one call writes more than one `gen` asked for, and the program's next texts and gens are
taken from what it wrote, as long as they agree. (Zheng et al., "SGLang", 2024, section 3.3.)"""

from collections.abc import Sequence
from dataclasses import dataclass

from server.lang.expressions import Gen, Text

MAX_TRIES = 3


@dataclass(frozen=True)
class Taken:
    value: str
    rest: str  # behind the stop, which stays in front of it: the program's next text usually starts with it


def take(text: str, stops: Sequence[str]) -> Taken | None:
    """What a gen with these stops would have made of `text`. None if none of them is in it: it might have gone on."""
    ends = [position for stop in stops if (position := text.find(stop)) >= 0]
    return Taken(text[: min(ends)], text[min(ends) :]) if ends else None


def match_pattern(text: str, pattern: Sequence[tuple[Text | Gen, Sequence[str]]]) -> list[str] | None:
    """The values of the gens in `pattern`, a list of (part, its stops); None if `text` does not follow it.

    A gen ends at its stop; one without goes up to the text that follows it, and the last one to the end.
    """
    values = []
    for i, (part, stops) in enumerate(pattern):
        if isinstance(part, Text):
            if not text.startswith(part.text):
                return None
            text = text[len(part.text) :]
            continue
        following = next((later.text for later, _ in pattern[i + 1 : i + 2] if isinstance(later, Text)), None)
        taken = take(text, (*stops, *([following] if following else ())))
        if taken is None:
            if i + 1 < len(pattern):
                return None
            taken = Taken(text, "")
        values.append(taken.value)
        text = taken.rest
    return values
