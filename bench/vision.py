"""Measure what pictures cost: time to first token, a burst of pictures that repeat, the pace of streams beside them.

    python -m bench.vision --shape qwen2.5-vl-7b llava-1.5-7b
    python -m bench.vision --shape tiny --device cpu

The engine runs in this process, with random weights of the real shape; pictures are random pixels, decoded already.
"Again" is the same picture and text once more: neither tower nor prefix is computed. The burst is 64 requests at once
over 8 pictures. Gaps are between two tokens of 16 streams, alone and while others send a new picture every so often;
"lag" is how late the event loop is for what comes in between, looked at every 5 ms.
"""

import argparse
import asyncio
import hashlib
import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from bench.compare import wide_console
from engine.config import EngineConfig
from engine.local import LocalEngine
from engine.media import Image
from engine.request import Request, SamplingParams
from engine.state import Delta, RequestState
from server.__main__ import SWITCH_S
from server.watch.monitor import percentile

PLACEHOLDER = "<image>"
# Tokens of their own, with the ids 0, 1, ...
SPECIAL_TOKENS = ("<|end|>", PLACEHOLDER, "<video>", "<begin>", "<stop>")
TOKEN_IDS = {
    "image_token_id": 1, "image_token_index": 1, "video_token_id": 2, "vision_start_token_id": 3,
    "vision_end_token_id": 4,
}  # fmt: skip
SPACE = "\u0120"  # as tokenizers of bytes write it
NUM_WORDS = 100  # tokens of text behind a picture
LAG_TICK_S = 0.005
QWEN_TEXT = {
    "model_type": "qwen2_5_vl_text", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}  # fmt: skip
LLAMA_TEXT = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064, "max_position_embeddings": 4096,
}  # fmt: skip
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
CLIP_PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 336},
    "crop_size": {"height": 336, "width": 336},
}
QWEN_PROCESSOR = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "merge_size": 2}
# Name -> (config.json, preprocessor_config.json).
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2.5-vl-7b": (
        {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "text_config": QWEN_TEXT,
            "vision_config": {"hidden_size": 1280, "out_hidden_size": 3584, "depth": 32, "num_heads": 16,
                              "intermediate_size": 3420},
        },
        QWEN_PROCESSOR,
    ),
    "llava-1.5-7b": (
        {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "text_config": LLAMA_TEXT,
            "vision_config": {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
                              "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14},
        },
        CLIP_PROCESSOR,
    ),
    "tiny": (
        {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "text_config": LLAMA_TEXT | SMALL | {"num_key_value_heads": 4},
            "vision_config": SMALL | {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14},
        },
        CLIP_PROCESSOR,
    ),
}  # fmt: skip


