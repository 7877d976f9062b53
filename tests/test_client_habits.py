"""Values and shapes that clients of SGLang, vLLM and OpenAI send and read without a thought."""

import json
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp.test_utils import TestClient, TestServer
from hypothesis import given
from hypothesis import strategies as st

from engine.request import Request, SamplingParams
from engine.state import RequestState
from engine.text.stops import StopScanner
from server.app import build_app
from server.config import ServerConfig
from server.reading.mending import mended
from tests.client import Client, events_of, post
from tests.fake_engine import FakeEngine, serving
from tests.test_engine import running_engine

USER = [{"role": "user", "content": "Hi"}]


async def events(client: Client, path: str, **body: Any) -> list[Any]:
    response = await client.post(path, json={**body, "stream": True})
    assert response.status == 200, await response.text()
    return [orjson.loads(event) for event in events_of(await response.read()) if event != "[DONE]"]


# ---- JSON that is nearly right ----


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages", "/api/chat"])
async def test_a_text_cut_within_an_emoji_and_a_byte_order_mark_are_read(
    client: Client, engine: FakeEngine, path: str
) -> None:
    text = r'"the first half \ud83d of \\ud83d and a whole \ud83d\ude00"'
    given = f'"max_tokens": 1, "messages": [{{"role": "user", "content": {text}}}]'
    if path == "/v1/responses":
        given = f'"max_output_tokens": 1, "input": {text}'
    body = f'{{"model": "fake-model", {given}}}'
    response = await client.post(
        path, data=b"\xef\xbb\xbf" + body.encode(), headers={"Content-Type": "application/json"}
    )
    assert response.status == 200, await response.text()
    assert "half \ufffd of \\ud83d and a whole \U0001f600" in bytes(engine.requests[0].input_ids).decode()


@given(st.text(st.sampled_from("\\u\ud83d\ude00\udc00\udbff\U0001f600d8\n"), max_size=12), st.booleans())
def test_every_half_of_a_pair_becomes_one_replacement_and_nothing_else_changes(text: str, has_mark: bool) -> None:
    written = json.dumps([text]).encode()
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    better = mended(b"\xef\xbb\xbf" + written if has_mark else written)
    assert (better is None) == ("\ufffd" not in whole and not has_mark)
    assert orjson.loads(better or written) == [whole]


async def test_a_body_that_is_not_utf_8_is_a_400_that_says_where(client: Client) -> None:
    headers = {"Content-Type": "application/json"}
    response = await client.post("/v1/chat/completions", data='{"model": "é"}'.encode("latin-1"), headers=headers)
    assert response.status == 400
    assert "it is not UTF-8, byte 11 is 0xe9" in await response.text()


# ---- values that switch something off ----

SAMPLED: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": USER}),
    ("/v1/completions", {"prompt": "Hi"}),
    ("/v1/messages", {"messages": USER, "max_tokens": 5}),
]


@pytest.mark.parametrize(("path", "body"), SAMPLED)
async def test_top_p_0_and_top_k_0_are_accepted(client: Client, engine: FakeEngine, path: str, body: Any) -> None:
    await post(client, path, **body, top_p=0, top_k=0, temperature=1)
    assert engine.requests[0].sampling_params.is_greedy


async def test_top_p_0_and_top_k_0_are_accepted_where_they_have_a_place_of_their_own(
    client: Client, engine: FakeEngine
) -> None:
    fields = {"top_p": 0, "top_k": 0}
    await post(client, "/generate", text="Hi", sampling_params=fields)
    await post(client, "/v1/responses", input="Hi", top_p=0)
    await post(client, "/api/chat", messages=USER, options=fields, stream=False)
    assert [request.sampling_params.is_greedy for request in engine.requests] == [True] * 3


