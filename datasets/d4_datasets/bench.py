"""What data cost beside a reference: python -m d4_datasets.bench WHAT [FILE].

    ingest-video, ingest-mcap   d4-ingest beside decoding the same file alone
    windows                     batches for training beside a plain copy of as many bytes
    open                        opening a thousand hours of metadata beside parsing them
    wait                        the share of a training step that goes into waiting for its batch

All are timed in turns in one run, so that a busy machine slows all; the median of the turns counts, with the
least and the most beside it. In ingest every picture is used; without FILE one is made: a minute of 640 x 360
at 20 Hz. Where mcap-ros2-support is installed, bags are timed beside it too.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import av
import cv2
import numpy as np
import tyro
from mcap.reader import make_reader
from rosbags.typesys import Stores, get_typestore

from d4_datasets import bags, messages
from d4_datasets.bags import Bag, BagWriter
from d4_datasets.contract import PICTURE_TYPES, Contract
from d4_datasets.errors import UserError, run_cli
from d4_datasets.footage import VideoFile, share_decoding
from d4_datasets.ingest import ingest
from d4_datasets.stills import decode_still

_SIZE, _HZ, _FRAMES = (360, 640), 20, 1200
_NAME = 46  # columns
_TWIST = "geometry_msgs/msg/Twist"


@dataclass(frozen=True)
class Options:
    """Time what data cost, each beside a reference in the same run."""

    what: Annotated[Literal["ingest-video", "ingest-mcap", "windows", "open", "wait"], tyro.conf.Positional]
    """d4-ingest beside decoding alone; batches for training beside a plain copy; opening a thousand hours;
    the share of a training step that waits for data."""

    file: Annotated[Path | None, tyro.conf.Positional] = None
    """To ingest: a video, or an MCAP file with a camera. To wait: a run folder. Without it one is made."""

    size: int = 64
    """Height and width of the pictures."""

    repeats: int = 5
    """How often each is timed; of `windows`, for how many seconds."""

    raw: bool = False
    """The bag that is made holds raw pictures instead of jpeg; a quarter as many."""


def contract(rate_hz: float, size: int, topic: str = "/camera", type_: str = PICTURE_TYPES[1]) -> Contract:
    """A robot with one camera at the rate of its pictures, and a base."""
    align = {"strategy": "hold", "timeline": "receive", "tolerance_ms": 2000.0 / rate_hz}
    camera = {"name": "front", "topic": topic, "type": type_, "size": [size, size], "align": align}
    base = {"name": "base", "topic": "/cmd_vel", "type": _TWIST, "select": ["linear.x", "angular.z"]}
    limits = {"low": [-1.0, -1.0], "high": [1.0, 1.0], "safety": "zeros", "align": align}
    robot = {"name": "bench", "rate_hz": rate_hz, "latency_ms": 0, "observations": [camera]}
    return Contract.from_dict(robot | {"actions": [base | limits]})


def pictures(frames: int) -> Any:
    """A camera that looks around in a landscape, with the noise of a sensor, uint8 [H, W, 3] each."""
    rng, (height, width) = np.random.default_rng(0), _SIZE
    land = np.zeros((4 * height, 4 * width, 3), np.float32)
    for fine in (1, 2, 4, 8):  # hills, and things on them
        coarse = rng.normal(0, 40 / fine**0.5, (24 * fine, 40 * fine, 3)).astype(np.float32)
        land += cv2.resize(coarse, (4 * width, 4 * height), interpolation=cv2.INTER_CUBIC)
    land = np.clip(land + 128, 0, 255).astype(np.uint8)
    noise = rng.normal(0, 2.5, (8, height, width, 3)).astype(np.int16)
    for k in range(frames):
        x, y = (round(1.5 * w * (1 + np.sin(k / s))) for w, s in ((width, 23), (height, 41)))
        seen = land[y : y + height, x : x + width] + noise[k % 7 if k % 2 else 7]
        yield np.clip(seen, 0, 255).astype(np.uint8)


def make_video(path: Path, frames: int = _FRAMES) -> None:
    """Write an H.264 video as cameras and recorders write it."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=_HZ, options={"crf": "18", "preset": "fast"})
        stream.height, stream.width = _SIZE
        for picture in pictures(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def make_bag(path: Path, frames: int = _FRAMES, raw: bool = False) -> None:
    """Write a bag with pictures, jpeg or raw, and commands."""
    with BagWriter(path) as writer:
        for k, picture in enumerate(pictures(frames)):
            stamp = 1_700_000_000_000_000_000 + k * 1_000_000_000 // _HZ
            message = (
                bags.image(picture, stamp) if raw else bags.compressed_image(picture, stamp, format="jpeg")
            )
            writer.write("/camera", message.__msgtype__, stamp, message)
            writer.write("/cmd_vel", _TWIST, stamp, bags.new(_TWIST))


def decode_video(path: Path, rgb: bool = False, threads: bool = False) -> int:
    """Decode all frames of a video with PyAV as it comes; to arrays of RGB, or with the threads of ingest,
    if wanted. Returns their number.
    """
    with av.open(str(path)) as container:
        stream, count = container.streams.video[0], 0
        if threads:
            share_decoding(stream)
        for frame in container.decode(stream):
            count += 1
            if rgb:
                frame.to_ndarray(format="rgb24")
        return count


def decode_bag(path: Path, topic: str) -> int:
    """Read all messages with mcap, deserialize them with rosbags and decode the pictures of `topic`."""
    store, count = get_typestore(Stores.ROS2_HUMBLE), 0
    for file in [path] if path.is_file() else sorted(path.glob("*.mcap")):
        with file.open("rb") as stream:
            for schema, channel, message in make_reader(stream).iter_messages():
                if schema is not None and schema.name in store.fielddefs:
                    msg = store.deserialize_cdr(message.data, schema.name)
                    if channel.topic == topic:
                        messages.decode(msg)
                        count += 1
    return count


def decode_by_mcap_ros2(path: Path, topic: str, pictures: bool) -> int:
    """Decode all messages with mcap-ros2-support, and the pictures of `topic` if wanted."""
    from mcap_ros2.decoder import DecoderFactory

    count = 0
    for file in [path] if path.is_file() else sorted(path.glob("*.mcap")):
        with file.open("rb") as stream:
            reader = make_reader(stream, decoder_factories=[DecoderFactory()])
            for _, channel, _, msg in reader.iter_decoded_messages():
                count += channel.topic == topic
                if channel.topic == topic and pictures:
                    _pixels(msg)
    return count


def _pixels(msg: Any) -> np.ndarray:
    """RGB of a picture, as its users get it."""
    data = np.frombuffer(msg.data, np.uint8)
    if hasattr(msg, "format"):
        return decode_still(data)
    return data.reshape(msg.height, msg.step)[:, : 3 * msg.width].reshape(msg.height, msg.width, 3)


class Took(NamedTuple):
    """Seconds that went by, and seconds of work on all cores: on a busy machine the first one depends on what
    else is done, even beside a reference that uses fewer cores.
    """

    wall_s: float
    cpu_s: float

    @classmethod
    def median(cls, times: Sequence[Took]) -> Took:
        """The median of each."""
        return cls(float(np.median([t.wall_s for t in times])), float(np.median([t.cpu_s for t in times])))

    def of(self, frames: int) -> str:
        """As text, for so many frames."""
        return f"{self.wall_s:7.2f} s {frames / self.wall_s:7.0f} frames/s"


def timed(work: Callable[[], Any]) -> Took:
    """How long it takes."""
    began, worked = time.perf_counter(), time.process_time()
    work()
    return Took(time.perf_counter() - began, time.process_time() - worked)


def compare(path: Path, robot: Contract, others: dict[str, Callable[[], int]], repeats: int) -> list[float]:
    """Print the time of ingest and of each of `others`; returns how many times as long as each it took."""
    frames = max(work() for work in others.values())  # now the file is in memory for all
    times: dict[str, list[Took]] = {name: [] for name in others}
    whole = []
    for _ in range(repeats):
        for name, work in others.items():
            times[name].append(timed(work))
        with tempfile.TemporaryDirectory() as folder:
            whole.append(timed(partial(ingest, [path], robot, Path(folder) / "dataset")))
    height, width = robot.images[0].size or (0, 0)
    print(f"{f'd4-ingest to {width} x {height}':<{_NAME}} {Took.median(whole).of(frames)}")
    ratios = []
    for name in others:
        # Turn by turn: what else the machine did slowed both.
        turns = [one.wall_s / other.wall_s for one, other in zip(whole, times[name], strict=True)]
        ratios.append(float(np.median(turns)))
        alone = Took.median(times[name])
        print(
            f"{name:<{_NAME}} {alone.of(frames)}; ingest takes {ratios[-1]:.2f} x the time "
            f"({min(turns):.2f} to {max(turns):.2f}), {Took.median(whole).cpu_s / alone.cpu_s:.2f} x the work"
        )
    return ratios


def bench_video(path: Path, size: int = 64, repeats: int = 3) -> list[float]:
    """Ingest of a video against PyAV; returns the ratios."""
    steps = np.diff(VideoFile(path, _HZ).stamps)
    rate = round(1e9 / float(np.median(steps)), 3) if len(steps) else float(_HZ)
    others: dict[str, Callable[[], int]] = {
        "PyAV decodes": partial(decode_video, path),
        "PyAV decodes, threads as in ingest": partial(decode_video, path, threads=True),
        "PyAV decodes to RGB arrays": partial(decode_video, path, rgb=True),
    }
    return compare(path, contract(rate, size), others, repeats)


def bench_bag(path: Path, size: int = 64, repeats: int = 3) -> list[float]:
    """Ingest of a bag's first camera against mcap with rosbags, and with mcap-ros2-support if it is there;
    returns the ratios.
    """
    bag = Bag(path)
    cameras = [(topic, kind) for topic, kind in bag.topics.items() if kind in PICTURE_TYPES]
    if not cameras:
        raise UserError(f"{path} has no camera ({' or '.join(PICTURE_TYPES)})")
    stamps = np.array([stamp for _, stamp, _ in bag.raw([cameras[0][0]])])
    rate = 1e9 / float(np.median(np.diff(stamps))) if len(stamps) > 1 else _HZ
    robot = contract(round(rate, 3), size, *cameras[0])
    others: dict[str, Callable[[], int]] = {
        "mcap, rosbags and OpenCV decode": partial(decode_bag, path, cameras[0][0])
    }
    if importlib.util.find_spec("mcap_ros2") is not None:
        alone = partial(decode_by_mcap_ros2, path, cameras[0][0])
        others["mcap-ros2-support and OpenCV decode"] = partial(alone, pictures=True)
        others["mcap-ros2-support decodes, no pictures"] = partial(alone, pictures=False)
    return compare(path, robot, others, repeats)


def main() -> None:
    """The command python -m d4_datasets.bench."""
    run_cli(lambda: _main(tyro.cli(Options, prog="python -m d4_datasets.bench")))


def _main(options: Options) -> None:
    if not options.what.startswith("ingest"):
        _reading(options, contract(10.0, options.size))
        return
    is_video = options.what == "ingest-video"
    run: Callable[[Path, int, int], list[float]] = bench_video if is_video else bench_bag
    if options.file is not None:
        run(options.file, options.size, options.repeats)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("made.mp4" if is_video else "made")
        if is_video:
            make_video(path)
        else:
            make_bag(path, _FRAMES // 4 if options.raw else _FRAMES, options.raw)
        run(path, options.size, options.repeats)


def _reading(options: Options, robot: Contract) -> None:
    from d4_datasets import bench_reading

    if options.what == "windows":
        bench_reading.bench_windows(robot, float(options.repeats))
    elif options.what == "open":
        bench_reading.bench_open(robot, options.repeats)
    else:
        bench_reading.bench_wait(robot, options.file)


if __name__ == "__main__":
    main()
