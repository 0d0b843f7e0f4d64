"""A dataset as it lies on disk: its metadata read, nothing of its bulk touched."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from d4_datasets import latents
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_datasets.latents import Origin

SCALAR_COLUMNS = {
    "action_mask": "bool",
    "is_terminal": "bool",
    "task_index": "int64",
    "episode_index": "int64",
}
_USED = ("episode_index", "length", "data/chunk_index", "data/file_index")


class NoFrames(UserError):
    """The dataset is there, and empty."""


class Source:
    """What meta/ says of one dataset, with E episodes and N frames.

    Args: root: its folder. shown: what people call it, where that is another place than the folder.

    Attributes:
        info, about: info.json and d4.json.
        contract: the robot.
        sources: E names of recordings.
        episodes: columns of the episode table by name, arrays [E].
        episode_start, episode_length: int64 [E].
        num_frames: N.
        origin: whose latents stand for the pictures, None if there are pictures.
        image_sizes: (height, width) by camera, empty if there are latents.
        columns: names of the per-frame columns that training needs.

    Raises:
        UserError: it is no dataset, or holds no frames (NoFrames), or its metadata contradict themselves.
    """

    def __init__(self, root: Path, shown: str | None = None) -> None:
        self.root, self.shown = root, shown or str(root)
        self.info = self._json("info.json")
        self.about = self._json("d4.json")
        self.contract = Contract.from_dict(self.about["contract"])
        self.sources: list[str] = [episode["source"] for episode in self.about["episodes"]]
        self.fps = float(self.info["fps"])
        self.episodes = self._read_episodes()
        self.episode_length = np.asarray(self.episodes["length"], np.int64)
        self.num_frames = int(self.episode_length.sum())
        if self.num_frames == 0:
            raise NoFrames(f"{self.shown} holds no frames; ingest a recording into it first (d4-ingest)")
        self.episode_start = np.cumsum(self.episode_length) - self.episode_length
        if (self.episode_length < 1).any():
            raise UserError(
                f"{self.shown} lists an episode without frames; write the dataset again (d4-ingest)"
            )
        self.origin = Origin(**self.about["latents"]) if "latents" in self.about else None
        self.image_sizes = {
            camera.name: camera.size
            for camera in self.contract.images
            if camera.size is not None and self.origin is None
        }
        self.columns = [
            "action",
            "reward",
            *SCALAR_COLUMNS,
            *(f"observation.{vector.name}" for vector in self.contract.vectors()),
            *([] if self.origin is None else [latents.column(self.contract.images[0].name)]),
        ]

    def _json(self, name: str) -> dict[str, Any]:
        path = self.root / "meta" / name
        try:
            return json.loads(path.read_text())
        except FileNotFoundError:
            raise UserError(
                f"{self.shown} is not a d4 dataset: meta/{name} is missing; make one with d4-ingest"
            ) from None
        except ValueError as error:
            raise UserError(
                f"{path} is not readable JSON ({error}); write the dataset again (d4-ingest)"
            ) from None

    def _read_episodes(self) -> dict[str, np.ndarray]:
        """Columns of the episode table, in the order of episode_index, without the bulky statistics."""
        files = sorted((self.root / "meta" / "episodes").rglob("*.parquet"))
        if not files:
            raise UserError(
                f"{self.shown} holds no frames: it lists no episodes; ingest a recording (d4-ingest)"
            )
        tables = []
        for file in files:
            names = [n for n in pq.read_schema(file).names if n in _USED or n.startswith("videos/")]
            tables.append(pq.read_table(file, columns=names))
        table = pa.concat_tables(tables).sort_by("episode_index")
        episodes = {name: table[name].to_numpy() for name in table.column_names}
        if not np.array_equal(episodes["episode_index"], np.arange(table.num_rows)):
            raise UserError(
                f"the episodes of {self.shown} are not numbered 0, 1, 2, ...; write the dataset again"
            )
        return episodes

    # -- files --

    def data_files(self) -> list[Path]:
        """The Parquet files with the per-frame columns."""
        return sorted((self.root / "data").rglob("*.parquet"))

    def videos(self, camera: str) -> dict[str, np.ndarray]:
        """The video files of a camera by their names within the folder, each with the ids of its episodes."""
        key = f"observation.images.{camera}"
        try:
            chunks, numbers = (self.episodes[f"videos/{key}/{part}_index"] for part in ("chunk", "file"))
        except KeyError:
            raise UserError(
                f"{self.shown} has no video of camera {camera!r} that its contract names"
            ) from None
        places, which = np.unique(np.stack([chunks, numbers], 1), axis=0, return_inverse=True)
        order = np.argsort(which.reshape(-1), kind="stable")
        groups = np.split(order, np.cumsum(np.bincount(which.reshape(-1), minlength=len(places)))[:-1])
        template = str(self.info["video_path"])
        names = [
            template.format(video_key=key, chunk_index=int(chunk), file_index=int(number))
            for chunk, number in places
        ]
        return {self.checked(name): group for name, group in zip(names, groups, strict=True)}

    def checked(self, name: str) -> str:
        """A name that stays in the folder: metadata of others must not reach beyond it."""
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"{self.shown} names the file {name!r}, which is not below its folder")
        return name

    def first_rows(self, camera: str) -> np.ndarray:
        """Number of every episode's first frame within its video file, int64 [E]."""
        begin = np.asarray(self.episodes[f"videos/observation.images.{camera}/from_timestamp"], np.float64)
        return np.round(begin * self.fps).astype(np.int64)

    def meta_files(self) -> list[Path]:
        """info.json, d4.json and the episode tables."""
        meta = [self.root / "meta" / "info.json", self.root / "meta" / "d4.json"]
        return meta + sorted((self.root / "meta" / "episodes").rglob("*.parquet"))

    def files(self) -> list[Path]:
        """Every file that training depends on.

        Raises:
            UserError: a video is missing.
        """
        videos = [self.root / name for camera in self.image_sizes for name in self.videos(camera)]
        missing = [path for path in videos if not path.is_file()]
        if missing:
            raise UserError(f"{missing[0]} is missing although the dataset lists it; copy the dataset again")
        return self.meta_files() + self.data_files() + videos
