"""What reading costs: batches of windows beside copying as many bytes, opening a thousand hours beside
parsing their metadata, and the share of a training step that goes into waiting for its batch.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from d4_datasets import frame_cache, lerobot
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_datasets.source import Source
from d4_datasets.windows import Windows

_HZ = 10
_BEGIN = 1_700_000_000_000_000_000
_PER_FILE = 2000  # episodes
SHAPES = (
    (64, 1),
    (16, 16),
    (16, 32),
    (64, 4),
)  # windows and frames of a batch of the tokenizer, dynamics, ...
_FEW_FRAMES, _LENGTH = 24_000, 120
_NUMBERS = (  # columns of one number
    "action_mask", "is_first", "is_last", "is_terminal", "timestamp", "frame_index", "episode_index", "index",
    "task_index",
)  # fmt: skip
HOURS = 1000


def make_dataset(root: Path, robot: Contract, episodes: int, length: int, pictures: bool) -> None:
    """Write a dataset and its frame cache without encoding anything: metadata as d4-ingest writes them, files
    in place of rows and videos that nobody opens. Without `pictures` frames and most columns are holes.
    """
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    (root / "cache/columns").mkdir(parents=True)
    pq.write_table(_episodes(robot, episodes, length), root / lerobot.EPISODES_PATH)
    info = {
        "codebase_version": "v3.0", "fps": _HZ, "total_episodes": episodes, "total_frames": episodes * length,
        "data_path": lerobot.DATA_PATH, "video_path": lerobot.VIDEO_PATH, "features": {},
    }  # fmt: skip
    (root / "meta/info.json").write_text(json.dumps(info, indent=1))
    about = {"format": 1, "contract": robot.to_dict(), "contract_hash": robot.hash, "sources": []}
    about["episodes"] = [
        {"source": f"drive_{number:06d}.mcap", "start_ns": _BEGIN + number * 40_000_000_000,
         "frames": length, "labelled": length, "stale": 0, "terminal": False, "dropped": 0}
        for number in range(episodes)
    ]  # fmt: skip
    (root / "meta/d4.json").write_text(json.dumps(about, indent=1))
    for number in range(-(-episodes // _PER_FILE)):
        keys = {"chunk_index": 0, "file_index": number}
        names = [lerobot.VIDEO_PATH.format(video_key=camera.key, **keys) for camera in robot.images]
        for name in (lerobot.DATA_PATH.format(**keys), *names):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(b"")
    _write_cache(root, robot, episodes, length, pictures)


def _episodes(robot: Contract, episodes: int, length: int) -> pa.Table:
    """The episode table, with the statistics that make up most of it."""
    number = np.arange(episodes)
    file = number // _PER_FILE
    table: dict[str, Any] = {
        "episode_index": number, "tasks": pa.array([[robot.name]] * episodes),
        "length": np.full(episodes, length), "dataset_from_index": number * length,
        "dataset_to_index": (number + 1) * length, "data/chunk_index": 0 * number, "data/file_index": file,
    }  # fmt: skip
    rng = np.random.default_rng(0)
    widths = {camera.key: 3 for camera in robot.images} | dict.fromkeys(_NUMBERS, 1)
    for name, width in (widths | {"action": robot.action_dim, "reward": len(robot.task_names)}).items():
        for part in ("min", "max", "mean", "std"):
            values = pa.FixedSizeListArray.from_arrays(pa.array(rng.normal(size=episodes * width)), width)
            table[f"stats/{name}/{part}"] = values.cast(pa.list_(pa.float64()))
    for camera in robot.images:
        begin = (number % _PER_FILE) * length / _HZ
        table |= {
            f"videos/{camera.key}/chunk_index": 0 * number, f"videos/{camera.key}/file_index": file,
            f"videos/{camera.key}/from_timestamp": begin,
            f"videos/{camera.key}/to_timestamp": begin + length / _HZ,
        }  # fmt: skip
    return pa.table(table)


def _write_cache(root: Path, robot: Contract, episodes: int, length: int, pictures: bool) -> None:
    frames, cache, rng = episodes * length, root / "cache", np.random.default_rng(0)

    def array(path: Path, dtype: Any, *shape: int) -> np.memmap:
        return np.lib.format.open_memmap(path, "w+", dtype, (frames, *shape))

    for camera in robot.images:
        assert camera.size is not None
        target = array(cache / f"{camera.name}.npy", np.uint8, *camera.size, 3)
        block = rng.integers(0, 256, (min(frames, 1000), *camera.size, 3), np.uint8)
        for begin in range(0, frames if pictures else 0, len(block)):
            target[begin : begin + len(block)] = block[: frames - begin]
    columns = cache / "columns"
    action = array(columns / "action.npy", np.float32, robot.action_dim)
    if pictures:
        action[:] = rng.uniform(-1, 1, action.shape)
    array(columns / "action_mask.npy", bool)[:] = True
    array(columns / "episode_index.npy", np.int64)[:] = np.repeat(np.arange(episodes), length)
    array(columns / "reward.npy", np.float32, len(robot.task_names))
    array(columns / "is_terminal.npy", bool)
    array(columns / "task_index.npy", np.int64)
    files = {str(path.relative_to(root)): frame_cache.fingerprint(path) for path in Source(root).files()}
    manifest = {"format": frame_cache.CACHE_FORMAT, "nonfinite": [], "sources": files}
    manifest["arrays"] = frame_cache.sizes(cache)
    (cache / "manifest.json").write_text(json.dumps(manifest))


# ---- windows


def bench_windows(robot: Contract, seconds: float = 1.0, frames: int = _FEW_FRAMES) -> dict[str, list[float]]:
    """Frames per second of batches from a warm cache, on one core and on two, beside a plain copy of as many
    bytes in the same turns; returns by shape [frames/s on one, on two, times as long as a copy].
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "dataset"
        make_dataset(root, robot, frames // _LENGTH, _LENGTH, pictures=True)
        results = {}
        for batch, length in SHAPES:
            alone = _batches(root, batch, length, seconds)
            with multiprocessing.get_context("spawn").Pool(2) as pool:
                both = pool.starmap(_batches, [(root, batch, length, seconds)] * 2)
            name = f"{batch} x {length}"
            results[name] = [alone[0], sum(one[0] for one in both), alone[1]]
            print(
                f"windows of {length:2d} frames, {batch:2d} a batch: {alone[0]:9,.0f} frames/s on one core "
                f"({alone[2]:,.0f} to {alone[3]:,.0f}), {results[name][1]:9,.0f} on two; "
                f"{alone[1]:.2f} x a plain copy",
                flush=True,
            )
    return results


def _batches(root: Path, batch: int, length: int, seconds: float) -> tuple[float, float, float, float]:
    """(frames/s of batches, times as long as copying as many bytes) by the median of many turns, and between
    which frames/s nine of ten turns lie.
    """
    windows = Windows(root)
    rng, (train, _) = np.random.default_rng(os.getpid()), windows.split()
    (camera,) = windows.images
    source = np.asarray(windows.images[camera])
    buffer = np.zeros((batch, length, *source.shape[1:]), np.uint8)
    flat, size = source.reshape(-1), buffer.nbytes
    times: dict[str, list[float]] = {"batch": [], "copy": []}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["copy"]) < 5:
        began = time.perf_counter()
        starts = windows.sample_starts(rng, batch, length, train)
        windows.batch(*windows.indices(starts, length), {f"image.{camera}": buffer})
        middle = time.perf_counter()
        begin = int(rng.integers(0, len(flat) - size))
        np.copyto(buffer.reshape(-1), flat[begin : begin + size])
        times["batch"].append(middle - began)
        times["copy"].append(time.perf_counter() - middle)
    typical, copied = (float(np.median(times[name])) for name in ("batch", "copy"))
    slow, fast = np.percentile(times["batch"], (95, 5))
    size = batch * length
    return size / typical, typical / copied, size / slow, size / fast


