"""Estimate how long steps take, to size prompt chunks and to time the next decision."""

from engine.schedule.plan import Plan, PrefillBudget, prefill_work

# Smallest prompt chunk of a step, as a share of chunked_prefill_size, however tight the time: prompts must not starve.
MIN_PREFILL_SHARE = 1 / 64
# Chunks shorter than this share of chunked_prefill_size are not used to estimate seconds per token: fixed costs
# dominate them.
MIN_SAMPLE_SHARE = 1 / 16
MIN_LEAD_S = 0.001  # least seconds between deciding a step and the end of the step before it
# MIN_LEAD_S with several ranks: the others receive the step later, and their delay looks like a longer step.
MIN_RANKS_LEAD_S = 0.003
LAUNCH_MARGIN = 1.25  # factor on the expected launch time: launches vary, and the device must not wait for them
# Least length of a step that limits its prompts on a CPU, in decode steps: below it, most of the time would go into
# reading the weights once more for each chunk.
MIN_LIMIT_DECODES = 4
CHUNK_GAIN = 16  # how much less time a token takes in a chunk than in a decode step of its own, at a guess
STEP_MARGIN = 0.9  # share of a step's time budget that is planned for: steps vary
MAX_GUESS_ERROR = 4  # factor between the cost of context and the guess, at most
FADING = 0.98  # of what older steps say of that cost, with each new one
GUESS_WEIGHT = 0.01  # of the guess, beside a step


class ContextCost:
    """Fit what a prompt token costs, and each token that it attends to, to the steps seen, by least squares.

    Attention reaches another share of its peak than the products do, by kernel and device: with a wrong cost, chunks
    take longer than planned at the start of a prompt, or at its end.
    """

    def __init__(self, guess: float) -> None:
        """guess: cost of attending to one token, as a share of a prompt token's other cost; 0: it costs nothing."""
        self.value = self._guess = guess
        self._xx = self._xy = self._yy = self._x = self._y = 0.0  # sums of products; x: prompt tokens/s, y: context/s

    def observe(self, num_tokens: float, num_context: float, seconds: float) -> None:
        """Take in that `num_tokens`, which attended to `num_context` tokens in all, took `seconds`."""
        if not self._guess or not seconds:
            return
        x, y = num_tokens / seconds, self._guess * num_context / seconds
        prior = GUESS_WEIGHT * (x + y) ** 2  # says that the guess is right: that x and y cost the same
        self._xx = FADING * self._xx + x * x + prior
        self._xy = FADING * self._xy + x * y - prior
        self._yy = FADING * self._yy + y * y + prior
        self._x, self._y = FADING * self._x + x, FADING * self._y + y
        of_tokens = self._x * self._yy - self._y * self._xy
        of_context = self._y * self._xx - self._x * self._xy
        factor = of_context / of_tokens if of_tokens > 0 else MAX_GUESS_ERROR
        self.value = self._guess * min(max(factor, 1 / MAX_GUESS_ERROR), MAX_GUESS_ERROR)


