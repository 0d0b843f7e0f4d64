"""The files of a rosbag2 recording, MCAP and sqlite3: their topics, and raw messages in order of time.

Reading prefers a file's index and falls back to a linear scan that recovers whatever a killed recorder left
behind; what was lost is said in the report, never hidden.
"""

from __future__ import annotations

import contextlib
import sqlite3
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from itertools import zip_longest
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import zstandard
from mcap.data_stream import ReadDataStream
from mcap.exceptions import EndOfFile
from mcap.opcode import Opcode
from mcap.reader import SeekingReader
from mcap.records import Channel, Chunk, ChunkIndex, Footer, Message, Schema
from mcap.stream_reader import breakup_chunk, read_magic
from rosbags.typesys import Stores, get_types_from_idl, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from d4_datasets.errors import UserError

_Record: TypeAlias = Schema | Channel | Message | Footer
_IDL_RULE = "=" * 80 + "\n"
_LARGEST_CHUNK = 4 * 2**30
_MESSAGE_HEAD = 22  # bytes of a message record before its data
receive_time = itemgetter(1)  # of (topic, time, data)


@lru_cache(maxsize=1)
def typestore() -> Typestore:
    """The message types of the newest ROS 2 release that rosbags knows."""
    return get_typestore(Stores.LATEST)


@dataclass(frozen=True)
class TopicInfo:
    """What a storage file says about a topic; `definition` is empty where the file holds none."""

    type: str
    encoding: str = ""
    definition: str = ""


@dataclass
class BagReport:
    """What came out of a bag: `messages` yielded, and one sentence for each thing that was not as it should
    be.
    """

    path: Path
    messages: int = 0
    warnings: list[str] = field(default_factory=list)

    def warn(self, text: str) -> None:
        """Add a warning once, however often the bag is read."""
        if text not in self.warnings:
            self.warnings.append(text)


@lru_cache(maxsize=256)
def typestore_of(topic: TopicInfo) -> Typestore | None:
    """A typestore that can decode `topic`, from the bag's own definition or else the standard one; None if
    none.
    """
    if topic.definition:
        with contextlib.suppress(Exception):  # a definition rosbags cannot parse is as good as none
            types: dict[str, Any] = {}
            if topic.encoding == "ros2msg":
                types.update(get_types_from_msg(topic.definition, topic.type))
            else:
                for part in topic.definition.split(_IDL_RULE):
                    idl = part.split("\n", 1)[1] if part.startswith("IDL: ") else part
                    types.update(get_types_from_idl(idl) if idl.strip() else {})
            store = get_typestore(Stores.EMPTY)
            store.register(types)
            store.get_msgdef(topic.type)
            return store
    return typestore() if topic.type in typestore().types else None


def unzstd(data: bytes) -> bytes:
    """Undo per-message compression, which shows by itself: CDR never starts with the zstd magic."""
    return zstandard.decompress(data) if data[:4] == b"\x28\xb5\x2f\xfd" else data


class McapFile:
    """One MCAP file, read by its index where it has one and from front to back where it has not."""

    def __init__(self, path: Path, shown: Path, report: BagReport) -> None:
        self.path, self.shown, self.report = path, shown, report
        self.topics: dict[str, TopicInfo] = {}
        self._channels: dict[int, str] = {}
        self._chunks: list[ChunkIndex] = []
        self._indexed = self._read_index()
        self._ordered = True
        if not self._indexed:
            self._scan()
        if not self._channels:
            raise UserError(f"{shown} is empty or no MCAP file: no ROS 2 topic was found in it")

    def _read_index(self) -> bool:
        with self.path.open("rb") as stream:
            try:
                summary = SeekingReader(stream).get_summary()
            except Exception:  # a damaged file can provoke anything in the parser; the scan says what is left
                return False
        if summary is None or not summary.chunk_indexes or not summary.channels:
            return False
        for channel in summary.channels.values():
            self._add(channel, summary.schemas.get(channel.schema_id))
        self._chunks = summary.chunk_indexes
        return True

    def _add(self, channel: Channel, schema: Schema | None) -> None:
        if channel.message_encoding == "cdr" and schema is not None:
            self._channels[channel.id] = channel.topic
            self.topics[channel.topic] = TopicInfo(
                schema.name, schema.encoding, schema.data.decode(errors="replace")
            )
        elif channel.message_encoding == "ros1":
            raise UserError(f"{self.shown} is a ROS 1 recording; convert it to ROS 2 with rosbags-convert")

    def _scan(self) -> None:
        """Find the topics, whether messages stand in time order, and whether the file is whole."""
        schemas: dict[int, Schema] = {}
        count, last = 0, -1
        whole = False
        for record in self.records():
            if isinstance(record, Schema):
                schemas[record.id] = record
            elif isinstance(record, Channel):
                self._add(record, schemas.get(record.schema_id))
            elif isinstance(record, Message) and record.channel_id in self._channels:
                count += 1
                self._ordered = self._ordered and record.log_time >= last
                last = record.log_time
            elif isinstance(record, Footer):
                whole = True
        if not whole and self._channels:
            self.report.warn(
                f"{self.shown} is cut off or damaged (recorder killed?); recovered {count} messages"
            )

    def records(self) -> Iterator[_Record]:
        """Schemas, channels and messages that can be read; then the footer if the file is whole."""
        with self.path.open("rb") as stream, contextlib.suppress(Exception):  # see _read_index
            source = ReadDataStream(stream)
            read_magic(source)
            yield from _parse(source, self.path.stat().st_size)

    def messages(self, topics: frozenset[str]) -> Iterator[tuple[str, int, bytes]]:
        """(topic, receive time in ns, CDR bytes) of the messages on `topics`, in order of time."""
        wanted = {id: topic for id, topic in self._channels.items() if topic in topics}
        if self._indexed:
            yield from self._by_chunk(wanted)
            return
        found = (
            (wanted[record.channel_id], record.log_time, record.data)
            for record in self.records()
            if isinstance(record, Message) and record.channel_id in wanted
        )
        yield from found if self._ordered else sorted(found, key=receive_time)

    def _by_chunk(self, wanted: Mapping[int, str]) -> Iterator[tuple[str, int, bytes]]:
        """Messages by the index of chunks, in order of time even where the times of chunks overlap."""
        chunks = [
            chunk
            for chunk in sorted(self._chunks, key=lambda chunk: chunk.message_start_time)
            # Some writers leave the index of messages out; then the chunk itself must say what is in it.
            if not chunk.message_index_offsets or chunk.message_index_offsets.keys() & wanted.keys()
        ]
        ends = [chunk.message_start_time for chunk in chunks[1:]]
        waiting: list[tuple[str, int, bytes]] = []
        with self.path.open("rb") as stream:
            for chunk, end in zip_longest(chunks, ends):
                waiting += self._read_chunk(stream, chunk, wanted)
                waiting.sort(key=receive_time)
                ready = len(waiting) if end is None else bisect_left(waiting, end, key=receive_time)
                yield from waiting[:ready]
                del waiting[:ready]

    def _read_chunk(
        self, stream: BinaryIO, index: ChunkIndex, wanted: Mapping[int, str]
    ) -> list[tuple[str, int, bytes]]:
        stream.seek(index.chunk_start_offset + 9)  # past opcode and length
        try:
            records = breakup_chunk(Chunk.read(ReadDataStream(stream)), validate_crc=True)
        except Exception as error:  # see _read_index
            self.report.warn(f"{self.shown}: a chunk of messages is damaged and left out ({error})")
            return []
        return [
            (wanted[record.channel_id], record.log_time, record.data)
            for record in records
            if isinstance(record, Message) and record.channel_id in wanted
        ]


