"""Which engine gets a request: prefixes stay where they are cached, and no engine is left with more to do."""

import random

import pytest

from engine.replicas.balance import ANSWER_CHUNKS, CHUNK_BYTES, HOT_SPOT_CHUNKS, METHODS, Balancer

TOKEN_BYTES = 4
PREFIX_LEN, QUESTION_LEN, NUM_GROUPS, NUM_REQUESTS = 4096, 128, 8, 512  # tokens


def prompt_of(rng: random.Random, num_tokens: int) -> bytes:
    return rng.randbytes(num_tokens * TOKEN_BYTES)


def shared_prefix_prompts(seed: int, num_groups: int = NUM_GROUPS) -> list[tuple[int, bytes]]:
    """(group, prompt) of a burst: each request takes one of a few prefixes, at random, and asks its own question."""
    rng = random.Random(seed)
    prefixes = [prompt_of(rng, PREFIX_LEN) for _ in range(num_groups)]
    groups = rng.choices(range(num_groups), k=NUM_REQUESTS)
    return [(group, prefixes[group] + prompt_of(rng, QUESTION_LEN)) for group in groups]


class Burst:
    """All requests come before the first has ended."""

    def __init__(self, method: str, num_engines: int, prompts: list[tuple[int, bytes]]) -> None:
        balancer = Balancer(method, num_engines)
        self.groups: list[set[int]] = [set() for _ in range(num_engines)]
        self.num_requests = [0] * num_engines
        for group, prompt in prompts:
            engine = balancer.pick(prompt).engine
            self.groups[engine].add(group)
            self.num_requests[engine] += 1

    @property
    def most_tokens(self) -> int:
        """Prompt tokens that the busiest engine computes, each prefix once."""
        counts = zip(self.groups, self.num_requests, strict=True)
        return max(len(groups) * PREFIX_LEN + num_requests * QUESTION_LEN for groups, num_requests in counts)


@pytest.mark.parametrize("method", METHODS)
def test_equal_loads_are_spread_whatever_the_policy(method: str) -> None:
    balancer = Balancer(method, 3)
    assert sorted(balancer.pick(bytes([i]) * 1024).engine for i in range(6)) == [0, 0, 1, 1, 2, 2]


def test_the_shortest_queue_is_the_one_with_the_fewest_requests() -> None:
    for method in ("shortest_queue", "total_requests"):
        balancer = Balancer(method, 2)
        long, _ = balancer.pick(bytes(1 << 20)), balancer.pick(b"")
        balancer.end(long)
        assert [balancer.pick(b"").engine for _ in range(3)] == [0, 1, 0]


def test_the_fewest_tokens_may_be_many_requests() -> None:
    balancer = Balancer("total_tokens", 2)
    assert balancer.pick(bytes(10 * ANSWER_CHUNKS * CHUNK_BYTES)).engine == 0
    assert [balancer.pick(b"").engine for _ in range(12)] == [1] * 11 + [0]


def test_a_known_prefix_goes_where_it_is_cached_until_that_is_a_hot_spot() -> None:
    balancer, rng = Balancer("cache_aware", 2), random.Random(0)
    head, work = prompt_of(rng, 1024), prompt_of(rng, 64 * HOT_SPOT_CHUNKS // 2)
    home = balancer.pick(head).engine
    other = 1 - home
    placements = [balancer.pick(work, [home])]
    assert balancer.pick(head + prompt_of(rng, 64)).engine == home
    assert balancer.pick(head + prompt_of(rng, 2048)).engine == other, "most of it is new"
    assert balancer.pick(prompt_of(rng, 64)).engine == other
    placements.append(balancer.pick(prompt_of(rng, 64 * HOT_SPOT_CHUNKS), [home]))
    assert balancer.pick(head).engine == other, "a hot spot"
    for placement in placements:
        balancer.end(placement)
    balancer.forget(home)
    assert balancer.pick(head).engine == other, "it knows the prefix too by now"


def test_what_has_ended_counts_no_more() -> None:
    for method in METHODS:
        balancer = Balancer(method, 2)
        for placement in [balancer.pick(prompt) for _, prompt in shared_prefix_prompts(0)]:
            balancer.end(placement)
        assert balancer.loads == [0, 0]


def test_what_is_remembered_of_prompts_is_bounded() -> None:
    balancer = Balancer("cache_aware", 2, max_chunks=4)
    home = balancer.pick(b"a" * 1024).engine
    balancer.pick(b"b" * 1024)
    balancer.pick(b"", [home])
    assert balancer.pick(b"a" * 1024).engine != home, "forgotten"


@pytest.mark.parametrize("num_engines", [2, 4])
def test_a_burst_of_requests_with_shared_prefixes_is_spread_evenly_and_each_prefix_goes_to_one_engine(
    num_engines: int,
) -> None:
    prefixes = [bytes([group]) * (PREFIX_LEN * TOKEN_BYTES) for group in range(NUM_GROUPS)]
    rng = random.Random(0)
    prompts = [(i % NUM_GROUPS, prefixes[i % NUM_GROUPS] + prompt_of(rng, QUESTION_LEN)) for i in range(NUM_REQUESTS)]
    for _ in range(10):
        rng.shuffle(prompts)
        burst = Burst("cache_aware", num_engines, prompts)
        assert max(burst.num_requests) <= 1.1 * NUM_REQUESTS / num_engines
        assert sum(map(len, burst.groups)) <= NUM_GROUPS + 1, "but for one that may level a difference"


@pytest.mark.parametrize("num_engines", [2, 3, 4, 8])
@pytest.mark.parametrize("num_groups", [1, 3, 5, 8, 64])
def test_in_a_burst_no_engine_computes_more_than_if_they_took_turns(num_engines: int, num_groups: int) -> None:
    for seed in range(2):
        prompts = shared_prefix_prompts(seed, num_groups)
        turns, aware = (Burst(method, num_engines, prompts) for method in ("round_robin", "cache_aware"))
        margin = 8 * QUESTION_LEN if num_groups == 1 else 0  # every engine computes it, one after the other
        assert aware.most_tokens <= turns.most_tokens + margin
        if num_groups >= 2 * num_engines:
            assert aware.most_tokens < 0.9 * turns.most_tokens
            assert max(aware.num_requests) < 1.25 * NUM_REQUESTS / num_engines


def test_a_prefix_that_everyone_shares_comes_to_be_everywhere() -> None:
    burst = Burst("cache_aware", 4, shared_prefix_prompts(0, num_groups=1))
    assert burst.groups == [{0}] * 4
    assert max(burst.num_requests) < 1.2 * NUM_REQUESTS / 4
