"""Whoever computes the features of pictures, as the scheduler sees it."""

from collections.abc import Sequence
from typing import Protocol

from engine.state import RequestState


class FeatureSource(Protocol):
    def fetch(self, state: RequestState, missing: Sequence[int]) -> bool:
        """Put the features of the pictures `missing` into `state.spans`, if all are there, and return True.

        Otherwise they are computed from now on, and `Scheduler.resume` follows, unless the request ends before.
        """