class StepPace:
    """Size prompt chunks so that steps keep to a time budget while answers stream, and time the next decision.

    The cost of a decode step, the cost of a prompt token and the host's time per launch are exponential moving
    averages, which follow the load.
    """

    def __init__(
        self,
        max_step_ms: float | None,
        chunked_prefill_size: int,
        context_cost: float = 0.0,
        min_lead_s: float = MIN_LEAD_S,
        max_wait_s: float | None = None,
    ) -> None:
        """Start without estimates.

        max_step_ms: time budget of a step while answers stream; None: no limit. context_cost: see `ContextCost`.
        min_lead_s: see `lead_s`. max_wait_s: time budget of every step, for what may arrive meanwhile; None: no limit.
        Large models may take longer.
        """
        self.max_step_s = None if max_step_ms is None else max_step_ms / 1e3
        self.max_wait_s = max_wait_s
        self.chunked_prefill_size = chunked_prefill_size
        self.min_tokens = max(int(chunked_prefill_size * MIN_PREFILL_SHARE), 1)
        self.min_sample_work = max(int(chunked_prefill_size * MIN_SAMPLE_SHARE), 1)
        self.context_cost, self.min_lead_s = ContextCost(context_cost), min_lead_s
        self.decode_s = 0.0
        self.prefill_token_s = 0.0  # seconds per prompt token, without its context
        self.slow_token_s = 0.0  # prefill_token_s of the slower recent steps: not every size suits the kernels
        self.decode_launch_s = self.prefill_launch_s = 0.0

    def prefill_budget(self, num_streams: int) -> PrefillBudget:
        """Return what the next step's prompts may take, in a time for which streams, and who arrives, may wait."""
        budget = PrefillBudget(self.chunked_prefill_size)
        if self.max_step_s is not None and num_streams:
            self._limit(budget, self.max_step_s, 0.0)
        # The first chunk shows what a token takes; it is cut only if decodes are so slow that it may take too long.
        if self.max_wait_s is not None and (
            self.slow_token_s or self.decode_s * self.chunked_prefill_size > CHUNK_GAIN * self.max_wait_s
        ):
            # Chunks that are too short to be sampled would stay so for ever after one slow step.
            self._limit(budget, max(self.max_wait_s, MIN_LIMIT_DECODES * self.decode_s), self.min_sample_work)
        return budget

    def _limit(self, budget: PrefillBudget, step_s: float, min_work: float) -> None:
        """Limit `budget` to what can be computed in `step_s`, `min_work` at least, and `min_tokens` in any case."""
        spare_s = STEP_MARGIN * step_s - self.decode_s
        # The first chunk must be long enough to sample, and may turn out a little shorter than its budget.
        work = spare_s / self.slow_token_s if self.slow_token_s else 2 * self.min_sample_work
        budget.work = min(budget.work, max(work, min_work))
        budget.context_cost, budget.min_tokens = self.context_cost.value, self.min_tokens

    def observe(self, plan: Plan, device_s: float, *, is_slow_way: bool = False) -> None:
        """Update the estimates with the device seconds that `plan` took.

        is_slow_way: longer prompts would have taken less a token. So what these took is the most, and shortens no
        chunk; but it ends that a few slow steps make all others be of this kind.
        """
        if plan.is_decode:
            self.decode_s = _follow(self.decode_s, device_s)
        elif self._prefill_work(plan) >= self.min_sample_work:
            prefill_s = max(device_s - self.decode_s, 0.0)
            token_s = prefill_s / self._prefill_work(plan)
            if is_slow_way:
                self.prefill_token_s = min(self.prefill_token_s, token_s)
                self.slow_token_s = min(self.slow_token_s, token_s)
                return
            num_tokens = plan.num_prefill_tokens
            self.context_cost.observe(num_tokens, self._prefill_work(plan, 1.0) - num_tokens, prefill_s)
            self.prefill_token_s = _follow(self.prefill_token_s, token_s)
            self.slow_token_s = _follow(self.slow_token_s, token_s, rise=0.3, fall=0.05)

    def _prefill_work(self, plan: Plan, context_cost: float | None = None) -> float:
        """Return the number of prompt tokens in `plan`, each weighted by its context."""
        if plan.is_decode:
            return 0.0
        q_lens, seq_lens = plan.q_lens[plan.num_decodes :], plan.seq_lens[plan.num_decodes :]
        cost = self.context_cost.value if context_cost is None else context_cost
        return float(prefill_work(q_lens, seq_lens - q_lens, cost).sum())

    def observe_launch(self, plan: Plan, host_s: float) -> None:
        """Update the estimates with the host seconds that deciding and enqueuing `plan` took."""
        if plan.is_decode:
            self.decode_launch_s = _follow(self.decode_launch_s, host_s)
        else:
            self.prefill_launch_s = _follow(self.prefill_launch_s, host_s)

    def lead_s(self, has_prompts: bool) -> float:
        """Return the seconds that deciding and enqueuing the next step takes, at least `min_lead_s`.

        With prompts the step may fit no graph and launch hundreds of kernels instead.
        """
        return max(self.min_lead_s, LAUNCH_MARGIN * (self.prefill_launch_s if has_prompts else self.decode_launch_s))

    def predict_s(self, plan: Plan) -> float:
        """Return the device seconds that `plan` will take, estimated rather too short than too long."""
        return 0.95 * (self.decode_s + self._prefill_work(plan) * self.prefill_token_s)


def _follow(mean: float, value: float, rise: float = 0.2, fall: float = 0.2) -> float:
    """Return the exponential moving average `mean` updated by `value`.

    An outlier, such as a kernel's compilation, counts as at most twice the mean. An average that rises faster than it
    falls stays near the largest values.
    """
    if not mean:
        return value
    return mean + (rise if value > mean else fall) * (min(value, 2 * mean) - mean)
