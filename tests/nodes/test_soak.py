"""Random faults, one after the other, for as long as D4_SOAK_S says (seconds, one minute by default).

Whatever happens the motors never see a value outside the contract, and never wait longer than two periods.
"""

import json
import os
import signal
import time

import numpy as np
import pytest

from d4_nodes.bench import ServerProcess

PERIOD_S = 0.05
FAULTS = (
    "server killed", "server stopped", "camera stops", "camera freezes", "stamps ahead", "stamps back",
    "wrong picture", "nan", "huge", "raise", "sleep 0.3", "emergency stop", "new episode", "clock jumps",
    "loop stands still", "nan now and then", "start and jump",
)  # fmt: skip


def inject(rig, fault: str, seconds: float) -> None:
    """One fault that lasts for some seconds, and its end."""
    camera = rig.camera
    if fault == "server killed":
        rig.server.process.send_signal(signal.SIGKILL)
        rig.server.process.wait()
        time.sleep(seconds)
        rig.server = ServerProcess(rig.command)
    elif fault == "server stopped":
        rig.server.process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        rig.server.process.send_signal(signal.SIGCONT)
    elif fault in ("camera stops", "camera freezes"):
        name = "pause" if fault == "camera stops" else "freeze"
        setattr(camera, name, True)
        time.sleep(seconds)
        setattr(camera, name, False)
    elif fault in ("stamps ahead", "stamps back"):
        camera.shift_ns = round(seconds * 1e9) * (1 if fault == "stamps ahead" else -1)
        time.sleep(seconds)
        camera.shift_ns = 0
    elif fault == "wrong picture":
        good, camera._pictures = camera._pictures, [_broken(picture) for picture in camera._pictures]
        time.sleep(seconds)
        camera._pictures = good
    elif fault == "emergency stop":
        with rig.loop.lock:
            rig.guard.stop("soak")
        time.sleep(seconds)
        with rig.loop.lock:
            rig.guard.reset_stop()
    elif fault == "new episode":
        rig.loop.begin(time.time_ns())
    elif fault == "clock jumps":
        rig.loop.jumped("the clock jumped by the test")
    elif fault == "start and jump":
        with rig.loop.lock:
            rig.loop.begin(time.time_ns() + round(seconds * 1e10))
            rig.loop.jumped("the clock jumped by the test")
    elif fault == "loop stands still":
        real = rig.loop._round
        rig.loop._round = lambda: (setattr(rig.loop, "_round", real), time.sleep(seconds))
        time.sleep(seconds)
    else:
        rig.faults.write_text(fault)
        time.sleep(seconds)
        rig.faults.unlink()


def _broken(picture):
    import copy

    broken = copy.copy(picture)
    broken.data = broken.data[: len(broken.data) // 3]
    return broken


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_soak(rig) -> None:
    seconds, rng = float(os.environ.get("D4_SOAK_S", "60")), np.random.default_rng(0)
    end, counts, slowest = time.monotonic() + seconds, dict.fromkeys(FAULTS, 0), 0.0
    while time.monotonic() < end:
        fault = str(rng.choice(FAULTS))
        inject(rig, fault, float(rng.uniform(0.05, 1.5)))
        counts[fault] += 1
        began = time.monotonic()
        rig.until_driving(20.0)
        slowest = max(slowest, time.monotonic() - began)
        time.sleep(float(rng.uniform(0.0, 0.5)))
    gaps = rig.motors.gaps.summary_ms()
    told = {"seconds": seconds, "faults": counts, "slowest_recovery_s": round(slowest, 3), "gap_ms": gaps,
            "commands": rig.report.counts["commands"], "watchdog": rig.watchdog.count}  # fmt: skip
    print(json.dumps(told))
    assert rig.motors.outside == 0
    assert gaps["max"] < 2e3 * PERIOD_S
    assert rig.report.stages["lateness"].largest < 1e9 * PERIOD_S  # nothing is sent whose time is over
    assert rig.report.reasons["the loop failed"] == 0
