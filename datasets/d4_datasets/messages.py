"""Camera messages to RGB pictures: sensor_msgs Image and CompressedImage -> uint8 [H, W, 3], and one resize
for all.

The importer and the robot's node call the same two functions, `decode` and `resize`, so that a policy sees
live what it saw in training. Messages are read by `getattr` only: those of rosbags and of rclpy work alike.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from d4_datasets.errors import UserError

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
    "yuv422": (1, 2, cv2.COLOR_YUV2RGB_UYVY),
    "uyvy": (1, 2, cv2.COLOR_YUV2RGB_UYVY),
    "yuv422_yuy2": (1, 2, cv2.COLOR_YUV2RGB_YUYV),
    "yuyv": (1, 2, cv2.COLOR_YUV2RGB_YUYV),
}
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
    header = getattr(msg, "header", None)
    return None if header is None else header.stamp.sec * 1_000_000_000 + header.stamp.nanosec


def decode(msg: Any) -> np.ndarray:
    """The picture in an Image or CompressedImage message, RGB uint8 [H, W, 3].

    Raises UserError if the encoding is not supported or the data is damaged or too short.
    """
    return _decode_raw(msg) if hasattr(msg, "encoding") else _decode_compressed(msg)


def resize(rgb: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`rgb` [H, W, 3] at `size` (height, width): area averaging when it shrinks, linear when it grows."""
    height, width = size
    if rgb.shape[:2] == size:
        return rgb
    shrinks = height <= rgb.shape[0] and width <= rgb.shape[1]
    return cv2.resize(rgb, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def _decode_raw(msg: Any) -> np.ndarray:
    """sensor_msgs/Image: `step` bytes a row, of which the row's pixels come first."""
    if msg.encoding not in _ENCODINGS:
        known = ", ".join(sorted(_ENCODINGS))
        raise UserError(f"the image encoding {msg.encoding!r} is not supported; supported are {known}")
    depth, channels, conversion = _ENCODINGS[msg.encoding]
    height, width, step = int(msg.height), int(msg.width), int(msg.step)
    row = width * channels * depth
    data = np.frombuffer(msg.data, np.uint8)
    if height == 0 or width == 0:
        raise UserError(f"an image of {height} x {width} pixels is empty")
    if step < row:
        raise UserError(
            f"an image {width} pixels wide in {msg.encoding} needs {row} bytes a row, its step is {step}"
        )
    if len(data) < step * height:
        raise UserError(
            f"the image data is cut off: {len(data)} bytes of {step * height} ({height} rows of {step})"
        )
    rows = data[: step * height].reshape(height, step)[:, :row]
    if depth == 2:
        rows = rows[:, 0::2] if msg.is_bigendian else rows[:, 1::2]
    pixels = np.ascontiguousarray(rows).reshape(height, width, channels)
    if conversion is None:
        return pixels
    if width % 2 and conversion in (cv2.COLOR_YUV2RGB_UYVY, cv2.COLOR_YUV2RGB_YUYV):
        raise UserError(f"an image in {msg.encoding} must be an even number of pixels wide, not {width}")
    return cv2.cvtColor(pixels, conversion)


def _decode_compressed(msg: Any) -> np.ndarray:
    """sensor_msgs/CompressedImage: whatever still-picture format OpenCV knows, by its content."""
    # "rgb8; jpeg compressed bgr8": the camera's encoding; the codec and the channel order the codec was
    # given.
    given = msg.format.partition(";")[2]
    data = np.frombuffer(msg.data, np.uint8)
    if "compressedDepth" in msg.format:
        raise UserError(
            f"the image format {msg.format!r} is not supported; record the depth image raw instead"
        )
    if data[:2].tobytes() == b"\xff\xd8" and b"\xff\xd9" not in data.tobytes():
        # OpenCV would fill the missing rows with grey and say nothing.
        raise UserError(f"a jpeg image of {len(data)} bytes is cut off")
    # A file's own rotation flag is ignored, as the ROS decoder does. To BGR, which every OpenCV can: the
    # robot's may be years older than the importer's.
    bgr = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION) if len(data) else None
    if bgr is None:
        raise UserError(
            f"an image of format {msg.format!r} ({len(data)} bytes) cannot be decoded; "
            "it is damaged or no still-picture format such as jpeg or png"
        )
    # The codec takes its input for BGR. Given RGB it stored the colours swapped, so what comes out is RGB.
    return bgr if "compressed rgb" in given else cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
