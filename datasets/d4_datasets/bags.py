"""Bags in and out, without ROS: write MCAP bags, read MCAP, sqlite3 and ROS 1 bags, damaged or odd ones too.

Reading prefers the file's index and falls back to a linear scan that recovers whatever a killed recorder left
behind; what was lost is said in the report of the stream, never hidden.
"""

from __future__ import annotations

import heapq
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import cv2
import numpy as np
import yaml
from rosbags.rosbag2 import StoragePlugin, Writer

from d4_datasets import packed
from d4_datasets.errors import UserError
from d4_datasets.msgtypes import Definitions, TopicInfo, decoder, typestore
from d4_datasets.rosbag1 import Rosbag1File
from d4_datasets.storage import BagReport, McapFile, Raw, SqliteFile, receive_time

STORAGE_SUFFIXES = (".mcap", ".db3")
_ROS1_SUFFIXES = (".bag", ".bag.active")
_EXPECTED = "an .mcap, .db3 or .bag file"
_LARGEST_METADATA = 1 << 22
_LATEST = 1 << 62  # ns, in the year 2116


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

    Args: path: a bag folder (with or without metadata.yaml), or one .mcap or .db3 file, zstd-compressed or
        not, or a .bag file of ROS 1. given: what else defines types. scratch: where compressed files are
        unpacked; None for the system's place.

    Raises UserError if there is no bag, or nothing in it can be read.
    """

    def __init__(
        self, path: str | Path, given: Definitions | None = None, scratch: Path | None = None
    ) -> None:
        self.path, self._given, self._scratch = Path(path), given, scratch
        self.report = BagReport(self.path)
        files, self._promised = _bag_files(self.path, self.report)
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._decoders: dict[str, Callable[[bytes], Any]] = {}
        try:
            self._storages = list(self._open(files))
        except BaseException:
            self.close()
            raise
        self._topics: dict[str, TopicInfo] = {}
        for storage in self._storages:
            for name, topic in storage.topics.items():
                if name not in self._topics or not self._topics[name].definition:
                    self._topics[name] = topic
        self.topics = {name: topic.type for name, topic in sorted(self._topics.items())}

    def close(self) -> None:
        """Remove what was unpacked; nothing can be read afterwards."""
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    def _open(self, files: Sequence[Path]) -> Iterator[McapFile | SqliteFile | Rosbag1File]:
        """The files that can be read; of several one may be damaged beyond that."""
        errors: list[UserError] = []
        for file in files:
            try:
                yield self._storage(file)
            except UserError as error:
                errors.append(error)
        if len(errors) == len(files):
            raise errors[0]
        for damage in errors:
            self.report.warn(f"{damage}; this part of the bag is left out")

    def _storage(self, file: Path) -> McapFile | SqliteFile | Rosbag1File:
        plain = file
        if file.suffix == ".zstd":
            self._temporary = self._temporary or tempfile.TemporaryDirectory(
                prefix=".d4-bag-", dir=self._scratch
            )
            plain = Path(self._temporary.name) / file.stem
            if damage := packed.unpack_file(file, plain):
                self.report.warn(f"{file} is cut off or damaged ({damage}); read as far as it goes")
        kind = McapFile if plain.suffix == ".mcap" else SqliteFile if plain.suffix == ".db3" else Rosbag1File
        return kind(plain, file, self.report)

    def require(self, topics: Sequence[str]) -> None:
        """Raise UserError unless every one of `topics` is in the bag and of a known type."""
        for name in topics:
            if name not in self._topics:
                held = ", ".join(self.topics) or "no topics at all"
                raise UserError(f"{self.path} has no topic {name}; it has {held}")
            self._decoder(name)

    def decodable(self, topic: str) -> bool:
        """Whether the messages of `topic` can be decoded."""
        try:
            self._decoder(topic)
        except UserError:
            return False
        return True

    def _decoder(self, name: str) -> Callable[[bytes], Any]:
        known = self._decoders.get(name)
        if known is None:
            try:
                known = self._decoders[name] = decoder(self._topics[name], self._given)
            except UserError as error:
                raise UserError(f"{self.path}: the type {self.topics[name]} of {name} {error}") from None
        return known

    def decode(self, topic: str, data: bytes) -> Any:
        """The message in `data`, as read from `topic`; raises UserError if the bytes do not fit the type."""
        decode = self._decoder(topic)
        try:
            return decode(data)
        except Exception as error:  # whatever garbage bytes can provoke in generated code
            kind = self._topics[topic].type
            raise UserError(f"a message of {topic} is not a valid {kind}: {error}") from None

    def raw(self, topics: Sequence[str]) -> Iterator[Raw]:
        """(topic, receive time in ns, bytes) of all messages on `topics`, in receive-time order."""
        wanted = frozenset(topics)
        counts, lost = dict.fromkeys(wanted, 0), dict.fromkeys(wanted, 0)
        merged = heapq.merge(*(s.messages(wanted) for s in self._storages), key=receive_time)
        for topic, stamp, data in merged:
            # Compression of single messages shows by itself: CDR never starts with the magic of zstd.
            if data[:4] == packed.ZSTD_MAGIC and not self._topics[topic].is_ros1:
                try:
                    data = packed.unpack(data, "zstd")
                except packed.Damaged:
                    lost[topic] += 1
                    continue
            if not 0 <= stamp <= _LATEST:
                lost[topic] += 1
                continue
            counts[topic] += 1
            yield topic, stamp, data
        self.report.messages = sum(counts.values())
        self._tell_losses(counts, lost)

    def _tell_losses(self, counts: dict[str, int], lost: dict[str, int]) -> None:
        for topic in sorted(counts):
            if lost[topic]:
                self.report.warn(
                    f"{self.path}: {lost[topic]} messages of {topic} cannot be unpacked or were received at "
                    "impossible times, and are left out"
                )
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
        raise UserError(f"there is no bag in {source}; expected .mcap, .db3 or .bag files or folders of them")
    return found


def _find_bags(path: Path, above: tuple[Path, ...] = ()) -> list[Path]:
    if is_bag(path):
        return [path]
    real = path.resolve()
    if not path.is_dir() or real in above:  # a link may lead back up
        return []
    children = sorted(child for child in path.iterdir() if not child.name.startswith("."))
    return [bag for child in children for bag in _find_bags(child, (*above, real))]


def is_bag(path: Path) -> bool:
    """Whether this is one bag: a file, or a folder with metadata.yaml or with nothing but its parts."""
    if path.is_file():
        return _is_file(path)
    if not path.is_dir():
        return False
    if (path / "metadata.yaml").exists():
        return True
    files = _storage_files(path)
    others = (child for child in path.iterdir() if not child.name.startswith("."))
    is_alone = not any(child.is_dir() or child.name.endswith(_ROS1_SUFFIXES) for child in others)
    return bool(files) and is_alone and _one_recording(files)


def bag_files(path: Path) -> list[Path]:
    """The files that belong to a bag."""
    if path.is_file():
        return [path]
    # What sqlite makes beside a database to read it says nothing of the recording.
    return [file for file in path.iterdir() if file.is_file() and not file.name.endswith("-shm")]


def _is_file(path: Path) -> bool:
    return _is_storage(path) or path.name.endswith(_ROS1_SUFFIXES)


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
        raise UserError(f"{path} does not exist; give a bag folder or {_EXPECTED}")
    if path.is_file():
        if not _is_file(path):
            raise UserError(f"{path} is no bag; expected a bag folder or {_EXPECTED}")
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
        if path.stat().st_size > _LARGEST_METADATA:
            raise ValueError("it is too large")
        info = yaml.safe_load(path.read_text(encoding="utf-8"))["rosbag2_bagfile_information"]
        names = list(dict.fromkeys(Path(name).name for name in info["relative_file_paths"]))
        topics = info["topics_with_message_count"]
        return names, {topic["topic_metadata"]["name"]: int(topic["message_count"]) for topic in topics}
    except (yaml.YAMLError, RecursionError, KeyError, TypeError, ValueError, ArithmeticError):
        report.warn(f"{path} is damaged; read from the bag's files alone")
        return [], {}
