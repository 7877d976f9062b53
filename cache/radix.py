"""The prompts whose keys and values are still in the KV buffers: a radix tree over token ids.

An edge (a node's token_ids) is a run of whole pages; two children of a node differ within their first page. Keys with
different `extra_key` have no node but the root in common. Idea: RadixAttention, Zheng et al. 2023 (arXiv:2312.07104).

Token ids are kept as bytes: comparing a node with a prompt is then one memcmp in place, and a page is a dict key as it
is. Offsets called `start` or `end` are in bytes.

A node is evictable or locked. Locking a node locks its path to the root, and time of last access never grows downwards,
so the least recently used evictable node is always found among the leaves.
"""

import heapq
import itertools
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Optional

import numpy as np

NO_SLOTS = np.empty(0, dtype=np.int32)
NO_SLOTS.flags.writeable = False
EVICTED = -1
TOKEN_BYTES = 4


class Node:
    """Hold the tokens between the end of `parent` and its own end. Callers read; only the tree writes."""

    __slots__ = (
        "children",
        "data",
        "depth_tokens",
        "hits",
        "in_heap",
        "key",
        "last_access",
        "lock_ref",
        "parent",
        "slots",
    )

    def __init__(self, parent: Optional["Node"], key: Hashable, data: bytes, slots: np.ndarray) -> None:
        self.parent = parent  # None: the root
        self.key = key  # its place in parent.children
        self.children: dict[Hashable, Node] = {}
        self.data = data  # its token ids
        self.slots = slots  # int32 [n]
        self.depth_tokens: int = len(slots) + (parent.depth_tokens if parent is not None else 0)  # root to its end
        self.lock_ref = 0  # EVICTED once it has left the tree
        self.last_access = 0
        self.hits = 0
        self.in_heap = False

    @property
    def token_ids(self) -> np.ndarray:
        """int32 [n], read-only."""
        return np.frombuffer(self.data, dtype=np.int32)


class Match(NamedTuple):
    slots: np.ndarray  # int32 [num_tokens] of the prefix
    node: Node  # ends where the prefix ends; the root when nothing matched
    num_whole: int  # leading tokens behind which a request can go on: all, but where layers have a window


class Prefix(NamedTuple):
    """Describe one prefix, for `top_prefixes`."""

    token_ids: np.ndarray  # int32, its first tokens
    num_tokens: int  # all of it
    lock_ref: int
    hits: int


@dataclass(frozen=True, slots=True)
class RadixStats:
    num_nodes: int
    """Nodes without the root."""
    num_evictable: int
    """Tokens that nobody locks."""
    num_locked: int
    """Tokens that somebody locks."""
    num_matches: int
    """Calls of `match`."""
    num_lookup_tokens: int
    """Tokens that `match` was asked for, in whole pages."""
    num_hit_tokens: int
    """Those of num_lookup_tokens that `match` found."""
    num_evicted: int
    """Tokens dropped to make room."""

    @property
    def num_cached(self) -> int:
        return self.num_evictable + self.num_locked

    @property
    def hit_rate(self) -> float:
        return self.num_hit_tokens / max(self.num_lookup_tokens, 1)


