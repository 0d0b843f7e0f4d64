"""What d4 and its mod in the game say to each other: two small files beside the world.

The mod writes `state.json` at every step of the game's server, 20 times a second; d4 writes `order.json`.
Both are renamed into place, so a reader sees the old one or the new one, never a part. `Order` follows one
order until the game has done it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from d4_sim.minecraft.game import GameTrouble

EMERGE_S = 90.0  # for a piece of world on a busy machine
HANGS_S = 20.0  # without a step of the game's server
_MOST = 2**20  # bytes of a state


@dataclass(frozen=True)
class State:
    """What the mod told last, in the game's own names.

    Attributes:
        step: of the game's server, counted from its start.
        number, phase, why: the newest order that it knows, how far that is, and why it failed.
        joined: whether the player is in the game; else the rest says nothing.
        yaw, pitch: degrees; +yaw turns right, within -180 .. 180, +pitch looks down.
        at: (x, y, z) of the feet.
        slot: of the hotbar, from 0.
        keys: bits of the keys that the game holds for down (forward 1, sneak 64, dig 128, ...).
        items: how many of each the player has.
        counters: kind (`dig`, `place`, `craft`, `use`, `open`) to name to count since the last order.
        trunk: (x, y, z) of what is left of the arena's tree.
    """

    step: int = 0
    number: int = 0
    phase: str = "idle"
    why: str = ""
    joined: bool = False
    yaw: float = 0.0
    pitch: float = 0.0
    at: tuple[float, float, float] = (0.0, 0.0, 0.0)
    slot: int | None = None
    keys: int = 0
    items: Mapping[str, int] = field(default_factory=dict)
    counters: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    trunk: tuple[tuple[float, float, float], ...] = ()


def parse(text: str) -> State | None:
    """The state in a file's text; None if it is none."""
    try:
        said = json.loads(text)
        state = State(
            step=int(said["step"]), number=int(said["number"]), phase=str(said["phase"]),
            why=str(said.get("why") or ""),
        )  # fmt: skip
        player = said.get("player")
        if not player:
            return state
        return replace(
            state,
            joined=True,
            yaw=wrap(-math.degrees(player["yaw"])),
            pitch=math.degrees(player["pitch"]),
            at=(float(player["x"]), float(player["y"]), float(player["z"])),
            slot=int(player["slot"]),
            keys=int(player["keys"]),
            items=_counts(player.get("items")),
            counters={kind: _counts(counts) for kind, counts in (said.get("stats") or {}).items()},
            trunk=tuple((float(x), float(y), float(z)) for x, y, z in said.get("trunk") or ()),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None


def wrap(degrees: float) -> float:
    """An angle within -180 .. 180."""
    return (degrees + 180.0) % 360.0 - 180.0


def _counts(table: Any) -> dict[str, int]:
    """A table of Lua; an empty one arrives as null or a list."""
    return {str(name): int(count) for name, count in table.items()} if table else {}


class Channel:
    """The two files of one world.

    Raises:
        GameTrouble: the game's server has not made a step for `HANGS_S`.
    """

    def __init__(self, world: Path) -> None:
        self._state, self._order = world / "state.json", world / "order.json"
        self._number = 0
        self._last = State()
        self._moved: float | None = None

    def read(self, now: float) -> State:
        """The newest state at the time `now` in seconds; the last one where there is nothing new."""
        try:
            with self._state.open("rb") as file:
                found = parse(file.read(_MOST).decode(errors="replace"))
        except OSError:
            found = None
        if self._moved is None or (found is not None and found.step != self._last.step):
            self._moved = now
        if found is not None:
            self._last = found
        elif self._last.step == 0:
            self._moved = now  # the game has not begun to tell: whoever started it has a limit for that
        if now - self._moved > HANGS_S:
            raise GameTrouble(f"Luanti hangs: its server has not made a step for {HANGS_S:g} s")
        return self._last

    def order(self, kind: str, **what: Any) -> int:
        """Give an order; returns its number."""
        self._number += 1
        aside = self._order.with_name("order.new")
        aside.write_text(json.dumps({"number": self._number, "kind": kind, **what}))
        os.replace(aside, self._order)
        return self._number


class Order:
    """Follows an order, given at the time `since`, until it is done."""

    def __init__(self, number: int, since: float, limit_s: float = EMERGE_S) -> None:
        self._number, self._since, self._limit_s = number, since, limit_s

    def done(self, state: State, now: float) -> bool:
        """Whether this state is one after the order.

        Raises:
            GameTrouble: the game could not do it, or not in time.
        """
        is_ours = state.number == self._number
        if is_ours and state.phase == "failed":
            raise GameTrouble(f"Luanti's world does not emerge: {state.why}")
        if is_ours and state.phase == "ready":
            return True
        if now - self._since > self._limit_s:
            stage = state.phase if is_ours else "not begun"
            raise GameTrouble(
                f"Luanti's world does not emerge within {self._limit_s:g} s ({stage}): the machine is too "
                "busy for a game in real time"
            )
        return False
