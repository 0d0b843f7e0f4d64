"""The game itself (package `crafter`), made reproducible, with a peaceful variant and remembered terrain."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from d4_datasets.errors import UserError

_REMEMBERED = 512  # terrains, 20 kB each: making one takes a second, and policies are compared on the same


def package() -> SimpleNamespace:
    """The modules `env`, `objects` and `worldgen` of the package.

    Raises:
        UserError: it is not installed.
    """
    try:
        from crafter import env, objects, worldgen
    except ImportError as error:
        raise UserError(
            f"the world crafter needs a package that is not here ({error}): "
            "pip install 'crafter>=1.8.3,<1.9', or d4 with its extra [crafter]"
        ) from error
    return SimpleNamespace(env=env, objects=objects, worldgen=worldgen)


class Members(dict):
    """The creatures of a chunk in the order of their arrival.

    The package keeps them in a set, whose order depends on addresses in memory; which of them vanishes is
    drawn by position, so that two processes part within some hundred ticks of the same seed and actions.
    """

    def add(self, creature: Any) -> None:
        """Put one in, at the end."""
        self[creature] = None

    def remove(self, creature: Any) -> None:
        """Take one out. Raises KeyError if it is not here."""
        del self[creature]


@dataclass(frozen=True)
class Terrain:
    """A generated world: materials, creatures as (class, position), and the state of the random numbers."""

    materials: np.ndarray
    creatures: tuple[tuple[type, tuple[int, int]], ...]
    random: Any


class Game:
    """One game after the other; `peaceful` has neither zombies nor skeletons.

    Raises:
        UserError: the package is not installed.
    """

    _terrains: ClassVar[OrderedDict[tuple[int, bool], Terrain]] = OrderedDict()

    def __init__(self, peaceful: bool) -> None:
        self._package = package()
        self._hostile = (self._package.objects.Zombie, self._package.objects.Skeleton)
        self._peaceful = peaceful
        self._env = self._package.env.Env(reward=False, length=None, seed=0)
        if peaceful:
            balance = self._env._balance_object

            def without_hostile(chunk: Any, creatures: Any, kind: type, *rest: Any) -> None:
                if not issubclass(kind, self._hostile):
                    balance(chunk, creatures, kind, *rest)

            self._env._balance_object = without_hostile

    @property
    def world(self) -> Any:
        """Materials and creatures."""
        return self._env._world

    @property
    def player(self) -> Any:
        """The player, with `pos`, `facing`, `inventory`, `achievements`, `sleeping`, `health`."""
        return self._env._player

    def begin(self, seed: int) -> np.ndarray:
        """Start the game that belongs to `seed`; returns the first picture, uint8 [64, 64, 3]."""
        terrain = self._terrain(seed)
        self._clear(seed)
        self.world._mat_map[:] = terrain.materials
        for kind, pos in terrain.creatures:
            owner = (self.player,) if kind in self._hostile else ()
            self.world.add(kind(self.world, pos, *owner))
        self.world.random.set_state(terrain.random)
        return self._env._obs()

    def step(self, action: int) -> np.ndarray:
        """One tick with command number `action`; returns the next picture."""
        return self._env.step(action)[0]

    def _clear(self, seed: int) -> None:
        """An empty world with a player in its middle, as the package's `reset` makes it."""
        env, world = self._env, self.world
        world.reset(seed=hash((seed, 1)) % (2**31 - 1))  # numbers hash to themselves, in every process
        world._chunks = defaultdict(Members)
        env._step, env._unlocked = 0, set()
        env._update_time()
        env._player = self._package.objects.Player(world, (world.area[0] // 2, world.area[1] // 2))
        env._last_health = env._player.health
        world.add(env._player)

    def _terrain(self, seed: int) -> Terrain:
        """What the package generates for a seed, made or remembered."""
        known, key = self._terrains, (seed, self._peaceful)
        if key not in known:
            self._clear(seed)
            self._package.worldgen.generate_world(self.world, self.player)
            left_out = (self._package.objects.Player, *(self._hostile if self._peaceful else ()))
            creatures = [o for o in self.world.objects if not isinstance(o, left_out)]
            placed = tuple((type(o), (int(o.pos[0]), int(o.pos[1]))) for o in creatures)
            known[key] = Terrain(self.world._mat_map.copy(), placed, self.world.random.get_state())
            if len(known) > _REMEMBERED:
                known.popitem(last=False)
        known.move_to_end(key)
        return known[key]
