"""Ollama's API."""

import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from engine.state import FinishReason
from server.app import build_app
from server.config import ServerConfig
from tests.client import Client
from tests.fake_engine import PARSERS, THOUGHT_AND_CALL, FakeEngine, serving
from tests.test_engine import running_engine

USER: list[Any] = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


async def answer(client: Client, path: str, **body: Any) -> Any:
    response = await client.post(path, json={"model": "fake-model", "stream": False, **body})
    assert response.status == 200, await response.text()
    return await response.json()


async def lines(client: Client, path: str, **body: Any) -> list[Any]:
    response = await client.post(path, json={"model": "fake-model", **body})
    assert (response.status, response.content_type) == (200, "application/x-ndjson")
    return [json.loads(line) for line in (await response.text()).splitlines()]


# ---- answers ----


async def test_a_chat_streams_lines_unless_told_otherwise(client: Client, engine: FakeEngine) -> None:
    *pieces, last = await lines(client, "/api/chat", messages=USER, options={"num_predict": 3})
    assert [piece["message"] for piece in pieces] == [{"role": "assistant", "content": letter} for letter in "Hel"]
    assert not any(piece["done"] for piece in pieces)
    assert (last["done"], last["done_reason"], last["message"]["content"]) == (True, "length", "")
    assert bytes(engine.requests[0].input_ids) == b"[user]Hi[assistant]"
    whole = await answer(client, "/api/chat", messages=USER)
    assert (whole["message"]["content"], whole["done_reason"], whole["done"]) == ("Hello, world", "stop", True)


async def test_counts_and_durations_come_with_the_end(client: Client) -> None:
    whole = await answer(client, "/api/chat", messages=USER)
    assert (whole["prompt_eval_count"], whole["eval_count"]) == (19, 12)
    assert whole["prompt_eval_duration"] == pytest.approx(0.25e9)  # the fake's times, in nanoseconds
    assert whole["eval_duration"] == pytest.approx(1e9)
    assert whole["total_duration"] == pytest.approx(1.75e9)


async def test_generate_puts_the_prompt_into_the_template_unless_it_is_raw(client: Client, engine: FakeEngine) -> None:
    templated = await answer(client, "/api/generate", prompt="Hi", system="Be brief")
    assert templated["response"] == "Hello, world"
    assert bytes(engine.requests[0].input_ids) == b"[system]Be brief[user]Hi[assistant]"
    *pieces, last = await lines(client, "/api/generate", prompt="Hi", raw=True)
    assert "".join(piece["response"] for piece in pieces) == "Hello, world"
    assert last["done"] and last["response"] == ""
    assert bytes(engine.requests[1].input_ids) == b"Hi"


async def test_options_reach_the_sampler_under_its_names(client: Client, engine: FakeEngine) -> None:
    options = {
        "num_predict": 5, "temperature": 0.5, "top_k": 0, "top_p": 0.9, "min_p": 0.1, "stop": "END", "seed": 3,
        "repeat_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.2, "num_ctx": 4096, "num_gpu": 1,
    }  # fmt: skip
    await answer(client, "/api/chat", messages=USER, options=options)
    params = engine.requests[0].sampling_params
    assert (params.max_new_tokens, params.temperature, params.top_k, params.top_p) == (5, 0.5, -1, 0.9)
    assert (params.min_p, params.stop, params.sampling_seed, params.repetition_penalty) == (0.1, ["END"], 3, 1.1)
    assert (params.presence_penalty, params.frequency_penalty) == (0.1, 0.2)


@pytest.mark.parametrize("format_", ["json", {"type": "object"}])
async def test_a_format_constrains_the_answer(client: Client, engine: FakeEngine, format_: Any) -> None:
    await answer(client, "/api/chat", messages=USER, format=format_)
    await answer(client, "/api/generate", prompt="Hi", raw=True, format=format_)
    for request in engine.requests:
        assert request.sampling_params.json_schema == {"type": "object"}


