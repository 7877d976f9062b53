"""Make a runner ready for its first request: compile and load kernels, and measure the largest step's memory."""

import itertools

import numpy as np
import torch

from engine.models.base import CausalLM
from engine.schedule.plan import Plan
from engine.step.cuda_graph import SAMPLE_MULTIPLE, GraphSizes
from engine.step.fields import StepShape
from engine.step.model_runner import ModelRunner
from kernels.corun import FLOPS_PER_BYTE, STEP_TOKENS, Corun
from kernels.experts import ExpertShape
from kernels.launch import compiling_ahead
from kernels.tune import tune_kernels
from kernels.tuning import AttentionShape, LatentShape, WeightShape

KERNEL_PROMPTS = (2, 32, 512)  # numbers of prompts that attention has kernels for: all are compiled at the start
# Where attention has latents, few tokens take another way behind a long context than many, and yet another one behind
# the longest, which takes memory too.
LONG_CONTEXT, MANY_TOKENS = 4096, 512


def compile_kernels(
    runner: ModelRunner,
    graph_sizes: GraphSizes | None,
    num_tokens: int,
    num_samples: int,
    max_len: int,
) -> None:
    """Compile all that `measure_step` and the graphs need, many at once: one by one they would take half a minute more.

    A rehearsal finds out which those are; nothing but what libraries compute is launched in it. Kernels are tuned
    first for those of the model's shapes that no table knows: other configurations are other kernels.
    """
    tune_kernels(
        weight_shapes(runner.model),
        attention=attention_shapes(runner.model, runner.kv.dtype),
        experts=expert_shapes(runner.model),
        dtype=runner.model.config.dtype,
    )
    with runner.model.model.few_layers(), compiling_ahead():
        _run_largest(runner, num_tokens, num_samples, max_len)
        if graph_sizes is not None:
            if runner.comm.rank == 0:  # the only one that samples
                runner.sampler.rehearse(num_samples)
            with torch.cuda.stream(runner.stream), torch.inference_mode():
                runner.new_graphs(graph_sizes).run_all()
            for num_free_sms in FLOPS_PER_BYTE if runner.splitter.can_split else ():
                _run_prompts(runner, _full_prompts(256, max_len), SAMPLE_MULTIPLE, corun=Corun(128, num_free_sms))


def weight_shapes(model: CausalLM) -> list[WeightShape]:
    """Return the shapes of the products of one token, each with what its block fuses."""
    shapes = [model.lm_head.weight.tuning_shape()]
    for block in {block.kind: block for block in model.model.layers}.values():
        shapes += block.tuning_shapes()
    return [shape for shape in shapes if shape is not None]


def attention_shapes(model: CausalLM, kv_dtype: torch.dtype) -> list[AttentionShape | LatentShape]:
    """Return the heads of this rank's attention, each kind once; none where Triton's kernels do not serve it."""
    shapes = dict.fromkeys(block.self_attn.attention_shape(kv_dtype) for block in model.model.layers)
    return [shape for shape in shapes if shape is not None]


def expert_shapes(model: CausalLM) -> list[ExpertShape]:
    """Return the products of this rank's experts, each kind once."""
    mixtures = [block.mixture for block in model.model.layers if block.mixture is not None]
    return list(dict.fromkeys(shape for mixture in mixtures for shape in mixture.expert_shapes()))


def bytes_per_token(model: CausalLM, weights_bytes: int) -> int:
    """Return the bytes of this rank's weights that a token meets: of experts those of its own, as if in 16 bits.

    weights_bytes: of all its weights.
    """
    for block in model.model.layers:
        if block.mixture is not None:
            experts, routing = block.mixture.experts, block.mixture.gate.routing
            for weight in (experts.gate_up_proj.weight, experts.down_proj.weight):
                weights_bytes -= sum(tensor.nbytes for _, tensor in weight.tensors())
                weights_bytes += 2 * weight.n * weight.k * routing.top_k // routing.num_experts
    return weights_bytes


def measure_step(runner: ModelRunner, num_tokens: int, num_samples: int, max_len: int) -> int:
    """Bytes that the largest step takes on the device: a full chunk of prompts, and logits of every row.

    Counted as the allocator reserves them, fragments included; they stay reserved for the runner's stream.
    """
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    _run_largest(runner, num_tokens, num_samples, max_len)
    return torch.cuda.memory_reserved() - before


