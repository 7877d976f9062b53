"""Test the real server, a process of its own, on the demo model, end to end as its users see it."""

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import openai
import pytest
import torch

from engine.checkpoint.folder import resolve_model
from engine.config import EngineConfig
from server.app import build_app
from server.config import ServerConfig
from tests.fake_engine import FakeEngine

ROOT = Path(__file__).parent.parent
KEY = "sesame"
OPEN_PATHS = ("/", "/docs", "/health", "/ping", "/dashboard")  # the pages are empty: what they show is not open
START_S, DRAIN_S = 240, 60  # the first start of all fetches the model and converts it
USER: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    port: int
    log: IO[bytes]

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def ask(
        self, method: str, path: str, body: bytes | dict[str, Any] | None = None, key: str = KEY
    ) -> tuple[int, bytes]:
        """Send a request and return (status, body) of the answer."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        with contextlib.closing(self.connect()) as connection:
            data = json.dumps(body).encode() if isinstance(body, dict) else body
            connection.request(method, path, data, headers)
            response = connection.getresponse()
            return response.status, response.read()

    def get(self, path: str) -> Any:
        status, body = self.ask("GET", path)
        assert status == 200, body
        return json.loads(body)

    def until_idle(self) -> None:
        """Wait for all requests to leave; then every page must be free or cached."""
        deadline = time.monotonic() + 120
        while (load := self.get("/get_load")[0])["num_reqs"] and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (load["num_reqs"], load["num_waiting_reqs"], load["num_tokens"]) == (0, 0, 0)
        stats = self.get("/server_info")["internal_states"][0]["scheduler"]
        assert (stats["num_running"], stats["num_waiting"], stats["num_held_tokens"]) == (0, 0, 0)
        assert stats["num_free_tokens"] + stats["num_cached_tokens"] == stats["num_total_tokens"]

    def end(self, number: signal.Signals) -> None:
        """Send a signal; the process must exit with 0 and leave no child behind."""
        self.process.send_signal(number)
        assert self.process.wait(DRAIN_S) == 0, self.text()
        with pytest.raises(ProcessLookupError):
            os.killpg(self.process.pid, 0)  # the group that it led has no members

    def text(self) -> str:
        self.log.seek(0)
        return self.log.read().decode(errors="replace")


@contextlib.contextmanager
def running_server(*flags: str) -> Iterator[Server]:
    """Run `python -m server` on the demo model, ready to answer. The block must not leave it in a bad state."""
    command = [sys.executable, "-m", "server", "--model-path", "demo", "--device", "cpu", "--port", "0", *flags]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment()
        )
        server = Server(process, 0, log)
        try:
            deadline = time.monotonic() + START_S
            while not (address := re.search(r"address\s+http://127\.0\.0\.1:(\d+)", server.text())):
                assert process.poll() is None and time.monotonic() < deadline, server.text()
                time.sleep(0.05)
            server.port = int(address[1])
            yield server
            if process.poll() is None:
                server.end(signal.SIGINT)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def environment() -> dict[str, str]:
    """Return this process's environment without the variables that conftest sets for itself."""
    return {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "HF_HUB_OFFLINE")}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server("--dtype", "float32", "--api-key", KEY) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.base_url, api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


# ---- the official client ----


def test_a_chat_knows_the_capital_of_france(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="demo", messages=USER, temperature=0, max_tokens=16)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.usage is not None and answer.usage.completion_tokens <= 16
    assert [model.id for model in client.models.list()] == ["demo"]


