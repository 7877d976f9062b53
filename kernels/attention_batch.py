"""The part of a step that attention reads, as every backend sees it."""

from typing import NamedTuple, Protocol

import numpy as np
import torch


class SharedPrefixes(Protocol):
    """Groups of decoding requests whose first tokens lie in the same slots. Each request is in one group at most."""

    @property
    def prefix_lens(self) -> torch.Tensor:
        """int32 [G], shared tokens; 0 for an unused group."""

    @property
    def cu_members(self) -> torch.Tensor:
        """int32 [G + 1], where each group's requests start in `members`."""

    @property
    def members(self) -> torch.Tensor:
        """int32 [B], request indices, group after group."""

    @property
    def own_starts(self) -> torch.Tensor:
        """int32 [B], the first token that is not in the request's group's prefix."""


class AttentionBatch(Protocol):
    """The part of a step that attention reads: T tokens of B requests, those with a single token first."""

    @property
    def rows(self) -> torch.Tensor:
        """int32 [B], each request's line in slot_table."""

    @property
    def seq_lens(self) -> torch.Tensor:
        """int32 [B], tokens that a request's last token sees, itself included; 0: padding, with any result."""

    @property
    def cu_q_lens(self) -> torch.Tensor:
        """int32 [B + 1], where each request's tokens start in [T]."""

    @property
    def slot_table(self) -> torch.Tensor:
        """int32 [num_rows, max_context]."""

    @property
    def slot_map(self) -> torch.Tensor | None:
        """int32 [slots that slot_table may name], the slot of the caches in place of each; None: the same."""

    @property
    def seen_until(self) -> torch.Tensor | None:
        """int32 [T], where what each token sees of its request ends, itself or beyond; None: each with itself."""

    @property
    def num_decodes(self) -> int:
        """Number of requests, the first ones, that have a single token."""

    @property
    def q_lens_host(self) -> np.ndarray:
        """Integers [B]. The "triton" kernels do not read it."""

    @property
    def seq_lens_host(self) -> np.ndarray:
        """Integers [B]. The "triton" kernels read only whether a single one is long: all steps of a graph agree."""

    @property
    def shared(self) -> SharedPrefixes | None:
        """Prefixes to read once per group. They change the work, not the result."""

    @property
    def is_for_graph(self) -> bool:
        """Return whether a CUDA graph replays this for steps of other lengths: the host's must then not be read."""


class HeadRotation(NamedTuple):
    """Hold what turns a step's products into its queries and keys: the arguments of `rope_and_store` of these names."""

    positions: torch.Tensor
    cos_sin: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    eps: float