def load_kernels(runner: ModelRunner, max_samples: int, max_len: int) -> None:
    """Run one step of each size that has no graph, through few blocks of the model: see `StepGraphs.eager_shape`.

    Steps whose layers are split follow, for the sizes of their parts.
    """
    if runner.graphs is None or not (sizes := runner.graphs.eager_sizes()):
        return
    samples = range(SAMPLE_MULTIPLE, max_samples + 1, SAMPLE_MULTIPLE)
    with runner.model.model.few_layers():
        for num_tokens, num_samples in itertools.zip_longest(sizes, samples, fillvalue=SAMPLE_MULTIPLE):
            _run_prompts(runner, _full_prompts(num_tokens, max_len), num_samples, is_greedy=True)
        if not runner.splitter.can_split:
            return
        largest = min(STEP_TOKENS, runner.stager.max_tokens // 2)
        for num_tokens, num_free_sms in zip(range(128, largest + 1, 128), itertools.cycle(FLOPS_PER_BYTE)):
            prompts = _full_prompts(2 * num_tokens, max_len)
            _run_prompts(runner, prompts, SAMPLE_MULTIPLE, corun=Corun(num_tokens, num_free_sms))


def _run_largest(runner: ModelRunner, num_tokens: int, num_samples: int, max_len: int) -> None:
    """Run a full chunk of prompts, and a few tokens of as many prompts as make a difference to kernels."""
    _run_prompts(runner, _full_prompts(num_tokens, max_len), num_samples)
    has_latents = any(isinstance(shape, LatentShape) for shape in attention_shapes(runner.model, runner.kv.dtype))
    if has_latents:
        num_new = min(MANY_TOKENS, num_tokens, max_len)
        _run_prompts(runner, [num_new], num_samples, context_len=max_len - num_new)
    contexts = (0, max(min(LONG_CONTEXT, max_len - 2), 0)) if has_latents else (0,)
    for num_prompts, context_len in itertools.product(KERNEL_PROMPTS, contexts):
        _run_prompts(runner, [2] * min(num_prompts, num_samples), num_samples, context_len=context_len)


def _full_prompts(num_tokens: int, max_len: int) -> list[int]:
    """Lengths of prompts, as long as they may be, that `num_tokens` have room for."""
    length = min(num_tokens, max_len)
    return [length] * (num_tokens // length)


def _run_prompts(
    runner: ModelRunner,
    q_lens: list[int],
    num_samples: int,
    is_greedy: bool = False,
    corun: Corun | None = None,
    context_len: int = 0,
) -> None:
    """One step of prompts of row 0, each behind a context, with logits and tokens of `num_samples`."""
    num_tokens, lens = sum(q_lens), np.array(q_lens, np.int32)
    slots, num_windows = np.arange(num_tokens, dtype=np.int32), runner.kv.num_window_slots
    plan = Plan(
        rows=np.zeros(len(lens), np.int32),
        q_lens=lens,
        seq_lens=lens + np.int32(context_len),
        input_ids=np.zeros(num_tokens, np.int32),
        out_cache_loc=1 + slots % (runner.kv.num_slots - 1),  # a small pool has fewer
        window_cache_loc=None if num_windows is None else 1 + slots % (num_windows - 1),
        num_decodes=0,
        samples=np.zeros(num_samples, np.int32),
        epochs=np.zeros(len(lens), np.int64),
        rope=np.zeros((3, num_tokens), np.int32) if runner.model.has_rope_axes else None,
    )
    with torch.cuda.stream(runner.stream), torch.inference_mode():
        runner.stager.upload(runner.stager.write(plan, StepShape.of(plan)))
        staged = runner.stager.views(StepShape.of(plan), plan)
        wanted = runner.forward(staged.batch, corun)[staged.sample_tokens]
        logits = runner.model.lm_head.gather(runner.model.compute_logits(wanted))
        if logits is not None:
            work = runner.sampler.plan_work(plan)
            work.is_greedy = is_greedy
            runner.sampler.sample(logits, work, staged.sample_rows, staged.sample_positions)
        runner.stager.slot_table[0].zero_()  # a smaller pool that follows has no such slots
    torch.cuda.synchronize()  # the staging buffer is used again
