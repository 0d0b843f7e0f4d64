"""Control messages between the robot's process and the inference server: a fixed header, then a bounded
payload.

They travel over a Unix socket of type SEQPACKET, which keeps message boundaries: a message is read whole or
not at all, and a damaged one can never shift the reading of the next. Frames and actions do not travel here
but lie in shared memory (`d4_nodes.memory`). Nothing is ever unpickled; payloads are UTF-8 text or JSON.

Standard library only.
"""

from __future__ import annotations

import enum
import errno
import json
import os
import socket
import stat
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAGIC = b"d4"
VERSION = 1
MAX_PAYLOAD = 1 << 16
_HEADER = struct.Struct("<2sBBIQ")  # magic, version, kind, bytes of payload, sequence number
_CREDENTIALS = struct.Struct("iII")  # struct ucred: process, user, group


class WireError(Exception):
    """A message that is not one of ours, or the other side has gone."""


class Kind(enum.IntEnum):
    """What a message says. Client to server: HELLO, STEP, BYE; server to client: the others."""

    HELLO = 1  # JSON: hash of the contract, and what is wanted: a policy or a tokenizer
    WELCOME = 2  # JSON: what the server runs; carries the descriptor of the shared memory
    REFUSED = 3  # text: why
    STEP = 4  # a request lies in shared memory
    DONE = 5  # the reply lies in shared memory
    FAILED = 6  # text: why there is no reply
    BYE = 7


@dataclass(frozen=True)
class Message:
    """One control message; `sequence` numbers requests and their replies."""

    kind: Kind
    sequence: int = 0
    payload: bytes = b""

    @property
    def text(self) -> str:
        """The payload as text; damaged characters are replaced."""
        return self.payload.decode("utf-8", "replace")

    def json(self) -> dict[str, Any]:
        """The payload as a JSON object.

        Raises:
            WireError: it is none.
        """
        try:
            value = json.loads(self.payload)
        except (ValueError, RecursionError) as error:
            raise WireError(f"the payload of {self.kind.name} is not JSON") from error
        if not isinstance(value, dict):
            raise WireError(f"the payload of {self.kind.name} is no JSON object")
        return value


def pack(message: Message) -> bytes:
    """Bytes of a message.

    Raises:
        WireError: the payload is too long.
    """
    if len(message.payload) > MAX_PAYLOAD:
        raise WireError(f"a payload of {len(message.payload)} bytes is longer than {MAX_PAYLOAD}")
    header = _HEADER.pack(MAGIC, VERSION, message.kind, len(message.payload), message.sequence)
    return header + message.payload


def parse(data: bytes) -> Message:
    """The message in `data`.

    Raises: WireError: too short, of another program or version, of unknown kind, or of another length than it
        says.
    """
    if len(data) < _HEADER.size:
        raise WireError(f"a message of {len(data)} bytes is shorter than its header")
    magic, version, kind, length, sequence = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise WireError("a message of another program")
    if version != VERSION:
        raise WireError(f"a message of protocol version {version}, this is version {VERSION}")
    if length != len(data) - _HEADER.size:
        raise WireError(f"a message announces {length} bytes and has {len(data) - _HEADER.size}")
    try:
        return Message(Kind(kind), sequence, data[_HEADER.size :])
    except ValueError:
        raise WireError(f"a message of unknown kind {kind}") from None


def send(sock: socket.socket, message: Message, descriptor: int | None = None) -> None:
    """Send a message, with an open file if given.

    Raises:
        WireError: the other side has gone or does not read.
    """
    try:
        socket.send_fds(
            sock, [pack(message)], [] if descriptor is None else [descriptor], socket.MSG_NOSIGNAL
        )
    except OSError as error:
        raise WireError(f"the other side of the socket has gone ({error.strerror})") from error


def receive(sock: socket.socket) -> tuple[Message, int | None]:
    """The next message and the open file that came with it, if any; the caller closes it.

    Raises:
        WireError: the other side has gone, or sent something else than one message.
        BlockingIOError: the socket does not block and nothing has come.
        TimeoutError: the socket has a time limit and nothing has come.
    """
    try:
        data, descriptors, flags, _ = socket.recv_fds(sock, _HEADER.size + MAX_PAYLOAD, 4)
    except (BlockingIOError, TimeoutError, InterruptedError):
        raise
    except OSError as error:
        raise WireError(f"the other side of the socket has gone ({error.strerror})") from error
    descriptor = descriptors[0] if len(descriptors) == 1 else None
    try:
        if not data:
            raise WireError("the other side closed the socket")
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(descriptors) > 1:
            raise WireError("a message is longer than any of ours")
        return parse(data), descriptor
    except WireError:
        for number in descriptors:
            os.close(number)
        raise


def listen(path: Path) -> socket.socket:
    """A listening socket that only this user can reach; takes the place of one whose server is dead.

    Raises:
        OSError: a server listens there already, the folder cannot be written, or somebody else could put a
            socket there.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if why := _distrust(path.parent):
        raise PermissionError(errno.EACCES, why)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        _clear(path)
        mask = os.umask(0o177)
        try:
            sock.bind(str(path))
        finally:
            os.umask(mask)
        sock.listen(4)
    except OSError:
        sock.close()
        raise
    return sock


def _clear(path: Path) -> None:
    """Remove a socket file that nobody listens on."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
    raise OSError(errno.EADDRINUSE, f"a server listens on {path} already")


def connect(path: Path, timeout_s: float) -> socket.socket:
    """A socket connected to a server.

    Raises:
        WireError: nobody listens there, somebody else could, or does.
    """
    if why := _distrust(path.parent):
        raise WireError(f"this process refuses {path}: {why}")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(timeout_s)
    until = time.monotonic() + timeout_s
    while True:
        try:
            sock.connect(str(path))
            break
        except OSError as error:
            # a queue that is full answers so at once, whatever the time limit
            if isinstance(error, BlockingIOError) and time.monotonic() < until:
                time.sleep(0.005)
                continue
            sock.close()
            raise WireError(f"no inference server listens on {path} ({error.strerror or error})") from error
    if why := stranger(sock):
        sock.close()
        raise WireError(f"this process refuses {path}: {why}")
    return sock


def stranger(sock: socket.socket) -> str:
    """Why the process at the other end must not be believed: another user runs it. Empty if this one does."""
    user, own = _user_of(sock), os.geteuid()
    return "" if user == own else f"at the other end is user {user}, run both as the same, here {own}"


def _user_of(sock: socket.socket) -> int:
    """Who runs the process that connected, or listened when it was connected to; from the kernel."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(credentials)[1])


def _distrust(folder: Path) -> str:
    """Whose folder it is, or who may write to it, if that is not this user alone; empty otherwise, and where
    there is no folder.
    """
    try:
        found = os.lstat(folder)
    except OSError:
        return ""
    if not stat.S_ISDIR(found.st_mode):
        return f"{folder.absolute()} is a link or no folder, name the folder itself"
    if found.st_uid != os.geteuid():
        return f"the folder {folder.absolute()} belongs to user {found.st_uid}, name one of your own"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to the folder {folder.absolute()}: chmod go-w, or name another"
    return ""


def default_socket(name: str) -> Path:
    """Where a server of this name listens: the user's own runtime folder, which nobody else can enter; where
    there is none, a folder in /tmp that `listen` makes for this user alone.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    is_own = runtime and Path(runtime).is_dir() and not _distrust(Path(runtime))
    folder = Path(runtime) if runtime and is_own else Path(f"/tmp/d4-{os.geteuid()}")
    return folder / f"d4-{name}.sock"
