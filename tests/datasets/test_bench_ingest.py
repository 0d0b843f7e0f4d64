"""The measurement of ingest against decoding, and reading ahead in a thread. Nothing here is timed."""

import sqlite3
import subprocess
import sys
import threading

import pytest

from d4_datasets import bench
from d4_datasets.aligned import ahead
from d4_datasets.bags import BagWriter, new
from d4_datasets.errors import UserError


def test_both_measurements_run(tmp_path, capsys, monkeypatch):
    bench.make_video(tmp_path / "v.mp4", 12)
    bench.make_bag(tmp_path / "bag", 12)
    assert len(bench.bench_video(tmp_path / "v.mp4", 16, 1)) == 3
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)  # mcap-ros2-support
    assert len(bench.bench_bag(tmp_path / "bag", 16, 1)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "d4-ingest to 16 x 16",
        "PyAV decodes",
        "PyAV decodes, threads as in ingest",
        "PyAV decodes to RGB arrays",
        "d4-ingest to 16 x 16",
        "mcap, rosbags and OpenCV decode",
    ]


def test_the_command_fails_in_one_sentence(tmp_path):
    (tmp_path / "v.mp4").write_bytes(b"no video")
    command = [sys.executable, "-m", "d4_datasets.bench", "ingest-video", str(tmp_path / "v.mp4")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_a_bag_without_a_camera_has_nothing_to_measure(tmp_path):
    with BagWriter(tmp_path / "bag") as writer:
        writer.write("/cmd_vel", "geometry_msgs/msg/Twist", 1, new("geometry_msgs/msg/Twist"))
    with pytest.raises(UserError, match="has no camera"):
        bench.bench_bag(tmp_path / "bag")


def test_reading_ahead_keeps_order_and_errors():
    def items(count):
        yield from range(count)
        raise UserError("the end is near")

    threads, reading = threading.active_count(), ahead(items(10))
    assert [next(reading) for _ in range(10)] == list(range(10))
    with pytest.raises(UserError, match="the end is near"):
        next(reading)
    assert threading.active_count() == threads


def test_large_items_do_not_pile_up():
    """Two of 100 MB are more than anybody should hold in advance; without their weight it was sixteen."""
    made = []

    def items():
        for k in range(20):
            made.append(k)
            yield (k,)

    reading = ahead(items(), lambda item: 1 << 27)
    for k in range(10):
        assert next(reading) == (k,)
        assert len(made) <= k + 4
    reading.close()
    assert len(made) < 20


def test_a_bag_of_raw_pictures_is_one(tmp_path, capsys):
    bench.make_bag(tmp_path / "bag", 6, raw=True)
    assert bench.bench_bag(tmp_path / "bag", 16, 1)
    assert "d4-ingest to 16 x 16" in capsys.readouterr().out


def test_whoever_stops_early_leaves_nothing_open():
    """sqlite refuses to be closed by another thread than the one that opened it."""
    closed = []

    def items():
        database = sqlite3.connect(":memory:")
        try:
            yield from (database.execute("SELECT 1").fetchone() for _ in range(100))
        finally:
            database.close()
            closed.append(True)

    threads, reading = threading.active_count(), ahead(items())
    assert next(reading) == (1,)
    reading.close()
    assert closed == [True]
    assert threading.active_count() == threads
