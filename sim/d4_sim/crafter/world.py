"""Crafter as a `d4_sim.world.World`: pictures of 64x64, one of 17 commands a tick, events as tasks."""

from __future__ import annotations

import functools
import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from d4_datasets.contract import Contract
from d4_sim.crafter.game import Game
from d4_sim.world import Observation

if TYPE_CHECKING:
    from d4_sim.driver import Driver

# The way to a diamond in the order in which it is mostly gone, then what keeps the player alive.
CHAIN = (
    "collect_wood", "place_table", "make_wood_pickaxe", "collect_stone", "make_stone_pickaxe",
    "collect_coal", "collect_iron", "place_furnace", "make_iron_pickaxe", "collect_diamond",
)  # fmt: skip
SURVIVAL = ("collect_drink", "eat_cow", "wake_up")
HORIZON = 500  # ticks: hunger, thirst and one whole night


class Crafter:
    """See `d4_sim.world.World`. A task is an event: its reward is how often it happened within the tick.

    The picture shows 9x7 fields around the player and the inventory below them. The game moves at the end of
    a tick, whenever within it the command came. Death is the only terminal.
    """

    peaceful = False
    tasks = (*CHAIN, *SURVIVAL)
    horizon = HORIZON
    success_reward = 1.0
    event_tasks = True
    action_low = np.zeros(1, np.float32)
    action_high = np.full(1, 16.0, np.float32)

    def __init__(self) -> None:
        self._game = Game(self.peaceful)
        self._task = self._tick = 0
        self._counts = self._before = np.zeros(len(self.tasks), np.int64)

    @classmethod
    def contract_path(cls) -> Path:
        """The contract file, the same for both difficulties."""
        return Path(__file__).with_name("crafter.yaml")

    @functools.cached_property
    def contract(self) -> Contract:
        """The robot contract of this world."""
        return Contract.load(self.contract_path())

    @property
    def version(self) -> str:
        """The game's package."""
        return f"Crafter {importlib.metadata.version('crafter')}"

    @property
    def probes(self) -> dict[str, np.ndarray]:
        """None: everything that matters is in the picture or out of sight."""
        return {}

    @property
    def achievements(self) -> dict[str, int]:
        """How often each of the game's 22 achievements happened in this episode, tasks or not."""
        return {name: int(count) for name, count in self._game.player.achievements.items()}

    @property
    def rewards(self) -> np.ndarray:
        """How often each task's event happened in the tick that led here, float32 [K]."""
        return (self._counts - self._before).astype(np.float32)

    def reset(self, seed: int, task: int) -> Observation:
        """Starts the game of `seed`; `task` is the one that `success` asks for."""
        if not 0 <= task < len(self.tasks):
            raise ValueError(f"task {task} is not in 0..{len(self.tasks) - 1}")
        self._task, self._tick = task, 0
        picture = self._game.begin(seed)
        self._counts = self._before = self._count()
        return Observation(picture)

    def step(self, action: np.ndarray) -> tuple[Observation, np.ndarray, bool, bool]:
        """One tick of the game with command number `action` (float32 [1], rounded and clipped)."""
        number = int(np.clip(np.rint(action[0]), 0, self.action_high[0]))
        picture = self._game.step(number)
        self._tick += 1
        self._before, self._counts = self._counts, self._count()
        dead = bool(self._game.player.health <= 0)
        return Observation(picture), self.rewards, dead, self._tick >= self.horizon

    def success(self) -> bool:
        """Whether the event of the task has happened in this episode."""
        return bool(self._counts[self._task] > 0)

    def state(self) -> dict[str, Any]:
        """Copies of everything a scripted player may look at.

        materials: uint8 [64, 64], indexed [x, y] (y down): number of the field's material in the package's
        list, from 1 on; creatures: {(x, y): class name}; position, facing: (x, y); inventory, achievements:
        counts by name (all 22 achievements); sleeping; daylight 0..1; task, tick.
        """
        world, player = self._game.world, self._game.player
        creatures = {tuple(map(int, o.pos)): type(o).__name__ for o in world.objects if o is not player}
        return {
            "materials": world._mat_map.copy(),
            "creatures": creatures,
            "position": tuple(map(int, player.pos)),
            "facing": tuple(map(int, player.facing)),
            "inventory": dict(player.inventory),
            "achievements": dict(player.achievements),
            "sleeping": bool(player.sleeping),
            "daylight": float(world.daylight),
            "task": self._task,
            "tick": self._tick,
        }

    def driver(self, kind: str, rng: np.random.Generator) -> Driver:
        """A scripted player (see `d4_sim.driver`)."""
        from d4_sim.crafter.player import CrafterPlayer

        return CrafterPlayer(kind, rng)

    def _count(self) -> np.ndarray:
        return np.array([self._game.player.achievements[name] for name in self.tasks])


class CrafterPeaceful(Crafter):
    """The same without zombies and skeletons: thirst, hunger, tiredness and lava are left."""

    peaceful = True
