"""A recording of any kind seen through a contract: ticks, labels and episodes, and the frames that they use.

Whoever reads a kind of recording fills `Track`s: stamps in ns and values, one per entry of the contract.
Everything that follows from them is here and the same for all kinds: `Aligned`. Pictures are not kept; which
of them ticks use is known before the second reading, in which `FrameWriter` takes them one by one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from queue import Queue
from typing import Any, TypeVar

import numpy as np

from d4_datasets import align, messages, progress, signals
from d4_datasets.contract import Action, Align, Contract, Observation
from d4_datasets.errors import UserError
from d4_datasets.latents import Origin
from d4_datasets.lerobot import Episode
from d4_datasets.video import Video, VideoEncoder

_T = TypeVar("_T")
_LIMIT_SLACK = 1e-3  # of the range: rounding in a driver is no violation
_UNSTAMPED_AFTER_NS = 60_000_000_000  # a zero stamp is genuine only near the start of simulated time
_MOST_TICKS = 1 << 24  # of one recording: 19 days at 10 Hz, with which memory stays below 2 GB
_MOST_WARNINGS = 100
TOO_SHORT = "and an episode takes at least"
_BATCH, _BATCH_BYTES = 16, 1 << 23  # items that one thread hands to another together, and their bytes
_MOST_PENDING = 1 << 30  # bytes of pictures that wait for earlier ones


@dataclass
class Track:
    """What one contract entry takes from its topic: stamps in ns, values, and which message of the topic it
    was.
    """

    topic: str
    align: Align
    read: Callable[[Any], Any] | None  # None for cameras, whose pictures are decoded in the second pass
    stamps: Any = field(default_factory=list)
    values: Any = field(default_factory=list)
    ordinals: Any = field(default_factory=list)
    lag: Any = field(default_factory=list)  # receive time minus stamp
    known: np.ndarray | None = None  # of commands: False ends the one before and gives none; None: all are
    unstamped: int = 0

    def add(self, ordinal: int, receive: int, msg: Any) -> None:
        """Take message number `ordinal` of the topic, received at `receive` ns."""
        stamp: int | None = receive
        if self.align.timeline == "header":
            stamp = messages.stamp_ns(msg)
            if stamp is None:
                raise UserError(
                    f"{self.topic} has no header to take its time from; write `timeline: receive`"
                )
            if stamp < 0 or (stamp == 0 and receive > _UNSTAMPED_AFTER_NS):
                self.unstamped += 1
                return
            self.lag.append(receive - stamp)
        if self.read is not None:
            self.values.append(self.read(msg))
        self.stamps.append(stamp)
        self.ordinals.append(ordinal)

    def close(self) -> None:
        """Lists to arrays, in order of time."""
        order = np.argsort(np.array(self.stamps, np.int64), kind="stable")
        self.stamps = np.array(self.stamps, np.int64)[order]
        self.ordinals = np.array(self.ordinals, np.int64)[order]
        if self.read is not None:
            self.values = [self.values[i] for i in order]


class Aligned:
    """The tracks of one recording for one contract, and the ticks and episodes that follow from them.

    Args: name: of the recording, for messages to people. contract: the robot. tracks: by key: observations by
        name, `action.<name>`, and `signal.<what>` for tasks, reward, start and terminal where the contract
        names them. clip: action channels whose commands outside the limits are clipped instead of refused.
        warnings: to be added to.

    Raises:
        UserError: NaN, or actions outside their limits, naming recording, topic and time.
    """

    def __init__(
        self,
        name: str,
        contract: Contract,
        tracks: dict[str, Track],
        clip: Sequence[str] = (),
        warnings: list[str] | None = None,
    ) -> None:
        self.name, self.contract, self.tracks = name, contract, tracks
        self.warnings: list[str] = [] if warnings is None else warnings
        self.latents: np.ndarray | None = None  # of the camera's messages, float16 [M, tokens, channels]
        self.origin: Origin | None = None
        self.vectors = {s.name: self._numbers(s.name, s.select) for s in contract.vectors()}
        self.commands = {
            channel.name: self._commands(channel, channel.name in clip) for channel in contract.actions
        }
        self._align()

    def _error(self, topic: str, time_ns: int, what: object) -> UserError:
        return UserError(f"{self.name}: {topic} at {time_ns / 1e9:.3f} s: {what}")

    def _numbers(self, key: str, select: Sequence[str]) -> np.ndarray:
        """The values of a track, float64 [M, k], without NaN."""
        track = self.tracks[key]
        values = np.array(track.values, np.float64).reshape(len(track.stamps), len(select))
        bad = np.argwhere(~(np.abs(values) <= np.finfo(np.float32).max))  # NaN is not
        if len(bad):
            row, column = bad[0]
            raise self._error(track.topic, track.stamps[row], f"{select[column]} is {values[row, column]}")
        return values

    def _commands(self, channel: Action, clip: bool) -> np.ndarray:
        """The commands of a channel, float64 [M, dim], within its limits."""
        key = f"action.{channel.name}"
        values = self._numbers(key, channel.select)
        names = [f"{channel.name}.{path}" for path in channel.select]
        columns = [self.contract.action_names.index(name) for name in names]
        low = self.contract.action_low[columns].astype(np.float64)
        high = self.contract.action_high[columns].astype(np.float64)
        slack = _LIMIT_SLACK * (high - low)
        outside = (values < low - slack) | (values > high + slack)
        if channel.kind != "continuous":
            outside |= np.abs(values - np.round(values)) > _LIMIT_SLACK
            values = np.round(values) if clip or not outside.any() else values
        bad = np.argwhere(outside)
        if len(bad) and not clip:
            row, column = bad[0]
            kind = (
                "" if channel.kind == "continuous" else f" or no whole number, as {channel.kind} actions are"
            )
            raise self._error(
                self.tracks[key].topic,
                self.tracks[key].stamps[row],
                f"{channel.select[column]} is {values[row, column]:g}, "
                f"outside [{low[column]:g}, {high[column]:g}]{kind}; "
                f"correct the limits in the contract or pass --clip-actions {channel.name}",
            )
        return np.clip(values, low, high)

    # -- ticks --

    def _align(self) -> None:
        contract, period = self.contract, self.contract.period_ns
        frames = self.tracks[contract.images[0].name].stamps
        starts = self.tracks["signal.start"].stamps if "signal.start" in self.tracks else None
        self._check_span(frames)
        self.ticks = align.grid_of(frames, period, starts)
        size = len(self.ticks.time)
        first = contract.images[0]
        index = align.sample(frames, self.ticks.time, first.align, period)
        self.anchors = align.anchors(frames, index, self.ticks, period)
        self.samples = {
            stream.name: align.sample(self.tracks[stream.name].stamps, self.anchors, stream.align, period)
            for stream in contract.observations
        } | {first.name: index}
        valid = np.ones(size, bool)
        for index in self.samples.values():
            valid &= index >= 0
        self.terminal = np.zeros(size, bool)
        if "signal.terminal" in self.tracks:
            track = self.tracks["signal.terminal"]
            stamps = track.stamps[np.array(track.values, bool)]
            self.terminal = align.terminals(stamps, self.ticks, period, after_start=starts is not None)
        self.episodes = align.segments(valid, self.terminal, self.ticks, contract.max_ticks)
        if not len(self.episodes) and len(self.warnings) <= _MOST_WARNINGS:
            self.warnings.append(self._why_empty(int(valid.sum())))
        self._label()
        self._reward_and_task(starts is not None)

    def _why_empty(self, valid: int) -> str:
        """Why there is no episode."""
        counts = [
            f"{int((self.samples[stream.name] >= 0).sum())} with {stream.topic}"
            for stream in self.contract.observations
        ]
        every = f", {valid} with all" if len(counts) > 1 else ""
        held = f"{len(self.ticks.time)} ticks ({', '.join(counts)}{every})"
        return f"{self.name} has {held}, {TOO_SHORT} {align.MIN_TICKS} in a row"

    def _check_span(self, frames: np.ndarray) -> None:
        """Refuse stamps that would take no end of ticks, and tell those that show a clock that jumped."""
        topic = self.tracks[self.contract.images[0].name].topic
        runs = align.runs(frames)
        span = sum(int(run[-1] - run[0]) for run in runs)
        if span // self.contract.period_ns > _MOST_TICKS:
            raise UserError(
                f"{self.name}: by the stamps of {topic} it lasts {span / 86400e9:.0f} days, too long for one "
                "recording; correct them, write `timeline: receive` for it, or cut the recording"
            )
        for before, after in pairwise(runs):
            self.warnings.append(
                f"{self.name}: after {before[-1] / 1e9:.3f} s {topic} has no frame for "
                f"{(after[0] - before[-1]) / 3600e9:.1f} h (a clock that was set?); episodes end there"
            )
            if len(self.warnings) > _MOST_WARNINGS:
                break

    def _label(self) -> None:
        """Actions [N, A] and their mask [N]: known where every channel has a command in force."""
        contract = self.contract
        self.action = np.zeros((len(self.ticks.time), contract.action_dim))
        self.mask = np.ones(len(self.ticks.time), bool)
        moments = self.anchors + contract.latency_ns + align.command_slack(contract.period_ns)
        column = 0
        for channel in contract.actions:
            track = self.tracks[f"action.{channel.name}"]
            index = align.sample(track.stamps, moments, channel.align, contract.period_ns)
            if len(track.stamps):
                self.action[:, column : column + channel.dim] = self.commands[channel.name][index]
            self.mask &= index >= 0
            if track.known is not None and len(track.stamps):
                self.mask &= track.known[index]
            column += channel.dim
        self.action[~self.mask] = 0

    def _reward_and_task(self, after_start: bool) -> None:
        contract, size = self.contract, len(self.ticks.time)
        self.reward = np.zeros((size, len(contract.task_names)))
        if contract.reward is not None and len(self.tracks["signal.reward"].stamps):
            track = self.tracks["signal.reward"]
            tick = align.arrivals(track.stamps, self.ticks, contract.period_ns, after_start=after_start)
            used, values = tick >= 0, np.array(track.values, np.float64)
            large = np.argwhere(~(np.abs(values) < signals.LARGEST_REWARD))
            if len(large):
                raise self._error(track.topic, track.stamps[large[0, 0]], "a reward is NaN or too large")
            if contract.reward.reduce == "sum":
                np.add.at(self.reward, tick[used], values[used])
            else:
                self.reward[tick[used]] = values[used]  # of several in a tick NumPy keeps the last
        self.task = np.zeros(size, np.int64)
        if contract.tasks is not None and len(self.tracks["signal.tasks"].stamps):
            track = self.tracks["signal.tasks"]
            index = align.latest(track.stamps, self.ticks, contract.period_ns)
            if (index < 0).any():
                self.warnings.append(
                    f"{self.name}: {int((index < 0).sum())} ticks come before the first message of "
                    f"{track.topic} and take its task"
                )
            self.task = np.array(track.values, np.int64)[np.maximum(index, 0)]

    def all_episodes(self, videos: dict[str, list[Video]], source: str) -> list[Episode]:
        """Every episode with its videos, per camera one for each."""
        return [
            self.episode(number, {name: videos[name][number] for name in videos}, source)
            for number in range(len(self.episodes))
        ]

    def episode(self, number: int, images: dict[str, Any], source: str) -> Episode:
        """Episode `number` with the given images."""
        begin, end = self.episodes[number]
        span = slice(begin, end)
        repeats = np.zeros(end - begin - 1, bool)
        for camera in self.contract.images:
            repeats |= np.diff(self.samples[camera.name][span]) == 0
        frames = self.samples[self.contract.images[0].name][span]
        return Episode(
            images=images,
            action=self.action[span],
            action_mask=self.mask[span],
            reward=self.reward[span],
            task_index=self.task[span],
            is_terminal=self.terminal[span],
            vectors={name: values[self.samples[name][span]] for name, values in self.vectors.items()},
            latents=None if self.latents is None else self.latents[frames],
            origin=self.origin,
            source=source,
            start_ns=int(self.ticks.time[begin]),
            stale=int(repeats.sum()),
            dropped=self._dropped(number),
            drive=int(self.ticks.group[begin]),
        )

    def _dropped(self, number: int) -> int:
        """Ticks of the episode's group that are in no episode, told with the group's first episode."""
        groups = self.ticks.group[self.episodes[:, 0]]
        group = groups[number]
        if number > 0 and groups[number - 1] == group:
            return 0
        ticks = np.flatnonzero(self.ticks.group == group)
        ended = np.flatnonzero(self.terminal[ticks])
        total = int(ended[0]) + 1 if len(ended) else len(ticks)
        mine = self.episodes[groups == group]
        return total - int((mine[:, 1] - mine[:, 0]).sum())


def ahead(items: Generator[_T, None, None], weigh: Callable[[_T], int] = lambda _: 0) -> Iterator[_T]:
    """The items of a generator, of which a thread makes some in advance: decoding goes on while the frames
    before are resized and encoded, all of which lets other threads run.

    They are handed over in batches, since waking a thread takes as long as a small frame. `weigh` gives the
    bytes of an item, so that large ones do not pile up.
    """
    ready: Queue[list[_T] | BaseException | None] = Queue(1)
    stopped = threading.Event()

    def work() -> None:
        batch: list[_T] = []
        held, end = 0, None
        try:
            for item in items:
                batch.append(item)
                held += weigh(item)
                if len(batch) == _BATCH or held >= _BATCH_BYTES:
                    ready.put(batch)
                    batch, held = [], 0
                if stopped.is_set():
                    break
            items.close()  # in the thread that files were opened in: sqlite insists
        except BaseException as error:
            end = error
        ready.put(batch)
        ready.put(end)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    got: list[_T] | BaseException | None = []
    try:
        while isinstance(got := ready.get(), list):
            yield from got
        if got is not None:
            raise got
    finally:
        stopped.set()
        while isinstance(got, list):
            got = ready.get()
        thread.join()


def picture_bytes(item: tuple[Any, ...]) -> int:
    """Of an item that ends with a picture, for `ahead`."""
    return item[-1].nbytes


class FrameWriter:
    """Takes one camera's pictures as they come and encodes the frames of its ticks, episode by episode."""

    def __init__(self, recording: Aligned, camera: Observation, folder: Path) -> None:
        assert camera.size is not None
        self.camera, self.folder, self.size = camera, folder, camera.size
        self.name = recording.name
        self.rate_hz = recording.contract.rate_hz
        sample, ordinals = recording.samples[camera.name], recording.tracks[camera.name].ordinals
        spans = [ordinals[sample[begin:end]] for begin, end in recording.episodes]
        self.wanted = np.concatenate(spans)
        self.last_use = {int(ordinal): place for place, ordinal in enumerate(self.wanted)}
        self.ends = set(np.cumsum([len(span) for span in spans]).tolist())
        self.pending: dict[int, np.ndarray] = {}
        self.place = 0
        self.encoder: VideoEncoder | None = None
        self.videos: list[Video] = []
        self.cameras, self.noted = len(recording.contract.images), time.monotonic()

    def uses(self, ordinal: int) -> bool:
        """Whether any tick uses picture number `ordinal` of the track."""
        return ordinal in self.last_use

    def add(self, ordinal: int, rgb: np.ndarray) -> None:
        """Take picture number `ordinal` of the track, uint8 [H, W, 3] of any size."""
        self.pending[ordinal] = messages.resize(rgb, self.size)
        if len(self.pending) * self.pending[ordinal].nbytes > _MOST_PENDING:
            raise UserError(
                f"{self.name}: pictures of {self.camera.topic} come too far from the order of their stamps; "
                "write `timeline: receive` for it"
            )
        # Usually one step; stamps that are out of order make frames wait for an earlier one.
        while self.place < len(self.wanted) and (use := int(self.wanted[self.place])) in self.pending:
            if self.encoder is None:
                path = self.folder / f"{self.camera.name}-{len(self.videos):05d}.mp4"
                self.encoder = VideoEncoder(path, self.rate_hz, self.size)
            self.encoder.add(self.pending[use])
            if self.last_use[use] == self.place:
                del self.pending[use]
            self.place += 1
            if self.place in self.ends:
                self.videos.append(self.encoder.close())
                self.encoder = None
        if time.monotonic() - self.noted >= progress.NOTE_EVERY_S:
            self.noted = time.monotonic()
            progress.note(self.folder, self.camera.name, self.place / len(self.wanted) / self.cameras)

    @property
    def missing(self) -> int:
        """How many frames of ticks have not come."""
        return len(self.wanted) - self.place

    def abort(self) -> None:
        """Remove what has been written."""
        if self.encoder is not None:
            self.videos.append(self.encoder.close())
            self.encoder = None
        for video in self.videos:
            video.path.unlink()
        self.videos = []
