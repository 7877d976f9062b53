"""Llama and the families that are Llama but for one thing.

    Llama 1 to 3.3, SmolLM2, Yi     every rope scaling; attention_bias and mlp_bias in some derived models
    Mistral                         a sliding window in all layers (`ModelConfig.windows`)
    Qwen2, Qwen2.5                  biases on q, k and v; a sliding window in the upper layers, if any
    Qwen3                           an RMS norm of each query and key head before the rotation

A block, h [T, hidden] being the residual stream:

    h = h + Wo attention(rope(Wqkv norm(h)))
    h = h + Wdown (silu(Wgate norm(h)) * Wup norm(h))
"""

from typing import ClassVar

import torch

from cache.pool import KVPool
from engine.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from engine.layers.layer import Layer, LayerConfig
from engine.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear, activation
from engine.layers.norm import RMSNorm
from engine.layers.rotary import RotaryEmbedding
from engine.model_config import ModelConfig
from engine.models import CausalLM, Decoder
from engine.step.batch import ForwardBatch
from kernels.attention import attention
from kernels.corun import Corun, CorunCosts, can_corun, gated_beside_decodes
from kernels.elementwise import rope_and_store
from kernels.gemm import linear_act


class LlamaAttention(Layer):
    qk_norm: ClassVar = False

    def __init__(self, config: ModelConfig, layers: LayerConfig, layer_id: int, rotary: RotaryEmbedding) -> None:
        head_dim, num_heads, hidden = config.head_dim, config.num_attention_heads, config.hidden_size
        qkv_bias, o_bias = self.biases(config)
        self.qkv_proj = QKVParallelLinear(hidden, head_dim, num_heads, config.num_key_value_heads, qkv_bias, layers)
        self.o_proj = RowParallelLinear(num_heads * head_dim, hidden, o_bias, layers)
        if self.qk_norm:
            self.q_norm = RMSNorm(head_dim, config.rms_norm_eps, layers)
            self.k_norm = RMSNorm(head_dim, config.rms_norm_eps, layers)
        self.rotary = rotary
        self.layer_id = layer_id
        self.num_heads = self.qkv_proj.num_heads
        self.num_kv_heads = self.qkv_proj.num_kv_heads
        self.head_dim = head_dim
        self.eps = config.rms_norm_eps
        self.scale = head_dim**-0.5
        self.window = config.windows[layer_id]
        self.backend = layers.attention_backend

    def biases(self, config: ModelConfig) -> tuple[bool, bool]:
        """Whether (q, k and v, the output) have one."""
        has_bias = config.raw.get("attention_bias", False)
        return has_bias, has_bias

    def __call__(self, h: torch.Tensor, norm: RMSNorm, batch: ForwardBatch, kv: KVPool) -> torch.Tensor:
        _, o = self.attend(h, norm, batch, kv)
        return self.o_proj(o.flatten(1), h)

    def attend(
        self, h: torch.Tensor, norm: RMSNorm, batch: ForwardBatch, kv: KVPool, *, has_decodes: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(queries, what they find), each [T, H, D]. has_decodes: see `kernels.attention.attention`."""
        qkv = self.qkv_proj(h, norm)  # [T, (H + 2 Hkv) D]
        k_cache, v_cache = kv.k(self.layer_id), kv.v(self.layer_id)
        q = rope_and_store(
            qkv,
            batch.positions,
            self.rotary.cos_sin,
            k_cache,
            v_cache,
            batch.out_cache_loc,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.q_norm.weight if self.qk_norm else None,
            self.k_norm.weight if self.qk_norm else None,
            self.eps,
        )
        return q, attention(
            q,
            k_cache,
            v_cache,
            batch,
            scale=self.scale,
            window=self.window,
            backend=self.backend,
            has_decodes=has_decodes,
        )


class Qwen2Attention(LlamaAttention):
    def biases(self, config: ModelConfig) -> tuple[bool, bool]:
        return True, False


class Qwen3Attention(LlamaAttention):
    qk_norm = True


class LlamaMLP(Layer):
    def __init__(self, config: ModelConfig, layers: LayerConfig) -> None:
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.raw.get("mlp_bias", False)
        self.gate_up_proj = MergedColumnParallelLinear(hidden, [inner, inner], bias, layers)
        self.down_proj = RowParallelLinear(inner, hidden, bias, layers)
        self.act = activation(config.hidden_act)

    def __call__(self, h: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        return self.down_proj(self.gate_up_proj.gated(h, norm, self.act), h)


class LlamaDecoderLayer(Layer):
    def __init__(self, config: ModelConfig, layers: LayerConfig, self_attn: LlamaAttention) -> None:
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, layers)
        self.self_attn = self_attn
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, layers)
        self.mlp = LlamaMLP(config, layers)

    def __call__(self, h: torch.Tensor, batch: ForwardBatch, kv: KVPool) -> torch.Tensor:
        if batch.corun is not None:
            return self._run_split(h, batch, kv, batch.corun)
        h = self.self_attn(h, self.input_layernorm, batch, kv)
        return self.mlp(h, self.post_attention_layernorm)

    def _run_split(self, h: torch.Tensor, batch: ForwardBatch, kv: KVPool, corun: Corun) -> torch.Tensor:
        """The same with the last tokens ahead of the others: see `kernels.corun`."""
        attn, mlp, norm = self.self_attn, self.mlp, self.post_attention_layernorm
        q, o = attn.attend(h, self.input_layernorm, batch, kv, has_decodes=False)
        weight, first = mlp.gate_up_proj.weight, len(h) - corun.num_tokens
        gated = h.new_empty(len(h), len(weight) // 2)
        attn.o_proj.add_to(h[first:], o[first:].flatten(1))
        gated_beside_decodes(
            norm(h[first:]),
            weight,
            mlp.act,
            gated[first:],
            q,
            kv.k(attn.layer_id),
            kv.v(attn.layer_id),
            batch,
            o,
            num_free_sms=corun.num_free_sms,
            scale=attn.scale,
        )
        attn.o_proj.add_to(h[:first], o[:first].flatten(1))
        linear_act(norm(h[:first]), weight, act=mlp.act, out=gated[:first])
        return mlp.down_proj(gated, h)

    def corun_costs(self, kv: KVPool) -> CorunCosts | None:
        """None: its steps cannot be split."""
        attn, gate_up = self.self_attn, self.mlp.gate_up_proj
        is_alone = attn.o_proj.comm.size == 1  # else each half has a sum over ranks of its own: 8 % slower on two GPUs
        has_kernel = attn.backend != "torch"
        has_window = attn.window >= 0  # and little for attention to read
        if not is_alone or not has_kernel or has_window or gate_up.bias is not None:
            return None
        if not can_corun(gate_up.weight, self.mlp.act):
            return None
        return CorunCosts(2 * kv.k(attn.layer_id)[0].nbytes, 2 * gate_up.weight.numel())


class LlamaModel(Decoder):
    def __init__(self, config: ModelConfig, layers: LayerConfig, attention_class: type[LlamaAttention]) -> None:
        rotary = RotaryEmbedding(config.rope, config.context_length)
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, layers)
        self.layers = [
            LlamaDecoderLayer(config, layers, attention_class(config, layers, i, rotary))
            for i in range(config.num_hidden_layers)
        ]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, layers)

    def corun_costs(self, kv: KVPool) -> CorunCosts | None:
        costs = {layer.corun_costs(kv) for layer in self.layers}
        return costs.pop() if len(costs) == 1 else None  # of all, or of none

    def one_layer_of_each_kind(self) -> list[LlamaDecoderLayer]:
        return list({layer.self_attn.window: layer for layer in self.layers}.values())

    def __call__(self, batch: ForwardBatch, kv: KVPool) -> torch.Tensor:
        h = self.embed_tokens(batch.input_ids)
        for layer in self.layers:
            h = layer(h, batch, kv)
        return self.norm(h)


class LlamaForCausalLM(CausalLM):
    packed_modules_mapping: ClassVar = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }
    attention_class: ClassVar = LlamaAttention
    model: LlamaModel

    def __init__(self, config: ModelConfig, layers: LayerConfig) -> None:
        self.model = LlamaModel(config, layers, self.attention_class)
        tied = config.tie_word_embeddings
        self.lm_head = (
            self.model.embed_tokens if tied else ParallelLMHead(config.vocab_size, config.hidden_size, layers)
        )

    def __call__(self, batch: ForwardBatch, kv: KVPool) -> torch.Tensor:
        return self.model(batch, kv)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head.logits(hidden)


class Qwen2ForCausalLM(LlamaForCausalLM):
    attention_class = Qwen2Attention


class Qwen3ForCausalLM(LlamaForCausalLM):
    attention_class = Qwen3Attention
