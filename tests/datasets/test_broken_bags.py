"""Bags that are cut at any place, damaged, or made to do harm: what is whole is read, the rest is said, and
neither memory nor the user's folder takes any of it."""

from __future__ import annotations

import os
import re
import sqlite3
import struct
import subprocess
import sys

import lz4.frame
import numpy as np
import pytest
import yaml
import zstandard
from fuzz_samples import write_mcap, write_rosbag2
from mcap.writer import CompressionType, IndexType
from mcap.writer import Writer as McapWriter
from rosbags.rosbag2 import CompressionMode, StoragePlugin
from test_ingest import drive, robot

from d4_datasets import bags, packed, sources, storage
from d4_datasets.bags import Bag, find_bags, read_bag
from d4_datasets.errors import UserError, sentence
from d4_datasets.ingest import ingest

ARRAY = "std_msgs/msg/Float64MultiArray"
T0 = 1_700_000_000_000_000_000
COUNT = 60


def item(k, size=30):
    values = np.random.default_rng(k).normal(size=size)
    values[0] = k
    return "/number", ARRAY, T0 + k, bytes(bags.typestore().serialize_cdr(bags.float64_array(values), ARRAY))


ITEMS = [item(k) for k in range(COUNT)]


def numbers(stream):
    return [int(msg.data[0]) for topic, _, msg in stream if topic == "/number"]


def read(path):
    """(numbers, warnings), or (what is left, sentence) where it is refused."""
    try:
        stream = read_bag(path)
        return numbers(stream), stream.report.warnings
    except UserError as error:
        return [], [str(error)]


