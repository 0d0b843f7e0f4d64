"""A Fetch arm at a table with a block: one agent that moves its gripper, or the block, to the red spot.

The model is that of gymnasium-robotics (FetchPush), and so are the places, the spread of block and target and
the 5 cm of success. What differs: commands are velocities of the gripper at 10 Hz (metres per second, three
axes, the fingers stay shut) that take hold after 40 ms, the camera is near, rewards are smooth.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from d4_sim.mujoco_world import MujocoWorld
from d4_sim.suite.files import FETCH, model_file

if TYPE_CHECKING:
    import mujoco

    from d4_sim.driver import Driver

SPEED_LIMIT = 0.6  # m/s on each axis
SUCCESS_RADIUS = 0.05  # m
REWARD_SCALE = 0.10  # m
TABLE = 0.425  # m, height of the block's middle when it lies on the table

_HOME = np.array([1.3419, 0.7491, TABLE + 0.1])  # m, the gripper at the start
_SPREAD = 0.15  # m, block and target from there, on both axes
_LEAST = 0.10  # m, block from the gripper, and block from the target
_LOW = np.array([1.10, 0.45, TABLE - 0.005])  # m, where the gripper may be sent
_HIGH = np.array([1.52, 1.05, TABLE + 0.20])
_BASE = {"robot0:slide0": 0.405, "robot0:slide1": 0.48}  # m, where the robot stands
_GRIPPER_DOWN = (1.0, 0.0, 1.0, 0.0)
_SETTLE = 600  # substeps from the model's pose to `_HOME`
_LOOK = {"pos": (1.86, 0.75, 1.22), "target": (1.30, 0.75, 0.44), "fovy": 37.0}


class Fetch(MujocoWorld):
    """See `d4_sim.world.World`; nothing ends an episode before its time."""

    robot = "fetch"
    folder = Path(__file__).parent
    camera = "near"
    most_geoms = 300
    horizon = 50
    tasks = ("reach", "push")
    success_reward = math.exp(-((SUCCESS_RADIUS / REWARD_SCALE) ** 2))
    action_low = np.full(3, -SPEED_LIMIT, np.float32)
    action_high = np.full(3, SPEED_LIMIT, np.float32)

    def __init__(self) -> None:
        super().__init__()
        self._target = np.zeros(3)
        self._dt = float(self.model.opt.timestep)

    @classmethod
    def build(cls) -> mujoco.MjModel:
        """The model with a camera near the table; the gripper follows the mocap body exactly."""
        import mujoco

        spec = mujoco.MjSpec.from_file(str(model_file(FETCH, "push.xml")))
        position = np.array(_LOOK["pos"])
        back = position - _LOOK["target"]
        right = np.cross([0.0, 0.0, 1.0], back)
        up = np.cross(back, right)
        axes = np.stack([axis / np.linalg.norm(axis) for axis in (right, up, back)], 1)
        quat = np.zeros(4)
        mujoco.mju_mat2Quat(quat, axes.ravel())
        spec.worldbody.add_camera(name="near", pos=position, quat=quat, fovy=_LOOK["fovy"])
        model = spec.compile()
        model.eq_data[0, 3:10] = [0, 0, 0, 1, 0, 0, 0]
        return model

    @classmethod
    def dress(cls, model: mujoco.MjModel) -> None:
        """No crosshair of the mocap body in the picture; a spot and a block that are seen at this size."""
        body = model.body("robot0:mocap").id
        model.geom_rgba[model.geom_bodyid == body, 3] = 0
        model.site("target0").size[:] = 0.03
        model.site("object0").rgba[3] = 0
        model.mat("block_mat").rgba[:3] = 0.05, 0.15, 0.9

    @property
    def probes(self) -> dict[str, np.ndarray]:
        """block: its position, float32 [2], metres."""
        return {"block": self._block()[:2].astype(np.float32)}

    @property
    def rewards(self) -> np.ndarray:
        """exp(-(d / 0.10 m)^2) of the gripper, and of the block, to the spot, float32 [2]."""
        return np.exp(-np.square(self._distances() / REWARD_SCALE)).astype(np.float32)

    def success(self) -> bool:
        """The gripper, or the block, is within 5 cm of the spot now."""
        return bool(self._distances()[self._task] < SUCCESS_RADIUS)

    def state(self) -> dict[str, Any]:
        """Copies of gripper, block, target (m), the command in force (m/s); task, tick."""
        return {
            "gripper": self._gripper(),
            "block": self._block(),
            "target": self._target.copy(),
            "command": self._command.copy(),
            "task": self._task,
            "tick": self._tick,
        }

    def driver(self, kind: str, rng: np.random.Generator) -> Driver:
        """A scripted driver of the gripper."""
        from d4_sim.suite.fetch_driver import FetchDriver

        return FetchDriver(kind, rng)

    @functools.cached_property
    def _rest(self) -> dict[str, np.ndarray]:
        """The robot with its gripper at home."""
        mj, model, data = self._mj, self.model, self._mj.MjData(self.model)
        for name, value in _BASE.items():
            data.joint(name).qpos[0] = value
        data.joint("object0:joint").qpos[:3] = _HOME[0] - 0.1, _HOME[1], TABLE
        mj.mj_forward(model, data)
        grip = data.site("robot0:grip").xpos - data.body("robot0:gripper_link").xpos
        data.mocap_pos[0], data.mocap_quat[0] = data.body("robot0:gripper_link").xpos, _GRIPPER_DOWN
        for step in range(2 * _SETTLE):
            if step == _SETTLE:  # pointing down by now
                grip = data.site("robot0:grip").xpos - data.body("robot0:gripper_link").xpos
            data.mocap_pos[0] += 0.02 * (_HOME - grip - data.mocap_pos[0])
            mj.mj_step(model, data)
        return {"qpos": data.qpos.copy(), "mocap": data.mocap_pos.copy(), "grip": grip.copy()}

    def _place(self, rng: np.random.Generator) -> None:
        data, rest = self._data, self._rest
        while True:
            block, target = _HOME[:2] + rng.uniform(-_SPREAD, _SPREAD, (2, 2))
            away = min(np.linalg.norm(block - _HOME[:2]), np.linalg.norm(block - target))
            if away >= _LEAST:
                break
        data.qpos[:], data.mocap_pos[:], data.mocap_quat[0] = rest["qpos"], rest["mocap"], _GRIPPER_DOWN
        data.joint("object0:joint").qpos[:] = *block, TABLE, 1.0, 0.0, 0.0, 0.0
        self._target = np.array([*target, TABLE])

    def _actuate(self) -> None:
        grip = self._rest["grip"]
        place = self._data.mocap_pos[0] + self._command * self._dt
        self._data.mocap_pos[0] = np.clip(place + grip, _LOW, _HIGH) - grip

    def _refresh(self) -> None:
        # all worlds of the class draw with one model, each with its own spot in it
        self.model.site("target0").pos[:] = self._target - self.model.body("floor0").pos
        super()._refresh()

    def _vectors(self) -> dict[str, np.ndarray]:
        return {"gripper": self._gripper().astype(np.float32)}

    def _gripper(self) -> np.ndarray:
        return self._data.site("robot0:grip").xpos.copy()

    def _block(self) -> np.ndarray:
        return self._data.joint("object0:joint").qpos[:3].copy()

    def _distances(self) -> np.ndarray:
        return np.linalg.norm(np.stack([self._gripper(), self._block()]) - self._target, axis=1)
