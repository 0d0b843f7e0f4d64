"""The pictures of one camera from a video file or a folder of picture files: when each was taken, then each.

    footage = VideoFile(path)             or PictureFolder(folder, ...)
    footage.stamps                        int64 ns [N], ascending: when each frame is shown
    for n, rgb in footage.read(wanted):   frames n with wanted[n], in order, uint8 [H, W, 3] of any size;
                                          read(wanted, size) may give them at `size` already

Stamps are known before any picture is decoded. If one that is wanted turns out not to be there, because the
file is damaged, `read` goes through the rest, takes what is missing out of `stamps` and raises `Damaged`:
whoever reads begins again, with ticks that follow from what is really there.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import Interpolation, VideoReformatter

from d4_datasets.aligned import ahead, picture_bytes
from d4_datasets.errors import UserError
from d4_datasets.stills import MOST_PIXELS, Range, decode_still

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_MEDIUM, _LARGE = 1 << 17, 1 << 20  # pixels
_MOST_BYTES = 1 << 28  # of one picture file
_FASTEST_HZ = 2000.0  # pictures per second above which stamps are broken
_SPARE_S = 100_000.0  # a day and a bit; with the next, how long so many frames can last
_SLOWEST_S = 60.0  # per picture, on average
# A pixel is the mean of the area that it covers, as everywhere. The luma and chroma that a video holds are
# averaged and the result is converted to RGB, a tenth of the work of converting first, and without the
# rounding down of that. Without the second flag colours would keep half the width of the small picture.
_SHRINK = Interpolation.AREA | Interpolation.FULL_CHR_H_INT
# What a file holds decides how it is read, so a playlist that calls itself .mp4 must not open other files.
_FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,asf,flv,ogg"
_OPEN = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}


class Damaged(Exception):
    """Frames that were wanted are not there; `stamps` is without them now."""


class Footage(Protocol):
    """See the module."""

    path: Path
    stamps: np.ndarray
    warnings: list[str]

    def read(
        self, wanted: np.ndarray, size: tuple[int, int] | None = None
    ) -> Generator[tuple[int, np.ndarray], None, None]:
        """(n, RGB uint8 [H, W, 3]) of the frames with `wanted` (bool [N]), in order; may raise Damaged.

        `size`: the (height, width) that the caller will resize them to; they may have it already.
        """


# ---- videos ----


class VideoFile:
    """The first video stream of a file, turned as its metadata say.

    Time 0 is the first frame that is shown. Where frames have no usable time they are counted at `fps`.

    Raises:
        UserError: it cannot be read, has no video or no frame, or no usable times and `fps` is None.
    """

    def __init__(self, path: Path, fps: float | None = None) -> None:
        self.path, self.fps = path, fps
        self.warnings: list[str] = []
        self._pts: np.ndarray | None = None  # of the frames in `stamps`; None where frames are counted
        self._size: tuple[int, int] | None = None
        with _opened(path) as (container, stream):
            self._check_size(stream)
            self._name = stream.codec_context.name
            self._scan(container, stream)

    def _check_size(self, picture: Any) -> None:
        """Refuse sizes that no memory is made for."""
        if picture.width * picture.height > MOST_PIXELS:
            raise UserError(
                f"{self.path}: its pictures are {picture.width} x {picture.height}, and more than "
                f"{MOST_PIXELS // 10**6} million pixels are not read: the file is damaged"
            )

    # -- times --

    def _scan(self, container: Any, stream: Any) -> None:
        """Times of all packets, without decoding any."""
        # An avi has a fixed rate and no times of presentation; those that FFmpeg guesses may be wrong.
        is_fixed = container.format.name == "avi"
        stamps, missing, broken = array("q"), 0, False
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
            except av.FFmpegError:
                broken = True
                break
            if packet is None:
                break
            if packet.size == 0 or packet.is_discard:
                continue
            stamp = packet.dts if is_fixed else packet.pts
            if packet.is_corrupt:
                broken = True
            elif stamp is None:
                missing += 1
            else:
                stamps.append(stamp)
        count, declared = len(stamps) + missing, stream.frames
        if count == 0:
            raise UserError(f"{self.path} has no frames{', it is cut off' if broken or declared else ''}")
        self._date(np.array(stamps, np.int64), missing, stream.time_base)
        if is_fixed:
            self._pts = None
        if declared > count + 1:
            self.warnings.append(f"{self.path} is cut off or damaged: it has {count} of {declared} frames")
        elif broken or self._is_short(container):
            self.warnings.append(
                f"{self.path} is cut off or damaged: its frames end after {self.stamps[-1] / 1e9:.1f} s"
            )

    def _is_short(self, container: Any) -> bool:
        """Whether frames end long before the file says it does; sound may last longer, if there is any."""
        if not container.duration or len(container.streams) > 1 or len(self.stamps) < 2:
            return False
        step = float(np.diff(self.stamps).max())
        return container.duration * 1000.0 > self.stamps[-1] + 2 * step + 500_000_000

    def _date(self, pts: np.ndarray, missing: int, base: Any) -> None:
        """Fill `stamps`, from stamps if they can be used, else by counting."""
        what = f"{missing} of {len(pts) + missing} frames have no time" if missing else None
        if what is None:
            order = np.unique(pts)
            what = _are_broken(order, len(pts), base)
        if what is None:
            if len(order) < len(pts):
                self.warnings.append(
                    f"{self.path}: {len(pts) - len(order)} frames have the time of another and are left out"
                )
            self._pts, self.stamps = order, _nanoseconds(order, base)
            return
        self._count(len(pts) + missing, what)

    def _count(self, frames: int, why: str) -> None:
        """Date frames by their number."""
        if self.fps is None:
            raise UserError(
                f"{self.path}: {why}; write files.fps to the contract to count its frames at a fixed rate"
            )
        self.warnings.append(f"{self.path}: {why}; its frames are counted at {self.fps:g} per second")
        self._pts = None
        self.stamps = np.round(np.arange(frames) * (1e9 / self.fps)).astype(np.int64)

    # -- pictures --

    def read(
        self, wanted: np.ndarray, size: tuple[int, int] | None = None
    ) -> Generator[tuple[int, np.ndarray], None, None]:
        """See `Footage.read`."""
        converter = _Converter(self, size)
        for number, frame in ahead(self._wanted(wanted), _frame_bytes):
            yield number, converter.rgb(frame)

    def _wanted(self, wanted: np.ndarray) -> Generator[tuple[int, Any], None, None]:
        """(n, decoded frame) of the frames with `wanted`, in order."""
        left = np.flatnonzero(wanted)
        seen = np.zeros(len(self.stamps), bool)
        place, is_whole = 0, True
        try:
            for number, frame in self._numbered():
                seen[number] = True
                if is_whole and number == left[place]:
                    yield number, frame
                    place += 1
                    if place == len(left):
                        return
                elif number > left[place]:
                    is_whole = False
        except _Backwards:
            self._count(len(seen), "its frames are not in the order of their times")
            raise Damaged from None
        self._shrink(seen)

    def _numbered(self) -> Iterator[tuple[int, Any]]:
        """(number, frame) in order, each number once."""
        if self._pts is None:
            # More frames than packets would be strange, but must not be an index error.
            yield from zip(range(len(self.stamps)), self._decode(), strict=False)
            return
        place, latest = 0, None
        for frame in self._decode():
            pts = frame.pts if frame.pts is not None else frame.dts
            if pts is None or (latest is not None and pts < latest):
                raise _Backwards
            latest = pts
            while place < len(self._pts) and self._pts[place] < pts:
                place += 1
            if place < len(self._pts) and self._pts[place] == pts:
                yield place, frame
                place += 1

    def _decode(self) -> Iterator[Any]:
        """All frames that can be decoded, in the order in which they are shown."""
        with _opened(self.path) as (container, stream):
            share_decoding(stream)
            packets = container.demux(stream)
            while True:
                try:
                    packet = next(packets, None)
                except av.FFmpegError:  # the rest cannot be read, but what the decoder holds can
                    packet = None
                is_end = packet is None or (packet.size == 0 and packet.dts is None)
                # A decoder takes an empty packet for the end, and an avi has them for repeated frames.
                if not is_end and (packet.is_corrupt or packet.size == 0):
                    continue
                with suppress(av.FFmpegError):
                    yield from stream.decode(packet)
                if is_end:
                    return

    def _shrink(self, seen: np.ndarray) -> None:
        """Keep the frames that were seen, and tell."""
        lost = int((~seen).sum())
        if lost == len(seen):
            raise UserError(f"{self.path}: none of its {lost} frames can be decoded ({self._name})")
        self.warnings.append(f"{self.path}: {lost} of {len(seen)} frames cannot be decoded and are left out")
        self.stamps = self.stamps[seen]
        self._pts = None if self._pts is None else self._pts[seen]
        raise Damaged


def share_decoding(stream: Any) -> None:
    """Let several threads decode large pictures, and two those of medium size. Small ones take as long to
    resize and encode as to decode, which goes on beside, and more threads than that only stand in the way of
    each other.
    """
    pixels = stream.codec_context.width * stream.codec_context.height
    if pixels > _MEDIUM:
        stream.thread_type = "AUTO" if pixels > _LARGE else "FRAME"
        stream.codec_context.thread_count = 0 if pixels > _LARGE else 2


def _frame_bytes(item: tuple[int, Any]) -> int:
    """Of a decoded frame, about: none has more than 3 bytes a pixel."""
    return 3 * item[1].width * item[1].height


class _Backwards(Exception):
    """Frames are shown in another order than their times."""


class _Converter:
    """Decoded frames of one reading to RGB, upright; at the size that is wanted if that is smaller."""

    def __init__(self, video: VideoFile, wanted: tuple[int, int] | None) -> None:
        self.video, self.wanted = video, wanted
        self.reformatter = VideoReformatter()
        self.size: tuple[int, int] | None = None
        self.matrix: np.ndarray | None = None
        self.shrinking: dict[str, Any] = {}

    def rgb(self, frame: Any) -> np.ndarray:
        """uint8 [H, W, 3]."""
        size = (frame.width, frame.height)
        if size != self.size:
            self._note(frame, size)
        try:
            small = self.reformatter.reformat(frame, format="rgb24", threads=1, **self.shrinking)
            picture = small.to_ndarray()
        except (av.FFmpegError, ValueError) as error:
            raise UserError(
                f"{self.video.path}: pixels in {frame.format.name} cannot be converted ({error}); "
                "convert the video with ffmpeg -pix_fmt yuv420p"
            ) from None
        return picture if self.matrix is None else np.ascontiguousarray(_upright(picture, self.matrix))

    def _note(self, frame: Any, size: tuple[int, int]) -> None:
        """What to know of a frame whose size is new."""
        self.video._check_size(frame)
        if self.size is not None:
            told = (
                f"{self.video.path}: the size of its frames changes from {self.size[0]} x {self.size[1]} to "
                f"{size[0]} x {size[1]}; all are resized to that of the contract"
            )
            if told not in self.video.warnings:
                self.video.warnings.append(told)
        self.size = size
        data = frame.side_data.get("DISPLAYMATRIX")
        matrix = None if data is None else np.frombuffer(bytes(data), np.int32)[:9].reshape(3, 3)[:2, :2]
        self.matrix = None if matrix is None or _is_upright(matrix) else matrix
        if self.matrix is not None and not _is_quarter(self.matrix):
            raise UserError(
                f"{self.video.path}: its metadata turn it by an angle that is no multiple of 90 degrees; "
                "write it upright with ffmpeg"
            )
        self.shrinking = {} if frame.format.is_rgb else self._shrinking(size)

    def _shrinking(self, size: tuple[int, int]) -> dict[str, Any]:
        """How frames of a (width, height) are made smaller while they are converted; empty where they grow.

        Those in RGB, which need no conversion, are left to the resizing of bags, equal to the last bit.
        """
        if self.wanted is None:
            return {}
        height, width = self.wanted
        if self.matrix is not None and not self.matrix[0, 0]:  # before they are turned by a quarter
            height, width = width, height
        is_smaller = width <= size[0] and height <= size[1] and (width, height) != size
        return {"width": width, "height": height, "interpolation": _SHRINK} if is_smaller else {}


def _is_upright(matrix: np.ndarray) -> bool:
    return bool(matrix[0, 0] > 0 and matrix[1, 1] > 0 and not matrix[0, 1] and not matrix[1, 0])


def _is_quarter(matrix: np.ndarray) -> bool:
    straight, crossed = matrix.diagonal(), matrix[::-1].diagonal()
    return bool((straight.all() and not crossed.any()) or (crossed.all() and not straight.any()))


def _upright(picture: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Turn and mirror a picture as a display matrix ((a, b), (c, d)) says: x' = a x + c y, y' = b x + d y."""
    if matrix[0, 0]:
        right, down = matrix[0, 0], matrix[1, 1]
    else:
        picture = picture.transpose(1, 0, 2)
        right, down = matrix[1, 0], matrix[0, 1]
    return picture[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1]


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """(container, video stream)."""
    limit = {"max_pixels": str(MOST_PIXELS)}
    try:
        # Absolute: a name with a colon in it would be taken for a protocol.
        container = av.open(str(path.absolute()), container_options=_OPEN, metadata_errors="replace")
    except (av.FFmpegError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{path} is no video that can be read ({reason}): it is empty, cut off before its index was "
            "written, or of another kind than its name says"
        ) from None
    with container:
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            raise UserError(f"{path} has no video stream")
        if streams[0].codec_context is None:
            raise UserError(f"{path}: there is no decoder for its video; convert it to H.264")
        streams[0].codec_context.options = {**streams[0].codec_context.options, **limit}
        yield container, streams[0]


