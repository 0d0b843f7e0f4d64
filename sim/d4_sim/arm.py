"""The arm: two links over a table, seen from above, whose tip is to reach one of two discs (MuJoCo)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from d4_sim.mujoco_world import RATE_HZ, MujocoWorld, Physics

if TYPE_CHECKING:
    from d4_sim.driver import Driver

SPEED_LIMIT = 2.0  # rad/s, each joint
BASE = np.array([0.0, -0.57])  # m, the shoulder
LINKS = np.array([0.65, 0.50])  # m
JOINT_LIMIT = np.array([0.80, 2.30])  # rad, shoulder and elbow either way; the joint ranges in arm.xml
SUCCESS_RADIUS = 0.15  # m
REWARD_SCALE = 0.37  # m

_DISC_DISC = 0.60  # m, least distance of the discs
_DISC_EXTENT = 0.84  # m, |x| of a disc at most, so that the picture holds all of it
# How far a disc is from the start, [least, most]: no episode is over at once, and none cannot be finished.
_START_DISC = (0.50, 0.95)  # m, from the tip
_START_TICKS = (3.5, 7.5)  # ticks at full speed
_MARGIN = 0.05  # rad, from what is drawn to the joint limits
_CANDIDATES = 128  # drawn at once; about one in a hundred is good
_MOCAP_HEIGHT = 0.003


def tip_of(joints: np.ndarray) -> np.ndarray:
    """Tip position [..., 2] in metres at the angles (shoulder, elbow) [..., 2]; zeros point along y."""
    angle = np.cumsum(joints, axis=-1)
    return BASE + np.stack([-np.sin(angle) @ LINKS, np.cos(angle) @ LINKS], axis=-1)


def mirrored(joints: np.ndarray) -> np.ndarray:
    """The other angles [..., 2] with the same tip: the elbow on the other side of the line to the tip."""
    shoulder, elbow = joints[..., 0], joints[..., 1]
    off_line = np.arctan2(LINKS[1] * np.sin(elbow), LINKS[0] + LINKS[1] * np.cos(elbow))
    return np.stack([shoulder + 2 * off_line, -elbow], axis=-1)


def joints_of(tip: np.ndarray, limit: np.ndarray = JOINT_LIMIT) -> np.ndarray:
    """The angles [n, 2] that put the tip there within the limits: n is 0 where out of reach, else 1 or 2."""
    x, y = tip - BASE
    first, second = LINKS
    cosine = (x * x + y * y - first**2 - second**2) / (2 * first * second)
    if abs(cosine) > 1.0:
        return np.zeros((0, 2))
    elbow = math.acos(cosine)
    straight = math.atan2(-x, y)
    one = np.array([straight - math.atan2(second * math.sin(elbow), first + second * cosine), elbow])
    both = np.stack([one, mirrored(one)])
    return both[(np.abs(both) <= limit).all(axis=1)]


def ticks_between(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Ticks at full speed from the angles `start` to the tip position of `end`, by the nearer elbow."""
    ways = np.stack([end, mirrored(end)])
    rad = np.abs(ways - start).max(axis=-1)
    possible = (np.abs(ways) <= JOINT_LIMIT).all(axis=-1)
    return np.where(possible, rad, np.inf).min(axis=0) / SPEED_LIMIT * RATE_HZ


def sample_layout(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draws joints [2] (rad) and discs [2, 2] (red, blue; metres), by rejection until all distances hold."""
    while True:
        angles = rng.uniform(-1.0, 1.0, (_CANDIDATES, 3, 2)) * (JOINT_LIMIT - _MARGIN)
        start, ends = angles[:, :1], angles[:, 1:]
        discs = tip_of(ends)
        good = np.linalg.norm(discs[:, 0] - discs[:, 1], axis=-1) >= _DISC_DISC
        good &= np.abs(discs[..., 0]).max(axis=1) <= _DISC_EXTENT
        good &= _within(np.linalg.norm(discs - tip_of(start), axis=-1), _START_DISC)
        good &= _within(ticks_between(start, ends), _START_TICKS)
        if good.any():
            first = good.argmax()
            return {"start": start[first, 0], "discs": discs[first]}


def _within(values: np.ndarray, bounds: tuple[float, float]) -> np.ndarray:
    return np.asarray(((values >= bounds[0]) & (values <= bounds[1])).all(axis=-1))


class Arm(MujocoWorld):
    """See `d4_sim.world.World`; nothing ends an episode before its time."""

    robot = "arm"
    tasks = ("reach_red", "reach_blue")
    success_reward = math.exp(-((SUCCESS_RADIUS / REWARD_SCALE) ** 2))
    action_low = np.full(2, -SPEED_LIMIT, np.float32)
    action_high = np.full(2, SPEED_LIMIT, np.float32)

    def __init__(self) -> None:
        super().__init__()
        self._discs = np.zeros((2, 2))

    @property
    def probes(self) -> dict[str, np.ndarray]:
        """tip: position of the tip, float32 [2], metres in the picture's frame."""
        return {"tip": tip_of(self._data.qpos).astype(np.float32)}

    @property
    def rewards(self) -> np.ndarray:
        """exp(-(d / 0.37 m)^2) of the tip for every disc, float32 [2]."""
        return np.exp(-np.square(self._distances() / REWARD_SCALE)).astype(np.float32)

    def success(self) -> bool:
        """The tip is within 0.15 m of the task's disc now."""
        return bool(self._distances()[self._task] < SUCCESS_RADIUS)

    def score(self, at: Physics, goal: int) -> np.ndarray:
        """The task's reward."""
        distance = np.linalg.norm(tip_of(at.qpos) - self._discs[goal], axis=-1)
        return np.exp(-np.square(distance / REWARD_SCALE))

    def state(self) -> dict[str, Any]:
        """Copies of joints, their velocity, command in force (rad, rad/s), discs [2, 2] (m); task, tick."""
        return {
            "joints": self._data.qpos.copy(),
            "velocity": self._data.qvel.copy(),
            "command": self._command.copy(),
            "discs": self._discs.copy(),
            "task": self._task,
            "tick": self._tick,
        }

    def driver(self, kind: str, rng: np.random.Generator) -> Driver:
        """A scripted driver of the joints."""
        from d4_sim.arm_driver import ArmDriver

        return ArmDriver(kind, rng)

    def _place(self, rng: np.random.Generator) -> None:
        layout = sample_layout(rng)
        self._discs = layout["discs"]
        self._data.qpos[:] = layout["start"]
        self._data.mocap_pos[:, :2] = self._discs
        self._data.mocap_pos[:, 2] = _MOCAP_HEIGHT

    def _vectors(self) -> dict[str, np.ndarray]:
        return {"joints": self._data.qpos.astype(np.float32)}

    def _distances(self) -> np.ndarray:
        return np.linalg.norm(self._discs - tip_of(self._data.qpos), axis=1)
