"""The control protocol: round trips, and whatever a stranger may send."""

import contextlib
import os
import socket
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_server import Scripted

from d4_nodes import memory, wire
from d4_nodes.memory import Memory
from d4_nodes.server import Server
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


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o702])
def test_a_folder_that_others_may_write_to_is_refused(tmp_path, mode) -> None:
    """Somebody else could put a socket there, and a robot would take plans from it."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(PermissionError, match="others may write to the folder"):
        wire.listen(folder / "d4.sock")
    with bound(folder / "d4.sock"), pytest.raises(WireError, match="others may write"):
        wire.connect(folder / "d4.sock", 0.1)


@contextlib.contextmanager
def bound(path):
    """A server that looks at nothing."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(str(path))
        sock.listen(1)
        yield


def test_a_folder_of_somebody_else_is_refused(tmp_path, monkeypatch) -> None:
    path = tmp_path / "d4.sock"
    with bound(path):
        owner = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
        with pytest.raises(WireError, match=f"refuses .* belongs to user {owner}"):
            wire.connect(path, 0.1)
    path.unlink()
    with pytest.raises(PermissionError, match=f"belongs to user {owner}"):
        wire.listen(path)


def test_a_folder_given_away_is_refused(tmp_path) -> None:
    if os.geteuid():
        pytest.skip("only root can give a folder away")
    os.chown(tmp_path, 65534, -1)
    with pytest.raises(PermissionError, match="belongs to user 65534"):
        wire.listen(tmp_path / "d4.sock")


def test_a_link_to_a_folder_is_refused(tmp_path) -> None:
    """Whoever made the link can let it lead elsewhere."""
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(PermissionError, match="is a link"):
        wire.listen(tmp_path / "link" / "d4.sock")
    with bound(tmp_path / "real" / "d4.sock"), pytest.raises(WireError, match="is a link"):
        wire.connect(tmp_path / "link" / "d4.sock", 0.1)


def test_a_runtime_folder_that_is_not_ours_is_left_alone(tmp_path, monkeypatch) -> None:
    """As `sudo -E` leaves it behind."""
    tmp_path.chmod(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert wire.default_socket("toy") == tmp_path / "d4-toy.sock"
    tmp_path.chmod(0o777)
    assert wire.default_socket("toy").parent == Path(f"/tmp/d4-{os.geteuid()}")


def test_a_robot_refuses_a_server_of_somebody_else(tmp_path, monkeypatch) -> None:
    with wire.listen(tmp_path / "d4.sock"):
        wire.connect(tmp_path / "d4.sock", 1.0).close()
        monkeypatch.setattr(wire, "_user_of", lambda sock: 4242)
        with pytest.raises(WireError, match="the other end is user 4242"):
            wire.connect(tmp_path / "d4.sock", 1.0)


@contextlib.contextmanager
def somebody_else():
    """This process as another user."""
    if os.geteuid():
        pytest.skip("only root can be somebody else")
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_the_kernel_says_who_is_at_the_other_end(tmp_path) -> None:
    path = tmp_path / "d4.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        with somebody_else():
            listener.listen(1)
        with pytest.raises(WireError, match="the other end is user 65534"):
            wire.connect(path, 1.0)


def test_a_server_refuses_a_robot_of_somebody_else(rig_server, tmp_path, monkeypatch) -> None:
    """Even where the way to the socket is open to everybody."""
    tmp_path.chmod(0o711)
    rig_server.socket.chmod(0o666)
    monkeypatch.chdir(tmp_path)  # the folders above it are closed
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        with somebody_else():
            sock.connect("d4.sock")
        sock.settimeout(5.0)
        message, _ = wire.receive(sock)
        assert message.kind is Kind.REFUSED
        assert message.text.startswith("at the other end is user 65534")
        with pytest.raises(WireError, match="closed"):
            wire.receive(sock)
    rig_server.link().close()


def test_a_server_looks_who_knocks(contract, tmp_path, monkeypatch) -> None:
    server = Server(Scripted(contract, tmp_path / "fault"), tmp_path / "d4.sock")
    monkeypatch.setattr(wire, "_user_of", lambda sock: 4242)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(5.0)
            sock.connect(str(tmp_path / "d4.sock"))
            message, _ = wire.receive(sock)
    finally:
        server.stop()
        thread.join()
    assert message.kind is Kind.REFUSED
    assert "user 4242" in message.text


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
