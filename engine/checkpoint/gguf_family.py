"""What describes an architecture of GGUF files, and what is computed of a file for one: see `gguf_architectures`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from engine.checkpoint.gguf import GGUF, shortest
from engine.checkpoint.gguf_rope import Rope, head_dim, rope_parameters
from engine.errors import ModelError
from engine.models.names import Rule

Derive = Callable[[GGUF], dict[str, Any]]
"""Computes entries of config.json from a file."""
Names = dict[str, str]

RMS, LAYER = "{}.attention.layer_norm_rms_epsilon", "{}.attention.layer_norm_epsilon"

# Tensors of a whole model and of a block, without ".weight" or ".bias" -> module of the checkpoint
TOP: Names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK: Names = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SANDWICH: Names = BLOCK | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
POST_NORMS: Names = {name: module for name, module in SANDWICH.items() if name not in ("attn_norm", "ffn_norm")}
QKV_BIAS: Names = {"attention_bias": "attn_q"}
MLP_BIAS: Names = QKV_BIAS | {"mlp_bias": "ffn_up"}
FUSED_GATE_UP: Names = BLOCK | {"ffn_up": "mlp.gate_up_proj"}


class Number(NamedTuple):
    """Name a list of the file's metadata, with a number for each block, that is a tensor of the checkpoint."""

    key: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Architecture:
    """Describe the checkpoint that the files of one architecture become."""

    name: str  # in config.json's `architectures`
    model_type: str
    keys: Names = field(default_factory=dict)  # entry of config.json -> the file's key; left out where it has none
    fixed: Mapping[str, Any] = field(default_factory=dict)  # entries that are the same for all files
    biases: Names = field(default_factory=lambda: QKV_BIAS)  # entry -> the tensor that has a bias where it is true
    derived: tuple[Derive, ...] = ()
    rope: Rope | None = rope_parameters
    block: Names = field(default_factory=lambda: BLOCK)
    top: Names = field(default_factory=lambda: TOP)
    layers: str = "model.layers"  # module of the blocks
    spellings: Names = field(default_factory=dict)  # entry that all families have -> this one's, "" if it has none
    is_interleaved: bool = False  # q and k keep rotary pairs side by side, which the checkpoint has half a head apart
    has_offset_norms: bool = False  # norms hold 1 + weight
    has_norms_of_heads: bool = False  # each query and key head has its own norm, a module in the checkpoint
    has_fused_qkv: bool = False  # in the checkpoint; files may fuse them for any
    has_qkv_by_head: bool = False  # the checkpoint's fused one holds the queries of a key, it and its value, ...
    is_transposed: bool = False  # the checkpoint's matrices of blocks are [in, out]
    has_like_heads: bool = True  # layers have as many heads of one length; else `derived` says how many, and how long
    has_experts: bool = False  # a mixture of experts in the place of some MLPs
    has_latents: bool = False  # latent attention, whose keys and values are made by one product
    rules: tuple[Rule, ...] = ()  # on the checkpoint's names, after all others
    numbers: Mapping[str, Number] = field(default_factory=dict)  # tensor of a block -> where the file has it


def windows(period: int, default: int | None = None) -> Derive:
    """Return what reads sliding windows: all but the last of every `period` layers, unless the file says otherwise."""

    def derive(gguf: GGUF) -> dict[str, Any]:
        num_layers, window = gguf["{}.block_count"], gguf.get("{}.attention.sliding_window", default) or None
        pattern = gguf.get("{}.attention.sliding_window_pattern", period)
        if not isinstance(pattern, list):
            pattern = [(i + 1) % pattern != 0 for i in range(num_layers)]
        is_local = [bool(window) and bool(local) for local in pattern]
        kinds = ["sliding_attention" if local else "full_attention" for local in is_local]
        return {"sliding_window": window, "layer_types": kinds}

    return derive


