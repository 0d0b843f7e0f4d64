"""A relay on clocks that stand still unless they are told, and what its tests share."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from d4_datasets.contract import Contract
from d4_nodes import driver as driver_module
from d4_nodes import relay as relay_module
from d4_nodes.guard import Guard, GuardConfig
from d4_nodes.inbox import Inbox
from d4_nodes.relay import Relay
from d4_nodes.report import Report

CONTRACT = Contract.load(Path(__file__).with_name("robot.yaml"))
MS = 1_000_000
PERIOD = CONTRACT.period_ns
SLACK_NS = 25 * MS


class Bench:
    """A relay on clocks that stand still unless they are told: camera and joints deliver every period."""

    def __init__(
        self,
        config: GuardConfig = GuardConfig(),  # noqa: B008
        contract: Contract = CONTRACT,
        recover_after: int = 5,
        is_simulated: bool = False,
    ) -> None:
        self.mono, self.shift = 10_000 * MS, 5_000_000 * MS
        pace = (lambda: self.mono + self.shift) if is_simulated else None
        self.sent: list[tuple[int, object]] = []
        self.dated: list[int] = []  # by the clock of the guard, which may be set
        self.said: list[str] = []
        self.guard = Guard(contract, config)
        self.relay = Relay(
            contract, self.guard, Inbox(tuple(s.name for s in contract.observations)),
            self._send, lambda: self.mono + self.shift,
            Report(contract.rate_hz, contract.latency_ms), self.said.append, pace, 0.0, recover_after,
        )  # fmt: skip
        self.sees = self.moves = True
        self._number = 0
        self._next_frame = self.mono
        self.relay.begin()

    def _send(self, verdict: object, now_ns: int) -> None:
        self.sent.append((self.mono, verdict))
        self.dated.append(now_ns)

    def see(self) -> None:
        """A frame and joints."""
        self._number += self.moves
        picture = SimpleNamespace(data=np.full(96, self._number % 256, np.uint8).tobytes())
        self.relay.put("joints", self.mono + self.shift)
        self.relay.put("eye", self.mono + self.shift, picture)

    def spend(self, ms: int) -> None:
        """Time goes by, looked at every millisecond."""
        for _ in range(ms):
            self.relay.round()
            self.mono += MS
            if self.mono >= self._next_frame:
                self._next_frame += PERIOD
                if self.sees:
                    self.see()
        self.relay.round()

    def base(self, *values: float) -> None:
        self.relay.command("/cmd_vel", np.array(values))

    def arm(self, value: float) -> None:
        self.relay.command("/arm", np.array([value]))

    def command(self, x: float, turn: float, arm: float) -> object:
        """A whole command; returns what the robot gets of it."""
        count = len(self.sent)
        self.base(x, turn)
        self.arm(arm)
        self.relay.round()
        assert len(self.sent) == count + 1
        return self.sent[-1][1]

    def drive(self, ms: int, x: float = 0.1, arm: float = 0.5) -> None:
        """Good commands every period."""
        for _ in range(ms // 50):
            self.command(x, 0.0, arm)
            self.spend(50)

    @property
    def last(self):
        return self.sent[-1][1]


def still(monkeypatch, bench: Bench) -> None:
    """The relay's monotonic time is the bench's."""
    for module in (driver_module, relay_module):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic_ns=lambda: bench.mono))
    bench.relay.begin()


def recover(bench: Bench, count: int = 5) -> None:
    """So many good commands must come; the last of them passes."""
    for left in reversed(range(count)):
        verdict = bench.command(0.1, 0.0, 1.0)
        assert verdict.is_safe == (left > 0)
        if left:
            assert verdict.rules == ("fault",)
            assert f"; {left} good commands in a row are still missing" in verdict.reason
        bench.spend(50)
    assert bench.relay.state == "driving"
