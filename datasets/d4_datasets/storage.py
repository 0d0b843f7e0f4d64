"""The files of a rosbag2 recording, MCAP and sqlite3: their topics, and raw messages in order of time.

Reading prefers a file's index and falls back to a linear scan that recovers whatever a killed recorder left
behind; what was lost is said in the report, never hidden. Lengths that a file states are not believed: no
more memory is taken than for the largest piece that any recorder writes.
"""

from __future__ import annotations

import contextlib
import sqlite3
import struct
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from itertools import zip_longest
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

from mcap.data_stream import ReadDataStream
from mcap.opcode import Opcode
from mcap.reader import SeekingReader
from mcap.records import Channel, ChunkIndex, Footer, Schema
from rosbags.typesys.msg import normalize_msgtype

from d4_datasets import packed
from d4_datasets.errors import UserError
from d4_datasets.msgtypes import TopicInfo

Raw: TypeAlias = tuple[str, int, bytes]  # topic, receive time in ns, bytes
receive_time = itemgetter(1)
_MCAP_MAGIC = b"\x89MCAP0\r\n"
_HEAD = struct.Struct("<BQ")  # of a record: opcode, length
_MESSAGE = struct.Struct("<HIQQ")  # channel, sequence, log time, publish time; the data follow
_CHUNK = struct.Struct("<QQQII")  # start, end, size, CRC, length of the name of the compression
_MOST_WAITING = 1 << 28  # bytes of messages that wait for earlier ones
_BATCH = 1 << 22
_MOST_TOPICS = 10_000
_SHORTEST_ROW = 16  # bytes
_MOST_TOLD = 20  # damaged chunks of a file, each in a warning of its own
_TRIES = 2000  # to find the next row that can be read, which is up to 100 000 further


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


def lost(what: object, damage: str, count: int, last: int, rest: str) -> str:
    """The warning about a file of which only a part can be read: what is there, until when, what is not.

    Args: last: when the last message was received, ns; below 0 if there is none.
    """
    until = f", the last at {last / 1e9:.3f} s" if last >= 0 else ""
    return f"{what} {damage}; recovered {count} messages{until}; {rest}"


def in_order(batches: Iterable[tuple[list[Raw], int | None]], most: int = _MOST_WAITING) -> Iterator[Raw]:
    """Messages in order of time, out of batches whose times may overlap.

    Args: batches: messages, and the time before which no later batch has any, None if that is not known.
        most: bytes that may wait; beyond that the oldest go on, and what comes later is out of order.
    """
    waiting: list[Raw] = []
    held = 0
    for messages, end in batches:
        waiting += messages
        held += sum(len(message[2]) for message in messages)
        waiting.sort(key=receive_time)
        ready = 0 if end is None else bisect_left(waiting, end, key=receive_time)
        held -= sum(len(message[2]) for message in waiting[:ready])
        if held > most:
            while held > most // 2:
                held -= len(waiting[ready][2])
                ready += 1
        yield from waiting[:ready]
        del waiting[:ready]
    yield from waiting


# ---- MCAP ----


class _Message(NamedTuple):
    channel: int
    time: int
    data: bytes


_Record: TypeAlias = Schema | Channel | _Message | Footer


