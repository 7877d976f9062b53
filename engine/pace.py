"""Estimate how long steps take, and cut prompts and time the next decision by it."""

from engine.schedule.plan import Plan, PrefillBudget, prefill_work

MIN_PREFILL_SHARE = 1 / 64  # of the longest chunk, in every step, however tight its time: a prompt must not starve
TELLING_SHARE = 1 / 16  # of the longest chunk: the time of a shorter one is not its tokens'
MIN_LEAD_S = 0.001  # a step is decided at least this long before the one before it ends
# Likewise where other ranks run it, too: they hear of it later, and what they come late by looks like a longer step.
MIN_RANKS_LEAD_S = 0.003
LAUNCH_MARGIN = 1.25  # launches vary; the device shall not wait for them
STEP_MARGIN = 0.9  # so much of a step's time budget is planned for: steps vary


class StepPace:
    """Cuts prompt chunks so that steps keep to a time budget while answers stream, and tells when to decide the next.

    What a decode step costs, what a prompt token adds, and how long the host takes are running means that follow the
    load.
    """

    def __init__(
        self,
        max_step_ms: float | None,
        chunked_prefill_size: int,
        context_cost: float = 0.0,
        min_lead_s: float = MIN_LEAD_S,
    ) -> None:
        """context_cost: what attending to a token of context takes, as a share of what else a prompt's token takes."""
        self.max_step_s = None if max_step_ms is None else max_step_ms / 1e3
        self.chunked_prefill_size = chunked_prefill_size
        self.min_tokens = max(int(chunked_prefill_size * MIN_PREFILL_SHARE), 1)
        self.telling_work = max(int(chunked_prefill_size * TELLING_SHARE), 1)
        self.context_cost, self.min_lead_s = context_cost, min_lead_s
        self.decode_s = 0.0
        self.prefill_token_s = 0.0  # without its context
        self.slow_token_s = 0.0  # likewise, in the slower ones of the last steps: not every size suits the kernels
        self.decode_launch_s = self.prefill_launch_s = 0.0

    def prefill_budget(self, num_streams: int) -> PrefillBudget:
        """What the next step's prompts may take: as much as there is if nobody would notice a long step."""
        budget = PrefillBudget(self.chunked_prefill_size)
        if self.max_step_s is not None and num_streams:
            spare_s = STEP_MARGIN * self.max_step_s - self.decode_s
            # The first chunk must tell: it may turn out a little shorter than its budget.
            budget.work = spare_s / self.slow_token_s if self.slow_token_s else 2 * self.telling_work
            budget.context_cost, budget.min_tokens = self.context_cost, self.min_tokens
        return budget

    def observe(self, plan: Plan, device_s: float) -> None:
        if plan.is_decode:
            self.decode_s = _follow(self.decode_s, device_s)
        elif (work := self._prefill_work(plan)) >= self.telling_work:
            token_s = max(device_s - self.decode_s, 0.0) / work
            self.prefill_token_s = _follow(self.prefill_token_s, token_s)
            self.slow_token_s = _follow(self.slow_token_s, token_s, rise=0.3, fall=0.05)

    def _prefill_work(self, plan: Plan) -> float:
        """Its prompt tokens, each weighed by its context."""
        if plan.is_decode:
            return 0.0
        q_lens, seq_lens = plan.q_lens[plan.num_decodes :], plan.seq_lens[plan.num_decodes :]
        return float(prefill_work(q_lens, seq_lens - q_lens, self.context_cost).sum())

    def observe_launch(self, plan: Plan, host_s: float) -> None:
        if plan.is_decode:
            self.decode_launch_s = _follow(self.decode_launch_s, host_s)
        else:
            self.prefill_launch_s = _follow(self.prefill_launch_s, host_s)

    def lead_s(self, has_prompts: bool) -> float:
        """Seconds to decide and enqueue the next step: with prompts no graph may hold it, but hundreds of kernels."""
        return max(self.min_lead_s, LAUNCH_MARGIN * (self.prefill_launch_s if has_prompts else self.decode_launch_s))

    def predict_s(self, plan: Plan) -> float:
        """How long `plan` will take, rather too short than too long."""
        return 0.95 * (self.decode_s + self._prefill_work(plan) * self.prefill_token_s)


def _follow(mean: float, value: float, rise: float = 0.2, fall: float = 0.2) -> float:
    """A running mean that takes a hiccup, such as a kernel's compilation, for no more than twice what is usual.

    One that rises faster than it falls stays near the largest values.
    """
    if not mean:
        return value
    return mean + (rise if value > mean else fall) * (min(value, 2 * mean) - mean)
