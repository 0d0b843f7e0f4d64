"""The contract: one YAML file that describes a robot to the importer, the trainer, the simulator and the
node.

Imports only PyYAML and NumPy and runs on Python 3.10, because the ROS process loads it. Unknown or missing
keys are refused by name: a contract that is half understood would train a policy on the wrong numbers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from d4_datasets import files
from d4_datasets.errors import UserError
from d4_datasets.files import Files
from d4_datasets.latents import TYPE as LATENTS_TYPE
from d4_datasets.section import MISSING, Section

PICTURE_TYPES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")
IMAGE_TYPES = (*PICTURE_TYPES, LATENTS_TYPE)  # latents stand for the picture that they were made of
STRATEGIES = ("hold", "asof", "drop")
TIMELINES = ("header", "receive")
ROLES = ("input", "probe")
KINDS = ("continuous", "binary", "categorical")
SAFETY = ("none", "hold", "zeros")
REDUCE = ("last", "sum")
_NOT_OF_ROBOT = ("files", "lerobot")

_LONGEST = 1 << 20  # bytes of a file
_MOST_ENTRIES = 10_000


@dataclass(frozen=True)
class Align:
    """How the messages of one stream are put on ticks.

    strategy: `hold` the newest sample is used until it is older than the tolerance (without a tolerance: for
      ever, for latched topics); `asof` the same with a mandatory tolerance; `drop` a sample serves only the
      first tick after it.
    timeline: the clock that dates a sample, its `header` stamp or the time it was `receive`d.
    tolerance_ms: oldest age at which a sample still counts, None for no limit.
    """

    strategy: str
    timeline: str
    tolerance_ms: float | None = None

    @property
    def tolerance_ns(self) -> int | None:
        """The tolerance in nanoseconds, None for no limit."""
        return None if self.tolerance_ms is None else round(self.tolerance_ms * 1e6)


@dataclass(frozen=True)
class Observation:
    """One observed stream: a camera (`size` = height, width) or a vector (`select` = field paths).

    depth_m: of a depth camera the nearest and farthest metres that its pictures tell apart; see
      `stills.shade`. None for cameras that see colours or grey.
    lerobot: the features, or elements of features, of other people's LeRobotDatasets that it is read from,
      here and everywhere below; empty for those of the same name.
    """

    name: str
    topic: str
    type: str
    align: Align
    size: tuple[int, int] | None = None
    select: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    role: str = "input"
    lerobot: tuple[str, ...] = ()
    depth_m: tuple[float, float] | None = None

    @property
    def is_image(self) -> bool:
        """True for a camera."""
        return self.size is not None

    @property
    def key(self) -> str:
        """The column (vectors) or video (cameras) of this stream in a dataset."""
        return f"observation.images.{self.name}" if self.is_image else f"observation.{self.name}"

    @property
    def holds_for_ever(self) -> bool:
        """Whether a sample counts until the next one comes, however long that is."""
        return self.align.strategy == "hold" and self.align.tolerance_ns is None


@dataclass(frozen=True)
class Action:
    """One command stream. `low`, `high`, `max_rate` (units per second) have one entry per selected field."""

    name: str
    topic: str
    type: str
    select: tuple[str, ...]
    safety: str
    align: Align
    units: tuple[str, ...] = ()
    kind: str = "continuous"
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    max_rate: tuple[float, ...] | None = None
    classes: int | None = None
    lerobot: tuple[str, ...] = ()

    @property
    def dim(self) -> int:
        """Number of action components in this channel."""
        return len(self.select)


@dataclass(frozen=True)
class Signal:
    """A topic of which one field is read: episode start, terminal."""

    topic: str
    type: str
    select: str
    lerobot: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tasks:
    """Where the task comes from. A string selects a name of `names`, a number its index.

    lerobot: the task strings of a LeRobotDataset that stand for the `names`, one for each.
    """

    topic: str
    type: str
    select: str
    names: tuple[str, ...]
    lerobot: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reward:
    """Where reward comes from: a scalar (for every task) or one entry per task; `reduce` joins several in a
    tick.
    """

    topic: str
    type: str
    select: str
    reduce: str = "last"
    lerobot: tuple[str, ...] = ()


@dataclass(frozen=True)
class Episode:
    """What starts and ends an episode; without `start` a whole bag is one.

    max_s: an episode longer than this many seconds is cut into several, so that a part of one long recording
    can be held out for measuring. A cut is not a terminal.
    """

    start: Signal | None = None
    terminal: Signal | None = None
    max_s: float | None = None


@dataclass(frozen=True)
class Contract:
    """A robot: its clock, what it observes, what it can do, and where tasks and rewards come from."""

    name: str
    rate_hz: float
    latency_ms: float
    observations: tuple[Observation, ...]
    actions: tuple[Action, ...]
    tasks: Tasks | None = None
    reward: Reward | None = None
    episode: Episode = Episode()
    files: Files | None = None

    @classmethod
    def load(cls, path: str | Path) -> Contract:
        """Read a contract from a YAML file; raises UserError naming the file and the key that is wrong."""
        path = Path(path)
        try:
            if path.stat().st_size > _LONGEST:
                raise UserError(f"{path} is no contract: it has more than {_LONGEST >> 20} MiB")
            raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise UserError(f"cannot read the contract {path}: {reason}") from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f" at line {mark.line + 1}" if mark is not None else ""
            raise UserError(f"{path} is not valid YAML{line}: {getattr(error, 'problem', error)}") from None
        except (RecursionError, ValueError) as error:  # nested without end, or a date that there is not
            raise UserError(f"{path} is not valid YAML: {str(error)[:200]}") from None
        if not _is_small(raw):
            raise UserError(f"{path} is no contract: it has more than {_MOST_ENTRIES} entries")
        return cls.from_dict(raw, source=str(path))

    @classmethod
    def from_dict(cls, raw: Any, source: str = "contract") -> Contract:
        """Build a contract from plain data; `source` is the file that error messages name."""
        node = Section(raw, source, "")
        contract = cls(
            name=node.word("name"),
            rate_hz=node.number("rate_hz", above=0.0),
            latency_ms=node.number("latency_ms", least=0.0),
            observations=tuple(_observation(child) for child in node.children("observations")),
            actions=tuple(_action(child) for child in node.children("actions")),
            tasks=_tasks(node.child("tasks")),
            reward=_reward(node.child("reward")),
            episode=_episode(node.child("episode")),
        )
        contract = dataclasses.replace(contract, files=_files(node.child("files"), contract))
        node.finish()
        if contract.max_ticks is not None and contract.max_ticks < 2:
            raise node.error("episode.max_s", "must last at least two ticks: one frame has no transition")
        for what, items in (("observations", contract.observations), ("actions", contract.actions)):
            names = [item.name for item in items]  # type: ignore[attr-defined]
            if len(set(names)) < len(names):
                raise node.error(what, f"two entries share one name in {names}; give each its own")
        if not contract.images:
            raise node.error("observations", "there is no camera; add an observation with a `size`")
        return contract

    def to_dict(self) -> dict[str, Any]:
        """The canonical plain-data form; `from_dict` of it gives an equal contract."""
        return _plain(self)

    def to_yaml(self) -> str:
        """The canonical YAML text."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=110)

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) of the canonical form, the same for two files that mean the same robot: how recordings
        lie on somebody's disk (`files`, `lerobot`) does not count.
        """
        text = json.dumps(_of_robot(self.to_dict()), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def images(self) -> tuple[Observation, ...]:
        """The cameras, in file order."""
        return tuple(stream for stream in self.observations if stream.is_image)

    def vectors(self, role: str | None = None) -> tuple[Observation, ...]:
        """The vector observations, in file order; only those of `role` ("input" or "probe") if given."""
        return tuple(s for s in self.observations if not s.is_image and role in (None, s.role))

    @property
    def action_dim(self) -> int:
        """Number of action components, all channels together (A)."""
        return sum(channel.dim for channel in self.actions)

    @property
    def action_names(self) -> tuple[str, ...]:
        """`<channel>.<field path>` of every action component, length A."""
        return tuple(f"{channel.name}.{path}" for channel in self.actions for path in channel.select)

    @cached_property
    def action_low(self) -> np.ndarray:
        """Lower limits, float32 [A]: as written for continuous channels, 0 otherwise."""
        return np.array([v for channel in self.actions for v in _limits(channel)[0]], np.float32)

    @cached_property
    def action_high(self) -> np.ndarray:
        """Upper limits, float32 [A]: as written for continuous channels, 1 or `classes - 1` otherwise."""
        return np.array([v for channel in self.actions for v in _limits(channel)[1]], np.float32)

    @property
    def task_names(self) -> tuple[str, ...]:
        """Task names, at least one: a contract without tasks has a single one, called as the robot."""
        return self.tasks.names if self.tasks is not None else (self.name,)

    @property
    def period_ns(self) -> int:
        """Nanoseconds from tick to tick."""
        return round(1e9 / self.rate_hz)

    @property
    def latency_ns(self) -> int:
        """Nanoseconds from capture to the command being in force."""
        return round(self.latency_ms * 1e6)

    @property
    def max_ticks(self) -> int | None:
        """Ticks of the longest episode, None for no limit."""
        return None if self.episode.max_s is None else round(self.episode.max_s * self.rate_hz)


def _limits(channel: Action) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if channel.kind == "continuous":
        return channel.low, channel.high
    top = 1.0 if channel.kind == "binary" else float((channel.classes or 1) - 1)
    return (0.0,) * channel.dim, (top,) * channel.dim


def _of_robot(plain: Any) -> Any:
    """Plain data without what says only how recordings lie on somebody's disk."""
    if isinstance(plain, dict):
        return {key: _of_robot(value) for key, value in plain.items() if key not in _NOT_OF_ROBOT}
    return [_of_robot(value) for value in plain] if isinstance(plain, list) else plain


