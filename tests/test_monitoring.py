"""What can be seen from outside: metrics, the dashboard, the access log, and the account on each answer."""

import asyncio
import dataclasses
import json
import logging
import os
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from engine.errors import QueueFull
from engine.request import Request, SamplingParams
from engine.state import FinishReason, RequestState, RequestTimes
from server.__main__ import set_up_logging
from server.app import build_app
from server.config import ServerConfig
from server.http.access_log import JsonAccessLogger
from server.pages.page import FOLDER
from server.watch.metrics import Metrics
from server.watch.monitor import Monitor, percentile
from server.watch.processes import ProcessWatch
from tests.client import Client, events_of, post
from tests.fake_engine import FakeEngine, serving


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def client(engine: FakeEngine) -> AsyncIterator[Client]:
    async with serving(engine, enable_metrics=True) as client:
        yield client


# ---- /metrics ----

SGLANG_NAMES = """
    num_running_reqs num_queue_reqs num_used_tokens token_usage max_total_num_tokens cache_hit_rate gen_throughput
    new_token_ratio prompt_tokens_total cached_tokens_total generation_tokens_total num_requests_total
    num_aborted_requests_total num_retracted_requests_total time_to_first_token_seconds e2e_request_latency_seconds
    queue_time_seconds inter_token_latency_seconds time_per_output_token_seconds per_stage_req_latency_seconds
    prompt_tokens_histogram generation_tokens_histogram event_loop_lag_seconds kv_available_tokens kv_evictable_tokens
    kv_used_tokens realtime_tokens_total num_so_requests_total
"""
MODES = ("prefill_compute", "prefill_cache", "decode")


async def metrics_of(client: Client) -> dict[str, float]:
    """Sample with its labels, without the model's name, to value."""
    text = await (await client.get("/metrics")).text()
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    names = [re.sub(r',?model_name="fake-model"(?=})|model_name="fake-model",', "", name) for name, _ in lines]
    return {name.replace("{}", ""): float(value) for name, (_, value) in zip(names, lines, strict=True)}


async def test_metrics_have_sglangs_names(client: Client) -> None:
    await post(client, "/generate", text="a")
    text = await (await client.get("/metrics")).text()
    assert set(SGLANG_NAMES.split()) <= set(re.findall(r"^# TYPE sglang:(\S+) ", text, re.MULTILINE))
    assert 'model_name="fake-model"' in text


async def test_a_request_is_counted_when_it_ends(client: Client, engine: FakeEngine) -> None:
    engine.is_manual = True
    task = asyncio.create_task(client.post("/generate", json={"text": "abcde"}))
    await engine.until(lambda: bool(engine.live))
    state = engine.states[0]
    engine.emit(state, "xyz")
    name = "sglang:e2e_request_latency_seconds"
    assert (await metrics_of(client)).get(f"{name}_count", 0) == 0
    engine.finish(state, FinishReason("stop", matched=257))
    await task
    metrics = await metrics_of(client)
    assert metrics[f"{name}_count"] == 1
    assert metrics[f"{name}_sum"] == pytest.approx(1.75)
    assert metrics["sglang:queue_time_seconds_sum"] == pytest.approx(0.5)
    assert metrics["sglang:time_to_first_token_seconds_sum"] == pytest.approx(0.75)
    assert metrics["sglang:inter_token_latency_seconds_sum"] == pytest.approx(1.0 / 2)
    assert metrics['sglang:per_stage_req_latency_seconds_sum{stage="prefill"}'] == pytest.approx(0.25)
    assert metrics["sglang:prompt_tokens_histogram_sum"] == 5
    assert metrics["sglang:generation_tokens_histogram_sum"] == 3


