"""One pass over a dataset, an episode at a time: the counts that `d4-audit` judges.

Frames are read once, in pieces of a few megabytes, through the memory map of the frame cache. What is kept is
a row per episode, a bounded sample of motion and a few hundred numbers per subject, so a dataset may be
larger than the memory.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from d4_datasets.checks.actions import Actions
from d4_datasets.checks.base import Look, Part
from d4_datasets.checks.cameras import Cameras, look
from d4_datasets.checks.labels import Labels
from d4_datasets.checks.lag import Lag
from d4_datasets.checks.rewards import Rewards
from d4_datasets.checks.times import Times
from d4_datasets.windows import Windows

_MOMENTS = 200  # points of the curves along the dataset


@dataclass(frozen=True)
class EpisodeRow:
    """What is in one episode.

    `unlabelled_run` is its longest stretch of frames without a known action. `repeated` counts frames equal
    to the one before and `longest_repeat` the longest run of equal frames, `dark` frames too dark to see
    anything and `flat` those of a single colour (of the worst camera each); `stale` counts ticks that had to
    hold the frame of the tick before, `dropped` ticks of the recording that lacked an observation; `gap_s`
    are the seconds since the episode before it in the same recording; `copy_of` is an earlier episode with
    the same frames and actions.
    """

    episode: int
    source: str
    frames: int
    seconds: float
    labelled: int
    unlabelled_run: int
    stale: int
    dropped: int
    gap_s: float | None
    repeated: int
    longest_repeat: int
    dark: int
    flat: int
    terminal: bool
    tasks: list[str]
    returns: list[float]
    copy_of: int | None = None


class Along:
    """Curves along the dataset: means of brightness and motion per camera, and of labels, over equal
    parts.
    """

    def __init__(self, frames: int, cameras: list[str]) -> None:
        self.edges = np.unique(np.linspace(0, frames, min(frames, _MOMENTS) + 1).astype(np.int64))
        names = ["labels", *(f"{what}/{name}" for name in cameras for what in ("brightness", "motion"))]
        self.sums = {name: np.zeros(len(self.edges) - 1) for name in names}

    def add(self, part: Part) -> None:
        """Take in one episode."""
        index = np.searchsorted(self.edges, part.first + np.arange(part.frames), side="right") - 1
        np.add.at(self.sums["labels"], index, part.mask)
        for name, seen in part.looks.items():
            np.add.at(self.sums[f"brightness/{name}"], index, seen.brightness)
            np.add.at(self.sums[f"motion/{name}"], index[:-1], seen.motion)

    def table(self) -> dict[str, list[float]]:
        """By name the means, in order of the frames."""
        return {name: (sums / np.diff(self.edges)).round(4).tolist() for name, sums in self.sums.items()}


class Scan:
    """The pass: a row per episode, and the counts of every subject.

    Args: provenance: the entries of the episodes in meta/d4.json. video_rate_hz: what the dataset says it
        runs at.
    """

    def __init__(self, windows: Windows, provenance: list[dict[str, Any]], video_rate_hz: float) -> None:
        self.windows = windows
        self.provenance = provenance + [{}] * (len(windows.episode_start) - len(provenance))
        contract, cameras = windows.contract, list(windows.images)
        labelled = np.add.reduceat(windows.action_mask, windows.episode_start, dtype=np.int64)
        self.actions, self.labels = Actions(contract), Labels(contract)
        self.cameras, self.times = Cameras(contract, cameras), Times(contract, video_rate_hz)
        self.rewards = Rewards(contract, windows.reward.shape[1])
        self.lag = Lag(contract, cameras, windows.episode_length, labelled)
        self.along = Along(windows.num_frames, cameras)
        self.rows: list[EpisodeRow] = []
        self._seen: dict[bytes, int] = {}

    def run(self) -> None:
        """Go through all episodes."""
        for episode in range(len(self.windows.episode_start)):
            self.rows.append(self._episode(episode))

    def _part(self, number: int) -> tuple[Part, bytes]:
        """An episode as the checks see it, and what tells its frames and actions from those of others."""
        windows = self.windows
        begin = int(windows.episode_start[number])
        rows = slice(begin, begin + int(windows.episode_length[number]))
        action = np.asarray(windows.action[rows])
        digest = hashlib.blake2b(action.tobytes(), digest_size=16)
        if windows.latents is not None:
            digest.update(windows.latents[rows].tobytes())
        images = {name: frames[rows] for name, frames in windows.images.items()}
        looks: dict[str, Look] = {name: look(frames) for name, frames in images.items()}
        for seen in looks.values():
            digest.update(seen.motion.tobytes() + seen.brightness.tobytes() + str(seen.checksum).encode())
        columns = (windows.action_mask, windows.reward, windows.is_terminal, windows.task_index)
        mask, reward, terminal, task = (np.asarray(column[rows]) for column in columns)
        part = Part(
            windows.contract, number, begin, action, mask, reward, terminal, task, looks, images,
            self.provenance[number],
        )  # fmt: skip
        return part, digest.digest()

    def _episode(self, number: int) -> EpisodeRow:
        part, digest = self._part(number)
        self.actions.add(part)
        self.lag.add(part)
        self.along.add(part)
        unlabelled, gap = self.labels.add(part), self.times.add(part)
        tasks, returns = self.rewards.add(part)
        copy = self._seen.setdefault(digest, number)
        return EpisodeRow(
            episode=number,
            source=str(part.origin.get("source", "")),
            frames=part.frames,
            seconds=part.frames / part.contract.rate_hz,
            labelled=int(part.mask.sum()),
            unlabelled_run=unlabelled,
            stale=int(part.origin.get("stale", 0)),
            dropped=int(part.origin.get("dropped", 0)),
            gap_s=gap,
            **self.cameras.add(part),
            terminal=bool(part.terminal.any()),
            tasks=tasks,
            returns=returns,
            copy_of=copy if copy != number else None,
        )
