"""Datasets on disk: exact frames and columns, appending, LeRobot's layout, and never half of anything."""

import json
import os
import signal
import subprocess
import sys

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

from d4_datasets import lerobot
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_datasets.lerobot import Dataset, Episode, LeRobotWriter
from d4_datasets.video import decode_video, encode_video

ALIGN = {"strategy": "hold", "timeline": "header", "tolerance_ms": 150}


def contract(rate_hz=10, size=(6, 10), dim=2):
    """Two cameras, a vector of one number and one of two, `dim` action components, two tasks."""
    camera = {"topic": "/a", "type": "sensor_msgs/msg/Image", "align": ALIGN}
    vector = {"topic": "/v", "type": "std_msgs/msg/Float64MultiArray", "align": ALIGN}
    action = {
        "name": "base",
        "topic": "/cmd",
        "type": "std_msgs/msg/Float64MultiArray",
        "select": [f"data[{i}]" for i in range(dim)],
        "low": [-1] * dim,
        "high": [1] * dim,
        "safety": "zeros",
        "align": ALIGN,
    }
    return Contract.from_dict(
        {
            "name": "toy",
            "rate_hz": rate_hz,
            "latency_ms": 0,
            "observations": [
                camera | {"name": "front", "size": list(size)},
                camera | {"name": "wrist", "size": [7, 5]},
                vector | {"name": "speed", "select": ["data[0]"]},
                vector | {"name": "pose", "select": ["data[0]", "data[1]"], "role": "probe"},
            ],
            "actions": [action],
            "tasks": {"topic": "/t", "type": "std_msgs/msg/String", "names": ["red", "blue"]},
        }
    )


def episode(contract, length=5, seed=0, labelled=True):
    rng = np.random.default_rng(seed)
    images = {c.name: rng.integers(0, 256, (length, *c.size, 3), np.uint8) for c in contract.images}
    mask = np.full(length, labelled)
    mask[-1] = False
    return Episode(
        images=images,
        action=rng.uniform(-1, 1, (length, contract.action_dim)).astype(np.float32),
        action_mask=mask,
        reward=rng.uniform(size=(length, 2)).astype(np.float32),
        task_index=np.full(length, seed % 2),
        is_terminal=np.arange(length) == length - 1,
        vectors={
            v.name: rng.normal(size=(length, len(v.select))).astype(np.float32) for v in contract.vectors()
        },
        source=f"bag{seed}",
        start_ns=seed,
        stale=1,
    )


def write(root, spec, seeds, **options):
    episodes = [episode(spec, 3 + seed, seed, **options) for seed in seeds]
    with LeRobotWriter(root, spec) as writer:
        for item in episodes:
            writer.add_episode(item)
    return episodes


def check(root, episodes):
    """The dataset holds exactly these episodes."""
    dataset = Dataset(root)
    assert dataset.info["total_episodes"] == len(episodes) == dataset.episodes.num_rows
    begin = 0
    for number, item in enumerate(episodes):
        columns = dataset.columns(number)
        assert columns["index"].tolist() == list(range(begin, begin + item.frames))
        assert dataset.episodes["dataset_from_index"][number].as_py() == begin
        begin += item.frames
        assert columns["frame_index"].tolist() == list(range(item.frames))
        assert set(columns["episode_index"]) == {number}
        np.testing.assert_allclose(
            columns["timestamp"], np.arange(item.frames) / dataset.contract.rate_hz, rtol=1e-6
        )
        expected = np.where(item.action_mask[:, None], item.action, 0)
        np.testing.assert_array_equal(columns["action"].reshape(item.frames, -1), expected)
        np.testing.assert_array_equal(columns["observation.speed"], item.vectors["speed"][:, 0])
        np.testing.assert_array_equal(columns["observation.pose"], item.vectors["pose"])
        for name in ("action_mask", "reward", "task_index", "is_terminal"):
            np.testing.assert_array_equal(columns[name], getattr(item, name))
        assert columns["is_first"].tolist() == [True] + [False] * (item.frames - 1)
        assert columns["is_last"].tolist() == [False] * (item.frames - 1) + [True]
        for camera, images in item.images.items():
            np.testing.assert_array_equal(np.stack(list(dataset.frames(camera, number))), images)
        assert dataset.d4["episodes"][number] == item.provenance()
    assert dataset.info["total_frames"] == begin


@pytest.mark.parametrize("rate_hz", [10, 29.97, 7.5])
@pytest.mark.parametrize("dim", [1, 2])
def test_what_is_written_is_read_back_bit_for_bit(tmp_path, rate_hz, dim):
    spec = contract(rate_hz, dim=dim)
    episodes = write(tmp_path / "data", spec, range(4))
    check(tmp_path / "data", episodes)
    assert Dataset(tmp_path / "data").contract == spec
    assert os.listdir(tmp_path) == ["data"]


