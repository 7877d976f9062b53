"""Grouped-query attention over the paged cache (Ainslie et al. 2023), and what blocks know of any attention."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch

from cache.layout import KV, LayerCache
from cache.pool import CachePool
from engine.layers.cache_scales import CacheScales
from engine.layers.forward_batch import ForwardBatch
from engine.layers.layer import Layer, LayerConfig, meta_weight
from engine.layers.linear import Linear, qkv_parallel, row_parallel
from engine.layers.norm import HiddenNorm, RMSNorm, UnitRMSNorm
from engine.layers.qk_norm import AllHeadsNorm, EachHeadNorm
from engine.layers.rotary import RotaryEmbedding
from engine.model_config import AttentionConfig, QKNorm
from kernels.attention import attention, attention_of_products, fits_one_kernel
from kernels.attention_batch import HeadRotation
from kernels.elementwise import rope_and_store
from kernels.tuning import AttentionShape, LatentShape, WeightShape
from kernels.weights import Norm, ShapeError, match_shard

AfterRope = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Changes rotated queries: (queries [T, H, D], positions [T]) -> queries."""
HeadNorms = tuple[HiddenNorm, HiddenNorm, HiddenNorm | None]
"""Norms of each query, key and value head before the rotation; only their weights are read."""
HeadNormWeights = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
"""The weights of these norms."""


class AnyAttention(Layer):
    """Compute the input of `o_proj`, which ends the branch and is the block's to call."""

    config: AttentionConfig
    o_proj: Linear

    @abstractmethod
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
        """layer_id: in the cache, of this layer or of the one that it shares keys and values with.

        norm_class: of the norms of query and key heads, if there are any.
        """

    @property
    @abstractmethod
    def cache(self) -> LayerCache:
        """Describe what this rank's layer keeps of each token, or the one whose keys and values it reads."""

    @abstractmethod
    def __call__(
        self, x: torch.Tensor, batch: ForwardBatch, pool: CachePool, *, norm: Norm | None = None
    ) -> torch.Tensor:
        """Return what the heads find, [T, H D], for norm(x), x [T, hidden]. Cache entries are stored in `pool`."""

    @abstractmethod
    def tuning_shapes(self, *, has_norm: bool) -> list[WeightShape | None]:
        """Return the shapes of the products of one token. has_norm: the first one takes the norm ahead of it in."""

    @abstractmethod
    def attention_shape(self, kv_dtype: torch.dtype) -> AttentionShape | LatentShape | None:
        """Return the shape that Triton's kernels are tuned for; None where they do not serve it."""


