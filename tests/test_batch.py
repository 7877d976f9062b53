"""Staging: a padded step, as CUDA graphs run it, gives the same logits as the step itself."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.build import EngineParts, build
from engine.config import EngineConfig
from engine.layers.forward_batch import FeatureRows, Features
from engine.ranks.leader import StepHeader
from engine.schedule.cohort import Cohort
from engine.schedule.plan import FeaturePart, Groups, Plan
from engine.schedule.rows import Rows
from engine.step.batch import BATCH_FIELDS, GROUP_FIELDS, SAMPLE_FIELDS, StagedBatch, Stager
from engine.step.batch import plan_of as read_plan
from engine.step.cuda_graph import (
    MAX_PROMPTS,
    GraphSizes,
    StepGraphs,
    fitting_ladders,
    largest_size,
    rounded_up,
    unpadded_sizes,
    useful_sizes,
)
from engine.step.fields import FIELDS, Field, Layout, Size, StepShape
from kernels.one_token import LONG_CONTEXT


@pytest.fixture(scope="module")
def parts(tiny_llama: Path) -> EngineParts:
    config = EngineConfig(model_path=str(tiny_llama), dtype="float32", device="cpu", max_total_tokens=512)
    return build(config, on_progress=lambda line: None)


def plan_of(decodes: list[int], prompts: list[int], groups: Groups | None = None, every: int = 2) -> Plan:
    """Return the plan of a step in which no two requests share a slot, and every `every`th is sampled.

    decodes: lengths so far, of rows 1, 2, ...; prompts: tokens of each, from the start.
    """
    lens = np.array([n + 1 for n in decodes] + prompts, np.int32)
    q_lens = np.array([1] * len(decodes) + prompts, np.int32)
    rng = np.random.default_rng(0)
    num_tokens = int(q_lens.sum())
    return Plan(
        rows=np.arange(1, len(lens) + 1, dtype=np.int32),
        q_lens=q_lens,
        seq_lens=lens,
        input_ids=rng.integers(3, 300, num_tokens).astype(np.int32),
        out_cache_loc=np.arange(300, 300 + num_tokens, dtype=np.int32),
        num_decodes=len(decodes),
        samples=np.arange(len(lens), dtype=np.int32)[::every],
        epochs=np.zeros(len(lens), np.int64),
        groups=groups,
    )


def logits_of(parts: EngineParts, plan: Plan, shape: StepShape) -> torch.Tensor:
    runner = parts.runner
    table, buffer = runner.stager.slot_table, runner.kv.buffers[0]
    table.zero_()
    table[1:, :200] = torch.arange(1, 201, dtype=torch.int32)  # what decodes have seen: slots all rows share
    generator = torch.Generator().manual_seed(0)
    buffer.copy_(torch.randn(buffer.shape, generator=generator))
    runner.stager.upload(runner.stager.write(plan, shape))
    staged: StagedBatch = runner.stager.views(shape, plan)
    batch = staged.batch
    batch.q_lens_host, batch.seq_lens_host = np.diff(batch.cu_q_lens.numpy()), batch.seq_lens.numpy()
    if plan.features:
        rows = torch.cat([part.features[:, part.first : part.last] for part in plan.features], dim=1)
        if staged.feature_tokens is not None:
            batch.features = Features(staged.feature_tokens.long(), rows[0], rows[1:])
        elif staged.feature_rows is not None:
            room = torch.cat([rows, torch.full((2, 5, rows.shape[2]), torch.nan)], dim=1)  # of steps before
            batch.features = FeatureRows(staged.feature_rows, room[0], room[1:])
    with torch.inference_mode():
        hidden = runner.forward(batch)
        return runner.model.compute_logits(hidden[staged.sample_tokens])[: len(plan.samples)]


@pytest.mark.parametrize(
    ("decodes", "prompts", "shape"),
    [
        ([5, 17, 3], [], StepShape(8, 0, 0, 8, False)),
        ([], [7], StepShape(0, 4, 32, 4, False)),
        ([5, 17, 3], [9, 4, 2], StepShape(8, 16, 32, 24, False)),
        ([5, 17, 3], [9, 23], StepShape(3, 2, 32, 5, False)),
    ],
)
def test_padding_changes_no_logits(
    parts: EngineParts, decodes: list[int], prompts: list[int], shape: StepShape
) -> None:
    plan = plan_of(decodes, prompts, every=1 if shape.is_decode else 2)
    exact = logits_of(parts, plan, StepShape.of(plan))
    padded = logits_of(parts, plan, shape)
    assert len(exact) == len(plan.samples)
    torch.testing.assert_close(padded, exact, rtol=1e-4, atol=1e-4)


def test_of_decodes_that_are_not_all_sampled_those_that_are_get_their_own_logits(parts: EngineParts) -> None:
    some, all_of_them = plan_of([5, 17, 3], []), plan_of([5, 17, 3], [], every=1)
    exact = logits_of(parts, all_of_them, StepShape.of(all_of_them))
    torch.testing.assert_close(logits_of(parts, some, StepShape.of(some)), exact[::2], rtol=1e-4, atol=1e-4)


def test_tokens_of_pictures_get_the_same_vectors_in_a_graphs_step(parts: EngineParts) -> None:
    plan = plan_of([5, 17, 3], [9, 4, 2])
    plain = logits_of(parts, plan, StepShape.of(plan))
    features = torch.randn(2, 6, parts.model_config.hidden_size)  # a vector, and what is added behind the first layer
    plan.features = [
        FeaturePart(np.array([2]), features, 1, 2),  # a prompt's last token, which stands with the decodes
        FeaturePart(np.array([4, 5, 13]), features, 3, 6),
    ]
    exact = logits_of(parts, plan, StepShape.of(plan))
    padded = logits_of(parts, plan, StepShape(8, 16, 32, 24, False, has_feature_rows=True))
    torch.testing.assert_close(padded, exact)
    assert not torch.allclose(exact, plain)


def test_steps_without_a_graph_have_few_sizes_and_none_too_large() -> None:
    def sizes(num_tokens: int) -> StepShape:
        return rounded_up(StepShape(100, 3, num_tokens - 100, 103, False), max_tokens=9000)

    totals = [sizes(num_tokens).num_prefill_tokens + 100 for num_tokens in range(2049, 9001)]
    assert len(set(totals)) <= 17
    assert all(num <= total <= min(1.125 * num, 9000) for num, total in enumerate(totals, start=2049))
    assert 8192 in totals, "a full chunk is computed without padding"


def test_rounding_a_step_up_changes_no_logits(parts: EngineParts) -> None:
    plan = plan_of([5, 17, 3], [9, 4, 23])
    shape = rounded_up(StepShape.of(plan), max_tokens=64)
    assert (shape.num_prefill_tokens, shape.num_samples) == (40 - 3, 64)
    exact = logits_of(parts, plan, StepShape.of(plan))
    torch.testing.assert_close(logits_of(parts, plan, shape)[: len(exact)], exact, rtol=1e-4, atol=1e-4)


def test_padding_beside_a_shared_prefix_changes_no_logits(parts: EngineParts) -> None:
    own_starts = np.array([4, 4, 0], np.int32)
    groups = Groups(np.array([4], np.int32), np.array([0, 2], np.int32), np.array([0, 1], np.int32), own_starts)
    plan = plan_of([5, 17, 3], [9, 4], groups)
    exact = logits_of(parts, plan_of([5, 17, 3], [9, 4]), StepShape.of(plan)._replace(has_groups=False))
    padded = logits_of(parts, plan, StepShape(8, 16, 32, 24, True))
    torch.testing.assert_close(padded, exact, rtol=1e-4, atol=1e-4)


def test_padding_writes_to_the_dump_slot_only(parts: EngineParts) -> None:
    plan = plan_of([5, 17, 3], [9])
    logits_of(parts, plan, StepShape.of(plan))
    exact = parts.runner.kv.buffers[0].clone()
    logits_of(parts, plan, StepShape(8, 16, 32, 24, False))
    torch.testing.assert_close(parts.runner.kv.buffers[0][:, :, 1:], exact[:, :, 1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("max_prompt_tokens", [8192, 2048, 16, 0])
@pytest.mark.parametrize("max_tokens", [30_000, 2117])
@pytest.mark.parametrize("max_requests", [1024, 100, 24, 8])
def test_ladders_keep_to_their_limits_and_cover_all_numbers_of_requests(
    max_prompt_tokens: int, max_tokens: int, max_requests: int
) -> None:
    ladders = fitting_ladders(max_prompt_tokens, max_tokens, max_requests)
    for ladder in ladders:
        assert ladder.num_decodes <= max_requests and ladder.num_tokens[-1] <= max_prompt_tokens
        assert ladder.num_decodes + ladder.num_tokens[-1] <= max_tokens
    assert bool(ladders) == (max_prompt_tokens >= 32)
    for has_groups in (False, True):
        ours = [ladder for ladder in ladders if ladder.has_groups == has_groups]
        if max_prompt_tokens >= 512:
            assert max(ladder.num_decodes for ladder in ours) == min(1024, max_requests)
            assert max(ladder.num_prompts for ladder in ours) >= min(MAX_PROMPTS, max_requests)
        assert len({(ladder.num_decodes, ladder.num_prompts, ladder.num_tokens) for ladder in ours}) == len(ours)


@pytest.mark.parametrize("has_groups", [False, True])
@pytest.mark.parametrize("num_decodes", [0, 4, 40, 300, 1000])
def test_steps_of_unpadded_sizes_have_a_graph_or_a_shape_just_as_large(num_decodes: int, has_groups: bool) -> None:
    ladders = fitting_ladders(8192, 2117, 1024)
    sizes = unpadded_sizes(ladders, num_decodes, has_groups, max_tokens=8192)
    assert sizes == sorted(set(sizes)) and num_decodes + sizes[-1] == 8192
    fitting = [ladder for ladder in ladders if ladder.num_decodes >= num_decodes and ladder.has_groups == has_groups]
    for size in sizes:
        if ladder := next((ladder for ladder in fitting if size <= ladder.num_tokens[-1]), None):
            assert size in ladder.num_tokens
        else:
            eager = StepShape(num_decodes, 1, size, 1, has_groups)
            assert rounded_up(eager, 8192).num_prefill_tokens == size


def test_without_graphs_no_size_is_preferred() -> None:
    assert unpadded_sizes([], 4, has_groups=False, max_tokens=8192) == []
    assert largest_size([], 4, has_groups=False) == 0


@pytest.mark.parametrize(("num_decodes", "size"), [(0, 2048), (8, 2040), (9, 2016), (40, 1024), (1000, 512)])
def test_the_largest_graph_of_a_step_has_room_for_its_decodes(num_decodes: int, size: int) -> None:
    assert largest_size(fitting_ladders(8192, 2117, 1024), num_decodes, has_groups=False) == size


@pytest.mark.parametrize(
    ("num_decodes", "num_tokens", "shape"),
    [(2, 600, (32, 608)), (2, 609, (8, 760)), (8, 1272, (8, 1272)), (9, 1240, (32, 1248)), (9, 610, (32, 736))],
)
def test_few_decodes_beside_long_chunks_have_few_places(
    num_decodes: int, num_tokens: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = graphs_of(4096, has_latents=False, monkeypatch=monkeypatch)
    found = graphs.shape_for(plan_of([9] * num_decodes, [num_tokens], every=1))
    assert found is not None and (found.num_decodes, found.num_prefill_tokens) == shape
    assert num_tokens <= shape[1] in graphs.prompt_sizes(num_decodes, has_groups=False)[0]


def test_a_size_is_used_only_if_no_larger_one_takes_less() -> None:
    assert useful_sizes([64, 128, 192, 256], [1.0, 2.0, 3.0, 2.5]) == [64, 128, 256]
    assert useful_sizes([64, 128], [1.01, 1.0]) == [64, 128], "they take the same time"
    assert useful_sizes([64, 128, 192], [3.0, 3.0, 2.0]) == [192]
    assert useful_sizes([64], [1.0]) == [64]


def test_groups_of_a_padded_step_are_the_plans_own(parts: EngineParts) -> None:
    own_starts = np.array([4, 4, 0], np.int32)
    groups = Groups(np.array([4], np.int32), np.array([0, 2], np.int32), np.array([0, 1], np.int32), own_starts)
    plan = plan_of([5, 17, 3], [], groups, every=1)
    stager = parts.runner.stager
    shape = StepShape(8, 0, 0, 8, True)
    stager.upload(stager.write(plan, shape))
    shared = stager.views(shape, plan).batch.shared
    assert shared is not None
    assert shared.prefix_lens.tolist() == [4, 0, 0, 0]
    assert shared.cu_members.tolist() == [0, 2, 2, 2, 2]
    assert shared.members.tolist()[:2] == [0, 1]
    assert shared.own_starts.tolist() == [4, 4, 0, 0, 0, 0, 0, 0]


def test_a_later_step_of_the_same_requests_is_staged_as_if_there_had_been_none_before() -> None:
    table = torch.zeros(9, 64, dtype=torch.int32)
    stager = Stager(64, 8, table)
    rng = random.Random(0)
    some, others = (
        Groups(np.array([n], np.int32), np.array([0, 2], np.int32), np.array([0, 1], np.int32), np.zeros(3, np.int32))
        for n in (4, 5)
    )
    sets = [
        plan_of(lens, [], groups, every=1)
        for lens, groups in (([5, 17, 3], some), ([5, 17, 3], None), ([9, 8], None), ([7], None))
    ]
    for plan in sets[:3]:
        plan.cohort = Cohort(Rows(8, 64), np.empty(0, np.int64))  # each its own; the last set is nobody's
    for i in range(300):
        plan = rng.choice(sets)
        plan.seq_lens = plan.seq_lens + 1
        plan.input_ids = np.full(plan.num_decodes, rng.choice([-1, 7]), np.int32)
        plan.out_cache_loc = plan.out_cache_loc + 5
        shape = rng.choice([StepShape.of(plan), StepShape(8, 0, 0, 8, plan.groups is not None)])
        fresh = Stager(64, 8, table).write(plan, shape).host
        assert torch.equal(stager.write(plan, shape).host, fresh)
        if i % 7 == 0:  # what another rank wrote, and other groups of the same requests
            stager.copy(np.full(80, 9, np.int32))
            sets[0].groups = others if sets[0].groups is some else some


def test_a_single_request_with_a_long_context_has_a_graph_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def graphs(batch_sizes: list[int], max_len: int) -> tuple[StepGraphs, list[list[int]]]:
        lens: list[list[int]] = []
        stager = Stager(8, 8, torch.zeros(9, max_len, dtype=torch.int32))

        def run(staged: StagedBatch) -> tuple[torch.Tensor, torch.Tensor]:
            lens.append(staged.batch.seq_lens.tolist())
            return torch.empty(0), torch.empty(0)

        made = StepGraphs(GraphSizes(batch_sizes, 0, 8, 8), stager, run, lambda: None)
        made.run_all()
        return made, lens

    made, lens = graphs([1, 2], LONG_CONTEXT + 9)
    assert [LONG_CONTEXT + 1] in lens and [1] in lens
    for num_cached, is_long in ((LONG_CONTEXT - 1, False), (LONG_CONTEXT, True)):
        shape = made.shape_for(plan_of([num_cached], [], every=1))
        assert shape == StepShape(1, 0, 0, 1, False, is_long=is_long)
    assert made.shape_for(plan_of([LONG_CONTEXT] * 2, [], every=1)) == StepShape(2, 0, 0, 2, False)
    assert [LONG_CONTEXT + 1] not in graphs([1, 2], LONG_CONTEXT)[1]
    made, lens = graphs([2], LONG_CONTEXT + 9)
    assert [LONG_CONTEXT + 1] not in lens
    assert made.shape_for(plan_of([LONG_CONTEXT], [], every=1)) == StepShape(2, 0, 0, 2, False)


def graphs_of(max_prompt_tokens: int, *, has_latents: bool, monkeypatch: pytest.MonkeyPatch) -> StepGraphs:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    stager = Stager(4096, 64, torch.zeros(65, 16, dtype=torch.int32))
    sizes = GraphSizes([1, 2, 4], max_prompt_tokens, 4096, 64, has_latents)
    return StepGraphs(sizes, stager, lambda _staged: (torch.empty(0), torch.empty(0)), lambda: None)


@pytest.mark.parametrize(
    ("has_latents", "max_prompt_tokens", "kept_to"), [(False, 512, 512), (True, 512, 0), (True, 4096, 2040)]
)
def test_chunks_do_not_keep_to_graphs_whose_prompts_attend_to_latents(
    has_latents: bool, max_prompt_tokens: int, kept_to: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = graphs_of(max_prompt_tokens, has_latents=has_latents, monkeypatch=monkeypatch)
    assert graphs.prompt_sizes(2, has_groups=False)[1] == kept_to


def test_a_graph_of_latents_serves_many_prompt_tokens_behind_short_contexts_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graphs = graphs_of(4096, has_latents=True, monkeypatch=monkeypatch)
    for num_tokens, num_cached, size in (
        (400, 8000, 416), (500, 8000, None), (700, 1000, 760), (700, 1084, 760), (700, 1085, None),
    ):  # fmt: skip
        plan = plan_of([9, 9], [num_tokens], every=1)
        plan.seq_lens[2] += num_cached
        shape = graphs.shape_for(plan)
        assert (shape and shape.num_prefill_tokens) == size
        assert shape is None or graphs.is_slow_way(plan, shape) == (num_tokens < 500)
    assert not graphs.is_slow_way(plan_of([9], [], every=1), StepShape(1, 0, 0, 1, False))
    assert graphs.eager_sizes()[:2] == [576, 640], "behind long contexts"


def test_a_field_is_added_by_a_line_in_the_table() -> None:
    shapes = [StepShape(3, 0, 0, 3, False), StepShape(3, 2, 9, 4, False), StepShape(4, 1, 5, 5, True)]
    mrope = Field("mrope", Size.TOKENS, width=3, when=lambda shape: shape.num_prefills > 0)
    for shape in shapes:
        before, after = Layout(shape, FIELDS), Layout(shape, (*FIELDS, mrope))
        assert {name: place for name, place in after.places.items() if name != "mrope"} == before.places
        if not shape.num_prefills:
            assert after.size == before.size and "mrope" not in after.places
            continue
        buffer = np.zeros(after.size, np.int32)
        views = after.views(buffer)
        assert views["mrope"].shape == (3, shape.num_tokens)
        views["mrope"][:] = 1
        assert all((view == 0).all() for name, view in views.items() if name != "mrope")
        assert after.places["mrope"].start % 4 == 0 and buffer.sum() == 3 * shape.num_tokens


def test_every_field_reaches_a_batch_under_its_name() -> None:
    named = {*BATCH_FIELDS, *SAMPLE_FIELDS, *GROUP_FIELDS}
    assert named == {field.name for field in FIELDS}


@pytest.mark.parametrize(("decodes", "prompts"), [([5, 17, 3], []), ([5, 17, 3], [9, 4]), ([], [7])])
def test_a_rank_reads_from_a_staged_step_the_plan_that_was_written(decodes: list[int], prompts: list[int]) -> None:
    plan = plan_of(decodes, prompts, every=1)
    shape = StepShape.of(plan)
    staged = Stager(64, 8, torch.zeros(9, 64, dtype=torch.int32)).write(plan, shape)
    header = StepHeader(shape, is_graph=False, num_samples=len(plan.samples), is_plain=True, num_prompts=0)
    message = np.concatenate([header.to_message(), staged.host.numpy()])
    received, rest = StepHeader.from_message(message)
    assert received == header and received.shape == shape
    read = read_plan(rest, received.shape, received.num_samples)
    for name in ("rows", "q_lens", "seq_lens", "input_ids", "out_cache_loc"):
        assert np.array_equal(getattr(read, name), getattr(plan, name)), name
    assert (read.num_decodes, len(read.samples)) == (plan.num_decodes, len(plan.samples))
