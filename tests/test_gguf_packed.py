"""GGUF files that stay packed give the logits of their dequantized selves, as the `gguf` package dequantizes them."""

import asyncio
import json
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from engine.checkpoint.folder import resolve_model
from engine.checkpoint.gguf_blocks import BLOCKS
from engine.checkpoint.gguf_convert import read_ahead
from engine.config import EngineConfig
from engine.errors import InvalidRequest, ModelError
from engine.layers.communicator import Communicator
from engine.layers.embedding import VocabParallelEmbedding
from engine.layers.layer import named_layers
from engine.layers.linear import Linear
from kernels.quantized import QuantizedWeight
from tests.test_engine import GPU_MIXES, MIXES, collect, make_state, prompts, running_engine
from tests.test_gguf_families import CASES, IDS, Case, make_checkpoint, write_file
from tests.test_models import TinyEngine, random_ids
from tests.test_quantization import engine_of
from tests.test_start import run
from tests.test_weights import TINY_GGUF

__all__ = ["prompts"]  # a fixture

VOCAB_SIZE, HIDDEN, KV = 384, 256, 128
SHAPES = {
    "token_embd": (VOCAB_SIZE, HIDDEN), "output": (VOCAB_SIZE, HIDDEN), "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (KV, HIDDEN), "attn_v": (KV, HIDDEN), "attn_output": (HIDDEN, HIDDEN), "ffn_gate": (512, HIDDEN),
    "ffn_up": (512, HIDDEN), "ffn_down": (HIDDEN, 512),
}  # fmt: skip
NORMS = {"output_norm": (HIDDEN,), "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,)}
TOKENS: Any = TINY_GGUF["tokenizer.ggml.tokens"]
METADATA = TINY_GGUF | {
    "llama.context_length": 512,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": 512,
    "llama.block_count": 2,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "tokenizer.ggml.tokens": [*TOKENS, *(f"t{i}" for i in range(len(TOKENS), VOCAB_SIZE))],
    "tokenizer.ggml.scores": [0.0] * VOCAB_SIZE,
    "tokenizer.ggml.token_type": [1] * VOCAB_SIZE,
}

# Where a block has its float16 numbers, and their size: the second lowers codes that are not signed to a mean of 0.
FLOATS: dict[str, dict[int, float]] = {
    "Q4_0": {0: 1}, "Q4_1": {0: 1, 2: -7.5}, "Q5_0": {0: 1}, "Q5_1": {0: 1, 2: -15.5}, "Q8_0": {0: 1},
    "Q2_K": {80: 1, 82: 1.5}, "Q3_K": {108: 1}, "Q4_K": {0: 1, 2: 7.5}, "Q5_K": {0: 1, 2: 15.5}, "Q6_K": {208: 1},
    "IQ4_NL": {0: 1}, "IQ4_XS": {0: 1}, "MXFP4": {},
}  # fmt: skip
# Scales that are a product of two numbers are rounded to float16: by a weight's 2^-11, and so are minima.
ROUNDED = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
MAX_DIFFERENCE = {True: 1e-2, False: 5e-6}  # of logits, as a share of the largest; True: of `ROUNDED` types


def random_blocks(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Return a matrix of random codes and scales, as bytes [rows, bytes of a row]; numbers spread by about 0.05."""
    quant: Any = getattr(gguf.quants, kind)
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // quant.block_size, quant.type_size), dtype=np.uint8)
    d = rng.uniform(0.5, 1.5, (len(blocks), 1))
    for size in (1.0, 0.0):  # which spreads them by something, then by what was wanted
        size = size or 0.05 / quant.dequantize_blocks(blocks).std()
        for start, factor in FLOATS[kind].items():
            blocks[:, start : start + 2] = (d * size * factor).astype(np.float16).view(np.uint8)
        if kind == "MXFP4":
            blocks[:, 0] = rng.integers(119, 124, len(blocks))
    return blocks.reshape(shape[0], -1)


def write(
    path: Path,
    kinds: Mapping[str, str],
    *,
    is_tied: bool = False,
    seed: int = 0,
    extra: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write a file whose matrices are of `kinds`, by the name of the tensor in a block; F32 where it names none."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in METADATA.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        add.get(type(value), writer.add_array)(key, value)
    for name, shape in (SHAPES | NORMS).items():
        if is_tied and name == "output":
            continue
        is_top = name in ("token_embd", "output", "output_norm")
        for path_of_tensor in [name] if is_top else [f"blk.{i}.{name}" for i in range(2)]:
            kind = kinds.get(name, "F32")
            tensor_name = f"{path_of_tensor}.weight"
            if kind in FLOATS:
                writer.add_tensor(tensor_name, random_blocks(kind, shape, rng), raw_dtype=GGMLQuantizationType[kind])
            else:
                values = rng.normal(1 if "norm" in name else 0, 0.05, shape)
                writer.add_tensor(tensor_name, values.astype(np.float16 if kind == "F16" else np.float32))
    for tensor_name, values in (extra or {}).items():
        writer.add_tensor(tensor_name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def both(folder: Path, kinds: Mapping[str, str], **options: Any) -> tuple[Path, Path]:
    """Return what a file becomes: packed, and dequantized."""
    write(folder / "model.gguf", kinds, **options)
    config = EngineConfig(model_path=str(folder / "model.gguf"), dtype="float32", download_dir=str(folder / "cache"))
    return resolve_model(config), resolve_model(config.replace(quantization="none"))


def matrices(engine: TinyEngine) -> dict[str, Linear | VocabParallelEmbedding]:
    kinds = Linear | VocabParallelEmbedding
    return {path: layer for path, layer in named_layers(engine.model) if isinstance(layer, kinds)}


def assert_same_weights(packed: TinyEngine, plain: TinyEngine, *, is_rounded: bool) -> None:
    """Compare weights one by one: they differ by what rounding scales and minima to float16 may change at most."""
    wanted = matrices(plain)
    for path, layer in matrices(packed).items():
        weight = layer.weight
        for part in range(len(weight.parts)):
            got, target = layer.weight_part("weight", part), wanted[path].weight_part("weight", part)
            if not is_rounded or not isinstance(weight, QuantizedWeight):
                torch.testing.assert_close(got, target, rtol=0, atol=0, msg=path)
                continue
            minimum = torch.zeros_like(got)
            if "minimum" in weight.fields:
                minima = weight.fields["minimum"][weight.row_slice(part)].float()
                minimum = minima.repeat_interleave(weight.form.group_size, dim=1)
            bound = ((got + minimum).abs() + minimum.abs()) * 2**-11 * 1.01
            assert bool(((got - target).abs() <= bound).all()), path


def assert_same_logits(packed: TinyEngine, plain: TinyEngine, *, is_rounded: bool) -> None:
    ids = random_ids(20, seed=0)
    got, wanted = packed.forward({0: ids}), plain.forward({0: ids})
    assert (got - wanted).abs().max() <= MAX_DIFFERENCE[is_rounded] * wanted.abs().max()
    got, wanted = packed.forward({0: [5]}), plain.forward({0: [5]})
    assert (got - wanted).abs().max() <= MAX_DIFFERENCE[is_rounded] * wanted.abs().max()


def test_every_type_that_stays_packed_is_tested() -> None:
    assert {GGMLQuantizationType(number).name for number in BLOCKS} == set(FLOATS)


@pytest.mark.parametrize("kind", FLOATS)
def test_a_file_of_each_type_has_the_weights_and_logits_of_its_dequantized_self(kind: str, tmp_path: Path) -> None:
    packed, plain = both(tmp_path, dict.fromkeys(SHAPES, kind))
    engine, is_rounded = TinyEngine(packed), kind in ROUNDED
    assert all(isinstance(layer.weight, QuantizedWeight) for layer in matrices(engine).values())
    assert_same_weights(engine, TinyEngine(plain), is_rounded=is_rounded)
    assert_same_logits(engine_of(packed), TinyEngine(plain), is_rounded=is_rounded)


# As files of many sizes have them: what one product needs is of several types, or not packed at all.
MIXTURES: dict[str, dict[str, str]] = {
    "Q4_K_M": dict.fromkeys(SHAPES, "Q4_K") | dict.fromkeys(("attn_v", "ffn_down", "output"), "Q6_K"),
    "4 bits with and without minima": dict.fromkeys(SHAPES, "Q4_0") | {"attn_v": "Q4_1", "ffn_up": "Q2_K"},
    "tables beside integers": dict.fromkeys(SHAPES, "IQ4_NL") | {"attn_k": "MXFP4", "attn_v": "Q5_1", "ffn_up": "Q4_0"},
    "tables": dict.fromkeys(SHAPES, "MXFP4") | {"attn_v": "IQ4_XS", "ffn_gate": "IQ4_NL"},
    "finer groups": dict.fromkeys(SHAPES, "Q5_0") | {"attn_v": "Q3_K", "ffn_gate": "Q4_K"},
}


@pytest.mark.parametrize("name", MIXTURES)
def test_types_that_meet_in_one_product_are_brought_to_one_that_holds_them_all(name: str, tmp_path: Path) -> None:
    packed, plain = both(tmp_path, MIXTURES[name])
    assert all(isinstance(layer.weight, QuantizedWeight) for layer in matrices(TinyEngine(packed)).values())
    assert_same_weights(TinyEngine(packed), TinyEngine(plain), is_rounded=True)
    assert_same_logits(engine_of(packed), TinyEngine(plain), is_rounded=True)


def test_a_product_with_a_part_that_is_not_packed_is_dense_and_others_stay_packed(tmp_path: Path) -> None:
    packed, plain = both(tmp_path, dict.fromkeys(SHAPES, "Q8_0") | {"attn_v": "F16", "ffn_down": "F32"})
    engine = TinyEngine(packed)
    is_packed = {path: isinstance(layer.weight, QuantizedWeight) for path, layer in matrices(engine).items()}
    dense = {path.rpartition(".")[2] for path, packed_too in is_packed.items() if not packed_too}
    assert dense == {"qkv_proj", "down_proj"}
    assert_same_weights(engine, TinyEngine(plain), is_rounded=False)
    assert_same_logits(engine_of(packed), TinyEngine(plain), is_rounded=False)


def test_a_tied_head_multiplies_by_the_packed_embedding(tmp_path: Path) -> None:
    packed, plain = both(tmp_path, dict.fromkeys(SHAPES, "Q6_K"), is_tied=True)
    engine = engine_of(packed)
    assert engine.model.lm_head.is_tied
    assert_same_logits(engine, TinyEngine(plain), is_rounded=True)


@pytest.mark.parametrize("rank", range(2))
def test_a_rank_holds_its_slices_of_a_packed_file(rank: int, tmp_path: Path) -> None:
    packed, plain = both(tmp_path, MIXTURES["Q4_K_M"])
    comm = Communicator(rank, 2)
    assert_same_weights(TinyEngine(packed, comm), TinyEngine(plain, comm), is_rounded=True)


def assert_stays_packed(case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Write a file of Q5_0: packed, its weights and logits are those of its dequantized self. Return what is dense."""
    from safetensors.torch import load_file

    model = make_checkpoint(case, folder / "original")
    add_tensor = gguf.GGUFWriter.add_tensor

    def add_packed(self: gguf.GGUFWriter, name: str, tensor: np.ndarray, **options: Any) -> None:
        if tensor.ndim in (2, 3) and tensor.shape[-1] % 32 == 0 and "norm" not in name and "_inp." not in name:
            kind = GGMLQuantizationType.Q5_0
            add_tensor(self, name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            add_tensor(self, name, tensor, **options)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", add_packed)
    write_file(case, model.config, load_file(folder / "original" / "model.safetensors"), folder / "model.gguf")
    config = EngineConfig(
        model_path=str(folder / "model.gguf"), dtype="float32", download_dir=str(folder), tokenizer_path=str(folder)
    )
    packed, plain = resolve_model(config), resolve_model(config.replace(quantization="none"))
    engine = TinyEngine(packed)
    assert_same_weights(engine, TinyEngine(plain), is_rounded=False)
    got, wanted = (engine_of(folder).forward({0: IDS.tolist()}) for folder in (packed, plain))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-3)
    return [path for path, layer in matrices(engine).items() if not isinstance(layer.weight, QuantizedWeight)]


@pytest.mark.parametrize("name", CASES)
def test_a_file_of_every_family_stays_packed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = assert_stays_packed(CASES[name], tmp_path, monkeypatch)
    # GPT-2's matrices lie across, and halves are put together.
    unlike = {"gpt2": ".layers.", "deepseek2": ".kv_b_proj"}.get(CASES[name].arch)
    assert not dense or (unlike and all(unlike in path for path in dense))


EXACT = dict.fromkeys(SHAPES, "Q4_1") | {"attn_v": "Q8_0", "ffn_down": "Q5_1", "token_embd": "Q5_0", "output": "Q8_0"}


@pytest.fixture(scope="module")
def greedy(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, prompts: list[list[int]]) -> Any:
    """Return (how to start a packed file, greedy answers of its dequantized self)."""
    folder = tmp_path_factory.mktemp("greedy")
    write(folder / "model.gguf", EXACT)
    options = {"download_dir": str(folder), "tokenizer_path": str(tiny_llama)}

    async def ask() -> list[list[int]]:
        async with running_engine(folder / "model.gguf", quantization="none", **options) as engine:
            return [(await collect(engine, make_state(prompt)))[1] for prompt in prompts]

    return folder / "model.gguf", options, asyncio.run(ask())


SOME: dict[str, dict[str, Any]] = {
    **{name: MIXES[name] for name in ("plain", "cached", "seven_token_chunks", "retracting")},
    "two_ranks": {"tp_size": 2},
}
MIXES_OF_DEVICES = [pytest.param("cpu", options, id=name) for name, options in SOME.items()] + [
    pytest.param("cuda", GPU_MIXES[name], id=f"cuda-{name}", marks=pytest.mark.gpu) for name in ("graphs", "no_graphs")
]


@pytest.mark.parametrize(("device", "mix"), MIXES_OF_DEVICES)
async def test_greedy_answers_of_a_packed_file_are_those_of_its_dequantized_self(
    device: str, mix: dict[str, Any], greedy: Any, prompts: list[list[int]]
) -> None:
    file, options, wanted = greedy
    async with running_engine(file, device=device, **options, **mix) as engine:
        answers = await asyncio.gather(*(collect(engine, make_state(prompt)) for prompt in prompts))
        assert [tokens for _, tokens in answers] == wanted


async def test_a_running_model_takes_weights_of_the_same_types_only(greedy: Any, tmp_path: Path) -> None:
    file, options, _ = greedy
    for name, change in (("same", {}), ("table", {"attn_q": "IQ4_NL", "attn_k": "IQ4_NL", "attn_v": "IQ4_NL"})):
        write(tmp_path / f"{name}.gguf", EXACT | change, seed=1)
    async with running_engine(file, **options) as engine:
        before = (await collect(engine, make_state([5, 6, 7])))[1]
        with pytest.raises(InvalidRequest, match=r"table\.gguf: quantization_config is not that of the weights in use"):
            await engine.maintenance.update_weights(str(tmp_path / "table.gguf"))
        assert (await collect(engine, make_state([5, 6, 7])))[1] == before
        await engine.maintenance.update_weights(str(tmp_path / "same.gguf"))
        after = (await collect(engine, make_state([5, 6, 7])))[1]
    async with running_engine(tmp_path / "same.gguf", **options) as engine:
        assert (await collect(engine, make_state([5, 6, 7])))[1] == after != before


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["Q4_1", "Q6_K", "IQ4_NL", "MXFP4"])
@pytest.mark.parametrize("is_tied", [False, True])
async def test_a_gpu_answers_from_a_packed_embedding_as_a_cpu_does(
    kind: str, is_tied: bool, tiny_llama: Path, tmp_path: Path, prompts: list[list[int]]
) -> None:
    write(tmp_path / "model.gguf", dict.fromkeys(SHAPES, kind), is_tied=is_tied)
    answers = {}
    for device in ("cpu", "cuda"):
        options = {"download_dir": str(tmp_path), "tokenizer_path": str(tiny_llama)}
        async with running_engine(tmp_path / "model.gguf", device=device, **options) as engine:
            answers[device] = [(await collect(engine, make_state(prompt)))[1] for prompt in prompts[:5]]
    assert answers["cuda"] == answers["cpu"]


@pytest.mark.parametrize(
    ("flag", "method"),
    [(None, "gguf"), ("gguf", "gguf"), ("none", None), ("fp8", None), ("int4", None)],
)
def test_a_file_stays_packed_unless_the_flag_says_otherwise(
    flag: str | None, method: str | None, tmp_path: Path
) -> None:
    write(tmp_path / "model.gguf", EXACT)
    config = EngineConfig(model_path=str(tmp_path / "model.gguf"), download_dir=str(tmp_path), quantization=flag)
    raw = json.loads((resolve_model(config) / "config.json").read_text())
    assert raw.get("quantization_config", {}).get("quant_method") == method


def test_a_tensor_that_would_pass_for_another_s_scales_is_named(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", dict.fromkeys(SHAPES, "Q8_0"), extra={"blk.1.attn_q.scale": np.ones(1, np.float32)})
    config = EngineConfig(model_path=str(tmp_path / "model.gguf"), download_dir=str(tmp_path))
    with pytest.raises(ModelError, match=r"broken: .* become model\.layers\.1\.self_attn\.q_proj\.scale"):
        resolve_model(config)


@pytest.mark.parametrize("quantization", ["gguf", "none"])
def test_a_conversion_does_not_wait_for_torch_s_compiler(quantization: str, tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", MIXTURES["Q4_K_M"])  # whose queries and keys are reordered
    options = {"model_path": str(tmp_path / "model.gguf"), "download_dir": str(tmp_path), "quantization": quantization}
    code = f"""
import sys
from engine.checkpoint.folder import resolve_model
from engine.config import EngineConfig
resolve_model(EngineConfig(**{options}))
print("torch._dynamo" in sys.modules)
"""
    assert run("-c", code).stdout == "False\n"


def test_rows_that_are_no_whole_blocks_are_named(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", dict.fromkeys(SHAPES, "Q8_0"))
    content = bytearray((tmp_path / "model.gguf").read_bytes())
    at = content.index(b"blk.1.ffn_up.weight") + len("blk.1.ffn_up.weight") + 4
    content[at : at + 8] = (HIDDEN + 16).to_bytes(8, "little")
    (tmp_path / "model.gguf").write_bytes(content)
    config = EngineConfig(model_path=str(tmp_path / "model.gguf"), download_dir=str(tmp_path))
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_up\.weight.* rows of 272, .* blocks of 32"):
        resolve_model(config)


def test_a_tensor_is_made_while_the_one_before_is_written() -> None:
    begun = [threading.Event() for _ in range(3)]

    class Counted:
        entries, num_bytes, bytes_read = (), 0, 0

        def __init__(self, number: int) -> None:
            self.number = number

        def read(self, *_: object) -> Iterator[torch.Tensor]:
            begun[self.number].set()
            yield torch.tensor(self.number)

    sources: Any = [Counted(number) for number in range(3)]
    written = []
    with ThreadPoolExecutor(1) as pool:
        for number, (source, values) in enumerate(read_ahead(sources, [], pool)):
            assert source is sources[number]
            written += [int(value) for value in values]
            assert number == 2 or begun[number + 1].wait(60), "the next one waits for this one"
            assert number > 0 or not begun[2].is_set(), "a third one is in memory"
    assert written == [0, 1, 2]
