"""Hours of a bad day in minutes: a server on the demo model, clients of every manner, and books that must balance.

    python -m bench.soak --minutes 10

Clients ask for answers of random lengths through every API, streamed or not, constrained by grammars, with tools and
reasoning, ask for vectors, start batches, abort, vanish in the middle, read slowly, send what is wrong, and flush the
cache. Every half a minute all of them pause; then nothing may be left over: no page or row held, no task, no
connection, nothing in the queue. Memory must not grow after warm-up, every greedy answer must begin like the first one
to its prompt, every constrained one must be what was asked for. Exits with 1 and the reasons otherwise.

    python -m bench.soak --hostile --duration 300

instead has one client send the worst that is known, beside the honest streams of another (`bench.hostile`).
"""

import argparse
import asyncio
import contextlib
import itertools
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import orjson
from rich.console import Console

from bench import hostile

ROOT = Path(__file__).parent.parent
NUM_PROMPTS = 40
MAX_NEW_TOKENS = 48
MAX_GROWTH_BYTES = 24 << 20  # from the end of warm-up to the end, of the process as the system sees it
SETTLE_S = 20.0
SERVER_FLAGS = """
    --model-path demo --device cpu --dtype float32 --max-total-tokens 2048 --max-running-requests 12
    --max-queued-requests 40 --chunked-prefill-size 128 --schedule-conservativeness 0.3 --context-length 1024
    --enable-metrics --access-log none --log-level warning --watchdog-timeout 60
    --tool-call-parser hermes --reasoning-parser qwen3
"""
PATTERNS = [r"(yes|no), because [a-z ]{3,20}\.", r"\d{4}-\d{2}-\d{2}", r"[A-Z][a-z]{2,8}( [A-Z][a-z]{2,8}){1,3}"]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "house": {"enum": ["Gryffindor", "Hufflepuff", "Ravenclaw", "Slytherin"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "is_alive": {"type": "boolean"},
    },
    "required": ["name", "house", "age", "is_alive"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "register_student", "strict": True, "parameters": SCHEMA}}]
BAD_BODIES: list[tuple[str, bytes]] = [
    ("/generate", b"{"),
    ("/generate", b"[]"),
    ("/generate", b'{"text": 7}'),
    ("/generate", b'{"text": "a", "sampling_params": {"temperature": -1}}'),
    ("/generate", b'{"text": "a", "sampling_params": {"stop_regex": "("}}'),
    ("/generate", b'{"input_ids": [99999999]}'),
    ("/generate", b'{"input_ids": [1], "sampling_params": {"max_new_tokens": 100000}}'),
    ("/v1/completions", b'{"prompt": []}'),
    ("/v1/completions", b'{"prompt": "a", "n": 1000000}'),
    ("/v1/chat/completions", b'{"messages": [{"role": "nobody", "content": "a"}]}'),
    ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}'),
    ("/generate", b'{"text": "a", "sampling_params": {"regex": "(", "max_new_tokens": 4}}'),
    ("/generate", b'{"text": "a", "sampling_params": {"json_schema": "{\\"type\\": 7}", "max_new_tokens": 4}}'),
    ("/v1/messages", b'{"messages": [{"role": "user", "content": "a"}]}'),
    ("/v1/responses", b'{"input": 7}'),
    ("/v1/embeddings", b'{"input": [-1]}'),
    ("/v1/batches", b'{"input_file_id": "none", "endpoint": "/v1/chat/completions"}'),
    ("/detokenize", b'{"tokens": [-1]}'),
]


@dataclass(frozen=True, slots=True)
class Books:
    """Hold what the idle server says it still has."""

    running: float
    waiting: float
    held: float
    cached: float
    free: float
    total: float
    tasks: float
    files: float
    memory_bytes: float


