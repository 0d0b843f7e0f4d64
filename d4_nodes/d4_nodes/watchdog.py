"""Watches the loop from a thread of its own: if the loop stands still, the safety action goes out all the
same.
"""

from __future__ import annotations

import threading

from d4_nodes.loop import Loop

_PERIODS = 2.0


class Watchdog:
    """Looks twice a period and acts when the loop has not gone round for two periods.

    It can do nothing about a process that does not run at all: that is for the robot's own controller, whose
    command timeout must be set.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop, self._period_s = loop, loop.contract.period_ns / 1e9
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self.count = 0  # of safety actions it had to send

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._period_s / 2):
            if self._loop.beat_age_s() > _PERIODS * self._period_s:
                self.count += self._loop.rest_from_outside(self._period_s)
