"""The same requests, step after step: what they have in common is looked up once, and who they are is one object."""

from typing import Final

import numpy as np

from engine.schedule.rows import Rows
from engine.state import RequestState


class Cohort:
    """Hold some running requests, and what stays the same of them while they run.

    Two steps are of the same requests if their plans name the same cohort: compare with `is`. Nobody writes to it.
    """

    __slots__ = ("epochs", "has_extras", "max_tokens", "rows", "states", "stops_at_eos", "wanted", "watched")

    def __init__(self, tables: Rows, rows: np.ndarray) -> None:
        """rows: int64 [B], each a running request's."""
        self.rows: Final = rows
        self.epochs: Final = tables.epoch[rows]
        self.max_tokens: Final = tables.max_tokens[rows]
        self.has_extras: Final = np.count_nonzero(tables.has_extras[rows]) > 0  # for a few rows much faster than any()
        stops_at_eos = tables.stops_at_eos[rows]
        self.stops_at_eos: Final = stops_at_eos if np.count_nonzero(stops_at_eos) else None  # bool [B]; None: nobody
        (wanted,) = tables.wants_tokens[rows].nonzero()
        self.wanted: Final[np.ndarray] = wanted  # indices of those that `states` holds
        self.states: Final[list[RequestState]] = tables.states_of(rows[wanted])  # that want to see their tokens
        has_stop_text = tables.has_stop_text[rows]
        self.watched: Final[list[RequestState]] = (  # whose text may end them
            tables.states_of(rows[has_stop_text]) if np.count_nonzero(has_stop_text) else []
        )
