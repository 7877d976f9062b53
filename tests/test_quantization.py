"""Quantized checkpoints, written by the formulas of their formats, give the logits of their dequantized selves."""

import asyncio
import json
import shutil
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from engine.checkpoint.folder import resolve_model
from engine.checkpoint.weights import load_weights, pack_weights
from engine.config import EngineConfig
from engine.errors import InvalidRequest, ModelError
from engine.layers.communicator import Communicator
from engine.layers.layer import LayerConfig, named_layers, padded_split
from engine.layers.linear import Linear
from engine.models.registry import build_model, load_config
from engine.quantization.methods import METHODS, quantization_of
from engine.quantization.modules import Modules, spellings
from engine.quantization.online import FORMATS as FORMATS_ONLINE
from kernels.dense import DenseWeight
from kernels.quantize import OnlineWeight
from kernels.weights import WHOLE, Part, Shard
from tests.quantized_files import (
    AWQ,
    BITSANDBYTES,
    CASES,
    FLOAT8,
    GROUP,
    Case,
    Round,
    Write,
    compressed,
    ct_config,
    ct_words,
    fp4,
    fp8_in_blocks,
    gptq,
    gptq_config,
    nf4,
    torchao_config,
    write_awq,
    write_quantized,
)
from tests.test_engine import MIXES, collect, make_state, prompts, running_engine
from tests.test_models import MakeTinyModel, TinyEngine, assert_equals_reference, random_ids

__all__ = ["prompts"]  # a fixture


def engine_of(folder: Path, comm: Communicator | None = None) -> TinyEngine:
    """Return a model that is packed, as a server's is."""
    engine = TinyEngine(folder, comm)
    pack_weights(engine.model)
    return engine


