"""API speculative execution (Zheng et al., "SGLang", 2024, section 3.3).

One call writes more than one `gen` asks for, and the program's next texts and gens are taken from it, as long as they
agree.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from .backends.base import JSON, BackendError, BaseBackend, Prompt
from .expressions import Gen, GenParams, Text

MAX_TRIES = 3


@dataclass(frozen=True)
class Taken:
    value: str
    rest: str  # behind the stop, which stays in front of it: the program's next text usually starts with it


def take(text: str, stops: Sequence[str]) -> Taken | None:
    """Cut off the part of `text` that a gen with these stops would have made.

    None if no stop is in it: the gen might have gone on.
    """
    ends = [position for stop in stops if (position := text.find(stop)) >= 0]
    return Taken(text[: min(ends)], text[min(ends) :]) if ends else None


def match_pattern(text: str, pattern: Sequence[tuple[Text | Gen, Sequence[str]]]) -> list[str] | None:
    """Return the values of the gens in `pattern`, a list of (part, its stops); None if `text` does not follow it.

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


class WrittenAhead:
    """The text that the API has written and no expression has asked for yet."""

    def __init__(self) -> None:
        self._text = ""

    def skip(self, text: str) -> None:
        """Go past a text that the program appended. Where it differs, nothing written ahead is of use."""
        self._text = self._text[len(text) :] if self._text.startswith(text) else ""

    async def generate(
        self, backend: BaseBackend, prompt: Prompt, params: GenParams, num_tokens: int
    ) -> tuple[list[str], list[JSON]]:
        """Return a gen's value and meta_info, from the text at hand or by a call.

        A call asks for at least `num_tokens` and does not stop.
        """
        meta: JSON = {}
        taken = take(self._text, params.all_stops)
        if taken is None:
            further = params.override({"stop": (), "max_new_tokens": max(num_tokens, params.max_new_tokens)})
            values, [meta] = await backend.generate(prompt, further)
            taken = take(values[0], params.all_stops)
            if taken is None:
                self._text = ""
                return values, [meta]
        self._text = taken.rest
        return [taken.value], [meta]


@dataclass(frozen=True)
class Recorded:
    part: Text | Gen
    stops: Sequence[str]
    future: "Future[Any] | None"  # of the gen's variable


class Recording:
    """The parts of an assistant's message, until its end."""

    def __init__(self) -> None:
        self.parts: list[Recorded] = []

    def add(self, part: Text | Gen, stops: Sequence[str] = (), future: "Future[Any] | None" = None) -> None:
        self.parts.append(Recorded(part, stops, future))

    def fail(self, error: BaseException) -> None:
        for recorded in self.parts:
            if recorded.future is not None:
                set_error(recorded.future, error)

    async def generate(
        self, backend: BaseBackend, prompt: Prompt, params: GenParams
    ) -> list[tuple[Text | Gen, str, JSON, "Future[Any] | None"]]:
        """Return each part with its text, meta_info and future, from one call for all gens.

        `BackendError` if no answer follows the program.
        """
        meta: JSON = {}
        values: list[str] = []
        if any(isinstance(recorded.part, Gen) for recorded in self.parts):
            try:
                values, meta = await self._values(backend, prompt, params)
            except Exception as error:
                self.fail(error)
                raise
        found = iter(values)
        return [
            (one.part, one.part.text if isinstance(one.part, Text) else next(found), meta, one.future)
            for one in self.parts
        ]

    async def _values(self, backend: BaseBackend, prompt: Prompt, params: GenParams) -> tuple[list[str], JSON]:
        pattern = [(recorded.part, recorded.stops) for recorded in self.parts]
        for _ in range(MAX_TRIES):
            [text], [meta] = await backend.generate(prompt, params)
            if (values := match_pattern(text, pattern)) is not None:
                return values, meta
        raise BackendError(f"{MAX_TRIES} answers did not follow the program; the last was {text!r}")


def set_error(future: "Future[Any]", error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
