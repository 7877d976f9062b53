"""The corpus of crashes: whatever has brought a server down once is answered, by every API that takes it.

The bodies are those of `bench.worst`, smaller here: `tests/test_hostile.py` has the limits at their full size.
"""

import asyncio
import json
import re
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import TestClient, TestServer

from bench.worst import Worst, grammars, spellings, with_fields, worst_bodies
from engine.local import LocalEngine
from server.app import build_app
from server.config import ServerConfig
from tests.client import Client
from tests.fake_engine import FakeEngine, serving
from tests.test_engine import collect, make_state, running_engine

BY_KIND: defaultdict[str, list[Worst]] = defaultdict(list)
for one in worst_bodies(1 / 1024):
    BY_KIND[one.kind].append(one)
FAILURE = re.compile(rb'server_error|api_error|internal server error|"code": ?5\d\d|Traceback')


async def told(client: Client, path: str, body: bytes, headers: dict[str, str]) -> str:
    """Return what is wrong with the answer; "" if it is one."""
    async with asyncio.timeout(60), client.post(path, data=body, headers=headers) as response:
        data = await response.read()
    said = f"{path} {body[:80]!r}: {response.status} {data[:200]!r}"
    if response.status >= 500 or FAILURE.search(data):
        return said
    if response.status >= 400 and not json.loads(data).get("error"):
        return f"no reason: {said}"
    return ""


def streamed(body: bytes) -> bytes:
    return b'{"stream":true,' + body[1:] if body.startswith(b"{") else body


@pytest.mark.parametrize("kind", sorted(BY_KIND))
@pytest.mark.max_callback_ms(150)  # thousands of values are parsed and checked in one go
async def test_what_has_brought_a_server_down_is_answered(kind: str) -> None:
    engine = FakeEngine(context_length=2048)
    async with serving(engine, served_model_name=["demo"]) as client:
        for worst in BY_KIND[kind]:
            body = worst.body
            for sent in (body, body if worst.is_compressed else streamed(body)):
                assert not await told(client, worst.path, sent, worst.headers)
        assert not engine.live
        assert (await client.post("/generate", json={"text": "Hi"})).status == 200


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
async def test_tokens_that_come_while_other_prompts_are_submitted_are_streamed(path: str) -> None:
    engine = FakeEngine("Hi", context_length=2048)
    async with asyncio.timeout(60), serving(engine) as client:
        name = "text" if path == "/generate" else "prompt"
        answer = await client.post(path, json={name: ["a"] * 100, "stream": True})
        data = await answer.text()
    assert data.endswith("data: [DONE]\n\n")
    ends = [line for line in data.splitlines() if '"finish_reason":{' in line or '"finish_reason":"stop"' in line]
    assert len(ends) == 100


# ---- grammars, on the engine that makes them ----

GRAMMARS = {kind: (field, value) for kind, field, value in grammars(lambda full: max(1, full // 10))}


@asynccontextmanager
async def served(engine: LocalEngine, folder: Path) -> AsyncIterator[Client]:
    config = ServerConfig(
        model_path="demo", file_storage_path=str(folder), tool_call_parser="hermes", disable_tool_prompt=False
    )
    async with TestClient(TestServer(build_app(engine, config))) as client:
        yield client


@pytest.mark.max_callback_ms(200)  # of a schema's 500 properties, written and looked up
async def test_every_api_answers_or_refuses_a_grammar_that_has_brought_an_engine_down(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """Alone, streamed, and in the lines of a batch; then the engine answers as it did before."""
    prompt = [7, 8, 9, 300]
    lines: list[dict[str, Any]] = []
    async with running_engine(tiny_llama) as engine, served(engine, tmp_path) as client:
        _, before = await collect(engine, make_state(prompt))
        wrong = []
        for kind, (field, value) in GRAMMARS.items():
            for path, fields in spellings(field, value):
                body = with_fields(path, fields)
                for sent in (body, streamed(body)):
                    wrong.append(await told(client, path, sent, {"Content-Type": "application/json"}))
                if path in ("/v1/chat/completions", "/v1/completions", "/v1/responses"):
                    name = f"{kind} {len(lines)}"
                    lines.append({"custom_id": name, "method": "POST", "url": path, "body": json.loads(body)})
        assert not [one for one in wrong if one]
        for url in ("/v1/chat/completions", "/v1/responses"):
            statuses = await statuses_of_batch(client, [line for line in lines if line["url"] == url])
            assert statuses <= {200, 400}
        assert (await collect(engine, make_state(prompt)))[1] == before


async def statuses_of_batch(client: Client, lines: list[dict[str, Any]]) -> set[int]:
    """Return the status codes of the answers to a batch's lines."""
    form = aiohttp.FormData({"purpose": "batch"})
    form.add_field("file", b"\n".join(json.dumps(line).encode() for line in lines), filename="lines.jsonl")
    file_id = (await (await client.post("/v1/files", data=form)).json())["id"]
    body = {"input_file_id": file_id, "endpoint": lines[0]["url"]}
    batch = await (await client.post("/v1/batches", json=body)).json()
    async with asyncio.timeout(60):
        while batch["status"] in ("validating", "in_progress", "finalizing"):
            await asyncio.sleep(0.05)
            batch = await (await client.get(f"/v1/batches/{batch['id']}")).json()
    assert batch["request_counts"]["total"] == len(lines), batch
    texts = [
        await (await client.get(f"/v1/files/{batch[name]}/content")).text()
        for name in ("output_file_id", "error_file_id")
        if batch[name]
    ]
    answers = [json.loads(line) for text in texts for line in text.splitlines()]
    assert len(answers) == len(lines)
    return {answer["response"]["status_code"] for answer in answers}
