"""A recording replayed through the live path: the loop of the policy node and the tokenizer node's, under a
clock that is turned by hand, fed with messages in the order in which they were received.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from d4_datasets import bags, fields
from d4_datasets.bags import BagWriter
from d4_datasets.contract import Contract
from d4_datasets.recording import Recording
from d4_nodes import encoding
from d4_nodes.guard import Guard, GuardConfig
from d4_nodes.inbox import inbox_of
from d4_nodes.loop import Loop, LoopConfig
from d4_nodes.report import Report
from d4_nodes.ticks import Tick

MS = 1_000_000
PERIOD = 100 * MS
EPOCH = 1_700_000_000_000 * MS
_STEP = 20 * MS  # a clock that leaps by more has jumped, for the loop
_SIZE = (2, 3)


def robot(cameras: int = 1, latency_ms: int = 60, **align: Any) -> Contract:
    """A robot with cameras eye0, eye1, and joints, 10 ticks a second."""
    rules = {"strategy": "hold", "timeline": "header", "tolerance_ms": 150} | align
    eyes = [
        {"name": f"eye{n}", "topic": f"/eye{n}", "type": "sensor_msgs/msg/Image", "size": list(_SIZE),
         "align": rules}
        for n in range(cameras)
    ]  # fmt: skip
    joints = {
        "name": "joints", "topic": "/joints", "type": "sensor_msgs/msg/JointState",
        "select": ["position[0]"], "align": rules,
    }  # fmt: skip
    base = {
        "name": "base", "topic": "/cmd_vel", "type": "geometry_msgs/msg/Twist", "select": ["linear.x"],
        "low": [-1], "high": [1], "safety": "zeros",
        "align": {"strategy": "hold", "timeline": "receive", "tolerance_ms": 250},
    }  # fmt: skip
    return Contract.from_dict(
        {"name": "toy", "rate_hz": 10, "latency_ms": latency_ms, "observations": [*eyes, joints],
         "actions": [base]}
    )  # fmt: skip


@dataclass(frozen=True, order=True)
class Event:
    """Message `number` of a stream: when it was received and when it was captured, ns since the beginning."""

    receive: int
    stream: str
    stamp: int
    number: int


@lru_cache(maxsize=4096)
def message(event: Event) -> Any:
    """What the stream carries; its number can be read off it."""
    stamp = EPOCH + event.stamp
    if event.stream == "joints":
        return bags.new(
            "sensor_msgs/msg/JointState", header=bags.header(stamp), name=["a"],
            position=np.array([float(event.number)]),
        )  # fmt: skip
    pixels = np.zeros((*_SIZE, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = event.number % 256, event.number // 256
    return bags.image(pixels, stamp)


@dataclass(frozen=True)
class Seen:
    """The observation of a tick: numbers of the messages by stream; and whether the past was forgotten."""

    numbers: dict[str, int]
    is_first: bool = False


# ---- as the importer sees it


def imported(contract: Contract, events: list[Event], folder: Path) -> dict[int, Seen]:
    """By time of the tick what is in the episodes that d4-ingest makes of the recording."""
    path = folder / "bag"
    types = {stream.name: (stream.topic, stream.type) for stream in contract.observations}
    with BagWriter(path) as writer:
        for event in sorted(events):
            topic, type_ = types[event.stream]
            writer.write(topic, type_, EPOCH + event.receive, message(event))
    recording = Recording(path, contract)
    numbers: dict[str, list[int]] = {name: [] for name in types}
    for event in sorted(events):
        numbers[event.stream].append(event.number)
    out = {}
    for begin, end in recording.episodes:
        for tick in range(begin, end):
            chosen = {
                name: numbers[name][int(recording.tracks[name].ordinals[recording.samples[name][tick]])]
                for name in types
            }
            out[int(recording.ticks.time[tick]) - EPOCH] = Seen(chosen, tick == begin)
    return out


# ---- as the robot sees it


class _Link:
    """A server that is never busy and never answers."""

    is_busy = False

    def __init__(self, contract: Contract, submit: Any) -> None:
        self.cameras = {c.name: np.zeros((*_SIZE, 3), np.uint8) for c in contract.images}
        self.vectors = {v.name: np.zeros(len(v.select), np.float32) for v in contract.vectors("input")}
        self.submit = submit

    def poll(self) -> None:
        return None

    def heartbeat_age_s(self) -> float:
        return 0.0


@dataclass
class Live:
    """What the loop handed to the server, by time of the tick; when each tick's picture was chosen, and when,
    after waiting for what was captured with it, the rest.
    """

    seen: dict[int, Seen] = field(default_factory=dict)
    chosen: dict[int, int] = field(default_factory=dict)
    decided: dict[int, int] = field(default_factory=dict)
    ticks: dict[int, Tick] = field(default_factory=dict)


class _Replay(Loop):
    """The loop, with a note of every tick that it works on."""

    def __init__(self, contract: Contract) -> None:
        self.now_ns, self.live = EPOCH, Live()
        super().__init__(
            contract, Guard(contract, GuardConfig()), inbox_of(contract), lambda *_: None, lambda: None,
            lambda: self.now_ns, Report(contract.rate_hz, contract.latency_ms),
            LoopConfig(longest_wait_s=0, early_ns=0), log=lambda _: None,
        )  # fmt: skip
        self._link: Any = _Link(contract, self._note)
        self._start_ns = None
        self._drift = 0

    def _look_at_clock(self) -> None:
        """The clock is turned by hand and does not jump."""

    def _begin_tick(self, tick: Tick) -> None:
        self.live.ticks[tick.time_ns - EPOCH] = tick
        self.live.chosen[tick.time_ns - EPOCH] = self.now_ns - EPOCH
        self.live.decided[tick.time_ns - EPOCH] = self.now_ns - EPOCH
        super()._begin_tick(tick)

    def _ask(self, tick: Tick) -> None:
        self.live.decided[tick.time_ns - EPOCH] = self.now_ns - EPOCH
        self._tick = tick
        super()._ask(tick)

    def _note(self, task: int, forget: bool, command: Any) -> None:
        numbers = {name: int(picture[0, 0, 0]) + 256 * int(picture[0, 0, 1])
                   for name, picture in self._link.cameras.items()}  # fmt: skip
        numbers |= {name: int(values[0]) for name, values in self._link.vectors.items()}
        self.live.seen[self._tick.time_ns - EPOCH] = Seen(numbers, bool(forget))

    def turn(self, until_ns: int) -> None:
        """Let time pass, with everything that becomes due on the way."""
        while True:
            for _ in range(8):  # a round does one thing
                self._round()
            if self.now_ns >= until_ns:
                return
            times = [until_ns, self.now_ns + _STEP]
            times += [time for time in (self._due.next_ns, self._ticker.deadline()) if time is not None]
            times += [] if self._waits is None else [self._patience_ns]
            self.now_ns = max(self.now_ns + 1, min(time for time in times if time > self.now_ns))


def replayed(contract: Contract, events: list[Event]) -> Live:
    """Feed the messages in the order in which they were received."""
    loop, vectors = _Replay(contract), {v.name: v for v in contract.vectors("input")}
    for event in sorted(events):
        loop.turn(EPOCH + event.receive)
        content = message(event)
        if event.stream in vectors:
            content = fields.read(content, vectors[event.stream].select).astype(np.float32)
        loop.put(event.stream, EPOCH + event.stamp, content)
    loop.turn(loop.now_ns + 2 * PERIOD)
    loop.inbox.close()
    return loop.live


# ---- as the tokenizer node sees it


class _Encoder(_Link):
    """A tokenizer that is never busy and publishes at once nothing."""

    weights = "w0"


def encoded(contract: Contract, events: list[Event], monkeypatch: Any) -> list[Seen]:
    """What goes to the tokenizer, picture by picture; `is_first` where a stream begins."""
    clock = _Clock()
    monkeypatch.setattr(encoding, "time", clock)
    monkeypatch.setattr(encoding.select, "select", lambda *_: None)
    out: list[Seen] = []
    vectors = {v.name: v for v in contract.vectors("input")}

    def note(is_new: bool) -> None:
        pictures = {name: int(p[0, 0, 0]) + 256 * int(p[0, 0, 1]) for name, p in link.cameras.items()}
        out.append(Seen(pictures | {n: int(v[0]) for n, v in link.vectors.items()}, bool(is_new)))

    link: Any = _Encoder(contract, note)
    node = encoding.Encoding(
        contract, lambda *_: None, lambda: link, lambda: EPOCH + clock.now_ns, lambda _: None
    )
    for event in sorted(events):
        while clock.now_ns < event.receive:
            clock.now_ns = min(event.receive, clock.now_ns + MS)
            node._round()
        content = message(event)
        if event.stream in vectors:
            content = fields.read(content, vectors[event.stream].select).astype(np.float32)
        node.put(event.stream, EPOCH + event.stamp, content)
        node._round()
    for _ in range(100):
        clock.now_ns += MS
        node._round()
    return out


class _Clock:
    """Stands in for the module `time`."""

    now_ns = 0

    def monotonic(self) -> float:
        return self.now_ns / 1e9

    def monotonic_ns(self) -> int:
        return self.now_ns


__all__ = ["MS", "PERIOD", "Event", "Live", "Seen", "encoded", "imported", "replayed", "robot"]
