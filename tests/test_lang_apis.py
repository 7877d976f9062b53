"""Test other companies' APIs through their official packages: OpenAI's on our routes, the others' recorded."""

import base64
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from google.genai import types

import server.lang as sgl
from server.lang.backends.anthropic import Anthropic
from server.lang.backends.base import BaseBackend
from server.lang.backends.gemini import Gemini
from server.lang.backends.openai import OpenAI
from server.lang.expressions import Gen, Text
from server.lang.loop import LoopThread
from server.lang.speculation import match_pattern, take
from tests.lang_servers import listening, serving_engine, tiny_engine


@pytest.fixture(scope="module")
def url(tiny_llama: Path) -> Iterator[str]:
    with tiny_engine(tiny_llama) as engine, serving_engine(engine, served_model_name=["tiny"]) as url:
        yield f"{url}/v1"


@sgl.function
def conversation(s, question):
    s += sgl.system("Be brief.")
    s += sgl.user(question)
    s += sgl.assistant(sgl.gen("first", max_tokens=6))
    s += sgl.user("And then?")
    s += sgl.assistant(sgl.gen("second", max_tokens=6, stop="\n"))


def test_a_chat_answers_as_our_native_route_does(url):
    chat, native = OpenAI("tiny", base_url=url, api_key="none"), sgl.RuntimeEndpoint(url.removesuffix("/v1"))
    state = conversation.run("Who?", backend=chat, temperature=0)
    assert state.error() is None
    same = conversation.run("Who?", backend=native, temperature=0)
    assert (state["first"], state.messages()[:3]) == (same["first"], same.messages()[:3])
    assert state.get_meta_info("second")["prompt_tokens"] > 0 and chat.token_usage["completion_tokens"] > 0
    streamed = conversation.run("Who?", backend=chat, temperature=0, stream=True)
    assert "".join(streamed.text_iter("first")) == state["first"]
    batch = conversation.run_batch([("Who?",), ("Where?",)], backend=chat, temperature=0)
    assert batch[0]["first"] == state["first"]
    chat.shutdown()
    native.shutdown()


