"""The order among waiting clients, and the limits of the queue.

Clients that wait share the server by tokens, in proportion to their weights: the client that has been served least
per unit of weight goes next, and one that comes back to the queue starts level with the one that is furthest behind,
so that nobody saves up tokens while away. This is the virtual token counter of Sheng et al. 2024 (arXiv:2401.00588),
with one difference: an answer's length is charged when its request is admitted, as the mean of what ended so far,
and put right at its end, so nothing here is called for each token.
"""

import itertools
import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator

from engine.errors import QueueFull
from engine.state import RequestState

FIRST_GUESS = 128.0  # tokens of an answer, before any has ended
MAX_IDLE_CLIENTS = 1024  # remembered although they do not wait, before those that owe nothing are forgotten
DRAIN_MEMORY_S = 30.0  # of working time, over which the drain rate is a mean
MAX_RETRY_S = 600.0


class FairShares:
    """Keep the accounts of clients: how much each waits for, and how much each has been served.

    max_requests, max_tokens: what may wait in the queue, as requests and as prompt tokens.
    """

    def __init__(self, max_requests: int | None = None, max_tokens: int | None = None) -> None:
        self.max_requests, self.max_tokens = max_requests, max_tokens
        self.num_requests: Counter[str] = Counter()  # client -> its waiting requests
        self.num_tokens: Counter[str] = Counter()  # client -> the prompt tokens of these
        self.num_waiting_tokens = 0
        self.num_served_tokens = 0  # computed for requests that have ended
        self.mean_answer = FIRST_GUESS
        self._served: dict[str, float] = {}  # client -> tokens per unit of weight, lifted on return to the queue
        self._last_served = 0.0  # where the client stood that was admitted last

    # ---- the queue's length ----

    def check(self, state: RequestState, num_free: int = 0) -> None:
        """Raise `QueueFull` if one more request is one too many.

        A full queue still takes from a client that holds less than its equal part of it: a client that floods the
        queue does not shut out the others. It takes all that one HTTP request asks for, or nothing.

        num_free: requests of the queue that the next step lets run.
        """
        if not self.num_requests or state.joins_others:
            return
        num_waiting = self.num_requests.total() - num_free
        client = state.request.client
        num_clients = len(self.num_requests.keys() | {client})
        limit = self.max_requests
        if limit is not None and num_waiting >= limit and self.num_requests[client] >= limit // num_clients:
            raise QueueFull(f"{num_waiting} requests are waiting, the limit is {limit}")
        limit = self.max_tokens
        if (
            limit is not None
            and self.num_waiting_tokens + state.prompt_len > limit
            and self.num_tokens[client] + state.prompt_len > limit // num_clients
        ):
            raise QueueFull(
                f"{self.num_waiting_tokens} prompt tokens are waiting and this prompt has {state.prompt_len}, "
                f"the limit is {limit}"
            )

    def enter(self, state: RequestState) -> None:
        """Enter `state` among those that wait."""
        client = state.request.client
        if client not in self.num_requests:
            others = (self._served[other] for other in self.num_requests)
            floor = min(others, default=self._last_served)
            self._served[client] = max(self._served.get(client, floor), floor)
            if len(self._served) > MAX_IDLE_CLIENTS + len(self.num_requests):
                self._served = {
                    name: served
                    for name, served in self._served.items()
                    if served > floor or name == client or name in self.num_requests
                }
        self.num_requests[client] += 1
        self.num_tokens[client] += state.prompt_len
        self.num_waiting_tokens += state.prompt_len

    def leave(self, state: RequestState) -> None:
        """Remove `state` from those that wait."""
        client = state.request.client
        self.num_requests[client] -= 1
        self.num_tokens[client] -= state.prompt_len
        self.num_waiting_tokens -= state.prompt_len
        if not self.num_requests[client]:
            del self.num_requests[client], self.num_tokens[client]

    # ---- who goes next ----

    def served(self, client: str) -> float:
        """Return the tokens per unit of weight that `client` has been served: who waits and has least goes next."""
        return self._served[client]

    def admit(self, state: RequestState, num_cached: int) -> None:
        """Charge `state`, which leaves the queue to run, what it will cost; `num_cached` prompt tokens are free."""
        self.leave(state)
        if state.charged_tokens:  # it was retracted: paid for when first admitted
            return
        client, weight = state.request.client, state.request.weight
        self._last_served = self._served[client]
        state.charged_tokens = self._expected_cost(state, num_cached)
        self._served[client] += state.charged_tokens / weight

    def settle(self, state: RequestState) -> None:
        """Charge `state`, which has ended, what it took, and not what was expected."""
        if not state.charged_tokens:
            return
        num_output = len(state.output_ids)
        cost = state.prompt_len - state.num_cached_tokens + num_output
        self.num_served_tokens += cost
        self.mean_answer += 0.05 * (num_output - self.mean_answer)
        client, weight = state.request.client, state.request.weight
        if client in self._served:
            self._served[client] += (cost - state.charged_tokens) / weight
        state.charged_tokens = 0.0

    def _expected_cost(self, state: RequestState, num_cached: int) -> float:
        answer = min(state.max_new_tokens, self.mean_answer)
        return max(state.prompt_len - num_cached + answer, 1.0)

    @property
    def num_waiting_work(self) -> float:
        """Tokens to compute for all that waits, estimated."""
        return self.num_waiting_tokens + self.mean_answer * self.num_requests.total()


