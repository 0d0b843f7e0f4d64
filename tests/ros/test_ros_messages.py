"""rclpy's own messages: commands of every type and pictures of every encoding, through serialisation."""

import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy")
pytestmark = pytest.mark.ros

import cv2  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from rclpy.serialization import deserialize_message, serialize_message  # noqa: E402
from sensor_msgs.msg import CompressedImage, Image  # noqa: E402

from d4_datasets import fields, messages  # noqa: E402
from d4_datasets.contract import Action, Align, Contract  # noqa: E402
from d4_datasets.errors import UserError  # noqa: E402
from d4_nodes.codec import Codec  # noqa: E402
from d4_nodes.ros.pictures import SHARED, pick_decoder, picture  # noqa: E402
from d4_nodes.ros.shell import RosTypes  # noqa: E402

TOY = Contract.load(Path(__file__).parents[1] / "nodes" / "robot.yaml")
COMMANDS = {
    "geometry_msgs/msg/Twist": ("linear.x", "angular.z"),
    "geometry_msgs/msg/TwistStamped": ("twist.linear.x", "twist.angular.z"),
    "std_msgs/msg/Float64MultiArray": ("data[0]", "data[1]"),
    "std_msgs/msg/Float32MultiArray": ("data[0]", "data[1]"),
    "std_msgs/msg/Float32": ("data",),
    "sensor_msgs/msg/JointState": ("position[name=elbow]", "velocity[name=elbow]", "position[name=wrist]"),
    "sensor_msgs/msg/Joy": ("axes[0]", "axes[3]"),
    "trajectory_msgs/msg/JointTrajectory": (
        "points[0].positions[joint_names=elbow]", "points[0].positions[joint_names=wrist]",
        "points[0].velocities[joint_names=elbow]",
    ),
}  # fmt: skip


def robot(*channels: Action) -> Contract:
    import dataclasses

    return dataclasses.replace(TOY, actions=channels)


@pytest.mark.parametrize("type_", COMMANDS)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_commands_of_every_type(type_, data):
    select = COMMANDS[type_]
    limits = (9.0,) * len(select)
    channel = Action("a", "/a", type_, select, "zeros", Align("hold", "receive"), (), "continuous",
                     tuple(-v for v in limits), limits)  # fmt: skip
    codec = Codec(robot(channel), RosTypes(), "base")
    for _ in range(2):
        drawn = data.draw(st.lists(st.floats(-9, 9, width=32), min_size=len(select), max_size=len(select)))
        values = np.array(drawn, np.float32)
        [(_, message)] = codec.messages(values, np.ones(len(values), bool), 5_000_000_003)
        again = deserialize_message(serialize_message(message), type(message))
        np.testing.assert_array_equal(fields.read(again, select), values)
        if hasattr(again, "header"):
            assert (again.header.stamp.sec, again.header.stamp.nanosec) == (5, 3)
            assert again.header.frame_id == "base"


def test_whole_numbers():
    def channel(name, type_, kind, **more):
        return Action(name, f"/{name}", type_, ("data",), "hold", Align("hold", "receive"), kind=kind, **more)

    contract = robot(
        channel("b", "std_msgs/msg/Bool", "binary"),
        channel("m", "std_msgs/msg/UInt8", "categorical", classes=4),
    )
    sent = dict(Codec(contract, RosTypes()).messages(np.array([1.0, 3.0]), np.ones(2, bool), 0))
    assert sent["/b"].data is True
    assert sent["/m"].data == 3


def test_an_unknown_type_is_one_sentence():
    with pytest.raises(UserError, match="not installed here"):
        RosTypes().new("nobody_msgs/msg/Nothing")


# what is in a picture of one colour, whatever its encoding: red 200, green 100, blue 50, or grey 90
PLAIN = {
    "rgb8": [200, 100, 50], "bgr8": [50, 100, 200], "rgba8": [200, 100, 50, 9], "bgra8": [50, 100, 200, 9],
    "mono8": [90], "16UC1": [90 * 256 + 7],
}  # fmt: skip


@pytest.mark.parametrize("padding", [0, 6])
@pytest.mark.parametrize("is_big", [0, 1])
@pytest.mark.parametrize("encoding", PLAIN)
def test_pictures_of_every_encoding(encoding, is_big, padding):
    height, width = 4, 6
    kind = np.dtype(np.uint16 if encoding == "16UC1" else np.uint8).newbyteorder(">" if is_big else "<")
    rows = np.tile(np.array(PLAIN[encoding], kind), (height, width)).view(np.uint8)
    rows = np.pad(rows, ((0, 0), (0, padding)), constant_values=255)
    msg = Image(height=height, width=width, encoding=encoding, is_bigendian=is_big, step=rows.shape[1])
    msg.data = rows.tobytes()
    again = deserialize_message(serialize_message(msg), Image)
    grey = len(PLAIN[encoding]) == 1
    np.testing.assert_array_equal(messages.decode(again)[2, 3], [90] * 3 if grey else [200, 100, 50])


def test_yuv422_is_what_opencv_makes_of_it():
    data = np.random.default_rng(0).integers(16, 236, (4, 8, 2), np.uint8)
    msg = Image(height=4, width=8, encoding="yuv422", step=16, data=data.tobytes())
    np.testing.assert_array_equal(messages.decode(msg), cv2.cvtColor(data, cv2.COLOR_YUV2RGB_UYVY))


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_compressed_pictures(suffix):
    rgb = np.zeros((16, 16, 3), np.uint8)
    rgb[..., 0] = 200
    data = cv2.imencode(f".{suffix}", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))[1].tobytes()
    kind = "jpeg" if suffix == "jpg" else "png"
    msg = CompressedImage(format=f"rgb8; {kind} compressed bgr8", data=data)
    got = messages.decode(deserialize_message(serialize_message(msg), CompressedImage))
    np.testing.assert_allclose(got.astype(int), rgb, atol=4)


@pytest.mark.parametrize("encoding", SHARED)
def test_cv_bridge_gives_the_same_pixels(encoding):
    pytest.importorskip("cv_bridge")
    decode, which = pick_decoder("cv_bridge")
    assert which == "cv_bridge"
    for padding in range(7):  # cv_bridge alone shears rows that are padded by a part of a pixel
        msg = picture(encoding, SHARED[encoding], padding, padding)
        np.testing.assert_array_equal(decode(msg), messages.decode(msg))


def test_a_cv_bridge_that_does_not_work_is_not_taken(monkeypatch, tmp_path):
    """One built for another NumPy does not raise: it ends the process that imports it."""
    (tmp_path / "cv_bridge.py").write_text("import os; os.write(2, b'built for NumPy 1'); os.abort()")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    assert pick_decoder("auto")[1] == "opencv"
    with pytest.raises(UserError, match="built for NumPy 1"):
        pick_decoder("cv_bridge")
    with pytest.raises(UserError, match="none of auto"):
        pick_decoder("magick")
