"""One bag seen through a contract: its ticks, labels and episodes, and then the frames they use as lossless
video.

A bag is read twice: first all stamps and numbers, from which ticks and episodes follow; then the frames that
ticks really use, which go straight into video. So memory does not grow with the length of a recording.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from d4_datasets import align, fields, latents, messages, signals
from d4_datasets.bags import Bag
from d4_datasets.contract import PICTURE_TYPES, Action, Align, Contract, Observation
from d4_datasets.errors import UserError
from d4_datasets.lerobot import Episode
from d4_datasets.video import Video, VideoEncoder

_RECEIVE = Align("hold", "receive")
_LIMIT_SLACK = 1e-3  # of the range: rounding in a driver is no violation
_CLOCK_SLACK_NS = 1_000_000_000
_UNSTAMPED_AFTER_NS = 60_000_000_000  # a zero stamp is genuine only near the start of simulated time


# ---- first pass: stamps and numbers ----


@dataclass
class _Track:
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
    unstamped: int = 0

    def add(self, ordinal: int, receive: int, msg: Any) -> None:
        stamp: int | None = receive
        if self.align.timeline == "header":
            stamp = messages.stamp_ns(msg)
            if stamp is None:
                raise UserError(
                    f"{self.topic} has no header to take its time from; write `timeline: receive`"
                )
            if stamp == 0 and receive > _UNSTAMPED_AFTER_NS:
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


class Recording:
    """The tracks of one bag for one contract, and the ticks and episodes that follow from them.

    Raises UserError, naming bag, topic and time, for topics that are missing or of another type, NaN, and
    actions outside their limits unless their channel is named in `clip`.
    """

    def __init__(self, path: Path, contract: Contract, clip: Sequence[str] = ()) -> None:
        self.contract, self.bag = contract, Bag(path)
        self.warnings = self.bag.report.warnings
        self.tracks = self._tracks()
        self._collect()
        self._check_clocks()
        self.latents = self._latents()
        self.vectors = {s.name: self._numbers(s.name, s.select) for s in contract.vectors()}
        self.commands = {
            channel.name: self._commands(channel, channel.name in clip) for channel in contract.actions
        }
        self._align()

    def _tracks(self) -> dict[str, _Track]:
        """The tracks by key: observations by name, `action.<name>`, `signal.<what>`, for the whole
        contract.
        """
        contract, held = self.contract, self.bag.topics
        tracks: dict[str, _Track] = {}

        def add(
            key: str, entry: Any, align: Align, read: Callable[[Any], Any] | None, required: bool
        ) -> None:
            if entry.topic not in held and not required:
                tracks[key] = _Track(entry.topic, align, read)
                return
            self.bag.require([entry.topic])
            if held[entry.topic] != entry.type:
                raise UserError(
                    f"{self.bag.path}: {entry.topic} carries {held[entry.topic]}, "
                    f"the contract says {entry.type}"
                )
            tracks[key] = _Track(entry.topic, align, read)

        for stream in map(self._as_recorded, contract.observations):
            read = _LatentsReader() if stream.type == latents.TYPE else _reader(stream)
            add(stream.name, stream, stream.align, None if stream.type in PICTURE_TYPES else read, True)
        for channel in contract.actions:
            add(f"action.{channel.name}", channel, channel.align, _reader(channel), False)
        others: dict[str, tuple[Any, Callable[[Any], Any]]] = {
            "tasks": (contract.tasks, partial(signals.task, contract)),
            "reward": (contract.reward, partial(signals.reward, contract)),
            "start": (contract.episode.start, lambda _: True),
            "terminal": (contract.episode.terminal, partial(signals.terminal, contract)),
        }
        for key, (signal, read) in others.items():
            if signal is not None:
                add(f"signal.{key}", signal, _RECEIVE, read, key == "start")
                if signal.topic not in held:
                    self.warnings.append(
                        f"{self.bag.path} has no topic {signal.topic}, which gives the {key}"
                    )
        return tracks

    def _as_recorded(self, stream: Observation) -> Observation:
        """A stream as this bag holds it: of a camera whose pictures it lacks, the latents if it has those."""
        held, topic = self.bag.topics, stream.topic + latents.SUFFIX
        if stream.type in PICTURE_TYPES and stream.topic not in held and held.get(topic) == latents.TYPE:
            stream = replace(stream, topic=topic, type=latents.TYPE)
        if stream.type == latents.TYPE and len(self.contract.images) > 1:
            raise UserError(
                f"{self.bag.path}: {stream.topic} carries the latents of a robot with one camera, and "
                f"contract {self.contract.name} names {len(self.contract.images)}"
            )
        return stream

    def _latents(self) -> np.ndarray | None:
        """The latents of the camera's messages, float16 [M, tokens, channels], with `origin`; None if the bag
        has pictures.
        """
        track = self.tracks[self.contract.images[0].name]
        self.origin = track.read.origin if isinstance(track.read, _LatentsReader) else None
        return None if self.origin is None else np.stack(track.values)

    def _collect(self) -> None:
        topics: dict[str, list[_Track]] = {}
        for track in self.tracks.values():
            if track.topic in self.bag.topics:
                topics.setdefault(track.topic, []).append(track)
        seen = dict.fromkeys(topics, 0)
        for topic, receive, data in self.bag.raw(list(topics)):
            try:
                msg = self.bag.decode(topic, data)
                for track in topics[topic]:
                    track.add(seen[topic], receive, msg)
            except UserError as error:
                raise self._error(topic, receive, error) from None
            seen[topic] += 1
        for key, track in self.tracks.items():
            track.close()
            if track.unstamped:
                self.warnings.append(
                    f"{self.bag.path}: {track.unstamped} messages of {track.topic} have no stamp"
                )
            if len(track.stamps) == 0 and key in {stream.name for stream in self.contract.observations}:
                lack = "stamped message; write `timeline: receive` for it" if track.unstamped else "message"
                raise UserError(f"{self.bag.path}: {track.topic} has no {lack}")

    def _check_clocks(self) -> None:
        """Header stamps of another clock than the bag's would silently tear frames and commands apart."""
        for track in self.tracks.values():
            if track.lag and abs(lag := float(np.median(track.lag))) > _CLOCK_SLACK_NS:
                self.warnings.append(
                    f"{self.bag.path}: header stamps of {track.topic} are {lag / 1e9:.1f} s away from the "
                    "time of reception; if its clock is not the recorder's write `timeline: receive`"
                )

    def _error(self, topic: str, time_ns: int, what: object) -> UserError:
        return UserError(f"{self.bag.path}: {topic} at {time_ns / 1e9:.3f} s: {what}")

    def _numbers(self, key: str, select: Sequence[str]) -> np.ndarray:
        """The values of a track, float64 [M, k], without NaN."""
        track = self.tracks[key]
        values = np.array(track.values, np.float64).reshape(len(track.stamps), len(select))
        bad = np.argwhere(~np.isfinite(values))
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
        self.ticks = align.grid(int(frames[0]), int(frames[-1]), period, starts)
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
        self._label()
        self._reward_and_task(starts is not None)

    def _label(self) -> None:
        """Actions [N, A] and their mask [N]: known where every channel has a command in force."""
        contract = self.contract
        self.action = np.zeros((len(self.ticks.time), contract.action_dim))
        self.mask = np.ones(len(self.ticks.time), bool)
        moments = self.anchors + contract.latency_ns + align.command_slack(contract.period_ns)
        column = 0
        for channel in contract.actions:
            stamps = self.tracks[f"action.{channel.name}"].stamps
            index = align.sample(stamps, moments, channel.align, contract.period_ns)
            if len(stamps):
                self.action[:, column : column + channel.dim] = self.commands[channel.name][index]
            self.mask &= index >= 0
            column += channel.dim
        self.action[~self.mask] = 0

    def _reward_and_task(self, after_start: bool) -> None:
        contract, size = self.contract, len(self.ticks.time)
        self.reward = np.zeros((size, len(contract.task_names)))
        if contract.reward is not None and len(self.tracks["signal.reward"].stamps):
            track = self.tracks["signal.reward"]
            tick = align.arrivals(track.stamps, self.ticks, contract.period_ns, after_start=after_start)
            used, values = tick >= 0, np.array(track.values)
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
                    f"{self.bag.path}: {int((index < 0).sum())} ticks come before the first message of "
                    f"{track.topic} and take its task"
                )
            self.task = np.array(track.values, np.int64)[np.maximum(index, 0)]

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


