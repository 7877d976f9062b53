"""Helpers around programs, under the names that scripts know from `sglang.utils`."""

import json
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

POLL_S = 0.5


def wait_for_server(base_url: str, timeout: float | None = None) -> None:
    """Return once the server at `base_url` answers. `TimeoutError` after `timeout` seconds; None: no limit."""
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        try:
            with urllib.request.urlopen(f"{base_url.rstrip('/')}/health", timeout=5):
                return
        except OSError:  # a URLError is one
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"no server answers at {base_url} within {timeout:g} s") from None
            time.sleep(POLL_S)


def terminate_process(process: "subprocess.Popen[Any]", timeout: float = 60.0) -> None:
    """End a server that was started as a child process: ask it to, and kill it after `timeout` seconds."""
    process.terminate()
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def read_jsonl(filename: str) -> Iterator[Any]:
    """Yield the values of a file of JSON lines; lines that are empty or begin with # are skipped."""
    with open(filename, encoding="utf-8") as file:
        for line in file:
            if line.strip() and not line.startswith("#"):
                yield json.loads(line)


def dump_state_text(filename: str, states: Iterable[Any], mode: str = "w") -> None:
    """Write the texts of program states, or strings, one after another under a heading each."""
    texts = [state if isinstance(state, str) else state.text() for state in states]
    with Path(filename).open(mode, encoding="utf-8") as file:
        file.writelines(f"{'=' * 40} {i} {'=' * 40}\n{text}\n\n" for i, text in enumerate(texts))


def print_highlight(content: object) -> None:
    """Print in bold."""
    print(f"\033[1m{content}\033[0m")
