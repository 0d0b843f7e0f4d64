"""The arm that pushes: two links over a table, whose tip moves a puck onto the disc, or itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from d4_sim.arm import BASE, joints_of, tip_of
from d4_sim.suite.push import CONTACT, Push
from d4_sim.suite.push import sample_layout as sample_places
from d4_sim.suite.push_driver import CLEAR

if TYPE_CHECKING:
    from d4_sim.driver import Driver

SPEED_LIMIT = 1.5  # rad/s, each joint
JOINT_LIMIT = np.array([2.3, 2.4])  # rad, shoulder and elbow either way; the joint ranges in arm_push.xml

_FAR = (0.60, 1.05)  # m, [least, most] from the shoulder to where the tip has work
_BEARING = 1.3  # rad, either way from straight ahead, at most
_BEHIND = CLEAR * CONTACT  # m, from the puck to where pushing begins


def sample_layout(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draws joints [2] (rad), puck and target [2] (m), by rejection until the arm can do both tasks.

    The start and the whole way from behind the puck to the target are within reach of either elbow.
    """
    while True:
        places = sample_places(rng)
        puck, target = places["puck"], places["target"]
        behind = puck - _BEHIND * (target - puck) / np.linalg.norm(target - puck)
        way = behind + np.linspace(0.0, 1.0, 9)[:, None] * (target - behind)
        if _within_reach(np.vstack([way, places["pusher"]])).all():
            left_or_right = joints_of(places["pusher"], JOINT_LIMIT)
            return {"joints": left_or_right[rng.integers(2)], "puck": puck, "target": target}


def _within_reach(tips: np.ndarray) -> np.ndarray:
    """Whether the tip can work at these places [n, 2], with the elbow to either side: bool [n]."""
    offset = tips - BASE
    far = np.linalg.norm(offset, axis=-1)
    bearing = np.arctan2(offset[:, 0], offset[:, 1])
    return np.asarray((far >= _FAR[0]) & (far <= _FAR[1]) & (np.abs(bearing) <= _BEARING))


class ArmPush(Push):
    """See `d4_sim.suite.push.Push`; the tip of an arm is the pusher."""

    robot = "arm_push"
    action_low = np.full(2, -SPEED_LIMIT, np.float32)
    action_high = np.full(2, SPEED_LIMIT, np.float32)
    moved = "joints"  # in rad, rad/s

    @property
    def probes(self) -> dict[str, np.ndarray]:
        """puck, tip: their positions, float32 [2], metres in the picture's frame."""
        qpos = self._data.qpos
        return {"puck": qpos[:2].astype(np.float32), "tip": tip_of(qpos[2:]).astype(np.float32)}

    def driver(self, kind: str, rng: np.random.Generator) -> Driver:
        """A scripted driver of the joints."""
        from d4_sim.suite.arm_push_driver import ArmPushDriver

        return ArmPushDriver(kind, rng)

    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        layout = sample_layout(rng)
        return np.concatenate([layout["puck"], layout["joints"]]), layout["target"]

    def _vectors(self) -> dict[str, np.ndarray]:
        return {"joints": self._data.qpos[2:].astype(np.float32)}

    @staticmethod
    def _pusher(qpos: np.ndarray) -> np.ndarray:
        return tip_of(qpos[..., 2:])
