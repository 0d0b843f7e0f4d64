"""How the Fetch's gripper gets itself or the block to the spot: over it, down behind it, and through."""

from __future__ import annotations

from typing import Any

import numpy as np

from d4_sim.driver import AxisDriver, saturate
from d4_sim.mujoco_world import LATENCY_MS
from d4_sim.suite.fetch import SPEED_LIMIT, TABLE

_GAIN = 5.0  # 1/s, braking towards a place
_CONTACT = 0.05  # m, from the gripper to the block's middle when they touch
_CLEAR = 0.075  # m, where the gripper comes down
_HOVER = TABLE + 0.075  # m, fingers pass over the block
_LOW = TABLE + 0.02  # m, low enough to push
_PUSHING = 0.3  # m/s, faster the block turns away


class FetchDriver(AxisDriver):
    """See `d4_sim.driver.AxisDriver`; the wrong driver does the other task."""

    axes = 3

    def _towards(self, target: int, state: dict[str, Any]) -> np.ndarray:
        tip = state["gripper"] + state["command"] * (LATENCY_MS / 1000)
        if target == 0:
            wanted = _GAIN * (state["target"] - tip)
        else:
            wanted = push_block(tip, state["block"], state["target"])
        return saturate(wanted / SPEED_LIMIT)


def push_block(tip: np.ndarray, block: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Velocity [3] in m/s of a gripper that is to push a block to a target on the table (all [3], m)."""
    way = (target - block)[:2]
    left = float(np.linalg.norm(way))
    if left < 0.012:
        return np.zeros(3)
    ahead = way / left
    aside = np.array([-ahead[1], ahead[0]])
    offset = (tip - block)[:2]
    behind, off = float(-offset @ ahead), float(offset @ aside)
    is_low = tip[2] < _LOW
    if is_low and behind > 0.6 * _CONTACT and abs(off) < 0.6 * behind:
        speed = min(_GAIN * left, _PUSHING) * max(0.0, 1.0 - 30.0 * abs(off))
        flat = ahead * (speed + 4.0 * max(behind - _CONTACT, 0.0)) - aside * 6.0 * off
        return np.array([*flat, _GAIN * (TABLE - tip[2])])
    place = block[:2] - _CLEAR * ahead
    to_place = place - tip[:2]
    if np.linalg.norm(to_place) < 0.02:  # above the place or on the way down there
        return np.array([*(_GAIN * to_place), _GAIN * (TABLE - tip[2]) - 0.1])
    if tip[2] < _HOVER - 0.02:  # up before it goes anywhere
        return np.array([0.0, 0.0, _GAIN * (_HOVER - tip[2]) + 0.1])
    return np.array([*(_GAIN * to_place), _GAIN * (_HOVER - tip[2])])
