"""Depth cameras: metres of every kind of message become the same grey, and what is not measured is black."""

import struct

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from test_ingest import ROBOT, TICK, Log
from test_messages import raw

from d4_datasets import bags, messages
from d4_datasets.bags import new
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_datasets.footage import read_picture
from d4_datasets.ingest import ingest
from d4_datasets.lerobot import Dataset
from d4_datasets.stills import shade

RANGE = (0.5, 4.5)
METRES = np.array([[0, 0.1, 0.5, 1.0], [2.5, 4.5, 9.0, 65.0]], np.float32)
GREY = [[0, 1, 1, 33], [128, 255, 255, 255]]
IMAGE = "sensor_msgs/msg/Image"


def grey(rgb):
    assert (rgb == rgb[..., :1]).all()
    return rgb[..., 0].tolist()


def compressed(metres, kind, a=40.0, b=-1.0):
    """As compressed_depth_image_transport makes it; 32FC1 by the inverse of depth."""
    if kind == "16UC1":
        pixels = np.round(metres * 1000).astype(np.uint16)
    else:
        with np.errstate(divide="ignore"):
            pixels = np.where(metres > 0, np.round(a / metres + b), 0).astype(np.uint16)
    png = cv2.imencode(".png", pixels)[1].tobytes()
    data = struct.pack("<iff", 1, a, b) + png
    return new(
        "sensor_msgs/msg/CompressedImage",
        format=f"{kind}; compressedDepth png",
        data=np.frombuffer(data, np.uint8),
    )


@pytest.mark.parametrize("bigendian", [0, 1])
@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize(("encoding", "kind"), [("16UC1", "u2"), ("mono16", "u2"), ("32FC1", "f4")])
def test_raw_depth(encoding, kind, padding, bigendian):
    values = METRES if kind == "f4" else np.round(METRES * 1000)
    msg = raw(encoding, values.astype((">" if bigendian else "<") + kind), padding, bigendian)
    assert grey(messages.decode(msg, RANGE)) == GREY


def test_what_floats_can_be_besides():
    odd = np.array([[np.nan, np.inf, -np.inf, -1.0, 1e-30, 1e30, 3.4e38, 2.5]], np.float32)
    assert grey(messages.decode(raw("32FC1", odd), RANGE)) == [[0, 255, 0, 0, 1, 255, 255, 128]]


@pytest.mark.parametrize("encoding", ["16UC1", "32FC1"])
def test_compressed_depth(encoding):
    out = np.array(grey(messages.decode(compressed(METRES, encoding, 4000, 5), RANGE)))
    assert abs(out - GREY).max() <= (0 if encoding == "16UC1" else 3)
    assert out[0, 0] == 0


def test_sixteen_bit_png_without_a_transport():
    png = cv2.imencode(".png", np.round(METRES * 1000).astype(np.uint16))[1].reshape(-1)
    msg = new("sensor_msgs/msg/CompressedImage", format="16UC1; png compressed ", data=png)
    assert grey(messages.decode(msg, RANGE)) == GREY
    assert grey(messages.decode(msg))[1][3] == 65000 >> 8


def test_without_a_range_millimetres_keep_their_high_byte_and_floats_are_refused():
    high = [[int(v) >> 8 for v in row] for row in np.round(METRES * 1000)]
    assert grey(messages.decode(compressed(METRES, "16UC1"))) == high
    assert grey(messages.decode(raw("16UC1", np.round(METRES * 1000).astype("<u2")))) == high
    for msg in (compressed(METRES, "32FC1"), raw("32FC1", METRES)):
        with pytest.raises(UserError, match=r"is depth; write .* `depth_m: \[0\.3, 6\]`"):
            messages.decode(msg)


def test_eight_bit_pictures_are_taken_as_they_are():
    rgb = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    for msg in (bags.image(rgb, 0), bags.compressed_image(rgb, 0)):
        np.testing.assert_array_equal(messages.decode(msg, RANGE), rgb)


PNG = bytes(compressed(METRES, "16UC1").data)
EIGHT_BITS = cv2.imencode(".png", np.zeros((2, 2), np.uint8))[1].tobytes()


