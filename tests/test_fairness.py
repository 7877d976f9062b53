"""Who runs next when several clients wait, when the queue is full, and that long prompts hold up no stream."""

import asyncio
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from engine.errors import QueueFull
from engine.request import Request, SamplingParams
from engine.schedule.fairness import MAX_IDLE_CLIENTS, MAX_RETRY_S, DrainRate, FairShares, Queue
from engine.schedule.plan import PrefillBudget
from engine.schedule.policy import MAX_SORTED_QUEUE
from engine.state import Delta, FinishReason, RequestState, Status
from tests.fake_engine import serving
from tests.test_engine import collect, make_state, running_engine
from tests.test_scheduler import Traffic, expected

numbers = itertools.count()


def submit(
    traffic: Traffic, client: str, prompt_len: int = 10, answer_len: int = 4, *, weight: float = 1.0, priority: int = 0
) -> RequestState:
    """Return a request whose prompt is like no other."""
    number = next(numbers)
    request = Request(
        f"{client}-{number}",
        [1 + number % 900] * prompt_len,
        SamplingParams(max_new_tokens=answer_len),
        client=client,
        weight=weight,
        priority=priority,
    )
    state = RequestState(request)
    traffic.scheduler.submit(state)
    return state


def tokens_served(traffic: Traffic, states: list[RequestState], num_steps: int) -> Counter[str]:
    """Tokens of the answers and prompts that ended within `num_steps`, by client."""
    for _ in range(num_steps):
        traffic.step()
        traffic.check_pages()
    done = [state for state in states if state.status is Status.FINISHED]
    served: Counter[str] = Counter()
    for state in done:
        served[state.request.client] += state.prompt_len + len(state.output_ids)
    return served


def test_a_client_that_comes_late_does_not_wait_for_anothers_backlog() -> None:
    traffic = Traffic(96, num_rows=1)
    flood = [submit(traffic, "flood") for _ in range(50)]
    for _ in range(20):
        traffic.step()
    late = submit(traffic, "late")
    before = sum(state.status is Status.FINISHED for state in flood)
    while late.status is not Status.FINISHED:
        traffic.step()
    after = sum(state.status is Status.FINISHED for state in flood)
    assert after - before <= 2  # the one that ran, and one whose turn it was
    traffic.run_all()
    assert all(state.output_ids == expected(state.request.input_ids, 4) for state in [*flood, late])


@pytest.mark.parametrize("policy", ["lpm", "fcfs", "dfs-weight", "random"])
def test_waiting_clients_get_tokens_in_proportion_to_their_weights(policy: str) -> None:
    traffic = Traffic(96, num_rows=2, policy=policy)
    states = [submit(traffic, "one", weight=1.0) for _ in range(120)]
    states += [submit(traffic, "three", weight=3.0) for _ in range(120)]
    served = tokens_served(traffic, states, 220)
    assert served["one"] > 100
    assert served["three"] / served["one"] == pytest.approx(3.0, rel=0.2)


def test_tokens_are_shared_and_not_requests() -> None:
    traffic = Traffic(256, num_rows=1, chunk=64)
    states = [submit(traffic, "short", prompt_len=8) for _ in range(200)]
    states += [submit(traffic, "long", prompt_len=80) for _ in range(200)]
    served = tokens_served(traffic, states, 500)
    assert served["long"] / served["short"] == pytest.approx(1.0, rel=0.25)


def queue_of(shares: FairShares, states: list[RequestState]) -> Queue:
    queue = Queue(shares)
    for state in states:
        shares.enter(state)
        queue.add(state)
    return queue


def admit_next(queue: Queue, shares: FairShares) -> RequestState:
    state = queue.next()
    queue.remove(state)
    shares.admit(state, 0)
    return state


