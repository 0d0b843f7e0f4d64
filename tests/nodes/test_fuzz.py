"""Malformed images, headers and socket messages: no crash, no hang, no read of a wrong size."""

import contextlib
import json
import os
import random
import socket
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_datasets.messages import decode, resize
from d4_nodes import memory, wire
from d4_nodes.activation import wait
from d4_nodes.bench import ServerProcess
from d4_nodes.link import Link
from d4_nodes.memory import Memory
from d4_nodes.wire import Kind, Message, WireError

MANY = 100_000
# malformed messages that were read, which are fewer than those sent: after the first a stranger is cut off
READ = [2_000, pytest.param(MANY, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
HERE = Path(__file__)
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
    good = number = 0
    while number - good < MANY:
        number += 1
        message = compressed_image(rng, jpeg) if number % 2 else raw_image(rng)
        with contextlib.suppress(UserError, cv2.error):
            picture = resize(decode(message), (8, 12))
            assert picture.shape == (8, 12, 3)
            assert picture.dtype == np.uint8
            good += 1
    assert good > MANY / 20


def test_headers() -> None:
    rng = random.Random(0)
    good = number = 0
    while number - good < MANY:
        number += 1
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
    assert good > MANY / 20


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


def visit(rng: random.Random, sock: socket.socket, contract: str) -> None:
    """What one stranger sends: nonsense, mostly after a proper greeting, between requests. Mostly it stays
    until it is shown the door.
    """
    if rng.random() < 0.7:
        hello = json.dumps({"contract": contract, "wants": "policy"}).encode()
        sock.send(wire.pack(Message(Kind.HELLO, payload=hello)))
        sock.recv(1 << 17)
    for _ in range(10):
        is_request = rng.random() < 0.6
        message = wire.pack(Message(Kind.STEP, rng.getrandbits(64))) if is_request else said(rng, contract)
        sock.send(message if rng.random() < 0.5 else damaged(rng, message))
    if rng.random() < 0.7:
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(1 << 17):
            pass


def served(path: Path, contract: Contract, opened: np.ndarray) -> int:
    """Be served like any robot; returns how many files the server had open then."""
    link = Link(path, contract)
    for number in range(3):
        link.submit(0, number == 0, None)
        wait(link, 5.0)
    link.close()
    return int(opened[0])


@pytest.mark.parametrize("least", READ)
def test_a_server_survives_whatever_strangers_send(contract, tmp_path, least) -> None:
    """The server itself counts; afterwards a robot is served as if nothing had been."""
    rng, path, note = random.Random(0), tmp_path / "d4.sock", tmp_path / "count"
    note.write_bytes(bytes(24))
    read, bad, opened = np.memmap(note, np.int64, "r+")[:, None]
    command = [sys.executable, str(HERE.with_name("counting_server.py")), str(HERE.with_name("robot.yaml"))]
    with ServerProcess([*command, str(path), str(note)]) as server:
        before, strangers = served(path, contract, opened), 0
        while bad[0] < least:
            with wire.connect(path, 5.0) as sock, contextlib.suppress(OSError):
                visit(rng, sock, contract.hash)
            strangers += 1
            assert server.process.poll() is None
        print(f"{read[0]} messages of {strangers} strangers read, {bad[0]} of them were malformed")
        assert read[0] > 1.2 * least
        assert served(path, contract, opened) == before


@pytest.mark.parametrize("least", READ)
def test_a_robot_survives_whatever_a_server_sends(contract, tmp_path, monkeypatch, least) -> None:
    """A link gives an answer of the right size or a WireError, whoever is at the other end."""
    good, before = 0, len(os.listdir("/proc/self/fd"))
    fields = memory.layout(contract, 4)
    layout = [[f.name, f.offset, f.dtype, list(f.shape)] for f in fields]
    card = {"checkpoint": "c", "leads": 4, "weights": "w", "fields": layout}
    path, shared = tmp_path / "d4.sock", Memory(fields)
    count = count_messages(monkeypatch)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.bind(str(path))
        door.listen(1)
        server = threading.Thread(target=_serve_badly, args=(door, card, shared.descriptor))
        server.start()
        while count.bad < least:
            with contextlib.suppress(WireError), contextlib.closing(Link(path, contract, 1.0)) as link:
                for _ in range(10):
                    link.submit(0, True, None)
                    reply = None
                    while reply is None:
                        reply = link.poll()
                    assert reply.plan.shape in ((4, contract.action_dim), (0, contract.action_dim))
                    good += 1
        door.shutdown(socket.SHUT_RDWR)
        server.join()
    shared.close()
    print(f"{count.read} messages read, {count.bad} of them were malformed, {good} answers to a request")
    assert good > least / 20
    assert len(os.listdir("/proc/self/fd")) <= before


def count_messages(monkeypatch) -> SimpleNamespace:
    """Messages that were read since, and those of them that were malformed; what only ends is none."""
    count, receive = SimpleNamespace(read=0, bad=0), wire.receive

    def counting(sock: socket.socket) -> tuple[Message, int | None]:
        try:
            result = receive(sock)
        except WireError as error:
            is_message = "closed" not in str(error) and "gone" not in str(error)
            count.read += is_message
            count.bad += is_message
            raise
        count.read += 1
        return result

    monkeypatch.setattr(wire, "receive", counting)
    return count


def _serve_badly(door: socket.socket, card: dict, descriptor: int) -> None:
    """Serve one robot after the other, badly, until the door is shut."""
    rng = random.Random(1)
    while True:
        try:
            sock, _ = door.accept()
        except OSError:
            return
        with sock, contextlib.suppress(OSError):
            _answer(sock, rng, wire.pack(Message(Kind.WELCOME, 0, json.dumps(card).encode())), descriptor)


def _answer(sock: socket.socket, rng: random.Random, welcome: bytes, descriptor: int) -> None:
    """Serve one robot until it has had enough."""
    sock.recv(1 << 17)
    files = [descriptor] * rng.choice([0, 1, 1, 1, 1, 3])
    socket.send_fds(sock, [welcome if rng.random() < 0.5 else damaged(rng, welcome)], files)
    while data := sock.recv(1 << 17):
        kind = rng.choice([Kind.DONE, Kind.DONE, Kind.FAILED, Kind.HELLO])
        sequence = wire.parse(data).sequence + (rng.random() < 0.1)
        done = wire.pack(Message(kind, sequence, rng.choice([b"", b"why", b"\xff"])))
        sock.send(done if rng.random() < 0.8 else damaged(rng, done))
