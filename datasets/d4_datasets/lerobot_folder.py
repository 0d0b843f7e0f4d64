"""LeRobotDataset folders of any origin, v2.0, v2.1 and v3.0: episodes, rows and pictures.

    v2.x    meta/info.json, meta/tasks.jsonl, meta/episodes.jsonl
            data/chunk-000/episode_000000.parquet               a file for each episode, and so for its videos
    v3.0    meta/info.json, meta/tasks.parquet, meta/episodes/chunk-000/file-000.parquet
            data/chunk-000/file-000.parquet                     many episodes a file
            videos/<feature>/chunk-000/file-000.mp4             many episodes a file, addressed by timestamps

Where files lie is taken from info.json. Of the tables one file is in memory at a time, of the pictures one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from d4_datasets.errors import UserError
from d4_datasets.packed import read_json
from d4_datasets.stills import decode_still
from d4_datasets.tables import read_parquet

VERSIONS = ("v2.0", "v2.1", "v3.0")
PICTURES = ("video", "image")  # the dtypes of features that hold pictures
_BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "task_index")
_LFS = b"version https://git-lfs"
_PICTURES_AT_ONCE = 16  # encoded pictures of an image feature that are in memory
_LONGEST_LINE = 1 << 24  # characters
_MOST_EPISODES = 1 << 20
_TEMPLATE = re.compile(r"(?:[^{}]|\{\w+(?::0?\d{1,2}d?)?\}){1,300}")
_WIDEST = 1 << 24  # numbers of a feature in a row


@dataclass(frozen=True)
class Listed:
    """An episode as the folder lists it: `length` rows in `data`; for every video feature the file and the
    second at which the episode begins in it.
    """

    number: int
    length: int
    data: Path
    videos: dict[str, tuple[Path, float]] = field(default_factory=dict)


class Folder:
    """A LeRobotDataset: `info`, `fps`, `features` and the `episodes` it lists.

    Raises:
        UserError: it is none of `VERSIONS`, or its metadata is missing or damaged.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.info = _json(root / "meta" / "info.json")
        version = str(self.info.get("codebase_version"))
        version = version if version.startswith("v") else f"v{version}"
        if version not in VERSIONS:
            raise UserError(
                f"{root} is a LeRobotDataset {version}; {', '.join(VERSIONS)} can be read: convert it with "
                "LeRobot's own scripts first"
            )
        self.is_v3 = version == "v3.0"
        try:
            self.fps = float(self.info["fps"])
            self.features: dict[str, dict[str, Any]] = dict(self.info["features"])
            self._data_path, self._video_path = str(self.info["data_path"]), self.info.get("video_path")
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise self._damaged("info.json", f"it lacks {error}") from None
        if not 0 < self.fps < math.inf:
            raise self._damaged("info.json", f"fps is {self.fps:g}")
        self.videos = tuple(name for name in self.features if self.dtype(name) == "video")
        self.episodes = self._listed()
        self._table: tuple[Path, tuple[str, ...], dict[str, np.ndarray]] | None = None
        self._held: tuple[Path, list[set[int]]] | None = None  # by row group its episodes

    def dtype(self, feature: str) -> str:
        """The dtype of a feature, "" if it states none."""
        about = self.features[feature]
        return str(about.get("dtype", "")) if isinstance(about, dict) else ""

    def width(self, feature: str) -> int:
        """How many numbers a feature has in a row."""
        shape = self.features[feature].get("shape", [1])
        try:
            width = math.prod(int(size) for size in shape)
        except (TypeError, ValueError, ArithmeticError):
            width = -1
        if not 0 <= width <= _WIDEST:
            raise self._damaged("info.json", f"the shape of {feature} is {str(shape)[:80]}")
        return width

    def names(self, feature: str) -> list[str]:
        """The names of a feature's components, [] if it has none: a list, or lists under headings."""

        def walk(node: Any) -> Iterator[str]:
            if isinstance(node, dict):
                # {"motors": ["a", "b"]}, or {"a": 0, "b": 1}
                leaves = all(isinstance(value, int) for value in node.values())
                yield from map(str, node) if leaves else walk(list(node.values()))
            elif isinstance(node, list):
                for value in node:
                    yield from walk(value)
            elif node is not None:
                yield str(node)

        return list(walk(self.features[feature].get("names")))

    def _damaged(self, file: str, what: object) -> UserError:
        # An error may quote all of the file.
        return UserError(f"{self.root}/meta/{file} is damaged: {str(what)[:300]}; copy the dataset again")

    # -- metadata --

    def _listed(self) -> list[Listed]:
        """All episodes in order of their number."""
        place = "episodes" if self.is_v3 else "episodes.jsonl"
        try:
            rows = self._episode_table() if self.is_v3 else _json_lines(self.root / "meta" / place)
            episodes = [self._listed_v3(row) if self.is_v3 else self._listed_v2(row) for row in rows]
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError) as error:
            raise self._damaged(place, f"what it says of an episode does not fit ({error!r})") from None
        return sorted(episodes, key=lambda episode: episode.number)

    def _episode_table(self) -> list[dict[str, Any]]:
        files = sorted((self.root / "meta" / "episodes").rglob("*.parquet"))
        if not files:
            raise UserError(f"{self.root} has no table of episodes in meta/episodes; copy the dataset again")
        rows: list[dict[str, Any]] = []
        for path in files:
            with open_table(path) as file:
                names = [n for n in file.schema_arrow.names if not n.startswith("stats/") and n != "tasks"]
                rows += read_parquet(file, names, _MOST_EPISODES).to_pylist()
        return rows

    def _listed_v3(self, row: dict[str, Any]) -> Listed:
        place = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
        data = self._file(self._data_path, **place)
        videos = {}
        for key in self.videos:
            place = {name: row[f"videos/{key}/{name}"] for name in ("chunk_index", "file_index")}
            path = self._file(self._video_path, video_key=key, **place)
            videos[key] = (path, float(row[f"videos/{key}/from_timestamp"]))
        return Listed(int(row["episode_index"]), int(row["length"]), data, videos)

    def _listed_v2(self, row: dict[str, Any]) -> Listed:
        number = int(row["episode_index"])
        place = {"episode_chunk": number // int(self.info.get("chunks_size", 1000)), "episode_index": number}
        data = self._file(self._data_path, **place)
        videos = {key: (self._file(self._video_path, video_key=key, **place), 0.0) for key in self.videos}
        return Listed(number, int(row["length"]), data, videos)

    def tasks(self) -> dict[int, str]:
        """The task strings by `task_index`."""
        path = self.root / "meta" / "tasks.parquet"
        try:
            if path.is_file():
                with open_table(path) as file:
                    table = read_parquet(file, rows=_MOST_EPISODES)
                strings = next(name for name in table.column_names if _is_text(table.schema.field(name).type))
                pairs = zip(table["task_index"].to_pylist(), table[strings].to_pylist(), strict=True)
                return {int(index): str(task) for index, task in pairs}
            path = path.with_suffix(".jsonl")
            rows = _json_lines(path)
            return {int(row["task_index"]): str(row["task"]) for row in rows}
        except (KeyError, TypeError, ValueError, StopIteration, ArithmeticError) as error:
            raise self._damaged(path.name, f"what it says of a task does not fit ({error!r})") from None

    # -- rows --

    def rows(self, episode: Listed, features: Sequence[str]) -> dict[str, np.ndarray]:
        """The rows of an episode in order: `features` as [T, k] in the type they are stored in, `frame_index`
        and `task_index` int64 [T].

        Raises:
            UserError: rows are missing or too many, a column is missing, has empty cells or is no number, or
                the timestamps are not those of the frame numbers.
        """
        wanted = tuple(dict.fromkeys(features))
        if self._table is None or self._table[:2] != (episode.data, wanted):
            self._table = None  # not two files at once
            self._table = (episode.data, wanted, self._read(episode.data, wanted))
        columns = self._table[2]
        place = np.flatnonzero(columns["episode_index"][:, 0] == episode.number)
        place = place[np.argsort(columns["frame_index"][place, 0], kind="stable")]
        rows = {name: column[place] for name, column in columns.items()}
        frames = rows["frame_index"][:, 0].astype(np.int64)
        if len(frames) != episode.length:
            raise UserError(
                f"{episode.data} has {len(frames)} rows of episode {episode.number}, which is listed with "
                f"{episode.length}; copy the dataset again"
            )
        if (np.diff(frames) <= 0).any():
            raise UserError(f"{episode.data}: a frame_index of episode {episode.number} stands twice")
        wrong = np.flatnonzero(np.abs(rows["timestamp"][:, 0] - frames / self.fps) > 0.5 / self.fps)
        if len(wrong):
            raise UserError(
                f"{episode.data}: frame {frames[wrong[0]]} of episode {episode.number} is stamped "
                f"{rows['timestamp'][wrong[0], 0]:.3f} s, which at {self.fps:g} frames a second is "
                "none of its moments; the timestamps of a LeRobotDataset are frame_index / fps"
            )
        rows["frame_index"], rows["task_index"] = frames, rows["task_index"][:, 0].astype(np.int64)
        return rows

    def _read(self, path: Path, features: Sequence[str]) -> dict[str, np.ndarray]:
        """Columns of one file as arrays [N, k]."""
        with open_table(path) as file:
            wanted = list(dict.fromkeys([*features, *_BOOKKEEPING]))
            missing = [name for name in wanted if name not in file.schema_arrow.names]
            if missing:
                raise UserError(f"{path} has no column {missing[0]!r}; copy the dataset again")
            table = read_parquet(file, wanted)
        return {name: _matrix(table[name], name, path) for name in table.column_names}

    # -- pictures --

    def pictures(
        self, episode: Listed, feature: str, rows: dict[int, int]
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(row, RGB uint8 [H, W, 3]) of those `rows`, by their `frame_index`, that have a picture.

        Raises:
            UserError: the file is missing or cannot be decoded.
        """
        if self.dtype(feature) == "image":
            return self._stills(episode, feature, rows)
        path, start = episode.videos[feature]
        _require(path)
        return _decode(path, start, self.fps, rows)

    def _stills(
        self, episode: Listed, feature: str, rows: dict[int, int]
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Pictures out of an image column: encoded in the cell, or in a file that the cell names."""
        columns = ["episode_index", "frame_index", feature]
        with open_table(episode.data) as file:
            groups = self._groups(episode, file)
            for batch in file.iter_batches(_PICTURES_AT_ONCE, row_groups=groups, columns=columns):
                numbers, episodes = batch["frame_index"].to_numpy(), batch["episode_index"].to_numpy()
                for place, number in enumerate(numbers.tolist()):
                    if episodes[place] == episode.number and number in rows:
                        where = f"{episode.data}: {feature} of frame {number}"
                        yield rows[number], _still(batch[feature][place].as_py(), self.root, where)

    def _groups(self, episode: Listed, file: pq.ParquetFile) -> list[int]:
        """The row groups of a file that hold rows of an episode. The file's own statistics are not asked for,
        see `read_parquet`.
        """
        if self._held is None or self._held[0] != episode.data:
            held = []
            for group in range(file.num_row_groups):
                rows = file.iter_batches(1 << 16, row_groups=[group], columns=["episode_index"])
                parts = [np.unique(batch["episode_index"].to_numpy(zero_copy_only=False)) for batch in rows]
                held.append(set(np.concatenate([np.zeros(0, np.int64), *parts]).tolist()))
            self._held = (episode.data, held)
        return [group for group, numbers in enumerate(self._held[1]) if episode.number in numbers]

    def _file(self, template: object, **values: Any) -> Path:
        """The file of the dataset that a template of info.json means; raises ValueError if that is none."""
        text = str(template)
        if not _TEMPLATE.fullmatch(text):
            raise ValueError(f"{text[:80]!r} is no path")
        path = PurePosixPath(text.format(**values))
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{str(path)[:80]} is not in the dataset")
        return self.root / path


# ---- files ----


@contextmanager
def open_table(path: Path) -> Iterator[pq.ParquetFile]:
    """A Parquet file; raises UserError if it is missing, or proves damaged while it is read."""
    _require(path)
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise UserError(f"{path} is damaged ({_first_line(error)}); copy the dataset again") from None


def _require(path: Path) -> None:
    """Refuse a file that is missing, or that stands only for one that was never fetched."""
    if not path.is_file():
        raise UserError(f"{path} is missing although the dataset lists it; copy the dataset again")
    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise UserError(f"{path} is only a pointer of git-lfs; fetch the files with: git lfs pull")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _json(path: Path) -> dict[str, Any]:
    _require(path)
    try:
        value = read_json(path)
    except ValueError as error:
        raise UserError(f"{path} is not readable JSON ({error}); copy the dataset again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds no mapping; copy the dataset again")
    return value


def _json_lines(path: Path) -> list[dict[str, Any]]:
    _require(path)
    rows = []
    with path.open(encoding="utf-8") as file:
        while line := file.readline(_LONGEST_LINE):
            if line.strip():
                rows.append(json.loads(line))
    return rows


# ---- values ----


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _matrix(column: pa.ChunkedArray, name: str, path: Path) -> np.ndarray:
    """A column as an array [N, k]: numbers, or lists of them, or lists of lists."""
    flat = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    count = len(flat)
    while isinstance(flat, pa.ExtensionArray) or _is_list(flat.type):
        if flat.null_count:
            break
        if isinstance(flat, pa.ExtensionArray):
            flat = flat.storage
            continue
        sizes = pc.unique(pc.list_value_length(flat))
        if len(sizes) > 1:
            raise UserError(f"{path}: the lists of column {name!r} differ in length")
        flat = flat.flatten()
    kind = flat.type
    if flat.null_count:
        raise UserError(f"{path}: column {name!r} has empty cells, and nothing can be filled in for them")
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise UserError(f"{path}: column {name!r} holds {kind}, which is no number")
    return flat.to_numpy(zero_copy_only=False).reshape(count, -1 if count else 1)


def _decode(path: Path, start_s: float, fps: float, rows: dict[int, int]) -> Iterator[tuple[int, np.ndarray]]:
    """(row, RGB uint8 [H, W, 3]) of those `rows`, by the number of frames since second `start_s` of a video,
    that are in it.
    """
    left, last = dict(rows), max(rows, default=-1)
    # One reformatter on one thread: setting up a converter per frame takes longer than the decoding.
    convert = av.video.reformatter.VideoReformatter()
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path} holds no video; copy the dataset again")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            assert stream.time_base is not None
            # Half a frame earlier: `start_s` is a sum of durations, and no exact moment of a frame.
            first = max(0.0, start_s - 0.5 / fps)
            container.seek(int(first / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                if frame.time is None or frame.time < first:
                    continue
                number = round((frame.time - start_s) * fps)
                if number > last:
                    return
                row = left.pop(number, None)
                if row is not None:
                    yield row, convert.reformat(frame, format="rgb24", threads=1).to_ndarray()
    except av.FFmpegError as error:
        raise UserError(f"{path} cannot be decoded ({error}); copy the dataset again") from None


def _still(cell: Any, root: Path, where: str) -> np.ndarray:
    """The picture of a cell {bytes, path}, RGB uint8 [H, W, 3]."""
    data = cell.get("bytes") if isinstance(cell, dict) else None
    if data is None and isinstance(cell, dict) and cell.get("path"):
        path = root / str(cell["path"])
        if not path.resolve().is_relative_to(root.resolve()):
            raise UserError(f"{where} is {cell['path']!r}, which is not in the dataset")
        _require(path)
        data = path.read_bytes()
    if not isinstance(data, bytes):
        raise UserError(f"{where} has no picture; copy the dataset again")
    try:
        return decode_still(data)
    except ValueError as error:
        raise UserError(f"{where} cannot be decoded: {error}; copy the dataset again") from None
