"""How scripted drivers get the arm's tip to a disc: straight in the angles, by inverse kinematics."""

from __future__ import annotations

from typing import Any

import numpy as np

from d4_sim.arm import SPEED_LIMIT, joints_of
from d4_sim.driver import AxisDriver, saturate
from d4_sim.mujoco_world import LATENCY_MS, MOTOR_LAG

_GAIN = 6.0  # 1/s, braking towards a target


class ArmDriver(AxisDriver):
    """See `d4_sim.driver.AxisDriver`; it takes the elbow, left or right, that is there sooner."""

    def _towards(self, target: int, state: dict[str, Any]) -> np.ndarray:
        # Where the joints will be when a command chosen now begins to bite.
        lead = state["joints"] + state["velocity"] * MOTOR_LAG + state["command"] * (LATENCY_MS / 1000)
        offsets = joints_of(state["discs"][target]) - lead
        nearer = offsets[np.abs(offsets).max(axis=1).argmin()]
        return saturate(_GAIN * nearer / SPEED_LIMIT)
