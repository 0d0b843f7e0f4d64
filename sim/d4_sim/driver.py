"""Scripted drivers of mixed quality for any world: the upper reference, and the people in the logs."""

from __future__ import annotations

import abc
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from d4_datasets import whole
from d4_datasets.errors import UserError, run_cli
from d4_datasets.workers import follow_parent
from d4_sim.world import Observation, World, make_world, world_class

KINDS = ("goal", "wrong", "wander", "expert", "random")  # the first three are the log mix
LOG_MIX = KINDS[:3]

_CHUNK = 50  # episodes per unit of parallel work


class Driver(abc.ABC):
    """One scripted driver for one episode; `act` reads the world's privileged state.

    kind: goal (sloppy, towards the own task), wrong (the same, towards another one), wander (towards
    nothing), expert (clean and fast), random (uniform, re-drawn every tick).
    """

    def __init__(self, kind: str, rng: np.random.Generator) -> None:
        if kind not in KINDS:
            raise ValueError(f"unknown driver kind {kind!r}, not one of {KINDS}")
        self.kind, self.rng = kind, rng

    @abc.abstractmethod
    def act(self, world: World) -> np.ndarray:
        """The command for the current tick, float32 [A] in the world's units."""


class AxisDriver(Driver):
    """A driver of continuous commands: noise is a shaky hand, wandering are OU velocities.

    A subclass knows one kind of robot: how to get to a target. Commands in here are in units of the limits.
    """

    axes: int = 2  # components of a command

    def __init__(self, kind: str, rng: np.random.Generator) -> None:
        super().__init__(kind, rng)
        self._noise = np.zeros(self.axes)
        self._speed = rng.uniform(0.2, 0.8)
        self._noise_level = rng.uniform(0.15, 0.3)
        self._burst_until, self._burst = 0, np.zeros(self.axes)

    def act(self, world: World) -> np.ndarray:
        """The command for the current tick, float32 [A] in the world's units; its limits are symmetric."""
        return (np.clip(self._command(world.state()), -1.0, 1.0) * world.action_high).astype(np.float32)

    @abc.abstractmethod
    def _towards(self, target: int, state: dict[str, Any]) -> np.ndarray:
        """The best command for getting to target number `target` and staying there."""

    def _restrain(self, command: np.ndarray, state: dict[str, Any]) -> np.ndarray:
        """What a wanderer makes of a command where it leads into danger."""
        return command

    def _wrong(self, task: int) -> int:
        """What a driver pursues that was given another task than this one."""
        return 1 - task

    def _command(self, state: dict[str, Any]) -> np.ndarray:
        if self.kind == "random":
            return self.rng.uniform(-1.0, 1.0, self.axes)
        if self.kind == "wander":
            return self._restrain(self._ou(level=0.7, memory=0.85), state)
        task = int(state["task"])
        command = self._towards(self._wrong(task) if self.kind == "wrong" else task, state)
        return command if self.kind == "expert" else self._sloppy(command, int(state["tick"]))

    def _sloppy(self, command: np.ndarray, tick: int) -> np.ndarray:
        """Slower, with a shaky hand, and now and then a moment of driving somewhere else."""
        if tick >= self._burst_until and self.rng.random() < 0.03:
            self._burst_until = tick + int(self.rng.integers(3, 7))
            self._burst = self.rng.uniform(-0.5, 0.5, self.axes)
        # Shaky, not drifting: with slowly drifting noise the last command would predict the next one better
        # than the scene does, and a policy cloned from such logs copies itself instead of looking.
        noise = self._ou(self._noise_level, memory=0.2)
        return (self._burst if tick < self._burst_until else self._speed * command) + noise

    def _ou(self, level: float, memory: float) -> np.ndarray:
        """Ornstein-Uhlenbeck noise with standard deviation `level`."""
        fresh = self.rng.standard_normal(self.axes)
        self._noise = memory * self._noise + np.sqrt(1 - memory**2) * level * fresh
        return self._noise


