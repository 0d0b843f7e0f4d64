"""Pictures to latents, live: what is encoded, what is left out, and when a stream begins anew."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from d4_datasets import bags
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_nodes import memory
from d4_nodes.encoding import Encoding
from d4_nodes.health import ERROR, OK, WARN
from d4_nodes.link import TokenizerLink
from d4_nodes.memory import Memory
from d4_nodes.server import Server

PERIOD = 50_000_000  # the toy robot's
TOLERANCE = 75_000_000


class Counting:
    """A tokenizer whose latents say which picture was seen and how many since the last reset."""

    kind = "tokenizer"

    def __init__(self, contract: Contract) -> None:
        self.contract, self.fields = contract, memory.latents_layout(contract, 2, 2)
        self.card = {"weights": "w0", "tokens": 2, "channels": 2}
        self.count, self.fails, self.gate = 0, False, threading.Event()
        self.gate.set()

    def decide(self, shared: Memory) -> None:
        assert self.gate.wait(5)
        if self.fails:
            raise RuntimeError("scripted")
        self.count = 0 if shared["reset"] else self.count + 1
        shared["latents"][0] = shared["camera.eye"][0, 0, 0], self.count
        shared["latents"][1] = shared["vector.joints"]


class Rig:
    """An encoding with a server in threads of this process."""

    def __init__(self, contract: Contract, folder: Path) -> None:
        self.contract, self.path = contract, folder / "d4.sock"
        self.got: list[
            tuple[int, int, int]
        ] = []  # number of the picture, stamp in periods, place in the stream
        self.joints: list[float] = []
        self.said: list[str] = []
        self.begin_server()
        self.encoding = Encoding(
            contract,
            self._publish,
            lambda: TokenizerLink(self.path, contract, 1.0),
            time.time_ns,
            self.said.append,
        )
        self.encoding_thread = threading.Thread(target=self.encoding.run, daemon=True)
        self.encoding_thread.start()
        self.origin, self.sent = time.time_ns(), 0
        self.until(lambda: self.encoding.is_connected)

    def begin_server(self) -> None:
        self.brain = Counting(self.contract)
        self.server = Server(self.brain, self.path)
        self.server_thread = threading.Thread(target=self.server.run, daemon=True)
        self.server_thread.start()

    def end_server(self) -> None:
        self.brain.gate.set()
        self.server.stop()
        self.server_thread.join(5)

    def _publish(self, message, latents: np.ndarray, weights: str) -> None:
        assert weights == "w0"
        stamp = (message.header.stamp.sec * 10**9 + message.header.stamp.nanosec - self.origin) / PERIOD
        self.joints.append(float(latents[1, 0]))
        self.got.append((int(latents[0, 0]), round(stamp, 3), int(latents[0, 1])))

    def picture(self, at: float, joints: bool = True):
        """Show picture number `sent`, captured `at` periods after the beginning."""
        self.sent += 1
        stamp = self.origin + round(at * PERIOD)
        if joints:
            self.encoding.put("joints", stamp, np.zeros(2, np.float32))
        self.encoding.put("eye", stamp, bags.image(np.full((8, 12, 3), self.sent, np.uint8), stamp))

    def settle(self, answers: int) -> list[tuple[int, int, int]]:
        """What has come out once there are so many answers, and no more come."""
        self.until(lambda: len(self.got) >= answers)
        time.sleep(0.05)
        assert len(self.got) == answers
        return self.got

    def show(self, *times: float) -> list[tuple[int, int, int]]:
        """Show pictures one by one, each when the one before is out (if it is let in)."""
        for at in times:
            before = self.encoding.counts["encoded"] + self.encoding.counts["left out"]
            self.picture(at)
            counts = self.encoding.counts
            self.until(lambda b=before, c=counts: c["encoded"] + c["left out"] > b)
        return self.got

    @staticmethod
    def until(condition, timeout_s: float = 5.0) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.002)

    def close(self) -> None:
        self.encoding.stop()
        self.encoding_thread.join(5)
        self.end_server()


@pytest.fixture
def rig(contract, tmp_path) -> Iterator[Rig]:
    rig = Rig(contract, tmp_path)
    yield rig
    rig.close()


def test_every_picture_of_a_stream_is_encoded_in_order(rig) -> None:
    assert rig.show(0, 1, 2, 3.1, 3.9) == [(1, 0, 0), (2, 1, 1), (3, 2, 2), (4, 3.1, 3), (5, 3.9, 4)]
    assert rig.said == []
    assert rig.encoding.counts == {"pictures": 5, "encoded": 5, "streams": 1, "overtaken": 0}


def test_a_gap_begins_a_stream_where_the_importer_splits_an_episode(rig) -> None:
    """With 75 ms of tolerance at 50 ms a single lost frame is bridged, two are not."""
    assert [place for *_, place in rig.show(0, 1, 3, 4, 7, 8)] == [0, 1, 2, 3, 0, 1]


def test_stamps_that_jump_back_begin_a_stream(rig) -> None:
    assert [place for *_, place in rig.show(100, 101, 2, 3)] == [0, 1, 0, 1]


def test_pictures_that_come_too_soon_or_twice_are_left_out(rig) -> None:
    """The tokenizer has learned time at the contract's rate: every second picture of a faster camera."""
    assert [stamp for _, stamp, _ in rig.show(0, 0.5, 1, 1, 1.5, 2, 1.2, 3)] == [0, 1, 2, 3]
    assert rig.encoding.counts["left out"] == 4


