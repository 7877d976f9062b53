"""Writers of quantized checkpoints, by the formulas of their formats, and what the codes they write stand for."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Json = dict[str, Any]
Weights = dict[str, torch.Tensor]
Write = Callable[[str, torch.Tensor, torch.Generator], tuple[Weights, torch.Tensor | None]]
"""(module, its weight [n, k], randomness) -> the checkpoint's tensors, by what follows the module's name, and what they
stand for [n, k]; None: the module is not quantized."""
Round = Callable[[torch.Tensor], torch.Tensor]

GROUP = 32
WITH_HEAD = r"_proj$|^lm_head$"


@dataclass(frozen=True)
class Case:
    """A kind of quantized checkpoint."""

    config: dict[str, Any]  # config.json's quantization_config
    write: Write
    rounds: Round | None = None  # what products do to their inputs
    model: str = "{}"  # entries of config.json
    modules: str = r"_proj$"  # that are quantized, by what is found in their names


def group_wise(of_groups: torch.Tensor, dim: int = 0, group: int = GROUP) -> torch.Tensor:
    return of_groups.repeat_interleave(group, dim)


def int32_words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack values [..., count] into int32 [..., count * bits / 32], one string of bits, the lowest ones first."""
    string = (values.long()[..., None] >> torch.arange(bits) & 1).flatten(-2)
    words = (string.unflatten(-1, (-1, 32)) << torch.arange(32)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def random_codes(bits: int, rows: int, columns: int, random: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 1 << bits, (rows, columns), generator=random)


def random_scales(bits: int, rows: int, columns: int, random: torch.Generator) -> torch.Tensor:
    return (torch.rand(rows, columns, generator=random) * 0.16 / (1 << bits)).half()


def write_awq(module: str, weight: torch.Tensor, random: torch.Generator) -> tuple[Weights, torch.Tensor]:
    n, k = weight.shape
    codes, zeros = random_codes(4, k, n, random), random_codes(4, k // GROUP, n, random)
    scales = random_scales(4, k // GROUP, n, random)

    def packed(values: torch.Tensor) -> torch.Tensor:
        return int32_words(values.unflatten(1, (-1, 8))[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1), 4)

    stands_for = (codes - group_wise(zeros)) * group_wise(scales.float())
    return {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales}, stands_for.t()


def gptq(
    bits: int = 4, *, sym: bool = False, zero_offset: int = 1, desc_act: bool = False, group: int | None = GROUP
) -> Write:
    """group: None: all inputs."""

    def write(module: str, weight: torch.Tensor, random: torch.Generator) -> tuple[Weights, torch.Tensor]:
        n, k = weight.shape
        g_idx = torch.arange(k) // (group or k)
        if desc_act:  # parts that are multiplied as one see the same inputs, and are quantized in the same order
            g_idx = g_idx[torch.randperm(k, generator=torch.Generator().manual_seed(k))]
        num_groups = int(g_idx.max()) + 1
        codes, scales = random_codes(bits, k, n, random), random_scales(bits, num_groups, n, random)
        zeros = random_codes(bits, num_groups, n, random)
        if sym:
            zeros.fill_(1 << (bits - 1))
        tensors = {
            "qweight": int32_words(codes.t(), bits).t(),
            "qzeros": int32_words((zeros - zero_offset) % (1 << bits), bits),
            "scales": scales,
            "g_idx": g_idx.to(torch.int32),
        }
        return tensors, ((codes - zeros[g_idx]) * scales.float()[g_idx]).t()

    return write


def gptq_config(bits: int = 4, **entries: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": False, "sym": False} | entries


def write_gptq_by_layer(
    module: str, weight: torch.Tensor, random: torch.Generator
) -> tuple[Weights, torch.Tensor | None]:
    """Write o_proj as it is, down_proj with 8 bits and symmetric, others as the configuration says."""
    if module.endswith("o_proj"):
        return {"weight": weight}, None
    write = gptq(8, sym=True, group=None) if module.endswith("down_proj") else gptq()
    return write(module, weight, random)


def marlin(group: int | None) -> Write:
    """Write what Marlin's own packer makes of codes, step by step as it goes over threads and tiles."""

    def write(module: str, weight: torch.Tensor, random: torch.Generator) -> tuple[Weights, torch.Tensor]:
        n, k = weight.shape
        num_groups = k // (group or k)
        codes, scales = random_codes(4, k, n, random), random_scales(4, num_groups, n, random)
        order = []
        for thread in range(32):
            of_tile = [
                16 * row + thread // 4 + 8 * half
                for half in (0, 1)
                for row in (2 * (thread % 4), 2 * (thread % 4) + 1, 2 * (thread % 4) + 8, 2 * (thread % 4) + 9)
            ]
            order += [[256 * tile + of_tile[i] for i in (0, 2, 4, 6, 1, 3, 5, 7)] for tile in range(4)]
        tiles = codes.view(k // 16, 16, n // 16, 16).permute(0, 2, 1, 3).reshape(-1, 1024)
        stored = tiles[:, torch.tensor(order).flatten()].reshape(k // 16, n * 16)
        if group is None:
            scale_order = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
        else:
            scale_order = [i + 8 * j for i in range(8) for j in range(8)]
        ordered = scales.reshape(-1, len(scale_order))[:, scale_order].reshape(scales.shape)
        tensors = {"B": int32_words(stored, 4), "s": ordered, "workspace": torch.zeros(n // 128 * 16).int()}
        return tensors, ((codes - 8) * group_wise(scales.float(), group=k // num_groups)).t()

    return write


def compressed(bits: int = 4, *, sym: bool = True, group: int | None = GROUP, actorder: bool = False) -> Write:
    """Pack values plus 2^(bits - 1) along the inputs, and such zeros along the outputs."""

    def write(module: str, weight: torch.Tensor, random: torch.Generator) -> tuple[Weights, torch.Tensor]:
        n, k = weight.shape
        g_idx = torch.arange(k) // (group or k)
        if actorder:
            g_idx = g_idx[torch.randperm(k, generator=torch.Generator().manual_seed(k))]
        num_groups, half = int(g_idx.max()) + 1, 1 << (bits - 1)
        codes, scales = random_codes(bits, n, k, random), random_scales(bits, n, num_groups, random)
        zeros = random_codes(bits, n, num_groups, random)
        tensors = {
            "weight_packed": int32_words(codes, bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor([n, k]),
        }
        if sym:
            zeros.fill_(half)
        else:
            tensors["weight_zero_point"] = int32_words(zeros.t(), bits).t()
        if actorder:
            tensors["weight_g_idx"] = g_idx.to(torch.int32)
        return tensors, (codes - zeros[:, g_idx]) * scales.float()[:, g_idx]

    return write


def bytes_each(bits: int, *, sym: bool = True) -> Write:
    """Write values of few bits, signed, one a byte."""

    def write(module: str, weight: torch.Tensor, random: torch.Generator) -> tuple[Weights, torch.Tensor]:
        n, k = weight.shape
        half = 1 << (bits - 1)
        codes, scales = random_codes(bits, n, k, random) - half, random_scales(bits, n, k // GROUP, random)
        zeros = random_codes(bits, n, k // GROUP, random) - half
        tensors = {"weight": codes.to(torch.int8), "weight_scale": scales}
        if sym:
            zeros.fill_(0)
        else:
            tensors["weight_zero_point"] = zeros.to(torch.int8)
        return tensors, (codes - group_wise(zeros, 1)) * group_wise(scales.float(), 1)

    return write


def to_fp8(values: torch.Tensor) -> torch.Tensor:
    return values.clamp(-448, 448).to(torch.float8_e4m3fn)


def by_token(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 448
    return to_fp8(x / scale).float() * scale


def by_token_in_blocks(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([by_token(part) for part in x.split(BLOCK, -1)], -1)


def by_token_int8(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


INPUT_SCALE = 0.03


def static_fp8(x: torch.Tensor) -> torch.Tensor:
    return to_fp8(x / INPUT_SCALE).float() * INPUT_SCALE


def static_int8(x: torch.Tensor) -> torch.Tensor:
    return (x / INPUT_SCALE).round().clamp(-127, 127) * INPUT_SCALE


BLOCK = 32
Scale = Callable[[torch.Tensor], torch.Tensor]


def of_all(weight: torch.Tensor) -> torch.Tensor:
    return weight.abs().amax().reshape(1, 1)


def of_rows(weight: torch.Tensor) -> torch.Tensor:
    return weight.abs().amax(1, keepdim=True)


def of_blocks(weight: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.stack([b.abs().amax() for b in r.split(BLOCK, 1)]) for r in weight.split(BLOCK, 0)])


def spread(scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Repeat scales over the rows and columns of a weight."""
    n, k = weight.shape
    for dim, size in enumerate((n, k)):
        count = scale.shape[dim]
        scale = scale.repeat_interleave(BLOCK if 1 < count < size else size // count, dim)
    return scale[:n, :k]


def fp8(of: Scale, name: str = "weight_scale", shaped: Scale = lambda scale: scale, **others: float) -> Write:
    """Round to e4m3. others: further tensors of one number."""

    def write(module: str, weight: torch.Tensor, random: torch.Generator) -> tuple[Weights, torch.Tensor]:
        scale = of(weight) / 448
        codes = to_fp8(weight / spread(scale, weight))
        tensors = {"weight": codes, name: shaped(scale)} | {leaf: torch.tensor(one) for leaf, one in others.items()}
        return tensors, codes.float() * spread(scale, weight)

    return write


def int8(of: Scale, **others: float) -> Write:
    def write(module: str, weight: torch.Tensor, random: torch.Generator) -> tuple[Weights, torch.Tensor]:
        scale = of(weight) / 127
        codes = (weight / scale).round()
        tensors = {"weight": codes.to(torch.int8), "weight_scale": scale}
        return tensors | {leaf: torch.tensor([one]) for leaf, one in others.items()}, codes * scale

    return write


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def int8_in_blocks(module: str, weight: torch.Tensor, random: torch.Generator) -> tuple[Weights, torch.Tensor]:
    scale = of_blocks(weight) / 127
    whole = spread(scale, weight)
    codes = (weight / whole).round()
    return {"weight": codes.to(torch.int8), "weight_scale_inv": scale}, codes * whole


def fp4(codes_name: str, group: int, global_name: str = "", inverse: bool = False) -> Write:
    """Write codes of E2M1, with e4m3 scales times one of all, or with powers of two where it has no name."""

    def write(module: str, weight: torch.Tensor, random: torch.Generator) -> tuple[Weights, torch.Tensor]:
        n, k = weight.shape
        codes = random_codes(4, n, k, random)
        tensors = {codes_name: (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8)}
        if global_name:
            of_all = torch.tensor(1 / 4096)
            scale = to_fp8(torch.rand(n, k // group, generator=random) * 448)
            tensors |= {"weight_scale": scale, global_name: 1 / of_all if inverse else of_all}
            scale = scale.float() * of_all
        else:
            exponents = torch.randint(115, 123, (n, k // group), generator=random)
            tensors["weight_scale"] = exponents.to(torch.uint8)
            scale = 2.0 ** (exponents - 127)
        return tensors, E2M1[codes] * group_wise(scale, 1, group)

    return write


def write_mxfp8(module: str, weight: torch.Tensor, random: torch.Generator) -> tuple[Weights, torch.Tensor]:
    exponents = torch.randint(115, 123, (weight.shape[0], weight.shape[1] // 32), generator=random)
    scale = group_wise(2.0 ** (exponents - 127), 1, 32)
    codes = to_fp8(weight / scale)
    return {"weight": codes, "weight_scale": exponents.to(torch.uint8)}, codes.float() * scale


def write_mixed(module: str, weight: torch.Tensor, random: torch.Generator) -> tuple[Weights, torch.Tensor | None]:
    if module.endswith("o_proj"):
        return {"weight": weight}, None
    return (fp8(of_rows) if module.endswith("down_proj") else compressed())(module, weight, random)


def torchao(bits: int, *, zeros: bool = False, group: int = GROUP) -> Write:
    """Write integers as torchao does, a byte each."""

    def write(module: str, weight: torch.Tensor, random: torch.Generator) -> tuple[Weights, torch.Tensor]:
        n, k = weight.shape
        least, count = -(1 << bits - 1), k // group
        codes = random_codes(bits, n, k, random) + least
        zero = random_codes(bits, n, count, random) + least if zeros else torch.zeros(n, count)
        scale = random_scales(bits, n, count, random).float()
        tensors = {"_weight_qdata": codes.to(torch.int8), "_weight_scale": scale}
        wanted = (codes - group_wise(zero, 1, group)) * group_wise(scale, 1, group)
        return tensors | {"_weight_zero_point": zero.to(torch.int8)}, wanted

    return write


def torchao_pairs(module: str, weight: torch.Tensor, random: torch.Generator) -> tuple[Weights, torch.Tensor]:
    """Write 4-bit integers as torchao does, two a byte, with a number that is added to each group."""
    n, k = weight.shape
    codes, scale = random_codes(4, n, k, random) - 8, random_scales(4, n, k // GROUP, random).float()
    added = torch.randn(n, k // GROUP, generator=random) * 0.05
    pairs = codes[:, ::2] & 15 | codes[:, 1::2] << 4
    tensors = {"_weight_qdata": pairs.to(torch.int8), "_weight_scale": scale.t(), "_weight_zero_point": added.t()}
    return tensors, codes * group_wise(scale, 1) + group_wise(added, 1)


def torchao_fp8(module: str, weight: torch.Tensor, random: torch.Generator) -> tuple[Weights, torch.Tensor]:
    tensors, wanted = fp8(of_rows)(module, weight, random)
    assert wanted is not None
    return {"_weight_qdata": tensors["weight"], "_weight_scale": tensors["weight_scale"]}, wanted


def torchao_config(kind: str, **settings: Any) -> Json:
    """Return config.json's entry; strings stand for torchao's own objects, whose kinds are not read."""
    named = {
        name: {"_type": "", "_data": value} if isinstance(value, str) else value for name, value in settings.items()
    }
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": kind, "_data": named}}}


def google(bits: int, weight_name: str = "weight") -> Write:
    """Write integers as Google does, with a scale a row."""

    def write(module: str, weight: torch.Tensor, random: torch.Generator) -> tuple[Weights, torch.Tensor]:
        n, k = weight.shape
        codes, scale = random_codes(bits, n, k, random), random_scales(bits, n, 1, random).float()
        per_byte = 8 // bits
        bytes_ = sum(codes[:, i::per_byte] << bits * i for i in range(per_byte))
        stored = (codes - 128).to(torch.int8) if bits == 8 else torch.as_tensor(bytes_).to(torch.uint8)
        scale_name = "weight_scale" if weight_name == "weight" else "embedding_scale"
        return {weight_name: stored, scale_name: scale}, (codes - (1 << bits - 1)) * scale

    return write


def with_scales(write: Write, **scales: float) -> Write:
    """Write tensors of one number beside others."""

    def written(module: str, weight: torch.Tensor, random: torch.Generator) -> tuple[Weights, torch.Tensor | None]:
        tensors, wanted = write(module, weight, random)
        return tensors | {name: torch.tensor(value) for name, value in scales.items()}, wanted

    return written


OF_GROUPS = {"_type": "PerGroup", "_data": {"group_size": GROUP}}


NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


BNB_FP4 = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3]) / 12


def nf4(*, double: bool, kind: str = "nf4", storage: torch.dtype = torch.uint8) -> Write:
    """double: scales are rounded to bytes, 256 of them with a scale and an offset. kind: or "fp4".

    storage: what the file calls the bytes.
    """
    meanings = NF4 if kind == "nf4" else BNB_FP4

    def write(module: str, weight: torch.Tensor, random: torch.Generator) -> tuple[Weights, torch.Tensor]:
        n, k = weight.shape
        codes, num_scales = random_codes(4, n, k, random), n * k // 64
        state: Json = {"quant_type": kind, "blocksize": 64, "dtype": "float32", "shape": [n, k]}
        tensors = {
            "weight": (16 * codes[:, ::2] + codes[:, 1::2]).to(torch.uint8).view(storage).view(-1, 1),
            "weight.quant_map": meanings.clone(),
        }
        if double:
            rounded = torch.randint(0, 256, (num_scales,), generator=random)
            table, of_256 = torch.linspace(-1, 1, 256), torch.rand(-(-num_scales // 256), generator=random) * 0.1
            tensors |= {"weight.absmax": rounded.to(torch.uint8), "weight.nested_absmax": of_256}
            tensors["weight.nested_quant_map"] = table
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
            scale = (table[rounded] * of_256.repeat_interleave(256)[:num_scales] + 0.25).half().float()
        else:
            scale = torch.rand(num_scales, generator=random).half().float()  # held exactly, and so are 12 of it
            tensors["weight.absmax"] = scale = scale if kind == "nf4" else 12 * scale
        name = f"weight.quant_state.bitsandbytes__{kind}"
        tensors[name] = torch.tensor(list(json.dumps(state).encode())).to(torch.uint8)
        return tensors, (meanings[codes].view(-1, 64) * scale[:, None]).view(n, k)

    return write


def write_bitsandbytes_int8(module: str, weight: torch.Tensor, random: torch.Generator) -> tuple[Weights, torch.Tensor]:
    largest = weight.abs().amax(1)
    codes = (weight / largest[:, None] * 127).round()
    tensors = {"weight": codes.to(torch.int8), "SCB": largest, "weight_format": torch.tensor(0).to(torch.uint8)}
    return tensors, codes * largest[:, None] / 127


def fp8_in_blocks(block: int) -> Write:
    """Write blocks that end beyond the last row."""

    def write(module: str, weight: torch.Tensor, random: torch.Generator) -> tuple[Weights, torch.Tensor]:
        n, k = weight.shape
        scale = torch.rand(-(-n // block), -(-k // block), generator=random) / 448
        spread_out = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)[:n, :k]
        codes = to_fp8(weight / spread_out)
        return {"weight": codes, "weight_scale": scale}, codes.float() * spread_out

    return write


def but(write: Write, others: dict[str, Write | None]) -> Write:
    """Write modules whose names end so in another way; None: as they are."""

    def written(module: str, weight: torch.Tensor, random: torch.Generator) -> tuple[Weights, torch.Tensor | None]:
        other = next((other for leaf, other in others.items() if module.endswith(leaf)), write)
        return ({"weight": weight}, None) if other is None else other(module, weight, random)

    return written


AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}

BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def ct_config(
    layout: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True} | weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors", "format": layout, "ignore": ["lm_head"],
        "quantization_status": "compressed", "config_groups": {"group_0": group},
    } | more  # fmt: skip


def ct_words(bits: int, group: int | None = GROUP, **weights: Any) -> dict[str, Any]:
    of_groups = {"strategy": "group", "group_size": group} if group else {"strategy": "channel", "group_size": None}
    return ct_config("pack-quantized", {"num_bits": bits, "type": "int"} | of_groups | weights)


DYNAMIC = {"num_bits": 8, "dynamic": True, "symmetric": True, "strategy": "token"}
STATIC = {"num_bits": 8, "dynamic": False, "symmetric": True, "strategy": "tensor"}
FLOAT8, INT8 = {"num_bits": 8, "type": "float"}, {"num_bits": 8, "type": "int"}
MIXED_GROUPS = {
    "group_0": {"targets": ["re:.*down_proj"], "format": "float-quantized",
                "weights": FLOAT8 | {"strategy": "channel"}, "input_activations": None},
    "group_1": {"targets": ["Linear"], "format": "pack-quantized",
                "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": True}},
}  # fmt: skip


CASES: dict[str, Case] = {
    "awq": Case(AWQ, write_awq),
    "awq but for some modules": Case(
        AWQ | {"modules_to_not_convert": ["v_proj", "layers.1.mlp", "0.self_attn.o_proj"]},
        but(write_awq, {"v_proj": None, "1.mlp.gate_proj": None, "1.mlp.up_proj": None, "1.mlp.down_proj": None,
                        "0.self_attn.o_proj": None}),
    ),
    "awq but for modules that nobody names": Case(
        AWQ, but(write_awq, {"q_proj": None, "0.mlp.up_proj": None, "1.mlp.down_proj": None})
    ),
    "bitsandbytes": Case(BITSANDBYTES, nf4(double=False)),
    "bitsandbytes, fp4": Case(BITSANDBYTES | {"bnb_4bit_quant_type": "fp4"}, nf4(double=False, kind="fp4")),
    "bitsandbytes, double": Case(BITSANDBYTES, nf4(double=True)),
    "bitsandbytes, bytes named otherwise": Case(
        BITSANDBYTES | {"bnb_4bit_quant_storage": "bfloat16"},
        nf4(double=True, storage=torch.bfloat16),
    ),
    "bitsandbytes but for some modules": Case(
        BITSANDBYTES | {"llm_int8_skip_modules": ["lm_head", "0.mlp"]},
        but(nf4(double=True), {"0.mlp.up_proj": None, "0.mlp.gate_proj": None, "0.mlp.down_proj": None, "k_proj": None})
    ),
    "bitsandbytes, int8": Case({"quant_method": "bitsandbytes", "load_in_8bit": True}, write_bitsandbytes_int8),
    "gptq": Case(gptq_config(sym=True), gptq(sym=True)),
    "gptq, zeros": Case(gptq_config(), gptq()),
    "gptq, zeros, version 2": Case(gptq_config(checkpoint_format="gptq_v2"), gptq(zero_offset=0)),
    "gptq, all inputs in one group": Case(gptq_config(group_size=-1, desc_act=True), gptq(group=None)),
    "gptq, desc_act": Case(gptq_config(sym=True, desc_act=True), gptq(sym=True, desc_act=True)),
    "gptq, 8 bits": Case(gptq_config(8, sym=True), gptq(8, sym=True)),
    "gptq, 8 bits, zeros": Case(gptq_config(8), gptq(8)),
    "gptq, 8 bits, desc_act": Case(gptq_config(8, desc_act=True), gptq(8, desc_act=True)),
    "gptq, 3 bits": Case(gptq_config(3, sym=True), gptq(3, sym=True)),
    "gptq, 3 bits, zeros": Case(gptq_config(3), gptq(3)),
    "gptq, 2 bits": Case(gptq_config(2, sym=True), gptq(2, sym=True)),
    "gptq, by what ends a name": Case(
        gptq_config(dynamic={".*v_proj": {"bits": 8}, "+:.*up_proj": {"bits": 2}, "-:.*down_proj": {}}),
        but(gptq(), {"v_proj": gptq(8), "up_proj": gptq(2), "down_proj": None}),
    ),
    "gptq, by layer": Case(
        gptq_config(dynamic={r"-:.*o_proj": {}, r"+:.*\.down_proj": {"bits": 8, "sym": True, "group_size": -1}}),
        write_gptq_by_layer,
    ),
    "gptq with its head": Case(
        gptq_config(desc_act=True, lm_head=True), gptq(desc_act=True), modules=WITH_HEAD
    ),
    "compressed-tensors, W8A16 with its embedding, tied": Case(
        ct_config("pack-quantized", {}, config_groups={"group_0": {
            "targets": ["Linear", "Embedding"], "weights": INT8 | {"strategy": "channel", "symmetric": True}}}),
        compressed(8, group=None),
        model='{"tie_word_embeddings": true}',
        modules=r"_proj$|embed_tokens$",
    ),
    "compressed-tensors, FP8 with its head": Case(
        ct_config("float-quantized", FLOAT8 | {"strategy": "tensor"}, ignore=[]), fp8(of_all), modules=WITH_HEAD
    ),
    "compressed-tensors, W8A16 with its head": Case(
        ct_config("int-quantized", INT8 | {"strategy": "channel"}, ignore=None),
        lambda *given: ({name: tensor.squeeze(1) if name == "weight_scale" else tensor
                         for name, tensor in int8(of_rows)(*given)[0].items()}, int8(of_rows)(*given)[1]),
        modules=WITH_HEAD,
    ),
    "gptq, one product of several kinds": Case(
        gptq_config(dynamic={r".*\.(q|up)_proj": {"bits": 8}, r"-:.*\.v_proj": {}}),
        but(gptq(), {"q_proj": gptq(8), "up_proj": gptq(8), "v_proj": None}),
        model='{"attention_bias": true, "mlp_bias": true, "random_norms": true}',
    ),
    "gptq for marlin": Case(
        gptq_config(checkpoint_format="marlin", sym=True), marlin(GROUP), model='{"num_key_value_heads": 4}'
    ),
    "gptq for marlin, all inputs in one group": Case(
        gptq_config(is_marlin_format=True, group_size=-1), marlin(None), model='{"num_key_value_heads": 4}'
    ),
    "auto-round": Case(
        {"quant_method": "auto-round", "bits": 4, "group_size": GROUP, "sym": False, "data_type": "int",
         "packing_format": "auto_round:auto_gptq",
         "extra_config": {
             ".*o_proj": {"bits": 16}, "model.layers.0.mlp.down_proj": {"bits": 8, "sym": True, "group_size": -1},
             "model.layers.1.mlp.down_proj": {"bits": 8, "sym": True, "group_size": -1},
         }},
        write_gptq_by_layer,
    ),
    "auto-round, its own packing": Case(
        {"quant_method": "auto-round", "bits": 3, "group_size": GROUP, "sym": False, "packing_format": "auto_round"},
        gptq(3, zero_offset=0),
    ),
    "auto-round, packed for GPTQModel": Case(
        {"quant_method": "auto-round", "bits": 4, "group_size": GROUP, "sym": False,
         "packing_format": "auto_round:gptqmodel"},
        gptq(zero_offset=0),
    ),
    "auto-round, MXFP4": Case(
        {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "data_type": "mx_fp", "act_bits": 4,
         "packing_format": "auto_round:llm_compressor"},
        fp4("weight_packed", 32),
    ),
    "auto-round, NVFP4 and MXFP8": Case(
        {"quant_method": "auto-round", "bits": 4, "group_size": 16, "data_type": "nv_fp", "act_bits": 4,
         "act_data_type": "nv_fp4_with_static_gs", "packing_format": "auto_round:llm_compressor",
         "extra_config": {".*down_proj": {"bits": 8, "group_size": 32, "data_type": "mx_fp"},
                          ".*o_proj": {"bits": 16, "data_type": "float"}}},
        but(fp4("weight_packed", 16, "weight_global_scale", inverse=True),
            {"down_proj": write_mxfp8, "o_proj": None}),
    ),
    "auto-round, FP8 static": Case(
        {"quant_method": "auto-round", "bits": 8, "group_size": -1, "data_type": "fp", "act_bits": 8,
         "act_dynamic": False, "packing_format": "auto_round:fp8_static"},
        fp8(of_rows, shaped=torch.squeeze, input_scale=INPUT_SCALE),
        static_fp8,
    ),
    "auto-round, FP8 in blocks": Case(
        {"quant_method": "auto-round", "bits": 8, "group_size": [BLOCK, BLOCK], "data_type": "fp", "act_bits": 8,
         "act_dynamic": True, "packing_format": "auto_round:fp8", "weight_block_size": [BLOCK, BLOCK]},
        fp8(of_blocks, "weight_scale_inv"),
        by_token_in_blocks,
    ),
    "auto-round as awq": Case(
        {"quant_method": "auto-round", "bits": 4, "group_size": GROUP, "packing_format": "auto_round:auto_awq"},
        write_awq,
    ),
    "compressed-tensors, W4A16": Case(ct_words(4), compressed()),
    "compressed-tensors, W4A16 with zeros": Case(ct_words(4, symmetric=False), compressed(sym=False)),
    "compressed-tensors, W4A16 in another order": Case(
        ct_words(4, actorder="group"), compressed(actorder=True)
    ),
    "compressed-tensors, W8A16": Case(ct_words(8, None), compressed(8, group=None)),
    "compressed-tensors, W8A16 with zeros": Case(ct_words(8, symmetric=False), compressed(8, sym=False)),
    "compressed-tensors, W3A16": Case(ct_words(3), compressed(3)),
    "compressed-tensors, W6A16 with zeros": Case(ct_words(6, symmetric=False), compressed(6, sym=False)),
    "compressed-tensors, W4A8": Case(
        ct_config("int-quantized", {"num_bits": 4, "type": "int", "group_size": GROUP}, DYNAMIC | INT8), bytes_each(4)
    ),
    "compressed-tensors, W4A8 with zeros": Case(
        ct_config("int-quantized", {"num_bits": 4, "type": "int", "group_size": GROUP, "symmetric": False}),
        bytes_each(4, sym=False),
    ),
    "compressed-tensors, W8 with zeros": Case(
        ct_config("int-quantized", {"num_bits": 8, "type": "int", "group_size": GROUP, "symmetric": False}),
        bytes_each(8, sym=False),
    ),
    "compressed-tensors, W8A8": Case(
        ct_config("int-quantized", INT8 | {"strategy": "channel"}, DYNAMIC | INT8), int8(of_rows), by_token_int8
    ),
    "compressed-tensors, W8A8 static": Case(
        ct_config("int-quantized", INT8 | {"strategy": "tensor"}, STATIC | INT8),
        int8(of_all, input_scale=INPUT_SCALE),
        static_int8,
    ),
    "compressed-tensors, FP8 dynamic": Case(
        ct_config("float-quantized", FLOAT8 | {"strategy": "channel"}, DYNAMIC | FLOAT8), fp8(of_rows), by_token
    ),
    "compressed-tensors, FP8 static": Case(
        ct_config("float-quantized", FLOAT8 | {"strategy": "tensor"}, STATIC | FLOAT8),
        fp8(of_all, input_scale=INPUT_SCALE, k_scale=0.1),
        static_fp8,
    ),
    "compressed-tensors, FP8 in blocks": Case(
        ct_config(
            "float-quantized",
            FLOAT8 | {"strategy": "block", "block_structure": [BLOCK, BLOCK]},
            DYNAMIC | FLOAT8 | {"strategy": "group", "group_size": BLOCK},
        ),
        fp8(of_blocks),
        by_token_in_blocks,
    ),
    "compressed-tensors, several groups": Case(
        ct_config("mixed-precision", {}, ignore=["lm_head", "re:.*o_proj"], config_groups=MIXED_GROUPS), write_mixed
    ),
    "compressed-tensors, NVFP4": Case(
        ct_config("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "group_size": 16}),
        fp4("weight_packed", 16, "weight_global_scale", inverse=True),
    ),
    "compressed-tensors, MXFP4": Case(
        ct_config("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "group_size": 32}), fp4("weight_packed", 32)
    ),
    "compressed-tensors, MXFP8": Case(
        ct_config("mxfp8-quantized", {"num_bits": 8, "type": "float", "group_size": 32}), write_mxfp8
    ),
    "fp8 in blocks": Case(
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]},
        fp8(of_blocks, "weight_scale_inv"),
        by_token_in_blocks,
    ),
    "fp8": Case(
        {"quant_method": "fp8", "activation_scheme": "static"}, fp8(of_all, input_scale=INPUT_SCALE), static_fp8
    ),
    "fp8 of Mistral": Case(
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
        fp8(of_all, "weight_scale_inv", torch.squeeze, activation_scale=INPUT_SCALE),
        static_fp8,
    ),
    "fbgemm": Case({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, fp8(of_rows), by_token),
    "modelopt": Case(
        {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["lm_head"]},
        fp8(of_all, shaped=torch.squeeze, input_scale=INPUT_SCALE, v_scale=0.1),
        static_fp8,
    ),
    "modelopt, rows and tokens": Case(
        {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "exclude_modules": ["lm_head*"]},
        fp8(of_rows, shaped=torch.squeeze),
        by_token,
    ),
    "modelopt, NVFP4": Case(
        {"quant_method": "modelopt_fp4", "quant_algo": "NVFP4", "exclude_modules": ["lm_head"]},
        fp4("weight", 16, "weight_scale_2"),
    ),
    "modelopt, mixed, with embedding and head": Case(
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {
            "model.embed_tokens": {"quant_algo": "NVFP4", "group_size": 16},
            "model.layers.0": {"quant_algo": "W4A16_NVFP4"},
            "model.layers.1.mlp": {"quant_algo": "W4A8_NVFP4_FP8", "group_size": 32},
            "model.layers.1.self_attn": {"quant_algo": "UNQUANTIZED"},
            "lm_head": {"quant_algo": "MXFP8"},
        }},
        but(fp4("weight", 16, "weight_scale_2"), {
            "lm_head": write_mxfp8,
            **{f"1.mlp.{one}_proj": fp4("weight", 32, "weight_scale_2") for one in ("gate", "up", "down")},
            **dict.fromkeys([f"1.self_attn.{one}_proj" for one in "qkvo"], None),
        }),
        modules=r"_proj$|^lm_head$|embed_tokens$",
    ),
    "modelopt, a cache alone": Case(
        {"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8", "exclude_modules": []},
        lambda module, weight, random: ({"weight": weight}, None),
    ),
    "rows of int8": Case({"quant_method": "w8a8_int8"}, int8(of_rows), by_token_int8),
    "blocks of int8": Case(
        {"quant_method": "blockwise_int8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]},
        int8_in_blocks,
    ),
    "rows of fp8": Case({"quant_method": "w8a8_fp8"}, fp8(of_rows), by_token),
    "quark": Case(
        {"quant_method": "quark", "exclude": ["lm_head"], "global_quant_config": {
            "weight": {"dtype": "fp8_e4m3", "qscheme": "per_tensor"},
            "input_tensors": {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False},
        }},
        fp8(of_all, shaped=torch.squeeze, input_scale=INPUT_SCALE, output_scale=0.1),
        static_fp8,
    ),
    "quark, int8": Case(
        {"quant_method": "quark", "exclude": ["lm_head"], "global_quant_config": {
            "weight": {"dtype": "int8", "qscheme": "per_channel"},
            "input_tensors": {"dtype": "int8", "qscheme": "per_channel", "is_dynamic": True},
        }},
        int8(of_rows),
        by_token_int8,
    ),
    "quark, MXFP4": Case(
        {"quant_method": "quark", "exclude": ["lm_head"], "global_quant_config": {
            "weight": {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}}},
        fp4("weight", 32),
    ),
    "gemma": Case(
        {"quant_method": "gemma", "num_bits": 4, "quantize_embeddings": True,
         "modules_to_not_convert": ["lm_head"], "module_quant_configs": {
             r"mlp\.(up|gate)_proj": {"num_bits": 2}, "embed_tokens|down_proj": {"num_bits": 8}}},
        but(with_scales(google(4), input_activation_scale=0.05, output_activation_scale=0.1), {
            "up_proj": google(2), "gate_proj": google(2), "down_proj": google(8),
            "embed_tokens": google(8, "embedding_quantized"),
        }),
        modules=r"_proj$|embed_tokens$",
    ),
    "torchao, int8": Case(torchao_config("Int8WeightOnlyConfig", granularity=OF_GROUPS), torchao(8)),
    "torchao, int4, zeros": Case(
        torchao_config(
            "IntxWeightOnlyConfig", weight_dtype="int4", granularity=OF_GROUPS, mapping_type="ASYMMETRIC"
        ),
        torchao(4, zeros=True),
    ),
    "torchao, int3": Case(
        torchao_config("Int8DynamicActivationIntxWeightConfig", weight_dtype="int3", weight_granularity=OF_GROUPS),
        torchao(3),
    ),
    "torchao, pairs": Case(torchao_config("Int4WeightOnlyConfig", group_size=GROUP), torchao_pairs),
    "torchao, fp8": Case(
        torchao_config("Float8DynamicActivationFloat8WeightConfig", granularity=[{"_type": "PerRow"}] * 2),
        torchao_fp8,
        by_token,
    ),
    "torchao, one for each name": Case(
        torchao_config("FqnToConfig", fqn_to_config={
            "_default": {"_type": "Int4WeightOnlyConfig", "_data": {"group_size": GROUP}},
            "re:.+\\.down_proj": None,
            "lm_head": {"_type": "Int8WeightOnlyConfig", "_data": {"granularity": OF_GROUPS}},
            "model.embed_tokens": {"_type": "Int8WeightOnlyConfig", "_data": {"granularity": OF_GROUPS}},
        }),
        but(torchao_pairs, {"down_proj": None, "lm_head": torchao(8), "embed_tokens": torchao(8)}),
        modules=r"_proj$|^lm_head$|embed_tokens$",
    ),
}  # fmt: skip


def write_quantized(folder: Path, case: Case, target: Path) -> None:
    """Write the checkpoint of `folder` quantized to `target`, and overwrite it with what that stands for."""
    random = torch.Generator().manual_seed(0)
    plain, packed = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module != name and re.search(case.modules, module):
            tensors, stands_for = case.write(module, weight, random)
            plain[name] = weight if stands_for is None else stands_for
            packed.update({f"{module}.{leaf}": tensor for leaf, tensor in tensors.items()})
        else:
            plain[name] = packed[name] = weight
    shutil.copytree(folder, target)
    save_file({name: tensor.contiguous() for name, tensor in packed.items()}, target / "model.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in plain.items()}, folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(raw | {"quantization_config": case.config}))
