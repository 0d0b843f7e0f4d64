"""The game itself (package `crafter`), made reproducible, with a peaceful variant and remembered terrain."""

from __future__ import annotations

import functools
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from d4_datasets.errors import UserError

_REMEMBERED = 512  # terrains, 20 kB each: making one takes a second, and policies are compared on the same


class Members(dict):
    """The creatures of a chunk in the order of their arrival.

    The game keeps them in a set, whose order depends on addresses in memory; which of them vanishes is drawn
    by position, so that two processes part within some hundred ticks of the same seed and actions.
    """

    def add(self, creature: Any) -> None:
        """Put one in, at the end."""
        self[creature] = None

    def remove(self, creature: Any) -> None:
        """Take one out. Raises KeyError if it is not here."""
        del self[creature]


@dataclass(frozen=True)
class _Terrain:
    """A generated world: materials, creatures as (class, position), and the state of the random numbers."""

    materials: np.ndarray
    creatures: tuple[tuple[type, tuple[int, int]], ...]
    random: Any


@functools.cache
def game_class() -> type:
    """The game as a class with `begin(seed)` and the package's `step`.

    Raises:
        UserError: the package is not installed.
    """
    try:
        import crafter
        from crafter import objects, worldgen
    except ImportError as error:
        raise UserError(
            "the world crafter needs a package that is not here "
            f"({error}): pip install 'crafter>=1.8.3,<1.9', or d4 with its extra [crafter]"
        ) from error

    hostile = (objects.Zombie, objects.Skeleton)

    class Game(crafter.Env):
        """One game; `peaceful` has neither zombies nor skeletons."""

        _terrains: ClassVar[OrderedDict[tuple[int, bool], _Terrain]] = OrderedDict()

        def __init__(self, peaceful: bool) -> None:
            super().__init__(reward=False, length=None, seed=0)
            self.peaceful = peaceful

        @property
        def world(self) -> Any:
            """Materials and creatures."""
            return self._world

        @property
        def player(self) -> Any:
            """The player, with `pos`, `facing`, `inventory`, `achievements`, `sleeping`, `health`."""
            return self._player

        def begin(self, seed: int) -> np.ndarray:
            """Start the game that belongs to `seed`; returns the first picture."""
            terrain = self._terrain(seed)
            self._clear(seed)
            self._world._mat_map[:] = terrain.materials
            for kind, pos in terrain.creatures:
                self._world.add(self._create(kind, pos))
            self._world.random.set_state(terrain.random)
            return self._obs()

        def _clear(self, seed: int) -> None:
            """An empty world with a player in its middle."""
            self._step, world = 0, self._world
            world.reset(seed=hash((seed, 1)) % (2**31 - 1))  # as the package does; numbers hash to themselves
            world._chunks = defaultdict(Members)
            self._update_time()
            self._player = objects.Player(world, (world.area[0] // 2, world.area[1] // 2))
            self._last_health = self._player.health
            self._unlocked: set[str] = set()
            world.add(self._player)

        def _create(self, kind: type, pos: tuple[int, int]) -> Any:
            owner = (self._player,) if kind in hostile else ()
            return kind(self._world, pos, *owner)

        def _terrain(self, seed: int) -> _Terrain:
            """What the package generates for a seed, made or remembered."""
            known, key = self._terrains, (seed, self.peaceful)
            if key not in known:
                self._clear(seed)
                worldgen.generate_world(self._world, self._player)
                creatures = [o for o in self._world.objects if o is not self._player]
                known[key] = _Terrain(
                    self._world._mat_map.copy(),
                    tuple(
                        (type(o), (int(o.pos[0]), int(o.pos[1])))
                        for o in creatures
                        if not (self.peaceful and isinstance(o, hostile))
                    ),
                    self._world.random.get_state(),
                )
                if len(known) > _REMEMBERED:
                    known.popitem(last=False)
            known.move_to_end(key)
            return known[key]

        def _balance_object(self, chunk: Any, objs: Any, cls: type, *rest: Any) -> None:
            if not (self.peaceful and issubclass(cls, hostile)):
                super()._balance_object(chunk, objs, cls, *rest)

    return Game
