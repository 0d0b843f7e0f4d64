"""Malformed images, headers and socket messages: no crash, no hang, no read of a wrong size."""

import contextlib
import random
from types import SimpleNamespace

import numpy as np

from d4_datasets.errors import UserError
from d4_datasets.messages import decode, resize
from d4_nodes import wire
from d4_nodes.wire import Kind, Message, WireError

MANY, STRANGERS = 100_000, 10_000
ENCODINGS = ("rgb8", "bgr8", "mono8", "rgba8", "bgra8", "yuv422", "16UC1", "bayer_rggb8", "", "rgb9", "\x00")
FORMATS = ("jpeg", "png", "rgb8; jpeg compressed bgr8", "", "compressedDepth", "\x00")


def raw_image(rng: random.Random) -> SimpleNamespace:
    """An Image whose parts contradict each other more often than not."""
    height, width = rng.choice([0, 1, 7, 8, 2**31]), rng.choice([0, 1, 8, 9, 2**31])
    return SimpleNamespace(
        height=height, width=width, encoding=rng.choice(ENCODINGS), is_bigendian=rng.choice([0, 1, 255]),
        step=rng.choice([0, 1, 3 * width, 4 * width, 100, 2**32 - 1]),
        data=rng.randbytes(rng.choice([0, 1, 192, 300])),
    )  # fmt: skip


def compressed_image(rng: random.Random, jpeg: bytes) -> SimpleNamespace:
    """A jpeg with damage, or no jpeg at all."""
    data = bytearray(jpeg)
    for _ in range(rng.randrange(6)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    data = data[: rng.randrange(len(data) + 1)] if rng.random() < 0.5 else data
    return SimpleNamespace(format=rng.choice(FORMATS), data=bytes(data))


def test_images() -> None:
    import cv2

    rng = random.Random(0)
    jpeg = cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    good = 0
    for k in range(MANY):
        message = compressed_image(rng, jpeg) if k % 2 else raw_image(rng)
        with contextlib.suppress(UserError, cv2.error):
            picture = resize(decode(message), (8, 12))
            assert picture.shape == (8, 12, 3)
            assert picture.dtype == np.uint8
            good += 1
    assert 0 < good < MANY


def test_headers() -> None:
    rng = random.Random(0)
    good = 0
    for _ in range(MANY):
        data = bytearray(
            wire.pack(Message(rng.choice(list(Kind)), rng.getrandbits(64), rng.randbytes(rng.randrange(9))))
        )
        for _ in range(rng.randrange(3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        data = data[: rng.randrange(len(data) + 1)] if rng.random() < 0.3 else data
        with contextlib.suppress(WireError):
            message = wire.parse(bytes(data))
            assert wire.pack(message) == bytes(data)
            good += 1
    assert 0 < good < MANY


def test_a_server_survives_whatever_strangers_send(rig_server) -> None:
    """Each sends nonsense until it is shown the door; afterwards a robot is served as if nothing had been."""
    rng = random.Random(0)
    for _ in range(STRANGERS):
        with contextlib.suppress(WireError, OSError), wire.connect(rig_server.socket, 5.0) as sock:
            for _ in range(10):
                sock.send(rng.randbytes(rng.choice([1, 15, 16, 17, 200, wire.MAX_PAYLOAD + 500])))
    link = rig_server.link()
    link.submit(0, True, None)
    rig_server.answer(link)
    link.close()
