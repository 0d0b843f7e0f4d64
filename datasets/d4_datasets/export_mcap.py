"""Episodes of a dataset as rosbag2 bags (MCAP), one for each, on the topics and in the types of its contract.

Messages are placed where `align` looks for them, so that d4-ingest of the bags with the same contract gives
the same dataset again:

    tick k          start_ns + k * period
    camera          tick k where the contract has start events, else half a period before it; never older than
                    the camera's tolerance
    vectors         with the first camera
    command         capture plus latency, where it is known. Before a stretch without commands it is sent
                    earlier, so that it is too old at the first tick of that stretch
    signals         tick k

Whatever cannot be said that way is found by running the rules of `aligned` over what is about to be written,
and told.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from d4_datasets import align, bags, fields
from d4_datasets.aligned import Aligned, Track
from d4_datasets.bags import BagWriter
from d4_datasets.contract import PICTURE_TYPES, Action, Align, Contract, Observation
from d4_datasets.errors import UserError
from d4_datasets.lerobot import Dataset
from d4_datasets.msgtypes import typestore

_EARLIEST_NS = 10**12  # earlier starts are moved by this much: a bag has no times below zero
_RECEIVE = Align("hold", "receive")


class Message(NamedTuple):
    """A message and when it is received, ns."""

    stamp: int
    topic: str
    type: str
    content: Any


@dataclass
class Stream:
    """Messages of one topic: when, and what puts number i into a fresh message, by the name of the entry.

    hardest: the message that is most likely not to be possible.
    """

    topic: str
    type: str
    stamps: np.ndarray  # int64 [M], ascending
    fill: dict[str, Callable[[Any, int], None]]
    hardest: int = 0

    def message(self, number: int) -> Message:
        """Message `number`."""
        stamp = int(self.stamps[number])
        content = bags.new(self.type)
        if hasattr(content, "header"):
            content.header = bags.header(stamp)
        for fill in self.fill.values():
            fill(content, number)
        return Message(stamp, self.topic, self.type, content)

    def messages(self) -> Iterator[Message]:
        """All of them, made one by one."""
        return (self.message(number) for number in range(len(self.stamps)))


@dataclass
class Said:
    """What could not be expressed: for each thing the number of episodes that it happens in."""

    counts: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """One sentence each."""
        return [
            f"{what} ({count} episode{'' if count == 1 else 's'})"
            for what, count in sorted(self.counts.items())
        ]


class EpisodeLog:
    """One episode on its way into a bag.

    Args: pictures: `png` (lossless) or `jpeg`, for cameras of type CompressedImage; those of type Image are
        written raw.
    """

    def __init__(self, dataset: Dataset, number: int, pictures: str) -> None:
        self.dataset, self.number, self.pictures = dataset, number, pictures
        self.contract: Contract = dataset.contract
        self.notes: set[str] = set()
        self.columns = {
            name: values.reshape(len(values), -1) for name, values in dataset.columns(number).items()
        }
        self.mask = self.columns["action_mask"][:, 0]
        self._times(len(self.mask))
        self.streams = self._streams()
        self._check()

    def _times(self, size: int) -> None:
        """Ticks, captures and moments of commands, int64 [T] each."""
        contract, period = self.contract, self.contract.period_ns
        start = int(self.dataset.d4["episodes"][self.number]["start_ns"])
        self.start = start if start >= _EARLIEST_NS else start + _EARLIEST_NS
        self.ticks = self.start + np.arange(size) * period
        before = 0 if contract.episode.start is not None else period // 2
        tolerance = contract.images[0].align.tolerance_ns
        self.captures = self.ticks - min(before, before if tolerance is None else tolerance)
        self.first_capture = self.start - before  # where the grid of ticks is counted from
        self.sent = self.captures + contract.latency_ns

    # -- what is written --

    def camera_stamps(self) -> np.ndarray:
        """When each picture was captured; the first stands twice where its place on the grid is too old."""
        if self.first_capture == self.captures[0]:
            return self.captures
        return np.append(self.first_capture, self.captures)

    def _streams(self) -> list[Stream]:
        streams = [self._vector(vector) for vector in self.contract.vectors()]
        first = 0
        for channel in self.contract.actions:
            streams.append(self._command(channel, self.columns["action"][:, first : first + channel.dim]))
            first += channel.dim
        streams += self._signals()
        joined: list[Stream] = []
        for stream in filter(self._is_possible, streams):
            same = next((other for other in joined if other.topic == stream.topic), None)
            if same is None:
                joined.append(stream)
            elif np.array_equal(same.stamps, stream.stamps):
                same.fill |= stream.fill
            else:
                joined.append(stream)
                names = " and ".join([*same.fill, *stream.fill])
                self.notes.add(
                    f"{names} share {stream.topic} at different times and read each other's messages"
                )
        return joined

    def _numbers(self, name: str, select: tuple[str, ...], values: np.ndarray) -> Callable[[Any, int], None]:
        """Writes row i of `values` [M, k] to the selected fields."""

        def fill(message: Any, number: int) -> None:
            fields.write(message, select, values[number], _new_element)
            if not np.array_equal(fields.read(message, select).astype(np.float32), values[number]):
                self.notes.add(f"the fields of {name} cannot hold its numbers exactly")

        return fill

    def _vector(self, vector: Observation) -> Stream:
        values = self.columns[vector.key]
        fill = {vector.name: self._numbers(vector.name, vector.select, values)}
        return Stream(vector.topic, vector.type, self.captures, fill)

    def _command(self, channel: Action, values: np.ndarray) -> Stream:
        name = f"action.{channel.name}"
        stamps, rows = command_stamps(self.sent, self.mask, values, channel.align, self.contract.period_ns)
        fill = {name: self._numbers(name, channel.select, values[rows])}
        return Stream(channel.topic, channel.type, stamps, fill)

    def _signals(self) -> list[Stream]:
        contract, streams = self.contract, []

        def add(what: str, entry: Any, at: np.ndarray, values: list[Any] | np.ndarray) -> None:
            def fill(message: Any, number: int) -> None:
                put(message, entry.select, values[number])

            streams.append(Stream(entry.topic, entry.type, at, {what: fill}))

        if contract.episode.start is not None:
            add("signal.start", contract.episode.start, self.ticks[:1], [self.number])
        if contract.tasks is not None:
            task = self.columns["task_index"][:, 0]
            change = np.flatnonzero(np.diff(task, prepend=-1))
            add("signal.tasks", contract.tasks, self.ticks[change], [self._task(i) for i in task[change]])
        if contract.reward is not None:
            rewards = self.columns["reward"].astype(np.float64)
            add("signal.reward", contract.reward, self.ticks, rewards)
            streams[-1].hardest = int(np.argmax(np.ptp(rewards, axis=1)))
        if contract.episode.terminal is not None:
            over = self.columns["is_terminal"][:, 0]
            add("signal.terminal", contract.episode.terminal, self.ticks, over)
        return streams

    def _task(self, index: int) -> str | int:
        """A task as its topic says it: by name where the field holds text, else by number."""
        tasks = self.contract.tasks
        assert tasks is not None
        known = tasks.type in typestore().types
        return tasks.names[index] if known and _is_text(tasks.type, tasks.select) else int(index)

    def _is_possible(self, stream: Stream) -> bool:
        """Whether a stream can be written; if not it is noted."""
        names = ", ".join(stream.fill)
        if stream.type not in typestore().types:
            self.notes.add(f"{names} is left out: {stream.topic} is of the unknown type {stream.type}")
            return False
        try:
            if len(stream.stamps):
                stream.message(stream.hardest)
        except UserError as error:
            self.notes.add(f"{names} is left out: {error}")
            return False
        return True

    def messages(self) -> Iterator[Message]:
        """Everything in order of time; pictures are decoded one by one."""
        cameras = [self._pictures(camera) for camera in self._cameras()]
        return heapq.merge(
            *(stream.messages() for stream in self.streams), *cameras, key=lambda message: message.stamp
        )

    def _cameras(self) -> list[Observation]:
        """Those that can be written."""
        chosen: dict[str, Observation] = {}
        for camera in sorted(self.contract.images, key=lambda c: np.prod(c.size or 0), reverse=True):
            if camera.type not in PICTURE_TYPES:
                self.notes.add(f"{camera.name} is left out: {camera.topic} is of type {camera.type}")
            elif camera.topic in chosen:
                self.notes.add(
                    f"{camera.name} is left out: {camera.topic} carries the pictures of "
                    f"{chosen[camera.topic].name}"
                )
            else:
                chosen[camera.topic] = camera
        return list(chosen.values())

    def _pictures(self, camera: Observation) -> Iterator[Message]:
        stamps = self.camera_stamps()
        twice = len(stamps) - len(self.captures)
        for number, frame in enumerate(self.dataset.frames(camera.name, self.number)):
            first = 0 if number == 0 else number + twice
            for stamp in map(int, stamps[first : number + twice + 1]):
                if camera.type.endswith("/CompressedImage"):
                    content = bags.compressed_image(frame, stamp, camera.name, self.pictures)
                else:
                    content = bags.image(frame, stamp, camera.name)
                yield Message(stamp, camera.topic, camera.type, content)

    # -- what would be read --

    def _check(self) -> None:
        """Note what comes out otherwise when these messages are read by the same contract."""
        entries: list[Observation | Action] = [*self.contract.observations, *self.contract.actions]
        for entry in entries:
            known = entry.type in typestore().types
            if known and entry.align.timeline == "header" and not hasattr(bags.new(entry.type), "header"):
                self.notes.add(f"{entry.topic} has no header, from which {entry.name} would take its time")
        try:
            aligned = Aligned("the bag", self.contract, self._tracks())
        except UserError as error:
            self.notes.add(f"d4-ingest would refuse it: {error}")
            return
        if aligned.episodes.tolist() != [[0, len(self.mask)]]:
            self.notes.add("read again it would not be one episode of the same length")
            return
        again = aligned.episode(0, {}, "")
        pairs = {
            "action": again.action,
            "action_mask": again.action_mask,
            "reward": again.reward,
            "task_index": again.task_index,
            "is_terminal": again.is_terminal,
        } | {vector.key: again.vectors[vector.name] for vector in self.contract.vectors()}
        for name, values in pairs.items():
            mine = self.columns[name]
            if not np.array_equal(values.reshape(mine.shape).astype(mine.dtype), mine):
                self.notes.add(f"{name} would be read otherwise than it is")

    def _tracks(self) -> dict[str, Track]:
        """What a reader would take from the streams."""
        tracks: dict[str, Track] = {}

        def add(key: str, topic: str, align_: Align, stamps: np.ndarray, values: Any) -> None:
            tracks[key] = Track(topic, align_, None, stamps, values, np.arange(len(stamps)))

        for camera in self.contract.images:
            add(camera.name, camera.topic, camera.align, self.camera_stamps(), None)
        for vector in self.contract.vectors():
            add(vector.name, vector.topic, vector.align, self.captures, self.columns[vector.key])
        first, period = 0, self.contract.period_ns
        for channel in self.contract.actions:
            values = self.columns["action"][:, first : first + channel.dim]
            stamps, rows = command_stamps(self.sent, self.mask, values, channel.align, period)
            add(f"action.{channel.name}", channel.topic, channel.align, stamps, values[rows])
            first += channel.dim
        values_of: dict[str, Any] = {
            "signal.start": [],
            "signal.tasks": self.columns["task_index"][:, 0],
            "signal.reward": self.columns["reward"],
            "signal.terminal": self.columns["is_terminal"][:, 0],
        }
        for stream in self.streams:
            for key in stream.fill.keys() & values_of.keys():
                at = (stream.stamps - self.start) // period
                values = values_of[key]
                add(key, stream.topic, _RECEIVE, stream.stamps, values[at] if len(values) else values)
        for key in ("signal.tasks", "signal.reward"):  # left out, or not in the contract
            if key not in tracks:
                add(key, key, _RECEIVE, np.zeros(0, np.int64), [])
        return tracks


def command_stamps(
    sent: np.ndarray, known: np.ndarray, values: np.ndarray, rule: Align, period: int
) -> tuple[np.ndarray, np.ndarray]:
    """(when commands are sent, int64 [M], the tick whose command each is, int64 [M]).

    One for each tick with a known command, at `sent` [T]. Where a tick without one follows and `rule` would
    hold the last command on, that one is sent so much earlier that it is too old by then; it replaces those
    after it, which must be equal for that, as they are in a recording where a command was held.
    """
    moments = sent + align.command_slack(period)
    stamps, rows = sent.copy(), np.arange(len(sent))
    use = known.copy()
    tolerance = None if rule.strategy == "drop" else rule.tolerance_ns
    begins = np.flatnonzero(known & ~np.append(False, known[:-1]))
    ends = np.flatnonzero(~known & np.append(False, known[:-1]))  # the first tick without a command
    for begin, end in zip(begins, ends, strict=False):
        if tolerance is None or moments[end] - sent[end - 1] > tolerance:
            continue
        early = moments[end] - tolerance - 1
        held = int(np.searchsorted(moments, early))  # the first tick that would have this command
        if held >= begin and (values[held:end] == values[end - 1]).all():
            use[held : end - 1] = False
            stamps[end - 1] = early
    return stamps[use], rows[use]


# ---- messages ----


def _new_element(message: Any, attribute: str) -> Any:
    """A zero element of an array of messages."""
    described = dict(typestore().fielddefs[message.__msgtype__][1])[attribute]
    element = described[1][0]
    if int(element[0]) != 2:
        raise UserError(f"{attribute} of {message.__msgtype__} holds no messages")
    return bags.new(str(element[1]))


def _is_text(kind: str, path: str) -> bool:
    try:
        return isinstance(fields.get(bags.new(kind), path), str)
    except UserError:
        return False


def put(message: Any, path: str, value: Any) -> None:
    """Set what stands at `path`, be it a text, an array of numbers or a number.

    Raises:
        UserError: the field is not there, or cannot hold `value`.
    """
    old = _or_none(message, path)
    if not isinstance(old, str | np.ndarray):
        numbers = np.atleast_1d(np.asarray(value, np.float64))
        if (numbers != numbers[0]).any():
            raise UserError(f"{path!r} is a single number, and there are {len(numbers)} different ones")
        fields.write(message, [path], numbers[:1], _new_element)
        return
    *outer, last = fields.parse(path)
    for step in outer:
        message = getattr(message, step.attribute)
        message = message[step.element] if step.element is not None else message
    new = str(value) if isinstance(old, str) else np.atleast_1d(value).astype(old.dtype)
    setattr(message, last.attribute, new)


def _or_none(message: Any, path: str) -> Any:
    """What stands at `path`, None where an array is still too short for it."""
    try:
        return fields.get(message, path)
    except UserError:
        return None


# ---- the whole ----


def write_bags(
    dataset: Dataset, numbers: list[int], out: Path, pictures: str, tick: Callable[[int], None]
) -> list[str]:
    """Write the episodes `numbers` as bags below the folder `out`; returns what could not be expressed."""
    said = Said()
    for number in numbers:
        log = EpisodeLog(dataset, number, pictures)
        source = str(dataset.d4["episodes"][number]["source"])
        about = {"d4_source": source, "d4_contract": dataset.contract.hash}
        with BagWriter(out / f"episode_{number:06d}", about) as writer:
            for message in log.messages():
                writer.write(message.topic, message.type, message.stamp, message.content)
        said.counts.update(log.notes)
        tick(len(log.mask))
    return said.lines()
