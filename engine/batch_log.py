"""Log steps in SGLang's format."""

import logging
import time

from engine.schedule.plan import Plan
from engine.schedule.resolver import Outcome
from engine.schedule.scheduler import Scheduler

logger = logging.getLogger(__name__)


class BatchLog:
    """Write SGLang's two log lines: one per step with prompt tokens, one every `interval` decode steps."""

    def __init__(self, scheduler: Scheduler, interval: int) -> None:
        self.scheduler, self.interval = scheduler, interval
        self._num_decode_steps = self._num_tokens = 0
        self._since = time.perf_counter()

    def on_launch(self, plan: Plan) -> None:
        """Log `plan` if it has prompt tokens, or if `interval` decode steps have passed."""
        if not logger.isEnabledFor(logging.INFO):
            return
        num_prompts = len(plan.rows) - plan.num_decodes - plan.num_jumps
        if not num_prompts:
            self._num_decode_steps += 1
            if self._num_decode_steps % self.interval == 0:
                self._log_decode()
        else:
            stats = self.scheduler.stats()
            num_cached = sum(len(slots) for _, _, slots in plan.prefix_copies)
            logger.info(
                "Prefill batch. #new-seq: %d, #new-token: %d, #cached-token: %d, token usage: %.2f, "
                "#running-req: %d, #queue-req: %d",
                num_prompts, plan.num_prefill_tokens, num_cached,
                stats.num_held_tokens / stats.num_total_tokens, stats.num_running, stats.num_waiting,
            )  # fmt: skip

    def on_resolve(self, outcome: Outcome) -> None:
        """Count the tokens of a step that has ended, for the throughput."""
        self._num_tokens += outcome.num_tokens

    def _log_decode(self) -> None:
        now = time.perf_counter()
        stats = self.scheduler.stats()
        logger.info(
            "Decode batch. #running-req: %d, #token: %d, token usage: %.2f, gen throughput (token/s): %.2f, "
            "#queue-req: %d",
            stats.num_running, stats.num_held_tokens, stats.num_held_tokens / stats.num_total_tokens,
            self._num_tokens / max(now - self._since, 1e-9), stats.num_waiting,
        )  # fmt: skip
        self._num_tokens, self._since = 0, now
