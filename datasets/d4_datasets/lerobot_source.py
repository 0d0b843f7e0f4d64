"""LeRobotDatasets, of others or our own, as recordings: one folder is one recording.

A contract names features by the optional key `lerobot`, or they are those of the same names (`_Mapping`). A
row of frame f is at f / fps seconds of its episode, and becomes samples as of a bag:

    pictures, vectors    stamped with the row
    action               stamped with the row plus the contract's latency: a row holds the command that
                         answered its frame, and when that was in force was not recorded
    next.<anything>      arrives with the following row, as reward and terminal of a bag do; that of the last
                         row with the last row, because how an episode ended must not be lost
    any other signal     arrives with its row
    task                 that of the row whose frame a tick shows

So at the contract's rate a row is a tick, and at a lower rate the rules of `align` apply. A dataset that this
project wrote with the same contract is copied as it is.
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from d4_datasets import latents
from d4_datasets.align import MIN_TICKS
from d4_datasets.aligned import Aligned, FrameWriter, Track
from d4_datasets.contract import Action, Contract, Observation
from d4_datasets.errors import UserError
from d4_datasets.lerobot import Dataset, Episode
from d4_datasets.lerobot_folder import PICTURES, Folder, Listed
from d4_datasets.video import Video, encode_video

_REWARDS = ("next.reward", "reward", "next.success")
_TERMINALS = ("next.done", "is_terminal")
_MASK = "action_mask"  # of our own datasets: whether the action of a row is known
_FASTER = 1.01  # more ticks than frames by this much cannot be a matter of rounding
_SAY_EVERY_S = 10.0

Columns = list[tuple[str, int]]  # (feature, column of it), one for each number


# ---- which features a contract means ----


class _Mapping:
    """Where a folder keeps what a contract names.

    Attributes:
        pictures: the feature of each camera, by name.
        numbers: the columns of each vector, `action.<channel>` and `signal.<reward or terminal>`, by key of
            their tracks; those that the folder lacks and a recording may lack are absent.

    Raises:
        UserError: an observation is missing, or what is there does not fit the contract.
    """

    def __init__(self, folder: Folder, contract: Contract) -> None:
        self.folder, self.contract = folder, contract
        self.warnings: list[str] = []
        self.pictures = {camera.name: self._picture(camera) for camera in contract.images}
        self.numbers: dict[str, Columns] = {
            vector.name: self._vector(vector) for vector in contract.vectors()
        }
        for channel in contract.actions:
            if (columns := self._action(channel)) is not None:
                self.numbers[f"action.{channel.name}"] = columns
        terminal = contract.episode.terminal
        if contract.reward is not None:
            self._signal("reward", contract.reward.lerobot, _REWARDS)
        if terminal is not None:
            self._signal("terminal", terminal.lerobot, _TERMINALS)

    @property
    def has_mask(self) -> bool:
        """Whether rows say if their action is known."""
        features = self.folder.features
        return _MASK in features and self.folder.dtype(_MASK) == "bool" and self.folder.width(_MASK) == 1

    @property
    def features(self) -> list[str]:
        """The features with numbers that are needed of every row."""
        used = [feature for columns in self.numbers.values() for feature, _ in columns]
        return list(dict.fromkeys([*used, *([_MASK] if self.has_mask else [])]))

    def _error(self, who: str, what: str) -> UserError:
        return UserError(f"{self.folder.root}: {who}: {what}")

    def _held(self) -> str:
        return ", ".join(self.folder.features) or "none"

    def _picture(self, camera: Observation) -> str:
        feature = camera.lerobot[0] if camera.lerobot else camera.key
        who = f"camera {camera.name!r}"
        if feature not in self.folder.features:
            raise self._error(
                who, f"there is no feature {feature!r}; write one as its `lerobot`: {self._held()}"
            )
        if self.folder.dtype(feature) not in PICTURES:
            raise self._error(who, f"{feature!r} holds {self.folder.dtype(feature)}, no pictures")
        return feature

    def _vector(self, vector: Observation) -> Columns:
        who, select = f"vector {vector.name!r}", vector.select
        if vector.lerobot:
            return self._explicit(who, vector.lerobot, len(select))
        for feature in (vector.key, "observation.state"):
            named = self._named(feature, vector.name, select)
            if named is not None:
                return named
        if vector.key not in self.folder.features:
            raise self._error(
                who, f"there is no feature {vector.key!r}; write features as its `lerobot`: {self._held()}"
            )
        return self._explicit(who, (vector.key,), len(select))

    def _action(self, channel: Action) -> Columns | None:
        """None if the folder has no actions at all: pictures without commands are data too."""
        who, features = f"action {channel.name!r}", self.folder.features
        if channel.lerobot:
            return self._explicit(who, channel.lerobot, channel.dim)
        named = self._named("action", channel.name, channel.select)
        if named is not None:
            return named
        if f"action.{channel.name}" in features:
            return self._explicit(who, (f"action.{channel.name}",), channel.dim)
        if "action" not in features:
            self.warnings.append(f"{self.folder.root} has no feature 'action', which gives {channel.name}")
            return None
        if self.folder.width("action") != self.contract.action_dim:
            raise self._error(
                who,
                f"'action' has {self.folder.width('action')} numbers ({self._names('action')}) and the "
                f"contract {self.contract.action_dim}; write elements such as action[0] as its `lerobot`",
            )
        before = self.contract.actions[: self.contract.actions.index(channel)]
        first = sum(other.dim for other in before)
        return [("action", first + i) for i in range(channel.dim)]

    def _signal(self, what: str, entries: Sequence[str], candidates: Sequence[str]) -> None:
        usual = [name for name in candidates if name in self.folder.features][:1]
        for feature in entries or usual:
            columns = self._explicit(f"`{what}`", (feature,), None)
            count = len(self.contract.task_names) if what == "reward" else 1
            if len(columns) not in (1, count):
                raise self._error(
                    f"`{what}`", f"{feature!r} has {len(columns)} numbers; one or {count} would fit"
                )
            self.numbers[f"signal.{what}"] = columns
            if feature == "next.success" and not entries:
                self.warnings.append(f"{self.folder.root} has no reward: next.success counts as one")
            return
        self.warnings.append(f"{self.folder.root} has no {' or '.join(candidates)}, which gives the {what}")

    def _named(self, feature: str, entry: str, select: Sequence[str]) -> Columns | None:
        """The components of a feature that are called `<entry>.<path>` or `<path>`, None unless all are."""
        if feature not in self.folder.features or self.folder.dtype(feature) in PICTURES:
            return None
        names = self.folder.names(feature)
        for wanted in ([f"{entry}.{path}" for path in select], list(select)):
            if set(wanted) <= set(names) and len(names) == self.folder.width(feature):
                return [(feature, names.index(name)) for name in wanted]
        return None

    def _explicit(self, who: str, entries: Sequence[str], count: int | None) -> Columns:
        """The columns that `feature`, `feature[3]` or `feature[name]` mean, `count` of them if given."""
        columns = [column for entry in entries for column in self._element(who, entry)]
        if count is not None and len(columns) != count:
            feature = entries[0].partition("[")[0]
            raise self._error(
                who,
                f"{', '.join(entries)} gives {len(columns)} numbers and `select` names {count}; write "
                f"elements of {self._names(feature)} as its `lerobot`",
            )
        return columns

    def _element(self, who: str, entry: str) -> Iterator[tuple[str, int]]:
        feature, bracket, element = entry.partition("[")
        if feature not in self.folder.features:
            raise self._error(who, f"there is no feature {feature!r}; there are {self._held()}")
        if self.folder.dtype(feature) in (*PICTURES, "string"):
            raise self._error(who, f"{feature!r} holds {self.folder.dtype(feature)}, no numbers")
        width, element = self.folder.width(feature), element.removesuffix("]")
        if not bracket:
            yield from ((feature, index) for index in range(width))
            return
        names = self.folder.names(feature)
        index = int(element) if element.isdecimal() else names.index(element) if element in names else width
        if index >= width:
            raise self._error(who, f"{feature!r} has no element {element!r}; it has {self._names(feature)}")
        yield feature, index

    def _names(self, feature: str) -> str:
        width = self.folder.width(feature)
        names = self.folder.names(feature)
        return ", ".join(names) if len(names) == width else f"0 to {width - 1}"


# ---- one episode ----


class _Rows(Aligned):
    """The rows of one LeRobot episode on ticks; pictures and rows of a tick are known by `samples`.

    Args: known: bool [T], whether the action of a row is known. task: int64 [T].
    """

    def __init__(
        self,
        name: str,
        contract: Contract,
        tracks: dict[str, Track],
        clip: Sequence[str],
        known: np.ndarray,
        task: np.ndarray,
    ) -> None:
        super().__init__(name, contract, tracks, clip)
        row = self.samples[contract.images[0].name]
        # What holds in a bag until it is too old is said row by row here.
        self.mask &= known[row]
        self.action[~self.mask] = 0
        self.task = task[row]


class _Converter:
    """Episodes of a folder to episodes of a dataset."""

    def __init__(self, folder: Folder, contract: Contract, out: Path, clip: Sequence[str]) -> None:
        self.folder, self.contract, self.out, self.clip = folder, contract, out, clip
        self.mapping = _Mapping(folder, contract)
        self.period = 1e9 / folder.fps
        if math.isclose(contract.rate_hz, folder.fps, rel_tol=1e-6):
            self.period = contract.period_ns
        if contract.rate_hz > _FASTER * folder.fps:
            raise UserError(
                f"{folder.root} has {folder.fps:g} frames a second and contract {contract.name} asks for "
                f"{contract.rate_hz:g}; write rate_hz: {folder.fps:g} or less"
            )
        self.tasks = self._tasks()

    def _tasks(self) -> dict[int, str | int]:
        """By `task_index` the contract's index of the task, or the string that is none of its."""
        if self.contract.tasks is None:
            return {}
        strings = self.contract.tasks.lerobot or self.contract.tasks.names
        return {
            index: strings.index(task) if task in strings else task
            for index, task in self.folder.tasks().items()
        }

    def episodes(self, listed: Listed) -> list[Episode]:
        """What becomes of one episode of the folder: usually one, several if it has gaps."""
        rows = self.folder.rows(listed, self.mapping.features)
        for name in self.mapping.features:
            if rows[name].shape[1] != self.folder.width(name):
                raise UserError(
                    f"{listed.data}: {name} has {rows[name].shape[1]} numbers in a row, info.json says "
                    f"{self.folder.width(name)}; copy the dataset again"
                )
        known = rows[_MASK][:, 0] if self.mapping.has_mask else np.ones(listed.length, bool)
        aligned = _Rows(
            f"{self.folder.root}, episode {listed.number}",
            self.contract,
            self._tracks(listed, rows, known),
            self.clip,
            known,
            self._task(listed, rows["task_index"]),
        )
        videos = self._videos(listed, rows["frame_index"], aligned) if len(aligned.episodes) else {}
        return aligned.all_episodes(videos, f"{self.folder.root.name}/{listed.number}")

    def _task(self, listed: Listed, index: np.ndarray) -> np.ndarray:
        """The contract's index of each row's task, int64 [T]."""
        if self.contract.tasks is None:
            return np.zeros(len(index), np.int64)
        found = {int(i): self.tasks.get(int(i), f"number {i}") for i in np.unique(index)}
        for task in found.values():
            if isinstance(task, str):
                raise UserError(
                    f"{self.folder.root}: the task of episode {listed.number} is {task!r}, which the "
                    f"contract does not name; write it among `tasks.names`, or as the "
                    f"`tasks.lerobot` of one of {list(self.contract.tasks.names)}"
                )
        return np.array([found[int(i)] for i in index], np.int64)

    def _tracks(self, listed: Listed, rows: dict[str, np.ndarray], known: np.ndarray) -> dict[str, Track]:
        contract, frames = self.contract, rows["frame_index"]
        stamps = np.round(frames * self.period).astype(np.int64)
        numbers = {key: self._numbers(rows, key) for key in self.mapping.numbers}
        tracks: dict[str, Track] = {}

        def add(key: str, entry: Observation | Action, at: np.ndarray, values: np.ndarray | None) -> None:
            columns = self.mapping.numbers.get(key, [])
            topic = columns[0][0] if columns else entry.topic
            tracks[key] = Track(topic, entry.align, None, at, values, np.arange(len(at)))

        for stream in contract.observations:
            add(stream.name, stream, stamps, numbers.get(stream.name))
        for channel in contract.actions:
            key = f"action.{channel.name}"
            at = (stamps + contract.latency_ns)[known if key in numbers else slice(0)]
            add(key, channel, at, numbers[key][known] if key in numbers else np.zeros((0, channel.dim)))
        for what in ("reward", "terminal", "tasks"):
            tracks[f"signal.{what}"] = self._signal(what, numbers, frames, stamps, listed)
        return tracks

    def _numbers(self, rows: dict[str, np.ndarray], key: str) -> np.ndarray:
        """What a key of the mapping reads of all rows, float64 [T, k]."""
        columns = [rows[feature][:, column] for feature, column in self.mapping.numbers[key]]
        return np.stack(columns, 1).astype(np.float64)

    def _signal(
        self,
        what: str,
        numbers: dict[str, np.ndarray],
        frames: np.ndarray,
        stamps: np.ndarray,
        listed: Listed,
    ) -> Track:
        """The rows that carry a signal, when it arrived and what it was; none for one that is not there."""
        key, align = f"signal.{what}", self.contract.images[0].align  # no signal goes by an `align`
        values = numbers.get(key)
        if values is None:
            return Track(what, align, None, np.zeros(0, np.int64), [], np.zeros(0, np.int64))
        feature = self.mapping.numbers[key][0][0]
        if not np.isfinite(values).all():
            row = int(np.argmin(np.isfinite(values).all(1)))
            raise UserError(
                f"{self.folder.root}: {feature} of frame {frames[row]} of episode {listed.number} is NaN or "
                "infinite"
            )
        used = np.ones(len(frames), bool)
        if feature.startswith("next."):
            used[-1] = values[-1].any()
            stamps = np.minimum(np.round((frames + 1) * self.period).astype(np.int64), stamps[-1])
        if what == "reward":
            values = np.broadcast_to(values, (len(values), len(self.contract.task_names)))
        else:
            values = values[:, 0] != 0
        return Track(feature, align, None, stamps[used], values[used], np.flatnonzero(used))

    def _videos(self, listed: Listed, frames: np.ndarray, aligned: Aligned) -> dict[str, list[Video]]:
        """The videos of all episodes that come of one, by camera."""
        videos = {}
        aside = self.out / "aside"
        aside.mkdir(exist_ok=True)
        for camera in self.contract.images:
            feature = self.mapping.pictures[camera.name]
            writer = FrameWriter(aligned, camera, aside)
            rows = {number: row for row, number in enumerate(frames.tolist()) if writer.uses(row)}
            for row, picture in self.folder.pictures(listed, feature, rows):
                writer.add(row, picture)
            if len(writer.videos) < len(aligned.episodes):
                raise _frames_missing(self.folder, listed, feature)
            videos[camera.name] = [
                replace(v, path=v.path.rename(self.out / f"{listed.number:06d}-{v.path.name}"))
                for v in writer.videos
            ]
        shutil.rmtree(aside)
        return videos


