"""Replay a coding agent's session against a server, and report what it computes beyond what is new.

    python -m bench.agent --port 30000 --api messages --turns 40

A session has the shape of recorded ones: a long system prompt, tools, and turns that each add a call of a tool and its
result to a history which every request repeats in full. Calls and results are drawn from a seed, and the model's own
answers are thrown away, so that every server and model gets the same work. Requests carry what Claude Code (messages)
and Codex (responses) put into them: a billing line that changes each time, hints for the provider's own cache, tools
that only the provider runs.

Of each turn: prompt (tokens), new (beyond the turn before), computed (not found in the cache), TTFT (from sending the
request to the first piece of the answer). A perfect cache computes what is new.
"""

import argparse
import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson
from rich.console import Console
from rich.table import Table

WORDS = ("file", "test", "error", "line", "import", "value", "module", "return", "branch", "commit", "server", "path")
MAX_EVENT_BYTES = 1 << 24
JSON = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Step:
    """Add a call of a tool and its result to the history."""

    call_id: str
    tool: str
    arguments: JSON
    result: str


@dataclass(frozen=True, slots=True)
class Session:
    """A recorded conversation, in no API's shape yet."""

    system: str
    tools: list[JSON]  # name, description and parameters of each
    task: str
    steps: list[Step]

    @classmethod
    def drawn(cls, seed: int, num_turns: int, num_tools: int, system_words: int, result_words: int) -> "Session":
        rng = random.Random(seed)

        def words(count: int) -> str:
            return " ".join(rng.choices(WORDS, k=count))

        tools = [
            {
                "name": f"tool_{i}",
                "description": words(40),
                "parameters": {
                    "type": "object",
                    "properties": {name: {"type": "string", "description": words(8)} for name in ("path", "text")},
                    "required": ["path"],
                },
            }
            for i in range(num_tools)
        ]
        steps = [
            Step(f"call_{i:04}", f"tool_{rng.randrange(num_tools)}", {"path": words(1)}, words(result_words))
            for i in range(num_turns - 1)
        ]
        return cls(f"You are an agent. {words(system_words)}", tools, words(50), steps)


@dataclass(frozen=True, slots=True)
class Turn:
    """Record what one request cost. Lengths in tokens."""

    prompt_len: int
    num_new: int  # beyond the prompt of the turn before
    num_cached: int
    ttft_s: float

    @property
    def num_computed(self) -> int:
        return self.prompt_len - self.num_cached


