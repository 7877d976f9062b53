"""Measure what a balancing policy gains: the real policies before simulated engines.

    python -m bench.balance [--engines 2]

Engines are as fast as Llama-3-8B on an H100: a step takes 6 ms, 24 µs a prompt token, 25 µs an answer, and 0.5 ms a
shared prefix of its answers. An engine keeps every prefix it has seen; requests run when they come.
"""

import argparse
import heapq
import itertools
import random
from collections import deque
from dataclasses import dataclass, field

import numpy as np
from rich.table import Table

from bench.compare import wide_console
from engine.replicas.balance import Balancer, Placement

STEP_S, TOKEN_S, ANSWER_S, GROUP_S = 6e-3, 1 / 42_000, 25e-6, 0.5e-3
CHUNK = 8192  # prompt tokens a step
ARRIVAL_S = 1.2e-3  # between two requests of a burst: what the front end takes for one
TOKEN_BYTES = 4
QUESTION_LEN, ANSWER_LEN = 128, 64
POLICIES = ("round_robin", "shortest_queue", "cache_aware")


@dataclass(frozen=True, slots=True)
class Workload:
    name: str
    num_prefixes: int
    prefix_len: int
    num_requests: int = 512
    request_rate: float | None = None  # requests/s, Poisson; None: all at once

    def draw(self, seed: int) -> "list[SimulatedRequest]":
        rng, now = random.Random(seed), 0.0
        prefixes = [rng.randbytes(self.prefix_len * TOKEN_BYTES) for _ in range(self.num_prefixes)]
        requests = []
        for _ in range(self.num_requests):
            group = rng.randrange(self.num_prefixes)
            prompt = prefixes[group] + rng.randbytes(QUESTION_LEN * TOKEN_BYTES)
            requests.append(SimulatedRequest(now, group, self.prefix_len, prompt))
            now += ARRIVAL_S if self.request_rate is None else rng.expovariate(self.request_rate)
        return requests


WORKLOADS = (
    Workload("burst, 8 prefixes of 4,096", 8, 4096),
    Workload("burst, 3 prefixes of 4,096", 3, 4096),
    Workload("burst, 1 prefix of 4,096", 1, 4096),
    Workload("burst, 64 prefixes of 4,096", 64, 4096),
    Workload("60/s, 64 prefixes of 2,048", 64, 2048, request_rate=60.0),
)


@dataclass(slots=True, eq=False)
class SimulatedRequest:
    arrived: float
    group: int
    prefix_len: int
    prompt: bytes
    placement: Placement = field(init=False)
    num_missing: int = 0  # prompt tokens to compute
    num_generated: int = 0
    first_token: float = 0.0
    finished: float = 0.0


@dataclass(slots=True)
class SimulatedEngine:
    waiting: deque[SimulatedRequest] = field(default_factory=deque)
    running: list[SimulatedRequest] = field(default_factory=list)
    known: set[int] = field(default_factory=set)
    num_computed: int = 0  # prompt tokens
    is_busy: bool = False

    def step(self) -> tuple[float, list[SimulatedRequest]]:
        """(how long it takes, whom it brings a token)."""
        num_groups = len({request.group for request in self.running})
        seconds = STEP_S + len(self.running) * ANSWER_S + num_groups * GROUP_S
        budget = CHUNK - len(self.running)
        while self.waiting and budget:
            request = self.waiting[0]
            if not request.num_missing:
                request.num_missing = QUESTION_LEN + (0 if request.group in self.known else request.prefix_len)
                self.known.add(request.group)
            count = min(budget, request.num_missing)
            budget -= count
            seconds += count * TOKEN_S
            self.num_computed += count
            request.num_missing -= count
            if request.num_missing:
                break
            self.running.append(self.waiting.popleft())
        return seconds, list(self.running)


def simulate(method: str, requests: list[SimulatedRequest], num_engines: int) -> list[SimulatedEngine]:
    """Plays `requests` to their ends. Events are arrivals of requests and ends of steps, in the order of time."""
    balancer = Balancer(method, num_engines)
    engines = [SimulatedEngine() for _ in range(num_engines)]
    order = itertools.count()
    events: list[tuple[float, int, SimulatedRequest | None, int, list[SimulatedRequest]]] = [
        (request.arrived, next(order), request, -1, []) for request in requests
    ]

    while events:
        now, _, request, i, batch = heapq.heappop(events)
        if request is not None:
            request.placement = balancer.pick(request.prompt)
            i = request.placement.engine
            engines[i].waiting.append(request)
            if engines[i].is_busy:
                continue
        for one in batch:
            one.num_generated += 1
            one.first_token = one.first_token or now
            if one.num_generated == ANSWER_LEN:
                one.finished = now
                engines[i].running.remove(one)
                balancer.end(one.placement)
        engines[i].is_busy = bool(engines[i].waiting or engines[i].running)
        if engines[i].is_busy:
            seconds, batch = engines[i].step()
            heapq.heappush(events, (now + seconds, next(order), None, i, batch))
    return engines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3, help="the worst of so many draws is shown, too")
    args = parser.parse_args()
    table = Table("workload", "policy", "requests/s", "the least", "TTFT, ms", "prompt tokens computed")
    for workload in WORKLOADS:
        for method in POLICIES:
            rates, first_tokens, computed = [], [], []
            for seed in range(args.seeds):
                requests = workload.draw(seed)
                engines = simulate(method, requests, args.engines)
                rates.append(len(requests) / max(request.finished for request in requests))
                first_tokens += [request.first_token - request.arrived for request in requests]
                computed.append(sum(engine.num_computed for engine in engines))
            figures = (np.mean(rates), min(rates), 1e3 * np.mean(first_tokens), np.mean(computed))
            table.add_row(workload.name, method, *(f"{figure:,.0f}" for figure in figures))
        table.add_section()
    wide_console().print(table)


if __name__ == "__main__":
    main()
