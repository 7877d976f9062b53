"""The step loop against a device that answers when it is told to."""

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from typing import Any

import numpy as np
import pytest
import torch

from cache.allocator import PageAllocator
from cache.radix import RadixCache
from engine.loop import StepLoop
from engine.output import OutputProcessor
from engine.pace import StepPace
from engine.request import Request, SamplingParams
from engine.schedule.plan import Plan
from engine.schedule.rows import Rows
from engine.schedule.scheduler import Scheduler
from engine.state import Delta, FinishReason, RequestState, Status
from engine.step.batch import Staged
from engine.step.fields import StepShape
from engine.step.model_runner import Step
from engine.step.sampler import SamplingWork

TOKEN = 7


class ManualSplitter:
    """Stands in for StepSplitter."""

    def __init__(self) -> None:
        self.best: int | None = None  # prompt tokens of a step
        self.can_split = False

    def best_prompt_tokens(self, num_decodes: int, num_context_tokens: int) -> int | None:
        return self.best


class ManualGraphs:
    """Stands in for StepGraphs: beside decodes the device pads prompts up to sizes, of which 64 is the last graph's."""

    def prompt_sizes(self, num_decodes: int, has_groups: bool) -> tuple[list[int], int]:
        return ([], 0) if has_groups or not num_decodes else ([16, 32, 48, 64, 72], 64)


class ManualRunner:
    """Stands in for ModelRunner: every request's next token is `TOKEN`, once `finish` is called for its step."""

    def __init__(self) -> None:
        self.launched: list[Step] = []
        self.ends: list[Future[None]] = []  # of the launched steps
        self.error: Exception | None = None
        self.ranks = None
        self.graphs: ManualGraphs | None = None
        self.splitter = ManualSplitter()
        self.is_slow_way, self.prompt_s = False, 0.0

    def launch(self, plan: Plan) -> Step:
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        work = SamplingWork(len(plan.samples), is_greedy=True)
        step = Step(
            plan,
            work,
            [],
            Staged(torch.empty(0), torch.empty(0)),
            StepShape.of(plan),
            is_graph=False,
            launched_at=time.perf_counter(),
            is_slow_way=self.is_slow_way,
        )
        step.done = Future()
        self.ends.append(step.done)
        step.tokens = torch.full((len(plan.samples),), TOKEN, dtype=torch.int32)
        self.launched.append(step)
        return step

    def times(self, step: Step) -> tuple[float, float]:
        return self.prompt_s if step.plan.num_prefill_tokens else 0.0, 0.0

    async def finish(self, index: int, error: Exception | None = None) -> None:
        """End step `index` on the device, or fail it; the loop gets time to notice."""
        if error is None:
            self.ends[index].set_result(None)
        else:
            self.ends[index].set_exception(error)
        await settle()


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@asynccontextmanager
async def running_loop(num_rows: int = 8, **options: Any) -> AsyncIterator[tuple[StepLoop, ManualRunner]]:
    rows = Rows(num_rows, 256)
    allocator = PageAllocator(64 * num_rows + 1, 1)
    scheduler = Scheduler(rows, allocator, RadixCache(1), is_eos=np.zeros(100, bool), chunked_prefill_size=4096)
    runner = ManualRunner()
    loop = StepLoop(scheduler, runner, OutputProcessor(scheduler), **options)  # type: ignore[arg-type]
    task = asyncio.create_task(loop.run())
    await settle()
    yield loop, runner
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def submit(
    loop: StepLoop, prompt: list[int], max_new_tokens: int = 8, stream: bool = False
) -> tuple[RequestState, list[Delta]]:
    deltas: list[Delta] = []
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0)
    state = RequestState(Request(f"r{prompt[0]}", prompt, params, stream=stream), deltas.append)
    loop.scheduler.submit(state)
    loop.wake()
    return state, deltas


class OneLetterAToken:
    has_stops, matched_stop = False, None

    def push(self, token_ids: list[int]) -> str:
        return "a" * len(token_ids)

    def finish(self) -> str:
        return ""


def submit_streams(loop: StepLoop, count: int, max_new_tokens: int = 8) -> list[list[Delta]]:
    """Return what each of `count` streams is given."""
    given = []
    for i in range(count):
        state, deltas = submit(loop, [i, 1, 2], max_new_tokens, stream=True)
        state.text_stream = OneLetterAToken()  # type: ignore[assignment]
        given.append(deltas)
    return given


