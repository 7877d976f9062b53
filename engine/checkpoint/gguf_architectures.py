"""Describe the architectures of GGUF files: the Hugging Face checkpoint that each becomes. Data.

Where a family computes what another one does, its files become that one's: InternLM2, Baichuan, XVERSE and EXAONE 3 are
Llamas with other names, MiniCPM is a Granite, ChatGLM a GLM, QWen a Qwen2, Orion a StableLM. A model that
also reads images becomes its language model.
`engine.checkpoint.gguf_names` and `gguf_config` read the table.
"""

import difflib
from collections.abc import Callable
from dataclasses import replace

from engine.checkpoint.gguf import GGUF
from engine.checkpoint.gguf_experts import (
    AsRow,
    dbrx_experts,
    deepseek_experts,
    deepseek_variant,
    ernie_experts,
    expert_names,
    gemma4_experts,
    glm_experts,
    granite_experts,
    grok_experts,
    hunyuan_experts,
    llama4_experts,
    minimax_experts,
    mixtral_experts,
    olmo_experts,
    qwen2_experts,
    qwen3_experts,
    shared_names,
)
from engine.checkpoint.gguf_family import (
    BLOCK,
    FUSED_GATE_UP,
    MLP_BIAS,
    POST_NORMS,
    SANDWICH,
    TOP,
    Architecture,
    Names,
    Number,
    falcon_norms,
    gemma4_layers,
    grok_multipliers,
    llama4_attention,
    minicpm_multipliers,
    mpt_attention,
    phi3_lengths,
    qk_norms,
    query_scalar,
    smollm3_layers,
    windows,
)
from engine.checkpoint.gguf_latents import latent_rope, latent_sizes
from engine.checkpoint.gguf_rope import (
    gemma3_rope,
    gemma4_rope,
    gpt_oss_rope,
    ministral3_rope,
    partly_rotated,
    phimoe_rope,
    rope_of_each_kind,
)
from engine.errors import ModelError
from engine.models.names import Rename

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
QWEN_3 = Architecture("Qwen3ForCausalLM", "qwen3")
QWEN_3_MOE = Architecture(
    "Qwen3MoeForCausalLM",
    "qwen3_moe",
    derived=(qwen3_experts,),
    block=BLOCK | expert_names("mlp"),
    has_experts=True,
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
LATENT: Names = BLOCK | {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
}
YOUTU = Architecture(
    "YoutuForCausalLM", "youtu", derived=(latent_sizes,), rope=latent_rope, block=LATENT, has_latents=True
)
DEEPSEEK_2 = replace(
    YOUTU,
    name="DeepseekV2ForCausalLM",
    model_type="deepseek_v2",
    derived=(latent_sizes, deepseek_experts),
    block=LATENT
    | expert_names("mlp")
    | shared_names("mlp.shared_experts")
    | {"exp_probs_b": "mlp.gate.e_score_correction"},
    has_experts=True,
    rules=(CORRECTION,),
)
FALCON = Architecture(
    "FalconForCausalLM",
    "falcon",
    fixed={"activation": "gelu"},
    biases={"bias": "attn_qkv"},
    derived=(falcon_norms,),
    block={
        "attn_norm": "input_layernorm",
        "attn_qkv": "self_attention.query_key_value",
        "attn_output": "self_attention.dense",
        "ffn_up": "mlp.dense_h_to_4h",
        "ffn_down": "mlp.dense_4h_to_h",
    },
    top={
        "token_embd": "transformer.word_embeddings",
        "output_norm": "transformer.ln_f",
        "output": "lm_head",
    },
    layers="transformer.h",
    spellings={
        "intermediate_size": "ffn_hidden_size",
        "num_key_value_heads": "num_kv_heads",
        "head_dim": "",
        "norm_eps": "layer_norm_epsilon",
    },
    has_fused_qkv=True,
    has_qkv_by_head=True,
)

# MosaicML's.
MOSAIC = Architecture(
    "DbrxForCausalLM",
    "dbrx",
    biases={},
    top={"token_embd": "transformer.wte", "output_norm": "transformer.norm_f", "output": "lm_head"},
    layers="transformer.blocks",
    spellings={
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "max_position_embeddings": "max_seq_len",
    },
    has_fused_qkv=True,
)

# general.architecture -> what its files become
ARCHITECTURES = {
    "llama": LLAMA,
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2"),
    "qwen2vl": Architecture("Qwen2ForCausalLM", "qwen2"),
    "qwen3": QWEN_3,
    "qwen3vl": QWEN_3,
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
        derived=(gemma4_layers, gemma4_experts),
        rope=gemma4_rope,
        block=SANDWICH
        | {
            "layer_output_scale": "layer_scalar",
            "inp_gate": "per_layer_input_gate",
            "proj": "per_layer_projection",
            "post_norm": "post_per_layer_input_norm",
            "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
            "post_ffw_norm_1": "post_feedforward_layernorm_1",
            "post_ffw_norm_2": "post_feedforward_layernorm_2",
            "expert_scales": "router.per_expert_scale",
        }
        | {name: module.removeprefix(".") for name, module in expert_names("").items()}
        | {"ffn_gate_inp": "router.proj"},
        top=TOP
        | {
            "per_layer_token_embd": "model.embed_tokens_per_layer",
            "per_layer_model_proj": "model.per_layer_model_projection",
            "per_layer_proj_norm": "model.per_layer_projection_norm",
        },
        has_fused_qkv=True,
        has_like_heads=False,
        has_experts=True,
        rules=(
            Rename(r"\.(layer_scalar|per_expert_scale)\.weight$", r".\1"),
            Rename(r"\.router\.proj\.scale$", ".router.scale"),
        ),
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
    "baichuan": LLAMA,
    "baichuan 13B": Architecture(
        "BaichuanForCausalLM",
        "baichuan",
        rope=None,
        spellings={"max_position_embeddings": "model_max_length"},
        is_interleaved=True,
    ),
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
    "bloom": Architecture(
        "BloomForCausalLM",
        "bloom",
        biases={},
        rope=None,
        block={
            "attn_norm": "input_layernorm",
            "attn_qkv": "self_attention.query_key_value",
            "attn_output": "self_attention.dense",
            "ffn_norm": "post_attention_layernorm",
            "ffn_up": "mlp.dense_h_to_4h",
            "ffn_down": "mlp.dense_4h_to_h",
        },
        top={
            "token_embd": "transformer.word_embeddings",
            "token_embd_norm": "transformer.word_embeddings_layernorm",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        layers="transformer.h",
        spellings={
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "seq_length",
            "norm_eps": "layer_norm_epsilon",
        },
        has_fused_qkv=True,
        has_qkv_by_head=True,
    ),
    "falcon": FALCON,
    "falcon 40B": replace(FALCON, block=FALCON.block | {"attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"}),
    "mpt": replace(
        MOSAIC,
        name="MptForCausalLM",
        model_type="mpt",
        derived=(mpt_attention,),
        rope=None,
        block={
            "attn_norm": "norm_1",
            "attn_qkv": "attn.Wqkv",
            "attn_output": "attn.out_proj",
            "ffn_norm": "norm_2",
            "ffn_up": "ffn.up_proj",
            "ffn_down": "ffn.down_proj",
        },
        spellings=MOSAIC.spellings | {"norm_eps": "layer_norm_epsilon"},
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
    "qwen3moe": QWEN_3_MOE,
    "qwen3vlmoe": QWEN_3_MOE,
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
    "phimoe": Architecture(
        "PhimoeForCausalLM",
        "phimoe",
        fixed={"sliding_window": None},
        biases={"attention_bias": "attn_q", "lm_head_bias": "output"},
        derived=(mixtral_experts,),
        rope=phimoe_rope,
        block=BLOCK | expert_names("block_sparse_moe", "w1", "w3", "w2"),
        has_experts=True,
    ),
    "deepseek": Architecture(
        "DeepseekForCausalLM",
        "deepseek",
        derived=(deepseek_experts,),
        block=BLOCK | expert_names("mlp") | shared_names("mlp.shared_experts"),
        is_interleaved=True,
        has_experts=True,
    ),
    "deepseek2": DEEPSEEK_2,
    "deepseek3": replace(DEEPSEEK_2, name="DeepseekV3ForCausalLM", model_type="deepseek_v3"),
    "youtu": YOUTU,
    "glm-dsa": replace(DEEPSEEK_2, name="GlmMoeDsaForCausalLM", model_type="glm_moe_dsa"),
    "minicpm3": replace(
        YOUTU,
        name="MiniCPM3ForCausalLM",
        model_type="minicpm3",
        fixed={"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256},  # there is one model of it
    ),
    "llama4": Architecture(
        "Llama4ForCausalLM",
        "llama4_text",
        derived=(llama4_experts, llama4_attention),
        block={name: module.replace("mlp.", "feed_forward.") for name, module in BLOCK.items()}
        | expert_names("feed_forward")
        | shared_names("feed_forward.shared_expert")
        | {"ffn_gate_inp": "feed_forward.router"},
        has_experts=True,
    ),
    "dbrx": replace(
        MOSAIC,
        derived=(dbrx_experts,),
        block=expert_names("mlp")
        | {
            "attn_norm": "norm_attn_norm.norm_1",
            "attn_qkv": "norm_attn_norm.attn.Wqkv",
            "attn_output": "norm_attn_norm.attn.out_proj",
            "attn_output_norm": "norm_attn_norm.norm_2",
            "ffn_gate_inp": "ffn.router.layer",
        },
        has_experts=True,
    ),
    "grok": Architecture(
        "Grok1ForCausalLM",
        "grok",
        fixed=GELU,
        derived=(grok_experts, grok_multipliers),
        block=BLOCK
        | expert_names("block_sparse_moe", "w1", "w3", "w2")
        | {
            "attn_norm": "pre_attn_norm",
            "attn_output_norm": "post_attn_norm",
            "ffn_norm": "pre_moe_norm",
            "layer_output_norm": "post_moe_norm",
            "post_ffw_norm": "post_moe_norm",
        },
        has_experts=True,
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
# Names of our own, of files that say by something else what they are.
LAYERS_OF_BAICHUAN_13B = 40
VARIANTS = (
    "olmo3",
    "mistral",
    "mixtral",
    "baichuan 13B",
    "falcon 40B",
    "deepseek3",
    "youtu",
)
FILES = tuple(name for name in ARCHITECTURES if name not in VARIANTS)  # names that files have


def architecture_of(gguf: GGUF) -> Architecture:
    """Return what the file becomes. `ModelError` if its architecture is not known, or has experts that are not."""
    name = gguf["general.architecture"]
    if name not in FILES:
        close = difflib.get_close_matches(name, FILES, 1, 0.5) if isinstance(name, str) else []
        nearest = f". The nearest is {close[0]!r}" if close else ""
        raise ModelError(f"GGUF architecture {name!r} is not supported, only {', '.join(FILES)}{nearest}")
    name = variant_of(gguf, name)
    num_experts = gguf.get("{}.expert_count")
    if num_experts and not ARCHITECTURES[name].has_experts:
        raise ModelError(f"GGUF architecture {name!r} with {num_experts} experts is not supported, only without")
    return ARCHITECTURES[name]


def variant_of(gguf: GGUF, name: str) -> str:
    """Return which one of the architectures that files call `name` this one has."""
    variants: dict[str, Callable[[], str]] = {  # asked only of its own files: others may lack the entry
        "llama": lambda: "mixtral" if gguf.get("{}.expert_count") else name,
        "olmo2": lambda: "olmo3" if gguf.get("{}.attention.sliding_window") else name,
        "mistral3": lambda: name if gguf.get("{}.attention.temperature_scale") else "mistral",  # Mistral Small 3
        "baichuan": lambda: "baichuan 13B" if gguf["{}.block_count"] == LAYERS_OF_BAICHUAN_13B else name,
        "falcon": lambda: "falcon 40B" if "blk.0.attn_norm_2.weight" in gguf.shapes else name,
        "deepseek2": lambda: deepseek_variant(gguf),
    }
    return variants[name]() if name in variants else name
