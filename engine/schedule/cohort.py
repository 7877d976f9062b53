"""The same requests, step after step: what they have in common is looked up once, and who they are is one object."""

from typing import Final

import numpy as np

from engine.request import Request
from engine.schedule.rows import Rows


class Cohort:
    """Some running requests, and what stays the same of them while they run.

    Two steps are of the same requests if their plans name the same cohort: compare with `is`. Nobody writes to it.
    """

    __slots__ = ("epochs", "has_extras", "max_tokens", "requests", "rows", "stops_at_eos", "wanted", "watched")

    def __init__(self, tables: Rows, rows: np.ndarray) -> None:
        """rows: int64 [B], each a running request's."""
        self.rows: Final = rows
        self.epochs: Final = tables.epoch[rows]
        self.max_tokens: Final = tables.max_tokens[rows]
        self.has_extras: Final = np.count_nonzero(tables.has_extras[rows]) > 0  # for a few rows much faster than any()
        stops_at_eos = tables.stops_at_eos[rows]
        self.stops_at_eos: Final = stops_at_eos if np.count_nonzero(stops_at_eos) else None  # bool [B]; None: nobody
        (wanted,) = tables.wants_tokens[rows].nonzero()
        self.wanted: Final[np.ndarray] = wanted  # indices of those that `requests` holds
        self.requests: Final[list[Request]] = tables.requests_of(rows[wanted])  # that want to see their tokens
        has_stop_text = tables.has_stop_text[rows]
        self.watched: Final[list[Request]] = (  # whose text may end them
            tables.requests_of(rows[has_stop_text]) if np.count_nonzero(has_stop_text) else []
        )


class Decoding:
    """The requests past their prompt, oldest first, and for how many steps each has just one token to compute."""

    def __init__(self, tables: Rows) -> None:
        self.rows = np.empty(0, np.int64)  # never written to: another array when others are
        self.current: Cohort | None = None  # of exactly these, where a step has asked for it
        self._tables = tables
        self._num_plain_steps = 0

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def cohort(self) -> Cohort:
        """Exactly these requests; the same object until others are."""
        if self.current is None:
            tables, rows = self._tables, self.rows
            self.current = Cohort(tables, rows)
            is_plain = len(rows) and not self.current.has_extras
            self._num_plain_steps = (
                int((tables.compute_limit[rows] - tables.num_computed[rows]).min()) if is_plain else 0
            )
        return self.current

    def add(self, row: int) -> None:
        self.rows, self.current = np.append(self.rows, row), None

    def remove(self, row: int) -> None:
        self.rows, self.current = self.rows[self.rows != row], None

    def clear(self) -> None:
        self.rows, self.current = self.rows[:0], None

    def count_plain_step(self) -> bool:
        """Return whether each row has exactly one token to compute, its last one, that need not be known here.

        The steps of which this is so are counted down, so that a step need not look: forced tokens apart, only an
        answer's limit ends it. To be called once a step, after `cohort`, which begins the count.
        """
        if self._num_plain_steps:
            self._num_plain_steps -= 1
            return True
        return False
