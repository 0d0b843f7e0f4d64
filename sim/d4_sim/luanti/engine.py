"""Luanti behind the interface of games: started, driven and shut down in the process that opens it."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from d4_datasets.errors import UserError
from d4_datasets.minecraft import TASKS
from d4_sim.luanti import names
from d4_sim.luanti.channel import Channel, Order, State
from d4_sim.luanti.hands import Deed, Hands, Press
from d4_sim.luanti.house import House, Look, find_program, version
from d4_sim.luanti.mouse import Mouse
from d4_sim.luanti.screen import Screen
from d4_sim.minecraft.game import PERIOD_S, Engine, GameTrouble, Rung, View
from d4_sim.minecraft.tasks import LADDER, MILESTONES

START_S = 150.0  # from the game's start until the player is in it
_HEARS_S = 20.0  # until a key that is pressed is heard
_STILL_S, _STILL_AT_MOST_S = 0.4, 8.0  # a picture that does not change any more is complete
_CLOSES, _CLOSES_S = 3, 8.0  # keys, and for each, to close a window
_SNEAK = 64  # its bit in `State.keys`
_POLL_S = 0.05
_MOUSE_S = 0.004
_REACH = (3.5, 9.0)  # nodes from the player to the trunk
_PLACES = 64  # that are tried for one with dry ground
_WILD = 4000  # nodes from the middle of the world

OPTIONS = ("display", "fps", "view_range")


class Clock:
    """Ticks of 50 ms on an absolute clock: lateness does not add up.

    Attributes:
        due: when the tick that is on now was to begin.
    """

    def __init__(
        self, now: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._now, self._sleep = now, sleep
        self.restart()

    def restart(self) -> None:
        """Tick 0 is now."""
        self._origin, self._tick = self._now(), 0
        self.due = self._origin

    def wait(self) -> tuple[float, int]:
        """Wait for the next tick; (seconds after it, ticks that were missed meanwhile).

        Whoever comes after the next tick gets it at once, as late as it is. Whole ticks that have passed by
        then are missed: nobody catches up with them, since an action lasts a tick.
        """
        self._tick += 1
        self.due = self._origin + self._tick * PERIOD_S
        if (left := self.due - self._now()) > 0:
            self._sleep(left)
        late = max(0.0, self._now() - self.due)
        missed = int(late / PERIOD_S)
        self._tick += missed
        self.due += missed * PERIOD_S
        return late, missed

    def left(self) -> float:
        """Seconds until the next tick."""
        return self.due + PERIOD_S - self._now()

    def since_tick(self) -> float:
        """Seconds since the tick that is on was to begin."""
        return self._now() - self.due


def arena(seed: int) -> dict[str, Any]:
    """The arena of an episode: where its tree stands and where the player looks, as the mod takes it.

    The tree may be in any direction, somewhere in or near the field of view.
    """
    rng = np.random.default_rng(seed)
    angle, far = rng.uniform(-np.pi, np.pi), rng.uniform(*_REACH)
    x, z = round(-np.sin(angle) * far), round(np.cos(angle) * far)
    yaw = np.arctan2(-x, z) + np.radians(rng.uniform(-75, 75))
    return {
        "trunk": {"x": x, "z": z, "height": int(rng.integers(3, 6))},
        "yaw": float(yaw), "pitch": float(np.radians(rng.uniform(-5, 15))),
    }  # fmt: skip


def wild(seed: int) -> dict[str, Any]:
    """Where an episode in the wild may begin: places to try, one after the other."""
    rng = np.random.default_rng(seed)
    places = rng.integers(-_WILD, _WILD, (_PLACES, 2))
    return {"places": [[int(x), int(z)] for x, z in places], "yaw": float(rng.uniform(0, 6.28)), "pitch": 0.0}


class Luanti:
    """A game of Luanti: an arena with one tree, or (`world` "wild") a generated landscape.

    Args, as text or numbers:
        display: number of the X display; a free one without it.
        fps: pictures a second, at most.
        view_range: nodes that can be seen.

    Raises:
        UserError: the game, Xvfb or python-xlib is not installed, an option makes no sense, or the display is
            taken.
        GameTrouble: the game does not start.
    """

    realtime = True

    def __init__(
        self, display: str | int = "", fps: str | int = 30, view_range: str | int = 40, world: str = "arena"
    ) -> None:
        number = None if display == "" else _whole("display", display, 1, 59_000)
        look = Look(_whole("fps", fps, 10, 200), _whole("view_range", view_range, 10, 200))
        self._wild = world == "wild"
        self._screen: Screen | None = None
        self._house: House | None = None
        self._clock, self._hands = Clock(), Hands()
        self._mouse: Mouse | None = None
        self._ordered = self._gui = False
        self._folder = Path(tempfile.mkdtemp(prefix="d4-luanti-"))
        try:
            self._screen = Screen(self._folder, number)
            self._mouse = Mouse(self._screen)
            self._house = House(self._folder, self._screen.number, look, self._wild)
            self._channel = Channel(self._house.world)
            self._until(lambda state: state.joined, START_S, "does not start")
            self._until(lambda state: self._screen_.focus(), START_S, "shows no window")
            self._until(lambda state: self._is_playing(), START_S, "does not get beyond loading")
        except BaseException:
            self.close()
            raise

    # ---- the interface ----

    @property
    def version(self) -> str:
        """Of the game's program."""
        return version(find_program())

    def reset(self, seed: int) -> View:
        """An episode: another place, or another tree, and nothing in the inventory."""
        with self._explained():
            self._do(self._hands.release())
            self._mouse_.clear()
            self._close_windows()
            what = wild(seed) if self._wild else arena(seed)
            number = self._channel.order("wild" if self._wild else "arena", **what)
            order = Order(number, time.monotonic())
            while not order.done(self._read(), time.monotonic()):
                time.sleep(_POLL_S)
            self._ordered = True
            self._hear()
            self._settle()
            self._clock.restart()
            return self._view(0.0, 0.0, 0)

    def step(self, action: Mapping[str, Any]) -> View:
        """Do this from now on; the view at the next tick."""
        if not self._ordered:
            raise RuntimeError("step before reset")
        with self._explained():
            self._do(self._hands.act(action))
            acted = self._clock.since_tick()
            self._turn()
            late, missed = self._clock.wait()
            return self._view(late, acted, missed)

    def close(self) -> None:
        """End the game and its display, and leave nothing of them; twice is no mistake."""
        if self._house is not None:
            self._house.close()
        if self._screen is not None:
            self._screen.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    # ---- looking ----

    @property
    def _screen_(self) -> Screen:
        assert self._screen is not None
        return self._screen

    def _read(self) -> State:
        if self._house is None or not self._house.alive:
            raise GameTrouble(self._death())
        return self._channel.read(time.monotonic())

    def _look(self) -> np.ndarray:
        picture, self._gui = self._screen_.look()
        self._do(self._hands.see(self._gui))
        return picture

    def _view(self, late_s: float, acted_s: float, missed: int) -> View:
        picture, state = self._look(), self._read()
        if not state.joined:  # no tree, which would count as a chopped one
            raise GameTrouble("the player has left the game")
        x, y, z = state.at
        more: dict[str, Any] = {
            "yaw": round(state.yaw, 3), "pitch": round(state.pitch, 3), "xpos": round(x, 3),
            "ypos": round(y, 3), "zpos": round(z, 3), "late_ms": round(1e3 * late_s, 2),
            "action_ms": round(1e3 * acted_s, 2), "missed": missed,
        }  # fmt: skip
        if not self._wild:
            more["trunk"] = [list(node) for node in state.trunk]
        return View(
            pov=picture, items=names.items(state.items), stats=names.counters(state.counters), gui=self._gui,
            slot=state.slot, over=not self._wild and not state.trunk, late_ms=1e3 * late_s, more=more,
        )  # fmt: skip

    # ---- acting ----

    @property
    def _mouse_(self) -> Mouse:
        assert self._mouse is not None
        return self._mouse

    def _turn(self) -> None:
        """Move the mouse in what is left of the tick, where the game has not taken the last movement yet."""
        while self._mouse_.waits and self._clock.left() > 2 * _MOUSE_S:
            time.sleep(_MOUSE_S)
            self._mouse_.deliver(self._gui)
            self._screen_.sync()

    def _do(self, deeds: list[Deed]) -> None:
        for deed in deeds:
            if not isinstance(deed, Press):
                self._mouse_.add(deed.right, deed.down)
            elif deed.key:
                self._screen_.key(deed.key, deed.down)
            else:
                self._screen_.button(deed.button, deed.down)
        self._mouse_.deliver(self._gui)
        if deeds:
            self._screen_.sync()

    def _tap(self, key: str) -> None:
        for down in (True, False):
            self._do([Press(key=key, down=down)])
            time.sleep(2 * _POLL_S)  # or the game may never see it

    def _close_windows(self) -> None:
        for _ in range(_CLOSES):
            if self._is_playing():
                return
            self._tap("Escape")
            deadline = time.monotonic() + _CLOSES_S  # a second key would open another window
            while not self._is_playing() and time.monotonic() < deadline:
                time.sleep(_POLL_S)
        raise GameTrouble("Luanti does not close its window")

    def _is_playing(self) -> bool:
        self._look()
        return not self._gui

    def _hear(self) -> None:
        """Wait until the game has heard a key: then it draws, listens, and knows where the player is."""
        self._tap("1")
        for down in (True, False):
            self._screen_.focus()
            self._do([Press(key="Shift_L", down=down)])
            self._until(_heard if down else _silent, _HEARS_S, "does not listen")

    def _settle(self) -> None:
        """Wait until the picture stands still, or long enough: what was built is drawn piece by piece."""
        before, since, began = self._look(), time.monotonic(), time.monotonic()
        while time.monotonic() - since < _STILL_S and time.monotonic() - began < _STILL_AT_MOST_S:
            time.sleep(_POLL_S)
            picture = self._look()
            if not np.array_equal(picture, before):
                before, since = picture, time.monotonic()

    def _until(self, reached: Callable[[State], bool], limit_s: float, trouble: str) -> None:
        """Wait until the game has got so far. Raises GameTrouble if it does not."""
        deadline = time.monotonic() + limit_s
        while not reached(self._read()):
            if time.monotonic() > deadline:
                assert self._house is not None
                print(self._house.log(), file=sys.stderr)
                complaint = self._house.complaint()
                reason = f" ({complaint})" if complaint else ""
                raise GameTrouble(f"Luanti {trouble} within {limit_s:g} s{reason}")
            time.sleep(_POLL_S)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns errors of a connection whose other end is gone into the sentence that says so."""
        try:
            yield
        except GameTrouble:
            raise
        except Exception:
            if self._screen is None or not self._screen.alive:
                raise GameTrouble("Luanti's display died") from None
            if self._house is None or not self._house.alive:
                raise GameTrouble(self._death()) from None
            raise

    def _death(self) -> str:
        return f"Luanti died {self._house.last_words()}" if self._house else "Luanti is not running"


def _heard(state: State) -> bool:
    return bool(state.keys & _SNEAK)


def _silent(state: State) -> bool:
    return not _heard(state)


def _whole(name: str, value: str | int, least: int, most: int) -> int:
    try:
        number = int(value)
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        raise UserError(f"Luanti's option {name} is a whole number of {least} to {most}, not {value!r}")
    return number


def in_the_wild(**options: Any) -> Luanti:
    """The game in a generated landscape."""
    return Luanti(world="wild", **options)


_OF_A_TREE = ("mine_log", "craft_planks", "craft_stick", "craft_wooden_pickaxe", "use_wooden_pickaxe")

ENGINE = Engine(
    name="luanti",
    title="Luanti tree chopping",
    kind="game",
    opens="d4_sim.luanti.engine:Luanti",
    options=OPTIONS,
    milestones=("log", "planks", "stick", "wooden_pickaxe"),  # what a tree is good for
    ladder=(Rung("mine_log", None),),
    impossible=tuple(name for name in TASKS if name not in _OF_A_TREE),
    minutes=1.0,
    player="d4_sim.luanti.player:Chopper",
    start_s=240.0,
    step_s=30.0,
)

# This game crafts without a table.
_TABLE = ("crafting_table", "place_crafting_table", "craft_crafting_table", "open_crafting_table")

WILD = replace(
    ENGINE,
    name="luanti_wild",
    title="Luanti (Minetest Game)",
    opens="d4_sim.luanti.engine:in_the_wild",
    milestones=tuple(name for name in MILESTONES if name not in _TABLE),
    ladder=tuple(rung for rung in LADDER if rung.task not in _TABLE),
    impossible=tuple(name for name in TASKS if name in _TABLE),
    minutes=60.0,
    player="",
)
