"""The log-probabilities of the tokens that a part of an answer is made of: not those of reasoning, calls and marks."""

from collections import deque
from collections.abc import Callable

from engine.state import Logprobs
from server.reading.protocol import JSON


class TextLogprobs:
    """Takes an answer's tokens as they come, and gives those of each piece of text that is found in them."""

    def __init__(self, spell: Callable[[Logprobs], list[JSON]]) -> None:
        """spell: return an object for each token, whose `bytes` are the token's."""
        self._spell = spell
        self._raw = b""  # of the tokens behind the last piece
        self._start = 0  # of _raw in the answer, in bytes
        self._tokens: deque[tuple[int, JSON]] = deque()  # (end in the answer, token), those not given yet

    def add(self, logprobs: Logprobs | None) -> None:
        if logprobs is None:
            return
        for token in self._spell(logprobs):
            self._raw += bytes(token["bytes"])
            self._tokens.append((self._start + len(self._raw), token))

    def take(self, piece: str) -> list[JSON]:
        """Return the tokens of the next piece of text; those ahead of it are passed over.

        A piece begins where a token does, if it can: marks ahead of it may hold the same letters, as </think> holds hi.
        A token that two pieces share is the first one's. A piece that is not found, as half a character is not, has
        all tokens that are left.
        """
        text = piece.encode()
        at = self._find(text)
        used = len(self._raw) if at < 0 else at + len(text)
        begin, end = self._start + max(at, 0), self._start + used
        self._raw, self._start = self._raw[used:], end
        while self._tokens and self._tokens[0][0] <= begin < end:
            self._tokens.popleft()
        taken, last = [], begin
        while self._tokens and last < end:
            last, token = self._tokens.popleft()
            taken.append(token)
        return taken

    def _find(self, text: bytes) -> int:
        """Return where in _raw a piece begins, -1 if nowhere."""
        at = self._raw.find(text)
        if at <= 0:
            return at
        starts = (end - self._start for end, _ in self._tokens)
        return next((start for start in starts if start >= at and self._raw.startswith(text, start)), at)
