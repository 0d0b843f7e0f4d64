"""From the files of a dataset to plain arrays: Parquet columns and lossless video, each checked against the
metadata.

A dataset is small and readable by LeRobot; a trainer needs random windows of it thousands of times a second,
which no video decoder gives. What comes out here is what `windows` maps into memory.
"""

from __future__ import annotations

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

from d4_datasets.errors import UserError
from d4_datasets.source import SCALAR_COLUMNS, Source

_ROWS_PER_READ = 65_536

Tick = Callable[[int], None]


def column_path(folder: Path, name: str) -> Path:
    """Where the array of a column lies in a cache folder."""
    return folder / "columns" / f"{name}.npy"


@contextmanager
def progress(total: int, what: str = "frame cache") -> Iterator[Tick]:
    """Show the unpacking on stderr: a bar on a terminal, two plain lines elsewhere."""
    if not sys.stderr.isatty():
        print(f"unpacking {total} frames into the {what} ...", file=sys.stderr, flush=True)
        yield lambda count: None
        print(f"{what} done", file=sys.stderr, flush=True)
        return
    bar = Progress(
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task("frames", total=total)
        yield lambda count: bar.advance(task, count)


# ---- columns


class Columns:
    """The per-frame columns of one dataset or of several behind each other, as arrays in `folder`/columns.

    Args: total: frames of all of them.

    Attributes: bad: frames with NaN or infinity by (column, episode).
    """

    def __init__(self, folder: Path, total: int) -> None:
        self.folder, self.total = folder, total
        self.bad: dict[tuple[str, int], int] = {}
        self._arrays: dict[str, np.memmap] = {}

    def nonfinite(self) -> list[tuple[str, int, int]]:
        """(column, episode, frames) of every NaN or infinity."""
        return [(column, episode, count) for (column, episode), count in sorted(self.bad.items())]

    def add(self, source: Source, frame: int = 0, episode: int = 0) -> None:
        """Write the columns of a dataset whose first frame and episode have these numbers.

        Raises:
            UserError: columns, rows or numbers are missing, or do not fit the episode table or the contract.
        """
        filled = np.zeros(source.num_frames, bool)
        for path in source.data_files():
            absent = set(source.columns) | {"index"}
            absent -= set(pq.read_schema(path).names)
            if absent:
                raise UserError(
                    f"{path} has no column {min(absent)!r}; write the dataset again with d4-ingest"
                )
            for rows in pq.ParquetFile(path).iter_batches(_ROWS_PER_READ, columns=["index", *source.columns]):
                index = rows["index"].to_numpy()
                if index.size and not 0 <= index.min() <= index.max() < source.num_frames:
                    raise UserError(
                        f"{path} has rows of frames that the episode table does not list; copy the dataset "
                        "again"
                    )
                filled[index] = True
                values = {name: _values(rows[name], name, path) for name in source.columns}
                values["episode_index"] += episode
                for name, value in values.items():
                    self._array(name, value, path)[index + frame] = value
                    self._count_nonfinite(name, value, values["episode_index"])
        self._check(source, filled, frame, episode)

    def _array(self, name: str, value: np.ndarray, path: Path) -> np.memmap:
        array = self._arrays.get(name)
        if array is None:
            shape = (self.total, *value.shape[1:])
            array = np.lib.format.open_memmap(column_path(self.folder, name), "w+", value.dtype, shape)
            self._arrays[name] = array
        if value.shape[1:] != array.shape[1:]:
            raise UserError(f"column {name!r} of {path} changes its width; write the dataset again")
        return array

    def _count_nonfinite(self, name: str, value: np.ndarray, episode: np.ndarray) -> None:
        if not np.issubdtype(value.dtype, np.floating):
            return
        for number in episode[~np.isfinite(value).all(1)]:
            self.bad[name, int(number)] = self.bad.get((name, int(number)), 0) + 1

    def _check(self, source: Source, filled: np.ndarray, frame: int, episode: int) -> None:
        """Hold the per-frame rows against the episode table and the contract: both name the same frames."""
        if not filled.all():
            number = int(np.searchsorted(source.episode_start, int(np.argmin(filled)), side="right")) - 1
            raise UserError(
                f"{source.shown} lacks rows of episode {number} under data/; copy the dataset again"
            )
        expected = np.repeat(np.arange(len(source.episode_start)), source.episode_length) + episode
        found = self._arrays["episode_index"][frame : frame + source.num_frames]
        wrong = np.flatnonzero(found != expected)
        if wrong.size:
            raise UserError(
                f"row {wrong[0]} of {source.shown} belongs to another episode than its episode table says; "
                "write the dataset again with d4-ingest"
            )
        width = self._arrays["action"].shape[1]
        if width != source.contract.action_dim:
            raise UserError(
                f"actions in {source.shown} have {width} numbers, its contract names "
                f"{source.contract.action_dim}; write the dataset again with d4-ingest"
            )


def _values(column: pa.Array, name: str, path: Path) -> np.ndarray:
    """Column as an array [rows] (flags, counts), float32 [rows, width], or float16 where it is stored so."""
    if column.null_count:
        raise UserError(f"column {name!r} of {path} has empty cells; write the dataset again with d4-ingest")
    if name in SCALAR_COLUMNS:
        return column.to_numpy(zero_copy_only=False).astype(SCALAR_COLUMNS[name])
    # LeRobot stores vectors of width 1 as plain numbers.
    flat = column.flatten() if pa.types.is_nested(column.type) else column
    values = flat.to_numpy(zero_copy_only=False)
    if values.dtype != np.float16:
        values = values.astype(np.float32)
    return values.reshape(len(column), -1)


# ---- frames


def unpack_camera(source: Source, camera: str, target: Path, tick: Tick) -> None:
    """Decode all videos of a camera into one array [N, H, W, 3]."""
    size = source.image_sizes[camera]
    frames = np.lib.format.open_memmap(target, "w+", np.uint8, (source.num_frames, *size, 3))
    filled = np.zeros(source.num_frames, bool)
    first = source.first_rows(camera)
    for name, episodes in source.videos(camera).items():
        rows = rows_of_video(first[episodes], source.episode_start[episodes], source.episode_length[episodes])
        decode_rows(source.root / name, source.fps, rows, frames, filled, tick)
    if not filled.all():
        episode = int(np.searchsorted(source.episode_start, int(np.argmin(filled)), side="right")) - 1
        raise UserError(lacking(camera, episode, source.shown))
    frames.flush()


def lacking(camera: str, episode: int, where: str) -> str:
    """What to say of a video that is too short."""
    return (
        f"the video of camera {camera!r} lacks frames of episode {episode} in {where}; "
        "copy the dataset again or write it again with d4-ingest"
    )


def rows_of_video(first: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Which row every frame of a video file belongs into, -1 for none, int64 [frames].

    Args: of its episodes, [E]: number of the first frame in the file, first row, and number of frames.
    """
    rows = np.full(int((first + length).max()), -1, np.int64)
    for begin, row, count in zip(first, start, length, strict=True):
        rows[begin : begin + count] = row + np.arange(count)
    return rows


def decode_rows(
    path: Path,
    fps: float,
    rows: np.ndarray,
    frames: np.ndarray,
    filled: np.ndarray,
    tick: Tick,
    shown: str | None = None,
) -> None:
    """Decode the frames of a video that have a row into `frames` [.., H, W, 3] and note them in `filled`.

    `shown` is what people call the file, where that is not its path.

    Raises:
        UserError: it cannot be decoded, or its frames are of another size.
    """
    wanted = np.flatnonzero(rows >= 0)
    for number, image in _decode(path, fps, int(wanted[0]), shown):
        row = int(rows[number]) if 0 <= number < len(rows) else -1
        if row >= 0:
            if image.shape != frames.shape[1:]:
                raise UserError(
                    f"{shown or path} has frames of {image.shape[1]}x{image.shape[0]}, the contract names "
                    f"{frames.shape[2]}x{frames.shape[1]}; write the dataset again with d4-ingest"
                )
            frames[row], filled[row] = image, True
            tick(1)
        elif number >= len(rows):
            return  # what follows belongs to episodes that nobody asked for


def _decode(
    path: Path, fps: float, first: int = 0, shown: str | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (frame number by its time stamp, RGB image) of a video file, from frame `first` on or earlier."""
    rate = float(Fraction(fps).limit_denominator(1001))  # video runs at 30000/1001, not at 29.97
    # One reformatter on one thread: setting up a converter per frame takes ten times longer than the
    # decoding.
    convert = av.video.reformatter.VideoReformatter()
    try:
        with av.open(str(path)) as container:
            stream: Any = container.streams.video[0]
            if first > 0:  # to the key frame before it
                container.seek(round((first - 0.5) / rate / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                # A frame without a time stamp has no place: it counts as lost, and that is reported by
                # episode.
                number = -1 if frame.time is None else round(frame.time * rate)
                yield number, convert.reformat(frame, format="rgb24", threads=1).to_ndarray()
    except av.FFmpegError as error:
        raise UserError(f"{shown or path} cannot be decoded ({error}); copy the dataset again") from None
