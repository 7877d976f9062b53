"""Send the requests of a crash dump (`--crash-dump-folder`) to a server again, and compare the answers.

    python -m bench.replay dumps/requests-....jsonl --port 30000 --speed 1

Requests go out at the times they first came, `--speed` times as fast (0: all at once), as token ids with the seeds they
were sampled with. So an answer that had ended must come again, token by token: exactly on a server whose arithmetic
does not depend on the batch, mostly on others. Exits with 1 if a request failed.
"""

import argparse
import asyncio
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import orjson
from rich.console import Console

SENT = (
    "input_ids", "sampling_params", "stream", "return_logprob", "logprob_start_len", "top_logprobs_num",
    "token_ids_logprob", "priority", "extra_key",
)  # fmt: skip
MAX_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Dump:
    header: dict[str, Any]
    records: list[dict[str, Any]]

    @classmethod
    def load(cls, path: Path) -> "Dump":
        header, *records = [orjson.loads(line) for line in path.read_bytes().splitlines()]
        return cls(header, records)


@dataclass(frozen=True, slots=True)
class Answer:
    output_ids: list[int]
    error: str = ""


def compare(record: dict[str, Any], answer: Answer) -> str:
    """failed, unknown (nothing to compare with), same or different."""
    if answer.error:
        return "failed"
    reason = record["finish_reason"]
    if reason is None or reason["type"] == "abort":
        return "unknown"
    return "same" if answer.output_ids == record["output_ids"] else "different"


def first_difference(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


async def ask(session: aiohttp.ClientSession, url: str, record: dict[str, Any]) -> Answer:
    body = {name: record[name] for name in SENT}
    body["sampling_params"] = {name: value for name, value in body["sampling_params"].items() if value is not None}
    try:
        async with session.post(f"{url}/generate", json=body) as response:
            data = await response.read()
        if response.status != 200:
            return Answer([], f"HTTP {response.status}: {data.decode(errors='replace')[:200]}")
        if not record["stream"]:
            return Answer(orjson.loads(data)["output_ids"])
        output_ids: list[int] = []
        for line in data.split(b"\n\n"):
            if not line or line == b"data: [DONE]":
                continue
            event = orjson.loads(line.removeprefix(b"data: "))
            if "error" in event:
                return Answer(output_ids, event["error"]["message"])
            ids = event["output_ids"]  # all so far, or with --stream-output the new ones
            output_ids = ids if len(ids) == event["meta_info"]["completion_tokens"] else output_ids + ids
        return Answer(output_ids)
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
        return Answer([], repr(error))


async def replay(
    dump: Dump, url: str, *, speed: float, api_key: str | None = None
) -> list[tuple[dict[str, Any], Answer, str]]:
    """Each record with its new answer and what the comparison says."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    started = time.perf_counter()
    first = min((record["arrived_s"] for record in dump.records), default=0.0)

    async def send(record: dict[str, Any]) -> Answer:
        if speed:
            due = started + (record["arrived_s"] - first) / speed
            await asyncio.sleep(max(due - time.perf_counter(), 0.0))
        return await ask(session, url, record)

    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=3600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
        answers = await asyncio.gather(*map(send, dump.records))
    return [(record, answer, compare(record, answer)) for record, answer in zip(dump.records, answers, strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--speed", type=float, default=1.0, help="1: as it was; 0: all at once (default: 1)")
    parser.add_argument("--api-key")
    args = parser.parse_args()
    console = Console()
    dump = Dump.load(args.file)
    console.print(
        f"{len(dump.records)} requests, written at {dump.header['at']}: {dump.header['reason']}", markup=False
    )
    url = f"http://{args.host}:{args.port}"
    results = asyncio.run(replay(dump, url, speed=args.speed, api_key=args.api_key))
    shown = 0
    for record, answer, verdict in results:
        if verdict in ("failed", "different") and shown < MAX_SHOWN:
            shown += 1
            at = first_difference(answer.output_ids, record["output_ids"])
            console.print(f"{record['rid']}: {verdict}: {answer.error or f'from token {at} on'}", markup=False)
    counts = Counter(verdict for *_, verdict in results)
    console.print(", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()) or "nothing to send")
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
