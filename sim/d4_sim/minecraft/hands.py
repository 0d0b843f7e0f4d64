"""A person's keyboard and mouse as actions of a tick, and a window to play in (Tk, which Python brings)."""

from __future__ import annotations

import time
from typing import Any

import cv2
import numpy as np

from d4_datasets import minecraft
from d4_datasets.errors import UserError
from d4_datasets.minecraft import BUTTONS, COLUMN, DEGREES_PER_COUNT, HOTBAR, KEYBOARD, SIZE

# Tk's names of keys, as far as they differ from the recorder's
_NAMED = {"shift_l": "left.shift", "control_l": "left.control"}
_DIGITS = range(10, 19)  # X11 codes of 1 .. 9, whose names depend on Shift
_REPEAT_S = 0.03  # a key that is held is released and pressed again by X11, at once
_TK_BUTTONS = {1: "attack", 3: "use", 2: "pickItem"}
LEAVE = "F10"


class Hands:
    """What is down now, and what the mouse did since the last tick.

    Presses that end before the tick count once: a quick click is a click.
    """

    def __init__(self) -> None:
        self._down: set[str] = set()
        self._fresh: set[str] = set()
        self._lifted: dict[str, float] = {}
        self._turn = np.zeros(2)  # counts: right, down
        self._slot = 0

    @staticmethod
    def key(symbol: str, code: int = 0) -> str | None:
        """The key of the game for a key of the keyboard, None if it has no meaning."""
        name = str(code - _DIGITS[0] + 1) if code in _DIGITS else _NAMED.get(symbol.lower(), symbol.lower())
        return KEYBOARD.get(f"key.keyboard.{name}")

    def press(self, key: str) -> None:
        """A key or button goes down."""
        self._lifted.pop(key, None)
        if key not in self._down:
            self._down.add(key)
            self._fresh.add(key)
            if key in HOTBAR:
                self._slot = HOTBAR.index(key)

    def lift(self, key: str, now: float) -> None:
        """It goes up; if it comes down again at once it never did."""
        self._lifted[key] = now

    def move(self, right: float, down: float) -> None:
        """The mouse moves, in counts."""
        self._turn += right, down

    def scroll(self, steps: int) -> None:
        """The wheel turns: another slot of the hotbar, as its key."""
        self._slot = (self._slot + steps) % len(HOTBAR)
        self._fresh.add(HOTBAR[self._slot])

    def tick(self, now: float) -> np.ndarray:
        """The action of the tick that begins, float64 [25]."""
        for key in [key for key, when in self._lifted.items() if now - when >= _REPEAT_S]:
            self._down.discard(key)
            del self._lifted[key]
        action = np.zeros(SIZE)
        for key in self._down | self._fresh:
            action[COLUMN[key]] = 1
        right, down = self._turn * DEGREES_PER_COUNT
        action[[COLUMN[name] for name in minecraft.ANGLES]] = np.clip((down, right), -180, 180)
        self._fresh, self._turn = set(), np.zeros(2)
        return action


class Window:
    """Shows a game and takes a person's keyboard and mouse. F10 or closing it ends the session.

    Raises:
        UserError: there is no display, or this Python has no Tk.
    """

    def __init__(self, title: str, zoom: int) -> None:
        try:
            import tkinter
        except ImportError:
            raise UserError("this Python has no Tk to show a game in: apt-get install python3-tk") from None
        try:
            self._root: Any = tkinter.Tk()
        except tkinter.TclError as error:
            raise UserError(f"there is no display to play on ({error}): set DISPLAY") from None
        self._photo_class = tkinter.PhotoImage
        self.hands, self.open, self._zoom = Hands(), True, zoom
        self._root.title(f"{title} - {LEAVE} ends")
        self._label = tkinter.Label(self._root, cursor="none", borderwidth=0)
        self._label.pack()
        self._photo: Any = None
        self._bind()
        self._root.update()
        self._root.focus_force()  # or keys go elsewhere until somebody clicks

    def _bind(self) -> None:
        root, label = self._root, self._label
        root.protocol("WM_DELETE_WINDOW", self._leave)
        root.bind(f"<{LEAVE}>", lambda _: self._leave())
        root.bind("<KeyPress>", lambda event: self._key(event, True))
        root.bind("<KeyRelease>", lambda event: self._key(event, False))
        label.bind("<Motion>", self._motion)
        label.bind("<ButtonPress>", self._button)
        label.bind("<ButtonRelease>", self._button_up)

    def _leave(self) -> None:
        self.open = False

    def _key(self, event: Any, down: bool) -> None:
        if (key := Hands.key(event.keysym, event.keycode)) is not None:
            self.hands.press(key) if down else self.hands.lift(key, time.monotonic())

    def _button(self, event: Any) -> None:
        if event.num in (4, 5):  # the wheel
            self.hands.scroll(-1 if event.num == 4 else 1)
        elif event.num in _TK_BUTTONS:
            self.hands.press(_TK_BUTTONS[event.num])

    def _button_up(self, event: Any) -> None:
        if event.num in _TK_BUTTONS:
            self.hands.lift(_TK_BUTTONS[event.num], time.monotonic())

    def _motion(self, event: Any) -> None:
        """Count from the middle of the window, and put the mouse back there."""
        x, y = self._label.winfo_width() // 2, self._label.winfo_height() // 2
        if (event.x, event.y) != (x, y):
            self.hands.move(event.x - x, event.y - y)
            self._label.event_generate("<Motion>", warp=True, x=x, y=y)

    def show(self, image: np.ndarray) -> None:
        """Show a picture uint8 [H, W, 3] and take what the person did meanwhile."""
        height, width = (self._zoom * side for side in image.shape[:2])
        if self._zoom > 1:
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        data = f"P6 {width} {height} 255 ".encode() + np.ascontiguousarray(image).tobytes()
        self._photo = self._photo_class(data=data, format="PPM")
        self._label.configure(image=self._photo)
        self._root.update()

    def close(self) -> None:
        """Close the window; twice is no mistake."""
        root, self._root = self._root, None
        if root is not None:
            root.destroy()


assert set(_TK_BUTTONS.values()) == set(BUTTONS)