class ChoiceDriver(Driver):
    """A driver of one categorical command: noise are slips of the finger and moments of doing something else.

    A subclass knows one world: what to choose next for a target, and what a wanderer does.
    """

    def __init__(self, kind: str, rng: np.random.Generator) -> None:
        super().__init__(kind, rng)
        self._slip = rng.uniform(0.02, 0.25)  # share of the ticks with another command than the one meant
        self._distracted_until = 0
        self._target: int | None = None

    def act(self, world: World) -> np.ndarray:
        """The class chosen at the current tick, float32 [1]."""
        return np.array([self._choose(world, world.state())], np.float32)

    @abc.abstractmethod
    def _towards(self, target: int, state: dict[str, Any]) -> int:
        """The best choice for making task number `target` happen."""

    @abc.abstractmethod
    def _wander(self, state: dict[str, Any]) -> int:
        """The choice of somebody without a target."""

    def _next_target(self, target: int, state: dict[str, Any]) -> int:
        """What a sloppy driver goes for now that went for `target` until the last tick."""
        return target

    def _choose(self, world: World, state: dict[str, Any]) -> int:
        if self.kind == "random":
            return int(self.rng.integers(int(world.action_high[0]) + 1))
        if self.kind == "wander":
            return self._wander(state)
        if self.kind == "expert":
            return self._towards(state["task"], state)
        if self._target is None:
            self._target = state["task"]
            if self.kind == "wrong":
                self._target = int(self._target + self.rng.integers(1, len(world.tasks))) % len(world.tasks)
        self._target = self._next_target(self._target, state)
        return self._sloppy(self._towards(self._target, state), state)

    def _sloppy(self, choice: int, state: dict[str, Any]) -> int:
        tick = int(state["tick"])
        if tick >= self._distracted_until and self.rng.random() < 0.015:
            self._distracted_until = tick + int(self.rng.integers(3, 9))
        is_off = tick < self._distracted_until or self.rng.random() < self._slip
        return self._wander(state) if is_off else choice


def saturate(wanted: np.ndarray) -> np.ndarray:
    """`wanted` within the limits (1 on every axis), shortened as a whole so that it keeps its direction."""
    return wanted * min(1.0, 1.0 / max(float(np.abs(wanted).max()), 1e-9))


@dataclass(frozen=True)
class Episode:
    """One driven episode of F frames, in the row convention of a dataset (see `EpisodeBatch`)."""

    frames: np.ndarray  # uint8 [F, H, W, 3]
    action: np.ndarray  # float32 [F, A], zeros at the last frame
    reward: np.ndarray  # float32 [F, K], arriving with the frame
    is_terminal: np.ndarray  # bool [F]
    vectors: dict[str, np.ndarray]  # float32 [F, k] by name: proprioception and probes of the contract
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
    driver = world.driver(kind or drawn, rng)
    observation = world.reset(seed, task)
    images, rewards, vectors = [observation.image], [world.rewards], [_vectors(observation, world)]
    actions, terminal, truncated = [], False, False
    while not (terminal or truncated):
        actions.append(driver.act(world))
        observation, reward, terminal, truncated = world.step(actions[-1])
        images.append(observation.image)
        rewards.append(reward)
        vectors.append(_vectors(observation, world))
    is_terminal = np.zeros(len(images), bool)
    is_terminal[-1] = terminal
    return Episode(
        frames=np.stack(images), action=np.stack([*actions, np.zeros_like(actions[0])]),
        reward=np.stack(rewards), is_terminal=is_terminal,
        vectors={name: np.stack([row[name] for row in vectors]) for name in vectors[0]},
        task=task, kind=KINDS.index(driver.kind), success=world.success(),
    )  # fmt: skip


def _vectors(observation: Observation, world: World) -> dict[str, np.ndarray]:
    return {**observation.vectors, **world.probes}


def episode_seed(seed: int, episode: int) -> int:
    """The seed of episode number `episode` of a recording, whoever drives it and in whatever order."""
    return int(np.random.SeedSequence([seed, episode]).generate_state(1, np.uint64)[0] >> 1)


def simulate(
    seed: int, episodes: int, kind: str | None = None, first: int = 0, world: str = "yard"
) -> dict[str, np.ndarray]:
    """Drives `episodes` episodes straight to arrays (E episodes, F frames in all).

    Keys: frames uint8 [F, H, W, 3], action float32 [F, A], reward float32 [F, K], is_terminal bool [F], the
    contract's vectors by name float32 [F, k], episode_start, episode_length, task, kind int64 [E], success
    bool [E].
    """
    made = make_world(world)
    driven = [drive(made, episode_seed(seed, first + i), kind) for i in range(episodes)]
    return join_episodes(driven)


def join_episodes(episodes: Sequence[Episode]) -> dict[str, np.ndarray]:
    """Concatenates episodes into the arrays that `simulate` documents."""
    names = ("frames", "action", "reward", "is_terminal")
    out = {name: np.concatenate([getattr(e, name) for e in episodes]) for name in names}
    out |= {name: np.concatenate([e.vectors[name] for e in episodes]) for name in episodes[0].vectors}
    lengths = np.array([len(e.frames) for e in episodes], np.int64)
    out["episode_start"] = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    out["episode_length"] = lengths
    out["task"] = np.array([e.task for e in episodes], np.int64)
    out["kind"] = np.array([e.kind for e in episodes], np.int64)
    out["success"] = np.array([e.success for e in episodes])
    return out