def test_an_episode_begins_with_the_newest_frame_before_its_start(rig) -> None:
    rig.show(0, 1, 2)
    rig.encoding.begin(rig.origin + round(2.3 * PERIOD))
    rig.settle(4)
    rig.show(3, 4)
    # the frame of tick 0 was out already, in the light of the last episode: it comes again without that past
    assert rig.got[2:] == [(3, 2, 2), (3, 2, 0), (4, 3, 1), (5, 4, 2)]


def test_a_frame_of_tick_0_that_was_left_out_is_taken_up(rig) -> None:
    rig.show(0, 1, 1.6)  # the last one too soon for its stream
    rig.encoding.begin(rig.origin + round(1.7 * PERIOD))
    rig.settle(3)
    assert rig.show(2.6)[2:] == [(3, 1.6, 0), (4, 2.6, 1)]


def test_a_frame_of_tick_0_that_comes_after_its_start_has_no_past(rig) -> None:
    rig.show(0, 1)
    rig.encoding.begin(rig.origin + round(2.3 * PERIOD))
    rig.settle(3)
    rig.picture(2)
    rig.settle(4)
    assert [place for *_, place in rig.show(3)][2:] == [0, 0, 1]


def test_the_newest_picture_wins_while_the_server_is_busy(rig) -> None:
    rig.show(0)
    rig.brain.gate.clear()
    for at in (1, 2, 3, 4):
        rig.picture(at)
        time.sleep(0.02)
    rig.brain.gate.set()
    assert [number for number, *_ in rig.settle(3)] == [1, 2, 5]
    assert rig.encoding.counts["overtaken"] == 2


def test_a_damaged_picture_is_dropped_and_the_stream_goes_on(rig) -> None:
    rig.show(0)
    stamp = rig.origin + PERIOD
    broken = bags.image(np.zeros((8, 12, 3), np.uint8), stamp)
    broken.data = broken.data[:-1]
    rig.encoding.put("joints", stamp, np.zeros(2, np.float32))
    rig.encoding.put("eye", stamp, broken)
    rig.until(lambda: rig.encoding.counts["dropped"])
    assert "/eye: the image data is cut off" in rig.said[0]
    assert rig.show(2)[1][1:] == (2, 1)
    assert rig.encoding.camera(1.0, rig.encoding.counts.__class__(), 0.9).level == WARN


def test_a_picture_without_its_joints_is_dropped(rig) -> None:
    rig.picture(0, joints=False)
    rig.until(lambda: rig.encoding.counts["dropped"])
    assert "no sample of /joints" in rig.said[0]
    rig.show(1)
    rig.picture(3, joints=False)  # the joints are 100 ms older: beyond their tolerance
    rig.until(lambda: rig.encoding.counts["dropped"] == 2)


def test_a_picture_waits_a_moment_for_the_joints_that_belong_to_it(rig) -> None:
    """Topics overtake each other: the joints of a picture were published before it, and came later."""
    rig.show(0)
    rig.picture(1, joints=False)
    time.sleep(0.004)
    rig.encoding.put(
        "joints", rig.origin + PERIOD - 10_000, np.full(2, 7, np.float32)
    )  # older: more may come
    time.sleep(0.002)
    rig.encoding.put("joints", rig.origin + PERIOD, np.full(2, 8, np.float32))
    rig.settle(2)
    assert rig.joints == [0, 8]
    rig.picture(2, joints=False)  # and not for ever: these joints lie within their tolerance
    rig.settle(3)
    assert rig.joints == [0, 8, 8]


def test_a_server_that_fails_costs_a_picture_and_the_past(rig) -> None:
    rig.show(0, 1)
    rig.brain.fails = True
    rig.picture(2)
    rig.until(lambda: rig.encoding.counts["failed"])
    rig.brain.fails = False
    assert [place for *_, place in rig.show(3, 4)] == [0, 1, 0, 1]
    assert "scripted" in rig.said[0]


def test_a_lost_server_is_said_and_found_again(rig) -> None:
    rig.show(0, 1)
    assert rig.encoding.server().level == OK
    rig.end_server()
    rig.until(lambda: not rig.encoding.is_connected)
    rig.until(lambda: "no inference server listens" in rig.encoding.server().message)
    assert rig.encoding.server().level == ERROR
    rig.picture(2)
    rig.begin_server()
    rig.settle(3)
    assert rig.show(3)[2:] == [(3, 2, 0), (4, 3, 1)]


def test_it_says_how_the_camera_is(rig) -> None:
    before = rig.encoding.counts.copy()
    assert rig.encoding.camera(1.0, before, 0.9).message == "nothing has come"
    rig.show(*range(19))
    assert rig.encoding.camera(1.0, before, 0.9).level == OK
    finding = rig.encoding.camera(2.0, before, 0.9)
    assert (finding.level, finding.message) == (WARN, "9.5 Hz of latents, the contract has 20 Hz")
    assert float(finding.values["age_p99_ms"]) > 0


def test_several_cameras_are_refused(contract) -> None:
    second = replace(contract.images[0], name="other")
    with pytest.raises(UserError, match=r"names 2 cameras \(eye, other\)"):
        Encoding(replace(contract, observations=(*contract.observations, second)), *[print] * 4)  # type: ignore
