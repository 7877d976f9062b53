"""Requests that wait or run too long are ended, and told the limit."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from engine.request import Request, SamplingParams
from engine.state import FinishReason, RequestState, Status
from engine.time_limits import TimeLimits
from server.command_line import parse_args
from tests.test_engine import running_engine


def state(rid: str, status: Status, arrived: float, scheduled: float = 0.0) -> RequestState:
    found = RequestState(Request(rid, [1], SamplingParams()))
    found.status, found.times.arrived, found.times.scheduled = status, arrived, scheduled
    return found


def ended(now: float, waiting_s: float | None, running_s: float | None) -> dict[str, str]:
    states = {
        "waits": state("waits", Status.WAITING, 100.0),
        "retracted": state("retracted", Status.WAITING, 100.0, 101.0),
        "runs": state("runs", Status.RUNNING, 90.0, 101.0),
    }
    told: dict[str, Any] = {}
    TimeLimits(states, lambda *given: told.update({given[0]: given[1:]}), waiting_s, running_s).check(now)
    return {rid: f"{status} {message}" for rid, (message, status) in told.items()}


def test_each_limit_ends_what_is_beyond_it_and_names_itself() -> None:
    assert ended(105.0, None, None) == ended(105.0, 5.0, 4.0) == {}
    assert ended(106.0, 5.0, None) == {
        "waits": "503 the request has waited for 6.0 s, the limit is 5 s (--request-waiting-timeout)"
    }
    assert ended(106.0, None, 4.5) == {
        "runs": "503 the request has run for 5.0 s, the limit is 4.5 s (--request-running-timeout)"
    }


async def reason(engine: Any, rid: str) -> FinishReason:
    params = SamplingParams(max_new_tokens=400, ignore_eos=True)
    async for delta in engine.generate(RequestState(Request(rid, [7, 11], params))):
        if delta.finish_reason is not None:
            return delta.finish_reason
    raise AssertionError("no end")


async def test_a_request_that_runs_too_long_ends_and_the_next_one_gets_its_place(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.time_limits.CHECK_S", 0.01)
    async with running_engine(tiny_llama, max_running_requests=1, request_running_timeout=0.02) as engine:
        for ended in await asyncio.gather(reason(engine, "a"), reason(engine, "b")):
            assert ended.status_code == 503 and "has run" in str(ended.message)


async def test_a_request_that_waits_too_long_ends_and_the_one_before_it_goes_on(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.time_limits.CHECK_S", 0.01)
    async with running_engine(tiny_llama, max_running_requests=1, request_waiting_timeout=3600.0) as engine:
        runner, may_go_on = engine.parts.runner, threading.Event()
        forward = runner.forward

        def held_forward(*batch: Any) -> Any:
            may_go_on.wait(60)
            return forward(*batch)

        monkeypatch.setattr(runner, "forward", held_forward)
        first = asyncio.create_task(reason(engine, "a"))
        async with asyncio.timeout(60):
            while not engine.stats().scheduler.num_running:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        engine.started.time_limits._waiting_s = 0.001
        second = await reason(engine, "b")
        assert second.status_code == 503 and "has waited" in str(second.message)
        may_go_on.set()
        assert (await first).type == "length"


def test_limits_are_flags() -> None:
    config = parse_args(["--request-waiting-timeout", "30", "--request-running-timeout", "600"])
    assert (config.request_waiting_timeout, config.request_running_timeout) == (30.0, 600.0)
    with pytest.raises(SystemExit):
        parse_args(["--request-running-timeout", "-1"])
