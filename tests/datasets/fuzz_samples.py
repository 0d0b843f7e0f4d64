"""Small whole recordings of every kind that d4-ingest reads, for `fuzz_readers` to damage."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import footage_files as footage
import foreign_lerobot as foreign
import minecraft_files as minecraft
import numpy as np
import ros1_files
import yaml
from mcap.writer import CompressionType, IndexType
from mcap.writer import Writer as McapWriter
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from test_ingest import ROBOT, TICK, drive
from test_lerobot_source import JOINTS, arm
from test_messages import raw

from d4_datasets import bags
from d4_datasets.contract import Contract
from d4_datasets.ingest import ingest
from d4_datasets.msgtypes import typestore

Item = tuple[str, str, int, bytes]  # topic, type, time, CDR
IMAGE, JOINT, GRIP = "sensor_msgs/msg/Image", "sensor_msgs/msg/JointState", "hand_msgs/msg/Grip"
GRIP_TEXT = "std_msgs/Header header\nuint8 OPEN=0\nbool[<=4] closed\ngeometry_msgs/Vector3[2] v\n"


@dataclass(frozen=True)
class Sample:
    """A folder `root` with a recording in it, and the `files` below it that may be changed.

    contract, msg_path: of the folder that a changed copy lies in.
    """

    name: str
    root: Path
    files: Sequence[str]
    contract: Callable[[Path], Contract]
    msg_path: Callable[[Path], Sequence[Path]] = lambda _: ()


# ---- bags ----


def bag_contract() -> dict[str, Any]:
    """The robot of `test_ingest` with a depth camera and joints."""
    spec = yaml.safe_load(ROBOT)
    align = {"strategy": "hold", "timeline": "header", "tolerance_ms": 150}
    spec["observations"] += [
        {"name": "depth", "topic": "/depth", "type": IMAGE, "size": [4, 6], "depth_m": [0, 3]},
        {"name": "arm", "topic": "/arm", "type": JOINT, "select": ["position[name=elbow]"]},
    ]
    spec["observations"] = [stream | {"align": align} for stream in spec["observations"]]
    return spec


def messages() -> list[Item]:
    """A drive of two short episodes, in order of time."""
    log = drive(2)
    for topic, _, stamp, msg in list(log.items):
        if topic == "/cam":
            head = msg.header
            depth = raw("16UC1", np.full((4, 6), 900, "<u2"), padding=4)
            depth.header = head
            log.add("/depth", IMAGE, stamp, depth)
            joints = bags.new(JOINT, header=head, name=["wrist", "elbow"], position=np.array([1.0, 0.5]))
            log.add("/arm", JOINT, stamp, joints)
    return [
        (topic, kind, stamp, bytes(typestore().serialize_cdr(msg, kind)))
        for topic, kind, stamp, msg in sorted(log.items, key=lambda item: item[2])
    ]


def write_mcap(path: Path, items: Sequence[Item], **options: Any) -> None:
    """By the mcap library, which leaves out what `options` say."""
    with path.open("wb") as stream:
        writer = McapWriter(stream, **options)
        writer.start(profile="ros2")
        channels: dict[str, int] = {}
        for topic, kind, stamp, data in items:
            if topic not in channels:
                text, _ = typestore().generate_msgdef(kind, ros_version=2)
                schema = writer.register_schema(kind, "ros2msg", text.encode())
                channels[topic] = writer.register_channel(topic, "cdr", schema)
            writer.add_message(channels[topic], stamp, data, stamp)
        writer.finish()


def write_rosbag2(
    path: Path, items: Sequence[Item], plugin: StoragePlugin, mode: CompressionMode = CompressionMode.NONE
) -> None:
    """By the writer of rosbags: a folder with metadata.yaml."""
    writer = Writer(path, version=9, storage_plugin=plugin)
    if mode != CompressionMode.NONE:
        writer.set_compression(mode, CompressionFormat.ZSTD)
    with writer:
        connections: dict[str, Any] = {}
        for topic, kind, stamp, data in items:
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, kind, typestore=typestore())
            writer.write(connections[topic], stamp, data)


def _write_bags(root: Path) -> None:
    items, none = messages(), IndexType.NONE
    variants: dict[str, dict[str, Any]] = {
        "mcap": {"compression": CompressionType.NONE, "chunk_size": 4000, "enable_crcs": False},
        "mcap-lz4": {"compression": CompressionType.LZ4, "chunk_size": 4000, "enable_crcs": False},
        "mcap-zstd": {"chunk_size": 4000},
        "mcap-plain": {"use_chunking": False, "enable_crcs": False},
        "mcap-noindex": {
            "compression": CompressionType.NONE, "chunk_size": 4000, "enable_crcs": False,
            "index_types": none, "use_summary_offsets": False, "use_statistics": False,
            "repeat_channels": False,
        },
    }  # fmt: skip
    for name, options in variants.items():
        (root / name).mkdir()
        write_mcap(root / name / "a.mcap", items, **options)
    for name, compression in (("ros1", ""), ("ros1-bz2", "bz2"), ("ros1-lz4", "lz4")):
        ros1_files.write(root / name / "a.bag", items, compression, 4000)
    write_rosbag2(root / "folder", items, StoragePlugin.MCAP)
    write_rosbag2(root / "folder-zstd", items, StoragePlugin.MCAP, CompressionMode.FILE)
    write_rosbag2(root / "db3", items, StoragePlugin.SQLITE3)
    write_rosbag2(root / "db3-message", items, StoragePlugin.SQLITE3, CompressionMode.MESSAGE)
    for part in range(2):
        write_rosbag2(root / f"part{part}", items[part::2], StoragePlugin.SQLITE3)
        (root / "split").mkdir(exist_ok=True)
        (root / f"part{part}/part{part}.db3").rename(root / f"split/split_{part}.db3")
    (root / "yaml").mkdir()
    write_mcap(root / "yaml/a.mcap", items)
    (root / "yaml/robot.yaml").write_text(yaml.safe_dump(bag_contract()))
    _write_typed(root / "typed", items)


def _write_typed(folder: Path, items: Sequence[Item]) -> None:
    """A bag with a type that only a .msg file beside it defines."""
    store = get_typestore(Stores.LATEST)
    store.register(dict(get_types_from_msg(GRIP_TEXT, GRIP)))
    zero = bags.new("geometry_msgs/msg/Vector3")
    grip = store.types[GRIP](header=bags.header(0), closed=np.array([True, False]), v=[zero, zero])
    data = bytes(store.serialize_cdr(grip, GRIP))
    bag = folder / "bag"
    bag.mkdir(parents=True)
    with sqlite3.connect(bag / "bag_0.db3") as database:
        database.execute("CREATE TABLE topics(id INTEGER PRIMARY KEY, name TEXT, type TEXT, "
                         "serialization_format TEXT, offered_qos_profiles TEXT)")  # fmt: skip
        database.execute("CREATE TABLE messages(id INTEGER PRIMARY KEY, topic_id INTEGER, timestamp INTEGER, "
                         "data BLOB)")  # fmt: skip
        names = dict.fromkeys((topic, kind) for topic, kind, *_ in items)
        ids = {topic: number for number, (topic, _) in enumerate(names, 1)} | {"/gripper": 99}
        for topic, kind in (*names, ("/gripper", GRIP)):
            database.execute("INSERT INTO topics VALUES (?, ?, ?, 'cdr', '')", (ids[topic], topic, kind))
        grips = [("/gripper", GRIP, items[0][2] + k * TICK, data) for k in range(6)]
        for topic, _, stamp, content in (*items, *grips):
            row = (ids[topic], stamp, content)
            database.execute("INSERT INTO messages(topic_id, timestamp, data) VALUES (?, ?, ?)", row)
    (folder / "types/hand_msgs/msg").mkdir(parents=True)
    (folder / "types/hand_msgs/msg/Grip.msg").write_text(GRIP_TEXT)


def _typed_contract() -> Contract:
    spec = bag_contract()
    spec["actions"][1] |= {"topic": "/gripper", "type": GRIP, "select": ["closed[0]"]}
    return Contract.from_dict(spec)


# ---- everything else ----


def _write_films(root: Path) -> None:
    frames = [footage.picture(k, (16, 24)) for k in range(12)]
    rows = [{"time": k / 10, "base.linear.x": k, "base.angular.z": -k, "task": "go"} for k in range(12)]
    tables = {"film-mp4": ".csv", "film-mkv": ".jsonl", "film-avi": ".parquet"}
    for name, suffix in tables.items():
        (root / name).mkdir()
        path = root / name / f"a.{name[5:]}"
        codec, pixels = ("mjpeg", "yuvj420p") if path.suffix == ".avi" else ("libx264", "yuv420p")
        footage.write_video(path, frames, codec=codec, pixels=pixels)
        footage.write_table(path.with_suffix(suffix), rows)
    suffixes = (".png", ".jpg", ".webp")
    pictures = {f"{k}{suffixes[k % 3]}": frame for k, frame in enumerate(frames)}
    footage.write_pictures(root / "pictures/a", pictures)
    footage.write_table(
        root / "pictures/a.csv", [row | {"image": name} for row, name in zip(rows, pictures, strict=True)]
    )


def _write_games(root: Path) -> None:
    lines = [
        minecraft.line("w d", dx=k, dy=-k, hotbar=k % 9, stats={"minecraft.mine_block:x": k})
        for k in range(10)
    ]
    minecraft.write_recording(root / "contractor", lines)
    minecraft.write_stream(root / "minerl/a", 9, before=2)


def _write_lerobot(root: Path) -> None:
    episodes = [foreign.episode(8, seed) for seed in range(3)]
    foreign.write(root / "lerobot3", episodes, names=JOINTS)
    foreign.write(root / "lerobot2", episodes, version="v2.1", names=JOINTS, kind="image")
    ingest([root / "mcap"], Contract.from_dict(bag_contract()), root / "ours")


def write_all(root: Path) -> None:
    """Write every sample to a folder of its name below `root`."""
    root.mkdir(parents=True)
    for write in (_write_bags, _write_films, _write_games, _write_lerobot):
        write(root)


def all_samples(root: Path) -> list[Sample]:
    """What `write_all` has written."""
    bag = Contract.from_dict(bag_contract())
    film = footage.contract(size=(8, 12), files={"stamps": "table"})
    other: dict[str, Callable[[Path], Contract]] = {
        "typed": lambda _: _typed_contract(),
        "yaml": lambda folder: Contract.load(folder / "robot.yaml"),
        "contractor": lambda _: minecraft.contract(),
        "minerl": lambda _: minecraft.contract("minerl"),
        "lerobot2": lambda _: arm(),
        "lerobot3": lambda _: arm(),
        "pictures": lambda _: film,
    }
    samples = []
    for folder in sorted(path for path in root.iterdir() if not path.name.startswith(("part", "."))):
        files = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
        plain = footage.contract() if folder.name.startswith("film") else bag
        contract = other.get(folder.name, lambda _, plain=plain: plain)
        if folder.name == "typed":
            samples.append(Sample("typed", folder, files, contract, lambda source: (source / "types",)))
        else:
            samples.append(Sample(folder.name, folder, files, contract))
    return samples
