"""What a world is: the small interface every validation environment implements, and a registry by name."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import numpy as np

from d4_datasets import whole
from d4_datasets.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from d4_datasets.contract import Contract
    from d4_sim.driver import Driver

# name -> "module:class"; imported on first use so that listing worlds needs no GL and no MuJoCo.
_WORLDS: dict[str, str] = {
    "yard": "d4_sim.yard:Yard",
    "yard_dusk": "d4_sim.yard:YardDusk",
    "arm": "d4_sim.arm:Arm",
    "push": "d4_sim.suite.push:Push",
    "arm_push": "d4_sim.suite.arm_push:ArmPush",
    "cartpole_swingup": "d4_sim.suite.control:CartpoleSwingup",
    "reacher_easy": "d4_sim.suite.control:ReacherEasy",
    "ball_in_cup_catch": "d4_sim.suite.control:BallInCupCatch",
    "finger_spin": "d4_sim.suite.control:FingerSpin",
    "cheetah_run": "d4_sim.suite.control:CheetahRun",
    "walker_walk": "d4_sim.suite.control:WalkerWalk",
    "walker": "d4_sim.suite.control:Walker",
    "fetch": "d4_sim.suite.fetch:Fetch",
    "crafter": "d4_sim.crafter.world:Crafter",
    "crafter_peaceful": "d4_sim.crafter.world:CrafterPeaceful",
}


@dataclass(frozen=True)
class Observation:
    """One tick: `image` uint8 [H, W, 3] RGB, and proprioception in `vectors` (float32 [k] by name)."""

    image: np.ndarray
    vectors: dict[str, np.ndarray] = field(default_factory=dict)


@runtime_checkable
class World(Protocol):
    """A lockstep environment with K tasks whose rewards are all computed at every tick.

    Tick k is at k / rate seconds. `step(action)` takes the action chosen at the current frame, lets it act
    from `latency_ms` after the tick (before that the previous one is still in force), returns the next frame.
    A world whose tasks are events, done once they have happened, has an attribute `event_tasks = True`; in
    others a task is a state to be in at the end.
    """

    tasks: tuple[str, ...]
    action_low: np.ndarray  # float32 [A]
    action_high: np.ndarray  # float32 [A]
    horizon: int  # ticks until `truncated`
    success_reward: float  # own-task reward at the last tick that counts as success in logs

    @property
    def contract(self) -> Contract:
        """The robot contract of this world."""
        ...

    @classmethod
    def contract_path(cls) -> Path:
        """The file of that contract; worlds that differ only in looks share one."""
        ...

    @property
    def probes(self) -> dict[str, np.ndarray]:
        """What the contract's probes measure at the current frame, float32 [k] by name."""
        ...

    @property
    def rewards(self) -> np.ndarray:
        """Reward of every task that arrives with the current frame, float32 [K]."""
        ...

    def reset(self, seed: int, task: int) -> Observation:
        """Starts the episode that belongs to `seed`; the layout does not depend on the task."""
        ...

    def step(self, action: np.ndarray) -> tuple[Observation, np.ndarray, bool, bool]:
        """Advances one tick: (observation, reward float32 [K], terminal, truncated)."""
        ...

    def success(self) -> bool:
        """Whether the current state counts as success of the current task."""
        ...

    def state(self) -> dict[str, Any]:
        """Privileged state for scripted drivers and tests (`task`, `tick`, others by world)."""
        ...

    def driver(self, kind: str, rng: np.random.Generator) -> Driver:
        """A scripted driver of this robot for one episode; kinds are those of `d4_sim.driver`."""
        ...


def has_events(world: World) -> bool:
    """Whether the tasks of a world are events."""
    return bool(getattr(world, "event_tasks", False))


def world_names() -> tuple[str, ...]:
    """Names that `make_world` knows."""
    return tuple(_WORLDS)


def world_class(name: str) -> type[World]:
    """The class of a world, whatever disturbs it; `yard_128` is the yard in pictures of 128 x 128.

    Raises UserError for an unknown name, and for a world whose pictures have one size only.
    """
    name, *_ = name.split("+")
    base, size = _base_and_size(name)
    if base not in _WORLDS:
        raise UserError(f"unknown world '{name}': choose one of {', '.join(_WORLDS)}.")
    module, _, attribute = _WORLDS[base].partition(":")
    try:
        world: Any = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise UserError(f"the world '{name}' cannot be imported: {error}.") from error
    if size is None:
        return cast("type[World]", world)
    if not hasattr(world, "at_size"):
        raise UserError(f"the world '{base}' draws its pictures in one size only.")
    return cast("type[World]", world.at_size(size))


def _base_and_size(name: str) -> tuple[str, int | None]:
    base, _, size = name.rpartition("_")
    return (base, int(size)) if base in _WORLDS and size.isdecimal() else (name, None)


def resized(contract: Contract, size: int) -> Contract:
    """A contract of a world for square pictures of `size` pixels; the same one if it has these."""
    if all(camera.size == (size, size) for camera in contract.images):
        return contract
    streams = tuple(replace(s, size=(size, size)) if s.is_image else s for s in contract.observations)
    return replace(contract, name=f"{contract.name}_{size}", observations=streams)


def contract_of(name: str) -> Contract:
    """The contract of a world, for pictures of the size that it is named with."""
    from d4_datasets.contract import Contract

    world: Any = world_class(name)
    contract, size = Contract.load(world.contract_path()), getattr(world, "image_size", None)
    return contract if size is None else resized(contract, size)


def contract_text(name: str) -> str:
    """The robot.yaml of a world: its file, or what that becomes in pictures of another size."""
    from d4_datasets.contract import Contract

    path, contract = world_class(name).contract_path(), contract_of(name)
    return path.read_text(encoding="utf-8") if contract == Contract.load(path) else contract.to_yaml()


def write_contract(path: Path, name: str) -> None:
    """Write the robot.yaml of a world.

    Raises:
        UserError: something else lies there, which nobody asked to replace.
    """
    from d4_datasets.contract import Contract

    if path.exists():
        try:
            there = _base_and_size(Contract.load(path).name)[0]
        except UserError:
            there = ""
        if there not in _WORLDS:
            raise UserError(f"{path} is there already and not the contract of a world: choose another --out")
    whole.write(path, contract_text(name))


def make_world(name: str) -> World:
    """Builds a world by name, which disturbances may follow: `yard+latency=60` (`d4_sim.suite.disturb`).

    Raises UserError for an unknown name and when the machine cannot render.
    """
    world = world_class(name)()
    _, *disturbances = name.split("+")
    if not disturbances:
        return world
    from d4_sim.suite.disturb import disturbed

    return disturbed(world, disturbances)
