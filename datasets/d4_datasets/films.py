"""Videos and folders of pictures, with or without a table of commands beside them, seen through a contract.

What a table says in a row is in force from its time on, until the next row; an empty cell says that the
command is unknown from there on. The contract's `files` section names what cannot be guessed: see `files`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from d4_datasets import files as layout
from d4_datasets import tables
from d4_datasets.aligned import Aligned, FrameWriter, Track
from d4_datasets.contract import Action, Align, Contract, Observation
from d4_datasets.errors import UserError
from d4_datasets.files import Files, Match
from d4_datasets.footage import (
    PICTURE_SUFFIXES,
    VIDEO_SUFFIXES,
    Damaged,
    Footage,
    PictureFolder,
    VideoFile,
    picture_names,
)
from d4_datasets.lerobot import Episode
from d4_datasets.tables import Clock, Table
from d4_datasets.video import Video

KIND = "video"
_ROWS = Align("hold", "receive")
_BESIDE = (*tables.SUFFIXES, ".txt", ".json", ".yaml", ".yml", ".md")  # what may lie between pictures
_MOST_READINGS = 5


# ---- what belongs to a recording ----


@dataclass(frozen=True)
class Parts:
    """The files of a recording: its name, the file or folder of each camera, the table if there is one."""

    name: str
    cameras: dict[str, Path]
    table: Path | None

    @classmethod
    def of(cls, path: Path, contract: Contract | None) -> Parts:
        """Those of the recording that `path` is the first camera of.

        Raises:
            UserError: a camera has no file, or several tables have the name of the recording.
        """
        rules = Files() if contract is None or contract.files is None else contract.files
        names = [""] if contract is None else [camera.name for camera in contract.images]
        if rules.cameras:
            found = layout.match(rules.cameras[names[0]], path)
            if found is None:
                raise UserError(f"{path} is not what files.cameras of the contract names for {names[0]}")
            cameras = {name: found.place(rules.cameras[name]) for name in names}
        else:
            if len(names) > 1:
                raise UserError(
                    f"{path} has one camera and the contract {len(names)}; write files.cameras to it, as in "
                    f'{{{names[0]}: "*_{names[0]}.mp4", {names[1]}: "*_{names[1]}.mp4"}}'
                )
            found = Match(path.absolute().parent, path.name if path.is_dir() else path.stem)
            cameras = {names[0]: path}
        for name, place in cameras.items():
            if not place.exists():
                raise UserError(f"{place} does not exist; files.cameras of the contract names it for {name}")
        return cls(found.name, cameras, _table(found, rules))


def _table(found: Match, rules: Files) -> Path | None:
    """The table of a recording, None if it has none."""
    patterns = [f"*{suffix}" for suffix in tables.SUFFIXES] if rules.table is None else [rules.table]
    there = [place for pattern in patterns if (place := found.place(pattern)).is_file()]
    if len(there) > 1:
        raise UserError(
            f"{there[0]} and {there[1].name} are both tables of {found.name}; name the one to read in "
            "files.table of the contract"
        )
    return there[0] if there else None


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()


def _is_picture_folder(path: Path) -> bool:
    """Whether a folder holds pictures, and nothing that somebody else might want to read."""
    if not path.is_dir():
        return False
    entries = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    suffixes = [entry.suffix.lower() for entry in entries]
    return (
        sum(suffix in PICTURE_SUFFIXES for suffix in suffixes) > 1
        and all(suffix in PICTURE_SUFFIXES + _BESIDE for suffix in suffixes)
        and not any(entry.is_dir() for entry in entries)
    )


def _is_in_dataset(path: Path) -> bool:
    """Whether a file is part of a dataset: videos/<key>/chunk-000/file-000.mp4."""
    return any((parent / "meta" / "info.json").is_file() for parent in list(path.absolute().parents)[:4])


# ---- one recording ----


class Film:
    """One recording: the footage of each camera and the numbers of the table.

    Raises UserError, naming the file, for what cannot be read, and for NaN, and actions outside their limits
    unless their channel is named in `clip`.
    """

    def __init__(self, path: Path, contract: Contract, clip: Sequence[str] = ()) -> None:
        self.path, self.contract, self.clip = path, contract, clip
        self.rules = contract.files or Files()
        self.parts = Parts.of(path, contract)
        self.notes: list[str] = []
        self.table = self._read_table()
        self.footage = {name: self._footage(place) for name, place in self.parts.cameras.items()}
        for camera in contract.images:
            if isinstance(pictures := self.footage[camera.name], PictureFolder):
                pictures.depth_m = camera.depth_m
        self.numbers = self._numbers()

    @property
    def warnings(self) -> list[str]:
        """What people should know, so far."""
        table = [] if self.table is None else self.table.warnings
        return [*self.notes, *table, *(note for one in self.footage.values() for note in one.warnings)]

    def ingest(self, folder: Path) -> tuple[list[Episode], list[str]]:
        """(episodes, warnings), with lossless videos in `folder`."""
        for _ in range(_MOST_READINGS):
            told: list[str] = []
            aligned = Aligned(str(self.path), self.contract, self._tracks(), self.clip, told)
            try:
                videos = self._encode(aligned, folder) if len(aligned.episodes) else {}
            except Damaged:
                continue
            return aligned.all_episodes(videos, self.parts.name), self.warnings + told
        raise UserError(f"{self.path} cannot be read twice alike: the file is damaged, or changes meanwhile")

    def _encode(self, aligned: Aligned, folder: Path) -> dict[str, list[Video]]:
        """The videos of all episodes, per camera."""
        writers: dict[str, FrameWriter] = {}
        try:
            for camera in self.contract.images:
                writer = writers[camera.name] = FrameWriter(aligned, camera, folder)
                footage = self.footage[camera.name]
                wanted = np.zeros(len(footage.stamps), bool)
                wanted[writer.wanted] = True
                for number, rgb in footage.read(wanted, camera.size):
                    writer.add(number, rgb)
        except Damaged:
            for writer in writers.values():
                writer.abort()
            raise
        return {name: writer.videos for name, writer in writers.items()}

    # -- what is there --

    def _column(self, name: str) -> str:
        return self.rules.columns.get(name, name)

    def _read_table(self) -> Table | None:
        if self.parts.table is None:
            return None
        contract = self.contract
        rewards = ["reward", *(f"reward.{name}" for name in contract.task_names)]
        vectors = [f"observation.{v.name}.{path}" for v in contract.vectors() for path in v.select]
        numbers = [*contract.action_names, *vectors, *(rewards if contract.reward is not None else ())]
        texts = ["start", "terminal", *(["task"] if contract.tasks is not None else ())]
        if self.rules.stamps == "table":
            texts.append("image")
        table = tables.read(
            self.parts.table,
            self._column("time"),
            [self._column(name) for name in numbers],
            [self._column(name) for name in texts],
            Clock(self.rules.scale, self.rules.offset_s),
        )
        asked = {self._column(name) for name in numbers + texts}
        absent = sorted(set(self.rules.columns.values()) & asked - table.names)
        if absent and len(table):
            raise UserError(f"{table.path} has no column {absent[0]!r}, which files.columns names")
        if not table.names & asked and len(table):
            raise UserError(
                f"{table.path} has none of the columns {', '.join(contract.action_names)}; write what they "
                f"are called there to files.columns of the contract, as in {{{contract.action_names[0]}: x}}"
            )
        return table

    def _footage(self, place: Path) -> Footage:
        if not place.is_dir():
            return VideoFile(place, self.rules.fps)
        names = picture_names(place)
        if not names:
            raise UserError(f"{place} has no pictures ({', '.join(PICTURE_SUFFIXES)})")
        if self.rules.stamps == "rate":
            fps = self.rules.fps or self.contract.rate_hz
            return PictureFolder(place, names, np.round(np.arange(len(names)) * (1e9 / fps)).astype(np.int64))
        if self.rules.stamps == "name":
            return PictureFolder(place, names, self._stamps_in_names(place, names))
        return self._listed(place, names)

    def _stamps_in_names(self, place: Path, names: Sequence[str]) -> np.ndarray:
        clock, stamps = Clock(self.rules.scale, self.rules.offset_s), np.empty(len(names), np.int64)
        for i, name in enumerate(names):
            digits = re.findall(r"[0-9]+(?:\.[0-9]+)?", Path(name).stem)
            try:
                stamps[i] = clock.nanoseconds(digits[-1] if digits else None)
            except ValueError:
                raise UserError(
                    f"{place / name}: its name has no number to take its time from; correct files.stamps or "
                    "files.scale of the contract"
                ) from None
        return stamps

    def _listed(self, place: Path, names: Sequence[str]) -> PictureFolder:
        """The pictures that the table lists, at the times of its rows."""
        table, column = self.table, self._column("image")
        if table is None or column not in table.names:
            where = f"{place} has no table" if table is None else f"{table.path} has no column {column!r}"
            raise UserError(f"{where} to take the times of its pictures from; correct files.stamps")
        known, used, stamps = set(names), [], []
        absent = 0
        for row, text in enumerate(table.texts[column]):
            # The last part of a path that the table holds, and only if it is in this folder.
            name = None if text is None else re.split(r"[/\\]", text)[-1]
            if name in known:
                used.append(name)
                stamps.append(table.time[row])
            else:
                absent += text is not None
        if not used:
            raise UserError(f"{table.path} lists none of the pictures in {place}")
        if absent:
            self.notes.append(f"{table.path} lists {absent} pictures that are not in {place}")
        if unlisted := len(names) - len(set(used)):
            self.notes.append(f"{place}: {unlisted} pictures are not in {table.path} and are left out")
        return PictureFolder(place, used, np.array(stamps, np.int64))

    # -- tracks --

    def _tracks(self) -> dict[str, Track]:
        """Those of the table, and one for each camera as its footage is now."""
        tracks = dict(self.numbers)
        for camera in self.contract.images:
            footage = self.footage[camera.name]
            ordinals = np.arange(len(footage.stamps))
            tracks[camera.name] = Track(
                footage.path.name, camera.align, None, footage.stamps, ordinals=ordinals
            )
        return tracks

    def _numbers(self) -> dict[str, Track]:
        """The tracks of vectors, commands and signals."""
        tracks = {stream.name: self._vector(stream) for stream in self.contract.vectors()}
        tracks |= {f"action.{channel.name}": self._commands(channel) for channel in self.contract.actions}
        if self.contract.reward is not None:
            tracks["signal.reward"] = self._reward()
        if self.contract.tasks is not None:
            tracks["signal.tasks"] = self._cells("task", self._task)
        for name in ("start", "terminal"):
            if self.table is not None and self._column(name) in self.table.names:
                track = self._cells(name, tables.boolean)
                rows = np.flatnonzero(track.values)
                if len(rows):
                    tracks[f"signal.{name}"] = _only(track, rows)
        self._check_overlap()
        return tracks

    def _check_overlap(self) -> None:
        """A table of another time than the video would leave everything unknown, in silence."""
        stamps = next(iter(self.footage.values())).stamps
        if self.table is None or not len(self.table):
            return
        begin, end = self.table.time[[0, -1]]
        if begin > stamps[-1] or end < stamps[0] - 60_000_000_000:
            self.notes.append(
                f"{self.table.path} is about {begin / 1e9:.3f} to {end / 1e9:.3f} s and the video about "
                f"{stamps[0] / 1e9:.3f} to {stamps[-1] / 1e9:.3f} s; correct files.offset_s and files.scale"
            )

    def _values(self, columns: Sequence[str], entry: str) -> np.ndarray | None:
        """float64 [R, k] of columns of the contract, NaN where empty; None if the table has none of them."""
        if self.table is None:
            return None
        names = [self._column(name) for name in columns]
        absent = [name for name in names if name not in self.table.names]
        if len(absent) == len(names):
            return None
        if absent:
            raise UserError(f"{self.table.path} has no column {absent[0]!r}, and others of {entry} are there")
        return np.stack([self.table.numbers[name] for name in names], axis=1)

    def _track(self, entry: str, align: Align, values: Any, rows: np.ndarray) -> Track:
        """A track of rows of the table."""
        assert self.table is not None
        return Track(f"{self.table.path.name} ({entry})", align, _given, self.table.time[rows], values, rows)

    def _none(self, entry: str, align: Align) -> Track:
        return Track(entry, align, _given, np.zeros(0, np.int64), [], np.zeros(0, np.int64))

    def _vector(self, stream: Observation) -> Track:
        values = self._values([f"observation.{stream.name}.{path}" for path in stream.select], stream.name)
        rows = np.zeros(0, np.int64) if values is None else np.flatnonzero(~np.isnan(values).any(1))
        if values is None or not len(rows):
            raise UserError(
                f"{self.path}: the contract observes {stream.name}, and no table has a row with "
                f"observation.{stream.name}.{stream.select[0]}"
            )
        return self._track(stream.name, stream.align, values[rows], rows)

    def _commands(self, channel: Action) -> Track:
        """Every row, since one with an empty cell ends the command before it."""
        values = self._values([f"{channel.name}.{path}" for path in channel.select], channel.name)
        if values is None:
            if self.table is not None:
                self.notes.append(f"{self.table.path} has no columns of {channel.name}: no action is known")
            return self._none(channel.name, channel.align)
        track = self._track(channel.name, channel.align, values, np.arange(len(values)))
        track.known = ~np.isnan(values).any(1)
        track.values = np.where(track.known[:, None], values, self._lowest(channel))
        return track

    def _lowest(self, channel: Action) -> np.ndarray:
        """A command [k] that is allowed, to stand where none is known."""
        names = [f"{channel.name}.{path}" for path in channel.select]
        return self.contract.action_low[[self.contract.action_names.index(name) for name in names]]

    def _reward(self) -> Track:
        """Rows with a reward in any cell: one for all tasks, or one for each."""
        tasks = self.contract.task_names
        single = self._values(["reward"], "reward")
        values = self._values([f"reward.{name}" for name in tasks], "reward") if single is None else single
        if values is None:
            return self._none("reward", _ROWS)
        rows = np.flatnonzero(~np.isnan(values).all(1))
        full = np.broadcast_to(np.nan_to_num(values[rows]), (len(rows), len(tasks)))
        return self._track("reward", _ROWS, full, rows)

    def _task(self, cell: str) -> int:
        """Index of a task, by name or number."""
        names = self.contract.task_names
        index = names.index(cell) if cell in names else int(cell)
        if not 0 <= index < len(names):
            raise ValueError
        return index

    def _cells(self, name: str, read: Callable[[str], Any]) -> Track:
        """The cells of a column of texts that are not empty."""
        column = self._column(name)
        if self.table is None or column not in self.table.names:
            return self._none(name, _ROWS)
        rows, values = [], []
        for row, cell in enumerate(self.table.texts[column]):
            if cell is None:
                continue
            try:
                values.append(read(cell))
            except ValueError:
                wanted = f"one of {list(self.contract.task_names)}" if name == "task" else "true or false"
                raise self.table.error(row, column, f"{cell[:40]!r} is not {wanted}") from None
            rows.append(row)
        return self._track(name, _ROWS, values, np.array(rows, np.int64))


def _given(value: Any) -> Any:
    return value


def _only(track: Track, rows: np.ndarray) -> Track:
    """Some rows of a track of truth values, all of them true."""
    return Track(
        track.topic, track.align, track.read, track.stamps[rows], [True] * len(rows), track.ordinals[rows]
    )


# ---- as a reader of `sources` ----


class Reader:
    """Takes what the `files` section of a contract names; without one every video and folder of pictures."""

    KIND = KIND

    def __init__(self, contract: Contract | None = None) -> None:
        self.contract = contract
        self.rules = Files() if contract is None or contract.files is None else contract.files

    def takes(self, path: Path) -> bool:
        """Whether this is the first camera of a recording."""
        try:
            is_one = (_is_video(path) and not _is_in_dataset(path)) or _is_picture_folder(path)
        except OSError:
            return False
        if not is_one or self.contract is None or not self.rules.cameras:
            return is_one
        return layout.match(self.rules.cameras[self.contract.images[0].name], path) is not None

    def files(self, path: Path) -> list[Path]:
        """Its videos or pictures, and its table."""
        parts = Parts.of(path, self.contract)
        found = [] if parts.table is None else [parts.table]
        for place in parts.cameras.values():
            found += [place / name for name in picture_names(place)] if place.is_dir() else [place]
        return found

    def name(self, path: Path) -> str:
        """What the recording is called."""
        return Parts.of(path, self.contract).name

    def fill(
        self, path: Path, contract: Contract, folder: Path, clip: Sequence[str]
    ) -> tuple[list[Episode], list[str]]:
        """(episodes, warnings) of a recording; their videos are in `folder`."""
        return Film(path, contract, clip).ingest(folder)


_ANY = Reader()
takes, files, name, fill = _ANY.takes, _ANY.files, _ANY.name, _ANY.fill


def for_contract(contract: Contract) -> Reader:
    """The reader that goes by the rules of a contract."""
    return Reader(contract)
