"""Malformed images, headers and socket messages: no crash, no hang, no read of a wrong size."""

import contextlib
import json
import random
import socket
import threading
from types import SimpleNamespace

import numpy as np

from d4_datasets.errors import UserError
from d4_datasets.messages import decode, resize
from d4_nodes import memory, wire
from d4_nodes.link import Link
from d4_nodes.memory import Memory
from d4_nodes.wire import Kind, Message, WireError

MANY, STRANGERS, ANSWERS = 100_000, 10_000, 2_000  # a stranger sends ten messages
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


def damaged(rng: random.Random, data: bytes) -> bytes:
    """A message with a few bytes changed, cut, repeated or replaced by nonsense."""
    kind = rng.randrange(5)
    if kind == 0:
        return rng.randbytes(rng.choice([1, 15, 16, 17, 200, wire.MAX_PAYLOAD + 500]))
    if kind == 1:
        return data[: rng.randrange(1, len(data) + 1)]
    if kind == 2:
        return data + data[: rng.randrange(1, 20)]
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def said(rng: random.Random, contract: str) -> bytes:
    """What a robot might say, in any order, with the right contract or another."""
    hello = {
        "contract": rng.choice([contract, "0" * 16, None, 7]),
        "wants": rng.choice(["policy", "tokenizer", []]),
    }
    payload = rng.choice([b"", b"{}", b"[1]", json.dumps(hello).encode()])
    return wire.pack(Message(rng.choice(list(Kind)), rng.getrandbits(64), payload))


def test_a_server_survives_whatever_strangers_send(rig_server) -> None:
    """Each sends nonsense until it is shown the door; afterwards a robot is served as if nothing had been."""
    rng = random.Random(0)
    for _ in range(STRANGERS):
        with wire.connect(rig_server.socket, 5.0) as sock, contextlib.suppress(OSError):
            for _ in range(10):
                message = said(rng, rig_server.contract.hash)
                sock.send(message if rng.random() < 0.5 else damaged(rng, message))
    link = rig_server.link()
    link.submit(0, True, None)
    rig_server.answer(link)
    link.close()


def test_a_robot_survives_whatever_a_server_sends(contract, tmp_path) -> None:
    """A link gives an answer of the right size or a WireError, whoever is at the other end."""
    rng, good = random.Random(0), 0
    fields = memory.layout(contract, 4)
    layout = [[f.name, f.offset, f.dtype, list(f.shape)] for f in fields]
    card = {"checkpoint": "c", "leads": 4, "weights": "w", "fields": layout}
    path, shared = tmp_path / "d4.sock", Memory(fields)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.bind(str(path))
        door.listen(1)
        for _ in range(ANSWERS):
            welcome = wire.pack(Message(Kind.WELCOME, 0, json.dumps(card).encode()))
            done = wire.pack(Message(rng.choice([Kind.DONE, Kind.FAILED, Kind.HELLO]), 1))
            server = threading.Thread(target=_answer, args=(door, rng, welcome, done, shared.descriptor))
            server.start()
            with contextlib.suppress(WireError):
                link = Link(path, contract, timeout_s=1.0)
                with contextlib.closing(link):
                    link.submit(0, True, None)
                    reply = None
                    while reply is None:
                        reply = link.poll()
                    assert reply.plan.shape in ((4, contract.action_dim), (0, contract.action_dim))
                    good += 1
            server.join()
    shared.close()
    assert 0 < good < ANSWERS


def _answer(door: socket.socket, rng: random.Random, welcome: bytes, done: bytes, descriptor: int) -> None:
    """Serve one robot once, badly."""
    sock, _ = door.accept()
    with sock, contextlib.suppress(OSError):
        sock.recv(1 << 17)
        first = welcome if rng.random() < 0.5 else damaged(rng, welcome)
        files = [descriptor] * rng.choice([0, 1, 1, 1, 1, 3])
        socket.send_fds(sock, [first], files)
        if not sock.recv(1 << 17):
            return
        sock.send(done if rng.random() < 0.5 else damaged(rng, done))
