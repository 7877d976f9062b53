"""OpenAI's Responses API, through its own client where that can say what is meant."""

import asyncio
import json
from typing import Any

import openai
import pytest

from engine.declared import convert
from engine.errors import InvalidRequest
from engine.state import FinishReason
from server.apis.response_store import ResponseStore
from server.apis.text_logprobs import TextLogprobs
from server.reading.left_out import LeftOut
from server.reading.responses import chat_body, configure, read_input
from server.reading.responses_body import ResponsesRequest
from server.reading.responses_tools import Tools
from tests.client import Client, official
from tests.fake_engine import PARSERS, THOUGHT_AND_CALL, FakeEngine, serving

TOOL: Any = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": None}


@pytest.fixture(scope="module", autouse=True)
def _models_of_the_official_client() -> None:
    """Use the official client once before the event loop is guarded: it builds its models then, for 0.2 s."""

    async def use() -> None:
        async with serving(FakeEngine(context_length=1024)) as client, official(client) as api:
            response = await api.responses.create(model="fake-model", input="Hi")
            await api.responses.retrieve(response.id)
            async with api.responses.stream(model="fake-model", input="Hi") as stream:
                await stream.get_final_response()

    asyncio.run(use())


@pytest.fixture
async def engine() -> FakeEngine:
    return FakeEngine(context_length=1024)


async def events(client: Client, **body: Any) -> list[Any]:
    response = await client.post("/v1/responses", json={"input": "Hi", **body, "stream": True})
    assert response.status == 200, await response.text()
    texts = (await response.text()).removesuffix("\n\n").split("\n\n")
    found = [json.loads(text.split("\ndata: ")[1]) for text in texts]
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


# ---- reasoning, as chats have it ----


