"""The yard: a holonomic base under an overhead camera, two pads to reach, a pit to avoid (MuJoCo)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from d4_sim.mujoco_world import MujocoWorld, Physics

if TYPE_CHECKING:
    import mujoco

    from d4_sim.driver import Driver

SPEED_LIMIT = 2.0  # m/s on each axis
ROBOT_LIMIT = 0.86  # m, the robot's centre; the joint range in yard.xml
PIT_RADIUS = 0.21  # m, the robot falls when its centre is this close
SUCCESS_RADIUS = 0.18  # m
REWARD_SCALE = 0.45  # m

# Where things are placed (|x|, |y| at most, metres) and how far apart.
_PAD_EXTENT, _PIT_EXTENT, _START_EXTENT = 0.77, 0.80, 0.84
_PAD_PAD, _PIT_PAD, _START_PIT = 0.80, 0.60, 0.55
_MOCAP_HEIGHT = 0.003

# The look of `YardDusk`: red, green, blue of the materials in yard.xml. A texture is multiplied by them.
_DUSK = {
    "floor": (0.34, 0.40, 0.62),
    "paint": (0.42, 0.30, 0.50),
    "wall": (0.80, 0.62, 0.30),
    "red": (1.00, 0.45, 0.20),
    "blue": (0.10, 0.70, 0.85),
    "black": (0.80, 0.78, 0.70),
    "yellow": (0.30, 0.85, 0.35),
    "dark": (0.95, 0.95, 1.00),
}
_DUSK_LIGHT = (0.85, 0.78, 0.80)
_DUSK_TILES = 7.0  # repeats of the floor's texture, in both directions


def sample_layout(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draws start, pads [2, 2] (red, blue) and pit in metres, by rejection until all distances hold."""
    while True:
        pads = rng.uniform(-_PAD_EXTENT, _PAD_EXTENT, (2, 2))
        pit = rng.uniform(-_PIT_EXTENT, _PIT_EXTENT, 2)
        start = rng.uniform(-_START_EXTENT, _START_EXTENT, 2)
        if np.linalg.norm(pads[0] - pads[1]) < _PAD_PAD:
            continue
        if np.linalg.norm(pads - pit, axis=1).min() >= _PIT_PAD and np.linalg.norm(start - pit) >= _START_PIT:
            return {"start": start, "pads": pads, "pit": pit}


class Yard(MujocoWorld):
    """See `d4_sim.world.World`; the pit ends an episode."""

    robot = "yard"
    tasks = ("reach_red", "reach_blue")
    success_reward = math.exp(-((SUCCESS_RADIUS / REWARD_SCALE) ** 2))
    action_low = np.full(2, -SPEED_LIMIT, np.float32)
    action_high = np.full(2, SPEED_LIMIT, np.float32)

    def __init__(self) -> None:
        super().__init__()
        self._pads = np.zeros((2, 2))
        self._pit = np.zeros(2)

    @property
    def probes(self) -> dict[str, np.ndarray]:
        """pose: robot position, float32 [2], metres in the arena frame."""
        return {"pose": self._data.qpos.astype(np.float32)}

    @property
    def rewards(self) -> np.ndarray:
        """exp(-(d / 0.45 m)^2) for every pad, float32 [2]; zeros once fallen."""
        if self._over:
            return np.zeros(2, np.float32)
        distance = np.linalg.norm(self._pads - self._data.qpos, axis=1)
        return np.exp(-np.square(distance / REWARD_SCALE)).astype(np.float32)

    def success(self) -> bool:
        """Standing within 0.18 m of the task's pad now, and not fallen."""
        distance = np.linalg.norm(self._pads[self._task] - self._data.qpos)
        return bool(distance < SUCCESS_RADIUS) and not self._over

    def score(self, at: Physics, goal: int) -> np.ndarray:
        """The task's reward, nothing from the pit on."""
        distance = np.linalg.norm(at.qpos - self._pads[goal], axis=-1)
        is_up = np.linalg.norm(at.qpos - self._pit, axis=-1) >= PIT_RADIUS
        return np.exp(-np.square(distance / REWARD_SCALE)) * np.cumprod(is_up, axis=-1)

    def state(self) -> dict[str, Any]:
        """Copies of position, velocity, command in force, pads [2, 2], pit; task, tick, fallen (m, m/s)."""
        return {
            "position": self._data.qpos.copy(),
            "velocity": self._data.qvel.copy(),
            "command": self._command.copy(),
            "pads": self._pads.copy(),
            "pit": self._pit.copy(),
            "task": self._task,
            "tick": self._tick,
            "fallen": self._over,
        }

    def driver(self, kind: str, rng: np.random.Generator) -> Driver:
        """A scripted driver of the base."""
        from d4_sim.yard_driver import YardDriver

        return YardDriver(kind, rng)

    def _place(self, rng: np.random.Generator) -> None:
        layout = sample_layout(rng)
        self._pads, self._pit = layout["pads"], layout["pit"]
        self._data.qpos[:] = layout["start"]
        self._data.mocap_pos[:2, :2] = self._pads
        self._data.mocap_pos[2, :2] = self._pit
        self._data.mocap_pos[:, 2] = _MOCAP_HEIGHT

    def _is_over(self) -> bool:
        return bool(np.hypot(*(self._data.qpos - self._pit)) < PIT_RADIUS)


class YardDusk(Yard):
    """The same yard with other colours, floor and light: the same robot in other bags."""

    @classmethod
    def dress(cls, model: mujoco.MjModel) -> None:
        """Repaints every material, makes the floor's tiles smaller and the light dimmer."""
        for name, colour in _DUSK.items():
            model.mat(name).rgba[:3] = colour
        model.mat("floor").texrepeat[:] = _DUSK_TILES
        model.vis.headlight.ambient[:] = _DUSK_LIGHT
