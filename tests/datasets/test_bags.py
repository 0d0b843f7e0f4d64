"""Bags: what is written is read back; damaged, odd and missing ones give what is left, or one sentence."""

import contextlib
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys

import numpy as np
import pytest
import yaml
import zstandard
from recordings import RECORDINGS, needs
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer

from d4_datasets import bags, messages
from d4_datasets.bags import BagWriter, find_bags, new, read_bag
from d4_datasets.errors import UserError

IMAGE, BOOL, ARRAY = "sensor_msgs/msg/Image", "std_msgs/msg/Bool", "std_msgs/msg/Float64MultiArray"
T0 = 1_700_000_000_000_000_000
COUNT = 60


def number(k):
    return bags.float64_array([k, -k])


def write(path, count=COUNT, size=4, times=None):
    """A bag with `count` images and as many arrays that number them."""
    rgb = np.arange(size * size * 3).reshape(size, size, 3).astype(np.uint8)
    with BagWriter(path) as writer:
        for k in range(count) if times is None else times:
            writer.write("/camera", IMAGE, T0 + k, bags.image(rgb, T0 + k))
            writer.write("/number", ARRAY, T0 + k, number(k))
    return path


def write_with(path, plugin, mode=CompressionMode.NONE):
    """The same arrays through rosbags' own writer, for what `BagWriter` does not write."""
    writer = Writer(path, version=9, storage_plugin=plugin)
    writer.set_compression(mode, CompressionFormat.ZSTD)
    with writer:
        connection = writer.add_connection("/number", ARRAY, typestore=bags.typestore())
        for k in range(COUNT):
            writer.write(connection, T0 + k, bags.typestore().serialize_cdr(number(k), ARRAY))
    return path


def numbers(stream):
    return [int(msg.data[0]) for topic, _, msg in stream if topic == "/number"]


# ---- writing


def test_what_is_written_is_read_back(tmp_path):
    path = write(tmp_path / "bag")
    stream = read_bag(path, ["/camera", "/number"])
    items = list(stream)
    assert [(topic, stamp) for topic, stamp, _ in items[:3]] == [
        ("/camera", T0),
        ("/number", T0),
        ("/camera", T0 + 1),
    ]
    assert messages.stamp_ns(items[2][2]) == T0 + 1
    assert messages.decode(items[0][2])[0, 1].tolist() == [3, 4, 5]
    assert numbers(stream) == list(range(COUNT))
    assert stream.report.messages == 2 * COUNT
    assert stream.report.warnings == []
    info = yaml.safe_load((path / "metadata.yaml").read_text())["rosbag2_bagfile_information"]
    assert info["message_count"] == 2 * COUNT
    assert info["relative_file_paths"] == ["bag.mcap"]
    assert (path / "bag.mcap").exists()
    assert os.listdir(tmp_path) == ["bag"]


def test_a_bag_appears_only_when_it_is_whole(tmp_path):
    def half():
        with BagWriter(tmp_path / "bag") as writer:
            writer.write("/flag", BOOL, T0, new(BOOL, data=True))
            assert not (tmp_path / "bag").exists()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert os.listdir(tmp_path) == []


