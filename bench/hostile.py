"""One client's worst beside the honest streams of another: what `bench.soak --hostile` does.

First the honest streams run alone, then with the worst bodies of `bench.worst` beside them, eight at once, and clients
that pipeline and go, open connections and say nothing, or send files made to hurt. No honest stream may fail or say
anything else than it did alone, /health must always answer at once, nothing may be a 5xx, and in the end the memory
must be where it was. Clients with keys of their own (`--api-key-file`) take turns: the server has two. A CPU's KV pool
takes pages as slots are first written, so that prompts fill it before memory is looked at.

The bad bodies come from a process of their own, and /health is asked for by another one, which also notes how long the
server's main thread and itself waited for a core meanwhile (Linux reports that): on a machine with other work, that is
not the server's doing. Not counted so is the wait for a thread that has the interpreter and itself waits for a core.
"""

import argparse
import asyncio
import contextlib
import itertools
import multiprocessing
import os
import random
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp
import orjson
from rich.console import Console

from bench.worst import FULL, worst_bodies

MAX_HEALTH_S = 0.25
CALM_SHARE = 0.2  # of the duration, before, in which the honest streams run alone
ANSWER_TOKENS = 32
FILLER_TOKENS = 1000
PATIENCE_S = 120.0  # for the answer to one bad body
SETTLE_S = 30.0  # that memory has to fall: the server looks every 5 s whether to trim its heap
# The allocator keeps pages of which a part is in use: bodies of 32 MB at eight at once leave some of them behind.
# A leak of one of these bodies would show in seconds.
MAX_LEFT_BYTES = 96 << 20
KEYS = "honest: sk-honest\nhostile: sk-hostile\n"
FLAGS = """
    --model-path demo --device cpu --dtype float32 --quantization none
    --max-total-tokens 4096 --max-running-requests 48 --chunked-prefill-size 128 --context-length 1024
    --enable-metrics --access-log none --log-level warning --watchdog-timeout 60 --tool-call-parser hermes
"""