async def test_the_next_step_is_on_its_way_before_the_device_is_done() -> None:
    async with running_loop() as (loop, runner):
        submit(loop, [1, 2, 3])
        await settle()
        assert len(runner.launched) == 2, "the second step takes its token from the first on the device"
        assert runner.launched[1].plan.input_ids.tolist() == [-1]
        await runner.finish(0)
        assert len(runner.launched) == 3


async def test_without_overlap_each_step_waits_for_the_one_before() -> None:
    async with running_loop(is_overlapped=False) as (loop, runner):
        submit(loop, [1, 2, 3])
        await settle()
        assert len(runner.launched) == 1
        await runner.finish(0)
        assert len(runner.launched) == 2


async def test_nothing_is_launched_while_there_is_nothing_to_do() -> None:
    async with running_loop() as (loop, runner):
        assert not runner.launched
        _, deltas = submit(loop, [1, 2, 3], max_new_tokens=1)
        await settle()
        assert len(runner.launched) == 1, "the only token needs no second step"
        await runner.finish(0)
        assert deltas[-1].token_ids == [TOKEN] and not loop.steps_in_flight


async def test_a_step_that_cannot_be_launched_fails_its_own_requests() -> None:
    async with running_loop() as (loop, runner):
        runner.error = MemoryError("no room")
        _, deltas = submit(loop, [1, 2, 3])
        await settle()
        reason = deltas[-1].finish_reason
        assert reason is not None and reason.status_code == 500 and "no room" in (reason.message or "")
        _, later = submit(loop, [4, 5, 6], max_new_tokens=1)
        await settle()
        await runner.finish(0)
        assert later[-1].token_ids == [TOKEN]


class ManualEvent:
    """Stands in for a CUDA event behind a step."""

    def __init__(self) -> None:
        self.has_fired = False
        self.error: Exception | None = None

    def query(self) -> bool:
        if self.error is not None:
            raise self.error
        return self.has_fired

    def synchronize(self) -> None:
        assert self.query()


def on_a_gpu(step: Step) -> ManualEvent:
    """From now on `step` is one that has an event, and nobody to tell of its end."""
    event = ManualEvent()
    step.done, step.events = None, [event]  # type: ignore[list-item]
    return event


async def test_the_end_of_a_step_that_nobody_tells_of_is_found() -> None:
    async with running_loop() as (loop, runner):
        _, deltas = submit(loop, [1, 2, 3], max_new_tokens=1)
        await settle()
        event = on_a_gpu(runner.launched[0])
        loop.wake()
        await settle()
        assert not deltas
        event.has_fired = True
        async with asyncio.timeout(60):
            while not deltas:  # noqa: ASYNC110 - one that is long overdue is looked at every millisecond
                await asyncio.sleep(0.001)
        await settle()
        assert deltas[-1].token_ids == [TOKEN] and not loop.steps_in_flight


async def test_a_step_that_is_long_overdue_is_still_looked_at() -> None:
    async with running_loop() as (loop, runner):
        _, deltas = submit(loop, [1, 2, 3], max_new_tokens=1)
        await settle()
        event = on_a_gpu(runner.launched[0])
        runner.launched[0].launched_at = time.perf_counter() - 60
        loop.wake()
        await asyncio.sleep(0.01)
        event.has_fired = True
        while not deltas:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        assert deltas[-1].token_ids == [TOKEN]


async def test_a_device_that_fails_fails_the_step_and_not_the_loop() -> None:
    async with running_loop() as (loop, runner):
        _, failed = submit(loop, [1, 2, 3], max_new_tokens=1)
        await settle()
        on_a_gpu(runner.launched[0]).error = RuntimeError("an illegal address")
        loop.wake()
        await settle()
        reason = failed[-1].finish_reason
        assert reason is not None and "an illegal address" in (reason.message or "")
        _, later = submit(loop, [4, 5, 6], max_new_tokens=1)
        await settle()
        await runner.finish(1)
        assert later[-1].token_ids == [TOKEN]


