"""A process that hangs says what it was doing and ends; one that is idle, slow or was stopped does not."""

import asyncio
import io
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from engine.watchdog import EXIT_STATUS, Watchdog
from tests.test_engine import collect, make_state, running_engine

ROOT = Path(__file__).parent.parent


async def watchdog_of(progress: Any, timeout_s: float = 10.0) -> Watchdog:
    """One that is asked to look by the test, not by its thread."""
    watchdog = Watchdog(timeout_s, progress, lambda: "the engine\n", exit_process=lambda status: None)
    watchdog._loop = asyncio.get_running_loop()
    return watchdog


async def looks(watchdog: Watchdog, *elapsed: float) -> list[str | None]:
    """Return what it says, the event loop having run between looks."""
    said = []
    for seconds in elapsed:
        said.append(watchdog.check(seconds))
        await asyncio.sleep(0)
    return said


async def test_an_idle_process_may_idle_forever() -> None:
    watchdog = await watchdog_of(lambda: None)
    assert await looks(watchdog, *[9.0] * 20) == [None] * 20


async def test_steps_that_come_back_are_progress_however_long_the_work_lasts() -> None:
    steps = iter(range(100))
    watchdog = await watchdog_of(lambda: next(steps))
    assert await looks(watchdog, *[9.0] * 20) == [None] * 20


async def test_a_step_that_does_not_come_back_is_a_hang() -> None:
    watchdog = await watchdog_of(lambda: (7, 0))
    *before, reason = await looks(watchdog, 0.0, 5.0, 4.0, 2.0)
    assert before == [None] * 3
    assert reason is not None and "no step has come back for 11.0 s" in reason


async def test_new_work_has_the_whole_time_however_old_the_last_step() -> None:
    state: list[Any] = [(7, 0)]
    watchdog = await watchdog_of(lambda: state[0])
    await looks(watchdog, 0.0, 8.0)
    state[0] = None
    await looks(watchdog, 8.0)
    state[0] = (7, 0)
    assert await looks(watchdog, 8.0, 8.0) == [None, None]


async def test_an_event_loop_that_does_not_run_is_a_hang() -> None:
    watchdog = await watchdog_of(lambda: None)
    said = [watchdog.check(4.0) for _ in range(4)]  # nothing is awaited in between
    assert said[:3] == [None] * 3
    assert said[3] is not None and "event loop has not run for 12.0 s" in said[3]


async def test_the_report_shows_engine_tasks_and_threads_even_if_one_cannot_be_told() -> None:
    watchdog = await watchdog_of(lambda: None)

    async def waits_for_nothing() -> None:
        await asyncio.Event().wait()

    task = asyncio.create_task(waits_for_nothing(), name="forlorn")
    await asyncio.sleep(0)
    report = watchdog.report("because")
    for part in ("because", "the engine", "forlorn", "waits_for_nothing", "MainThread"):
        assert part in report
    watchdog.describe = lambda: str(1 / 0)
    report = watchdog.report("because")
    assert "ZeroDivisionError" in report and "waits_for_nothing" in report
    task.cancel()


async def test_the_thread_writes_the_report_calls_back_and_ends_the_process() -> None:
    ended, output = threading.Event(), io.StringIO()
    told: list[str] = []
    statuses: list[int] = []

    def end(status: int) -> None:
        statuses.append(status)
        ended.set()

    watchdog = Watchdog(0.05, lambda: (1, 0), lambda: "the engine\n", exit_process=end, output=output)
    watchdog.on_hang.append(told.append)
    with watchdog:
        await asyncio.to_thread(ended.wait, 60)
    assert statuses == [EXIT_STATUS]
    assert "the engine" in output.getvalue()
    [reason] = told  # on a busy machine, the event loop has not run for so long either
    assert reason in output.getvalue()


async def test_a_report_that_cannot_be_saved_does_not_keep_the_process_alive() -> None:
    ended = threading.Event()

    def fail(reason: str) -> None:
        raise OSError("disk full")

    output = io.StringIO()
    watchdog = Watchdog(0.05, lambda: 1, str, exit_process=lambda status: ended.set(), output=output)
    watchdog.on_hang.append(fail)
    with watchdog:
        assert await asyncio.to_thread(ended.wait, 60)
    assert "disk full" in output.getvalue()


async def test_a_timeout_of_0_watches_nothing() -> None:
    with Watchdog(0, lambda: 1, str) as watchdog:
        assert not watchdog._thread.is_alive()


SCRIPT = """
import asyncio, faulthandler, re, sys, threading, time
import engine.watchdog
engine.watchdog.LOCK_GRACE_S = 1.0

has_timer = threading.Event()
start_timer = faulthandler.dump_traceback_later

def start_timer_and_tell(*args, **options):
    start_timer(*args, **options)
    has_timer.set()

faulthandler.dump_traceback_later = start_timer_and_tell

def hold_the_loop():
    while True:
        time.sleep(0.01)

def hold_the_interpreter():
    re.match("(a+)+$", "a" * 60 + "b")

async def main():
    with engine.watchdog.Watchdog(1.0, lambda: None, lambda: "the engine"):
        while not has_timer.is_set():
            await asyncio.sleep(0.01)
        globals()[sys.argv[1]]()

asyncio.run(main())
"""


@pytest.mark.parametrize("hang", ["hold_the_loop", "hold_the_interpreter"])
def test_a_process_whose_event_loop_is_blocked_ends_with_its_stacks(hang: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, hang], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == (EXIT_STATUS if hang == "hold_the_loop" else 1)
    assert hang in done.stderr
    assert ("WATCHDOG" in done.stderr) == (hang == "hold_the_loop")


async def test_a_step_that_hangs_on_the_device_is_seen_and_named(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    async with running_engine(tiny_llama, watchdog_timeout=0.01) as engine:
        await collect(engine, make_state([5, 6, 7]))
        forward = engine.parts.runner.forward

        def hang(*batch: Any) -> Any:
            release.wait(120)
            return forward(*batch)

        monkeypatch.setattr(engine.parts.runner, "forward", hang)
        watchdog = await watchdog_of(engine.progress)
        watchdog.describe = engine.describe
        assert await looks(watchdog, 100.0) == [None], "idle"
        task = asyncio.create_task(collect(engine, make_state([9, 9], rid="the-victim")))
        for _ in range(5):  # it is launched
            await asyncio.sleep(0)
        *_, reason = await looks(watchdog, 0.0, 6.0, 6.0)
        assert reason is not None and "no step has come back" in reason
        report = watchdog.report(reason)
        for part in ("the-victim: RUNNING", "step-loop", "num_running"):
            assert part in report
        await asyncio.sleep(0.05)
        assert engine.health().status == "stuck"
        assert engine.health().last_step_age_s > 0.01
        release.set()
        await task
        assert engine.progress() is None
        assert engine.health().status == "ok"
