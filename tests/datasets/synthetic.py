"""A small dataset made of known frames, written straight with PyArrow and PyAV, so that tests can plant any
fault."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from d4_datasets.contract import Contract

CAMERA = "observation.images.cam"


def contract(size: tuple[int, int] = (16, 24), tasks: tuple[str, ...] = ("left", "right")) -> dict[str, Any]:
    """A robot with one camera, a probe and two continuous actions, as plain data."""
    align = {"strategy": "hold", "timeline": "header", "tolerance_ms": 150}
    return {
        "name": "toy",
        "rate_hz": 10,
        "latency_ms": 40,
        "observations": [
            {
                "name": "cam",
                "topic": "/cam",
                "type": "sensor_msgs/msg/Image",
                "size": list(size),
                "align": align,
            },
            {
                "name": "pose",
                "topic": "/pose",
                "type": "geometry_msgs/msg/PoseStamped",
                "select": ["pose.position.x", "pose.position.y"],
                "units": ["m", "m"],
                "role": "probe",
                "align": align,
            },
        ],
        "actions": [
            {
                "name": "base",
                "topic": "/cmd_vel",
                "type": "geometry_msgs/msg/Twist",
                "select": ["linear.x", "linear.y"],
                "units": ["m/s", "m/s"],
                "low": [-1.0, -1.0],
                "high": [1.0, 1.0],
                "safety": "zeros",
                "align": align,
            }
        ],
        "tasks": {"topic": "/task", "type": "std_msgs/msg/String", "select": "data", "names": list(tasks)},
    }


@dataclass
class Episode:
    """The frames of one episode; arrays have one row per frame and may be changed before `write`."""

    images: np.ndarray  # uint8 [L, H, W, 3]
    action: np.ndarray  # float32 [L, 2]
    mask: np.ndarray  # bool [L]
    reward: np.ndarray  # float32 [L, 2]
    pose: np.ndarray  # float32 [L, 2]
    terminal: bool = False
    task: int = 0
    provenance: dict[str, Any] = field(default_factory=dict)


def episode(length: int, seed: int = 0, labelled: bool = True, size: tuple[int, int] = (16, 24)) -> Episode:
    """A white square that moves by the action, `pose` being its place, over a fixed background."""
    rng = np.random.default_rng(seed)
    action = rng.uniform(-1, 1, (length, 2)).astype(np.float32)
    pose = np.clip(np.cumsum(np.vstack([np.full((1, 2), 0.5), action[:-1] * 0.15]), 0), 0.0, 1.0).astype(
        np.float32
    )
    images = np.empty((length, *size, 3), np.uint8)
    images[:] = rng.integers(40, 120, (*size, 3), np.uint8)
    for t, (x, y) in enumerate(pose):
        row, column = int(y * (size[0] - 4)), int(x * (size[1] - 4))
        images[t, row : row + 4, column : column + 4] = 255
        images[t, 0, 0] = (t % 256, seed % 256, t // 256)  # no two frames are alike
    mask = np.full(length, labelled)
    return Episode(images, action * mask[:, None], mask, np.zeros((length, 2), np.float32), pose)


def write(root: Path, episodes: list[Episode], spec: dict[str, Any] | None = None, fps: float = 10) -> Path:
    """Write the episodes as a dataset folder (one Parquet file, one video per pair of episodes)."""
    spec = spec or contract()
    parsed = Contract.from_dict(spec)
    for folder in ("meta/episodes/chunk-000", "data/chunk-000", f"videos/{CAMERA}/chunk-000"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for number in range(0, len(episodes), 2):
        _write_video(
            root / f"videos/{CAMERA}/chunk-000/file-{number // 2:03d}.mp4", episodes[number : number + 2], fps
        )
    pq.write_table(_rows(episodes, fps), root / "data/chunk-000/file-000.parquet")
    pq.write_table(_episode_table(episodes, fps), root / "meta/episodes/chunk-000/file-000.parquet")
    frames = sum(len(e.mask) for e in episodes)
    info = {
        "codebase_version": "v3.0",
        "fps": fps,
        "total_episodes": len(episodes),
        "total_frames": frames,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": {},
    }
    (root / "meta/info.json").write_text(json.dumps(info))
    provenance = [
        {
            "source": f"bag-{number}",
            "start_ns": 0,
            "frames": len(e.mask),
            "labelled": int(e.mask.sum()),
            "stale": 0,
            "terminal": e.terminal,
            "dropped": 0,
        }
        | e.provenance
        for number, e in enumerate(episodes)
    ]
    d4 = {"format": 1, "contract": spec, "contract_hash": parsed.hash, "episodes": provenance}
    (root / "meta/d4.json").write_text(json.dumps(d4))
    return root


def _write_video(path: Path, episodes: list[Episode], fps: float) -> None:
    with av.open(str(path), "w") as container:
        height, width = episodes[0].images.shape[1:3]
        stream = container.add_stream(
            "libx264rgb", rate=round(fps), options={"crf": "0", "g": "8", "bf": "0"}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "rgb24"
        for image in np.concatenate([e.images for e in episodes]):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def _rows(episodes: list[Episode], fps: float) -> pa.Table:
    length = [len(e.mask) for e in episodes]
    frame = np.concatenate([np.arange(n) for n in length] or [np.zeros(0, np.int64)])
    last = np.concatenate([np.arange(n) == n - 1 for n in length] or [np.zeros(0, bool)])
    ends = np.repeat([e.terminal for e in episodes], length).astype(bool)
    total = len(frame)

    def vectors(name: str) -> pa.Array:
        values = np.concatenate([getattr(e, name) for e in episodes] or [np.zeros((0, 2), np.float32)])
        flat = pa.array(values.astype(np.float32).ravel())
        return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])

    return pa.table(
        {
            "action": vectors("action"),
            "reward": vectors("reward"),
            "observation.pose": vectors("pose"),
            "action_mask": np.concatenate([e.mask for e in episodes] or [np.zeros(0, bool)]),
            "task_index": np.repeat([e.task for e in episodes], length).astype(np.int64),
            "is_first": frame == 0,
            "is_last": last,
            "is_terminal": last & ends,
            "timestamp": (frame / fps).astype(np.float32),
            "frame_index": frame.astype(np.int64),
            "episode_index": np.repeat(np.arange(len(episodes)), length).astype(np.int64),
            "index": np.arange(total, dtype=np.int64),
        }
    )


def _episode_table(episodes: list[Episode], fps: float) -> pa.Table:
    length = np.array([len(e.mask) for e in episodes], np.int64)
    end = np.cumsum(length)
    number = np.arange(len(episodes))
    # Videos hold two episodes each, the second begins where the first ends.
    begin = np.where(number % 2 == 1, np.roll(length, 1), 0)
    return pa.table(
        {
            "episode_index": number,
            "length": length,
            "dataset_from_index": end - length,
            "dataset_to_index": end,
            f"videos/{CAMERA}/chunk_index": np.zeros(len(episodes), np.int64),
            f"videos/{CAMERA}/file_index": number // 2,
            f"videos/{CAMERA}/from_timestamp": begin / fps,
            f"videos/{CAMERA}/to_timestamp": (begin + length) / fps,
        }
    )
