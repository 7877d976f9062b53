"""Tuned configurations: what is shipped serves as before; what is new is timed once, kept, and found again."""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from engine.layers.communicator import Communicator
from engine.step.warmup import bytes_per_token, expert_shapes
from kernels import launch, quantized_cuda, quantized_few, quantized_tasks, triton_tasks, tune, tuning
from kernels.card import HOPPER, INTERPRETER, Card
from kernels.experts import ExpertShape
from kernels.launch import arrival_counters
from kernels.quantized_cuda import CudaQuantizedWeight
from kernels.quantized_few import FEW_CONFIGS
from kernels.quantized_format import Format
from kernels.quantized_kernel import Kind
from kernels.quantized_many import MANY_CONFIGS
from kernels.tile_sizes import least_rows, tile_bytes
from kernels.triton_decode import (
    DECODE_BYTES_CONFIGS,
    DECODE_CONFIGS,
    DECODE_LIMITS,
    PREFIX_CONFIGS,
    decode_config,
)
from kernels.triton_experts import TILE_CODES, TILE_CONFIGS
from kernels.triton_gemm import GEMV_CONFIGS, GemvConfig, default_gemv_config
from kernels.triton_mla import ABSORBED_CONFIGS, EXPANDED_CONFIGS, LATENT_DECODE_LIMITS
from kernels.triton_mla import DECODE_CONFIGS as LATENT_DECODE_CONFIGS
from kernels.triton_prefill import PREFILL_CONFIGS
from kernels.triton_skinny import SKINNY_CONFIGS, SkinnyConfig, default_skinny_config
from kernels.triton_softmax import DecodeConfig, PrefillConfig, default_prefill_config
from kernels.tuning import AttentionShape, Configs, LatentShape, Task, WeightShape
from tests.cards import CARDS
from tests.test_models import MakeTinyModel, TinyEngine

CARD = torch.device("cuda", 0)  # nothing is run on it
CPU = torch.device("cpu")
ALL_CONFIGS: tuple[Configs[Any], ...] = (
    GEMV_CONFIGS, SKINNY_CONFIGS, DECODE_CONFIGS, DECODE_BYTES_CONFIGS, PREFIX_CONFIGS, PREFILL_CONFIGS,
    LATENT_DECODE_CONFIGS, ABSORBED_CONFIGS, EXPANDED_CONFIGS, TILE_CONFIGS, FEW_CONFIGS, MANY_CONFIGS,
)  # fmt: skip


class Config(NamedTuple):
    block: int
    num_warps: int = 4


DEFAULT, FAST, SLOW, BROKEN = Config(1), Config(2), Config(3, 8), Config(4)
TAKES_US = {DEFAULT: 10.0, FAST: 5.0, SLOW: 20.0}


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Give `CARD` a name, and this machine an empty cache folder. Calling it is a new start, on a card of that name."""

    def start(name: str = "Test Card 9", limits: Card = CARDS[90]) -> None:
        monkeypatch.setattr(tuning, "card_of", lambda device: limits if device.type == "cuda" else INTERPRETER)
        monkeypatch.setattr(tuning, "card_name", lambda device: name if device.type == "cuda" else device.type)
        forget()

    def forget() -> None:
        tuning.tables.cache_clear()
        for configs in ALL_CONFIGS:
            configs.get.cache_clear()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    start()
    yield start
    forget()


def new_configs() -> Configs[Config]:
    return Configs("test", Config, lambda *_: DEFAULT)


class Bench:
    """Stands in for a GPU: every launch takes what `TAKES_US` says, a second passes for each task compiled."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.timed: list[Config] = []
        self.prepared: list[tuple[int, ...]] = []

    def task(self, configs: Configs[Config], *key: int) -> Task:
        def prepare() -> list[Callable[[Config], object]]:
            self.prepared.append(key)
            return [self.launch] * 3

        return Task(configs, key, [SLOW, BROKEN, FAST], prepare)

    def launch(self, config: Config) -> None:
        if config == BROKEN:
            raise RuntimeError("out of resource: shared memory")
        self.timed.append(config)

    def timer(self, launches: list[Callable[[], object]]) -> Callable[[], float]:
        for run in launches:
            run()
        config = self.timed[-1]
        return lambda: TAKES_US[config]

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        self.now_s += 1.0
        yield

    def tune(self, tasks: list[Task], budget_s: float = 100.0) -> int:
        return tune.tune(tasks, budget_s, CARD, timer=self.timer, compiling=self.compiling, clock=lambda: self.now_s)


