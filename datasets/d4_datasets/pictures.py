"""Pictures for reports: contact sheets with captions, PNG and MP4 as bytes. Images are RGB uint8 everywhere.

Nothing here reads a dataset or writes a file except `write_png`: a caller hands over arrays and gets an
array or bytes, which stand in an HTML page as well as on disk.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

from d4_datasets import whole

Color = tuple[int, int, int]

GREEN: Color = (34, 150, 74)
ORANGE: Color = (222, 130, 20)
GREY: Color = (205, 205, 205)
_INK: Color = (30, 30, 30)
_PAPER = 255

_FONT, _FONT_SCALE = cv2.FONT_HERSHEY_SIMPLEX, 0.45
_LINE = 17  # height of a line of text, pixels
_GAP = 3  # between tiles
_BAR = 5  # height of the colour bar under a tile
_MARGIN = 10


@dataclass(frozen=True)
class Strip:
    """One row of a contact sheet.

    Attributes:
        images: uint8 [n, H, W, 3], left to right.
        caption: text left of the row, lines divided by newlines.
        notes: text under each image, n entries or none.
        bars: colour of the bar under each image (None: no bar), n entries or none.
    """

    images: np.ndarray
    caption: str = ""
    notes: Sequence[str] = ()
    bars: Sequence[Color | None] = ()


def fit(images: np.ndarray, height: int) -> np.ndarray:
    """Bring images [..., H, W, 3] to about `height` pixels: small ones by whole pixels, large ones by
    averaging.

    Enlarging repeats pixels, so that what a low-resolution model sees is shown as it is, not smoothed.
    """
    now = images.shape[-3]
    if now <= height:
        factor = max(1, round(height / now))
        return images.repeat(factor, axis=-3).repeat(factor, axis=-2)
    width = max(1, round(images.shape[-2] * height / now))
    flat = images.reshape(-1, *images.shape[-3:])
    small = np.stack([cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA) for image in flat])
    return small.reshape(*images.shape[:-3], height, width, 3)


def contact_sheet(
    strips: Sequence[Strip], title: str = "", legend: Sequence[tuple[str, Color]] = (), tile: int = 96
) -> np.ndarray:
    """Draw rows of captioned images, uint8 [H, W, 3].

    `title` (lines divided by newlines) stands on top, `legend` explains the colours of the bars, and images
    are about `tile` pixels high.
    """
    left = 2 * _MARGIN + max((_text_width(line) for s in strips for line in s.caption.split("\n")), default=0)
    rows = [_strip_picture(strip, left, tile) for strip in strips]
    head = _head(title, legend)
    width = max(picture.shape[1] for picture in [head, *rows])
    return np.concatenate([_widen(picture, width) for picture in [head, *rows]])


def png_bytes(image: np.ndarray) -> bytes:
    """Encode an RGB image [H, W, 3] as PNG."""
    bgr = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2BGR)
    _, data = cv2.imencode(".png", bgr, [cv2.IMWRITE_PNG_COMPRESSION, 9])  # a tenth of the default's size
    return data.tobytes()


def write_png(path: Path, image: np.ndarray) -> None:
    """Write an RGB image [H, W, 3] to `path`, whole or not at all."""
    whole.write(path, png_bytes(image))


def mp4_bytes(frames: np.ndarray, fps: float, enlarge: int = 1) -> bytes:
    """Encode a clip [T, H, W, 3] as an MP4 that every browser plays (H.264, yuv420p, index in front).

    Every pixel becomes `enlarge` x `enlarge` of them, a frame at a time, so that a long clip stays small in
    memory. Odd sizes are extended by repeating the last row or column, because yuv420p halves the colours.
    """
    height, width = frames.shape[1] * enlarge, frames.shape[2] * enlarge
    odd = ((0, height % 2), (0, width % 2), (0, 0))
    rate = Fraction(fps).limit_denominator(1001)  # 29.97 is 30000/1001
    # Through a file: moving the index to the front means reading back what was written.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        with av.open(str(path), "w", container_options={"movflags": "faststart"}) as container:
            stream = container.add_stream("libx264", rate=rate, options={"crf": "18"})
            stream.height, stream.width, stream.pix_fmt = height + height % 2, width + width % 2, "yuv420p"
            for frame in frames:
                large = np.pad(frame.repeat(enlarge, 0).repeat(enlarge, 1), odd, mode="edge")
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(large), format="rgb24")
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
        return path.read_bytes()


def _text_width(text: str) -> int:
    return cv2.getTextSize(text, _FONT, _FONT_SCALE, 1)[0][0]


def _write(picture: np.ndarray, text: str, x: int, line: int) -> None:
    """Put a line of text into `picture`, `line` lines (may be a fraction) below its top."""
    base = int((line + 1) * _LINE) - 5
    cv2.putText(picture, text, (x, base), _FONT, _FONT_SCALE, _INK, 1, cv2.LINE_AA)


def _paper(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), _PAPER, np.uint8)


def _widen(picture: np.ndarray, width: int) -> np.ndarray:
    return np.pad(picture, ((0, 0), (0, width - picture.shape[1]), (0, 0)), constant_values=_PAPER)


def _strip_picture(strip: Strip, left: int, tile: int) -> np.ndarray:
    """One row: caption, images, bars, notes."""
    images = fit(strip.images, tile)
    count, height, width = images.shape[:3]
    lines = strip.caption.split("\n")
    under = _BAR * bool(strip.bars) + _LINE * bool(strip.notes)
    picture = _paper(
        max(height + under, _LINE * len(lines)) + 2 * _GAP, left + count * (width + _GAP) + _MARGIN
    )
    for number, line in enumerate(lines):
        _write(picture, line, _MARGIN, number)
    for number, image in enumerate(images):
        x = left + number * (width + _GAP)
        picture[:height, x : x + width] = image
        if strip.bars and strip.bars[number] is not None:
            picture[height : height + _BAR, x : x + width] = strip.bars[number]
        if strip.notes:
            top = height + _BAR * bool(strip.bars)
            _write(picture[top:], strip.notes[number], x, 0)
    return picture


def _head(title: str, legend: Sequence[tuple[str, Color]]) -> np.ndarray:
    """The title lines and, below, the colours and what they mean."""
    lines = title.split("\n") if title else []
    width = 2 * _MARGIN + max((_text_width(line) for line in lines), default=0)
    x = _MARGIN
    entries = []
    for text, color in legend:
        entries.append((x, text, color))
        x += 24 + _text_width(text) + 2 * _MARGIN
    picture = _paper(_LINE * (len(lines) + bool(legend)) + 2 * _MARGIN, max(width, x))
    body = picture[_MARGIN // 2 :]
    for number, line in enumerate(lines):
        _write(body, line, _MARGIN, number)
    top = _LINE * len(lines)
    for x, text, color in entries:
        body[top + 7 : top + 7 + _BAR, x : x + 20] = color
        _write(body[top:], text, x + 24, 0)
    return picture
