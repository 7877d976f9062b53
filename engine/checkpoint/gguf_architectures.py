"""Describe the architectures of GGUF files: the Hugging Face checkpoint that each becomes. Data.

Where a family computes what another one does, its files become that one's: InternLM2, Baichuan, XVERSE and EXAONE 3 are
Llamas with other names, MiniCPM is a Granite, ChatGLM a GLM, QWen a Qwen2, Orion a StableLM.
`engine.checkpoint.gguf_names` and `gguf_config` read the table.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from engine.checkpoint.gguf import GGUF, shortest
from engine.checkpoint.gguf_experts import (
    AsRow,
    ernie_experts,
    expert_names,
    glm_experts,
    granite_experts,
    hunyuan_experts,
    minimax_experts,
    mixtral_experts,
    olmo_experts,
    qwen2_experts,
    qwen3_experts,
    shared_names,
)
from engine.checkpoint.gguf_rope import (
    Rope,
    gemma3_rope,
    gemma4_rope,
    gpt_oss_rope,
    head_dim,
    ministral3_rope,
    partly_rotated,
    rope_of_each_kind,
    rope_parameters,
)
from engine.errors import ModelError
from engine.models.names import Rename, Rule

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
    spellings: Names = field(default_factory=dict)  # entry that all families have -> how this one spells it
    is_interleaved: bool = False  # q and k keep rotary pairs side by side, which the checkpoint has half a head apart
    has_offset_norms: bool = False  # norms hold 1 + weight
    has_norms_of_heads: bool = False  # each query and key head has its own norm, a module in the checkpoint
    has_fused_qkv: bool = False  # in the checkpoint; files may fuse them for any
    has_qkv_by_head: bool = False  # the checkpoint's fused one holds a head's query, key and value, then the next's
    is_transposed: bool = False  # the checkpoint's matrices of blocks are [in, out]
    has_like_heads: bool = True  # layers have as many heads of one length; else `derived` says how many, and how long
    has_experts: bool = False  # a mixture of experts in the place of some MLPs
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


def no_alibi(gguf: GGUF) -> dict[str, Any]:
    """Raise `ModelError` for the one Baichuan whose positions are not rotary."""
    if gguf["{}.block_count"] == 40:
        raise ModelError("GGUF files of Baichuan 13B, which has ALiBi, are not supported; its safetensors are")
    return {}


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


GELU = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
LLAMA = Architecture("LlamaForCausalLM", "llama", biases=MLP_BIAS, is_interleaved=True)
NEOX_LLAMA = replace(LLAMA, is_interleaved=False)
GEMMA_2 = Architecture(
    "Gemma2ForCausalLM",
    "gemma2",
    keys={
        "attn_logit_softcapping": "{}.attn_logit_softcapping",
        "final_logit_softcapping": "{}.final_logit_softcapping",
    },
    fixed=GELU,
    derived=(windows(2, 4096), query_scalar(46)),
    block=SANDWICH,
    has_offset_norms=True,
)
OLMO_2 = Architecture("Olmo2ForCausalLM", "olmo2", block=POST_NORMS)
GRANITE = Architecture(
    "GraniteForCausalLM",
    "granite",
    keys={
        "attention_multiplier": "{}.attention.scale",
        "embedding_multiplier": "{}.embedding_scale",
        "residual_multiplier": "{}.residual_scale",
        "logits_scaling": "{}.logit_scale",
    },
    biases=MLP_BIAS,
    is_interleaved=True,
)
HUNYUAN = Architecture(
    "HunYuanDenseV1ForCausalLM",
    "hunyuan_v1_dense",
    block=BLOCK | {"attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm"},
)
CORRECTION = Rename(r"\.e_score_correction\.bias$", ".e_score_correction_bias")
GLM_4 = Architecture(
    "Glm4ForCausalLM",
    "glm4",
    rope=partly_rotated,
    block=FUSED_GATE_UP
    | {
        "post_attention_norm": "post_self_attn_layernorm",
        "post_ffw_norm": "post_mlp_layernorm",
    },
)

# general.architecture -> what its files become
ARCHITECTURES = {
    "llama": LLAMA,
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2"),
    "qwen3": Architecture("Qwen3ForCausalLM", "qwen3"),
    "gemma": Architecture("GemmaForCausalLM", "gemma", fixed=GELU, has_offset_norms=True),
    "gemma2": GEMMA_2,
    "gemma3": replace(
        GEMMA_2,
        name="Gemma3ForCausalLM",
        model_type="gemma3_text",
        keys={"final_logit_softcapping": "{}.final_logit_softcapping"},
        fixed=GELU | {"attn_logit_softcapping": None},
        derived=(windows(6), query_scalar(62)),
        rope=gemma3_rope,
    ),
    "gemma4": Architecture(
        "Gemma4ForCausalLM",
        "gemma4_text",
        keys={"final_logit_softcapping": "{}.final_logit_softcapping"},
        fixed=GELU,
        derived=(gemma4_layers,),
        rope=gemma4_rope,
        block=SANDWICH
        | {
            "layer_output_scale": "layer_scalar",
            "inp_gate": "per_layer_input_gate",
            "proj": "per_layer_projection",
            "post_norm": "post_per_layer_input_norm",
        },
        top=TOP
        | {
            "per_layer_token_embd": "model.embed_tokens_per_layer",
            "per_layer_model_proj": "model.per_layer_model_projection",
            "per_layer_proj_norm": "model.per_layer_projection_norm",
        },
        has_fused_qkv=True,
        has_like_heads=False,
        rules=(Rename(r"\.layer_scalar\.weight$", ".layer_scalar"),),
    ),
    "phi2": Architecture(
        "PhiForCausalLM",
        "phi",
        fixed={"hidden_act": "gelu_new"},
        derived=(qk_norms("qk_layernorm"),),
        rope=partly_rotated,
        block=BLOCK | {"attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"},
        top=TOP | {"output_norm": "model.final_layernorm"},
        spellings={"norm_eps": "layer_norm_eps"},
    ),
    "phi3": Architecture(
        "Phi3ForCausalLM",
        "phi3",
        derived=(phi3_lengths,),
        block=FUSED_GATE_UP | {"attn_qkv": "self_attn.qkv_proj"},
        has_fused_qkv=True,
    ),
    "glm4": GLM_4,
    "chatglm": replace(GLM_4, name="GlmForCausalLM", model_type="glm", block=FUSED_GATE_UP),
    "command-r": Architecture(
        "CohereForCausalLM",
        "cohere",
        keys={"logit_scale": "{}.logit_scale"},
        derived=(qk_norms("use_qk_norm"),),
        spellings={"norm_eps": "layer_norm_eps"},
    ),
    "cohere2": Architecture(
        "Cohere2ForCausalLM",
        "cohere2",
        keys={"logit_scale": "{}.logit_scale"},
        derived=(windows(4),),
        spellings={"norm_eps": "layer_norm_eps"},
    ),
    "olmo": Architecture("OlmoForCausalLM", "olmo", keys={"clip_qkv": "{}.attention.clamp_kqv"}, is_interleaved=True),
    "olmo2": OLMO_2,
    "olmo3": replace(
        OLMO_2, name="Olmo3ForCausalLM", model_type="olmo3", derived=(windows(4),), rope=rope_of_each_kind
    ),
    "granite": GRANITE,
    "minicpm": replace(GRANITE, keys={}, derived=(minicpm_multipliers,)),
    "smollm3": Architecture(
        "SmolLM3ForCausalLM", "smollm3", biases=MLP_BIAS, derived=(smollm3_layers,), is_interleaved=True
    ),
    "exaone": NEOX_LLAMA,
    "exaone4": Architecture("Exaone4ForCausalLM", "exaone4", derived=(windows(4),), block=POST_NORMS),
    "stablelm": Architecture(
        "StableLmForCausalLM",
        "stablelm",
        keys={"use_parallel_residual": "{}.use_parallel_residual"},
        biases={"use_qkv_bias": "attn_q"},
        derived=(qk_norms("qk_layernorm"),),
        rope=partly_rotated,
        block=BLOCK | {f"attn_{x}_norm": f"self_attn.{x}_layernorm" for x in "qk"},
        spellings={"norm_eps": "layer_norm_eps"},
        has_norms_of_heads=True,
    ),
    "orion": Architecture(
        "StableLmForCausalLM",
        "stablelm",
        fixed={"use_parallel_residual": False},
        biases={"use_qkv_bias": "attn_q"},
        rope=partly_rotated,
        spellings={"norm_eps": "layer_norm_eps"},
    ),
    "gptneox": Architecture(
        "GPTNeoXForCausalLM",
        "gpt_neox",
        keys={"use_parallel_residual": "{}.use_parallel_residual"},
        fixed={"hidden_act": "gelu"},
        rope=partly_rotated,
        block={
            "attn_norm": "input_layernorm",
            "attn_qkv": "attention.query_key_value",
            "attn_output": "attention.dense",
            "ffn_norm": "post_attention_layernorm",
            "ffn_up": "mlp.dense_h_to_4h",
            "ffn_down": "mlp.dense_4h_to_h",
        },
        top={
            "token_embd": "gpt_neox.embed_in",
            "output_norm": "gpt_neox.final_layer_norm",
            "output": "embed_out",
        },
        layers="gpt_neox.layers",
        spellings={"norm_eps": "layer_norm_eps"},
        has_fused_qkv=True,
        has_qkv_by_head=True,
    ),
    "apertus": Architecture(
        "ApertusForCausalLM",
        "apertus",
        fixed={"hidden_act": "xielu"},
        biases=MLP_BIAS,
        block=BLOCK | {"attn_norm": "attention_layernorm", "ffn_norm": "feedforward_layernorm"},
        numbers={
            "mlp.act_fn.alpha_p": Number("xielu.alpha_p", (1,)),
            "mlp.act_fn.alpha_n": Number("xielu.alpha_n", (1,)),
            "mlp.act_fn.beta": Number("xielu.beta", ()),
            "mlp.act_fn.eps": Number("xielu.eps", ()),
        },
    ),
    "nemotron": Architecture(
        "NemotronForCausalLM",
        "nemotron",
        fixed={"hidden_act": "relu2"},
        biases=MLP_BIAS,
        rope=partly_rotated,
        has_offset_norms=True,
        spellings={"norm_eps": "norm_eps"},
    ),
    "starcoder2": Architecture(
        "Starcoder2ForCausalLM",
        "starcoder2",
        fixed={"hidden_act": "gelu_pytorch_tanh"},
        biases={"use_bias": "attn_output"},
        block=BLOCK | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
        spellings={"norm_eps": "norm_epsilon"},
    ),
    "internlm2": LLAMA,
    "xverse": LLAMA,
    "baichuan": replace(LLAMA, derived=(no_alibi,)),
    "qwen": Architecture("Qwen2ForCausalLM", "qwen2"),
    "mistral3": Architecture("Ministral3ForCausalLM", "ministral3", rope=ministral3_rope, is_interleaved=True),
    "mistral": replace(LLAMA, name="MistralForCausalLM", model_type="mistral", fixed={"sliding_window": None}),
    "seed_oss": Architecture(
        "SeedOssForCausalLM",
        "seed_oss",
        biases=MLP_BIAS | {"attention_out_bias": "attn_output"},
        block=BLOCK | {"post_attention_norm": "post_attention_layernorm"},
    ),
    "hunyuan-dense": HUNYUAN,
    "ernie4_5": Architecture("Ernie4_5ForCausalLM", "ernie4_5", biases={"use_bias": "attn_q"}),
    "arcee": Architecture(
        "ArceeForCausalLM", "arcee", fixed={"hidden_act": "relu2"}, biases=MLP_BIAS, is_interleaved=True
    ),
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        "gpt2",
        fixed={"activation_function": "gelu_new"},
        rope=None,
        block={
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
        top={
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        layers="transformer.h",
        spellings={
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
            "norm_eps": "layer_norm_epsilon",
        },
        has_fused_qkv=True,
        is_transposed=True,
    ),
    "mixtral": Architecture(
        "MixtralForCausalLM",
        "mixtral",
        fixed={"sliding_window": None},
        derived=(mixtral_experts,),
        block=BLOCK | expert_names("block_sparse_moe", "w1", "w3", "w2"),
        is_interleaved=True,
        has_experts=True,
    ),
    "qwen2moe": Architecture(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        biases={"qkv_bias": "attn_q"},
        derived=(qwen2_experts,),
        block=BLOCK
        | expert_names("mlp")
        | shared_names("mlp.shared_expert")
        | {"ffn_gate_inp_shexp": "mlp.shared_expert_gate"},
        has_experts=True,
    ),
    "qwen3moe": Architecture(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        derived=(qwen3_experts,),
        block=BLOCK | expert_names("mlp"),
        has_experts=True,
    ),
    "olmoe": Architecture(
        "OlmoeForCausalLM",
        "olmoe",
        keys={"clip_qkv": "{}.attention.clamp_kqv"},
        derived=(olmo_experts,),
        block=BLOCK | expert_names("mlp"),
        has_experts=True,
    ),
    # A checkpoint of Hugging Face's has gate and up of all experts in one tensor, the file and this one have each.
    "granitemoe": replace(
        GRANITE,
        name="GraniteMoeSharedForCausalLM",
        model_type="granitemoeshared",
        derived=(granite_experts,),
        block=BLOCK | expert_names("mlp") | shared_names("mlp.shared_experts"),
        has_experts=True,
    ),
    "glm4moe": Architecture(
        "Glm4MoeForCausalLM",
        "glm4_moe",
        derived=(glm_experts, qk_norms("use_qk_norm")),
        rope=partly_rotated,
        block=BLOCK
        | expert_names("mlp")
        | shared_names("mlp.shared_experts")
        | {"post_attention_norm": "post_attention_layernorm", "exp_probs_b": "mlp.gate.e_score_correction"},
        has_experts=True,
        rules=(CORRECTION,),
    ),
    "ernie4_5-moe": Architecture(
        "Ernie4_5_MoeForCausalLM",
        "ernie4_5_moe",
        biases={"use_bias": "attn_q"},
        derived=(ernie_experts,),
        block=BLOCK
        | expert_names("mlp")
        | shared_names("mlp.shared_experts")
        | {"exp_probs_b": "mlp.moe_statics.e_score_correction"},
        has_experts=True,
        rules=(CORRECTION, AsRow(r"\.e_score_correction_bias$")),
    ),
    "hunyuan-moe": replace(
        HUNYUAN,
        name="HunYuanMoEV1ForCausalLM",
        model_type="hunyuan_v1_moe",
        derived=(hunyuan_experts,),
        block=HUNYUAN.block | expert_names("mlp") | shared_names("mlp.shared_mlp") | {"ffn_gate_inp": "mlp.gate.wg"},
        has_experts=True,
    ),
    "minimax-m2": Architecture(
        "MiniMaxM2ForCausalLM",
        "minimax_m2",
        derived=(minimax_experts, qk_norms("use_qk_norm")),
        rope=partly_rotated,
        block=BLOCK
        | expert_names("block_sparse_moe", "w1", "w3", "w2")
        | {"exp_probs_b": "block_sparse_moe.e_score_correction"},
        has_experts=True,
        rules=(CORRECTION,),
    ),
    # As Granite's.
    "gpt-oss": Architecture(
        "GptOssForCausalLM",
        "gpt_oss",
        derived=(mixtral_experts, windows(2)),
        rope=gpt_oss_rope,
        block=BLOCK
        | expert_names("mlp")
        | {"post_attention_norm": "post_attention_layernorm", "attn_sinks": "self_attn.sinks"},
        has_experts=True,
        rules=(Rename(r"\.sinks\.weight$", ".sinks"),),
    ),
}
FILES = tuple(name for name in ARCHITECTURES if name not in ("olmo3", "mistral", "mixtral"))  # names that files have


def architecture_of(gguf: GGUF) -> Architecture:
    """Return what the file becomes. `ModelError` if its architecture is not known, or has experts that are not."""
    name = gguf["general.architecture"]
    if name not in FILES:
        close = difflib.get_close_matches(name, FILES, 1, 0.5) if isinstance(name, str) else []
        nearest = f". The nearest is {close[0]!r}" if close else ""
        raise ModelError(f"GGUF architecture {name!r} is not supported, only {', '.join(FILES)}{nearest}")
    num_experts = gguf.get("{}.expert_count")
    if name == "llama" and num_experts:
        name = "mixtral"
    if num_experts and not ARCHITECTURES[name].has_experts:
        raise ModelError(f"GGUF architecture {name!r} with {num_experts} experts is not supported, only without")
    if name == "olmo2" and gguf.get("{}.attention.sliding_window"):
        name = "olmo3"
    if name == "mistral3" and not gguf.get("{}.attention.temperature_scale"):  # Mistral Small 3
        name = "mistral"
    return ARCHITECTURES[name]
