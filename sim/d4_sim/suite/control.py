"""Tasks of the DeepMind control suite on their own models (MJCF of dm_control), slower and shorter.

Physics, start states and rewards are those of dm_control 1.0.41, which tests compare with what it gave. What
differs: a command lasts 50 or 100 ms and takes hold after 20 ms, and episodes last a few seconds instead of
10 to 25. Returns are sums over these fewer ticks; scores of other publications do not compare.
"""

from __future__ import annotations

import abc
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from d4_sim.mujoco_world import MujocoWorld, Physics
from d4_sim.suite.files import DM_CONTROL, model_file
from d4_sim.suite.planner import MppiConfig

if TYPE_CHECKING:
    import mujoco

    from d4_sim.driver import Driver

_GAUSSIAN_AT_MARGIN = 0.1


def near(
    x: np.ndarray, low: float, high: float, margin: float = 0.0, at_margin: float | None = None
) -> np.ndarray:
    """1 within [low, high], falling to `at_margin` at a distance of `margin` outside; 0 there without margin.

    It falls as a Gaussian through 0.1, or along a line where `at_margin` is given: that of the suite's
    rewards, whose line goes on to 0.
    """
    outside = np.maximum(np.maximum(low - x, x - high), 0.0)
    if margin == 0.0:
        return (outside == 0.0).astype(float)
    share = outside / margin
    if at_margin is None:
        return np.exp(math.log(_GAUSSIAN_AT_MARGIN) * share**2)
    return np.maximum(1.0 - (1.0 - at_margin) * share, 0.0)


class ControlWorld(MujocoWorld):
    """What these worlds share: files, clock, pictures by the suite's cameras, and the planner as expert.

    A subclass says what the rewards of a state are (`reward_of`), what the planner pursues (`score`), and how
    an episode begins (`_place`). Nothing ends an episode before its time.
    """

    folder = Path(__file__).parent
    rate_hz = 20
    latency_ms = 20
    most_geoms = 200
    camera = "fixed"
    horizon = 100
    success_reward = 0.9
    planning: ClassVar[MppiConfig] = MppiConfig()
    # what the probe measures, by name; a property of the state that a picture shows
    shown: ClassVar[dict[str, Callable[[Physics], np.ndarray]]]

    @classmethod
    def source(cls) -> str:
        """Name of the MJCF file."""
        return f"{cls.robot}.xml"

    @classmethod
    def build(cls) -> mujoco.MjModel:
        """The compiled model."""
        import mujoco

        path = str(model_file(DM_CONTROL, cls.source()))
        # or MuJoCo writes that the cheetah uses an old word into a file in the folder one is in
        mujoco.set_mju_user_warning(logging.getLogger(__name__).debug)
        try:
            return mujoco.MjModel.from_xml_path(path)
        finally:
            mujoco.set_mju_user_warning(None)

    @abc.abstractmethod
    def reward_of(self, at: Physics) -> np.ndarray:
        """Rewards of all tasks in states [..., :], float [..., K]."""

    def score(self, at: Physics, goal: int) -> np.ndarray:
        """See `MujocoWorld.score`; here the reward of the task."""
        return self.reward_of(at)[..., goal]

    @property
    def now(self) -> Physics:
        """The present state."""
        data = self._data
        return Physics(data.qpos.copy(), data.qvel.copy(), data.ctrl.copy(), data.sensordata.copy())

    @property
    def rewards(self) -> np.ndarray:
        """Reward of every task in the present state, float32 [K]."""
        return np.asarray(self.reward_of(self.now), np.float32)

    @property
    def probes(self) -> dict[str, np.ndarray]:
        """state: numbers that the picture shows, float32 [k]."""
        now = self.now
        return {"state": np.array([get(now) for get in self.shown.values()], np.float32)}

    def success(self) -> bool:
        """The own task's reward is nearly the best there is, now."""
        return bool(self.rewards[self._task] >= self.success_reward)

    def state(self) -> dict[str, Any]:
        """Copies of positions, velocities and the command in force; task, tick."""
        return {
            "qpos": self._data.qpos.copy(),
            "qvel": self._data.qvel.copy(),
            "command": self._command.copy(),
            "task": self._task,
            "tick": self._tick,
        }

    def driver(self, kind: str, rng: np.random.Generator) -> Driver:
        """The planner, more or less well followed."""
        from d4_sim.suite.drivers import PlannerDriver

        return PlannerDriver(kind, rng, self)

    def _refresh(self) -> None:
        # positions, velocities and the sensors of both, as they are now
        self._mj.mj_step1(self.model, self._data)

    def _scatter(self, rng: np.random.Generator, is_rolling: bool) -> None:
        """Draws hinges and slides within their ranges, and unlimited hinges all around if `is_rolling`."""
        model = self.model
        for joint in range(model.njnt):
            low, high = model.jnt_range[joint] if model.jnt_limited[joint] else (-math.pi, math.pi)
            is_hinge = model.jnt_type[joint] == self._mj.mjtJoint.mjJNT_HINGE
            if model.jnt_limited[joint] or (is_hinge and is_rolling):
                self._data.qpos[model.jnt_qposadr[joint]] = rng.uniform(low, high)

    def _until_free(self, draw: Callable[[], None]) -> None:
        """Draws until nothing touches anything."""
        while True:
            draw()
            self._mj.mj_forward(self.model, self._data)
            if self._data.ncon == 0:
                return