def cache_file(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "radixloop" / "tuned").iterdir()
    return path


# what is shipped


def test_known_shapes_have_the_configurations_that_were_found_for_them(card: Callable[[str], None]) -> None:
    for name in ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"):
        card(name)
        assert GEMV_CONFIGS.get(CARD, 6144, 4096) == GemvConfig(4, 1024, 4, 4)
        assert GEMV_CONFIGS.get(CARD, 151936, 1024) == GemvConfig(2, 1024, 4, 1)
        assert SKINNY_CONFIGS.get(CARD, 6144, 1024, 32) == SkinnyConfig(16, 64, 2, 6)
        assert DECODE_CONFIGS.get(CARD, 128, 4) == DecodeConfig(32, 1, 4, 2)
        assert DECODE_CONFIGS.get(CARD, 128, 1 << 20) == DecodeConfig(32, 1, 2, 8)
        assert PREFILL_CONFIGS.get(CARD, 128) == PREFIX_CONFIGS.get(CARD, 128) == PrefillConfig(64, 64, 4, 3)


def test_shapes_that_no_table_has_get_the_kernels_default(card: Callable[[str], None]) -> None:
    assert GEMV_CONFIGS.get(CARD, 999, 512) == default_gemv_config(999, 512)
    assert SKINNY_CONFIGS.get(CARD, 999, 768, 32) == default_skinny_config(768, 32)
    assert PREFILL_CONFIGS.get(CARD, 512) == default_prefill_config(512)


@pytest.mark.parametrize("limits", [CARDS[number] for number in (75, 80, 86, 89, 120)], ids=lambda card: card.name)
def test_attention_is_cut_so_that_a_cards_shared_memory_holds_it(limits: Card, card: Callable[..., None]) -> None:
    def needed(config: DecodeConfig | PrefillConfig, key_width: int, value_width: int) -> int:
        assert config.block_m >= least_rows(limits) and config.block_n >= 16 and config.num_stages >= 1
        return tile_bytes(limits, config.block_m, config.block_n, config.num_stages, key_width, value_width)

    card(limits.name, limits)
    for head_dim in (16, 64, 128, 256):
        configs: list[DecodeConfig | PrefillConfig] = [
            *(DECODE_CONFIGS.get(CARD, head_dim, limit) for limit in DECODE_LIMITS),
            PREFILL_CONFIGS.get(CARD, head_dim),
            PREFIX_CONFIGS.get(CARD, head_dim),
        ]
        for config in configs:
            assert needed(config, head_dim, head_dim) <= limits.shared_bytes
    for config in (LATENT_DECODE_CONFIGS.get(CARD, 512, 8, 4), ABSORBED_CONFIGS.get(CARD, 512)):
        assert needed(config, 512 + 64, 0) <= limits.shared_bytes
    assert needed(EXPANDED_CONFIGS.get(CARD, 128, 128), 128 + 64, 128) <= limits.shared_bytes


def test_no_more_is_cut_than_a_card_lacks(card: Callable[..., None]) -> None:
    found = {}
    for number in (90, 80, 86, 75):
        card(f"card of {number}", CARDS[number])
        found[number] = tuple(PREFILL_CONFIGS.get(CARD, 256))
    assert found == {90: (128, 64, 8, 3), 80: (128, 64, 8, 2), 86: (64, 32, 4, 2), 75: (32, 16, 4, 2)}


def test_what_was_found_on_a_card_is_taken_as_it_is(card: Callable[..., None]) -> None:
    card("NVIDIA H100 PCIe", CARDS[75])
    assert PREFILL_CONFIGS.get(CARD, 256) == PrefillConfig(128, 64, 8, 3)
    card("NVIDIA A10", CARDS[86])
    PREFILL_CONFIGS.record(CARD, (256,), PrefillConfig(64, 64, 8, 3))
    assert PREFILL_CONFIGS.get(CARD, 256) == PrefillConfig(64, 64, 8, 3)


