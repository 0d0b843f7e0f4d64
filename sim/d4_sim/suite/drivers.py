"""A planner as a driver of mixed quality."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from d4_sim.driver import AxisDriver
from d4_sim.suite.planner import Planner

if TYPE_CHECKING:
    from d4_sim.suite.control import ControlWorld


class PlannerDriver(AxisDriver):
    """See `d4_sim.driver`: sloppy drivers follow the plan with a shaky hand and lapses, and it copes.

    A driver of the wrong kind pursues another goal of the world's `score`, for the whole episode.
    """

    def __init__(self, kind: str, rng: np.random.Generator, world: ControlWorld) -> None:
        self.axes = len(world.action_low)
        super().__init__(kind, rng)
        self._speed = rng.uniform(0.5, 1.0)  # torques cannot be halved as velocities can
        self._noise_level = rng.uniform(0.1, 0.5)
        self._turn = rng.uniform()  # which of the other goals a wrong driver pursues
        self._goals = world.goals or len(world.tasks)
        cfg = world.planning
        if kind != "expert":  # half the thought is enough for them
            cfg = replace(cfg, copies=max(cfg.copies // 2, 2))
        self._planner = Planner(world, cfg, rng)

    def _towards(self, target: int, state: dict[str, Any]) -> np.ndarray:
        return self._planner.act(target)

    def _wrong(self, task: int) -> int:
        return (task + 1 + int(self._turn * (self._goals - 1))) % self._goals
