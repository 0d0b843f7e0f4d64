"""Random faults over real topics, for as long as D4_SOAK_S says (seconds, one minute by default)."""

import json
import os
import signal
import time

import numpy as np
import pytest

pytest.importorskip("rclpy")
pytestmark = [pytest.mark.ros, pytest.mark.slow, pytest.mark.timeout(0)]

from policy_rig import PERIOD_S, PolicyProcess, Server, World  # noqa: E402
from std_msgs.msg import Bool  # noqa: E402
from std_srvs.srv import Trigger  # noqa: E402

SWITCHES = {
    "camera stops": ("pause", True), "camera freezes": ("freeze", True), "encoding": ("encoding", "nonsense"),
    "size": ("size", (0, 0)), "other size": ("size", (16, 24)), "ahead": ("offset_ns", 400_000_000),
    "back": ("offset_ns", -400_000_000),
}  # fmt: skip
MODEL = ("nan", "huge", "raise", "sleep 0.3")
FAULTS = (*SWITCHES, *MODEL, "server killed", "server stopped", "emergency stop", "shut down and up")
LIMITS, RATES = ((-1.0, 1.0), (-2.0, 2.0)), (10.0, 20.0)  # of robot.yaml


class Soak:
    """A driving node, and what can go wrong around it."""

    def __init__(self, folder) -> None:
        self.folder, self.server = folder, Server(folder)
        self.process, self.world = PolicyProcess(folder), World()
        self.pauses: list[tuple[int, int]] = []  # in which nothing is sent: the node was inactive
        self.began: list[tuple[int, str]] = []  # faults
        assert self.world.configure()
        assert self.world.activate()
        self.world.until_state("driving")

    def close(self) -> None:
        self.world.close()
        self.server.process.kill()
        self.process.end(signal.SIGKILL)

    def inject(self, fault: str, seconds: float) -> None:
        world = self.world
        self.began.append((time.time_ns(), fault))
        if fault in SWITCHES:
            name, value = SWITCHES[fault]
            before = getattr(world, name)
            setattr(world, name, value)
            time.sleep(seconds)
            setattr(world, name, before)
        elif fault in MODEL:
            self.server.faults.write_text(fault)
            time.sleep(seconds)
            self.server.faults.unlink()
        elif fault == "server killed":
            self.server.kill()
            time.sleep(seconds)
            self.server = Server(self.folder)
        elif fault == "server stopped":
            self.server.kill(signal.SIGSTOP)
            time.sleep(seconds)
            self.server.kill(signal.SIGCONT)
        elif fault == "emergency stop":
            world.stop.publish(Bool(data=True))
            time.sleep(seconds)
            assert world.call(Trigger, "policy/reset_stop", Trigger.Request()).success
        else:
            began = time.time_ns()
            assert world.deactivate()
            assert world.activate()
            world.until_state("driving", 20.0)
            self.pauses.append((began, time.time_ns()))


@pytest.fixture
def soak(tmp_path):
    soak = Soak(tmp_path)
    yield soak
    soak.close()


def test_soak(soak) -> None:
    seconds, rng = float(os.environ.get("D4_SOAK_S", "60")), np.random.default_rng(1)
    end, counts, slowest = time.monotonic() + seconds, dict.fromkeys(FAULTS, 0), 0.0
    while time.monotonic() < end:
        fault = str(rng.choice(FAULTS))
        soak.inject(fault, float(rng.uniform(0.05, 1.5)))
        counts[fault] += 1
        began = time.monotonic()
        soak.world.until(lambda: soak.world.status[-1].state == "driving", 20.0)
        slowest = max(slowest, time.monotonic() - began)
        time.sleep(float(rng.uniform(0.0, 0.5)))
    twists = np.array(soak.world.twists)
    sent = np.array(soak.world.sent[: len(twists)])  # one may have come since the line above
    gaps = np.diff(sent) / 1e9
    inactive = np.zeros(len(gaps), bool)
    for begin, end_ns in soak.pauses:
        inactive |= (sent[:-1] < end_ns) & (sent[1:] > begin)
    active = gaps[~inactive]
    long = [
        (round(1e3 * gaps[i], 1), next((f for t, f in reversed(soak.began) if t < sent[i + 1]), "none"))
        for i in np.flatnonzero(~inactive & (gaps > 2 * PERIOD_S))
    ]
    told = {"seconds": seconds, "faults": counts, "slowest_recovery_s": round(slowest, 3),
            "commands": len(twists), "longest_gap_ms": round(1e3 * active.max(), 1),
            "gap_p99.9_ms": round(1e3 * np.quantile(active, 0.999), 1),
            "longer_than_two_periods": long}  # fmt: skip
    print(json.dumps(told))
    for column, (low, high), rate in zip((1, 2), LIMITS, RATES, strict=True):
        values = twists[:, column]
        driven = (values[1:] != 0) & ~inactive  # a stop is not slewed
        # a message may be late by some ms, and then the next one seems to follow sooner than it was sent
        assert (np.abs(np.diff(values))[driven] <= rate * (gaps[driven] + 0.03)).all()
        assert np.isfinite(twists[:, column]).all()
        assert low <= twists[:, column].min() <= twists[:, column].max() <= high
    arms = np.array([x for _, x in soak.world.arms])
    assert np.isfinite(arms).all()
    assert np.abs(arms).max() <= 3.0
    assert active.max() < 2 * PERIOD_S + 0.01  # a safety action is due at 1.75 periods at the latest
