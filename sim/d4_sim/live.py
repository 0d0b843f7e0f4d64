"""A simulated robot that runs by the clock: commands take hold when they come, frames are taken on time.

The lockstep `World.step` says when a command takes hold; here the robot's own loop decides that, early or
late. Knows no ROS: times are nanoseconds of whatever clock its user lives by.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from d4_datasets.errors import UserError
from d4_sim.mujoco_world import MujocoWorld
from d4_sim.world import Observation, make_world


@dataclass
class Outcome:
    """One episode: return and success of its own task, frames, whether it ended for good."""

    seed: int
    task: int
    ret: float = 0.0
    success: bool = False
    terminal: bool = False
    frames: int = 0


@dataclass(frozen=True)
class Frame:
    """What the robot's sensors say at one tick: `number` of the tick, capture time, rewards float32 [K]."""

    number: int
    stamp_ns: int
    observation: Observation
    probes: dict[str, np.ndarray]
    rewards: np.ndarray
    is_terminal: bool
    is_last: bool


@dataclass
class LiveWorld:
    """One episode after the other of a world by name.

    Raises:
        UserError: the world is unknown or does not run by the clock.
    """

    name: str
    outcomes: list[Outcome] = field(default_factory=list)

    def __post_init__(self) -> None:
        world: Any = make_world(self.name)
        if not isinstance(world, MujocoWorld):
            raise UserError(f"the world {self.name} runs in lockstep only")
        self.world = world
        world.reset(0, 0)  # the first picture takes ten times as long as the others
        self.contract = world.contract
        self._commands: deque[tuple[int, np.ndarray]] = deque()
        self._time_ns = self._begin_ns = self._tick = 0

    def begin(self, seed: int, task: int, time_ns: int) -> Frame:
        """Begin an episode whose first frame is captured at `time_ns`."""
        observation = self.world.reset(seed, task)
        self._commands.clear()
        self._time_ns = self._begin_ns = time_ns
        self._tick = 0
        self.outcomes.append(Outcome(seed, task, frames=1))
        return Frame(0, time_ns, observation, self.world.probes, self.world.rewards, False, False)

    def command(self, values: np.ndarray, arrival_ns: int) -> None:
        """A command (A,) has come; it takes hold with the substep in whose first half it came."""
        self._commands.append((arrival_ns, np.asarray(values, np.float32)))

    @property
    def next_ns(self) -> int:
        """When the next frame is captured."""
        return self._begin_ns + (self._tick + 1) * self.contract.period_ns

    def advance(self, now_ns: int) -> Frame | None:
        """Catch up with the clock; a frame if its moment has come."""
        step, end = self.world.timestep_ns, self.next_ns
        while self._time_ns + step <= min(now_ns, end):
            while self._commands and self._commands[0][0] <= self._time_ns + step // 2:
                self.world.command(self._commands.popleft()[1])
            self.world.advance(1)
            self._time_ns += step
        return self._frame() if self._time_ns >= end else None

    def _frame(self) -> Frame:
        self._tick += 1
        observation, rewards, terminal, truncated = self.world.frame()
        outcome = self.outcomes[-1]
        outcome.frames += 1
        outcome.ret += float(rewards[outcome.task])
        outcome.success, outcome.terminal = self.world.success(), bool(terminal)
        stamp = self._begin_ns + self._tick * self.contract.period_ns
        last = bool(terminal or truncated)
        return Frame(self._tick, stamp, observation, self.world.probes, rewards, bool(terminal), last)