def test_a_streamed_chat_adds_up_to_the_whole_one_and_tells_its_usage(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "demo", "messages": USER, "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(**asked)
    *chunks, last = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert len(chunks) > 5
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.usage is not None and whole.usage is not None
    assert last.usage.model_dump() == whole.usage.model_dump()


def test_two_answers_differ_and_a_seed_repeats_them(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "demo", "messages": USER, "temperature": 1.5, "max_tokens": 12, "n": 2, "seed": 7}
    first, again = (client.chat.completions.create(**asked) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1]
    assert texts[0] != texts[1]
    assert [choice.message.content for choice in again.choices] == texts


def test_a_completion_ends_before_its_stop_and_not_without(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "demo", "prompt": "1, 2, 3, 4,", "temperature": 0, "max_tokens": 12}
    assert "7" in client.completions.create(**asked).choices[0].text
    choice = client.completions.create(**asked, stop=["7"]).choices[0]
    assert (choice.text, choice.finish_reason) == (" 5, 6, ", "stop")


def test_log_probabilities_are_those_of_the_greedy_tokens(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=USER, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
    )
    (choice,) = answer.choices
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content
    for entry in choice.logprobs.content:
        tops = [top.logprob for top in entry.top_logprobs]
        assert entry.token == entry.top_logprobs[0].token
        assert entry.logprob == tops[0] and tops == sorted(tops, reverse=True) and tops[0] <= 0
    completion = client.completions.create(model="demo", prompt="The sky is", max_tokens=2, logprobs=2, temperature=0)
    assert completion.choices[0].logprobs is not None
    assert len(completion.choices[0].logprobs.tokens or []) == 2


async def test_64_streams_of_which_half_are_cancelled_leave_nothing_behind(server: Server) -> None:
    async def read(client: openai.AsyncOpenAI, i: int) -> str | None:
        stream = await client.completions.create(
            model="demo", prompt=f"Story number {i}: once", max_tokens=12, stream=True, extra_body={"ignore_eos": True}
        )
        num_chunks, reason = 0, None
        async for chunk in stream:
            num_chunks += 1
            reason = chunk.choices[0].finish_reason
            if i % 2 and num_chunks == 3:
                await stream.close()
                return "cancelled"
        return reason

    async with openai.AsyncOpenAI(base_url=server.base_url, api_key=KEY, max_retries=0, timeout=120) as client:
        reasons = await asyncio.gather(*(read(client, i) for i in range(64)))
    assert reasons == ["length", "cancelled"] * 32
    await asyncio.to_thread(server.until_idle)


# ---- the model's answers ----

PROMPTS = [
    "The capital of France is", "Once upon a time", "def add(a, b):", "1, 1, 2, 3, 5, 8,", "SELECT name FROM",
    "Dear Sir or Madam,", "Knock knock.", "Grüße aus Köln,",
]  # fmt: skip
NUM_NEW_TOKENS = 12


async def test_greedy_text_equals_transformers_own(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=server.base_url, api_key=KEY, max_retries=0, timeout=120) as client:

        async def complete(prompt: str) -> str:
            answer = await client.completions.create(
                model="demo", prompt=prompt, max_tokens=NUM_NEW_TOKENS, temperature=0
            )
            return answer.choices[0].text

        ours = await asyncio.gather(*map(complete, PROMPTS))
    theirs = await asyncio.to_thread(transformers_texts)
    assert dict(zip(PROMPTS, ours, strict=True)) == dict(zip(PROMPTS, theirs, strict=True))


def transformers_texts() -> list[str]:
    """Return what transformers' generate makes of `PROMPTS`, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve_model(EngineConfig(model_path="demo", dtype="float32", quantization="none"))
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    output = model.generate(**inputs, max_new_tokens=NUM_NEW_TOKENS, do_sample=False)
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# ---- what clients do wrong ----

CHAT = {"messages": USER, "max_tokens": 1}
BAD: dict[str, tuple[str, str, bytes | dict[str, Any] | None, int]] = {
    "not JSON": ("POST", "/v1/chat/completions", b'{"messages": [', 400),
    "no object": ("POST", "/generate", b'["text"]', 400),
    "NaN": ("POST", "/v1/completions", b'{"prompt": "a", "temperature": NaN}', 400),
    "not UTF-8": ("POST", "/generate", b'{"text": "\xff"}', 400),
    "wrong type": ("POST", "/v1/completions", {"prompt": {"a": 1}}, 400),
    "wrong type of a parameter": ("POST", "/generate", {"text": "a", "sampling_params": {"top_p": "high"}}, 400),
    "unknown parameter": ("POST", "/generate", {"text": "a", "sampling_params": {"tempreature": 1}}, 400),
    "negative": ("POST", "/v1/completions", {"prompt": "a", "max_tokens": -1}, 400),
    "negative temperature": ("POST", "/generate", {"text": "a", "sampling_params": {"temperature": -0.1}}, 400),
    "negative token id": ("POST", "/generate", {"input_ids": [-1]}, 400),
    "huge": ("POST", "/v1/completions", {"prompt": "a", "max_tokens": 10**12}, 400),
    "huge n": ("POST", "/v1/chat/completions", {**CHAT, "n": 10**9}, 400),
    "huge token id": ("POST", "/generate", {"input_ids": [10**30]}, 400),
    "empty prompt": ("POST", "/v1/completions", {"prompt": ""}, 400),
    "no messages": ("POST", "/v1/chat/completions", {"messages": []}, 400),
    "no prompt": ("POST", "/generate", {}, 400),
    "prompt beyond the context": ("POST", "/generate", {"input_ids": [300] * 9000}, 400),
    "text beyond the context": ("POST", "/v1/completions", {"prompt": "one two " * 9000}, 400),
    "unknown model": ("POST", "/v1/chat/completions", {**CHAT, "model": "gpt-9"}, 404),
    "unknown role": ("POST", "/v1/chat/completions", {"messages": [{"role": "wizard", "content": "a"}]}, 400),
    "broken stop regex": ("POST", "/generate", {"text": "a", "sampling_params": {"stop_regex": "("}}, 400),
    "50 MB": ("POST", "/v1/completions", b'{"prompt": "' + b"a" * 50_000_000 + b'"}', 413),
    "wrong method": ("GET", "/v1/chat/completions", None, 405),
    "wrong method, native": ("DELETE", "/generate", None, 405),
    "unknown route": ("GET", "/v1/nothing", None, 404),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_the_apis_shape_and_the_next_request_is_served(server: Server, case: str) -> None:
    method, path, body, expected = BAD[case]
    status, answer = server.ask(method, path, body)
    assert status == expected, answer
    error = json.loads(answer)["error"]
    assert error["message"] and len(error["message"]) < 400
    if path.startswith("/v1/"):
        assert error.keys() == {"message", "type", "param", "code"}
    else:
        assert error["code"] == expected
    check_that_it_serves(server)


def test_a_truncated_body_is_dropped_and_the_next_request_is_served(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = (
            f"POST /generate HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
        )
        connection.sendall(head.encode() + b'Content-Length: 500\r\n\r\n{"text": "a"')
    check_that_it_serves(server)
    server.until_idle()


def check_that_it_serves(server: Server) -> None:
    status, answer = server.ask("POST", "/generate", {"text": "Hi", "sampling_params": {"max_new_tokens": 1}})
    assert status == 200, answer
    assert json.loads(answer)["meta_info"]["completion_tokens"] == 1


def test_a_key_opens_every_route_and_health_needs_none(server: Server) -> None:
    assert server.ask("GET", "/health", key="")[0] == 200
    routes = build_app(FakeEngine(), ServerConfig(model_path="demo", enable_metrics=True)).router.routes()
    paths = {(route.method, route.resource.canonical) for route in routes if route.resource is not None}
    assert len(paths) > 20
    for method, path in paths:
        if path not in OPEN_PATHS and method != "HEAD":
            for key in ("", "wrong"):
                status, answer = server.ask(method, path, key=key)
                assert (path, status) == (path, 401)
                error = json.loads(answer)["error"]
                assert error if isinstance(error, str) else error["message"]  # Ollama's clients want a string


# ---- coming and going ----


def open_stream(server: Server, num_tokens: int) -> http.client.HTTPResponse:
    body = {
        "text": "Once upon a time", "stream": True,
        "sampling_params": {"max_new_tokens": num_tokens, "ignore_eos": True, "temperature": 0},
    }  # fmt: skip
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/generate",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"},
    )
    response = urllib.request.urlopen(request, timeout=60)
    assert response.readline().startswith(b"data: ")  # it runs
    return response


def test_a_client_that_goes_frees_its_slots(server: Server) -> None:
    response = open_stream(server, num_tokens=4000)
    assert server.get("/get_load")[0]["num_reqs"] == 1
    response.close()
    server.until_idle()  # minutes before 4000 tokens are made


def test_a_signal_drains_what_runs_and_then_exits_with_0() -> None:
    with running_server("--dtype", "bfloat16", "--skip-server-warmup") as server, open_stream(server, 24) as response:
        server.process.send_signal(signal.SIGTERM)  # an idle server has SIGINT: see `running_server`
        *_, last, done = (line for line in response.read().split(b"\n\n") if line)
        assert done == b"data: [DONE]"
        meta = json.loads(last.removeprefix(b"data: "))["meta_info"]
        assert meta["finish_reason"] == {"type": "length", "length": 24}
        assert server.process.wait(DRAIN_S) == 0, server.text()
        with pytest.raises(ProcessLookupError):
            os.killpg(server.process.pid, 0)


@pytest.mark.parametrize(("argument", "text"), [("--help", "--model-path"), ("models", "Gemma 3 270M and 1B")])
def test_the_console_script_helps_without_loading_torch(argument: str, text: str) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, function = scripts["radixloop"].split(":")
    script = f"""
import contextlib, sys
from {module} import {function}
with contextlib.suppress(SystemExit):
    {function}([{argument!r}])
sys.exit("torch" in sys.modules)
"""
    shown = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert text in shown.stdout