def test_a_killed_writer_leaves_no_bag_and_does_not_block_the_next(tmp_path):
    code = f"""
import os, signal
from d4_datasets.bags import BagWriter, new
writer = BagWriter({str(tmp_path / "bag")!r})
writer.write("/flag", "{BOOL}", 1, new("{BOOL}", data=True))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "bag").exists()
    write(tmp_path / "bag", 2)
    assert os.listdir(tmp_path) == ["bag"]


def test_mistakes_in_writing(tmp_path):
    write(tmp_path / "bag", 1)
    with pytest.raises(UserError, match="exists already"):
        BagWriter(tmp_path / "bag")
    with BagWriter(tmp_path / "other") as writer:
        writer.write("/flag", BOOL, T0, new(BOOL))
        with pytest.raises(UserError, match="/flag carries std_msgs/msg/Bool in this bag"):
            writer.write("/flag", ARRAY, T0, number(1))
        with pytest.raises(UserError, match="type my_msgs/msg/Thing of /x is unknown"):
            writer.write("/x", "my_msgs/msg/Thing", T0, new(BOOL))
    with pytest.raises(UserError, match="type my_msgs/msg/Thing is unknown"):
        new("my_msgs/msg/Thing")
    with pytest.raises(UserError, match="has no field 'value'; its fields are data"):
        new(BOOL, value=True)


@pytest.mark.parametrize("name", sorted(bags.typestore().types))
def test_a_zero_message_of_every_type_can_be_written(name):
    store = bags.typestore()
    data = store.serialize_cdr(new(name), name)
    assert bytes(store.serialize_cdr(store.deserialize_cdr(data, name), name)) == bytes(data)


# ---- reading what is whole


@pytest.mark.parametrize("plugin", [StoragePlugin.MCAP, StoragePlugin.SQLITE3])
@pytest.mark.parametrize(
    "mode", [CompressionMode.NONE, CompressionMode.MESSAGE, CompressionMode.FILE, CompressionMode.STORAGE]
)
def test_every_storage_and_compression(tmp_path, plugin, mode):
    if (plugin, mode) == (StoragePlugin.SQLITE3, CompressionMode.STORAGE):
        pytest.skip("sqlite3 knows no chunks to compress")
    path = write_with(tmp_path / "bag", plugin, mode)
    assert numbers(read_bag(path)) == list(range(COUNT))
    file = next(p for p in path.iterdir() if p.name != "metadata.yaml")
    stream = read_bag(file)  # the bare file
    assert numbers(stream) == list(range(COUNT))
    assert stream.report.warnings == []
    (path / "metadata.yaml").unlink()
    stream = read_bag(path)
    assert numbers(stream) == list(range(COUNT))
    assert "has no metadata.yaml" in stream.report.warnings[0]


def test_messages_come_in_order_of_time(tmp_path):
    times = [*range(0, 40, 2), *range(1, 40, 2)]
    path = write(tmp_path / "bag", times=times, size=256)  # large images: several chunks that overlap in time
    stamps = [stamp for _, stamp, _ in read_bag(path)]
    assert stamps == sorted(stamps)
    assert len(stamps) == 80
    (cut := tmp_path / "cut.mcap").write_bytes((path / "bag.mcap").read_bytes()[:-50])
    stamps = [stamp for _, stamp, _ in read_bag(cut)]
    assert stamps == sorted(stamps)
    assert len(stamps) == 80


def test_a_split_recording_is_one_bag(tmp_path):
    folder = tmp_path / "split"
    folder.mkdir()
    for part in (0, 1, 10):
        one = write_with(tmp_path / f"part{part}", StoragePlugin.MCAP)
        shutil.move(one / f"part{part}.mcap", folder / f"split_{part}.mcap")
        shutil.rmtree(one)
    assert find_bags(tmp_path) == [folder]
    assert len(numbers(read_bag(folder))) == 3 * COUNT


def test_topics_of_unknown_type_are_ignored_unless_asked_for(tmp_path):
    path = write_with(tmp_path / "bag", StoragePlugin.SQLITE3)
    with sqlite3.connect(path / "bag.db3") as database:
        database.execute("UPDATE topics SET type = 'my_msgs/msg/Thing'")
        database.execute("DELETE FROM message_definitions")
        database.execute(
            "INSERT INTO topics SELECT 99, '/other', 'std_msgs/msg/Bool', serialization_format, "
            "offered_qos_profiles, type_description_hash FROM topics"
        )
    assert list(read_bag(path)) == []
    with pytest.raises(UserError, match="type my_msgs/msg/Thing of /number is unknown"):
        read_bag(path, ["/number"])


def test_only_what_is_asked_for_is_read(tmp_path):
    assert {topic for topic, _, _ in read_bag(write(tmp_path / "bag", 3), ["/number"])} == {"/number"}


# ---- reading what is not whole


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_a_cut_mcap_gives_what_is_left_and_says_so(tmp_path, share):
    path = write(tmp_path / "bag", size=64)
    file = path / "bag.mcap"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    stream = read_bag(path)
    found = numbers(stream)
    assert found == list(range(len(found)))
    assert len(found) > (share - 0.35) * COUNT
    total = stream.report.messages
    (text,) = (text for text in stream.report.warnings if "cut off or damaged" in text)
    assert re.search(rf"recovered {total} messages, the last at \d+\.\d+ s; ", text)
    assert "bytes are an unfinished piece" in text or "had not written yet is lost" in text
    if total < 2 * COUNT:
        assert any(f"promises {COUNT} messages on /number" in text for text in stream.report.warnings)


def test_a_count_beyond_all_numbers_is_no_reason_to_give_up(tmp_path):
    """int() of the .inf of YAML is neither a ValueError nor a TypeError."""
    path = write(tmp_path / "bag", 3) / "metadata.yaml"
    path.write_text(re.sub(r"message_count: \d+", "message_count: .inf", path.read_text()))
    stream = read_bag(tmp_path / "bag")
    assert numbers(stream) == [0, 1, 2]
    assert any("metadata.yaml is damaged" in text for text in stream.report.warnings)


def test_every_cut_of_a_small_mcap_is_readable_or_refused(tmp_path):
    data = (write(tmp_path / "bag", 3) / "bag.mcap").read_bytes()
    file = tmp_path / "cut.mcap"
    for length in range(0, len(data), 23):
        file.write_bytes(data[:length])
        found = []
        with contextlib.suppress(UserError):  # nothing left of it; anything else is a bug
            found = numbers(read_bag(file))
        assert found == list(range(len(found)))


def test_a_damaged_chunk_is_left_out_and_said(tmp_path):
    path = write_with(tmp_path / "bag", StoragePlugin.MCAP, CompressionMode.STORAGE)
    data = bytearray((path / "bag.mcap").read_bytes())
    at = data.index(b"\x28\xb5\x2f\xfd") + 60
    data[at : at + 20] = bytes(20)
    (path / "bag.mcap").write_bytes(data)
    stream = read_bag(path)
    list(stream)
    assert any("a chunk of messages is damaged" in text for text in stream.report.warnings)
    assert any(
        "metadata.yaml promises 60 messages on /number, 0 are" in text for text in stream.report.warnings
    )


def test_an_index_that_leaves_messages_out_does_not_hide_them(tmp_path):
    """Some writers index chunks without the offsets of messages; rosbags then finds none and says nothing."""
    from mcap.writer import IndexType
    from mcap.writer import Writer as McapWriter

    file = tmp_path / "bag.mcap"
    with file.open("wb") as stream:
        writer = McapWriter(stream, index_types=IndexType.CHUNK)
        writer.start(profile="ros2")
        text, _ = bags.typestore().generate_msgdef(ARRAY, ros_version=2)
        schema = writer.register_schema(ARRAY, "ros2msg", text.encode())
        channel = writer.register_channel("/number", "cdr", schema)
        for k in range(20):
            writer.add_message(
                channel, T0 + k, bytes(bags.typestore().serialize_cdr(number(k), ARRAY)), T0 + k
            )
        writer.finish()
    assert numbers(read_bag(file)) == list(range(20))


def test_a_broken_metadata_file_is_not_needed(tmp_path):
    path = write(tmp_path / "bag", 3)
    (path / "metadata.yaml").write_text("rosbag2_bagfile_information: {")
    stream = read_bag(path)
    assert numbers(stream) == [0, 1, 2]
    assert "metadata.yaml is damaged" in stream.report.warnings[0]


def test_a_missing_part_is_said(tmp_path):
    path = write(tmp_path / "bag", 3)
    info = yaml.safe_load((path / "metadata.yaml").read_text())
    info["rosbag2_bagfile_information"]["relative_file_paths"].append("bag_1.mcap")
    (path / "metadata.yaml").write_text(yaml.safe_dump(info))
    stream = read_bag(path)
    assert numbers(stream) == [0, 1, 2]
    assert "bag_1.mcap named in metadata.yaml is missing" in stream.report.warnings[0]


def test_a_damaged_database(tmp_path):
    file = tmp_path / "bag.db3"
    file.write_bytes(b"SQLite format 3\0" + bytes(3000))
    with pytest.raises(UserError, match="no readable sqlite3 bag"):
        read_bag(file)


def test_mistakes_in_reading(tmp_path):
    path = write(tmp_path / "bag", 1)
    with pytest.raises(UserError, match="has no topic /cam; it has /camera, /number"):
        read_bag(path, ["/cam"])
    with pytest.raises(UserError, match="nothing does not exist"):
        read_bag(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match=r"notes.txt is no bag"):
        read_bag(tmp_path / "notes.txt")
    (tmp_path / "empty.mcap").write_bytes(b"")
    with pytest.raises(UserError, match="empty or no MCAP file"):
        read_bag(tmp_path / "empty.mcap")
    (tmp_path / "void").mkdir()
    with pytest.raises(UserError, match=r"holds no \.mcap or \.db3 file"):
        read_bag(tmp_path / "void")
    (tmp_path / "x.db3.zstd").write_bytes(zstandard.compress(b"x")[:-3])
    with pytest.raises(UserError):
        read_bag(tmp_path / "x.db3.zstd")


def test_a_message_that_does_not_fit_its_type(tmp_path):
    path = write_with(tmp_path / "bag", StoragePlugin.SQLITE3)
    with sqlite3.connect(path / "bag.db3") as database:
        database.execute("UPDATE messages SET data = x'0001000099'")
    with pytest.raises(UserError, match=r"at 1700000000.000 s: a message of /number is not a valid"):
        list(read_bag(path))


def test_finding_bags(tmp_path):
    for name in ("run2/a", "run1/b", "run1/a"):
        write(tmp_path / name, 1)
    shutil.copy(tmp_path / "run1/a/a.mcap", tmp_path / "loose.mcap")
    shutil.copy(tmp_path / "run1/a/a.mcap", tmp_path / "lost.mcap")
    (tmp_path / ".tmp-half").mkdir()
    shutil.copy(tmp_path / "run1/a/a.mcap", tmp_path / ".tmp-half/half.mcap")
    found = [str(path.relative_to(tmp_path)) for path in find_bags(tmp_path)]
    assert found == ["loose.mcap", "lost.mcap", "run1/a", "run1/b", "run2/a"]
    with pytest.raises(UserError, match="several recordings"):
        read_bag(tmp_path)
    (tmp_path / "void").mkdir()
    with pytest.raises(UserError, match="there is no bag in"):
        find_bags(tmp_path / "void")
    with pytest.raises(UserError, match="nowhere does not exist"):
        find_bags(tmp_path / "nowhere")


# ---- recordings of real robots


@needs()
@pytest.mark.parametrize(
    ("name", "topic", "count"),
    [
        ("donkeycar/full_compressed_db3", "/camera/image_raw/compressed", 1000),
        ("donkeycar/full_compressed_mcap", "/camera/image_raw/compressed", 1000),
        ("odd_bags/bayer_rggb8_mcap", "/camera/image_raw", 40),
        ("odd_bags/chunk_lz4.mcap", "/camera/image_raw/compressed", 100),
        ("odd_bags/compressed_png_format_string_mcap", "/camera/image_raw/compressed", 30),
        ("odd_bags/killed_no_footer.mcap", "/camera/image_raw/compressed", 91),
        ("odd_bags/no_index.mcap", "/camera/image_raw/compressed", 100),
        ("odd_bags/raw_rgb8_db3", "/camera/image_raw", 40),
        ("odd_bags/zstd_message_db3", "/camera/image_raw/compressed", 100),
        ("rerun_ros2_mcap", "/compressed_image", 1),
        ("rerun_ros2_mcap", "/image", 1),
    ],
)
def test_real_recordings(name, topic, count):
    if not (RECORDINGS / name).exists():
        pytest.skip(f"{name} is not among the recordings")
    pictures = [msg for _, _, msg in read_bag(RECORDINGS / name, [topic])]
    assert len(pictures) >= count
    first = messages.decode(pictures[0]).astype(int)
    if name.startswith(("odd_bags", "donkeycar")):  # all are one drive: the same first frame, Bayer nearly so
        assert first.shape == (120, 160, 3)
        assert np.abs(first.mean((0, 1)) - [131.6, 124.0, 94.6]).max() < 0.5