# ---- opening

# getrusage would tell the memory of the process that started this one, if that is more
_OPEN = """
import re, sys, time
from pathlib import Path
from d4_datasets.windows import Windows
def peak(): return re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
before, began = peak(), time.perf_counter()
windows = Windows(Path(sys.argv[1]))
windows.split()
print(time.perf_counter() - began, before, peak(), windows.num_frames)
"""


def bench_open(robot: Contract, repeats: int = 3, hours: float = HOURS) -> tuple[float, float, float]:
    """Seconds to open and split a dataset of so many hours, whose cache is there, in a process of its own;
    how many times as long as parsing its metadata that is; and the process's peak memory in MB.
    """
    frames = round(hours * 3600 * _HZ)
    length = min(360, frames)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "dataset"
        make_dataset(root, robot, max(2, frames // length), length, pictures=False)
        opened, parsed, memory, before = [], [], [], []
        for _ in range(repeats):
            words = [sys.executable, "-c", _OPEN, str(root)]
            seconds, bare, peak, count = subprocess.run(
                words, capture_output=True, text=True, check=True
            ).stdout.split()
            opened.append(float(seconds))
            memory.append(float(peak) / 1024)
            before.append(float(bare) / 1024)
            began = time.perf_counter()
            json.loads((root / "meta/d4.json").read_text())
            pq.read_table(root / "meta/episodes")
            parsed.append(time.perf_counter() - began)
    typical = float(np.median(opened))
    ratio = typical / float(np.median(parsed))
    episodes = max(2, frames // length)
    print(
        f"{hours:g} h, {int(count):,} frames in {episodes:,} episodes: opened in {typical:.2f} s "
        f"({min(opened):.2f} to {max(opened):.2f}; {ratio:.2f} x parsing d4.json and the episode table), "
        f"{max(memory):.0f} MB at most ({max(before):.0f} MB before)"
    )
    return typical, ratio, max(memory)


# ---- waiting


def bench_wait(robot: Contract, run: Path | None = None, scale: float = 0.03) -> dict[str, float]:
    """The share of the step time that training waited for its batches, by phase: of a run that is there, or
    of a short one of `nano`, trained as a user would.
    """
    if run is not None:
        return _shares(run)
    with tempfile.TemporaryDirectory() as folder:
        root, run = Path(folder) / "dataset", Path(folder) / "run"
        make_dataset(root, robot, _FEW_FRAMES // _LENGTH, _LENGTH, pictures=True)
        words = [sys.executable, "-m", "d4_core.train", str(root), "--run", str(run), "--scale", str(scale)]
        words += ["--phases", "tokenizer", "dynamics", "agent", "--force", "--device", "cpu"]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"d4-train ended with exit code {done.returncode}: {done.stderr.strip()[-300:]}")
        return _shares(run)


def _shares(run: Path) -> dict[str, float]:
    shares = {}
    for phase, lines in _phases(run):
        known = [line for line in lines if "wait_share" in line]
        steps = np.diff([0, *(line["step"] for line in known)])
        if len(known) > 1:  # the first line is the first step, whose batch nobody could make before
            shares[phase] = float(np.average([line["wait_share"] for line in known[1:]], weights=steps[1:]))
            print(f"{phase:12} waited {shares[phase]:.2%} of the time for its batches")
    if not shares:
        raise UserError(f"{run} has no metrics.jsonl with the share of time that went into waiting")
    return shares


def _phases(run: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    try:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{run} is no run folder of d4-train: {error}") from None
    for phase in dict.fromkeys(line["phase"] for line in lines):
        yield phase, [line for line in lines if line["phase"] == phase]
