"""Videos, pictures and tables for tests of ingest without bags, each frame known by its pixels."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from d4_datasets.contract import Contract

SIZE = (8, 12)
RATE = 10


def contract(cameras: Sequence[str] = ("front",), size: tuple[int, int] = SIZE, **more: Any) -> Contract:
    """A robot whose base can be anywhere in +-100, and whose grip is a switch."""
    hold = {"strategy": "hold", "timeline": "receive"}
    raw = {
        "name": "toy",
        "rate_hz": RATE,
        "latency_ms": 40,
        "observations": [
            {
                "name": name, "topic": f"/{name}", "type": "sensor_msgs/msg/Image", "size": list(size),
                "align": {**hold, "tolerance_ms": 150},
            }
            for name in cameras
        ],
        "actions": [
            {
                "name": "base", "topic": "/cmd_vel", "type": "geometry_msgs/msg/Twist",
                "select": ["linear.x", "angular.z"], "low": [-100, -100], "high": [100, 100],
                "safety": "zeros", "align": {**hold, "tolerance_ms": 250},
            },
        ],
    }  # fmt: skip
    return Contract.from_dict(raw | more)


GRIP = {
    "name": "grip", "topic": "/grip", "type": "std_msgs/msg/Bool", "select": ["data"], "kind": "binary",
    "safety": "hold", "align": {"strategy": "hold", "timeline": "receive"},
}  # fmt: skip


def picture(k: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Frame number `k`."""
    return np.random.default_rng(k).integers(0, 256, (*size, 3), np.uint8)


def write_video(
    path: Path,
    frames: Sequence[np.ndarray],
    stamps_ms: Sequence[int] | None = None,
    codec: str = "libx264rgb",
    pixels: str = "rgb24",
    turn: dict[str, Any] | None = None,
    **options: str,
) -> Path:
    """Write frames at their times (default: every 100 ms), without loss unless `codec` has some."""
    if codec.startswith("libx264"):
        options = {"crf": "0", "preset": "ultrafast", **options}
    stamps = [100 * k for k in range(len(frames))] if stamps_ms is None else stamps_ms
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, options=options)
        if frames:
            stream.height, stream.width = frames[0].shape[:2]
        else:
            stream.height, stream.width = SIZE
        stream.pix_fmt = pixels
        if path.suffix != ".avi":
            stream.codec_context.time_base = Fraction(1, 1000)
        if turn is not None:
            stream.set_display_rotation(**turn)
        for rgb, stamp in zip(frames, stamps, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
            unit = 100 if path.suffix == ".avi" else 1
            frame.pts, frame.time_base = stamp // unit, Fraction(unit, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows as CSV, JSONL or Parquet, by the suffix; None is an empty cell."""
    names = list(dict.fromkeys(name for row in rows for name in row)) or ["time"]
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(names)
            for row in rows:
                writer.writerow(["" if row.get(name) is None else row[name] for name in names])
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), path)
    return path


def write_pictures(folder: Path, frames: dict[str, np.ndarray]) -> Path:
    """Write pictures under their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rgb in frames.items():
        cv2.imwrite(str(folder / name), cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))
    return folder
