"""Output that nobody reads must not stop a robot's process.

A terminal that is stopped (Ctrl-S), a pager or a pipe that nobody empties blocks whoever writes to it, and
ROS's logger does so while it holds Python's lock: every thread stands still, the watchdog included.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import sys
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

_MOST = 1 << 20  # bytes that wait to be read by somebody
_CHUNK = 1 << 16
_PATIENCE_S = 2.0  # at the end


class _Way:
    """From a file descriptor of this process to where it led before, never blocking who writes to it."""

    def __init__(self, fd: int) -> None:
        self._fd, self._there = fd, os.dup(fd)
        self._source, end = os.pipe()
        with contextlib.suppress(OSError):
            fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, _MOST)
        os.set_blocking(end, False)  # a full pipe would stop whoever holds Python's lock, and it is for good
        os.dup2(end, fd)
        os.close(end)
        self._waiting: deque[bytes] = deque()
        self._size = self._lost = 0
        self._is_over, self._news = False, threading.Condition()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._take, self._give)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Lead where it led before; what waits is given a moment to be read."""
        os.dup2(self._there, self._fd)
        for thread in self._threads:
            thread.join(_PATIENCE_S)

    def _take(self) -> None:
        while chunk := os.read(self._source, _CHUNK):
            with self._news:
                if self._size + len(chunk) > _MOST:
                    self._lost += len(chunk)
                else:
                    self._waiting.append(chunk)
                    self._size += len(chunk)
                self._news.notify()
        with self._news:
            self._is_over = True
            self._news.notify()

    def _give(self) -> None:
        with contextlib.suppress(OSError):  # who read it has gone
            while (text := self._next()) is not None:
                while text:
                    text = text[os.write(self._there, text) :]

    def _next(self) -> bytes | None:
        with self._news:
            self._news.wait_for(lambda: self._waiting or self._lost or self._is_over)
            if self._waiting:
                text = self._waiting.popleft()
                self._size -= len(text)
                return text
            lost, self._lost = self._lost, 0
            return f"[{lost} bytes of output are missing here: nobody read them]\n".encode() if lost else None


class _Lossy(io.RawIOBase):
    """Writes what there is room for and forgets the rest."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def writable(self) -> bool:
        return True

    def write(self, text: Any) -> int:
        with contextlib.suppress(BlockingIOError):
            os.write(self._fd, text)
        return len(text)


@contextlib.contextmanager
def never_blocking() -> Iterator[None]:
    """While in force, writing to stdout and stderr never waits. What comes when a mebibyte waits to be read
    is lost, and most of it is said once somebody reads again.
    """
    if sys.stderr.isatty():
        os.environ.setdefault("RCUTILS_COLORIZED_OUTPUT", "1")  # what looks at the pipe sees no terminal
    before = sys.stdout, sys.stderr
    for stream in before:
        stream.flush()
    ways = [_Way(fd) for fd in (1, 2)]
    sys.stdout, sys.stderr = (io.TextIOWrapper(_Lossy(fd), write_through=True) for fd in (1, 2))  # type: ignore[type-var]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for way in ways:
            way.close()
