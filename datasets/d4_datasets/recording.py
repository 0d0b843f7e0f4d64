"""One bag seen through a contract.

It is read twice: first all stamps and numbers, from which ticks and episodes follow (`aligned`); then the
frames that ticks really use, which go straight into video. So memory does not grow with the length of a
recording.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from d4_datasets import fields, latents, messages, signals
from d4_datasets.aligned import Aligned, FrameWriter, Track, ahead, picture_bytes
from d4_datasets.bags import Bag, bag_files, is_bag
from d4_datasets.contract import PICTURE_TYPES, Action, Align, Contract, Observation
from d4_datasets.errors import UserError
from d4_datasets.lerobot import Episode
from d4_datasets.msgtypes import Definitions
from d4_datasets.video import Video

_RECEIVE = Align("hold", "receive")
_CLOCK_SLACK_NS = 1_000_000_000


# ---- first pass: stamps and numbers ----


class Recording(Aligned):
    """One bag.

    Args: given: what defines types that the bag does not. scratch: where compressed files are unpacked.

    Raises UserError, naming bag, topic and time, for topics that are missing or of another type, NaN, and
    actions outside their limits unless their channel is named in `clip`.
    """

    def __init__(
        self,
        path: Path,
        contract: Contract,
        clip: Sequence[str] = (),
        given: Definitions | None = None,
        scratch: Path | None = None,
    ) -> None:
        self.contract, self.bag = contract, Bag(path, given, scratch)
        self.warnings = self.bag.report.warnings
        self.tracks = self._tracks()
        self._collect()
        self._check_clocks()
        super().__init__(str(path), contract, self.tracks, clip, self.warnings)
        self.latents = self._latents()

    def _tracks(self) -> dict[str, Track]:
        """The tracks by key: observations by name, `action.<name>`, `signal.<what>`, for the whole
        contract.
        """
        contract, held = self.contract, self.bag.topics
        tracks: dict[str, Track] = {}

        def add(
            key: str, entry: Any, align: Align, read: Callable[[Any], Any] | None, required: bool
        ) -> None:
            if entry.topic not in held and not required:
                tracks[key] = Track(entry.topic, align, read)
                return
            if held.get(entry.topic, entry.type) != entry.type:
                raise UserError(
                    f"{self.bag.path}: {entry.topic} carries {held[entry.topic]}, "
                    f"the contract says {entry.type}"
                )
            self.bag.require([entry.topic])
            tracks[key] = Track(entry.topic, align, read)

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
        topics: dict[str, list[Track]] = {}
        for track in self.tracks.values():
            if track.topic in self.bag.topics:
                topics.setdefault(track.topic, []).append(track)
        seen = dict.fromkeys(topics, 0)
        self.topics = list(topics)
        for topic, receive, data in self.bag.raw(self.topics):
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


def encode_frames(recording: Recording, folder: Path) -> dict[str, list[Video]]:
    """The videos of all episodes, per camera; none of a camera whose latents were recorded."""
    if recording.latents is not None:
        return {}
    cameras = [FrameWriter(recording, camera, folder) for camera in recording.contract.images]
    topics: dict[str, list[FrameWriter]] = {}
    for camera in cameras:
        topics.setdefault(camera.camera.topic, []).append(camera)
    for camera, ordinal, rgb in ahead(_pictures(recording, topics), picture_bytes):
        camera.add(ordinal, rgb)
    for camera in cameras:
        if camera.missing:
            raise UserError(
                f"{recording.bag.path}: {camera.missing} pictures of {camera.camera.topic} are not there any "
                "more: something writes to the bag, or the disk fails"
            )
    return {camera.camera.name: camera.videos for camera in cameras}


def _pictures(
    recording: Recording, topics: dict[str, list[FrameWriter]]
) -> Generator[tuple[FrameWriter, int, np.ndarray], None, None]:
    """(camera, number on its topic, RGB) of the pictures that any tick uses."""
    seen = dict.fromkeys(topics, 0)
    # All topics again: in a damaged bag the place of a message may depend on what is read beside it.
    for topic, receive, data in recording.bag.raw(recording.topics):
        if topic not in topics:
            continue
        ordinal = seen[topic]
        seen[topic] += 1
        cameras = [camera for camera in topics[topic] if camera.uses(ordinal)]
        if not cameras:
            continue
        try:
            msg = recording.bag.decode(topic, data)
            ranges = {camera.camera.depth_m for camera in cameras}
            pictures = {depth_m: messages.decode(msg, depth_m) for depth_m in ranges}
        except UserError as error:
            raise UserError(f"{recording.bag.path}: {topic} at {receive / 1e9:.3f} s: {error}") from None
        for camera in cameras:
            yield camera, ordinal, pictures[camera.camera.depth_m]


# ---- as a reader of `sources` ----

KIND = "bag"


def takes(path: Path) -> bool:
    """Whether this is a bag."""
    return is_bag(path)


def files(path: Path) -> list[Path]:
    """The files of a bag."""
    return bag_files(path)


def fill(
    path: Path,
    contract: Contract,
    folder: Path,
    clip: Sequence[str],
    given: Definitions | None = None,
) -> tuple[list[Episode], list[str]]:
    """(episodes, warnings) of a bag; their videos are in `folder`."""
    recording = Recording(path, contract, clip, given, folder)
    try:
        videos = encode_frames(recording, folder) if len(recording.episodes) else {}
        return recording.all_episodes(videos, path.name), recording.warnings
    finally:
        recording.bag.close()


def with_types(given: Definitions) -> Reader:
    """The reader that knows these types too."""
    return Reader(given)


@dataclass(frozen=True)
class Reader:
    """This module with more types."""

    given: Definitions
    KIND = KIND
    takes = staticmethod(takes)
    files = staticmethod(files)

    def fill(
        self, path: Path, contract: Contract, folder: Path, clip: Sequence[str]
    ) -> tuple[list[Episode], list[str]]:
        """See `sources`."""
        return fill(path, contract, folder, clip, self.given)
