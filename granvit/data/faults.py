"""Counting what is wrong with data, and saying when it is too much."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable

from granvit.errors import Failed, printable
from granvit.questions.schema import DataFault

log = logging.getLogger(__name__)

NAMED = 10
"""Rows of one and the same fault that a line names."""


class FaultBudgetExceeded(Failed, ValueError):
    """More rows are faulty than the caller allowed."""


class FaultLog:
    """Counts faults by kind and the rows that have some, and says when there are too many.

    `budget` is the share of `rows` that may have faults; any budget above 0 allows at least one row. A row
    counts once, however often it is read. `unit` is what the messages call a row.
    """

    def __init__(self, rows: int, budget: float, unit: str = "row") -> None:
        if not 0 <= budget <= 1:
            raise ValueError(f"fault_budget must be a share in [0, 1], got {budget!r}")
        self.rows, self.budget, self.unit = rows, budget, unit
        self.counts: Counter[str] = Counter()
        self.faulty: set[int | str] = set()
        self._seen: set[tuple[int | str, str]] = set()

    @property
    def allowed(self) -> int:
        """How many rows may have faults."""
        return max(1, math.floor(self.budget * self.rows)) if self.budget > 0 else 0

    def grow(self, rows: int) -> None:
        """Count the budget's share of this many rows, if that is more: a stream's length is not known beforehand."""
        self.rows = max(self.rows, rows)

    def add(self, row: int | str, name: str, fault: DataFault) -> None:
        """Note one fault of row `row` (its number or id), shown as `name`."""
        self.add_all([(row, name, fault)])

    def add_all(self, faults: Iterable[tuple[int | str, str, DataFault]]) -> None:
        """Note faults as `add` does; rows that have the very same one stand on one line, with their number
        where they are more than NAMED."""
        names: dict[str, list[str]] = {}
        for row, name, fault in faults:
            if (row, str(fault)) not in self._seen:
                self._seen.add((row, str(fault)))
                self.counts[fault.kind] += 1
                self.faulty.add(row)
                names.setdefault(str(fault), []).append(name)
        for message, rows in names.items():
            more = f" and {len(rows) - NAMED:,} more" if len(rows) > NAMED else ""
            log.warning("%s", printable(f"{', '.join(rows[:NAMED])}{more}: {message}"))

    def check(self) -> None:
        """Raises FaultBudgetExceeded if there are more rows with faults than the budget allows."""
        if len(self.faulty) > self.allowed:
            raise FaultBudgetExceeded(f"{self.summary()}; the fault budget allows {self.allowed}")

    def summary(self) -> str:
        """One line: how many rows have faults, and how many faults of which kind there are."""
        kinds = ", ".join(f"{kind} {count}" for kind, count in self.counts.most_common())
        return f"{len(self.faulty)} of {self.rows} {self.unit}s have faults" + (f" ({kinds})" if kinds else "")
