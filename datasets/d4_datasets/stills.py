"""Still pictures out of their files: png, jpeg, webp and whatever else OpenCV knows, of bounded size.

A depth picture says at every pixel how far it is. `shade` makes of it what a camera's picture is elsewhere.
"""

from __future__ import annotations

import cv2
import numpy as np

MOST_PIXELS = 1 << 26  # of one picture, 8192 x 8192: a header that says more is damaged or means harm
_MILLIMETRES = 0.001  # in 16-bit depth pictures

Range = tuple[float, float]


def decode_still(data: bytes | np.ndarray, depth_m: Range | None = None, upright: bool = False) -> np.ndarray:
    """The picture in the content of a file, RGB uint8 [H, W, 3].

    Args: depth_m: nearest and farthest metres of a depth camera: a picture of one 16-bit number a pixel is
        depth in millimetres, see `shade`; any other one is taken as it is. upright: turn it as its metadata
        say.

    Raises:
        ValueError: what is wrong with it.
    """
    if depth_m is not None:
        raw = decode_raw_still(data)
        if raw.dtype == np.uint16 and raw.ndim == 2:
            return shade(raw * np.float32(_MILLIMETRES), depth_m)
    # To BGR, which every OpenCV can: the robot's may be years older than the importer's.
    flags = cv2.IMREAD_COLOR if upright else cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    return cv2.cvtColor(_decode(data, flags), cv2.COLOR_BGR2RGB)


def decode_raw_still(data: bytes | np.ndarray) -> np.ndarray:
    """The pixels in the content of a file as OpenCV gives them, of any type and shape; may raise as above."""
    return _decode(data, cv2.IMREAD_UNCHANGED)


def _decode(data: bytes | np.ndarray, flags: int) -> np.ndarray:
    content = bytes(data)
    size = picture_size(content)
    if size is None and content.startswith((b"\x89PNG", b"\xff\xd8", b"RIFF")):
        # OpenCV would fill the missing rows with grey and say nothing.
        raise ValueError("it is cut off")
    if size is not None and size[0] * size[1] > MOST_PIXELS:
        raise ValueError(f"it says that it has {size[1]} x {size[0]} pixels, which is too many")
    try:
        picture = cv2.imdecode(np.frombuffer(content, np.uint8), flags) if content else None
    except cv2.error:  # beyond OpenCV's own limits
        picture = None
    if picture is None:
        raise ValueError("it is damaged or no still-picture format such as jpeg or png")
    return picture


def shade(metres: np.ndarray, depth_m: Range) -> np.ndarray:
    """Depth float [H, W] as a grey picture, uint8 [H, W, 3]: from 1 at the nearest of `depth_m` and nearer to
    255 at the farthest and beyond; 0 where nothing was measured (0, below, NaN).
    """
    near, far = depth_m
    with np.errstate(invalid="ignore", over="ignore"):
        level = np.clip((metres - np.float32(near)) * np.float32(254 / (far - near)) + 1, 1, 255)
        grey = np.where(metres > 0, np.round(level), 0).astype(np.uint8)
    return cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)


# ---- sizes ----


def picture_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) that the header of a png, jpeg or webp file says; None if it is none, or is cut off.

    OpenCV believes headers, however large, and fills what is missing with grey.
    """
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        whole = len(data) >= 45 and b"IEND" in data[-64:]
        return (_big(data[20:24]), _big(data[16:20])) if whole else None
    if data[:2] == b"\xff\xd8":
        return _jpeg_size(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and len(data) >= 30:
        return _webp_size(data) if len(data) >= 8 + _little(data[4:8]) else None
    return None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    place = 2
    while place + 9 < len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            # The mark of the end behind it: one before it may be that of a thumbnail.
            size = _big(data[place + 5 : place + 7]), _big(data[place + 7 : place + 9])
            return size if data.find(b"\xff\xd9", place) > 0 else None
        alone = marker in (0x01, 0xFF) or 0xD0 <= marker <= 0xD8
        place += (1 if marker == 0xFF else 2) if alone else 2 + _big(data[place + 2 : place + 4])
    return None


def _webp_size(data: bytes) -> tuple[int, int] | None:
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + _little(data[27:30]), 1 + _little(data[24:27])
    if kind == b"VP8L":
        bits = _little(data[21:25])
        return 1 + (bits >> 14 & 0x3FFF), 1 + (bits & 0x3FFF)
    return (_little(data[28:30]) & 0x3FFF, _little(data[26:28]) & 0x3FFF) if kind == b"VP8 " else None


def _big(data: bytes) -> int:
    return int.from_bytes(data, "big")


def _little(data: bytes) -> int:
    return int.from_bytes(data, "little")
