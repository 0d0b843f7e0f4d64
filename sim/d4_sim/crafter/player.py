"""A scripted player of Crafter that knows the map and the recipes, and players of lesser quality."""

from __future__ import annotations

from typing import Any

import numpy as np
from crafter import constants

from d4_sim.crafter.paths import MOVES, Cell, add, route
from d4_sim.crafter.world import CHAIN, Crafter
from d4_sim.driver import ChoiceDriver

_ACTIONS = {name: number for number, name in enumerate(constants.actions)}
_STEPS: dict[str, Cell] = {**dict(MOVES), "noop": (0, 0)}
_CODES = {name: number for number, name in enumerate(constants.materials, 1)}
_WALKABLE = [_CODES[name] for name in constants.walkable]
_SOURCES = {next(iter(info["receive"])): name for name, info in constants.collect.items()}  # wood: tree, ...
_CREATURES = {"eat_cow": "Cow", "defeat_zombie": "Zombie", "defeat_skeleton": "Skeleton"}
_ENOUGH, _LITTLE = 7, 3  # food and drink
_FAR = 12.0  # cost of a way from which on a new table is better than an old one
_MOST = 9  # of one thing in the inventory


class CrafterPlayer(ChoiceDriver):
    """See `d4_sim.driver.ChoiceDriver`. Every expert and most others also look after themselves."""

    def __init__(self, kind: str, rng: np.random.Generator) -> None:
        super().__init__(kind, rng)
        self._careful = bool(rng.random() < 0.8) or kind == "expert"
        self._filling = ""  # food or drink, from when there is little until there is enough
        self._heading, self._heading_until = "noop", 0
        self._counted = -1  # events of the target when it became the target

    # -- ChoiceDriver ----------------------------------------------------------------------------------------

    def _towards(self, target: int, state: dict[str, Any]) -> int:
        self._look(state)
        choice = self._survive() if self._careful else ""
        return _ACTIONS[choice or self._pursue(Crafter.tasks[target])]

    def _wander(self, state: dict[str, Any]) -> int:
        """Straight on for some ticks, digging at what is in the way now and then, rarely anything at all."""
        self._look(state)
        if self.rng.random() < 0.04:
            return int(self.rng.integers(len(_ACTIONS)))
        ahead = add(self._at, _STEPS[self._heading])
        if state["tick"] >= self._heading_until or self._is("lava", ahead):
            self._heading_until = state["tick"] + int(self.rng.integers(2, 10))
            self._heading = MOVES[self.rng.integers(len(MOVES))][0]
        if not self._is_free(self._front) and self.rng.random() < 0.5:
            return _ACTIONS["do"]
        is_deadly = self._is("lava", add(self._at, _STEPS[self._heading]))
        return _ACTIONS["noop" if is_deadly else self._heading]

    def _next_target(self, target: int, state: dict[str, Any]) -> int:
        """After an event or two the next step of the way to the diamond, or anything else."""
        done = state["achievements"]
        if self._counted < 0:
            self._counted = done[Crafter.tasks[target]]
        if done[Crafter.tasks[target]] == self._counted or self.rng.random() < 0.3:
            return target
        undone = [i for i, name in enumerate(CHAIN) if not done[name]]
        goes_on = bool(undone) and self.rng.random() < 0.8
        target = undone[0] if goes_on else int(self.rng.integers(len(Crafter.tasks)))
        self._counted = done[Crafter.tasks[target]]
        return target

    # -- what the player sees --------------------------------------------------------------------------------

    def _look(self, state: dict[str, Any]) -> None:
        self._state, self._map = state, state["materials"]
        self._creatures: dict[Cell, str] = state["creatures"]
        self._at: Cell = state["position"]
        self._has: dict[str, int] = state["inventory"]
        self._front = add(self._at, state["facing"])

    def _material(self, cell: Cell) -> int:
        """Number of a cell's material, 0 beyond the edge."""
        is_inside = 0 <= cell[0] < self._map.shape[0] and 0 <= cell[1] < self._map.shape[1]
        return int(self._map[cell]) if is_inside else 0

    def _is(self, name: str, cell: Cell) -> bool:
        return self._material(cell) == _CODES[name]

    def _is_free(self, cell: Cell) -> bool:
        return self._material(cell) in _WALKABLE and cell not in self._creatures

    def _costs(self) -> np.ndarray:
        """Ticks to enter every cell, [64, 64]: a step, and a blow or two for what has to go first."""
        price = np.full(len(_CODES) + 1, np.inf)
        price[_WALKABLE] = 1.0
        for name, info in constants.collect.items():
            has_tools = all(self._has[tool] >= count for tool, count in info["require"].items())
            if has_tools and info["leaves"] in constants.walkable and name not in constants.walkable:
                price[_CODES[name]] = 2.0
        if self._has["stone"] > 1:  # can be laid over both
            price[[_CODES["water"], _CODES["lava"]]] = 4.0
        costs = price[self._map]
        lava = np.pad(self._map == _CODES["lava"], 1)
        beside = lava[:-2, 1:-1] | lava[2:, 1:-1] | lava[1:-1, :-2] | lava[1:-1, 2:]
        costs[beside & (costs < 3.0)] = 3.0  # a wrong step there is the last one
        for cell, name in self._creatures.items():
            costs[cell] = 6.0 if name == "Cow" else np.inf
        return costs

    # -- looking after oneself -------------------------------------------------------------------------------

    def _survive(self) -> str:
        """What has to be done now whatever the target is; empty if nothing."""
        if self._state["sleeping"]:
            return "noop"
        attacker = next((c for _, s in MOVES if self._creatures.get(c := add(self._at, s)) == "Zombie"), None)
        if attacker is not None:
            return self._strike(attacker)
        if self._filling and self._has[self._filling] >= _ENOUGH:
            self._filling = ""
        if not self._filling:
            self._filling = next((need for need in ("drink", "food") if self._has[need] <= _LITTLE), "")
        if self._filling:
            choice = self._pursue("collect_drink" if self._filling == "drink" else "eat_cow", otherwise="")
            if choice:
                return choice
        return "sleep" if self._has["energy"] <= 1 else ""

    # -- tasks -----------------------------------------------------------------------------------------------

    def _pursue(self, task: str, otherwise: str = "noop") -> str:
        """The next action towards a task; `otherwise` if there is no way to what it needs."""
        verb, _, thing = task.partition("_")
        if task in _CREATURES:
            return self._approach(self._where(_CREATURES[task]), otherwise)
        if task == "wake_up":
            is_tired = self._has["energy"] < constants.items["energy"]["max"]
            return "sleep" if is_tired else "noop"
        if verb == "collect":
            return self._collect(thing, otherwise)
        return self._place(thing) if verb == "place" else self._make(thing)

    def _collect(self, thing: str, otherwise: str = "noop") -> str:
        source = _SOURCES[thing]
        for tool, count in constants.collect[source]["require"].items():
            if self._has[tool] < count:
                return self._make(tool)
        goal = self._map == _CODES[source]
        for cell in self._creatures:
            goal[cell] = False
        return self._approach(goal, otherwise)

    def _gather(self, uses: dict[str, int]) -> str:
        """An action towards the first thing of which there is too little; empty if there is enough of all."""
        short = (thing for thing, count in uses.items() if self._has[thing] < count)
        thing = next(short, "")
        return self._collect(thing) if thing else ""

    def _place(self, thing: str) -> str:
        info = constants.place[thing]
        missing = self._gather(info["uses"])
        if missing:
            return missing
        where = [_CODES[name] for name in info["where"]]
        if self._material(self._front) in where and self._front not in self._creatures:
            return f"place_{thing}"
        return self._turn(where)

    def _turn(self, where: list[int]) -> str:
        """A move after which something of `where` is in front, or any move at all."""
        free = [(name, add(self._at, step), step) for name, step in MOVES]
        free = [(name, near, step) for name, near, step in free if self._is_free(near)]
        for name, near, step in free:
            far = add(near, step)
            if self._material(far) in where and far not in self._creatures:
                return name
        return free[0][0] if free else "do"

    def _make(self, thing: str) -> str:
        info = constants.make[thing]
        benches, costs = info["nearby"], self._costs()
        spot = np.isfinite(costs)
        for bench in benches:
            spot &= self._beside(bench)
        if spot[self._at]:
            return self._gather(self._stock(info["uses"], False)) or f"make_{thing}"
        way = route(self._at, costs, spot, _FAR)
        old = [b for b in benches if route(self._at, costs, self._beside(b), _FAR)] if not way else benches
        build = [bench for bench in benches if bench not in old]
        if not way and not build:  # they are too far apart: another one beside the first
            old, build = benches[:1], benches[1:]
        uses = dict(info["uses"])
        for item, count in (cost for bench in build for cost in constants.place[bench]["uses"].items()):
            uses[item] = uses.get(item, 0) + count
        missing = self._gather(self._stock(uses, "table" in build))
        if missing:
            return missing
        if way:
            return self._enter(way[0])
        if old and not self._beside(old[0])[self._at]:
            return self._approach(self._beside(old[0]), "noop", is_place=True)
        return self._place(build[0])

    def _stock(self, uses: dict[str, int], is_new: bool) -> dict[str, int]:
        """What to gather, in order: the far things first, wood last and some more where the trees are."""
        order = [thing for thing in ("iron", "coal", "stone", "wood") if thing in uses]
        out: dict[str, int] = {thing: uses[thing] for thing in order}
        if is_new and not self._has["wood_pickaxe"]:
            out["wood"] = min(_MOST, out["wood"] + 3)
        return out

    # -- moving ----------------------------------------------------------------------------------------------

    def _where(self, creature: str) -> np.ndarray:
        """bool [64, 64]: the cells of all creatures of a kind."""
        out = np.zeros(self._map.shape, bool)
        for cell, name in self._creatures.items():
            out[cell] |= name == creature
        return out

    def _beside(self, bench: str) -> np.ndarray:
        """bool [64, 64]: the cells from which a table or furnace can be used."""
        there = np.pad(self._map == _CODES[bench], 1)
        width, height = self._map.shape
        return np.logical_or.reduce(
            [there[i : i + width, j : j + height] for i in range(3) for j in range(3)]
        )  # fmt: skip

    def _approach(self, goal: np.ndarray, otherwise: str, is_place: bool = False) -> str:
        """A step towards the nearest goal and a blow at it, or into it if it is a place to be."""
        way = route(self._at, self._costs(), goal)
        if not way:
            return otherwise
        return self._strike(way[0]) if goal[way[0]] and not is_place else self._enter(way[0])

    def _enter(self, cell: Cell) -> str:
        """Into a neighbouring cell, through what is there."""
        if self._is_free(cell):
            return self._direction(cell)
        if self._is("water", cell) or self._is("lava", cell):
            is_ahead = cell == self._front
            return "place_stone" if is_ahead else "noop" if self._is("lava", cell) else self._direction(cell)
        return self._strike(cell)

    def _strike(self, cell: Cell) -> str:
        return "do" if cell == self._front else self._direction(cell)

    def _direction(self, cell: Cell) -> str:
        return next(name for name, step in MOVES if add(self._at, step) == cell)