def _are_broken(order: np.ndarray, count: int, base: Any) -> str | None:
    """What is wrong with the times of `count` frames, `order` being the different ones; None if nothing."""
    if base is None or base <= 0:
        return "its times have no unit"
    span = float((int(order[-1]) - int(order[0])) * base)
    if count > 1 and (len(order) < (count + 1) // 2 or span * _FASTEST_HZ < count - 1):
        return f"its {count} frames are said to last {span:g} s"
    if span > _SPARE_S + _SLOWEST_S * count:
        return f"its {count} frames are said to last {span:g} s"
    return None


def _nanoseconds(pts: np.ndarray, base: Any) -> np.ndarray:
    """Times in units of `base` as ns since the first, rounded; no product leaves 64 bits."""
    whole, rest = np.divmod((pts - pts[0]) * base.numerator, base.denominator)
    return whole * 1_000_000_000 + (rest * 1_000_000_000 + base.denominator // 2) // base.denominator


# ---- folders of pictures ----


class PictureFolder:
    """Picture files `names` in `folder`, of which number n was taken at `stamps[n]` ns, in any order."""

    depth_m: Range | None = None  # of a depth camera, see `stills`

    def __init__(self, folder: Path, names: Sequence[str], stamps: np.ndarray) -> None:
        self.path, self.warnings = folder, []
        order = np.argsort(stamps, kind="stable")
        self.stamps, first = np.unique(stamps[order], return_index=True)
        self.names: list[str] = [names[i] for i in order[first]]
        if same := len(names) - len(self.names):
            self.warnings.append(f"{folder}: {same} pictures have the time of another and are left out")

    def read(
        self, wanted: np.ndarray, size: tuple[int, int] | None = None
    ) -> Generator[tuple[int, np.ndarray], None, None]:
        """See `Footage.read`. Pictures are resized as those of a camera's messages are, by the caller."""
        yield from ahead(self._read(wanted), picture_bytes)

    def _read(self, wanted: np.ndarray) -> Generator[tuple[int, np.ndarray], None, None]:
        good = np.ones(len(self.names), bool)
        for number in np.flatnonzero(wanted):
            try:
                picture = read_picture(self.path / self.names[number], self.depth_m)
            except UserError as error:
                good[number] = False
                self.warnings.append(f"{error}; it is left out")
                continue
            if good.all():
                yield int(number), picture
        if good.all():
            return
        if not good.any():
            raise UserError(f"{self.path}: none of its {len(good)} pictures can be read")
        self.stamps = self.stamps[good]
        self.names = [name for name, is_good in zip(self.names, good, strict=True) if is_good]
        raise Damaged


def picture_names(folder: Path) -> list[str]:
    """The picture files of a folder in natural order: 2 before 10."""
    names = (entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    pictures = [name for name in names if name.lower().endswith(PICTURE_SUFFIXES)]
    return sorted(pictures, key=lambda name: ([_part(part) for part in re.split(r"(\d+)", name)], name))


def _part(text: str) -> tuple[int, int, str]:
    # Digits of other scripts are letters here: int() knows some of them and not others.
    return (0, int(text), "") if text.isascii() and text.isdigit() and len(text) < 1000 else (1, 0, text)


def read_picture(path: Path, depth_m: Range | None = None) -> np.ndarray:
    """A png, jpeg or webp file, RGB uint8 [H, W, 3], turned as its metadata say; `depth_m` as in `stills`.

    Raises:
        UserError: it is none, damaged, cut off, or too large.
    """
    if path.stat().st_size > _MOST_BYTES:
        raise UserError(f"{path} has more than {_MOST_BYTES >> 20} MiB")
    try:
        return decode_still(path.read_bytes(), depth_m, upright=True)
    except ValueError as error:
        raise UserError(f"{path} is no picture that can be read: {error}") from None
