"""Count the functions, files and lines of this project that one streamed chat enters, on a random model of two layers.

    python -m tests.hot_path [--functions]

Three counts, after a first chat that is not counted: of a whole request, on the event loop; of a token in the middle of
it, on the event loop; and of the forward of such a step, on the thread that computes it. A GPU replays a CUDA graph
instead of that forward. Lines are those with code in them, of the functions entered.
"""

import argparse
import asyncio
import sys
import threading
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from types import CodeType, FrameType
from typing import Any

from aiohttp.test_utils import TestClient, TestServer

from tests.conftest import VOCAB_SIZE, save_tokenizer
from tests.structure import PACKAGES

ROOT = Path(__file__).parent.parent
NUM_TOKENS = 128
WHOLE = range(sys.maxsize)  # events of an answer
STEADY = range(32, 96)  # those that stand for all: the first and the last take more
BODY = {
    "model": "tiny", "messages": [{"role": "user", "content": "Once upon a time"}],
    "stream": True, "temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True,
}  # fmt: skip


def save_model(folder: Path) -> None:
    """Write a random Llama of two layers with a tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    save_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


class Calls:
    """Records what is called of this project's packages, on the event loop's thread and on others."""

    def __init__(self) -> None:
        self.is_on = False
        self.on_loop: Counter[CodeType] = Counter()
        self.elsewhere: Counter[CodeType] = Counter()
        self._loop_thread = threading.get_ident()
        self._folders = tuple(f"{ROOT / package}/" for package in PACKAGES)

    def __call__(self, frame: FrameType, event: str, _argument: Any) -> None:
        """Record a call; a profile function of `sys.setprofile`. A coroutine that goes on is called again."""
        code = frame.f_code
        if self.is_on and event == "call" and code.co_filename.startswith(self._folders):
            (self.on_loop if threading.get_ident() == self._loop_thread else self.elsewhere)[code] += 1

    def forget(self) -> None:
        self.on_loop.clear()
        self.elsewhere.clear()


def summary(title: str, calls: Counter[CodeType], num_tokens: int) -> str:
    """Return one line: how many functions, in how many files, of how many lines, and calls a token."""
    named = {code for code in calls if not code.co_name.startswith("<")}  # a comprehension is part of its function
    lines = {(code.co_filename, line) for code in calls for *_, line in code.co_lines() if line}
    files = {code.co_filename for code in calls}
    a_token = sum(calls.values()) / num_tokens
    return f"{title}: {len(named)} functions, {len(files)} files, {len(lines)} lines; {a_token:.1f} calls a token"


def listing(calls: Counter[CodeType]) -> str:
    names = sorted((str(Path(code.co_filename).relative_to(ROOT)), code.co_qualname, n) for code, n in calls.items())
    return "\n".join(f"  {n:5} {file} {name}" for file, name, n in names)


async def measure(folder: Path, calls: Calls, with_functions: bool) -> None:
    """Serve the model, stream chats from it, print the counts."""
    from engine.new_engine import new_engine
    from server.app import build_app
    from server.config import ServerConfig

    config = ServerConfig(
        model_path=str(folder), dtype="float32", device="cpu", served_model_name=["tiny"], max_total_tokens=4096
    )
    async with new_engine(config) as engine, TestClient(TestServer(build_app(engine, config))) as client:

        def num_generated() -> int:
            return engine.stats().loop.num_generated_tokens

        async def chat(record: range = range(0)) -> int:
            """Stream a chat and record from one event of it to another; return the tokens generated in between."""
            num_events, before, after = 0, num_generated(), 0
            calls.is_on = record.start == 0 < record.stop
            async with client.post("/v1/chat/completions", json=BODY) as response:
                assert response.status == 200, await response.text()
                async for line in response.content:
                    num_events += line.startswith(b"data: ")
                    if line.startswith(b"data: ") and num_events in (record.start, record.stop):
                        calls.is_on = False
                        before, after = (
                            (num_generated(), after) if num_events == record.start else (before, num_generated())
                        )
                        calls.is_on = num_events == record.start
            calls.is_on = False
            return (after or num_generated()) - before

        await chat()
        num_tokens = await chat(WHOLE)
        print(summary("a request, event loop", calls.on_loop, num_tokens))
        calls.forget()
        num_tokens = await chat(STEADY)
        print(summary("a token, event loop", calls.on_loop, num_tokens))
        print(summary("its forward, a thread", calls.elsewhere, num_tokens))
        if with_functions:
            print(listing(calls.on_loop))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--functions", action="store_true", help="list what a token enters on the event loop")
    args = parser.parse_args()
    calls = Calls()
    threading.setprofile(calls)  # for threads that start from now on
    with TemporaryDirectory() as folder:
        save_model(Path(folder))
        sys.setprofile(calls)
        try:
            asyncio.run(measure(Path(folder), calls, args.functions))
        finally:
            sys.setprofile(None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