async def test_no_limit_is_a_negative_num_predict(client: Client, engine: FakeEngine) -> None:
    await answer(client, "/api/generate", prompt="Hi", raw=True, options={"num_predict": -1})
    assert engine.states[0].max_new_tokens == 256 - 2


async def test_thinking_text_and_calls_are_fields_of_their_own() -> None:
    async with serving(FakeEngine(THOUGHT_AND_CALL, context_length=1024), **PARSERS) as client:
        whole = await answer(client, "/api/chat", messages=USER, tools=[TOOL], think=True)
        streamed = await lines(client, "/api/chat", messages=USER, tools=[TOOL], think=True)
    message = whole["message"]
    assert (message["thinking"], message["content"]) == ("Where?", "Let me look.")
    [call] = message["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": {"city": "Oslo"}}
    assert "".join(line["message"].get("thinking", "") for line in streamed) == "Where?"
    assert "".join(line["message"]["content"] for line in streamed) == "Let me look."
    [streamed_call] = [call for line in streamed for call in line["message"].get("tool_calls", [])]
    assert streamed_call["function"] == call["function"]


@pytest.mark.parametrize(
    ("path", "prompt"),
    [
        ("/api/chat", {"messages": USER}),
        ("/api/generate", {"prompt": "Hi"}),
        ("/api/generate", {"prompt": "Hi", "raw": True}),
    ],
)
async def test_each_tokens_log_probability_comes_once(client: Client, path: str, prompt: Any) -> None:
    asked = {**prompt, "logprobs": True, "top_logprobs": 2}
    whole = await answer(client, path, **asked)
    assert "".join(entry["token"] for entry in whole["logprobs"]) == "Hello, world"
    assert all(set(entry) == {"token", "logprob", "bytes", "top_logprobs"} for entry in whole["logprobs"])
    assert [len(entry["top_logprobs"]) for entry in whole["logprobs"]] == [2] * 12
    streamed = await lines(client, path, **asked)
    assert [entry for line in streamed for entry in line.get("logprobs", [])] == whole["logprobs"]
    assert "logprobs" not in await answer(client, path, **prompt)


async def test_thinking_and_calls_have_log_probabilities_too() -> None:
    async with serving(FakeEngine(THOUGHT_AND_CALL), **PARSERS) as client:
        found = await lines(client, "/api/chat", messages=USER, tools=[TOOL], logprobs=True)
    tokens = [entry["token"] for line in found for entry in line.get("logprobs", [])]
    assert "".join(tokens) == THOUGHT_AND_CALL