async def test_template_variables_and_a_thinking_budget_are_as_in_chats(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.answer = "Hm</think>Two"
    seen: list[Any] = []
    render_chat = engine.tokenizer.render_chat

    def render(messages: Any, **variables: Any) -> str:
        seen.append(variables.pop("enable_thinking", None))
        return render_chat(messages, **variables)

    async with serving(engine, **PARSERS) as client:
        monkeypatch.setattr(engine.tokenizer, "render_chat", render)
        for path, body in (
            ("/v1/responses", {"input": "Hi", "thinking_token_budget": 7}),
            ("/v1/messages", {"max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}),
        ):
            body["chat_template_kwargs"] = {"enable_thinking": "perhaps"}
            response = await client.post(path, json=body)
            assert response.status == 200, await response.text()
    assert seen == ["perhaps", "perhaps"]
    assert engine.requests[0].max_thinking_tokens == 7


# ---- log-probabilities ----

LOGPROBS: Any = ["message.output_text.logprobs"]


def tokens_of(logprobs: Any) -> str:
    return b"".join(bytes(token["bytes"]) for token in logprobs).decode()


@pytest.mark.parametrize("answer", ["Hello, world", THOUGHT_AND_CALL, "<think>Let me</think>\n\nLet me", "<think>Hm"])
async def test_texts_have_the_log_probabilities_of_their_own_tokens(engine: FakeEngine, answer: str) -> None:
    engine.answer = answer
    async with serving(engine, **PARSERS) as client:
        body: dict[str, Any] = {"include": LOGPROBS, "top_logprobs": 2, "tools": [TOOL]}
        whole = await (await client.post("/v1/responses", json={"input": "Hi", **body})).json()
        streamed = await events(client, **body)
    texts = [item["content"][0] for item in whole["output"] if item["type"] == "message"]
    assert len(texts) == (answer != "<think>Hm") and whole["top_logprobs"] == 2
    deltas = [event for event in streamed if event["type"] == "response.output_text.delta"]
    for text in texts:
        assert tokens_of(text["logprobs"]) == text["text"] == answer.rpartition("</think>")[2].partition("<")[0].strip()
        assert [len(token["top_logprobs"]) for token in text["logprobs"]] == [2] * len(text["text"].encode())
        assert [token for event in deltas for token in event["logprobs"]] == text["logprobs"]
        (done,) = [event for event in streamed if event["type"] == "response.output_text.done"]
        assert done["logprobs"] == text["logprobs"]
    ended = [item["content"] for item in streamed[-1]["response"]["output"] if item["type"] == "message"]
    assert ended == [[text] for text in texts]


def test_a_token_that_pieces_share_is_the_firsts_and_what_is_no_text_is_passed_over() -> None:
    tokens = TextLogprobs(lambda logprobs: [{"bytes": list(token)} for token in logprobs])  # type: ignore[attr-defined]

    def taken(piece: str, *come: bytes) -> list[bytes]:
        tokens.add(list(come))  # type: ignore[arg-type]
        return [bytes(token["bytes"]) for token in tokens.take(piece)]

    assert taken("Hm", b"<think>", b"H", b"m") == [b"H", b"m"]
    assert taken("a b", b"</think>", b"a", b" bc") == [b"a", b" bc"]
    assert taken("c") == [] and taken("€", b"\xe2\x82", b"\xac") == [b"\xe2\x82", b"\xac"]
    assert taken("\ufffd", b"\xe2") == [b"\xe2"], "half a character"
    assert taken("e", b"e", b"<eos>") == [b"e"]


def test_a_piece_whose_letters_a_mark_ahead_of_it_holds_has_its_own_tokens() -> None:
    tokens = TextLogprobs(lambda logprobs: [{"bytes": list(token)} for token in logprobs])  # type: ignore[attr-defined]
    tokens.add([b"</think>", b"\n\n", b"hi"])  # type: ignore[arg-type]
    assert [bytes(token["bytes"]) for token in tokens.take("hi")] == [b"hi"]
    tokens.add([b" there"])  # type: ignore[arg-type]
    assert [bytes(token["bytes"]) for token in tokens.take(" there")] == [b" there"]


async def test_the_official_client_reads_log_probabilities(api: openai.AsyncOpenAI) -> None:
    response: Any = await api.responses.create(model="fake-model", input="Hi", include=LOGPROBS)
    (part,) = response.output[0].content
    assert "".join(token.token for token in part.logprobs) == "Hello, world"
    assert part.logprobs[0].top_logprobs == []
    async with api.responses.stream(model="fake-model", input="Hi", top_logprobs=1) as stream:
        deltas = [event async for event in stream if event.type == "response.output_text.delta"]
    assert [delta.logprobs[0].token for delta in deltas] == list("Hello, world")
    plain: Any = await api.responses.create(model="fake-model", input="Hi")
    assert plain.output[0].content[0].logprobs == []


# ---- answers ----


async def test_a_response_has_output_usage_and_status(api: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    response = await api.responses.create(model="fake-model", input="Hi", instructions="Be brief", metadata={"a": "b"})
    assert (response.output_text, response.status, response.object) == ("Hello, world", "completed", "response")
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens) == (35, 12, 47)
    assert response.usage.input_tokens_details.cached_tokens == 2
    assert (response.id, response.metadata) == (engine.requests[0].rid, {"a": "b"})
    assert bytes(engine.requests[0].input_ids) == b"[system]Be brief[user]Hi[assistant]"


async def test_an_answer_that_met_its_limit_is_incomplete(api: openai.AsyncOpenAI) -> None:
    response = await api.responses.create(model="fake-model", input="Hi", max_output_tokens=3)
    assert (response.status, response.output_text) == ("incomplete", "Hel")
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].type == "message" and response.output[0].status == "incomplete"


async def test_a_stream_adds_items_and_parts_before_it_fills_them(client: Client) -> None:
    found = await events(client, max_output_tokens=2)
    assert [event["type"].removeprefix("response.") for event in found] == [
        "created", "in_progress", "output_item.added", "content_part.added",
        "output_text.delta", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done", "incomplete",
    ]  # fmt: skip
    assert found[2]["item"]["content"] == []
    assert found[6]["text"] == "He"
    assert found[-1]["response"]["output"] == [found[8]["item"]]
    assert len({event["item_id"] for event in found[3:8]}) == 1


async def test_the_official_stream_accumulates_to_the_whole_response(api: openai.AsyncOpenAI) -> None:
    async with api.responses.stream(model="fake-model", input="Hi") as stream:
        deltas = [event.delta async for event in stream if event.type == "response.output_text.delta"]
        final = await stream.get_final_response()
    assert "".join(deltas) == final.output_text == "Hello, world"
    assert final.status == "completed"
    kept = await api.responses.retrieve(final.id)
    assert (kept.output_text, kept.usage, kept.created_at) == (final.output_text, final.usage, final.created_at)


async def test_a_failure_ends_a_stream_as_a_failed_response(client: Client, engine: FakeEngine) -> None:
    engine.failure = FinishReason("abort", message="out of memory", status_code=500)
    found = await events(client)
    assert [event["type"] for event in found] == ["response.created", "response.in_progress", "response.failed"]
    assert found[-1]["response"]["error"] == {"code": "server_error", "message": "out of memory"}


async def test_a_disconnect_aborts_the_response() -> None:
    engine = FakeEngine(is_manual=True)
    async with serving(engine) as client:
        response = await client.post("/v1/responses", json={"input": "Hi", "stream": True})
        engine.emit(engine.states[0], "H")
        await response.content.readline()
        response.close()
        await engine.until(lambda: engine.aborted == [engine.requests[0].rid])


# ---- reasoning and tools ----


@pytest.mark.parametrize("is_stream", [False, True])
async def test_reasoning_text_and_a_call_are_items_of_their_own(is_stream: bool) -> None:
    async with serving(FakeEngine(THOUGHT_AND_CALL, context_length=1024), **PARSERS) as client, official(client) as api:
        if is_stream:
            async with api.responses.stream(model="fake-model", input="Hi", tools=[TOOL]) as stream:
                kinds = [event.type async for event in stream]
                response: Any = await stream.get_final_response()
            assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 3
            assert "response.reasoning_text.done" in kinds
            assert "response.function_call_arguments.done" in kinds
        else:
            response = await api.responses.create(model="fake-model", input="Hi", tools=[TOOL])
    reasoning, message, call = response.output
    assert reasoning.content[0].text == "Where?"
    assert response.usage.output_tokens_details.reasoning_tokens == len("<think>Where?</think>")
    assert message.content[0].text == "Let me look."
    assert (call.name, json.loads(call.arguments), call.status) == ("weather", {"city": "Oslo"}, "completed")


async def test_a_calls_result_continues_the_conversation() -> None:
    engine = FakeEngine(THOUGHT_AND_CALL, context_length=1024)
    async with serving(engine, **PARSERS) as client, official(client) as api:
        first = await api.responses.create(model="fake-model", input="Hi", tools=[TOOL])
        call = first.output[-1]
        assert call.type == "function_call"
        result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
        await api.responses.create(model="fake-model", input=[result], previous_response_id=first.id, tools=[TOOL])
    prompt = bytes(engine.requests[1].input_ids).decode()
    assert prompt == "[weather][user]Hi[assistant]Let me look.[weather][tool]rain[assistant]"


# ---- what is kept ----


async def test_a_stored_response_is_continued_without_its_instructions(
    api: openai.AsyncOpenAI, engine: FakeEngine
) -> None:
    first = await api.responses.create(model="fake-model", input="Hi", instructions="Be brief")
    second = await api.responses.create(model="fake-model", input="And?", previous_response_id=first.id)
    assert bytes(engine.requests[1].input_ids) == b"[user]Hi[assistant]Hello, world[user]And?[assistant]"
    assert second.previous_response_id == first.id


async def test_a_reference_stands_for_an_item_of_a_stored_response(client: Client, engine: FakeEngine) -> None:
    first = await (await client.post("/v1/responses", json={"input": "Who?", "instructions": "Be brief"})).json()
    listed = await (await client.get(f"/v1/responses/{first['id']}/input_items")).json()
    references = [{"type": "item_reference", "id": listed["data"][0]["id"]}, {"id": first["output"][0]["id"]}]
    again = {"input": [*references, {"role": "user", "content": "And?"}]}
    second = await client.post("/v1/responses", json=again)
    assert second.status == 200, await second.text()
    said = first["output"][0]["content"][0]["text"]
    assert f"[user]Who?[assistant]{said}[user]And?" in bytes(engine.requests[-1].input_ids).decode()
    rid = (await second.json())["id"]
    listed = await (await client.get(f"/v1/responses/{rid}/input_items?order=asc")).json()
    assert [item["type"] for item in listed["data"]] == ["message"] * 3
    twice = await client.post("/v1/responses", json={"input": [references[0], references[0]]})
    assert (twice.status, (await twice.json())["error"]["param"]) == (400, "input[1].id")
    await client.delete(f"/v1/responses/{first['id']}")
    for item_id, status in ((first["output"][0]["id"], 404), ("msg_x", 404), ("", 404), (5, 400)):
        response = await client.post("/v1/responses", json={"input": [{"type": "item_reference", "id": item_id}]})
        error = (await response.json())["error"]
        assert (response.status, error["param"]) == (status, "input[0].id"), error


async def test_a_deleted_response_and_one_not_stored_are_gone(api: openai.AsyncOpenAI) -> None:
    kept = await api.responses.create(model="fake-model", input="Hi")
    await api.responses.delete(kept.id)
    unkept = await api.responses.create(model="fake-model", input="Hi", store=False)
    for response in (kept, unkept):
        with pytest.raises(openai.NotFoundError):
            await api.responses.retrieve(response.id)
        with pytest.raises(openai.BadRequestError, match="previous_response_id"):
            await api.responses.create(model="fake-model", input="Hi", previous_response_id=response.id)


def test_the_store_forgets_what_was_used_least_recently() -> None:
    store = ResponseStore(max_count=2, max_bytes=1000)
    for name in "ab":
        store.put("", {"id": name}, [])
    assert store.get("", "a") is not None
    store.put("", {"id": "c"}, [])
    assert [name for name in "abc" if store.get("", name)] == ["a", "c"]


async def test_the_tokens_of_a_prompt_are_counted_as_the_response_counts_them(client: Client) -> None:
    async with official(client) as api:
        first = await api.responses.create(model="fake-model", input="Hi")
        asked: dict[str, Any] = {
            "model": "fake-model", "input": "And?", "instructions": "Be brief.", "previous_response_id": first.id,
            "tools": [TOOL],
        }  # fmt: skip
        counted = await api.responses.input_tokens.count(**asked)
        response = await api.responses.create(**asked)
    assert response.usage is not None
    assert counted.input_tokens == response.usage.input_tokens > 20


def test_the_store_is_bounded_in_bytes() -> None:
    store = ResponseStore(max_count=100, max_bytes=1000)
    for name in "abcde":
        store.put("", {"id": name, "text": "x" * 300}, [])
    assert 0 < store.num_bytes <= 1000
    assert store.get("", "a") is None
    store.put("", {"id": "f", "text": "x" * 2000}, [])
    assert store.num_bytes == 0


def test_the_events_that_a_response_keeps_count_as_its_own_and_go_with_it() -> None:
    store = ResponseStore(max_count=100, max_bytes=1000)
    for name in "ab":
        store.put("", {"id": name}, [])
    before = store.num_bytes
    store.keep_events("b", [b"x" * 100, b"y"])
    store.keep_events("gone", [b"x" * 100])
    assert store.num_bytes == before + 101
    assert (store.events("a"), store.events("b"), store.events("gone")) == (None, [b"x" * 100, b"y"], None)
    store.keep_events("a", [b"x" * 1000])
    assert store.owner("a") is None and store.events("b") is not None and store.num_bytes <= 1000
    store.remove("b")
    assert (store.num_bytes, store.events("b")) == (0, None)


@pytest.mark.parametrize("limits", [{"max_count": 4}, {"max_bytes": 4 * 350}])
def test_who_stores_much_pushes_out_nobody_elses_responses(limits: dict[str, int]) -> None:
    store = ResponseStore(**limits)
    for owner, name in (("ann", "a"), ("bob", "b"), *(("eve", f"e{i}") for i in range(50))):
        store.put(owner, {"id": name, "text": "x" * 300}, [])
    kept = [name for name in ("a", "b", "e47", "e48", "e49") if store.owner(name)]
    assert kept == ["a", "b", "e48", "e49"]
    for name in kept:
        store.remove(name)
    assert store.num_bytes == 0


async def test_with_a_key_for_each_client_nobody_reads_anothers_response(tmp_path: Any) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text("ann: a-key\nbob: b-key\n")
    async with (
        serving(FakeEngine(), api_key_file=str(keys)) as client,
        official(client, "a-key") as ann,
        official(client, "b-key") as bob,
    ):
        response = await ann.responses.create(model="fake-model", input="Hi")
        assert (await ann.responses.retrieve(response.id)).id == response.id
        with pytest.raises(openai.NotFoundError):
            await bob.responses.retrieve(response.id)
        reference: Any = {"type": "item_reference", "id": response.output[0].id}
        await ann.responses.create(model="fake-model", input=[reference])
        with pytest.raises(openai.NotFoundError):
            await bob.responses.create(model="fake-model", input=[reference])
        with pytest.raises(openai.NotFoundError):
            await bob.responses.delete(response.id)


# ---- in the background ----


async def test_a_background_response_is_fetched_when_it_is_done() -> None:
    engine = FakeEngine(is_manual=True)
    async with serving(engine) as client, official(client) as api:
        response = await api.responses.create(model="fake-model", input="Hi", background=True)
        assert (response.status, response.output) == ("in_progress", [])  # the fake schedules at once
        engine.emit(engine.states[0], "Hello")
        engine.finish(engine.states[0], FinishReason("stop"))
        done = await api.responses.retrieve(response.id)
        while done.status == "in_progress":
            done = await api.responses.retrieve(response.id)
        assert (done.status, done.output_text, done.background) == ("completed", "Hello", True)


async def test_a_background_stream_goes_on_without_its_client_and_is_taken_up_at_any_event() -> None:
    engine = FakeEngine(is_manual=True)
    async with serving(engine) as client, official(client) as api:
        stream: Any = await api.responses.create(model="fake-model", input="Hi", background=True, stream=True)
        created: Any = await anext(stream)
        response_id = created.response.id
        assert (created.type, created.response.background) == ("response.created", True)
        engine.emit(engine.states[0], "Hel")
        async for event in stream:
            if event.type == "response.output_text.delta":
                break
        await stream.close()
        running = await api.responses.retrieve(response_id)
        assert (running.status, running.output) == ("in_progress", [])
        late: Any = await api.responses.retrieve(response_id, stream=True, starting_after=event.sequence_number)
        engine.emit(engine.states[0], "lo")
        first: Any = await anext(late)
        assert (first.sequence_number, first.delta) == (event.sequence_number + 1, "lo")
        engine.finish(engine.states[0], FinishReason("stop"))
        rest: list[Any] = [first] + [event async for event in late]
        whole: Any = await api.responses.retrieve(response_id, stream=True)
        everything = [event async for event in whole]
        assert engine.aborted == []
        assert [event.sequence_number for event in everything] == list(range(len(everything)))
        assert rest == everything[event.sequence_number + 1 :]
        assert rest[-1].response.output_text == "Hello"
        assert (await api.responses.retrieve(response_id)).output_text == "Hello"
        none: Any = await api.responses.retrieve(response_id, stream=True, starting_after=len(everything))
        assert [event async for event in none] == []
        await api.responses.delete(response_id)
        with pytest.raises(openai.NotFoundError):
            await api.responses.retrieve(response_id, stream=True)


async def test_a_background_stream_that_is_cancelled_or_fails_ends_with_an_event_of_it() -> None:
    for status_code, kind, status in ((499, "response.incomplete", "cancelled"), (500, "response.failed", "failed")):
        engine = FakeEngine(is_manual=True)
        async with serving(engine) as client, official(client) as api:
            stream: Any = await api.responses.create(model="fake-model", input="Hi", background=True, stream=True)
            engine.finish(engine.states[0], FinishReason("abort", message="x", status_code=status_code))
            *_, last = [event async for event in stream]
            assert (last.type, last.response.status) == (kind, status)
            assert (await api.responses.retrieve(last.response.id)).status == status


async def test_a_server_that_ends_ends_the_streams_of_background_responses() -> None:
    engine = FakeEngine(is_manual=True)
    async with serving(engine) as client, official(client) as api:
        stream: Any = await api.responses.create(model="fake-model", input="Hi", background=True, stream=True)
        await anext(stream)
    assert engine.aborted == [engine.states[0].rid]


async def test_only_streams_in_the_background_can_be_streamed_again(api: openai.AsyncOpenAI) -> None:
    for fields in ({}, {"background": True}, {"stream": True}):
        made: Any = await api.responses.create(model="fake-model", input="Hi", **fields)  # type: ignore[call-overload]
        response_id = (await anext(made)).response.id if "stream" in fields else made.id
        if "stream" in fields:
            _ = [event async for event in made]
        with pytest.raises(openai.BadRequestError, match="stream"):
            await api.responses.retrieve(response_id, stream=True)
    again: Any = await api.responses.create(model="fake-model", input="Hi", background=True, stream=True)
    (*_, last) = [event async for event in again]
    with pytest.raises(openai.BadRequestError, match="starting_after"):
        await api.responses.retrieve(last.response.id, stream=True, starting_after=-1)


async def test_whether_a_stored_response_is_streamed_is_a_boolean_in_any_case(client: Client) -> None:
    made = await client.post("/v1/responses", json={"input": "Hi", "background": True, "stream": True})
    await made.read()
    path = f"/v1/responses/{json.loads((await made.text()).split('data: ')[1].split(chr(10))[0])['response']['id']}"
    for stream, kind in (("True", "text/event-stream"), ("False", "application/json")):
        answer = await client.get(path, params={"stream": stream})
        assert (answer.status, answer.content_type) == (200, kind)
    for stream in ("0", "", "yes"):
        answer = await client.get(path, params={"stream": stream})
        assert (answer.status, (await answer.json())["error"]["param"]) == (400, "stream")


async def test_a_cancelled_background_response_keeps_what_it_had_said() -> None:
    engine = FakeEngine(is_manual=True)
    async with serving(engine) as client, official(client) as api:
        response = await api.responses.create(model="fake-model", input="Hi", background=True)
        engine.emit(engine.states[0], "Hel")
        cancelled = await api.responses.cancel(response.id)
        assert (cancelled.status, cancelled.output_text) == ("cancelled", "Hel")
        assert (await api.responses.cancel(response.id)).status == "cancelled"
        assert engine.aborted == [response.id]


async def test_a_background_response_that_failed_says_so() -> None:
    engine = FakeEngine(is_manual=True)
    async with serving(engine) as client, official(client) as api:
        response = await api.responses.create(model="fake-model", input="Hi", background=True)
        engine.finish(engine.states[0], FinishReason("abort", message="out of memory", status_code=500))
        failed = await api.responses.cancel(response.id)
        assert failed.error is not None
        assert (failed.status, failed.error.message) == ("failed", "out of memory")


async def test_a_background_response_that_the_queue_refuses_is_refused_at_once() -> None:
    async with serving(FakeEngine(max_queued=0)) as client, official(client) as api:
        with pytest.raises(openai.RateLimitError):
            await api.responses.create(model="fake-model", input="Hi", background=True)


async def test_deleting_a_background_response_aborts_it() -> None:
    engine = FakeEngine(is_manual=True)
    async with serving(engine) as client, official(client) as api:
        response = await api.responses.create(model="fake-model", input="Hi", background=True)
        await api.responses.delete(response.id)
        assert engine.aborted == [response.id]
        with pytest.raises(openai.NotFoundError):
            await api.responses.retrieve(response.id)


async def test_a_server_that_ends_takes_its_background_responses_along() -> None:
    engine = FakeEngine(is_manual=True)
    async with serving(engine) as client, official(client) as api:
        response = await api.responses.create(model="fake-model", input="Hi", background=True)
    assert engine.aborted == [response.id]


async def test_only_background_responses_can_be_cancelled(api: openai.AsyncOpenAI) -> None:
    response = await api.responses.create(model="fake-model", input="Hi")
    with pytest.raises(openai.BadRequestError, match="background"):
        await api.responses.cancel(response.id)


# ---- translation ----


def translated(**body: Any) -> dict[str, Any]:
    left_out = LeftOut()
    given = convert({"input": "Hi", **body}, ResponsesRequest)
    return chat_body(given, read_input(given.input, left_out), Tools(given.tools, left_out), left_out)


def test_the_items_of_one_turn_make_one_message() -> None:
    items: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look"}]},
        {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "b", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "1"},
        {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "2"}]},
        {"role": "assistant", "content": "Three"},
        {"role": "assistant", "content": "Four"},
    ]
    calls = [{"id": name, "type": "function", "function": {"name": "f", "arguments": "{}"}} for name in "ab"]
    assert read_input(items, LeftOut()) == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "I look", "reasoning_content": "Hm", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "a", "content": "1"},
        {"role": "tool", "tool_call_id": "b", "content": "2"},
        {"role": "assistant", "content": "Three"},
        {"role": "assistant", "content": "Four"},
    ]