async def test_a_request_whose_sink_fails_ends_though_it_has_lost_its_slots_meanwhile() -> None:
    async with running_loop(num_rows=40) as (loop, runner):
        submit_streams(loop, 40)
        states = list(loop.scheduler.waiting)
        await settle()
        told: list[Delta] = []

        def sink(delta: Delta) -> None:
            told.append(delta)
            if delta.finish_reason is None:
                raise ConnectionError("gone")

        last = states[-1]
        last.sink = sink
        states[0].sink = lambda delta: loop.scheduler.retract_all()
        await runner.finish(0)
        assert last.status is Status.FINISHED and last not in loop.scheduler.waiting
        assert told[-1].finish_reason is not None and "gone" in (told[-1].finish_reason.message or "")


async def test_a_request_that_did_not_run_in_the_failed_step_is_computed_anew() -> None:
    async with running_loop(is_overlapped=False) as (loop, runner):
        _, failed = submit(loop, [1, 2, 3], max_new_tokens=2)
        await settle()
        _, bystander = submit(loop, [4, 5, 6], max_new_tokens=1)
        await runner.finish(0, RuntimeError("injected"))
        reason = failed[-1].finish_reason
        assert reason is not None and "injected" in (reason.message or "")
        await runner.finish(1)
        assert bystander[-1].token_ids == [TOKEN]


def plan_of(num_prefill_tokens: int) -> Plan:
    """Return the plan of one prompt of that many tokens, or of one decoding request."""
    q_lens = np.array([num_prefill_tokens or 1], np.int32)
    return Plan(
        rows=q_lens,
        q_lens=q_lens,
        seq_lens=q_lens,
        input_ids=np.zeros(q_lens[0], np.int32),
        out_cache_loc=np.zeros(q_lens[0], np.int32),
        num_decodes=0 if num_prefill_tokens else 1,
        samples=np.zeros(0, np.int32),
        epochs=np.zeros(1, np.int64),
    )


def observe(pace: StepPace, num_prefill_tokens: int, device_s: float) -> None:
    pace.observe(plan_of(num_prefill_tokens), device_s)


async def test_beside_decodes_a_chunk_is_as_long_as_suits_the_device() -> None:
    async with running_loop() as (loop, runner):
        submit(loop, [1, 2, 3])
        await settle()
        runner.splitter.best, runner.splitter.can_split = 50, True
        submit(loop, [*range(4, 204)])
        await runner.finish(0)
        await runner.finish(1)
        await runner.finish(2)
        assert [step.plan.num_prefill_tokens for step in runner.launched] == [3, 0, 50, 50, 50]


async def test_beside_decodes_a_chunk_fills_what_the_device_computes_anyway() -> None:
    async with running_loop() as (loop, runner):
        submit(loop, [1, 2, 3])
        await settle()
        runner.splitter.best, runner.splitter.can_split = 50, True
        runner.graphs = ManualGraphs()
        submit(loop, [*range(4, 204)])
        await runner.finish(0)
        await runner.finish(1)
        await runner.finish(2)
        assert [step.plan.num_prefill_tokens for step in runner.launched] == [3, 0, 48, 48, 48]


async def test_beside_streams_a_chunk_keeps_to_the_largest_graph() -> None:
    async with running_loop(max_step_ms=60, chunked_prefill_size=35 * 16) as (loop, runner):
        submit(loop, [1, 2, 3], stream=True)
        await settle()
        runner.graphs = ManualGraphs()
        submit(loop, [*range(4, 204)])
        await runner.finish(0)
        await runner.finish(1)
        assert [step.plan.num_prefill_tokens for step in runner.launched] == [3, 0, 64, 64]  # where 70 are granted


@pytest.mark.parametrize(("is_slow_way", "chunk"), [(False, 8), (True, 70)])
async def test_a_step_that_goes_a_slow_way_shortens_no_chunk(is_slow_way: bool, chunk: int) -> None:
    async with running_loop(max_step_ms=60, chunked_prefill_size=35 * 16) as (loop, runner):
        runner.is_slow_way, runner.prompt_s = is_slow_way, 1.0
        submit(loop, [*range(4, 54)], stream=True)
        await settle()
        submit(loop, [*range(4, 204)])
        await runner.finish(0)
        await runner.finish(1)
        chunks = [step.plan.num_prefill_tokens for step in runner.launched]
        assert chunks[:3] == [50, 0, chunk], "8: the fewest, since 50 took a second"