def test_pyarrow_and_av_alone_read_what_is_written(tmp_path):
    """By the rules of LeRobotDataset v3.0, with nothing of this project."""
    root, episodes = tmp_path / "data", write(tmp_path / "data", contract(), range(4))
    info = json.loads((root / "meta/info.json").read_text())
    table = pq.read_table(root / "meta/episodes").to_pylist()
    assert (info["codebase_version"], len(table)) == ("v3.0", 4)
    for number, (row, item) in enumerate(zip(table, episodes, strict=True)):
        place = {name: row[f"data/{name}"] for name in ("chunk_index", "file_index")}
        columns = pq.read_table(root / info["data_path"].format(**place)).to_pydict()
        mine = [k for k, e in enumerate(columns["episode_index"]) if e == number]
        assert len(mine) == row["length"] == row["dataset_to_index"] - row["dataset_from_index"]
        known = np.where(item.action_mask[:, None], item.action, 0)
        np.testing.assert_array_equal([columns["action"][k] for k in mine], known)
        for camera, images in item.images.items():
            key = f"observation.images.{camera}"
            place = {name: row[f"videos/{key}/{name}"] for name in ("chunk_index", "file_index")}
            begin, end = (row[f"videos/{key}/{name}_timestamp"] for name in ("from", "to"))
            with av.open(str(root / info["video_path"].format(video_key=key, **place))) as container:
                seen = [(f.time, f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
            half = 0.5 / info["fps"]
            inside = [picture for time, picture in seen if begin - half <= time < end - half]
            np.testing.assert_array_equal(np.stack(inside), images)


def test_appending_keeps_old_files_and_adds_new_ones(tmp_path):
    spec, root = contract(), tmp_path / "data"
    episodes = write(root, spec, range(3))
    (root / "cache").mkdir()
    (root / "notes.txt").write_text("mine")
    inode = (root / "data/chunk-000/file-000.parquet").stat().st_ino
    episodes += write(root, spec, range(3, 5))
    check(root, episodes)
    assert (root / "data/chunk-000/file-000.parquet").stat().st_ino == inode  # linked, not copied
    assert (root / "data/chunk-000/file-001.parquet").exists()
    assert (root / "videos/observation.images.wrist/chunk-000/file-001.mp4").exists()
    assert not (root / "cache").exists()  # it is of the old frames
    assert (root / "notes.txt").read_text() == "mine"
    assert os.listdir(tmp_path) == ["data"]


def test_files_roll_over_at_their_size(tmp_path, monkeypatch):
    monkeypatch.setattr(lerobot, "DATA_FILE_MB", 0.0005)
    monkeypatch.setattr(lerobot, "VIDEO_FILE_MB", 0.01)
    monkeypatch.setattr(lerobot, "CHUNK_FILES", 2)
    episodes = write(tmp_path / "data", contract(), range(8))
    check(tmp_path / "data", episodes)
    for folder in ("data", "videos/observation.images.front"):
        assert (tmp_path / "data" / folder / "chunk-001").is_dir()


def test_layout_is_that_of_lerobot_v3(tmp_path):
    spec = contract(dim=1)
    episodes = write(tmp_path, spec, range(3))
    info = json.loads((tmp_path / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0"
    assert info["fps"] == 10
    assert isinstance(info["fps"], int)
    assert info["splits"] == {"train": "0:3"}
    assert info["features"]["observation.images.front"]["shape"] == [6, 10, 3]
    assert info["features"]["observation.images.front"]["dtype"] == "video"
    assert info["features"]["action"] == {"dtype": "float32", "shape": [1], "names": ["base.data[0]"]}
    assert info["features"]["reward"]["names"] == ["red", "blue"]
    schema = pq.read_schema(tmp_path / info["data_path"].format(chunk_index=0, file_index=0))
    columns = [name for name, feature in info["features"].items() if feature["dtype"] != "video"]
    assert schema.names == columns
    kinds = {name: str(schema.field(name).type) for name in schema.names}
    assert kinds["action"] == "float"  # one number is a plain column
    assert kinds["reward"] == "fixed_size_list<element: float>[2]"
    assert kinds["task_index"] == kinds["index"] == "int64"
    assert kinds["timestamp"] == "float"
    tasks = pq.read_table(tmp_path / "meta/tasks.parquet")
    assert tasks.to_pydict() == {"task_index": [0, 1], "task": ["red", "blue"]}
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["task"]
    row = pq.read_table(tmp_path / "meta/episodes/chunk-000/file-000.parquet").to_pylist()[1]
    key = "videos/observation.images.front"
    assert row["tasks"] == ["blue"]
    assert row["length"] == 4
    assert [row["dataset_from_index"], row["dataset_to_index"]] == [3, 7]
    assert [row[f"{key}/from_timestamp"], row[f"{key}/to_timestamp"]] == pytest.approx([0.3, 0.7])
    assert row["data/chunk_index"] == row["data/file_index"] == row[f"{key}/file_index"] == 0
    assert np.shape(row["stats/observation.images.front/mean"]) == (3, 1, 1)
    assert row["stats/action/count"] == [episodes[1].action_mask.sum()]


def test_statistics_are_those_of_all_frames_and_of_known_actions_only(tmp_path):
    spec = contract()
    episodes = write(tmp_path, spec, range(3)) + write(tmp_path, spec, [3], labelled=False)
    stats = json.loads((tmp_path / "meta/stats.json").read_text())
    action = np.concatenate([item.action[item.action_mask] for item in episodes])
    pose = np.concatenate([item.vectors["pose"] for item in episodes])
    for name, values in (("action", action), ("observation.pose", pose)):
        for key in ("min", "max", "mean", "std"):
            np.testing.assert_allclose(stats[name][key], getattr(np, key)(values, axis=0), rtol=1e-5)
        assert stats[name]["count"] == [len(values)]
    pixels = np.concatenate([item.images["front"].reshape(-1, 3) for item in episodes]) / 255
    np.testing.assert_allclose(np.ravel(stats["observation.images.front"]["mean"]), pixels.mean(0), rtol=1e-6)
    np.testing.assert_allclose(np.ravel(stats["observation.images.front"]["std"]), pixels.std(0), rtol=1e-6)


def test_long_videos_give_statistics_of_a_sample(tmp_path):
    frames = [np.full((4, 4, 3), t % 100, np.uint8) for t in range(1000)]
    video = encode_video(tmp_path / "v.mp4", frames, 10, (4, 4))
    assert video.frames == 1000
    assert 100 <= video.stats["count"][0] <= 400
    np.testing.assert_allclose(video.stats["mean"], 49.5 / 255, rtol=0.1)
    assert len(list(decode_video(tmp_path / "v.mp4", 50.0))) == 500


def test_nothing_shows_before_finalize_and_an_exception_drops_it(tmp_path):
    spec, root = contract(), tmp_path / "data"

    def half():
        with LeRobotWriter(root, spec) as writer:
            writer.add_episode(episode(spec))
            assert not root.exists()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert os.listdir(tmp_path) == []
    episodes = write(root, spec, [1])
    writer = LeRobotWriter(root, spec)
    writer.add_episode(episode(spec))
    writer.abort()
    check(root, episodes)
    with LeRobotWriter(tmp_path / "none", spec):
        pass
    assert os.listdir(tmp_path) == ["data"]


@pytest.mark.parametrize("step", ["add", "exchange", "first rename", "cleanup"])
def test_a_kill_at_any_step_leaves_the_old_or_the_new_dataset(tmp_path, step):
    spec, root = contract(), tmp_path / "data"
    episodes = write(root, spec, range(2))
    code = f"""
import os, signal, shutil, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from pathlib import Path
from d4_datasets import lerobot
import test_lerobot as t
step, root = {step!r}, Path({str(root)!r})
def die(*a, **k):
    os.kill(os.getpid(), signal.SIGKILL)
spec = t.contract()
writer = lerobot.LeRobotWriter(root, spec)
writer.add_episode(t.episode(spec, 5, 2))
if step == "add":
    die()
if step == "exchange":
    lerobot._exchange = die
if step == "first rename":
    lerobot._exchange = lambda *a: False
    rename = os.rename
    os.rename = lambda a, b: (rename(a, b), die())
if step == "cleanup":
    shutil.rmtree = die
writer.finalize()
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    added = [episode(spec, 5, 2)] if step == "cleanup" else []
    if step != "first rename":
        check(root, episodes + added)
    new = write(root, spec, [3])  # the next run tidies up and goes on
    check(root, episodes + added + new)
    assert os.listdir(tmp_path) == ["data"]


def test_without_an_atomic_exchange_two_renames_do(tmp_path, monkeypatch):
    monkeypatch.setattr(lerobot, "_exchange", lambda *_: False)
    spec = contract()
    episodes = write(tmp_path / "data", spec, [0]) + write(tmp_path / "data", spec, [1])
    check(tmp_path / "data", episodes)
    assert os.listdir(tmp_path) == ["data"]


def test_mistakes(tmp_path):
    spec = contract()
    write(tmp_path / "data", spec, [0])
    with pytest.raises(UserError, match="made with another contract"):
        LeRobotWriter(tmp_path / "data", contract(rate_hz=20))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").touch()
    with pytest.raises(UserError, match="photos is not a dataset"):
        LeRobotWriter(tmp_path / "photos", spec)
    with LeRobotWriter(tmp_path / "more", spec) as writer:
        bad = episode(spec)
        bad.action = bad.action[:, :1]
        with pytest.raises(ValueError, match="action has shape"):
            writer.add_episode(bad)
        bad = episode(spec)
        bad.vectors["pose"][2, 1] = np.nan
        with pytest.raises(ValueError, match=r"observation\.pose has NaN"):
            writer.add_episode(bad)
    video = tmp_path / "data/videos/observation.images.front/chunk-000/file-000.mp4"
    video.write_bytes(video.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be decoded"):
        list(Dataset(tmp_path / "data").frames("front", 0))


def test_video_is_plain_h264_that_any_player_seeks_in(tmp_path):
    write(tmp_path, contract(size=(16, 16)), [40])
    with av.open(str(tmp_path / "videos/observation.images.front/chunk-000/file-000.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        packets = [packet for packet in container.demux(stream) if packet.dts is not None]
    assert [float(p.pts * p.time_base) for p in packets] == pytest.approx(np.arange(43) / 10)
    assert all(p.is_keyframe for p in packets[::10])
