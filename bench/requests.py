"""Time and memory of reading request bodies, by the server's own functions: no HTTP, no template, no tokenizer.

python -m bench.requests
"""

import argparse
import time
import tracemalloc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec

from bench import agent
from engine.declared import convert
from engine.errors import InvalidRequest
from engine.request import SamplingParams
from server.apis.generate import GenerateRequest
from server.http.bodies import BodyBudget, BodyTooLarge, HeldBody
from server.reading import messages, responses
from server.reading.chat_messages import parse_messages
from server.reading.left_out import LeftOut
from server.reading.messages_body import MessagesRequest
from server.reading.messages_tools import MessagesTools
from server.reading.openai_body import ChatRequest
from server.reading.prompts import check_token_ids
from server.reading.protocol import parse
from server.reading.responses_body import ResponsesRequest
from server.reading.responses_tools import Tools
from server.reading.sampling import read_options, read_sampling_params
from server.reading.tool_choice import read_tool_choice

VOCAB_SIZE = 128_256
NAMES = ("max_completion_tokens", "max_tokens")
ENGINE: Any = SimpleNamespace(model_config=SimpleNamespace(vocab_size=VOCAB_SIZE, sampling_defaults={}))
SMALL: dict[str, Any] = {
    "model": "default",
    "messages": [{"role": "system", "content": "You are helpful."}, {"role": "user", "content": "Hi there"}],
    "max_tokens": 64,
    "temperature": 0.7,
    "stream": True,
    "stream_options": {"include_usage": True},
}
SESSION = agent.Session.drawn(0, num_turns=41, num_tools=30, system_words=4000, result_words=300)
LIMIT = {"max_tokens": 32_000, "stream": True}
TURN = "Some words of a conversation that has gone on for a while. " * 8
PARAMETERS = {
    "type": "object",
    "properties": {f"field_{i}": {"type": "string", "description": "what it is for"} for i in range(6)},
    "required": ["field_0"],
}


def agent_body() -> dict[str, Any]:
    """Return a chat of 40 turns and 30 tools."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": TURN} for i in range(40)]
    tools = [
        {"type": "function", "function": {"name": f"tool_{i}", "description": TURN, "parameters": PARAMETERS}}
        for i in range(30)
    ]
    return {**SMALL, "messages": turns, "tools": tools}


def read_chat(text: bytes) -> Any:
    return checked(parse(text, ChatRequest))


def read_messages(text: bytes) -> Any:
    body, left_out = parse(text, MessagesRequest), LeftOut()
    tools = MessagesTools(body.tools, body.messages, left_out)
    return body, checked(convert(messages.chat_body(body, tools, left_out, keeps_volatile=False), ChatRequest))


def read_responses(text: bytes) -> Any:
    body, left_out = parse(text, ResponsesRequest), LeftOut()
    tools, said = Tools(body.tools, left_out), responses.read_input(responses.resolved(body.input, no_item), left_out)
    chat = convert(responses.chat_body(body, said, tools, left_out), ChatRequest)
    return body, checked(chat), responses.echo_of(body, "default")


def no_item(item_id: str, field: str) -> dict[str, Any]:
    raise KeyError(field, item_id)


def checked(body: ChatRequest) -> Any:
    """Return the parts of a chat that are read off its body."""
    return (
        body,
        read_tool_choice(body),
        parse_messages(body.messages),
        read_sampling_params(body, ENGINE, NAMES, None),
        read_options(body, -1),
    )


def read_generate(text: bytes) -> Any:
    body = parse(text, GenerateRequest)
    assert isinstance(body.sampling_params, dict)
    params = SamplingParams.from_dict(body.sampling_params)
    return body, check_token_ids(body.input_ids, VOCAB_SIZE, "input_ids"), params


def measured(read: Callable[[bytes], Any], text: bytes, seconds: float) -> tuple[float, float]:
    """Return the least CPU seconds of a reading, and the MB at its peak beside the text."""
    times: list[float] = []
    num = max(1, 100_000 // len(text))  # a clock tells microseconds
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        begun = time.thread_time()
        for _ in range(num):
            read(text)
        times.append((time.thread_time() - begun) / num)
    tracemalloc.start()
    read(text)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return min(times), peak / 1e6


def is_refused(text: bytes) -> bool:
    """Return whether a body has more objects or values than any may, which is known before it is read."""
    try:
        HeldBody(BodyBudget(1 << 30)).add(text)
    except (BodyTooLarge, InvalidRequest):
        return True
    return False


def bodies() -> dict[str, tuple[Callable[[bytes], Any], bytes]]:
    ids = {"input_ids": [(i * 7919) % VOCAB_SIZE for i in range(160_000)], "sampling_params": {"max_new_tokens": 5}}
    values = b'{"input_ids": [1], "sampling_params": {}, "unknown": [%b 1]}'
    encode = msgspec.json.encode
    return {
        "a small chat": (read_chat, encode(SMALL)),
        "a chat of 40 turns and 30 tools": (read_chat, encode(agent_body())),
        "Claude Code's messages after 40 turns": (read_messages, encode(agent.messages_body(SESSION, 40) | LIMIT)),
        "Codex's responses after 40 turns": (read_responses, encode(agent.responses_body(SESSION, 40))),
        "1 MB of token ids": (read_generate, encode(ids)),
        "2 million values in an unknown field": (read_generate, values % (b'"",' * 2_000_000)),
        "32 MB of empty objects in an unknown field": (read_generate, values % (b"{}," * 11_000_000)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each body")
    args = parser.parse_args()
    for name, (read, text) in bodies().items():
        cpu_s, peak_mb = measured(read, text, args.seconds)
        refused = "  (refused before it is read)" if is_refused(text) else ""
        print(f"{name:45} {len(text) / 1e3:9.1f} kB {cpu_s * 1e3:9.3f} ms {peak_mb:9.2f} MB{refused}")


if __name__ == "__main__":
    main()
