"""A robot whose camera pans over a textured wall as it is told, so that any fault of timing can be planted:
as a dataset, and as a bag."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import synthetic

from d4_datasets.bags import BagWriter, compressed_image, new
from d4_datasets.contract import Contract

T0 = 1_700_000_000_000_000_000
MS = 1_000_000
TICK = 100 * MS
SIZE = (32, 48)

_rng = np.random.default_rng(7)
_WALL = cv2.GaussianBlur(_rng.integers(0, 256, (96, 160, 3), np.uint8), (0, 0), 2.5)
_WALL = cv2.normalize(_WALL, None, 20, 235, cv2.NORM_MINMAX)


def commands(frames: int, seed: int = 0, smooth: float = 0.0) -> np.ndarray:
    """Commands float32 [frames, 2] within -1..1; `smooth` (0..1) is how much of a command the next one
    keeps."""
    rng = np.random.default_rng(seed)
    action = np.zeros((frames, 2))
    for t, noise in enumerate(rng.normal(0, 0.45 * np.sqrt(1 - smooth**2), (frames, 2))):
        action[t] = smooth * action[t - 1] + noise if t else noise
    return np.clip(action, -0.95, 0.95).astype(np.float32)


def pan(action: np.ndarray, lag: int = 0, seed: int = 0) -> np.ndarray:
    """What the camera sees, uint8 [frames, 32, 48, 3]: from t to t+1 it pans by the command of t - lag.

    Pixels are noisy, so that no two frames are alike.
    """
    rng = np.random.default_rng([seed, 99])
    moved = np.roll(action, lag, 0)
    place = np.cumsum(np.concatenate([np.zeros((1, 2)), 2.5 * moved[:-1]]), 0)
    place -= place.mean(0)
    images = np.empty((len(action), *SIZE, 3), np.uint8)
    for t, (x, y) in enumerate(place):
        # The wall repeats itself as in a mirror, so that the camera never leaves it.
        shift = np.array([[1, 0, -56 - x], [0, 1, -32 - y]], np.float64)
        view = cv2.warpAffine(_WALL, shift, SIZE[::-1], borderMode=cv2.BORDER_REFLECT)
        images[t] = np.clip(view + rng.normal(0, 2, view.shape), 0, 255)
    return images


def spec(**changes: Any) -> dict[str, Any]:
    """The contract of the panning camera: 10 Hz, 40 ms."""
    return synthetic.contract(size=SIZE, tasks=("left",)) | changes


def episode(frames: int = 120, lag: int = 0, seed: int = 0, smooth: float = 0.0) -> synthetic.Episode:
    """An episode of the panning camera, with a reward at its end."""
    action = commands(frames, seed, smooth)
    reward = np.zeros((frames, 1), np.float32)
    reward[-1] = 1
    pose = np.zeros((frames, 2), np.float32)
    return synthetic.Episode(pan(action, lag, seed), action, np.ones(frames, bool), reward, pose)


def contract() -> Contract:
    """For bags: camera by header stamps, commands by reception, as the real ones."""
    raw = spec()
    raw["observations"] = [{**raw["observations"][0], "type": "sensor_msgs/msg/CompressedImage"}]
    raw["actions"][0]["align"] = {"strategy": "hold", "timeline": "receive", "tolerance_ms": 250}
    del raw["tasks"]
    return Contract.from_dict(raw | {"episode": {"max_s": 10}})


class Bag:
    """A recording of the panning camera in the making; `captured` (ns) and `stamps` may be changed, frames be
    left out (`keep`), before it is written.
    """

    def __init__(self, frames: int = 300, period: int = TICK, seed: int = 0) -> None:
        self.captured = T0 + np.arange(frames) * period
        self.stamps = self.captured.copy()
        self.action = commands(frames, seed)
        self.images = pan(self.action, 0, seed)
        self.keep = np.ones(frames, bool)
        self.keep_command = np.ones(frames, bool)

    def write(self, path: Path) -> Path:
        """Write it as a rosbag2 recording."""
        items: list[tuple[int, str, str, Any]] = []
        for k in np.flatnonzero(self.keep):
            picture = compressed_image(self.images[k], int(self.stamps[k]))
            items.append((int(self.captured[k]) + 3 * MS, "/cam", "sensor_msgs/msg/CompressedImage", picture))
        for k in np.flatnonzero(self.keep_command):
            msg = new("geometry_msgs/msg/Twist")
            msg.linear.x, msg.linear.y = map(float, self.action[k])
            items.append((int(self.captured[k]) + 40 * MS, "/cmd_vel", "geometry_msgs/msg/Twist", msg))
        with BagWriter(path) as writer:
            for time, topic, kind, msg in sorted(items, key=lambda item: item[0]):
                writer.write(topic, kind, time, msg)
        return path
