"""The control protocol: round trips, and whatever a stranger may send."""

import contextlib
import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d4_nodes import memory, wire
from d4_nodes.memory import Memory
from d4_nodes.wire import Kind, Message, WireError

messages = st.builds(Message, st.sampled_from(Kind), st.integers(0, 2**64 - 1), st.binary(max_size=300))


@pytest.fixture
def pair():
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield pair
    for sock in pair:
        sock.close()


@given(messages)
def test_what_is_packed_is_parsed(message) -> None:
    assert wire.parse(wire.pack(message)) == message


@given(st.binary(max_size=64))
def test_anything_else_is_a_wire_error(data) -> None:
    try:
        message = wire.parse(data)
    except WireError:
        return
    assert wire.pack(message) == data


@given(messages, st.data())
def test_a_damaged_header_never_gives_a_payload_of_another_length(message, draw) -> None:
    data = bytearray(wire.pack(message))
    place = draw.draw(st.integers(0, 15))
    data[place] ^= draw.draw(st.integers(1, 255))
    try:
        parsed = wire.parse(bytes(data))
    except WireError:
        return
    assert len(parsed.payload) == len(message.payload)


@given(st.binary(max_size=50))
def test_a_payload_is_a_json_object_or_an_error(payload) -> None:
    with contextlib.suppress(WireError):
        assert isinstance(Message(Kind.HELLO, payload=payload).json(), dict)


def test_deeply_nested_json_is_an_error() -> None:
    with pytest.raises(WireError):
        Message(Kind.HELLO, payload=b"[" * 60_000).json()


def test_messages_keep_their_boundaries(pair) -> None:
    for number in range(3):
        wire.send(pair[0], Message(Kind.STEP, number, b"x" * number))
    assert [wire.receive(pair[1])[0].sequence for _ in range(3)] == [0, 1, 2]


def test_a_message_longer_than_any_of_ours_is_refused(pair) -> None:
    with pytest.raises(WireError):
        wire.pack(Message(Kind.STEP, 0, b"x" * (wire.MAX_PAYLOAD + 1)))
    pair[0].send(b"x" * (wire.MAX_PAYLOAD + 100))
    with pytest.raises(WireError, match="longer"):
        wire.receive(pair[1])


def test_an_open_file_travels_along(pair, tmp_path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"seen")
    with path.open() as file:
        wire.send(pair[0], Message(Kind.WELCOME), file.fileno())
    _, descriptor = wire.receive(pair[1])
    assert descriptor is not None
    assert os.read(descriptor, 10) == b"seen"
    os.close(descriptor)


def test_files_that_come_with_nonsense_are_closed(pair, tmp_path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    path = tmp_path / "f"
    path.touch()
    with path.open() as file:
        socket.send_fds(pair[0], [b"nonsense"], [file.fileno()])
    with pytest.raises(WireError):
        wire.receive(pair[1])
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_closed_socket_is_a_wire_error(pair) -> None:
    pair[0].close()
    with pytest.raises(WireError):
        wire.receive(pair[1])
    with pytest.raises(WireError):
        wire.send(pair[1], Message(Kind.BYE))


def test_a_socket_file_left_by_a_crash_is_taken_over(tmp_path) -> None:
    path = tmp_path / "d4.sock"
    wire.listen(path).close()
    assert path.is_socket()
    with wire.listen(path), pytest.raises(OSError, match="already"):
        wire.listen(path)


def test_the_socket_is_for_this_user_alone(tmp_path) -> None:
    path = tmp_path / "d4.sock"
    with wire.listen(path):
        assert path.stat().st_mode & 0o077 == 0


def test_nobody_listens(tmp_path) -> None:
    with pytest.raises(WireError, match="no inference server"):
        wire.connect(tmp_path / "none.sock", 0.1)


def test_memory_that_the_other_side_could_shrink_is_refused(tmp_path, contract) -> None:
    """Reading what is not there any more is no exception but the end of the process."""
    fields = memory.layout(contract, 2)
    open_ended = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.truncate(open_ended, 1 << 20)
    plain = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.truncate(plain, 1 << 20)
    for descriptor in (open_ended, plain):
        with pytest.raises(ValueError, match="shrink"):
            Memory(fields, descriptor)
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(descriptor)
    ours = Memory(fields)
    theirs = Memory(fields, os.dup(ours.descriptor))
    theirs["reward"][...] = 3.0
    assert ours["reward"] == 3.0
    theirs.close()
    ours.close()