def _frames_missing(folder: Folder, listed: Listed, feature: str) -> UserError:
    path = listed.videos[feature][0] if feature in listed.videos else listed.data
    return UserError(
        f"{path} lacks frames of episode {listed.number} for {feature} of {folder.root.name}; "
        "copy the dataset again"
    )


# ---- our own ----


def _copied(folder: Folder, listed: Listed, dataset: Dataset, out: Path) -> Episode:
    """An episode of a dataset that was made with the same contract, as it is; UserError if it is damaged."""
    try:
        return _copy(folder, listed, dataset, out)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{folder.root}, episode {listed.number}: its metadata and its rows do not fit each other "
            f"({str(error)[:200] or type(error).__name__}); copy the dataset again"
        ) from None


def _check_rows(rows: dict[str, np.ndarray], contract: Contract) -> None:
    """Raise ValueError unless columns have the widths of the contract and values that can be."""
    widths = {"action": contract.action_dim, "reward": len(contract.task_names), _MASK: 1, "is_terminal": 1}
    for name, width in {**widths, **{v.key: len(v.select) for v in contract.vectors()}}.items():
        if rows[name].shape[1] != width:
            raise ValueError(f"{name} has {rows[name].shape[1]} numbers, not {width}")
        if not np.isfinite(rows[name].astype(np.float64)).all():
            raise ValueError(f"{name} has NaN or infinite values")
    if not np.isin(rows["task_index"], np.arange(len(contract.task_names))).all():
        raise ValueError("task_index is beyond the tasks of the contract")


