"""The guard as a node of its own: in front of any policy, last before the robot.

What the other policy wants comes on `policy/<command topic>`; what the contract allows goes out on the
command topics themselves, and the safety action when nothing comes. A lifecycle node around `d4_nodes.relay`.

    configure     read the contract, make topics
    activate      watch and pass on
    deactivate    stop, wait (bounded), safety action last; report
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import numpy as np
from d4_interfaces.msg import PolicyStatus

from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_nodes.codec import Topic
from d4_nodes.health import Finding
from d4_nodes.inbox import inbox_of
from d4_nodes.output import never_blocking
from d4_nodes.relay import Relay, RelayExaminer, read
from d4_nodes.report import Report
from d4_nodes.ros import qos
from d4_nodes.ros.commanding import CommandingNode
from d4_nodes.ros.guard_parameters import PARAMETERS
from d4_nodes.ros.shell import local, spin


class GuardNode(CommandingNode[Relay]):
    """See the module; parameters are those of `guard_parameters`."""

    def __init__(self) -> None:
        super().__init__("guard", PARAMETERS)

    # -- transitions --

    def _configure(self, contract: Contract) -> str:
        prefix = self._get("input_prefix").strip("/")
        if not prefix:
            raise UserError("input_prefix is empty: the guard would listen to its own commands")
        self._observe(contract)
        self._command(contract)
        for topic in self._codec.topics:
            callback = functools.partial(self._on_command, topic)
            self._listen(f"{prefix}/{local(topic.name)}", topic.type, callback, qos.sensor())
        if self._get("alive_topic"):
            self._listen(self._get("alive_topic"), self._get("alive_type"), self._on_alive, qos.sensor())
            self._on_alive(None)  # from now on it is watched, also if it never speaks
        wanted = ", ".join(f"{prefix}/{local(topic.name)}" for topic in self._codec.topics)
        return f"commands are expected on {wanted}"

    def _prepare(self, contract: Contract) -> None:
        assert self.guard is not None
        self._refuse_rivals()
        self._look_for_rivals()
        self.guard.config = self._guard_config(watchdog_ms=self._get("watchdog_ms"))
        report = Report(contract.rate_hz, contract.latency_ms, self._about())
        self._relay = Relay(
            contract, self.guard, inbox_of(contract), self._send, self._now, report, self._log_driver,
            self._now if self._is_simulated else None, 0.002 if self._is_simulated else 0.02,
            self._get("recover_after"),
        )  # fmt: skip
        self._examiner = RelayExaminer(self._relay, self._thresholds())

    def _start(self) -> None:
        self._run(self._relay)

    # -- topics --

    def _on_command(self, topic: Topic, msg: Any) -> None:
        if self.runner is None:
            return
        try:
            self.runner.loop.command(topic.name, read(topic, msg))
        except UserError as error:
            self._complain(f"{topic.name}: {error}: dropped")

    def _on_alive(self, msg: Any) -> None:
        """Whatever the other process says there, it lives."""
        who = f"process behind {self._get('alive_topic')}"
        self._tell(lambda guard: guard.alive(who, self._now()))

    def _advice(self, topic: str) -> str:
        return f"let them publish on {self._get('input_prefix').strip('/')}/{local(topic)}"

    def _take(self, stream: str, stamp_ns: int, value: Any) -> None:
        if self.runner is not None:
            self.runner.loop.put(stream, stamp_ns, None if isinstance(value, np.ndarray) else value)

    # -- what it says --

    def _findings(self) -> list[Finding]:
        return [] if self.runner is None else self._examiner.look()

    def _tell_more(self, msg: PolicyStatus, driver: Relay) -> None:
        """Nothing: the guard has no task and no weights."""


def main() -> None:
    """Entry point of `ros2 run d4_nodes guard_node`."""
    with never_blocking():
        code = spin(GuardNode)
    sys.exit(code)


if __name__ == "__main__":
    main()