class ScriptedPolicy:
    """A driver kind as a policy for `run_episodes` (it looks at the worlds, not at the pictures).

    Without a kind every episode has one of the log mix, as recordings have.
    """

    def __init__(self, kind: str | None, seed: int = 0) -> None:
        self.kind, self.seed = kind, seed
        self._worlds: Sequence[World] = ()
        self._drivers: list[Driver] = []

    def bind(self, worlds: Sequence[World]) -> None:
        """The worlds whose state the drivers read."""
        self._worlds = worlds

    def reset(self, n: int, tasks: np.ndarray) -> None:
        """Fresh drivers, one for each world."""
        rngs = [np.random.default_rng([self.seed, i]) for i in range(len(self._worlds))]
        self._drivers = [
            world.driver(self.kind or LOG_MIX[int(rng.integers(len(LOG_MIX)))], rng)
            for world, rng in zip(self._worlds, rngs, strict=True)
        ]

    def act(self, images: np.ndarray, vectors: dict[str, np.ndarray], alive: np.ndarray) -> np.ndarray:
        """float32 [n, A], zeros for worlds that have ended."""
        out = np.zeros((len(self._worlds), len(self._worlds[0].action_low)), np.float32)
        for i in np.flatnonzero(alive).tolist():
            out[i] = self._drivers[i].act(self._worlds[i])
        return out


def quality(seed: int, episodes: int, world: str = "yard") -> dict[str, dict[str, float]]:
    """Mean own-task return, success and falls of the log mix (`data`) and of every kind alone."""
    made = make_world(world)
    rows: dict[str, dict[str, float]] = {}
    for kind in (None, *KINDS):
        driven = [drive(made, episode_seed(seed, i), kind) for i in range(episodes)]
        rows[kind or "data"] = {
            "return": float(np.mean([e.own_return for e in driven])),
            "success": float(np.mean([e.success for e in driven])),
            "fallen": float(np.mean([e.is_terminal[-1] for e in driven])),
            "frames": float(np.mean([len(e.frames) for e in driven])),
        }
    return rows


def save(out: Path, data: dict[str, np.ndarray]) -> None:
    """Writes an uncompressed .npz, whole or not at all."""
    if out.suffix != ".npz":
        raise UserError(f"--out {out} must end in .npz.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole.aside(out) as new:
        np.savez(new, **data)  # type: ignore[arg-type]  # the stub takes every name for allow_pickle


@dataclass(frozen=True)
class Args:
    """Drives a world with scripted drivers and writes the episodes to one .npz, or reports their quality."""

    out: Path | None = None
    """The .npz to write; without it only the quality table is printed."""
    world: str = "yard"
    """World to drive in."""
    episodes: int = 1500
    """How many episodes."""
    seed: int = 0
    """Same seed, same episodes."""
    jobs: int = 1
    """Processes; the result does not depend on it."""


def worker_pool(jobs: int) -> ProcessPoolExecutor:
    """Processes that can render: spawned, because a forked child must not inherit a GL context.

    They ignore Ctrl-C: the parent gets it too, and ends them (`end_pool`).
    """
    return ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_begin_worker)


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    follow_parent()


def end_pool(pool: ProcessPoolExecutor) -> None:
    """End the processes of a pool in the middle of their work."""
    workers = list((pool._processes or {}).values())  # terminate_workers() has them from Python 3.14 on
    pool.shutdown(wait=False, cancel_futures=True)
    for worker in workers:
        worker.terminate()


def _simulate_parallel(args: Args) -> dict[str, np.ndarray]:
    if args.jobs == 1:
        return simulate(args.seed, args.episodes, world=args.world)
    firsts = range(0, args.episodes, _CHUNK)
    with worker_pool(args.jobs) as pool:
        futures = [
            pool.submit(
                simulate, args.seed, min(_CHUNK, args.episodes - first), first=first, world=args.world
            )
            for first in firsts
        ]
        try:
            parts = [future.result() for future in futures]
        except BaseException:
            end_pool(pool)
            raise
    out = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    out["episode_start"] = np.cumsum(out["episode_length"]) - out["episode_length"]
    return out


def cli() -> None:
    """The command `python -m d4_sim.driver`."""
    import tyro

    args = tyro.cli(Args, prog="python -m d4_sim.driver")
    world_class(args.world)
    if args.episodes < 1 or args.jobs < 1 or args.seed < 0:
        raise UserError("--episodes and --jobs must be at least 1 and --seed at least 0.")
    if args.out is None:
        print(f"{'driver':8s} {'return':>7s} {'success':>8s} {'fallen':>7s} {'frames':>7s}")
        for name, row in quality(args.seed, args.episodes, args.world).items():
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
