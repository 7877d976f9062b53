"""The canary: a fixed prompt whose log-probabilities are computed again now and then, in whatever batch runs.

Weights that are not what they were, cached keys that are another request's, a graph or a kernel that reads what is not
its own: none of this ends a step, and the text stays plausible. It does move the log-probabilities of a text that is
known. The canary is a request like any other, so it meets what the others meet, and it is a tiny one.
"""

import asyncio
import dataclasses
import functools
import logging
import math
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass

from engine.build import EngineParts
from engine.engine import CanaryStats, EngineStats
from engine.errors import EngineError
from engine.loop import StepLoop
from engine.request import Request, SamplingParams
from engine.schedule.scheduler import Scheduler
from engine.state import Delta, RequestState, Status, TokenLogprob

logger = logging.getLogger(__name__)

TEXT = "The capital of France is Paris. One, two, three, four, five, six. def add(a, b):\n    return a + b\n"
MAX_PROMPT_LEN = 32
NUM_NEW_TOKENS = 3  # so that decode steps are seen too
INTERVAL_S = 300.0
RETRY_S = 10.0  # after the engine was too busy
TIMEOUT_S = 60.0
MIN_FREE_SHARE = 0.125  # of rows and of KV slots, for the engine not to be saturated
PRIORITY = -(1 << 40)  # everybody else goes first
NAMESPACE = "\0canary"  # of the prefix cache
# Mean distance of log-probabilities beyond rounding. What shares the batch changes the order of sums: in 16 bits that
# is some hundredths, and a wrong weight or key is tenths to whole units.
TOLERANCE = {"float32": 0.01, "bfloat16": 0.15, "float16": 0.05}


@dataclass(slots=True)
class _Costs:
    """Sum up requests of the canary's own, by the counters that clients' requests go into."""

    num_requests: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_prompt_tokens: int = 0
    num_hit_tokens: int = 0
    num_output_tokens: int = 0

    def add(self, state: RequestState, num_output_tokens: int) -> None:
        """Count in `state`, which has been submitted."""
        self.num_requests += 1
        self.num_running += state.status is Status.RUNNING
        self.num_waiting += state.status is Status.WAITING
        if state.times.scheduled:
            self.num_prompt_tokens += state.prompt_len
            self.num_hit_tokens += state.num_cached_tokens
            self.num_output_tokens += num_output_tokens


