"""A small robot, a server with scripted answers, and a loop that drives it."""

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from relay_bench import Bench, still

from d4_datasets.contract import Contract
from d4_nodes.activation import wait
from d4_nodes.bench import Camera, LatencyArgs, Motors, ServerProcess
from d4_nodes.guard import Guard, GuardConfig
from d4_nodes.inbox import Inbox
from d4_nodes.link import Link
from d4_nodes.loop import Loop, LoopConfig
from d4_nodes.report import Report
from d4_nodes.watchdog import Watchdog

# no deadlines: on a busy machine any example may take a second
settings.register_profile("nodes", settings(), deadline=None)
settings.load_profile("nodes")

ROBOT = Path(__file__).with_name("robot.yaml")


@pytest.fixture
def contract() -> Contract:
    return Contract.load(ROBOT)


class Rig:
    """The loop of a robot with a simulated camera and a server process that can be told to misbehave."""

    def __init__(self, contract: Contract, folder: Path) -> None:
        self.contract, self.socket, self.faults = contract, folder / "d4.sock", folder / "fault"
        self.command = [
            sys.executable,
            str(Path(__file__).with_name("scripted_server.py")),
            str(ROBOT),
        ]
        self.command += [str(self.socket), str(self.faults)]
        self.server = ServerProcess(self.command)
        self.guard, self.motors = Guard(contract, GuardConfig()), Motors(contract)
        self.report = Report(contract.rate_hz, contract.latency_ms)
        self.said: list[str] = []
        self.loop = Loop(
            contract, self.guard, Inbox(tuple(s.name for s in contract.observations)), self.motors,
            lambda: Link(self.socket, contract, timeout_s=1.0), time.time_ns, self.report, LoopConfig(),
            log=self.said.append,
        )  # fmt: skip
        self.camera = Camera(self.loop, LatencyArgs(checkpoint=Path()), contract.images[0].size)
        self.watchdog = Watchdog(self.loop)
        self._thread = threading.Thread(target=self.loop.run, name="loop")

    def start(self) -> None:
        self.camera.start()
        self.watchdog.start()
        self._thread.start()
        self.until_driving()

    def stop(self) -> None:
        self.loop.stop()
        if self._thread.ident is not None:
            self._thread.join(5)
            self.camera.stop()
            self.watchdog.stop()
        self.server.__exit__()

    def until_driving(self, timeout_s: float = 10.0) -> None:
        self.until(lambda: self.loop.state == "driving", timeout_s)

    def until_safe(self, timeout_s: float = 10.0) -> str:
        """Wait for a safety action; returns the rule that caused it."""
        self.until(lambda: self.motors.commands[-1][1], timeout_s)
        return self.motors.commands[-1][2][0]

    @staticmethod
    def until(condition, timeout_s: float) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.002)

    def safe_after_s(self, since_ns: int) -> float:
        """Seconds from a moment to the first safety action after it."""
        return next(t - since_ns for t, is_safe, _ in self.motors.commands if is_safe and t >= since_ns) / 1e9


@pytest.fixture
def standing(contract: Contract, tmp_path: Path) -> Iterator[Rig]:
    """A rig that has not been started."""
    rig = Rig(contract, tmp_path)
    try:
        yield rig
    finally:
        rig.stop()
    assert rig.motors.outside == 0, "a command outside the contract"


@pytest.fixture
def rig(standing: Rig) -> Rig:
    """A rig that drives."""
    standing.start()
    return standing


class ServerOnly:
    """A scripted server process and links to it."""

    def __init__(self, contract: Contract, folder: Path) -> None:
        self.contract, self.socket = contract, folder / "d4.sock"
        script = Path(__file__).with_name("scripted_server.py")
        self.process = ServerProcess(
            [sys.executable, str(script), str(ROBOT), str(self.socket), str(folder / "fault")]
        )

    def link(self) -> Link:
        return Link(self.socket, self.contract)

    def answer(self, link: Link) -> None:
        wait(link, 5.0)


@pytest.fixture
def rig_server(contract: Contract, tmp_path: Path) -> Iterator[ServerOnly]:
    """A server that waits for a robot."""
    server = ServerOnly(contract, tmp_path)
    with server.process:
        yield server


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A relay whose time is told by the test."""
    bench = Bench()
    still(monkeypatch, bench)
    return bench
