"""The canary: what moves the log-probabilities of a known text is an alarm, and nothing else of it shows."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp.test_utils import TestClient, TestServer

from engine.canary import drift
from engine.engine import Health
from engine.local import LocalEngine
from engine.replicas.stats import combined_health
from engine.request import Request, SamplingParams
from engine.state import RequestState
from server.app import build_app
from server.config import ServerConfig
from tests.test_engine import running_engine

PROMPT = [7, 11, 300, 42, 5]


def asked(name: str, num_tokens: int = 30) -> RequestState:
    return RequestState(Request(name, PROMPT, SamplingParams(max_new_tokens=num_tokens, ignore_eos=True), stream=True))


async def answer(engine: LocalEngine, name: str, num_tokens: int = 30) -> None:
    async for _ in engine.generate(asked(name, num_tokens)):
        pass


def damage(engine: LocalEngine) -> None:
    """Change a weight underneath the running engine."""
    with torch.no_grad():
        weight = engine.parts.runner.model.model.norm.weight
        weight[::2] *= 0.5


async def test_weights_changed_underneath_are_an_alarm_in_health_metrics_and_log(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_engine(tiny_llama) as engine:
        canary = engine.started.canary
        assert await canary.look() and await canary.look()
        assert (canary.stats.num_runs, canary.stats.num_alarms) == (2, 0) and canary.stats.drift < 1e-4
        assert "canary" not in caplog.text
        damage(engine)
        alarms: list[int] = []
        canary.on_alarm = lambda: alarms.append(canary.stats.num_alarms)
        assert await canary.look()
        assert alarms == [1] and "canary" in caplog.text
        config = ServerConfig(model_path=str(tiny_llama), file_storage_path=str(tmp_path), enable_metrics=True)
        async with TestClient(TestServer(build_app(engine, config))) as client:
            health = await (await client.get("/health")).json()
            assert (health["status"], health["num_canary_alarms"]) == ("ok", 1) and health["canary_drift"] > 0.05
            assert "radixloop:canary_alarms_total{" in (text := await (await client.get("/metrics")).text())
            assert f'radixloop:canary_drift{{model_name="{tiny_llama}"}} {health["canary_drift"]}' in text


async def test_damaged_keys_and_values_are_an_alarm_while_others_run(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama) as engine:
        canary = engine.started.canary
        assert await canary.look()
        with torch.no_grad():
            layers: Any = engine.parts.runner.model.model.layers
            for layer in layers:
                layer.input_layernorm.weight.neg_()
        await asyncio.gather(canary.look(), answer(engine, "a"))
        assert canary.stats.num_alarms == 1


async def test_beside_others_nothing_moves_beyond_rounding(tiny_llama: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        async with running_engine(tiny_llama, dtype=dtype) as engine:
            canary = engine.started.canary
            assert await canary.look()
            for i in range(3):
                others = [answer(engine, f"{i}-{k}", 10 * k) for k in range(1, 6)]
                await asyncio.gather(canary.look(), *others)
            assert (canary.stats.num_runs, canary.stats.num_alarms) == (4, 0)
            assert canary.stats.drift < canary.tolerance / 2


async def test_clients_statistics_do_not_show_it(tiny_llama: Path) -> None:
    def shown(engine: LocalEngine) -> Any:
        stats, health = engine.stats(), engine.health()
        scheduler = stats.scheduler
        return (
            stats.num_requests, stats.num_aborted, stats.loop.num_generated_tokens, scheduler.num_prompt_tokens,
            scheduler.num_hit_tokens, scheduler.num_running, scheduler.num_waiting, health.num_running,
            health.num_queued, engine.top_prefixes(3),
        )  # fmt: skip

    async with running_engine(tiny_llama) as engine:
        await answer(engine, "a")
        before = shown(engine)
        for _ in range(3):
            looking = asyncio.create_task(engine.started.canary.look())
            while not looking.done():
                await asyncio.sleep(0)
                assert shown(engine) == before
        engine.started.canary._generate = refused
        assert not await engine.started.canary.look()
        assert shown(engine) == before
        await answer(engine, "b")
        assert shown(engine)[0] == before[0] + 1


async def refused(state: RequestState) -> Any:
    from engine.errors import QueueFull

    raise QueueFull("full")
    yield


async def test_an_aborted_canary_is_no_alarm_and_no_abort(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama) as engine:
        canary = engine.started.canary
        looking = asyncio.create_task(canary.look())
        await asyncio.sleep(0)
        engine.abort_all()
        assert not await looking
        assert engine.stats().num_aborted == engine.stats().num_requests == canary.stats.num_runs == 0
        assert await canary.look()


async def test_a_saturated_or_paused_engine_is_left_alone(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama, max_running_requests=2) as engine:
        canary = engine.started.canary
        others = asyncio.gather(*(answer(engine, str(i)) for i in range(3)))
        await asyncio.sleep(0)
        assert not await canary.look()
        await others
        await engine.maintenance.pause()
        assert not await canary.look()
        await engine.maintenance.resume()
        assert await canary.look()


async def test_weights_replaced_on_purpose_begin_anew(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama) as engine:
        canary = engine.started.canary
        damage(engine)
        assert await canary.look()
        await engine.maintenance.update_weights(str(tiny_llama))
        assert await canary.look() and await canary.look()
        assert canary.stats.num_alarms == 0


async def test_it_starts_when_told_to_unless_switched_off(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama) as engine, running_engine(tiny_llama, disable_canary=True) as other:
        assert not engine.started.canary.stats.num_runs
        engine.start_canary()
        other.start_canary()
        async with asyncio.timeout(60):
            while not engine.started.canary.stats.num_runs:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert not other.started.canary.stats.num_runs


def test_a_tie_that_falls_the_other_way_is_no_drift() -> None:
    assert drift([(-1.0, 5), (-2.0, 6), (-3.0, 7)], [(-1.5, 5), (-9.0, 9), (-9.0, 7)]) == 0.5
    assert drift([(-1.0, 5)], [(float("nan"), 5)]) == float("inf")


def test_of_several_engines_the_worst_counts() -> None:
    each = [Health("ok", num_canary_alarms=1, canary_drift=0.1), Health("ok", num_canary_alarms=2, canary_drift=0.5)]
    health = combined_health(each)
    assert (health.num_canary_alarms, health.canary_drift) == (3, 0.5)