def mcap(path, items=ITEMS, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mcap(path, items, **{"chunk_size": 2000, **options})
    return path


PLAIN = {"compression": CompressionType.NONE}
NO_INDEX = {"index_types": IndexType.NONE, "use_summary_offsets": False, "use_statistics": False,
            "repeat_channels": False, "repeat_schemas": False}  # fmt: skip


# ---- every compression, whole


@pytest.mark.parametrize("index", [{}, NO_INDEX])
@pytest.mark.parametrize("compression", list(CompressionType))
def test_chunks_of_every_compression(tmp_path, compression, index):
    assert read(mcap(tmp_path / "a.mcap", compression=compression, **index)) == (list(range(COUNT)), [])


@pytest.mark.parametrize("index", [{}, NO_INDEX])
def test_without_chunks(tmp_path, index):
    assert read(mcap(tmp_path / "a.mcap", use_chunking=False, **index)) == (list(range(COUNT)), [])


@pytest.mark.parametrize("plugin", list(StoragePlugin))
@pytest.mark.parametrize("mode", [CompressionMode.FILE, CompressionMode.MESSAGE])
def test_a_split_bag_with_compression(tmp_path, plugin, mode):
    folder = tmp_path / "split"
    folder.mkdir()
    for part in range(3):
        write_rosbag2(tmp_path / f"part{part}", ITEMS[20 * part : 20 * part + 20], plugin, mode)
        (file,) = (p for p in (tmp_path / f"part{part}").iterdir() if p.name != "metadata.yaml")
        file.rename(folder / file.name.replace(f"part{part}", f"split_{part}"))
    found, warnings = read(folder)
    assert found == list(range(COUNT))
    assert len(warnings) == 1  # no metadata.yaml
    assert folder in find_bags(tmp_path)


# ---- cut


@pytest.mark.parametrize(
    "options",
    [PLAIN, {"compression": CompressionType.LZ4}, {}, {**PLAIN, **NO_INDEX}, {"use_chunking": False}],
    ids=["plain", "lz4", "zstd", "no index", "no chunks"],
)
def test_every_cut_of_an_mcap_gives_the_first_messages(tmp_path, options):
    data = mcap(tmp_path / "a.mcap", **options).read_bytes()
    cut, best = tmp_path / "cut.mcap", 0
    for length in range(0, len(data) - 1, 173):
        cut.write_bytes(data[:length])
        found, warnings = read(cut)
        assert found == list(range(len(found)))
        assert len(found) >= best
        assert any("cut off or damaged" in text or "is empty or no MCAP" in text for text in warnings)
        best = len(found)
    assert best >= COUNT - 1


@pytest.mark.parametrize("mode", [CompressionMode.NONE, CompressionMode.MESSAGE])
def test_every_cut_of_a_database_gives_what_is_left(tmp_path, mode):
    write_rosbag2(tmp_path / "bag", ITEMS, StoragePlugin.SQLITE3, mode)
    data = (tmp_path / "bag/bag.db3").read_bytes()
    cut = tmp_path / "cut.db3"
    counts = []
    for length in range(0, len(data) + 1, 2048):
        cut.write_bytes(data[:length])
        found, warnings = read(cut)
        assert len(set(found)) == len(found)
        assert set(found) <= set(range(COUNT))
        assert warnings or len(found) == COUNT
        counts.append(len(found))
    assert counts[-1] == COUNT
    assert len(set(counts)) > 4  # more and more: row by row what the index cannot lead to


@pytest.mark.parametrize("share", [0.5, 0.7, 0.95])
@pytest.mark.parametrize("plugin", list(StoragePlugin))
def test_a_compressed_file_that_is_cut_is_read_as_far_as_it_goes(tmp_path, plugin, share):
    items = [item(k, 2000) for k in range(COUNT)]
    write_rosbag2(tmp_path / "bag", items, plugin, CompressionMode.FILE)
    (file,) = (tmp_path / "bag").glob("*.zstd")
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    found, warnings = read(tmp_path / "bag")
    assert found == sorted(set(found))
    assert len(found) >= (share - 0.3) * COUNT
    assert any(f"{file} is cut off or damaged (it is cut off)" in text for text in warnings)


@pytest.mark.parametrize("last", [b"", b"\x89MCAP0\r\n", b"garbage"])
def test_the_last_part_of_a_split_bag_may_be_dead(tmp_path, last):
    """A recorder that is killed leaves one file in which nothing stands yet; the others are whole."""
    mcap(tmp_path / "bag/bag_0.mcap")
    (tmp_path / "bag/bag_1.mcap").write_bytes(last)
    found, warnings = read(tmp_path / "bag")
    assert found == list(range(COUNT))
    assert any("bag_1.mcap is empty or no MCAP file" in text and "left out" in text for text in warnings)
    (tmp_path / "bag/bag_0.mcap").write_bytes(b"")
    assert "bag_0.mcap is empty or no MCAP file" in read(tmp_path / "bag")[1][0]


# ---- damaged


@pytest.mark.parametrize("options", [PLAIN, {**PLAIN, **NO_INDEX}])
def test_a_wrong_checksum_leaves_out_the_chunk(tmp_path, options):
    """Without an index the checksum was not looked at, and wrong numbers came out."""
    data = bytearray(mcap(tmp_path / "a.mcap", **options).read_bytes())
    at = data.index(ITEMS[10][3])
    data[at + 60] ^= 1
    (tmp_path / "a.mcap").write_bytes(data)
    found, warnings = read(tmp_path / "a.mcap")
    assert 10 not in found
    assert COUNT - 10 < len(found) < COUNT
    (text,) = (w for w in warnings if "chunk" in w)
    assert re.search(
        r"a chunk of messages is damaged and left out \(its checksum is wrong\): \d+ bytes, received from "
        r"\d+\.\d+ to \d+\.\d+ s",
        text,
    )


def test_many_damaged_chunks_are_told_in_few_warnings(tmp_path):
    items = [(topic, kind, T0 + k * 10**9, body) for k, (topic, kind, _, body) in enumerate(ITEMS)]
    data = bytearray(mcap(tmp_path / "a.mcap", items, **(PLAIN | {"chunk_size": 1})).read_bytes())
    for _, _, _, body in items:
        data[data.index(body) + 60] ^= 1
    (tmp_path / "a.mcap").write_bytes(data)
    found, warnings = read(tmp_path / "a.mcap")
    assert found == []
    assert len(warnings) == 21
    assert any("more than 20 chunks are damaged" in text for text in warnings)


def test_a_damaged_message_among_compressed_ones_is_left_out(tmp_path):
    write_rosbag2(tmp_path / "bag", ITEMS, StoragePlugin.SQLITE3, CompressionMode.MESSAGE)
    with sqlite3.connect(tmp_path / "bag/bag.db3") as database:
        database.execute("UPDATE messages SET data = substr(data, 1, 40) WHERE id = 8")
    found, warnings = read(tmp_path / "bag")
    assert found == [k for k in range(COUNT) if k != 7]
    assert any("1 messages of /number cannot be unpacked" in text for text in warnings)


def test_rows_that_are_no_messages_are_left_out(tmp_path):
    write_rosbag2(tmp_path / "bag", ITEMS, StoragePlugin.SQLITE3)
    with sqlite3.connect(tmp_path / "bag/bag.db3") as database:
        database.execute("UPDATE messages SET data = 'text' WHERE id = 2")
        database.execute("UPDATE messages SET timestamp = 'noon' WHERE id = 3")
        database.execute("UPDATE messages SET timestamp = -5 WHERE id = 4")
        database.execute("UPDATE messages SET topic_id = 77 WHERE id = 5")
    found, warnings = read(tmp_path / "bag")
    assert found == [0, *range(5, COUNT)]
    assert any("2 rows are no messages and are left out" in text for text in warnings)
    assert any(
        "1 messages of /number cannot be unpacked or were received at impossible" in w for w in warnings
    )


def test_times_beyond_this_century_are_left_out(tmp_path):
    """A log time of 64 bits does not fit the arithmetic of 63, and stopped with an OverflowError."""
    odd = [("/number", ARRAY, stamp, ITEMS[0][3]) for stamp in ((1 << 64) - 1, 1 << 63, (1 << 62) + 1)]
    found, warnings = read(mcap(tmp_path / "a.mcap", [*ITEMS, *odd]))
    assert found == list(range(COUNT))
    assert any("3 messages of /number" in text for text in warnings)


def test_a_chunk_that_stands_twice_in_the_index_gives_its_messages_once(tmp_path, monkeypatch):
    path = mcap(tmp_path / "a.mcap")
    real = storage.SeekingReader.get_summary

    def doubled(self):
        summary = real(self)
        summary.chunk_indexes *= 2
        return summary

    monkeypatch.setattr(storage.SeekingReader, "get_summary", doubled)
    assert read(path)[0] == list(range(COUNT))


def test_messages_out_of_order_wait_for_each_other_but_not_for_ever(tmp_path, monkeypatch):
    order = [*range(0, COUNT, 2), *range(1, COUNT, 2)]
    items = [ITEMS[k] for k in order]
    path = mcap(tmp_path / "a.mcap", items, use_chunking=False)
    assert read(path)[0] == list(range(COUNT))
    batches = [([("/x", k, bytes(100))], None) for k in order]
    assert [stamp for _, stamp, _ in storage.in_order(batches)] == list(range(COUNT))
    held = [stamp for _, stamp, _ in storage.in_order(batches, most=1000)]
    assert sorted(held) == list(range(COUNT))
    assert held != sorted(held)
    assert held[0] == 0


# ---- sizes that lie


def at_most(megabytes, code):
    """Run Python code in a process that may take so much memory beyond what importing takes."""
    head = (
        "import resource; from d4_datasets import bags, packed, recording; packed.LARGEST = 1 << 26\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        f"resource.setrlimit(resource.RLIMIT_AS, (used + ({megabytes} << 20),) * 2)\n"
    )
    return subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True, check=False)