class Canary:
    """Computes the log-probabilities when there is room, and compares them with the first."""

    def __init__(
        self,
        generate: Callable[[RequestState], AsyncGenerator[Delta, None]],
        has_room: Callable[[], bool],
        weights_version: Callable[[], int],
        input_ids: list[int],
        dtype: str,
    ) -> None:
        """Start nothing yet.

        generate: as of `Engine`. has_room: whether the engine is not saturated. weights_version: a number that changes
        when the weights are replaced on purpose. dtype: of the activations.
        """
        self.stats = CanaryStats()
        self.tolerance = TOLERANCE.get(dtype, max(TOLERANCE.values()))
        self.on_alarm: Callable[[], object] = lambda: None
        self._generate, self._has_room, self._weights_version = generate, has_room, weights_version
        self._input_ids = input_ids
        self._first: list[TokenLogprob] = []
        self._first_version = -1  # of the weights that made them
        self._task: asyncio.Task[None] | None = None
        self._current: RequestState | None = None
        self._ended = _Costs()

    def start(self) -> None:
        """Compute the first log-probabilities soon, and compare from then on."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="canary")
            self._task.add_done_callback(_report_end)

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        while True:
            has_run = await self.look()
            await asyncio.sleep(INTERVAL_S if has_run else RETRY_S)

    async def look(self) -> bool:
        """Compute the log-probabilities once, and keep or compare them. Return False if that was not possible now."""
        if not self._has_room():
            return False
        version = self._weights_version()
        found = await self._compute()
        if found is None or self._weights_version() != version:
            return False
        self.stats.num_runs += 1
        if version != self._first_version:
            self._first, self._first_version = found, version
        self._compare(found)
        return True

    def _compare(self, found: list[TokenLogprob]) -> None:
        stats = self.stats
        stats.drift = drift(self._first, found)
        if not stats.drift <= self.tolerance:  # NaN is an alarm, too
            stats.num_alarms += 1
            self.on_alarm()
            logger.error(
                "the canary's log-probabilities have moved by %.3g on average, rounding explains %.3g: weights, cached "
                "keys and values, or a kernel are not what they were at the start",
                stats.drift, self.tolerance,
            )  # fmt: skip

    async def _compute(self) -> list[TokenLogprob] | None:
        """Return the log-probabilities of the prompt's tokens but the first, then of the answer's. None: no answer."""
        params = SamplingParams(max_new_tokens=NUM_NEW_TOKENS, temperature=0.0, ignore_eos=True)
        rid = f"CANARY_{uuid.uuid4().hex}"
        request = Request(
            rid, self._input_ids, params, return_logprob=True, logprob_start_len=0, priority=PRIORITY,
            extra_key=NAMESPACE, client=NAMESPACE,
        )  # fmt: skip
        state = self._current = RequestState(request)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                async for delta in self._generate(state):
                    if delta.finish_reason is not None and delta.finish_reason.type == "length":
                        assert delta.logprobs is not None and state.input_logprobs is not None
                        return state.input_logprobs.token[1:] + delta.logprobs.token
        except (EngineError, TimeoutError):
            pass
        finally:
            self._current = None
            if state.status is Status.FINISHED:  # else it was refused
                self._ended.add(state, len(state.output_ids))
        return None

    def is_in(self, status: Status) -> bool:
        """Return whether there is a request of the canary's own now, of that status."""
        return self._current is not None and self._current.status is status

    def owns(self, rid: str) -> bool:
        """Return whether `rid` is that of the canary's own request."""
        return self._current is not None and self._current.rid == rid

    def has_prefix(self, token_ids: Sequence[int]) -> bool:
        """Return whether a cached prefix is the canary's own."""
        return list(token_ids[: len(self._input_ids)]) == self._input_ids

    def without(self, stats: EngineStats, output_len: Callable[[RequestState], int]) -> EngineStats:
        """Return `stats` as if the canary's requests were not. `output_len`: counts the tokens of an answer so far."""
        costs = dataclasses.replace(self._ended)
        if self._current is not None:
            costs.add(self._current, output_len(self._current))
        scheduler, loop = stats.scheduler, stats.loop
        return dataclasses.replace(
            stats,
            num_requests=stats.num_requests - costs.num_requests,
            scheduler=dataclasses.replace(
                scheduler,
                num_running=scheduler.num_running - costs.num_running,
                num_waiting=scheduler.num_waiting - costs.num_waiting,
                num_prompt_tokens=scheduler.num_prompt_tokens - costs.num_prompt_tokens,
                num_hit_tokens=scheduler.num_hit_tokens - costs.num_hit_tokens,
            ),
            loop=dataclasses.replace(loop, num_generated_tokens=loop.num_generated_tokens - costs.num_output_tokens),
        )


def canary_of(
    generate: Callable[[RequestState], AsyncGenerator[Delta, None]],
    parts: EngineParts,
    loop: StepLoop,
    weights_version: Callable[[], int],
    context_length: int,
) -> Canary:
    """Return the canary of an engine made of `parts`."""
    known = range(parts.model_config.vocab_size) if parts.config.skip_tokenizer_init else parts.tokenizer.encode(TEXT)
    input_ids = list(known[: min(MAX_PROMPT_LEN, context_length - NUM_NEW_TOKENS)])
    dtype = str(parts.model_config.dtype).removeprefix("torch.")
    return Canary(generate, functools.partial(has_room, parts.scheduler, loop), weights_version, input_ids, dtype)


def has_room(scheduler: Scheduler, loop: StepLoop) -> bool:
    """Return whether steps are launched, nobody waits, and rows and slots are free."""
    stats, num_rows = scheduler.stats(), scheduler.rows.num_rows
    return (
        not loop.is_still
        and not stats.num_waiting
        and stats.num_running <= num_rows * (1 - MIN_FREE_SHARE)
        and stats.num_held_tokens <= stats.num_total_tokens * (1 - MIN_FREE_SHARE)
    )


def _report_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        logger.error("the canary has ended", exc_info=task.exception())


def drift(first: list[TokenLogprob], found: list[TokenLogprob]) -> float:
    """Return the mean distance of two runs' log-probabilities, up to the first token that the answers do not share.

    Answers may part where two tokens are equally likely but for rounding; up to there everything must agree.
    """
    distances: list[float] = []
    for (one, token), (other, other_token) in zip(first, found, strict=True):
        if token != other_token:
            break
        assert one is not None and other is not None
        distances.append(abs(one - other) if math.isfinite(one) and math.isfinite(other) else math.inf)
    return sum(distances) / len(distances)
