"""A robot that goes without a word, idle or with a request at the server; the next one is served."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from d4_nodes import wire
from d4_nodes.link import Link
from d4_nodes.wire import Kind, Message

ROBOT = Path(__file__).with_name("robot.yaml")
CLIENT = """
import sys, time
from pathlib import Path
from d4_datasets.contract import Contract
from d4_nodes.link import Link
link = Link(Path(sys.argv[1]), Contract.load(sys.argv[2]))
for number in range(int(sys.argv[3])):
    link.submit(0, number == 0, None)
    while number + 1 < int(sys.argv[3]) and link.poll() is None:
        pass
print("ready", flush=True)
time.sleep(60)
"""


def first_plan(link: Link) -> np.ndarray:
    """The answer to the first frame of an episode; the script's is (0 + n) / 1000."""
    link.submit(0, True, None)
    until = time.monotonic() + 5.0
    while (reply := link.poll()) is None:
        assert time.monotonic() < until
    assert not reply.failure
    return reply.plan


def assert_served(server) -> None:
    """A new robot gets its own first answer, and not one of the robot before."""
    link = server.link()
    for _ in range(3):
        np.testing.assert_allclose(first_plan(link)[:, 0], np.arange(4) / 1000)
    assert link.heartbeat_age_s() < 0.5
    link.close()


@pytest.mark.parametrize("requests", [0, 3])
def test_a_robot_that_is_killed_makes_room(rig_server, tmp_path, requests) -> None:
    """Without requests it dies idle, otherwise while the server works on the last of them."""
    command = [sys.executable, "-c", CLIENT, str(rig_server.socket), str(ROBOT), str(requests)]
    if requests:
        (tmp_path / "fault").write_text("sleep 0.3")
    with subprocess.Popen(command, stdout=subprocess.PIPE) as robot:
        assert robot.stdout.readline() == b"ready\n"
        robot.kill()
    (tmp_path / "fault").unlink(missing_ok=True)
    assert_served(rig_server)


@pytest.mark.parametrize("is_asking", [False, True])
def test_a_socket_that_is_closed_makes_room(rig_server, tmp_path, is_asking) -> None:
    """Again and again; the new robot knocks while the server still works for the one that has gone."""
    for _ in range(20):
        link = rig_server.link()
        (tmp_path / "fault").write_text("sleep 0.02")
        if is_asking:
            link.submit(0, True, None)
        link._sock.close()  # no BYE
        assert_served(rig_server)


def test_a_robot_that_goes_in_the_handshake_makes_room(rig_server) -> None:
    hello = Message(Kind.HELLO, payload=b'{"contract": "%s"}' % rig_server.contract.hash.encode())
    for is_heard in (False, True):
        for _ in range(20):
            with wire.connect(rig_server.socket, 5.0) as sock:
                if is_heard:
                    wire.send(sock, hello)
    assert_served(rig_server)


def test_a_request_left_unread_is_answered_to_nobody(rig_server, tmp_path) -> None:
    """The robot that comes next must not get the answer to a request of the one before."""
    (tmp_path / "fault").write_text("huge")
    link = rig_server.link()
    link.submit(0, True, None)
    link._sock.close()
    (tmp_path / "fault").unlink()
    link = rig_server.link()
    assert link.poll() is None
    np.testing.assert_allclose(first_plan(link)[:, 0], np.arange(4) / 1000)
    link.close()


def test_a_loop_that_loses_its_socket_drives_on(rig) -> None:
    """In the middle of its work, without a word to the server, which is still there."""
    for _ in range(3):
        rig.loop._link._sock.shutdown(socket.SHUT_RDWR)
        assert rig.until_safe(5.0) == "fault"
        rig.until_driving()
    assert rig.report.reasons["the server was lost"] == 3