def test_chunks_that_one_slow_step_made_short_grow_by_what_short_ones_take() -> None:
    pace = StepPace(max_step_ms=60, chunked_prefill_size=8192)
    observe(pace, 1000, 0.2)
    assert int(pace.prefill_budget(num_streams=1).work) == 270, "of 200 us each"
    pace.observe(plan_of(512), 0.0256, is_slow_way=True)
    assert int(pace.prefill_budget(num_streams=1).work) == 1080, "50 us at most"
    pace.observe(plan_of(512), 0.2, is_slow_way=True)
    assert int(pace.prefill_budget(num_streams=1).work) == 1080, "longer ones take less"


def test_prompt_chunks_are_cut_so_that_streams_keep_their_pace() -> None:
    pace = StepPace(max_step_ms=60, chunked_prefill_size=8192)
    assert pace.prefill_budget(num_streams=4).work == 2 * 8192 // 16, "nothing is known yet"
    observe(pace, 0, 0.010)
    observe(pace, 2000, 0.010 + 2000 * 25e-6)
    assert 1750 <= pace.prefill_budget(num_streams=4).work <= 2000  # almost (60 - 10) ms at 25 µs a token
    assert pace.prefill_budget(num_streams=0).num_tokens_behind(0) == 8192, "nobody would notice"


def test_the_first_chunk_beside_streams_tells_what_a_token_takes() -> None:
    pace = StepPace(max_step_ms=60, chunked_prefill_size=8192, context_cost=1e-4)
    observe(pace, 0, 0.010)
    chunk = plan_of(pace.prefill_budget(num_streams=4).num_tokens_behind(30_000))
    chunk.seq_lens = chunk.q_lens + 30_000
    pace.observe(chunk, 0.020)
    assert pace.prefill_token_s > 0


def test_chunks_are_the_shorter_the_more_tokens_they_attend_to() -> None:
    pace = StepPace(max_step_ms=60, chunked_prefill_size=8192, context_cost=1e-4)
    observe(pace, 0, 0.010)
    observe(pace, 2000, 0.010 + 2000 * 1.1 * 25e-6)  # the mean token of that chunk sees 1,000 others: a tenth more
    before = pace.prefill_budget(4)
    lens = [before.num_tokens_behind(context) for context in (0, 10_000, 20_000)]
    assert lens == pytest.approx([1628, 860, 580], rel=0.01)
    assert [n * (1 + (c + n / 2) / 1e4) for n, c in zip(lens, (0, 10_000, 20_000), strict=True)] == pytest.approx(
        [before.work] * 3, rel=0.01
    ), "they take the same time"
    deep = plan_of(500)
    deep.seq_lens = deep.q_lens + 40_000
    pace.observe(deep, 0.010 + 500 * 5.025 * 25e-6)  # as expected so deep in a prompt
    assert pace.prefill_budget(4).work == pytest.approx(before.work, rel=0.01)


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_what_context_costs_is_learned_from_the_steps(factor: float) -> None:
    pace = StepPace(max_step_ms=60, chunked_prefill_size=8192, context_cost=1e-4)
    observe(pace, 0, 0.010)

    def seconds(num_tokens: int, context: int) -> float:
        return 0.010 + 25e-6 * num_tokens * (1 + factor * 1e-4 * (context + num_tokens / 2))

    for _ in range(8):
        for context in range(0, 24_000, 1_000):
            chunk = plan_of(1_000)
            chunk.seq_lens = chunk.q_lens + context
            pace.observe(chunk, seconds(1_000, context))
    budget = pace.prefill_budget(num_streams=4)
    for context in (0, 10_000, 23_000):
        assert 0.048 <= seconds(budget.num_tokens_behind(context), context) <= 0.058, "nearly as long as it may be"


def test_a_kernel_that_is_compiled_meanwhile_does_not_make_context_dear() -> None:
    pace = StepPace(max_step_ms=60, chunked_prefill_size=8192, context_cost=1e-4)
    for context in [*range(0, 24_000, 1_000), 23_500]:
        chunk = plan_of(1_000)
        chunk.seq_lens = chunk.q_lens + context
        pace.observe(chunk, 2.0 if context == 23_500 else 25e-6 * 1_000 * (1 + 1e-4 * (context + 500)))
    assert pace.context_cost.value == pytest.approx(1e-4, rel=0.05)