def _parse(source: ReadDataStream, size: int) -> Iterator[_Record]:
    """The records of `size` bytes of MCAP one by one, a footer last; raises whatever damage provokes.

    Unlike mcap's own `StreamReader` this gives the first messages of a chunk that is not there to its end.
    """
    damage: Exception | None = None
    footer: Footer | None = None
    while source.count < size:
        opcode, length = source.read1(), source.read8()
        if length > (_LARGEST_CHUNK if opcode == Opcode.CHUNK else size):
            raise EndOfFile  # garbage, or cut: do not try to hold it in memory
        if opcode == Opcode.FOOTER:
            footer = Footer.read(source)
            break
        if opcode == Opcode.MESSAGE:
            message = Message.read(source, length)
            if len(message.data) < length - _MESSAGE_HEAD:
                raise EndOfFile
            yield message
        elif opcode == Opcode.CHANNEL:
            yield Channel.read(source)
        elif opcode == Opcode.SCHEMA:
            yield Schema.read(source)
        elif opcode == Opcode.CHUNK:
            chunk = Chunk.read(source)
            try:
                if chunk.compression:
                    yield from breakup_chunk(chunk)  # type: ignore[misc]
                else:
                    yield from _parse(ReadDataStream(BytesIO(chunk.data)), len(chunk.data))
            except Exception as error:  # the chunks after this one may be sound
                damage = error
        else:
            source.read(length)
    if damage is not None:
        raise damage
    if footer is not None:
        yield footer


class SqliteFile:
    """One sqlite3 storage file."""

    def __init__(self, path: Path, shown: Path, report: BagReport) -> None:
        self.path, self.shown, self.report = path, shown, report
        try:
            with self._open() as database:
                tables = {row[0] for row in database.execute("SELECT name FROM sqlite_master")}
                rows = database.execute(
                    "SELECT id, name, type FROM topics WHERE serialization_format = 'cdr'"
                ).fetchall()
                texts = self._definitions(database) if "message_definitions" in tables else {}
        except sqlite3.Error as error:
            raise UserError(f"{shown} is no readable sqlite3 bag: {error}") from None
        self._ids = {name: id for id, name, _ in rows}
        self.topics = {name: TopicInfo(kind, *texts.get(kind, ("", ""))) for _, name, kind in rows}

    def _open(self) -> contextlib.closing[sqlite3.Connection]:
        # Not `immutable`: a killed recorder leaves its last messages in the write-ahead log beside the file.
        return contextlib.closing(sqlite3.connect(f"file:{self.path}?mode=ro", uri=True))

    @staticmethod
    def _definitions(database: sqlite3.Connection) -> dict[str, tuple[str, str]]:
        query = "SELECT topic_type, encoding, encoded_message_definition FROM message_definitions"
        return {kind: (encoding, text) for kind, encoding, text in database.execute(query)}

    def messages(self, topics: frozenset[str]) -> Iterator[tuple[str, int, bytes]]:
        """(topic, receive time in ns, CDR bytes) of the messages on `topics`, in order of time."""
        names = {self._ids[name]: name for name in topics if name in self._ids}
        marks = ",".join("?" * len(names))
        where = f"topic_id IN ({marks}) ORDER BY timestamp, id"
        query = f"SELECT topic_id, timestamp, data FROM messages WHERE {where}"
        count = 0
        try:
            with self._open() as database:
                for id, stamp, data in database.execute(query, tuple(names)):
                    count += 1
                    yield names[id], stamp, data
        except sqlite3.Error as error:
            self.report.warn(f"{self.shown} is damaged ({error}); recovered {count} messages")
