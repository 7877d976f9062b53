"""A picture of a radix tree: its most used nodes, each behind its parent."""

import heapq
import itertools
from typing import NamedTuple

import numpy as np

from cache.radix import Node, RadixCache

MAX_CHILDREN = 256  # of one node that are looked at, the newest: a root may have tens of thousands
HEAD_LEN = 24  # tokens


class NodeView(NamedTuple):
    parent: int  # place of its parent in the picture; -1: the root
    start: int  # tokens before it
    num_tokens: int
    head: np.ndarray  # int32, its first tokens
    lock_ref: int
    hits: int
    num_hidden: int  # children that are not in the picture


def outline(cache: RadixCache, num_nodes: int, without: str | None = None) -> tuple[list[NodeView], dict[Node, int]]:
    """Return the nodes in use, then those hit most and used last, and their places.

    without: an extra_key whose nodes are left out. The cost is bounded, however large the tree is.
    """
    # None of the three grows downwards, so a best-first search finds them in order, parents first.
    serial = itertools.count()
    frontier: list[tuple[tuple[int, int, int], int, Node]] = []
    places: dict[Node, int] = {}

    def look_below(node: Node) -> None:
        for child in itertools.islice(reversed(node.children.values()), MAX_CHILDREN):
            if not (isinstance(child.key, tuple) and child.key[0] == without):
                rank = (-child.lock_ref, -child.hits, -child.last_access)
                heapq.heappush(frontier, (rank, next(serial), child))

    look_below(cache.root)
    while frontier and len(places) < num_nodes:
        _, _, node = heapq.heappop(frontier)
        places[node] = len(places)
        look_below(node)
    num_shown = dict.fromkeys(places, 0)
    for node in places:
        if node.parent in num_shown:
            num_shown[node.parent] += 1
    views = [
        NodeView(
            -1 if node.parent is None else places.get(node.parent, -1),
            node.depth_tokens - len(node.slots),
            len(node.slots),
            node.token_ids[:HEAD_LEN],
            node.lock_ref,
            node.hits,
            len(node.children) - num_shown[node],
        )
        for node in places
    ]
    return views, places
