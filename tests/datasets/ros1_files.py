"""Bags of ROS 1, made of the messages of rosbag2 ones."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rosbags.rosbag1 import Writer
from rosbags.typesys import Stores, get_typestore

from d4_datasets.bags import Bag
from d4_datasets.msgtypes import typestore

NOETIC = get_typestore(Stores.ROS1_NOETIC)


def convert(source: Path, path: Path, compression: str = "", chunk: int = 1 << 20) -> Path:
    """The bag `source` as a .bag file, in chunks of `chunk` bytes."""
    bag = Bag(source)
    items = ((topic, bag.topics[topic], stamp, data) for topic, stamp, data in bag.raw(list(bag.topics)))
    return write(path, items, compression, chunk)


def write(
    path: Path, items: Iterable[tuple[str, str, int, bytes]], compression: str = "", chunk: int = 1 << 20
) -> Path:
    """Messages (topic, type, time, CDR) as a .bag file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = Writer(path)
    writer.chunk_threshold = chunk
    if compression:
        writer.set_compression(Writer.CompressionFormat[compression.upper()])
    connections = {}
    with writer:
        for topic, kind, stamp, data in items:
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, kind, typestore=NOETIC)
            writer.write(connections[topic], stamp, typestore().cdr_to_ros1(data, kind))
    return path