FLAT = {"type": "function", "name": "f", "parameters": {"type": "object"}}


def test_items_of_the_input_add_tools_and_change_the_configuration() -> None:
    items: list[dict[str, Any]] = [
        {"role": "user", "content": "Hi"},
        {"type": "additional_tools", "role": "developer", "tools": [{**FLAT, "name": "g"}, {**FLAT, "strict": True}]},
        {"type": "configuration_update", "reasoning": {"effort": "low"}},
        {"type": "configuration_update", "reasoning": {"effort": "high"}, "text": {"format": {"type": "json_object"}}},
    ]
    body, left_out = (
        convert({"input": items, "tools": [FLAT], "reasoning": {"effort": "none"}}, ResponsesRequest),
        LeftOut(),
    )
    configure(body, items)
    chat = chat_body(body, read_input(items, left_out), Tools(body.tools, left_out, items), left_out)
    assert chat["messages"] == [{"role": "user", "content": "Hi"}]
    assert [(tool["function"]["name"], tool["function"].get("strict")) for tool in chat["tools"]] == [
        ("f", True), ("g", None),
    ]  # fmt: skip
    assert (chat["reasoning_effort"], chat["response_format"]["type"]) == ("high", "json_object")
    assert not left_out.parts


@pytest.mark.parametrize(
    ("item", "field"),
    [
        ({"type": "additional_tools", "tools": [FLAT, {"type": "function"}]}, "input[0].tools[1].name"),
        ({"type": "additional_tools", "tools": [{**FLAT, "name": "a b"}]}, "input[0].tools[0].name"),
        ({"type": "additional_tools", "tools": 7}, "input[0].tools"),
        ({"type": "additional_tools"}, "input[0].tools"),
        ({"type": "configuration_update", "reasoning": {"effort": "huge"}}, "input[0].reasoning.effort"),
        ({"type": "configuration_update", "text": 7}, "input[0].text"),
        ({"type": "compaction_trigger"}, "input[0]"),
    ],
)
async def test_an_item_that_is_wrong_is_named(client: Client, item: dict[str, Any], field: str) -> None:
    response = await client.post("/v1/responses", json={"input": [item, {"role": "user", "content": "Hi"}]})
    assert response.status == 400
    assert field in (await response.json())["error"]["message"]


