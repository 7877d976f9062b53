"""Measure the cost of turning tokens into text, for one stream and for many.

    python -m bench.detokenize [--tokenizer FOLDER]

CPU time of this thread, tokens pushed one at a time as a decode step brings them, pieces already in the table.
Without a folder: a byte-level tokenizer of 256 bytes and the words of this text. The budget of the design: 256 streams
at 215 steps a second are 55,000 pushes, so 1 µs a push is 5.5% of a core.
"""

import argparse
import time
from pathlib import Path

import tokenizers
from rich.console import Console
from rich.table import Table
from tokenizers import decoders, models, pre_tokenizers

from engine.request import SamplingParams
from engine.text.tokenizer import FastBackend, Tokenizer

TEXTS = {
    "English": "The quick brown fox jumps over the lazy dog, while seven wise wizards count to twelve. ",
    "emoji, CJK": "日本語のテキスト、你好世界 🙂🚀 ",
}
STOPS = {
    "no stops": SamplingParams(),
    "4 stop strings": SamplingParams(stop=["\n\nUser:", "Observation:", "<|im_end|>", "###"]),
    "a stop regex": SamplingParams(stop_regex=[r"Answer: \d+"]),
}
NUM_STREAMS = (1, 256)
SECONDS_PER_STEP = 1 / 215


def small_tokenizer() -> Tokenizer:
    """Words of the English text are one token each; everything else is bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([" " + word for word in TEXTS["English"].split()])
    return Tokenizer(FastBackend(tokenizer))


def seconds_per_push(
    tokenizer: Tokenizer, text: str, params: SamplingParams, num_streams: int, num_steps: int
) -> float:
    """Least of five runs."""
    ids = tokenizer.encode(text * 20, add_special_tokens=False)
    pushes = [(token_id,) for token_id in ids]
    least = float("inf")
    for _ in range(5):
        streams = [tokenizer.text_stream(params, ids) for _ in range(num_streams)]
        started = time.thread_time()
        for step in range(num_steps):
            for i, stream in enumerate(streams):
                stream.push(pushes[(step + i) % len(pushes)])
        least = min(least, time.thread_time() - started)
    return least / (num_steps * num_streams)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="model folder")
    parser.add_argument("--num-pushes", type=int, default=100_000)
    args = parser.parse_args()
    tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else small_tokenizer()

    table = Table(title=f"detokenize: {tokenizer.vocab_size:,} tokens in the vocabulary")
    table.add_column("text")
    table.add_column("stops")
    for num_streams in NUM_STREAMS:
        table.add_column(
            f"µs a token\n{num_streams} streams" if num_streams > 1 else "µs a token\n1 stream", justify="right"
        )
    table.add_column(f"of a {SECONDS_PER_STEP * 1e3:.2f} ms step\n{NUM_STREAMS[-1]} streams", justify="right")
    for name, text in TEXTS.items():
        for stops, params in STOPS.items():
            seconds = [seconds_per_push(tokenizer, text, params, n, args.num_pushes // n) for n in NUM_STREAMS]
            share = seconds[-1] * NUM_STREAMS[-1] / SECONDS_PER_STEP
            table.add_row(name, stops, *(f"{s * 1e6:.2f}" for s in seconds), f"{share:.1%}")
    Console().print(table)


if __name__ == "__main__":
    main()
