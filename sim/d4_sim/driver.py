"""Scripted drivers of mixed quality for the yard: the upper reference, and the people in the logs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from d4_datasets.errors import UserError, run_cli
from d4_sim.world import World, make_world
from d4_sim.yard import LATENCY_MS, RATE_HZ, ROBOT_LIMIT, SPEED_LIMIT

KINDS = ("goal", "wrong", "wander", "expert", "random")  # the first three are the log mix
LOG_MIX = KINDS[:3]

_CHUNK = 50  # episodes per unit of parallel work
_PERIOD = 1.0 / RATE_HZ
_MOTOR_LAG = 0.04  # s, time constant of the base
_GAIN = 6.0  # 1/s, braking towards a target
_PIT_BERTH = 0.36  # m, how far from the pit's centre a careful driver stays
_PIT_SIGHT = 0.9  # m, how far ahead the pit matters


@dataclass
class Driver:
    """One scripted driver for one episode; `act` reads the world's privileged state.

    kind: goal (noisy, towards the own pad), wrong (the same, towards the other pad), wander (OU velocities),
    expert (clean and fast), random (uniform, re-drawn every tick).
    """

    kind: str
    rng: np.random.Generator

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown driver kind {self.kind!r}, not one of {KINDS}")
        rng = self.rng
        self._noise = np.zeros(2)
        self._speed = rng.uniform(0.2, 0.8)
        self._noise_level = rng.uniform(0.3, 0.6)  # m/s
        self._careful = bool(rng.random() < 0.3)
        self._burst_until, self._burst = 0, np.zeros(2)
        if self.kind == "expert":
            self._careful = True

    def act(self, world: World) -> np.ndarray:
        """The command for the current tick, float32 [2], m/s."""
        state = world.state()
        if self.kind == "random":
            return self.rng.uniform(-SPEED_LIMIT, SPEED_LIMIT, 2).astype(np.float32)
        if self.kind == "wander":
            command = self._ou(level=1.4, memory=0.85)
            command = self._avoid(state["position"], state["pit"], command) if self._careful else command
        else:
            goal = state["pads"][state["task"] if self.kind != "wrong" else 1 - state["task"]]
            command = self._towards(goal, state)
            if self.kind != "expert":
                command = self._sloppy(command, int(state["tick"]))
        return np.clip(command, -SPEED_LIMIT, SPEED_LIMIT).astype(np.float32)

    def _towards(self, goal: np.ndarray, state: dict[str, Any]) -> np.ndarray:
        """Full speed to the goal, braking on it, around the pit if careful."""
        # Where the robot will be when a command chosen now begins to bite.
        lead = state["position"] + state["velocity"] * _MOTOR_LAG + state["command"] * (LATENCY_MS / 1000)
        target = around(lead, goal, state["pit"]) if self._careful else goal
        offset = target - lead
        wanted = _GAIN * offset if target is goal else offset * 1e3  # no braking at waypoints
        # Keep the direction when an axis saturates, otherwise the path bends into the pit.
        return wanted * min(1.0, SPEED_LIMIT / max(float(np.abs(wanted).max()), 1e-9))

    def _sloppy(self, command: np.ndarray, tick: int) -> np.ndarray:
        """Slower, with a shaky hand, and now and then a moment of driving somewhere else."""
        if tick >= self._burst_until and self.rng.random() < 0.03:
            self._burst_until = tick + int(self.rng.integers(3, 7))
            self._burst = self.rng.uniform(-1.0, 1.0, 2)
        # Shaky, not drifting: with slowly drifting noise the last command would predict the next one better
        # than the scene does, and a policy cloned from such logs copies itself instead of looking.
        noise = self._ou(self._noise_level, memory=0.2)
        return (self._burst if tick < self._burst_until else self._speed * command) + noise

    def _ou(self, level: float, memory: float) -> np.ndarray:
        """Ornstein-Uhlenbeck noise with standard deviation `level` (m/s)."""
        self._noise = memory * self._noise + np.sqrt(1 - memory**2) * level * self.rng.standard_normal(2)
        return self._noise

    @staticmethod
    def _avoid(position: np.ndarray, pit: np.ndarray, command: np.ndarray) -> np.ndarray:
        """Removes the part of a command that leads into the pit's surroundings."""
        offset = position - pit
        distance = float(np.linalg.norm(offset))
        outward = offset / max(distance, 1e-6)
        closing = min(0.0, float(command @ outward))
        if distance + closing * 2 * _PERIOD > _PIT_BERTH:
            return command
        return command - closing * outward + (0.4 * outward if distance < _PIT_BERTH else 0.0)


