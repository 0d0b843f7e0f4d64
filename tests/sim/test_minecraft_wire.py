"""What arrives in pieces is waited for by nobody who has other things to do."""

from __future__ import annotations

import socket
import struct
import threading
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d4_sim.minecraft import minerl_worker, wire, worker
from d4_sim.minecraft.environment import Environment, Lost
from d4_sim.minecraft.wire import Wire, WireError


def message(said: dict, data: bytes) -> bytes:
    mine, its = socket.socketpair()
    with mine, its:
        Wire(mine).send(wire.VIEW, said, data)
        mine.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: its.recv(2**16), b""))


@given(st.integers(0, 5000), st.lists(st.integers(1, 5100), max_size=5))
@settings(deadline=None, max_examples=50)
def test_a_message_is_there_when_its_last_byte_is(size: int, cuts: list[int]) -> None:
    """Of one environment half an answer came, and all others waited for the rest."""
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    whole = message({"over": False}, data)
    mine, its = socket.socketpair()
    with mine, its:
        line, sent = Wire(mine), 0
        assert not line.has_arrived()
        for cut in sorted({cut for cut in cuts if cut < len(whole)}):
            its.sendall(whole[sent:cut])
            sent = cut
            assert not line.has_arrived()
        its.sendall(whole[sent:] + whole)
        for _ in range(2):
            assert line.has_arrived()
            assert line.receive(1.0) == (wire.VIEW, {"over": False}, data)
        assert not line.has_arrived()


def test_the_rest_is_waited_for_until_the_time_is_over() -> None:
    mine, its = socket.socketpair()
    with mine, its:
        line, whole = Wire(mine), message({}, bytes(100))
        its.sendall(whole[:40])
        assert not line.has_arrived()
        with pytest.raises(TimeoutError):
            line.receive(0.05)


@pytest.mark.parametrize("trouble", ["end", "noise", "size"])
def test_there_is_nothing_to_wait_for_after_the_end_or_behind_noise(trouble: str) -> None:
    mine, its = socket.socketpair()
    with mine, its:
        line = Wire(mine)
        if trouble == "end":
            its.close()
        elif trouble == "noise":
            its.sendall(b"Traceback (most recent call last):")
        else:
            its.sendall(struct.pack("<4sBBHII", b"d4mc", wire.VERSION, wire.VIEW, 0, 10, 2**31))
        assert line.has_arrived()
        with pytest.raises(EOFError if trouble == "end" else WireError):
            line.receive(1.0)


class _Line:
    """An end of the wire: what arrives is asked of it, and how long each answer may wait is kept."""

    def __init__(self) -> None:
        self.asks = [(wire.RESET, {"seed": 3}, b""), (wire.STEP, {}, bytes(8)), (wire.CLOSE, {}, b"")]
        self.limits: list[float | None] = []

    def receive(self):
        return self.asks.pop(0)

    def send(self, kind: int, said: dict, data: bytes = b"", limit_s: float | None = 60.0) -> None:
        if kind == wire.VIEW:
            self.limits.append(limit_s)


class _Host:
    realtime = False
    version = ""
    env = SimpleNamespace(observation_space=SimpleNamespace(spaces={}))

    def reset(self, seed: int):
        return {}, b""

    def step(self, action):
        return {}, b""


def test_a_game_waits_for_a_benchmark_that_waits() -> None:
    """After a minute of silence, as of Ctrl-Z, every game took the benchmark for dead and ended."""
    for serve in (worker.serve, lambda line, host: minerl_worker.serve(line, wire, host)):
        line = _Line()
        serve(line, _Host())
        assert line.limits == [None, None]


def test_the_rest_of_an_answer_is_waited_for_after_a_benchmark_stood_still() -> None:
    """Half a view lay there when it went on, the time was over, and the game was lost."""
    mine, its = socket.socketpair()
    with mine, its:
        whole = message({"shape": [1, 1, 3]}, bytes(3))
        environment = Environment.__new__(Environment)
        environment._wire, environment.deadline, environment._patience_s = Wire(mine), 0.0, 1.0
        its.sendall(whole[:20])
        assert not environment.has_answered()
        later = threading.Timer(0.2, its.sendall, [whole[20:]])
        later.start()
        assert environment.receive().image.shape == (1, 1, 3)
        later.join()
        with pytest.raises(Lost, match="no answer within 1 s"):
            environment.receive()
