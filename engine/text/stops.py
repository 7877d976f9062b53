"""Find stop strings and stop regexes in a text that arrives in parts."""

from collections.abc import Sequence
from functools import lru_cache

import regex  # type: ignore[import-untyped]

from engine.errors import InvalidRequest

REGEX_WINDOW = 1024  # characters: a longer match of a stop regex loses its start
REGEX_TIMEOUT_S = 0.025  # of one search, on the event loop; a pattern that takes longer fails its own request


class StopStrings:
    """Find which of some strings ends first in a text that arrives in parts: the automaton of Aho and Corasick (1975).

    A state stands for the longest tail of the text that starts one of the strings: exactly the text to hold back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._fail = [0]
        self.num_chars = [0]  # by state: the length of its tail
        self.stop: list[str | None] = [None]  # by state: the longest stop string that its tail ends with
        for stop in filter(None, stops):
            state = 0
            for num_chars, char in enumerate(stop, start=1):
                state = self._next[state].setdefault(char, len(self._next))
                if state == len(self._next):
                    self._next.append({})
                    self._fail.append(0)
                    self.num_chars.append(num_chars)
                    self.stop.append(None)
            self.stop[state] = stop
        self._first_chars = frozenset(self._next[0])
        level = list(self._next[0].values())
        while level:  # breadth first: a state's fail link points to a shorter tail
            below = []
            for state in level:
                for char, child in self._next[state].items():
                    self._fail[child] = self._step(self._fail[state], char)
                    self.stop[child] = self.stop[child] or self.stop[self._fail[child]]
                    below.append(child)
            level = below

    def _step(self, state: int, char: str) -> int:
        while (after := self._next[state].get(char)) is None:
            if not state:
                return 0
            state = self._fail[state]
        return after

    def scan(self, state: int, text: str) -> tuple[int, int]:
        """Return (state after `text`, -1), or (state, characters read) at the first end of a stop string."""
        if not state and self._first_chars.isdisjoint(text):
            return 0, -1  # most texts: saves the walk
        for index, char in enumerate(text):
            state = self._step(state, char)
            if self.stop[state] is not None:
                return state, index + 1
        return state, -1


@lru_cache(maxsize=32)
def compiled_stops(stops: tuple[str, ...], patterns: tuple[str, ...]) -> tuple[StopStrings, "list[regex.Pattern[str]]"]:
    """Compile stop strings and regexes, which takes up to 20 ms and 5 MB.

    Cached for the n answers of a request, and for clients that always send the same stops. Raises `InvalidRequest`.
    """
    try:
        return StopStrings(stops), [regex.compile(pattern, cache_pattern=False) for pattern in patterns]
    except (regex.error, RecursionError) as error:
        raise InvalidRequest(f"stop_regex is not a regular expression: {error}", "stop_regex") from None


class StopScanner:
    """Release the part of a text that cannot belong to a stop.

    The stop that ends first wins, the longest of several; so token boundaries make no difference to strings.
    A regex sees the text so far (`$` matches at its end) and is searched for in the text held back, at most the last
    `REGEX_WINDOW` characters: a pattern like `.*END` holds back that much, and costs no more however long the answer.
    """

    def __init__(self, stops: Sequence[str], patterns: Sequence[str], is_kept: bool) -> None:
        self.matched_stop: str | None = None  # the string, or the regex's pattern
        self._is_kept = is_kept
        self._strings, self._patterns = compiled_stops(tuple(stops), tuple(patterns))
        self._state = 0
        self._held = ""
        self._released = ""  # the last released characters, for a regex's look-behind

    def push(self, text: str) -> str:
        """Return the text that `text` releases. Raises `InvalidRequest` if a regex takes too long."""
        self._state, end = self._strings.scan(self._state, text)
        if not (self._state or self._held or self._patterns):
            return text
        num_before = len(self._held)
        self._held += text
        matches = []  # (end, start, stop) in the held text
        if end >= 0 and (stop := self._strings.stop[self._state]) is not None:
            end += num_before
            matches.append((end, end - len(stop), stop))
        num_held = self._strings.num_chars[self._state]
        for pattern in self._patterns:
            found = self._search(pattern, len(text))
            if found is None:
                continue
            start, match_end = (place - len(self._released) for place in found.span())
            if found.partial:
                num_held = max(num_held, min(len(self._held) - start, REGEX_WINDOW))
            else:
                matches.append((match_end, start, pattern.pattern))
        if matches:
            end, start, self.matched_stop = min(matches)
            return self._release(end if self._is_kept else start)
        return self._release(len(self._held) - num_held)

    def pass_over(self, text: str) -> str:
        """Return the text that `text` releases, stops that end in it included: none ends the answer.

        Held back is the beginning of a stop string that may end in a later text.
        """
        end, num_read = 0, 0
        while end >= 0:
            num_read += end
            self._state, end = self._strings.scan(self._state, text[num_read:])
        self._held += text
        return self._release(len(self._held) - self._strings.num_chars[self._state])

    def finish(self) -> str:
        """Return the text still held back."""
        return self._release(len(self._held)) if self.matched_stop is None else ""

    def _search(self, pattern: "regex.Pattern[str]", num_new: int) -> "regex.Match[str] | None":
        text = self._released + self._held
        start = max(len(self._released), len(text) - num_new - REGEX_WINDOW)
        try:
            return pattern.search(text, start, partial=True, timeout=REGEX_TIMEOUT_S)
        except TimeoutError:
            limit_ms = REGEX_TIMEOUT_S * 1e3
            message = (
                f"stop_regex {pattern.pattern!r} took more than {limit_ms:.0f} ms on {len(text) - start} characters"
            )
            raise InvalidRequest(message, "stop_regex") from None

    def _release(self, num_chars: int) -> str:
        text, self._held = self._held[:num_chars], self._held[num_chars:]
        if self._patterns:
            self._released = (self._released + text)[-REGEX_WINDOW:]
        return text