READ = "s = bags.read_bag({path!r}); print(sum(1 for _ in s)); print(s.report.warnings)"


def mcap_of(path, *records):
    """An MCAP file of these records (opcode, content)."""
    body = b"".join(struct.pack("<BQ", code, len(content)) + content for code, content in records)
    path.write_bytes(b"\x89MCAP0\r\n" + body)
    return path


def text(value):
    return struct.pack("<I", len(value)) + value.encode()


DEFINITION = "float64[] data"
SCHEMA = (3, struct.pack("<H", 1) + text("my_msgs/msg/Numbers") + text("ros2msg") + text(DEFINITION))
CHANNEL = (4, struct.pack("<HH", 1, 1) + text("/number") + text("cdr") + struct.pack("<I", 0))
MESSAGE = (
    struct.pack("<HIQQ", 1, 0, T0, T0) + b"\0\1\0\0" + struct.pack("<Id", 1, 5.0)[:4] + bytes(4) + bytes(8)
)


def chunk(content, compression, size=None):
    head = struct.pack("<QQQI", T0, T0, len(content) if size is None else size, 0)
    packers = {"zstd": zstandard.compress, "lz4": lz4.frame.compress, "": bytes}
    data = packers[compression](content)
    return 6, head + text(compression) + struct.pack("<Q", len(data)) + data


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_a_chunk_that_unpacks_to_gigabytes_is_left_out(tmp_path, compression):
    bomb = chunk(bytes(100 << 20), compression)
    assert len(bomb[1]) < 1 << 20
    path = mcap_of(tmp_path / "a.mcap", SCHEMA, CHANNEL, (5, MESSAGE), bomb, (5, MESSAGE))
    done = at_most(400, READ.format(path=str(path)))
    assert done.stdout.startswith("2\n"), done.stderr
    assert "it unpacks to more than 64 MiB" in done.stdout


