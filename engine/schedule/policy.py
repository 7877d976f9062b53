"""The order in which waiting requests are admitted, as far as priorities and clients' shares leave it open."""

import random
from collections import Counter

from cache.radix import Node
from engine.schedule.fairness import Queue
from engine.schedule.holdings import Holdings
from engine.state import RequestState

MAX_SORTED_QUEUE = 128  # matching a longer queue against the tree costs more than its order gains
MAX_OVERTAKEN = 256  # requests that the policy may admit before one that came earlier


class QueueOrder:
    """Sort the queue when requests have come: a tree that grows in between gains less than matching it again costs."""

    def __init__(self, policy: str, held: Holdings, rng: random.Random) -> None:
        """policy: as --schedule-policy; rng: shuffles for the policy "random"."""
        self.policy = policy
        self._held, self._random = held, rng

    def sort(self, waiting: Queue, num_admitted: int) -> None:
        """Reorder `waiting`, if that has not been done. num_admitted: requests so far, in all."""
        if waiting.has_newcomers and len(waiting) <= MAX_SORTED_QUEUE:
            waiting.reorder(self._by_policy(waiting, num_admitted))
        waiting.has_newcomers = False

    def _by_policy(self, queue: Queue, num_admitted: int) -> list[RequestState]:
        cache = self._held.cache
        waiting = sorted(queue, key=lambda r: r.times.arrived)
        # Requests that the policy likes least are overtaken only so often.
        newest_overdue = num_admitted - MAX_OVERTAKEN
        overdue = [r for r in waiting if r.num_admitted_before <= newest_overdue]
        waiting = [r for r in waiting if r.num_admitted_before > newest_overdue]
        if self.policy == "random":
            self._random.shuffle(waiting)
        elif self.policy == "lpm":
            waiting.sort(key=lambda r: -cache.match_len(r.all_token_ids(), r.extra_key))
        elif self.policy == "dfs-weight":
            waiting = _depth_first(waiting, {id(r): cache.match(r.all_token_ids(), r.extra_key).node for r in waiting})
        return overdue + waiting


def _depth_first(waiting: list[RequestState], node_of: dict[int, Node]) -> list[RequestState]:
    """Return requests in depth-first order of the tree nodes they match, the branch with more requests first."""
    weights: Counter[int] = Counter()
    paths: dict[int, list[int]] = {}
    for state in waiting:
        node: Node | None = node_of[id(state)]
        path = []
        while node is not None:
            path.append(id(node))
            node = node.parent
        paths[id(state)] = path[::-1]
        weights.update(path)
    return sorted(waiting, key=lambda r: [(-weights[node], node) for node in paths[id(r)]])
