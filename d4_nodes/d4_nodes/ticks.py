"""Which frame belongs to which tick, live: the rules of `d4_datasets.align` applied as frames come in.

Offline, tick k is served by the newest frame captured at or before it. Live, nobody knows yet whether a newer
one will come; but a camera is periodic, so the frame after which the next would come too late for the tick is
taken to be the newest, and work begins the moment it arrives. A tick without a frame of its own is served,
when its time has passed, by the last one, as the contract's tolerance allows.

Pure logic on nanoseconds; no clock, no thread.
"""

from __future__ import annotations

from typing import NamedTuple

from d4_datasets.contract import Align

_TRUST = 5  # intervals between frames until the camera's period counts as known


def oldest(align: Align, period_ns: int) -> int | None:
    """How old a sample may be at its tick, ns; None: it holds for ever."""
    if align.strategy == "drop":
        return min(period_ns - 1, align.tolerance_ns or period_ns)
    return align.tolerance_ns


class Tick(NamedTuple):
    """A tick that can be worked on.

    number: k. time_ns: nominal time. anchor_ns: capture time of its frame, from which latency counts; a tick
    without a frame of its own is one period after the anchor before it. stamp_ns: of the frame that serves
    it.
    """

    number: int
    time_ns: int
    anchor_ns: int
    stamp_ns: int

    @property
    def is_fresh(self) -> bool:
        """Whether the tick has a frame of its own."""
        return self.anchor_ns == self.stamp_ns


class Ticker:
    """Turns capture times of the first camera into ticks, each once, in order.

    Args:
        period_ns: between ticks.
        grace_ns: how much longer than expected a tick waits for a frame of its own.
    """

    def __init__(self, period_ns: int, grace_ns: int = 0) -> None:
        self.period_ns, self.grace_ns = period_ns, grace_ns
        self.skipped = 0  # ticks that went by without being handed out
        self.late = 0  # frames that came when their tick had been handed out
        self.begin(None)

    def begin(self, start_ns: int | None) -> None:
        """Begin at tick 0: at `start_ns`, or half a period after the next frame."""
        self._zero = start_ns
        self._next = 0
        self._frame: int | None = None  # newest frame
        self._own: tuple[int, int] | None = None  # last tick with a frame of its own, and that frame
        self._stamps: list[int] = []

    def time_of(self, number: int) -> int:
        """Nominal time of a tick."""
        assert self._zero is not None
        return self._zero + number * self.period_ns

    def frame(self, stamp_ns: int) -> None:
        """A frame captured at `stamp_ns` has arrived; stamps must not go back."""
        if self._zero is None:
            self._zero = stamp_ns + self.period_ns // 2
        self._stamps = [*self._stamps[-_TRUST:], stamp_ns]
        if self._index(stamp_ns) < self._next:
            self.late += 1
        self._frame = stamp_ns

    def next(self, now_ns: int) -> Tick | None:
        """The next tick if it can be worked on now."""
        if self._zero is None or self._frame is None:
            return None
        newest = self._index(self._frame)
        if newest > self._next:  # its own frame never came, or came too late to be told apart
            self.skipped += newest - self._next
            self._next = newest
        due = self.time_of(self._next)
        if newest == self._next and self._frame + self._interval() > due:
            return self._take(self._frame)
        waited = now_ns - self._patience()
        if waited > 0:
            self.skipped += waited // self.period_ns
            self._next += waited // self.period_ns
            return self._take(self._frame if newest >= self._next else None)
        return None

    def deadline(self) -> int | None:
        """When the next tick can be worked on at the latest, without further frames."""
        return None if self._zero is None else self._patience() + 1

    def _patience(self) -> int:
        """Until when the next tick waits: for a better frame than its own until its time; for one at all
        until its time or, if that is sooner, one period after the frame before; and a little longer.
        Of a camera so fast that the better frame must come before it is too late to decide on the one at
        hand, it waits no longer than that.
        """
        due = self.time_of(self._next)
        has_own = self._frame is not None and self._index(self._frame) >= self._next
        if has_own and self._frame is not None and self._interval() <= self.grace_ns:
            due = min(due, self._frame)
        elif not has_own and self._own is not None:
            number, stamp = self._own
            due = min(due, stamp + (self._next - number) * self.period_ns)
        return due + self.grace_ns

    def _take(self, own: int | None) -> Tick:
        assert self._frame is not None
        number, self._next = self._next, self._next + 1
        if own is not None or self._own is None:
            self._own = (number, self._frame)
        anchor = self._own[1] + (number - self._own[0]) * self.period_ns
        return Tick(number, self.time_of(number), anchor, self._frame)

    def _index(self, stamp_ns: int) -> int:
        """The tick that a frame belongs to: the first at or after it."""
        assert self._zero is not None
        return max(0, -((self._zero - stamp_ns) // self.period_ns))

    def _interval(self) -> int:
        """Time between frames, ns: the median of the last ones, since a single short one of a camera that
        jitters tells nothing of the next; one period until enough have been seen.
        """
        if len(self._stamps) <= _TRUST:
            return self.period_ns
        return sorted(b - a for a, b in zip(self._stamps, self._stamps[1:], strict=False))[_TRUST // 2]
