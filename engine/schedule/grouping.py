"""Groups of decoding requests that share a cached prefix worth reading once for all of them."""

from collections import Counter

import numpy as np

from cache.radix import Node
from engine.schedule.cohort import Cohort
from engine.schedule.holdings import Holdings, shared_node
from engine.schedule.plan import Groups

MIN_SHARED_TOKENS = 2048  # reads of shared KV a step must save for the grouped attention to pay


class PrefixGroups:
    """Group decoding requests, and remember the last step's groups, which stay while its requests do."""

    def __init__(self, held: Holdings) -> None:
        self._held = held
        self.groups: Groups | None = None  # of the requests asked for last
        self._cohort: Cohort | None = None  # these, if they were one
        self._key = (b"", b"")  # their rows and epochs

    def find(self, decodes: np.ndarray, epochs: np.ndarray, cohort: Cohort | None) -> Groups | None:
        """Put each decoding row into the group of the tree node whose shared reading saves most, if that is much.

        decodes: int64 [B]; epochs: int64 [>= B], theirs first; cohort: these rows, if they are one.
        """
        num_decodes = len(decodes)
        if num_decodes < 2:
            return None
        if cohort is self._cohort and cohort is not None:
            return self.groups
        key = (decodes.tobytes(), epochs[:num_decodes].tobytes())
        is_same, self._cohort, self._key = key == self._key, cohort, key
        if not is_same:  # the same without a cohort: some that are left out of step after step
            self.groups = self._group(decodes)
        return self.groups

    def _group(self, decodes: np.ndarray) -> Groups | None:
        held = self._held
        if int(held.cached_lens[decodes].sum()) < MIN_SHARED_TOKENS:
            return None
        # By the deepest node that each shares with anybody: most rows have leaves of their own, and few nodes the rest.
        sharing: dict[Node, list[int]] = {}
        for i, row in enumerate(decodes.tolist()):
            sharing.setdefault(shared_node(held.nodes[row]), []).append(i)
        num_users: Counter[Node] = Counter()
        for node, indices in sharing.items():
            for above in held.cache.path(node):
                num_users[above] += len(indices)
        members: dict[Node, list[int]] = {}
        for node, indices in sharing.items():
            path = held.cache.path(node)
            best = max(path, key=lambda node: (num_users[node] - 1) * node.depth_tokens, default=None)
            if best is not None:
                members.setdefault(best, []).extend(indices)
        members = {node: indices for node, indices in members.items() if len(indices) > 1}
        if sum((len(indices) - 1) * node.depth_tokens for node, indices in members.items()) < MIN_SHARED_TOKENS:
            return None
        own_starts = np.zeros(len(decodes), np.int32)
        for node, indices in members.items():
            own_starts[indices] = node.depth_tokens
        return Groups(
            prefix_lens=np.array([node.depth_tokens for node in members], np.int32),
            cu_members=np.cumsum([0, *map(len, members.values())], dtype=np.int32),
            members=np.concatenate([np.array(indices, np.int32) for indices in members.values()]),
            own_starts=own_starts,
        )
