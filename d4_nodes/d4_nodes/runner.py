"""Loop, watchdog and report as one thing that starts and stops: what a node activates and deactivates.

Knows no ROS. Starting takes a real-time thread as far as that is permitted; stopping waits for the loop,
bounded, and whatever happens the safety action is the last thing that is sent.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from d4_nodes import realtime
from d4_nodes.driver import Driver
from d4_nodes.watchdog import Watchdog

_PATIENCE_S = 2.0
_Driver = TypeVar("_Driver", bound=Driver)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Realtime:
    """What to ask the system for; see `realtime.prepare_thread`."""

    priority: int = 0
    cores: tuple[int, ...] = ()
    lock_memory: bool = False


class Runner(Generic[_Driver]):
    """Runs a loop in a thread of its own until `stop`; once only.

    Args:
        loop: to run.
        settings: real-time treatment of its thread.
        log: told the report at the end.
        warn: told in one line what could not be had; None: `log` is, after "warning: ".

    Attributes:
        refused: what the system did not permit the thread, one line each; `realtime_refused` of the report.
    """

    def __init__(
        self,
        loop: _Driver,
        settings: Realtime = Realtime(),
        log: Callable[[str], None] = print,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self.loop, self.settings, self._log = loop, settings, log
        self._warn = warn or (lambda line: log(f"warning: {line}"))
        self.refused: list[str] = []
        loop.report.about["realtime_refused"] = self.refused
        self._watchdog = Watchdog(loop, self._prepare)
        self._thread = threading.Thread(target=self._run, name="loop", daemon=True)

    def start(self) -> None:
        """Begin to drive."""
        self._watchdog.start()
        self._thread.start()

    def stop(self) -> bool:
        """Stop and send the safety action, last of all; False if the loop did not end in time."""
        self.loop.stop()
        self._thread.join(_PATIENCE_S)
        self._watchdog.stop()
        if not self._thread.is_alive():
            return True
        if self.loop.abandon(_PATIENCE_S):
            self._warn("the loop did not end in time; the safety action was sent in its place")
        else:
            self._warn(
                "the loop hangs while it sends: no safety action could be sent, the robot's own "
                "command timeout must stop it"
            )
        return False

    @property
    def is_running(self) -> bool:
        """Whether the loop's thread lives."""
        return self._thread.is_alive()

    def rules(self) -> dict[str, Any]:
        """The guard's tallies by rule."""
        is_ours = self.loop.lock.acquire(timeout=_PATIENCE_S)  # a loop that hangs may hold it for ever
        try:
            return {name: dataclasses.asdict(tally) for name, tally in self.loop.guard.tally.items()}
        finally:
            if is_ours:
                self.loop.lock.release()

    def conclude(self, folder: Path | None) -> Path | None:
        """Say the report, and write it as JSON into `folder`; returns the file.

        Raises:
            OSError: it cannot be written.
        """
        rules = self.rules()
        self._log(self.loop.report.text(rules))
        if folder is None:
            return None
        now_ns = time.time_ns()
        name = time.strftime("%Y-%m-%dT%H-%M-%S", time.localtime(now_ns // 10**9))
        path = folder / f"{self.loop.contract.name}-{name}.{now_ns // 10**6 % 1000:03d}-{os.getpid()}.json"
        self.loop.report.write(path, rules)
        return path

    def _prepare(self) -> list[str]:
        s = self.settings
        return realtime.prepare_thread(s.priority, s.cores, s.lock_memory)

    def _run(self) -> None:
        self.refused += self._prepare()
        for line in self.refused:
            self._warn(line)
        with realtime.quiet_interpreter():
            self.loop.run()
