"""Which of several engines gets a request."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# The names are SGLang's, which has called shortest_queue total_requests of late.
METHODS = ("cache_aware", "round_robin", "shortest_queue", "total_requests", "total_tokens")
PROMPT_METHODS = ("cache_aware", "total_tokens")  # those that look at the prompt
CHUNK_BYTES = 256  # of a prompt: 64 token ids, or about as many tokens of text
ANSWER_CHUNKS = 4  # what an answer, whose length nobody knows, counts for beside its prompt
MAX_CHUNKS = 1 << 18  # remembered: 16 million tokens
MIN_KNOWN_SHARE = 0.5  # of a prompt, for its cached part to decide where it goes
HOT_SPOT_CHUNKS, HOT_SPOT_RATIO = 128, 1.25  # an engine this far ahead of the least busy one is a hot spot


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request went, and what it counts for there until `Balancer.end`."""

    engine: int
    load: int


class Balancer:
    """`method` is one of METHODS.

    round_robin takes turns. total_requests takes the engine with the fewest requests, total_tokens the one with the
    fewest tokens. cache_aware takes the one that was given the longest head of the prompt before, unless that head is
    short or the engine a hot spot: then it is the one that has least to compute. What engines have cached is known by
    what they were given, so a prefix counts as soon as it is sent, and an eviction goes unnoticed.

    To cache_aware a request is the chunks of its prompt that are new where it goes, and its answer. By numbers of
    requests, an engine would be given new prefixes for having few requests, whatever these have yet to compute.
    """

    def __init__(self, method: str, num_engines: int, max_chunks: int = MAX_CHUNKS) -> None:
        self.method, self.max_chunks = method, max_chunks
        self.loads = [0] * num_engines  # requests, or chunks of what they have and have yet to compute
        self._turn = -1
        self._known: OrderedDict[int, int] = OrderedDict()  # chunk with all before it -> bits of engines; oldest first

    def pick(self, prompt: bytes, candidates: Sequence[int] | None = None) -> Placement:
        """The engine for `prompt`, one of `candidates`; of all by default."""
        candidates = candidates or range(len(self.loads))
        if self.method == "round_robin":
            return self._place(self._next(candidates), 1)
        least = min(self.loads[i] for i in candidates)
        idle = [i for i in candidates if self.loads[i] == least]
        if self.method != "cache_aware":
            is_by_tokens = self.method == "total_tokens"
            return self._place(self._next(idle), len(prompt) // CHUNK_BYTES + ANSWER_CHUNKS if is_by_tokens else 1)
        keys = list(_chunk_keys(prompt))
        lens = self._known_lens(keys)
        best = max(candidates, key=lambda i: (lens[i], -self.loads[i]))
        is_hot = self.loads[best] - least > HOT_SPOT_CHUNKS and self.loads[best] > HOT_SPOT_RATIO * least
        if is_hot or not keys or lens[best] < MIN_KNOWN_SHARE * len(keys):
            best = self._next(idle)
        self._remember(keys, best)
        return self._place(best, len(keys) - lens[best] + ANSWER_CHUNKS)

    def end(self, placement: Placement) -> None:
        """Its request has ended."""
        self.loads[placement.engine] -= placement.load

    def forget(self, engine: int) -> None:
        """Its cache is empty again."""
        for key in self._known:
            self._known[key] &= ~(1 << engine)

    def _place(self, engine: int, load: int) -> Placement:
        self.loads[engine] += load
        return Placement(engine, load)

    def _next(self, candidates: Sequence[int]) -> int:
        """In turn: the first one after the last taken."""
        self._turn = min(candidates, key=lambda i: (i - self._turn - 1) % len(self.loads))
        return self._turn

    def _known_lens(self, keys: Sequence[int]) -> list[int]:
        """For each engine how many chunks from the first on it was given."""
        num_engines = len(self.loads)
        lens = [0] * num_engines
        holders = (1 << num_engines) - 1
        for count, key in enumerate(keys, start=1):
            holders &= self._known.get(key, 0)
            if not holders:
                break
            for i in range(num_engines):
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