def around(position: np.ndarray, goal: np.ndarray, pit: np.ndarray) -> np.ndarray:
    """`goal` itself if the straight way stays clear of the pit, else a waypoint beside it ([2], metres)."""
    way = goal - position
    length = float(np.linalg.norm(way))
    to_pit = pit - position
    distance = float(np.linalg.norm(to_pit))
    direction = way / max(length, 1e-9)
    along = float(to_pit @ direction)
    across = float(direction[0] * to_pit[1] - direction[1] * to_pit[0])
    if distance > _PIT_SIGHT + _PIT_BERTH or not 0.0 < along < length or abs(across) >= _PIT_BERTH:
        return goal
    if distance <= _PIT_BERTH:  # already too close: leave first, sliding towards the goal
        return position + 0.2 * (direction - 1.5 * to_pit / max(distance, 1e-9))
    # The tangent to the berth on the nearer side, unless that one leads through the wall.
    angle = np.arcsin(min(1.0, _PIT_BERTH / distance))
    reach = np.sqrt(distance**2 - _PIT_BERTH**2)
    sides = [-1.0, 1.0] if across > 0 else [1.0, -1.0]
    waypoints = []
    for side in sides:
        c, s = np.cos(side * angle), np.sin(side * angle)
        unit = to_pit / distance
        waypoints.append(position + reach * np.array([c * unit[0] - s * unit[1], s * unit[0] + c * unit[1]]))
    inside = [w for w in waypoints if np.abs(w).max() <= ROBOT_LIMIT]
    return inside[0] if inside else waypoints[0]


@dataclass(frozen=True)
class Episode:
    """One driven episode of F frames, in the row convention of a dataset (see `EpisodeBatch`)."""

    frames: np.ndarray  # uint8 [F, 64, 64, 3]
    action: np.ndarray  # float32 [F, 2], zeros at the last frame
    reward: np.ndarray  # float32 [F, 2], arriving with the frame
    is_terminal: np.ndarray  # bool [F]
    pose: np.ndarray  # float32 [F, 2]
    task: int
    kind: int  # index into KINDS
    success: bool

    @property
    def own_return(self) -> float:
        """Sum of the own task's reward over the frames after the first."""
        return float(self.reward[1:, self.task].sum())


def drive(world: World, seed: int, kind: str | None = None) -> Episode:
    """Drives the episode of `seed`, which fixes layout, task, noise, and the driver unless given."""
    rng = np.random.default_rng([seed, 1])
    task = int(rng.integers(len(world.tasks)))
    drawn = LOG_MIX[int(rng.integers(len(LOG_MIX)))]
    driver = Driver(kind or drawn, rng)
    observation = world.reset(seed, task)
    images, rewards, poses = [observation.image], [world.rewards], [world.pose]
    actions, terminal, truncated = [], False, False
    while not (terminal or truncated):
        actions.append(driver.act(world))
        observation, reward, terminal, truncated = world.step(actions[-1])
        images.append(observation.image)
        rewards.append(reward)
        poses.append(world.pose)
    is_terminal = np.zeros(len(images), bool)
    is_terminal[-1] = terminal
    return Episode(
        frames=np.stack(images), action=np.stack([*actions, np.zeros_like(actions[0])]),
        reward=np.stack(rewards), is_terminal=is_terminal, pose=np.stack(poses),
        task=task, kind=KINDS.index(driver.kind), success=world.success(),
    )  # fmt: skip


def episode_seed(seed: int, episode: int) -> int:
    """The seed of episode number `episode` of a recording, whoever drives it and in whatever order."""
    return int(np.random.SeedSequence([seed, episode]).generate_state(1, np.uint64)[0] >> 1)


def simulate(seed: int, episodes: int, kind: str | None = None, first: int = 0) -> dict[str, np.ndarray]:
    """Drives `episodes` yard episodes straight to arrays (E episodes, F frames in all).

    Keys: frames uint8 [F, 64, 64, 3], action float32 [F, 2], reward float32 [F, 2], is_terminal bool [F],
    pose float32 [F, 2], episode_start, episode_length, task, kind int64 [E], success bool [E].
    """
    world = make_world("yard")
    driven = [drive(world, episode_seed(seed, first + i), kind) for i in range(episodes)]
    return join_episodes(driven)


def join_episodes(episodes: Sequence[Episode]) -> dict[str, np.ndarray]:
    """Concatenates episodes into the arrays that `simulate` documents."""
    names = ("frames", "action", "reward", "is_terminal", "pose")
    out = {name: np.concatenate([getattr(e, name) for e in episodes]) for name in names}
    lengths = np.array([len(e.frames) for e in episodes], np.int64)
    out["episode_start"] = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    out["episode_length"] = lengths
    out["task"] = np.array([e.task for e in episodes], np.int64)
    out["kind"] = np.array([e.kind for e in episodes], np.int64)
    out["success"] = np.array([e.success for e in episodes])
    return out