class McapFile:
    """One MCAP file, read by its index where it has one and from front to back where it has not."""

    def __init__(self, path: Path, shown: Path, report: BagReport) -> None:
        self.path, self.shown, self.report = path, shown, report
        self.topics: dict[str, TopicInfo] = {}
        self._channels: dict[int, str] = {}
        self._chunks: list[ChunkIndex] = []
        self._damaged: set[str] = set()  # the chunks that were told
        self._unread = 0  # bytes at the end that are no whole record
        self._indexed = self._read_index()
        self._ordered = True
        if not self._indexed:
            self._scan()
        if not self._channels:
            raise UserError(f"{shown} is empty or no MCAP file: no ROS topic was found in it")

    def _read_index(self) -> bool:
        with self.path.open("rb") as stream:
            try:
                summary = SeekingReader(stream, record_size_limit=packed.LARGEST).get_summary()
            except Exception:  # a damaged file can provoke anything in the parser; the scan says what is left
                return False
        if summary is None or not summary.chunk_indexes or not summary.channels:
            return False
        for channel in summary.channels.values():
            self._add(channel, summary.schemas.get(channel.schema_id))
        # By place: one that stands in the index twice must not give its messages twice.
        chunks = {chunk.chunk_start_offset: chunk for chunk in summary.chunk_indexes}
        self._chunks = sorted(chunks.values(), key=lambda chunk: chunk.message_start_time)
        return True

    def _add(self, channel: Channel, schema: Schema | None) -> None:
        if channel.message_encoding not in ("cdr", "ros1") or schema is None:
            return
        kind, encoding = schema.name, schema.encoding
        if channel.message_encoding == "ros1":
            kind, encoding = normalize_msgtype(kind), "ros1msg"
        self._channels[channel.id] = channel.topic
        self.topics[channel.topic] = TopicInfo(kind, encoding, schema.data.decode(errors="replace"))

    def _scan(self) -> None:
        """Find the topics, whether messages stand in time order, and whether the file is whole."""
        schemas: dict[int, Schema] = {}
        count, last = 0, -1
        whole = False
        for record in self._records():
            if isinstance(record, Schema):
                schemas[record.id] = record
            elif isinstance(record, Channel):
                self._add(record, schemas.get(record.schema_id))
            elif isinstance(record, _Message) and record.channel in self._channels:
                count += 1
                self._ordered = self._ordered and record.time >= last
                last = max(last, record.time)
            elif isinstance(record, Footer):
                whole = True
        if not whole and self._channels:
            rest = "what the recorder had not written yet is lost"
            if self._unread:
                rest = (
                    f"its last {self._unread} bytes are an unfinished piece, of which what is whole was taken"
                )
            damage = "is cut off or damaged (recorder killed?)"
            self.report.warn(lost(self.shown, damage, count, last, rest))

    # -- from front to back --

    def _records(self) -> Iterator[_Record]:
        """Schemas, channels and messages that can be read; then the footer if the file is whole."""
        whole = True
        size = self.path.stat().st_size
        with self.path.open("rb") as stream:
            if stream.read(len(_MCAP_MAGIC)) != _MCAP_MAGIC:
                return
            while len(head := stream.read(_HEAD.size)) == _HEAD.size:
                opcode, length = _HEAD.unpack(head)
                end = stream.tell() + length
                if opcode == Opcode.FOOTER:
                    if whole and end <= size:
                        yield Footer(0, 0, 0)
                    return
                if opcode == Opcode.CHUNK and length <= packed.LARGEST:
                    content, is_good = self._content(stream.read(length), end <= size)
                    whole &= is_good
                    yield from _parsed(content)
                elif opcode in _PARSED and length <= packed.LARGEST:
                    parsed = list(_parsed(head + stream.read(length)))
                    whole &= len(parsed) == 1
                    yield from parsed
                elif opcode == Opcode.CHUNK or opcode in _PARSED:
                    whole = False
                if end > size:
                    self._unread = _HEAD.size + length - (end - size)
                    return
                stream.seek(end)

    def _content(self, body: bytes, is_whole: bool) -> tuple[bytes, bool]:
        """(records of a chunk as they are in front of any compression, whether they are all).

        Of a chunk that is cut off this is what is there; one that is damaged is left out.
        """
        try:
            data, compression, crc = _unwrapped(body)
            if not is_whole:
                return packed.salvage(data, compression), False
            content = packed.unpack(data, compression)
            if crc and zlib.crc32(content) != crc:
                raise packed.Damaged("its checksum is wrong")
        except (packed.Damaged, struct.error) as error:
            self._tell_chunk(body, str(error))
            return b"", False
        return content, True

    def _tell_chunk(self, body: bytes, error: str) -> None:
        """Say that a chunk is lost, and when its messages were received, as far as it says so itself."""
        about = f"{len(body)} bytes"
        if len(body) >= _CHUNK.size:
            begin, end, *_ = _CHUNK.unpack_from(body)
            about += f", received from {begin / 1e9:.3f} to {end / 1e9:.3f} s"
        text = f"{self.shown}: a chunk of messages is damaged and left out ({error}): {about}"
        if len(self._damaged) >= _MOST_TOLD and text not in self._damaged:
            text = f"{self.shown}: more than {_MOST_TOLD} chunks are damaged and left out"
        self._damaged.add(text)
        self.report.warn(text)

    # -- messages --

    def messages(self, topics: frozenset[str]) -> Iterator[Raw]:
        """(topic, receive time in ns, bytes) of the messages on `topics`, in order of time."""
        wanted = {id: topic for id, topic in self._channels.items() if topic in topics}
        if self._indexed:
            yield from in_order(self._by_chunk(wanted))
            return
        found = (
            (wanted[record.channel], record.time, record.data)
            for record in self._records()
            if isinstance(record, _Message) and record.channel in wanted
        )
        yield from found if self._ordered else in_order(_batches(found))

    def _by_chunk(self, wanted: Mapping[int, str]) -> Iterator[tuple[list[Raw], int | None]]:
        """Messages by the index of chunks, with when the next chunk begins."""
        chunks = [
            chunk
            for chunk in self._chunks
            # Some writers leave the index of messages out; then the chunk itself must say what is in it.
            if not chunk.message_index_offsets or chunk.message_index_offsets.keys() & wanted.keys()
        ]
        with self.path.open("rb") as stream:
            for chunk, after in zip_longest(chunks, chunks[1:]):
                end = None if after is None else after.message_start_time
                yield self._read_chunk(stream, chunk, wanted), end

    def _read_chunk(self, stream: BinaryIO, index: ChunkIndex, wanted: Mapping[int, str]) -> list[Raw]:
        body, is_there = b"", False
        if index.chunk_start_offset < 1 << 62:
            stream.seek(index.chunk_start_offset)
            head = stream.read(_HEAD.size)
            if len(head) == _HEAD.size:
                opcode, length = _HEAD.unpack(head)
                if opcode == Opcode.CHUNK and length <= packed.LARGEST:
                    body = stream.read(length)
                    is_there = len(body) == length
        if not is_there:
            self.report.warn(f"{self.shown}: a chunk of messages is not where the index says, and left out")
            return []
        return [
            (wanted[record.channel], record.time, record.data)
            for record in _parsed(self._content(body, True)[0], wanted)
            if isinstance(record, _Message)
        ]


