"""Commands as messages: whatever the contract can describe is written, and read back as it was meant."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d4_datasets import fields
from d4_datasets.bags import new
from d4_datasets.contract import Action, Align, Contract
from d4_datasets.errors import UserError
from d4_datasets.msgtypes import typestore
from d4_nodes.codec import Codec


class RosbagsTypes:
    """Messages of rosbags in place of rclpy's."""

    def new(self, name):
        return new(name)

    def element(self, msg, attribute):
        definition = dict(typestore().fielddefs[msg.__msgtype__][1])[attribute]
        return new(definition[1][0][1])


TYPES = RosbagsTypes()

# every type that the documentation promises, with fields of it
COMMANDS = {
    "geometry_msgs/msg/Twist": ("linear.x", "linear.y", "angular.z"),
    "geometry_msgs/msg/TwistStamped": ("twist.linear.x", "twist.angular.z"),
    "geometry_msgs/msg/Wrench": ("force.z",),
    "geometry_msgs/msg/PoseStamped": ("pose.position.x", "pose.orientation.w"),
    "std_msgs/msg/Float64MultiArray": ("data[0]", "data[1]", "data[2]"),
    "std_msgs/msg/Float32MultiArray": ("data[0]", "data[1]"),
    "std_msgs/msg/Float64": ("data",),
    "std_msgs/msg/Float32": ("data",),
    "sensor_msgs/msg/JointState": ("position[name=elbow]", "velocity[name=elbow]", "position[name=wrist]"),
    "sensor_msgs/msg/Joy": ("axes[0]", "axes[3]"),
    "trajectory_msgs/msg/JointTrajectory": (
        "points[0].positions[joint_names=elbow]", "points[0].positions[joint_names=wrist]",
        "points[0].velocities[joint_names=elbow]",
    ),
}  # fmt: skip


def channel(type_: str, select: tuple[str, ...], **changes) -> Action:
    one = Action("a", "/a", type_, select, "zeros", Align("hold", "receive"), low=(-9.0,) * len(select),
                 high=(9.0,) * len(select))  # fmt: skip
    return dataclasses.replace(one, **changes)


def robot(contract: Contract, *channels: Action) -> Contract:
    return dataclasses.replace(contract, actions=channels)


numbers = st.floats(-9, 9, width=32)


@pytest.mark.parametrize("type_", COMMANDS)
@given(data=st.data())
def test_what_is_written_is_read_by_the_importers_path(type_, data):
    select = COMMANDS[type_]
    contract = robot(_TOY, channel(type_, select))
    codec = Codec(contract, TYPES, "base_link")
    for _ in range(3):  # the message is used again: nothing of one command may leak into the next
        values = np.array(
            data.draw(st.lists(numbers, min_size=len(select), max_size=len(select))), np.float32
        )
        [(topic, message)] = codec.messages(values, np.ones(len(values), bool), 3_000_000_007)
        assert topic == "/a"
        np.testing.assert_array_equal(fields.read(message, select), values)
        store = typestore()
        again = store.deserialize_cdr(store.serialize_cdr(message, type_), type_)  # what really travels
        np.testing.assert_array_equal(fields.read(again, select), values)
        if hasattr(again, "header"):
            assert (again.header.stamp.sec, again.header.stamp.nanosec) == (3, 7)
            assert again.header.frame_id == "base_link"


def test_whole_numbers(contract):
    switch = channel("std_msgs/msg/Bool", ("data",), name="b", topic="/b", kind="binary", low=(), high=())
    mode = channel(
        "std_msgs/msg/UInt8", ("data",), name="m", topic="/m", kind="categorical", classes=5, low=(), high=()
    )
    codec = Codec(robot(contract, switch, mode), TYPES)
    sent = dict(codec.messages(np.array([1.0, 4.0], np.float32), np.ones(2, bool), 0))
    assert sent["/b"].data is True
    assert sent["/m"].data == 4


def test_channels_that_share_a_topic_are_one_message(contract):
    parts = [
        channel("geometry_msgs/msg/Twist", (path,), name=path.replace(".", "_"))
        for path in ("linear.x", "angular.z")
    ]
    codec = Codec(robot(contract, *parts), TYPES)
    [(_, message)] = codec.messages(np.array([1.5, -2.0], np.float32), np.ones(2, bool), 0)
    assert (message.linear.x, message.angular.z) == (1.5, -2.0)


def test_a_channel_whose_safety_is_silence_is_left_out(contract):
    parts = (channel("std_msgs/msg/Float64", ("data",), name=n, topic=f"/{n}") for n in ("x", "y"))
    codec = Codec(robot(contract, *parts), TYPES)
    sent = dict(codec.messages(np.array([1.0, 2.0], np.float32), np.array([True, False]), 0))
    assert list(sent) == ["/x"]


def test_trajectory_points_are_due_at_the_next_tick(contract):
    """A point that is to be reached at once makes a controller refuse it or jump."""
    codec = Codec(
        robot(contract, channel("trajectory_msgs/msg/JointTrajectory", ("points[0].positions[0]",))), TYPES
    )
    [(_, message)] = codec.messages(np.zeros(1, np.float32), np.ones(1, bool), 0)
    assert message.points[0].time_from_start.nanosec == contract.period_ns


@pytest.mark.parametrize(
    ("channels", "says"),
    [
        ([channel("geometry_msgs/msg/Twist", ("linear.w",))], "no field 'w'"),
        ([channel("geometry_msgs/msg/Twist", ("linear",))], "not a single number"),
        ([channel("nobody_msgs/msg/Nothing", ("x",))], "unknown"),
        (
            [
                channel("std_msgs/msg/Float64", ("data",)),
                channel("std_msgs/msg/Float32", ("data",), name="b"),
            ],
            "differ in `type`",
        ),
        (
            [
                channel("geometry_msgs/msg/Twist", ("linear.x",)),
                channel("geometry_msgs/msg/Twist", ("linear.y",), name="b", safety="hold"),
            ],
            "differ in `safety`",
        ),
        (
            [
                channel("geometry_msgs/msg/Twist", ("linear.x",)),
                channel("geometry_msgs/msg/Twist", ("linear.x",), name="b", low=(-1.0,), high=(1.0,)),
            ],
            "another channel",
        ),
    ],
)
def test_mistakes_show_before_the_robot_moves(contract, channels, says):
    with pytest.raises(UserError, match=says):
        Codec(robot(contract, *channels), TYPES)


_TOY = Contract.load(__file__.replace("test_codec.py", "robot.yaml"))
