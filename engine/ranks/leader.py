"""The ranks of a tensor-parallel model: rank 0 lives in this process, the others get each step through a ring.

What travels is the step as it is staged for the device, so a follower copies it on and enqueues the same work. Only
rank 0 samples; a step's tokens reach the other devices by a collective that belongs to the step.
"""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from engine.checkpoint.folder import resolve_model
from engine.config import EngineConfig
from engine.errors import EngineStopped, ModelError
from engine.rank_maintenance import RankMaintenance, reason_of
from engine.ranks.channel import ChannelReader, Payload, open_channel
from engine.ranks.children import Children, Parent, StoppedChildren
from engine.ranks.meeting import Waiting, names
from engine.ranks.nodes import NodeLink, NodeLinks, open_store
from engine.step.batch import plan_of
from engine.step.fields import StepShape
from engine.step.logprobs import PromptLogprobWork
from engine.step.model_runner import ModelRunner, Step
from engine.step.sampler import SamplingWork

LOCALHOST = "127.0.0.1"
PREFIX, STEP, ORDER = range(3)  # kinds of message: int32 arrays that begin with theirs
ANSWER_KEY = "radixloop/order{}/rank{}"  # in the store: what has become of an order; empty: all is well
ARRIVAL_KEY = "radixloop/here/rank{}"  # in the store: the rank has come so far
ANSWER_POLL_S = 0.01

RunRank = Callable[[Parent, EngineConfig, Path, int, str, int, ChannelReader], None]


class StepHeader(NamedTuple):
    """Say of a step what its fields do not; travels as int32 numbers, in this order."""

    shape: StepShape
    is_graph: bool
    num_samples: int  # without the shape's padding
    is_plain: bool  # the most likely tokens are wanted, and every rank finds them
    num_prompts: int  # chunks whose tokens' log-probabilities are wanted: (first token, count) each

    def to_message(self) -> np.ndarray:
        """Return the numbers that a message begins with: int32, the kind first."""
        return np.array([STEP, *self.shape, *self[1:]], np.int32)

    @classmethod
    def from_message(cls, message: np.ndarray) -> tuple["StepHeader", np.ndarray]:
        """Return the header of a message of kind STEP, and what follows it."""
        num_sizes = len(StepShape._fields)
        end = num_sizes + len(cls._fields)
        numbers = message[1:end].tolist()
        return cls(StepShape._make(numbers[:num_sizes]), *numbers[num_sizes:]), message[end:]


