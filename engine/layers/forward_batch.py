"""The input that layers read of a step."""

from dataclasses import dataclass, replace

import numpy as np
import torch


@dataclass(slots=True)
class SharedPrefixes:
    """Groups of decoding requests whose first tokens live in the same slots, so that attention reads them once.

    Request i of the step belongs to at most one group. `members` lists request indices group after group.
    """

    prefix_lens: torch.Tensor  # int32 [G], shared tokens; 0 for an unused group
    cu_members: torch.Tensor  # int32 [G + 1]
    members: torch.Tensor  # int32 [B]
    own_starts: torch.Tensor  # int32 [B], where each request's own part starts: its group's prefix_len, or 0


@dataclass(slots=True)
class Features:
    """Vectors of pictures in place of those of F tokens, and what is added at these tokens behind the first layers."""

    tokens: torch.Tensor  # int64 [F], indices into T
    vectors: torch.Tensor  # [F, hidden]
    deep: torch.Tensor  # [L, F, hidden], of the first L layers; L = 0 for most models

    def put(self, h: torch.Tensor) -> None:
        """Write the vectors into h [T, hidden]."""
        h.index_copy_(0, self.tokens, self.vectors)

    def add(self, h: torch.Tensor, layer: int) -> None:
        """Add to h [T, hidden] what comes behind a layer."""
        if layer < len(self.deep):
            h.index_add_(0, self.tokens, self.deep[layer])

    def hide(self, input_ids: torch.Tensor, padding: int) -> torch.Tensor:
        """Return the ids of tokens, int32 [T], those of pictures replaced."""
        return input_ids.index_fill(0, self.tokens, padding)


@dataclass(slots=True)
class FeatureRows:
    """`Features` of steps that share a graph: any of their tokens may be parts of pictures, or none."""

    rows: torch.Tensor  # int32 [T], 1 + the token's row of `vectors`; 0: it has none
    vectors: torch.Tensor  # [N, hidden]
    deep: torch.Tensor  # [L, N, hidden]

    def put(self, h: torch.Tensor) -> None:
        """See `Features.put`."""
        h.copy_(torch.where(self._has_row, self.vectors[self._row], h))

    def add(self, h: torch.Tensor, layer: int) -> None:
        """See `Features.add`."""
        if layer < len(self.deep):
            h.add_(self.deep[layer][self._row].masked_fill_(~self._has_row, 0.0))

    def hide(self, input_ids: torch.Tensor, padding: int) -> torch.Tensor:
        """See `Features.hide`."""
        return input_ids.masked_fill(self.rows > 0, padding)

    @property
    def _has_row(self) -> torch.Tensor:
        return (self.rows > 0)[:, None]

    @property
    def _row(self) -> torch.Tensor:
        return (self.rows - 1).clamp_(min=0)


@dataclass(slots=True)
class ForwardBatch:
    """The input of one forward: T tokens of B requests, those with exactly one token first.

    Device tensors are views of one staging buffer and stay valid until the next step is launched.
    """

    input_ids: torch.Tensor  # int32 [T]
    positions: torch.Tensor  # int32 [T], each token's place in its sequence
    out_cache_loc: torch.Tensor  # int32 [T], the slot its key and value go to
    token_rows: torch.Tensor  # int32 [T], the row each token belongs to
    rows: torch.Tensor  # int32 [B], each request's line in slot_table
    seq_lens: torch.Tensor  # int32 [B], tokens its last token may look at, itself included
    cu_q_lens: torch.Tensor  # int32 [B + 1], where each request's tokens start in [T]
    slot_table: torch.Tensor  # int32 [num_rows, max_context], the slot of every token of every row
    num_decodes: int  # requests 0 .. num_decodes have one token each; the rest have more
    q_lens_host: np.ndarray  # [B]
    seq_lens_host: np.ndarray  # [B]
    shared: SharedPrefixes | None = None
    window_cache_loc: torch.Tensor | None = None  # int32 [T], where layers with a window store, if they have their own
    slot_map: torch.Tensor | None = None  # int32 [num_slots], see `kernels.attention_batch`
    of_windows: "ForwardBatch | None" = None  # the same step as such layers see it
    seen_until: torch.Tensor | None = None  # int32 [T], see `kernels.attention_batch`
    rope: torch.Tensor | None = None  # int32 [3, T], positions where rotations have three axes
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None  # (positions [T], cos_sin) in place of the layers' own
    features: Features | FeatureRows | None = None
    is_for_graph: bool = False  # both of the host's are the capture's, not the steps' that replay it

    def with_windows(self, window_slots: torch.Tensor) -> "ForwardBatch":
        """Return this step for a pool whose layers with a window have slots of their own.

        window_slots: int32 [num_slots], the one of each slot. Prefixes that requests share are mostly behind a window:
        such layers read each request's part for itself.
        """
        assert self.window_cache_loc is not None
        of_windows = replace(self, out_cache_loc=self.window_cache_loc, slot_map=window_slots, shared=None)
        return replace(self, of_windows=of_windows)
