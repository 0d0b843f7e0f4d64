"""Clocks: the rate that was reached against the one that is claimed, gaps, jumps, time of day."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import numpy as np

from d4_datasets.checks.base import Part, Verdict, error, ok, warn
from d4_datasets.contract import Contract

_SLOW = 0.1  # share of the ticks without a frame of their own
_DROPPED = 0.1  # share of the ticks without all observations
_SET_S = 946_684_800  # 2000-01-01: a clock that shows less was never set, or counts from its start
_HOUR_NS = 3_600_000_000_000


class Times:
    """Running counts over episodes in their order; `video_rate_hz` is what the dataset says it runs at."""

    def __init__(self, contract: Contract, video_rate_hz: float) -> None:
        self.contract, self.video_rate_hz = contract, video_rate_hz
        self.frames = self.stale = self.dropped = self.dated = self.set = 0
        self.hours = np.zeros(24, np.int64)
        self.begin: int | None = None
        self.end = 0
        self.gaps, self.gap_s, self.longest_gap_s = 0, 0.0, 0.0
        self.overlaps: list[tuple[int, float]] = []
        self._before: dict[str, Any] = {}

    def add(self, part: Part) -> float | None:
        """Take in one episode; returns the seconds without data since the one before it, None where that is
        another recording.
        """
        origin, period = part.origin, self.contract.period_ns
        self.frames += part.frames
        self.stale += int(origin.get("stale", 0))
        self.dropped += int(origin.get("dropped", 0))
        gap = self._gap(origin)
        if gap is not None and gap > 2e-9 * period:
            self.gaps, self.gap_s = self.gaps + 1, self.gap_s + gap
            self.longest_gap_s = max(self.longest_gap_s, gap)
        if gap is not None and gap < -2e-9 * period:
            self.overlaps.append((part.number, -gap))
        self._before = origin
        if "start_ns" in origin:
            self._date(int(origin["start_ns"]), part.frames)
        return gap

    def _date(self, start: int, frames: int) -> None:
        self.dated += frames
        if start < _SET_S * 10**9:
            return
        self.set += frames
        self.begin = start if self.begin is None else min(self.begin, start)
        self.end = max(self.end, start + frames * self.contract.period_ns)
        # Whole hours that an episode touches share its frames by time.
        edges = np.arange(start // _HOUR_NS, (start + frames * self.contract.period_ns) // _HOUR_NS + 2)
        span = np.clip(edges * _HOUR_NS, start, start + frames * self.contract.period_ns)
        count = np.diff(np.round((span - start) / self.contract.period_ns)).astype(np.int64)
        np.add.at(self.hours, edges[:-1] % 24, count)

    def _gap(self, here: dict[str, Any]) -> float | None:
        before = self._before
        if not here.get("source") or here["source"] != before.get("source"):
            return None
        if not {"start_ns", "frames"} <= before.keys() or "start_ns" not in here:
            return None
        end = before["start_ns"] + before["frames"] * self.contract.period_ns
        return round((here["start_ns"] - end) / 1e9, 3)

    def table(self) -> dict[str, Any]:
        """`achieved_hz` counts ticks that had a frame of their own; hours are UTC, in frames."""
        rate = self.contract.rate_hz
        known = self.begin is not None
        return {
            "rate_hz": rate, "video_rate_hz": self.video_rate_hz,
            "achieved_hz": rate * (1 - self.stale / max(self.frames, 1)),
            "stale": self.stale, "dropped": self.dropped,
            "gaps": self.gaps, "gap_s": self.gap_s, "longest_gap_s": self.longest_gap_s,
            "overlaps": len(self.overlaps),
            "first": _date(self.begin) if self.begin is not None else None,
            "last": _date(self.end) if known else None, "hours_utc": self.hours.tolist(),
        }  # fmt: skip

    def verdicts(self) -> Iterator[Verdict]:
        """Rates, gaps, jumps of the clock, and when the data were recorded."""
        yield from self._rates()
        lost = self.dropped / max(self.frames + self.dropped, 1)
        text = f"{self.dropped} ticks dropped ({lost:.1%}), {self.gaps} gaps within recordings"
        if self.gaps:
            text += f", the longest {self.longest_gap_s:.1f} s"
        if lost > _DROPPED:
            yield warn("gaps", text, "an observation was missing: raise its tolerance_ms, or fix the drops")
        else:
            yield ok("gaps", text)
        if self.overlaps:
            number, seconds = self.overlaps[0]
            text = f"{len(self.overlaps)} episodes begin before the one before them ends, first: episode "
            text += f"{number} by {seconds:.1f} s"
            yield warn("clock", text, "the recorder's clock jumped back, or the data are faster than rate_hz")
        yield from self._day()

    def _rates(self) -> Iterator[Verdict]:
        rate, share = self.contract.rate_hz, self.stale / max(self.frames, 1)
        if abs(self.video_rate_hz - rate) > 1e-3:
            text = f"the dataset runs at {self.video_rate_hz:g} Hz, its contract at {rate:g} Hz"
            yield error("rate", text, "ingest again with this contract: every time constant would be wrong")
            return
        text = f"{share:.1%} stale frames: pictures came at about {rate * (1 - share):.1f} Hz, the contract "
        text += f"claims {rate:g}"
        if share > _SLOW:
            yield warn("rate", text, "lower rate_hz in the contract, or find out why the camera is late")
        else:
            yield ok("rate", f"{rate:g} Hz, as the contract says; {share:.1%} stale frames")

    def _day(self) -> Iterator[Verdict]:
        if self.begin is not None:
            hours = int((self.hours > 0).sum())
            text = (
                f"recorded from {_date(self.begin)} to {_date(self.end)} UTC, in {hours} of the day's hours"
            )
            yield ok("clock", text)
        elif self.dated:
            yield ok("clock", "the recorder's clock was not set (or simulated): time of day is unknown")


def _date(time_ns: int) -> str:
    return datetime.fromtimestamp(time_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M")
