"""Which of several engines gets a request."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence

METHODS = ("round_robin", "shortest_queue", "cache_aware")
CHUNK_BYTES = 256  # of a prompt: 64 token ids, or about as many tokens of text
MAX_CHUNKS = 1 << 18  # remembered: 16 million tokens
MIN_KNOWN_SHARE = 0.5  # of a prompt, for its cached part to decide where it goes
HOT_SPOT_REQUESTS, HOT_SPOT_RATIO = 16, 1.5  # an engine this far ahead of the least busy one is a hot spot


class Balancer:
    """`method` is one of METHODS.

    round_robin takes turns. shortest_queue takes the engine with the fewest requests. cache_aware takes the one that
    was given the longest head of the prompt before, unless that head is short or the engine a hot spot: then it is
    shortest_queue. What engines have cached is known by what they were given, so an eviction goes unnoticed.
    """

    def __init__(self, method: str, num_engines: int, max_chunks: int = MAX_CHUNKS) -> None:
        self.method, self.num_engines, self.max_chunks = method, num_engines, max_chunks
        self._turn = -1
        self._known: OrderedDict[int, int] = OrderedDict()  # chunk with all before it -> bits of engines; oldest first

    def pick(self, prompt: bytes, loads: Sequence[int], candidates: Sequence[int] | None = None) -> int:
        """The engine for `prompt`: its index into `loads`, the requests that each engine has.

        candidates: those to choose from; all by default.
        """
        candidates = candidates or range(self.num_engines)
        if self.method == "round_robin":
            return self._next(candidates)
        least = min(loads[i] for i in candidates)
        idle = [i for i in candidates if loads[i] == least]
        if self.method == "shortest_queue":
            return self._next(idle)
        keys = list(_chunk_keys(prompt))
        lens = self._known_lens(keys)
        best = max(candidates, key=lambda i: (lens[i], -loads[i]))
        is_hot = loads[best] - least > HOT_SPOT_REQUESTS and loads[best] > HOT_SPOT_RATIO * least
        if is_hot or not keys or lens[best] < MIN_KNOWN_SHARE * len(keys):
            best = self._next(idle)
        self._remember(keys, best)
        return best

    def forget(self, engine: int) -> None:
        """Its cache is empty again."""
        for key in self._known:
            self._known[key] &= ~(1 << engine)

    def _next(self, candidates: Sequence[int]) -> int:
        """In turn: the first one after the last taken."""
        self._turn = min(candidates, key=lambda i: (i - self._turn - 1) % self.num_engines)
        return self._turn

    def _known_lens(self, keys: Sequence[int]) -> list[int]:
        """For each engine how many chunks from the first on it was given."""
        lens = [0] * self.num_engines
        holders = (1 << self.num_engines) - 1
        for count, key in enumerate(keys, start=1):
            holders &= self._known.get(key, 0)
            if not holders:
                break
            for i in range(self.num_engines):
                if holders >> i & 1:
                    lens[i] = count
        return lens

    def _remember(self, keys: Sequence[int], engine: int) -> None:
        for key in keys:
            self._known[key] = self._known.get(key, 0) | 1 << engine
            self._known.move_to_end(key)
        while len(self._known) > self.max_chunks:
            self._known.popitem(last=False)


def _chunk_keys(prompt: bytes) -> Iterator[int]:
    """A key for each whole chunk, of it and all before it."""
    key = 0
    for end in range(CHUNK_BYTES, len(prompt) + 1, CHUNK_BYTES):
        key = hash((key, prompt[end - CHUNK_BYTES : end]))
        yield key
