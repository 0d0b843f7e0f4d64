"""LeRobotDatasets as others write them, v2.1 and v3.0, of known rows and frames, so that tests can plant any
fault."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

TOP = "observation.images.top"
DATA_V3 = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_V3 = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
DATA_V2 = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
VIDEO_V2 = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"

Rows = dict[str, Any]  # features by name, and "task"


def episode(length: int, seed: int = 0, size: tuple[int, int] = (8, 12), task: str = "lift it") -> Rows:
    """Rows of an arm with four joints and one camera."""
    rng = np.random.default_rng(seed)
    return {
        TOP: rng.integers(0, 256, (length, *size, 3), np.uint8),
        "observation.state": rng.uniform(-1, 1, (length, 4)).astype(np.float32),
        "action": rng.uniform(-1, 1, (length, 4)).astype(np.float32),
        "next.reward": rng.uniform(size=(length, 1)).astype(np.float32),
        "next.done": (np.arange(length) == length - 1)[:, None],
        "task": task,
    }


def write(
    root: Path,
    episodes: Sequence[Rows],
    version: str = "v3.0",
    fps: float = 10,
    names: Any = None,
    kind: str = "video",
    per_file: int = 2,
    codec: str = "libx264rgb",
) -> Path:
    """Write the episodes as a dataset; `names` of state and action, `kind` of the camera's feature."""
    tasks = list(dict.fromkeys(rows["task"] for rows in episodes))
    is_v3 = version == "v3.0"
    per_file = per_file if is_v3 else 1
    listed, first = [], 0
    for begin in range(0, len(episodes), per_file):
        part = episodes[begin : begin + per_file]
        place = {"chunk_index": begin // per_file // 3, "file_index": begin // per_file % 3}
        place |= {"episode_chunk": begin // 3, "episode_index": begin, "video_key": TOP}
        if kind == "video":
            frames = np.concatenate([rows[TOP] for rows in part])
            _video(root / (VIDEO_V3 if is_v3 else VIDEO_V2).format(**place), frames, fps, codec)
        table = _table(part, begin, first, tasks, fps, kind)
        path = root / (DATA_V3 if is_v3 else DATA_V2).format(**place)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
        seconds = 0.0
        for number, rows in enumerate(part, begin):
            length = len(rows["action"])
            about: Rows = {"episode_index": number, "tasks": [rows["task"]], "length": length}
            if is_v3:
                index = {name: place[name] for name in ("chunk_index", "file_index")}
                about |= {f"data/{name}": value for name, value in index.items()}
                about |= {"dataset_from_index": first, "dataset_to_index": first + length}
                if kind == "video":
                    about |= {f"videos/{TOP}/{name}": value for name, value in index.items()}
                    about |= {f"videos/{TOP}/from_timestamp": seconds}
                    about |= {f"videos/{TOP}/to_timestamp": seconds + length / fps}
            listed.append(about)
            first, seconds = first + length, seconds + length / fps
    _metadata(root, version, listed, tasks, info(episodes[0], version, fps, names, kind))
    return root


def info(rows: Rows, version: str, fps: float, names: Any, kind: str) -> Rows:
    """The content of info.json."""
    features: Rows = {}
    for name, values in rows.items():
        if name == TOP:
            features[name] = {"dtype": kind, "shape": [*values.shape[1:]], "names": ["h", "w", "c"]}
        elif name != "task":
            named = names if name in ("observation.state", "action") else None
            features[name] = {"dtype": str(values.dtype), "shape": [values.shape[1]], "names": named}
    for name in ("timestamp", "frame_index", "episode_index", "index", "task_index"):
        features[name] = {"dtype": "int64", "shape": [1], "names": None}
    is_v3 = version == "v3.0"
    return {
        "codebase_version": version,
        "fps": fps,
        "chunks_size": 3,
        "data_path": DATA_V3 if is_v3 else DATA_V2,
        "video_path": (VIDEO_V3 if is_v3 else VIDEO_V2) if kind == "video" else None,
        "features": features,
    }


def _metadata(root: Path, version: str, listed: list[Rows], tasks: list[str], info: Rows) -> None:
    meta = root / "meta"
    meta.mkdir(parents=True, exist_ok=True)
    (meta / "info.json").write_text(json.dumps(info))
    if version == "v3.0":
        (meta / "episodes/chunk-000").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(listed), meta / "episodes/chunk-000/file-000.parquet")
        # As pandas writes an index without a name.
        pq.write_table(
            pa.table({"task_index": range(len(tasks)), "__index_level_0__": tasks}), meta / "tasks.parquet"
        )
    else:
        lines = [json.dumps({"task_index": i, "task": task}) for i, task in enumerate(tasks)]
        (meta / "tasks.jsonl").write_text("\n".join(lines) + "\n")
        (meta / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))


def _video(path: Path, frames: np.ndarray, fps: float, codec: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exact = codec == "libx264rgb"
    with av.open(str(path), "w") as container:
        options = {"crf": "0", "g": "4", "bf": "0"} if exact else {"crf": "12", "g": "250", "bf": "2"}
        stream = container.add_stream(codec, rate=round(fps), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "rgb24" if exact else "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _table(part: Sequence[Rows], begin: int, first: int, tasks: list[str], fps: float, kind: str) -> pa.Table:
    """The rows of the episodes of one file."""
    length = [len(rows["action"]) for rows in part]
    frame = np.concatenate([np.arange(n) for n in length])
    columns: Rows = {}
    for name in part[0]:
        if name == "task" or (name == TOP and kind == "video"):
            continue
        values = np.concatenate([rows[name] for rows in part])
        if name == TOP:
            cells = [{"bytes": _png(picture), "path": f"frame-{i}.png"} for i, picture in enumerate(values)]
            columns[name] = pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        else:  # lists without a fixed length, and single numbers bare
            columns[name] = pa.array(values.tolist() if values.shape[1] > 1 else values[:, 0])
    columns |= {
        "timestamp": (frame / fps).astype(np.float32),
        "frame_index": frame,
        "episode_index": np.repeat(np.arange(begin, begin + len(part)), length),
        "index": first + np.arange(len(frame)),
        "task_index": np.repeat([tasks.index(rows["task"]) for rows in part], length),
    }
    return pa.table(columns)


def _png(picture: np.ndarray) -> bytes:
    return cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1].tobytes()