def test_a_message_that_unpacks_to_gigabytes_is_left_out(tmp_path):
    write_rosbag2(tmp_path / "bag", ITEMS, StoragePlugin.SQLITE3, CompressionMode.MESSAGE)
    bomb = zstandard.compress(bytes(100 << 20))
    with sqlite3.connect(tmp_path / "bag/bag.db3") as database:
        database.execute("UPDATE messages SET data = ? WHERE id = 8", (bomb,))
        # A frame says how large its content is; here 1 TiB.
        database.execute("UPDATE messages SET data = x'28b52ffde0000000000001000001000078' WHERE id = 9")
    done = at_most(400, READ.format(path=str(tmp_path / "bag")))
    assert done.stdout.startswith(f"{COUNT - 2}\n"), done.stderr
    assert "2 messages of /number cannot be unpacked" in done.stdout


def test_a_file_that_unpacks_to_a_thousand_times_its_size_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "_FREELY", 1 << 20)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = tmp_path / "a.mcap.zstd"
    content = mcap(tmp_path / "whole/a.mcap").read_bytes()
    path.write_bytes(zstandard.compress(content + bytes(1 << 28)))
    found, warnings = read(path)
    assert found == list(range(COUNT))  # what comes before
    assert any("it unpacks to more than 1000 times its size" in text for text in warnings)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mcap.zstd", "whole"]


@pytest.mark.parametrize("code", [3, 4, 5, 6, 9, 200])
@pytest.mark.parametrize("length", [1 << 33, 1 << 62, (1 << 64) - 1])
def test_lengths_beyond_the_file_take_no_memory(tmp_path, code, length):
    path = mcap_of(tmp_path / "a.mcap", SCHEMA, CHANNEL, (5, MESSAGE))
    path.write_bytes(path.read_bytes() + struct.pack("<BQ", code, length) + bytes(100))
    stream = read_bag(path)
    assert len(list(stream)) == 1
    assert any("cut off or damaged" in warning for warning in stream.report.warnings)


def test_chunks_in_chunks_are_not_followed(tmp_path):
    inner = chunk(b"", "")
    for _ in range(3000):
        inner = chunk(struct.pack("<BQ", 6, len(inner[1])) + inner[1], "")
    path = mcap_of(tmp_path / "a.mcap", SCHEMA, CHANNEL, (5, MESSAGE), inner)
    assert len(list(read_bag(path))) == 1


def test_an_attachment_larger_than_memory_is_passed_over(tmp_path):
    path = mcap_of(tmp_path / "a.mcap", SCHEMA, CHANNEL, (5, MESSAGE))
    with path.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        file.write(struct.pack("<BQ", 9, 3 << 30))
        file.seek(3 << 30, os.SEEK_CUR)  # a hole in the file, which takes no disk
        file.write(struct.pack("<BQ", 5, len(MESSAGE)) + MESSAGE)
    done = at_most(600, READ.format(path=str(path)))
    assert done.stdout.startswith("2\n"), done.stderr