async def test_gauges_and_counters_are_the_engines_own(client: Client) -> None:
    metrics = await metrics_of(client)
    assert metrics["sglang:token_usage"] == 0.25
    assert metrics["radixloop:bookkeeping_violations_total"] == 0
    assert (metrics["radixloop:evicted_tokens_total"], metrics["radixloop:num_cached_prefixes"]) == (60, 3)
    assert metrics["sglang:cache_hit_rate"] == 0.4
    slots = [metrics[f"sglang:kv_{name}_tokens"] for name in ("used", "evictable", "available")]
    assert slots == [250, 500, 250] and sum(slots) == metrics["sglang:max_total_num_tokens"]
    tokens = [metrics[f'sglang:realtime_tokens_total{{mode="{mode}"}}'] for mode in MODES]
    assert tokens == [60, 40, 7]
    assert metrics["sglang:num_so_requests_total"] == 8
    assert metrics["radixloop:num_refused_requests_total"] == 5
    assert metrics['radixloop:host_seconds_total{stage="deliver"}'] == 0.004
    assert metrics["process_resident_memory_bytes"] > 1e6


async def test_the_pool_of_layers_with_a_window_has_gauges_where_there_is_one(
    client: Client, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not [name for name in await metrics_of(client) if "swa" in name or "window" in name]
    stats = engine.stats()
    with_windows = dataclasses.replace(
        stats.scheduler, num_total_window_tokens=200, num_free_window_tokens=20, num_cached_window_tokens=60,
        num_held_window_tokens=120,
    )  # fmt: skip
    monkeypatch.setattr(engine, "stats", lambda: dataclasses.replace(stats, scheduler=with_windows))
    monkeypatch.setattr(engine, "replica_stats", lambda: [engine.stats()])
    metrics = await metrics_of(client)
    slots = [metrics[f"sglang:swa_{name}_tokens"] for name in ("used", "evictable", "available")]
    assert slots == [120, 60, 20] and sum(slots) == metrics["radixloop:num_window_tokens"]
    assert metrics["sglang:swa_token_usage"] == metrics["sglang:token_usage"] == 0.6
    assert metrics["sglang:full_token_usage"] == 0.25


async def test_each_replica_has_its_gauges(client: Client, engine: FakeEngine) -> None:
    engine.num_replicas = 2
    metrics = await metrics_of(client)
    for i in range(2):
        assert metrics[f'sglang:num_running_reqs{{dp_rank="{i}"}}'] == 1
        assert metrics[f'sglang:token_usage{{dp_rank="{i}"}}'] == 0.25
    assert "sglang:token_usage" not in metrics
    assert metrics["sglang:num_requests_total"] == 3


# ---- the monitor ----


def test_a_percentile_is_one_of_the_values() -> None:
    values = [float(i) for i in range(100, 0, -1)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile(values, 1)) == (51, 100, 100)
    assert percentile([], 0.5) is None
    assert percentile([3.0], 0.99) == 3.0


def test_rates_are_differences_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, clock = FakeEngine(), [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    monitor = Monitor(engine)
    assert monitor.rates(5).generated == 0
    for _ in range(10):
        monitor.samples.append(monitor.sample())
        clock[0] += 1
        scheduler, loop = engine.current_stats.scheduler, engine.current_stats.loop
        loop.num_generated_tokens += 50
        loop.num_steps += 10
        loop.deliver_s += 0.002
        scheduler = dataclasses.replace(
            scheduler,
            num_prompt_tokens=scheduler.num_prompt_tokens + 100,
            num_hit_tokens=scheduler.num_hit_tokens + 75,
        )
        engine.current_stats = dataclasses.replace(engine.current_stats, scheduler=scheduler)
    rates = monitor.rates(5)
    assert (rates.generated, rates.prompt, rates.steps, rates.hit_rate) == (50, 100, 10, 0.75)
    assert monitor.throughputs(5) == [50]
    assert rates.host_us_per_step == pytest.approx(200)
    assert [rate.generated for _, rate in monitor.series()] == [50] * 9


def test_a_request_that_never_ran_has_no_latency() -> None:
    monitor = Monitor(FakeEngine())
    monitor.observe(_state(RequestTimes(arrived=1.0, finished=2.0)))
    assert not monitor.ended
    monitor.observe(_state(RequestTimes(1.0, 2.0, 4.0, 8.0), [1, 2, 3]))
    (ended,) = monitor.ended
    assert (ended.queue_s, ended.first_token_s, ended.token_s, ended.total_s) == (1.0, 3.0, 2.0, 7.0)


async def test_forced_tokens_of_a_request_that_never_ran_are_no_answer_to_measure() -> None:
    """A grammar may force tokens before the request is admitted, and its client may leave before that."""
    engine = FakeEngine()
    metrics = Metrics(engine, Monitor(engine), "demo", {})
    metrics.observe(_state(RequestTimes(arrived=1.0, first_token=2.0, finished=2.0), [1, 2, 3]))
    assert metrics.registry.get_sample_value("sglang:time_to_first_token_seconds_count", {"model_name": "demo"}) == 0


def _state(times: RequestTimes, output_ids: list[int] | None = None) -> RequestState:
    return RequestState(Request("r", [1], SamplingParams()), output_ids=output_ids or [], times=times)


@pytest.mark.max_callback_ms(400)  # it blocks the loop to see that this is found
async def test_a_blocked_event_loop_shows_as_lag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.watch.monitor.IDLE_TICK_S", 0.01)
    monkeypatch.setattr("server.watch.monitor.TICK_S", 0.01)
    monitor, seen = Monitor(FakeEngine()), asyncio.Event()
    monitor.lag_observers.append(lambda lag_s: seen.set() if lag_s > 0.1 else None)
    context = monitor.running(None)  # type: ignore[arg-type]
    await anext(context)
    await asyncio.sleep(0.02)
    time.sleep(0.2)  # noqa: ASYNC251 - this is the test
    await asyncio.wait_for(seen.wait(), 60)
    assert max(monitor.lags) > 0.1
    with pytest.raises(StopAsyncIteration):
        await anext(context)


# ---- the dashboard ----


async def test_the_dashboards_data_is_all_that_the_page_reads(client: Client) -> None:
    await post(client, "/generate", text="Hi")
    data = await (await client.get("/dashboard/data")).json()
    assert data["model"] == "fake-model"
    assert data["now"]["kv"] == {"held": 250, "cached": 500, "total": 1000}
    assert data["latency"]["num_requests"] == 1
    assert data["latency"]["first_token"]["p99"] == pytest.approx(0.75)
    assert data["prefixes"] == [{"head": "<b>S", "tail": "", "num_tokens": 4, "hits": 42, "num_users": 1}]
    (branch, _), (replica,), (process, *_) = data["branches"], data["replicas"], data["processes"]
    assert process["pid"] == os.getpid() and process["memory_bytes"] > 1 << 20
    assert (branch["num_tokens"], branch["parent"], branch["head"]) == (40, -1, "<b>S")
    owners = {"kv": data["now"]["kv"], "prefix": data["prefixes"][0], "branch": branch, "replica": replica}
    script = "".join((FOLDER / name).read_text() for name in ("dashboard.js", "branches.js"))
    for group, name in re.findall(r"\b(now|latency|series|kv|prefix|branch|replica|canary)\.(\w+)", script):
        owner = owners.get(group) or (data["now"] if group == "now" else data["now"].get(group) or data[group])
        assert name in owner, f"{group}.{name}"


def test_replicas_and_ranks_are_shown_with_their_memory_and_cores(tmp_path: Path) -> None:
    page, ticks, own = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK"), os.getpid()

    def put(pid: int, name: str, children: str, *, cpu_s: int = 0, state: str = "S") -> None:
        files = {
            "comm": f"{name}\n",
            "stat": f"{pid} (a) b) {state} {'0 ' * 10} {ticks * cpu_s} {ticks} 0",
            "statm": f"900 {pid} 5",
            f"task/{pid}/children": children,
            f"task/{pid + 1}/children": "",
        }
        for file, text in files.items():
            (tmp_path / str(pid) / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / str(pid) / file).write_text(text)

    put(own, "python", f"{own + 10} {own + 20} {own + 30} {own + 40}")
    put(own + 10, "replica 0", f"{own + 11}", cpu_s=3)
    put(own + 11, "rank 1", "", state="T")
    put(own + 20, "replica 1", "")
    put(own + 30, "python", "")  # Python's helper; the last one has just ended
    watch = ProcessWatch(tmp_path)
    first = watch.report()
    assert [one["name"] for one in first] == ["server", "replica 0", "replica 0, rank 1", "replica 1"]
    assert [one["is_alive"] for one in first] == [True, True, False, True]
    assert first[1]["memory_bytes"] == (own + 10) * page and first[1]["cores"] is None
    put(own + 10, "replica 0", "", cpu_s=4)
    server, replica = watch.report()[:2]
    assert server["cores"] == 0 and replica["cores"] > 0


async def test_requests_that_run_show_their_prompts_ends_and_how_far_they_are(engine: FakeEngine) -> None:
    engine.is_manual = True
    prompt = "".join(f"{i:03d}" for i in range(60))
    body = {"text": prompt, "rid": "mine", "sampling_params": {"max_new_tokens": 50}}
    async with serving(engine) as client:
        task = asyncio.create_task(client.post("/generate", json=body))
        await engine.until(lambda: bool(engine.live))
        engine.emit(engine.states[0], "xyz")
        (request,) = (await (await client.get("/dashboard/data")).json())["requests"]
        assert (request["rid"], request["head"], request["tail"]) == ("mine", prompt[:24], prompt[-24:])
        assert (request["num_prompt_tokens"], request["num_cached_tokens"]) == (180, 2)
        assert (request["num_output_tokens"], request["max_new_tokens"]) == (3, 50)
        assert request["is_running"] and request["age_s"] > 0
        await client.post("/abort_request", json={"rid": "mine"})
        await task
        assert (await (await client.get("/dashboard/data")).json())["requests"] == []


async def test_a_span_that_is_not_kept_is_an_error_that_names_those_that_are(client: Client) -> None:
    for span in ("300", "3600", "86400"):
        data = await (await client.get(f"/dashboard/data?span={span}")).json()
        assert data["series"]["span_s"] == int(span)
    response = await client.get("/dashboard/data?span=7")
    assert response.status == 400
    assert "span must be one of 300, 3600, 86400, got '7'" in await response.text()


def test_longer_spans_are_kept_in_coarser_steps_of_means_and_bounded() -> None:
    monitor = Monitor(FakeEngine())
    sample = dataclasses.replace(monitor.sample(), num_waiting=2)
    for second in range(86400 // 2):
        now = dataclasses.replace(sample, at=float(second), num_running=second % 2, num_generated_tokens=10 * second)
        for history in monitor.histories.values():
            history.add(now)
    for span_s, step_s in ((300, 1.0), (3600, 12.0), (86400, 288.0)):
        samples = monitor.histories[span_s].samples
        assert len(samples) <= 301
        steps = [after.at - before.at for before, after in zip(samples, list(samples)[1:], strict=False)]
        assert set(steps) == {step_s}
        _, rates = monitor.series(span_s)[-1]
        assert rates.generated == pytest.approx(10)
    assert {sample.num_running for sample in list(monitor.histories[3600].samples)[1:]} == {0.5}
    assert samples[-1].num_waiting == 2


@pytest.mark.parametrize(("is_working", "shown"), [(True, "busy"), (False, "stuck")])
async def test_a_step_that_takes_long_is_busy_and_one_that_hangs_is_stuck(
    is_working: bool, shown: str, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.watch.monitor.time.process_time", lambda: time.perf_counter() if is_working else 1.0)
    monkeypatch.setattr("server.watch.dashboard.RATE_SPAN_S", 60.0)
    engine.health_status = "stuck"
    async with serving(engine) as client:
        await asyncio.sleep(0.2)
        assert (await (await client.get("/dashboard/data")).json())["now"]["status"] == shown
        engine.health_status = "ok"
        assert (await (await client.get("/dashboard/data")).json())["now"]["status"] == "ok"


async def test_the_page_is_open_and_its_data_is_not(engine: FakeEngine) -> None:
    def bearer(key: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {key}"}

    async with serving(engine, api_key="k", admin_api_key="a") as client:
        assert (await client.get("/dashboard")).status == 200
        assert (await client.get("/dashboard/data")).status == 401
        assert (await client.get("/dashboard/data", headers=bearer("k"))).status == 401
        assert (await client.get("/dashboard/data", headers=bearer("a"))).status == 200


# ---- meta_info ----


async def test_an_answers_account_tells_where_the_time_went(client: Client) -> None:
    meta = (await post(client, "/generate", text="Hello"))["meta_info"]
    assert (meta["queue_time"], meta["prefill_time"], meta["decode_time"]) == pytest.approx((0.5, 0.25, 1.0))
    assert meta["e2e_latency"] == pytest.approx(1.75)
    assert meta["cached_tokens"] == 2
    assert meta["first_missed_token"] == {"position": 2, "token_id": ord("l"), "text": "l"}
    meta = (await post(client, "/generate", text="Hel"))["meta_info"]
    assert meta["first_missed_token"] is None  # only the last token was computed, as for any cached prompt


@pytest.mark.parametrize(
    ("path", "prompt"),
    [
        ("/v1/completions", {"prompt": "Hello"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}),
    ],
)
async def test_openais_routes_give_the_account_when_asked(client: Client, path: str, prompt: dict[str, Any]) -> None:
    plain = await post(client, path, **prompt)
    assert "meta_info" not in plain["choices"][0]
    answer = await post(client, path, **prompt, return_meta_info=True)
    meta = answer["choices"][0]["meta_info"]
    assert meta["decode_time"] == pytest.approx(1.0)
    assert meta["completion_tokens"] == 12
    response = await client.post(path, json={**prompt, "stream": True, "return_meta_info": True})
    *events, done = events_of(await response.read())
    choices = [json.loads(event)["choices"][0] for event in events]
    assert done == "[DONE]"
    assert [("meta_info" in choice) for choice in choices] == [False] * (len(choices) - 1) + [True]
    assert choices[-1]["meta_info"]["finish_reason"] == {"type": "stop", "matched": 257}
    assert (await client.post(path, json={**prompt, "return_meta_info": 1})).status == 400


# ---- the access log ----


async def test_the_json_access_log_is_an_object_a_line(
    engine: FakeEngine, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    server = TestServer(build_app(engine, ServerConfig(model_path="fake-model", file_storage_path=str(tmp_path))))
    with caplog.at_level("INFO", "aiohttp.access"):
        await server.start_server(access_log_class=JsonAccessLogger)
        client: Client = TestClient(server)
        async with client:
            await post(client, "/generate", text="Hello", rid="mine")
            await client.get("/nope?key=secret")
    generate, nope = [json.loads(record.getMessage()) for record in caplog.records if record.name == "aiohttp.access"]
    assert (generate["method"], generate["path"], generate["status"]) == ("POST", "/generate", 200)
    assert (generate["request_id"], nope["request_id"][:4]) == ("mine", "req_")
    assert (generate["rid"], generate["prompt_tokens"], generate["cached_tokens"]) == ("mine", 5, 2)
    assert (generate["completion_tokens"], generate["finish_reasons"]) == (12, ["stop"])
    assert (generate["queue_s"], generate["first_token_s"]) == pytest.approx((0.5, 0.75))
    assert generate["client"] == "127.0.0.1"
    assert (nope["status"], nope["path"]) == (404, "/nope")
    assert "rid" not in nope


@pytest.mark.parametrize(
    ("sent", "rid", "named"),
    [("from-a-proxy", "mine", "from-a-proxy"), (None, "mine", "mine"), ("é" * 2, "a\r\nSet-Cookie: b", "req_"),
     ("x" * 129, "x" * 129, "req_")],
)  # fmt: skip
async def test_an_answer_is_named_as_the_client_named_it_where_a_header_can_say_so(
    client: Client, sent: str | None, rid: str, named: str
) -> None:
    headers = {} if sent is None else {"X-Request-Id": sent}
    answer = await client.post("/generate", json={"text": "Hello", "rid": rid}, headers=headers)
    assert answer.status == 200
    assert answer.headers["X-Request-Id"] == answer.headers["Request-Id"]
    assert answer.headers["X-Request-Id"].startswith(named) and "Set-Cookie" not in answer.headers


async def test_official_clients_find_the_name_of_an_answer_and_of_an_error(client: Client) -> None:
    import anthropic
    import openai

    url = str(client.make_url("/"))
    of_openai = openai.AsyncOpenAI(base_url=f"{url}v1", api_key="none", max_retries=0)
    of_anthropic = anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0)
    messages: Any = [{"role": "user", "content": "Hello"}]
    async with of_openai, of_anthropic:
        chat = await of_openai.chat.completions.create(model="fake-model", messages=messages)
        message = await of_anthropic.messages.create(model="fake-model", messages=messages, max_tokens=12)
        with pytest.raises(openai.BadRequestError) as refused:
            await of_openai.chat.completions.create(model="fake-model", messages=messages, n=0)
    assert (chat._request_id, message._request_id) == (chat.id, message.id)
    assert str(refused.value.request_id).startswith("req_")


def test_the_json_access_log_stands_alone_on_its_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    access = logging.getLogger("aiohttp.access")
    monkeypatch.setattr(access, "handlers", [])
    monkeypatch.setattr(access, "propagate", True)
    set_up_logging(ServerConfig(model_path="m", access_log="json"))
    access.info('{"a": 1}')
    assert capsys.readouterr().err == '{"a": 1}\n'


# ---- keys of several clients ----


@pytest.fixture
def key_file(tmp_path: Path) -> str:
    file = tmp_path / "keys.yaml"
    file.write_text("alice: sk-alice\nbob: {key: sk-bob, weight: 3}\n")
    return str(file)


async def test_a_key_names_the_client_and_its_weight(engine: FakeEngine, key_file: str) -> None:
    async with serving(engine, api_key_file=key_file) as client:
        for key in ("sk-alice", "sk-bob"):
            for path, body in (("/generate", {"text": "a"}), ("/v1/completions", {"prompt": "a"})):
                response = await client.post(path, json=body, headers={"Authorization": f"Bearer {key}"})
                assert response.status == 200
        assert (await client.post("/generate", json={"text": "a"})).status == 401
        response = await client.post("/flush_cache", headers={"Authorization": "Bearer sk-bob"})
        assert response.status == 401, "several clients have nobody who may reach into the server"
        assert "admin" in (await response.json())["error"]["message"]
    accounts = [(request.client, request.weight) for request in engine.requests]
    assert accounts == [("alice", 1.0)] * 2 + [("bob", 3.0)] * 2


async def test_without_a_file_the_address_is_the_client(engine: FakeEngine) -> None:
    async with serving(engine, api_key="k") as client:
        await client.post("/generate", json={"text": "a"}, headers={"Authorization": "Bearer k"})
    assert engine.requests[0].client == "127.0.0.1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold"),
        ("- a", "must hold"),
        ("a: 123", "a needs a key in quotes"),
        ("a: {key: x, wait: 1}", "a needs a key"),
        ("a: {key: x, weight: 0}", "weight of a"),
        ("a: x\nb: x", "b has the key of a"),
        ("a: [", "not YAML"),
    ],
)
def test_a_wrong_key_file_is_a_clear_error(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        build_app(FakeEngine(), ServerConfig(model_path="m", api_key_file=str(file)))


async def test_retry_after_is_whole_seconds_and_rounded_up(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(state: RequestState) -> None:
        raise QueueFull("9 requests are waiting, the limit is 9", 7.2)

    monkeypatch.setattr(engine, "submit", refuse)
    async with serving(engine) as client:
        for path, body in (("/generate", {"text": "a"}), ("/v1/completions", {"prompt": "a", "stream": True})):
            response = await client.post(path, json=body)
            assert (response.status, response.headers["Retry-After"]) == (429, "8")
