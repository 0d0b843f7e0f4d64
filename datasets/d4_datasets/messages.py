"""Camera messages to RGB pictures: sensor_msgs Image and CompressedImage -> uint8 [H, W, 3], and one resize
for all.

The importer and the robot's node call the same two functions, `decode` and `resize`, so that a policy sees
live what it saw in training. Messages are read by `getattr` only: those of rosbags and of rclpy work alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from d4_datasets.errors import UserError
from d4_datasets.stills import Range, decode_raw_still, decode_still, shade

# encoding -> (bytes per channel, channels, OpenCV conversion to RGB or None). 16-bit values keep their high
# byte.
_ENCODINGS: dict[str, tuple[int, int, int | None]] = {
    "rgb8": (1, 3, None),
    "bgr8": (1, 3, cv2.COLOR_BGR2RGB),
    "rgba8": (1, 4, cv2.COLOR_RGBA2RGB),
    "bgra8": (1, 4, cv2.COLOR_BGRA2RGB),
    "mono8": (1, 1, cv2.COLOR_GRAY2RGB),
    "8UC1": (1, 1, cv2.COLOR_GRAY2RGB),
    "8UC3": (1, 3, cv2.COLOR_BGR2RGB),
    "8UC4": (1, 4, cv2.COLOR_BGRA2RGB),
    "rgb16": (2, 3, None),
    "bgr16": (2, 3, cv2.COLOR_BGR2RGB),
    "rgba16": (2, 4, cv2.COLOR_RGBA2RGB),
    "bgra16": (2, 4, cv2.COLOR_BGRA2RGB),
    "mono16": (2, 1, cv2.COLOR_GRAY2RGB),
    "16UC1": (2, 1, cv2.COLOR_GRAY2RGB),
    "16UC3": (2, 3, cv2.COLOR_BGR2RGB),
    "16UC4": (2, 4, cv2.COLOR_BGRA2RGB),
    "32FC1": (4, 1, None),
    "yuv422": (1, 2, cv2.COLOR_YUV2RGB_UYVY),
    "uyvy": (1, 2, cv2.COLOR_YUV2RGB_UYVY),
    "yuv422_yuy2": (1, 2, cv2.COLOR_YUV2RGB_YUYV),
    "yuyv": (1, 2, cv2.COLOR_YUV2RGB_YUYV),
}
_PLANAR = {"nv12": cv2.COLOR_YUV2RGB_NV12, "nv21": cv2.COLOR_YUV2RGB_NV21}
_METRES = {"16UC1": 0.001, "mono16": 0.001, "32FC1": 1.0}  # in one unit of a depth camera
_DEPTH_HEAD = 12  # bytes before the png of a compressedDepth image
_NEEDS_RANGE = (
    "a picture of floats (32FC1) is depth; write the range that counts to the camera in the contract, as in "
    "`depth_m: [0.3, 6]`"
)
# OpenCV names a Bayer pattern by its second row, ROS by its first.
_BAYER = {
    "bayer_rggb": cv2.COLOR_BayerBG2RGB,
    "bayer_bggr": cv2.COLOR_BayerRG2RGB,
    "bayer_gbrg": cv2.COLOR_BayerGR2RGB,
    "bayer_grbg": cv2.COLOR_BayerGB2RGB,
}
for _pattern, _code in _BAYER.items():
    _ENCODINGS[f"{_pattern}8"] = (1, 1, _code)
    _ENCODINGS[f"{_pattern}16"] = (2, 1, _code)


def stamp_ns(msg: Any) -> int | None:
    """The header stamp in nanoseconds, None if the message has no header."""
    stamp = getattr(getattr(msg, "header", None), "stamp", None)
    return None if stamp is None else stamp.sec * 1_000_000_000 + stamp.nanosec


def decode(msg: Any, depth_m: Range | None = None) -> np.ndarray:
    """The picture in an Image or CompressedImage message, RGB uint8 [H, W, 3].

    Args: depth_m: nearest and farthest metres of a depth camera, from the contract: depth becomes grey as
        `stills.shade` says. Pictures of 8 bits are taken as they are.

    Raises UserError if the encoding is not supported or the data is damaged or too short.
    """
    try:
        return _decode_raw(msg, depth_m) if hasattr(msg, "encoding") else _decode_compressed(msg, depth_m)
    except AttributeError as error:  # a bag brings its own definitions, and they may be damaged
        raise UserError(f"a message that is no picture: {error}") from None


def look(
    msg: Any,
    size: tuple[int, ...],
    depth_m: Range | None = None,
    decoder: Callable[[Any], np.ndarray] = decode,
) -> np.ndarray:
    """The picture in a message at `size` (height, width): by `decoder`, but for depth cameras (`decode`)."""
    return resize(decoder(msg) if depth_m is None else decode(msg, depth_m), size)


def resize(rgb: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """`rgb` [H, W, 3] at `size` (height, width): area averaging when it shrinks, linear when it grows."""
    height, width = size
    if rgb.shape[:2] == size:
        return rgb
    shrinks = height <= rgb.shape[0] and width <= rgb.shape[1]
    return cv2.resize(rgb, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def _decode_raw(msg: Any, depth_m: Range | None) -> np.ndarray:
    """sensor_msgs/Image: `step` bytes a row, of which the row's pixels come first."""
    if msg.encoding in _PLANAR:
        return _decode_planar(msg)
    if msg.encoding not in _ENCODINGS:
        known = ", ".join(sorted([*_ENCODINGS, *_PLANAR]))
        raise UserError(f"the image encoding {msg.encoding!r} is not supported; supported are {known}")
    depth, channels, conversion = _ENCODINGS[msg.encoding]
    width = int(msg.width)
    rows = _rows(msg, width * channels * depth, int(msg.height))
    if msg.encoding in _METRES and (depth_m is not None or depth == 4):
        return _decode_depth(rows, _METRES[msg.encoding], bool(msg.is_bigendian), depth_m)
    if depth == 2:
        rows = rows[:, 0::2] if msg.is_bigendian else rows[:, 1::2]
    pixels = np.ascontiguousarray(rows).reshape(-1, width, channels)
    if conversion is None:
        return pixels
    if width % 2 and conversion in (cv2.COLOR_YUV2RGB_UYVY, cv2.COLOR_YUV2RGB_YUYV):
        raise UserError(f"an image in {msg.encoding} must be an even number of pixels wide, not {width}")
    return cv2.cvtColor(pixels, conversion)