async def test_tool_calls_and_results_go_into_the_prompt(client: Client, engine: FakeEngine) -> None:
    call = {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    messages = [
        *USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_name": "weather", "content": "rain"},
    ]
    await answer(client, "/api/chat", messages=messages)
    assert bytes(engine.requests[0].input_ids) == b"[user]Hi[assistant][weather][tool]rain[assistant]"


async def test_asking_for_nothing_loads_the_model(client: Client, engine: FakeEngine) -> None:
    for path, empty in (("/api/chat", {"messages": []}), ("/api/generate", {"prompt": "", "keep_alive": "5m"})):
        loaded = await answer(client, path, **empty)
        assert (loaded["done"], loaded["done_reason"]) == (True, "load")
    assert not engine.requests


# ---- models ----


async def test_the_model_is_listed_shown_and_known_with_its_tag() -> None:
    async with serving(FakeEngine(), **PARSERS) as client:
        for path in ("/api/tags", "/api/ps"):
            [card] = (await (await client.get(path)).json())["models"]
            assert (card["name"], card["details"]["family"]) == ("fake-model", "fake")
        shown = await answer(client, "/api/show", model="fake-model:latest")
        assert shown["model_info"] == {"general.architecture": "fake", "fake.context_length": 256}
        assert shown["capabilities"] == ["completion", "tools", "thinking"]
        assert (await (await client.get("/api/version")).json())["version"]


# ---- errors ----


@pytest.mark.parametrize(
    ("field", "path", "body"),
    [
        ("messages[0].role", "/api/chat", {"messages": [{"content": "x"}]}),
        ("messages[0].images", "/api/chat", {"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}),
        ("images", "/api/generate", {"prompt": "x", "images": ["aGk="]}),
        ("suffix", "/api/generate", {"prompt": "x", "suffix": "y"}),
        ("template", "/api/generate", {"prompt": "x", "template": "y"}),
        ("context", "/api/generate", {"prompt": "x", "context": [1]}),
        ("system", "/api/generate", {"prompt": "x", "raw": True, "system": "y"}),
        ("tools", "/api/generate", {"prompt": "x", "tools": [TOOL]}),
        ("format", "/api/chat", {"messages": USER, "format": "yaml"}),
        ("think", "/api/chat", {"messages": USER, "think": "hard"}),
        ("options.mirostat", "/api/chat", {"messages": USER, "options": {"mirostat": 2}}),
        ("options.num_predict", "/api/chat", {"messages": USER, "options": {"num_predict": "many"}}),
        ("options.temperature", "/api/chat", {"messages": USER, "options": {"temperature": -1}}),
        ("options.repeat_penalty", "/api/generate", {"prompt": "x", "raw": True, "options": {"repeat_penalty": 9}}),
        ("top_logprobs", "/api/chat", {"messages": USER, "logprobs": True, "top_logprobs": 129}),
        ("top_logprobs", "/api/chat", {"messages": USER, "top_logprobs": 2}),
        ("top_logprobs", "/api/generate", {"prompt": "x", "raw": True, "top_logprobs": 2}),
        ("options.seed", "/api/chat", {"messages": USER, "options": {"seed": "x"}}),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(client: Client, field: str, path: str, body: Any) -> None:
    response = await client.post(path, json={"model": "fake-model", **body})
    assert response.status == 400
    [(key, message)] = (await response.json()).items()
    assert key == "error"
    assert field in message


async def test_clients_that_look_for_a_server_first_find_it(client: Client) -> None:
    head, get = await client.head("/"), await client.get("/")
    assert (head.status, get.status) == (200, 200)
    assert "running" in await get.text()


async def test_an_unknown_model_is_not_found(client: Client) -> None:
    for path in ("/api/chat", "/api/show"):
        response = await client.post(path, json={"model": "llama3", "messages": USER})
        assert response.status == 404
        assert "llama3" in (await response.json())["error"]


async def test_a_failure_ends_a_stream_with_an_error_line(client: Client, engine: FakeEngine) -> None:
    engine.failure = FinishReason("abort", message="out of memory", status_code=500)
    assert await lines(client, "/api/chat", messages=USER) == [{"error": "out of memory"}]


async def test_a_disconnect_aborts_the_chat() -> None:
    engine = FakeEngine(is_manual=True)
    async with serving(engine) as client:
        response = await client.post("/api/chat", json={"model": "fake-model", "messages": USER})
        engine.emit(engine.states[0], "H")
        await response.content.readline()
        response.close()
        await engine.until(lambda: engine.aborted == [engine.requests[0].rid])


# ---- as Ollama's own clients and examples do it ----


async def test_options_that_ollama_sends_by_default_are_accepted(client: Client, engine: FakeEngine) -> None:
    options = {"repeat_last_n": 64, "typical_p": 0.7, "tfs_z": 1, "mirostat": 0, "repeat_penalty": 1.1}
    await answer(client, "/api/chat", messages=USER, options=options)
    assert engine.requests[0].sampling_params.repetition_penalty == 1.1


async def test_a_window_of_no_tokens_means_no_penalties(client: Client, engine: FakeEngine) -> None:
    options = {"repeat_last_n": 0, "repeat_penalty": 1.1, "presence_penalty": 1, "frequency_penalty": 1}
    await answer(client, "/api/generate", prompt="Hi", options=options)
    assert not engine.requests[0].sampling_params.has_penalties


@pytest.mark.parametrize("headers", [{}, {"Origin": "http://HOST"}, {"Sec-Fetch-Site": "same-origin"}])
async def test_curl_need_not_name_a_content_type(client: Client, headers: dict[str, str]) -> None:
    host = f"{client.host}:{client.port}"
    sent = {name: value.replace("HOST", host) for name, value in headers.items()}
    for kind in ("application/x-www-form-urlencoded", "text/plain"):
        body = b'{"model": "fake-model", "prompt": "Hi", "stream": false}'
        response = await client.post("/api/generate", data=body, headers={**sent, "Content-Type": kind})
        assert response.status == 200, await response.text()


@pytest.mark.parametrize(
    "headers", [{"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}]
)
async def test_a_foreign_page_cannot_leave_the_content_type_out(client: Client, headers: dict[str, str]) -> None:
    for path, more in (("/api/generate", headers), ("/generate", {})):
        sent = {**more, "Content-Type": "text/plain"}
        response = await client.post(path, data=b'{"prompt": "Hi", "text": "Hi"}', headers=sent)
        assert 400 <= response.status < 404


async def test_texts_become_vectors_of_length_1(client: Client, engine: FakeEngine) -> None:
    for given, count in (("ab", 1), (["ab", "zzzz"], 2), ([], 0), ("", 0)):
        answer_ = await answer(client, "/api/embed", input=given)
        assert len(answer_["embeddings"]) == count
        assert all(sum(x * x for x in vector) == pytest.approx(1, abs=1e-5) for vector in answer_["embeddings"])
    cut = await answer(client, "/api/embed", input="ab", dimensions=2, keep_alive="5m", options={})
    assert len(cut["embeddings"][0]) == 2 and cut["prompt_eval_count"] == 2
    older = await answer(client, "/api/embeddings", prompt="ab")
    assert older["embedding"] == [2.0, 195.0, 3.0, 4.0]


async def test_a_text_beyond_the_context_is_cut_unless_told_otherwise(client: Client, engine: FakeEngine) -> None:
    await answer(client, "/api/embed", input="x" * 1000)
    assert len(engine.requests[0].input_ids) == 256
    body = {"model": "fake-model", "input": "x" * 1000, "truncate": False}
    assert (await client.post("/api/embed", json=body)).status == 400


async def test_the_model_is_there_to_be_pulled(client: Client) -> None:
    assert [line["status"] for line in await lines(client, "/api/pull")] == ["pulling manifest", "success"]
    assert await answer(client, "/api/pull") == {"status": "success"}
    assert (await client.post("/api/pull", json={"model": "llama3"})).status == 404


async def test_a_model_that_need_not_stay_is_told_to_go(client: Client, engine: FakeEngine) -> None:
    for path, empty in (("/api/chat", {"messages": []}), ("/api/generate", {"prompt": ""})):
        for keep_alive in (0, "0", "0s"):
            gone = await answer(client, path, **empty, keep_alive=keep_alive)
            assert (gone["done"], gone["done_reason"]) == (True, "unload")
    said = await answer(client, "/api/chat", messages=USER, keep_alive=0)
    assert said["message"]["content"] == "Hello, world"
    assert len(engine.requests) == 1


async def test_a_text_cut_to_the_context_is_computed(tiny_llama: Path, tmp_path: Path) -> None:
    config = ServerConfig(model_path=str(tiny_llama), file_storage_path=str(tmp_path), served_model_name=["fake-model"])
    async with running_engine(tiny_llama) as engine, TestClient(TestServer(build_app(engine, config))) as client:
        vectors = await answer(client, "/api/embed", input=["one", "over and over " * 500])
    assert vectors["prompt_eval_count"] > 512
    assert [len(vector) for vector in vectors["embeddings"]] == [64, 64]
