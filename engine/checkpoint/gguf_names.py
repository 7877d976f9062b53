"""Turn the tensors of a GGUF file into those of a Hugging Face checkpoint: rules of `engine.models.names`.

All of them take rows as they are, but for norms, routers and GPT-2, so they hold for rows of packed blocks as well.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter

import torch

from engine.checkpoint.gguf import GGUF
from engine.checkpoint.gguf_family import Architecture
from engine.checkpoint.gguf_rope import FACTOR_TENSORS, head_dim, rotary_dim
from engine.errors import ModelError
from engine.models.names import Ignore, Interleave, Piece, Rename, Rule, Split, pieces_of


@dataclass(frozen=True)
class Translate:
    """Give a tensor the checkpoint's name: `blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""

    architecture: Architecture

    def __call__(self, piece: Piece) -> Iterable[Piece]:
        """Raise `ModelError` if the family has no such tensor."""
        known = self.architecture
        stem, _, kind = piece.name.rpartition(".")
        block, _, rest = stem.removeprefix("blk.").partition(".")
        # A norm of each head is a module of its own.
        rest, _, head = rest.partition("#")
        # So is each expert's product.
        numbered = re.fullmatch(r"(ffn_\w+\.)(\d+)", rest)
        rest, expert = (f"{numbered[1]}*", numbered[2]) if numbered else (rest, "")
        if stem in known.top:
            name = known.top[stem]
        elif stem.startswith("blk.") and rest in known.block:
            name = f"{known.layers}.{block}.{known.block[rest].replace('*', expert)}"
            name += f".norms.{head}" if head else ""
        else:
            raise ModelError(f"GGUF tensor {piece.name!r} belongs to no layer of {known.name}")
        yield Piece(f"{name}.{kind}", piece.transforms, piece.index)


@dataclass(frozen=True)
class SubtractOne:
    """Take norms back to what their checkpoint holds, in float32: the file has 1 + weight."""

    def __call__(self, piece: Piece) -> Iterable[Piece]:
        if piece.name.endswith("_norm.weight"):
            piece = Piece(piece.name, (*piece.transforms, lambda loaded: loaded.float() - 1.0), piece.index)
        yield piece


@dataclass(frozen=True)
class Transpose:
    """Turn the matrices of blocks."""

    def __call__(self, piece: Piece) -> Iterable[Piece]:
        if piece.name.startswith("blk.") and piece.name.endswith(".weight") and "_norm." not in piece.name:
            piece = Piece(piece.name, (*piece.transforms, torch.Tensor.t), piece.index)
        yield piece


@dataclass(frozen=True)
class ByHead:
    """Put the queries of a key's heads, that key and its value after one another: the file has all queries first."""

    heads: int
    kv_heads: int

    def __call__(self, piece: Piece) -> Iterable[Piece]:
        if ".attn_qkv." in piece.name:
            piece = Piece(piece.name, (*piece.transforms, self._reorder), piece.index)
        yield piece

    def _reorder(self, loaded: torch.Tensor) -> torch.Tensor:
        size = len(loaded) // (self.heads + 2 * self.kv_heads)
        parts = loaded.split([size * count for count in (self.heads, self.kv_heads, self.kv_heads)])
        return torch.cat([part.unflatten(0, (self.kv_heads, -1)) for part in parts], dim=1).flatten(0, 1)


@dataclass(frozen=True)
class NormOfEachHead:
    """Split the norms of query and key heads, which a file stacks, into those of each head."""

    heads: int
    kv_heads: int

    def __call__(self, piece: Piece) -> Iterable[Piece]:
        stem, _, kind = piece.name.rpartition(".")
        num_heads = {"attn_q_norm": self.heads, "attn_k_norm": self.kv_heads}.get(stem.rpartition(".")[2])
        if num_heads is None:
            yield piece
            return
        for i in range(num_heads):
            yield Piece(f"{stem}#{i}.{kind}", (*piece.transforms, itemgetter(i)))


@dataclass(frozen=True)
class OfEachExpert:
    """Take the stack of a layer's experts apart: `ffn_up_exps` -> `ffn_up.0`, `ffn_up.1`, ..."""

    gguf: GGUF

    def __call__(self, piece: Piece) -> Iterable[Piece]:
        """Raise `ModelError` if a stack is not of as many experts as the file says."""
        if "_exps." not in piece.name:
            yield piece
            return
        shape, count = self.gguf.shapes[piece.name], self.gguf["{}.expert_count"]
        if len(shape) != (2 if piece.name.endswith(".bias") else 3) or shape[0] != count:
            raise ModelError(f"GGUF tensor {piece.name!r} of shape {list(shape)} is no stack of {count} experts")
        for i in range(count):
            yield Piece(piece.name.replace("_exps.", f".{i}."), (*piece.transforms, itemgetter(i)))


@dataclass(frozen=True)
class KeepRouters:
    """Keep in float32 what chooses experts, so that it is never packed. A row of its own may be stored as a vector."""

    def __call__(self, piece: Piece) -> Iterable[Piece]:
        if re.search(r"\.ffn_gate_inp(_shexp)?\.weight$", piece.name):
            piece = Piece(piece.name, (*piece.transforms, lambda loaded: torch.atleast_2d(loaded.float())))
        yield piece


def rules_of(gguf: GGUF, architecture: Architecture) -> Sequence[Rule]:
    """Return the rules that take the tensors of `gguf` to the checkpoint of `architecture`."""
    rules: list[Rule] = []
    if architecture.has_experts:
        # Blocks behind the layers predict several tokens at once.
        rules += [Ignore(rf"^blk\.{i}\.") for i in range(gguf.num_layers, gguf["{}.block_count"])]
        rules.append(Rename(r"\.ffn_down_exps\.scale$", ".expert_scales.weight"))  # one of each: no stack
        rules += [OfEachExpert(gguf), Split("ffn_gate_up", ("ffn_gate", "ffn_up"), (1, 1)), KeepRouters()]
    if architecture.has_latents:
        # `engine.checkpoint.gguf_latents` puts the former together; the latter, of long contexts, are not run.
        rules.append(Ignore(r"\.(attn_[kv]_b|indexer)\."))
    if not architecture.has_fused_qkv:
        rules.append(
            Split("attn_qkv", ("attn_q", "attn_k", "attn_v"), (gguf.heads, gguf.kv_heads, gguf.kv_heads)),
        )
    if architecture.is_interleaved:
        rules.append(Interleave(r"\.attn_[qk]\.", head_dim(gguf), rotary_dim(gguf)))
    if architecture.has_offset_norms:
        rules.append(SubtractOne())
    if architecture.is_transposed:
        rules.append(Transpose())
    if architecture.has_norms_of_heads:
        rules.append(NormOfEachHead(gguf.heads, gguf.kv_heads))
    if architecture.has_qkv_by_head:
        rules.append(ByHead(gguf.heads, gguf.kv_heads))
    return (*rules, Translate(architecture), *architecture.rules)


def placed(gguf: GGUF, architecture: Architecture) -> dict[str, list[Piece]]:
    """Return what becomes of each tensor of the file, by its name. `ModelError` names one that has no place."""
    rules = rules_of(gguf, architecture)
    return {tensor.name: pieces_of(tensor.name, rules) for tensor in gguf.tensors if tensor.name not in FACTOR_TENSORS}
