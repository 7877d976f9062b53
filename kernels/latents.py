"""Sizes that the two ways of latent attention share, and the matrix between latents and heads. See `kernels.mla`."""

from typing import NamedTuple

import torch

FEW_TOKENS = 16  # of products for which the matrices' bytes and the launch count, not the operations
# Of prompts, in a CUDA graph, up to which they attend to latents themselves, however long the contexts are: it knows
# none. That takes several times as long a token as to attend to keys that are made of them.
MAX_ABSORBED_TOKENS = 512
GRAPH_CONTEXT = 1024  # cached tokens for which a graph has room that makes keys


class LatentSizes(NamedTuple):
    """The sizes of a head."""

    key_dim: int  # N, of the part of a key that is not rotated
    value_dim: int
    rank: int

    def saved_by_absorbing(self, q_len: int, seq_len: int) -> int:
        """Return the multiplications that the last `q_len` of `seq_len` tokens save the absorbed way."""
        of_token = self.rank * (self.key_dim + self.value_dim)
        of_pair = 2 * self.rank - self.key_dim - self.value_dim  # more than expanded ones take
        return (seq_len - q_len) * of_token - q_len * seq_len * of_pair


def graph_room(num_tokens: int) -> int:
    """Return how long the contexts of a graph's prompts may be together, those `num_tokens` included.

    0: however long; they are attended to as latents.
    """
    return num_tokens + GRAPH_CONTEXT if num_tokens > MAX_ABSORBED_TOKENS else 0


class Expansion(NamedTuple):
    """The matrix that makes keys and values of latents."""

    weight: torch.Tensor  # [H (N + V), R]: a head's U, then its V
    num_heads: int
    sizes: LatentSizes

    @property
    def by_head(self) -> torch.Tensor:
        """Return the matrix as [H, N + V, R]."""
        return self.weight.view(self.num_heads, -1, self.sizes.rank)

    def of_heads(self, heads: slice) -> "Expansion":
        """Return the part of the matrix that is of some heads."""
        weight = self.by_head[heads]
        return Expansion(weight.flatten(0, 1), len(weight), self.sizes)


def absorb(q: torch.Tensor, expansion: Expansion) -> torch.Tensor:
    """Take the parts of queries that are not rotated to the latents' space: [T, H, N] -> [T, H, R]."""
    keys = expansion.by_head[:, : expansion.sizes.key_dim]
    absorbed = q.new_empty(*q.shape[:2], expansion.sizes.rank)
    _multiply_heads(q, keys, absorbed)
    return absorbed


def values_of(found: torch.Tensor, expansion: Expansion, out: torch.Tensor) -> None:
    """Write what each head makes of the latent that it found: [T, H, R] -> [T, H, V]."""
    values = expansion.by_head[:, expansion.sizes.key_dim :]
    if found.is_cpu and found.dtype.itemsize == 2:  # a transposed matrix takes five times as long: the small one then
        out.copy_(torch.bmm(values, found.permute(1, 2, 0)).permute(2, 0, 1))
        return
    _multiply_heads(found, values.transpose(1, 2), out)


def _multiply_heads(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """Write x @ weight of each head into `out`: x [T, H, I], weight [H, I, O]."""
    if x.is_cuda and len(x) <= FEW_TOKENS and x.dtype.itemsize == 2:
        from kernels.triton_latents import head_products  # here: a machine without a GPU need not have triton

        head_products(x, weight, out)
        return
    torch.bmm(x.transpose(0, 1), weight, out=out.transpose(0, 1))