def write_model(folder: Path, shape: str) -> None:
    """Write all of a model into `folder` but its weights. Each token has a text of its own, and so is seen to come."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    config, processor = SHAPES[shape]
    config = config | TOKEN_IDS | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    tokens = [*SPECIAL_TOKENS, SPACE, *sorted(filter(str.isascii, pre_tokenizers.ByteLevel.alphabet()))]
    tokens += [f"{SPACE}{i}" for i in range(len(tokens), config["text_config"]["vocab_size"])]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)


class Bench:
    """Ask one engine."""

    def __init__(self, engine: LocalEngine, side: int) -> None:
        """side: pixels of a picture, either way."""
        self.engine, self.side = engine, side
        self._numbers = itertools.count()
        self._random = np.random.default_rng(0)

    def picture(self) -> Image:
        pixels = self._random.integers(0, 256, (self.side, self.side, 3), np.uint8)
        return Image(pixels, hashlib.sha256(pixels.tobytes()).digest())

    async def ask(self, picture: Image | None, num_new_tokens: int) -> list[float]:
        """Return when tokens came, one or several at once, behind when they were asked for: time.perf_counter()."""
        times = [time.perf_counter()]
        done = asyncio.Event()

        def sink(delta: Delta) -> None:
            if delta.finish_reason is not None and delta.finish_reason.type == "abort":
                raise SystemExit(delta.finish_reason.message)
            times.append(time.perf_counter())
            if delta.finish_reason is not None:
                done.set()

        text = " " * NUM_WORDS
        if picture is None:
            ids, media = [random.randrange(len(SPECIAL_TOKENS), 5000) for _ in range(NUM_WORDS)], None
        else:
            ids, media = await self.engine.encode_media(PLACEHOLDER + text, [picture])
        params = SamplingParams(max_new_tokens=num_new_tokens, temperature=0.0, ignore_eos=True)
        request = Request(f"bench-{next(self._numbers)}", ids, params, stream=True, media=media)
        self.engine.submit(RequestState(request, sink))
        await done.wait()
        return times

    async def first_token_ms(self, num_rounds: int) -> tuple[list[float], list[float]]:
        """Return ms to the first token, of a picture for the first time and again, of each round."""
        first: list[float] = []
        again: list[float] = []
        for _ in range(num_rounds):
            picture = self.picture()
            for found in (first, again):
                times = await self.ask(picture, 2)
                found.append(1e3 * (times[1] - times[0]))
        return first, again

    async def burst_s(self, num_requests: int, num_pictures: int) -> float:
        """Return the seconds that so many requests at once take, of 16 tokens each."""
        pictures = [self.picture() for _ in range(num_pictures)]
        start = time.perf_counter()
        await asyncio.gather(*(self.ask(pictures[i % num_pictures], 16) for i in range(num_requests)))
        return time.perf_counter() - start

    async def pace(self, num_streams: int, num_tokens: int, every_s: float | None) -> tuple[list[float], list[float]]:
        """Return the streams' gaps and the loop's lags in ms. every_s: seconds between pictures; None: none come."""
        streams = asyncio.gather(*(self.ask(None, num_tokens) for _ in range(num_streams)))
        lags: list[float] = []
        others: list[asyncio.Task[list[float]]] = []
        pictures = [] if every_s is None else [self.picture() for _ in range(32)]
        next_at = time.perf_counter()
        while not streams.done():
            due = time.perf_counter() + LAG_TICK_S
            await asyncio.sleep(LAG_TICK_S)
            lags.append(1e3 * max(time.perf_counter() - due, 0.0))
            if every_s is not None and pictures and time.perf_counter() >= next_at:
                others.append(asyncio.create_task(self.ask(pictures.pop(), 4)))
                next_at += every_s
        gaps = [1e3 * (b - a) for times in await streams for a, b in itertools.pairwise(times[1:])]
        await asyncio.gather(*others)
        return gaps, lags


COLUMNS = (
    "model", "tokens a picture", "first token, ms", "again, ms", "burst, requests/s", "gap alone: p50 / p99, ms",
    "beside pictures: p50 / p99, ms", "loop lag: p50 / p99, ms",
)  # fmt: skip


def shown(values: Sequence[float], *shares: float) -> str:
    return " / ".join(f"{percentile(sorted(values), share) or 0.0:.1f}" for share in shares)


async def measure(shape: str, args: argparse.Namespace) -> list[str]:
    """Return what the table says of a shape."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), shape)
        options = {} if args.device is None else {"device": args.device}
        config = EngineConfig(model_path=folder, load_format="dummy", random_seed=0, disable_canary=True, **options)
        async with LocalEngine(config) as engine:
            bench = Bench(engine, args.side)
            await bench.first_token_ms(1)  # kernels are loaded
            [num_tokens] = engine.count_media_tokens([bench.picture().size])
            first, again = await bench.first_token_ms(args.rounds)
            burst = await bench.burst_s(64, 8)
            alone, _ = await bench.pace(16, args.tokens, None)
            beside, lags = await bench.pace(16, args.tokens, args.every)
            return [
                shape, str(num_tokens), shown(first, 0.5), shown(again, 0.5), f"{64 / burst:.1f}",
                shown(alone, 0.5, 0.99), shown(beside, 0.5, 0.99), shown(lags, 0.5, 0.99),
            ]  # fmt: skip


def measured(shape: str, args: argparse.Namespace) -> list[str]:
    """Do `measure` in a process of its own, whose memory is free afterwards."""
    sys.setswitchinterval(SWITCH_S)  # as the server
    return asyncio.run(measure(shape, args))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bench.vision", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--shape", nargs="+", default=["qwen2.5-vl-7b", "llava-1.5-7b"], choices=list(SHAPES), help="models")
    add("--device", help="cuda or cpu; default: cuda where there is one")
    add("--side", type=int, default=1000, help="pixels of a picture, either way")
    add("--rounds", type=int, default=5, help="pictures whose first tokens are timed")
    add("--tokens", type=int, default=512, help="of each stream")
    add("--every", type=float, default=0.1, help="seconds between pictures beside the streams")
    args = parser.parse_args()
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        for shape in args.shape:  # a table of each: what was measured is seen, whatever comes of the next
            table = Table(*COLUMNS, box=box.SIMPLE)
            table.add_row(*processes.submit(measured, shape, args).result())
            wide_console().print(table)


if __name__ == "__main__":
    main()