def test_who_asks_for_much_and_takes_little_is_charged_for_little() -> None:
    shares = FairShares()
    modest, greedy = (
        [state_of(client, max_new_tokens=2000) for _ in range(20)] for client in ("stops early", "goes on")
    )
    queue = queue_of(shares, modest + greedy)
    admitted: Counter[str] = Counter()
    for _ in range(20):
        state = admit_next(queue, shares)
        admitted[state.request.client] += 1
        state.output_ids = [1] * (10 if state.request.client == "stops early" else 500)
        shares.settle(state)
    assert admitted["stops early"] > 5 * admitted["goes on"]


def test_nobody_saves_up_turns_while_away() -> None:
    shares = FairShares()
    early, worker = state_of("away"), [state_of("worker") for _ in range(100)]
    shares.enter(early)
    shares.admit(early, 0)
    shares.settle(early)
    queue = queue_of(shares, worker)
    for _ in range(80):
        shares.settle(admit_next(queue, shares))
    for state in [state_of("away") for _ in range(20)]:
        shares.enter(state)
        queue.add(state)
    clients = [admit_next(queue, shares).request.client for _ in range(10)]
    assert 4 <= clients.count("away") <= 6


def test_priority_goes_before_fairness() -> None:
    traffic = Traffic(96, num_rows=1)
    usual = [submit(traffic, client) for client in "abab"]
    urgent = submit(traffic, "a", priority=5)
    traffic.step()
    assert urgent.status is Status.RUNNING
    assert all(state.status is Status.WAITING for state in usual)
    traffic.run_all()


@pytest.mark.parametrize("policy", ["lpm", "fcfs", "dfs-weight", "random"])
def test_every_policy_keeps_to_priorities(policy: str) -> None:
    traffic = Traffic(96, num_rows=1, policy=policy)
    low, high = submit(traffic, "a", priority=-1), submit(traffic, "a", priority=1)
    traffic.step()
    assert (low.status, high.status) == (Status.WAITING, Status.RUNNING)


def test_the_next_one_of_a_long_queue_is_found_without_looking_at_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    traffic = Traffic(96, num_rows=2)
    states = [submit(traffic, "abc"[i % 3], priority=i % 2) for i in range(3 * MAX_SORTED_QUEUE)]
    with monkeypatch.context() as patch:
        patch.setattr(Queue, "__iter__", None)
        while len(traffic.scheduler.waiting) > MAX_SORTED_QUEUE:
            states.append(submit(traffic, "c"))
            for _ in range(8):
                traffic.step()
    traffic.run_all()
    assert all(state.output_ids == expected(state.request.input_ids, 4) for state in states)


def test_of_equals_the_one_that_came_first_is_next_also_among_the_retracted() -> None:
    traffic = Traffic(64, num_rows=8)
    states = [submit(traffic, "a", prompt_len=4, answer_len=8) for _ in range(4)]
    for _ in range(6):
        traffic.step()
    late = [submit(traffic, "a") for _ in range(MAX_SORTED_QUEUE)]
    traffic.scheduler.retract_all()
    order = []
    while traffic.scheduler.waiting:
        order.append(state := traffic.scheduler.waiting.next())
        traffic.scheduler.finish(state, FinishReason("abort"))
    assert order == states + late


def test_a_retracted_request_pays_once() -> None:
    traffic = Traffic(64, num_rows=8, conservativeness=0.0)
    states = [submit(traffic, "ab"[i % 2], prompt_len=4, answer_len=40) for i in range(8)]
    traffic.run_all()
    assert traffic.scheduler.num_retractions > 0
    assert traffic.scheduler.shares.num_served_tokens <= 8 * 44
    assert all(state.charged_tokens == 0 for state in states)


def test_the_accounts_are_empty_when_nobody_waits() -> None:
    traffic = Traffic(64, num_rows=2)
    states = [submit(traffic, "abc"[i % 3]) for i in range(9)]
    traffic.step()
    traffic.scheduler.finish(states[-1], FinishReason("abort"))
    assert traffic.scheduler.shares.num_waiting_tokens == sum(r.prompt_len for r in traffic.scheduler.waiting)
    traffic.run_all()
    shares = traffic.scheduler.shares
    assert (shares.num_waiting_tokens, shares.num_requests.total(), shares.num_tokens.total()) == (0, 0, 0)