def _rows(msg: Any, row: int, count: int) -> np.ndarray:
    """`count` rows of `row` bytes without what pads them, uint8 [count, row]."""
    height, width, step = int(msg.height), int(msg.width), int(msg.step)
    data = np.frombuffer(msg.data, np.uint8)
    if height == 0 or width == 0:
        raise UserError(f"an image of {height} x {width} pixels is empty")
    if step < row:
        raise UserError(
            f"an image {width} pixels wide in {msg.encoding} needs {row} bytes a row, its step is {step}"
        )
    if len(data) < step * count:
        raise UserError(
            f"the image data is cut off: {len(data)} bytes of {step * count} ({count} rows of {step})"
        )
    return data[: step * count].reshape(count, step)[:, :row]


def _decode_planar(msg: Any) -> np.ndarray:
    """A plane of brightness with one byte a pixel, then one of colours at half the height."""
    height, width = int(msg.height), int(msg.width)
    if height % 2 or width % 2:
        raise UserError(
            f"an image in {msg.encoding} must have an even number of rows and columns, not {height} x {width}"
        )
    planes = _rows(msg, width, height * 3 // 2)
    return cv2.cvtColor(np.ascontiguousarray(planes), _PLANAR[msg.encoding])


def _decode_depth(rows: np.ndarray, unit: float, bigendian: bool, depth_m: Range | None) -> np.ndarray:
    """Depth pixels in rows of bytes, in `unit` metres."""
    if depth_m is None:
        raise UserError(_NEEDS_RANGE)
    kind = np.dtype("u2" if unit < 1 else "f4").newbyteorder(">" if bigendian else "<")
    values = np.ascontiguousarray(rows).view(kind).astype(np.float32)
    return shade(values * np.float32(unit), depth_m)


def _decode_compressed(msg: Any, depth_m: Range | None) -> np.ndarray:
    """sensor_msgs/CompressedImage: whatever still-picture format OpenCV knows, by its content."""
    # "rgb8; jpeg compressed bgr8": the camera's encoding; the codec and the channel order the codec was
    # given.
    _, _, given = msg.format.partition(";")
    data = np.frombuffer(msg.data, np.uint8)
    try:
        if "compressedDepth" in given:
            return _decode_compressed_depth(msg.format, data, depth_m)
        rgb = decode_still(data, depth_m)
    except ValueError as error:
        raise UserError(
            f"an image of format {msg.format!r} ({len(data)} bytes) cannot be decoded: {error}"
        ) from None
    # The codec takes its input for BGR. Given RGB it stored the colours swapped.
    return np.ascontiguousarray(rgb[..., ::-1]) if "compressed rgb" in given else rgb


def _decode_compressed_depth(format: str, data: np.ndarray, depth_m: Range | None) -> np.ndarray:
    """A 16-bit png behind 12 bytes: what it is (4 bytes), and the two numbers that turn what stands in it
    into metres where the camera gave floats (32FC1): metres = a / (pixel - b). Raises ValueError.
    """
    if "rvl" in format:
        raise ValueError("rvl is not supported; set the publisher's compressedDepth format to png")
    if len(data) < _DEPTH_HEAD:
        raise ValueError("it is cut off")
    pixels = decode_raw_still(data[_DEPTH_HEAD:])
    if pixels.dtype != np.uint16 or pixels.ndim != 2:
        raise ValueError("it holds no 16-bit depth")
    if not format.startswith("32FC1"):
        return _decode_raw_16(pixels, depth_m)
    if depth_m is None:
        raise UserError(_NEEDS_RANGE)
    a, b = np.frombuffer(data[4:_DEPTH_HEAD], "<f4")
    with np.errstate(all="ignore"):
        metres = np.where(pixels > 0, a / (pixels.astype(np.float32) - b), np.nan)
    return shade(metres, depth_m)


def _decode_raw_16(pixels: np.ndarray, depth_m: Range | None) -> np.ndarray:
    """16-bit depth in millimetres, native [H, W]; its high byte where the contract says nothing."""
    if depth_m is not None:
        return shade(pixels * np.float32(_METRES["16UC1"]), depth_m)
    return cv2.cvtColor((pixels >> 8).astype(np.uint8), cv2.COLOR_GRAY2RGB)
