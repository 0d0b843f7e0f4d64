"""ROS 1: the same messages in a .bag give the same dataset; cut and damaged ones give what is left."""

from __future__ import annotations

import bz2
import struct
from pathlib import Path

import numpy as np
import planted
import pytest
import ros1_files
from mcap.writer import Writer as McapWriter

from d4_datasets import bags, packed
from d4_datasets.bags import Bag, BagWriter, find_bags, new, read_bag
from d4_datasets.errors import UserError
from d4_datasets.ingest import ingest
from d4_datasets.lerobot import Dataset

T0 = 1_700_000_000_000_000_000
ARRAY, TWIST = "std_msgs/msg/Float64MultiArray", "geometry_msgs/msg/TwistStamped"
COUNT = 40


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Numbers and stamped commands, as rosbag2."""
    path = tmp_path_factory.mktemp("source") / "bag"
    with BagWriter(path) as writer:
        for k in range(COUNT):
            writer.write("/number", ARRAY, T0 + k, bags.float64_array([k] + [0] * 50))
            msg = new(TWIST, header=bags.header(T0 + 7 * k, "base"))
            msg.twist.linear.x = k / 4
            writer.write("/cmd", TWIST, T0 + k, msg)
    return path


def numbers(stream):
    return [int(msg.data[0]) for topic, _, msg in stream if topic == "/number"]


@pytest.mark.parametrize("compression", ["", "bz2", "lz4"])
def test_messages_come_back_by_value_and_time(tmp_path, source, compression):
    path = ros1_files.convert(source, tmp_path / "a.bag", compression, chunk=2000)
    stream = read_bag(path)
    assert stream.bag.topics == {"/cmd": TWIST, "/number": ARRAY}
    items = list(stream)
    assert [stamp for _, stamp, _ in items] == sorted(2 * list(range(T0, T0 + COUNT)))
    assert numbers(items) == list(range(COUNT))
    commands = [msg for topic, _, msg in items if topic == "/cmd"]
    assert [msg.twist.linear.x for msg in commands] == [k / 4 for k in range(COUNT)]
    assert commands[3].header.stamp.nanosec == 21
    assert stream.report.warnings == []
    assert stream.report.messages == 2 * COUNT


def test_a_drive_gives_the_same_dataset_from_ros1_and_ros2(tmp_path):
    two = planted.Bag(30).write(tmp_path / "two/drive")
    one = ros1_files.convert(two, tmp_path / "one/drive.bag", "lz4", chunk=50_000)
    assert find_bags(tmp_path / "one") == [one]
    summaries = [
        ingest([path], planted.contract(), tmp_path / path.parent.name / "data") for path in (one, two)
    ]
    assert summaries[0].warnings == summaries[1].warnings == []
    datasets = [Dataset(tmp_path / name / "data") for name in ("one", "two")]
    for name, values in datasets[0].columns(0).items():
        np.testing.assert_array_equal(values, datasets[1].columns(0)[name])
    frames = [np.stack(list(dataset.frames("cam", 0))) for dataset in datasets]
    np.testing.assert_array_equal(*frames)


def test_messages_of_overlapping_chunks_come_in_order_of_time(tmp_path):
    stamps = [*range(0, 40, 2), *range(1, 40, 2)]
    data = bags.typestore().serialize_cdr(new("std_msgs/msg/Bool"), "std_msgs/msg/Bool")
    items = (("/flag", "std_msgs/msg/Bool", T0 + k, data) for k in stamps)
    path = ros1_files.write(tmp_path / "a.bag", items, chunk=200)
    assert [stamp - T0 for _, stamp, _ in read_bag(path)] == list(range(40))


@pytest.mark.parametrize("compression", ["", "bz2", "lz4"])
def test_every_cut_gives_the_first_messages_or_a_sentence(tmp_path, source, compression):
    data = ros1_files.convert(source, tmp_path / "a.bag", compression, chunk=3000).read_bytes()
    path = tmp_path / "cut.bag"
    best = 0
    for length in range(0, len(data), 101):
        path.write_bytes(data[:length])
        try:
            stream = read_bag(path)
        except UserError:
            found = []
        else:
            found = numbers(stream)
            assert any("cut off or damaged" in text for text in stream.report.warnings)
        assert found == list(range(len(found)))
        assert len(found) >= best - 1  # the longer the file the more
        best = max(best, len(found))
    assert best == COUNT


def test_a_recorder_that_was_killed_leaves_messages_outside_of_chunks(tmp_path, source):
    """rosbag writes the size of a chunk when it is full; until then its messages follow an empty one."""
    data = bytearray(ros1_files.convert(source, tmp_path / "a.bag", chunk=3000).read_bytes())
    last = data.rindex(b"compression=none")
    size_at = data.index(b"size=", last) + 9
    size = struct.unpack_from("<I", data, size_at)[0]
    data[size_at : size_at + 4] = bytes(4)
    path = tmp_path / "a.bag.active"
    path.write_bytes(data[: size_at + 4 + size])
    stream = read_bag(path)
    assert numbers(stream) == list(range(COUNT))
    assert "recovered 80 messages, the last at " in stream.report.warnings[0]
    assert find_bags(tmp_path)[-1] == path


def test_reading_goes_on_after_a_damage_by_the_index_at_the_end(tmp_path, source):
    data = bytearray(ros1_files.convert(source, tmp_path / "a.bag", chunk=3000).read_bytes())
    at = data.index(b"compression=none", 5000) - 17  # the head of the second chunk
    data[at : at + 12] = b"\xff" * 12
    (tmp_path / "a.bag").write_bytes(data)
    stream = read_bag(tmp_path / "a.bag")
    found = numbers(stream)
    assert found == sorted(found)
    assert COUNT - 8 <= len(found) < COUNT
    assert found[-1] == COUNT - 1
    assert any("damaged" in text for text in stream.report.warnings)


@pytest.mark.parametrize("compression", ["bz2", "lz4"])
def test_a_damaged_chunk_is_left_out_and_said(tmp_path, source, compression):
    data = bytearray(ros1_files.convert(source, tmp_path / "a.bag", compression, chunk=3000).read_bytes())
    at = data.index(f"compression={compression}".encode(), 5000) + 60
    data[at : at + 8] = b"\xff" * 8
    (tmp_path / "a.bag").write_bytes(data)
    stream = read_bag(tmp_path / "a.bag")
    found = numbers(stream)
    assert 20 < len(found) < COUNT
    assert any("damaged and left out" in text for text in stream.report.warnings)


def test_a_chunk_that_unpacks_beyond_reason_is_left_out(tmp_path, source, monkeypatch):
    monkeypatch.setattr(packed, "LARGEST", 1 << 22)
    data = ros1_files.convert(source, tmp_path / "a.bag").read_bytes()
    head = (
        struct.pack("<I", 40) + b"\x04\0\0\0op=\x05\x0f\0\0\0compression=bz2\x09\0\0\0size=\xff\xff\xff\xff"
    )
    bomb = bz2.compress(bytes(1 << 26))
    (tmp_path / "a.bag").write_bytes(data + head + struct.pack("<I", len(bomb)) + bomb)
    stream = read_bag(tmp_path / "a.bag")
    assert numbers(stream) == list(range(COUNT))
    assert any("unpacks to more than" in text for text in stream.report.warnings)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no ROS 1 bag"),
        (b"\x89MCAP0\r\n" + bytes(100), "is no ROS 1 bag"),
        (b"#ROSBAG V1.2\n" + bytes(100), r"older than 2\.0; convert it with rosbag fix"),
        (b"#ROSBAG V2.0\n", "holds no topics"),
        (b"#ROSBAG V2.0\n" + b"\xff" * 5000, "holds no topics"),
    ],
)
def test_what_is_no_bag_is_refused(tmp_path, content, message):
    (tmp_path / "a.bag").write_bytes(content)
    with pytest.raises(UserError, match=message):
        Bag(tmp_path / "a.bag")


def test_ros1_messages_in_mcap(tmp_path):
    store = ros1_files.NOETIC
    with (tmp_path / "a.mcap").open("wb") as stream:
        writer = McapWriter(stream)
        writer.start(profile="ros1")
        text, _ = store.generate_msgdef(ARRAY)
        schema = writer.register_schema("std_msgs/Float64MultiArray", "ros1msg", text.encode())
        channel = writer.register_channel("/number", "ros1", schema)
        for k in range(5):
            data = store.cdr_to_ros1(bags.typestore().serialize_cdr(bags.float64_array([k]), ARRAY), ARRAY)
            writer.add_message(channel, T0 + k, bytes(data), T0 + k)
        writer.finish()
    assert numbers(read_bag(tmp_path / "a.mcap")) == list(range(5))


def test_two_types_on_one_topic_are_said(tmp_path, source):
    first = ros1_files.convert(source, tmp_path / "a.bag").read_bytes()
    path = tmp_path / "b.bag"
    path.write_bytes(first.replace(b"topic=/cmd", b"topic=/num").replace(b"topic=/number", b"topic=//num//"))
    stream = read_bag(path)
    assert stream.bag.topics == {"/num": ARRAY}
    assert len(list(stream)) == COUNT
    assert any("/num carries" in text for text in stream.report.warnings)


def test_bags_in_one_folder_are_recordings_of_their_own(tmp_path, source):
    """Nothing tells the parts of `rosbag record --split` from recordings that somebody numbered."""
    names = [ros1_files.convert(source, tmp_path / f"run_{k}.bag") for k in range(2)]
    assert find_bags(tmp_path) == [Path(name) for name in names]