class Attention(AnyAttention):
    """Queries, keys and values of all heads; `o_proj` is the block's to call: it ends the branch."""

    weight_names: ClassVar = ("sinks", "k_scale", "v_scale")

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
        head_dim, num_heads, num_kv_heads = config.head_dim, config.num_heads, config.num_kv_heads
        self.config, self.rotary, self.layer_id = config, rotary, layer_id
        self.num_heads = layers.split(num_heads, "num_attention_heads")
        self.num_kv_heads = layers.num_kv_heads(num_kv_heads)
        self.num_new_kv_heads = self.num_kv_heads if config.kv_owner is None else 0
        self.head_dim, self.eps, self.dtype = head_dim, norm_eps, layers.dtype
        self.qkv_proj = qkv_parallel(
            hidden_size,
            head_dim,
            num_heads,
            num_kv_heads if self.num_new_kv_heads else 0,
            layers.within("qkv_proj"),
            bias=config.qkv_bias,
        )
        self.o_proj = row_parallel(num_heads * head_dim, hidden_size, layers.within("o_proj"), bias=config.o_bias)
        self.make_qkv: Callable[..., torch.Tensor] = self.qkv_proj.__call__
        self.after_rope: AfterRope | None = rotary.scale_queries if rotary.scales_queries else None
        self.head_norms: HeadNorms | None = None
        if config.qk_norm is not QKNorm.NONE:
            self._add_norms(config, norm_class, layers)
        if config.clip_qkv:
            self.make_qkv = clipped(self.make_qkv, config.clip_qkv)
        self.scale, self.window, self.softcap = config.scale, config.window, config.softcap
        self.shard = layers.shard
        self.sinks = meta_weight(self.num_heads, dtype=layers.dtype) if config.has_sinks else None
        self.slopes = meta_weight(self.num_heads, dtype=torch.float32) if config.slopes else None
        self.kv_dtype = layers.kv_dtype or layers.dtype
        self.k_scale: torch.Tensor | None = None  # see `expect_cache_scales`
        self.v_scale: torch.Tensor | None = None
        self.cache_scales: CacheScales | None = None
        self.has_window_slots = layers.has_window_slots and config.window >= 0
        self.backend = layers.attention_backend

    def materialize(self, device: torch.device) -> None:
        super().materialize(device)
        if self.slopes is not None:
            first = self.shard.index * self.num_heads
            slopes = self.config.slopes[first : first + self.num_heads]
            self.slopes = torch.tensor(slopes, dtype=torch.float32, device=device)

    def place_weight(self, name: str, loaded: torch.Tensor, part: int) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ARG002
        if name == "sinks":
            return match_shard(getattr(self, name), loaded, 0, self.shard)
        if loaded.numel() != 1:
            raise ShapeError(f"has {loaded.numel()} numbers; one for all heads is supported")
        return getattr(self, name), loaded.reshape(1).float()

    def expect_cache_scales(self) -> None:
        """Divide keys and values by numbers of the checkpoint before they are rounded to the cache's FP8."""
        self.k_scale, self.v_scale = meta_weight(1, dtype=torch.float32), meta_weight(1, dtype=torch.float32)

    def pack(self) -> None:
        if self.k_scale is not None and self.v_scale is not None:
            norms = _weights(self.head_norms) if self.head_norms else (None, None, None)
            size = self.num_kv_heads * self.head_dim
            self.cache_scales = CacheScales.of(self.k_scale, self.v_scale, size, norms, self.dtype)
            self.scale = self.config.scale * self.cache_scales.k

    def _add_norms(self, config: AttentionConfig, norm_class: type[HiddenNorm], layers: LayerConfig) -> None:
        if config.qk_norm is QKNorm.ALL_HEADS:
            self.qk_norm: AllHeadsNorm | EachHeadNorm = AllHeadsNorm(self.qkv_proj.weight.parts[:2], self.eps, layers)
        elif config.qk_norm is QKNorm.EACH_HEAD:
            self.qk_norm = EachHeadNorm(self.qkv_proj.weight.parts[:2], self.head_dim, self.eps, layers)
        if config.qk_norm in (QKNorm.ALL_HEADS, QKNorm.EACH_HEAD):
            self.num_normed = sum(self.qk_norm.sizes)
            self.make_qkv = self._make_normed_qkv
            return
        if config.qk_norm is QKNorm.UNIT_HEADS:
            self.unit_norm = UnitRMSNorm(self.head_dim, self.eps, layers)
            self.head_norms = self.unit_norm, self.unit_norm, None
            return
        self.q_norm = norm_class(self.head_dim, self.eps, layers)
        if self.num_new_kv_heads:
            self.k_norm = norm_class(self.head_dim, self.eps, layers)
        if config.v_norm or config.qk_norm is QKNorm.ROTATED_HEADS:
            self.unit_norm = UnitRMSNorm(self.head_dim, self.eps, layers)
        if config.qk_norm is QKNorm.ROTATED_HEADS:
            self.head_norms = self.unit_norm, self.unit_norm, None
            self.after_rope = self._scale_by_norms
        else:
            k_norm = self.k_norm if self.num_new_kv_heads else self.q_norm
            self.head_norms = self.q_norm, k_norm, self.unit_norm if config.v_norm else None

    def _make_normed_qkv(self, x: torch.Tensor, *, norm: Norm | None = None) -> torch.Tensor:
        qkv = self.qkv_proj(x, norm=norm)
        self.qk_norm(qkv[:, : self.num_normed])
        return qkv

    def _scale_by_norms(self, q: torch.Tensor, _positions: torch.Tensor) -> torch.Tensor:
        """Multiply rotated queries by the weights of both norms, in place.

        A rotation changes no length, so heads are normalized before it; the keys' weight may stand at the queries.
        """
        return q.mul_(self.q_norm.weight * self.k_norm.weight)

    @property
    def norm_weights(self) -> HeadNormWeights:
        """Return the weights of the norms of query, key and value heads."""
        return _weights(self.head_norms) if self.head_norms else (None, None, None)

    @property
    def is_plain(self) -> bool:
        """Return whether heads are rotated as the product makes them, and all of them stored as they are."""
        is_product = self.make_qkv == self.qkv_proj.__call__
        return is_product and self.rotates_all and self.cache_scales is None and self.backend == "torch"

    @property
    def rotates_all(self) -> bool:
        """Return whether queries, and keys of this layer's own, are rotated, and nothing is done to them after it."""
        return self.num_new_kv_heads == self.num_kv_heads and self.after_rope is None

    @property
    def cache(self) -> KV:
        return KV(self.num_kv_heads, self.head_dim, window=None if self.window < 0 else self.window)

    def tuning_shapes(self, *, has_norm: bool) -> list[WeightShape | None]:
        return [
            self.qkv_proj.weight.tuning_shape(has_norm=has_norm),
            self.o_proj.weight.tuning_shape(has_residual=True),
        ]

    def attention_shape(self, kv_dtype: torch.dtype) -> AttentionShape | None:
        if self.backend == "torch":
            return None
        return AttentionShape(self.num_heads, self.num_kv_heads, self.head_dim, kv_dtype)

    def __call__(
        self, x: torch.Tensor, batch: ForwardBatch, pool: CachePool, *, norm: Norm | None = None
    ) -> torch.Tensor:
        return self.answer(self.make_qkv(x, norm=norm), batch, pool)

    def answer(self, qkv: torch.Tensor, batch: ForwardBatch, pool: CachePool) -> torch.Tensor:
        """Return what products [T, (H + 2 Hkv) D] find, [T, H D]; keys and values go to the cache."""
        batch, norms = self._own(batch), self._scaled(qkv)
        k_cache, v_cache = pool[self.layer_id]
        if self.rotates_all and norms[2] is None and fits_one_kernel(batch, self.backend):
            rotation = HeadRotation(*self._angles(batch), norms[0], norms[1], self.eps)
            options = self._options()
            found = attention_of_products(
                qkv, rotation, k_cache, v_cache, batch, self.num_heads, self.backend, **options
            )
        else:
            found = self.find(self._rotate(qkv, batch, pool, norms), k_cache, v_cache, batch)
        return self._unscaled(found).flatten(1)

    def attend(
        self, x: torch.Tensor, batch: ForwardBatch, pool: CachePool, *, norm: Norm | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (queries, what they find), each [T, H, D]; single tokens' part of the second is left as it is."""
        batch, qkv = self._own(batch), self.make_qkv(x, norm=norm)
        q = self._rotate(qkv, batch, pool, self._scaled(qkv))
        k_cache, v_cache = pool[self.layer_id]
        return q, self._unscaled(self.find(q, k_cache, v_cache, batch, has_decodes=False))

    def _own(self, batch: ForwardBatch) -> ForwardBatch:
        """Return the step as this layer sees it."""
        if self.has_window_slots:
            assert batch.of_windows is not None
            batch = batch.of_windows
        if batch.seen_until is not None and not self.config.sees_ahead:
            batch = replace(batch, seen_until=None)
        return batch

    def _scaled(self, qkv: torch.Tensor) -> HeadNormWeights:
        """Return the weights of heads' norms, behind which keys and values are as the cache's scales have them."""
        scales = self.cache_scales
        if scales is None:
            return self.norm_weights
        scales.shrink_(qkv)
        return scales.norms

    def _angles(self, batch: ForwardBatch) -> tuple[torch.Tensor, torch.Tensor]:
        return batch.rotation or (batch.positions, self.rotary.cos_sin)

    def _rotate(self, qkv: torch.Tensor, batch: ForwardBatch, pool: CachePool, norms: HeadNormWeights) -> torch.Tensor:
        """Return the queries as attention takes them; keys and values are written to their slots."""
        q_norm, k_norm, v_norm = norms
        positions, cos_sin = self._angles(batch)
        k_cache, v_cache = pool[self.layer_id]
        q = rope_and_store(
            qkv,
            positions,
            cos_sin,
            k_cache,
            v_cache,
            batch.out_cache_loc,
            self.num_heads,
            self.num_new_kv_heads,
            self.head_dim,
            q_norm,
            k_norm,
            self.eps,
            v_norm,
        )
        return q if self.after_rope is None else self.after_rope(q, batch.positions)

    def _unscaled(self, found: torch.Tensor) -> torch.Tensor:
        return found if self.cache_scales is None else found.mul_(self.cache_scales.v)

    def find(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        batch: ForwardBatch,
        *,
        has_decodes: bool = True,
    ) -> torch.Tensor:
        """Return what rotated queries [T, H, D] find in the layer's caches, [T, H, D]."""
        return attention(q, k_cache, v_cache, batch, backend=self.backend, has_decodes=has_decodes, **self._options())

    def _options(self) -> dict[str, Any]:
        """Return the arguments of any attention that are the same in every step."""
        return {
            "scale": self.scale,
            "window": self.window,
            "is_chunked": self.config.is_chunked,
            "softcap": self.softcap,
            "sinks": self.sinks,
            "slopes": self.slopes,
        }


def _weights(norms: HeadNorms) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    q, k, v = norms
    return q.weight, k.weight, None if v is None else v.weight


def clipped(make_qkv: Callable[..., torch.Tensor], limit: float) -> Callable[..., torch.Tensor]:
    """Return `make_qkv` with its result clamped to at most `limit`, either way (OLMo 1)."""

    def make_clipped_qkv(x: torch.Tensor, *, norm: Norm | None = None) -> torch.Tensor:
        return make_qkv(x, norm=norm).clamp_(-limit, limit)

    return make_clipped_qkv