def _copy(folder: Folder, listed: Listed, dataset: Dataset, out: Path) -> Episode:
    contract, origin = dataset.contract, dataset.origin
    rows = folder.rows(listed, [name for name in folder.features if folder.dtype(name) not in PICTURES])
    _check_rows(rows, contract)
    videos: dict[str, np.ndarray | Video] = {}
    for camera in contract.images if origin is None else ():
        assert camera.size is not None
        place = {number: row for row, number in enumerate(rows["frame_index"].tolist())}
        pictures = folder.pictures(listed, camera.key, place)
        path = out / f"{listed.number:06d}-{camera.name}.mp4"
        video = encode_video(path, (picture for _, picture in pictures), contract.rate_hz, camera.size)
        if video.frames != listed.length:
            raise _frames_missing(folder, listed, camera.key)
        videos[camera.name] = video
    kept = None
    if origin is not None:
        kept = rows[latents.column(contract.images[0].name)].reshape(-1, origin.tokens, origin.channels)
    about = dataset.d4["episodes"][listed.number]
    if not 0 <= int(about["start_ns"]) < 1 << 63:
        raise ValueError("start_ns is no time")
    return Episode(
        images=videos,
        action=rows["action"],
        action_mask=rows[_MASK][:, 0],
        reward=rows["reward"],
        task_index=rows["task_index"],
        is_terminal=rows["is_terminal"][:, 0],
        vectors={vector.name: rows[vector.key] for vector in contract.vectors()},
        latents=kept,
        origin=origin,
        drive=int(about.get("drive", 0)),  # not known to datasets that were made before 2026-11-22
        **{name: about[name] for name in ("source", "start_ns", "stale", "dropped")},
    )


