"""What all checks share: an episode as they see it, and verdicts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from d4_datasets.contract import Contract

SHORT = 16  # frames; shorter episodes mostly pad the windows they are in


@dataclass(frozen=True)
class Verdict:
    """One line of judgement: level is OK, WARN or ERROR; `hint` says what to do about it."""

    level: str
    check: str
    message: str
    hint: str = ""


def ok(check: str, message: str) -> Verdict:
    """Nothing to do."""
    return Verdict("OK", check, message)


def warn(check: str, message: str, hint: str) -> Verdict:
    """A person should look at this."""
    return Verdict("WARN", check, message, hint)


def error(check: str, message: str, hint: str) -> Verdict:
    """A model trained on this would learn something false."""
    return Verdict("ERROR", check, message, hint)


class Look(NamedTuple):
    """What was seen of one camera in one episode of L frames.

    Attributes:
        motion: float32 [L - 1], mean absolute change from each frame to the next (of 255); 0 exactly where
            the two are equal.
        brightness: float32 [L], mean over the pixels.
        contrast: float32 [L], standard deviation over the pixels.
        checksum: of all pixels.
    """

    motion: np.ndarray
    brightness: np.ndarray
    contrast: np.ndarray
    checksum: int = 0


@dataclass(frozen=True)
class Part:
    """One episode of L frames, as the checks see it.

    Attributes:
        number, first: its id, and the global index of its first frame.
        action, mask, reward, terminal, task: its columns, [L, A], [L], [L, K], [L], [L].
        looks: per camera what was seen; empty for a dataset of latents.
        images: per camera uint8 [L, H, W, 3], mapped, not loaded.
        origin: its entry in meta/d4.json, empty where another program wrote the dataset.
    """

    contract: Contract
    number: int
    first: int
    action: np.ndarray
    mask: np.ndarray
    reward: np.ndarray
    terminal: np.ndarray
    task: np.ndarray
    looks: dict[str, Look] = field(default_factory=dict)
    images: dict[str, np.ndarray] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)

    @property
    def frames(self) -> int:
        """L."""
        return len(self.mask)


def runs(flags: np.ndarray) -> np.ndarray:
    """Where `flags` [n] is True without a break: int64 [R, 2], begin and end (exclusive) of each run."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return edges.reshape(-1, 2)


def longest_run(flags: np.ndarray) -> tuple[int, int]:
    """(length, begin) of the longest run of True in `flags` [n]; (0, 0) where there is none."""
    found = runs(flags)
    if not len(found):
        return 0, 0
    length = found[:, 1] - found[:, 0]
    best = int(length.argmax())
    return int(length[best]), int(found[best, 0])


def size_text(count: float) -> str:
    """Bytes for people: 1.23 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
