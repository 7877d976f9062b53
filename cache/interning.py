"""Ids for what stands in a prompt and is no token, such as a picture: the tree then tells two of them apart.

A tree's token ids are int32, and vocabularies end far below 2^30, so ids from there on are free. They are counted up,
one for each key that is in use, and none is given twice: unlike a hash of so few bits, an id never means another key.
"""

import itertools
from collections.abc import Iterable

import numpy as np

FIRST_ID, END_ID = 1 << 30, (1 << 31) - 1
MIN_FORGOTTEN = 1024  # keys to collect before it is worth looking which of them are in use


class Interner:
    """Give each key an id for as long as it is in use, which is up to `forget_others`."""

    def __init__(self) -> None:
        self._ids: dict[bytes, int] = {}
        self._tokens: dict[int, int] = {}
        self._next = itertools.count(FIRST_ID)
        self._limit = MIN_FORGOTTEN

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def is_full(self) -> bool:
        """Return whether so many keys have come that some may be out of use: `forget_others` is due."""
        return len(self._ids) >= self._limit

    def id_of(self, key: bytes, token: int) -> int:
        """Return the id of `key`. token: what to show in its place."""
        if (found := self._ids.get(key)) is None:
            found = next(self._next)
            assert found < END_ID, "a billion keys have been given ids"
            self._ids[key], self._tokens[found] = found, token
        return found

    def tokens(self, ids: np.ndarray) -> np.ndarray:
        """Return int32 ids with those given here replaced by the tokens to show in their place."""
        is_ours = ids >= FIRST_ID
        if not is_ours.any():
            return ids
        shown = ids.copy()
        shown[is_ours] = [self._tokens[found] for found in ids[is_ours].tolist()]
        return shown

    def forget_others(self, used: Iterable[int]) -> None:
        """Forget every key whose id is not in `used`; those may be looked up once more only as new ones."""
        kept = set(used)
        self._ids = {key: found for key, found in self._ids.items() if found in kept}
        self._tokens = {found: token for found, token in self._tokens.items() if found in kept}
        self._limit = max(2 * len(self._ids), MIN_FORGOTTEN)
