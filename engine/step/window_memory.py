"""Divide the memory of keys and values between a pool for layers with a window and the pool of all other layers.

A running request holds up to two windows there, one at the end of its cached prompt and one of its answer, however long
it is. So a pool of two windows for each request that may run, and a chunk, is never short of slots; more of it could
only keep the ends of more prefixes. That may be more than there is memory for: then it has half as many slots as the
other pool. Both run out together where requests have four windows; shorter ones are no more at once than fit into half,
which, layers with a window being most of such a model, is nearly as many as with one pool; longer ones are many more.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cache.layout import KV, LayerCache, bytes_per_token, has_window
from engine.config import EngineConfig
from engine.schedule.window_holdings import least_len

MAX_RATIO = 0.5


@dataclass(frozen=True, slots=True)
class KVSplit:
    """Say how many bytes two pools take, and how many tokens of windows belong to a pool of so many tokens."""

    full_bytes: int
    """Bytes of a token in layers that see all."""
    window_bytes: int
    """Bytes of a token in layers that see a window; 0: those have no pool of their own."""
    wanted: int = 0
    """Tokens of windows that surely do."""
    least: int = 0
    """Tokens of windows below which a request might not fit."""
    ratio: float = MAX_RATIO
    """Tokens of windows for each of the other pool: at most, or exactly if nothing is wanted."""
    page_size: int = 1

    @classmethod
    def of(
        cls,
        config: EngineConfig,
        max_len: int,
        layout: Sequence[LayerCache],
        dtype: torch.dtype,
        has_window_slots: bool,
    ) -> "KVSplit":
        """config: resolved. max_len: tokens of the longest prompt with its answer.

        has_window_slots: layers with a window have a pool of their own.
        """
        if not has_window_slots:
            return cls(bytes_per_token(layout, dtype), 0)
        assert config.max_running_requests and config.chunked_prefill_size
        window, page_size, chunk = max_window(layout), config.page_size, config.chunked_prefill_size
        windowed = [entry for entry in layout if has_window(entry)]
        ratio = config.swa_full_tokens_ratio
        return cls(
            full_bytes=bytes_per_token([entry for entry in layout if not has_window(entry)], dtype),
            window_bytes=bytes_per_token(windowed, dtype),
            wanted=0 if ratio is not None else config.max_running_requests * least_len(window, page_size) + chunk,
            least=least_len(window, page_size) + max(min(chunk, max_len), page_size),
            ratio=MAX_RATIO if ratio is None else ratio,
            page_size=page_size,
        )

    @property
    def token_bytes(self) -> int:
        """Bytes of a token in all layers."""
        return self.full_bytes + self.window_bytes

    def num_window_tokens(self, num_tokens: int) -> int:
        """Return the tokens of windows, whole pages, beside a pool of `num_tokens`, whole pages too."""
        if not self.window_bytes:
            return 0
        num_window_tokens = int(self.ratio * num_tokens)
        if self.wanted:
            num_window_tokens = min(num_window_tokens, self.wanted)
        num_window_tokens = max(num_window_tokens, self.least)
        return min(num_window_tokens + -num_window_tokens % self.page_size, num_tokens)

    def num_bytes(self, num_tokens: int) -> int:
        """Return the bytes of both pools, the one of them with `num_tokens`."""
        return num_tokens * self.full_bytes + self.num_window_tokens(num_tokens) * self.window_bytes

    def num_tokens(self, room: int, most: int) -> int:
        """Return the tokens, `most` at most where all layers see a window, of the pool that fits with the other one.

        room: bytes for both.
        """
        if not self.window_bytes:
            return room // self.full_bytes
        most = min(most, room // self.full_bytes) if self.full_bytes else most
        return max(bisect.bisect_right(range(most + 1), room, key=self.num_bytes) - 1, 0)


def max_window(layout: Sequence[LayerCache]) -> int:
    """Return the longest window of the layers, which is what the pool keeps for all of them; 0: none has any."""
    return max((entry.window for entry in layout if isinstance(entry, KV) and entry.window is not None), default=0)
