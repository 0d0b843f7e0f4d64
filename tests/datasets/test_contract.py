"""The contract file: what it means, that it survives a round trip, and every mistake in it by name."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import yaml

from d4_datasets.contract import Align, Contract
from d4_datasets.errors import UserError

YARD = yaml.safe_load("""
name: yard
rate_hz: 10
latency_ms: 40
observations:
  - {name: overhead, topic: /camera, type: sensor_msgs/msg/CompressedImage, size: [48, 64],
     align: {strategy: hold, timeline: header, tolerance_ms: 150}}
  - {name: pose, topic: /pose, type: geometry_msgs/msg/PoseStamped,
     select: [pose.position.x, pose.position.y], units: [m, m], role: probe,
     align: {strategy: hold, timeline: header, tolerance_ms: 150}}
  - {name: speed, topic: /speed, type: std_msgs/msg/Float64MultiArray, select: ["data[0]"],
     align: {strategy: hold, timeline: receive}}
actions:
  - {name: base, topic: /cmd_vel, type: geometry_msgs/msg/Twist,
     select: [linear.x, linear.y], units: [m/s, m/s],
     low: [-1.2, -1], high: [1.2, 1], max_rate: [30, 30], safety: zeros,
     align: {strategy: hold, timeline: receive, tolerance_ms: 250}}
  - {name: grip, topic: /grip, type: std_msgs/msg/Bool, select: [data], kind: binary, safety: hold,
     align: {strategy: hold, timeline: receive, tolerance_ms: 250}}
  - {name: gear, topic: /gear, type: std_msgs/msg/Int64, select: [data],
     kind: categorical, classes: 4, safety: hold,
     align: {strategy: hold, timeline: receive, tolerance_ms: 250}}
tasks: {topic: /task, type: std_msgs/msg/String, select: data, names: [reach_red, reach_blue]}
reward: {topic: /reward, type: std_msgs/msg/Float64MultiArray, select: data, reduce: last}
episode: {start: {topic: /episode, type: std_msgs/msg/Int64, select: data},
          terminal: {topic: /terminal, type: std_msgs/msg/Bool, select: data}}
