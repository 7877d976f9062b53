"""The guard that the async tests run under does catch what it is for."""

import asyncio
import time

import pytest

from tests.conftest import BlockingCallGuard


async def sleep_on_the_loop(seconds: float) -> None:
    time.sleep(seconds)  # noqa: ASYNC251
    await asyncio.sleep(0)


async def test_the_guard_names_a_coroutine_that_blocks_the_loop(blocking_call_guard: BlockingCallGuard) -> None:
    await asyncio.create_task(sleep_on_the_loop(0.06))
    assert "sleep_on_the_loop" in blocking_call_guard.report()
    blocking_call_guard.blocked.clear()


async def test_waiting_and_worker_threads_do_not_count_as_blocking(blocking_call_guard: BlockingCallGuard) -> None:
    await asyncio.gather(asyncio.sleep(0.06), asyncio.to_thread(time.sleep, 0.06))
    assert blocking_call_guard.blocked == []


@pytest.mark.max_callback_ms(10_000)
async def test_a_test_may_set_its_own_limit(blocking_call_guard: BlockingCallGuard) -> None:
    await sleep_on_the_loop(0.06)
    assert blocking_call_guard.blocked == []