def _reader(entry: Observation | Action) -> Callable[[Any], np.ndarray]:
    return lambda msg: fields.read(msg, entry.select)


class _LatentsReader:
    """Latents as float16 [tokens, channels], all of one `origin`."""

    def __init__(self) -> None:
        self.origin: latents.Origin | None = None

    def __call__(self, msg: Any) -> np.ndarray:
        values, origin = latents.unpack(msg), latents.Origin.of(msg)
        if self.origin is None:
            self.origin = origin
        if origin != self.origin:
            raise UserError(
                f"latents of {origin} come after those of {self.origin}: what one tokenizer makes means "
                "nothing to another, and one codec is enough; record them apart"
            )
        if np.abs(values).max() > np.finfo(np.float16).max:
            raise UserError("latents beyond half precision: the message is damaged")
        return values.astype(np.float16)


# ---- second pass: the frames that ticks use ----


class _Camera:
    """Takes one camera's messages as they come and encodes the frames of its ticks, episode by episode."""

    def __init__(self, recording: Recording, camera: Observation, folder: Path) -> None:
        assert camera.size is not None
        self.camera, self.folder, self.size = camera, folder, camera.size
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

    def uses(self, ordinal: int) -> bool:
        """Whether any tick uses message number `ordinal` of the topic."""
        return ordinal in self.last_use

    def add(self, ordinal: int, msg: Any) -> None:
        """Take message number `ordinal` of the topic."""
        self.pending[ordinal] = messages.resize(messages.decode(msg), self.size)
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


def encode_frames(recording: Recording, folder: Path) -> dict[str, list[Video]]:
    """The videos of all episodes, per camera; none of a camera whose latents were recorded."""
    if recording.latents is not None:
        return {}
    cameras = [_Camera(recording, camera, folder) for camera in recording.contract.images]
    topics: dict[str, list[_Camera]] = {}
    for camera in cameras:
        topics.setdefault(camera.camera.topic, []).append(camera)
    seen = dict.fromkeys(topics, 0)
    for topic, receive, data in recording.bag.raw(list(topics)):
        for camera in topics[topic]:
            if not camera.uses(seen[topic]):
                continue
            try:
                camera.add(seen[topic], recording.bag.decode(topic, data))
            except UserError as error:
                raise UserError(f"{recording.bag.path}: {topic} at {receive / 1e9:.3f} s: {error}") from None
        seen[topic] += 1
    return {camera.camera.name: camera.videos for camera in cameras}
