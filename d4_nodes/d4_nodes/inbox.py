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
_EARLY = 10  # a sample may be early by one part of so many of the shortest interval, but ...
_EARLIEST_NS = 2_000_000  # ... by no more than this: whoever waits for it waits as much longer


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
        reorder_ns: samples that were captured at most so long before the newest one are put in order; what
            goes back further is of a clock that was set, and follows it.
    """

    def __init__(self, names: tuple[str, ...], cameras: tuple[str, ...] = (), reorder_ns: int = 0) -> None:
        self.names, self._reorder_ns = names, reorder_ns
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
        samples, place = self._samples[name], len(self._samples[name])
        if self.is_overtaken(name, sample):
            while place and 0 < samples[place - 1].stamp_ns - sample.stamp_ns <= self._reorder_ns:
                place -= 1
            if len(samples) == samples.maxlen:
                samples.popleft()
                place = max(0, place - 1)
            samples.insert(place, sample)
        else:
            samples.append(sample)
        self.accepted[name] += 1

    def is_overtaken(self, name: str, sample: Sample) -> bool:
        """Whether a sample comes after one that was captured a little later."""
        newest = self.newest(name)
        return newest is not None and 0 < newest.stamp_ns - sample.stamp_ns <= self._reorder_ns

    def newest(self, name: str) -> Sample | None:
        """The last accepted sample; from any thread."""
        samples = self._samples[name]
        return samples[-1] if samples else None

    def at(self, name: str, time_ns: int) -> Sample | None:
        """The newest accepted sample captured at or before a time."""
        return next((s for s in reversed(self._samples[name]) if s.stamp_ns <= time_ns), None)

    def is_on_its_way(self, name: str, time_ns: int) -> bool:
        """Whether a sample captured at or before a time, but after the newest one, is still to be expected:
        topics overtake each other. Judged by the shortest interval between the last samples of the stream,
        less a little for jitter.
        """
        stamps = [s.stamp_ns for s in list(self._samples[name])[-_TRUST - 1 :]]
        if not stamps:
            return True
        if not 0 < time_ns - stamps[-1] < _ASLEEP_NS:
            return False
        intervals = [b - a for a, b in itertools.pairwise(stamps) if b > a]
        if len(intervals) < _TRUST:
            return True
        shortest = min(intervals)
        return stamps[-1] + shortest - min(shortest // _EARLY, _EARLIEST_NS) <= time_ns

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
    cameras = tuple(s.name for s in inputs if s.is_image)
    return Inbox(tuple(s.name for s in inputs), cameras, contract.period_ns)