def test_clients_that_owe_nothing_are_forgotten() -> None:
    shares = FairShares()
    for i in range(3 * MAX_IDLE_CLIENTS):
        state = state_of(f"client {i}")
        shares.enter(state)
        shares.leave(state)
    assert len(shares._served) <= MAX_IDLE_CLIENTS + 1


# ---- a full queue ----


def state_of(client: str, prompt_len: int = 10, max_new_tokens: int = 10) -> RequestState:
    params = SamplingParams(max_new_tokens=max_new_tokens)
    return RequestState(Request(client, [1] * prompt_len, params, client=client))


def test_the_token_limit_counts_the_prompts_that_wait() -> None:
    traffic = Traffic(256, num_rows=1, max_queued_tokens=100)
    states = [submit(traffic, "a", prompt_len=40) for _ in range(2)]
    with pytest.raises(QueueFull, match=r"80 prompt tokens .* 40, the limit is 100"):
        submit(traffic, "a", prompt_len=40)
    traffic.step()
    states.append(submit(traffic, "a", prompt_len=40))  # one has left the queue
    traffic.run_all()
    assert all(state.output_ids == expected(state.request.input_ids, 4) for state in states)


def test_an_empty_queue_takes_a_prompt_above_the_token_limit() -> None:
    traffic = Traffic(256, num_rows=1, max_queued_tokens=100)
    long = submit(traffic, "a", prompt_len=150)
    traffic.run_all()
    assert long.status is Status.FINISHED


def test_a_client_that_floods_the_queue_does_not_shut_out_another() -> None:
    shares = FairShares(max_requests=8)
    for _ in range(8):
        state = state_of("flood")
        shares.check(state)
        shares.enter(state)
    with pytest.raises(QueueFull):
        shares.check(state_of("flood"))
    for _ in range(4):  # half of the queue is its part
        state = state_of("other")
        shares.check(state)
        shares.enter(state)
    with pytest.raises(QueueFull):
        shares.check(state_of("other"))


def test_a_crowd_of_clients_cannot_grow_the_queue_beyond_twice_its_limit() -> None:
    shares = FairShares(max_requests=16)
    for i in range(1000):
        state = state_of(f"client {i % 500}")
        try:
            shares.check(state)
        except QueueFull:
            continue
        shares.enter(state)
    assert 16 <= shares.num_requests.total() <= 32


# ---- when to come back ----


def test_the_drain_rate_is_tokens_per_working_second() -> None:
    rate = DrainRate()
    total, now = 0, 100.0
    for _ in range(20):
        rate.busy(now)
        now += 2.0
        total += 500
        rate.observe(now, total, is_idle=True)
        now += 1000.0  # nobody asks for anything
    assert rate.tokens_per_s == pytest.approx(250)
    assert rate.seconds_for(5000, now) == pytest.approx(20)


def test_the_drain_rate_follows_the_load() -> None:
    rate = DrainRate()
    rate.busy(0.0)
    for second in range(1, 101):
        rate.observe(float(second), second * 1000, is_idle=False)
    for second in range(101, 301):
        rate.observe(float(second), 100_000 + (second - 100) * 10, is_idle=False)
    assert 10 <= rate.tokens_per_s < 20


def test_before_anything_has_ended_the_wait_so_far_is_the_guess() -> None:
    rate = DrainRate()
    assert rate.seconds_for(1e9, 5.0) == 1.0
    rate.busy(10.0)
    assert rate.seconds_for(1e9, 17.0) == 7.0
    rate.observe(18.0, 1, is_idle=False)
    assert rate.seconds_for(1e9, 18.0) == MAX_RETRY_S


# ---- long prompts and streams ----


