"""How the arm gets its tip, or the puck, to the disc: around its base, then as a pusher would."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from d4_sim.arm import BASE, joints_of, tip_of
from d4_sim.driver import AxisDriver, saturate
from d4_sim.mujoco_world import LATENCY_MS, MOTOR_LAG, RATE_HZ
from d4_sim.suite.arm_push import JOINT_LIMIT, SPEED_LIMIT
from d4_sim.suite.push import CONTACT
from d4_sim.suite.push_driver import CLEAR, push_velocity

_GAIN = 5.0  # 1/s, braking towards a place
_FASTEST = 1.2  # m/s, of the tip
_NEAR = 0.45  # m, between tip and puck: farther off the arm just swings
_THERE = 0.06  # m, from puck to disc: on the way around it to correct that, the arm would knock it off
_REACH = (0.46, 1.12)  # m, from the shoulder: the tip keeps within, neither folded nor straight


class ArmPushDriver(AxisDriver):
    """See `d4_sim.driver.AxisDriver`; the wrong driver does the other task.

    Over a distance the tip swings around the arm's base; by the puck it moves as a pusher would. The joints
    go straight to the angles that put the tip where it should be a tick later.
    """

    def _towards(self, target: int, state: dict[str, Any]) -> np.ndarray:
        lead = state["joints"] + state["velocity"] * MOTOR_LAG + state["command"] * (LATENCY_MS / 1000)
        tip, puck, disc = tip_of(lead), state["puck"], state["target"]
        way = disc - puck
        left = float(np.linalg.norm(way))
        if target == 1:
            wanted = _swing(tip, disc)
        elif left < _THERE:
            return np.zeros(2)
        elif np.linalg.norm(tip - puck) > _NEAR:
            wanted = _swing(tip, puck - CLEAR * CONTACT * way / left)
        else:
            wanted = push_velocity(tip, puck, disc, CONTACT)
        step = wanted * min(1.0, _FASTEST / max(float(np.linalg.norm(wanted)), 1e-6)) / RATE_HZ
        turns = joints_of(_in_reach(tip + step), JOINT_LIMIT) - lead
        if not len(turns):
            return np.zeros(2)
        return saturate(turns[np.abs(turns).max(axis=1).argmin()] * RATE_HZ / SPEED_LIMIT)


def _swing(tip: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Velocity [2] in m/s that takes the tip around the arm's base to a place, never behind it."""
    here, there = tip - BASE, place - BASE
    far = float(np.linalg.norm(here))
    outward = here / far
    turn = math.atan2(there[0], there[1]) - math.atan2(here[0], here[1])  # rad, to the right
    clockwise = np.array([outward[1], -outward[0]])
    return _GAIN * ((float(np.linalg.norm(there)) - far) * outward + far * turn * clockwise)


def _in_reach(place: np.ndarray) -> np.ndarray:
    """The nearest place [2] that the tip reaches neither folded nor straight."""
    offset = place - BASE
    far = float(np.linalg.norm(offset))
    return BASE + offset * float(np.clip(far, *_REACH)) / max(far, 1e-6)
