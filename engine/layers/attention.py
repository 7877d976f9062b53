"""Grouped-query attention over the paged cache (Ainslie et al. 2023)."""

import torch

from cache.layout import KV
from cache.pool import CachePool
from engine.layers.forward_batch import ForwardBatch
from engine.layers.layer import Layer, LayerConfig
from engine.layers.linear import qkv_parallel, row_parallel
from engine.layers.norm import HiddenNorm, RMSNorm
from engine.layers.rotary import RotaryEmbedding
from engine.model_config import AttentionConfig
from kernels.attention import attention
from kernels.elementwise import rope_and_store
from kernels.weights import Norm


class Attention(Layer):
    """Queries, keys and values of all heads; `o_proj` is the block's to call: it ends the branch."""

    def __init__(
        self,
        config: AttentionConfig,
        hidden_size: int,
        norm_eps: float,
        layer_id: int,
        rotary: RotaryEmbedding,
        layers: LayerConfig,
        norm_class: type[HiddenNorm] = RMSNorm,
    ) -> None:
        """norm_class: of the norms of query and key heads, if there are any."""
        head_dim, num_heads, num_kv_heads = config.head_dim, config.num_heads, config.num_kv_heads
        self.qkv_proj = qkv_parallel(
            hidden_size, head_dim, num_heads, num_kv_heads, layers.within("qkv_proj"), bias=config.qkv_bias
        )
        self.o_proj = row_parallel(num_heads * head_dim, hidden_size, layers.within("o_proj"), bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = norm_class(head_dim, norm_eps, layers)
            self.k_norm = norm_class(head_dim, norm_eps, layers)
        self.config, self.rotary, self.layer_id = config, rotary, layer_id
        self.num_heads = layers.split(num_heads, "num_attention_heads")
        self.num_kv_heads = layers.num_kv_heads(num_kv_heads)
        self.head_dim, self.eps = head_dim, norm_eps
        self.scale, self.window, self.softcap = config.scale, config.window, config.softcap
        self.has_qk_norm = config.qk_norm
        self.backend = layers.attention_backend

    @property
    def cache(self) -> KV:
        """What this rank's layer keeps of each token."""
        return KV(self.num_kv_heads, self.head_dim, window=None if self.window < 0 else self.window)

    def __call__(
        self, x: torch.Tensor, batch: ForwardBatch, pool: CachePool, *, norm: Norm | None = None
    ) -> torch.Tensor:
        """Return what the heads find, [T, H D], for norm(x), x [T, hidden]. Keys and values are stored in `pool`."""
        _, found = self.attend(x, batch, pool, norm=norm)
        return found.flatten(1)

    def attend(
        self,
        x: torch.Tensor,
        batch: ForwardBatch,
        pool: CachePool,
        *,
        norm: Norm | None = None,
        has_decodes: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (queries, what they find), each [T, H, D]. has_decodes: see `kernels.attention.attention`."""
        qkv = self.qkv_proj(x, norm=norm)  # [T, (H + 2 Hkv) D]
        k_cache, v_cache = pool[self.layer_id]
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
            self.q_norm.weight if self.has_qk_norm else None,
            self.k_norm.weight if self.has_qk_norm else None,
            self.eps,
        )
        return q, attention(
            q,
            k_cache,
            v_cache,
            batch,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            backend=self.backend,
            has_decodes=has_decodes,
        )
