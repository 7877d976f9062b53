"""Several GPUs at work on one model: sums over ranks by size, ours beside NCCL's, then decode steps of 1 and N ranks.

    python -m bench.parallel --tp 2 --model-path MODEL --load-format dummy
    python -m bench.parallel --tp 2 --only sums

Sums are timed inside a CUDA graph of 50, as decode steps hold them. Unknown flags go to `bench.offline`, which
measures the steps. Over HTTP: `python -m bench.gpu --only speed --models llama3-8b --server-args "--tp 2"`.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch.distributed import TCPStore

from engine.layers.communicator import Communicator
from engine.ranks.children import Children, Parent
from engine.ranks.leader import LOCALHOST, join_store

SIZES = tuple(1 << exponent for exponent in range(12, 25, 2))  # bytes
NUM_SUMS, NUM_REPLAYS = 50, 10


def seconds_of(add: Callable[[torch.Tensor], object], x: torch.Tensor) -> float:
    """Return the seconds that one sum takes on the device; the fastest of several looks at many."""

    def run() -> None:
        for _ in range(NUM_SUMS):
            add(x)

    if not x.is_cuda:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) / NUM_SUMS
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        add(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            run()
        graph.replay()
        best = float("inf")
        for _ in range(NUM_REPLAYS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            best = min(best, begin.elapsed_time(end) / 1e3 / NUM_SUMS)
    return best


def measure_sums(parent: Parent, rank: int, size: int, port: int, device_type: str) -> None:
    """Do a rank's part; report as "ready" how sums are done and each of SIZES' seconds (ours, the library's)."""
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    comm = Communicator(rank, size)
    comm.connect(join_store(LOCALHOST, port), device)
    comm.self_test(timeout_s=60)
    rows = []
    for num_bytes in SIZES:
        x = torch.ones(num_bytes // 2, dtype=torch.bfloat16, device=device)
        total = comm.all_reduce(x.clone())
        if not bool((total == size).all()):
            raise ValueError(f"a sum of {num_bytes} bytes is wrong: {total.unique().tolist()} instead of {size}")
        x.zero_()  # sums in place must not overflow
        rows.append((seconds_of(comm.all_reduce, x), seconds_of(torch.distributed.all_reduce, x)))
    parent.tell("ready", (comm.describe(), rows))
    comm.close()


def print_sums(size: int, device_type: str, console: Console) -> None:
    store = TCPStore(LOCALHOST, 0, is_master=True, wait_for_workers=False)
    children = Children(console.print)
    for rank in range(size):
        children.spawn(f"rank {rank}", measure_sums, rank, size, store.port, device_type)
    children.watch()
    how, rows = children.wait_ready()[0]
    children.close()
    table = Table("bytes", "ours µs", "library µs", "ours GB/s", title=f"sums over {size} ranks: {how}")
    for num_bytes, (ours, library) in zip(SIZES, rows, strict=True):
        table.add_row(f"{num_bytes:,}", f"{ours * 1e6:.1f}", f"{library * 1e6:.1f}", f"{num_bytes / ours / 1e9:.1f}")
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", choices=("sums", "steps"))
    parser.add_argument("--batch", nargs="+", default=["1", "8", "64", "256"])
    args, engine_flags = parser.parse_known_args()
    console = Console()
    if args.only != "steps":
        print_sums(args.tp, args.device, console)
    if args.only == "sums":
        return 0
    status = 0
    for size in (1, args.tp):
        console.print(f"{size} rank(s)", style="bold")
        command = [sys.executable, "-m", "bench.offline", "--device", args.device, "--tp", str(size), "--batch"]
        status |= subprocess.run([*command, *args.batch, *engine_flags], check=False).returncode
    return status


if __name__ == "__main__":
    sys.exit(main())
