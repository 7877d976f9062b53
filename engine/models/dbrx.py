"""DBRX: a Llama with layer norms and fine-grained experts.

norms           layer norms without bias
q, k, v         in one `Wqkv`; clamped
experts         the best of a softmax, renormalized
on disk         all experts' rows in one tensor each, `w1` gate, `v1` up; `w2` is stored [inputs, outputs]
"""

from collections.abc import Sequence
from typing import Any

from engine.errors import ModelError
from engine.layers.block import PreNorm
from engine.layers.norm import BiaslessLayerNorm
from engine.model_config import ExpertsConfig, ModelConfig, read_decoder
from engine.models.base import CausalLM
from engine.models.moe import EXPERTS, everywhere
from engine.models.names import Rename, Rule, Split, Transpose, Unstack
from engine.models.spelling import respelled, with_rope
from kernels.routing import Routing

PLACES = {"w1": "gate_proj", "v1": "up_proj", "w2": "down_proj"}


class DbrxBlock(PreNorm):
    norm_class = BiaslessLayerNorm


class Dbrx(CausalLM):
    block = DbrxBlock
    checkpoint = EXPERTS  # numbered in a converted GGUF file

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        attention, ffn = raw["attn_config"], raw["ffn_config"]
        raw = respelled(
            raw,
            hidden_size="d_model",
            num_hidden_layers="n_layers",
            num_attention_heads="n_heads",
            max_position_embeddings="max_seq_len",
        )
        raw = with_rope(raw, rope_theta=attention.get("rope_theta", 10000.0))
        power = ffn.get("moe_normalize_expert_weights", 1)
        if power not in (None, 1):
            raise ModelError(f"config.json: moe_normalize_expert_weights must be 1 or null, got {power}")
        routing = Routing(ffn["moe_num_experts"], ffn["moe_top_k"], renormalize=power == 1)
        experts = ExpertsConfig(routing, ffn["ffn_hidden_size"])
        return read_decoder(
            raw | {"intermediate_size": ffn["ffn_hidden_size"], "attention_bias": False},
            num_kv_heads=attention.get("kv_n_heads", 1),
            clip_qkv=attention.get("clip_qkv") or 0.0,
            norm_eps=1e-5,
            hidden_act=(ffn.get("ffn_act_fn") or {}).get("name", "silu"),
            experts=everywhere(raw, experts),
        )

    @property
    def names(self) -> Sequence[Rule]:
        attention, experts = self.config.attention[0], self.config.experts[0]
        assert experts is not None
        num_heads, num_kv_heads, num_experts = attention.num_heads, attention.num_kv_heads, experts.routing.num_experts
        return (
            Rename(r"^(transformer\.)?wte\.", "model.embed_tokens."),
            Rename(r"^(transformer\.)?blocks\.", "model.layers."),
            Rename(r"^(transformer\.)?norm_f\.", "model.norm."),
            Rename(r"\.norm_attn_norm\.norm_1\.", ".input_layernorm."),
            Rename(r"\.norm_attn_norm\.norm_2\.", ".post_attention_layernorm."),
            Rename(r"\.norm_attn_norm\.attn\.out_proj\.", ".self_attn.o_proj."),
            Rename(r"\.norm_attn_norm\.attn\.", ".self_attn."),
            Split("Wqkv", ("q_proj", "k_proj", "v_proj"), (num_heads, num_kv_heads, num_kv_heads)),
            Rename(r"\.ffn\.router\.layer\.", ".mlp.gate."),
            *(
                Unstack(rf"\.ffn\.experts\.mlp\.{name}$", f".mlp.experts.{place}.weight", num_experts, is_flat=True)
                for name, place in PLACES.items()
            ),
            Transpose(r"\.experts\.down_proj\.weight$"),
            *(  # as quantized files have them: one by one, outputs first
                Rename(rf"\.ffn\.experts\.mlp\.(\d+)\.{name}\.", rf".mlp.experts.\1.{place}.")
                for name, place in PLACES.items()
            ),
            *super().names,
        )
