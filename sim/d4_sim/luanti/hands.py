"""What a tick's action does to keyboard and mouse: presses, lifts, and movements of the pointer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from d4_datasets.minecraft import DEGREES_PER_COUNT

# MineRL's keys on this game's keyboard (X11's names) and mouse. It has no second hand and picks no blocks.
KEYS = {
    "forward": "w", "back": "s", "left": "a", "right": "d", "jump": "space", "sneak": "Shift_L",
    "sprint": "Control_L", "inventory": "e", "drop": "q", "ESC": "Escape",
    **{f"hotbar.{slot}": str(slot) for slot in range(1, 10)},
}  # fmt: skip
BUTTONS = {"attack": 1, "use": 3}
_HELD = ("forward", "back", "left", "right", "jump", "sneak", "sprint")

_WINDOW_PIXELS = 0.5  # that the pointer moves for a count: recordings were made in windows twice as large
_SURE = 2  # views of an open window until ESC is passed on,
_APART = 4  # and ticks since a key that opens or closes one


@dataclass(frozen=True)
class Press:
    """A key (`key`, X11's name) or a button (`button`, its number) that goes down or up."""

    key: str = ""
    button: int = 0
    down: bool = True


@dataclass(frozen=True)
class Move:
    """A movement of the pointer, in pixels."""

    right: int
    down: int


Deed = Press | Move


class Hands:
    """Turns actions into deeds, in order; knows what is down and whether a window is open.

    ESC reaches the game where a window is open, which it closes. Elsewhere it would open a menu that leads
    out of the game. Turns go on where the last one was rounded, so that none is lost.
    """

    def __init__(self) -> None:
        self._down: dict[str, bool] = {}  # name to whether it was passed on
        self._rest = [0.0, 0.0]
        self._gui = False
        self._open_for, self._since = 0, _APART

    def see(self, gui: bool) -> list[Deed]:
        """Take note of whether a window is open; what has to be done at once.

        The game forgets held keys while one is, so they are pressed again when it closes.
        """
        closed = self._gui and not gui
        self._gui, self._open_for = gui, self._open_for + 1 if gui else 0
        if not closed:
            return []
        held = [name for name in _HELD if self._down.get(name)]
        return [_press(name, down) for name in held for down in (False, True)]

    def act(self, action: Mapping[str, Any]) -> list[Deed]:
        """What this action does, MineRL's dictionary."""
        deeds: list[Deed] = []
        self._since += 1
        for name in (*KEYS, *BUTTONS):
            wanted = bool(action.get(name, 0))
            if wanted and name not in self._down:
                self._down[name] = self._may(name)
                if self._down[name]:
                    deeds.append(_press(name, True))
                if name in ("inventory", "ESC"):
                    self._since = 0
            elif not wanted and self._down.pop(name, False):
                deeds.append(_press(name, False))
        pitch, yaw = (float(angle) for angle in action.get("camera", (0.0, 0.0)))
        move = self._move(yaw, pitch)
        return [move, *deeds] if move.right or move.down else deeds

    def release(self) -> list[Deed]:
        """Everything goes up."""
        down, self._down = self._down, {}
        self._rest = [0.0, 0.0]
        return [_press(name, False) for name, passed in down.items() if passed]

    def _may(self, name: str) -> bool:
        return name != "ESC" or (self._open_for >= _SURE and self._since >= _APART)

    def _move(self, yaw: float, pitch: float) -> Move:
        pixels = []
        for axis, angle in enumerate((yaw, pitch)):
            exact = angle / DEGREES_PER_COUNT * (_WINDOW_PIXELS if self._gui else 1.0) + self._rest[axis]
            whole = round(exact)
            self._rest[axis] = exact - whole
            pixels.append(whole)
        return Move(pixels[0], pixels[1])


def _press(name: str, down: bool) -> Press:
    return Press(button=BUTTONS[name], down=down) if name in BUTTONS else Press(key=KEYS[name], down=down)
