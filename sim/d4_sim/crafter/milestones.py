"""Milestones of Crafter: which an episode reached and when, and policies that are asked for one by one.

An episode is played with a ladder of prompts, as the paper's are: the next task is asked for as soon as
enough of the present one was done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from d4_sim.minecraft.tasks import Ladder
from d4_sim.minecraft.worlds import CRAFTER
from d4_sim.world import World

LADDER = CRAFTER.ladder
MILESTONES = CRAFTER.milestones


def first_ticks(reward: np.ndarray, length: int | None = None) -> list[int | None]:
    """The tick at which each task first happened in an episode, None for those that never did.

    Args:
        reward: events (T, K) that arrived with frames 0..T-1 (`EpisodeBatch.reward`, or a dataset's).
        length: frames of the episode, default all T.
    """
    happened: np.ndarray = np.greater(reward[:length], 0)
    return [int(column.argmax()) if column.any() else None for column in happened.T]


def crafter_score(shares: Sequence[float]) -> float:
    """The score of Crafter's paper: the geometric mean of success rates, all plus one per cent.

    Args: shares: of the episodes with each of the 22 achievements, 0 .. 1.
    """
    return float(np.expm1(np.mean(np.log1p(100 * np.asarray(shares, float)))))


class Watched:
    """A policy that remembers its worlds, for what they tell when their episodes are over."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.worlds: Sequence[Any] = ()

    def bind(self, worlds: Sequence[World]) -> None:
        """The worlds that are played."""
        self.worlds = worlds
        if hasattr(self.policy, "bind"):
            self.policy.bind(worlds)

    def reset(self, n: int, tasks: np.ndarray) -> None:
        """As the policy does."""
        self.policy.reset(n, tasks)

    def act(self, images: np.ndarray, vectors: dict[str, np.ndarray], alive: np.ndarray) -> np.ndarray:
        """The policy's actions."""
        return self.policy.act(images, vectors, alive)

    def achievements(self) -> dict[str, list[int]]:
        """How often each achievement happened, by name, episode by episode."""
        told = [world.achievements for world in self.worlds]
        return {name: [each[name] for each in told] for name in told[0]}


class Prompted:
    """A session that is asked for the tasks of a ladder: a policy for `d4_sim.vector.run_episodes`.

    Args:
        session: any policy; one without a method `ask` is never told anything.
        ladder: the prompts, tasks by their names in the worlds.
    """

    def __init__(self, session: Any, ladder: Sequence[Any] = LADDER) -> None:
        self.session, self._rungs = session, tuple(ladder)
        self._worlds: Sequence[World] = ()

    def bind(self, worlds: Sequence[World]) -> None:
        """The worlds whose events are counted."""
        self._worlds = worlds
        if hasattr(self.session, "bind"):
            self.session.bind(worlds)

    def reset(self, n: int, tasks: np.ndarray) -> None:
        """Start n episodes, each with the first prompt."""
        self.ladders = [Ladder(self._rungs) for _ in range(n)]
        self._names, self._begun = self._worlds[0].tasks, False
        self.session.reset(n, self._asked())

    def act(self, images: np.ndarray, vectors: dict[str, np.ndarray], alive: np.ndarray) -> np.ndarray:
        """The session's actions under the prompts as they are now."""
        changed = False
        if self._begun:  # nothing that came with the first frame was done by anybody
            for i in np.flatnonzero(alive).tolist():
                done = dict(zip(self._names, self._worlds[i].rewards.tolist(), strict=True))
                changed |= self.ladders[i].step(done)
        self._begun = True
        if changed and hasattr(self.session, "ask"):
            self.session.ask(self._asked())
        return self.session.act(images, vectors, alive)

    def _asked(self) -> np.ndarray:
        return np.array([self._names.index(ladder.task) for ladder in self.ladders])
