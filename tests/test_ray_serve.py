"""The fleet under Ray Serve, on a local Ray: what passes through its proxy, and what it refuses."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import unused_port

from tests.client import events_of

ray = pytest.importorskip("ray")
serve = pytest.importorskip("ray.serve")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def fleet(tiny_llama: Path) -> Iterator[str]:
    """Yield the URL of a fleet of one server."""
    from server.fleet.ray_serve import build

    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, runtime_env={"env_vars": env})
    port = unused_port()
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        options = {"model_path": str(tiny_llama), "device": "cpu", "max_total_tokens": 2048, "num_cpus": 0.5}
        serve.run(build({**options, "max_replicas": 2, "api_key": "secret"}))
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def client_of(fleet: str) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(fleet, headers={"Authorization": "Bearer secret"})


def body(num_tokens: int, **more: Any) -> dict[str, Any]:
    params = {"max_new_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    return {"text": "Hi", "sampling_params": params, **more}


async def test_requests_errors_and_keys_pass_through(fleet: str) -> None:
    async with client_of(fleet) as client:
        answer = await client.post("/generate", json=body(5))
        assert (answer.status, len((await answer.json())["output_ids"])) == (200, 5)
        answer = await client.post("/v1/chat/completions", json={"messages": 3})
        assert (answer.status, (await answer.json())["error"]["param"]) == (400, "messages")
        answer = await client.get("/v1/models/no%2Fmodel?x=%20")
        assert (answer.status, "no/model" in await answer.text()) == (404, True)
        answer = await client.get("/v1/models", headers={"Authorization": "Bearer wrong"})
        assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")


async def test_a_stream_comes_token_by_token_and_ends_with_its_client(fleet: str) -> None:
    async with client_of(fleet) as client:
        whole = await (await client.post("/generate", json=body(20))).json()
        answer = await client.post("/generate", json=body(20, stream=True))
        *events, done = events_of(await answer.read())
        assert (answer.content_type, done, json.loads(events[-1])["text"]) == (
            "text/event-stream",
            "[DONE]",
            whole["text"],
        )
        assert len(events) > 5
        answer = await client.post("/generate", json=body(400, stream=True))
        assert (await answer.content.readany()).startswith(b"data: ")
        answer.close()
        while (await (await client.get("/get_load")).json())[0]["num_reqs"]:
            pass
        stats = (await (await client.get("/server_info")).json())["internal_states"][0]
        assert stats["num_aborted"] == 1


async def test_what_a_fleet_cannot_do_is_refused(fleet: str) -> None:
    async with client_of(fleet) as client:
        for path in (
            "/v1/files",
            "/v1/batches",
            "/open_session",
            "/v1/responses/resp_1",
            "/abort_request",
            "/flush_cache",
        ):
            answer = await client.post(path, json={})
            assert answer.status == 501
            assert path in (await answer.json())["error"]["message"]
