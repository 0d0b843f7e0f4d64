"""Which library decodes pictures: cv_bridge where it works and agrees, else OpenCV alone.

Importer and node must see the same picture, so the importer's decoder decides what is right; cv_bridge is
taken only after it has given the same pixels for every encoding that it knows.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from sensor_msgs.msg import CompressedImage, Image

from d4_datasets import messages
from d4_datasets.errors import UserError

Decoder = Callable[[Any], np.ndarray]

# what both can turn into RGB, and bytes per pixel
SHARED = {"rgb8": 3, "bgr8": 3, "rgba8": 4, "bgra8": 4, "mono8": 1}


def pick_decoder(which: str) -> tuple[Decoder, str]:
    """(decoder, its name) for auto, opencv or cv_bridge.

    Raises:
        UserError: cv_bridge was asked for and does not work here, or another name was given.
    """
    if which not in ("auto", "opencv", "cv_bridge"):
        raise UserError(f"image_decoder {which!r} is none of auto, opencv, cv_bridge")
    if which == "opencv":
        return messages.decode, "opencv"
    why = _why_not()
    if not why:
        _bridge()  # now, not while the first picture waits for it
        return _decode, "cv_bridge"
    if which == "cv_bridge":
        raise UserError(f"cv_bridge does not work here: {why}; set image_decoder to opencv")
    return messages.decode, "opencv"


def picture(encoding: str, channels: int, seed: int = 0, padding: int = 12) -> Image:
    """A small picture of noise with padded rows."""
    height, width = 6, 8
    step = width * channels + padding
    noise = np.random.default_rng(seed).integers(0, 256, height * step, np.uint8)
    return Image(height=height, width=width, encoding=encoding, step=step, data=noise.tobytes())


@functools.cache
def _bridge() -> Any:
    from cv_bridge import CvBridge

    return CvBridge()


def _decode(msg: Any) -> np.ndarray:
    """By cv_bridge what it shares with us, the rest as the importer does; also rows padded by a part of a
    pixel, which cv_bridge shears.
    """
    if isinstance(msg, CompressedImage) or msg.encoding not in SHARED or msg.step % SHARED[msg.encoding]:
        return messages.decode(msg)
    return np.ascontiguousarray(_bridge().imgmsg_to_cv2(msg, "rgb8"))


def _why_not() -> str:
    """Why cv_bridge cannot be used; empty if it can. Asked in a process of its own: one that was built for
    another NumPy does not raise but ends the process.
    """
    code = "import sys; from d4_nodes.ros import pictures; sys.exit(pictures.compare())"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return ""
    return (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]


def compare() -> str | int:
    """0 if cv_bridge decodes all shared encodings as we do, else what differs; may crash."""
    for encoding, channels in SHARED.items():
        image = picture(encoding, channels)
        if not np.array_equal(_decode(image), messages.decode(image)):
            return f"it decodes {encoding} differently"
    return 0