@pytest.mark.parametrize(
    ("format", "data", "message"),
    [
        ("16UC1; compressedDepth png", PNG[:8], "it is cut off"),
        ("16UC1; compressedDepth png", PNG[:30], "it is cut off"),
        ("16UC1; compressedDepth png", PNG[12:], "it is damaged or no"),
        ("16UC1; compressedDepth rvl", PNG, "rvl is not supported; set .* to png"),
        ("16UC1; compressedDepth png", PNG[:12] + EIGHT_BITS, "it holds no 16-bit depth"),
    ],
)  # fmt: skip
def test_damaged_depth_is_refused(format, data, message):
    msg = new("sensor_msgs/msg/CompressedImage", format=format, data=np.frombuffer(data, np.uint8))
    with pytest.raises(UserError, match=message):
        messages.decode(msg, RANGE)


@given(
    arrays.arrays(np.float32, (3, 4), elements=st.floats(width=32)),
    st.floats(0, 10),
    st.floats(0.01, 100),
)
def test_farther_is_never_darker(metres, near, width):
    out = shade(metres, (near, near + width))[..., 0]
    measured = metres > 0
    assert ((out > 0) == measured).all()
    order = np.argsort(metres[measured], kind="stable")
    assert (np.diff(out[measured][order].astype(int)) >= 0).all()


# ---- in the contract


def depth_contract(**changes):
    raw_contract = yaml.safe_load(ROBOT)
    camera = raw_contract["observations"][0] | {"type": IMAGE, "topic": "/depth", "depth_m": list(RANGE)}
    raw_contract["observations"] = [camera | changes]
    return Contract.from_dict(
        {k: raw_contract[k] for k in ("name", "rate_hz", "latency_ms", "observations", "actions")}
    )


def test_depth_is_part_of_the_contract_and_of_its_hash_only_where_it_is_written():
    contract = depth_contract()
    assert contract.images[0].depth_m == RANGE
    assert Contract.from_dict(contract.to_dict()) == contract
    assert depth_contract(depth_m=[0.5, 5]).hash != contract.hash
    plain = depth_contract(depth_m=None)
    assert "depth_m" not in str(plain.to_dict())


@pytest.mark.parametrize("value", [[1], [2, 1], [-1, 2], [1, 1], "near", [0, "far"], [0, float("inf")]])
def test_mistakes_in_the_range(value):
    with pytest.raises(UserError, match=r"`observations\[0\]\.depth_m`"):
        depth_contract(depth_m=value)


def test_a_vector_has_no_depth():
    raw_contract = yaml.safe_load(ROBOT)
    raw_contract["observations"][1]["depth_m"] = [0, 1]
    with pytest.raises(UserError, match="unknown key"):
        Contract.from_dict(raw_contract)


def test_ingest_of_depth_and_of_two_ranges_of_one_topic(tmp_path):
    log, t0 = Log(), 1_700_000_000_000_000_000
    for k in range(5):
        stamp = t0 + k * TICK
        msg = raw("16UC1", np.full((8, 12), 1000 * (k + 1), "<u2"))
        msg.header = bags.header(stamp)
        log.add("/depth", IMAGE, stamp, msg)
    log.write(tmp_path / "bag")
    one = depth_contract().to_dict()
    one["observations"].append(one["observations"][0] | {"name": "far", "depth_m": [0.5, 9.5]})
    ingest([tmp_path / "bag"], Contract.from_dict(one), tmp_path / "data")
    dataset = Dataset(tmp_path / "data")
    near, far = ([int(frame[0, 0, 0]) for frame in dataset.frames(name, 0)] for name in ("cam", "far"))
    assert near == [33, 96, 160, 223, 255]
    assert far == [15, 43, 72, 100, 128]
    live = messages.look(log.items[1][3], (4, 6), RANGE, decoder=None)  # as the robot's node looks at it
    assert live.shape == (4, 6, 3)
    assert (live == near[1]).all()


def test_depth_in_folders_of_pictures(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.round(METRES * 1000).astype(np.uint16))
    assert grey(read_picture(tmp_path / "a.png", RANGE)) == GREY