def test_budgets_count_on_the_slower_ones_of_the_last_steps() -> None:
    pace = StepPace(max_step_ms=60, chunked_prefill_size=8192)
    observe(pace, 0, 0.010)
    for token_s in (20e-6, 20e-6, 20e-6, 28e-6) * 20:
        observe(pace, 2000, 0.010 + 2000 * token_s)
    work = pace.prefill_budget(num_streams=4).work
    assert 0.010 + work * 28e-6 < 0.060, "a slow step keeps to the budget, too"
    assert pace.predict_s(plan_of(2000)) < 0.010 + 2000 * 23e-6, "while the usual one is what is expected"


def test_a_prompt_gets_its_share_however_slow_the_device() -> None:
    pace = StepPace(max_step_ms=60, chunked_prefill_size=8192)
    observe(pace, 0, 0.2)
    observe(pace, 2000, 2.0)
    budget = pace.prefill_budget(num_streams=4)
    assert budget.num_tokens_behind(50_000) == 8192 // 64 and not budget.is_spent
    budget.spend(8192 // 64, 50_000)
    assert budget.is_spent


@pytest.mark.parametrize("num_streams", [0, 3])
def test_on_a_slow_cpu_nobody_waits_long_for_a_chunk(num_streams: int) -> None:
    pace = StepPace(max_step_ms=None, chunked_prefill_size=512, max_wait_s=1.0)
    assert pace.prefill_budget(num_streams).num_tokens_behind(0) == 512, "nothing is known yet"
    observe(pace, 0, 0.1)
    assert pace.prefill_budget(num_streams).num_tokens_behind(0) == 64, "decodes this slow make a long chunk dear"
    observe(pace, 64, 0.1 + 64 / 90)
    assert 0.8 < 0.1 + pace.prefill_budget(num_streams).num_tokens_behind(0) / 90 <= 1.0


def test_on_a_fast_cpu_chunks_are_whole() -> None:
    pace = StepPace(max_step_ms=None, chunked_prefill_size=512, max_wait_s=1.0)
    for _ in range(3):
        observe(pace, 0, 0.01)
        observe(pace, 512, 0.5)
    assert pace.prefill_budget(num_streams=4).num_tokens_behind(0) == 512


def test_a_model_that_is_slow_to_read_computes_more_than_a_few_tokens_for_each_time_it_is_read() -> None:
    pace = StepPace(max_step_ms=None, chunked_prefill_size=512, max_wait_s=1.0)
    observe(pace, 0, 1.5)
    observe(pace, 64, 1.5 + 64 / 100)
    num_tokens = pace.prefill_budget(num_streams=4).num_tokens_behind(0)
    assert num_tokens / 100 > 1.5, "most of the time goes into the tokens"
    assert 1.5 + num_tokens / 100 <= 4 * 1.5


def test_after_a_hiccup_chunks_stay_long_enough_to_learn_from() -> None:
    pace = StepPace(max_step_ms=None, chunked_prefill_size=512, max_wait_s=1.0)
    observe(pace, 512, 3000.0)
    num_tokens = pace.prefill_budget(num_streams=4).num_tokens_behind(0)
    assert num_tokens >= 512 // 16
    for _ in range(200):
        observe(pace, pace.prefill_budget(num_streams=4).num_tokens_behind(0), 0.1)
    assert pace.prefill_budget(num_streams=4).num_tokens_behind(0) > 5 * num_tokens


def test_one_hiccup_does_not_starve_prompts_for_long() -> None:
    pace = StepPace(max_step_ms=60, chunked_prefill_size=8192)
    observe(pace, 0, 0.010)
    observe(pace, 2000, 0.060)
    before = pace.prefill_budget(num_streams=1).work
    observe(pace, 2000, 5.0)  # a kernel was compiled
    assert pace.prefill_budget(num_streams=1).work > 0.7 * before


@pytest.mark.parametrize("num_prefill_tokens", [0, 1000])
def test_a_prediction_is_never_longer_than_what_was_seen(num_prefill_tokens: int) -> None:
    pace = StepPace(max_step_ms=None, chunked_prefill_size=8192)
    observe(pace, 0, 0.010)
    observe(pace, 1000, 0.030)
    assert pace.predict_s(plan_of(num_prefill_tokens)) <= (0.030 if num_prefill_tokens else 0.010)


async def test_the_next_step_is_launched_before_the_last_ones_tokens_are_given() -> None:
    async with running_loop() as (loop, runner):
        state, _ = submit(loop, [1, 2, 3], stream=True)
        state.text_stream = OneLetterAToken()  # type: ignore[assignment]
        num_launched: list[int] = []
        state.sink = lambda delta: num_launched.append(len(runner.launched))
        await settle()
        await runner.finish(0)
        await runner.finish(1)
        assert num_launched == [3, 4]


async def test_each_token_is_a_piece_of_its_own_while_the_host_keeps_up() -> None:
    async with running_loop(num_rows=40) as (loop, runner):
        given = submit_streams(loop, 40)
        await settle()
        for i in range(3):
            await runner.finish(i)
        assert [[delta.token_ids for delta in deltas] for deltas in given] == [[[TOKEN]] * 3] * 40


async def test_tokens_that_come_before_a_streams_turn_go_out_in_one_piece() -> None:
    async with running_loop(num_rows=400) as (loop, runner):
        given = submit_streams(loop, 400)
        await settle()
        for i in range(3):  # faster than the host can tell 400 streams
            runner.ends[i].set_result(None)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        await settle()
        sizes = [[len(delta.token_ids) for delta in deltas] for deltas in given]
        assert {sum(one) for one in sizes} == {3}
        assert max(map(max, sizes)) > 1, "some were told of two steps at once"
        assert all(delta.text == "a" * len(delta.token_ids) for deltas in given for delta in deltas)


async def test_a_turn_of_the_event_loop_serves_a_few_streams_and_ends_fewer() -> None:
    async with running_loop(num_rows=400) as (loop, runner):
        given = submit_streams(loop, 400, max_new_tokens=2)
        await settle()
        for step, most_a_turn in ((0, 64), (1, 8)):
            runner.ends[step].set_result(None)
            for _ in range(100):
                num_before = sum(map(len, given))
                await asyncio.sleep(0)
                assert sum(map(len, given)) - num_before <= most_a_turn
            assert all(len(deltas) == step + 1 for deltas in given)


async def test_an_aborted_stream_is_given_the_tokens_that_wait_for_its_turn() -> None:
    async with running_loop(num_rows=400) as (loop, runner):
        given = submit_streams(loop, 400)
        await settle()
        states = loop.scheduler.running()
        runner.ends[0].set_result(None)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert any(given) and not given[-1], "its turn has not come"
        loop.abort(states[-1], FinishReason("abort"))
        await settle()
        (last,) = given[-1]
        assert (last.token_ids, last.text, last.finish_reason and last.finish_reason.type) == ([TOKEN], "a", "abort")
        assert all(len(deltas) == 1 for deltas in given)


async def test_a_pause_begins_when_all_news_are_given() -> None:
    async with running_loop(num_rows=400) as (loop, runner):
        given = submit_streams(loop, 400)
        await settle()
        pausing = asyncio.create_task(loop.pause())
        for end in runner.ends:
            end.set_result(None)
        await asyncio.wait_for(pausing, 60)
        assert {sum(len(delta.token_ids) for delta in deltas) for deltas in given} == {2}
        assert loop.is_still and len(runner.launched) == 2


@pytest.mark.breaks_bookkeeping
async def test_an_idle_loop_reports_a_page_that_is_lost_once_and_says_so_in_its_statistics(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with running_loop() as (loop, runner):

        async def serve(prompt: list[int]) -> None:
            submit(loop, prompt, max_new_tokens=1)
            await settle()
            await runner.finish(-1)

        await serve([1, 2, 3])
        assert loop.stats.num_violations == 0 and not caplog.records
        loop.scheduler.held.allocator.allocate(2)
        loop.wake()
        await settle()
        assert loop.stats.num_violations == 0, "checked once an idle period"
        for prompt in ([4, 5], [6, 7, 8]):  # the same mistake twice
            await serve(prompt)
            assert loop.stats.num_violations == 1
        loop.scheduler.held.allocator.allocate(1)
        await serve([9])
        assert loop.stats.num_violations == 2
        errors = [record.getMessage() for record in caplog.records]
        assert ["2 of 512 KV slots" in errors[0], "3 of 512 KV slots" in errors[1]] == [True, True]
        assert len(errors) == 2
