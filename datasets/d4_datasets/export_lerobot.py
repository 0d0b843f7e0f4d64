"""A dataset as a plain LeRobotDataset v3.0: only columns that LeRobot's own tools know.

observation.images.<camera>    as they are
observation.state              all input vectors in a row; a probe is left out, because a policy of
                               LeRobot takes whatever is called observation
action                         as it is. There is no mark for an unknown action, so each stretch of known
                               ones becomes an episode of its own, and the rest is left out
next.reward, next.done         what arrives with the following frame, where the contract has them
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from d4_datasets.align import MIN_TICKS
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_datasets.lerobot import Dataset, Episode, LeRobotWriter
from d4_datasets.video import Video, VideoEncoder

_STATE = "observation.state"
_OURS = ("action_mask", "reward", "is_first", "is_last", "is_terminal")


class PlainWriter(LeRobotWriter):
    """Writes episodes whose actions are all known, without what only this project reads."""

    def _columns(self, episode: Episode) -> dict[str, np.ndarray]:
        columns = super()._columns(episode)
        size = episode.frames
        states = [columns[vector.key].reshape(size, -1) for vector in self.contract.vectors("input")]
        plain = {_STATE: np.concatenate(states, 1)} if states else {}
        plain["action"] = columns["action"]
        if self.contract.reward is not None:
            own = columns["reward"].reshape(size, -1)[np.arange(size), columns["task_index"]]
            plain["next.reward"] = np.append(own[1:], np.float32(0))
        if self.contract.episode.terminal is not None:
            # The last row as well: nothing follows it, and how an episode ended must not be lost.
            plain["next.done"] = np.append(columns["is_terminal"][1:], columns["is_terminal"][-1])
        vectors = {vector.key for vector in self.contract.vectors()}
        return plain | {
            name: values for name, values in columns.items() if name not in (*plain, *vectors, *_OURS)
        }

    def _write_meta(self, episodes: pa.Table) -> None:
        super()._write_meta(episodes)
        meta = self._aside / "meta"
        (meta / "d4.json").unlink()
        info = json.loads((meta / "info.json").read_text())
        info["features"] = plain_features(self.contract, info["features"])
        (meta / "info.json").write_text(json.dumps(info, indent=1))


def plain_features(contract: Contract, features: dict[str, Any]) -> dict[str, Any]:
    """The `features` of info.json without ours."""
    inputs = contract.vectors("input")
    names = [f"{vector.name}.{path}" for vector in inputs for path in vector.select]
    new: dict[str, Any] = {name: about for name, about in features.items() if about["dtype"] == "video"}
    if names:
        new[_STATE] = {"dtype": "float32", "shape": [len(names)], "names": names}
    new["action"] = features["action"]
    if contract.reward is not None:
        new["next.reward"] = {"dtype": "float32", "shape": [1], "names": None}
    if contract.episode.terminal is not None:
        new["next.done"] = {"dtype": "bool", "shape": [1], "names": None}
    gone = {*_OURS, *(vector.key for vector in contract.vectors())}
    return new | {name: about for name, about in features.items() if name not in (*gone, *new)}


def known_runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """The stretches [begin, end) of at least `MIN_TICKS` known actions."""
    edges = np.diff(mask.astype(np.int8), prepend=0, append=0)
    runs = zip(np.flatnonzero(edges == 1).tolist(), np.flatnonzero(edges == -1).tolist(), strict=True)
    return [(begin, end) for begin, end in runs if end - begin >= MIN_TICKS]


def write_plain(
    dataset: Dataset, numbers: list[int], out: Path, parts: Path, tick: Callable[[int], None]
) -> list[str]:
    """Write the episodes `numbers` to `out`, with `parts` for videos on their way; returns what was left out.

    Raises:
        UserError: no episode has known actions.
    """
    contract, kept, total = dataset.contract, 0, 0
    with PlainWriter(out, contract) as writer:
        for number in numbers:
            columns = dataset.columns(number)
            runs = known_runs(columns["action_mask"])
            parts.mkdir(parents=True, exist_ok=True)
            for run, episode in enumerate(_episodes(dataset, number, columns, runs, parts)):
                writer.add_episode(episode)
                kept += runs[run][1] - runs[run][0]
            shutil.rmtree(parts)
            total += len(columns["action_mask"])
            tick(len(columns["action_mask"]))
        if not writer.episodes:
            raise UserError(
                f"{dataset.root} has no stretch of known actions, and a plain LeRobotDataset cannot mark "
                "an action as unknown; export it as mcap"
            )
    left = f"{total - kept} of {total} frames have no known action, or stand alone, and are left out"
    notes = [] if kept == total else [left]
    probes = [vector.name for vector in contract.vectors("probe")]
    return notes + ([f"probes are left out: {', '.join(probes)}"] if probes else [])


def _episodes(
    dataset: Dataset, number: int, columns: dict[str, np.ndarray], runs: list[tuple[int, int]], parts: Path
) -> list[Episode]:
    contract, size = dataset.contract, len(columns["action_mask"])
    videos = {camera.name: _videos(dataset, camera.name, number, runs, parts) for camera in contract.images}
    rows = {name: values.reshape(size, -1) for name, values in columns.items()}
    return [
        Episode(
            images={name: made[run] for name, made in videos.items()},
            action=rows["action"][begin:end],
            action_mask=columns["action_mask"][begin:end],
            reward=rows["reward"][begin:end],
            task_index=columns["task_index"][begin:end],
            is_terminal=columns["is_terminal"][begin:end],
            vectors={vector.name: rows[vector.key][begin:end] for vector in contract.vectors()},
        )
        for run, (begin, end) in enumerate(runs)
    ]


def _videos(
    dataset: Dataset, camera: str, number: int, runs: list[tuple[int, int]], parts: Path
) -> list[Video]:
    """The frames of each run as a video of its own."""
    size = next(image.size for image in dataset.contract.images if image.name == camera)
    assert size is not None
    videos: list[Video] = []
    frames = enumerate(dataset.frames(camera, number))
    for begin, end in runs:
        encoder = VideoEncoder(parts / f"{camera}-{begin}.mp4", dataset.contract.rate_hz, size)
        for place, frame in frames:
            if place >= begin:
                encoder.add(frame)
            if place == end - 1:
                break
        videos.append(encoder.close())
    return videos
