"""Warnings without floods."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from typing import Any

_NUMBER = re.compile(r"(?<![\w/])\d[\d.e+-]*")  # but none that belongs to a name, such as /eye_2 or /arm/2
_MOST = 100  # things that are remembered
_LENGTH = 120  # of a text, so far as it says what is meant


class Complaints:
    """Says one thing at most every few seconds: a flood of warnings costs more than what it warns of. Two
    texts that differ in numbers only say the same, but for a sign.
    """

    def __init__(self, say: Callable[[str], Any], seconds: float = 5.0) -> None:
        self._say, self._seconds = say, seconds
        self._lock = threading.Lock()
        self._said: dict[str, tuple[float, int]] = {}  # when, and how often not since; the longest ago first

    def __call__(self, text: str) -> None:
        """Say it, unless the same was said just now; from any thread."""
        key, now = _NUMBER.sub("#", text)[:_LENGTH], time.monotonic()
        with self._lock:
            said, kept_back = self._said.get(key, (-1e9, 0))
            if now - said <= self._seconds:
                self._said[key] = (said, kept_back + 1)
                return
            self._said.pop(key, None)
            self._said[key] = (now, 0)
            if len(self._said) > _MOST:
                del self._said[next(iter(self._said))]
        self._say(f"{text} (and {kept_back} times in between)" if kept_back else text)
