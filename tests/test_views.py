"""Test views of a running engine: its oldest requests and the branches of its prefix tree."""

from contextlib import aclosing
from pathlib import Path

import numpy as np
import pytest

import cache.outline
from cache.outline import outline
from cache.radix import Node, RadixCache
from engine.config import EngineConfig
from engine.local import LocalEngine
from engine.request import Request, SamplingParams
from engine.state import RequestState


def fill(tree: RadixCache, ids: list[int], first_slot: int, extra_key: str = "") -> Node:
    tokens = np.array(ids, np.int32)
    return tree.insert(tokens, np.arange(first_slot, first_slot + len(ids), dtype=np.int32), extra_key)[1]


@pytest.fixture
def tree() -> RadixCache:
    """Return 1-2-3 and 1-2-4, which is locked, 5-6, which was hit twice, and a tree apart of another key."""
    tree = RadixCache(1)
    fill(tree, [1, 2, 3], 10)
    tree.lock(fill(tree, [1, 2, 4], 20))
    hit = fill(tree, [5, 6], 30)
    fill(tree, [7, 8, 9], 40, "other")
    tree.hit(hit)
    tree.hit(hit)
    return tree


def test_branches_come_in_use_first_then_by_hits_and_behind_their_parents(tree: RadixCache) -> None:
    views, places = outline(tree, 10, without="other")
    assert [(view.parent, view.start, view.head.tolist(), view.lock_ref, view.hits) for view in views] == [
        (-1, 0, [1, 2], 1, 0), (0, 2, [4], 1, 0), (-1, 0, [5, 6], 0, 2), (0, 2, [3], 0, 0),
    ]  # fmt: skip
    assert [view.num_tokens for view in views] == [2, 1, 2, 1]
    assert list(places.values()) == [0, 1, 2, 3]
    assert [view.head.tolist() for view in outline(tree, 10)[0]].count([7, 8, 9]) == 1


def test_what_is_left_out_is_counted(tree: RadixCache) -> None:
    views, _ = outline(tree, 2, without="other")
    assert [(view.head.tolist(), view.num_hidden) for view in views] == [([1, 2], 1), ([4], 0)]


def test_of_a_wide_node_only_the_newest_children_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache.outline, "MAX_CHILDREN", 3)
    tree = RadixCache(1)
    for i in range(10):
        fill(tree, [i, 0], 100 + 2 * i)
    assert sorted(view.head[0] for view in outline(tree, 10)[0]) == [7, 8, 9]


async def test_a_live_request_shows_its_tokens_and_holds_its_branch(tiny_llama: Path) -> None:
    config = EngineConfig(model_path=str(tiny_llama), device="cpu", dtype="float32", max_total_tokens=2048)
    params = SamplingParams(max_new_tokens=400, ignore_eos=True)
    async with LocalEngine(config) as engine:
        prompt = list(range(100, 132))
        state = RequestState(Request("mine", prompt, params, stream=True))
        async with aclosing(engine.generate(state)) as deltas:
            async for _ in deltas:
                (view,) = engine.oldest_requests(4)
                if view.num_output_tokens > 3:
                    break
            assert (view.rid, view.is_running, view.num_cached_tokens) == ("mine", True, 0)
            (branch,) = engine.top_branches(8)
            assert (branch.head.tolist(), branch.num_users, branch.rids) == (prompt[:24], 1, ("mine",))
        assert engine.oldest_requests(4) == []
        (branch,) = engine.top_branches(8)
        assert (branch.num_users, branch.rids) == (0, ())