def auth(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer sk-{name}"}


# ---- /health, from a process of its own ----


@dataclass(frozen=True, slots=True)
class Probe:
    """An answer of /health: seconds until it was there, and of those spent waiting for a core."""

    took_s: float
    waited_s: float
    is_ok: bool

    @property
    def own_s(self) -> float:
        return max(0.0, self.took_s - self.waited_s)


def core_wait_s(pid: int) -> float:
    """Return how long the main thread of a process has been ready to run without a core; 0 where Linux says nothing."""
    try:
        return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def probe(port: int, server_pid: int, pipe: Connection) -> None:
    """Ask for /health 20 times a second. What arrives at `pipe` is answered with the probes since; None ends it."""
    probes: list[Probe] = []
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    while True:
        if pipe.poll(0.05):
            goes_on = pipe.recv()
            pipe.send(probes)
            if not goes_on:
                return
            probes = []
        waited, started, answer = core_wait_s(server_pid) + core_wait_s(os.getpid()), time.perf_counter(), b""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall(request)
            while piece := connection.recv(4096):
                answer += piece
        took_s = time.perf_counter() - started
        waited = core_wait_s(server_pid) + core_wait_s(os.getpid()) - waited
        probes.append(Probe(took_s, waited, answer.startswith(b"HTTP/1.1 200")))


# ---- the worst, from another ----


class Attacker:
    def __init__(self, port: int, seed: int) -> None:
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        self.rng = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.slowest: dict[str, float] = {}
        self.problems: list[str] = []
        self.bodies = worst_bodies()

    async def run(self, num_at_once: int, until: float) -> None:
        # A kind at a time in an order of chance: otherwise those with many spellings would be most of it.
        kinds = sorted({worst.kind for worst in self.bodies})
        acts: list[Callable[[aiohttp.ClientSession], Coroutine[Any, Any, str]]] = [
            self.pipeline_and_go, self.say_nothing, self.batch_of_a_long_line, self.batch_of_bad_lines,
            self.open_sessions, self.leave_in_the_middle,
        ]  # fmt: skip
        turns: list[Any] = [*kinds, *acts]
        self.rng.shuffle(turns)
        order = itertools.cycle(turns)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=auth("hostile")) as session:

            async def work() -> None:
                while time.monotonic() < until:
                    turn = next(order)
                    name = turn if isinstance(turn, str) else turn.__name__.replace("_", " ")
                    started = time.monotonic()
                    try:
                        said = await (self.send(session, turn) if isinstance(turn, str) else turn(session))
                    except TimeoutError:  # its own others are before it: see `settled_memory` for what never ends
                        said = "nothing"
                    except (aiohttp.ClientError, OSError) as error:  # refused while it was still being sent
                        said = type(error).__name__
                    self.counts[f"{name}: {said}"] += 1
                    self.slowest[name] = max(self.slowest.get(name, 0.0), time.monotonic() - started)

            await asyncio.gather(*(work() for _ in range(num_at_once)))

    async def send(self, session: aiohttp.ClientSession, kind: str) -> str:
        worst = self.rng.choice([worst for worst in self.bodies if worst.kind == kind])
        async with session.post(self.url + worst.path, data=worst.body, headers=worst.headers) as response:
            data = await response.read()
        if response.status >= 500:
            self.problems.append(f"{kind} to {worst.path} was answered with {response.status}: {data[:200]!r}")
        return str(response.status)

    async def connect(self) -> asyncio.StreamWriter:
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        return writer

    def request(self, path: str, body: bytes, num_bytes: int | None = None) -> bytes:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer sk-hostile\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {num_bytes or len(body)}\r\n\r\n"
        return head.encode() + body

    async def pipeline_and_go(self, _: aiohttp.ClientSession) -> str:
        body = b'{"text":"Go on","sampling_params":{"max_new_tokens":900,"ignore_eos":true}}'
        writer = await self.connect()
        writer.write(self.request("/generate", body) * 50)
        await asyncio.sleep(self.rng.random())
        writer.transport.abort()
        return "gone"

    async def say_nothing(self, _: aiohttp.ClientSession) -> str:
        """Open a hundred connections, begin a request on each, and leave after seconds."""
        writers = [await self.connect() for _ in range(100)]
        for writer in writers:
            writer.write(self.request("/v1/chat/completions", b'{"messages": [', FULL)[: self.rng.randrange(1, 200)])
        await asyncio.sleep(5)
        for writer in writers:
            writer.transport.abort()
        return "gone"

    async def leave_in_the_middle(self, _: aiohttp.ClientSession) -> str:
        """Send most of a large body, and leave."""
        worst = self.rng.choice([worst for worst in self.bodies if worst.kind in ("text of 16 MB", "tiny objects")])
        writer = await self.connect()
        body = worst.body
        writer.write(self.request(worst.path, body)[: -len(body) // 10])
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(writer.drain(), 2)
        writer.transport.abort()
        return "gone"

    async def open_sessions(self, session: aiohttp.ClientSession) -> str:
        statuses = set()
        for _ in range(50):
            async with session.post(f"{self.url}/open_session", json={}) as response:
                statuses.add(response.status)
        return " ".join(map(str, sorted(statuses)))

    async def batch_of_a_long_line(self, session: aiohttp.ClientSession) -> str:
        return await self.batch(session, b'{"custom_id": "a", "body": "' + b"x" * (90 << 20) + b'"}\n')

    async def batch_of_bad_lines(self, session: aiohttp.ClientSession) -> str:
        """Lines of what is answered with 4xx when it comes alone, and one after the other of a million values."""
        body = {"messages": [{"role": "user", "content": "x" * 2_000_000}]}
        line = {"method": "POST", "url": "/v1/chat/completions", "body": body}
        lines = [orjson.dumps({"custom_id": str(i), **line}) for i in range(10)]
        lines += [
            orjson.dumps({"custom_id": f"v{i}", **line})[:-2] + b',"x":[%b1]}}' % (b"{}," * 200_000) for i in range(5)
        ]
        return await self.batch(session, b"\n".join(lines))

    async def batch(self, session: aiohttp.ClientSession, content: bytes) -> str:
        form = aiohttp.FormData({"purpose": "batch"})
        form.add_field("file", content, filename="lines.jsonl")
        async with session.post(f"{self.url}/v1/files", data=form) as response:
            if response.status != 200:
                return f"upload {response.status}"
            file_id = (await response.json())["id"]
        body = {"input_file_id": file_id, "endpoint": "/v1/chat/completions"}
        async with session.post(f"{self.url}/v1/batches", json=body) as response:
            batch = await response.json()
        async with asyncio.timeout(PATIENCE_S):
            while batch["status"] in ("validating", "in_progress", "finalizing"):
                await asyncio.sleep(0.5)
                async with session.get(f"{self.url}/v1/batches/{batch['id']}") as response:
                    batch = await response.json()
        for used_id in filter(None, (file_id, batch["output_file_id"], batch["error_file_id"])):
            async with session.delete(f"{self.url}/v1/files/{used_id}"):
                pass
        return str(batch["status"])


def attack(port: int, seed: int, num_at_once: int, duration_s: float, pipe: Connection) -> None:
    """Send the worst for so long; then (counts, the slowest of each kind, problems) go into `pipe`."""
    attacker = Attacker(port, seed)
    asyncio.run(attacker.run(num_at_once, time.monotonic() + duration_s))
    pipe.send((attacker.counts, attacker.slowest, attacker.problems))


# ---- the honest ----


@dataclass
class Streams:
    """Record what honest streams have seen, in one phase."""

    ttft_s: list[float] = field(default_factory=list)
    gap_s: list[float] = field(default_factory=list)
    num_done: int = 0


class Honest:
    """Clients that stream short greedy answers through every API, again and again."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.answers: dict[tuple[str, int], str] = {}
        self.problems: list[str] = []
        self.seen = Streams()

    def request(self, path: str, i: int) -> dict[str, Any]:
        text = f"Tell me about the number {i}, and why it matters."
        chat = {"messages": [{"role": "user", "content": text}], "stream": True, "temperature": 0}
        return {
            "/generate": {
                "text": text, "stream": True,
                "sampling_params": {"temperature": 0, "max_new_tokens": ANSWER_TOKENS, "ignore_eos": True},
            },
            "/v1/chat/completions": {**chat, "max_tokens": ANSWER_TOKENS, "ignore_eos": True},
            "/v1/messages": {**chat, "model": "demo", "max_tokens": ANSWER_TOKENS},
            "/v1/responses": {
                "input": text, "stream": True, "temperature": 0, "max_output_tokens": ANSWER_TOKENS, "store": False,
            },
            "/api/chat": {**chat, "model": "demo", "options": {"num_predict": ANSWER_TOKENS, "temperature": 0}},
        }[path]  # fmt: skip

    async def run(self, num_clients: int, until: float) -> Streams:
        """Return what was seen until then."""
        self.seen = Streams()
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=300)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=auth("honest")) as session:
            await asyncio.gather(*(self.client(session, i, until) for i in range(num_clients)))
        return self.seen

    async def client(self, session: aiohttp.ClientSession, number: int, until: float) -> None:
        path = list(TEXT_OF)[number % len(TEXT_OF)]
        for i in itertools.count(number):
            if time.monotonic() > until:
                return
            try:
                await self.stream(session, path, i % 16)
            except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError) as error:
                self.problems.append(f"an honest stream of {path} failed: {error!r}")

    async def stream(self, session: aiohttp.ClientSession, path: str, i: int) -> None:
        last = time.perf_counter()
        texts: list[str] = []
        async with session.post(self.url + path, json=self.request(path, i)) as response:
            if response.status != 200:
                data = await response.read()
                self.problems.append(f"an honest stream of {path} was answered with {response.status}: {data[:200]!r}")
                return
            async for event in events(response):
                if text := TEXT_OF[path](event):
                    now = time.perf_counter()
                    (self.seen.gap_s if texts else self.seen.ttft_s).append(now - last)
                    last = now
                    texts.append(text)
        answer = texts[-1] if path == "/generate" else "".join(texts)
        known = self.answers.setdefault((path, i), answer)
        if answer != known or not answer:
            self.problems.append(f"an honest answer of {path} is {answer[-60:]!r}, and was {known[-60:]!r}")
        self.seen.num_done += 1


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """Yield the JSON objects of a stream. `ValueError` if it ends without its API's last word."""
    is_whole = False
    async for line in response.content:
        line = line.strip()
        is_whole = is_whole or line == b"data: [DONE]"
        data = line if line.startswith(b"{") else line.removeprefix(b"data: ") if line.startswith(b"data: {") else b""
        if data:
            event = orjson.loads(data)
            if event.get("error"):
                raise ValueError(f"an error in the stream: {data[:200]!r}")
            kind = event.get("type", "")
            is_whole = is_whole or event.get("done") is True or kind in ENDS
            yield event
    if not is_whole:
        raise ValueError("the stream ended too early")


ENDS = ("message_stop", "response.completed", "response.incomplete")
TEXT_OF: dict[str, Callable[[dict[str, Any]], str]] = {
    "/generate": lambda event: str(event["text"]),
    "/v1/chat/completions": lambda event: "".join(one["delta"].get("content") or "" for one in event["choices"]),
    "/v1/messages": lambda event: str(event.get("delta", {}).get("text", "")),
    "/v1/responses": lambda event: str(event["delta"]) if event.get("type") == "response.output_text.delta" else "",
    "/api/chat": lambda event: str(event["message"]["content"]),
}


# ---- the whole ----


def memory_bytes(pid: int) -> int:
    """Return the resident memory of a process and all that it has started."""
    try:
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        tasks = Path(f"/proc/{pid}/task").iterdir()
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:  # it has just ended
        return 0
    return resident + sum(map(memory_bytes, children))


async def watch_memory(pid: int) -> int:
    """Return the most memory that the server had when this is cancelled."""
    most = 0
    with contextlib.suppress(asyncio.CancelledError):
        while True:
            most = max(most, memory_bytes(pid))
            await asyncio.sleep(0.1)
    return most


async def fill_pool(url: str) -> None:
    """Have every slot of the KV pool written once, by prompts that share nothing."""
    async with aiohttp.ClientSession(headers=auth("honest")) as session:
        async with session.get(f"{url}/server_info", raise_for_status=True) as response:
            num_slots = (await response.json())["internal_states"][0]["scheduler"]["num_total_tokens"]
        for i in range(num_slots // FILLER_TOKENS + 1):
            body = {"input_ids": [1000 + i] * FILLER_TOKENS, "sampling_params": {"max_new_tokens": 1}}
            async with session.post(f"{url}/generate", json=body, raise_for_status=True) as response:
                await response.read()


async def settled_memory(url: str, pid: int, problems: list[str]) -> int:
    """Return the memory once nothing runs, the least of the seconds after. What runs to their end is a problem."""
    deadline = time.monotonic() + SETTLE_S
    least, num_requests = memory_bytes(pid), 0
    async with aiohttp.ClientSession(headers=auth("honest")) as session:
        while time.monotonic() < deadline:
            async with session.get(f"{url}/get_load") as response:
                loads = await response.json()
            num_requests = sum(load["num_reqs"] for load in loads)
            if not num_requests:
                least = min(least, memory_bytes(pid))
            await asyncio.sleep(0.5)
    if num_requests:
        problems.append(f"{num_requests} requests run {SETTLE_S:.0f} s after the last client has gone")
    return least


def percentile(values: list[float], percent: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * percent / 100))] if values else 0.0


def report(console: Console, name: str, streams: Streams, probes: list[Probe], num_bytes: int) -> None:
    first, gaps, health = streams.ttft_s, streams.gap_s, [one.took_s for one in probes]
    own = [one.own_s for one in probes]
    share = sum(one.waited_s for one in probes) / max(sum(health), 1e-9)
    num_late, num_own_late = (sum(took_s > MAX_HEALTH_S for took_s in took) for took in (health, own))
    console.print(
        f"{name}: {streams.num_done} streams; load {os.getloadavg()[0]:.1f}; {num_bytes / 1e6:.0f} MB at most\n"
        f"  first text: p50 {percentile(first, 50):.2f} s, p99 {percentile(first, 99):.2f}, most {max(first):.2f}\n"
        f"  between two: p50 {percentile(gaps, 50):.3f} s, p99 {percentile(gaps, 99):.3f}, most {max(gaps):.3f}\n"
        f"  /health, {len(probes)} times, by the clock: {times_ms(health)}; {num_late} above {MAX_HEALTH_S * 1e3:.0f}\n"
        f"  /health without the wait for a core ({share:.0%} of it): {times_ms(own)}; {num_own_late} above",
        highlight=False,
        soft_wrap=True,
    )


def times_ms(times_s: list[float]) -> str:
    p50, p99, most = (percentile(times_s, percent) * 1e3 for percent in (50, 99, 100))
    return f"p50 {p50:.1f} ms, p99 {p99:.0f}, most {most:.0f}"


def report_answers(console: Console, counts: Counter[str], slowest: dict[str, float]) -> None:
    """Print how many bad requests had which answer, all together and by kind."""
    by_answer: Counter[str] = Counter()
    for name, count in sorted(counts.items()):
        kind, _, said = name.rpartition(": ")
        by_answer[said] += count
        console.print(f"  {count:4d} × {name} (the slowest of its kind {slowest[kind]:.1f} s)", highlight=False)
    said = ", ".join(f"{count} × {said}" for said, count in by_answer.most_common())
    console.print(f"answers to the worst, {counts.total()} together: {said}", highlight=False, soft_wrap=True)


async def hostile(port: int, pid: int, args: argparse.Namespace, console: Console) -> list[str]:
    """Run it all against the server on `port`, the process `pid`; return what was wrong."""
    context = multiprocessing.get_context("spawn")
    honest, url = Honest(port), f"http://127.0.0.1:{port}"
    pipe, theirs = context.Pipe()
    prober = context.Process(target=probe, args=(port, pid, theirs), daemon=True)
    prober.start()
    problems: list[str] = []

    async def phase(name: str, duration_s: float, goes_on: bool) -> list[Probe]:
        watching = asyncio.create_task(watch_memory(pid))
        streams = await honest.run(args.streams, time.monotonic() + duration_s)
        watching.cancel()
        pipe.send(goes_on)
        probes: list[Probe] = await asyncio.to_thread(pipe.recv)
        report(console, name, streams, probes, await watching)
        return probes

    await phase("alone", args.duration * CALM_SHARE, goes_on=True)
    await fill_pool(url)
    before = await settled_memory(url, pid, problems)
    results, their_results = context.Pipe(duplex=False)
    attacker = context.Process(
        target=attack, args=(port, args.seed, args.bad_at_once, args.duration, their_results), daemon=True
    )
    attacker.start()
    pipe.send(True)
    await asyncio.to_thread(pipe.recv)  # of the pause, in which nothing ran
    probes = await phase("beside the worst", args.duration, goes_on=False)
    counts, slowest, bad = await asyncio.to_thread(results.recv)
    problems += honest.problems + bad
    after = await settled_memory(url, pid, problems)
    report_answers(console, counts, slowest)
    console.print(
        f"memory: {before / 1e6:.0f} MB before, {after / 1e6:.0f} MB after {SETTLE_S:.0f} s without requests "
        f"({(after - before) / 1e6:+.0f}, the limit is {MAX_LEFT_BYTES / 1e6:.0f}); "
        f"honest failures: {len(honest.problems)}",
        highlight=False,
        soft_wrap=True,
    )
    if after - before > MAX_LEFT_BYTES:
        problems.append(f"{(after - before) / 1e6:.0f} MB are left over, the limit is {MAX_LEFT_BYTES / 1e6:.0f}")
    slow = [one for one in probes if one.own_s > MAX_HEALTH_S]
    problems += [f"/health took {one.own_s:.2f} s, and {one.waited_s:.2f} s more for want of a core" for one in slow]
    problems += ["/health was not answered with 200" for one in probes if not one.is_ok]
    return problems
