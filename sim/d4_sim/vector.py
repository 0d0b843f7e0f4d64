"""Episodes in lockstep, so that a policy acts on a batch of worlds at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from d4_sim.world import Observation, World, make_world


class Policy(Protocol):
    """Acts on n worlds at once. A policy with a method `bind(worlds)` is given the worlds first."""

    def reset(self, n: int, tasks: np.ndarray) -> None:
        """Forgets everything; n episodes of the given tasks (int64 [n]) start now."""
        ...

    def act(self, images: np.ndarray, vectors: dict[str, np.ndarray], alive: np.ndarray) -> np.ndarray:
        """float32 [n, A] from images uint8 [n, H, W, 3] and proprioception; rows not `alive` are ignored."""
        ...


@dataclass(frozen=True)
class EpisodeBatch:
    """N episodes as rows of frames, T = horizon + 1; the same convention as a dataset.

    Row t holds the action chosen at frame t; reward and terminal of row t arrived with frame t. Rows past
    `length` are zeros, and so is the action of the last frame.
    """

    action: np.ndarray  # float32 [N, T, A]
    reward: np.ndarray  # float32 [N, T, K]
    terminal: np.ndarray  # bool [N, T]
    probes: dict[str, np.ndarray]  # float32 [N, T, k] by name, what the world's probes measured
    length: np.ndarray  # int64 [N], frames
    task: np.ndarray  # int64 [N]
    success: np.ndarray  # bool [N]
    frames: np.ndarray | None = None  # uint8 [N, T, H, W, 3]

    @property
    def returns(self) -> np.ndarray:
        """Own-task return of every episode, float32 [N]; no action earned frame 0, so it does not count."""
        own = np.take_along_axis(self.reward, self.task[:, None, None], axis=2)[..., 0]
        return own[:, 1:].sum(axis=1)


def join_batches(batches: Sequence[EpisodeBatch]) -> EpisodeBatch:
    """The episodes of several batches of one world and one horizon, in their order."""

    def join(name: str) -> np.ndarray:
        return np.concatenate([getattr(batch, name) for batch in batches])

    probes = {name: np.concatenate([batch.probes[name] for batch in batches]) for name in batches[0].probes}
    return EpisodeBatch(
        action=join("action"), reward=join("reward"), terminal=join("terminal"), probes=probes,
        length=join("length"), task=join("task"), success=join("success"),
        frames=None if batches[0].frames is None else join("frames"),
    )  # fmt: skip


def run_episodes(
    world: str,
    seeds: Sequence[int],
    tasks: Sequence[int],
    policy: Policy,
    horizon: int,
    keep_frames: bool = False,
) -> EpisodeBatch:
    """Runs one episode per seed in lockstep for at most `horizon` ticks (or the world's own limit).

    A world that has ended keeps its last picture; `alive` tells the policy. With `keep_frames` the pictures
    are returned too (12 kB per tick and world at 64x64).
    """
    worlds = [make_world(world) for _ in seeds]
    if hasattr(policy, "bind"):
        policy.bind(worlds)
    task = np.asarray(tasks, np.int64)
    observations = [w.reset(int(s), int(q)) for w, s, q in zip(worlds, seeds, task, strict=True)]
    policy.reset(len(worlds), task)
    record = _Record(worlds, min(horizon, worlds[0].horizon), keep_frames)
    alive = np.ones(len(worlds), bool)
    for i, w in enumerate(worlds):
        record.frame(i, 0, observations[i], w.rewards, False, w)
    for t in range(record.steps):
        actions = np.asarray(policy.act(*stack(observations), alive.copy()), np.float32)
        for i in np.flatnonzero(alive).tolist():
            record.action[i, t] = actions[i]
            observations[i], reward, terminal, truncated = worlds[i].step(actions[i])
            record.frame(i, t + 1, observations[i], reward, terminal, worlds[i])
            alive[i] = not (terminal or truncated)
        if not alive.any():
            break
    return record.finish(task, np.array([w.success() for w in worlds]))


def stack(observations: Sequence[Observation]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Images uint8 [n, H, W, 3] and vectors float32 [n, k] by name."""
    vectors = {name: np.stack([o.vectors[name] for o in observations]) for name in observations[0].vectors}
    return np.stack([o.image for o in observations]), vectors


class _Record:
    """The arrays of an `EpisodeBatch` while they fill."""

    def __init__(self, worlds: Sequence[World], steps: int, keep_frames: bool) -> None:
        n, rows = len(worlds), steps + 1
        self.steps = steps
        self.action = np.zeros((n, rows, len(worlds[0].action_low)), np.float32)
        self.reward = np.zeros((n, rows, len(worlds[0].tasks)), np.float32)
        self.terminal = np.zeros((n, rows), bool)
        probes = worlds[0].probes.items()
        self.probes = {name: np.zeros((n, rows, len(value)), np.float32) for name, value in probes}
        self.length = np.zeros(n, np.int64)
        self.frames: np.ndarray | None = None
        self._keep = keep_frames

    def frame(
        self, i: int, t: int, observation: Observation, reward: np.ndarray, terminal: bool, world: World
    ) -> None:
        """Stores frame t of episode i and what arrived with it."""
        self.reward[i, t], self.terminal[i, t] = reward, terminal
        for name, value in world.probes.items():
            self.probes[name][i, t] = value
        self.length[i] = t + 1
        if self._keep:
            if self.frames is None:
                self.frames = np.zeros((*self.reward.shape[:2], *observation.image.shape), np.uint8)
            self.frames[i, t] = observation.image

    def finish(self, task: np.ndarray, success: np.ndarray) -> EpisodeBatch:
        """The finished batch."""
        return EpisodeBatch(
            action=self.action, reward=self.reward, terminal=self.terminal, probes=self.probes,
            length=self.length, task=task, success=success, frames=self.frames,
        )  # fmt: skip