NOT_SUPPORTED: list[tuple[str, dict[str, Any], list[str]]] = [
    ("/v1/chat/completions", {"messages": USER}, ["functions", "use_beam_search", "lora_path", "bad_words", "echo"]),
    ("/v1/completions", {"prompt": "Hi"}, ["functions", "use_beam_search", "lora_path", "session_params"]),
    ("/generate", {"text": "Hi"}, ["audio_data", "lora_path", "custom_logit_processor"]),
    ("/api/chat", {"messages": USER, "stream": False}, ["images", "context", "suffix", "template"]),
    ("/api/generate", {"prompt": "Hi", "stream": False}, ["suffix", "tools"]),
    ("/v1/messages", {"messages": USER, "max_tokens": 5}, ["n"]),
    ("/v1/responses", {"input": "Hi"}, ["conversation", "prompt"]),
]


@pytest.mark.parametrize(("path", "body", "fields"), NOT_SUPPORTED)
async def test_what_is_not_supported_may_be_empty_or_false(
    client: Client, path: str, body: Any, fields: list[str]
) -> None:
    nothing: tuple[Any, ...] = (None, False, 0, "", [], {})
    for empty in nothing:
        await post(client, path, **body, **dict.fromkeys(fields, empty))
    for field in fields:
        response = await client.post(path, json={**body, field: ["x"]})
        assert response.status == 400 and field in await response.text()


async def test_fields_of_sglang_and_vllm_mean_the_same_on_every_api(client: Client, engine: FakeEngine) -> None:
    fields: dict[str, Any] = {
        "top_k": 5, "min_p": 0.1, "seed": 3, "min_tokens": 2, "repetition_penalty": 1.1, "presence_penalty": 0.5,
        "logit_bias": {"5": 1}, "stop_token_ids": [7], "stop_regex": "x", "ignore_eos": True,
        "structured_outputs": {"regex": "[0-9]{3}"},
    }  # fmt: skip
    await post(client, "/v1/chat/completions", messages=USER, max_tokens=5, **fields)
    await post(client, "/v1/messages", messages=USER, max_tokens=5, **fields)
    await post(client, "/v1/responses", input="Hi", max_output_tokens=5, **fields)
    chat, *others = [request.sampling_params for request in engine.requests]
    assert others == [chat, chat] and (chat.top_k, chat.regex) == (5, "[0-9]{3}")


async def test_fields_of_chats_are_not_ignored_by_apis_that_spell_them_otherwise(client: Client) -> None:
    chats = {"response_format": {"type": "json_object"}, "reasoning_effort": "low", "max_completion_tokens": 4}
    for path, body, others in (
        ("/v1/messages", {"messages": USER, "max_tokens": 5}, {"stop": ["a"]}),
        ("/v1/responses", {"input": "Hi"}, {"max_tokens": 4}),
    ):
        for field, value in {**chats, **others, "logprobs": True}.items():
            response = await client.post(path, json={**body, field: value})
            assert response.status == 400 and f"{field} is not supported" in await response.text()


async def test_of_several_prompts_the_one_that_does_not_fit_is_named(client: Client, engine: FakeEngine) -> None:
    long = "a" * (engine.context_length + 1)
    for path, body, field in (
        ("/v1/completions", {"prompt": ["a", long]}, "prompt[1]"),
        ("/v1/completions", {"prompt": [[1], [1] * len(long)]}, "prompt[1]"),
        ("/v1/embeddings", {"input": ["a", long]}, "input[1]"),
        ("/v1/embeddings", {"input": long}, "input"),
        ("/v1/score", {"query": "", "items": ["a", long], "label_token_ids": [1]}, "items[1]"),
        ("/generate", {"text": ["a", long]}, "text[1]"),
    ):
        response = await client.post(path, json=body)
        message = (await response.json())["error"]["message"]
        assert response.status == 400 and f"{field} has {len(long)} tokens" in message, message
        assert "left for the answer" not in message


async def test_images_of_a_message_may_be_none_at_all(client: Client) -> None:
    """LiteLLM sends an empty list with each message to Ollama's API."""
    await post(client, "/api/chat", messages=[{**USER[0], "images": []}], stream=False)
    response = await client.post("/api/chat", json={"messages": [{**USER[0], "images": ["aGk="]}]})
    assert response.status == 400 and "messages[0].images" in await response.text()


