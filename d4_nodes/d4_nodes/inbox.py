"""Newest samples of every stream, handed from whatever thread receives them to the loop."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections import Counter, deque
from typing import Any, NamedTuple

from d4_datasets.contract import Contract

_KEPT = 64  # samples of a vector: a fast joint topic at its newest tick lies further back than the last few
_KEPT_PICTURES = 8  # of a camera: they are large


_TRUST = 5  # intervals between samples until a stream's rate counts as known
_ASLEEP_NS = 10**9  # who has been silent for so long is not waited for


class Sample(NamedTuple):
    """A message, when it was captured and when it came (ns of the loop's clock)."""

    stamp_ns: int
    arrival_ns: int
    message: Any


class Inbox:
    """A few newest samples per stream, and a file descriptor that becomes readable when anything happens.

    Args:
        names: of the streams.
        cameras: those of them that are cameras, of which fewer samples are kept.
    """

    def __init__(self, names: tuple[str, ...], cameras: tuple[str, ...] = ()) -> None:
        self.names = names
        self.accepted: Counter[str] = Counter()  # samples per stream
        self._samples: dict[str, deque[Sample]] = {
            name: deque(maxlen=_KEPT_PICTURES if name in cameras else _KEPT) for name in names
        }
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

    def is_on_its_way(self, name: str, time_ns: int) -> bool:
        """Whether a sample captured at or before a time, but after the newest one, is still to be expected:
        topics overtake each other. Judged by the shortest interval between the last samples of the stream.
        """
        stamps = [s.stamp_ns for s in list(self._samples[name])[-_TRUST - 1 :]]
        if not stamps:
            return True
        if not 0 < time_ns - stamps[-1] < _ASLEEP_NS:
            return False
        intervals = [b - a for a, b in itertools.pairwise(stamps) if b > a]
        return len(intervals) < _TRUST or stamps[-1] + min(intervals) <= time_ns

    def since(self, name: str, time_ns: int) -> list[int]:
        """Capture times of the accepted samples from a time on, in order."""
        return [s.stamp_ns for s in self._samples[name] if s.stamp_ns >= time_ns]

    def clear(self, held: tuple[str, ...] = ()) -> None:
        """Forget everything, but the newest sample of the streams `held`, which counts from now on as always
        there.
        """
        self.drain()
        for name, samples in self._samples.items():
            newest = list(samples)[-1:]
            samples.clear()
            if name in held:
                samples.extend(sample._replace(stamp_ns=0) for sample in newest)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._event)


def inbox_of(contract: Contract) -> Inbox:
    """An inbox for what a policy sees of a robot."""
    inputs = [s for s in contract.observations if s.role == "input"]
    return Inbox(tuple(s.name for s in inputs), tuple(s.name for s in inputs if s.is_image))
