"""One shape for every API's answer: what streams adds up to what is whole, and a token enters few functions."""

import asyncio
import json
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from engine.request import SamplingParams
from engine.state import Delta, FinishReason, RequestState
from server.apis.answer import Answer
from server.apis.openai_answers import ChatAnswer, Envelope
from server.http.live import Options, make_requests
from server.http.sse import EventStream
from server.reading.chat import ChatTurn
from tests.fake_engine import PARSERS, THOUGHT_AND_CALL, FakeEngine, FakeTokenizer, serving

MESSAGES = [{"role": "user", "content": "Hi"}]
FUNCTION = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOL = {"type": "function", "function": FUNCTION}
Said = tuple[str, str, str]  # reasoning, text, arguments of the call


def values_of(stream: bytes) -> list[Any]:
    """Return the JSON of each event, or of each line."""
    lines = [line.removeprefix("data: ") for line in stream.decode().splitlines()]
    return [json.loads(line) for line in lines if line.startswith("{")]


def chat_said(whole: Any, stream: list[Any]) -> tuple[Said, Said]:
    def said(messages: list[Any]) -> Said:
        calls = [call["function"]["arguments"] for message in messages for call in message.get("tool_calls", [])]
        texts = [message.get("content") or "" for message in messages]
        return "".join(message.get("reasoning", "") for message in messages), "".join(texts), "".join(calls)

    deltas = [choice["delta"] for event in stream for choice in event["choices"]]
    return said([whole["choices"][0]["message"]]), said(deltas)


def messages_said(whole: Any, stream: list[Any]) -> tuple[Said, Said]:
    blocks = whole["content"]
    calls = [block["input"] for block in blocks if block["type"] == "tool_use"]
    deltas = [event["delta"] for event in stream if event["type"] == "content_block_delta"]

    def joined(parts: list[Any], name: str) -> str:
        return "".join(part.get(name, "") for part in parts)

    streamed = joined(deltas, "partial_json")
    return (joined(blocks, "thinking"), joined(blocks, "text"), json.dumps(calls[0])), (
        joined(deltas, "thinking"),
        joined(deltas, "text"),
        json.dumps(json.loads(streamed)),
    )


def responses_said(whole: Any, stream: list[Any]) -> tuple[Said, Said]:
    def said(items: list[Any]) -> Said:
        texts = {"reasoning": "", "message": "", "function_call": ""}
        for item in items:
            texts[item["type"]] += item.get("arguments") or item["content"][0]["text"]
        return texts["reasoning"], texts["message"], texts["function_call"]

    grown = {"reasoning_text": "", "output_text": "", "function_call_arguments": ""}
    for event in stream:
        _, name, *rest = event["type"].split(".")
        if rest == ["delta"]:
            grown[name] += event["delta"]
    assert said(stream[-1]["response"]["output"]) == tuple(grown.values())
    return said(whole["output"]), said(stream[-1]["response"]["output"])


def ollama_said(whole: Any, stream: list[Any]) -> tuple[Said, Said]:
    def said(lines: list[Any]) -> Said:
        messages = [line["message"] for line in lines]
        calls = [call["function"]["arguments"] for message in messages for call in message.get("tool_calls", [])]
        thinking = "".join(message.get("thinking", "") for message in messages)
        return thinking, "".join(message["content"] for message in messages), json.dumps(calls)

    return said([whole]), said(stream)


APIS: dict[str, tuple[dict[str, Any], Callable[[Any, list[Any]], tuple[Said, Said]]]] = {
    "/v1/chat/completions": ({"messages": MESSAGES, "tools": [TOOL]}, chat_said),
    "/v1/messages": (
        {
            "messages": MESSAGES,
            "max_tokens": 200,
            "thinking": {"type": "adaptive"},
            "tools": [{"name": "weather", "input_schema": FUNCTION["parameters"]}],
        },
        messages_said,
    ),
    "/v1/responses": ({"input": "Hi", "tools": [{"type": "function", **FUNCTION}]}, responses_said),
    "/api/chat": ({"messages": MESSAGES, "tools": [TOOL], "think": True}, ollama_said),
}


@pytest.mark.parametrize("path", APIS)
async def test_a_streamed_answer_adds_up_to_the_whole_one(path: str) -> None:
    body, said = APIS[path]
    async with serving(FakeEngine(THOUGHT_AND_CALL), **PARSERS) as client:
        response = await client.post(path, json={**body, "stream": False})
        whole = await response.json()
        response = await client.post(path, json={**body, "stream": True})
        stream = values_of(await response.read())
    from_whole, from_stream = said(whole, stream)
    assert from_whole == from_stream
    assert from_whole[:2] == ("Where?", "Let me look.")
    assert "Oslo" in from_whole[2]


@pytest.mark.parametrize("path", [*APIS, "/v1/completions", "/generate"])
async def test_a_stream_that_fails_after_it_began_says_so_in_its_last_event(path: str) -> None:
    engine = FakeEngine(is_manual=True)
    body = APIS[path][0] if path in APIS else {"text" if path == "/generate" else "prompt": "Hi"}
    async with serving(engine) as client:
        task = asyncio.create_task(client.post(path, json={**body, "stream": True}))
        await engine.until(lambda: bool(engine.live))
        response = await task
        engine.emit(engine.states[0], "Hello")
        engine.finish(engine.states[0], FinishReason("abort", message="the step failed", status_code=500))
        *_, last = values_of(await response.read())
    assert response.status == 200
    assert "the step failed" in json.dumps(last.get("error") or last["response"]["error"])


class Connection:
    """Takes bytes, and is never full."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def is_closing(self) -> bool:
        return False

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def get_write_buffer_size(self) -> int:
        return 0


async def test_a_token_of_plain_text_enters_three_functions_and_makes_one_write() -> None:
    answer: Answer
    turn = ChatTurn("Hi", [1], SamplingParams(), Options(stream=True), None)
    [request] = make_requests(["r"], turn.input_ids, turn.params, turn.options)
    state = RequestState(request)
    answer = ChatAnswer(0, state, Envelope("r", "m", "o", "c"), FakeTokenizer(), turn=turn)
    stream, connection = EventStream([answer]), Connection()
    stream.transport, stream.is_direct = connection, True  # type: ignore[assignment]
    answer.sink(Delta(state, "first", [1]))
    entered: list[str] = []

    def observe(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and "/server/" in frame.f_code.co_filename:
            entered.append(frame.f_code.co_name)

    connection.written.clear()
    delta = Delta(state, "more", [2])
    sys.setprofile(observe)
    try:
        answer.sink(delta)
    finally:
        sys.setprofile(None)
    assert entered == ["sink", "text", "write"]
    assert len(connection.written) == 1
