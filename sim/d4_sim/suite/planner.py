"""A planner on the true simulator: the expert of every MuJoCo world that can say what is good in a state.

At every tick it rolls many noisy copies of its plan out from the present state with `mujoco.rollout`, scores
the frames with `MujocoWorld.score`, and shifts the plan towards the better copies (model predictive path
integral control). It knows the state, the latency and the physics; a policy knows none of them.

Shapes: C copies, H ticks, A commands, S substeps of a tick.
"""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import dataclass

import numpy as np

from d4_sim.mujoco_world import MujocoWorld, Physics


@dataclass(frozen=True, kw_only=True)
class MppiConfig:
    """Settings of the planner; a tick costs copies x iterations x horizon x substeps of physics.

    Attributes:
        copies: sequences per iteration.
        horizon: ticks looked ahead.
        iterations: refits per tick.
        spread: standard deviations of the noise in units of the limits, from the timid to the bold copies.
        memory: correlation of the noise from tick to tick.
        temperature: of the weights, in standard deviations of the scores; small: only the best copies count.
    """

    copies: int = 48
    horizon: int = 15
    iterations: int = 1
    spread: tuple[float, float] = (0.05, 1.0)
    memory: float = 0.6
    temperature: float = 0.1


class Planner:
    """Plans for one world. `reset` at the start of an episode; the same noise gives the same plan."""

    def __init__(self, world: MujocoWorld, cfg: MppiConfig, rng: np.random.Generator) -> None:
        import mujoco
        from mujoco import rollout

        self.world, self.cfg, self.rng = world, cfg, rng
        self._threads = threads()
        self._data = [mujoco.MjData(world.model) for _ in range(self._threads)]
        self._rollout = rollout.rollout
        self._plan = np.zeros((cfg.horizon, len(world.action_low)))
        low, high = cfg.spread
        self._spread = np.geomspace(low, high, cfg.copies)[:, None, None]

    def act(self, goal: int) -> np.ndarray:
        """The next command for a goal of `MujocoWorld.score`, in units of the limits, float64 [A]."""
        for _ in range(self.cfg.iterations):
            self._improve(goal)
        first = self._plan[0].copy()
        self._plan = np.concatenate([self._plan[1:], self._plan[-1:]])
        return first

    def _improve(self, goal: int) -> None:
        copies = np.clip(self._plan + self._spread * self._noise(), -1.0, 1.0)
        copies[0] = self._plan  # what was planned competes as it is
        copies[1] = 0.0
        value = self.evaluate(copies, goal)
        scale = max(float(value.std()), 1e-9) * self.cfg.temperature
        weight = np.exp((value - value.max()) / scale)
        self._plan = np.einsum("c,cha->ha", weight / weight.sum(), copies)

    def _noise(self) -> np.ndarray:
        """Unit-variance noise [C, H, A] that remembers."""
        cfg = self.cfg
        white = self.rng.standard_normal((cfg.copies, *self._plan.shape))
        fresh = np.sqrt(1 - cfg.memory**2)
        for t in range(1, cfg.horizon):
            white[:, t] = cfg.memory * white[:, t - 1] + fresh * white[:, t]
        return white

    def evaluate(self, copies: np.ndarray, goal: int) -> np.ndarray:
        """Sums of the scores [C] of the frames that these sequences [C, H, A] lead to."""
        world, (substeps, late) = self.world, self.world.substeps
        count, horizon, _ = copies.shape
        control = np.empty((count, horizon * substeps + late, copies.shape[2]))
        control[:, :late] = world.in_force
        control[:, late:] = np.repeat(copies * world.action_high, substeps, axis=1)
        # the last command's late part lies beyond the last frame
        control = control[:, : horizon * substeps]
        start = np.broadcast_to(world.physics(), (count, len(world.physics())))
        state, sensors = self._rollout(world.model, self._data, start, control)
        frames = slice(substeps - 1, None, substeps)
        nq, nv = world.model.nq, world.model.nv
        at = Physics(
            qpos=state[:, frames, 1 : 1 + nq], qvel=state[:, frames, 1 + nq : 1 + nq + nv],
            ctrl=control[:, frames], sensors=sensors[:, frames],
        )  # fmt: skip
        return np.asarray(world.score(at, goal).sum(-1))


def threads() -> int:
    """Threads of a planner: all cores, or one in a worker process, whose siblings have the others."""
    if multiprocessing.parent_process() is not None:
        return 1
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdecimal() and int(wanted) > 0 else len(os.sched_getaffinity(0))
