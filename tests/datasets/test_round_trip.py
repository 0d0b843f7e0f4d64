"""Messages of any contract -> bag -> dataset -> windows: every value at its tick, nothing else.

What ought to come out is worked out here once more, message by message and in plain loops, from the table of
docs/contract.md.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import event, given, settings
from hypothesis import strategies as st

from d4_datasets import bags
from d4_datasets.bags import BagWriter, header, new
from d4_datasets.contract import Contract
from d4_datasets.ingest import ingest
from d4_datasets.windows import Windows

MS = 1_000_000
T0 = 1_700_000_000_000_000_000
SIZE = (8, 12)
PICTURES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")


def joints(stamp: int, values: list[float]) -> Any:
    """Of drivers that disagree on the order: the second one turns it round at every other message."""
    names, order = ["lift", "turn"], [1, 0] if round(values[0] * 8) % 2 else [0, 1]
    message = new("sensor_msgs/msg/JointState", header=header(stamp), name=[names[i] for i in order])
    message.position = np.array([values[i] for i in order])
    return message


def odometry(stamp: int, values: list[float]) -> Any:
    message = new("nav_msgs/msg/Odometry", header=header(stamp))
    message.pose.pose.position.x, message.twist.twist.angular.z = values
    return message


def stamped(stamp: int, values: list[float]) -> Any:
    message = new("geometry_msgs/msg/TwistStamped", header=header(stamp))
    message.twist.linear.x, message.twist.angular.z = values
    return message


def twist(_: int, values: list[float]) -> Any:
    return stamped(0, values).twist


def floats(_: int, values: list[float]) -> Any:
    return bags.float64_array([7.0, *values])


def joy(stamp: int, values: list[float]) -> Any:
    return new("sensor_msgs/msg/Joy", header=header(stamp), axes=np.array([0, *values], np.float32))


# type -> (a message of two numbers, where they are in it, does it have a header)
KINDS: dict[str, tuple[Any, list[str], bool]] = {
    "sensor_msgs/msg/JointState": (joints, ["position[name=lift]", "position[name=turn]"], True),
    "nav_msgs/msg/Odometry": (odometry, ["pose.pose.position.x", "twist.twist.angular.z"], True),
    "geometry_msgs/msg/TwistStamped": (stamped, ["twist.linear.x", "twist.angular.z"], True),
    "geometry_msgs/msg/Twist": (twist, ["linear.x", "angular.z"], False),
    "std_msgs/msg/Float64MultiArray": (floats, ["data[1]", "data[2]"], False),
    "sensor_msgs/msg/Joy": (joy, ["axes[1]", "axes[2]"], True),
}


@dataclass
class Stream:
    """What was sent on a topic: (stamp, received, value), in order of time; and how it is described."""

    name: str
    type: str
    align: dict[str, Any]
    sent: list[tuple[int, int, Any]] = field(default_factory=list)

    def dated(self) -> list[tuple[int, Any]]:
        """(the time that counts, value)."""
        place = 0 if self.align["timeline"] == "header" else 1
        return [(one[place], one[2]) for one in self.sent]

    def at(self, time: int, period: int) -> Any:
        """The newest value at a time; None if there is none or it is too old."""
        before = [one for one in self.dated() if one[0] <= time]
        if not before:
            return None
        age, tolerance = time - before[-1][0], self.align.get("tolerance_ms")
        if tolerance is not None and age > tolerance * MS:
            return None
        return None if self.align["strategy"] == "drop" and age >= period else before[-1][1]


@dataclass
class Case:
    """A robot and everything it said."""

    period: int
    latency_ms: int
    cameras: list[Stream]
    vector: Stream
    action: Stream
    reward: Stream

    def contract(self) -> Contract:
        def entry(stream: Stream) -> dict[str, Any]:
            return {"name": stream.name, "topic": f"/{stream.name}", "type": stream.type,
                    "align": stream.align}  # fmt: skip

        cameras = [entry(camera) | {"size": list(SIZE)} for camera in self.cameras]
        vector = entry(self.vector) | {"select": KINDS[self.vector.type][1]}
        limits = {"low": [-9, -9], "high": [9, 9], "safety": "zeros"}
        action = entry(self.action) | {"select": KINDS[self.action.type][1]} | limits
        reward = {"topic": "/reward", "type": self.reward.type, "select": "data", "reduce": "sum"}
        return Contract.from_dict({
            "name": "any", "rate_hz": 1e9 / self.period, "latency_ms": self.latency_ms,
            "observations": [*cameras, vector], "actions": [action], "reward": reward,
        })  # fmt: skip

    def write(self, path: Path) -> None:
        said = []
        for camera in self.cameras:
            make = bags.image if camera.type == PICTURES[0] else bags.compressed_image
            said += [(received, camera, make(value, stamp)) for stamp, received, value in camera.sent]
        for stream in (self.vector, self.action):
            build = KINDS[stream.type][0]
            said += [(received, stream, build(stamp, value)) for stamp, received, value in stream.sent]
        double = "std_msgs/msg/Float64"
        said += [(at, self.reward, new(double, data=value)) for _, at, value in self.reward.sent]
        with BagWriter(path) as writer:
            for received, stream, message in sorted(said, key=lambda one: one[0]):
                writer.write(f"/{stream.name}", stream.type, received, message)

    def expected(self) -> list[dict[str, Any]]:
        """The ticks of all episodes, by the table of docs/contract.md."""
        period, first = self.period, self.cameras[0]
        times = [time for time, _ in first.dated()]
        ticks, run, anchor, last = [], [], 0, None
        for k in range((times[-1] - times[0]) // period + 2):
            tick = times[0] + period // 2 + k * period
            if tick >= times[-1] + period:
                break
            frame = first.at(tick, period)
            captured = max((time for time in times if time <= tick), default=None)
            if frame is not None:
                anchor = captured if captured != last else anchor + period
            else:
                anchor = tick
            last = captured if frame is not None else None
            found = {"image.cam0": frame, "vector": self.vector.at(anchor, period)}
            if len(self.cameras) == 2:
                found["image.cam1"] = self.cameras[1].at(anchor, period)
            if any(value is None for value in found.values()):
                run = _end(ticks, run)
                continue
            slack = min(5 * MS, period // 4)
            found["action"] = self.action.at(anchor + self.latency_ms * MS + slack, period)
            found["reward"] = sum(v for _, at, v in self.reward.sent if tick - period < at <= tick)
            run.append(found)
        _end(ticks, run)
        return ticks


def _end(ticks: list[dict[str, Any]], run: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """An episode is over; one of a single tick is none."""
    if len(run) > 1:
        ticks += [one | {"first": k == 0} for k, one in enumerate(run)]
    return []


@st.composite
def cases(draw) -> Case:
    period = draw(st.sampled_from([20, 50, 100, 333])) * MS
    pair = st.lists(st.integers(-64, 64).map(lambda n: n / 8), min_size=2, max_size=2)
    length = draw(st.integers(4, 16))

    def times(every: float, begin: int = 0) -> list[tuple[int, int]]:
        """Stamps anywhere, about so many periods apart, received in their order after some time each."""
        count = round(length / every) + 1
        usual = round(every * period)
        step = st.one_of(st.just(usual), st.integers(1, 2 * usual), st.integers(2 * usual, 5 * usual))
        steps = draw(st.lists(step, min_size=count, max_size=count))
        stamps = [T0 + begin + sum(steps[:k]) for k in range(count)]
        took = draw(st.lists(st.integers(0, 30 * MS), min_size=count, max_size=count))
        return list(zip(stamps, np.maximum.accumulate(np.array(stamps) + took).tolist(), strict=True))

    def align(has_header: bool, strategies: tuple[str, ...], open_end: bool) -> dict[str, Any]:
        timeline = draw(st.sampled_from(["header", "receive"])) if has_header else "receive"
        tolerance = draw(st.sampled_from([period // MS, 2 * period // MS, 150, *[None] * open_end]))
        found = {"strategy": draw(st.sampled_from(strategies)), "timeline": timeline}
        if tolerance is None and found["strategy"] != "hold":
            tolerance = 150
        return found if tolerance is None else found | {"tolerance_ms": tolerance}

    cameras = []
    for number in range(draw(st.integers(1, 2))):
        camera = Stream(f"cam{number}", draw(st.sampled_from(PICTURES)), align(True, ("hold", "asof"), False))
        camera.sent = [(s, r, picture(number, k)) for k, (s, r) in enumerate(times(0.8, -number * period))]
        cameras.append(camera)
    streams = []
    for name, often in (("vector", 0.5), ("action", 1.0)):
        kind = draw(st.sampled_from(sorted(KINDS)))
        stream = Stream(name, kind, align(KINDS[kind][2], ("hold", "asof", "drop"), True))
        stream.sent = [(s, r, draw(pair)) for s, r in times(often, -period)]
        streams.append(stream)
    reward = Stream("reward", "std_msgs/msg/Float64", {"timeline": "receive"})
    reward.sent = [(s, r, draw(st.integers(-8, 8)) / 4) for s, r in times(1.5)]
    return Case(period, draw(st.sampled_from([0, 13, 40, 120])), cameras, *streams, reward)


def picture(camera: int, k: int) -> np.ndarray:
    return np.random.default_rng([camera, k]).integers(0, 256, (*SIZE, 3), np.uint8)


@settings(deadline=None, max_examples=40)
@given(cases())
def test_every_message_is_in_the_windows_at_its_time_and_nothing_else(case: Case) -> None:
    if not (wanted := case.expected()):
        event("nothing to expect")
        return
    event(f"{sum(tick['first'] for tick in wanted)} episodes")
    with tempfile.TemporaryDirectory() as folder:
        case.write(Path(folder) / "bag")
        ingest([Path(folder) / "bag"], case.contract(), Path(folder) / "data")
        windows = Windows(Path(folder) / "data")
        starts = np.flatnonzero([tick["first"] for tick in wanted])
        assert windows.num_frames == len(wanted)
        assert windows.episode_start.tolist() == starts.tolist()
        longest = int(windows.episode_length.max())
        batch = windows.batch(*windows.indices(windows.episode_start, longest))
        seen = [(e, t) for e, length in enumerate(windows.episode_length) for t in range(length)]
        for (e, t), tick in zip(seen, wanted, strict=True):
            for name in ("image.cam0", "image.cam1")[: len(case.cameras)]:
                np.testing.assert_array_equal(batch[name][e, t], tick[name])
            assert batch["vector.vector"][e, t].tolist() == tick["vector"]
            assert batch["action_mask"][e, t] == (tick["action"] is not None)
            assert batch["action"][e, t].tolist() == (tick["action"] or [0, 0])
            assert batch["reward"][e, t].tolist() == [tick["reward"]]
            assert batch["is_first"][e, t] == tick["first"]