@dataclass
class Soak:
    url: str
    seed: int
    rng: random.Random = field(init=False)
    prompts: list[list[int]] = field(init=False)
    answers: dict[int, list[int]] = field(default_factory=dict)  # prompt -> the longest answer seen
    vectors: dict[int, list[float]] = field(default_factory=dict)  # prompt -> the first embedding seen
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    rids: "itertools.count[int]" = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        heads = [[self.rng.randrange(100, 30_000) for _ in range(self.rng.randrange(10, 120))] for _ in range(6)]
        self.prompts = [
            self.rng.choice(heads) + [self.rng.randrange(100, 30_000) for _ in range(self.rng.randrange(1, 60))]
            for _ in range(NUM_PROMPTS)
        ]

    # ---- what clients do ----

    def work(self) -> tuple[int, dict[str, Any]]:
        """(which prompt, a greedy request of /generate)."""
        i = self.rng.randrange(NUM_PROMPTS)
        num_tokens = self.rng.randrange(1, MAX_NEW_TOKENS)
        params = {"max_new_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
        return i, {"input_ids": self.prompts[i], "sampling_params": params, "rid": f"soak-{next(self.rids)}"}

    def check_answer(self, i: int, output_ids: list[int]) -> None:
        known = self.answers.setdefault(i, output_ids)
        num_common = min(len(known), len(output_ids))
        if known[:num_common] != output_ids[:num_common]:
            at = next(k for k in range(num_common) if known[k] != output_ids[k])
            self.problems.append(f"prompt {i}: token {at} is {output_ids[at]}, the first time it was {known[at]}")
        if len(output_ids) > len(known):
            self.answers[i] = output_ids

    async def ask(self, session: aiohttp.ClientSession) -> str:
        i, body = self.work()
        async with session.post(f"{self.url}/generate", json=body) as response:
            data = await response.read()
        if response.status == 429:
            return "refused"
        self.check_answer(i, orjson.loads(data)["output_ids"])
        return "answered"

    async def stream(self, session: aiohttp.ClientSession, *, pause_s: float = 0.0) -> str:
        i, body = self.work()
        async with session.post(f"{self.url}/generate", json={**body, "stream": True}) as response:
            if response.status == 429:
                return "refused"
            last = b""
            async for line in response.content:
                if line.startswith(b"data: {"):
                    last = line
                if pause_s:
                    await asyncio.sleep(pause_s)
        self.check_answer(i, orjson.loads(last.removeprefix(b"data: "))["output_ids"])
        return "streamed"

    async def stream_slowly(self, session: aiohttp.ClientSession) -> str:
        await self.stream(session, pause_s=0.05)
        return "streamed slowly"

    async def sample_several(self, session: aiohttp.ClientSession) -> str:
        _, body = self.work()
        params = {**body["sampling_params"], "temperature": 1.0, "top_p": 0.9, "n": 3, "stop": [" the", "ing "]}
        request = {**body, "sampling_params": params, "stream": self.rng.random() < 0.5}
        async with session.post(f"{self.url}/generate", json=request) as response:
            await response.read()
        return "refused" if response.status == 429 else "sampled"

    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"Tell me about number {self.rng.randrange(100)}."}]

    async def post(self, session: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> bytes | None:
        """Return the answer, or None if there is no room for it. Anything but these is a problem."""
        async with session.post(self.url + path, json=body) as response:
            data = await response.read()
        if response.status == 429:
            return None
        if response.status != 200:
            self.problems.append(f"{path} was answered with {response.status}: {data[:200]!r}")
            return None
        return data

    async def chat(self, session: aiohttp.ClientSession) -> str:
        """Ask for an answer that begins as reasoning with a budget."""
        body: dict[str, Any] = {"messages": self.messages(), "max_tokens": self.rng.randrange(1, 30)}
        if self.rng.random() < 0.5:
            body["max_thinking_tokens"] = self.rng.randrange(10)
        body["stream"] = self.rng.random() < 0.5
        data = await self.post(session, "/v1/chat/completions", body)
        if data is None:
            return "refused"
        if body["stream"] and not data.endswith(b"data: [DONE]\n\n"):
            self.problems.append(f"a chat ended with {data[-100:]!r}")
        return "chatted"

    async def match(self, session: aiohttp.ClientSession) -> str:
        """Ask for a regular expression, through /generate."""
        _, body = self.work()
        pattern = self.rng.choice(PATTERNS)
        params = {"regex": pattern, "max_new_tokens": 60, "temperature": self.rng.choice([0, 1.0])}
        data = await self.post(session, "/generate", {**body, "sampling_params": params})
        if data is None:
            return "refused"
        answer = orjson.loads(data)
        if answer["meta_info"]["finish_reason"]["type"] == "stop" and not re.fullmatch(pattern, answer["text"]):
            self.problems.append(f"{answer['text']!r} does not match {pattern}")
        return "matched"

    async def fill_in(self, session: aiohttp.ClientSession) -> str:
        """Ask for a JSON schema, through chat.completions: as the answer's form, or as a tool's arguments."""
        body: dict[str, Any] = {"messages": self.messages(), "max_tokens": 120}
        is_call = self.rng.random() < 0.5
        if is_call:
            body |= {"tools": TOOLS, "tool_choice": "required"}
        else:
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "student", "schema": SCHEMA}}
        data = await self.post(session, "/v1/chat/completions", body)
        if data is None:
            return "refused"
        choice = orjson.loads(data)["choices"][0]
        if choice["finish_reason"] == "length":
            return "filled in half"
        message = choice["message"]
        calls = message.get("tool_calls", [])
        if is_call and not calls:
            self.problems.append(f"no tool was called, but one had to be: {choice}")
        for text in [call["function"]["arguments"] for call in calls] if is_call else [message["content"]]:
            if orjson.loads(text).keys() != SCHEMA["properties"].keys():
                self.problems.append(f"{text!r} is not what the schema asks for")
        return "called" if is_call else "filled in"

    async def send_message(self, session: aiohttp.ClientSession) -> str:
        """Anthropic's API."""
        body: dict[str, Any] = {"messages": self.messages(), "max_tokens": self.rng.randrange(1, 30), "model": "demo"}
        body["stream"] = self.rng.random() < 0.7
        data = await self.post(session, "/v1/messages", body)
        if data is None:
            return "refused"
        if body["stream"] and b"event: message_stop" not in data[-100:]:
            self.problems.append(f"a message ended with {data[-100:]!r}")
        return "messaged"

    async def respond(self, session: aiohttp.ClientSession) -> str:
        """OpenAI's responses; some go on without their client, and are fetched, cancelled or deleted."""
        body: dict[str, Any] = {"input": "Tell me more.", "max_output_tokens": self.rng.randrange(1, 30)}
        if self.rng.random() < 0.6:
            body |= {"stream": self.rng.random() < 0.7, "store": False}
            data = await self.post(session, "/v1/responses", body)
            if data is not None and body["stream"] and not re.search(rb"event: response\.(completed|incomplete)", data):
                self.problems.append(f"a response ended with {data[-100:]!r}")
            return "refused" if data is None else "responded"
        data = await self.post(session, "/v1/responses", {**body, "background": True})
        if data is None:
            return "refused"
        path = f"{self.url}/v1/responses/{orjson.loads(data)['id']}"
        await asyncio.sleep(self.rng.random())
        async with session.get(path) as response:
            if response.status != 200:
                self.problems.append(f"a response in the background was answered with {response.status}")
        async with session.delete(path, raise_for_status=True):
            return "responded in the background"

    async def embed(self, session: aiohttp.ClientSession) -> str:
        i = self.rng.randrange(NUM_PROMPTS)
        data = await self.post(session, "/v1/embeddings", {"input": self.prompts[i]})
        if data is None:
            return "refused"
        vector = orjson.loads(data)["data"][0]["embedding"]
        known = self.vectors.setdefault(i, vector)
        if (cosine := sum(a * b for a, b in zip(known, vector, strict=True))) < 0.999:
            self.problems.append(f"the vectors of prompt {i} have a cosine of {cosine:.4f}")
        return "embedded"

    async def start_batch(self, session: aiohttp.ClientSession) -> str:
        """Lines of which one is wrong; half of the batches are cancelled under way."""
        bodies: list[dict[str, Any]] = [{"messages": self.messages(), "max_tokens": 8} for _ in range(5)]
        bodies[3] = {"messages": []}
        lines = [
            {"custom_id": str(i), "method": "POST", "url": "/v1/chat/completions", "body": body}
            for i, body in enumerate(bodies)
        ]
        form = aiohttp.FormData({"purpose": "batch"})
        form.add_field("file", b"\n".join(map(orjson.dumps, lines)), filename="lines.jsonl")
        async with session.post(f"{self.url}/v1/files", data=form, raise_for_status=True) as response:
            file_id = (await response.json())["id"]
        body = {"input_file_id": file_id, "endpoint": "/v1/chat/completions"}
        data = await self.post(session, "/v1/batches", body)
        assert data is not None, "batches are not refused"
        batch = orjson.loads(data)
        path = f"{self.url}/v1/batches/{batch['id']}"
        if is_cancelled := self.rng.random() < 0.5:
            await asyncio.sleep(self.rng.random())
            async with session.post(f"{path}/cancel"):  # 400 if it was done before
                pass
        while batch["status"] not in ("completed", "cancelled", "failed"):
            await asyncio.sleep(0.5)
            async with session.get(path, raise_for_status=True) as response:
                batch = await response.json()
        counts = batch["request_counts"]
        if batch["status"] == "failed" or (not is_cancelled and counts != {"total": 5, "completed": 4, "failed": 1}):
            self.problems.append(f"a batch is {batch['status']} with {counts}, {batch['errors']}")
        for used_id in filter(None, (file_id, batch["output_file_id"], batch["error_file_id"])):
            async with session.delete(f"{self.url}/v1/files/{used_id}", raise_for_status=True):
                pass
        return f"batch {batch['status']}"

    async def abort(self, session: aiohttp.ClientSession) -> str:
        _, body = self.work()
        asking = asyncio.create_task(self._read(session, {**body, "stream": self.rng.random() < 0.5}))
        await asyncio.sleep(self.rng.random() * 0.5)
        async with session.post(f"{self.url}/abort_request", json={"rid": body["rid"]}) as response:
            if response.status != 200:
                self.problems.append(f"an abort was answered with {response.status}")
        await asking
        return "aborted"

    async def _read(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> None:
        async with session.post(f"{self.url}/generate", json=body) as response:
            await response.read()

    def long_work(self) -> tuple[str, dict[str, Any]]:
        """(path, a request of it for a long answer)."""
        _, body = self.work()
        body["sampling_params"]["max_new_tokens"] = 500
        constrained = {**body, "sampling_params": {"regex": "([a-z]{1,9} ){100}", "max_new_tokens": 400}}
        limit = {"max_tokens": 500, "ignore_eos": True}
        return self.rng.choice(
            [
                ("/generate", body),
                ("/generate", constrained),
                ("/v1/chat/completions", {"messages": self.messages(), "n": 2, **limit}),
                ("/v1/messages", {"messages": self.messages(), "model": "demo", **limit}),
                ("/v1/responses", {"input": "Tell me all.", "max_output_tokens": 500, "ignore_eos": True}),
            ]
        )

    async def vanish(self, session: aiohttp.ClientSession) -> str:
        """Close the connection without a word: before the answer, or after a few of its bytes."""
        path, body = self.long_work()
        data = orjson.dumps({**body, "stream": self.rng.random() < 0.7})
        host, port = self.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 12)
        writer.write(head_of(path, data) + data[: self.rng.choice([len(data), len(data), len(data) // 2])])
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(reader.read(self.rng.choice([1, 300, 3000])), self.rng.random() * 2)
        writer.transport.abort()
        return "vanished"

    async def not_read(self, session: aiohttp.ClientSession) -> str:
        """Ask for a stream, read nothing of it for seconds, and leave."""
        path, body = self.long_work()
        data = orjson.dumps({**body, "stream": True})
        host, port = self.url.removeprefix("http://").split(":")
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        with connection:
            await loop.sock_connect(connection, (host, int(port)))
            await loop.sock_sendall(connection, head_of(path, data) + data)
            await asyncio.sleep(1 + self.rng.random() * 3)
        return "never read"

    async def send_nonsense(self, session: aiohttp.ClientSession) -> str:
        path, body = self.rng.choice(BAD_BODIES)
        headers = {"Content-Type": "application/json"}
        async with session.post(self.url + path, data=body, headers=headers) as response:
            text = await response.text()
        if response.status not in (400, 404) or "message" not in text:
            self.problems.append(f"{path} {body[:60]!r} was answered with {response.status}: {text[:100]}")
        return "was wrong"

    async def flush(self, session: aiohttp.ClientSession) -> str:
        async with session.post(f"{self.url}/flush_cache") as response:
            if response.status not in (200, 400):
                self.problems.append(f"/flush_cache was answered with {response.status}")
        return "flushed" if response.status == 200 else "could not flush"

    async def client(self, session: aiohttp.ClientSession, until: float) -> None:
        acts: list[tuple[Callable[[aiohttp.ClientSession], Awaitable[str]], int]] = [
            (self.ask, 20), (self.stream, 20), (self.sample_several, 6), (self.chat, 8), (self.match, 8),
            (self.fill_in, 8), (self.send_message, 6), (self.respond, 6), (self.embed, 6), (self.start_batch, 2),
            (self.stream_slowly, 5), (self.abort, 12), (self.vanish, 15), (self.not_read, 4), (self.send_nonsense, 10),
            (self.flush, 3),
        ]  # fmt: skip
        while time.monotonic() < until:
            (act,) = self.rng.choices([act for act, _ in acts], [weight for _, weight in acts])
            try:
                self.counts[await act(session)] += 1
            except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError) as error:
                self.problems.append(f"{act.__name__}: {error!r}")
            await asyncio.sleep(self.rng.random() * 0.2)

    # ---- what must balance ----

    async def books(self, session: aiohttp.ClientSession) -> Books:
        async with session.get(f"{self.url}/server_info", raise_for_status=True) as response:
            schedulers = [state["scheduler"] for state in (await response.json())["internal_states"]]  # of each replica
        scheduler = {name: sum(one[name] for one in schedulers) for name in schedulers[0]}
        async with session.get(f"{self.url}/metrics", raise_for_status=True) as response:
            metrics = dict(re.findall(r"^([\w:]+)(?:{[^}]*})? (\S+)$", await response.text(), re.MULTILINE))
        return Books(
            running=scheduler["num_running"], waiting=scheduler["num_waiting"], held=scheduler["num_held_tokens"],
            cached=scheduler["num_cached_tokens"], free=scheduler["num_free_tokens"],
            total=scheduler["num_total_tokens"], tasks=float(metrics["radixloop:event_loop_tasks"]),
            files=float(metrics["process_open_fds"]), memory_bytes=float(metrics["process_resident_memory_bytes"]),
        )  # fmt: skip

    async def settle(self, session: aiohttp.ClientSession, first: Books | None) -> Books:
        """Check the books once everything has ended; what is then left over is a problem."""
        deadline = time.monotonic() + SETTLE_S
        while True:
            books = await self.books(session)
            left = [name for name in ("running", "waiting", "held") if getattr(books, name)]
            if first is not None:
                left += [name for name in ("tasks", "files") if getattr(books, name) > getattr(first, name)]
            if not left or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.2)
        self.problems += [f"{getattr(books, name):.0f} {name} are left over when idle" for name in left]
        if books.free + books.cached != books.total:
            self.problems.append(f"{books.free} free and {books.cached} cached pages are not {books.total}")
        return books


def head_of(path: str, body: bytes) -> bytes:
    return b"POST %b HTTP/1.1\r\nHost: soak\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (
        path.encode(),
        len(body),
    )


async def soak(url: str, args: argparse.Namespace, console: Console) -> list[str]:
    run = Soak(url, args.seed)
    started = time.monotonic()
    history: list[tuple[float, Books]] = []
    # A connection a request: kept ones would be tasks and files that the books cannot tell from leaks.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=1 << 12) as session:
        first = await run.settle(session, None)
        while (elapsed := time.monotonic() - started) < args.minutes * 60:
            until = min(time.monotonic() + args.round_s, started + args.minutes * 60)
            await asyncio.gather(*(run.client(session, until) for _ in range(args.clients)))
            books = await run.settle(session, first)
            history.append((elapsed, books))
            run.counts[await run.flush(session)] += 1  # now that nothing runs it must succeed
            console.print(
                f"{time.monotonic() - started:5.0f} s: {sum(run.counts.values())} acts, "
                f"{books.memory_bytes / 1e6:.0f} MB, {books.tasks:.0f} tasks, {books.files:.0f} files, "
                f"{books.cached:.0f} tokens cached, {len(run.problems)} problems",
                highlight=False,
            )
    console.print(", ".join(f"{count} {what}" for what, count in run.counts.most_common()), highlight=False)
    warm = [books.memory_bytes for elapsed, books in history if elapsed > args.minutes * 60 * 0.3]
    if len(warm) >= 4:
        third = len(warm) // 3 or 1
        growth = statistics.median(warm[-third:]) - statistics.median(warm[:third])
        console.print(f"memory after warm-up: {growth / 1e6:+.1f} MB", highlight=False)
        if growth > MAX_GROWTH_BYTES:
            run.problems.append(f"memory grew by {growth / 1e6:.1f} MB after warm-up")
    return run.problems


async def wait_until_ready(url: str, server: "subprocess.Popen[bytes]") -> None:
    async with aiohttp.ClientSession() as session:
        while server.poll() is None:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"{url}/health") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.2)
    raise SystemExit("the server did not start")