def _unwrapped(body: bytes) -> tuple[bytes, str, int]:
    """(data, compression, CRC of what is in them or 0) of a chunk; raises struct.error if it has no head."""
    *_, crc, length = _CHUNK.unpack_from(body)
    place = _CHUNK.size + length
    (size,) = struct.unpack_from("<Q", body, place)
    name = body[_CHUNK.size : place].decode(errors="replace")
    return body[place + 8 : place + 8 + size], name, crc


_PARSED = (Opcode.SCHEMA, Opcode.CHANNEL, Opcode.MESSAGE)


def _parsed(content: bytes, wanted: Mapping[int, str] | None = None) -> Iterator[_Record]:
    """The schemas, channels and messages in `content` as far as they are whole; of `wanted` channels only."""
    place, size = 0, len(content)
    while place + _HEAD.size <= size:
        opcode, length = _HEAD.unpack_from(content, place)
        begin = place + _HEAD.size
        place = begin + length
        if place > size:
            return
        if opcode == Opcode.MESSAGE and length >= _MESSAGE.size:
            channel, _, time, _ = _MESSAGE.unpack_from(content, begin)
            if wanted is None or channel in wanted:
                yield _Message(channel, time, content[begin + _MESSAGE.size : place])
        elif opcode in (Opcode.SCHEMA, Opcode.CHANNEL):
            kind = Schema if opcode == Opcode.SCHEMA else Channel
            with contextlib.suppress(Exception):  # see _read_index
                yield kind.read(ReadDataStream(BytesIO(content[begin:place])))


def _batches(messages: Iterable[Raw]) -> Iterator[tuple[list[Raw], None]]:
    """A few megabytes of messages at a time."""
    batch: list[Raw] = []
    held = 0
    for message in messages:
        batch.append(message)
        held += 100 + len(message[2])
        if held > _BATCH:
            yield batch, None
            batch, held = [], 0
    yield batch, None


# ---- sqlite3 ----


