"""Runs plans on the device. `launch` enqueues a step and returns; its tokens are read when its event has fired.

On a GPU the stream keeps steps in order; on a CPU one worker thread does. Either way the caller goes on at once.

Where a grammar forbids tokens, which ones depends on the token before, and that may still be on the device. Such a
step is launched up to its logits, and `sample` enqueues the rest once the host knows.
"""

import contextlib
import itertools
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from cache.pool import CachePool
from engine.layers.attention import Attention
from engine.layers.communicator import Communicator
from engine.layers.forward_batch import ForwardBatch
from engine.layers.layer import unique_layers
from engine.models.base import CausalLM
from engine.schedule.plan import Plan
from engine.step.batch import NUM_STAGING_BUFFERS, Staged, StagedBatch, Stager
from engine.step.compiled import CompiledSteps
from engine.step.cuda_graph import GraphSizes, StepGraphs
from engine.step.features import StepFeatures
from engine.step.fields import StepShape
from engine.step.hidden import HiddenStates, HiddenWork, plan_hidden
from engine.step.host_copies import TokenBuffers, to_host
from engine.step.logprobs import PromptLogprobs, PromptLogprobWork, TokenLogprobs, plan_prompt_logprobs, prompt_logprobs
from engine.step.pooling import PooledChunks, pool
from engine.step.sampler import Sampler, SamplingWork
from engine.step.splitter import StepSplitter
from engine.text.grammar import MaskFiller, Matcher
from kernels.bookkeeping import begin_step, end_step
from kernels.corun import Corun

MAX_IDLE_S = 0.1
NUM_EVENT_PAIRS = 4 * NUM_STAGING_BUFFERS  # a step has one pair, or two where its sampling is enqueued apart


@dataclass(slots=True, eq=False)
class Step:
    """A launched plan. `tokens` and the log-probabilities are valid once it has ended."""

    plan: Plan
    work: SamplingWork
    prompt_work: list[PromptLogprobWork]
    staged: Staged
    shape: StepShape  # of `staged`
    is_graph: bool  # one is replayed
    launched_at: float  # time.perf_counter()
    is_slow_way: bool = False  # longer prompts take less a token
    corun: Corun | None = None  # its layers are split so
    host_s: float = 0.0  # what it took the CPU worker
    done: Future[None] | None = None  # of the worker that computes it, on a CPU; nobody tells of a GPU's end
    awaits_masks: bool = False  # enqueued up to its logits; `ModelRunner.sample` must follow
    events: list[torch.cuda.Event] = field(default_factory=list)  # the first and the last are around its work
    batch: StagedBatch | None = None
    logits: torch.Tensor | None = None  # [S or more, V]; like `batch` only valid until the next launch
    greedy: torch.Tensor | None = None  # int32 [S or more], their argmax, where a graph made it
    tokens: torch.Tensor | None = None  # int32 [S or more], host; written again NUM_STAGING_BUFFERS launches later
    sampled_logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    pooled: PooledChunks | None = None
    hidden_work: HiddenWork | None = None  # of rank 0 alone
    hidden: HiddenStates | None = None

    @property
    def has_ended(self) -> bool:
        """Return whether all that is enqueued of the step is computed, or has failed."""
        if self.done is not None:
            return self.done.done()
        try:
            return bool(self.events[-1].query())
        except RuntimeError:  # `result` will say it
            return True

    def result(self) -> None:
        """Wait for its end. Raises what the step raised."""
        if self.done is not None:
            self.done.result()
        else:
            self.events[-1].synchronize()


class Followers(Protocol):
    """The other ranks, as a runner sees them; see engine.ranks.leader.Ranks."""

    def announce(self, step: Step) -> None: ...
    def fail(self, error: BaseException) -> None: ...
    def close(self, close_comm: Callable[[], None]) -> None: ...


class SingleTokens(Protocol):
    """A way of single tokens through the model's weights that is shorter than that of the blocks."""

    def take(self, batch: ForwardBatch) -> bool: ...
    def __call__(self, batch: ForwardBatch, pool: CachePool) -> torch.Tensor: ...


