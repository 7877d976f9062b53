"""The pictures of one request while it waits and runs: what stands for them in the tree, and their features."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from engine.media import PromptMedia


class Spans:
    """Follow the pictures of a prompt. Features are any objects: the scheduler passes them on."""

    __slots__ = ("features", "ids", "media", "rope_delta", "tree_ids")

    def __init__(self, media: PromptMedia, prompt_ids: np.ndarray, ids: Sequence[int]) -> None:
        """prompt_ids: int32 [prompt_len]. ids: of each picture, what stands for it in the tree."""
        self.media, self.ids = media, tuple(ids)
        self.features: list[Any] = [None] * len(ids)
        self.tree_ids = prompt_ids.copy()
        for places, its_id in zip(media.places, ids, strict=True):
            self.tree_ids[places] = its_id
        # A token behind the prompt has its index and this as its position on every axis.
        self.rope_delta = 0 if media.rope is None else int(media.rope.max()) + 1 - media.prompt_len

    def missing(self, start: int) -> list[int]:
        """Return the pictures without features that are needed to compute the prompt from token `start` on."""
        pairs = zip(self.media.places, self.features, strict=True)
        return [i for i, (places, features) in enumerate(pairs) if places[-1] >= start and features is None]

    def parts(self, start: int, stop: int) -> Iterator[tuple[np.ndarray, Any, int, int]]:
        """Yield (places, features, first, last) of the pictures in tokens [start, stop): rows [first, last) of each."""
        for places, features in zip(self.media.places, self.features, strict=True):
            first, last = np.searchsorted(places, (start, stop)).tolist()
            if first < last:
                yield places[first:last], features, first, last

    def release(self, stop: int) -> None:
        """Drop the features of pictures that end before token `stop`."""
        for i, places in enumerate(self.media.places):
            if places[-1] < stop:
                self.features[i] = None

    def positions(self, start: int, stop: int) -> np.ndarray:
        """Return the positions of tokens [start, stop), int64 [3, stop - start]."""
        positions = np.broadcast_to(np.arange(start, stop) + self.rope_delta, (3, stop - start)).copy()
        of_prompt = self.media.rope[:, start:stop] if self.media.rope is not None else positions[:, :0]
        positions[:, : of_prompt.shape[1]] = of_prompt
        return positions