""")


def test_a_full_contract_is_understood():
    contract = Contract.from_dict(YARD)
    assert [camera.name for camera in contract.images] == ["overhead"]
    assert contract.images[0].size == (48, 64)
    assert contract.images[0].key == "observation.images.overhead"
    assert [vector.name for vector in contract.vectors()] == ["pose", "speed"]
    assert [vector.name for vector in contract.vectors("probe")] == ["pose"]
    assert [vector.name for vector in contract.vectors("input")] == ["speed"]
    assert contract.vectors()[0].key == "observation.pose"
    assert contract.action_dim == 4
    assert contract.action_names == ("base.linear.x", "base.linear.y", "grip.data", "gear.data")
    np.testing.assert_array_equal(contract.action_low, np.float32([-1.2, -1, 0, 0]))
    np.testing.assert_array_equal(contract.action_high, np.float32([1.2, 1, 1, 3]))
    assert contract.action_low.dtype == np.float32
    assert contract.task_names == ("reach_red", "reach_blue")
    assert contract.period_ns == 100_000_000
    assert contract.latency_ns == 40_000_000
    assert contract.vectors()[1].align == Align("hold", "receive", None)
    assert contract.images[0].align.tolerance_ns == 150_000_000


def test_canonical_yaml_round_trips_and_the_hash_is_of_the_meaning(tmp_path):
    contract = Contract.from_dict(YARD)
    path = tmp_path / "robot.yaml"
    path.write_text(contract.to_yaml())
    again = Contract.load(path)
    assert again == contract
    assert again.hash == contract.hash
    assert again.to_yaml() == contract.to_yaml()
    same = copy.deepcopy(YARD) | {"rate_hz": 10.0}
    same["observations"][0]["role"] = "input"
    assert Contract.from_dict(same).hash == contract.hash
    assert contract.max_ticks is None
    longest = edit(["episode", "max_s"], 2.5)
    assert Contract.from_dict(longest).max_ticks == 25
    assert Contract.from_dict(Contract.from_dict(longest).to_dict()) == Contract.from_dict(longest)
    assert Contract.from_dict(YARD | {"latency_ms": 41}).hash != contract.hash


def test_what_is_optional_may_be_left_out():
    small = {key: YARD[key] for key in ("name", "rate_hz", "latency_ms")}
    small |= {"observations": YARD["observations"][:1], "actions": YARD["actions"][:1]}
    contract = Contract.from_dict(small)
    assert contract.task_names == ("yard",)
    assert contract.reward is None
    assert contract.episode.start is None
    assert Contract.from_dict(contract.to_dict()) == contract


def edit(path, value):
    """YARD with the entry at `path` (keys and indices) set, or removed where `value` is None."""
    raw = copy.deepcopy(YARD)
    node = raw
    for key in path[:-1]:
        node = node[key]
    if value is None:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return raw


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["rate_herz"], 10, "robot.yaml: `rate_herz`: unknown key; did you mean `rate_hz`"),
        (["observations", 0, "align", "tolerance"], 5, r"`observations\[0\].align.tolerance`: unknown key"),
        (["rate_hz"], None, "`rate_hz`: this key is missing"),
        (["rate_hz"], 0, "`rate_hz`: must be a number above 0, not 0"),
        (["rate_hz"], "fast", "`rate_hz`: must be a number"),
        (["latency_ms"], -1, "`latency_ms`: must be a number of at least 0"),
        (["latency_ms"], float("nan"), "`latency_ms`: must be a number"),
        (["name"], "my robot", "`name`: 'my robot' must be letters"),
        (["observations"], [], "`observations`: must be a list with at least one entry"),
        (["observations", 0, "topic"], "camera", "must be a full topic name"),
        (["observations", 0, "type"], "CompressedImage", "must look like geometry_msgs/msg/Twist"),
        (["observations", 0, "size"], [64], r"must be \[height, width\]"),
        (["observations", 0, "size"], None, "`size`|size"),
        (["observations", 0, "select"], ["data"], "unknown key"),
        (["observations", 0, "role"], "probe", "a camera is always an input"),
        (["observations", 0, "align"], None, "align`: this key is missing"),
        (["observations", 0, "align", "strategy"], "nearest", "must be one of hold, asof, drop"),
        (["observations", 0, "align", "timeline"], None, "timeline`: this key is missing"),
        (["observations", 0, "align", "tolerance_ms"], None, "tolerance_ms`: this key is missing"),
        (["observations", 0, "align", "tolerance_ms"], 0, "must be a number above 0"),
        (["observations", 1, "name"], "overhead", "two entries share one name"),
        (["observations", 1, "select"], "pose.position.x", "must be a list"),
        (["observations", 1, "select"], ["a", "a"], "stands twice"),
        (["observations", 1, "units"], ["m"], "has 1 entries but `select` has 2"),
        (["observations", 1, "role"], "spectator", "must be one of input, probe"),
        (["actions", 0, "low"], [-1.2], "has 1 entries but `select` has 2"),
        (["actions", 0, "low"], [2, -1], "must be below `high`"),
        (["actions", 0, "low"], None, "low`: this key is missing"),
        (["actions", 0, "max_rate"], [0, 1], "must be above 0"),
        (["actions", 0, "safety"], "stop", "must be one of none, hold, zeros"),
        (["actions", 0, "kind"], "analog", "must be one of continuous, binary, categorical"),
        (["actions", 1, "low"], [0], "unknown key"),
        (["actions", 2, "classes"], 1, "whole number of at least 2"),
        (["tasks", "names"], [], "must be a list"),
        (["reward", "reduce"], "mean", "must be one of last, sum"),
        (["episode", "start", "topic"], "episode", r"`episode.start.topic`"),
        (["episode", "max_s"], 0.1, "must last at least two ticks"),
        (["episode", "max_s"], -1, "must be a number above 0"),
        (["episode", "end"], {}, "`episode.end`: unknown key"),
        (["tasks"], "reach", "tasks. must be a mapping"),
    ],
)
def test_every_mistake_is_named(path, value, message):
    with pytest.raises(UserError, match=message):
        Contract.from_dict(edit(path, value), source="robot.yaml")


def test_a_contract_needs_a_camera():
    with pytest.raises(UserError, match="there is no camera"):
        Contract.from_dict(YARD | {"observations": YARD["observations"][1:]})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the contract .*No such file"),
        (b"a: [1", "not valid YAML at line"),
        (b"- 1", "the file must be a mapping"),
        (b"\xff\xfe\x00x", "cannot read the contract|not valid YAML"),
    ],
)
def test_unreadable_files(tmp_path, content, message):
    path = tmp_path / "robot.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        Contract.load(path)


def test_the_robot_process_can_load_it_without_heavy_imports():
    heavy = {"torch", "cv2", "av", "pyarrow", "rosbags"}
    code = f"import sys, d4_datasets.contract; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
