"""One pass over a dataset, an episode at a time: the counts that `d4-audit` judges.

Nothing grows with the number of frames but a bounded sample of motion, from which the delay between action
and picture is estimated.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from d4_datasets.contract import Contract
from d4_datasets.windows import Windows

_CHUNK = 256  # frames compared at once
_DARK = 10.0  # mean brightness (of 255) below which a frame shows nothing
_LAGS = range(-3, 9)  # frames
_LAG_FRAMES = 20_000  # enough to estimate a lag; more would only cost time


@dataclass(frozen=True)
class EpisodeRow:
    """What is in one episode.

    `repeated` counts frames equal to the one before (the worst camera) and `longest_repeat` the longest run
    of equal frames; `stale` counts ticks that had to hold the frame of the tick before, `dropped` ticks of
    the recording that lacked an observation; `gap_s` are the seconds since the episode before it in the same
    recording; `copy_of` is an earlier episode with the same frames and actions.
    """

    episode: int
    source: str
    frames: int
    seconds: float
    labelled: int
    stale: int
    dropped: int
    gap_s: float | None
    repeated: int
    longest_repeat: int
    dark: int
    terminal: bool
    tasks: list[str]
    returns: list[float]
    copy_of: int | None = None


@dataclass
class ActionStats:
    """Running statistics of the labelled actions, one entry per component (A)."""

    contract: Contract
    count: int = 0
    steps: int = 0

    def __post_init__(self) -> None:
        dim = self.contract.action_dim
        self.low, self.high = self.contract.action_low, self.contract.action_high
        self.slack = 1e-4 * (self.high - self.low)  # float32 and unit conversions
        self.discrete = np.array([c.kind != "continuous" for c in self.contract.actions for _ in c.select])
        self.max_rate = np.array(
            [r for c in self.contract.actions for r in (c.max_rate or (np.inf,) * c.dim)], np.float64
        )
        self.minimum, self.maximum = np.full(dim, np.inf), np.full(dim, -np.inf)
        self.sum, self.square = np.zeros(dim), np.zeros(dim)
        self.outside, self.at_limit, self.too_fast = (np.zeros(dim, np.int64) for _ in range(3))

    def add(self, action: np.ndarray, mask: np.ndarray) -> None:
        """Take in the actions [L, A] of one episode."""
        known = mask & np.isfinite(action).all(1)
        step = np.abs(np.diff(action, axis=0)) * self.contract.rate_hz
        both = known[1:] & known[:-1]
        self.too_fast += (step[both] > 1.001 * self.max_rate).sum(0)
        self.steps += int(both.sum())
        value = action[known].astype(np.float64)
        if not len(value):
            return
        self.count += len(value)
        self.minimum = np.minimum(self.minimum, value.min(0))
        self.maximum = np.maximum(self.maximum, value.max(0))
        self.sum += value.sum(0)
        self.square += (value**2).sum(0)
        bad = (value < self.low - self.slack) | (value > self.high + self.slack)
        bad |= self.discrete & (value != np.round(value))
        self.outside += bad.sum(0)
        self.at_limit += ((value <= self.low + self.slack) | (value >= self.high - self.slack)).sum(0)

    def table(self) -> dict[str, dict[str, Any]]:
        """Per component name; shares are of the labelled frames."""
        if not self.count:
            return {}
        mean = self.sum / self.count
        std = np.sqrt(np.maximum(self.square / self.count - mean**2, 0.0))
        return {
            name: {
                "min": float(self.minimum[i]), "max": float(self.maximum[i]),
                "mean": float(mean[i]), "std": float(std[i]),
                "low": float(self.low[i]), "high": float(self.high[i]),
                "outside": int(self.outside[i]), "at_limit": self.at_limit[i] / self.count,
                "over_max_rate": self.too_fast[i] / max(self.steps, 1),
                "constant": bool(self.maximum[i] - self.minimum[i] <= self.slack[i]),
            }
            for i, name in enumerate(self.contract.action_names)
        }  # fmt: skip


class Scan:
    """The pass: per-episode rows, and running statistics of cameras, actions and motion."""

    def __init__(self, windows: Windows, provenance: list[dict[str, Any]]) -> None:
        self.windows = windows
        self.provenance = provenance + [{}] * (len(windows.episode_start) - len(provenance))
        self.actions = ActionStats(windows.contract)
        self.rows: list[EpisodeRow] = []
        self.camera = {name: {"repeated": 0, "longest": 0, "dark": 0, "pairs": 0} for name in windows.images}
        self.task_frames = np.zeros(len(windows.contract.task_names), np.int64)
        self.task_episodes = np.zeros_like(self.task_frames)
        self.unknown_tasks = 0
        self.motion: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._motion_frames = 0
        self._seen: dict[bytes, int] = {}

    def run(self) -> None:
        """Go through all episodes."""
        for episode in range(len(self.windows.episode_start)):
            self.rows.append(self._episode(episode))

    def _episode(self, number: int) -> EpisodeRow:
        windows, source = self.windows, self.provenance[number]
        begin = int(windows.episode_start[number])
        rows = slice(begin, begin + int(windows.episode_length[number]))
        action, mask = np.asarray(windows.action[rows]), np.asarray(windows.action_mask[rows])
        self.actions.add(action, mask)
        digest = hashlib.blake2b(action.tobytes(), digest_size=16)
        if windows.latents is not None:
            digest.update(windows.latents[rows].tobytes())
        repeated = longest = dark = 0
        for name, frames in windows.images.items():
            motion, brightness = _look(frames[rows], digest)
            still, gloom = motion == 0, int((brightness < _DARK).sum())
            run = _longest_run(still)
            self._count_camera(name, still, run, gloom)
            repeated, longest, dark = max(repeated, int(still.sum())), max(longest, run), max(dark, gloom)
            if name == next(iter(windows.images)):
                self._keep_motion(motion, action, mask)
        copy = self._seen.setdefault(digest.digest(), number)
        return EpisodeRow(
            episode=number,
            source=str(source.get("source", "")),
            frames=len(mask),
            seconds=len(mask) / windows.contract.rate_hz,
            labelled=int(mask.sum()),
            stale=int(source.get("stale", 0)),
            dropped=int(source.get("dropped", 0)),
            gap_s=self._gap(number),
            repeated=repeated,
            longest_repeat=longest,
            dark=dark,
            terminal=bool(windows.is_terminal[rows].any()),
            tasks=self._tasks(np.asarray(windows.task_index[rows])),
            returns=[
                round(float(r), 6) for r in np.nan_to_num(windows.reward[rows]).sum(0, dtype=np.float64)
            ],
            copy_of=copy if copy != number else None,
        )

    def _count_camera(self, name: str, still: np.ndarray, run: int, dark: int) -> None:
        camera = self.camera[name]
        camera["repeated"] += int(still.sum())
        camera["pairs"] += len(still)
        camera["longest"] = max(camera["longest"], run)
        camera["dark"] += dark

    def _keep_motion(self, motion: np.ndarray, action: np.ndarray, mask: np.ndarray) -> None:
        if self._motion_frames < _LAG_FRAMES and mask.any() and np.isfinite(action).all():
            self.motion.append((motion, action, mask))
            self._motion_frames += len(mask)

    def _tasks(self, task: np.ndarray) -> list[str]:
        """Count the tasks of an episode and name them."""
        names = self.windows.contract.task_names
        known = (task >= 0) & (task < len(names))
        self.unknown_tasks += int((~known).sum())
        counts = np.bincount(task[known], minlength=len(names))
        self.task_frames += counts
        self.task_episodes += counts > 0
        return [names[i] for i in np.flatnonzero(counts)]

    def _gap(self, number: int) -> float | None:
        """Seconds without data since the episode before it, None where that is another recording."""
        here, before = self.provenance[number], self.provenance[number - 1] if number else {}
        if not here.get("source") or here["source"] != before.get("source"):
            return None
        if not {"start_ns", "frames"} <= before.keys() or "start_ns" not in here:
            return None
        end = before["start_ns"] + before["frames"] * self.windows.contract.period_ns
        return round((here["start_ns"] - end) / 1e9, 3)


def _look(frames: np.ndarray, digest: hashlib.blake2b) -> tuple[np.ndarray, np.ndarray]:
    """Mean absolute change from each frame to the next [L-1], and brightness [L]; feeds `digest` with the
    frames.

    The change is 0 exactly where two frames are equal.
    """
    length = len(frames)
    motion, brightness = np.empty(max(length - 1, 0), np.float32), np.empty(length, np.float32)
    for begin in range(0, length, _CHUNK):
        # One more frame, so that the chunks' ends are compared too.
        flat = np.ascontiguousarray(frames[begin : begin + _CHUNK + 1]).reshape(-1, frames[0].size)
        own = flat[:_CHUNK]
        digest.update(own.data)
        brightness[begin : begin + len(own)] = own.mean(1)
        if len(flat) > 1:
            motion[begin : begin + len(flat) - 1] = cv2.absdiff(flat[1:], flat[:-1]).mean(1)
    return motion, brightness


def _longest_run(still: np.ndarray) -> int:
    """Length in frames of the longest run of equal frames; 0 where no two neighbours are equal."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], still, [False]]).astype(np.int8)))
    return int((edges[1::2] - edges[::2]).max()) + 1 if len(edges) else 0


