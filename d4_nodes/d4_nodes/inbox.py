"""Newest samples of every stream, handed from whatever thread receives them to the loop."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter, deque
from typing import Any, NamedTuple

_KEPT = 64  # samples per stream: a fast joint topic at its newest tick lies further back than the last few


class Sample(NamedTuple):
    """A message, when it was captured and when it came (ns of the loop's clock)."""

    stamp_ns: int
    arrival_ns: int
    message: Any


class Inbox:
    """A few newest samples per stream, and a file descriptor that becomes readable when anything happens.

    Args:
        names: of the streams.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.accepted: Counter[str] = Counter()  # samples per stream
        self._samples: dict[str, deque[Sample]] = {name: deque(maxlen=_KEPT) for name in names}
        self._fresh: deque[tuple[str, Sample]] = deque(maxlen=_KEPT * max(1, len(names)))
        self._lock = threading.Lock()
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        """Readable after `put` or `wake`, until `drain`."""
        return self._event

    def put(self, name: str, sample: Sample) -> None:
        """A message has come; from any thread."""
        with self._lock:
            self._fresh.append((name, sample))
        self.wake()

    def wake(self) -> None:
        """Make whoever waits look; from any thread."""
        os.eventfd_write(self._event, 1)

    def drain(self) -> list[tuple[str, Sample]]:
        """What has come since the last call, in order."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._event)
        with self._lock:
            fresh = list(self._fresh)
            self._fresh.clear()
        return fresh

    def keep(self, name: str, sample: Sample) -> None:
        """Accept a drained sample as part of the stream."""
        self._samples[name].append(sample)
        self.accepted[name] += 1

    def newest(self, name: str) -> Sample | None:
        """The last accepted sample; from any thread."""
        samples = self._samples[name]
        return samples[-1] if samples else None

    def at(self, name: str, time_ns: int) -> Sample | None:
        """The newest accepted sample captured at or before a time."""
        return next((s for s in reversed(self._samples[name]) if s.stamp_ns <= time_ns), None)

    def since(self, name: str, time_ns: int) -> list[int]:
        """Capture times of the accepted samples from a time on, in order."""
        return [s.stamp_ns for s in self._samples[name] if s.stamp_ns >= time_ns]

    def clear(self) -> None:
        """Forget everything."""
        self.drain()
        for samples in self._samples.values():
            samples.clear()

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._event)
