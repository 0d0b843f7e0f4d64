"""What worlds made with MuJoCo share: how they draw, when a command takes hold, when an episode ends."""

from __future__ import annotations

import abc
import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_sim.world import Observation, resized

if TYPE_CHECKING:
    import mujoco

    from d4_sim.driver import Driver

# of a world that does not say otherwise
RATE_HZ = 10
LATENCY_MS = 40
HORIZON = 30
IMAGE_SIZE = 64  # pixels, square
MOTOR_LAG = 0.04  # s, time constant of every actuator: inertia / kv in the models

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


@contextlib.contextmanager
def _rendering(backend: str) -> Iterator[None]:
    """Whatever the GL stack raises (ImportError, AttributeError, RuntimeError, GLError) as a UserError."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"cannot render with MUJOCO_GL={backend!r} ({type(error).__name__}): {_GL_HELP}."
        ) from error


def _model(world: type[MujocoWorld], look: int | None) -> mujoco.MjModel:
    """The compiled model in its look. Raises UserError where this version of MuJoCo cannot make it."""
    from d4_sim.suite.looks import repaint

    try:
        model = world.build()
        world.dress(model)
        if look is not None:
            repaint(model, look)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        why = " ".join(str(error).split())
        raise UserError(
            f"MuJoCo {version('mujoco')} cannot make the model of {world.__name__} ({why}): docs/mujoco.md "
            "names versions that work."
        ) from error
    return model


class _Camera:
    """A model and the GL context that draws it, shared by all worlds of one class in this process."""

    def __init__(self, world: type[MujocoWorld], look: int | None = None) -> None:
        backend, self._name, size = choose_gl(), world.camera, world.image_size
        with _rendering(backend):
            import mujoco
        self.model = _model(world, look)
        canvas = self.model.vis.global_
        canvas.offwidth, canvas.offheight = max(canvas.offwidth, size), max(canvas.offheight, size)
        # it lives as long as the process, at whose end MuJoCo 4.0's own destructor complains
        lasting = type("Renderer", (mujoco.Renderer,), {"__del__": lambda self: None})
        with _rendering(backend):
            self._renderer = lasting(self.model, size, size, max_geom=world.most_geoms)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._renderer.scene.flags[flag] = 0

    def render(self, data: mujoco.MjData) -> np.ndarray:
        """The world's picture, uint8 [H, W, 3] RGB, a fresh array."""
        self._renderer.update_scene(data, camera=self._name)
        return self._renderer.render()


@functools.cache
def _camera(world: type[MujocoWorld], look: int | None = None) -> _Camera:
    return _Camera(world, look)


@functools.cache
def _at_size(world: type[MujocoWorld], size: int) -> type[MujocoWorld]:
    return type(f"{world.__name__}{size}", (world,), {"image_size": size})


@dataclass(frozen=True)
class Physics:
    """Physical states of any leading shape, as `MujocoWorld.score` judges them."""

    qpos: np.ndarray  # [..., nq]
    qvel: np.ndarray  # [..., nv]
    ctrl: np.ndarray  # [..., nu], in force when the state was reached
    sensors: np.ndarray  # [..., nsensordata]


