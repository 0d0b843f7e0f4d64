"""d4_interfaces/msg/Latents: a camera frame as the latents of a tokenizer, into a message and out again.

The tokenizer node writes them, the importer reads them. Messages are read by `getattr` only, so those of
rosbags and of rclpy work alike. NumPy only: the ROS process loads this.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from d4_datasets.errors import UserError

TYPE = "d4_interfaces/msg/Latents"
SUFFIX = "/latents"  # the topic of a camera's latents is the camera's with this behind it
CODECS = ("float16", "uint8")


def column(camera: str) -> str:
    """Name of the column of a camera's latents in a dataset."""
    return f"observation.latents.{camera}"


class Origin(NamedTuple):
    """What latents are: whose (hash of the tokenizer's weights), how written, how many."""

    weights: str
    codec: str
    tokens: int
    channels: int

    @classmethod
    def of(cls, msg: Any) -> Origin:
        """That of a message."""
        return cls(str(msg.weights), str(msg.codec), int(msg.tokens), int(msg.channels))

    def __str__(self) -> str:
        return f"tokenizer {self.weights} ({self.tokens} x {self.channels}, {self.codec})"


def require_alike(mine: Origin | None, dataset: str, its: Origin | None, source: str) -> None:
    """Refuse an episode of a source whose latents are not those that a dataset holds; None: pictures.

    Raises:
        UserError: they are made by another tokenizer, or otherwise written, or only one of them is latents.
    """
    if mine != its:
        held, new = ("pictures" if origin is None else f"latents of {origin}" for origin in (mine, its))
        raise UserError(
            f"{dataset} holds {held} and {source} {new}: a dataset holds pictures, or latents of one "
            "tokenizer in one codec; write to another folder"
        )


def pack(latents: np.ndarray, codec: str) -> dict[str, Any]:
    """Fields `codec`, `low`, `high`, `tokens`, `channels`, `data` (uint8 [n]) of latents [tokens, channels].

    Raises:
        ValueError: the latents are not finite, or beyond what half precision holds, or the codec is unknown.
    """
    values = np.asarray(latents, np.float32)
    if not np.isfinite(values).all() or np.abs(values).max(initial=0) > np.finfo(np.float16).max:
        raise ValueError("latents hold NaN, infinity or numbers beyond half precision")
    low = high = np.float32(0)
    if codec == "float16":
        data = np.ascontiguousarray(values, "<f2").view(np.uint8)
    elif codec == "uint8":
        low, high = values.min(initial=np.inf), values.max(initial=-np.inf)
        # in double precision: the difference of two neighbouring floats divides badly
        scale = 255.0 / (float(high) - float(low)) if high > low else 0.0
        data = np.round((values.astype(np.float64) - float(low)) * scale).astype(np.uint8)
    else:
        raise ValueError(f"codec {codec!r} is none of {', '.join(CODECS)}")
    tokens, channels = values.shape
    return {
        "codec": codec, "low": float(low), "high": float(high),
        "tokens": tokens, "channels": channels, "data": data.reshape(-1),
    }  # fmt: skip


def unpack(msg: Any) -> np.ndarray:
    """The latents in a message, float32 [tokens, channels].

    Raises:
        UserError: the codec is unknown, or the data does not fit what the message says about it.
    """
    if msg.codec not in CODECS:
        raise UserError(
            f"latents of codec {msg.codec!r} are not supported; supported are {', '.join(CODECS)}"
        )
    data, shape = np.frombuffer(msg.data, np.uint8), (int(msg.tokens), int(msg.channels))
    size = shape[0] * shape[1] * (2 if msg.codec == "float16" else 1)
    if size == 0 or len(data) != size:
        raise UserError(
            f"latents of {shape[0]} tokens with {shape[1]} channels in {msg.codec} are {size} bytes, the "
            f"message has {len(data)}: it is damaged"
        )
    if msg.codec == "float16":
        values = data.view("<f2").astype(np.float32)
    else:
        low, high = float(msg.low), float(msg.high)
        if not (np.isfinite([low, high]).all() and low <= high):
            raise UserError(f"latents in uint8 lie between {low:g} and {high:g}: the message is damaged")
        values = (low + data * ((high - low) / 255.0)).astype(np.float32)
    if not np.isfinite(values).all():
        raise UserError("latents hold NaN or infinity: the message is damaged")
    return values.reshape(shape)
