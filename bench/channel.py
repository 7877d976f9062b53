"""Measure the microseconds from a plan's being written into the shared ring to its being read by every rank.

    python -m bench.channel [--num-bytes 10240] [--interval-ms 3]

A message goes out every few milliseconds, as steps do, so that readers sleep in between: the wake-up is what counts.
"""

import argparse
import multiprocessing
import time
from multiprocessing.connection import Connection

import numpy as np

from engine.ranks.channel import ChannelReader, open_channel

NUM_READERS = (1, 2, 4, 8)


def read(reader: ChannelReader, pipe: Connection) -> None:
    """Tells the delay of each message in ns; its first 8 bytes are when it was written."""
    pipe.send("ready")
    delays: list[int] = []
    while True:
        try:
            message = reader.receive()
        except EOFError:
            pipe.send(np.array(delays))
            return
        # Linux's monotonic clock is the same in all processes.
        delays.append(time.perf_counter_ns() - int.from_bytes(message[:8], "little"))


def measure(num_readers: int, num_bytes: int, num_messages: int, interval_s: float) -> tuple[np.ndarray, np.ndarray]:
    """(µs until the last reader has it, µs of writing), for each message."""
    context = multiprocessing.get_context("spawn")
    writer, readers = open_channel(num_readers)
    pipes = []
    processes = []
    for reader in readers:
        ours, theirs = context.Pipe()
        process = context.Process(target=read, args=(reader, theirs))
        process.start()
        reader.close()
        pipes.append(ours)
        processes.append(process)
    for pipe in pipes:
        pipe.recv()
    body, writing = bytes(num_bytes), []
    for _ in range(num_messages):
        time.sleep(interval_s)
        start = time.perf_counter_ns()
        writer.send(start.to_bytes(8, "little"), body)
        writing.append(time.perf_counter_ns() - start)
    writer.close()
    delays = np.stack([pipe.recv() for pipe in pipes])
    for process in processes:
        process.join()
    return delays.max(axis=0) / 1e3, np.array(writing) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-bytes", type=int, default=10240, help="a decode step of 256 requests has about 10 KB")
    parser.add_argument("--num-messages", type=int, default=1000)
    parser.add_argument("--interval-ms", type=float, default=3.0)
    args = parser.parse_args()
    print(f"{args.num_bytes} bytes every {args.interval_ms:g} ms, µs")
    print(f"{'readers':>8} {'written p50':>12} {'read p50':>10} {'read p99':>10}")
    for num_readers in NUM_READERS:
        delays, writing = measure(num_readers, args.num_bytes, args.num_messages, args.interval_ms / 1e3)
        p50, p99 = np.percentile(delays, (50, 99))
        print(f"{num_readers:8} {np.median(writing):12.1f} {p50:10.1f} {p99:10.1f}", flush=True)


if __name__ == "__main__":
    main()