def test_the_number_of_requests_decides_about_decode_configurations(card: Callable[[str], None]) -> None:
    q, cache = torch.empty(1, 8, 128, dtype=torch.bfloat16), torch.empty(1, 8, 128, dtype=torch.bfloat16)
    for limit in DECODE_LIMITS:
        DECODE_CONFIGS.record(CPU, (128, limit), DecodeConfig(32, 1, 4, limit))
    found = [decode_config(q, num_requests, cache).programs_per_sm for num_requests in (1, 4, 5, 16, 17, 64, 65, 4000)]
    assert found == [limit for limit in DECODE_LIMITS for _ in range(2)]
    found = [decode_config(q, num_requests, cache[:, :4]).programs_per_sm for num_requests in (4, 16, 128, 129)]
    assert found == list(DECODE_LIMITS), "half as many heads fill the chip half as well"


def test_a_cache_of_8_bits_has_decode_configurations_of_its_own(card: Callable[[str], None]) -> None:
    q, cache = torch.empty(1, 4, 128, dtype=torch.bfloat16), torch.empty(1, 4, 128, dtype=torch.bfloat16)
    config = DecodeConfig(32, 1, 3, 8)
    DECODE_BYTES_CONFIGS.record(CPU, (128, DECODE_LIMITS[-1]), config)
    assert decode_config(q, 4000, cache.to(torch.float8_e4m3fn)) == config != decode_config(q, 4000, cache)


def test_a_card_has_its_own_table_and_others_are_tuned_anew(card: Callable[[str], None]) -> None:
    for name, is_tuned in (("NVIDIA H200", True), ("NVIDIA H100 PCIe", True), ("NVIDIA L4", False), ("cpu", False)):
        card(name)
        assert GEMV_CONFIGS.is_tuned(CARD, (6144, 4096)) is is_tuned, name


def test_every_shipped_table_is_as_it_would_be_written() -> None:
    paths = list(tuning.SHIPPED.glob("*.json"))
    assert tuning.SHIPPED / tuning.FALLBACK in paths
    for path in paths:
        text = path.read_text()
        assert text == tuning.format_table(json.loads(text)["cards"], tuning.parse_table(text))


