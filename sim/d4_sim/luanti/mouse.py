"""A mouse none of whose movements is lost.

The game reads where the pointer is once a picture and, if it is elsewhere, puts it back into the middle of
its window. What moves the pointer between the two is lost, and the slower the machine, the more. So a
movement is made only when the one before has been read: when the pointer is in the middle again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

AT_ONCE = (300, 170)  # pixels right and down: the game cannot see the pointer beyond its window
_KEPT = 1200  # pixels that wait at most: half a turn
_PATIENCE_S = 1.0  # without the pointer in the middle, until movements are made all the same


class Pointed(Protocol):
    """A display with a pointer."""

    def move(self, right: int, down: int) -> None:
        """Move the pointer, in pixels."""
        ...

    def is_centred(self) -> bool:
        """Whether the pointer is in the middle."""
        ...


class Mouse:
    """Moves the pointer as soon as the game can take it."""

    def __init__(self, screen: Pointed, now: Callable[[], float] = time.monotonic) -> None:
        self._screen, self._now = screen, now
        self._right = self._down = 0
        self._since = now()

    @property
    def waits(self) -> bool:
        """Whether there are movements that have not been made."""
        return bool(self._right or self._down)

    def add(self, right: int, down: int) -> None:
        """Have it moved by so many pixels."""
        if not self.waits:
            self._since = self._now()
        self._right = max(-_KEPT, min(_KEPT, self._right + right))
        self._down = max(-_KEPT, min(_KEPT, self._down + down))

    def deliver(self, gui: bool) -> None:
        """Move what can be moved now; in an open window (`gui`) the pointer is free."""
        if not self.waits:
            return
        late = self._now() - self._since > _PATIENCE_S
        if gui or late or self._screen.is_centred():
            right, down = (max(-most, min(most, v)) for v, most in zip(self._all, AT_ONCE, strict=True))
            self._screen.move(right, down)
            self._right, self._down = self._right - right, self._down - down
            self._since = self._now()

    @property
    def _all(self) -> tuple[int, int]:
        return self._right, self._down

    def clear(self) -> None:
        """Forget what has not been made."""
        self._right = self._down = 0
        self._since = self._now()
