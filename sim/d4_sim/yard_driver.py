"""How scripted drivers get the yard's base to a pad: straight, around the pit if they are careful."""

from __future__ import annotations

from typing import Any

import numpy as np

from d4_sim.driver import AxisDriver, saturate
from d4_sim.mujoco_world import LATENCY_MS, MOTOR_LAG, RATE_HZ
from d4_sim.yard import ROBOT_LIMIT, SPEED_LIMIT

_PERIOD = 1.0 / RATE_HZ
_GAIN = 6.0  # 1/s, braking towards a target
_PIT_BERTH = 0.36  # m, how far from the pit's centre a careful driver stays
_PIT_SIGHT = 0.9  # m, how far ahead the pit matters


class YardDriver(AxisDriver):
    """See `d4_sim.driver.AxisDriver`; every expert and a third of the others keep clear of the pit."""

    def __init__(self, kind: str, rng: np.random.Generator) -> None:
        super().__init__(kind, rng)
        self._careful = bool(rng.random() < 0.3) or kind == "expert"

    def _towards(self, target: int, state: dict[str, Any]) -> np.ndarray:
        """Full speed to the pad, braking on it, around the pit if careful."""
        goal = state["pads"][target]
        # Where the robot will be when a command chosen now begins to bite.
        lead = state["position"] + state["velocity"] * MOTOR_LAG + state["command"] * (LATENCY_MS / 1000)
        way = around(lead, goal, state["pit"]) if self._careful else goal
        offset = way - lead
        wanted = _GAIN * offset if way is goal else offset * 1e3  # no braking at waypoints
        # With its direction kept when an axis saturates, otherwise the path bends into the pit.
        return saturate(wanted / SPEED_LIMIT)

    def _restrain(self, command: np.ndarray, state: dict[str, Any]) -> np.ndarray:
        """Removes the part of a command that leads into the pit's surroundings, if careful."""
        if not self._careful:
            return command
        velocity = command * SPEED_LIMIT
        offset = state["position"] - state["pit"]
        distance = float(np.linalg.norm(offset))
        outward = offset / max(distance, 1e-6)
        closing = min(0.0, float(velocity @ outward))
        if distance + closing * 2 * _PERIOD > _PIT_BERTH:
            return command
        velocity = velocity - closing * outward + (0.4 * outward if distance < _PIT_BERTH else 0.0)
        return velocity / SPEED_LIMIT


def around(position: np.ndarray, goal: np.ndarray, pit: np.ndarray) -> np.ndarray:
    """`goal` itself if the straight way stays clear of the pit, else a waypoint beside it ([2], metres)."""
    way = goal - position
    length = float(np.linalg.norm(way))
    to_pit = pit - position
    distance = float(np.linalg.norm(to_pit))
    direction = way / max(length, 1e-9)
    along = float(to_pit @ direction)
    across = float(direction[0] * to_pit[1] - direction[1] * to_pit[0])
    if distance > _PIT_SIGHT + _PIT_BERTH or not 0.0 < along < length or abs(across) >= _PIT_BERTH:
        return goal
    if distance <= _PIT_BERTH:  # already too close: leave first, sliding towards the goal
        return position + 0.2 * (direction - 1.5 * to_pit / max(distance, 1e-9))
    # The tangent to the berth on the nearer side, unless that one leads through the wall.
    angle = np.arcsin(min(1.0, _PIT_BERTH / distance))
    reach = np.sqrt(distance**2 - _PIT_BERTH**2)
    sides = [-1.0, 1.0] if across > 0 else [1.0, -1.0]
    waypoints = []
    for side in sides:
        c, s = np.cos(side * angle), np.sin(side * angle)
        unit = to_pit / distance
        waypoints.append(position + reach * np.array([c * unit[0] - s * unit[1], s * unit[0] + c * unit[1]]))
    inside = [w for w in waypoints if np.abs(w).max() <= ROBOT_LIMIT]
    return inside[0] if inside else waypoints[0]
