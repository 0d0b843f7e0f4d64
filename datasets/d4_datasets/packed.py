"""What comes out of files that may be damaged or mean harm: memory and disk are bounded, whatever a header
says.
"""

from __future__ import annotations

import bz2
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import lz4.frame
import zstandard

LARGEST = 1 << 29  # bytes of one piece: a chunk, or a message that is compressed by itself
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_PIECE = 1 << 20
_SIP = 1 << 12  # of zstd data, which may become 20 000 times larger
_FREELY = 1 << 26  # bytes of a file that any file may become
_MOST_TIMES = 1000  # larger than it was: no recording of sensors
_LONGEST_TEXT = 1 << 26  # of a file with metadata


class Damaged(Exception):
    """Data that cannot be unpacked, with what is wrong."""


def unpack(data: bytes, compression: str) -> bytes:
    """`data` without its compression: "zstd", "lz4" (frames), "bz2"; "" and "none" are none.

    Raises:
        Damaged: it is cut off or wrong, larger than `LARGEST`, or of another compression.
    """
    whole, damage = _unpack(data, compression)
    if damage:
        raise Damaged(damage)
    return whole


def salvage(data: bytes, compression: str) -> bytes:
    """What can be had of `data` that is cut off or damaged, up to the damage; maybe nothing."""
    return _unpack(data, compression)[0]


def _unpack(data: bytes, compression: str) -> tuple[bytes, str]:
    """(as much as can be had, what is wrong: "" if it is whole)."""
    if compression in ("", "none"):
        return data, ""
    if compression == "zstd":
        with suppress(zstandard.ZstdError):  # in one step what is whole, says its size, and is one frame
            if 0 < zstandard.frame_content_size(data) <= LARGEST:
                return zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False), ""
    out = bytearray()
    try:
        for piece in _pieces(data, compression):
            out += piece
            if len(out) > LARGEST:
                return b"", f"it unpacks to more than {LARGEST >> 20} MiB"
    except (zstandard.ZstdError, RuntimeError, OSError, EOFError, ValueError) as error:
        return bytes(out), str(error) or type(error).__name__
    return bytes(out), ""


def _pieces(data: bytes, compression: str) -> Iterator[bytes]:
    """The content in pieces; raises what the library does, and EOFError where the end is missing."""
    if compression == "zstd":
        yield from _zstd(data[i : i + _SIP] for i in range(0, len(data), _SIP))
    elif compression in ("lz4", "bz2"):
        source = lz4.frame.LZ4FrameDecompressor() if compression == "lz4" else bz2.BZ2Decompressor()
        piece = source.decompress(data, max_length=_PIECE)
        while piece or not source.needs_input:
            yield piece
            if source.eof:
                return
            piece = source.decompress(b"", max_length=_PIECE)
        if not source.eof:
            raise EOFError("it is cut off")
    else:
        raise ValueError(f"the compression {compression!r} is not supported")


def _zstd(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The content of zstd frames one after the other. A size in a header is not believed."""
    frame = None
    for piece in pieces:
        while piece:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(piece)
            piece, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("it is cut off")


def unpack_file(packed: Path, out: Path) -> str:
    """Write what a .zstd file holds to `out`; returns what is wrong with it, "" if it is whole.

    What comes before a damage is written. A file that becomes a thousand times larger is taken for a bomb.
    """
    most = max(_FREELY, _MOST_TIMES * packed.stat().st_size)
    total = 0
    with packed.open("rb") as source, out.open("wb") as sink:
        try:
            for piece in _zstd(iter(lambda: source.read(_SIP), b"")):
                sink.write(piece[: most - total])
                total += len(piece)
                if total > most:
                    return f"it unpacks to more than {_MOST_TIMES} times its size"
        except (zstandard.ZstdError, EOFError) as error:
            return str(error)
    return ""


# ---- metadata ----


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: it is larger than any file of metadata, nested too deep, or no JSON.
        OSError: it cannot be read.
    """
    if path.stat().st_size > _LONGEST_TEXT:
        raise ValueError(f"it has more than {_LONGEST_TEXT >> 20} MiB")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deep") from None