class MujocoWorld(abc.ABC):
    """A `d4_sim.world.World` from an MJCF with a camera, whose actuators take the action as it is.

    Not thread-safe: all worlds of one class in a process draw with one GL context.
    """

    robot: ClassVar[str]  # <robot>.yaml, and <robot>.xml where the model is our own, lie in `folder`
    folder: ClassVar[Path] = Path(__file__).parent
    camera: ClassVar[str] = "overhead"
    rate_hz: ClassVar[float] = RATE_HZ
    latency_ms: ClassVar[float] = LATENCY_MS
    image_size: ClassVar[int] = IMAGE_SIZE
    most_geoms: ClassVar[int] = 64  # that may be in the picture
    goals: ClassVar[int | None] = None  # of `score`; None: the tasks alone
    horizon = HORIZON
    tasks: tuple[str, ...]
    success_reward: float
    action_low: np.ndarray
    action_high: np.ndarray

    def __init__(self) -> None:
        self._camera = _camera(type(self))
        import mujoco

        self._mj = mujoco
        self._data = mujoco.MjData(self._camera.model)
        self._substeps = round(1.0 / self.rate_hz / self._camera.model.opt.timestep)
        self._late = round(self.latency_ms / 1000 / self._camera.model.opt.timestep)
        self._task = self._tick = 0
        self._over = False
        self._command = np.zeros_like(self.action_low)

    @classmethod
    def contract_path(cls) -> Path:
        """The contract file of this world."""
        return cls.folder / f"{cls.robot}.yaml"

    @classmethod
    def build(cls) -> mujoco.MjModel:
        """The compiled model."""
        import mujoco

        return mujoco.MjModel.from_xml_path(str(cls.folder / f"{cls.robot}.xml"))

    @classmethod  # noqa: B027  (not abstract: most worlds look as their file says)
    def dress(cls, model: mujoco.MjModel) -> None:
        """Changes the look of the model before anything is drawn."""

    @functools.cached_property
    def contract(self) -> Contract:
        """The robot contract of this world."""
        return resized(Contract.load(self.contract_path()), self.image_size)

    @classmethod
    def at_size(cls, size: int) -> type[MujocoWorld]:
        """This world in pictures of `size` x `size` pixels. Raises UserError for a size that is none."""
        if not 32 <= size <= 512 or size % 8:
            raise UserError(f"pictures of {size} pixels: choose a multiple of 8 from 32 to 512.")
        return _at_size(cls, size)

    @property
    @abc.abstractmethod
    def probes(self) -> dict[str, np.ndarray]:
        """What the contract's probes measure now, float32 [k] by name."""

    @property
    @abc.abstractmethod
    def rewards(self) -> np.ndarray:
        """Reward of every task that arrives with the current frame, float32 [K]."""

    @abc.abstractmethod
    def success(self) -> bool:
        """Whether the current state counts as success of the current task."""

    @abc.abstractmethod
    def state(self) -> dict[str, Any]:
        """Privileged state for scripted drivers and tests."""

    @abc.abstractmethod
    def driver(self, kind: str, rng: np.random.Generator) -> Driver:
        """A scripted driver of this robot for one episode (see `d4_sim.driver`)."""

    @abc.abstractmethod
    def _place(self, rng: np.random.Generator) -> None:
        """Draws a layout and puts the freshly reset model there."""

    def redress(self, look: int) -> None:
        """Other colours, textures and lights from now on, a set of them for every number (`d4_sim.suite`)."""
        self._camera = _camera(type(self), look)

    def _is_over(self) -> bool:
        """Whether the state that has just been reached ends the episode for good."""
        return False

    def _vectors(self) -> dict[str, np.ndarray]:
        """Proprioception that the models see, float32 [k] by name."""
        return {}

    def reset(self, seed: int, task: int) -> Observation:
        """Places everything for `seed` and returns frame 0; `task` is the one that `success` asks for."""
        if not 0 <= task < len(self.tasks):
            raise ValueError(f"task {task} is not in 0..{len(self.tasks) - 1}")
        self._task, self._tick, self._over = task, 0, False
        self._command = np.zeros_like(self.action_low)
        self._mj.mj_resetData(self._camera.model, self._data)
        self._place(np.random.default_rng(seed))
        return self._observe()

    def step(self, action: np.ndarray) -> tuple[Observation, np.ndarray, bool, bool]:
        """Holds the previous command for the latency, then `action` (float32 [A], clipped) to the end."""
        self.advance(self._late)
        self.command(action)
        self.advance(self._substeps - self._late)
        return self.frame()

    # -- the parts of a step, for worlds that run by the clock --

    @property
    def timestep_ns(self) -> int:
        """Nanoseconds of one substep."""
        return round(1e9 * self._camera.model.opt.timestep)

    def command(self, action: np.ndarray) -> None:
        """From now on `action` (float32 [A], clipped) is in force."""
        self._command = np.clip(action, self.action_low, self.action_high).astype(np.float32)

    def advance(self, substeps: int) -> None:
        """Moves on under the command in force; nothing moves once the episode is over."""
        for _ in range(substeps):
            if self._over:
                return
            self._actuate()
            self._mj.mj_step(self._camera.model, self._data)
            self._over = self._is_over()

    def frame(self) -> tuple[Observation, np.ndarray, bool, bool]:
        """The next tick's (observation, reward float32 [K], terminal, truncated), as it is now."""
        self._tick += 1
        return self._observe(), self.rewards, self._over, self._tick >= self.horizon

    def _actuate(self) -> None:
        """Hands the command in force to the model."""
        self._data.ctrl[:] = self._command

    def _refresh(self) -> None:
        """Positions are fresh after a reset or a step only once the kinematics have run again."""
        self._mj.mj_kinematics(self._camera.model, self._data)
        self._mj.mj_camlight(self._camera.model, self._data)

    def _observe(self) -> Observation:
        self._refresh()
        return Observation(self._camera.render(self._data), self._vectors())

    # -- what a planner on the true simulator needs --

    @property
    def model(self) -> mujoco.MjModel:
        """The compiled model; worlds of one class share it, so that nobody may change it."""
        return self._camera.model

    @property
    def in_force(self) -> np.ndarray:
        """The command in force, float32 [A]."""
        return self._command

    @property
    def substeps(self) -> tuple[int, int]:
        """Substeps of a tick, and those of them before a new command takes hold."""
        return self._substeps, self._late

    def physics(self) -> np.ndarray:
        """The state that decides what happens next (mjSTATE_FULLPHYSICS): time, qpos, qvel, ..."""
        kind = self._mj.mjtState.mjSTATE_FULLPHYSICS
        out = np.zeros(self._mj.mj_stateSize(self.model, kind))
        self._mj.mj_getState(self.model, self._data, out, kind)
        return out

    def score(self, at: Physics, goal: int) -> np.ndarray:
        """How good these states [..., T, :] are for goal number `goal`, float [..., T]; a planner adds it up.

        The first goals are the tasks, others are what a driver does that was given the wrong one.
        Raises UserError if nobody has said what is good in this world.
        """
        raise UserError(f"the world {self.contract.name} does not say what a planner should do in it.")