class SqliteFile:
    """One sqlite3 storage file."""

    def __init__(self, path: Path, shown: Path, report: BagReport) -> None:
        self.path, self.shown, self.report = path, shown, report
        try:
            with self._open() as database:
                tables = self._tables(database)
                rows = database.execute(
                    "SELECT id, name, type FROM topics WHERE serialization_format = 'cdr'"
                ).fetchmany(_MOST_TOPICS)
                texts = self._definitions(database) if "message_definitions" in tables else {}
        except sqlite3.Error as error:
            raise UserError(f"{shown} is no readable sqlite3 bag: {error}") from None
        rows = [row for row in rows if list(map(type, row)) == [int, str, str]]
        self._names = {id: name for id, name, _ in rows}
        self.topics = {name: TopicInfo(kind, *texts.get(kind, ("", ""))) for _, name, kind in rows}

    def _open(self) -> contextlib.closing[sqlite3.Connection]:
        # A killed recorder leaves its last messages in the write-ahead log beside the file. Where there is
        # none the file is taken as it is: else sqlite would leave files beside those of the user.
        log = self.path.with_name(f"{self.path.name}-wal")
        mode = "mode=ro" if log.is_file() and log.stat().st_size else "immutable=1"
        database = sqlite3.connect(f"{self.path.absolute().as_uri()}?{mode}", uri=True)
        database.text_factory = lambda data: data.decode(errors="replace")
        database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, packed.LARGEST)
        database.execute("PRAGMA trusted_schema = OFF")
        database.execute("PRAGMA writable_schema = ON")  # else one that is cut off is not opened at all
        return contextlib.closing(database)

    @staticmethod
    def _tables(database: sqlite3.Connection) -> set[str]:
        """Names of the tables; sqlite3.Error for one that is computed when read, which may never end."""
        kinds = {row[1]: row[2] for row in database.execute("PRAGMA table_list") if row[0] == "main"}
        for name in ("topics", "messages", "message_definitions"):
            columns = database.execute("SELECT hidden FROM pragma_table_xinfo(?)", (name,)).fetchall()
            if kinds.get(name, "table") != "table" or any(hidden for (hidden,) in columns):
                raise sqlite3.DatabaseError(f"its {name} is no plain table")
        return set(kinds)

    @staticmethod
    def _definitions(database: sqlite3.Connection) -> dict[str, tuple[str, str]]:
        query = "SELECT topic_type, encoding, encoded_message_definition FROM message_definitions"
        rows = database.execute(query).fetchmany(_MOST_TOPICS)
        return {row[0]: row[1:] for row in rows if list(map(type, row)) == [str, str, str]}

    def messages(self, topics: frozenset[str]) -> Iterator[Raw]:
        """(topic, receive time in ns, CDR bytes) of the messages on `topics`, in order of time."""
        names = {id: name for id, name in self._names.items() if name in topics}
        where = f"topic_id IN ({','.join('?' * len(names))})"
        query = f"SELECT topic_id, timestamp, data, id FROM messages WHERE {where}"
        by_time = self._is_indexed(query, tuple(names))
        found = self._messages(names, query, by_time)
        # Without an index sqlite would sort all messages before it gave the first, on the disk.
        yield from found if by_time else in_order(_batches(found))

    def _is_indexed(self, query: str, ids: tuple[int, ...]) -> bool:
        """Whether rows can come in order of time without being sorted."""
        with contextlib.suppress(sqlite3.Error), self._open() as database:
            plan = database.execute(f"EXPLAIN QUERY PLAN {query} ORDER BY timestamp, id", ids)
            return not any("TEMP B-TREE" in str(step[3]) for step in plan)
        return False

    def _messages(self, names: Mapping[int, str], query: str, by_time: bool) -> Iterator[Raw]:
        strange = 0
        for id, stamp, data, _ in self._rows(query, by_time, tuple(names)):
            if type(stamp) is int and type(data) is bytes and id in names:
                yield names[id], stamp, data
            else:
                strange += 1
        if strange:
            self.report.warn(f"{self.shown}: {strange} rows are no messages and are left out")

    def _rows(self, query: str, by_time: bool, ids: tuple[int, ...]) -> Iterator[tuple[Any, ...]]:
        """(topic id, time, data, number), by time or number as far as all is whole, then by number."""
        count, last, newest = 0, (-1 << 64, -1), -1
        most = self.path.stat().st_size // _SHORTEST_ROW
        order = "timestamp, id" if by_time else "id"
        try:
            with self._open() as database:
                for row in database.execute(f"{query} ORDER BY {order}", ids):
                    key = (row[1] if by_time and type(row[1]) is int else last[0], row[3])
                    if key <= last or count > most:
                        raise sqlite3.DatabaseError("its rows go round in circles")
                    count, last = count + 1, key
                    newest = _later(newest, row[1])
                    yield row
            return
        except sqlite3.Error as error:
            damage = error
        with contextlib.suppress(sqlite3.Error), self._open() as database:
            for row in _salvaged(database, query, ids, -1 if by_time else last[1]):
                if not by_time or type(row[1]) is not int or (row[1], row[3]) > last:
                    count += 1
                    newest = _later(newest, row[1])
                    yield row
        rest = "rows that nothing leads to are lost"
        self.report.warn(lost(self.shown, f"is damaged ({damage})", count, newest, rest))


def _later(time: int, other: object) -> int:
    return max(time, other) if type(other) is int else time


def _salvaged(
    database: sqlite3.Connection, query: str, ids: tuple[int, ...], number: int
) -> Iterator[tuple[Any, ...]]:
    """The rows of a damaged database after row `number`, by number, over gaps that cannot be read."""
    failures = 0
    while failures < _TRIES:
        try:
            for row in database.execute(f"{query} AND id > ? ORDER BY id", (*ids, number)):
                if row[3] <= number:
                    raise sqlite3.DatabaseError("its rows go round in circles")
                number, failures = row[3], 0
                yield row
            return
        except sqlite3.Error:
            failures += 1
            number += 1 + failures // 20  # in longer steps the longer it takes
