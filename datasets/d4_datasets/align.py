"""Time: from messages at any moment to ticks at a fixed rate, as pure functions on arrays of nanoseconds.

    tick k          t0 + k * period; t0 is the start event, or else the first frame plus half a period, so
                    that a frame that jitters by less than that still falls to its own tick
    frame k         the first camera's newest frame at or before tick k, if it is not older than its tolerance
    anchor k        when that frame was captured; a tick without a frame of its own is one period after the
                    anchor before it
    observation k   of every other stream the newest sample at or before anchor k: when a robot acts on a
                    frame as soon as it has it, nothing newer is there
    action k        the command in force at anchor k + latency: what is learned contains the delay of
                    deployment. A command sent for that very moment is recorded a little after it, so one
                    that comes up to `command_slack` later counts
    reward k        messages in (tick k - 1, tick k]: they arrive with frame k; terminal likewise
    episode         from a start event to its terminal tick, the next start event or the end of the data; a
                    tick that lacks an observation splits it, and so does the contract's `episode.max_s`

Stamps are sorted int64 arrays. The importer and the robot's node use these same rules.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from d4_datasets.contract import Align

MIN_TICKS = 2  # a single frame has no transition to learn from


LONGEST_GAP_NS = 3_600_000_000_000  # between frames of one episode
_COMMAND_SLACK_NS = 5_000_000


def command_slack(period: int) -> int:
    """How much later than its moment a command may be recorded and still count, ns: 5 ms, or a quarter of the
    period where that is less.
    """
    return min(_COMMAND_SLACK_NS, period // 4)


class Grid(NamedTuple):
    """Ticks of all episodes of a recording: `time` int64 [N], ascending, and `group` int64 [N], the start
    event.
    """

    time: np.ndarray
    group: np.ndarray

    @property
    def first(self) -> np.ndarray:
        """bool [N], True on the first tick of every group."""
        return np.diff(self.group, prepend=-1) != 0


def grid(first_frame: int, last_frame: int, period: int, starts: np.ndarray | None = None) -> Grid:
    """The ticks of a recording whose frames lie in [first_frame, last_frame].

    `starts` are the times of its start events, None if the contract has none. The last tick is less than one
    period after the last frame, and ticks of an episode end before the next start event.
    """
    if starts is None:
        starts = np.array([first_frame + period // 2], np.int64)
    end = last_frame + period
    stops = np.minimum(np.append(starts[1:], end), end)
    counts = np.maximum(0, -((starts - stops) // period))  # ticks in [start, stop)
    group = np.repeat(np.arange(len(starts)), counts)
    k = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return Grid(starts[group] + k * period, group)


def runs(frames: np.ndarray) -> list[np.ndarray]:
    """Frames divided where none came for more than `LONGEST_GAP_NS`: a clock jumped, or a recorder slept."""
    return np.split(frames, np.flatnonzero(np.diff(frames) > LONGEST_GAP_NS) + 1)


def grid_of(frames: np.ndarray, period: int, starts: np.ndarray | None = None) -> Grid:
    """The ticks of all runs of frames, int64 [F] sorted, each as `grid` has them: nothing in between."""
    times, groups, before, count = [], [], None, 0
    for run in runs(frames):
        own = starts
        if starts is not None:
            begin = 0 if before is None else int(np.searchsorted(starts, before, side="right"))
            own = starts[begin : np.searchsorted(starts, run[-1] + period, side="right")]
            # Of a start long before the first frame the ticks without frames are left out.
            early = np.maximum(0, run[0] - own) * (run[0] - own > LONGEST_GAP_NS)
            own = own + early // period * period
        ticks = grid(int(run[0]), int(run[-1]), period, own)
        times.append(ticks.time)
        groups.append(ticks.group + count)
        before, count = run[-1] + period, count + (1 if own is None else len(own))
    return Grid(np.concatenate(times), np.concatenate(groups))


def sample(stamps: np.ndarray, times: np.ndarray, align: Align, period: int) -> np.ndarray:
    """Index of the sample that serves each of `times`, int64 [N], -1 where there is none."""
    index = np.searchsorted(stamps, times, side="right") - 1
    if len(stamps) == 0:
        return index
    age = times - stamps[np.maximum(index, 0)]
    good = index >= 0
    if align.tolerance_ns is not None:
        good &= age <= align.tolerance_ns
    if align.strategy == "drop":
        good &= age < period
    return np.where(good, index, -1)


def anchors(stamps: np.ndarray, index: np.ndarray, ticks: Grid, period: int) -> np.ndarray:
    """When each tick's frame was captured, int64 [N], for frames at `stamps` that serve the ticks by `index`.

    A tick that repeats the frame of the one before is taken to have lacked one that was due a period later. A
    tick without any frame is its own anchor.
    """
    if len(stamps) == 0 or len(index) == 0:
        return ticks.time
    is_own = ticks.first | (np.diff(index, prepend=-1) != 0)
    place = np.arange(len(index))
    repeats = place - np.maximum.accumulate(np.where(is_own, place, 0))
    return np.where(index >= 0, stamps[np.maximum(index, 0)] + repeats * period, ticks.time)


def arrivals(stamps: np.ndarray, ticks: Grid, period: int, *, after_start: bool) -> np.ndarray:
    """The tick that each message arrives with, int64 [M], -1 if it arrives with none: (tick k - 1, tick k].

    With `after_start` (the contract names start events) a message before the start of an episode is not part
    of it.
    """
    if len(ticks.time) == 0:
        return np.full(len(stamps), -1, np.int64)
    tick = np.searchsorted(ticks.time, stamps, side="left")
    inside = np.minimum(tick, len(ticks.time) - 1)
    early = ticks.time[inside] - stamps
    allowed = np.where(ticks.first[inside] & after_start, 1, period)
    return np.where((tick < len(ticks.time)) & (early < allowed), tick, -1)


def terminals(stamps: np.ndarray, ticks: Grid, period: int, *, after_start: bool) -> np.ndarray:
    """Terminal ticks, bool [N], for terminal messages at `stamps`.

    A terminal that arrives less than one period after the last tick of an episode, where no tick is left to
    carry it, marks that last tick: how an episode ended must not be lost.
    """
    flags = np.zeros(len(ticks.time), bool)
    tick = arrivals(stamps, ticks, period, after_start=after_start)
    flags[tick[tick >= 0]] = True
    if len(flags):
        before = np.searchsorted(ticks.time, stamps, side="left") - 1
        late = (tick < 0) & (before >= 0) & (stamps - ticks.time[before] < period)
        flags[before[late]] = True
    return flags


def segments(valid: np.ndarray, terminal: np.ndarray, ticks: Grid, longest: int | None = None) -> np.ndarray:
    """Episodes as [start, stop) tick indices, int64 [E, 2].

    `valid` bool [N] says that every observation is there. A group is cut after its first terminal tick,
    split where a tick is not valid, and cut into even pieces of at most `longest` ticks; runs shorter than
    `MIN_TICKS` are left out.
    """
    if len(valid) == 0:
        return np.zeros((0, 2), np.int64)
    ended = np.cumsum(terminal) - terminal
    first = np.flatnonzero(ticks.first)
    size = np.diff(np.append(first, len(valid)))
    ended = ended - np.repeat(ended[first], size)
    use = valid & (ended == 0)
    begins = use & (ticks.first | ~np.append(False, use[:-1]))
    ends = use & np.append(ticks.first[1:] | ~use[1:], True)
    runs = np.stack([np.flatnonzero(begins), np.flatnonzero(ends) + 1], axis=1)
    if longest is not None:
        # Even pieces: a last one of a single tick would be left out, and a terminal with it.
        counts = -((runs[:, 0] - runs[:, 1]) // longest)
        run = np.repeat(runs, counts, axis=0)
        piece = np.arange(len(run)) - np.repeat(np.cumsum(counts) - counts, counts)
        bounds = np.stack([piece, piece + 1], axis=1) * (run[:, 1:] - run[:, :1])
        runs = run[:, :1] + bounds // np.repeat(counts, counts)[:, None]
    return runs[runs[:, 1] - runs[:, 0] >= MIN_TICKS]


def latest(stamps: np.ndarray, ticks: Grid, period: int) -> np.ndarray:
    """Index of the newest message at each tick, for topics sent once an episode (tasks): int64 [N], -1 for
    none.

    A message that arrives within one period after the start of an episode counts from its first tick on: it
    is sent together with the start event and may be received a little later.
    """
    times = ticks.time + np.where(ticks.first, period, 0)
    return np.searchsorted(stamps, times, side="right") - 1
