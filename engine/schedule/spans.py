"""The pictures of one request while it waits and runs: what stands for them in the tree, and their features."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from engine.media import PromptMedia

NO_TOKENS = np.empty(0, np.int32)


def told_apart(prompt_ids: np.ndarray, media: PromptMedia | None) -> np.ndarray:
    """Return a prompt's tokens with a part of its key for each picture: a good guess, to choose a replica by."""
    if media is None or not media.media:
        return prompt_ids
    found = prompt_ids.copy()
    for key, places in zip(media.keys, media.places, strict=True):
        found[places] = np.frombuffer(key[:4], np.int32)
    return found


class Spans:
    """Follow the pictures of a prompt. Features are any objects: the scheduler passes them on."""

    __slots__ = ("features", "ids", "is_whole", "media", "rope_delta", "tree_ids", "until")

    def __init__(self, media: PromptMedia, prompt_ids: np.ndarray, ids: Sequence[int]) -> None:
        """prompt_ids: int32 [prompt_len]. ids: of each picture, what stands for it in the tree."""
        self.media, self.ids = media, tuple(ids)
        self.features: list[Any] = [None] * len(ids)
        self.tree_ids = prompt_ids.copy()
        for places, its_id in zip(media.places, ids, strict=True):
            self.tree_ids[places] = its_id
        self.is_whole = media.is_whole
        self.until = self._until() if self.is_whole else NO_TOKENS  # int32 [prompt_len], where what each sees ends
        # A token behind the prompt has its index and this as its position on every axis.
        self.rope_delta = 0 if media.rope is None else int(media.rope.max()) + 1 - media.prompt_len

    def _until(self) -> np.ndarray:
        until = np.arange(1, self.media.prompt_len + 1, dtype=np.int32)
        for places in self.media.places:
            for block in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1):
                until[block] = block[-1] + 1
        return until

    @property
    def longest(self) -> int:
        """Return the tokens of the longest run that one step must compute together."""
        return int((self.until - np.arange(len(self.until))).max(initial=1))

    def whole_stop(self, start: int, stop: int) -> int:
        """Return where a chunk from `start` on ends, `stop` or near it, that cuts through no picture."""
        if stop > len(self.until) or self.until[stop - 1] <= stop:
            return stop
        end = int(self.until[stop - 1])
        first = int(np.searchsorted(self.until, end))
        return first if first > start else end

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

    def forget(self) -> None:
        """Drop the features of all pictures."""
        self.features = [None] * len(self.ids)

    def positions(self, start: int, stop: int) -> np.ndarray:
        """Return the positions of tokens [start, stop), int64 [3, stop - start]."""
        positions = np.broadcast_to(np.arange(start, stop) + self.rope_delta, (3, stop - start)).copy()
        of_prompt = self.media.rope[:, start:stop] if self.media.rope is not None else positions[:, :0]
        positions[:, : of_prompt.shape[1]] = of_prompt
        return positions