async def run_against_own_server(args: argparse.Namespace, console: Console) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory() as folder:
        flags = SERVER_FLAGS.split()
        if args.hostile:
            keys = Path(folder, "keys.yaml")
            keys.write_text(hostile.KEYS)  # noqa: ASYNC240 - as below
            flags = [*hostile.FLAGS.split(), "--api-key-file", str(keys)]
        server = subprocess.Popen(  # noqa: ASYNC220 - nothing else runs yet
            [sys.executable, "-m", "server", "--port", str(port), "--file-storage-path", folder,
             *flags, *args.server_flags],
            cwd=ROOT, env=environment, stderr=log,
        )  # fmt: skip
        try:
            url = f"http://127.0.0.1:{port}"
            await wait_until_ready(url, server)
            if args.hostile:
                problems = await hostile.hostile(port, server.pid, args, console)
            else:
                problems = await soak(url, args, console)
            server.send_signal(signal.SIGTERM)
            if (status := server.wait(90)) != 0:
                problems.append(f"the server ended with status {status}")
        finally:
            server.kill()
            server.wait()
        log.seek(0)
        if b"Traceback" in (text := log.read()):
            problems.append(f"the server's log holds a traceback:\n{text.decode(errors='replace')[-4000:]}")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--round-s", type=float, default=30.0, help="seconds between two looks at the books")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of the server's model")
    parser.add_argument("--hostile", action="store_true", help="the worst bodies beside honest streams")
    parser.add_argument("--duration", type=float, default=300.0, help="of --hostile, in seconds")
    parser.add_argument("--streams", type=int, default=32, help="honest ones at once, of --hostile")
    parser.add_argument("--bad-at-once", type=int, default=8, help="bad bodies at once, of --hostile")
    parser.add_argument("server_flags", nargs="*", help="more flags of the server, after --")
    args = parser.parse_args()
    console = Console()
    problems = asyncio.run(run_against_own_server(args, console))
    for problem, count in Counter(problems).most_common(20):
        console.print(f"PROBLEM ({count}x): {problem}", markup=False, highlight=False)
    console.print("the books balance" if not problems else f"{len(problems)} problems", highlight=False)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
