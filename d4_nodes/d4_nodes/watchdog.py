"""Watches the loop from a thread of its own: if the loop stands still, the safety action goes out all the
same.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Protocol

from d4_datasets.contract import Contract
from d4_nodes.guard import Guard
from d4_nodes.report import Report

_PERIODS = 2.0


class Driver(Protocol):
    """What sends commands from a thread of its own: `d4_nodes.loop.Loop`, `d4_nodes.relay.Relay`."""

    contract: Contract
    guard: Guard
    report: Report
    lock: threading.RLock

    def run(self) -> None:
        """Go round until `stop`; then send the safety action, last of all."""

    def stop(self) -> None:
        """Make `run` return."""

    def beat_age_s(self) -> float:
        """Seconds since it last went round, 0 once it has ended as it was asked to."""

    def rest_from_outside(self, timeout_s: float) -> bool:
        """Send the safety action in place of a loop that stands still; False if it holds the lock."""


class Watchdog:
    """Looks twice a period and acts when the loop has not gone round for two periods.

    It can do nothing about a process that does not run at all: that is for the robot's own controller, whose
    command timeout must be set.
    """

    def __init__(self, loop: Driver) -> None:
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
                with contextlib.suppress(Exception):  # a failing middleware must not end the watching
                    self.count += self._loop.rest_from_outside(self._period_s)