def _plain(value: Any) -> Any:
    """Dataclasses to dicts without empty entries, tuples to lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {name: _plain(item) for name, item in items if item not in (None, (), {}, Episode())}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _is_small(raw: Any) -> bool:
    """Whether plain data has few entries; aliases count as what they stand for, which may be without end."""
    waiting, count = [raw], 0
    while waiting and count + len(waiting) <= _MOST_ENTRIES:
        node = waiting.pop()
        count += 1
        if isinstance(node, dict):
            waiting += [*node.keys(), *node.values()]
        elif isinstance(node, list):
            waiting += node
    return not waiting


def _align(node: Section, *, camera: bool) -> Align:
    child = node.child("align")
    if child is None:
        raise node.error(
            "align", "this key is missing; write {strategy: hold, timeline: header, tolerance_ms: 150}"
        )
    strategy = child.choice("strategy", STRATEGIES)
    unbounded = strategy == "hold" and not camera
    tolerance = child.take("tolerance_ms", None if unbounded else MISSING)
    if tolerance is not None:
        tolerance = child.number("tolerance_ms", above=0.0)
    align = Align(strategy, child.choice("timeline", TIMELINES), tolerance)
    child.finish()
    return align


def _size(node: Section) -> tuple[int, int]:
    size = node.take("size")
    good = isinstance(size, list) and len(size) == 2 and all(type(v) is int and v > 0 for v in size)
    if not good:
        raise node.error("size", f"must be [height, width] in pixels, not {size!r}")
    return size[0], size[1]


def _depth(node: Section) -> tuple[float, float] | None:
    if (given := node.take("depth_m", None)) is None:
        return None
    values = [node._number("depth_m", value) for value in given] if isinstance(given, list) else []
    if len(values) != 2 or not 0 <= values[0] < values[1]:
        raise node.error("depth_m", f"must be [nearest, farthest] in metres, not {given!r}")
    return values[0], values[1]


def _observation(node: Section) -> Observation:
    name, topic, kind = node.word("name"), node.topic(), node.type()
    camera = kind in IMAGE_TYPES
    size = _size(node) if camera else None
    select = () if camera else node.texts("select")
    units = () if camera or node.take("units", None) is None else node.texts("units", len(select))
    role = node.choice("role", ROLES, "input")
    if camera and role != "input":
        raise node.error("role", "a camera is always an input; only vectors can be probes")
    depth = _depth(node) if camera else None
    features = node.features(max(1, len(select)))
    align = _align(node, camera=camera)
    stream = Observation(name, topic, kind, align, size, select, units, role, features, depth)
    node.finish()
    return stream


def _action(node: Section) -> Action:
    name, topic, type_ = node.word("name"), node.topic(), node.type()
    select, kind = node.texts("select"), node.choice("kind", KINDS, "continuous")
    dim = len(select)
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    classes = max_rate = None
    if kind == "continuous":
        low, high = node.numbers("low", dim), node.numbers("high", dim)
        if any(a >= b for a, b in zip(low, high, strict=True)):
            raise node.error("low", f"{list(low)} must be below `high` {list(high)} in every entry")
        if node.take("max_rate", None) is not None:
            max_rate = node.numbers("max_rate", dim)
            if min(max_rate) <= 0:
                raise node.error("max_rate", f"{list(max_rate)} must be above 0 (units per second)")
    elif kind == "categorical":
        classes = node.take("classes")
        if type(classes) is not int or classes < 2:
            raise node.error("classes", f"must be a whole number of at least 2, not {classes!r}")
    units = () if node.take("units", None) is None else node.texts("units", dim)
    safety = node.choice("safety", SAFETY)
    align, features = _align(node, camera=False), node.features(dim)
    node.finish()
    return Action(
        name, topic, type_, select, safety, align, units, kind, low, high, max_rate, classes, features
    )


def _signal(node: Section | None, is_start: bool = False) -> Signal | None:
    if node is None:
        return None
    topic, type_, select = node.topic(), node.type(), node.text("select", "data")
    signal = Signal(topic, type_, select, () if is_start else node.features(1))
    node.finish()
    return signal


def _tasks(node: Section | None) -> Tasks | None:
    if node is None:
        return None
    topic, type_, select, names = node.topic(), node.type(), node.text("select", "data"), node.texts("names")
    strings = () if node.take("lerobot", None) is None else node.texts("lerobot")
    if len(strings) not in (0, len(names)):
        raise node.error("lerobot", f"has {len(strings)} task strings; write one for each of {list(names)}")
    tasks = Tasks(topic, type_, select, names, strings)
    node.finish()
    return tasks


def _reward(node: Section | None) -> Reward | None:
    if node is None:
        return None
    reduce = node.choice("reduce", REDUCE, "last")
    reward = Reward(node.topic(), node.type(), node.text("select", "data"), reduce, node.features(1))
    node.finish()
    return reward


def _episode(node: Section | None) -> Episode:
    if node is None:
        return Episode()
    max_s = node.take("max_s", None)
    if max_s is not None:
        max_s = node.number("max_s", above=0.0)
    episode = Episode(_signal(node.child("start"), is_start=True), _signal(node.child("terminal")), max_s)
    node.finish()
    return episode


def _files(node: Section | None, contract: Contract) -> Files | None:
    columns = [f"observation.{vector.name}.{path}" for vector in contract.vectors() for path in vector.select]
    rewards = [f"reward.{name}" for name in contract.task_names]
    names = (*files.SIGNAL_COLUMNS, *contract.action_names, *columns, *rewards)
    return files.parse(node, [camera.name for camera in contract.images], names)
