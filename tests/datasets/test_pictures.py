"""Pictures: bytes that decode to what went in, and sheets on which everything fits."""

from __future__ import annotations

import io
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from d4_datasets.pictures import GREEN, Strip, contact_sheet, fit, mp4_bytes, png_bytes, write_png


def _noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


def _decode_png(data: bytes) -> np.ndarray:
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def test_png_keeps_every_pixel_and_the_order_of_colours(tmp_path: Path) -> None:
    image = _noise(13, 17)
    np.testing.assert_array_equal(_decode_png(png_bytes(image)), image)
    write_png(tmp_path / "a.png", image)
    np.testing.assert_array_equal(_decode_png((tmp_path / "a.png").read_bytes()), image)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_failed_write_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(b"old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_png(tmp_path / "a.png", _noise(4, 4))
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize(("height", "width", "enlarge"), [(64, 64, 1), (33, 47, 1), (11, 15, 3)])
def test_mp4_plays_with_the_frames_and_the_rate_given(height: int, width: int, enlarge: int) -> None:
    clip = np.zeros((8, height, width, 3), np.uint8)
    clip[:, :, : width // 2] = (200, 40, 40)
    clip[4:, :, : width // 2] = (40, 40, 200)
    data = mp4_bytes(clip, fps=12.5, enlarge=enlarge)
    assert data[4:8] == b"ftyp"
    assert data.index(b"moov") < data.index(b"mdat")  # a browser can begin before the end has arrived
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert float(stream.average_rate) == 12.5
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 8
    size = (height * enlarge, width * enlarge)
    assert frames[0].shape[:2] == (size[0] + size[0] % 2, size[1] + size[1] % 2)
    at = 3 * enlarge + enlarge // 2
    for frame, truth in ((frames[1], clip[1]), (frames[6], clip[6])):
        assert np.abs(frame[at, at].astype(int) - truth[3, 3]).max() < 20


def test_fit_repeats_small_pixels_and_averages_large_images() -> None:
    small = _noise(2, 16, 24)
    large = fit(small, 64)
    assert large.shape == (2, 64, 96, 3)
    np.testing.assert_array_equal(large[:, ::4, ::4], small)
    assert fit(_noise(3, 480, 640), 96).shape == (3, 96, 128, 3)


def test_contact_sheet_shows_every_image_with_its_bar() -> None:
    first, second = _noise(3, 32, 32), _noise(2, 32, 32, seed=1)
    sheet = contact_sheet(
        [Strip(first, "one\ntwo lines", ["0 s", "1 s", "2 s"], [GREEN, None, GREEN]), Strip(second)],
        title="a title", legend=[("labelled", GREEN)], tile=32,
    )  # fmt: skip
    assert sheet.dtype == np.uint8
    assert sheet.shape[2] == 3

    def places(tile: np.ndarray) -> int:
        windows = np.lib.stride_tricks.sliding_window_view(sheet, tile.shape)[:, :, 0]
        return int((windows == tile).all(axis=(2, 3, 4)).sum())

    assert [places(image) for image in [*first, second[1]]] == [1, 1, 1, 1]
    green = (sheet == GREEN).all(-1).sum()
    assert green == (2 * 32 + 20) * 5  # two bars and the legend


def test_long_captions_do_not_run_into_the_images() -> None:
    black = np.zeros((1, 32, 32, 3), np.uint8)
    caption = "a caption that is a good deal longer than usual"
    image = np.argwhere((contact_sheet([Strip(black, caption)], tile=32) == 0).all(-1))
    wide = contact_sheet([Strip(np.full_like(black, 255), caption)], tile=32)
    ink = np.argwhere(wide.min(-1) < 128)
    assert ink[:, 1].max() < image[:, 1].min()
