"""Lossless video of one camera: RGB frames in and the same frames out, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

from d4_datasets.errors import UserError

# crf 0 in RGB is bit-exact; a key frame every 10 keeps random access cheap; no B frames, so packets stand in
# order.
_X264 = {"crf": "0", "preset": "ultrafast", "g": "10", "bf": "0"}
_STATS_FRAMES = 100  # frames of an episode that pixel statistics are taken from

Stats = dict[str, np.ndarray]


@dataclass(frozen=True)
class Video:
    """The encoded video of one episode: `frames` frames, and pixel statistics in [0, 1], each [3]."""

    path: Path
    frames: int
    stats: Stats


class VideoEncoder:
    """Encodes RGB uint8 frames [H, W, 3] into a lossless MP4 file, one at a time; memory does not grow with
    length.

    `close` returns the `Video`. Raises UserError if this build of FFmpeg lacks libx264rgb.
    """

    def __init__(self, path: Path, rate_hz: float, size: tuple[int, int]) -> None:
        self.path, self.frames = path, 0
        self._container = av.open(str(path), "w", format="mp4")
        try:
            stream = self._container.add_stream("libx264rgb", rate=rate_fraction(rate_hz), options=_X264)
        except (av.FFmpegError, ValueError):
            raise UserError("this PyAV has no libx264rgb encoder; install the av wheel from PyPI") from None
        stream.height, stream.width = size
        stream.pix_fmt = "rgb24"
        stream.codec_context.thread_count = 1  # one process per core does better than threads on small frames
        self._stream = stream
        self._pixels = _PixelStats()

    def add(self, frame: np.ndarray) -> None:
        """Append a frame."""
        self._pixels.add(self.frames, frame)
        self._container.mux(self._stream.encode(_video_frame(frame)))
        self.frames += 1

    def close(self) -> Video:
        """Finish the file."""
        self._container.mux(self._stream.encode())
        self._container.close()
        return Video(self.path, self.frames, self._pixels.result())


def _video_frame(rgb: np.ndarray) -> av.VideoFrame:
    """As `VideoFrame.from_ndarray` makes it, which takes five times as long."""
    frame = av.VideoFrame(rgb.shape[1], rgb.shape[0], "rgb24")
    plane = frame.planes[0]
    if plane.line_size != 3 * rgb.shape[1]:  # rows are padded
        return av.VideoFrame.from_ndarray(rgb, format="rgb24")
    plane.update(rgb.tobytes())
    return frame


def encode_video(path: Path, frames: Iterable[np.ndarray], rate_hz: float, size: tuple[int, int]) -> Video:
    """Encode all `frames` (RGB uint8 [H, W, 3]) into a lossless MP4 file."""
    encoder = VideoEncoder(path, rate_hz, size)
    for frame in frames:
        encoder.add(frame)
    return encoder.close()


def decode_video(path: Path, start_s: float = 0.0) -> Iterator[np.ndarray]:
    """The frames of a video from time `start_s` on, RGB uint8 [H, W, 3], in order."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            assert stream.time_base is not None
            first = round(start_s / stream.time_base)
            container.seek(first, stream=stream)
            for frame in container.decode(stream):
                if frame.pts is not None and frame.pts >= first:
                    yield frame.to_ndarray()  # planar GBR; PyAV orders it as RGB, without conversion
    except av.FFmpegError as error:
        raise UserError(f"{path} cannot be decoded ({error}); write the dataset again") from None


def rate_fraction(rate_hz: float) -> Fraction:
    """The frame rate as FFmpeg wants it."""
    return Fraction(rate_hz).limit_denominator(1001)


class _PixelStats:
    """Running per-channel min, max, mean, std of frames that thin out as an episode gets longer."""

    def __init__(self) -> None:
        self.stride, self.count = 1, 0
        self.low, self.high = np.full(3, 255), np.zeros(3)
        self.total, self.squares = np.zeros(3), np.zeros(3)

    def add(self, number: int, frame: np.ndarray) -> None:
        if number % self.stride:
            return
        if number >= _STATS_FRAMES * self.stride:
            self.stride *= 2
        planes = cv2.split(frame)
        mean, std = (value[:, 0] for value in cv2.meanStdDev(frame))
        self.count += 1
        self.low = np.minimum(self.low, [plane.min() for plane in planes])
        self.high = np.maximum(self.high, [plane.max() for plane in planes])
        self.total += mean
        self.squares += mean**2 + std**2

    def result(self) -> Stats:
        mean = self.total / max(self.count, 1)
        std = np.sqrt(np.maximum(self.squares / max(self.count, 1) - mean**2, 0))
        values = {"min": self.low / 255, "max": self.high / 255, "mean": mean / 255, "std": std / 255}
        return {**values, "count": np.array([self.count])}
