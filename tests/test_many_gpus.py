"""What `bench.many_gpus` measures on a host of so many GPUs, without any."""

import argparse
import io

import pytest
from rich.console import Console

from bench.compare import WORKLOADS
from bench.many_gpus import PARTS, SERVERS, Measurement, argument_parser, choose, run_all
from bench.many_gpus import WORKLOADS as CHOSEN_WORKLOADS
from bench.shapes import SHAPES
from server.command_line import parse_args


def asked(*words: str) -> argparse.Namespace:
    return argument_parser().parse_args([*words, "--cache-dir", "/nowhere"])


@pytest.mark.parametrize("num_gpus", [1, 2, 4, 8])
def test_only_what_needs_more_gpus_is_left_out(num_gpus: int) -> None:
    chosen, beyond = choose(asked(), num_gpus)
    assert all(one.num_gpus <= num_gpus for one in chosen) and all(one.num_gpus > num_gpus for one in beyond)
    assert (not chosen, not beyond) == (num_gpus == 1, num_gpus == 8)
    parts = [PARTS.index(one.part) for one in chosen]
    assert parts == sorted(parts)  # what tells whether the rest means anything comes first
    assert len({one.name for one in chosen + beyond}) == len(chosen + beyond)


def test_every_server_that_many_gpus_start_has_flags_that_exist() -> None:
    for server in SERVERS:
        config = parse_args(["--model-path", server.model, *server.flags.split()])
        assert (config.tp_size, config.dp_size) == (server.tp, server.dp) and server.model in SHAPES
    assert set(CHOSEN_WORKLOADS) <= set(WORKLOADS)


def test_what_many_gpus_have_no_time_for_is_named() -> None:
    now, limits = 0.0, []
    codes: dict[str, int | None] = {"a": 0, "b": None, "c": 3}
    all_of_them = [Measurement(name, "sums", 2, [name], 200.0) for name in "abcd"]

    def run(command: list[str], limit_s: float) -> int | None:
        nonlocal now
        now += 190
        limits.append(limit_s)
        return codes[command[0]]

    console = Console(file=io.StringIO())
    outcomes, not_begun = run_all(all_of_them, 580.0, console, run=run, clock=lambda: now)
    assert outcomes == {"a": "ended after 190 s", "b": "TIMED OUT after 190 s", "c": "FAILED (3) after 190 s"}
    assert not_begun == ["d"] and limits == [200.0, 200.0, 200.0]
    limits.clear()
    run_all(all_of_them[:1], 100.0, console, run=run, clock=lambda: now)
    assert limits == [100.0]
