"""The guard that every async test runs under catches what it is for."""

import asyncio
import gc
import time

import pytest

from tests.conftest import BlockingCallGuard

pytest_plugins = ["pytester"]

# Far from the limit: of busy threads, the guard may leave out more than it should.
ASYNC_TESTS = """
    import asyncio
    import time

    runs = []

    async def hold(seconds):
        time.sleep(seconds)

    async def test_that_holds_the_loop_once():
        runs.append(1)
        await asyncio.create_task(hold(0.3 if len(runs) == 1 else 0.0))

    async def test_that_is_wrong_and_holds_the_loop():
        await asyncio.create_task(hold(0.3))
        assert not runs

    async def test_that_holds_the_loop():
        await asyncio.create_task(hold(0.3))

    async def test_that_computes_for_a_while_itself():
        time.sleep(0.3)

    async def test_that_does_not():
        pass

    def test_without_a_loop():
        time.sleep(0.15)
"""


async def sleep_on_the_loop(seconds: float) -> None:
    time.sleep(seconds)  # noqa: ASYNC251
    await asyncio.sleep(0)


def test_an_async_test_that_holds_the_loop_each_time_fails_without_asking_for_the_guard(
    pytester: pytest.Pytester,
) -> None:
    pytester.makeini("[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n")
    pytester.makepyfile(ASYNC_TESTS)
    result = pytester.runpytest_inprocess("-p", "tests.conftest", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=5, failed=1, errors=2)  # the guard reports after the test's own end
    result.stdout.fnmatch_lines(["*held the event loop for more than 100 ms:*", "*test_that_holds_the_loop*"])


async def test_the_guard_names_a_coroutine_that_blocks_the_loop(blocking_call_guard: BlockingCallGuard) -> None:
    await asyncio.create_task(sleep_on_the_loop(0.3))
    assert "sleep_on_the_loop" in blocking_call_guard.report()
    blocking_call_guard.blocked.clear()


@pytest.mark.max_callback_ms(250)
async def test_waiting_and_worker_threads_do_not_count_as_blocking(blocking_call_guard: BlockingCallGuard) -> None:
    await asyncio.gather(asyncio.sleep(0.3), asyncio.to_thread(time.sleep, 0.3))
    assert blocking_call_guard.blocked == []


@pytest.mark.max_callback_ms(10_000)
async def test_a_test_may_set_its_own_limit(blocking_call_guard: BlockingCallGuard) -> None:
    await asyncio.create_task(sleep_on_the_loop(0.15))
    assert blocking_call_guard.blocked == []


@pytest.mark.max_callback_ms(250)
async def test_pauses_of_the_garbage_collector_do_not_count_as_blocking(
    blocking_call_guard: BlockingCallGuard,
) -> None:
    def pause(phase: str, _info: dict[str, int]) -> None:
        time.sleep(0.3 if phase == "start" else 0.0)

    gc.callbacks.append(pause)
    await asyncio.sleep(0)  # what comes now is a callback of its own
    gc.collect(0)
    await asyncio.sleep(0)
    gc.callbacks.remove(pause)
    assert blocking_call_guard.blocked == []
