"""The puck: a round pusher on a table with two tasks, the puck onto the disc, or the pusher itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from d4_sim.mujoco_world import MujocoWorld, Physics

if TYPE_CHECKING:
    from d4_sim.driver import Driver

SPEED_LIMIT = 1.5  # m/s on each axis
CONTACT = 0.23  # m, between the centres when pusher and puck touch; the radii in push.xml
SUCCESS_RADIUS = 0.12  # m
REWARD_SCALE = 0.40  # m

_EXTENT = 0.72  # m, |x| and |y| at most of everything at the start
_PUCK_TARGET = (0.45, 1.1)  # m, [least, most]
_PUSHER_AWAY = 0.40  # m, at least, from the puck and from the target
_MOCAP_HEIGHT = 0.003


def sample_layout(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draws pusher, puck and target [2] in metres, by rejection until all distances hold."""
    while True:
        pusher, puck, target = rng.uniform(-_EXTENT, _EXTENT, (3, 2))
        near, far = _PUCK_TARGET
        if not near <= np.linalg.norm(puck - target) <= far:
            continue
        if min(np.linalg.norm(pusher - puck), np.linalg.norm(pusher - target)) >= _PUSHER_AWAY:
            return {"pusher": pusher, "puck": puck, "target": target}


class Push(MujocoWorld):
    """See `d4_sim.world.World`; nothing ends an episode before its time."""

    robot = "push"
    folder = Path(__file__).parent
    horizon = 60
    tasks = ("push", "reach")
    success_reward = math.exp(-((SUCCESS_RADIUS / REWARD_SCALE) ** 2))
    action_low = np.full(2, -SPEED_LIMIT, np.float32)
    action_high = np.full(2, SPEED_LIMIT, np.float32)
    moved: ClassVar[str] = "pusher"  # what commands move, as `state` calls it; in m, m/s

    def __init__(self) -> None:
        super().__init__()
        self._target = np.zeros(2)

    @property
    def probes(self) -> dict[str, np.ndarray]:
        """pusher, puck: their positions, float32 [2], metres in the picture's frame."""
        qpos = self._data.qpos.astype(np.float32)
        return {"puck": qpos[:2], "pusher": qpos[2:]}

    @property
    def rewards(self) -> np.ndarray:
        """exp(-(d / 0.40 m)^2) of the puck, and of the pusher, to the disc, float32 [2]."""
        return np.exp(-np.square(self._distances(self._data.qpos) / REWARD_SCALE)).astype(np.float32)

    def success(self) -> bool:
        """The puck, or the pusher, is within 0.12 m of the disc's centre now."""
        return bool(self._distances(self._data.qpos)[self._task] < SUCCESS_RADIUS)

    def score(self, at: Physics, goal: int) -> np.ndarray:
        """The task's reward, and for pushing that the pusher is where it can push from."""
        distance = self._distances(at.qpos)[..., goal]
        reward = np.exp(-np.square(distance / REWARD_SCALE))
        if goal == 1:
            return reward
        puck, pusher = at.qpos[..., :2], self._pusher(at.qpos)
        way = self._target - puck
        behind = puck - CONTACT * way / np.maximum(np.linalg.norm(way, axis=-1, keepdims=True), 1e-6)
        return 2 * reward - 0.5 * np.linalg.norm(behind - pusher, axis=-1)

    def state(self) -> dict[str, Any]:
        """Copies of puck and target (m), of `moved`, its velocity and the command in force; task, tick."""
        return {
            "puck": self._data.qpos[:2].copy(),
            self.moved: self._data.qpos[2:].copy(),
            "velocity": self._data.qvel[2:].copy(),
            "command": self._command.copy(),
            "target": self._target.copy(),
            "task": self._task,
            "tick": self._tick,
        }

    def driver(self, kind: str, rng: np.random.Generator) -> Driver:
        """A scripted driver of the pusher."""
        from d4_sim.suite.push_driver import PushDriver

        return PushDriver(kind, rng)

    def _place(self, rng: np.random.Generator) -> None:
        self._data.qpos[:], self._target = self._draw(rng)
        self._data.mocap_pos[0] = *self._target, _MOCAP_HEIGHT

    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Positions of puck and pusher as the model has them, and the target [2] in metres."""
        layout = sample_layout(rng)
        return np.concatenate([layout["puck"], layout["pusher"]]), layout["target"]

    @staticmethod
    def _pusher(qpos: np.ndarray) -> np.ndarray:
        """Where the pusher is, [..., 2] in metres."""
        return qpos[..., 2:]

    def _distances(self, qpos: np.ndarray) -> np.ndarray:
        """Of puck and pusher to the target, [..., 2] in metres."""
        both = np.stack([qpos[..., :2], self._pusher(qpos)], -2)
        return np.linalg.norm(both - self._target, axis=-1)