def messages_body(session: Session, num_steps: int) -> JSON:
    """Return Claude Code's request after `num_steps` of the session."""
    messages: list[JSON] = [{"role": "user", "content": [{"type": "text", "text": session.task}]}]
    for step in session.steps[:num_steps]:
        call = {"type": "tool_use", "id": step.call_id, "name": step.tool, "input": step.arguments}
        result = {"type": "tool_result", "tool_use_id": step.call_id, "content": step.result}
        messages += [{"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    messages[-1]["content"][-1]["cache_control"] = {"type": "ephemeral"}
    billing = f"x-anthropic-billing-header: cc_version=2.1.36.{num_steps:x}; cc_entrypoint=cli; cch={num_steps:05x};"
    tools = [{**tool, "input_schema": tool["parameters"]} for tool in session.tools]
    for tool in tools:
        del tool["parameters"]
    return {
        "system": [{"type": "text", "text": billing}, {"type": "text", "text": session.system}],
        "messages": messages,
        "tools": [*tools, {"type": "web_search_20250305", "name": "web_search"}],
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "metadata": {"user_id": "bench"},
    }


def responses_body(session: Session, num_steps: int) -> JSON:
    """Return Codex's request after `num_steps` of the session."""
    items: list[JSON] = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": session.task}]}]
    for step in session.steps[:num_steps]:
        arguments = orjson.dumps(step.arguments).decode()
        items.append({"type": "function_call", "call_id": step.call_id, "name": step.tool, "arguments": arguments})
        items.append({"type": "function_call_output", "call_id": step.call_id, "output": step.result})
    return {
        "instructions": session.system,
        "input": items,
        "tools": [*({"type": "function", "strict": False, **tool} for tool in session.tools), {"type": "web_search"}],
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "bench",
        "text": {"verbosity": "medium"},
    }


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[JSON]:
    async for line in response.content:
        if line.startswith(b"data: {"):
            yield orjson.loads(line[6:])


async def messages_turn(http: aiohttp.ClientSession, body: JSON, num_previous: int) -> Turn:
    usage: JSON = {}
    ttft_s, start = 0.0, time.perf_counter()
    async with http.post("/v1/messages", json=body | {"stream": True}) as response:
        await _check(response)
        async for event in events(response):
            if event["type"] == "error":
                raise RuntimeError(event["error"]["message"])
            if event["type"] in ("content_block_start", "message_delta"):
                ttft_s = ttft_s or time.perf_counter() - start
            usage = event.get("usage") or usage
    cached = usage.get("cache_read_input_tokens") or 0
    prompt_len = usage["input_tokens"] + cached + (usage.get("cache_creation_input_tokens") or 0)
    return Turn(prompt_len, prompt_len - num_previous, cached, ttft_s)


async def responses_turn(http: aiohttp.ClientSession, body: JSON, num_previous: int) -> Turn:
    usage: JSON = {}
    ttft_s, start = 0.0, time.perf_counter()
    async with http.post("/v1/responses", json=body | {"stream": True}) as response:
        await _check(response)
        async for event in events(response):
            kind, whole = event["type"], event.get("response") or {}
            if kind in ("response.failed", "error"):
                raise RuntimeError(str(whole.get("error") or event))
            if kind not in ("response.created", "response.queued", "response.in_progress"):
                ttft_s = ttft_s or time.perf_counter() - start
            usage = whole.get("usage") or usage
    prompt_len = usage["input_tokens"]
    cached = (usage.get("input_tokens_details") or {}).get("cached_tokens") or 0
    return Turn(prompt_len, prompt_len - num_previous, cached, ttft_s)


async def _check(response: aiohttp.ClientResponse) -> None:
    if response.status != 200:
        raise RuntimeError(f"{response.url.path} answered {response.status}: {(await response.text())[:300]}")


APIS = {
    "messages": (messages_body, messages_turn, "max_tokens"),
    "responses": (responses_body, responses_turn, "max_output_tokens"),
}


async def replay(base_url: str, api: str, session: Session, *, model: str, answer_len: int, key: str) -> list[Turn]:
    """Play the session's turns one after another. RuntimeError if the server refuses one or fails."""
    body_of, turn_of, limit = APIS[api]
    headers = {"Authorization": f"Bearer {key}", "X-Api-Key": key}
    turns: list[Turn] = []
    async with aiohttp.ClientSession(
        base_url, headers=headers, read_bufsize=MAX_EVENT_BYTES, timeout=aiohttp.ClientTimeout(total=None)
    ) as http:
        for num_steps in range(len(session.steps) + 1):
            body = body_of(session, num_steps) | {"model": model, "temperature": 0.0, limit: answer_len}
            turns.append(await turn_of(http, body, turns[-1].prompt_len if turns else 0))
    return turns


def computed_per_new(turns: Sequence[Turn]) -> float:
    """Return the tokens computed by one that is new, from the second turn on: the first may find an older session."""
    return sum(turn.num_computed for turn in turns[1:]) / max(sum(turn.num_new for turn in turns[1:]), 1)


def show(api: str, turns: Sequence[Turn]) -> None:
    table = Table("turn", "prompt", "new", "computed", "computed / new", "TTFT ms", title=f"/v1/{api}")
    for column in table.columns:
        column.justify = "right"
    for number, turn in enumerate(turns):
        ratio = turn.num_computed / max(turn.num_new, 1)
        cells = (number, turn.prompt_len, turn.num_new, turn.num_computed, f"{ratio:.2f}", f"{turn.ttft_s * 1e3:.0f}")
        table.add_row(*map(str, cells))
    console = Console()
    console.print(table)
    later = sorted(turn.ttft_s for turn in turns[1:]) or [0.0]
    console.print(
        f"/v1/{api}: computed / new {computed_per_new(turns):.3f} from turn 1 on; "
        f"TTFT first {turns[0].ttft_s * 1e3:.0f} ms, then median {later[len(later) // 2] * 1e3:.0f} ms, "
        f"longest {later[-1] * 1e3:.0f} ms"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", help="default: http://127.0.0.1:PORT")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--api", choices=[*APIS, "both"], default="both")
    parser.add_argument("--model", default="default")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--tools", type=int, default=30)
    parser.add_argument("--system-words", type=int, default=4000)
    parser.add_argument("--result-words", type=int, default=300, help="of a tool's result")
    parser.add_argument("--answer-len", type=int, default=64, help="tokens of each answer, at most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if min(args.turns, args.tools, args.answer_len) < 1:
        parser.error("--turns, --tools and --answer-len must be at least 1")
    base_url = args.base_url or f"http://127.0.0.1:{args.port}"
    for i, api in enumerate(APIS if args.api == "both" else [args.api]):
        # A session of its own for each API: else the second finds in the cache what the first has left there.
        session = Session.drawn(args.seed + i, args.turns, args.tools, args.system_words, args.result_words)
        try:
            turns = asyncio.run(
                replay(base_url, api, session, model=args.model, answer_len=args.answer_len, key=args.api_key)
            )
        except (RuntimeError, aiohttp.ClientError) as error:
            print(f"/v1/{api}: {error}", file=sys.stderr)
            return 1
        show(api, turns)
    return 0


if __name__ == "__main__":
    sys.exit(main())
