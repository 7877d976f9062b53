"""Run the client libraries that people use against a server, and show which of them work.

    python -m bench.clients --port 30000 --npm ~/clients

Each is asked for a streamed chat, a call of a tool whose result is then sent back, an answer of a given form, and
embeddings where it has them. Nothing is installed: a library that is not there is reported as that. The Vercel AI SDK
needs node, and `ai`, `@ai-sdk/openai-compatible` and `zod` in the folder that `--npm` names. Calls of tools are forced
wherever a client can force them, so that a tiny model will do. Exits with 1 if anything has failed.
"""

import argparse
import asyncio
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import aiohttp
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.client_checks import CLIENTS, Client, Server

CHECKS = ("chat", "tools", "structured", "embeddings")
VERCEL = Path(__file__).with_suffix(".mjs")
VERCEL_PACKAGES = ("ai", "@ai-sdk/openai-compatible", "zod")


@dataclass(slots=True)
class Result:
    """The outcome of one client. A check that the client has no part in is neither."""

    name: str
    version: str  # empty: it is not installed
    passed: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)  # why, by check


def run_client(name: str, package: str, make: type[Client], server: Server) -> Result:
    try:
        result = Result(name, version(package))
    except PackageNotFoundError:
        return Result(name, "")
    # Whatever a library raises is its check's failure, and no other's.
    with ThreadPoolExecutor(1) as threads:
        making = threads.submit(make, server)
        if error := making.exception():
            result.failures = {"start": reason_of(error)}
            return result
        for check in CHECKS:
            ask: Callable[[], None] | None = getattr(making.result(), check, None)
            if ask is None:
                continue
            if error := threads.submit(ask).exception():
                result.failures[check] = reason_of(error)
            else:
                result.passed.append(check)
    return result


def reason_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:500]}"


def run_vercel(folder: str, server: Server) -> Result:
    """Run the SDK in node. What it prints is a line of JSON for each check: its name, and why it failed."""
    name = "Vercel AI SDK"
    manifests = [Path(folder, "node_modules", package, "package.json") for package in VERCEL_PACKAGES]
    if not folder or not shutil.which("node") or not all(manifest.exists() for manifest in manifests):
        return Result(name, "")
    result = Result(name, json.loads(manifests[0].read_text())["version"])
    # Read from stdin, the script finds the packages of the folder it is run in.
    command = ["node", "--input-type=module", "-", server.v1, server.model, server.key]
    with VERCEL.open() as script:
        done = subprocess.run(command, cwd=folder, stdin=script, capture_output=True, text=True)
    for line in filter(None, done.stdout.splitlines()):
        check, error = json.loads(line)
        if error is None:
            result.passed.append(check)
        else:
            result.failures[check] = error
    if done.returncode or not result.passed:
        result.failures.setdefault("start", done.stderr[-500:])
    return result


def show(results: Iterable[Result], console: Console) -> int:
    """Print the table, then why what failed has failed. Return the exit status."""
    table = Table("client", "version", *CHECKS)
    results = list(results)
    for result in results:
        cells = ["passed" if check in result.passed else "-" for check in CHECKS]
        for check in result.failures:
            if check in CHECKS:
                cells[CHECKS.index(check)] = "[red]failed[/]"
        table.add_row(result.name, result.version or "not installed", *cells)
    console.print(table)
    failures = [(result.name, *failure) for result in results for failure in result.failures.items()]
    for name, check, reason in failures:
        console.print(f"{name}: {check}: {escape(reason)}", highlight=False)
    return 1 if failures else 0


async def find_model(url: str, key: str) -> str:
    headers = {"Authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(raise_for_status=True) as http, http.get(url + "/v1/models", headers=headers) as r:
        return (await r.json())["data"][0]["id"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", help="default: http://127.0.0.1:PORT")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--npm", default="", help="folder whose node_modules holds the Vercel AI SDK")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the names of those to run")
    args = parser.parse_args(argv)
    url = (args.base_url or f"http://127.0.0.1:{args.port}").rstrip("/")
    try:
        server = Server(url, asyncio.run(find_model(url, args.api_key)), args.api_key)
    except aiohttp.ClientError as error:
        print(f"{url}: {error}", file=sys.stderr)
        return 1
    logging.disable(logging.WARNING)  # libraries' own

    def is_meant(name: str) -> bool:
        return any(part.lower() in name.lower() for part in args.only)

    results = [run_client(*client, server) for client in CLIENTS if is_meant(client[0])]
    if is_meant("Vercel AI SDK"):
        results.append(run_vercel(args.npm, server))
    return show(results, Console())


if __name__ == "__main__":
    sys.exit(main())