def test_a_definition_as_large_as_the_file_is_none(tmp_path):
    huge = (
        3,
        struct.pack("<H", 1) + text("my_msgs/msg/Numbers") + text("ros2msg") + text("float64 x\n" * 200_000),
    )
    path = mcap_of(tmp_path / "a.mcap", huge, CHANNEL, (5, MESSAGE))
    with pytest.raises(UserError, match="the type my_msgs/msg/Numbers of /number is unknown"):
        read_bag(path, ["/number"])


# ---- metadata.yaml


def info(names):
    about = {"relative_file_paths": names, "topics_with_message_count": []}
    return yaml.safe_dump({"rosbag2_bagfile_information": about})


def test_names_in_the_metadata_lead_nowhere_else(tmp_path):
    mcap(tmp_path / "secret/other.mcap")
    mcap(tmp_path / "bag/bag_0.mcap", ITEMS[:3])
    for name in (
        "../secret/other.mcap",
        str(tmp_path / "secret/other.mcap"),
        "..",
        "/",
        "",
        "a\0b",
        "x" * 200,
    ):
        (tmp_path / "bag/metadata.yaml").write_text(info([name]))
        found, warnings = read(tmp_path / "bag")
        assert found == [0, 1, 2]
        assert any("is missing" in text for text in warnings)


@pytest.mark.parametrize(
    "content",
    [
        "[" * 900,
        "x" * (5 << 20),
        "a: &a [*a]",
        "&a [&b [*a, *a], *b]",
        "rosbag2_bagfile_information: 5",
        "rosbag2_bagfile_information: {relative_file_paths: [[1]], topics_with_message_count: []}",
        "rosbag2_bagfile_information: {relative_file_paths: 7, topics_with_message_count: 7}",
        "!!python/object/apply:os.system ['touch /tmp/ran']",
        "\0\1\2",
        "",
    ],
)
def test_metadata_that_are_none_are_not_needed(tmp_path, content):
    mcap(tmp_path / "bag/bag_0.mcap", ITEMS[:3])
    (tmp_path / "bag/metadata.yaml").write_text(content)
    found, warnings = read(tmp_path / "bag")
    assert found == [0, 1, 2]
    assert any("metadata.yaml is damaged" in text for text in warnings)
    assert len(" ".join(warnings)) < 1000


def test_a_file_named_twice_is_read_once(tmp_path):
    mcap(tmp_path / "bag/bag_0.mcap")
    (tmp_path / "bag/metadata.yaml").write_text(info(["bag_0.mcap"] * 5))
    assert read(tmp_path / "bag")[0] == list(range(COUNT))


# ---- what else a recorder writes


def test_types_that_nobody_knows_disturb_no_stream(tmp_path):
    """Events of services, actions and parameters, and channels of Foxglove, stand in bags of ROS beside the
    topics; some have definitions that no parser takes."""
    path = tmp_path / "a.mcap"
    odd = {
        "/add/_service_event": (
            "a_interfaces/srv/Add_Event",
            "ros2msg",
            "cdr",
            "Info info\nA[<=1] r",
        ),
        "/scene": ("foxglove.SceneUpdate", "protobuf", "protobuf", "\x00\x01"),
        "/json": ("state", "jsonschema", "json", "{}"),
        "/none": ("my_msgs/msg/None", "ros2msg", "cdr", ""),
        "/broken": ("my_msgs/msg/Broken", "ros2msg", "cdr", "what? is [this"),
        "/idl": ("my_msgs/msg/Idl", "ros2idl", "cdr", "module {"),
    }
    with path.open("wb") as stream:
        writer = McapWriter(stream)
        writer.start(profile="ros2")
        for topic, (kind, encoding, messages, definition) in odd.items():
            schema = writer.register_schema(kind, encoding, definition.encode())
            channel = writer.register_channel(topic, messages, schema)
            for k in range(3):
                writer.add_message(channel, T0 + k, b"\0\1\0\0\5", T0 + k)
        text, _ = bags.typestore().generate_msgdef(ARRAY, ros_version=2)
        schema = writer.register_schema(ARRAY, "ros2msg", text.encode())
        channel = writer.register_channel("/number", "cdr", schema)
        for _, _, stamp, data in ITEMS:
            writer.add_message(channel, stamp, data, stamp)
        writer.finish()
    assert read(path) == (list(range(COUNT)), [])
    bag = Bag(path)
    assert [topic for topic in bag.topics if bag.decodable(topic)] == ["/number"]


