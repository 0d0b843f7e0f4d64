"""Commands to messages: the contract's action channels as messages of whatever types their topics have.

Reading a field out of a bag and writing it into a command is one path (`d4_datasets.fields`). Knows no ROS:
what makes a message is given, rclpy's classes on the robot and those of rosbags in tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from d4_datasets import fields
from d4_datasets.contract import Action, Contract
from d4_datasets.errors import UserError


class Types(Protocol):
    """Makes messages."""

    def new(self, name: str) -> Any:
        """A zero-filled message of a type such as geometry_msgs/msg/Twist; raises UserError if unknown."""

    def element(self, msg: Any, attribute: str) -> Any:
        """A zero-filled element for an array of messages."""


class Part(NamedTuple):
    """A channel's place: its entries in the action vector."""

    channel: Action
    span: slice


class Topic:
    """What one command topic carries: one or more channels of the contract.

    Attributes:
        name, type: of the topic.
        parts: its channels.
    """

    def __init__(self, name: str, type_: str, parts: list[Part], types: Types, frame_id: str) -> None:
        self.name, self.type, self.parts = name, type_, parts
        self._types = types
        self._message = types.new(type_)
        header = getattr(self._message, "header", None)
        self._stamp = None if header is None else header.stamp
        if header is not None:
            header.frame_id = frame_id

    def fill(self, values: np.ndarray, stamp_ns: int) -> Any:
        """The message for an action (A,); the same object every time, filled anew."""
        for part in self.parts:
            fields.write(self._message, part.channel.select, values[part.span], self._types.element)
        if self._stamp is not None:
            self._stamp.sec, self._stamp.nanosec = divmod(stamp_ns, 1_000_000_000)
        return self._message


class Codec:
    """All command topics of a contract.

    Args:
        contract: the robot.
        types: makes messages.
        frame_id: for messages that have a header.

    Raises:
        UserError: a type is unknown, a field is not there or no number, or channels that share a topic
            disagree about its type or about what is safe.
    """

    def __init__(self, contract: Contract, types: Types, frame_id: str = "") -> None:
        places: dict[str, list[Part]] = {}
        column = 0
        for channel in contract.actions:
            places.setdefault(channel.topic, []).append(Part(channel, slice(column, column + channel.dim)))
            column += channel.dim
        for name, parts in places.items():
            for what in ("type", "safety"):
                kinds = {getattr(part.channel, what) for part in parts}
                if len(kinds) > 1:
                    raise UserError(f"channels on {name} differ in `{what}`: {', '.join(sorted(kinds))}")
        self.topics = [
            Topic(name, parts[0].channel.type, parts, types, frame_id) for name, parts in places.items()
        ]
        for topic in self.topics:
            for values in (contract.action_low, contract.action_high):
                _prove(topic, values)
            _reach(topic, contract.period_ns)

    def messages(self, values: np.ndarray, send: np.ndarray, stamp_ns: int) -> Iterator[tuple[str, Any]]:
        """(topic, message) of every topic that is to be sent: action (A,), which entries to send (A,)."""
        for topic in self.topics:
            if send[topic.parts[0].span].all():
                yield topic.name, topic.fill(values, stamp_ns)


def _prove(topic: Topic, values: np.ndarray) -> None:
    """Write and read back once, so that a mistake in the contract shows before the robot moves."""
    message = topic.fill(values, 0)
    for part in topic.parts:
        wanted, back = values[part.span], fields.read(message, part.channel.select)
        if not ((back == np.round(wanted)) | np.isclose(back, wanted, rtol=1e-5, atol=0)).all():
            raise UserError(
                f"{topic.name}: channel {part.channel.name} written as {wanted.tolist()} reads back as "
                f"{back.tolist()}; does another channel write the same field?"
            )


def _reach(topic: Topic, period_ns: int) -> None:
    """Points of a trajectory are to be reached at the next tick, unless the contract selects their times: a
    controller refuses, or jumps to, a point that is to be reached at once.
    """
    paths = [path for part in topic.parts for path in part.channel.select]
    if topic.type == "trajectory_msgs/msg/JointTrajectory" and not any("time_from" in p for p in paths):
        for point in topic.fill(np.zeros(topic.parts[-1].span.stop), 0).points:
            point.time_from_start.sec, point.time_from_start.nanosec = divmod(period_ns, 1_000_000_000)