def test_formats_tools_and_effort_have_their_counterparts() -> None:
    schema = {"type": "object"}
    body = {
        "text": {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}},
        "tools": [TOOL],
        "tool_choice": {"type": "function", "name": "weather"},
        "reasoning": {"effort": "low"},
        "max_output_tokens": 5,
    }
    chat = translated(**body)
    assert chat["response_format"]["json_schema"] == {"name": "x", "schema": schema, "strict": True}
    assert chat["tools"] == [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    assert chat["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
    assert (chat["reasoning_effort"], chat["max_completion_tokens"]) == ("low", 5)


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("input", {"input": None}),
        ("input[0].type", {"input": [{"type": "hologram", "id": "x"}]}),
        ("input[0].content[0].type", {"input": [{"role": "user", "content": [{"type": "input_hologram"}]}]}),
        ("input[0].call_id", {"input": [{"type": "function_call_output", "output": "x"}]}),
        ("input[0].arguments", {"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": 5}]}),
        ("tools[0].parameters", {"tools": [{"type": "function", "name": "f", "parameters": 1}]}),
        ("tools[0].type", {"tools": [{"name": "f"}]}),
        ("tool_choice", {"tool_choice": "some"}),
        ("tool_choice.type", {"tool_choice": {"type": "web_search"}}),
        ("truncation", {"truncation": "some"}),
        ("conversation", {"conversation": "conv_1"}),
        ("prompt", {"prompt": {"id": "x"}}),
        ("continue_final_message", {"continue_final_message": True}),
        ("input_ids", {"input_ids": [1]}),
        ("max_thinking_tokens", {"max_thinking_tokens": -1}),
        ("text.verbosity", {"text": {"verbosity": "huge"}}),
        ("n", {"n": 2}),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(field: str, body: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as error:
        translated(**body)
    assert error.value.field == field


@pytest.mark.parametrize(
    ("message", "body"),
    [
        ("input must be a string or a list of items, got 7", {"input": 7}),
        ("input[1].role must be 'assistant' or 'developer' or 'system' or 'user', got None",
         {"input": [{"role": "user", "content": "a"}, {"content": "b"}]}),
        ("input[0].content must be a string or a list of parts, got None", {"input": [{"role": "user"}]}),
        ("input[0].content[1].text must be a string, got None",
         {"input": [{"role": "user", "content": [{"type": "input_image"}, {"type": "input_text"}]}]}),
        ("input[0].name must be a string, got None", {"input": [{"type": "function_call", "call_id": "a"}]}),
        ("input[0].call_id must be a string, got None", {"input": [{"type": "shell_call", "action": {}}]}),
        ("tools[0].type must be a kind of tool, got ''", {"tools": [{"type": ""}]}),
        ("tools[0].tools[1].name must be a string, got None",
         {"tools": [{"type": "namespace", "tools": [{"type": "web_search"}, {"type": "custom"}]}]}),
        ("tools[0].format.definition must be a string, got None",
         {"tools": [{"type": "custom", "name": "f", "format": {"type": "grammar"}}]}),
        ("metadata must be an object of at most 16 strings, got {'a': 1}", {"metadata": {"a": 1}}),
        ("max_output_tokens must be an integer between 1 and 9007199254740992, got 0", {"max_output_tokens": 0}),
        ("input has 20000 entries, the limit is 16384", {"input": [{"role": "user", "content": "a"}] * 20000}),
    ],
)  # fmt: skip
def test_an_error_says_what_a_value_must_be_and_what_it_is(message: str, body: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as error:
        translated(**body)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("is_stream", [False, True])
async def test_integers_beyond_64_bits_are_kept_and_repeated(client: Client, is_stream: bool) -> None:
    """orjson, which writes the answers, would refuse them."""
    big: Any = {"n": 10**30}
    body = {
        "input": [{"role": "user", "content": "Hi", **big}, {"type": "shell_call", "call_id": "a", "action": big}],
        "tools": [{"type": "local_shell", **big}],
        "reasoning": big,
        "text": big,
        "tool_choice": {"type": "local_shell", **big},
    }
    if is_stream:
        response = (await events(client, **body))[-1]["response"]
    else:
        response = await (await client.post("/v1/responses", json=body)).json()
    kept = await (await client.get(f"/v1/responses/{response['id']}")).json()
    assert response["tools"][0]["n"] == 10**30 == pytest.approx(kept["text"]["n"])
    [call, said] = (await (await client.get(f"/v1/responses/{response['id']}/input_items")).json())["data"]
    assert call["action"]["n"] == said["n"] == pytest.approx(10**30)


async def test_a_wrong_field_inside_has_the_clients_name(client: Client) -> None:
    for body, field in (
        ({"metadata": {"a": 1}}, "metadata"),
        ({"background": True, "store": False}, "background"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": 1}}}, "text.format.schema"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"previous_response_id": "resp_x"}, "previous_response_id"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": [1]}]}, "input[0].arguments"),
    ):
        response = await client.post("/v1/responses", json={"input": "Hi", **body})
        assert (response.status, (await response.json())["error"]["param"]) == (400, field)
