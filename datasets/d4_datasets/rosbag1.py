"""Bags of ROS 1 (`.bag`, format 2.0): their topics, and raw messages in order of time.

A bag is read from front to back once, over its chunks and past their content: the index behind each chunk
says which topics and times are in it. What has no index, because the recorder was killed or the file is cut
off, is unpacked for that. The index at the end of the file is used for one thing: to go on after a damage.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from rosbags.typesys.msg import normalize_msgtype

from d4_datasets import packed
from d4_datasets.errors import UserError
from d4_datasets.msgtypes import TopicInfo
from d4_datasets.storage import BagReport, Raw, in_order, lost

_MAGIC = b"#ROSBAG V2.0\n"
_MESSAGE, _FILE, _INDEX, _CHUNK, _CHUNK_INFO, _CONNECTION = range(2, 8)
_LONGEST_HEADER = 1 << 20
_LONGEST = 1 << 24  # of a definition, or the index of a chunk
_LOOSE = 1 << 22  # bytes of messages outside chunks that are taken together
_ENTRY = np.dtype([("sec", "<u4"), ("nsec", "<u4"), ("offset", "<u4")])

Fields = dict[str, bytes]


class _Record(NamedTuple):
    """A record at `place`, whose data lie in [begin, end)."""

    op: int
    fields: Fields
    place: int
    begin: int
    end: int


@dataclass
class _Chunk:
    """Where messages lie in the file, in what compression, and what is known of them."""

    begin: int
    end: int
    compression: str
    is_cut: bool = False
    count: int = 0
    first: int = 1 << 63
    last: int = -1
    connections: set[int] = field(default_factory=set)

    def note(self, connection: int, first: int, last: int, count: int = 1) -> None:
        """Messages of a connection, received from `first` to `last` ns."""
        self.connections.add(connection)
        self.first, self.last = min(self.first, first), max(self.last, last)
        self.count += count

    def forget(self) -> None:
        """Take nothing for known."""
        self.count, self.first, self.last = 0, 1 << 63, -1
        self.connections.clear()


class Rosbag1File:
    """One .bag file."""

    def __init__(self, path: Path, shown: Path, report: BagReport) -> None:
        self.path, self.shown, self.report = path, shown, report
        self.topics: dict[str, TopicInfo] = {}
        self._channels: dict[int, str] = {}
        self._seen: set[int] = set()  # connections, also of those that are left out
        self._chunks: list[_Chunk] = []
        self._size = path.stat().st_size
        with path.open("rb") as stream:
            magic = stream.read(len(_MAGIC))
            if magic != _MAGIC:
                other = magic.startswith(b"#ROS")
                raise UserError(
                    f"{shown} is no ROS 1 bag that can be read"
                    + (": its format is older than 2.0; convert it with rosbag fix" if other else "")
                )
            is_whole = self._scan(stream)
            self._chunks.sort(key=lambda chunk: chunk.first)
        if not is_whole:
            count = sum(chunk.count for chunk in self._chunks)
            last = max((chunk.last for chunk in self._chunks if chunk.count), default=-1)
            rest = "what was behind it, or not written yet, is lost"
            report.warn(lost(shown, "is cut off or damaged (recorder killed?)", count, last, rest))
        if not self.topics:
            raise UserError(f"{shown} holds no topics: it is empty, or cut off before the first message")

    # -- what is where --

    def _scan(self, stream: BinaryIO) -> bool:
        """Find chunks and topics; whether the file is whole."""
        index, missing, place, is_whole = 0, 0, len(_MAGIC), True
        places: list[int] | None = None
        while place < self._size:
            try:
                record = _record(stream, place)
                if record.op == _FILE:
                    index = _number(record.fields, "index_pos", 8)
                    missing = _number(record.fields, "chunk_count", 4)
                    if record.fields.get("encryptor"):
                        raise UserError(f"{self.shown} is encrypted, and cannot be read")
                self._take(stream, record)
                missing -= record.op == _CHUNK_INFO
                place = record.end
            except _Damaged:
                is_whole = False
                if self._chunks:  # its index may not be whole
                    self._chunks[-1].forget()
                places = _chunk_places(stream, index) if places is None else places
                place = min((at for at in places if at > place), default=self._size)
        for chunk in self._chunks:
            if chunk.count == 0 or not chunk.connections <= self._seen:
                self._look_into(stream, chunk)
        return is_whole and index > 0 and missing == 0 and place == self._size

    def _take(self, stream: BinaryIO, record: _Record) -> None:
        """Note what one record of the file says."""
        op, fields, _, begin, end = record
        if op == _CHUNK:
            compression = fields.get("compression", b"none").decode(errors="replace")
            is_cut = end > self._size
            # One that was being written has no size yet; its messages come as records of their own.
            if end > begin:
                self._chunks.append(_Chunk(begin, min(end, self._size), compression, is_cut))
        elif end > self._size:
            raise _Damaged
        elif op == _CONNECTION:
            self._connect(fields, _data(stream, record))
        elif op == _INDEX and self._chunks:
            self._take_index(_number(fields, "conn", 4), _number(fields, "count", 4), _data(stream, record))
        elif op == _MESSAGE:
            self._take_loose(record)

    def _take_index(self, connection: int, count: int, data: bytes) -> None:
        """What is in the last chunk of one connection."""
        if len(data) != count * _ENTRY.itemsize:
            raise _Damaged
        if count:
            times = np.frombuffer(data, _ENTRY)
            stamps = times["sec"].astype(np.int64) * 1_000_000_000 + times["nsec"]
            self._chunks[-1].note(connection, int(stamps.min()), int(stamps.max()), count)

    def _take_loose(self, record: _Record) -> None:
        """A message outside of any chunk: the last chunk of a recorder that was killed."""
        last = self._chunks[-1] if self._chunks else None
        if last is None or last.compression or last.end != record.place or last.end - last.begin > _LOOSE:
            last = _Chunk(record.place, record.place, "")
            self._chunks.append(last)
        last.end = record.end
        time = _time(record.fields)
        last.note(_number(record.fields, "conn", 4), time, time)

    def _connect(self, fields: Fields, data: bytes) -> None:
        """Note a topic with its type and definition."""
        connection, about = _number(fields, "conn", 4), _fields(data)
        if connection in self._seen:
            return
        self._seen.add(connection)
        topic = fields.get("topic", b"").decode(errors="replace")
        topic = "/" + "/".join(part for part in topic.split("/") if part)
        kind = about.get("type", b"").decode(errors="replace")
        text = about.get("message_definition", b"").decode(errors="replace")
        info = TopicInfo(normalize_msgtype(kind), "ros1msg", text)
        if topic in self.topics and self.topics[topic].type != info.type:
            self.report.warn(
                f"{self.shown}: {topic} carries {self.topics[topic].type} and {info.type}; the latter is "
                "left out"
            )
            return
        self._channels[connection] = topic
        self.topics.setdefault(topic, info)

    def _look_into(self, stream: BinaryIO, chunk: _Chunk) -> None:
        """Find out what is in a chunk without an index, or with one of connections that nothing describes."""
        chunk.forget()
        for record, data in _records(self._content(stream, chunk)):
            if record.op == _CONNECTION:
                with suppress(_Damaged):
                    self._connect(record.fields, data)
            elif record.op == _MESSAGE:
                time = _time(record.fields)
                chunk.note(_number(record.fields, "conn", 4), time, time)

    # -- messages --

    def messages(self, topics: frozenset[str]) -> Iterator[Raw]:
        """(topic, receive time in ns, bytes) of the messages on `topics`, in order of time."""
        wanted = {id: topic for id, topic in self._channels.items() if topic in topics}
        chunks = [chunk for chunk in self._chunks if chunk.connections & wanted.keys()]
        yield from in_order(self._by_chunk(chunks, wanted))

    def _by_chunk(
        self, chunks: list[_Chunk], wanted: Mapping[int, str]
    ) -> Iterator[tuple[list[Raw], int | None]]:
        with self.path.open("rb") as stream:
            for chunk, after in zip_longest(chunks, chunks[1:]):
                found: list[Raw] = []
                count = 0
                for record, data in _records(self._content(stream, chunk)):
                    if record.op == _MESSAGE:
                        count += 1
                        connection = _number(record.fields, "conn", 4)
                        if connection in wanted:
                            found.append((wanted[connection], _time(record.fields), data))
                if count < chunk.count:
                    self.report.warn(
                        f"{self.shown}: {chunk.count - count} messages of a chunk are damaged and left out"
                    )
                yield found, None if after is None else after.first

    def _content(self, stream: BinaryIO, chunk: _Chunk) -> bytes:
        """The records of a chunk before any compression; those that are left if it is cut."""
        size = chunk.end - chunk.begin
        stream.seek(chunk.begin)
        try:
            if size > packed.LARGEST:
                raise packed.Damaged(f"it has more than {packed.LARGEST >> 20} MiB")
            data = stream.read(size)
            if chunk.is_cut:
                return packed.salvage(data, chunk.compression)
            return packed.unpack(data, chunk.compression)
        except packed.Damaged as error:
            self.report.warn(f"{self.shown}: a chunk of messages is damaged and left out ({error})")
            return b""


# ---- records: length and fields of a header, length and data ----


class _Damaged(Exception):
    """Bytes that are no record."""


def _record(stream: BinaryIO, place: int) -> _Record:
    """The record at `place`; its data may go beyond the end of the file."""
    try:
        stream.seek(place)
    except (OSError, OverflowError):  # beyond what a file can be
        raise _Damaged from None
    header = stream.read(_length(stream.read(4), _LONGEST_HEADER))
    fields = _fields(header)
    size = _length(stream.read(4))
    begin = place + 8 + len(header)
    return _Record(_number(fields, "op", 1), fields, place, begin, begin + size)


def _records(content: bytes) -> Iterator[tuple[_Record, bytes]]:
    """The records of an unpacked chunk with their data, up to the first that is not whole."""
    place = 0
    while place < len(content):
        try:
            size = _length(content[place : place + 4], len(content))
            fields = _fields(content[place + 4 : place + 4 + size])
            begin = place + 8 + size
            end = begin + _length(content[begin - 4 : begin])
            record = _Record(_number(fields, "op", 1), fields, place, begin, end)
            if record.op == _MESSAGE:
                _number(fields, "conn", 4), _time(fields)
        except _Damaged:
            return
        if end > len(content):
            return
        yield record, content[begin:end]
        place = end


def _fields(header: bytes) -> Fields:
    """The fields of a header, `name=value` each with its length."""
    fields, place = {}, 0
    while place < len(header):
        size = _length(header[place : place + 4])
        name, equals, value = header[place + 4 : place + 4 + size].partition(b"=")
        place += 4 + size
        if not equals or place > len(header):
            raise _Damaged
        fields[name.decode(errors="replace")] = value
    return fields


def _length(data: bytes, most: int = 1 << 32) -> int:
    if len(data) < 4 or (length := struct.unpack("<I", data)[0]) > most:
        raise _Damaged
    return int(length)


def _number(fields: Fields, name: str, size: int) -> int:
    value = fields.get(name, b"")
    if len(value) != size:
        raise _Damaged
    return int.from_bytes(value, "little")


def _time(fields: Fields) -> int:
    """When a message was received, ns."""
    value = fields.get("time", b"")
    if len(value) != 8:
        raise _Damaged
    seconds, nanoseconds = struct.unpack("<II", value)
    return int(seconds) * 1_000_000_000 + int(nanoseconds)


def _data(stream: BinaryIO, record: _Record) -> bytes:
    if record.end - record.begin > _LONGEST:
        raise _Damaged
    stream.seek(record.begin)
    return stream.read(record.end - record.begin)


def _chunk_places(stream: BinaryIO, index: int) -> list[int]:
    """Where the index at the end of the file says that chunks begin; empty if there is none."""
    places: list[int] = []
    place = index
    try:
        while place:
            record = _record(stream, place)
            if record.op == _CHUNK_INFO:
                places.append(_number(record.fields, "chunk_pos", 8))
            place = record.end
    except _Damaged:
        pass
    return places