def estimate_lag(
    episodes: list[tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> tuple[int, dict[int, float]] | None:
    """Find by how many frames the picture follows the action.

    For every lag k, the motion of the picture (one number per pair of frames) is explained from the action
    chosen k frames before and its square, by least squares; the lag that explains most is the answer. A lag
    of 0 means that a_t shows in the change from frame t to t+1.

    Args:
        episodes: (motion [L-1], action [L, A], mask [L]) per episode.

    Returns:
        (lag, {lag: multiple correlation 0..1}), or None where there is too little or too constant data.
    """
    curve: dict[int, float] = {}
    for lag in _LAGS:
        pairs = [_at_lag(*episode, lag) for episode in episodes]
        motion = np.concatenate([m for m, _ in pairs] or [np.zeros(0)]).astype(np.float64)
        action = np.concatenate([a for _, a in pairs] or [np.zeros((0, 1))]).astype(np.float64)
        features = np.concatenate([action, action**2], 1)
        if len(motion) < 50 * features.shape[1]:
            return None
        features, motion = features - features.mean(0), motion - motion.mean()
        if not motion.any() or not features.any():
            return None
        fit = features @ np.linalg.lstsq(features, motion, rcond=None)[0]
        curve[lag] = float(np.sqrt((fit**2).mean()) / motion.std())
    return max(curve, key=lambda lag: curve[lag]), curve


def _at_lag(
    motion: np.ndarray, action: np.ndarray, mask: np.ndarray, lag: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (motion at t, action at t - lag) of the frames where both are there."""
    t = np.arange(max(lag, 0), max(min(len(motion), len(motion) + lag), 0))
    t = t[mask[t - lag]]
    return motion[t], action[t - lag]