class ModelRunner:
    """Owns the model, the KV buffers and everything a step touches on the device."""

    def __init__(
        self,
        model: CausalLM,
        kv: CachePool,
        sampler: Sampler,
        stager: Stager,
        comm: Communicator,
    ) -> None:
        self.model, self.kv, self.comm = model, kv, comm
        self.sampler, self.stager = sampler, stager
        self.splitter = StepSplitter(model.model, kv)
        self._singles: SingleTokens | None = None
        self.graphs: StepGraphs | None = None
        self._graph_sizes: GraphSizes | None = None
        self.device = stager.device
        self._is_cuda = self.device.type == "cuda"
        self._last_end: torch.cuda.Event | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="step")  # on a CPU, computes the steps, in order
        self.stream: torch.cuda.Stream | None = None
        self._token_buffers = TokenBuffers(stager.max_requests, self.device)
        self.compile_steps()
        if self._is_cuda:
            self.stream = _new_stream()
            # In turns, since to make them anew would take a third of a launch's time.
            self._event_pairs = itertools.cycle(
                [
                    [torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2)]
                    for _ in range(NUM_EVENT_PAIRS)
                ]
            )
        self.features = StepFeatures(model, comm, self.device, self.stream)
        # Of rank 0 alone: who fills in masks, and who runs every step along with it.
        self.masks: MaskFiller | None = None
        self.ranks: Followers | None = None

    def new_graphs(self, sizes: GraphSizes) -> StepGraphs:
        """Return graphs of these sizes, not captured yet."""
        return StepGraphs(
            sizes, self.stager, self.run_greedy, self.comm.meet,
            has_windows=self.kv.window_slots is not None, has_rope=self.model.has_rope_axes,
            has_feature_rows=self.features.reserve(sizes),
        )  # fmt: skip

    def capture_graphs(self, sizes: GraphSizes) -> None:
        self._graph_sizes = sizes
        graphs = self.new_graphs(sizes)
        with torch.cuda.stream(self.stream), torch.inference_mode():
            with self.model.model.few_layers():
                graphs.run_all()  # what a kernel or a library needs once must not happen in a capture
            graphs.capture_all()
        self.graphs = graphs

    def compile_steps(self) -> None:
        """Make the way of single tokens through the weights as they are now."""
        if self.device.type == "cpu":
            self._singles = CompiledSteps.of(self.model, self.kv)
        elif self._is_cuda:
            from engine.step.chained import ChainedSteps  # here: a machine without a GPU need not have triton

            self._singles = ChainedSteps.of(self.model, self.device)

    def release_graphs(self) -> None:
        """Forget the graphs, and give what the allocator keeps back to the device."""
        self.graphs = None
        if self._is_cuda:
            torch.cuda.empty_cache()

    def recapture_graphs(self) -> None:
        """Capture the graphs again, where there were any: they hold the addresses of weights and KV pool."""
        if self._is_cuda:
            torch.cuda.synchronize()  # weights and pool were written on another stream
        if self._graph_sizes is not None:
            self.capture_graphs(self._graph_sizes)

    def move_weights(self, device: torch.device) -> None:
        """Move the weights to `device`: to host memory, or back. No step may be in flight."""
        for layer in unique_layers(self.model):
            layer.move_to(device)

    def adopt_weights(self, new: CausalLM) -> None:
        """Take over the weights of `new`, the same model in host memory. No step may be in flight.

        Graphs hold the addresses of the device's weights, so these are written in place; on a CPU nothing does.
        """
        if not self._is_cuda:
            for layer in unique_layers(new):
                layer.pack()
            self.model = new
            self.compile_steps()
            return
        for layer, new_layer in zip(unique_layers(self.model), unique_layers(new), strict=True):
            new_layer.move_to(self.device)
            new_layer.pack()  # into the layout that this layer's weights have by now
            for (_, weight), (_, new_weight) in zip(layer.weights(), new_layer.weights(), strict=True):
                weight.copy_(new_weight)
        torch.cuda.synchronize()
        attention = [layer for layer in unique_layers(self.model) if isinstance(layer, Attention)]
        if scaled := [layer for layer in attention if layer.cache_scales is not None]:
            for layer in scaled:
                layer.pack()
            self.release_graphs()  # they hold numbers made of the scales
            self.recapture_graphs()

    def close(self) -> None:
        """Let steps and ranks end, and give the KV pool's memory back: whoever keeps the engine may start another."""
        if self.stream is not None and self.comm.rank == 0:  # another may wait for one that is gone
            with contextlib.suppress(RuntimeError):  # a device that has failed has nothing under way
                self.stream.synchronize()
        # What other ranks were told to run must be run here too.
        self._worker.shutdown(wait=True, cancel_futures=self.ranks is None)
        self.graphs = self._singles = None  # before the ranks part: graphs hold what their collectives need
        if self.ranks is not None:
            self.ranks.close(self.comm.close)
        self.kv.release()

    def launch(self, plan: Plan) -> Step:
        """Enqueue `plan`, up to its logits if matchers have a say in its tokens.

        `sample` must follow then before the next launch. Everything that is needed of the host is copied before this
        returns.

        Raises what cannot be enqueued: out of memory, a kernel that does not compile.
        """
        work = self.sampler.plan_work(plan)
        hidden_work = plan_hidden(plan, self.sampler.rows) if work.wants_hidden or plan.hidden else None
        graph_shape = self.graphs.shape_for(plan) if self.graphs is not None and hidden_work is None else None
        shape = graph_shape or (StepShape.of(plan) if self.graphs is None else self.graphs.eager_shape(plan))
        step = Step(
            plan=plan,
            work=work,
            hidden_work=hidden_work,
            prompt_work=plan_prompt_logprobs(plan) if plan.prompt_logprobs else [],
            staged=self.stager.write(plan, shape),
            shape=shape,
            is_graph=graph_shape is not None,
            corun=self.splitter.choose(plan, shape) if graph_shape is None else None,
            launched_at=time.perf_counter(),
        )
        if self.graphs is not None and step.is_graph:
            step.is_slow_way = self.graphs.is_slow_way(plan, shape)
        step.awaits_masks = step.work.masked is not None
        if self.ranks is not None:
            self.ranks.announce(step)
        self._enqueue(step, self._forward if step.awaits_masks else self.run)
        return step

    def sample(self, step: Step, samples: list[int], matchers: list[Matcher]) -> dict[int, str]:
        """Enqueue the sampling of a step that awaits it. Returns index -> message of the matchers that failed.

        samples: indices into S whose tokens `matchers` restrict, all of them ready for that token.
        """
        errors: dict[int, str] = {}
        if samples:
            assert self.masks is not None
            bits, errors = self.masks.fill(matchers)
            step.work.masks = bits, torch.tensor(samples, dtype=torch.int32)
        step.awaits_masks = False
        self._enqueue(step, self._sample, after=step.done)
        return errors

    def _enqueue(self, step: Step, work: Callable[[Step], None], after: Future[None] | None = None) -> None:
        if self.stream is None:
            step.done = self._worker.submit(self._run_in_worker, step, work, after)
            return
        torch.cuda.set_stream(self.stream)  # and leave it so: all that this thread does on the device is steps
        begin, end = next(self._event_pairs)
        begin.record(self.stream)
        self._run(step, work)
        end.record(self.stream)
        step.events += (begin, end)

    def times(self, step: Step) -> tuple[float, float]:
        """(seconds the device took for `step`, seconds it had waited for it), both of steps resolved in order.

        The wait is 0 on a CPU, and after a pause: without work the device may rest.
        """
        if not step.events:
            return step.host_s, 0.0
        begin, end = step.events[0], step.events[-1]
        before, self._last_end = self._last_end, end
        idle_s = before.elapsed_time(begin) / 1e3 if before is not None else 0.0
        return begin.elapsed_time(end) / 1e3, idle_s if idle_s < MAX_IDLE_S else 0.0

    def _run_in_worker(self, step: Step, work: Callable[[Step], None], after: Future[None] | None) -> None:
        if after is not None:
            after.result()  # raises what it raised
        start = time.perf_counter()
        self._run(step, work)
        step.host_s += time.perf_counter() - start

    def _run(self, step: Step, work: Callable[[Step], None]) -> None:
        try:
            with torch.inference_mode():
                work(step)
        except BaseException as error:
            self._last_end = None  # its event may be in use again before a step is resolved
            if self.ranks is not None:
                self.ranks.fail(error)
            raise

    def run(self, step: Step) -> None:
        """Enqueue the whole of `step` on the current stream; on a CPU, compute it. In inference mode."""
        self._forward(step)
        self._sample(step)

    def _forward(self, step: Step) -> None:
        """Compute a staged plan up to its logits."""
        plan = step.plan
        for row, start, slots in plan.prefix_copies:
            slots_tensor = torch.from_numpy(slots).to(self.device, non_blocking=True)
            self.stager.slot_table[row, start : start + len(slots)] = slots_tensor
        self.stager.upload(step.staged)
        if step.is_graph:
            assert self.graphs is not None
            if plan.features:
                self.features.write_for_graph(plan)
            step.logits, step.greedy, step.batch = self.graphs.replay(step.shape)
            return
        step.batch = staged = self.stager.views(step.shape, plan)
        if staged.feature_tokens is not None:
            staged.batch.features = self.features.of_step(plan, staged.feature_tokens)
        hidden = self.forward(staged.batch, step.corun)
        for work in step.prompt_work:
            if (values := prompt_logprobs(self.model, hidden, work)) is not None:
                step.prompt_logprobs.append(values)
        if plan.pooled:
            step.pooled = pool(self.model, hidden, plan)
        if (kept := step.hidden_work) is not None:
            tokens = torch.from_numpy(kept.tokens).to(self.device, non_blocking=True)
            step.hidden = HiddenStates(kept, to_host(hidden[tokens].float()))
        if len(plan.samples):
            is_all = len(plan.samples) == len(hidden)  # and not only `is_decode`: some may have more to compute
            step.logits = self.model.compute_logits(hidden if is_all else hidden[staged.sample_tokens])

    def _sample(self, step: Step) -> None:
        """Make tokens of the logits, and copy them to the host."""
        num_samples = len(step.plan.samples)
        logits, greedy, staged = step.logits, step.greedy, step.batch
        step.logits = step.greedy = step.batch = None  # their memory is the next step's
        if logits is None:
            step.tokens = torch.empty(0, dtype=torch.int32)
            return
        assert staged is not None
        lm_head, last_tokens = self.model.lm_head, self.sampler.last_tokens
        is_alone = self.comm.size == 1  # else the way was chosen, and told to all ranks, before there were masks
        if step.work.is_plain and (greedy is not None if is_alone else step.work.masked is None):
            if greedy is None:  # every rank finds the same, for less than gathering all logits takes
                greedy = lm_head.most_likely(logits[:num_samples])
                end_step(greedy, staged.sample_rows[:num_samples], last_tokens)
            step.tokens = self._token_buffers.to_host(greedy)
            return
        rows = staged.sample_rows[:num_samples]
        all_logits = lm_head.gather(logits[:num_samples])
        if all_logits is None:  # rank 0 samples
            tokens = self.comm.broadcast(torch.empty(num_samples, dtype=torch.int32, device=self.device))
            end_step(tokens, rows, last_tokens)
            return
        tokens, sampled_logprobs = self.sampler.sample(
            all_logits, step.work, rows, staged.sample_positions[:num_samples]
        )
        self.comm.broadcast(tokens)
        step.tokens = self._token_buffers.to_host(tokens)
        if sampled_logprobs is not None:
            step.sampled_logprobs = sampled_logprobs.to_host()

    def run_greedy(self, staged: StagedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a step up to its most likely tokens, which become the next step's input: this is what graphs hold."""
        if staged.feature_rows is not None:
            staged.batch.features = self.features.in_graph(staged.feature_rows)
        hidden = self.forward(staged.batch)
        is_decode = staged.batch.num_decodes == len(hidden)
        logits = self.model.compute_logits(hidden if is_decode else hidden[staged.sample_tokens])
        greedy = self.model.lm_head.most_likely(logits)
        end_step(greedy, staged.sample_rows, self.sampler.last_tokens)
        return logits, greedy

    def forward(self, batch: ForwardBatch, corun: Corun | None = None) -> torch.Tensor:
        """Return the hidden states [T, hidden_size] of the batch; its cache entries are stored on the way.

        corun: how the layers are split, if they are.
        """
        begin_step(
            batch.input_ids, batch.positions, batch.out_cache_loc, batch.token_rows,
            self.sampler.last_tokens, batch.slot_table, self.kv.window_slots, batch.window_cache_loc,
        )  # fmt: skip
        if batch.rope is not None:
            batch = replace(batch, rotation=self.model.rotation_of(batch.rope))
        if self.kv.window_slots is not None:
            batch = batch.with_windows(self.kv.window_slots)
        if self._singles is not None and self._singles.take(batch):
            return self._singles(batch, self.kv)
        if corun is None:
            return self.model(batch, self.kv)
        splitter, split = self.splitter, corun
        return self.model(batch, self.kv, lambda block, h: splitter.run_block(block, h, batch, split))


def _new_stream() -> torch.cuda.Stream:
    """Return a stream for steps, which come before a tower of pictures.

    It begins when what was enqueued before is done: the zeros of tables and buffers are another stream's work.
    """
    stream = torch.cuda.Stream(priority=-1)
    stream.wait_stream(torch.cuda.current_stream())
    return stream