async def test_top_p_0_draws_the_likeliest_token_and_top_k_0_from_all(tiny_llama: Path) -> None:
    async def answer(name: str, **params: Any) -> list[int]:
        asked = SamplingParams(max_new_tokens=12, ignore_eos=True, sampling_seed=3, **params)
        state = RequestState(Request(name, [7, 11, 300], asked))
        return [token async for delta in engine.generate(state) for token in delta.token_ids]

    async with running_engine(tiny_llama) as engine:
        assert await answer("a", top_p=0.0) == await answer("b", temperature=0.0)
        assert await answer("c", top_k=0) == await answer("d") != await answer("e", temperature=0.0)


async def test_stop_tokens_outside_the_vocabulary_never_come(client: Client, tiny_llama: Path) -> None:
    for wanted in ({"stop_token_ids": [-1, 9999]}, {"stop_token_ids": [9999], "min_new_tokens": 2}):
        assert (await post(client, "/generate", text="a", sampling_params=wanted))["text"] == "Hello, world"
    async with running_engine(tiny_llama) as engine:
        params = SamplingParams(max_new_tokens=4, min_new_tokens=3, ignore_eos=True, stop_token_ids=[-7, 1 << 40])
        async for delta in engine.generate(RequestState(Request("a", [7, 11], params))):
            assert delta.finish_reason is None or delta.finish_reason.type == "length"


async def test_no_tokens_have_no_text(client: Client) -> None:
    assert await post(client, "/detokenize", tokens=[]) == {"text": "", "prompt": ""}
    assert (await post(client, "/detokenize", tokens=[[], [72]]))["text"] == ["", "H"]
    assert (await client.post("/detokenize", json={})).status == 400


# ---- stops that wait ----


@given(
    parts=st.lists(st.text("ab. ", max_size=4), max_size=12),
    stops=st.lists(st.text("ab. ", min_size=1, max_size=3), min_size=1, max_size=3),
    num_first=st.integers(0, 12),
)
def test_stops_that_end_in_the_first_texts_are_passed_over_and_nothing_is_lost(
    parts: list[str], stops: list[str], num_first: int
) -> None:
    scanner, released = StopScanner(stops, [], is_kept=True), ""
    for part in parts[:num_first]:
        released += scanner.pass_over(part)
    first, whole = "".join(parts[:num_first]), "".join(parts)
    for part in parts[num_first:]:
        if scanner.matched_stop is None:
            released += scanner.push(part)
    released += scanner.finish()
    ends = [i for i in range(len(first) + 1, len(whole) + 1) if any(whole[:i].endswith(stop) for stop in stops)]
    assert released == whole[: ends[0] if ends else len(whole)]


@pytest.mark.parametrize("kind", ["stop", "stop_regex"])
async def test_with_min_tokens_stop_texts_wait_too(tiny_llama: Path, kind: str) -> None:
    async with running_engine(tiny_llama) as engine:
        whole = SamplingParams(max_new_tokens=40, temperature=0.0, ignore_eos=True)
        async for delta in engine.generate(RequestState(Request("a", [7, 11, 300], whole))):
            tokens, text = delta.token_ids, delta.text
        stops: Any = [char for char in text if char.isascii() and char.isalpha()][:3]
        for min_new_tokens in (0, 10, 25):
            params = SamplingParams(
                max_new_tokens=40, min_new_tokens=min_new_tokens, temperature=0.0, no_stop_trim=True, ignore_eos=True,
                **{kind: stops},
            )  # fmt: skip
            state = RequestState(Request(f"b{min_new_tokens}", [7, 11, 300], params, stream=True))
            shown = ""
            async for delta in engine.generate(state):
                shown += delta.text
            assert len(state.output_ids) > min_new_tokens or len(state.output_ids) == 40
            read = engine.tokenizer.decode(tokens[: len(state.output_ids)])
            assert read.startswith(shown) and len(shown) > len(engine.tokenizer.decode(tokens[:min_new_tokens]))
            if not min_new_tokens:
                assert len(state.output_ids) < 40, "the stops are in the answer's beginning"


# ---- keys that are read without looking ----


