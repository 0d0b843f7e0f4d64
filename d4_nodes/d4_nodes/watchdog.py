"""Watches the loop from a thread of its own: if the loop stands still, the safety action goes out all the
same.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from d4_nodes.driver import Driver

_LOOKS = 8  # a period
_STILL = 0.75  # periods: a loop goes round more often
_SILENT = 1.6  # periods: with the time between two looks well below the two that are promised
_MUTE = 2.25  # periods: whatever the loop does, it does not drive


class Watchdog:
    """Looks often, and acts when the loop does not go round and has sent nothing for nearly two periods, or
    goes round and has sent nothing for longer than that.

    Args:
        loop: to watch.
        prepare: called first in the watching thread, such as `realtime.prepare_thread` for one of the loop's.

    It can do nothing about a process that does not run at all: that is for the robot's own controller, whose
    command timeout must be set.
    """

    def __init__(self, loop: Driver, prepare: Callable[[], object] = lambda: None) -> None:
        self._loop, self._period_s, self._prepare = loop, loop.contract.period_ns / 1e9, prepare
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
        self._prepare()
        while not self._ended.wait(self._period_s / _LOOKS):
            if self._is_needed():
                with contextlib.suppress(Exception):  # a failing middleware must not end the watching
                    has_acted = self._loop.rest_from_outside(self._period_s)
                    self.count += has_acted
                    self._loop.report.counts["safety actions of the watchdog"] += has_acted

    def _is_needed(self) -> bool:
        beat_age, silence = self._loop.beat_age_s(), self._loop.silence_s()
        if beat_age > _STILL * self._period_s:
            return silence > _SILENT * self._period_s
        return beat_age > 0 and self._loop.keeps_real_time and silence > _MUTE * self._period_s