def query_scalar(num_layers_27b: int) -> Derive:
    """Return what reads `query_pre_attn_scalar`, which files leave out: the 27B model's is not the length of a head."""

    def derive(gguf: GGUF) -> dict[str, Any]:
        is_27b = gguf["{}.block_count"] == num_layers_27b
        return {"query_pre_attn_scalar": gguf["{}.embedding_length"] // gguf.heads if is_27b else head_dim(gguf)}

    return derive


def qk_norms(entry: str) -> Derive:
    """Return what says in `entry` whether queries and keys are normed."""
    return lambda gguf: {entry: "blk.0.attn_q_norm.weight" in gguf.shapes}


def phi3_lengths(gguf: GGUF) -> dict[str, Any]:
    """Return Phi-3's window, for which files say 0 where there is none, and the length before scaling."""
    original = gguf.get("{}.rope.scaling.original_context_length", gguf["{}.context_length"])
    window = gguf.get("{}.attention.sliding_window") or None
    return {"sliding_window": window, "original_max_position_embeddings": original}


def smollm3_layers(gguf: GGUF) -> dict[str, Any]:
    """Return which layers are rotated: all but every fourth."""
    return {"no_rope_layers": [int((i + 1) % 4 != 0) for i in range(gguf["{}.block_count"])]}


def minicpm_multipliers(gguf: GGUF) -> dict[str, Any]:
    """Return MiniCPM's multipliers by Granite's names. Old files have none: they are of the 1B and 2B models."""
    hidden_size, num_layers = gguf["{}.embedding_length"], gguf["{}.block_count"]
    return {
        "embedding_multiplier": shortest(gguf.get("{}.embedding_scale", 12.0)),
        "residual_multiplier": shortest(gguf.get("{}.residual_scale", 1.4 / num_layers**0.5)),
        "logits_scaling": shortest(gguf.get("{}.logit_scale", hidden_size / 256)),
        "attention_multiplier": head_dim(gguf) ** -0.5,
    }


def falcon_norms(gguf: GGUF) -> dict[str, Any]:
    """Return which norms a Falcon has. All are written as the newer ones, whose layout of q, k and v has all others."""
    has_two = "blk.0.attn_norm_2.weight" in gguf.shapes
    return {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 2 if has_two else 1}


def mpt_attention(gguf: GGUF) -> dict[str, Any]:
    """Return MPT's attention, and by how much its MLP is wider."""
    steepest, clip = gguf.get("{}.attention.max_alibi_bias", 0.0), gguf.get("{}.attention.clamp_kqv")
    attention = {"alibi": bool(steepest), "alibi_bias_max": int(steepest), "clip_qkv": shortest(clip) if clip else None}
    return {"attn_config": attention, "expansion_ratio": gguf["{}.feed_forward_length"] // gguf["{}.embedding_length"]}


def grok_multipliers(gguf: GGUF) -> dict[str, Any]:
    """Return Grok's multipliers and caps. Old files have none: they are of Grok 1."""
    scale = head_dim(gguf) ** -0.5
    if abs(gguf.get("{}.attention.output_scale", scale) - scale) > 1e-4 * scale:
        raise ModelError(f"attention.output_scale of the GGUF file must be {scale:.6g} for Grok")
    return {
        "embedding_multiplier_scale": shortest(gguf.get("{}.embedding_scale", 78.38367176906169)),
        "output_multiplier_scale": shortest(gguf.get("{}.logit_scale", 0.5773502691896257)),
        "attn_logit_softcapping": shortest(gguf.get("{}.attn_logit_softcapping", 30.0)),
        "router_logit_softcapping": shortest(gguf.get("{}.router_logit_softcapping", 30.0)),
        "final_logit_softcapping": shortest(gguf.get("{}.final_logit_softcapping", 0.0)) or None,
        "attn_temperature_len": gguf.get("{}.attention.temperature_length"),
    }


def llama4_attention(gguf: GGUF) -> dict[str, Any]:
    """Return Llama 4's attention, of which files say little: Maverick alone, of 128 experts, has no norms of heads."""
    num_layers, window = gguf["{}.block_count"], gguf.get("{}.attention.sliding_window", 8192)
    return {
        "attention_chunk_size": window or None,
        "no_rope_layers": [int(not window or (i + 1) % 4 != 0) for i in range(num_layers)],
        "use_qk_norm": gguf["{}.expert_count"] != 128,
    }


def gemma4_layers(gguf: GGUF) -> dict[str, Any]:
    """Return what Gemma 4's layers of two kinds have, and what its smallest models save memory with."""
    derived = windows(6)(gguf)
    is_local = [kind == "sliding_attention" for kind in derived["layer_types"]]
    kv_heads = gguf.get("{}.attention.head_count_kv", gguf.heads)
    of_layers = kv_heads if isinstance(kv_heads, list) else [kv_heads] * len(is_local)
    of_global = [heads for heads, local in zip(of_layers, is_local, strict=True) if not local]
    widths = [gguf.shapes[f"blk.{i}.ffn_down.weight"][1] for i in (0, len(is_local) - 1)]
    vectors = gguf.shapes.get("per_layer_token_embd.weight")
    return derived | {
        "head_dim": gguf.get("{}.attention.key_length_swa") or head_dim(gguf),
        "global_head_dim": head_dim(gguf),
        "num_key_value_heads": next(heads for heads, local in zip(of_layers, is_local, strict=True) if local),
        "num_global_key_value_heads": of_global[0],
        "attention_k_eq_v": f"blk.{is_local.index(False)}.attn_v.weight" not in gguf.shapes,
        "num_kv_shared_layers": gguf.get("{}.attention.shared_kv_layers", 0),
        "use_double_wide_mlp": widths[1] == 2 * widths[0],
        "hidden_size_per_layer_input": gguf.get("{}.embedding_length_per_layer_input", 0),
        **({"vocab_size_per_layer_input": vectors[0]} if vectors else {}),
    }