def test_a_flood_of_long_prompts_does_not_hold_up_a_stream() -> None:
    """Cut prompts as StepPace does: whatever waits, a step computes at most its budget and one token of each stream."""
    traffic = Traffic(20_000, num_rows=64, chunk=4096, depth=1)
    streams = [submit(traffic, "chat", prompt_len=5, answer_len=300) for _ in range(4)]
    traffic.step()
    floods = [submit(traffic, "flood", prompt_len=1500, answer_len=2) for _ in range(12)]
    for _ in range(200):
        plan = traffic.scheduler.schedule(PrefillBudget(64))
        assert plan is not None
        assert plan.num_prefill_tokens <= 64
        assert {state.row for state in streams} <= set(plan.rows.tolist())
        traffic.scheduler.resolve(plan, traffic.run(plan))
    assert all(traffic.rows.num_known[state.row] == 5 + 1 + 200 for state in streams)
    assert sum(state.status is Status.FINISHED for state in floods) >= 5, "nor do streams starve the prompts"


def test_the_smallest_budget_still_moves_a_long_prompt() -> None:
    traffic = Traffic(2000, num_rows=4, chunk=512, depth=1)
    submit(traffic, "chat", prompt_len=5, answer_len=200)
    traffic.step()
    long = submit(traffic, "flood", prompt_len=800, answer_len=1)
    for _ in range(60):
        plan = traffic.scheduler.schedule(PrefillBudget(16))
        assert plan is not None
        traffic.scheduler.resolve(plan, traffic.run(plan))
    assert long.status is Status.FINISHED


# ---- the engine ----


async def test_a_refused_request_is_told_when_the_queue_will_be_done(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama, max_running_requests=1, max_queued_requests=2) as engine:

        async def flood() -> tuple[list[asyncio.Task[Any]], float]:
            """Submit until the queue is full: (those accepted, what the one refused was told)."""
            tasks = []
            with pytest.raises(QueueFull, match="the limit is 2") as refused:
                while True:
                    state = make_state([5, 6, 7], max_new_tokens=40)
                    deltas: asyncio.Queue[Delta] = asyncio.Queue()
                    state.sink = deltas.put_nowait
                    engine.submit(state)
                    tasks.append(asyncio.create_task(deltas.get()))
            return tasks, refused.value.retry_after_s

        tasks, guess = await flood()
        assert guess == 1.0, "nothing has ended yet"
        await asyncio.gather(*tasks)
        rate = engine.stats().drain_tokens_per_s
        assert rate > 0
        engine.started.intake.drain_rate._tokens /= rate  # as if it drained a token a second
        tasks, told = await flood()
        work = engine.parts.scheduler.shares.num_waiting_work
        assert told == pytest.approx(work, rel=0.01)
        assert work > 2 * (3 + 40)
        assert engine.stats().num_refused == 2
        await asyncio.gather(*tasks)


async def test_clients_take_turns_in_the_running_engine(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama, max_running_requests=1) as engine:
        ended: list[str] = []

        def submit_one(client: str) -> None:
            state = make_state([5, 6, 7], max_new_tokens=8, client=client)
            state.sink = lambda delta: ended.append(client) if delta.finish_reason else None
            engine.submit(state)

        for _ in range(20):
            submit_one("flood")
        submit_one("late")
        while len(ended) < 21:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert ended.index("late") <= 2


async def test_times_tell_prefill_from_decode_whether_streamed_or_not(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama) as engine:
        for stream in (False, True):
            state = make_state([5, 6, 7], stream=stream)
            await collect(engine, state)
            times = state.times
            assert times.arrived <= times.scheduled <= times.first_token < times.finished


async def test_a_request_for_more_answers_than_may_wait_is_answered(tiny_llama: Path) -> None:
    limits: dict[str, Any] = {"max_running_requests": 1, "max_queued_requests": 1}
    async with running_engine(tiny_llama, **limits) as engine, serving(engine) as client:
        body = {"model": "fake-model", "prompt": ["a", "b", "c"], "n": 2, "max_tokens": 2}
        response = await client.post("/v1/completions", json=body)
        assert response.status == 200, await response.text()
        assert len((await response.json())["choices"]) == 6
