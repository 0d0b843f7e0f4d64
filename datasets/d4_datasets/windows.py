"""Training windows out of a dataset folder, at memory speed.

A dataset keeps its frames as lossless video and its labels as Parquet: small, and readable by LeRobot. A
trainer needs random windows of it thousands of times a second, which no video decoder gives. So the first
use unpacks the dataset once into a cache of plain `.npy` files next to it; from then on every batch is a
gather from memory maps, and the memory of the process does not grow with the dataset.

    <root>/cache/manifest.json          what the cache was made from: size, time, sha256 of each source file
    <root>/cache/<camera>.npy           uint8 [N, H, W, 3], RGB
    <root>/cache/columns/<name>.npy     one array [N, ...] per column

The cache is written aside and renamed, so an interrupted build leaves nothing half-written, and it is
rebuilt when a source file has changed. Deleting it is always safe.
"""

from __future__ import annotations

import fcntl
import fnmatch
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from d4_datasets import latents
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_datasets.latents import Origin

CACHE_FORMAT = 1
_ROWS_PER_READ = 65_536
_SCALAR_COLUMNS = {
    "action_mask": "bool",
    "is_terminal": "bool",
    "task_index": "int64",
    "episode_index": "int64",
}

Tick = Callable[[int], None]


class NoFrames(UserError):
    """The dataset is there, and empty."""


