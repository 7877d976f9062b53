"""The requests past their prompt, and the plan of their next tokens."""

import numpy as np

from engine.schedule.cohort import Cohort
from engine.schedule.holdings import Holdings
from engine.schedule.plan import Plan
from engine.schedule.rows import Rows

_NO_INDICES = np.empty(0, np.int64)


class Decoding:
    """Keep the requests past their prompt, oldest first, and count the steps in which each has one token to compute."""

    def __init__(self, tables: Rows, held: Holdings) -> None:
        self.rows = np.empty(0, np.int64)  # never written to: another array when others are
        self.current: Cohort | None = None  # of exactly these, where a step has asked for it
        self._tables, self._held = tables, held
        self._num_plain_steps = 0
        # Of decodes only the number differs: plans take as much of these as they need.
        self._one_each = np.ones(tables.num_rows, np.int64)
        self._each = np.arange(tables.num_rows)
        self._unknown = np.full(tables.num_rows, -1, np.int32)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def cohort(self) -> Cohort:
        """Exactly these requests: one object until somebody comes or goes."""
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

    def num_missing(self) -> np.ndarray:
        """Return the tokens (int64 [B]) that each row has yet to compute before it can sample."""
        live, tables = self.rows, self._tables
        return np.minimum(tables.num_tokens[live], tables.compute_limit[live]) - tables.num_computed[live]

    def plan(self, decodes: np.ndarray, computed: np.ndarray, slots: np.ndarray) -> Plan:
        """Plan one token for each of `decodes`, some of these rows. Its epochs are the caller's to set.

        computed: int64 [B], tokens of each so far; slots: int32 [B], where the new ones go.
        """
        tables, count = self._tables, len(decodes)
        tables.num_computed[decodes] = self._held.num_slots[decodes] = seq_lens = computed + 1
        input_ids = self._unknown[:count]
        if (self.current or self.cohort).has_extras:  # forced tokens, perhaps, which no step has sampled
            is_known = computed < tables.num_known[decodes]
            input_ids = np.where(is_known, tables.token_ids[decodes, computed], input_ids)
        return Plan(
            rows=decodes,
            q_lens=self._one_each[:count],
            seq_lens=seq_lens,
            input_ids=input_ids,
            out_cache_loc=slots,
            num_decodes=count,
            samples=self._each[:count],
            epochs=_NO_INDICES,
        )