class ScriptedPolicy:
    """A driver kind as a policy for `run_episodes` (it looks at the worlds, not at the pictures)."""

    def __init__(self, kind: str, seed: int = 0) -> None:
        self.kind, self.seed = kind, seed
        self._worlds: Sequence[World] = ()
        self._drivers: list[Driver] = []

    def bind(self, worlds: Sequence[World]) -> None:
        """The worlds whose state the drivers read."""
        self._worlds = worlds

    def reset(self, n: int, tasks: np.ndarray) -> None:
        """Fresh drivers for n episodes."""
        self._drivers = [Driver(self.kind, np.random.default_rng([self.seed, i])) for i in range(n)]

    def act(self, images: np.ndarray, vectors: dict[str, np.ndarray], alive: np.ndarray) -> np.ndarray:
        """float32 [n, 2], zeros for worlds that have ended."""
        out = np.zeros((len(self._worlds), 2), np.float32)
        for i in np.flatnonzero(alive).tolist():
            out[i] = self._drivers[i].act(self._worlds[i])
        return out


def quality(seed: int, episodes: int) -> dict[str, dict[str, float]]:
    """Mean own-task return, success and falls of the log mix (`data`) and of every kind alone."""
    world = make_world("yard")
    rows: dict[str, dict[str, float]] = {}
    for kind in (None, *KINDS):
        driven = [drive(world, episode_seed(seed, i), kind) for i in range(episodes)]
        rows[kind or "data"] = {
            "return": float(np.mean([e.own_return for e in driven])),
            "success": float(np.mean([e.success for e in driven])),
            "fallen": float(np.mean([e.is_terminal[-1] for e in driven])),
            "frames": float(np.mean([len(e.frames) for e in driven])),
        }
    return rows


def save(out: Path, data: dict[str, np.ndarray]) -> None:
    """Writes an uncompressed .npz aside and renames it."""
    if out.suffix != ".npz":
        raise UserError(f"--out {out} must end in .npz.")
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".tmp-{os.getpid()}-{out.name}")
    try:
        np.savez(aside, **data)  # type: ignore[arg-type]  # the stub takes every name for allow_pickle
        os.replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)


@dataclass(frozen=True)
class Args:
    """Drives the yard with scripted drivers and writes the episodes to one .npz, or reports their quality."""

    out: Path | None = None
    """The .npz to write; without it only the quality table is printed."""
    episodes: int = 1500
    """How many episodes."""
    seed: int = 0
    """Same seed, same episodes."""
    jobs: int = 1
    """Processes; the result does not depend on it."""


def worker_pool(jobs: int) -> ProcessPoolExecutor:
    """Processes that can render: spawned, because a forked child must not inherit a GL context.

    They ignore Ctrl-C: the parent gets it too, and lets them finish what they are at.
    """
    return ProcessPoolExecutor(
        jobs,
        mp_context=get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )


def _simulate_parallel(args: Args) -> dict[str, np.ndarray]:
    if args.jobs == 1:
        return simulate(args.seed, args.episodes)
    firsts = range(0, args.episodes, _CHUNK)
    with worker_pool(args.jobs) as pool:
        futures = [
            pool.submit(simulate, args.seed, min(_CHUNK, args.episodes - first), first=first)
            for first in firsts
        ]
        try:
            parts = [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    out = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    out["episode_start"] = np.cumsum(out["episode_length"]) - out["episode_length"]
    return out


def cli() -> None:
    """The command `python -m d4_sim.driver`."""
    import tyro

    args = tyro.cli(Args, prog="python -m d4_sim.driver")
    if args.episodes < 1 or args.jobs < 1 or args.seed < 0:
        raise UserError("--episodes and --jobs must be at least 1 and --seed at least 0.")
    if args.out is None:
        print(f"{'driver':8s} {'return':>7s} {'success':>8s} {'fallen':>7s} {'frames':>7s}")
        for name, row in quality(args.seed, args.episodes).items():
            rates = f"{row['success']:8.3f} {row['fallen']:7.3f} {row['frames']:7.1f}"
            print(f"{name:8s} {row['return']:7.2f} {rates}")
        return
    start = time.perf_counter()
    data = _simulate_parallel(args)
    save(args.out, data)
    seconds = time.perf_counter() - start
    frames, kinds = len(data["frames"]), np.bincount(data["kind"], minlength=3)[:3]
    mix = ", ".join(f"{k} {n}" for k, n in zip(LOG_MIX, kinds, strict=True))
    print(f"{args.episodes} episodes ({mix}), {frames} frames in {seconds:.0f} s")
    print(f"written to {args.out}")


def main() -> None:
    """Entry point with one-sentence errors."""
    run_cli(cli)


if __name__ == "__main__":
    main()
