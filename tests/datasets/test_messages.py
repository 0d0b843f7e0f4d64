"""Camera messages to RGB: every encoding gives the picture that was put in, every damage is refused."""

import cv2
import numpy as np
import pytest

from d4_datasets import bags, messages
from d4_datasets.bags import new
from d4_datasets.errors import UserError

HEIGHT, WIDTH = 6, 8


def picture(height=HEIGHT, width=WIDTH):
    """Left half red, right half blue, brighter to the bottom: shows swapped channels and rows."""
    rgb = np.zeros((height, width, 3), np.uint8)
    rgb[:, : width // 2, 0] = 200
    rgb[:, width // 2 :, 2] = 200
    rgb[:, :, 1] = (np.arange(height) * 40 % 256)[:, None]
    return rgb


def raw(encoding, pixels, padding=0, bigendian=0):
    """An Image message of `pixels` [H, W, ...] with `padding` junk bytes after each row."""
    rows = np.ascontiguousarray(pixels).reshape(len(pixels), -1).view(np.uint8)
    rows = np.pad(rows, ((0, 0), (0, padding)), constant_values=255)
    height, width = pixels.shape[:2]
    return new(
        "sensor_msgs/msg/Image",
        height=height,
        width=width,
        encoding=encoding,
        step=rows.shape[1],
        is_bigendian=bigendian,
        data=rows.reshape(-1),
    )


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize(
    ("encoding", "conversion"),
    [
        ("rgb8", None),
        ("bgr8", cv2.COLOR_RGB2BGR),
        ("rgba8", cv2.COLOR_RGB2RGBA),
        ("bgra8", cv2.COLOR_RGB2BGRA),
        ("8UC3", cv2.COLOR_RGB2BGR),
        ("8UC4", cv2.COLOR_RGB2BGRA),
    ],
)
def test_eight_bit_colour_is_exact(encoding, conversion, padding):
    rgb = picture()
    pixels = rgb if conversion is None else cv2.cvtColor(rgb, conversion)
    out = messages.decode(raw(encoding, pixels, padding))
    np.testing.assert_array_equal(out, rgb)
    assert out.flags.c_contiguous
    assert out.dtype == np.uint8


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("encoding", ["mono8", "8UC1"])
def test_grey(encoding, padding):
    grey = picture()[:, :, 1]
    out = messages.decode(raw(encoding, grey, padding))
    np.testing.assert_array_equal(out, np.repeat(grey[..., None], 3, 2))


@pytest.mark.parametrize("encoding", ["mono16", "16UC1"])
@pytest.mark.parametrize("bigendian", [0, 1])
def test_sixteen_bits_keep_the_high_byte(encoding, bigendian):
    grey = np.array([[0, 255, 256, 65535]], np.uint16).repeat(2, 0)
    pixels = grey.astype(">u2" if bigendian else "<u2")
    out = messages.decode(raw(encoding, pixels, 3, bigendian))
    assert out[0, :, 0].tolist() == [0, 0, 1, 255]


@pytest.mark.parametrize("bigendian", [0, 1])
@pytest.mark.parametrize(
    ("encoding", "order"),
    [
        ("rgb16", [0, 1, 2]),
        ("bgr16", [2, 1, 0]),
        ("16UC3", [2, 1, 0]),
        ("rgba16", [0, 1, 2, 0]),
        ("bgra16", [2, 1, 0, 0]),
        ("16UC4", [2, 1, 0, 0]),
    ],
)
def test_sixteen_bit_colour(encoding, order, bigendian):
    pixels = (picture().astype(np.uint16)[..., order] * 256 + 77).astype(">u2" if bigendian else "<u2")
    np.testing.assert_array_equal(messages.decode(raw(encoding, pixels, 3, bigendian)), picture())


@pytest.mark.parametrize(("encoding", "order"), [("nv12", (0, 1)), ("nv21", (1, 0))])
@pytest.mark.parametrize("padding", [0, 6])
def test_a_plane_of_brightness_and_one_of_colours(encoding, order, padding):
    # See test_yuv422 for the numbers.
    planes = np.empty((12, 8), np.uint8)
    planes[:8] = [82] * 4 + [41] * 4
    colours = np.array([(90, 240)] * 2 + [(240, 110)] * 2, np.uint8)[:, order]
    planes[8:] = colours.reshape(-1)
    msg = raw(encoding, planes, padding)
    msg.height = 8
    out = messages.decode(msg).astype(int)
    assert out.shape == (8, 8, 3)
    assert abs(out[:, :3] - [255, 0, 0]).max() < 6
    assert abs(out[:, 5:] - [0, 0, 255]).max() < 6


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize(
    ("encoding", "order"), [("yuv422", "uyvy"), ("uyvy", "uyvy"), ("yuv422_yuy2", "yuyv"), ("yuyv", "yuyv")]
)
def test_yuv422(encoding, order, padding):
    # BT.601: pure red is Y 82, U 90, V 240; pure blue is Y 41, U 240, V 110.
    red, blue = {"y": 82, "u": 90, "v": 240}, {"y": 41, "u": 240, "v": 110}
    row = [pixel[c] for pixel in (red, blue) for c in order]
    pixels = np.array([row], np.uint8).reshape(1, 4, 2).repeat(2, 0)
    out = messages.decode(raw(encoding, pixels, padding)).astype(int)
    assert abs(out[0, 0] - [255, 0, 0]).max() < 6
    assert abs(out[0, 2] - [0, 0, 255]).max() < 6


@pytest.mark.parametrize("pattern", ["rggb", "bggr", "gbrg", "grbg"])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(("padding", "bigendian"), [(0, 0), (4, 1)])
def test_bayer(pattern, bits, padding, bigendian):
    channel = {"r": 0, "g": 1, "b": 2}
    rgb = np.full((16, 16, 3), (200, 120, 40), np.uint8)
    mosaic = np.empty((16, 16), np.uint8)
    for i, letter in enumerate(pattern):
        mosaic[i // 2 :: 2, i % 2 :: 2] = rgb[i // 2 :: 2, i % 2 :: 2, channel[letter]]
    pixels = mosaic if bits == 8 else (mosaic.astype(np.uint16) * 256).astype(">u2" if bigendian else "<u2")
    out = messages.decode(raw(f"bayer_{pattern}{bits}", pixels, padding, bigendian))
    np.testing.assert_array_equal(out[4:-4, 4:-4], rgb[4:-4, 4:-4])


@pytest.mark.parametrize(
    "format", ["png", "rgb8; png compressed bgr8", "bgr8; png compressed bgr8", "PNG", ""]
)
def test_png_is_exact_whatever_the_format_string(format):
    msg = bags.compressed_image(picture(), 0)
    msg.format = format
    np.testing.assert_array_equal(messages.decode(msg), picture())


def test_a_codec_that_was_given_rgb_stored_the_colours_swapped():
    msg = bags.compressed_image(picture()[..., ::-1].copy(), 0)
    msg.format = "rgb8; png compressed rgb8"
    np.testing.assert_array_equal(messages.decode(msg), picture())


@pytest.mark.parametrize("format", ["jpeg", "rgb8; jpeg compressed bgr8"])
def test_jpeg_is_close(format):
    rgb = np.full((64, 64, 3), (200, 120, 40), np.uint8)
    msg = bags.compressed_image(rgb, 0, format="jpeg")
    msg.format = format
    assert np.abs(messages.decode(msg).astype(int) - rgb).max() < 4


def test_grey_and_transparent_files_become_rgb():
    for pixels in (
        picture()[:, :, 1],
        np.dstack([picture()[..., ::-1], np.full((HEIGHT, WIDTH), 9, np.uint8)]),
    ):
        _, data = cv2.imencode(".png", pixels)
        out = messages.decode(new("sensor_msgs/msg/CompressedImage", format="png", data=data.reshape(-1)))
        assert out.shape == (HEIGHT, WIDTH, 3)


def broken(**changes):
    msg = raw("rgb8", picture())
    for name, value in changes.items():
        setattr(msg, name, value)
    return msg


def compressed(format="jpeg", data=b"", **_):
    return new("sensor_msgs/msg/CompressedImage", format=format, data=np.frombuffer(data, np.uint8))


JPEG = bytes(bags.compressed_image(picture(64, 64), 0, format="jpeg").data)


@pytest.mark.parametrize(
    ("msg", "message"),
    [
        (broken(encoding="64FC1"), "encoding '64FC1' is not supported; supported are"),
        (broken(data=np.zeros(100, np.uint8)), r"cut off: 100 bytes of 144 \(6 rows of 24\)"),
        (broken(step=23), "needs 24 bytes a row, its step is 23"),
        (broken(height=0), "0 x 8 pixels is empty"),
        (raw("yuyv", np.zeros((2, 3, 2), np.uint8)), "even number of pixels wide, not 3"),
        (compressed(), r"'jpeg' \(0 bytes\) cannot be decoded"),
        (compressed("h264", b"\0\0\0\1g" * 9), "'h264' .* no still-picture format"),
        (compressed("jpeg", JPEG[: len(JPEG) // 2]), "'jpeg' .* cannot be decoded: it is cut off"),
        (raw("nv12", np.zeros((6, 5), np.uint8)), "even number of rows and columns, not 6 x 5"),
    ],
)
def test_damaged_and_foreign_images_are_refused(msg, message):
    with pytest.raises(UserError, match=message):
        messages.decode(msg)


def test_resize():
    rgb = np.zeros((64, 64, 3), np.uint8)
    rgb[::2] = 200
    assert messages.resize(rgb, (64, 64)) is rgb
    small = messages.resize(rgb, (32, 16))
    assert small.shape == (32, 16, 3)
    assert (small == 100).all()  # the mean of the area, no aliasing
    assert messages.resize(rgb, (100, 128)).shape == (100, 128, 3)


def test_stamp():
    assert messages.stamp_ns(bags.image(picture(), 1_700_000_000_123_456_789)) == 1_700_000_000_123_456_789
    assert messages.stamp_ns(new("std_msgs/msg/Bool")) is None


def test_a_message_whose_definition_is_damaged_is_one_sentence() -> None:
    """A bag whose definition of Image had lost a field ended in a traceback."""

    class Image:
        encoding, width, height, step, is_bigendian = "rgb8", 2, 2, 6, 0

    with pytest.raises(UserError, match=r"a message that is no picture: .*'data'"):
        messages.decode(Image())
