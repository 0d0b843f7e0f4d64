"""rosbag2 in and out, without ROS: write MCAP bags, read MCAP and sqlite3 bags that may be damaged or odd.

Reading prefers the file's index and falls back to a linear scan that recovers whatever a killed recorder left
behind; what was lost is said in the report of the stream, never hidden.
"""

from __future__ import annotations

import heapq
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import cv2
import numpy as np
import yaml
import zstandard
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys.store import Typestore

from d4_datasets.errors import UserError
from d4_datasets.storage import (
    BagReport,
    McapFile,
    SqliteFile,
    TopicInfo,
    receive_time,
    typestore,
    typestore_of,
    unzstd,
)

STORAGE_SUFFIXES = (".mcap", ".db3")


# ---- messages ----


def new(msgtype: str, **fields: Any) -> Any:
    """A zero-filled message of `msgtype`, e.g. "geometry_msgs/msg/Twist", with top-level `fields` set."""
    store = typestore()
    if msgtype not in store.fielddefs:
        raise UserError(f"the message type {msgtype} is unknown; standard ROS 2 types can be written")
    zeros = {name: _zero(description) for name, description in store.fielddefs[msgtype][1]}
    unknown = fields.keys() - zeros.keys()
    if unknown:
        raise UserError(f"{msgtype} has no field {min(unknown)!r}; its fields are {', '.join(zeros)}")
    return store.types[msgtype](**{**zeros, **fields})


def _zero(description: Any) -> Any:
    """The zero value of one field in rosbags' type description: (kind, detail)."""
    kind, detail = int(description[0]), description[1]
    if kind == 1:  # base type: (name, limit)
        return {"string": "", "bool": False}.get(detail[0], 0.0 if detail[0].startswith("float") else 0)
    if kind == 2:  # nested message: type name
        return new(detail)
    element, length = detail
    length = (
        length if kind == 3 else 0
    )  # array of fixed length, or sequence (where the number is an upper bound)
    if int(element[0]) == 1 and element[1][0] != "string":
        dtype = {"octet": "uint8", "byte": "uint8", "char": "uint8"}.get(element[1][0], element[1][0])
        return np.zeros(length, dtype)
    return [_zero(element) for _ in range(length)]


def header(stamp_ns: int, frame_id: str = "") -> Any:
    """A std_msgs/Header."""
    stamp = new("builtin_interfaces/msg/Time", sec=stamp_ns // 10**9, nanosec=stamp_ns % 10**9)
    return new("std_msgs/msg/Header", stamp=stamp, frame_id=frame_id)


def image(rgb: np.ndarray, stamp_ns: int, frame_id: str = "camera") -> Any:
    """A sensor_msgs/Image (rgb8) of an RGB uint8 [H, W, 3] array."""
    height, width, _ = rgb.shape
    data = np.ascontiguousarray(rgb, np.uint8).reshape(-1)
    head = header(stamp_ns, frame_id)
    return new(
        "sensor_msgs/msg/Image",
        header=head,
        height=height,
        width=width,
        encoding="rgb8",
        step=3 * width,
        data=data,
    )


def compressed_image(rgb: np.ndarray, stamp_ns: int, frame_id: str = "camera", format: str = "png") -> Any:
    """A sensor_msgs/CompressedImage of an RGB uint8 [H, W, 3] array; `format` is png (lossless) or jpeg."""
    flags = [cv2.IMWRITE_PNG_COMPRESSION, 1] if format == "png" else [cv2.IMWRITE_JPEG_QUALITY, 95]
    good, data = cv2.imencode(f".{format}", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), flags)
    if not good:
        raise ValueError(f"cannot encode an image of shape {rgb.shape} as {format}")
    text = f"rgb8; {format} compressed bgr8"
    return new(
        "sensor_msgs/msg/CompressedImage",
        header=header(stamp_ns, frame_id),
        format=text,
        data=data.reshape(-1),
    )


def float64_array(values: Sequence[float] | np.ndarray) -> Any:
    """A std_msgs/Float64MultiArray."""
    return new("std_msgs/msg/Float64MultiArray", data=np.asarray(values, np.float64).reshape(-1))


# ---- writing ----