class RadixCache:
    """Own the slots of cached prefixes; all others are the caller's. `token_ids` are int32 [n], and are copied."""

    node_class: ClassVar[type[Node]] = Node

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self._page_bytes = page_size * TOKEN_BYTES
        self.root = self.node_class(None, None, b"", NO_SLOTS)
        self.num_evictable = 0
        self.num_locked = 0
        self._num_nodes = 0
        self._num_matches = 0
        self._num_lookup_tokens = 0
        self._num_hit_tokens = 0
        self._num_evicted = 0
        self._now = 0  # of last_access: counts calls of match and insert
        # Every unlocked leaf is in the heap, once, under its last_access or an earlier one: a touch costs no push, and
        # evict() puts off or drops what it finds out of date.
        self._heap: list[tuple[int, int, Node]] = []
        self._serial = itertools.count()  # breaks ties, nodes do not compare

    def new_empty(self) -> "RadixCache":
        """Return another tree like this one, without nodes."""
        return type(self)(self.page_size)

    @property
    def num_cached(self) -> int:
        """Tokens in the tree."""
        return self.num_evictable + self.num_locked

    def match(self, token_ids: np.ndarray, extra_key: str = "") -> Match:
        """Return the longest cached prefix of `token_ids`, whole pages only, now the most recently used one.

        Splits a node when the match ends inside it. The slots may be evicted until `lock(match.node)`.
        """
        data = self._whole_pages(token_ids)
        path, num_matched = self._touch(data, extra_key)
        self._num_matches += 1
        self._num_lookup_tokens += len(data) // TOKEN_BYTES
        self._num_hit_tokens += num_matched
        if not path:
            return Match(NO_SLOTS, self.root, 0)
        return Match(np.concatenate([node.slots for node in path]), path[-1], num_matched)

    def match_len(self, token_ids: np.ndarray, extra_key: str = "") -> int:
        """Return the number of tokens that `match` would find. Changes nothing: for ordering a queue."""
        return self._walk(self._whole_pages(token_ids), extra_key)[1]

    def whole_len(self, node: Node, limit: int) -> int:
        """Return the tokens, `limit` at most, of the prefix that ends at `node` behind which a request can go on."""
        return min(node.depth_tokens, limit)

    def insert(self, token_ids: np.ndarray, slots: np.ndarray, extra_key: str = "") -> tuple[int, Node]:
        """Put the whole pages of `token_ids` into the tree. Returns (num_existing, the node where they end).

        The tree takes over slots[num_existing : whole pages]. The first `num_existing` tokens were there already: the
        caller's slots for them are still the caller's, unless they are the tree's own. Slots: int32 [>= n].
        """
        data = self._whole_pages(token_ids)
        path, num_existing = self._touch(data, extra_key)
        node = path[-1] if path else self.root
        num_whole = len(data) // TOKEN_BYTES
        if num_existing == num_whole:
            return num_existing, node
        assert len(slots) >= num_whole, f"{num_whole} tokens, {len(slots)} slots"
        rest = data[num_existing * TOKEN_BYTES :]
        page = rest[: self._page_bytes]
        key = page if path else (extra_key, page)
        leaf = self.node_class(node, key, rest, slots[num_existing:num_whole].copy())
        leaf.last_access = self._now
        node.children[key] = leaf
        self._num_nodes += 1
        self.num_evictable += num_whole - num_existing
        self._push_if_evictable(leaf)
        return num_existing, leaf

    def hit(self, node: Node) -> None:
        """Count a request that is served from the prefix that ends at `node`; see `top_prefixes`."""
        for step in self.path(node):
            step.hits += 1

    def lock(self, node: Node) -> None:
        """Keep `node` and its path to the root from eviction, until as many `unlock`s."""
        for step in self.path(node):
            assert step.lock_ref != EVICTED, "locked a node that was evicted after its match"
            if step.lock_ref == 0:
                self.num_evictable -= len(step.slots)
                self.num_locked += len(step.slots)
            step.lock_ref += 1

    def unlock(self, node: Node) -> None:
        """Undo one `lock(node)`."""
        for step in self.path(node):
            assert step.lock_ref > 0, "unlocked more often than locked"
            step.lock_ref -= 1
            if step.lock_ref == 0:
                self.num_evictable += len(step.slots)
                self.num_locked -= len(step.slots)
                self._push_if_evictable(step)

    def evict(self, num_tokens: int) -> np.ndarray:
        """Drop least recently used unlocked leaves, whole nodes, until `num_tokens` are freed or none is left.

        Returns their slots (int32), now the caller's. O(log nodes) a leaf, amortized over the touches since.
        """
        freed: list[np.ndarray] = []
        num_freed = 0
        while num_freed < num_tokens and self._heap:
            last_access, _, node = self._heap[0]
            if not node.children and node.lock_ref == 0 and node.last_access != last_access:
                heapq.heapreplace(self._heap, (node.last_access, next(self._serial), node))
                continue
            heapq.heappop(self._heap)
            node.in_heap = False
            if node.children or node.lock_ref:
                continue
            parent = node.parent
            assert parent is not None
            del parent.children[node.key]
            node.lock_ref = EVICTED
            self._on_evicted(node)
            freed.append(node.slots)
            num_freed += len(node.slots)
            self._num_nodes -= 1
            self._push_if_evictable(parent)
        self.num_evictable -= num_freed
        self._num_evicted += num_freed
        return np.concatenate(freed) if freed else NO_SLOTS

    def reset(self) -> np.ndarray:
        """Empty the tree, in which nothing may be locked. Returns all its slots (int32), now the caller's."""
        assert self.num_locked == 0, f"{self.num_locked} tokens are locked"
        return self.evict(self.num_evictable)

    def path(self, node: Node) -> Iterator[Node]:
        """Yield `node` and its ancestors, deepest first, without the root."""
        while node.parent is not None:
            yield node
            node = node.parent

    def top_prefixes(self, k: int, head_len: int = 32) -> list[Prefix]:
        """Return the k prefixes that were hit most often, each as far as all its hits went, with its first tokens."""
        # Hits never grow downwards, so a best-first search finds them in order.
        top: list[Prefix] = []
        frontier = [(-node.hits, next(self._serial), node) for node in self.root.children.values() if node.hits]
        heapq.heapify(frontier)
        while frontier and len(top) < k:
            _, _, node = heapq.heappop(frontier)
            for child in node.children.values():
                if child.hits:
                    heapq.heappush(frontier, (-child.hits, next(self._serial), child))
            if all(child.hits < node.hits for child in node.children.values()):
                head = b"".join([step.data for step in self.path(node)][::-1])[: head_len * TOKEN_BYTES]
                top.append(Prefix(np.frombuffer(head, dtype=np.int32), node.depth_tokens, node.lock_ref, node.hits))
        return top

    def stats(self) -> RadixStats:
        return RadixStats(
            num_nodes=self._num_nodes,
            num_evictable=self.num_evictable,
            num_locked=self.num_locked,
            num_matches=self._num_matches,
            num_lookup_tokens=self._num_lookup_tokens,
            num_hit_tokens=self._num_hit_tokens,
            num_evicted=self._num_evicted,
        )

    def slots(self) -> np.ndarray:
        """Return every slot in the tree (int32 [num_cached]). Linear in the tree: for tests and idle time."""
        return np.concatenate([NO_SLOTS, *(node.slots for node in self.nodes())])

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken. Linear in the tree: for tests and idle time."""
        num_nodes = num_evictable = num_locked = 0
        in_heap = {id(node) for _, _, node in self._heap}
        assert len(in_heap) == len(self._heap), "a node is in the heap twice"
        for node in self.nodes():
            parent = node.parent
            assert parent is not None
            assert parent.children[node.key] is node
            num = len(node.slots)
            assert num > 0
            assert num % self.page_size == 0, f"a node of {num} slots"
            assert len(node.data) == num * TOKEN_BYTES
            assert (node.key[1] if isinstance(node.key, tuple) else node.key) == node.data[: self._page_bytes]
            assert isinstance(node.key, tuple) == (parent is self.root)
            assert node.depth_tokens == parent.depth_tokens + num
            pages = node.slots.reshape(-1, self.page_size)
            assert (pages[:, 0] % self.page_size == 0).all(), "a page starts inside a page"
            assert (pages == pages[:, :1] + np.arange(self.page_size)).all(), "slots of a page are not in order"
            assert node.lock_ref >= sum(child.lock_ref for child in node.children.values())
            for child in node.children.values():
                assert child.last_access <= node.last_access
                assert child.hits <= node.hits
            assert node.in_heap == (id(node) in in_heap)
            if not node.children and node.lock_ref == 0:
                assert node.in_heap, "an unlocked leaf that evict() cannot find"
            num_nodes += 1
            num_evictable += num if node.lock_ref == 0 else 0
            num_locked += num if node.lock_ref else 0
        assert all(entry[0] <= entry[2].last_access for entry in self._heap)
        assert num_nodes == self._num_nodes
        assert (num_evictable, num_locked) == (self.num_evictable, self.num_locked)
        assert len(np.unique(self.slots())) == self.num_cached, "a slot is in the tree twice"

    def _whole_pages(self, token_ids: np.ndarray) -> bytes:
        assert token_ids.dtype == np.int32, f"token_ids are {token_ids.dtype}"
        return token_ids[: len(token_ids) // self.page_size * self.page_size].tobytes()

    def _walk(self, data: bytes, extra_key: str) -> tuple[list[Node], int]:
        """Return the nodes along `data`, the last one perhaps in part, and how many tokens they have in common."""
        path: list[Node] = []
        node, start = self.root, 0
        key: Hashable = (extra_key, data[: self._page_bytes])
        while start < len(data):
            child = node.children.get(key)
            if child is None:
                break
            path.append(child)
            if not data.startswith(child.data, start):
                num_common = _common_len(child.token_ids, np.frombuffer(data, dtype=np.int32, offset=start))
                return path, node.depth_tokens + num_common // self.page_size * self.page_size
            node, start = child, start + len(child.data)
            key = data[start : start + self._page_bytes]
        return path, node.depth_tokens

    def _touch(self, data: bytes, extra_key: str) -> tuple[list[Node], int]:
        """Walk along `data`, split the last node if it goes on beyond the common part, mark all as just used."""
        path, num_matched = self._walk(data, extra_key)
        if path and path[-1].depth_tokens > num_matched:
            path[-1] = self._split(path[-1], num_matched)
        self._now += 1
        for node in path:
            node.last_access = self._now
        return path, num_matched

    def _split(self, node: Node, depth_tokens: int) -> Node:
        """Cut `node` in two at `depth_tokens` and return the upper one.

        The upper one is the new object: whoever holds `node` (a lock, a heap entry) means the path down to its end.
        """
        parent = node.parent
        assert parent is not None
        cut = depth_tokens - parent.depth_tokens
        upper = self.node_class(parent, node.key, node.data[: cut * TOKEN_BYTES], node.slots[:cut].copy())
        upper.lock_ref, upper.last_access, upper.hits = node.lock_ref, node.last_access, node.hits
        parent.children[node.key] = upper
        node.data, node.slots = node.data[cut * TOKEN_BYTES :], node.slots[cut:].copy()
        node.parent, node.key = upper, node.data[: self._page_bytes]
        upper.children[node.key] = node
        self._num_nodes += 1
        return upper

    def _on_evicted(self, node: Node) -> None:
        """Take note that `node` has left the tree: for trees that know more of a node."""

    def _push_if_evictable(self, node: Node) -> None:
        if not node.in_heap and not node.children and node.lock_ref == 0 and node.parent is not None:
            node.in_heap = True
            heapq.heappush(self._heap, (node.last_access, next(self._serial), node))

    def ids_from(self, first: int) -> set[int]:
        """Return the token ids in the tree that are `first` or more. Linear in the tree."""
        found: set[int] = set()
        for node in self.nodes():
            ids = node.token_ids
            found.update(ids[ids >= first].tolist())
        return found

    def nodes(self) -> Iterator[Node]:
        """Yield every node but the root, in no order."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())


class NoCache(RadixCache):
    """Remember nothing: every match is empty, every slot stays its request's."""

    def insert(self, token_ids: np.ndarray, slots: np.ndarray, extra_key: str = "") -> tuple[int, Node]:  # noqa: ARG002
        """Take over none of `slots`: as if all whole pages were there already."""
        return len(token_ids) // self.page_size * self.page_size, self.root


def _common_len(a: np.ndarray, b: np.ndarray) -> int:
    """Return the length of the common prefix of two arrays, neither empty."""
    num = min(len(a), len(b))
    differs = a[:num] != b[:num]
    first = int(differs.argmax())  # 0 also when none differs
    return first if differs[first] else num
