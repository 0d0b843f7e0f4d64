"""What passes between the benchmark and the process of a game: a fixed binary header, JSON, raw bytes.

Both ends use this file. The other end may be an interpreter that has nothing of d4 (MineRL wants an old gym),
so it needs only Python 3.8 and its standard library. No pickle: what arrives is numbers, text and pixels.

    magic "d4mc" | version u8 | kind u8 | 0 u16 | bytes of JSON u32 | bytes of data u32 | JSON | data

The benchmark sends RESET {"seed": s} and STEP with the action as little-endian float64 in the data; the game
answers each with a VIEW, whose JSON says `shape` [H, W, 3] of the picture in the data and what else is known.
It begins with HELLO and may send FAILED {"sentence": ..., "user": whether the user can put it right} instead
of any answer. CLOSE has no answer: the game ends.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from typing import Any

HELLO, RESET, STEP, VIEW, FAILED, CLOSE = range(1, 7)
VERSION = 1
MOST_TEXT, MOST_DATA = 16 * 2**20, 64 * 2**20

_HEADER = struct.Struct("<4sBBHII")
_MAGIC = b"d4mc"
_BLOCK = 2**18


class WireError(Exception):
    """What arrived is no message of this protocol, or of another version of it."""


class Wire:
    """Messages over one end of a stream socket."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._held = bytearray()  # of a message that is not whole yet

    def fileno(self) -> int:
        """For select."""
        return self._end.fileno()

    def send(
        self, kind: int, said: dict[str, Any] | None = None, data: bytes = b"", limit_s: float | None = 60.0
    ) -> None:
        """Send a message.

        Args: limit_s: seconds until the other end must have taken it; None waits for ever.

        Raises:
            OSError: the other end is gone, or does not read (TimeoutError).
        """
        text = json.dumps(said or {}, separators=(",", ":")).encode()
        self._end.settimeout(limit_s)
        self._end.sendall(_HEADER.pack(_MAGIC, VERSION, kind, 0, len(text), len(data)) + text)
        if data:
            self._end.sendall(data)

    def receive(self, limit_s: float | None = None) -> tuple[int, dict[str, Any], bytes]:
        """The next message: (kind, JSON, data).

        Args: limit_s: seconds for the whole message; None waits for ever.

        Raises:
            EOFError: the other end is gone.
            OSError: the same, or the time is over (TimeoutError).
            WireError: something else than a message arrived.
        """
        deadline = None if limit_s is None else time.monotonic() + limit_s
        magic, version, kind, _, texts, bulk = _HEADER.unpack(self._read(_HEADER.size, deadline))
        if magic != _MAGIC or not HELLO <= kind <= CLOSE or texts > MOST_TEXT or bulk > MOST_DATA:
            raise WireError("what arrived is no message of this protocol")
        if version != VERSION:
            raise WireError(f"the other end speaks version {version} of the protocol, this one {VERSION}")
        text, data = self._read(texts, deadline), self._read(bulk, deadline)
        try:
            said = json.loads(text.decode())
        except ValueError:
            raise WireError("the text of a message is not JSON") from None
        if not isinstance(said, dict):
            raise WireError("the text of a message is no JSON object")
        return kind, said, data

    def has_arrived(self) -> bool:
        """Take what is there without waiting for more: whether `receive` has an answer, or a complaint."""
        self._end.settimeout(0.0)
        try:
            while not self._is_whole():
                part = self._end.recv(_BLOCK)
                if not part:
                    return True
                self._held += part
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    @property
    def has_begun(self) -> bool:
        """Whether a part of a message is here."""
        return bool(self._held)

    def _is_whole(self) -> bool:
        if len(self._held) < _HEADER.size:
            return False
        magic, _, _, _, texts, bulk = _HEADER.unpack_from(self._held)
        is_one = magic == _MAGIC and texts <= MOST_TEXT and bulk <= MOST_DATA
        return not is_one or len(self._held) >= _HEADER.size + texts + bulk

    def _read(self, size: int, deadline: float | None) -> bytes:
        out = self._held[:size]
        del self._held[:size]
        while len(out) < size:
            if deadline is not None:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError("a message did not arrive whole in time")
                self._end.settimeout(left)
            else:
                self._end.settimeout(None)
            part = self._end.recv(min(size - len(out), _BLOCK))
            if not part:
                raise EOFError("the other end is gone")
            out += part
        return bytes(out)

    def close(self) -> None:
        """Close this end."""
        self._end.close()