def test_litellms_providers_answer_as_the_api_itself_does(url, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else the import asks the network for prices
    pytest.importorskip("litellm")
    direct = OpenAI("tiny", base_url=url, api_key="none")
    backend = sgl.LiteLLM("openai/tiny", api_base=url, api_key="none")
    state, same = (conversation.run("Who?", backend=one, temperature=0) for one in (backend, direct))
    assert state.messages() == same.messages() and state.error() is None
    assert backend.token_usage == direct.token_usage
    streamed = conversation.run("Who?", backend=backend, temperature=0, stream=True)
    assert "".join(streamed.text_iter("second")) == same["second"]
    with pytest.raises(sgl.BackendError) as refused:
        conversation.run("Who?", backend=backend, temperature=-1)["first"]
    assert refused.value.status == 400
    backend.shutdown()
    direct.shutdown()


def test_a_completion_model_continues_text(url):
    backend = OpenAI("tiny", is_chat_model=False, base_url=url, api_key="none")

    @sgl.function
    def program(s):
        s += "Once upon" + sgl.gen("a", max_tokens=5) + " and" + sgl.gen("b", max_tokens=5, n=2)
        forks = s.fork(2)
        forks += lambda i: f" {i}" + sgl.gen("c", max_tokens=3)
        forks.join()

    state = program.run(backend=backend, temperature=0)
    assert state.text() == f"Once upon{state['a']} and{state['b'][0]}"
    assert len(state["c"]) == 2
    backend.shutdown()


def test_a_completion_model_selects_as_our_native_route_does(url):
    backend = OpenAI("tiny", is_chat_model=False, base_url=url, api_key="none")
    native = sgl.RuntimeEndpoint(url.removesuffix("/v1"))

    @sgl.function
    def pick(s, prompt, method):
        s += prompt + sgl.select("x", choices=["a lazy dog", "the rain", "Grüße"], choices_method=method)

    for method in (sgl.token_length_normalized, sgl.greedy_token_selection):
        batch = [{"prompt": prompt, "method": method} for prompt in ("in Spain ", "日本 th", "The quick")]
        for state, same in zip(
            pick.run_batch(batch, backend=backend), pick.run_batch(batch, backend=native), strict=True
        ):
            assert state["x"] == same["x"]
            scores, others = (one.get_meta_info("x")["normalized_prompt_logprobs"] for one in (state, same))
            assert scores == pytest.approx(others, abs=1e-4)
    with pytest.raises(NotImplementedError, match="token ids"):
        pick.run("a", sgl.unconditional_likelihood_normalized, backend=backend)["x"]
    backend.shutdown()
    native.shutdown()


def test_what_a_chat_api_cannot_do_is_an_error_at_the_variable(url):
    backend = OpenAI("tiny", base_url=url, api_key="none")

    @sgl.function
    def midway(s):
        s += sgl.user("hi") + sgl.assistant("Well, " + sgl.gen("x"))

    with pytest.raises(RuntimeError, match="gen must come first"):
        midway.run(backend=backend)["x"]

    @sgl.function
    def outside(s, before):
        s += before + sgl.user("hi") + "\n" + sgl.assistant(sgl.gen("x", max_tokens=2))
        s += "The end."

    assert isinstance(outside.run("\n", backend=backend)["x"], str)
    for before, named in (("Rhyme.", "Rhyme"), (sgl.image(PICTURE), "<image>")):
        with pytest.raises(RuntimeError, match=f"outside of them.*{named}"):
            outside.run(before, backend=backend)["x"]

    @sgl.function
    def joined(s):
        forks = s.fork(2)
        forks += sgl.user("hi")
        forks.join("concate_and_append")
        s += sgl.assistant(sgl.gen("x"))

    with pytest.raises(RuntimeError, match="outside of them"):
        joined.run(backend=backend)["x"]

    @sgl.function
    def pick(s):
        s += sgl.user("hi") + sgl.assistant(sgl.select("x", choices=["a", "b"]))

    with pytest.raises(NotImplementedError, match="cannot select"):
        pick.run(backend=backend)["x"]
    with pytest.raises(sgl.BackendError) as refused:
        conversation.run("Who?", backend=backend, temperature=-1)["first"]
    assert refused.value.status == 400
    backend.shutdown()


# ---- recorded APIs ----


@contextmanager
def recording(answers: Callable[[dict[str, Any]], Any], path: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the URL of a server that answers each POST to `path` with `answers(body)`, a JSON object or a status."""
    bodies: list[dict[str, Any]] = []

    async def answer(request: web.Request) -> web.Response:
        bodies.append(await request.json())
        value = answers(bodies[-1])
        if isinstance(value, int):
            return web.json_response({"error": {"message": "refused", "code": value}}, status=value)
        return web.json_response(value)

    app = web.Application()
    app.router.add_post(path, answer)
    loop = LoopThread("recorder")
    with listening(loop, app) as url:
        yield url, bodies
    loop.close()


def chat_answer(text: str) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    return {"id": "c", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


def completion_answer(text: str) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": "stop", "text": text, "logprobs": None}
    return {"id": "c", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]}


PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(20)


@sgl.function
def describe(s):
    s += sgl.system("You see.")
    s += sgl.user(sgl.image(PICTURE) + "What is this?")
    s += sgl.assistant(sgl.gen("answer", max_tokens=9, temperature=0.5, top_p=0.9, top_k=3, stop=["\n", "END"]))


def test_openai_is_sent_messages_with_images_and_only_what_was_asked_for():
    with recording(lambda body: chat_answer("a cat, 7 years old"), "/v1/chat/completions") as (url, bodies):
        backend = OpenAI("gpt-4o", base_url=f"{url}/v1", api_key="k")
        state = describe.run(backend=backend)
        assert state["answer"] == "a cat, 7 years old"
        [body] = bodies
        assert [message["role"] for message in body["messages"]] == ["system", "user"]
        image, text = body["messages"][1]["content"]
        assert image["image_url"]["url"] == "data:image/png;base64," + base64.b64encode(PICTURE).decode()
        assert text == {"type": "text", "text": "What is this?"}
        assert {k: v for k, v in body.items() if k != "messages"} == {
            "model": "gpt-4o", "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "stop": ["\n", "END"]
        }  # fmt: skip

        @sgl.function
        def typed(s):
            s += sgl.user("How old?") + sgl.assistant(sgl.gen("age", dtype=int))
            s += sgl.user("Who?") + sgl.assistant(sgl.gen("who", json_schema='{"type": "object"}', regex=None))
            s += sgl.user("Where?") + sgl.assistant(sgl.gen("where", regex="[a-z]+"))

        state = typed.run(backend=backend)
        assert state["age"] == "7" and state.error() is None
        assert bodies[-2]["response_format"]["json_schema"]["schema"] == {"type": "object"}
        assert bodies[-1]["regex"] == "[a-z]+"
        backend.shutdown()


def test_anthropic_is_sent_its_own_shapes():
    answer = {
        "id": "m", "type": "message", "role": "assistant", "model": "claude", "stop_reason": "end_turn",
        "content": [{"type": "text", "text": "a cat"}], "usage": {"input_tokens": 5, "output_tokens": 2},
    }  # fmt: skip
    with recording(lambda body: answer, "/v1/messages") as (url, bodies):
        backend = Anthropic("claude", base_url=url, api_key="k", max_retries=0)
        state = describe.run(backend=backend)
        assert (state["answer"], state.get_meta_info("answer")["output_tokens"]) == ("a cat", 2)
        [body] = bodies
        assert body["system"] == "You see." and body["stop_sequences"] == ["END"]
        assert (body["max_tokens"], body["temperature"], body["top_p"], body["top_k"]) == (9, 0.5, 0.9, 3)
        [message] = body["messages"]
        source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(PICTURE).decode()}
        assert message["content"] == [
            {"type": "image", "source": source}, {"type": "text", "text": "What is this?"}
        ]  # fmt: skip
        backend.shutdown()
    with recording(lambda body: 429, "/v1/messages") as (url, _):
        backend = Anthropic("claude", base_url=url, api_key="k", max_retries=0)
        with pytest.raises(sgl.BackendError) as refused:
            describe.run(backend=backend)["answer"]
        assert refused.value.status == 429
        backend.shutdown()


def test_gemini_is_sent_its_own_shapes():
    candidate = {"content": {"role": "model", "parts": [{"text": "a cat"}]}, "finishReason": "STOP"}
    with recording(lambda body: {"candidates": [candidate]}, "/{path:.*}") as (url, bodies):
        backend = Gemini("gemini-x", api_key="k", http_options=types.HttpOptions(base_url=url))
        assert describe.run(backend=backend)["answer"] == "a cat"
        [body] = bodies
        assert body["systemInstruction"]["parts"][0]["text"] == "You see."
        picture, text = body["contents"][0]["parts"]
        assert picture["inlineData"]["data"] == base64.b64encode(PICTURE).decode() and text["text"] == "What is this?"
        config = body["generationConfig"]
        assert (config["maxOutputTokens"], config["topK"], config["stopSequences"]) == (9, 3, ["\n", "END"])
        backend.shutdown()


# ---- API speculative execution ----


@sgl.function(num_api_spec_tokens=64)
def character(s):
    s += "Name:" + sgl.gen("name", stop="\n") + "\nAge:" + sgl.gen("age", stop="\n") + "\nJob:"
    s += sgl.gen("job", stop="\n")


@pytest.mark.parametrize("make", [OpenAI, Anthropic, Gemini])
def test_what_an_api_lacks_is_refused_and_not_left_out(make):
    backend = make("m", api_key="k")  # is never asked

    @sgl.function
    def program(s, asked):
        s += sgl.user("hi") + sgl.assistant(sgl.gen("x", **asked))

    lacking: list[dict[str, Any]] = [{"return_logprob": True}]
    if make is not OpenAI:
        lacking += [{"stop_regex": "a+"}, {"stop_token_ids": [7]}, {"min_p": 0.1}, {"regex": "a"}]
    for asked in lacking:
        with pytest.raises(NotImplementedError, match=f"has no {next(iter(asked))}"):
            program.run(asked, backend=backend)["x"]
    with pytest.raises(NotImplementedError, match=r"a stream of .* has no dtype"):
        list(program.run({"dtype": int}, backend=backend, stream=True).text_iter("x"))
    backend.shutdown()


def test_one_call_serves_several_gens_of_a_completion_model():
    text = " Ada\nAge: 36\nJob: mathematician\nHome: London"
    with recording(lambda body: completion_answer(text), "/v1/completions") as (url, bodies):
        backend = OpenAI("m", is_chat_model=False, base_url=f"{url}/v1", api_key="k")
        state = character.run(backend=backend)
        assert state.text() == "Name: Ada\nAge: 36\nJob: mathematician"
        assert [state[name] for name in ("name", "age", "job")] == [" Ada", " 36", " mathematician"]
        [body] = bodies
        assert body["max_tokens"] == 128 and "stop" not in body
        backend.shutdown()


def test_what_the_api_guessed_wrong_is_asked_again():
    texts = iter([" Ada\nBorn: 1815\n", " 36\nJob: poet\n"])
    with recording(lambda body: completion_answer(next(texts)), "/v1/completions") as (url, bodies):
        backend = OpenAI("m", is_chat_model=False, base_url=f"{url}/v1", api_key="k")
        assert character.run(backend=backend).text() == "Name: Ada\nAge: 36\nJob: poet"
        assert [body["prompt"] for body in bodies] == ["Name:", "Name: Ada\nAge:"]
        backend.shutdown()


@sgl.function(num_api_spec_tokens=64)
def chat_character(s):
    s += sgl.user("Describe a character.")
    s += sgl.assistant("Name:" + sgl.gen("name", stop="\n") + "\nAge:" + sgl.gen("age"))


def chat_backend(url: str) -> BaseBackend:
    return OpenAI("m", base_url=f"{url}/v1", api_key="k")


def test_one_call_writes_a_whole_chat_message():
    texts = iter(["I think", "Name: Ada\nAge: 36"])
    with recording(lambda body: chat_answer(next(texts)), "/v1/chat/completions") as (url, bodies):
        backend = chat_backend(url)
        state = chat_character.run(backend=backend)
        assert (state["name"], state["age"]) == (" Ada", " 36")
        assert state.messages()[1]["content"] == "Name: Ada\nAge: 36"
        assert len(bodies) == 2, "the first answer did not follow the program"
        with pytest.raises(ValueError, match="cannot stream"):
            chat_character.run(backend=backend, stream=True)
        backend.shutdown()


def test_an_api_that_never_follows_the_program_is_an_error():
    with recording(lambda body: chat_answer("no"), "/v1/chat/completions") as (url, bodies):
        backend = chat_backend(url)
        with pytest.raises(sgl.BackendError, match="3 answers did not follow"):
            chat_character.run(backend=backend)["age"]
        assert len(bodies) == 3
        backend.shutdown()


def test_speculated_text_is_taken_up_to_a_stop():
    assert take("abc\ndef", ["\n", "e"]) is not None
    taken = take("abc\ndef", ["e", "\n"])
    assert taken is not None and (taken.value, taken.rest) == ("abc", "\ndef")
    assert take("abc", ["\n"]) is None
    pattern: list[Any] = [(Text("a"), ()), (Gen("x"), ()), (Text("c"), ()), (Gen("y"), ("!",))]
    assert match_pattern("abcd!e", pattern) == ["b", "d"]
    assert match_pattern("bbcd!e", pattern) is None
