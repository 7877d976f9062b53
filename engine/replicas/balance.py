"""The choice of the engine, among several, that gets a request."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# The names are SGLang's, which has called shortest_queue total_requests of late.
METHODS = ("cache_aware", "round_robin", "shortest_queue", "total_requests", "total_tokens")
PROMPT_METHODS = ("cache_aware", "total_tokens")  # those that look at the prompt
CHUNK_BYTES = 256  # of a prompt: 64 token ids, or about 64 tokens of text
ANSWER_CHUNKS = 4  # load of an answer, whose length is unknown
MAX_CHUNKS = 1 << 18  # remembered: 16 million tokens of prompts
MIN_KNOWN_SHARE = 0.5  # of a prompt, from which on its cached part decides where the prompt goes
HOT_SPOT_CHUNKS, HOT_SPOT_RATIO = 128, 1.25  # an engine this far ahead of the least busy one is a hot spot


@dataclass(frozen=True, slots=True)
class Placement:
    """The engine that got a request, and the request's load there until `Balancer.end`."""

    engine: int
    load: int


class Balancer:
    """Chooses engines by `method`, one of METHODS.

    round_robin cycles through the engines. total_requests (shortest_queue) picks the one with the fewest requests,
    total_tokens the one with the fewest tokens. cache_aware picks the one that got the longest head of the prompt
    before, unless that head is short or the engine is a hot spot: then it picks the one with the least load. What an
    engine has cached is inferred from the prompts that it got, so a prefix counts as soon as it is sent, and an
    eviction goes unnoticed.

    For cache_aware, a request's load is its answer and the chunks of its prompt that are new to the engine. If loads
    were numbers of requests, an engine with few requests would get new prefixes, however much it has yet to compute.
    """

    def __init__(self, method: str, num_engines: int, max_chunks: int = MAX_CHUNKS) -> None:
        self.method, self.max_chunks = method, max_chunks
        self.loads = [0] * num_engines  # in requests, or in chunks that live requests hold or have yet to compute
        self._last = -1
        self._known: OrderedDict[int, int] = OrderedDict()  # chunk with all before it -> bits of engines; oldest first

    def pick(self, prompt: bytes, candidates: Sequence[int] | None = None) -> Placement:
        """Choose the engine for `prompt` among `candidates` (default: all), and add the request to its load."""
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
        """Subtract the load of a request that has ended."""
        self.loads[placement.engine] -= placement.load

    def forget(self, engine: int) -> None:
        """Forget the prompts that `engine` got: its cache has been flushed."""
        for key in self._known:
            self._known[key] &= ~(1 << engine)

    def _place(self, engine: int, load: int) -> Placement:
        self.loads[engine] += load
        return Placement(engine, load)

    def _next(self, candidates: Sequence[int]) -> int:
        """Return the first candidate after the engine that was returned last: idle engines alternate."""
        self._last = min(candidates, key=lambda i: (i - self._last - 1) % len(self.loads))
        return self._last

    def _known_lens(self, keys: Sequence[int]) -> list[int]:
        """Return for each engine how many of `keys`, counted from the first, it got before."""
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
    """Yield a key for each whole chunk: a hash of it and all chunks before it."""
    key = 0
    for end in range(CHUNK_BYTES, len(prompt) + 1, CHUNK_BYTES):
        key = hash((key, prompt[end - CHUNK_BYTES : end]))
        yield key