class Windows:
    """All frames of one dataset as arrays over a global frame index, and the windows cut from them.

    N frames, E episodes, A action dimensions, K tasks (at least 1). Arrays are memory maps opened read-only.

    Attributes:
        contract: the contract the dataset was made with.
        num_frames: N.
        episode_start, episode_length: int64 [E], global index of the first frame, and number of frames.
        labelled: bool [E], True where any frame of the episode has a known action.
        sources: E names of the recordings that the episodes come from.
        episode_index: int64 [N].
        images: per camera uint8 [N, H, W, 3], RGB; empty if latents stand for them.
        latents: float16 [N, tokens, channels] of the robot's one camera, None if there are pictures.
        origin: whose latents they are.
        action: float32 [N, A], in the units of the contract, zeros where unknown.
        action_mask: bool [N], True where the action is known.
        reward: float32 [N, K], arrived with the frame.
        is_terminal: bool [N].
        task_index: int64 [N].
        vectors: per vector observation float32 [N, k].
        nonfinite: {(column, episode): number of frames}, empty unless opened with `strict=False`.

    Raises:
        UserError: no dataset at `root`, no frames in it, frames missing from a video, or NaN in a column.
    """

    def __init__(self, root: Path, cache: Path | None = None, *, strict: bool = True) -> None:
        """Open the dataset at `root`, building the cache (default `<root>/cache`) where it is missing or
        outdated.

        With `strict=False` NaN and infinities are counted in `nonfinite` instead of refused: the audit looks
        at faulty data too.
        """
        source = _Source(Path(root))
        self.root = source.root
        self.cache = Path(cache) if cache is not None else source.root / "cache"
        manifest = _current_manifest(source, self.cache) or _build(source, self.cache)
        self.nonfinite = {(column, episode): count for column, episode, count in manifest["nonfinite"]}
        if strict:
            _refuse_nonfinite(self.nonfinite)
        self.contract: Contract = source.contract
        self.num_frames = source.num_frames
        self.episode_start, self.episode_length = source.episode_start, source.episode_length
        self.images: dict[str, np.ndarray] = {
            name: np.load(self.cache / f"{name}.npy", mmap_mode="r") for name in source.image_sizes
        }
        columns = {name: np.load(_column_path(self.cache, name), mmap_mode="r") for name in source.columns}
        self.origin = source.origin
        self.latents: np.ndarray | None = None
        if self.origin is not None:
            flat = columns[latents.column(source.contract.images[0].name)]
            self.latents = flat.reshape(-1, self.origin.tokens, self.origin.channels)
        self.action, self.reward = columns["action"], columns["reward"]
        self.action_mask, self.is_terminal = columns["action_mask"], columns["is_terminal"]
        self.task_index, self.episode_index = columns["task_index"], columns["episode_index"]
        self.vectors: dict[str, np.ndarray] = {
            name: columns[f"observation.{name}"] for name in source.vector_names
        }
        self.labelled = np.logical_or.reduceat(self.action_mask, self.episode_start)
        self.sources = source.sources
        # Base-class views: indexing an np.memmap pays for subclass machinery on every gather.
        self._images = {name: array.view(np.ndarray) for name, array in self.images.items()}
        self._columns = {name: array.view(np.ndarray) for name, array in columns.items()}

    def split(self, holdout: float = 0.05, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Split the episodes into (train, holdout) ids, int64 and sorted, always the same for the same seed.

        Labelled and unlabelled episodes are split apart, so that both kinds stand on both sides. A kind with
        one episode only stays in train; of two or more, at least one is held out (unless `holdout` is 0).
        """
        if not 0.0 <= holdout < 1.0:
            raise UserError(f"holdout is {holdout}; it is a share of the episodes, at least 0 and below 1")
        rng = np.random.default_rng(seed)
        held = np.zeros(len(self.episode_start), bool)
        for kind in (True, False):
            episodes = rng.permutation(np.flatnonzero(self.labelled == kind))
            if holdout > 0 and len(episodes) > 1:
                count = min(max(1, round(holdout * len(episodes))), len(episodes) - 1)
                held[episodes[:count]] = True
        return np.flatnonzero(~held), np.flatnonzero(held)

    def of(self, recordings: str) -> np.ndarray:
        """Which episodes come from recordings whose name fits a pattern of the shell, bool [E]."""
        return np.array([fnmatch.fnmatchcase(name, recordings) for name in self.sources])

    def keep_labels(self, episodes: np.ndarray, share: float, recordings: str = "*", seed: int = 0) -> None:
        """Forget the commands of all but `share` of the labelled ones among `episodes` (ids).

        For measuring what labels are worth: a smaller share keeps a part of what a larger one keeps. Other
        episodes are untouched, so that held-out ones can still be measured on. Of `episodes` that come from
        other recordings than those that fit the pattern, none is kept.
        """
        is_kept = self.labelled & self.of(recordings)
        order = np.random.default_rng([seed, 1]).permutation(episodes[is_kept[episodes]])
        hidden = np.zeros(len(self.labelled), bool)
        hidden[episodes] = self.labelled[episodes]
        hidden[order[: round(share * len(order))]] = False
        if hidden.any():
            self.labelled = self.labelled & ~hidden
            self.action_mask = self.action_mask & ~np.repeat(hidden, self.episode_length)
            self._columns["action_mask"] = self.action_mask

    def sample_starts(
        self, rng: np.random.Generator, batch: int, length: int, episodes: np.ndarray
    ) -> np.ndarray:
        """Draw global start indices int64 [batch] of windows of `length` frames within `episodes` (ids).

        A frame is drawn uniformly over all frames of the episodes and put at a uniform place in its window;
        the window is then shifted into the episode. So long episodes count by their frames, and both the
        first and the last frames of an episode (where its task begins and where its reward falls) are seen
        about half as often as the rest, instead of almost never. Episodes shorter than `length` start at
        their first frame.
        """
        episodes = np.asarray(episodes, np.int64)
        if episodes.size == 0:
            raise UserError("no episodes to draw windows from; the dataset or its split is empty")
        ends = np.cumsum(self.episode_length[episodes])
        frame = rng.integers(0, ends[-1], batch)
        which = np.searchsorted(ends, frame, side="right")
        size = self.episode_length[episodes[which]]
        offset = frame - (ends[which] - size) - rng.integers(0, length, batch)
        return self.episode_start[episodes[which]] + np.clip(offset, 0, np.maximum(size - length, 0))

    def indices(self, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Expand starts [B] to (idx int64 [B, length], valid bool [B, length]).

        Past the end of the episode the last frame is repeated and `valid` is False: no window crosses a
        boundary.
        """
        starts = np.asarray(starts, np.int64)
        episode = np.searchsorted(self.episode_start, starts, side="right") - 1
        last = (self.episode_start[episode] + self.episode_length[episode] - 1)[:, None]
        idx = starts[:, None] + np.arange(length)
        return np.minimum(idx, last), idx <= last

    def batch(self, idx: np.ndarray, valid: np.ndarray) -> dict[str, np.ndarray]:
        """Gather the frames `idx` [B, T] into fresh arrays [B, T, ...].

        Keys: image.<camera> uint8 [B, T, H, W, 3] or latents float16 [B, T, tokens, channels]; action,
        action_mask, reward, is_terminal, is_first, task_index, valid, vector.<name>. Where `valid` is False
        nothing is known and nothing is paid: masks and flags are False, action and reward are zero, and only
        what was seen (images, vectors, task) repeats.
        """
        columns = self._columns
        out = {f"image.{name}": array[idx] for name, array in self._images.items()}
        if self.latents is not None:
            out["latents"] = self.latents.view(np.ndarray)[idx]
        out |= {f"vector.{name}": columns[f"observation.{name}"][idx] for name in self.vectors}
        first = self.episode_start[columns["episode_index"][idx]] == idx
        out["action"] = columns["action"][idx] * valid[..., None]
        out["action_mask"] = columns["action_mask"][idx] & valid
        out["reward"] = columns["reward"][idx] * valid[..., None]
        out["is_terminal"] = columns["is_terminal"][idx] & valid
        out["is_first"] = first & valid
        out["task_index"] = columns["task_index"][idx]
        out["valid"] = np.array(valid, bool)
        return out


def cache_bytes(contract: Contract, num_frames: int) -> int:
    """Size in bytes of the image cache of `num_frames` frames of this contract."""
    return num_frames * sum(camera.size[0] * camera.size[1] * 3 for camera in contract.images if camera.size)


class _Source:
    """The dataset as it lies on disk: metadata read, nothing of its bulk touched."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.info = self._json("info.json")
        about = self._json("d4.json")
        self.contract = Contract.from_dict(about["contract"])
        self.sources = [episode["source"] for episode in about["episodes"]]
        self.fps = float(self.info["fps"])
        self.episodes = self._read_episodes()
        self.episode_length = np.asarray(self.episodes["length"], np.int64)
        self.num_frames = int(self.episode_length.sum())
        if self.num_frames == 0:
            raise NoFrames(f"{root} holds no frames; ingest a recording into it first (d4-ingest)")
        self.episode_start = np.cumsum(self.episode_length) - self.episode_length
        if (self.episode_length < 1).any():
            raise UserError(f"{root} lists an episode without frames; write the dataset again (d4-ingest)")
        self.origin = Origin(**about["latents"]) if "latents" in about else None
        self.image_sizes = {
            camera.name: camera.size
            for camera in self.contract.images
            if camera.size is not None and self.origin is None
        }
        self.vector_names = [vector.name for vector in self.contract.vectors()]
        self.columns = [
            "action",
            "reward",
            *_SCALAR_COLUMNS,
            *(f"observation.{n}" for n in self.vector_names),
            *([] if self.origin is None else [latents.column(self.contract.images[0].name)]),
        ]

    def _json(self, name: str) -> dict[str, Any]:
        path = self.root / "meta" / name
        try:
            return json.loads(path.read_text())
        except FileNotFoundError:
            raise UserError(
                f"{self.root} is not a d4 dataset: {path} is missing; make one with d4-ingest"
            ) from None
        except ValueError as error:
            raise UserError(
                f"{path} is not readable JSON ({error}); write the dataset again (d4-ingest)"
            ) from None

    def _read_episodes(self) -> dict[str, list[Any]]:
        """Columns of the episode table, in the order of episode_index, without the bulky statistics."""
        files = sorted((self.root / "meta" / "episodes").rglob("*.parquet"))
        if not files:
            raise UserError(
                f"{self.root} holds no frames: it lists no episodes; ingest a recording (d4-ingest)"
            )
        tables = []
        for file in files:
            names = [n for n in pq.read_schema(file).names if not n.startswith("stats/") and n != "tasks"]
            tables.append(pq.read_table(file, columns=names))
        table = pa.concat_tables(tables).sort_by("episode_index")
        if table["episode_index"].to_pylist() != list(range(table.num_rows)):
            raise UserError(
                f"the episodes of {self.root} are not numbered 0, 1, 2, ...; write the dataset again"
            )
        return table.to_pydict()

    def data_files(self) -> list[Path]:
        """The Parquet files with the per-frame columns."""
        return sorted((self.root / "data").rglob("*.parquet"))

    def videos(self, camera: str) -> dict[Path, list[int]]:
        """The video files of a camera, each with the ids of the episodes in it."""
        key = f"observation.images.{camera}"
        files: dict[Path, list[int]] = {}
        try:
            chunks, numbers = (self.episodes[f"videos/{key}/{part}_index"] for part in ("chunk", "file"))
        except KeyError:
            raise UserError(
                f"{self.root} has no video of camera {camera!r} that its contract names"
            ) from None
        for episode, (chunk, number) in enumerate(zip(chunks, numbers, strict=True)):
            name = self.info["video_path"].format(video_key=key, chunk_index=chunk, file_index=number)
            files.setdefault(self.root / name, []).append(episode)
        return files

    def first_row(self, camera: str, episode: int) -> int:
        """Number of the episode's first frame within its video file."""
        return round(self.episodes[f"videos/observation.images.{camera}/from_timestamp"][episode] * self.fps)

    def files(self) -> list[Path]:
        """Every file the cache depends on."""
        meta = [self.root / "meta" / "info.json", self.root / "meta" / "d4.json"]
        meta += sorted((self.root / "meta" / "episodes").rglob("*.parquet"))
        videos = [path for camera in self.image_sizes for path in self.videos(camera)]
        missing = [path for path in videos if not path.is_file()]
        if missing:
            raise UserError(f"{missing[0]} is missing although the dataset lists it; copy the dataset again")
        return meta + self.data_files() + videos


def _column_path(cache: Path, name: str) -> Path:
    return cache / "columns" / f"{name}.npy"


# ---- is the cache the one of this dataset?


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fingerprint(path: Path) -> dict[str, Any]:
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": _sha256(path)}


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every array in a cache folder."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*.npy"))}