@pytest.fixture(scope="module")
def made(make_tiny_model: MakeTinyModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Return for each case a quantized checkpoint and the plain one that it stands for."""
    from transformers import LlamaConfig

    models = {model: make_tiny_model(LlamaConfig, "tiny_plain", **{"intermediate_size": 128} | json.loads(model))
              for model in {case.model for case in CASES.values()}}  # fmt: skip
    folders = {}
    for name, case in CASES.items():
        folder = tmp_path_factory.mktemp("quantized")
        shutil.copytree(models[case.model], folder / "plain")
        write_quantized(folder / "plain", case, folder / "packed")
        folders[name] = folder / "packed", folder / "plain"
    return folders


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.rounds is None])
def test_a_quantized_checkpoint_has_the_logits_of_what_it_stands_for(name: str, made) -> None:
    packed, plain = made[name]
    assert_equals_reference(engine_of(packed), plain, random_ids(20, seed=0), random_ids(13, seed=1))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.rounds is not None])
def test_inputs_are_rounded_as_the_checkpoint_says(name: str, made) -> None:
    (packed, plain), rounds = made[name], CASES[name].rounds
    assert rounds is not None
    ids = random_ids(20, seed=0)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    with torch.inference_mode():
        unrounded = model(torch.tensor([ids])).logits[0]
        round_inputs(model, rounds)
        wanted = model(torch.tensor([ids])).logits[0]
    got = engine_of(packed).forward({0: ids})
    # A sum in another order may round one input to the next code: far less than rounding itself changes.
    assert (got - wanted).norm() < 0.2 * (unrounded - wanted).norm()


FP8_WEIGHTS = ct_config("float-quantized", FLOAT8 | {"strategy": "block", "block_structure": [48, 48]})


@pytest.mark.parametrize("family", ["Phi3Config", "GlmConfig"])  # one tensor for q, k and v; pairs side by side
@pytest.mark.parametrize(
    ("config", "write"),
    [
        (AWQ, write_awq),
        (gptq_config(desc_act=True), gptq(desc_act=True)),
        (ct_words(3, symmetric=False), compressed(3, sym=False)),
        (FP8_WEIGHTS, fp8_in_blocks(48)),
        (BITSANDBYTES, nf4(double=True)),
        ({"quant_method": "modelopt_fp4", "quant_algo": "NVFP4", "exclude_modules": ["lm_head"]},
         fp4("weight", 16, "weight_scale_2")),
    ],
    ids=["awq", "gptq", "compressed-tensors", "fp8", "bitsandbytes", "modelopt"],
)  # fmt: skip
def test_rows_are_cut_and_reordered_with_their_scales(
    family: str, config: dict[str, Any], write: Write, make_tiny_model: MakeTinyModel, tmp_path: Path
) -> None:
    plain = make_tiny_model(getattr(transformers, family), "fused", intermediate_size=128, pad_token_id=0)
    write_quantized(plain, Case(config, write), tmp_path / "packed")
    engine = engine_of(tmp_path / "packed")
    assert not any(isinstance(layer.weight, DenseWeight) for path, layer in linears(engine).items() if "proj" in path)
    assert_equals_reference(engine, plain, random_ids(20, seed=0), random_ids(13, seed=1))


def test_lists_in_the_names_of_the_file_hold_where_the_model_has_others(
    make_tiny_model: MakeTinyModel, tmp_path: Path
) -> None:
    plain = make_tiny_model(transformers.PhiConfig, "phi", intermediate_size=128)
    config = gptq_config(modules_in_block_to_quantize=[["self_attn.dense"], ["mlp.fc1"]])
    write_quantized(plain, Case(config, gptq(), modules=r"dense$|fc1$"), tmp_path / "packed")
    assert_equals_reference(engine_of(tmp_path / "packed"), plain, random_ids(20, seed=0), random_ids(13, seed=1))


@pytest.mark.parametrize("name", ["gptq with its head", "compressed-tensors, FP8 with its head"])
def test_a_quantized_head_is_its_own_though_a_configuration_ties_it(name: str, made, tmp_path: Path) -> None:
    packed, plain = made[name]
    shutil.copytree(packed, folder := tmp_path / "tied")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": True}))
    assert_equals_reference(engine_of(folder), plain, random_ids(20, seed=0), random_ids(13, seed=1))


@pytest.mark.parametrize("name", CASES)
def test_random_weights_of_a_configuration_give_finite_logits(name: str, made) -> None:
    config = load_config(made[name][0])
    model = build_model(config, LayerConfig(torch.float32))
    load_weights(model, made[name][0], "dummy", torch.device("cpu"))
    pack_weights(model)
    down = model.model.layers[0].mlp.down_proj
    x = torch.randn(5, down.weight.k, generator=torch.Generator().manual_seed(0))
    spread = down(x).std() / down.weight.k**0.5
    assert 0.01 < spread < 0.04


def round_inputs(model: torch.nn.Module, rounds: Round) -> None:
    """Make transformers' model round the inputs of what `write_quantized` quantizes."""
    for module, layer in model.named_modules():
        if module.endswith("_proj"):
            layer.register_forward_pre_hook(lambda _, inputs: (rounds(inputs[0]),))


def linears(engine: TinyEngine) -> dict[str, Linear]:
    return {path: layer for path, layer in named_layers(engine.model) if isinstance(layer, Linear)}


@pytest.mark.parametrize("name", CASES)
def test_a_rank_holds_its_slices_of_codes_and_scales(name: str, made) -> None:
    packed, plain = made[name]
    for comm in (Communicator(0, 2), Communicator(1, 2)):
        wanted = linears(TinyEngine(plain, comm))
        for path, layer in linears(engine_of(packed, comm)).items():
            for part in range(len(layer.weight.parts)):
                torch.testing.assert_close(layer.weight.rows_of(part), wanted[path].weight.rows_of(part))


@pytest.mark.parametrize(
    "name", ["gptq, desc_act", "gptq, 8 bits, desc_act", "compressed-tensors, W4A16 in another order"]
)
@torch.inference_mode()
def test_products_of_ranks_with_parts_of_groups_sum_up_to_the_whole_ones(name: str, made) -> None:
    packed, plain = made[name]
    wanted = TinyEngine(plain).model.model.layers[1]
    ranks = [engine_of(packed, Communicator(rank, 2)).model.model.layers[1] for rank in range(2)]
    for path in ("self_attn.o_proj", "mlp.down_proj"):
        whole, *parts = (attrgetter(path)(layer).weight for layer in (wanted, *ranks))
        x = torch.randn(5, whole.k, generator=torch.Generator().manual_seed(0))
        x[0, 0] = torch.inf  # fills up no group of a rank that does not have it
        sums = [
            part.product(x[:, i * whole.k // 2 : (i + 1) * whole.k // 2].contiguous()) for i, part in enumerate(parts)
        ]
        torch.testing.assert_close((sums[0] + sums[1])[1:], whole.product(x)[1:], rtol=0, atol=1e-4)
        assert not sums[1].isnan().any()
        logits = [
            part.logits(x[:, i * whole.k // 2 : (i + 1) * whole.k // 2].contiguous()) for i, part in enumerate(parts)
        ]
        torch.testing.assert_close((logits[0] + logits[1])[1:], whole.product(x)[1:], rtol=0, atol=1e-4)


# ---- the whole engine ----

SOME = {name: MIXES[name] for name in ("plain", "seven_token_chunks", "retracting")} | {"two_ranks": {"tp_size": 2}}


@pytest.fixture(scope="module")
def greedy(made, prompts: list[list[int]]) -> dict[str, list[list[int]]]:
    """Return transformers' greedy answers to `prompts`, with inputs rounded as a case says."""
    answers = {}
    for name in ("compressed-tensors, W4A16 with zeros", "fp8 in blocks"):
        model = AutoModelForCausalLM.from_pretrained(made[name][1], dtype=torch.float32).eval()
        if (rounds := CASES[name].rounds) is not None:
            round_inputs(model, rounds)
        options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        answers[name] = [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in prompts]
    return answers


@pytest.mark.parametrize("name", ["compressed-tensors, W4A16 with zeros", "fp8 in blocks"])
@pytest.mark.parametrize("mix", SOME)
async def test_greedy_answers_do_not_depend_on_the_mix(
    name: str, mix: str, made, greedy: dict[str, list[list[int]]], prompts: list[list[int]]
) -> None:
    async with running_engine(made[name][0], **SOME[mix]) as engine:
        for _ in range(2):  # the second time everything is cached
            answers = await asyncio.gather(*(collect(engine, make_state(prompt)) for prompt in prompts))
            assert [tokens for _, tokens in answers] == greedy[name]


async def test_quantized_weights_are_replaced_and_broken_ones_refused(made, tmp_path: Path) -> None:
    def shuffled(files: dict[str, torch.Tensor]) -> None:
        files[f"{UP}.g_idx"] = files[f"{UP}.g_idx"].flip(0)

    folder = made["gptq, desc_act"][0]
    async with running_engine(folder) as engine:

        async def answer() -> list[int]:
            return (await collect(engine, make_state([7, 11, 300])))[1]

        before = await answer()
        with pytest.raises(InvalidRequest, match=r"gate_up_proj has parts with different g_idx"):
            await engine.maintenance.update_weights(str(broken(made, "gptq, desc_act", tmp_path / "other", shuffled)))
        assert await answer() == before
        with pytest.raises(InvalidRequest, match=r"quantization_config is not that of the weights in use"):
            await engine.maintenance.update_weights(str(made["awq"][0]))
        await engine.maintenance.update_weights(str(made["gptq, desc_act"][1]))  # plain: what these weights stand for
        assert await answer() == before
        await engine.maintenance.update_weights(str(made["awq"][1]))
        assert await answer() != before


# ---- what cannot be read ----


def broken(made, name: str, folder: Path, change: Callable[[dict[str, torch.Tensor]], None], **config: Any) -> Path:
    """Copy a case's quantized checkpoint to `folder`, with its tensors changed and entries of its configuration."""
    shutil.copytree(made[name][0], folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] |= config
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


DOWN, UP = "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gptq, zeros", lambda files: files.pop(f"{DOWN}.scales"), rf"missing: {DOWN}\.scales"),
        ("awq", lambda files: files.pop(f"{DOWN}.qzeros"), rf"missing: {DOWN}\.qzeros"),
        (
            "gptq",
            lambda files: files.update({f"{DOWN}.qweight": files[f"{DOWN}.qweight"][:-1].clone()}),
            rf"{DOWN}\.qweight, read as codes, has shape \[64, 60\], the model wants \[64, 64\]",
        ),
        (
            "gptq",
            lambda files: files.update({f"{DOWN}.qweight": files[f"{DOWN}.qweight"].float()}),
            rf"{DOWN}\.qweight, read as codes, is of torch\.float32 .*torch\.int32",
        ),
        (
            "gptq",
            lambda files: files.update({f"{UP}.scales": files[f"{UP}.scales"][1:].clone()}),
            rf"{UP}\.scales, read as scale, has shape \[128, 1\], the model wants \[128, 2\]",
        ),
        (
            "gptq",
            lambda files: files.update({f"{DOWN}.g_idx": files[f"{DOWN}.g_idx"].flip(0)}),
            rf"{DOWN}\.g_idx does not number groups of 32 inputs one after another, .* desc_act",
        ),
        (
            "fp8 in blocks",
            lambda files: files.pop(f"{DOWN}.weight_scale_inv"),
            rf"{DOWN}\.weight is of torch\.float8_e4m3fn, which stands for nothing without a scale",
        ),
        (
            "compressed-tensors, FP8 dynamic",
            lambda files: files.update({f"{UP}.weight": files[f"{UP}.weight"].half()}),
            rf"{UP}\.weight is of torch\.float16, the format's codes are of torch\.float8_e4m3fn",
        ),
        (
            "compressed-tensors, FP8 in blocks",
            lambda files: files.update({f"{UP}.weight_scale": files[f"{UP}.weight_scale"][1:].clone()}),
            rf"{UP}\.weight_scale, read as scale, has shape \[96, 2\], the model wants \[128, 2\]",
        ),
        (
            "modelopt, NVFP4",
            lambda files: files.pop(f"{UP}.weight_scale_2"),
            rf"{UP}\.weight_scale, read as scale, needs {UP}\.weight_scale_2, which the checkpoint does not have",
        ),
        (
            "compressed-tensors, NVFP4",
            lambda files: files.update({f"{UP}.weight_scale": files[f"{UP}.weight_scale"].float()}),
            rf"{UP}\.weight_scale, read as scale, is of torch\.float32, NVFP4's scales are of torch\.float8_e4m3fn",
        ),
        (
            "bitsandbytes",
            lambda files: files.update({f"{UP}.weight.quant_map": files[f"{UP}.weight.quant_map"] * 2}),
            rf"{UP}\.weight\.quant_map is not NF4's table",
        ),
        (
            "bitsandbytes, double",
            lambda files: files.pop(f"{UP}.weight.nested_absmax"),
            rf"{UP}\.weight\.absmax, read as scale, is of bytes, without nested_absmax",
        ),
        (
            "bitsandbytes",
            lambda files: files.update({f"{UP}.weight": files[f"{UP}.weight"][1:].clone()}),
            rf"{UP}\.weight is of torch\.uint8 \[4095, 1\], the format's are 4096 bytes",
        ),
        (
            "bitsandbytes",
            lambda files: files.update({f"{UP}.weight.quant_state.bitsandbytes__nf4": torch.ones(3).to(torch.uint8)}),
            rf"{UP}\.weight.* has a description that cannot be read",
        ),
        (
            "gptq, desc_act",
            lambda files: files.update({f"{UP}.g_idx": files[f"{UP}.g_idx"].flip(0)}),
            r"model\.layers\.1\.mlp\.gate_up_proj has parts with different g_idx",
        ),
        (
            "gptq, desc_act",
            lambda files: files.update({f"{DOWN}.g_idx": files[f"{DOWN}.g_idx"] * 0}),
            r"model\.layers\.1\.mlp\.down_proj has a g_idx whose groups are not all of 32 inputs",
        ),
        (
            "compressed-tensors, FP8 dynamic",
            lambda files: files.update({f"{UP}.weight": files[f"{UP}.weight"].float().to(torch.float8_e5m2)}),
            rf"{UP}\.weight is of torch\.float8_e5m2, the format's codes are of torch\.float8_e4m3fn",
        ),
        (
            "compressed-tensors, FP8 dynamic",
            lambda files: files.update({f"{UP}.weight_scale": files[f"{UP}.weight_scale"].long()}),
            rf"{UP}\.weight_scale, read as scale, is of torch\.int64, the format's scales are floats",
        ),
        (
            "compressed-tensors, FP8 dynamic",
            lambda files: files[f"{UP}.weight_scale"][3].fill_(torch.inf),
            r"model\.layers\.1\.mlp\.gate_up_proj has scales that are infinite or NaN",
        ),
        (
            "compressed-tensors, FP8 dynamic",
            lambda files: files[f"{DOWN}.weight"].view(torch.uint8)[3, 5:6].fill_(0xFF),
            r"model\.layers\.1\.mlp\.down_proj has codes that are NaN",
        ),
        (
            "compressed-tensors, FP8 static",
            lambda files: files.update({f"{UP}.input_scale": torch.ones(3)}),
            rf"{UP}\.input_scale has shape \[3\], the model wants \[1\]",
        ),
        (
            "compressed-tensors, W8A8",
            lambda files: files.update({f"{UP}.weight": files[f"{UP}.weight"].view(torch.uint8)}),
            rf"{UP}\.weight is of torch\.uint8, the format's codes are of torch\.int8",
        ),
        (
            "compressed-tensors, W4A8",
            lambda files: files.update({f"{UP}.weight": files[f"{UP}.weight"][:, :-1].clone()}),
            rf"{UP}\.weight is of torch\.int8 \[128, 63\], the format's values are a matrix .* even number",
        ),
        (
            "compressed-tensors, W3A16",
            lambda files: files.update({f"{UP}.weight_shape": torch.tensor([128.0, 64.0])}),
            rf"{UP}\.weight_packed, read as codes, needs a weight_shape of two whole numbers, .* torch\.float32 \[2\]",
        ),
        (
            "compressed-tensors, NVFP4",
            lambda files: files.update({f"{UP}.weight_global_scale": torch.ones(2)}),
            rf"{UP}\.weight_scale, read as scale, has 2 numbers in weight_global_scale beside it, NVFP4 has one",
        ),
        (
            "gptq, all inputs in one group",
            lambda files: files.update({f"{DOWN}.scales": files[f"{DOWN}.scales"].repeat(2, 1)}),
            rf"{DOWN}\.scales, read as scale, has shape \[64, 2\], the model wants \[64, 1\]",
        ),
        (
            "awq",
            lambda files: files.update({f"{DOWN}.scales": files[f"{DOWN}.scales"][0, 0].clone()}),
            rf"{DOWN}\.scales, read as scale, has shape \[\], the format's is a matrix",
        ),
        (
            "bitsandbytes, int8",
            lambda files: files.update({f"{DOWN}.SCB": files[f"{DOWN}.SCB"].int()}),
            rf"{DOWN}\.SCB, read as scale, is of torch\.int32, the format's scales are floats",
        ),
        (
            "bitsandbytes, double",
            lambda files: files.update({f"{DOWN}.weight.nested_quant_map": torch.ones(255)}),
            rf"{DOWN}\.weight\.absmax, read as scale, has nested_quant_map of 255 .* 256",
        ),
        (
            "bitsandbytes",
            lambda files: files.pop(f"{DOWN}.weight.quant_state.bitsandbytes__nf4"),
            rf"{DOWN}\.weight needs weight\.quant_state\.bitsandbytes__nf4",
        ),
        (
            "torchao, pairs",
            lambda files: files.update({f"{DOWN}._weight_zero_point": torch.zeros(1, 64)}),
            rf"{DOWN}\._weight_zero_point, .* has shape \[1, 64\], and the scales beside it \[4, 64\]",
        ),
        (
            "compressed-tensors, W3A16",
            lambda files: files.update({f"{UP}.weight_shape": torch.tensor([64])}),
            rf"{UP}\.weight_packed, read as codes, needs a weight_shape of two whole numbers",
        ),
    ],
)  # fmt: skip
def test_a_broken_checkpoint_is_refused_by_the_name_of_its_tensor(
    name: str, change: Callable[[dict[str, torch.Tensor]], None], message: str, made, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        pack_weights(TinyEngine(broken(made, name, tmp_path / "broken", change)).model)


@pytest.mark.parametrize("name", ["compressed-tensors, W4A16 with zeros", "compressed-tensors, W8A16"])
def test_sizes_that_words_fill_need_not_be_in_the_file(name: str, made, tmp_path: Path) -> None:
    def without_sizes(files: dict[str, torch.Tensor]) -> None:
        for tensor in [tensor for tensor in files if tensor.endswith("weight_shape")]:
            del files[tensor]

    ids = random_ids(20, seed=0)
    folder = broken(made, name, tmp_path / "without", without_sizes)
    assert torch.equal(engine_of(folder).forward({0: ids}), engine_of(made[name][0]).forward({0: ids}))


def test_a_pointer_in_the_place_of_weights_is_named(made, tmp_path: Path) -> None:
    shutil.copytree(made["awq"][0], folder := tmp_path / "cloned")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    (folder / "model.safetensors").write_text(pointer)
    with pytest.raises(
        ModelError, match=r"model\.safetensors is a pointer of Git LFS, not the weights: .*git lfs pull"
    ):
        TinyEngine(folder)


def test_what_a_flag_cannot_do_to_a_gguf_file_is_said_before_it_is_converted(tmp_path: Path) -> None:
    config = EngineConfig(model_path=str(tmp_path / "model.gguf"), download_dir=str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF, but never read")
    with pytest.raises(ModelError, match=r"--quantization awq: the checkpoint is not quantized; .* int4"):
        resolve_model(config.replace(quantization="awq"))
    (tmp_path / "model.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(ModelError, match=r"model\.gguf is a pointer of Git LFS, not the model: .*git lfs pull"):
        resolve_model(config)


def test_a_folder_in_mistrals_own_format_says_what_is_needed(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text('{"dim": 64, "quantization": {"qformat_weight": "fp8_e4m3"}}')
    with pytest.raises(ModelError, match=r"Mistral's own params\.json alone: the config\.json and the weights"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "exl2", "bits": 4}, r"exl2.*Supported: auto-round, awq, "),
        ({"quant_method": "awq", "version": "gemv"}, "version 'gemv'.*only 4 bits, version 'gemm'"),
        ({"quant_method": "awq", "checkpoint_format": "gemv_fast"}, "version 'gemv_fast'.*only 4 bits, version 'gemm'"),
        ({"quant_method": "awq", "modules_to_not_convert": 3}, "modules_to_not_convert must be a list of names, got 3"),
        ({"quant_method": "gptq", "bits": 5}, "GPTQ of 5 bits"),
        ({"quant_method": "gptq", "bits": "4"}, "bits must be of type int, got '4'"),
        ({"quant_method": "gptq", "checkpoint_format": "bitblas"}, "bitblas.*only gptq, gptq_v2 and marlin"),
        ({"quant_method": "gptq", "dynamic": {"-:(": {}}}, "dynamic has the pattern .* cannot be read"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "'e5m2'.*only e4m3"),
        ({"quant_method": "fp8", "activation_scheme": "none"}, "activation_scheme 'none'.*only dynamic and static"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size must be two sizes.*\[128\]"),
        ({"quant_method": "fp8", "weight_block_size": [256, 128]}, "blocks of 256 rows"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "ModelOpt's W4A8_AWQ.*only FP8, "),
        (
            {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "uint4", "qscheme": "per_group"}}},
            "Quark's uint4 per_group.*only fp8_e4m3",
        ),
        (ct_words(1), "weights of 1 bits, type int"),
        (ct_words(4) | {"transform_config": {"config_groups": {"u": {}}}}, "transforms .* are not supported"),
        (ct_words(4) | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask.*save them dense"),
        (ct_words(4) | {"config_groups": {"group_0": 4}}, "config_groups, group_0 must be of type dict, got 4"),
        ({"quant_method": "gptq", "dynamic": {".*": 4}}, r"dynamic, \.\* must be of type dict, got 4"),
        ({"quant_method": "auto-round", "extra_config": []}, r"extra_config must be of type dict, got \[\]"),
        ({"quant_method": "quark", "layer_quant_config": {"*": "x"}}, "layer_quant_config, .* must be of type dict"),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": 1}}, "quantized_layers, a must be of type dict"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "af4"}, "4-bit af4.*only nf4"),
        ({"group_size": 64, "bits": 4, "mode": "affine"}, "mlx .group_size and bits without a quant_method"),
        (ct_words(4) | {"format": "marlin-24"}, "'marlin-24' of integers .*only pack-quantized and int"),
        ({"quant_method": "hqq"}, "hqq.*while it is loaded: --quantization .*int4"),
        ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, "'int4_weight_only' .* pickled"),
        ({"quant_method": "torchao", "quant_type": {"default": 4}}, "quant_type, default must be an object with _type"),
        (torchao_config("Float8StaticActivationFloat8WeightConfig"), "Float8StaticAct.* not supported, only Int4"),
        (torchao_config("Int4WeightOnlyConfig", int4_packing_format="tile_packed_to_4d"), "'tile_packed_to_4d'"),
        (torchao_config("IntxWeightOnlyConfig", weight_dtype="uint4"), "dtype 'uint4', PerRow, are not supported"),
        ({"quant_method": "auto-round", "data_type": "mx_int", "bits": 4}, "mx_int.*only int of"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:mlx"}, "auto_round:mlx' of integers"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "bits": 8}, "has 4 bits, not 8"),
    ],
)  # fmt: skip
def test_a_variant_that_is_not_read_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        quantization_of(config, None)


@pytest.mark.parametrize(
    ("config", "flag", "message"),
    [
        (gptq_config(), "awq_marlin", "--quantization awq_marlin, but .* quant_method 'gptq'"),
        (gptq_config(), "fp8", "--quantization fp8, but .* quant_method 'gptq'"),
        (gptq_config(), "gptqq", "gptqq is not known.*fp8.*awq.*gptq"),
        (None, "gptq_marlin", "--quantization gptq_marlin: the checkpoint is not quantized.*fp8"),
    ],
)
def test_a_flag_that_contradicts_the_file_names_both(config: Any, flag: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        quantization_of(config, flag)


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("awq", ("awq", "awq_marlin", "moe_wna16")),
        ("gptq", ("gptq", "gptq_marlin", "marlin", "moe_wna16")),
        ("auto-round", ("auto-round", "auto_round", "gptq_marlin")),
        ("compressed-tensors", ("compressed-tensors", "w8a8_int8", "w8a8_fp8", "mxfp4")),
        ("fp8", ("fp8", "w8a8_fp8")),
    ],
)
def test_a_flag_named_after_a_kernel_means_its_format(method: str, flags: tuple[str, ...]) -> None:
    for flag in (None, "none", *flags):
        assert type(quantization_of({"quant_method": method}, flag)) is METHODS[method]


OPTIONAL = (
    "format", "version", "bits", "w_bit", "group_size", "sym", "desc_act", "lm_head", "checkpoint_format", "dynamic",
    "activation_scheme", "fmt", "weight_block_size", "data_type", "packing_format", "extra_config", "ignore", "exclude",
    "modules_to_not_convert", "llm_int8_skip_modules", "bnb_4bit_quant_type", "config_groups", "sparsity_config",
    "layer_quant_config", "exclude_modules", "quantized_layers", "include_input_output_embeddings",
)  # fmt: skip
OPTIONAL_OF_GROUPS = (
    "num_bits",
    "type",
    "symmetric",
    "group_size",
    "actorder",
    "block_structure",
    "strategy",
    "format",
)


def with_nulls(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with null for what it does not have, its groups of modules too."""
    groups = {
        name: group | {"weights": dict.fromkeys(OPTIONAL_OF_GROUPS) | group["weights"]}
        for name, group in config.get("config_groups", {}).items()
    }
    return dict.fromkeys(OPTIONAL) | config | ({"config_groups": groups} if groups else {})


@pytest.mark.parametrize("name", CASES)
def test_an_entry_that_is_null_is_as_one_that_is_not_there(name: str) -> None:
    config = CASES[name].config
    for module in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj", "lm_head"):
        wanted, got = (quantization_of(one, None).scheme_of(module) for one in (config, with_nulls(config)))
        assert got == wanted


@pytest.mark.parametrize("name", ["modelopt", "compressed-tensors, W4A16", "bitsandbytes", "bitsandbytes, int8"])
def test_spellings_of_old_libraries_are_read(name: str) -> None:
    config = CASES[name].config
    inner = {entry: value for entry, value in config.items() if entry != "quant_method"}
    nested = {"modelopt": {"quantization": inner}, "compressed-tensors, W4A16": {"quantization_config": config}}
    module = "model.layers.0.mlp.up_proj"
    assert quantization_of(nested.get(name, inner), None).scheme_of(module) == quantization_of(config, None).scheme_of(
        module
    )


@pytest.mark.parametrize(
    ("name", "file", "config"),
    [
        ("gptq, zeros", "quantize_config.json", {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}),
        (
            "modelopt",
            "hf_quant_config.json",
            {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}},
        ),
        ("awq", "quant_config.json", {"zero_point": True, "q_group_size": GROUP, "w_bit": 4, "version": "GEMM"}),
    ],
)
def test_a_configuration_beside_config_json_is_read(
    name: str, file: str, config: dict[str, Any], made, tmp_path: Path
) -> None:
    shutil.copytree(made[name][0], folder := tmp_path / "old")
    raw = json.loads((folder / "config.json").read_text())
    wanted = raw.pop("quantization_config")["quant_method"]
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / file).write_text(json.dumps(config))
    assert type(TinyEngine(folder).model.quantization) is METHODS[wanted]


def test_a_bias_of_zeros_may_be_there_and_another_may_not(made, tmp_path: Path) -> None:
    def zeros(files: dict[str, torch.Tensor]) -> None:
        files[f"{DOWN}.bias"] = torch.zeros(64)

    def ones(files: dict[str, torch.Tensor]) -> None:
        files[f"{DOWN}.bias"] = torch.ones(64)

    TinyEngine(broken(made, "gptq", tmp_path / "zeros", zeros))
    with pytest.raises(ModelError, match=rf"{DOWN}\.bias is not zero, and the model has no such bias"):
        TinyEngine(broken(made, "gptq", tmp_path / "ones", ones))


# ---- which modules a configuration means ----


@pytest.mark.parametrize(
    ("entry", "means", "but_not"),
    [
        ("model.layers.0.mlp.down_proj", "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"),
        ("mlp.gate", "model.layers.0.mlp.gate", "model.layers.0.mlp.gate_proj"),
        ("model.layers.1", "model.layers.1.mlp.up_proj", "model.layers.10.mlp.up_proj"),
        ("model.language_model.layers.0.mlp", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"),
        ("language_model.model.layers.0", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"),
        ("language_model.lm_head", "lm_head", "model.lm"),
        ("model.layers.0.self_attn.qkv_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.o_proj"),
        ("layers.0.mlp.gate_up_proj", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"),
        (r"re:.*\.(q|k)_proj$", "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"),
        (r"re:.*v_proj$", "model.layers.0.self_attn.v_proj", "model.layers.0.self_attn.q_proj"),
        ("*.up_proj", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"),
        ("model.layers.*.self_attn*", "model.layers.3.self_attn.k_proj", "model.layers.3.mlp.up_proj"),
    ],
)
def test_an_entry_means_a_module_by_any_of_its_names(entry: str, means: str, but_not: str) -> None:
    modules = Modules([entry], "ignore")
    assert spellings(means) in modules
    assert spellings(but_not) not in modules


@pytest.mark.parametrize(
    ("name", "largest"), [("fp8", 0.07), ("fp8wo", 0.04), ("int8", 0.008), ("w8a8_int8", 0.02), ("int4", 0.1)]
)
def test_weights_rounded_while_they_load_multiply_nearly_as_they_were(name: str, largest: float):
    random = torch.Generator().manual_seed(0)
    values, x = torch.randn(96, 320, generator=random), torch.randn(5, 320, generator=random)
    weight = OnlineWeight([Part(64), Part(32)], 320, torch.float32, FORMATS_ONLINE[name])
    weight.materialize(torch.device("cpu"))
    for part, rows in enumerate(values.split([64, 32])):
        target, source = weight.place("weight", rows, part)
        target.copy_(source)
    got, wanted = weight.pack().product(x), x @ values.t()
    assert (got - wanted).norm() / wanted.norm() < largest


@pytest.mark.parametrize(
    ("num_inputs", "k", "shard"),
    [
        (192, 96, Shard(1, 2)),  # a group and a half
        (96, 64, padded_split(Shard(1, 2), 96, 64)[1]),  # half a group, and zeros
        (48, 64, padded_split(WHOLE, 48, 64)[1]),
    ],
)
def test_a_rank_rounds_groups_of_its_own_inputs_wherever_they_are_split(num_inputs: int, k: int, shard: Shard) -> None:
    random = torch.Generator().manual_seed(0)
    values, x = torch.randn(32, num_inputs, generator=random), torch.randn(5, num_inputs, generator=random)
    weight = OnlineWeight([Part(32)], k, torch.float32, FORMATS_ONLINE["int4wo-64"], shard)
    weight.materialize(torch.device("cpu"))
    target, source = weight.place("weight", values, 0)
    target.copy_(source)
    got = weight.pack().product(shard.of(x, 1, k))
    wanted = shard.of(x, 1, k) @ shard.of(values, 1, k).t()
    assert (got - wanted).norm() / wanted.norm() < 0.1