class Ranks:
    """Run the ranks of this host but rank 0 as processes; on the first host, also reach other hosts' ranks."""

    def __init__(self, config: EngineConfig, folder: Path, run: RunRank, on_failure: Callable[[str], object]) -> None:
        """Start the other ranks.

        run: what a rank does, given its parent, the configuration, the model's folder, its rank, host and port of the
        `store` where ranks meet, and where steps come from. on_failure: see `Children`.
        """
        if config.nnodes > 1:
            self.store = open_store(config)
        else:
            self.store = dist.TCPStore(LOCALHOST, 0, is_master=True, wait_for_workers=False)
        first, per_node = config.node_rank * config.ranks_per_node, config.ranks_per_node
        local_ranks = range(max(first, 1), first + per_node)
        self._nodes = NodeLinks(config, self.store) if config.nnodes > 1 and config.node_rank == 0 else None
        self._plans, readers = open_channel(len(local_ranks))
        self._children = Children(on_failure)
        self._last_step: Step | None = None
        self._size, self._num_orders = config.tp_size, 0
        self._timeout_s = config.answer_timeout_s
        self._last_look = [(0, time.monotonic())] * len(local_ranks)  # (messages that it had taken up, since when)
        for rank, reader in zip(local_ranks, readers, strict=True):
            self._children.spawn(f"rank {rank}", run, config, folder, rank, self.store.host, self.store.port, reader)
            reader.close()
        self._children.checks += [self._find_hung, StoppedChildren(self._children, self._timeout_s).find]
        if self._nodes is not None:
            self._children.checks.append(self._nodes.find_lost)
        self._children.watch()

    def wait_ready(self) -> None:
        self._children.wait_ready()

    def announce(self, step: Step) -> None:
        """Have every rank run `step`. It must be run here too, sampling included, or the others wait for ever."""
        if self._last_step is not None and self._last_step.awaits_masks:
            self.fail(RuntimeError("a step was given up before its tokens were sampled"))
        self._last_step = step
        for row, start, slots in step.plan.prefix_copies:
            self.send(np.array([PREFIX, row, start], np.int32), slots.astype(np.int32, copy=False))
        prompts = [(work.first_token, len(work.target_ids)) for work in step.prompt_work]
        header = StepHeader(
            step.shape,
            is_graph=step.is_graph,
            num_samples=len(step.plan.samples),
            is_plain=step.work.is_plain and step.work.masked is None,
            num_prompts=len(prompts),
        )
        self.send(header.to_message(), np.array(prompts, np.int32).reshape(-1), step.staged.host.numpy())

    def order(self, name: str, **arguments: Any) -> int:
        """Have every rank call `RankMaintenance.do(name, **arguments)`, after the steps announced before.

        Returns the order's number, for `wait_done`.
        """
        self._num_orders += 1
        text = json.dumps([self._num_orders, name, arguments]).encode()
        self.send(np.array([ORDER], np.int32), text.ljust(-(-len(text) // 4) * 4))
        return self._num_orders

    def wait_done(self, order: int) -> dict[int, str]:
        """Return the ranks that could not do it, and why. Blocks. Raises `EngineStopped` if one ended meanwhile."""
        keys = {rank: ANSWER_KEY.format(order, rank) for rank in range(1, self._size)}
        while not self.store.check(list(keys.values())):
            if self._children.failure is not None:
                raise EngineStopped(self._children.failure)
            time.sleep(ANSWER_POLL_S)
        reasons = {rank: self.store.get(key).decode() for rank, key in keys.items()}
        for key in keys.values():
            self.store.delete_key(key)
        return {rank: reason for rank, reason in reasons.items() if reason}

    def send(self, *parts: Payload) -> None:
        """Send one message to all ranks."""
        self._plans.send(*parts)
        if self._nodes is not None:
            self._nodes.send(*parts)

    def fail(self, error: BaseException, what: str = "a step") -> None:
        """Report that `what` failed here, half way: the ranks are no longer in step with each other."""
        self._children.fail(f"rank 0 failed in {what}: {type(error).__name__}: {error}")

    def close(self, close_comm: Callable[[], None]) -> None:
        """End the ranks; `close_comm` leaves their group, as they do, if all are well."""
        self._children.stop_watching()
        self._plans.close()
        if self._nodes is not None:
            self._nodes.close()
        if self._children.failure is None:
            close_comm()
            self._children.close()
        else:
            self._children.kill()

    def abandon(self, error: BaseException) -> BaseException:
        """End the ranks after `error` ended the start. Returns the error to report, perhaps what happened to one."""
        return self._children.abandon(error)

    def _find_hung(self) -> str | None:
        """Return the description of a rank that takes up no step although there is one, as after SIGSTOP."""
        now = time.monotonic()
        for i, (num_sent, since) in enumerate(self._last_look):
            num_unread = self._plans.num_unread(i)
            num_taken = self._plans.num_sent - num_unread
            if num_taken != num_sent or not num_unread:
                self._last_look[i] = num_taken, now
            elif now - since > self._timeout_s:
                return f"{self._children.describe(i)} has not taken up a step for {now - since:.0f} s (--dist-timeout)"
        return None


def join_store(host: str, port: int) -> dist.TCPStore:
    return dist.TCPStore(host, port, is_master=False)


def arrive(store: dist.TCPStore, rank: int, num_ranks: int) -> None:
    """Report that this rank is ready to connect. Rank 0 waits until all are.

    Without a limit: loading takes as long as it does, and a rank that has ended or was stopped is found by its host.
    """
    if rank:
        store.set(ARRIVAL_KEY.format(rank), "")
        return
    waiting = Waiting()
    missing = list(range(1, num_ranks))
    while missing := [other for other in missing if not store.check([ARRIVAL_KEY.format(other)])]:
        waiting.go_on(f"{names('rank', missing)} of {num_ranks} to load its weights")
        time.sleep(ANSWER_POLL_S)


def run_node(config: EngineConfig, run: RunRank, on_progress: Callable[[str], None]) -> None:
    """Run the ranks of a host but the first until one ends. Raises `ModelError` if one fails."""
    link = NodeLink(config, open_store(config))
    received = json.loads(link.receive())
    own = {name: getattr(config, name) for name in ("model_path", "download_dir", "node_rank", "base_gpu_id")}
    config = EngineConfig(**{**received, **own})
    failures: list[str] = []

    def on_failure(message: str) -> None:
        failures.append(message)
        link.close()

    ranks = Ranks(config, resolve_model(config), run, on_failure)
    on_progress(f"node {config.node_rank} of {config.nnodes} has started its ranks")
    try:
        while True:
            ranks.send(link.receive())
    except EOFError:
        ranks.close(lambda: None)
    if failures:
        raise ModelError(failures[0])


class Follower:
    """Carry out, on a rank but 0, the orders that are not steps."""

    def __init__(self, rank: int, store: dist.TCPStore, maintenance: RankMaintenance) -> None:
        self._rank, self._store, self._maintenance = rank, store, maintenance

    def obey(self, order: int, name: str, arguments: dict[str, Any]) -> None:
        """Do what rank 0 orders. Raises a failure that leaves this rank unlike the others: it ends the server."""
        if name == "read":  # takes long, and steps go on
            threading.Thread(target=self._read, args=(order, arguments), daemon=True).start()
            return
        self._maintenance.do(name, **arguments)
        self._answer(order, "")

    def _read(self, order: int, arguments: dict[str, Any]) -> None:
        reason = ""
        try:
            self._maintenance.read(**arguments)
        except Exception as error:  # noqa: BLE001 - whatever it is, rank 0 waits for an answer
            reason = reason_of(error)
        self._answer(order, reason)

    def _answer(self, order: int, reason: str) -> None:
        self._store.set(ANSWER_KEY.format(order, self._rank), reason)


def follow(runner: ModelRunner, plans: ChannelReader, follower: Follower) -> None:
    """Run all that rank 0 announces, until it closes the channel."""
    prefix_copies: list[tuple[int, int, np.ndarray]] = []
    while True:
        try:
            message = np.frombuffer(plans.receive(), np.int32)
        except EOFError:
            return
        if message[0] == PREFIX:
            _, row, start = message[:3].tolist()
            prefix_copies.append((row, start, message[3:].copy()))  # the ring's memory is used again
            continue
        if message[0] == ORDER:
            follower.obey(*json.loads(message[1:].tobytes()))
            continue
        header, rest = StepHeader.from_message(message)
        prompts = rest[: 2 * header.num_prompts].reshape(-1, 2).tolist()
        written = rest[2 * header.num_prompts :]
        plan = plan_of(written, header.shape, header.num_samples)
        plan.prefix_copies, prefix_copies = prefix_copies, []
        step = Step(
            plan=plan,
            work=SamplingWork(header.num_samples, is_greedy=bool(header.is_plain)),
            prompt_work=[PromptLogprobWork(None, 0, first, np.zeros(count, np.int64)) for first, count in prompts],
            staged=runner.stager.copy(written),
            shape=header.shape,
            is_graph=bool(header.is_graph),
            launched_at=time.perf_counter(),
        )
        with torch.cuda.stream(runner.stream), torch.inference_mode():
            runner.run(step)
