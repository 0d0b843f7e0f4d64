"""Field paths: what is read can be written back and read again, for messages of any make."""

from array import array
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d4_datasets import fields
from d4_datasets.bags import new
from d4_datasets.errors import UserError

numbers = st.floats(-1e6, 1e6, allow_nan=False)
names = st.lists(st.sampled_from(["hip", "knee", "elbow", "wrist", "jaw"]), min_size=1, unique=True)


def joints(names, positions):
    return new("sensor_msgs/msg/JointState", name=list(names), position=np.array(positions, np.float64))


def test_reading():
    twist = new("geometry_msgs/msg/Twist")
    twist.linear.x, twist.angular.z = 0.5, -1.0
    np.testing.assert_array_equal(fields.read(twist, ["linear.x", "angular.z"]), [0.5, -1.0])
    state = joints(["elbow", "wrist"], [1.0, 2.0])
    np.testing.assert_array_equal(fields.read(state, ["position[1]", "position[name=elbow]"]), [2.0, 1.0])
    assert fields.get(new("std_msgs/msg/String", data="reach"), "data") == "reach"
    assert fields.read(new("std_msgs/msg/Bool", data=True), ["data"]).tolist() == [1.0]


def test_names_are_looked_up_in_the_messages_around():
    point = new("trajectory_msgs/msg/JointTrajectoryPoint", positions=np.array([1.0, 2.0]))
    msg = new("trajectory_msgs/msg/JointTrajectory", joint_names=["elbow", "wrist"], points=[point])
    assert fields.read(msg, ["points[0].positions[joint_names=wrist]"]).tolist() == [2.0]
    fields.write(msg, ["points[0].positions[joint_names=wrist]"], [5.0])
    assert point.positions.tolist() == [1.0, 5.0]


@given(names, st.data())
def test_round_trip_by_name_whatever_the_order(order, data):
    values = data.draw(st.lists(numbers, min_size=len(order), max_size=len(order)))
    paths = [f"position[name={name}]" for name in data.draw(st.permutations(order))]
    # Written to a fresh message, and to one whose driver lists the joints in another order.
    for target in (joints([], []), joints(data.draw(st.permutations(order)), [0.0] * len(order))):
        fields.write(target, paths, values)
        np.testing.assert_array_equal(fields.read(target, paths), values)
        assert sorted(target.name) == sorted(order)
        assert target.position.dtype == np.float64


@given(st.lists(numbers, min_size=1, max_size=6), st.data())
def test_round_trip_by_index_of_every_kind_of_array(values, data):
    paths = [f"data[{i}]" for i in data.draw(st.permutations(range(len(values))))]
    for empty in (np.zeros(0), array("d"), []):
        msg = SimpleNamespace(data=empty)
        fields.write(msg, paths, values)
        np.testing.assert_array_equal(fields.read(msg, paths), values)
        assert type(msg.data) is type(empty)


@given(st.floats(-100, 100), st.booleans())
def test_numbers_keep_the_type_of_their_field(number, flag):
    joy = new("sensor_msgs/msg/Joy", buttons=np.zeros(2, np.int32))
    fields.write(joy, ["axes[0]", "buttons[1]"], [number, flag])
    assert joy.axes.dtype == np.float32
    assert joy.buttons.tolist() == [0, int(flag)]
    msg = new("std_msgs/msg/Bool")
    fields.write(msg, ["data"], [float(flag)])
    assert msg.data is flag
    msg = new("std_msgs/msg/Int64")
    fields.write(msg, ["data"], [number])
    assert msg.data == round(number)
    assert isinstance(msg.data, int)


def test_writing_leaves_a_received_message_array_alone():
    received = np.frombuffer(np.ones(2).tobytes())  # read-only
    state = joints(["a", "b"], [0, 0])
    state.position = received
    fields.write(state, ["position[0]"], [3.0])
    assert state.position.tolist() == [3.0, 1.0]
    assert received.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "path", ["", "a..b", "a.", ".a", "a[", "a[-1]", "a[x]", "a[1][2]", "a b", "1a", "a[name=]"]
)
def test_malformed_paths(path):
    with pytest.raises(UserError, match="malformed at character"):
        fields.parse(path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("linear.w", "Vector3 has no field 'w'"),
        ("linear", "not a single number but geometry_msgs__msg__Vector3"),
    ],
)
def test_wrong_paths_for_a_twist(path, message):
    twist = new("geometry_msgs/msg/Twist")
    with pytest.raises(UserError, match=message):
        fields.read(twist, [path])
    with pytest.raises(UserError, match=r"has no field|not a single number"):
        fields.write(twist, [path], [1.0])


def test_wrong_elements():
    state = joints(["elbow"], [1.0])
    with pytest.raises(UserError, match="position has only 1 elements"):
        fields.read(state, ["position[1]"])
    with pytest.raises(UserError, match="effort has only 0 elements"):  # drivers leave arrays empty
        fields.read(state, ["effort[name=elbow]"])
    with pytest.raises(UserError, match=r"'wrist' is not among name = \['elbow'\]"):
        fields.read(state, ["position[name=wrist]"])
    with pytest.raises(UserError, match="there is no array 'joints'"):
        fields.read(state, ["position[joints=elbow]"])
    with pytest.raises(UserError, match="points has only 0 elements to write into"):
        fields.write(new("trajectory_msgs/msg/JointTrajectory"), ["points[0].positions[0]"], [1.0])
    with pytest.raises(UserError, match="2 values cannot be written to 1 fields"):
        fields.write(state, ["position[0]"], [1.0, 2.0])
