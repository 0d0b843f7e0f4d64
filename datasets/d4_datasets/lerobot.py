"""LeRobotDataset v3.0 folders: written whole or not at all, appended to, read back.

    meta/info.json, meta/stats.json, meta/tasks.parquet, meta/d4.json
    meta/episodes/chunk-000/file-000.parquet
    data/chunk-000/file-000.parquet                  many episodes a file
    videos/<camera key>/chunk-000/file-000.mp4       many episodes a file, addressed by from/to timestamp

Frames are H.264 in RGB without loss. A dataset is put together beside its final place and then takes it in
one rename, so a process killed at any moment leaves either the dataset as it was before or the finished one.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Self

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from d4_datasets import latents, whole
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_datasets.latents import Origin
from d4_datasets.packed import read_json
from d4_datasets.video import Stats, Video, decode_video, encode_video, rate_fraction

FORMAT = 1
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"
CHUNK_FILES = 1000
DATA_FILE_MB = 100
VIDEO_FILE_MB = 200


# ---- episodes ----


@dataclass
class Episode:
    """T frames of one episode. `images`: per camera uint8 [T, H, W, 3], or a `Video` that holds them already;
    empty if `latents` of the robot's one camera stand for them.

    `stale` counts ticks that repeat the frame of the tick before, `dropped` ticks that belong to the same
    recording but lacked an observation. `drive` numbers the start events of the recording: pieces of one
    drive look alike and are held out together.
    """

    images: dict[str, np.ndarray | Video]
    action: np.ndarray  # float32 [T, A], zeros where unknown
    action_mask: np.ndarray  # bool [T]
    reward: np.ndarray  # float32 [T, K]
    task_index: np.ndarray  # int64 [T]
    is_terminal: np.ndarray  # bool [T]
    vectors: dict[str, np.ndarray] = field(default_factory=dict)  # float32 [T, k]
    latents: np.ndarray | None = None  # float16 [T, tokens, channels]
    origin: Origin | None = None  # of the latents
    source: str = ""
    start_ns: int = 0
    stale: int = 0
    dropped: int = 0
    drive: int = 0

    @property
    def frames(self) -> int:
        """T."""
        return len(self.action_mask)

    def provenance(self) -> dict[str, Any]:
        """The entry of this episode in meta/d4.json."""
        return {
            "source": self.source,
            "start_ns": int(self.start_ns),
            "frames": self.frames,
            "labelled": int(self.action_mask.sum()),
            "stale": int(self.stale),
            "terminal": bool(self.is_terminal[-1]),
            "dropped": int(self.dropped),
            "drive": int(self.drive),
        }


def _features(contract: Contract, origin: Origin | None) -> dict[str, dict[str, Any]]:
    """The `features` of info.json, in column order; `origin` of latents that stand for the pictures."""
    fps = _fps(contract)
    features: dict[str, dict[str, Any]] = {
        camera.key: {
            "dtype": "video",
            "shape": [*camera.size, 3],
            "names": ["height", "width", "channels"],
            "info": {
                "video.fps": fps,
                "video.height": camera.size[0],
                "video.width": camera.size[1],
                "video.channels": 3,
                "video.codec": "h264",
                "video.pix_fmt": "gbrp",
                "video.is_depth_map": False,
                "has_audio": False,
            },
        }
        for camera in contract.images
        if camera.size is not None and origin is None
    }
    if origin is not None:
        size = origin.tokens * origin.channels
        features[latents.column(contract.images[0].name)] = {
            "dtype": "float16",
            "shape": [size],
            "names": None,
        }

    def add(name: str, dtype: str, names: Iterable[str] | None = None) -> None:
        names = None if names is None else list(names)
        features[name] = {"dtype": dtype, "shape": [1 if names is None else len(names)], "names": names}

    for vector in contract.vectors():
        add(vector.key, "float32", vector.select)
    add("action", "float32", contract.action_names)
    add("action_mask", "bool")
    add("reward", "float32", contract.task_names)
    for name in ("is_first", "is_last", "is_terminal"):
        add(name, "bool")
    add("timestamp", "float32")
    for name in ("frame_index", "episode_index", "index", "task_index"):
        add(name, "int64")
    return features


def _fps(contract: Contract) -> int | float:
    return int(contract.rate_hz) if contract.rate_hz == int(contract.rate_hz) else contract.rate_hz


def _arrow_column(values: np.ndarray) -> pa.Array:
    """[T] or [T, 1] as plain numbers, [T, k] as lists of fixed length: what LeRobot expects of each shape."""
    if values.ndim == 2 and values.shape[1] > 1:
        return pa.FixedSizeListArray.from_arrays(
            pa.array(np.ascontiguousarray(values).ravel()), values.shape[1]
        )
    return pa.array(values.reshape(-1))


def _column_stats(values: np.ndarray) -> Stats:
    """min, max, mean, std per component and the count, of values [T] or [T, k]."""
    rows = values.astype(np.float64)
    rows = rows[:, None] if rows.ndim == 1 else rows
    if len(rows) == 0:
        zero = np.zeros(rows.shape[1])
        return {"min": zero, "max": zero, "mean": zero, "std": zero, "count": np.array([0])}
    stats = {"min": rows.min(0), "max": rows.max(0), "mean": rows.mean(0), "std": rows.std(0)}
    return {**stats, "count": np.array([len(rows)])}


# ---- writing ----


class _VideoFile:
    """The video file of one camera that is being filled: packets of finished videos are copied in, not re-
    encoded.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.frames = self.bytes = 0
        self._container = av.open(str(path), "w", format="mp4")
        self._stream: Any = None

    def append(self, video: Video, rate_hz: float) -> None:
        with av.open(str(video.path)) as part:
            source = part.streams.video[0]
            if self._stream is None:
                self._stream = self._container.add_stream_from_template(source)
            ticks = round(1 / (source.time_base * rate_fraction(rate_hz)))  # of the time base, per frame
            for packet in part.demux(source):
                if packet.dts is None:  # the empty packet that ends a stream
                    continue
                packet.pts += self.frames * ticks
                packet.dts += self.frames * ticks
                packet.stream = self._stream
                self.bytes += packet.size
                self._container.mux(packet)
        self.frames += video.frames

    def close(self) -> None:
        self._container.close()