def _limits(count: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full(count, -1.0, np.float32), np.full(count, 1.0, np.float32)


class CartpoleSwingup(ControlWorld):
    """A pole hangs from a cart on a rail: swing it up and hold it there, in the middle."""

    robot = "cartpole_swingup"
    tasks = ("swingup",)
    goals = 3
    action_low, action_high = _limits(1)
    shown: ClassVar = {
        "cart": lambda at: at.qpos[..., 0],
        "pole_sin": lambda at: np.sin(at.qpos[..., 1]),
        "pole_cos": lambda at: np.cos(at.qpos[..., 1]),
    }
    planning = MppiConfig(horizon=25, memory=0.7)

    @classmethod
    def source(cls) -> str:
        """Name of the MJCF file."""
        return "cartpole.xml"

    def reward_of(self, at: Physics) -> np.ndarray:
        """Upright, in the middle, with little force and slowly: the product of four shares."""
        cart, pole = at.qpos[..., 0], at.qpos[..., 1]
        upright = (np.cos(pole) + 1) / 2
        centred = (1 + near(cart, 0, 0, margin=2)) / 2
        effort = np.clip(1 - np.square(at.ctrl[..., 0]), 0, 1)
        calm = (1 + near(at.qvel[..., 1], 0, 0, margin=5)) / 2
        return (upright * centred * (4 + effort) / 5 * calm)[..., None]

    def score(self, at: Physics, goal: int) -> np.ndarray:
        """The task, or the cart to one of the rail's ends."""
        if goal == 0:
            return self.reward_of(at)[..., 0]
        return -np.square(at.qpos[..., 0] - (1.2 if goal == 1 else -1.2))

    def _place(self, rng: np.random.Generator) -> None:
        noise = 0.01 * rng.standard_normal(4)
        self._data.qpos[:] = noise[0], math.pi + noise[1]
        self._data.qvel[:] = noise[2:]


class ReacherEasy(ControlWorld):
    """Two links on a table, moved by torques: the tip to the target, and stay."""

    robot = "reacher_easy"
    rate_hz = 10
    horizon = 60
    tasks = ("reach",)
    goals = 2
    action_low, action_high = _limits(2)
    shown: ClassVar = {
        "tip_x": lambda at: finger(at)[..., 0],
        "tip_y": lambda at: finger(at)[..., 1],
    }
    planning = MppiConfig(horizon=10)
    _LINK, _REACH = 0.12, 0.05 + 0.01  # m: of each link, and the radii of target and tip together

    def __init__(self) -> None:
        super().__init__()
        self._targets = np.zeros((2, 2))

    @classmethod
    def source(cls) -> str:
        """Name of the MJCF file."""
        return "reacher.xml"

    def reward_of(self, at: Physics) -> np.ndarray:
        """1 while the tip touches the target."""
        return near(self._distance(at, 0), 0, self._REACH)[..., None]

    def score(self, at: Physics, goal: int) -> np.ndarray:
        """The reward and how near the tip is, to the target or to another place."""
        distance = self._distance(at, goal)
        return near(distance, 0, self._REACH) - 5 * distance

    def _distance(self, at: Physics, goal: int) -> np.ndarray:
        return np.linalg.norm(finger(at) - self._targets[goal], axis=-1)

    def _place(self, rng: np.random.Generator) -> None:
        self._scatter(rng, is_rolling=True)
        angle, radius = rng.uniform(0, 2 * math.pi, 2), rng.uniform(0.05, 0.20, 2)
        self._targets = np.stack([radius * np.sin(angle), radius * np.cos(angle)], -1)

    def _refresh(self) -> None:
        # all worlds of the class draw with one model, each with its own target in it
        self.model.geom("target").pos[:2] = self._targets[0]
        super()._refresh()


def finger(at: Physics) -> np.ndarray:
    """Position [..., 2] of the reacher's tip in metres."""
    angles = np.cumsum(at.qpos, axis=-1)
    return 0.12 * np.stack([np.cos(angles).sum(-1), np.sin(angles).sum(-1)], -1)


class BallInCupCatch(ControlWorld):
    """A ball hangs from a cup by a string: swing it in."""

    robot = "ball_in_cup_catch"
    camera = "cam0"
    horizon = 80
    tasks = ("catch",)
    goals = 3
    action_low, action_high = _limits(2)
    shown: ClassVar = {
        "cup_x": lambda at: at.qpos[..., 0],
        "cup_z": lambda at: at.qpos[..., 1] + 0.6,
        "ball_x": lambda at: at.qpos[..., 2],
        "ball_z": lambda at: at.qpos[..., 3] + 0.2,
    }
    planning = MppiConfig(horizon=20, memory=0.7, temperature=0.2)

    @classmethod
    def source(cls) -> str:
        """Name of the MJCF file."""
        return "ball_in_cup.xml"

    def _offset(self, at: Physics) -> np.ndarray:
        """From the middle of the cup to the ball [..., 2] (x, z), m."""
        return at.qpos[..., 2:] + [0.0, 0.2] - at.qpos[..., :2] - [0.0, 0.6 - 0.05]

    def reward_of(self, at: Physics) -> np.ndarray:
        """1 while the whole ball is in the cup."""
        inside = np.abs(self._offset(at)) < 0.05 - 0.025
        return inside.all(-1).astype(float)[..., None]

    def score(self, at: Physics, goal: int) -> np.ndarray:
        """The ball above the cup and then into it; or the cup to one side."""
        if goal:
            return -np.abs(at.qpos[..., 0] - (0.2 if goal == 1 else -0.2))
        offset, above = self._offset(at), np.array([0.0, 0.12])
        # the way into the cup leads over its rim
        is_in = (np.abs(offset[..., 0]) < 0.05) & (offset[..., 1] > -0.05)
        around = np.linalg.norm(offset - above, axis=-1) + above[1]
        return self.reward_of(at)[..., 0] - np.where(is_in, np.linalg.norm(offset, axis=-1), around)

    def _place(self, rng: np.random.Generator) -> None:
        def draw() -> None:
            self._data.qpos[2:] = rng.uniform(-0.2, 0.2), rng.uniform(0.2, 0.5)

        self._until_free(draw)


class FingerSpin(ControlWorld):
    """A finger of two joints beside a body on a hinge: keep it spinning fast."""

    robot = "finger_spin"
    camera = "cam0"
    horizon = 80
    tasks = ("spin",)
    goals = 3
    action_low, action_high = _limits(2)
    shown: ClassVar = {
        "proximal": lambda at: at.qpos[..., 0],
        "distal": lambda at: at.qpos[..., 1],
        "hinge_sin": lambda at: np.sin(at.qpos[..., 2]),
        "hinge_cos": lambda at: np.cos(at.qpos[..., 2]),
    }
    planning = MppiConfig(copies=96, horizon=12, memory=0.3, spread=(0.1, 2.0))
    _FAST = 15.0  # rad/s

    @classmethod
    def source(cls) -> str:
        """Name of the MJCF file."""
        return "finger.xml"

    @classmethod
    def dress(cls, model: mujoco.MjModel) -> None:
        """The hinge of this task, and no targets in the picture."""
        model.dof_damping[model.joint("hinge").dofadr] = 0.03
        for name in ("target", "tip"):
            model.site(name).rgba[3] = 0

    def reward_of(self, at: Physics) -> np.ndarray:
        """1 while the body spins backwards at 15 rad/s or more."""
        return (at.qvel[..., 2] <= -self._FAST).astype(float)[..., None]

    def score(self, at: Physics, goal: int) -> np.ndarray:
        """How fast it spins the right way; the wrong way; or not at all."""
        speed = -at.qvel[..., 2] / self._FAST
        if goal == 2:
            return -np.abs(speed)
        return np.minimum(speed if goal == 0 else -speed, 1.3)

    def _place(self, rng: np.random.Generator) -> None:
        self._until_free(lambda: self._scatter(rng, is_rolling=True))


class Walker(ControlWorld):
    """Two legs and a torso that can only fall forwards and backwards, with three tasks for one agent."""

    robot = "walker"
    camera = "side"
    tasks: tuple[str, ...] = ("stand", "walk", "run")
    speeds: ClassVar[tuple[float, ...]] = (0.0, 1.0, 8.0)  # m/s, of the tasks
    goals = 4
    success_reward = 0.8
    action_low, action_high = _limits(6)
    shown: ClassVar = {
        "height": lambda at: at.qpos[..., 0] + 1.3,
        "upright": lambda at: np.cos(at.qpos[..., 2]),
        "lean": lambda at: np.sin(at.qpos[..., 2]),
        **{
            name: (lambda at, i=i: at.qpos[..., i])  # type: ignore[misc]
            for i, name in enumerate(
                ("right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle"), 3
            )
        },
    }
    planning = MppiConfig(copies=32, horizon=14)

    @classmethod
    def source(cls) -> str:
        """Name of the MJCF file."""
        return "walker.xml"

    def reward_of(self, at: Physics) -> np.ndarray:
        """Standing upright, and for the moving tasks at least so fast."""
        return np.stack([self._moving(at, speed) for speed in self.speeds], -1)

    def _moving(self, at: Physics, speed: float) -> np.ndarray:
        standing = near(at.qpos[..., 0] + 1.3, 1.2, math.inf, margin=0.6)
        upright = (1 + np.cos(at.qpos[..., 2])) / 2
        stand = (3 * standing + upright) / 4
        if speed == 0.0:
            return stand
        forward = np.sign(speed) * at.sensors[..., 0]
        move = near(forward, abs(speed), math.inf, margin=abs(speed) / 2, at_margin=0.5)
        return stand * (5 * move + 1) / 6

    def score(self, at: Physics, goal: int) -> np.ndarray:
        """The task's reward, or that of walking backwards."""
        return self._moving(at, self.speeds[goal] if goal < len(self.speeds) else -1.0)

    def _place(self, rng: np.random.Generator) -> None:
        self._scatter(rng, is_rolling=True)


class WalkerWalk(Walker):
    """The walker with the one task that the suite is mostly judged by."""

    robot = "walker_walk"
    tasks = ("walk",)
    speeds = (1.0,)
    goals = 2


class CheetahRun(ControlWorld):
    """Half a cheetah: run."""

    robot = "cheetah_run"
    camera = "side"
    tasks = ("run",)
    goals = 3
    success_reward = 0.5
    action_low, action_high = _limits(6)
    shown: ClassVar = {
        "height": lambda at: at.qpos[..., 1],
        "pitch_sin": lambda at: np.sin(at.qpos[..., 2]),
        "pitch_cos": lambda at: np.cos(at.qpos[..., 2]),
        **{
            name: (lambda at, i=i: at.qpos[..., i])  # type: ignore[misc]
            for i, name in enumerate(("bthigh", "bshin", "bfoot", "fthigh", "fshin", "ffoot"), 3)
        },
    }
    planning = MppiConfig(horizon=12, memory=0.3)
    _FAST = 10.0  # m/s

    @classmethod
    def source(cls) -> str:
        """Name of the MJCF file."""
        return "cheetah.xml"

    def reward_of(self, at: Physics) -> np.ndarray:
        """Speed forwards, as a share of 10 m/s."""
        return near(at.sensors[..., 0], self._FAST, math.inf, margin=self._FAST, at_margin=0.0)[..., None]

    def score(self, at: Physics, goal: int) -> np.ndarray:
        """Forwards; backwards; or stay."""
        speed = at.sensors[..., 0] / self._FAST
        return (speed, -speed, -np.abs(speed))[goal]

    def _place(self, rng: np.random.Generator) -> None:
        self._scatter(rng, is_rolling=False)
        for _ in range(200):  # it falls onto its feet before the episode begins
            self._mj.mj_step(self.model, self._data)
        self._data.time = 0.0