class BagWriter:
    """Writes a rosbag2 MCAP bag (a folder) aside and gives it its name on `close`.

    As a context manager an exception, and a kill at any time, leaves no bag under `path`. `custom` is stored
    in the bag's metadata. Raises UserError if `path` exists.
    """

    def __init__(self, path: str | Path, custom: Mapping[str, str] | None = None) -> None:
        self.path = Path(path)
        if self.path.exists():
            raise UserError(f"{self.path} exists already; choose another name or remove it")
        # The storage file is called as its folder, so the folder has its final name inside an aside folder.
        self._aside = self.path.parent / f".tmp-{self.path.name}"
        shutil.rmtree(self._aside, ignore_errors=True)
        self._writer = Writer(self._aside / self.path.name, version=9, storage_plugin=StoragePlugin.MCAP)
        for key, value in (custom or {}).items():
            self._writer.set_custom_data(key, value)
        self._writer.open()
        self._connections: dict[str, Any] = {}

    def write(self, topic: str, type: str, stamp_ns: int, msg: Any) -> None:
        """Append `msg` to `topic`, received at `stamp_ns` (nanoseconds)."""
        connection = self._connections.get(topic)
        if connection is None:
            if type not in typestore().types:
                raise UserError(
                    f"the message type {type} of {topic} is unknown; standard ROS 2 types can be written"
                )
            connection = self._writer.add_connection(topic, type, typestore=typestore())
            self._connections[topic] = connection
        elif connection.msgtype != type:
            raise UserError(
                f"{topic} carries {connection.msgtype} in this bag, it cannot carry {type} as well"
            )
        self._writer.write(connection, stamp_ns, typestore().serialize_cdr(msg, type))

    def close(self) -> None:
        """Finish the bag and move it to `path`."""
        self._writer.close()
        (self._aside / self.path.name).rename(self.path)
        self._aside.rmdir()

    def abort(self) -> None:
        """Throw away what was written."""
        self._writer.abort()
        shutil.rmtree(self._aside, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


# ---- reading ----


class Bag:
    """An open bag: `topics` (name -> type), messages in receive-time order, a `report` of what was wrong with
    it.

    `path` is a bag folder (with or without metadata.yaml), or one .mcap or .db3 file, zstd-compressed or not.
    Raises UserError if there is no bag, or nothing in it can be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.report = BagReport(self.path)
        files, self._promised = _bag_files(self.path, self.report)
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._storages = [self._storage(file) for file in files]
        self._topics: dict[str, TopicInfo] = {}
        for storage in self._storages:
            for name, topic in storage.topics.items():
                if name not in self._topics or not self._topics[name].definition:
                    self._topics[name] = topic
        self.topics = {name: topic.type for name, topic in sorted(self._topics.items())}

    def _storage(self, file: Path) -> McapFile | SqliteFile:
        plain = file
        if file.suffix == ".zstd":
            self._temporary = self._temporary or tempfile.TemporaryDirectory(prefix="d4-bag-")
            plain = Path(self._temporary.name) / file.stem
            with file.open("rb") as packed, plain.open("wb") as out:
                try:
                    zstandard.ZstdDecompressor().copy_stream(packed, out)
                except zstandard.ZstdError as error:
                    raise UserError(f"{file} is not a readable zstd file: {error}") from None
        kind = McapFile if plain.suffix == ".mcap" else SqliteFile
        return kind(plain, file, self.report)

    def require(self, topics: Sequence[str]) -> None:
        """Raise UserError unless every one of `topics` is in the bag and of a known type."""
        for name in topics:
            if name not in self._topics:
                held = ", ".join(self.topics) or "no topics at all"
                raise UserError(f"{self.path} has no topic {name}; it has {held}")
            self._store(name)

    def decodable(self, topic: str) -> bool:
        """Whether the messages of `topic` can be decoded."""
        try:
            self._store(topic)
        except UserError:
            return False
        return True

    def _store(self, name: str) -> Typestore:
        topic = self._topics[name]
        store = typestore_of(topic)
        if store is None:
            raise UserError(
                f"{self.path}: the type {topic.type} of {name} is unknown and the bag holds no usable "
                "definition of it; record it again as MCAP, which stores definitions, or leave this topic out"
            )
        return store

    def decode(self, topic: str, data: bytes) -> Any:
        """The message in `data`, as read from `topic`; raises UserError if the bytes do not fit the type."""
        kind = self._topics[topic].type
        try:
            return self._store(topic).deserialize_cdr(data, kind)
        except UserError:
            raise
        except Exception as error:  # whatever garbage bytes can provoke in generated code
            raise UserError(f"a message of {topic} is not a valid {kind}: {error}") from None

    def raw(self, topics: Sequence[str]) -> Iterator[tuple[str, int, bytes]]:
        """(topic, receive time in ns, CDR bytes) of all messages on `topics`, in receive-time order."""
        wanted = frozenset(topics)
        counts = dict.fromkeys(wanted, 0)
        merged = heapq.merge(*(s.messages(wanted) for s in self._storages), key=receive_time)
        for topic, stamp, data in merged:
            counts[topic] += 1
            yield topic, stamp, unzstd(data)
        self.report.messages = sum(counts.values())
        for topic in sorted(wanted):
            promised = self._promised.get(topic, 0)
            if counts[topic] < promised:
                self.report.warn(
                    f"{self.path}: metadata.yaml promises {promised} messages on {topic}, "
                    f"{counts[topic]} are in the bag"
                )


class BagStream:
    """The decoded messages of `topics`: iterate for (topic, receive_ns, msg); `report` is complete
    afterwards.
    """

    def __init__(self, bag: Bag, topics: Sequence[str]) -> None:
        self.bag, self.topics, self.report = bag, tuple(topics), bag.report

    def __iter__(self) -> Iterator[tuple[str, int, Any]]:
        for topic, stamp, data in self.bag.raw(self.topics):
            try:
                msg = self.bag.decode(topic, data)
            except UserError as error:
                raise UserError(f"{self.bag.path} at {stamp / 1e9:.3f} s: {error}") from None
            yield topic, stamp, msg


def read_bag(path: str | Path, topics: Sequence[str] | None = None) -> BagStream:
    """Read the messages of `topics` (default: all whose type is known) in receive-time order.

    Raises UserError, before the first message, if the bag is unreadable, lacks one of `topics` or its type.
    """
    bag = Bag(path)
    if topics is None:
        topics = [name for name in bag.topics if bag.decodable(name)]
    bag.require(topics)
    return BagStream(bag, topics)


def find_bags(source: str | Path) -> list[Path]:
    """The bags under `source`, sorted: itself if it is one, else all below it. Raises UserError if there is
    none.
    """
    source = Path(source)
    if not source.exists():
        raise UserError(f"{source} does not exist; give a bag or a folder of bags")
    found = _find_bags(source)
    if not found:
        ros1 = next(source.rglob("*.bag"), None) if source.is_dir() else source
        if ros1 is not None and ros1.suffix == ".bag":
            raise UserError(
                f"{ros1} is a ROS 1 bag; convert it with: rosbags-convert --src {ros1} --dst <folder>"
            )
        raise UserError(f"there is no bag in {source}; expected .mcap or .db3 files or folders of them")
    return found


def _find_bags(path: Path) -> list[Path]:
    if is_bag(path):
        return [path]
    children = [] if path.is_file() else sorted(p for p in path.iterdir() if not p.name.startswith("."))
    return [bag for child in children if child.is_dir() or _is_storage(child) for bag in _find_bags(child)]


def is_bag(path: Path) -> bool:
    """Whether this is one bag: a storage file, or a folder with metadata.yaml or with its parts."""
    if path.is_file():
        return _is_storage(path)
    return (path / "metadata.yaml").exists() or bool(
        _storage_files(path) and _one_recording(_storage_files(path))
    )


def _is_storage(path: Path) -> bool:
    return path.name.removesuffix(".zstd").endswith(STORAGE_SUFFIXES)


def _storage_files(folder: Path) -> list[Path]:
    def split_number(path: Path) -> tuple[str, int]:
        match = re.match(r"(.*?)_?(\d*)\.", path.name)
        return (match[1], int(match[2] or -1)) if match else (path.name, -1)

    return sorted((p for p in folder.iterdir() if p.is_file() and _is_storage(p)), key=split_number)


def _one_recording(files: list[Path]) -> bool:
    """Whether `files` are the parts of one split recording: name_0.mcap, name_1.mcap, ..."""
    stems = {re.sub(r"_\d+$", "", path.name.split(".")[0]) for path in files}
    return len(files) == 1 or (len(stems) == 1 and all(re.search(r"_\d+\.", path.name) for path in files))


def _bag_files(path: Path, report: BagReport) -> tuple[list[Path], dict[str, int]]:
    """The storage files of a bag, and how many messages its metadata promises on every topic."""
    if not path.exists():
        raise UserError(f"{path} does not exist; give a bag folder or an .mcap or .db3 file")
    if path.is_file():
        if not _is_storage(path):
            raise UserError(f"{path} is no bag; expected a bag folder or an .mcap or .db3 file")
        return [path], {}
    names, promised = _metadata(path / "metadata.yaml", report)
    files = [path / name for name in names if (path / name).is_file()]
    for name in names:
        if not (path / name).is_file():
            report.warn(f"{path}: the file {name} named in metadata.yaml is missing")
    if not files:
        files = _storage_files(path)
        if not files:
            raise UserError(f"{path} holds no .mcap or .db3 file, so it is no bag")
        if not _one_recording(files):
            raise UserError(
                f"{path} holds several recordings and no metadata.yaml; give its files one by one"
            )
    return files, promised


def _metadata(path: Path, report: BagReport) -> tuple[list[str], dict[str, int]]:
    """(file names, messages per topic) of a metadata.yaml; empty where it is absent or broken."""
    if not path.exists():
        report.warn(
            f"{path.parent} has no metadata.yaml (the recorder was killed?); read from its files alone"
        )
        return [], {}
    try:
        info = yaml.safe_load(path.read_text())["rosbag2_bagfile_information"]
        names = [Path(name).name for name in info["relative_file_paths"]]
        topics = info["topics_with_message_count"]
        return names, {topic["topic_metadata"]["name"]: int(topic["message_count"]) for topic in topics}
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, ValueError):
        report.warn(f"{path} is damaged; read from the bag's files alone")
        return [], {}