def test_writing_to_a_table_keeps_the_cards_and_shapes_that_it_has(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    tuning.write_table(path, ["A", "B"], {"gemv": {(1, 2): {"block_n": 4}}})
    tuning.write_table(path, ["B"], {"gemv": {(3, 4): {"block_n": 2}}})
    text = path.read_text()
    assert json.loads(text)["cards"] == ["A", "B"]
    assert set(tuning.parse_table(text)["gemv"]) == {(1, 2), (3, 4)}


# what is found


def test_a_new_shape_is_tuned_once_and_found_by_later_starts(card: Callable[[str], None], tmp_path: Path) -> None:
    configs, bench = new_configs(), Bench()
    assert configs.get(CARD, 7, 5) == DEFAULT
    assert bench.tune([bench.task(configs, 7, 5)]) == 1
    assert configs.get(CARD, 7, 5) == FAST and configs.get(CARD, 7, 6) == DEFAULT
    tuning.tables(CARD).save()
    assert "Test_Card_9-" in cache_file(tmp_path).name

    card("Test Card 9")
    configs, bench = new_configs(), Bench()
    assert configs.get(CARD, 7, 5) == FAST
    assert bench.tune([bench.task(configs, 7, 5)]) == 0
    assert not bench.prepared and bench.now_s == 0.0, "a later start has nothing to do"


def test_another_card_does_not_get_what_was_found(card: Callable[[str], None]) -> None:
    configs, bench = new_configs(), Bench()
    bench.tune([bench.task(configs, 7)])
    tuning.tables(CARD).save()
    card("Test Card 10")
    assert new_configs().get(CARD, 7) == DEFAULT


def test_files_of_several_models_are_one(card: Callable[[str], None]) -> None:
    for key in (7, 8):
        configs, bench = new_configs(), Bench()
        bench.tune([bench.task(configs, key)])
        others = tuning.Tables("Test Card 9", tuning.tables(CARD).cache_path)
        others.add("test", (9,), SLOW._asdict())
        others.save()  # another process, which has not seen the first one's
        tuning.tables(CARD).save()
        card("Test Card 9")
    assert [new_configs().get(CARD, key) for key in (7, 8, 9)] == [FAST, FAST, SLOW]


def test_the_default_stays_where_others_are_hardly_faster(
    card: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    configs, bench = new_configs(), Bench()
    monkeypatch.setitem(TAKES_US, FAST, 9.9)
    bench.tune([bench.task(configs, 7)])
    assert configs.get(CARD, 7) == DEFAULT and configs.is_tuned(CARD, (7,))


def test_a_kernel_none_of_whose_candidates_runs_keeps_its_default(card: Callable[[str], None]) -> None:
    configs, bench = new_configs(), Bench()
    tasks = [bench.task(configs, 7)._replace(candidates=[BROKEN])]

    def prepare() -> list[Callable[[Config], object]]:
        raise RuntimeError("CUDA out of memory")

    tasks.append(bench.task(configs, 8)._replace(prepare=prepare))
    bench.tune(tasks)
    assert configs.get(CARD, 7) == configs.get(CARD, 8) == DEFAULT


def test_tuning_ends_when_its_time_is_spent(card: Callable[[str], None], caplog: pytest.LogCaptureFixture) -> None:
    configs, bench = new_configs(), Bench()
    tasks = [bench.task(configs, key)._replace(candidates=[FAST] * 20) for key in range(9)]
    with caplog.at_level(logging.INFO, "kernels.tune"):
        assert bench.tune(tasks, budget_s=3.0) == 3
    assert bench.now_s <= 3.0
    assert [configs.get(CARD, key) for key in range(4)] == [FAST, FAST, FAST, DEFAULT]
    assert "3 of 9 new shapes" in caplog.text and "keep their defaults" in caplog.text
    assert bench.tune(tasks) == 6, "a later start goes on"


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"configs": {"test": {"x": {}}}}', '{"configs": {"test": [1]}}', "\0"]
)
def test_a_broken_cache_file_is_a_warning_and_is_replaced(
    card: Callable[[str], None], text: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tuning.tables(CARD).cache_path
    assert path is not None
    path.parent.mkdir(parents=True)
    path.write_text(text)
    card("Test Card 9")
    configs, bench = new_configs(), Bench()
    assert configs.get(CARD, 7) == DEFAULT
    assert str(path) in caplog.text
    bench.tune([bench.task(configs, 7)])
    tuning.tables(CARD).save()
    card("Test Card 9")
    assert new_configs().get(CARD, 7) == FAST


def test_a_cache_file_of_other_fields_is_a_warning(
    card: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    tuning.tables(CARD).add("test", (7,), {"block": 2, "num_moons": 1})
    assert new_configs().get(CARD, 7) == DEFAULT
    assert "num_moons" in caplog.text


def test_a_cache_folder_that_cannot_be_written_is_a_warning(
    card: Callable[[str], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "radixloop").write_text("a file where the folder should be")
    configs, bench = new_configs(), Bench()
    bench.tune([bench.task(configs, 7)])
    tuning.tables(CARD).save()
    assert "cannot be kept" in caplog.text
    assert configs.get(CARD, 7) == FAST


@pytest.mark.gpu
@pytest.mark.usefixtures("card")
def test_tuning_leaves_the_counters_of_attention_as_it_found_them() -> None:
    tune.tune_kernels([], 20.0, attention=[AttentionShape(4, 2, 16)])
    assert DECODE_CONFIGS.is_tuned(CARD, (16, DECODE_LIMITS[0]))
    assert not arrival_counters(CARD, 1).any()


def test_without_a_gpu_nothing_is_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(tune, "tune", lambda *_: pytest.fail("tuned"))
    tune.tune_kernels([WeightShape(64, 64)], attention=[AttentionShape(4, 2, 64)])
    assert tuning.tables(CPU).cache_path is None


# the tasks


SHAPES = [
    WeightShape(96, 256, has_norm=True), WeightShape(64, 256, has_residual=True), WeightShape(64, 256, "silu", True),
    WeightShape(40, 512, max_tokens=1),
]  # fmt: skip


def test_every_kernel_of_a_model_is_a_task_and_each_shape_once() -> None:
    tasks = triton_tasks.tasks_of(SHAPES, [AttentionShape(4, 2, 16)] * 2, torch.float16, CPU)
    assert len({(task.configs.kind, task.key) for task in tasks}) == len(tasks)
    keys: dict[str, list[Any]] = {}
    for task in tasks:
        keys.setdefault(task.configs.kind, []).append(task.key)
    assert keys == {
        "gemv": [(96, 256), (40, 512), (64, 256)],
        "decode": [(16, limit) for limit in DECODE_LIMITS],
        "prefill": [(16,)],
        "skinny": [(96, 256, 16), (64, 256, 16), (96, 256, 32), (64, 256, 32)],
        "prefix": [(16,)],
    }
    tasks = triton_tasks.tasks_of([], [LatentShape(6, 16, 8, 12, 32)], torch.float16, CPU)
    decodes = {("latent_decode", (32, 8, limit)) for limit in LATENT_DECODE_LIMITS}
    prompts = {("latent_absorbed", (32,)), ("latent_expanded", (16, 16))}
    assert {(task.configs.kind, task.key) for task in tasks} == decodes | prompts
    tasks = triton_tasks.tasks_of([], [], torch.float16, CPU, EXPERTS)
    fp4, heights = TILE_CODES.index("fp4"), triton_tasks.TILE_CANDIDATES
    assert [task.key for task in tasks] == [key for m in heights for key in ((96, 64, 0, m), (64, 96, fp4, m))]


KINDS = (
    "gemv", "skinny", "decode", "prefill", "prefix", "latent_decode", "latent_absorbed", "latent_expanded", "experts"
)  # fmt: skip
EXPERTS = [ExpertShape(2, 96, 64, "silu"), ExpertShape(2, 64, 96, form=Format("int4", 32, table="fp4"))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_tasks_launches_run_its_kernel_with_every_candidate(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_tasks, "ROTATION_BYTES", 1 << 17)
    limits = (*DECODE_LIMITS, *LATENT_DECODE_LIMITS)
    monkeypatch.setattr(triton_tasks, "DECODE_LENS", dict.fromkeys(limits, (2, 40)))
    monkeypatch.setattr(triton_tasks, "TILE_PAIRS", dict.fromkeys(triton_tasks.TILE_PAIRS, 3))
    for name, value in (("PROMPT_LEN", 24), ("PREFIX_REQUESTS", 3), ("PREFIX_LEN", 20), ("OWN_LEN", 4)):
        monkeypatch.setattr(triton_tasks, name, value)
    launched: list[str] = []
    monkeypatch.setattr(launch.Kernel, "launch", note_into(launched))
    attention: list[AttentionShape | LatentShape] = [AttentionShape(4, 2, 16), LatentShape(6, 16, 8, 12, 32)]
    for task in triton_tasks.tasks_of(SHAPES[:1], attention, torch.float16, CPU, EXPERTS):
        if task.configs.kind == kind:
            launches = task.prepare()
            assert len(launches) >= triton_tasks.MIN_LAUNCHES and task.candidates
            for config in task.candidates:
                launches[0](config)
    assert launched


def note_into(launched: list[str]) -> Callable[..., None]:
    return lambda kernel, *_: launched.append(kernel.name)


def test_a_token_meets_its_own_experts_alone(make_tiny_model: MakeTinyModel) -> None:
    import transformers

    sizes = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "hidden_size": 64}
    model = TinyEngine(make_tiny_model(transformers.Qwen3MoeConfig, "qwen3-moe, tuned", **sizes)).model
    num_layers, num_weights = len(model.model.layers), 3 * 32 * 64  # of an expert, in float32
    assert bytes_per_token(model, 1 << 30) == (1 << 30) - num_layers * (8 * 4 - 3 * 2) * num_weights


def test_the_experts_of_a_model_are_tuned_as_its_layers_multiply_by_them(make_tiny_model: MakeTinyModel) -> None:
    import transformers

    sizes = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "hidden_size": 64}
    folder = make_tiny_model(transformers.Qwen3MoeConfig, "qwen3-moe, tuned", **sizes)
    half = Communicator(1, 2)
    assert expert_shapes(TinyEngine(folder).model) == [ExpertShape(8, 64, 64, "silu"), ExpertShape(8, 64, 32)]
    assert expert_shapes(TinyEngine(folder, half, 2).model) == [ExpertShape(4, 64, 64, "silu"), ExpertShape(4, 64, 32)]


# weights of few bits


FEW_BITS = Kind(Format("int4", 128, has_zero=True, scale_dtype=torch.float16), torch.bfloat16, True, 128, torch.float16)
PACKED = [
    WeightShape(64, 1024, has_norm=True, max_tokens=1, kind=FEW_BITS),
    WeightShape(128, 1024, "silu", has_norm=True, max_tokens=1, kind=FEW_BITS),
    WeightShape(32, 1536, has_residual=True, max_tokens=1, kind=FEW_BITS),
]
PACKED_KEYS = [(128, 1024, 4, 1), (64, 1024, 4, 0), (32, 1536, 4, 0)]  # rows, inputs, bits, is gated


@pytest.fixture
def packed_tasks(card: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Task]]:
    """Return the tasks of `PACKED` and of weights of 16 bits on a card."""
    monkeypatch.setattr(quantized_tasks, "can_multiply_few", lambda _: True)

    def tasks(limits: Card, device: torch.device = CARD) -> list[Task]:
        card("Test Card 9", limits)
        for module in (quantized_tasks, quantized_few):
            monkeypatch.setattr(module, "card_of", lambda _: limits)
        for fits in ("fits_some", "fits_many"):
            monkeypatch.setattr(quantized_tasks, fits, lambda *_: limits.capability >= HOPPER)
        quantized_few._fitting.cache_clear()
        return quantized_tasks.quantized_tasks([*PACKED, *SHAPES], device)

    return tasks


@pytest.mark.parametrize(("capability", "kernel", "bucket"), [(90, "quantized_some", 16), (80, "quantized", 2)])
def test_products_of_few_bits_are_tuned_for_one_token_and_for_16(
    capability: int, kernel: str, bucket: int, packed_tasks: Callable[..., list[Task]]
) -> None:
    tasks = packed_tasks(CARDS[capability])
    wanted = [("quantized", (n, k, bits, 0, gated)) for n, k, bits, gated in PACKED_KEYS]
    wanted += [(kernel, (n, k, bits, bucket, gated)) for n, k, bits, gated in PACKED_KEYS]
    assert [(task.configs.kind, task.key) for task in tasks] == wanted
    assert all(1 <= len(task.candidates) <= 5 for task in tasks), "a start has no time for more"
    assert not triton_tasks.tasks_of(PACKED, [], torch.bfloat16, CARD)


def test_their_candidates_are_compiled_at_once_and_the_fastest_serves_later_starts(
    packed_tasks: Callable[..., list[Task]], card: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[tuple[str, str, str]] = []
    monkeypatch.setattr(tune, "compile_source", lambda *source: compiled.append(source))
    tasks, bench = packed_tasks(CARDS[90]), Bench()
    fastest = [task.candidates[-1] for task in tasks]
    takes_us = dict.fromkeys((config for task in tasks for config in task.candidates), 10.0) | dict.fromkeys(fastest, 5)

    def timer(launches: list[Callable[[], object]]) -> Callable[[], float]:
        return lambda: takes_us.get(launches[0](), 20.0)

    stand_ins = [task._replace(prepare=lambda: [lambda config: config]) for task in tasks]
    options: dict[str, Any] = {"timer": timer, "compiling": contextlib.nullcontext, "clock": lambda: bench.now_s}
    assert tune.tune(stand_ins, 60.0, CARD, **options) == len(tasks)
    assert {name for name, _, _ in compiled} == {"quantized_few", "quantized_some"}
    assert {source for task in tasks if task.source_of for source in map(task.source_of, task.candidates)} == set(
        compiled
    )
    tuning.tables(CARD).save()
    card("Test Card 9")
    assert [takes_us[task.configs.get(CARD, *task.key)] for task in tasks] == [5] * len(tasks)
    assert tune.tune(stand_ins, 60.0, CARD, **options) == 0


def test_their_candidates_are_launched_as_layers_multiply(
    packed_tasks: Callable[..., list[Task]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, str | None, bool, Any]] = []

    def note(_kind: Kind, x: torch.Tensor, *_: Any, config: Any, act: str | None, residual: Any, **_more: Any) -> None:
        seen.append((len(x), act, residual is not None, config))

    monkeypatch.setattr(triton_tasks, "ROTATION_BYTES", 1 << 17)
    monkeypatch.setattr(CudaQuantizedWeight, "_prepare", lambda *_: None)
    monkeypatch.setattr(quantized_cuda, "multiply_few", note)
    monkeypatch.setattr(quantized_cuda, "multiply_some", note)
    wanted: list[tuple[int, str | None, bool, Any]] = []
    for task, (num_tokens, shape) in zip(
        packed_tasks(CARDS[90], CPU),
        [(num_tokens, PACKED[i]) for num_tokens in (1, 16) for i in (1, 0, 2)],
        strict=True,
    ):
        launches = task.prepare()
        assert len(launches) >= triton_tasks.MIN_LAUNCHES
        for config in task.candidates:
            launches[0](config)
            wanted.append((num_tokens, shape.act, shape.has_residual, config))
    assert seen == wanted
