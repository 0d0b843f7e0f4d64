"""What robots do to a policy, done to a world: late and lost commands, noise, lost frames, other looks.

A disturbed world is a world by name, such as `yard+latency=60+noise=0.1`: wherever a world is named, its
disturbances may be. All of it follows from the seed of the episode, so that two policies meet the same.

latency=MS       capture to command in force, instead of the contract's latency
latency=FILE     capture to command in force, missed commands and lost frames, drawn as often as in a measured
                 report (d4-bench latency, a robot), tick by tick: which of them came together is not in a
                 report. A missed command leaves the last one in force, which is worse than what the robot's
                 node does: it sends the plan's next one, and tells the policy
latency=measured the same of docs/results/robot/latency-20hz.json in this repository
jitter=MS        a delay of each command: the size of a normal draw of this deviation, 0.8 of it on
                 average; none overtakes another
noise=SHARE      standard deviation of every pixel's noise, as a share of the full range
drop=SHARE       frames that never arrive: the picture and what came with it are those of the tick before
look=NUMBER      other colours, textures and lights, a set of them for every number (MuJoCo worlds)
light=FACTOR     the whole picture darker (below 1) or brighter
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from d4_datasets.errors import UserError
from d4_sim.mujoco_world import MujocoWorld
from d4_sim.world import Observation, World, world_class

if TYPE_CHECKING:
    from d4_datasets.contract import Contract
    from d4_sim.driver import Driver

_STREAM = 7_040_417  # keeps these draws apart from those of the world with the same seed
MEASURED = Path(__file__).parents[3] / "docs/results/robot/latency-20hz.json"

_QUANTILES = {"min": 0.0, "p50": 0.5, "p99": 0.99, "p99.9": 0.999, "max": 1.0}


@dataclass(frozen=True)
class Lateness:
    """How late commands were in a measured run.

    Attributes:
        late_ms: capture to command, at the quantiles of `_QUANTILES`.
        missed: share of the ticks whose frame came, of those in which the command did not go out.
        lost: share of the ticks without a frame of their own, and so without a command.
    """

    late_ms: tuple[float, ...]
    missed: float
    lost: float

    @classmethod
    def load(cls, path: Path) -> Lateness:
        """From the JSON that `d4-bench latency` or the policy node wrote.

        Raises:
            UserError: there is no such file, or it is something else.
        """
        try:
            report = json.loads(path.read_text())
            stage, counts = report["stages_ms"]["lateness"], report["counts"]
            promised = float(report["latency_ms"])  # from which lateness counts
            late = tuple(promised + max(0.0, float(stage[key])) for key in _QUANTILES)
            ticks = max(1, int(counts["ticks"]))
            lost = int(counts.get("ticks without a frame of their own", 0))
            missed = max(0, int(counts.get("missed", 0)) - lost)  # whose frame was lost is missed for that
        except OSError as error:
            raise UserError(f"the latency report {path} cannot be read: {error.strerror}.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is no latency report of d4: it lacks latency_ms, stages_ms.lateness or counts.ticks "
                "(d4-bench latency --out FILE writes one)."
            ) from error
        return cls(late, missed / max(1, ticks - lost), lost / ticks)

    def draw(self, rng: np.random.Generator) -> float:
        """Capture to command of one tick, in ms."""
        return float(np.interp(rng.uniform(), tuple(_QUANTILES.values()), self.late_ms))


@dataclass(frozen=True)
class Disturbance:
    """What is done to a world; see the module."""

    latency: float | Lateness | None = None
    jitter: float = 0.0
    noise: float = 0.0
    drop: float = 0.0
    look: int | None = None
    light: float = 1.0

    @classmethod
    def parse(cls, parts: Sequence[str]) -> Disturbance:
        """From texts NAME=VALUE.

        Raises:
            UserError: an unknown name, or a value out of range.
        """
        known = {f.name: _READ[f.name] for f in fields(cls)}
        values: dict[str, Any] = {}
        for part in parts:
            name, is_given, text = part.partition("=")
            if name not in known or not is_given:
                raise UserError(f"'{part}' is no disturbance: give NAME=VALUE with {', '.join(known)}.")
            if name in values:
                raise UserError(f"'{part}': {name} is given twice.")
            values[name] = known[name](name, text)
        return cls(**values)


def _number(most: float, least: float = 0.0, whole: bool = False) -> Any:
    def read(name: str, text: str) -> float:
        try:
            value = int(text) if whole else float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            kind = "whole number" if whole else "number"
            raise UserError(f"{name}={text}: give a {kind} from {least:g} to {most:g}.")
        return value

    return read


def _latency(name: str, text: str) -> float | Lateness:
    if path := _report(text):
        return Lateness.load(path)
    if "/" in text:
        raise UserError(f"{name}={text}: a latency report is a .json file without a + in its path.")
    return float(_number(1000.0)(name, text))


_READ = {
    "latency": _latency, "jitter": _number(1000.0), "noise": _number(1.0), "drop": _number(0.95),
    "look": _number(2.0**31, whole=True), "light": _number(4.0),
}  # fmt: skip


@dataclass
class _Commands:
    """Commands on their way: which one is in force at a time, in the order in which they were sent."""

    waiting: deque[tuple[float, np.ndarray]] = field(default_factory=deque)
    newest_ms: float = 0.0

    def send(self, action: np.ndarray, at_ms: float) -> None:
        """It takes hold then, and not before those that were sent earlier."""
        self.newest_ms = max(self.newest_ms, at_ms)
        self.waiting.append((self.newest_ms, np.asarray(action, np.float32)))

    def arrived(self, now_ms: float) -> np.ndarray | None:
        """The newest of those that have arrived since the last call."""
        newest = None
        while self.waiting and self.waiting[0][0] <= now_ms:
            newest = self.waiting.popleft()[1]
        return newest


class Disturbed:
    """A world with a disturbance around it; members of `d4_sim.world.World` not here are the world's own.

    Rewards, probes, success and the drivers' knowledge are those of the undisturbed state.
    """

    def __init__(self, world: World, disturbance: Disturbance) -> None:
        self._world, self._how = world, disturbance
        self._period_ms = 1000.0 / world.contract.rate_hz
        self._commands = _Commands()
        self._rng = np.random.default_rng()
        self._tick = 0
        self._seen: Observation | None = None
        self._is_mute = False  # a tick without a frame of its own has no command of its own here
        self._in_force = np.zeros_like(world.action_low)
        if disturbance.look is not None:
            if not isinstance(world, MujocoWorld):
                raise UserError(f"look= needs a MuJoCo world, and {world.contract.name} is none; try light=.")
            world.redress(disturbance.look)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._world, name)

    @property
    def contract(self) -> Contract:
        """The robot contract of the world."""
        return self._world.contract

    def driver(self, kind: str, rng: np.random.Generator) -> Driver:
        """A scripted driver, who knows the state and nothing of the disturbance."""
        return self._world.driver(kind, rng)

    def reset(self, seed: int, task: int) -> Observation:
        """Starts the episode of `seed`; the first frame always arrives."""
        self._rng = np.random.default_rng([seed, _STREAM])
        self._commands, self._tick, self._is_mute = _Commands(), 0, False
        self._in_force = np.zeros_like(self._world.action_low)
        self._seen = self._spoil(self._world.reset(seed, task))
        return self._seen

    def step(self, action: np.ndarray) -> tuple[Observation, np.ndarray, bool, bool]:
        """The command takes hold when it arrives, and what is seen is what the camera made of it."""
        self._send(action)
        if isinstance(self._world, MujocoWorld):
            observation, reward, terminal, truncated = self._by_the_clock(self._world)
        else:
            observation, reward, terminal, truncated = self._by_the_tick()
        self._tick += 1
        lost, dropped = self._rng.uniform(size=2)
        self._is_mute = isinstance(self._how.latency, Lateness) and lost < self._how.latency.lost
        if dropped >= self._how.drop and not self._is_mute:
            self._seen = self._spoil(observation)
        assert self._seen is not None
        return self._seen, reward, terminal, truncated

    def _send(self, action: np.ndarray) -> None:
        latency, due = self._how.latency, float(self._world.contract.latency_ms)
        missed, luck = 0.0, self._rng.uniform(size=2)
        if isinstance(latency, Lateness):
            due = latency.draw(self._rng)
            missed = latency.missed
        elif latency is not None:
            due = latency
        if self._how.jitter:
            due += abs(self._rng.normal(0.0, self._how.jitter))
        if luck[0] >= missed and not self._is_mute:
            self._commands.send(action, self._tick * self._period_ms + due)

    def _by_the_clock(self, world: MujocoWorld) -> tuple[Observation, np.ndarray, bool, bool]:
        """One tick in substeps, each under the command that has arrived by its middle."""
        substeps, _ = world.substeps
        length_ms = self._period_ms / substeps
        for i in range(substeps):
            now_ms = self._tick * self._period_ms + (i + 0.5) * length_ms
            arrived = self._commands.arrived(now_ms)
            if arrived is not None:
                world.command(arrived)
            world.advance(1)
        return world.frame()

    def _by_the_tick(self) -> tuple[Observation, np.ndarray, bool, bool]:
        """One tick of a world without a clock: a command later than its tick counts in the next one."""
        arrived = self._commands.arrived((self._tick + 1) * self._period_ms - 1e-6)
        if arrived is not None:
            self._in_force = arrived
        return self._world.step(self._in_force)

    def _spoil(self, observation: Observation) -> Observation:
        how = self._how
        if not how.noise and how.light == 1.0:
            return observation
        picture = observation.image.astype(np.float32) * how.light
        if how.noise:
            noise = self._rng.standard_normal(picture.shape, dtype=np.float32)
            picture += 255.0 * how.noise * noise
        image = np.clip(np.rint(picture), 0, 255).astype(np.uint8)
        return Observation(image, observation.vectors)


def slug(parts: Sequence[str]) -> str:
    """A name for files of what happened under these disturbances, and in which report."""
    named = ((name, _report(text), text) for name, _, text in (part.partition("=") for part in parts))
    short = [f"{name}-{f'{path.stem}-{_hash(path)}' if path else text}" for name, path, text in named]
    return re.sub(r"[^\w.-]+", "-", "-".join(short))


def file_name(world: str) -> str:
    """A world's name for files, whatever disturbs it."""
    name, *parts = world.split("+")
    return f"{name}-{slug(parts)}" if parts else name


def contents(parts: Sequence[str]) -> str:
    """What the reports among these disturbances hold, as a key; empty without any."""
    paths = [path for part in parts if (path := _report(part.partition("=")[2]))]
    return " ".join(_hash(path) for path in paths)


def _report(text: str) -> Path | None:
    """The latency report that a value names, if it does."""
    if text == "measured":
        return MEASURED
    return Path(text) if Path(text).suffix == ".json" else None


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:6]


def fitting(world: str, parts: Sequence[str]) -> tuple[str, ...]:
    """The disturbances that a world has: only those of MuJoCo can look different."""
    is_mujoco = issubclass(world_class(world), MujocoWorld)
    return tuple(each for each in parts if is_mujoco or "look=" not in each)


def disturbed(world: World, parts: Sequence[str]) -> World:
    """The world under these disturbances (texts NAME=VALUE). Raises UserError for one that does not exist."""
    return Disturbed(world, Disturbance.parse(parts))  # type: ignore[return-value]  # by __getattr__
