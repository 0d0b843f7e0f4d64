"""The yard: a holonomic base under an overhead camera, two pads to reach, a pit to avoid (MuJoCo)."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_sim.world import Observation

if TYPE_CHECKING:
    import mujoco

TASKS = ("reach_red", "reach_blue")
RATE_HZ = 10
LATENCY_MS = 40
HORIZON = 30
IMAGE_SIZE = 64  # pixels, square
SPEED_LIMIT = 2.0  # m/s on each axis
ROBOT_LIMIT = 0.86  # m, the robot's centre; the joint range in yard.xml
PIT_RADIUS = 0.21  # m, the robot falls when its centre is this close
SUCCESS_RADIUS = 0.18  # m
REWARD_SCALE = 0.45  # m

# Where things are placed (|x|, |y| at most, metres) and how far apart.
_PAD_EXTENT, _PIT_EXTENT, _START_EXTENT = 0.77, 0.80, 0.84
_PAD_PAD, _PIT_PAD, _START_PIT = 0.80, 0.60, 0.55
_MOCAP_HEIGHT = 0.003

_HERE = Path(__file__).parent
_GL_HELP = (
    "install libegl1 and libgl1-mesa-dri (MUJOCO_GL=egl) or libosmesa6 (MUJOCO_GL=osmesa) with apt-get, "
    "or unset MUJOCO_GL to let d4 choose"
)


def choose_gl() -> str:
    """Sets and returns MUJOCO_GL: what the user asked for, else egl if its library loads, else osmesa."""
    # Mesa's software rasteriser draws pictures this small twice as fast without threads of its own.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    asked = os.environ.get("MUJOCO_GL")
    if asked is not None or not sys.platform.startswith("linux"):
        return asked or ""
    for name, library in (("egl", "libEGL.so.1"), ("osmesa", "libOSMesa.so.8")):
        try:
            ctypes.CDLL(library)
        except OSError:
            continue
        if "mujoco" in sys.modules:  # it has made its own choice by now, which needs a screen
            raise UserError(
                "MuJoCo was imported before d4 could choose how to render: "
                f"set MUJOCO_GL={name} and start again."
            )
        os.environ["MUJOCO_GL"] = name
        return name
    raise UserError(f"cannot render: neither EGL nor OSMesa is installed here, {_GL_HELP}.")


class _Camera:
    """The one GL context of this process: every yard has the same model, so all of them share it."""

    def __init__(self) -> None:
        backend = choose_gl()
        try:
            import mujoco

            self.model = mujoco.MjModel.from_xml_path(str(_HERE / "yard.xml"))
            self._renderer = mujoco.Renderer(self.model, IMAGE_SIZE, IMAGE_SIZE, max_geom=64)
        except (
            Exception
        ) as error:  # the GL stack raises ImportError, AttributeError, RuntimeError, GLError, ...
            raise UserError(
                f"cannot render with MUJOCO_GL={backend!r} ({type(error).__name__}): {_GL_HELP}."
            ) from error
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._renderer.scene.flags[flag] = 0

    def render(self, data: mujoco.MjData) -> np.ndarray:
        """The overhead picture, uint8 [64, 64, 3] RGB, a fresh array."""
        self._renderer.update_scene(data, camera="overhead")
        return self._renderer.render()


@functools.cache
def _camera() -> _Camera:
    return _Camera()


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


class Yard:
    """See `d4_sim.world.World`. Not thread-safe: all yards of a process draw with one GL context."""

    tasks = TASKS
    horizon = HORIZON
    success_reward = math.exp(-((SUCCESS_RADIUS / REWARD_SCALE) ** 2))
    action_low = np.full(2, -SPEED_LIMIT, np.float32)
    action_high = np.full(2, SPEED_LIMIT, np.float32)

    def __init__(self) -> None:
        self._camera = _camera()
        import mujoco

        self._mj = mujoco
        self._data = mujoco.MjData(self._camera.model)
        self._substeps = round(1.0 / RATE_HZ / self._camera.model.opt.timestep)
        self._late = round(LATENCY_MS / 1000 / self._camera.model.opt.timestep)
        self._pads = np.zeros((2, 2))
        self._pit = np.zeros(2)
        self._task = self._tick = 0
        self._fallen = False
        self._command = np.zeros(2, np.float32)

    @functools.cached_property
    def contract(self) -> Contract:
        """The yard's robot contract (yard.yaml)."""
        return Contract.load(_HERE / "yard.yaml")

    @property
    def pose(self) -> np.ndarray:
        """Robot position, float32 [2], metres in the arena frame."""
        return self._data.qpos.astype(np.float32)

    @property
    def rewards(self) -> np.ndarray:
        """exp(-(d / 0.45 m)^2) for every pad, float32 [2]; zeros once fallen."""
        if self._fallen:
            return np.zeros(2, np.float32)
        distance = np.linalg.norm(self._pads - self._data.qpos, axis=1)
        return np.exp(-np.square(distance / REWARD_SCALE)).astype(np.float32)

    def reset(self, seed: int, task: int) -> Observation:
        """Places everything for `seed` and returns frame 0; `task` is the pad that `success` asks for."""
        if not 0 <= task < len(TASKS):
            raise ValueError(f"task {task} is not in 0..{len(TASKS) - 1}")
        layout = sample_layout(np.random.default_rng(seed))
        self._pads, self._pit = layout["pads"], layout["pit"]
        self._task, self._tick, self._fallen = task, 0, False
        self._command = np.zeros(2, np.float32)
        self._mj.mj_resetData(self._camera.model, self._data)
        self._data.qpos[:] = layout["start"]
        self._data.mocap_pos[:2, :2] = self._pads
        self._data.mocap_pos[2, :2] = self._pit
        self._data.mocap_pos[:, 2] = _MOCAP_HEIGHT
        return self._observe()

    def step(self, action: np.ndarray) -> tuple[Observation, np.ndarray, bool, bool]:
        """Holds the previous command for 40 ms, then `action` (float32 [2], clipped) until the next tick."""
        for substep in range(self._substeps):
            if substep == self._late:
                self._command = np.clip(action, self.action_low, self.action_high).astype(np.float32)
            if self._fallen:
                break
            self._data.ctrl[:] = self._command
            self._mj.mj_step(self._camera.model, self._data)
            self._fallen = bool(np.hypot(*(self._data.qpos - self._pit)) < PIT_RADIUS)
        self._tick += 1
        return self._observe(), self.rewards, self._fallen, self._tick >= HORIZON

    def success(self) -> bool:
        """Standing within 0.18 m of the task's pad now, and not fallen."""
        distance = np.linalg.norm(self._pads[self._task] - self._data.qpos)
        return bool(distance < SUCCESS_RADIUS) and not self._fallen

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
            "fallen": self._fallen,
        }

    def _observe(self) -> Observation:
        # Positions are fresh after a reset or a step only once the kinematics have run again.
        self._mj.mj_kinematics(self._camera.model, self._data)
        self._mj.mj_camlight(self._camera.model, self._data)
        return Observation(self._camera.render(self._data))