async def test_the_number_of_log_probabilities_stands_beside_them(client: Client) -> None:
    body = {"text": "a", "return_logprob": True, "sampling_params": {"max_new_tokens": 3}}
    assert (await post(client, "/generate", **body))["meta_info"]["output_token_logprobs_length"] == 3
    async with serving(FakeEngine(), stream_output=True) as other:
        for one in (client, other):
            found = await events(one, "/generate", **body)
            assert found[-1]["meta_info"]["output_token_logprobs_length"] == 3
    meta = (await post(client, "/generate", text="a"))["meta_info"]
    assert "output_token_logprobs_length" not in meta


@pytest.mark.parametrize("more", [{}, {"stream_options": {"include_usage": True}}, {"echo": True}, {"max_tokens": 1}])
async def test_every_event_of_a_streamed_completion_has_the_log_probabilities_asked_for(
    tiny_llama: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    body: dict[str, Any] = {"prompt": "Hi", "max_tokens": 5, "logprobs": 1, "ignore_eos": True, "seed": 1, **more}
    config = ServerConfig(model_path=str(tiny_llama), file_storage_path=str(tmp_path))
    async with running_engine(tiny_llama) as engine, TestClient(TestServer(build_app(engine, config))) as client:
        choices = [choice for event in await events(client, "/v1/completions", **body) for choice in event["choices"]]
        whole = (await post(client, "/v1/completions", **body | {"stream_options": None}))["choices"][0]
    assert all(choice["logprobs"]["tokens"] for choice in choices)
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    tokens = [token for choice in choices for token in choice["logprobs"]["tokens"]]
    assert tokens == whole["logprobs"]["tokens"]


async def test_every_delta_of_a_chat_has_reasoning_content(client: Client) -> None:
    for more in ({}, {"logprobs": True}):
        found = await events(client, "/v1/chat/completions", messages=USER, max_tokens=3, **more)
        assert all("reasoning_content" in event["choices"][0]["delta"] for event in found)


# ---- scores ----


async def test_token_ids_are_scored_as_texts_are(client: Client, engine: FakeEngine) -> None:
    labels = {"label_token_ids": [65, 66], "apply_softmax": True}
    texts = await post(client, "/v1/score", query="Is it?", items=["yes", "no"], **labels)
    ids = {"query": list(b"Is it?"), "items": [list(b"yes"), list(b"no")]}
    assert (await post(client, "/v1/score", **ids, **labels))["scores"] == texts["scores"]
    await post(client, "/v1/score", **ids, **labels, item_first=True)
    prompts = [bytes(request.input_ids) for request in engine.requests]
    assert prompts == [b"Is it?yes", b"Is it?no"] * 2 + [b"yesIs it?", b"noIs it?"]
    assert texts["usage"] == {"prompt_tokens": 17, "completion_tokens": 0, "total_tokens": 17}
    wrongs: list[dict[str, Any]] = [
        {"query": [65], "items": ["yes"]},
        {"query": "Is", "items": [[1]]},
        {"query": [], "items": [[]]},
    ]
    for wrong in wrongs:
        assert (await client.post("/v1/score", json={**wrong, **labels})).status == 400


# ---- lines about requests ----


async def test_lines_about_requests_are_switched_on_and_off(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    def lines() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "server.apis.request_logging"]

    caplog.set_level("INFO", logger="server.apis.request_logging")
    await post(client, "/generate", text="a")
    assert lines() == []
    asked = {"log_requests": True, "log_requests_level": 3}
    assert await post(client, "/configure_logging", **asked) == asked
    await post(client, "/generate", text="secret")
    (line,) = lines()
    assert "secret" in line and "Hello, world" in line
    assert await post(client, "/configure_logging", log_requests=False) == {**asked, "log_requests": False}
    caplog.clear()
    await post(client, "/generate", text="a")
    assert lines() == []
    for wrong in ({"log_requests_level": 9}, {"dump_requests_folder": "/tmp"}):
        response = await client.post("/configure_logging", json=wrong)
        assert response.status == 400 and next(iter(wrong)) in await response.text()
