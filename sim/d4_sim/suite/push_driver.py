"""How a round tip gets a round thing to a place: around it, and then through it."""

from __future__ import annotations

from typing import Any

import numpy as np

from d4_sim.driver import AxisDriver, saturate
from d4_sim.mujoco_world import LATENCY_MS, MOTOR_LAG
from d4_sim.suite.push import CONTACT, SPEED_LIMIT

_GAIN = 5.0  # 1/s, braking towards a place
_ASIDE = 7.0  # 1/s, how fast a tip that is off the line of pushing gets back onto it
_PUSHING = 1.0  # m/s, faster the thing slips off to one side between two ticks
CLEAR = 1.25  # of the contact distance: the way around keeps so far from the thing
_BEHIND = 0.55  # cosine of the angle off the line within which pushing begins


def push_velocity(tip: np.ndarray, thing: np.ndarray, target: np.ndarray, contact: float) -> np.ndarray:
    """Velocity [2] in m/s for a tip that is to push a round thing to a target.

    Args:
        tip, thing, target: positions [2] in metres.
        contact: distance of the centres when they touch.
    """
    way = target - thing
    left = float(np.linalg.norm(way))
    ahead = way / max(left, 1e-6)
    aside = np.array([-ahead[1], ahead[0]])
    offset = tip - thing
    distance = float(np.linalg.norm(offset))
    if float(-offset @ ahead) > _BEHIND * distance:
        # off the line the tip would push the thing aside: slower, and back onto the line
        off = float(offset @ aside)
        straight = max(0.0, 1.0 - 2.5 * abs(off) / contact)
        gap = max(distance - contact, 0.0)
        return ahead * straight * (min(_GAIN * left, _PUSHING) + _GAIN * gap) - aside * _ASIDE * off
    return _around(offset, ahead, distance, contact)


def _around(offset: np.ndarray, ahead: np.ndarray, distance: float, contact: float) -> np.ndarray:
    """Velocity on the way to the place behind the thing, along a circle where the thing is in between."""
    place = -CLEAR * contact * ahead
    to_place = place - offset
    along = float(np.clip(-offset @ to_place / max(to_place @ to_place, 1e-9), 0.0, 1.0))
    if np.linalg.norm(offset + along * to_place) > contact * 1.05:
        return _GAIN * to_place
    outward = offset / max(distance, 1e-6)
    turn = np.array([-outward[1], outward[0]])
    if turn @ to_place < 0:
        turn = -turn
    return turn * 10.0 + outward * _GAIN * 2 * (CLEAR * contact - distance)


class PushDriver(AxisDriver):
    """See `d4_sim.driver.AxisDriver`; the wrong driver does the other task."""

    def _towards(self, target: int, state: dict[str, Any]) -> np.ndarray:
        # Where the pusher will be when a command chosen now begins to bite.
        lead = state["pusher"] + state["velocity"] * MOTOR_LAG + state["command"] * (LATENCY_MS / 1000)
        if target == 1:
            return saturate(_GAIN * (state["target"] - lead) / SPEED_LIMIT)
        if np.linalg.norm(state["puck"] - state["target"]) < 0.02:
            return np.zeros(2)
        return saturate(push_velocity(lead, state["puck"], state["target"], CONTACT) / SPEED_LIMIT)