@pytest.mark.parametrize("topic", ["/cam", "/pose"])
def test_a_stream_without_a_single_message_is_named(tmp_path, topic):
    items = [
        (name, kind, stamp, bytes(bags.typestore().serialize_cdr(msg, kind)))
        for name, kind, stamp, msg in sorted(drive(1).items, key=lambda item: item[2])
    ]
    write_rosbag2(tmp_path / "bag", items, StoragePlugin.SQLITE3)
    with sqlite3.connect(tmp_path / "bag/bag.db3") as database:
        query = "DELETE FROM messages WHERE topic_id = (SELECT id FROM topics WHERE name = ?)"
        database.execute(query, (topic,))
    with pytest.raises(UserError, match=f"{topic} has no message"):
        ingest([tmp_path / "bag"], robot(), tmp_path / "data")
    assert os.listdir(tmp_path) == ["bag"]


def test_a_bag_file_does_not_hide_the_bags_beside_it(tmp_path):
    """A folder with one .mcap file counted as that bag, whatever else lay in it."""
    one, two = mcap(tmp_path / "bags/a.mcap"), mcap(tmp_path / "bags/later/b.mcap")
    assert find_bags(tmp_path) == [one, two.parent]
    (tmp_path / "mixed").mkdir()
    paths = [tmp_path / "mixed/x.mcap", tmp_path / "mixed/y.bag"]
    for path in paths:
        path.touch()
    assert find_bags(tmp_path / "mixed") == paths


def test_links_that_lead_back_up_are_not_followed(tmp_path):
    mcap(tmp_path / "bags/a/a.mcap")
    for name in ("bags/up", "bags/a/up", "bags/b/up", "bags/b/upper", "bags/b/c/d"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(tmp_path / "bags")
    (tmp_path / "bags/a/a.mcap").rename(tmp_path / "bags/a.mcap")
    assert find_bags(tmp_path / "bags") == [tmp_path / "bags/a.mcap"]
    assert [one.path for one in sources.find(tmp_path / "bags")] == [tmp_path / "bags/a.mcap"]


# ---- permissions


def as_another_user(body):
    """What `body()` returns in a process that may not read what is shut: root may read everything."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        if os.geteuid() == 0:
            os.setresuid(65534, 65534, 65534)
        try:
            os.write(writer, str(body()).encode()[:60_000])
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    with os.fdopen(reader) as stream:
        return stream.read()


def test_what_may_not_be_read_is_one_sentence(tmp_path):
    shut = [tmp_path / "shut", *(tmp_path / plugin.name for plugin in StoragePlugin)]
    shut[0].mkdir()
    for path, plugin in zip(shut[1:], StoragePlugin, strict=True):
        write_rosbag2(path, ITEMS, plugin)
    files_of_bags = [next(p for p in path.iterdir() if p.suffix != ".yaml") for path in shut[1:]]
    for path in (shut[0], *files_of_bags):
        path.chmod(0)
    for parent in [tmp_path, *tmp_path.parents[:2]]:
        if not os.geteuid():
            parent.chmod(0o755)

    def told(use, path):
        try:
            return use(path)
        except Exception as error:
            return sentence(error)

    for use, path in ((find_bags, shut[0]), *((Bag, path) for path in (*shut[1:], *files_of_bags))):
        answer = as_another_user(lambda use=use, path=path: told(use, path))
        assert "Permission denied" in answer or "unable to open database" in answer, answer
        assert str(path) in answer