def _current_manifest(source: _Source, cache: Path) -> dict[str, Any] | None:
    """Return the manifest of the cache, or None where it is missing or was made from other files.

    Size and time are compared first and the content only where the time differs (a copied dataset), as git
    does: opening a large dataset must not read it all.
    """
    path = cache / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    if manifest.get("format") != CACHE_FORMAT or manifest["arrays"] != _sizes(cache):
        return None
    files = {str(file.relative_to(source.root)): file for file in source.files()}
    known = manifest["sources"]
    if files.keys() != known.keys():
        return None
    touched = False
    for name, file in files.items():
        stat = file.stat()
        if stat.st_size != known[name]["size"]:
            return None
        if stat.st_mtime_ns != known[name]["mtime_ns"]:
            if _sha256(file) != known[name]["sha256"]:
                return None
            known[name]["mtime_ns"] = stat.st_mtime_ns
            touched = True
    if touched and os.access(cache, os.W_OK):
        _write_json(path, manifest)
    return manifest


def _write_json(path: Path, value: dict[str, Any]) -> None:
    aside = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    aside.write_text(json.dumps(value))
    os.replace(aside, path)


# ---- building it


def _build(source: _Source, cache: Path) -> dict[str, Any]:
    """Unpack the dataset into `cache` and return its manifest."""
    if cache.exists() and any(cache.iterdir()) and not (cache / "manifest.json").exists():
        raise UserError(f"{cache} holds files that are not a frame cache; name another folder for the cache")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        lock = (cache.parent / f".{cache.name}.lock").open("w")
    except PermissionError:
        raise UserError(
            f"cannot write the frame cache to {cache}; name a writable folder for the cache"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Another process may have built it while this one waited for the lock.
        manifest = _current_manifest(source, cache)
        return manifest if manifest is not None else _build_locked(source, cache)


def _build_locked(source: _Source, cache: Path) -> dict[str, Any]:
    aside = cache.with_name(f".tmp-{cache.name}")
    shutil.rmtree(aside, ignore_errors=True)  # what a killed build left
    need = cache_bytes(source.contract, source.num_frames) if source.image_sizes else 0
    free = shutil.disk_usage(cache.parent).free
    if need > free:
        raise UserError(
            f"the frame cache {cache} needs {need / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free; "
            "free some space or name a folder on another disk for the cache"
        )
    try:
        (aside / "columns").mkdir(parents=True)
        # Before the content is used: a file changed meanwhile makes the cache outdated, never wrong.
        sources = {str(path.relative_to(source.root)): _fingerprint(path) for path in source.files()}
        with _progress(source.num_frames * len(source.image_sizes)) as tick:
            nonfinite = _unpack_columns(source, aside)
            for camera in source.image_sizes:
                _unpack_camera(source, camera, aside / f"{camera}.npy", tick)
        manifest = {
            "format": CACHE_FORMAT,
            "nonfinite": nonfinite,
            "sources": sources,
            "arrays": _sizes(aside),
        }
        _write_json(aside / "manifest.json", manifest)
        shutil.rmtree(cache, ignore_errors=True)
        os.rename(aside, cache)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return manifest


@contextmanager
def _progress(total: int) -> Iterator[Tick]:
    """Show the unpacking on stderr: a bar on a terminal, two plain lines elsewhere."""
    if not sys.stderr.isatty():
        print(f"unpacking {total} frames into the frame cache ...", file=sys.stderr, flush=True)
        yield lambda count: None
        print("frame cache done", file=sys.stderr, flush=True)
        return
    bar = Progress(
        TextColumn("frame cache"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task("frames", total=total)
        yield lambda count: bar.advance(task, count)


def _unpack_columns(source: _Source, folder: Path) -> list[tuple[str, int, int]]:
    """Write the Parquet columns as arrays; returns (column, episode, frames) of every NaN or infinity
    found."""
    arrays: dict[str, np.memmap] = {}
    filled = np.zeros(source.num_frames, bool)
    bad: dict[tuple[str, int], int] = {}
    for path in source.data_files():
        absent = set(source.columns) | {"index"}
        absent -= set(pq.read_schema(path).names)
        if absent:
            raise UserError(f"{path} has no column {min(absent)!r}; write the dataset again with d4-ingest")
        for rows in pq.ParquetFile(path).iter_batches(_ROWS_PER_READ, columns=["index", *source.columns]):
            index = rows["index"].to_numpy()
            if index.size and not 0 <= index.min() <= index.max() < source.num_frames:
                raise UserError(
                    f"{path} has rows of frames that the episode table does not list; copy the dataset again"
                )
            filled[index] = True
            values = {name: _values(rows[name], name, path) for name in source.columns}
            for name, value in values.items():
                if name not in arrays:
                    arrays[name] = np.lib.format.open_memmap(
                        _column_path(folder, name), "w+", value.dtype, (source.num_frames, *value.shape[1:])
                    )
                if value.shape[1:] != arrays[name].shape[1:]:
                    raise UserError(f"column {name!r} of {path} changes its width; write the dataset again")
                arrays[name][index] = value
                _count_nonfinite(bad, name, value, values["episode_index"])
    _check_rows(source, filled, arrays)
    return [(column, episode, count) for (column, episode), count in sorted(bad.items())]


def _values(column: pa.Array, name: str, path: Path) -> np.ndarray:
    """Column as an array [rows] (flags, counts), float32 [rows, width], or float16 where it is stored so."""
    if column.null_count:
        raise UserError(f"column {name!r} of {path} has empty cells; write the dataset again with d4-ingest")
    if name in _SCALAR_COLUMNS:
        return column.to_numpy(zero_copy_only=False).astype(_SCALAR_COLUMNS[name])
    # LeRobot stores vectors of width 1 as plain numbers.
    flat = column.flatten() if pa.types.is_nested(column.type) else column
    values = flat.to_numpy(zero_copy_only=False)
    if values.dtype != np.float16:
        values = values.astype(np.float32)
    return values.reshape(len(column), -1)


def _count_nonfinite(
    bad: dict[tuple[str, int], int], name: str, value: np.ndarray, episode: np.ndarray
) -> None:
    if not np.issubdtype(value.dtype, np.floating):
        return
    for number in episode[~np.isfinite(value).all(1)]:
        bad[name, int(number)] = bad.get((name, int(number)), 0) + 1


def _check_rows(source: _Source, filled: np.ndarray, arrays: dict[str, np.memmap]) -> None:
    """Hold the per-frame rows against the episode table and the contract: both name the same frames."""
    if not filled.all():
        episode = int(np.searchsorted(source.episode_start, int(np.argmin(filled)), side="right")) - 1
        raise UserError(f"{source.root} lacks rows of episode {episode} under data/; copy the dataset again")
    expected = np.repeat(np.arange(len(source.episode_start)), source.episode_length)
    wrong = np.flatnonzero(arrays["episode_index"] != expected)
    if wrong.size:
        raise UserError(
            f"row {wrong[0]} of {source.root} belongs to another episode than its episode table says; "
            "write the dataset again with d4-ingest"
        )
    width = arrays["action"].shape[1]
    if width != source.contract.action_dim:
        raise UserError(
            f"actions in {source.root} have {width} numbers, its contract names "
            f"{source.contract.action_dim}; write the dataset again with d4-ingest"
        )


def _unpack_camera(source: _Source, camera: str, target: Path, tick: Tick) -> None:
    """Decode all videos of a camera into one array [N, H, W, 3]."""
    height, width = source.image_sizes[camera]
    frames = np.lib.format.open_memmap(target, "w+", np.uint8, (source.num_frames, height, width, 3))
    filled = np.zeros(source.num_frames, bool)
    for path, episodes in source.videos(camera).items():
        rows = _rows_of_video(source, camera, episodes)
        for number, image in _decode(path, source.fps):
            row = int(rows[number]) if 0 <= number < len(rows) else -1
            if row < 0:
                continue  # a frame that belongs to no episode
            if image.shape != frames.shape[1:]:
                raise UserError(
                    f"{path} has frames of {image.shape[1]}x{image.shape[0]}, the contract names "
                    f"{width}x{height} for {camera!r}; write the dataset again with d4-ingest"
                )
            frames[row], filled[row] = image, True
            tick(1)
    if not filled.all():
        episode = int(np.searchsorted(source.episode_start, int(np.argmin(filled)), side="right")) - 1
        raise UserError(
            f"the video of camera {camera!r} lacks frames of episode {episode} in {source.root}; "
            "copy the dataset again or write it again with d4-ingest"
        )
    frames.flush()


def _rows_of_video(source: _Source, camera: str, episodes: list[int]) -> np.ndarray:
    """Global frame index of every frame of a video file, -1 where it belongs to no episode."""
    first = [source.first_row(camera, episode) for episode in episodes]
    length = [int(source.episode_length[episode]) for episode in episodes]
    rows = np.full(max(begin + count for begin, count in zip(first, length, strict=True)), -1, np.int64)
    for episode, begin, count in zip(episodes, first, length, strict=True):
        rows[begin : begin + count] = source.episode_start[episode] + np.arange(count)
    return rows


def _decode(path: Path, fps: float) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (frame number by its time stamp, RGB image) of a video file."""
    rate = float(Fraction(fps).limit_denominator(1001))  # video runs at 30000/1001, not at 29.97
    # One reformatter on one thread: setting up a converter per frame takes ten times longer than the
    # decoding.
    convert = av.video.reformatter.VideoReformatter()
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                # A frame without a time stamp has no place: it counts as lost, and that is reported by
                # episode.
                number = -1 if frame.time is None else round(frame.time * rate)
                yield number, convert.reformat(frame, format="rgb24", threads=1).to_ndarray()
    except av.FFmpegError as error:
        raise UserError(f"{path} cannot be decoded ({error}); copy the dataset again") from None


def _refuse_nonfinite(nonfinite: dict[tuple[str, int], int]) -> None:
    if nonfinite:
        (column, episode), count = next(iter(nonfinite.items()))
        raise UserError(
            f"column {column!r} has NaN or infinite values in {count} frames of episode {episode}; "
            "remove or repair the recording it came from (d4-audit lists all) and ingest again"
        )
