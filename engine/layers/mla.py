"""Multi-head latent attention (DeepSeek-AI 2024, DeepSeek-V2).

A token's keys and values are products of one short vector, its latent; that and a rotated key which all heads share
are what is cached. Ranks split the heads, and each holds all latents.
"""

import torch

from cache.layout import Latent
from cache.pool import CachePool
from engine.errors import ModelError
from engine.layers.attention import AnyAttention
from engine.layers.forward_batch import ForwardBatch
from engine.layers.layer import LayerConfig
from engine.layers.linear import Linear, row_parallel
from engine.layers.norm import HiddenNorm, RMSNorm
from engine.layers.rotary import RotaryEmbedding
from engine.model_config import AttentionConfig, LatentConfig
from kernels.dense import DenseWeight
from kernels.elementwise import rope_and_store_latent
from kernels.latents import Expansion, LatentSizes
from kernels.mla import latent_attention
from kernels.quantized import QuantizedWeight
from kernels.tuning import LatentShape, WeightShape
from kernels.weights import Norm, Part

NORM_EPS = 1e-6  # of both latents' norms, whatever that of others is


class ExpandingLinear(Linear):
    """The product that makes keys and values of latents, as plain numbers: attention takes the matrix apart."""

    def pack(self) -> None:
        if not isinstance(self.weight, DenseWeight):
            if isinstance(self.weight, QuantizedWeight):
                self.weight.settle()
            parts, k = self.weight.parts, self.weight.k
            self.weight = DenseWeight(parts, k, self.dtype, data=self.weight.rows_of(0).contiguous())


class LatentAttention(AnyAttention):
    """Queries of all heads, and the latents in which they find values.

    One product makes a token's latent, and its queries or a latent of theirs, which then is the same on every rank.
    """

    config: LatentConfig

    def __init__(
        self,
        config: AttentionConfig,
        hidden_size: int,
        norm_eps: float,  # noqa: ARG002 - of the latents' norms it is always the same
        layer_id: int,
        rotary: RotaryEmbedding,
        layers: LayerConfig,
        norm_class: type[HiddenNorm] = RMSNorm,
    ) -> None:
        assert isinstance(config, LatentConfig)
        self.config, self.rotary, self.layer_id = config, rotary, layer_id
        self.num_heads = layers.split(config.num_heads, "num_attention_heads")
        self.rank, self.rope_dim = config.kv_lora_rank, config.rope.rotary_dim
        self.scale, self.backend = config.scale, layers.attention_backend
        queries = Part(self.num_heads * config.head_dim, layers.shard)
        of_kv = Part(self.rank + self.rope_dim)
        if config.q_lora_rank:
            first, name = Part(config.q_lora_rank), "q_a_proj"
            self.q_a_layernorm = norm_class(config.q_lora_rank, NORM_EPS, layers)
            self.q_b_proj = Linear((), [queries], config.q_lora_rank, layers.within("q_b_proj"))
        else:
            first, name = queries, "q_proj"
            if config.qkv_bias:
                raise ModelError("config.json: attention_bias without a q_lora_rank is not supported")
        self.qkv_a_proj = Linear(
            (name, "kv_a_proj_with_mqa"), [first, of_kv], hidden_size, layers.within("qkv_a_proj"), bias=config.qkv_bias
        )
        self.num_first = first.num_rows
        self.kv_a_layernorm = norm_class(self.rank, NORM_EPS, layers)
        self.sizes = LatentSizes(config.qk_nope_head_dim, config.v_head_dim, self.rank)
        expanded_dim = config.qk_nope_head_dim + config.v_head_dim
        self.kv_b_proj = ExpandingLinear(
            (), [Part(self.num_heads * expanded_dim, layers.shard)], self.rank, layers.within("kv_b_proj")
        )
        self.o_proj = row_parallel(
            config.num_heads * config.v_head_dim, hidden_size, layers.within("o_proj"), bias=config.o_bias
        )

    @property
    def cache(self) -> Latent:
        return Latent(self.rank, self.rope_dim)

    @property
    def expansion(self) -> Expansion:
        """The matrix of `kv_b_proj`, once packed."""
        weight = self.kv_b_proj.weight
        assert isinstance(weight, DenseWeight), "not packed"
        return Expansion(weight.data, self.num_heads, self.sizes)

    def tuning_shapes(self, *, has_norm: bool) -> list[WeightShape | None]:
        shapes = [self.qkv_a_proj.weight.tuning_shape(has_norm=has_norm)]
        if self.config.q_lora_rank:
            shapes.append(self.q_b_proj.weight.tuning_shape(has_norm=self.q_a_layernorm.is_rms))
        return [*shapes, self.o_proj.weight.tuning_shape(has_residual=True)]

    def attention_shape(self, kv_dtype: torch.dtype) -> LatentShape | None:
        if self.backend == "torch":
            return None
        key_dim, value_dim, rank = self.sizes
        return LatentShape(self.num_heads, key_dim, self.rope_dim, value_dim, rank, kv_dtype)

    def __call__(
        self, x: torch.Tensor, batch: ForwardBatch, pool: CachePool, *, norm: Norm | None = None
    ) -> torch.Tensor:
        made = self.qkv_a_proj(x, norm=norm)
        q, kv = made[:, : self.num_first], made[:, self.num_first :]
        if self.config.q_lora_rank:
            q = self.q_b_proj(q, norm=self.q_a_layernorm)
        q = q.unflatten(1, (self.num_heads, -1))
        cache = pool[self.layer_id].latent
        rope_and_store_latent(
            q,
            kv,
            batch.positions,
            self.rotary.cos_sin,
            cache,
            batch.out_cache_loc,
            self.kv_a_layernorm.weight,
            NORM_EPS,
        )
        return latent_attention(q, cache, self.expansion, batch, scale=self.scale, backend=self.backend).flatten(1)
