"""Measure what constrained answers cost a running server, and what forced tokens save.

    python -m bench.grammar --port 30000

Three tables, all by /generate, greedy:
- JSON: answers of `CHARACTER` (fixed keys, short values), 1 and 64 at a time, with jump-forward as the server has it.
  Start it with `--disable-jump-forward` for the other column; steps are the server's own count.
- Masks: 64 answers of `--tokens` tokens under a grammar that forces nothing, beside 64 free ones.
- Compiling: milliseconds for ten schemas as applications send them, first mask included, as the server reports them.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from dataclasses import dataclass
from typing import Any

import aiohttp
import uvloop
from rich.console import Console
from rich.table import Table

STRING, INTEGER, NUMBER, BOOLEAN = ({"type": name} for name in ("string", "integer", "number", "boolean"))
WORD = {"type": "string", "pattern": "^[A-Za-z ]{1,12}$"}


def obj(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def array(items: Any, **bounds: int) -> dict[str, Any]:
    return {"type": "array", "items": items, **bounds}


# After the example in SGLang's README: a wizard, described by fixed keys.
CHARACTER = obj(
    name=WORD,
    house={"enum": ["Gryffindor", "Slytherin", "Ravenclaw", "Hufflepuff"]},
    blood_status={"enum": ["Pure-blood", "Half-blood", "Muggle-born"]},
    occupation={"enum": ["student", "teacher", "auror", "ministry of magic"]},
    wand=obj(wood=WORD, core=WORD, length_inches={"type": "integer", "minimum": 8, "maximum": 16}),
    alive={"enum": ["Alive", "Deceased"]},
    patronus=WORD,
)
ADDRESS = obj(street=STRING, city=STRING, zip={"type": "string", "pattern": r"^\d{5}(-\d{4})?$"}, country=STRING)
SCHEMAS: dict[str, dict[str, Any]] = {
    "character": CHARACTER,
    "sentiment": obj(sentiment={"enum": ["positive", "neutral", "negative"]}, confidence=NUMBER, reason=STRING),
    "weather tool": obj(
        name={"const": "get_weather"}, arguments=obj(location=STRING, unit={"enum": ["celsius", "fahrenheit"]})
    ),
    "one of three tools": {
        "anyOf": [
            obj(name={"const": name}, arguments=arguments)
            for name, arguments in (
                ("search", obj(query=STRING, limit=INTEGER)),
                ("read", obj(path=STRING)),
                ("write", obj(path=STRING, content=STRING, append=BOOLEAN)),
            )
        ]
    },
    "invoice": obj(
        number={"type": "string", "pattern": "^INV-[0-9]{6}$"},
        issued={"type": "string", "format": "date"},
        customer=obj(name=STRING, email={"type": "string", "format": "email"}, address=ADDRESS),
        lines=array(obj(text=STRING, quantity={"type": "integer", "minimum": 1}, price=NUMBER), minItems=1),
        paid=BOOLEAN,
    ),
    "entities": obj(
        entities=array(obj(text=STRING, label={"enum": ["PER", "ORG", "LOC", "MISC"]}, start=INTEGER), maxItems=50)
    ),
    "calendar event": obj(
        id={"type": "string", "format": "uuid"}, start={"type": "string", "format": "date-time"}, title=STRING,
        guests=array({"type": "string", "format": "email"}, maxItems=20), repeats={"anyOf": [{"type": "null"}, WORD]},
    ),
    "expression tree": {
        "$defs": {
            "node": {
                "anyOf": [NUMBER, obj(op={"enum": ["+", "-", "*", "/"]}, left={"$ref": "#/$defs/node"},
                                      right={"$ref": "#/$defs/node"})]
            }
        },
        "$ref": "#/$defs/node",
    },
    "country of 200": obj(country={"enum": [f"Country number {i}" for i in range(200)]}),
    "form of 40 fields": obj(**{f"field_{i}": (STRING, INTEGER, BOOLEAN, NUMBER)[i % 4] for i in range(40)}),
}  # fmt: skip
ANY_TEXT = r"(.|\n)*"


@dataclass(frozen=True, slots=True)
class Run:
    """Requests answered together."""

    num_tokens: int
    num_forced: int
    num_steps: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds


def fastest(runs: list[Run]) -> Run:
    return max(runs, key=lambda run: run.tokens_per_s)


class Server:
    def __init__(self, session: aiohttp.ClientSession, seed: int) -> None:
        self.session = session
        self.rng = random.Random(seed)

    async def info(self) -> dict[str, Any]:
        async with self.session.get("/get_server_info") as response:
            response.raise_for_status()
            return await response.json()

    async def generate(self, **sampling_params: Any) -> dict[str, Any]:
        """meta_info of one answer; no two prompts begin alike."""
        body = {
            "text": f"{self.rng.random()}. Describe a character of Harry Potter as JSON:\n",
            "sampling_params": {"temperature": 0.0, **sampling_params},
        }
        async with self.session.post("/generate", json=body) as response:
            answer = await response.json()
            if response.status != 200:
                raise SystemExit(f"HTTP {response.status}: {answer}")
            return answer["meta_info"]

    async def run(self, batch_size: int, **sampling_params: Any) -> Run:
        before = (await self.info())["internal_states"][0]["loop"]["num_steps"]
        start = time.perf_counter()
        metas = await asyncio.gather(*(self.generate(**sampling_params) for _ in range(batch_size)))
        seconds = time.perf_counter() - start
        num_steps = (await self.info())["internal_states"][0]["loop"]["num_steps"] - before
        num_tokens = sum(meta["completion_tokens"] for meta in metas)
        num_sampled = sum(meta["completion_tokens_wo_jump_forward"] for meta in metas)
        return Run(num_tokens, num_tokens - num_sampled, num_steps, seconds)

    async def compile_ms(self, schema: dict[str, Any]) -> float:
        """Return how long the server compiles a schema that it cannot have seen."""
        before = (await self.info())["internal_states"][0]["grammars"]["compile_s"]
        fresh = {**schema, "title": str(self.rng.random())}
        await self.generate(json_schema=json.dumps(fresh), max_new_tokens=1)
        return 1e3 * ((await self.info())["internal_states"][0]["grammars"]["compile_s"] - before)


async def bench(args: argparse.Namespace, console: Console) -> None:
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    timeout = aiohttp.ClientTimeout(total=args.timeout)
    url = f"http://{args.host}:{args.port}"
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, headers=headers, timeout=timeout, connector=connector) as session:
        server = Server(session, args.seed)
        info = await server.info()
        jumps = "off" if info["disable_jump_forward"] else "on"
        console.print(f"{info['model_path']} on {info['device']}, jump-forward {jumps}, {url}")
        constraint = {"json_schema": json.dumps(CHARACTER), "max_new_tokens": 400}
        for batch_size in args.batch_sizes:  # once unseen: compilation, kernels, graphs
            await server.run(batch_size, **constraint)

        table = Table("JSON, requests at once", "steps", "tokens", "of them forced", "tokens/s")
        for batch_size in args.batch_sizes:
            best = fastest([await server.run(batch_size, **constraint) for _ in range(args.rounds)])
            table.add_row(
                str(batch_size), str(best.num_steps), str(best.num_tokens), str(best.num_forced),
                f"{best.tokens_per_s:,.0f}",
            )  # fmt: skip
        console.print(table)

        length = {"max_new_tokens": args.tokens, "min_new_tokens": args.tokens}
        table = Table(f"{max(args.batch_sizes)} answers of {args.tokens} tokens", "tokens/s", "ms a step")
        runs: dict[str, list[Run]] = {"free": [], "constrained": []}
        for _ in range(args.rounds):  # in turns, so that what else the machine does falls on both
            runs["free"].append(await server.run(max(args.batch_sizes), **length))
            runs["constrained"].append(await server.run(max(args.batch_sizes), regex=ANY_TEXT, **length))
        for name, rounds in runs.items():
            best = fastest(rounds)
            table.add_row(name, f"{best.tokens_per_s:,.0f}", f"{1e3 * best.seconds / best.num_steps:.2f}")
        console.print(table)

        table = Table("schema", "compile, ms")
        for name, schema in SCHEMAS.items():
            table.add_row(name, f"{min([await server.compile_ms(schema) for _ in range(args.rounds)]):.1f}")
        console.print(table)


def main() -> None:
    description, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m bench.grammar", description=description, epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--api-key")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--tokens", type=int, default=128, help="of an answer, in the comparison with free ones")
    parser.add_argument("--rounds", type=int, default=3, help="of which the best counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds a request may take")
    try:
        uvloop.run(bench(parser.parse_args(), Console()))
    except aiohttp.ClientError as error:
        sys.exit(f"no server, or none that answers: {error}")


if __name__ == "__main__":
    main()