class Queue:
    """Keep waiting requests in lines: of retracted and new ones, of each priority, each client, each own priority.

    Coming, leaving and finding the next one take no longer the more requests wait.
    """

    def __init__(self, shares: FairShares) -> None:
        self._shares = shares
        self._lines: dict[tuple[bool, int, str, int], OrderedDict[RequestState, None]] = {}  # of those that have any
        self.has_newcomers = False  # somebody has come since `QueueOrder` sorted it

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __bool__(self) -> bool:
        return bool(self._lines)

    def __iter__(self) -> Iterator[RequestState]:
        return itertools.chain.from_iterable(self._lines.values())

    def add(self, state: RequestState, *, is_first: bool = False) -> None:
        """Put `state` at the end of its line, or at its head. `FairShares.enter` must come before."""
        line = self._lines.setdefault(_line_of(state), OrderedDict())
        line[state] = None
        line.move_to_end(state, last=not is_first)
        self.has_newcomers = True

    def remove(self, state: RequestState) -> None:
        key = _line_of(state)
        del self._lines[key][state]
        if not self._lines[key]:
            del self._lines[key]

    def next(self) -> RequestState:
        """Return the request to admit next.

        What was retracted was promised its place: it comes first. Then the highest priority counts, then which client
        has been served least, then which of its requests it holds highest, then the order within the line.
        """
        *head, _ = min(self._lines, key=lambda key: (*key[:2], self._shares.served(key[2])))
        key = min((key for key in self._lines if [*key[:3]] == head), key=lambda key: key[3])
        return next(iter(self._lines[key]))

    def reorder(self, states: Iterable[RequestState]) -> None:
        """Put all that wait, which must be `states`, into their lines in that order."""
        self._lines.clear()
        for state in states:
            self.add(state)


def _line_of(state: RequestState) -> tuple[bool, int, str, int]:
    request = state.request
    return state.num_retractions == 0, -request.priority, request.client, -request.own_priority


class DrainRate:
    """Measure the tokens per second that leave the engine in requests that ended, while it has work.

    Times are the caller's, in seconds; idle time between `idle` and `busy` does not count.
    """

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0  # sums that fade with DRAIN_MEMORY_S
        self._last_total = 0
        self._since: float | None = None  # None: idle

    def busy(self, now: float) -> None:
        """Begin to count time, if there was no work before."""
        if self._since is None:
            self._since = now

    def observe(self, now: float, num_served_tokens: int, *, is_idle: bool) -> None:
        """Count a request that has ended; `num_served_tokens` were computed for all that ended so far."""
        if self._since is not None:
            elapsed = max(now - self._since, 0.0)
            fading = math.exp(-elapsed / DRAIN_MEMORY_S)
            self._tokens = self._tokens * fading + num_served_tokens - self._last_total
            self._seconds = self._seconds * fading + elapsed
        self._last_total = num_served_tokens
        self._since = None if is_idle else now

    @property
    def tokens_per_s(self) -> float:
        """Tokens per working second, 0 until a request has ended."""
        return self._tokens / self._seconds if self._seconds else 0.0

    def seconds_for(self, num_tokens: float, now: float) -> float:
        """Return how long `num_tokens` of work take: at least a second, and a guess before anything has ended."""
        if self.tokens_per_s:
            seconds = num_tokens / self.tokens_per_s
        else:
            seconds = 0.0 if self._since is None else now - self._since
        return min(max(seconds, 1.0), MAX_RETRY_S)
