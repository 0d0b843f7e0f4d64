"""Commands that wait for their moment."""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass

import numpy as np

from d4_datasets.contract import Contract
from d4_nodes.ticks import Tick


@dataclass
class Due:
    """A command to be sent at `time_ns`; `tick` None is one between two ticks."""

    time_ns: int
    tick: Tick | None
    values: np.ndarray | None = None


class Schedule:
    """Commands in the order of their times.

    Args:
        contract: the robot.
        count: commands sent per tick.
        slot_ns: a command counts for so long after its time.
    """

    def __init__(self, contract: Contract, count: int, slot_ns: int) -> None:
        self.slot_ns, self._count, self._period_ns = slot_ns, count, contract.period_ns
        self._due: deque[Due] = deque()
        kinds, dims = zip(*((c.kind == "continuous", c.dim) for c in contract.actions), strict=True)
        self._blend = np.repeat(kinds, dims)

    def add(self, due: Due) -> None:
        """Add a command."""
        insort(self._due, due, key=lambda d: d.time_ns)

    def add_between(self, due: Due, plan: np.ndarray) -> None:
        """Add those between a tick's command, the first of `plan` (n, A), and the next one's, the second."""
        if self._count < 2 or len(plan) < 2:
            return
        for j in range(1, self._count):
            share = np.where(self._blend, j / self._count, 0.0)
            values = plan[0] + share * (plan[1] - plan[0])
            self.add(Due(due.time_ns + j * self._period_ns // self._count, None, values))

    @property
    def next_ns(self) -> int | None:
        """When the next one is due, None if nothing waits."""
        return self._due[0].time_ns if self._due else None

    def pop(self) -> Due:
        """The next one, which waits no longer."""
        return self._due.popleft()

    def clear(self) -> None:
        """Nothing waits any more."""
        self._due.clear()

    def leave_out(self, now_ns: int) -> tuple[int, int]:
        """Drop commands whose time is over; returns how many, and by how much the latest was late, ns."""
        count = late_ns = 0
        while self._due:
            is_next_due = len(self._due) > 1 and now_ns >= self._due[1].time_ns
            if not is_next_due and now_ns < self._due[0].time_ns + self.slot_ns:
                break
            late_ns = max(late_ns, now_ns - self._due.popleft().time_ns)
            count += 1
        return count, late_ns