# ---- as a reader of `sources` ----

KIND = "lerobot"


def takes(path: Path) -> bool:
    """Whether this is a LeRobotDataset."""
    return (path / "meta" / "info.json").is_file()


def files(path: Path) -> list[Path]:
    """The files of a LeRobotDataset, without what others keep in its folder."""
    parts = (path / name for name in ("meta", "data", "videos", "images"))
    return [file for part in parts for file in part.rglob("*") if file.is_file()]


def fill(
    path: Path, contract: Contract, folder: Path, clip: Sequence[str]
) -> tuple[list[Episode], list[str]]:
    """(episodes, warnings) of a LeRobotDataset; their videos are in `folder`."""
    source = Folder(path)
    own = Dataset(path) if (path / "meta" / "d4.json").is_file() else None
    if own is not None and own.contract.hash == contract.hash:
        return [_copied(source, listed, own, folder) for listed in _said(path, source.episodes)], []
    converter = _Converter(source, contract, folder, clip)
    usable = [listed for listed in source.episodes if listed.length >= MIN_TICKS]
    warnings = converter.mapping.warnings
    if len(usable) < len(source.episodes):
        warnings.append(
            f"{path}: {len(source.episodes) - len(usable)} episodes of fewer than {MIN_TICKS} frames are "
            "left out"
        )
    return [episode for listed in _said(path, usable) for episode in converter.episodes(listed)], warnings


def _said(path: Path, episodes: list[Listed]) -> Iterator[Listed]:
    """The episodes one after the other; how far it is gets said now and then, for a folder can be large."""
    began = said = time.monotonic()
    for number, listed in enumerate(episodes):
        yield listed
        now = time.monotonic()
        if now - said >= _SAY_EVERY_S:
            left = (now - began) * (len(episodes) - number - 1) / (number + 1)
            print(f"{path.name}: episode {number + 1} of {len(episodes)}, {left:.0f} s left", file=sys.stderr)
            said = now
