"""Define what all decoders have: embedding, blocks, final norm, head. A family says which blocks, names and numbers."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch

from cache.layout import LayerCache
from cache.pool import CachePool
from engine.layers.attention import Attention
from engine.layers.block import Block, PreNorm
from engine.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from engine.layers.forward_batch import FeatureRows, Features, ForwardBatch
from engine.layers.layer import Layer, LayerConfig
from engine.layers.norm import NoNorm
from engine.layers.rotary import RotaryEmbedding
from engine.model_config import ModelConfig, read_decoder
from engine.models.names import COMMON_NAMES, LANGUAGE_HALF, TIED_HEAD, Convert, Rule, stacked_names
from engine.quantization import Quantization

RunBlock = Callable[[Block, torch.Tensor], torch.Tensor]
"""Computes one block: (block, h) -> h."""


class Decoder(Layer):
    """Embedding, blocks and final norm."""

    def __init__(self, config: ModelConfig, block_class: type[Block], layers: LayerConfig) -> None:
        rotary = {rope: RotaryEmbedding(rope, config.context_length) for rope in config.ropes}
        embed_size = config.embed_size or config.hidden_size
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, embed_size, layers.within("embed_tokens"), config.embed_scale
        )
        owners = [i for i, attention in enumerate(config.attention) if attention.kv_owner is None]
        cache_ids = {owner: i for i, owner in enumerate(owners)}
        self.layers = [
            block_class(
                config,
                attention,
                cache_ids[i if attention.kv_owner is None else attention.kv_owner],
                rotary[attention.rope],
                replace(layers.within(f"layers.{i}"), block_index=i),
            )
            for i, attention in enumerate(config.attention)
        ]
        norm_class = block_class.norm_class if block_class.has_final_norm else NoNorm
        self.norm = norm_class(config.hidden_size, config.norm_eps, layers)

    def __call__(self, batch: ForwardBatch, pool: CachePool, run_block: RunBlock | None = None) -> torch.Tensor:
        """Return the last hidden states [T, hidden]. run_block: computes a block in place of the block itself."""
        h = self.embed(batch)
        if batch.features is not None:
            h = self._run_blocks(h, batch, batch.features, pool, run_block)
        elif run_block is None:
            for block in self.layers:
                h = block(h, batch, pool)
        else:
            for block in self.layers:
                h = run_block(block, h)
        return self.norm(h)

    def _run_blocks(
        self,
        h: torch.Tensor,
        batch: ForwardBatch,
        features: Features | FeatureRows,
        pool: CachePool,
        run_block: RunBlock | None,
    ) -> torch.Tensor:
        """Return h behind all blocks, of a step with tokens of pictures."""
        features.put(h)
        for i, block in enumerate(self.layers):
            h = block(h, batch, pool) if run_block is None else run_block(block, h)
            features.add(h, i)
        return h

    def embed(self, batch: ForwardBatch) -> torch.Tensor:
        """Return what the first block gets, [T, hidden], but for pictures."""
        return self.embed_tokens(batch.input_ids)

    @contextlib.contextmanager
    def few_layers(self) -> Iterator[None]:
        """Keep one block of each kind only, meanwhile: enough to find out which kernels there are; results are not."""
        layers, few = self.layers, dict[tuple[object, ...], Block]()
        for block in layers:
            few.setdefault(block.kind, block)
        self.layers = list(few.values())
        try:
            yield
        finally:
            self.layers = layers


class CausalLM(Layer):
    """A decoder and its head. Attributes are named as in the checkpoint, but for what `checkpoint` renames.

    A family is a subclass that sets what differs from Llama.
    """

    decoder: ClassVar[type[Decoder]] = Decoder
    block: ClassVar[type[Block]] = PreNorm
    checkpoint: ClassVar[Sequence[Rule]] = COMMON_NAMES
    quantization = Quantization()  # of what is built

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        """Read a config.json of this family. KeyError naming an entry that is missing."""
        return read_decoder(raw)

    @classmethod
    def block_of(cls, config: ModelConfig) -> type[Block]:
        """Return the block of a model."""
        return cls.block

    def __init__(self, config: ModelConfig, layers: LayerConfig) -> None:
        self.config, self._of_head = config, layers.within("lm_head")
        self.model = self.decoder(config, self.block_of(config), layers.within("model"))
        self.lm_head = self._make_head()

    def _make_head(self) -> ParallelLMHead:
        config = self.config
        return ParallelLMHead(
            config.vocab_size,
            config.embed_size or config.hidden_size,
            self._of_head,
            tied_to=self.model.embed_tokens if config.tie_word_embeddings else None,
            scale=config.logit_scale,
            bias=config.lm_head_bias,
            softcap=config.logit_softcap,
        )

    def untie(self) -> None:
        """Give the model a head with a weight of its own, on the meta device, in place of the embedding's."""
        self.config = replace(self.config, tie_word_embeddings=False)
        self.lm_head = self._make_head()

    @property
    def names(self) -> Sequence[Rule]:
        """Rules that lead from a checkpoint's names to this model's."""
        rules = (*LANGUAGE_HALF, *self.checkpoint) if self.config.is_language_half else tuple(self.checkpoint)
        if self.config.tie_word_embeddings:
            return (*rules, TIED_HEAD)
        return rules

    @property
    def stacks(self) -> Sequence[Rule]:
        """Rules that take stacks of experts apart, before a format's tensors are converted one expert at a time."""
        return ()

    @property
    def rules(self) -> Sequence[Rule]:
        """Rules that lead from a checkpoint's tensors to this model's: first into its layout, then to its names."""
        num_experts = next((experts.routing.num_experts for experts in self.config.experts if experts), 0)
        in_memory = stacked_names(num_experts) if num_experts else ()
        return (*self.stacks, Convert(self.quantization), *self.names, *in_memory)

    @property
    def has_rope_axes(self) -> bool:
        """Return whether a token's position has three axes."""
        return bool(self.config.rope.sections)

    @property
    def num_deep_layers(self) -> int:
        """Return the layers behind which more features of pictures are added: the first ones."""
        return self.config.num_deep_layers

    def rotation_of(self, rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what all layers rotate by: see `RotaryEmbedding.rotation_of`."""
        attention = self.model.layers[0].self_attn
        assert isinstance(attention, Attention)
        return attention.rotary.rotation_of(rope)

    def __call__(self, batch: ForwardBatch, pool: CachePool, run_block: RunBlock | None = None) -> torch.Tensor:
        """Return the last hidden states [T, hidden], final norm applied; keep the tokens' cache entries in `pool`."""
        return self.model(batch, pool, run_block)

    def cache_layout(self) -> tuple[LayerCache, ...]:
        """Return what this rank's layers keep of each token, one entry for each layer that has keys of its own."""
        layers = [block.self_attn for block in self.model.layers]
        return tuple(layer.cache for layer in layers if layer.config.kv_owner is None)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return this rank's logits of hidden states: [S, hidden] -> float32 [S, tokens of this rank]."""
        return self.lm_head.logits(hidden)

    def pool(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what a prompt that wants a vector gets: float32 [N, size] of pooled states, float32 [N, hidden]."""
        return hidden
