"""What a game is to this package: keyboard and mouse in, pictures and counters out, at 20 Hz.

A `Game` is played with MineRL's action dictionary of 24 keys and shows what a person would see. Nothing here
knows which game it is: `Engine` says how a game (or a `d4_sim.world.World`) is opened, what results on it are
called and what is counted. Engines are found by name and imported on first use.

An action is a dictionary as `d4_datasets.minecraft.to_env` makes it: a whole number 0 or 1 for each of the 23
keys (`attack use forward back left right jump sneak sprint drop swapHands pickItem inventory ESC hotbar.1` to
`hotbar.9`) and `camera`, float32 [2]: pitch and yaw in degrees within this tick, +pitch looks down, +yaw
turns right. While a window is open the camera moves the pointer, `DEGREES_PER_COUNT` a mouse count.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from d4_datasets.errors import UserError
from d4_datasets.minecraft import RATE_HZ

PERIOD_S = 1 / RATE_HZ
MOST_LATE = 0.05  # share of a recording's pictures that may come half a tick late
VIEW = (360, 640)  # height, width of a picture

# name -> "module:object" of an Engine
_ENGINES = {
    "minerl": "d4_sim.minecraft.minerl:ENGINE",
    "luanti": "d4_sim.luanti.engine:ENGINE",
    "luanti_wild": "d4_sim.luanti.engine:WILD",
    "crafter": "d4_sim.minecraft.worlds:CRAFTER",
    "crafter_peaceful": "d4_sim.minecraft.worlds:CRAFTER_PEACEFUL",
}


class GameTrouble(RuntimeError):
    """A game died, hangs, or does not do what it was told. The message is one sentence, without a dot."""


@dataclass(frozen=True)
class View:
    """What a game shows and tells at one tick.

    Attributes:
        pov: the picture, uint8 [360, 640, 3] RGB.
        items: how many of each item the player has, by Minecraft 1.16's names (`oak_log`) without
            `minecraft:`, whatever the game calls the same thing itself; None if it does not tell.
        stats: the game's counters since the world began, by the names of contractor recordings
            (`minecraft.mine_block:minecraft.oak_log`), as `d4_datasets.minecraft.TASKS` looks for them; None
            if it does not tell. Counters that are 0 may be left out.
        gui: whether a window (inventory, crafting table, ...) is open.
        pointer: where the pointer is while a window is open, in pixels of a 1280x720 window, if `pov` was
            taken without it; None if `pov` shows it or there is none.
        slot: the chosen slot of the hotbar, 0 to 8; None if it does not tell.
        over: the episode has ended by itself (the player died, or the game says so).
        late_ms: of a game in real time, by how much this view was taken after the tick that was waited for,
            ticks that passed unseen meanwhile included.
        more: anything else worth recording, JSON (`yaw`, `pitch`, `xpos`, ...). A game in real time says
            `action_ms`, how long after its tick the last action was handed to its display, and `missed`,
            the ticks that had passed unseen before this one.
    """

    pov: np.ndarray
    items: Mapping[str, int] | None = None
    stats: Mapping[str, int] | None = None
    gui: bool = False
    pointer: tuple[float, float] | None = None
    slot: int | None = None
    over: bool = False
    late_ms: float = 0.0
    more: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Game(Protocol):
    """A game played with keyboard and mouse, a tick of 50 ms at a time, in the process that opened it.

    A game in lockstep (`realtime` False) stands still between two calls. One in real time goes on: keys stay
    down until the next action, and `step` returns the view of the next tick by the game's own absolute clock,
    or the newest one at once where the caller comes late, which the view says (`late_ms`).

    Whoever opens a game closes it. Each method has to return or fail within a bounded time of its own; a
    failure that the user can put right is a `UserError` of one sentence, others are best a `GameTrouble`. The
    caller has a watchdog, too: it kills the process and everything that it started.

    Attributes:
        version: what plays, with its version (`Minetest 5.6.1`); games of two versions are not the same.
    """

    realtime: bool
    version: str

    def reset(self, seed: int) -> View:
        """Begin an episode in the world that belongs to `seed`: nothing in the inventory, full health."""
        ...

    def step(self, action: Mapping[str, Any]) -> View:
        """Do this for a tick; the view at the next one."""
        ...

    def close(self) -> None:
        """End the game and every process that it started; calling it twice is no mistake."""
        ...


@dataclass(frozen=True)
class Rung:
    """A step of a prompt ladder: ask for `task` until `count` of it were accomplished; None is for ever."""

    task: str
    count: int | None = 1


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How a game or a world is opened, and how an agent is judged on it.

    Attributes:
        name: what users call it (`--engine`).
        title: how results on it are headed. Only Minecraft is called Minecraft.
        kind: "game", or "world" for a `d4_sim.world.World`.
        opens: "module:function", called with the options of the user as keywords in a process of its own;
            returns a `Game` or a `World`.
        options: names of the options that `opens` takes.
        script: run by the interpreter that the option `python` names, instead of `opens`: a program that
            speaks `d4_sim.minecraft.wire` and needs nothing of d4.
        milestones: what is to be achieved at least once, easiest first: items by their names in
            `d4_sim.minecraft.tasks.MILESTONES` (games), or tasks (worlds).
        ladder: the prompts.
        impossible: tasks that nobody can do there, and that are not asked for.
        rate_hz: ticks in a second.
        minutes: length of an episode.
        published: whether published results on the same game stand beside ours.
        player: "module:function" of a scripted player, called with a seed: its method `act(View)` returns an
            action; empty if there is none.
        start_s, step_s: how long opening it, or beginning an episode, and a tick may take before it counts
            as hanging.
    """

    name: str
    title: str
    kind: str
    opens: str = ""
    options: tuple[str, ...] = ()
    script: Path | None = None
    milestones: tuple[str, ...]
    ladder: tuple[Rung, ...]
    impossible: tuple[str, ...] = ()
    rate_hz: float = RATE_HZ
    minutes: float = 60.0
    published: bool = False
    player: str = ""
    start_s: float = 300.0
    step_s: float = 60.0


def engine(name: str) -> Engine:
    """The engine of this name. Raises UserError if there is none."""
    if name not in _ENGINES:
        raise UserError(f"there is no engine {name!r}: choose one of {', '.join(_ENGINES)}")
    found: Engine = named(_ENGINES[name])
    return found


def named(path: str) -> Any:
    """What "module:object" names.

    Raises:
        UserError: this installation has no such module or object.
    """
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise UserError(f"this installation of d4 has no {path} ({error})") from None
