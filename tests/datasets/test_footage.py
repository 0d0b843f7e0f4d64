"""Video files as they come: odd times, turned, cut off, lying, empty."""

import re
import shutil
import struct

import av
import cv2
import numpy as np
import pytest
from footage_files import contract, picture, write_pictures, write_video

from d4_datasets import footage, messages
from d4_datasets.errors import UserError
from d4_datasets.footage import Damaged, VideoFile, picture_names, read_picture
from d4_datasets.ingest import ingest
from d4_datasets.lerobot import Dataset
from d4_datasets.stills import picture_size

MS = 1_000_000


def frames_of(video):
    """All frames."""
    return [rgb for _, rgb in video.read(np.ones(len(video.stamps), bool))]


def big(k, size=(48, 64)):
    """A picture that codecs with loss keep the look of."""
    y, x = np.mgrid[: size[0], : size[1]]
    return np.stack([(x * 4 + 8 * k) % 256, y * 5 % 256, np.full(size, 12 * k % 256)], 2).astype(np.uint8)


# ---- times


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_a_variable_rate_is_kept(tmp_path, suffix):
    stamps = [0, 33, 133, 140, 900, 901, 5000]
    video = VideoFile(write_video(tmp_path / f"v{suffix}", [picture(k) for k in range(7)], stamps))
    assert (video.stamps // MS).tolist() == stamps
    np.testing.assert_array_equal(frames_of(video), [picture(k) for k in range(7)])
    assert video.warnings == []


def test_time_zero_is_the_first_frame(tmp_path):
    video = VideoFile(write_video(tmp_path / "v.mkv", [picture(k) for k in range(3)], [700, 800, 950]))
    assert (video.stamps // MS).tolist() == [0, 100, 250]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_reordered_frames_come_in_the_order_of_their_times(tmp_path, suffix):
    """B-frames: packets stand in another order than frames, and an AVI has no times for them."""
    frames = [np.full((32, 32, 3), 10 * k, np.uint8) for k in range(24)]
    path = write_video(
        tmp_path / f"v{suffix}", frames, codec="libx264", pixels="yuv420p", bf="3", b_strategy="0", crf="10"
    )
    with av.open(str(path)) as container:
        pts = [p.pts if p.pts is not None else -1 for p in container.demux(video=0) if p.size]
    assert suffix == ".avi" or pts != sorted(pts)
    video = VideoFile(path)
    assert (video.stamps // MS).tolist() == [100 * k for k in range(24)]
    levels = [rgb.mean() for rgb in frames_of(video)]
    np.testing.assert_allclose(levels, [10 * k for k in range(24)], atol=6)


def test_an_edit_list_is_obeyed(tmp_path):
    """A cut made without encoding: frames before it are in the file and must not be shown."""
    path = write_video(tmp_path / "v.mp4", [picture(k) for k in range(12)])
    data = bytearray(path.read_bytes())
    place = data.index(b"elst") + 8
    count, _, start = struct.unpack(">IIi", data[place : place + 12])
    assert (count, start) == (1, 0)
    with av.open(str(path)) as container:
        unit = container.streams.video[0].time_base
    struct.pack_into(">i", data, place + 8, int(0.5 / unit))
    path.write_bytes(data)
    video = VideoFile(path)
    assert (video.stamps // MS).tolist() == [100 * k for k in range(7)]
    np.testing.assert_array_equal(frames_of(video), [picture(k) for k in range(5, 12)])


class Strange:
    """VideoFile of packets whose times a test has changed."""

    def __init__(self, monkeypatch, change):
        decode = VideoFile._decode

        def scan(self, container, stream):
            pts = [packet.pts for packet in container.demux(stream) if packet.size]
            changed = change(pts)
            self._changed = dict(zip(pts, changed, strict=True))
            known = np.array([p for p in changed if p is not None], np.int64)
            self._date(known, len(pts) - len(known), stream.time_base)

        def decoded(self):
            for frame in decode(self):
                frame.pts = self._changed[frame.pts]
                if frame.pts is None:
                    frame.dts = None
                yield frame

        monkeypatch.setattr(VideoFile, "_scan", scan)
        monkeypatch.setattr(VideoFile, "_decode", decoded)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda pts: [None] * len(pts), "6 of 6 frames have no time"),
        (lambda pts: [None, *pts[1:]], "1 of 6 frames have no time"),
        (lambda pts: [0] * len(pts), "its 6 frames are said to last 0 s"),
        (lambda pts: [p // 1000 for p in pts], "its 6 frames are said to last"),
        (lambda pts: [p * 10**9 for p in pts], "its 6 frames are said to last 5e"),
        (lambda pts: [*pts[:-1], 2**62], "its 6 frames are said to last"),
    ],
)
def test_times_that_cannot_be_used_need_a_rate(tmp_path, monkeypatch, change, sentence):
    path = write_video(tmp_path / "v.mkv", [picture(k) for k in range(6)])
    Strange(monkeypatch, change)
    with pytest.raises(UserError, match=sentence + r".*; write files\.fps to the contract"):
        VideoFile(path)
    video = VideoFile(path, fps=5)
    assert (video.stamps // MS).tolist() == [200 * k for k in range(6)]
    np.testing.assert_array_equal(frames_of(video), [picture(k) for k in range(6)])
    assert re.search("frames are counted at 5 per second", video.warnings[0])


def test_times_that_run_backwards_need_a_rate(tmp_path, monkeypatch):
    """Parts of two recordings put behind each other: sorted, they would be shuffled."""
    path = write_video(tmp_path / "v.mkv", [picture(k) for k in range(6)])
    Strange(monkeypatch, lambda pts: [*pts[3:], *pts[:3]])
    with pytest.raises(UserError, match="not in the order of their times; write files"):
        frames_of(VideoFile(path))
    video = VideoFile(path, fps=10)
    with pytest.raises(Damaged):
        frames_of(video)
    np.testing.assert_array_equal(frames_of(video), [picture(k) for k in range(6)])


def test_frames_with_the_time_of_another_are_left_out(tmp_path, monkeypatch):
    path = write_video(tmp_path / "v.mkv", [picture(k) for k in range(6)])
    Strange(monkeypatch, lambda pts: [pts[0], pts[1], pts[1], *pts[3:]])
    video = VideoFile(path)
    np.testing.assert_array_equal(frames_of(video), [picture(k) for k in (0, 1, 3, 4, 5)])
    assert "1 frames have the time of another" in video.warnings[0]


# ---- pictures


@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
@pytest.mark.parametrize("hflip", [False, True])
def test_frames_are_turned_as_the_metadata_say(tmp_path, degrees, hflip):
    """FFmpeg's own filters are the judge of what a display matrix means."""
    frames = [picture(k) for k in range(2)]
    path = write_video(tmp_path / "v.mp4", frames, turn={"degrees": degrees, "hflip": hflip})
    shown = frames_of(VideoFile(path))
    wanted = np.rot90(frames[0], degrees // 90)
    np.testing.assert_array_equal(shown[0], wanted[:, ::-1] if hflip else wanted)


def test_an_angle_that_is_no_quarter_turn_is_refused(tmp_path):
    path = write_video(tmp_path / "v.mp4", [picture(0), picture(1)], turn={"degrees": 30})
    with pytest.raises(UserError, match="no multiple of 90 degrees"):
        frames_of(VideoFile(path))


@pytest.mark.parametrize(
    ("codec", "pixels", "suffix"),
    [
        ("ffv1", "gray", ".mkv"), ("ffv1", "gray16le", ".mkv"), ("ffv1", "yuv444p10le", ".mkv"),
        ("ffv1", "bgra", ".mkv"), ("ffv1", "yuv411p", ".mkv"), ("libx264", "yuvj420p", ".mp4"),
        ("libx264", "yuv422p", ".mov"), ("libvpx-vp9", "yuv420p", ".webm"), ("mjpeg", "yuvj422p", ".avi"),
        ("rawvideo", "bgr24", ".avi"), ("png", "rgb48be", ".mov"), ("mpeg4", "yuv420p", ".avi"),
        ("libvpx", "yuva420p", ".webm"),
    ],
)  # fmt: skip
def test_any_pixel_format_becomes_rgb(tmp_path, codec, pixels, suffix):
    frames = [big(k) for k in range(6)]
    try:
        path = write_video(tmp_path / f"v{suffix}", frames, codec=codec, pixels=pixels)
    except (av.FFmpegError, ValueError) as error:
        pytest.skip(f"this FFmpeg cannot write it: {error}")
    video = VideoFile(path)
    assert (video.stamps // MS).tolist() == [100 * k for k in range(6)]
    for rgb, frame in zip(frames_of(video), frames, strict=True):
        assert (rgb.shape, rgb.dtype) == (frame.shape, np.uint8)
        grey = np.dot(frame, [0.299, 0.587, 0.114])
        wanted = np.repeat(grey[..., None], 3, 2) if "gray" in pixels else frame
        assert np.abs(rgb.astype(float) - wanted).mean() < 16


def scene(k, size=(96, 160)):
    """Smooth colours, as a camera sees them."""
    coarse = np.random.default_rng(k).uniform(30, 225, (6, 10, 3)).astype(np.float32)
    return cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("turn", [None, {"degrees": 90, "hflip": False}])
@pytest.mark.parametrize(
    ("codec", "pixels", "suffix"),
    [
        ("libx264", "yuv420p", ".mp4"), ("libx264", "yuvj420p", ".mp4"), ("libx264", "nv12", ".mov"),
        ("ffv1", "yuv420p", ".mkv"), ("ffv1", "yuv422p10le", ".mkv"), ("ffv1", "yuv444p", ".mkv"),
    ],
)  # fmt: skip
def test_a_video_shrinks_to_the_means_of_areas(tmp_path, codec, pixels, suffix, turn):
    """While it is converted, and more exactly than what is converted, rounded and resized after it.

    But for H.264 with its chroma at the left of each pair of pixels, where the reader looks for it: FFmpeg,
    which writes it here, leaves it in the middle.
    """
    if turn is not None and suffix != ".mp4":
        pytest.skip("turned in mp4 only")
    frames = [scene(k) for k in range(3)]
    path = write_video(tmp_path / f"v{suffix}", frames, codec=codec, pixels=pixels, turn=turn)
    video, errors = VideoFile(path), {}
    for name, wanted in (("now", (20, 24)), ("before", None)):
        shown = [messages.resize(rgb, (20, 24)) for _, rgb in video.read(np.ones(3, bool), wanted)]
        upright = [np.rot90(frame) if turn else frame for frame in frames]
        truth = [cv2.resize(f.astype(np.float32), (24, 20), interpolation=cv2.INTER_AREA) for f in upright]
        errors[name] = np.abs(np.array(shown) - np.array(truth))
    slack = 1.5 if codec == "libx264" else 0.0
    assert errors["now"].mean() < min(0.8, errors["before"].mean()) + slack
    assert errors["now"].max() < 5 + 4 * slack


@pytest.mark.parametrize("size", [(96, 160), (100, 24), (20, 200), (200, 300)])
def test_a_video_that_does_not_shrink_is_left_to_the_caller(tmp_path, size):
    path = write_video(tmp_path / "v.mp4", [scene(0)], codec="libx264", pixels="yuv420p")
    (_, rgb), *_ = VideoFile(path).read(np.ones(1, bool), size)
    assert rgb.shape == (96, 160, 3)


def test_a_size_that_changes_on_the_way_is_told(tmp_path):
    """Two h264 streams of different sizes, one behind the other in one file of packets."""
    parts = [
        write_video(tmp_path / f"{n}.ts", [big(k, s) for k in range(5)], codec="libx264", pixels="yuv420p")
        for n, s in enumerate([(48, 64), (96, 128)])
    ]
    path = tmp_path / "v.mkv"
    with av.open(str(path), "w") as out:
        stream, number = None, 0
        for part in parts:
            with av.open(str(part)) as source:
                if stream is None:
                    stream = out.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(source.streams.video[0]):
                    if packet.dts is not None:
                        packet.pts = packet.dts = number * 9000
                        packet.stream, number = stream, number + 1
                        out.mux(packet)
    video = VideoFile(path)
    shapes = [rgb.shape[:2] for rgb in frames_of(video)]
    assert shapes == [(48, 64)] * 5 + [(96, 128)] * 5
    assert "changes from 64 x 48 to 128 x 96" in video.warnings[0]


# ---- damage


def noisy(path, count=60, **options):
    return write_video(path, [picture(k, (48, 64)) for k in range(count)], **options)


@pytest.mark.parametrize("share", [0.3, 0.77])
def test_an_mp4_cut_off_behind_its_index_gives_what_is_there(tmp_path, share):
    noisy(tmp_path / "whole.mp4", movflags="faststart")
    with av.open(str(tmp_path / "whole.mp4")) as source, av.open(
        str(tmp_path / "v.mp4"), "w", options={"movflags": "faststart"}
    ) as out:  # fmt: skip
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    path = tmp_path / "v.mp4"
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    summary = ingest([path], contract(size=(48, 64)), tmp_path / "out")
    dataset = Dataset(tmp_path / "out")
    count = summary.frames
    assert abs(count - 60 * share) < 6
    for k, frame in enumerate(dataset.frames("front", 0)):
        np.testing.assert_array_equal(frame, picture(k, (48, 64)))
    assert re.search(r"is cut off or damaged: it has \d+ of 60 frames", summary.warnings[0])


@pytest.mark.parametrize("suffix", [".mkv", ".avi"])
def test_a_recording_cut_off_gives_what_is_there(tmp_path, suffix):
    path = noisy(tmp_path / f"v{suffix}")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    summary = ingest([path], contract(size=(48, 64)), tmp_path / "out")
    assert 20 < summary.frames < 35
    assert any("cut off" in warning for warning in summary.warnings)
    for k, frame in enumerate(Dataset(tmp_path / "out").frames("front", 0)):
        np.testing.assert_array_equal(frame, picture(k, (48, 64)))


def test_frames_that_cannot_be_decoded_split_the_episode(tmp_path):
    """Every frame is a key frame here; those whose bytes are gone are lost, and only those."""
    path = noisy(tmp_path / "v.mov", 30, codec="png", pixels="rgb24")
    data = bytearray(path.read_bytes())
    heads = [m.start() for m in re.finditer(b"IHDR", bytes(data))]
    assert len(heads) == 30
    for k in range(12, 16):
        data[heads[k] : heads[k] + 24] = bytes(24)
    path.write_bytes(data)
    summary = ingest([path], contract(size=(48, 64)), tmp_path / "out")
    dataset = Dataset(tmp_path / "out")
    assert summary.episodes == 2
    assert any("4 of 30 frames cannot be decoded and are left out" in w for w in summary.warnings)
    last = list(dataset.frames("front", 1))
    np.testing.assert_array_equal(last, [picture(k, (48, 64)) for k in range(30 - len(last), 30)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "v.mov"]


def test_an_mp4_without_its_index_is_refused(tmp_path):
    data = noisy(tmp_path / "v.mp4").read_bytes()
    (tmp_path / "v.mp4").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cut off before its index was written"):
        VideoFile(tmp_path / "v.mp4")


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 5000, b"<html>", b"ftypmp42" * 900, b"ffconcat version 1.0\nfile whole.mkv\n",
                b"#EXTM3U\n#EXTINF:1,\nwhole.mkv\n#EXT-X-ENDLIST\n"],
)  # fmt: skip
def test_what_is_no_video_is_refused_and_lists_open_nothing(tmp_path, content):
    """A list of other files that calls itself a video would read them."""
    write_video(tmp_path / "whole.mkv", [picture(0), picture(1)])
    (tmp_path / "v.mp4").write_bytes(content)
    with pytest.raises(UserError, match="is no video that can be read"):
        VideoFile(tmp_path / "v.mp4")


def test_a_name_with_a_colon_is_no_protocol(tmp_path, monkeypatch):
    write_video(tmp_path / "v.mkv", [picture(0), picture(1)])
    shutil.move(tmp_path / "v.mkv", tmp_path / "pipe:0.mkv")
    monkeypatch.chdir(tmp_path)
    assert len(VideoFile(footage.Path("pipe:0.mkv")).stamps) == 2


@pytest.mark.parametrize("suffix", [".mkv", ".avi"])
def test_no_frames_is_one_sentence(tmp_path, suffix):
    path = write_video(tmp_path / f"v{suffix}", [], codec="mjpeg", pixels="yuvj420p")
    with pytest.raises(UserError, match=r"has no frames|has no video|is no video that can be read"):
        VideoFile(path)


def test_no_video_stream_is_one_sentence(tmp_path):
    with av.open(str(tmp_path / "v.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(UserError, match="has no video stream"):
        VideoFile(tmp_path / "v.mkv")


@pytest.mark.parametrize(
    ("side", "sentence"),
    [(9000, "9000 x 9000, and more than 67 million pixels"), (60_000, "none of its 3 frames can be decoded")],
)
def test_absurd_sizes_are_refused_before_memory_is_made(tmp_path, side, sentence):
    """A header of a few bytes that says gigabytes; FFmpeg itself ignores those that are larger still."""
    path = write_video(tmp_path / "v.mkv", [picture(0, (260, 300))] * 3, codec="ffv1", pixels="bgr0")
    data, absurd = path.read_bytes(), struct.pack(">H", side)
    for key, size in ((b"\xb0\x82", 300), (b"\xba\x82", 260)):  # PixelWidth, PixelHeight
        assert data.count(key + struct.pack(">H", size)) == 1
        data = data.replace(key + struct.pack(">H", size), key + absurd)
    path.write_bytes(data)
    with pytest.raises(UserError, match=sentence):
        frames_of(VideoFile(path))


def test_a_picture_inside_a_video_that_lies_about_its_size(tmp_path):
    path = write_video(tmp_path / "v.mov", [picture(k) for k in range(4)], codec="png", pixels="rgb24")
    data = bytearray(path.read_bytes())
    for found in list(re.finditer(b"IHDR", bytes(data)))[2:]:
        struct.pack_into(">II", data, found.end(), 60_000, 60_000)
    path.write_bytes(data)
    video = VideoFile(path)
    with pytest.raises(Damaged):
        frames_of(video)
    assert len(video.stamps) == 2


# ---- folders of pictures


def test_natural_order(tmp_path):
    for name in ("a10.png", "a9.png", "b1.JPG", "a09.png", "x.txt", ".a1.png", "a².png"):
        (tmp_path / name).touch()
    assert picture_names(tmp_path) == ["a09.png", "a9.png", "a10.png", "a².png", "b1.JPG"]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_pictures_that_are_cut_off_or_lie_are_refused(tmp_path, suffix):
    frame = picture(0, (40, 50))
    path = write_pictures(tmp_path, {f"p{suffix}": frame}) / f"p{suffix}"
    data = path.read_bytes()
    assert picture_size(data) == (40, 50)
    assert read_picture(path).shape == frame.shape
    for length in (0, 7, 30, len(data) // 2, len(data) - 12):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match="is no picture that can be read"):
            read_picture(path)
    path.write_bytes(data.replace(struct.pack(">I", 50), struct.pack(">I", 10**9), 1))
    if suffix == ".png":
        with pytest.raises(UserError, match="1000000000 x 40 pixels, which is too many"):
            read_picture(path)
