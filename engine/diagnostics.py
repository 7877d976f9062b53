"""The state of a local engine as others see it: health, statistics, a description for whoever looks for a hang."""

import dataclasses
import itertools
import time

from cache.outline import outline
from engine.build import EngineParts
from engine.canary import NAMESPACE, Canary
from engine.constraints import Constraints
from engine.engine import EngineStats, Health
from engine.intake import Intake
from engine.loop import StepLoop
from engine.media import EncoderStats
from engine.state import RequestState, Status
from engine.views import BranchView, RequestView
from engine.vision.encoder import Encoder

MAX_HOLDERS = 8  # of a node of the tree that are named
STUCK_AFTER_S = 30.0  # a step this long makes /health fail; --watchdog-timeout is when the process gives up


class Diagnostics:
    """Reads the engine's objects and changes none of them."""

    def __init__(
        self,
        parts: EngineParts,
        loop: StepLoop,
        intake: Intake,
        constraints: Constraints,
        canary: Canary,
        encoder: Encoder | None,
    ) -> None:
        self._parts, self._loop, self._intake, self._constraints = parts, loop, intake, constraints
        self._canary, self._encoder = canary, encoder
        self._requests = intake.requests
        self._busy_since = 0.0  # time.perf_counter()

    @property
    def has_work(self) -> bool:
        """Return whether a step should come back before long. Callable from any thread."""
        if self._loop.is_still:
            return False
        return bool(self._requests.by_rid or self._loop.steps_in_flight)

    def record_work(self) -> None:
        """Note that there is work from now on: the age of the last step counts from here."""
        self._busy_since = time.perf_counter()

    def health(self, is_running: bool) -> Health:
        now = time.perf_counter()
        scheduler = self._parts.scheduler
        age_s = now - max(self._busy_since, self._loop.stats.last_step_at) if self.has_work else 0.0
        queued = [*scheduler.waiting, *scheduler.parked.values()]
        oldest = min((state.times.arrived for state in queued), default=now)
        status = "ok"
        if not is_running:
            status = "stopped"
        elif self._requests.is_stopping:
            status = "stopping"
        elif age_s > min(STUCK_AFTER_S, self._parts.config.watchdog_timeout or STUCK_AFTER_S):
            status = "stuck"
        canary = self._canary
        return Health(
            status,
            age_s,
            now - oldest,
            scheduler.num_running - canary.is_in(Status.RUNNING),
            len(queued) - canary.is_in(Status.WAITING),
            self._loop.stats.num_violations,
            canary.stats.num_alarms,
            canary.stats.drift,
        )

    def stats(self) -> EngineStats:
        """Return the statistics of clients' requests, the canary's left out."""
        encoder = self._encoder
        stats = EngineStats(
            scheduler=self._parts.scheduler.stats(),
            loop=self._loop.stats,
            num_requests=self._requests.num_requests,
            num_aborted=self._requests.num_aborted,
            num_refused=self._requests.num_refused,
            drain_tokens_per_s=self._intake.drain_rate.tokens_per_s,
            grammars=self._constraints.stats,
            canary=dataclasses.replace(self._canary.stats),
            encoder=EncoderStats() if encoder is None else encoder.read_stats(),
        )
        return self._canary.without(stats, self._output_len)

    def top_branches(self, k: int) -> list[BranchView]:
        """See `Engine.top_branches`."""
        held, rows = self._parts.scheduler.held, self._parts.rows
        views, places = outline(held.cache, k, without=NAMESPACE)
        holders: dict[int, list[str]] = {}
        for row, node in held.nodes.items():
            place = next((places[step] for step in held.cache.path(node) if step in places), None)
            if place is not None and len(holders.setdefault(place, [])) < MAX_HOLDERS:
                holders[place].append(rows.state_at(row).rid)
        shown = self._intake.interner.tokens
        return [
            BranchView(
                0, view.parent, view.start, view.num_tokens, shown(view.head), view.lock_ref, view.hits,
                view.num_hidden, tuple(holders.get(place, ())),
            )
            for place, view in enumerate(views)
        ]  # fmt: skip

    def oldest_requests(self, k: int) -> list[RequestView]:
        """See `Engine.oldest_requests`."""
        clients = (state for rid, state in self._requests.by_rid.items() if not self._canary.owns(rid))
        return [
            RequestView(state.rid, state.status is Status.RUNNING, self._output_len(state), state.num_cached_tokens)
            for state in itertools.islice(clients, k)
        ]

    def _output_len(self, state: RequestState) -> int:
        if state.row < 0:
            return len(state.output_ids)
        return int(self._parts.rows.num_known[state.row]) - state.prompt_len

    def progress(self) -> tuple[int, ...] | None:
        """See `Engine.progress`."""
        if not self.has_work:
            return None
        return self._loop.stats.num_steps, self._loop.stats.num_failed_steps

    def describe(self) -> str:
        """See `Engine.describe`."""
        now = time.perf_counter()
        lines = [f"{name}: {value}" for name, value in dataclasses.asdict(self.stats()).items()]
        for step in self._loop.steps_in_flight:
            plan = step.plan
            rids = [state.rid for row in plan.rows.tolist() if (state := self._parts.rows.states[row])]
            lines.append(
                f"step in flight for {now - step.launched_at:.3f} s: {plan.num_tokens} tokens, "
                f"{plan.num_decodes} decodes, q_lens {plan.q_lens.tolist()}, seq_lens {plan.seq_lens.tolist()}, {rids}"
            )
        for state in list(self._requests.by_rid.values()):
            lines.append(
                f"request {state.rid}: {state.status.name}, a prompt of {state.prompt_len} tokens, "
                f"{now - state.times.arrived:.3f} s old"
            )
        return "\n".join(lines) + "\n"