class LeRobotWriter:
    """Writes, or appends to, the dataset at `root`. Nothing shows at `root` before `finalize`.

    Use it as a context manager: an exception drops everything added since. Raises UserError if `root` holds
    something else, or a dataset of another contract.
    """

    def __init__(self, root: str | Path, contract: Contract) -> None:
        self.root, self.contract = Path(root), contract
        self._aside = _aside(self.root, "new")
        _recover(self.root)
        shutil.rmtree(self._aside, ignore_errors=True)
        self._old: Dataset | None = None
        self._origin: Origin | None = None  # of latents that stand for the pictures
        self._rows: list[dict[str, Any]] = []
        self._provenance: list[dict[str, Any]] = []
        self._sources: list[dict[str, Any]] = []
        self._next = {"data": 0, **dict.fromkeys((camera.key for camera in contract.images), 0)}
        self._episodes = self._frames = 0  # old and new
        if self.root.exists() and any(self.root.iterdir()):
            self._continue(Dataset(self.root))
        self._aside.mkdir(parents=True)
        self._videos: dict[str, _VideoFile] = {}
        self._tables: list[pa.Table] = []
        self._table_bytes = 0

    def _continue(self, old: Dataset) -> None:
        """Take over the files of the dataset that is there."""
        if old.contract.hash != self.contract.hash:
            raise UserError(
                f"{self.root} was made with another contract ({old.contract.name}, {old.contract.hash[:12]}, "
                f"not {self.contract.hash[:12]}); write to another folder"
            )
        self._old = old
        self._provenance, self._sources = list(old.d4["episodes"]), list(old.d4.get("sources", []))
        self._episodes, self._frames = old.info["total_episodes"], old.info["total_frames"]
        self._origin = old.origin
        for name in self._next:
            prefix = "data" if name == "data" else f"videos/{name}"
            if name != "data" and self._origin is not None:
                continue
            chunks = old.episodes[f"{prefix}/chunk_index"].to_numpy()
            files = old.episodes[f"{prefix}/file_index"].to_numpy()
            self._next[name] = int((chunks * CHUNK_FILES + files).max(initial=-1)) + 1

    @property
    def sources(self) -> list[dict[str, Any]]:
        """The entries of all recordings in the dataset, old and new, as given to `add_source`."""
        return self._sources

    @property
    def episodes(self) -> int:
        """Number of episodes, old and new."""
        return self._episodes

    def add_source(self, entry: dict[str, Any]) -> None:
        """Note in meta/d4.json that a recording has been ingested, whether it gave episodes or not."""
        self._sources.append(entry)

    def add_episode(self, episode: Episode) -> None:
        """Append an episode.

        Raises:
            ValueError: its arrays do not fit the contract.
            UserError: it has latents and the dataset pictures, or other latents, or the other way round.
        """
        if self._episodes == 0:
            self._origin = episode.origin
        latents.require_alike(self._origin, str(self.root), episode.origin, episode.source)
        columns = self._columns(episode)
        row: dict[str, Any] = {
            "episode_index": self._episodes,
            "tasks": [self.contract.task_names[i] for i in np.unique(episode.task_index)],
            "length": episode.frames,
            "dataset_from_index": self._frames,
            "dataset_to_index": self._frames + episode.frames,
            "meta/episodes/chunk_index": 0,
            "meta/episodes/file_index": 0,
        }
        for name, values in columns.items():
            known = values[episode.action_mask] if name == "action" else values
            row |= {f"stats/{name}/{key}": value.tolist() for key, value in _column_stats(known).items()}
        for camera in self.contract.images if self._origin is None else ():
            row |= self._add_video(camera.key, episode.images[camera.name])
        table = pa.table({name: _arrow_column(values) for name, values in columns.items()})
        if self._table_bytes + table.nbytes > DATA_FILE_MB * 2**20:
            self._flush_data()
        self._tables.append(table)
        self._table_bytes += table.nbytes
        row |= dict(
            zip(("data/chunk_index", "data/file_index"), divmod(self._next["data"], CHUNK_FILES), strict=True)
        )
        self._rows.append(row)
        self._provenance.append(episode.provenance())
        self._episodes += 1
        self._frames += episode.frames

    def _columns(self, episode: Episode) -> dict[str, np.ndarray]:
        """All per-frame columns, in the order of the features."""
        size = episode.frames
        number = np.arange(size)
        columns: dict[str, np.ndarray] = {
            vector.key: np.asarray(episode.vectors[vector.name], np.float32)
            for vector in self.contract.vectors()
        }
        columns |= {
            "action": np.where(episode.action_mask[:, None], episode.action, 0).astype(np.float32),
            "action_mask": np.asarray(episode.action_mask, bool),
            "reward": np.asarray(episode.reward, np.float32),
            "is_first": number == 0,
            "is_last": number == size - 1,
            "is_terminal": np.asarray(episode.is_terminal, bool),
            "timestamp": (number / self.contract.rate_hz).astype(np.float32),
            "frame_index": number,
            "episode_index": np.full(size, self._episodes),
            "index": self._frames + number,
            "task_index": np.asarray(episode.task_index, np.int64),
        }
        if episode.latents is not None:
            columns[latents.column(self.contract.images[0].name)] = np.asarray(
                episode.latents, np.float16
            ).reshape(size, -1)
        for name, feature in _features(self.contract, self._origin).items():
            if feature["dtype"] == "video":
                continue
            values = columns[name]
            if values.shape not in ((size, *feature["shape"]), (size,) if feature["shape"] == [1] else ()):
                raise ValueError(f"{name} has shape {values.shape}, expected {size} x {feature['shape'][0]}")
            if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
                raise ValueError(f"{name} has NaN or infinite values")
        return columns

    def _add_video(self, key: str, images: np.ndarray | Video) -> dict[str, Any]:
        """Append the frames of one camera; returns its columns of the episodes table."""
        rate = self.contract.rate_hz
        temporary = None
        if isinstance(images, np.ndarray):
            height, width = images.shape[1:3]
            temporary = self._aside / ".part.mp4"
            images = encode_video(temporary, images, rate, (height, width))
        file = self._videos.get(key)
        if file is not None and file.bytes + images.path.stat().st_size > VIDEO_FILE_MB * 2**20:
            file.close()
            self._next[key] += 1
            file = None
        chunk, number = divmod(self._next[key], CHUNK_FILES)
        if file is None:
            path = VIDEO_PATH.format(video_key=key, chunk_index=chunk, file_index=number)
            file = self._videos[key] = _VideoFile(self._aside / path)
        begin = file.frames
        file.append(images, rate)
        if temporary is not None:
            temporary.unlink()
        place: dict[str, float] = {"chunk_index": chunk, "file_index": number}
        place |= {"from_timestamp": begin / rate, "to_timestamp": file.frames / rate}
        # LeRobot keeps pixel statistics as [channel, 1, 1] and the count flat.
        stats = {
            name: value.tolist() if name == "count" else value.reshape(3, 1, 1).tolist()
            for name, value in images.stats.items()
        }
        return {f"videos/{key}/{name}": value for name, value in place.items()} | {
            f"stats/{key}/{name}": value for name, value in stats.items()
        }

    def _flush_data(self) -> None:
        chunk, number = divmod(self._next["data"], CHUNK_FILES)
        path = self._aside / DATA_PATH.format(chunk_index=chunk, file_index=number)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.concat_tables(self._tables).combine_chunks(), path)
        self._tables, self._table_bytes = [], 0
        self._next["data"] += 1

    def finalize(self) -> None:
        """Put the dataset in place, old episodes and new, in one step. Without any episode nothing is
        written.
        """
        if not self._rows:
            self._abort_if_unchanged()
            return
        for video in self._videos.values():
            video.close()
        if self._tables:
            self._flush_data()
        episodes = pa.Table.from_pylist(self._rows)
        if self._old is not None:
            _link_tree(self.root, self._aside)
            episodes = pa.concat_tables(
                [self._old.episodes, episodes.select(self._old.episodes.column_names)]
            )
        self._write_meta(episodes)
        _swap(self._aside, self.root)

    def _abort_if_unchanged(self) -> None:
        """No new episode: only the list of sources may have to be brought up to date."""
        if self._old is not None and self._sources != self._old.d4.get("sources", []):
            _write_json(self.root / "meta" / "d4.json", {**self._old.d4, "sources": self._sources})
        self.abort()

    def _write_meta(self, episodes: pa.Table) -> None:
        meta = self._aside / "meta"
        path = self._aside / EPISODES_PATH
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(episodes, path)
        pq.write_table(_tasks_table(self.contract.task_names), meta / "tasks.parquet")
        _write_json(meta / "stats.json", _total_stats(episodes))
        d4 = {
            "format": FORMAT,
            "contract": self.contract.to_dict(),
            "contract_hash": self.contract.hash,
            "episodes": self._provenance,
            "sources": self._sources,
        }
        if self._origin is not None:
            d4["latents"] = self._origin._asdict()
        _write_json(meta / "d4.json", d4)
        info = {
            "codebase_version": "v3.0",
            "robot_type": self.contract.name,
            "total_episodes": self._episodes,
            "total_frames": self._frames,
            "total_tasks": len(self.contract.task_names),
            "chunks_size": CHUNK_FILES,
            "data_files_size_in_mb": DATA_FILE_MB,
            "video_files_size_in_mb": VIDEO_FILE_MB,
            "fps": _fps(self.contract),
            "splits": {"train": f"0:{self._episodes}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH,
            "features": _features(self.contract, self._origin),
        }
        _write_json(meta / "info.json", info)

    def abort(self) -> None:
        """Drop what was added since the writer was opened."""
        for video in self._videos.values():
            with suppress(av.FFmpegError, ValueError):
                video.close()
        shutil.rmtree(self._aside, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.abort()
            return
        try:
            self.finalize()
        except BaseException:  # a full disk, which must not stay full of this
            self.abort()
            raise


def _tasks_table(names: Iterable[str]) -> pa.Table:
    """tasks.parquet as pandas writes it: the task strings are the index."""
    names = list(names)
    table = pa.table({"task_index": np.arange(len(names)), "task": names})
    columns = [
        {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64"},
        {"name": "task", "field_name": "task", "pandas_type": "unicode", "numpy_type": "object"},
    ]
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [{**column, "metadata": None} for column in columns],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.0.0",
    }
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def _total_stats(episodes: pa.Table) -> dict[str, Any]:
    """stats.json: the statistics of all episodes joined."""
    names = [
        name[len("stats/") : -len("/count")] for name in episodes.column_names if name.endswith("/count")
    ]
    total: dict[str, Any] = {}
    for name in names:
        low, high, mean, std, count = (
            np.array(episodes[f"stats/{name}/{key}"].to_pylist(), np.float64)
            for key in ("min", "max", "mean", "std", "count")
        )
        used = count[:, 0] > 0
        if not used.any():
            used[:] = True
        weight = (count / max(count.sum(), 1)).reshape(-1, *[1] * (mean.ndim - 1))
        average = (mean * weight).sum(0)
        variance = ((std**2 + (mean - average) ** 2) * weight).sum(0)
        total[name] = {
            "min": low[used].min(0).tolist(),
            "max": high[used].max(0).tolist(),
            "mean": average.tolist(),
            "std": np.sqrt(variance).tolist(),
            "count": [int(count.sum())],
        }
    return total


# ---- putting it in place ----


def _aside(root: Path, what: str) -> Path:
    return root.absolute().parent / f".tmp-{root.name}-{what}"


def _link_tree(old: Path, new: Path) -> None:
    """Give `new` the files of `old` but for metadata and frame cache, by hard links where the file system has
    them.
    """

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    for entry in old.iterdir():
        if entry.name in ("meta", "cache") or entry.name.startswith("."):
            continue
        if entry.is_dir():
            shutil.copytree(entry, new / entry.name, copy_function=link, dirs_exist_ok=True)
        else:
            link(str(entry), str(new / entry.name))


def _swap(new: Path, root: Path) -> None:
    """Put `new` in the place of `root` and remove what was there; `root` is whole at every moment."""
    if not root.exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        os.rename(new, root)
        return
    if not _exchange(new, root):
        # Two renames: a kill between them leaves the old dataset aside, where `_recover` finds it.
        retired = _aside(root, "old")
        shutil.rmtree(retired, ignore_errors=True)
        os.rename(root, retired)
        os.rename(new, root)
        new = retired
    shutil.rmtree(new, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one atomic step, which only Linux's renameat2 can do; False where it cannot."""
    at_cwd, exchange = -100, 2
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    return renameat2 is not None and renameat2(at_cwd, bytes(one), at_cwd, bytes(other), exchange) == 0


def _recover(root: Path) -> None:
    retired = _aside(root, "old")
    if retired.exists() and not root.exists():
        os.rename(retired, root)


def _write_json(path: Path, value: Any) -> None:
    whole.write(path, json.dumps(value, indent=1))


# ---- reading ----


class Dataset:
    """A finished dataset: `info`, `d4`, `contract`, the `episodes` table; columns and frames on demand."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        try:
            self.info: dict[str, Any] = read_json(self.root / "meta/info.json")
            self.d4: dict[str, Any] = read_json(self.root / "meta/d4.json")
            self.episodes: pa.Table = pq.read_table(self.root / "meta/episodes")
            self.contract = Contract.from_dict(self.d4["contract"], source=f"{self.root}/meta/d4.json")
            self.origin = Origin(**self.d4["latents"]) if "latents" in self.d4 else None
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise UserError(
                f"{self.root} is not a dataset of d4-ingest ({error}); name another folder"
            ) from None

    def columns(self, episode: int) -> dict[str, np.ndarray]:
        """All per-frame columns of an episode: [T], or [T, k] for vectors of more than one number."""
        path = self.root / DATA_PATH.format(**self._place(episode, "data"))
        table = pq.read_table(path, filters=[("episode_index", "==", episode)])
        out = {}
        for name in table.column_names:
            column = table[name].combine_chunks()
            if pa.types.is_nested(column.type):
                out[name] = column.flatten().to_numpy().reshape(len(column), -1)
            else:
                out[name] = column.to_numpy(zero_copy_only=False)
        return out

    def frames(self, camera: str, episode: int) -> Iterator[np.ndarray]:
        """The frames of an episode in order, RGB uint8 [H, W, 3]."""
        key = f"observation.images.{camera}"
        path = self.root / VIDEO_PATH.format(video_key=key, **self._place(episode, f"videos/{key}"))
        start = self.episodes[f"videos/{key}/from_timestamp"][episode].as_py()
        return islice(decode_video(path, start), self.episodes["length"][episode].as_py())

    def _place(self, episode: int, prefix: str) -> dict[str, int]:
        return {
            name: self.episodes[f"{prefix}/{name}"][episode].as_py() for name in ("chunk_index", "file_index")
        }
