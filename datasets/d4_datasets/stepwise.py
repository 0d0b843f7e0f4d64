"""Recordings that hold one row of actions for each frame of a video: what their readers share.

Such data have no clock to align. Row k was chosen at frame k, so both get the stamp k periods, and everything
else follows by the rules of `aligned`. A row that is not known has no stamp and leaves its frame unlabelled.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from d4_datasets.aligned import Aligned, FrameWriter, Track
from d4_datasets.contract import Align, Contract
from d4_datasets.errors import UserError
from d4_datasets.minecraft import resize
from d4_datasets.video import Video

_MANY = 0.2  # people turn faster than contracts allow in up to a tenth of the ticks; more is another unit
Paint = Callable[[int, np.ndarray], None]


@dataclass
class Steps:
    """N frames and what belongs to them.

    Attributes:
        actions: values of every channel of the contract by name, float64 [N, dim].
        known: bool [N], whether the row of actions is known.
        reward: what arrives with each frame, float64 [N, K]; None if the recording does not say.
        terminal: bool [N], frames that end it for good.
    """

    actions: dict[str, np.ndarray]
    known: np.ndarray
    reward: np.ndarray | None
    terminal: np.ndarray


def require(name: str, contract: Contract, offers: Collection[str], rate_hz: float) -> None:
    """Check that recordings offer what a contract asks for.

    Raises:
        UserError: a topic or a start event that they do not have, or another rate.
    """
    entries: list[tuple[str, Any]] = [("observation", stream) for stream in contract.observations]
    entries += [("action", channel) for channel in contract.actions]
    entries += [("tasks", contract.tasks), ("reward", contract.reward)]
    entries += [("episode.start", contract.episode.start), ("episode.terminal", contract.episode.terminal)]
    for what, entry in entries:
        if entry is not None and (entry.topic not in offers or what == "episode.start"):
            raise UserError(
                f"{name}: a recording of this kind has no {entry.topic}, which the contract names for its "
                f"{what}; it has {', '.join(sorted(offers))}"
            )
    if contract.rate_hz != rate_hz:
        raise UserError(
            f"{name}: it was recorded at {rate_hz:g} Hz and contract {contract.name} says "
            f"{contract.rate_hz:g}; a camera's turns cannot be put on other ticks: write "
            f"`rate_hz: {rate_hz:g}`"
        )


def align(name: str, contract: Contract, steps: Steps, clip: Sequence[str], warnings: list[str]) -> Aligned:
    """Put a recording on the ticks of a contract.

    Continuous actions are clipped to the contract's limits; if those were many, the warnings say how many.
    """
    count, period = len(steps.known), contract.period_ns
    stamps = np.arange(count) * period
    tracks = {stream.name: _track(stream, stamps, np.arange(count)) for stream in contract.observations}
    for channel in contract.actions:
        rows = np.flatnonzero(steps.known)
        values = steps.actions[channel.name][rows]
        if channel.kind == "continuous":
            values, outside = _clip(values, channel.low, channel.high)
            if outside > _MANY * max(1, len(rows)):
                warnings.append(
                    f"{name}: {outside} of {len(rows)} rows of {channel.name} beyond the contract's "
                    "limits clipped"
                )
        tracks[f"action.{channel.name}"] = _track(channel, stamps[rows], rows, values)
    nothing = np.zeros(0, np.int64)
    if contract.tasks is not None:
        tracks["signal.tasks"] = _track(contract.tasks, nothing, nothing)
    if contract.reward is not None:
        given = steps.reward if steps.reward is not None else np.zeros((0, len(contract.task_names)))
        rows = np.flatnonzero(given.any(axis=1))
        tracks["signal.reward"] = _track(contract.reward, stamps[rows], rows, given[rows])
        if steps.reward is None:
            warnings.append(f"{name} does not tell what was accomplished: its reward is 0 throughout")
    if contract.episode.terminal is not None:
        rows = np.flatnonzero(steps.terminal)
        tracks["signal.terminal"] = _track(
            contract.episode.terminal, stamps[rows], rows, np.ones(len(rows), bool)
        )
    return Aligned(name, _by_row(contract), tracks, clip, warnings)


def _track(entry: Any, stamps: np.ndarray, ordinals: np.ndarray, values: Any = ()) -> Track:
    track = Track(entry.topic, getattr(entry, "align", Align("hold", "receive")), None)
    track.stamps, track.ordinals, track.values = stamps, ordinals, values
    return track


def _clip(values: np.ndarray, low: Sequence[float], high: Sequence[float]) -> tuple[np.ndarray, int]:
    """(values within the limits, how many rows were not)."""
    clipped = np.clip(values, low, high)
    return clipped, int((clipped != values).any(axis=1).sum())


def _by_row(contract: Contract) -> Contract:
    """The contract with every row for its own frame only: holding a row would invent the ones not known."""
    own = Align("drop", "receive", 1000 / contract.rate_hz)
    return replace(
        contract,
        observations=tuple(replace(stream, align=own) for stream in contract.observations),
        actions=tuple(replace(channel, align=own) for channel in contract.actions),
    )


# ---- pictures ----


def count_frames(path: Path) -> int:
    """How many frames a video file holds, without decoding them.

    Raises:
        UserError: it is no video, or damaged.
    """
    try:
        with av.open(str(path)) as container:
            return sum(1 for packet in container.demux(container.streams.video[0]) if packet.size)
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise _damaged(path, error) from None


def decode(path: Path) -> Iterator[av.VideoFrame]:
    """The frames of a video file in order, as the codec has them.

    Raises:
        UserError: it is no video, or damaged.
    """
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # recordings are worked on side by side
            yield from container.decode(stream)
    except (av.FFmpegError, AttributeError, IndexError, ValueError) as error:  # a stream of no known codec
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be decoded ({error}); fetch it again, or leave it out with --skip")


def encode(
    recording: Aligned, path: Path, folder: Path, first: int = 0, paint: Paint | None = None
) -> dict[str, list[Video]]:
    """The videos of all episodes, per camera, from the frames of `path` that follow its `first` ones.

    Args: paint: called with the number of a frame and its picture [H, W, 3], to draw into it.

    Raises:
        UserError: a frame cannot be decoded.
    """
    if not len(recording.episodes):
        return {}
    cameras = [FrameWriter(recording, camera, folder) for camera in recording.contract.images]
    convert = VideoReformatter()  # one for all frames: setting it up takes longer than using it
    last, number = max(int(camera.wanted[-1]) for camera in cameras), -1
    for number, frame in enumerate(decode(path), -first):
        if any(camera.uses(number) for camera in cameras):
            # A copy: what the decoder hands out is its own, and is drawn into.
            rgb = np.array(convert.reformat(frame, format="rgb24").to_ndarray())
            if paint is not None:
                paint(number, rgb)
            for camera in cameras:
                camera.add(number, resize(rgb, camera.camera.topic, camera.size))
        if number >= last:
            break
    if number < last:
        raise UserError(
            f"{path}: frame {number + first + 2} of {last + first + 1} cannot be decoded; fetch the file "
            "again, or leave it out with --skip"
        )
    return {camera.camera.name: camera.videos for camera in cameras}
