"""d4-export: bags that d4-ingest makes the same dataset of, and LeRobotDatasets without our own columns."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mcap.reader import make_reader
from test_lerobot_source import own_episode

from d4_datasets import export_mcap
from d4_datasets.bags import Bag, new, read_bag
from d4_datasets.contract import Align, Contract
from d4_datasets.errors import UserError
from d4_datasets.export import export
from d4_datasets.ingest import ingest
from d4_datasets.lerobot import Dataset, LeRobotWriter

ROBOT = """
name: toy
rate_hz: 10
latency_ms: 40
observations:
  - {name: cam, topic: /cam, type: sensor_msgs/msg/CompressedImage, size: [8, 12],
     align: {strategy: hold, timeline: header, tolerance_ms: 150}}
  - {name: side, topic: /side, type: sensor_msgs/msg/Image, size: [7, 5],
     align: {strategy: hold, timeline: header, tolerance_ms: 150}}
  - {name: joints, topic: /joint_states, type: sensor_msgs/msg/JointState,
     select: ["position[name=hip]", "position[name=knee]"],
     align: {strategy: hold, timeline: header, tolerance_ms: 150}}
  - {name: load, topic: /joint_states, type: sensor_msgs/msg/JointState, select: ["effort[name=knee]"],
     role: probe, align: {strategy: asof, timeline: receive, tolerance_ms: 20}}
actions:
  - {name: base, topic: /cmd_vel, type: geometry_msgs/msg/Twist, select: [linear.x, angular.z],
     low: [-1, -1], high: [1, 1], safety: zeros, align: {strategy: hold, timeline: receive, tolerance_ms: 20}}
  - {name: legs, topic: /legs, type: trajectory_msgs/msg/JointTrajectory,
     select: ["points[0].positions[1]", "points[0].positions[0]"],
     low: [-1, -1], high: [1, 1], safety: hold, align: {strategy: drop, timeline: header, tolerance_ms: 500}}
tasks: {topic: /task, type: std_msgs/msg/String, names: [red, blue]}
reward: {topic: /reward, type: std_msgs/msg/Float64MultiArray}
episode: {start: {topic: /episode, type: std_msgs/msg/Int64},
          terminal: {topic: /terminal, type: std_msgs/msg/Bool}}
"""


def robot(**changes):
    raw = yaml.safe_load(ROBOT) | changes
    return Contract.from_dict({key: value for key, value in raw.items() if value is not None})


def change(kind, name, /, **changes):
    """The contract's entries of a kind with one of them changed."""
    items = yaml.safe_load(ROBOT)[kind]
    return {kind: [item | changes if item["name"] == name else item for item in items]}


def item(spec, length, seed, **columns):
    """An episode that a recording can be of: one task, over at its end."""
    episode = own_episode(spec, length, seed)
    episode.task_index[:] = seed % len(spec.task_names)
    episode.is_terminal[:] = (np.arange(length) == length - 1) & bool(seed % 3)
    if spec.reward is None:
        episode.reward[:] = 0
    if spec.episode.terminal is None:
        episode.is_terminal[:] = False
    for name, values in columns.items():
        setattr(episode, name, np.asarray(values))
    return episode


def write(root, spec, episodes):
    with LeRobotWriter(root, spec) as writer:
        for episode in episodes:
            writer.add_episode(episode)
    return root


def differences(one, other):
    """Names of what differs between two datasets, episode by episode; frames to the bit."""
    one, other = Dataset(one), Dataset(other)
    assert one.episodes.num_rows == other.episodes.num_rows
    found = set()
    for number in range(one.episodes.num_rows):
        mine, theirs = one.columns(number), other.columns(number)
        found |= {name for name in mine if not np.array_equal(mine[name], theirs.get(name))}
        for camera in one.contract.images:
            frames = zip(one.frames(camera.name, number), other.frames(camera.name, number), strict=True)
            found |= set() if all(np.array_equal(a, b) for a, b in frames) else {camera.name}
    return found


def again(folder, spec, episodes, **options):
    """Write, export as bags, ingest these; returns (what differs, what export said)."""
    write(folder / "own", spec, episodes)
    said = export(folder / "own", folder / "bags", "mcap", **options)
    ingest([folder / "bags"], spec, folder / "again")
    return differences(folder / "own", folder / "again"), said


# ---- bags


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"episode": None},
        {"reward": None, "tasks": None},
        {"latency_ms": 0},
        {"rate_hz": 29.97},
        {"episode": {"max_s": 1}},
    ],
)
def test_bags_give_the_same_dataset_again(tmp_path, changes):
    spec = robot(**changes)
    found, said = again(tmp_path, spec, [item(spec, 3 + n, n) for n in range(5)])
    assert (found, said) == (set(), [])
    entries = [Dataset(tmp_path / name).d4["episodes"] for name in ("own", "again")]
    for before, after in zip(*entries, strict=True):
        assert [before[name] for name in ("frames", "labelled", "terminal")] == [
            after[name] for name in ("frames", "labelled", "terminal")
        ]
        assert after["source"].startswith("episode_00000")


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.integers(2, 9), min_size=1, max_size=3),
    latency_ms=st.sampled_from([0, 37, 250]),
    starts=st.booleans(),
    tolerance_ms=st.sampled_from([20, 50, 150]),
    seed=st.integers(0, 2**30),
)
def test_any_dataset_that_bags_can_say_comes_back(lengths, latency_ms, starts, tolerance_ms, seed):
    cam = {"align": {"strategy": "hold", "timeline": "header", "tolerance_ms": tolerance_ms}}
    episode = None if not starts else robot().to_dict()["episode"]
    spec = robot(latency_ms=latency_ms, episode=episode, **change("observations", "cam", **cam))
    with tempfile.TemporaryDirectory() as folder:
        episodes = [item(spec, length, seed + n) for n, length in enumerate(lengths)]
        assert again(Path(folder), spec, episodes) == (set(), [])


def test_a_bag_is_what_foxglove_and_ros_expect(tmp_path):
    spec = robot()
    write(tmp_path / "own", spec, [item(spec, 4, 1, action_mask=[True, False, True, True])])
    export(tmp_path / "own", tmp_path / "bags", "mcap")
    path = tmp_path / "bags/episode_000000/episode_000000.mcap"
    with path.open("rb") as file:
        reader = make_reader(file)
        summary = reader.get_summary()
        assert reader.get_header().profile == "ros2"
    assert summary.statistics.message_count > 0
    schemas = {c.topic: summary.schemas[c.schema_id] for c in summary.channels.values()}
    assert {schema.encoding for schema in schemas.values()} == {"ros2msg"}
    assert {topic: schema.name for topic, schema in schemas.items()} == {
        entry["topic"]: entry["type"]
        for entry in [*spec.to_dict()["observations"], *spec.to_dict()["actions"]]
    } | {
        "/task": "std_msgs/msg/String", "/reward": "std_msgs/msg/Float64MultiArray",
        "/episode": "std_msgs/msg/Int64", "/terminal": "std_msgs/msg/Bool",
    }  # fmt: skip
    messages = [(topic, stamp, msg) for topic, stamp, msg in read_bag(path.parent)]
    assert [stamp for _, stamp, _ in messages] == sorted(stamp for _, stamp, _ in messages)
    of = {topic: [msg for t, _, msg in messages if t == topic] for topic in schemas}
    assert {topic: len(found) for topic, found in of.items()} == {
        "/cam": 4, "/side": 4, "/joint_states": 4, "/cmd_vel": 3, "/legs": 3, "/task": 1, "/reward": 4,
        "/episode": 1, "/terminal": 4,
    }  # fmt: skip
    assert of["/joint_states"][0].name == ["hip", "knee"]
    assert len(of["/joint_states"][0].effort) == 2
    assert of["/cam"][0].format == "rgb8; png compressed bgr8"
    assert of["/side"][0].encoding == "rgb8"
    assert of["/task"][0].data == "blue"


def test_jpeg_is_smaller_and_only_the_pictures_differ(tmp_path):
    spec = robot(**change("observations", "cam", size=[64, 64]))
    episodes = [item(spec, 4, 1)]
    episodes[0].images["cam"][:] = np.arange(64, dtype=np.uint8)[:, None]
    found, said = again(tmp_path, spec, episodes, images="jpeg")
    assert found <= {"cam"}
    assert said == []


def test_some_episodes_can_be_chosen(tmp_path):
    spec = robot()
    write(tmp_path / "own", spec, [item(spec, 3, n) for n in range(4)])
    export(tmp_path / "own", tmp_path / "bags", "mcap", episodes=[3, 1])
    assert sorted(path.name for path in (tmp_path / "bags").iterdir()) == ["episode_000001", "episode_000003"]


@pytest.mark.parametrize("tolerance_ms", [250, 1000, None])
def test_a_command_that_was_held_ends_where_it_did(tmp_path, tolerance_ms):
    """A recording in which commands stopped: the last one holds until its tolerance, and no longer."""
    rule = {"strategy": "hold", "timeline": "receive"} | (
        {"tolerance_ms": tolerance_ms} if tolerance_ms else {}
    )
    spec = robot(actions=[change("actions", "base", align=rule)["actions"][0]], latency_ms=0)
    action = np.random.default_rng(0).uniform(-1, 1, (16, 2)).astype(np.float32)
    held = 4 + (tolerance_ms or 0) // 100  # the last command came at tick 4
    action[4:] = action[4]
    mask = np.arange(16) <= held if tolerance_ms else np.ones(16, bool)
    found, said = again(tmp_path, spec, [item(spec, 16, 1, action=action, action_mask=mask)])
    assert (found, said) == (set(), [])


def test_what_bags_cannot_say_is_said(tmp_path):
    """An action unknown for one tick within what the contract holds on; a second terminal; a changed task."""
    rule = {"strategy": "hold", "timeline": "receive"}
    spec = robot(actions=[change("actions", "base", align=rule)["actions"][0]])
    mask = np.array([True, False, True, True])
    over = np.array([False, True, False, True])
    write(
        tmp_path / "own",
        spec,
        [
            item(spec, 4, 1, action_mask=mask),
            item(spec, 4, 1, action_mask=mask),
            item(spec, 4, 2, is_terminal=over),
            item(spec, 4, 1, action_mask=mask | True, task_index=[0, 1, 1, 1]),
        ],
    )
    assert export(tmp_path / "own", tmp_path / "bags", "mcap") == [
        "action would be read otherwise than it is (2 episodes)",
        "action_mask would be read otherwise than it is (2 episodes)",
        "read again it would not be one episode of the same length (1 episode)",
        "task_index would be read otherwise than it is (1 episode)",
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            change("observations", "load", type="mine_msgs/msg/Load", topic="/load"),
            "load is left out: /load is of the unknown type",
        ),
        (change("observations", "load", select=["effort.knee"]), "load is left out: 'effort.knee'"),
        (
            change(
                "observations", "load", topic="/cmd_vel", type="geometry_msgs/msg/Twist", select=["linear.y"]
            ),
            "load and action.base share /cmd_vel at different times",
        ),
        (
            change(
                "actions",
                "base",
                type="geometry_msgs/msg/Pose2D",
                select=["x", "y"],
                align={"strategy": "hold", "timeline": "header", "tolerance_ms": 90},
            ),
            "/cmd_vel has no header",
        ),
        (
            change("actions", "base", type="std_msgs/msg/Int8MultiArray", select=["data[0]", "data[1]"]),
            "the fields of action.base cannot hold its numbers exactly",
        ),
        (
            change("actions", "base", low=[5, 5], high=[6, 6]),
            "d4-ingest would refuse it: the bag: /cmd_vel at",
        ),
        (
            {"reward": {"topic": "/r", "type": "std_msgs/msg/Float64"}},
            "signal.reward is left out: 'data' is a single number",
        ),
        (
            change("observations", "side", topic="/cam", type="sensor_msgs/msg/CompressedImage"),
            "side is left out: /cam carries the pictures of cam",
        ),
        (
            change("observations", "cam", type="d4_interfaces/msg/Latents"),
            "cam is left out: /cam is of type d4_",
        ),
    ],
)
def test_what_has_no_place_in_a_message_is_said(tmp_path, changes, expected):
    spec = robot(**changes)
    write(tmp_path / "own", spec, [item(spec, 4, 1)])
    assert expected in " | ".join(export(tmp_path / "own", tmp_path / "bags", "mcap"))
    assert Bag(tmp_path / "bags/episode_000000").topics


def test_a_start_too_early_for_a_bag_is_moved(tmp_path):
    spec = robot()
    episode = item(spec, 4, 1)
    episode.start_ns = 0
    assert again(tmp_path, spec, [episode]) == (set(), [])


def test_numbers_texts_and_arrays_are_put_into_messages():
    for kind, path, value, expected in [
        ("std_msgs/msg/String", "data", "red", "red"),
        ("std_msgs/msg/UInt8", "data", 3, 3),
        ("std_msgs/msg/Bool", "data", True, True),
        ("std_msgs/msg/Float64MultiArray", "data[1]", [0.5], 0.5),
        ("geometry_msgs/msg/TwistStamped", "header.frame_id", "base", "base"),
        ("sensor_msgs/msg/Joy", "axes", [0.5, 1.0], [0.5, 1.0]),
    ]:
        message = new(kind)
        export_mcap.put(message, path, value)
        assert np.array_equal(export_mcap.fields.get(message, path), expected)
    with pytest.raises(UserError, match="single number"):
        export_mcap.put(new("std_msgs/msg/Float64"), "data", [1.0, 2.0])


def test_commands_are_placed_where_they_are_too_old_in_time():
    sent = np.arange(6) * 100
    ones = np.ones((6, 1))
    known = np.array([True, True, True, False, False, True])
    stamps, rows = export_mcap.command_stamps(sent, known, ones, Align("hold", "receive", 150e-6), 100)
    assert rows.tolist() == [0, 1, 2, 5]
    assert stamps.tolist() == [0, 100, 174, 500]  # older than 150 at 300 and the slack of 25
    stamps, _ = export_mcap.command_stamps(sent, known, ones, Align("drop", "receive", 1.0), 100)
    assert stamps.tolist() == [0, 100, 200, 500]


# ---- plain LeRobotDatasets


def test_a_plain_dataset_has_only_what_lerobot_knows(tmp_path):
    spec = robot()
    masks = [[True] * 6, [True, True, False, True, True, True], [False] * 6, [True, False] * 3]
    episodes = [item(spec, 6, n, action_mask=mask) for n, mask in enumerate(masks)]
    write(tmp_path / "own", spec, episodes)
    said = export(tmp_path / "own", tmp_path / "plain", "lerobot")
    assert said == [
        "13 of 24 frames have no known action, or stand alone, and are left out",
        "probes are left out: load",
    ]
    info = json.loads((tmp_path / "plain/meta/info.json").read_text())
    columns = ["observation.state", "action", "next.reward", "next.done"]
    usual = ["timestamp", "frame_index", "episode_index", "index", "task_index"]
    pictures = ["observation.images.cam", "observation.images.side"]
    assert sorted(info["features"]) == sorted([*columns, *usual, *pictures])
    assert info["features"]["observation.state"]["names"] == [
        "joints.position[name=hip]",
        "joints.position[name=knee]",
    ]
    table = pq.read_table(tmp_path / "plain/data/chunk-000/file-000.parquet")
    assert table.column_names == [*columns, *usual]
    assert info["total_frames"] == table.num_rows == 11
    assert not (tmp_path / "plain/meta/d4.json").exists()
    stats = json.loads((tmp_path / "plain/meta/stats.json").read_text())
    assert sorted(stats) == sorted(info["features"])
    lengths = pq.read_table(tmp_path / "plain/meta/episodes")["length"].to_pylist()
    assert lengths == [6, 2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own", "plain"]


def test_a_plain_dataset_is_read_again_by_the_same_contract(tmp_path):
    observations = [entry for entry in yaml.safe_load(ROBOT)["observations"] if entry["name"] != "load"]
    spec = robot(observations=observations, tasks=None)
    episodes = [item(spec, 3 + n, n, action_mask=[True] * (3 + n)) for n in range(3)]
    for episode in episodes:
        episode.reward[0] = 0  # nothing comes before a first row
    write(tmp_path / "own", spec, episodes)
    export(tmp_path / "own", tmp_path / "plain", "lerobot")
    ingest([tmp_path / "plain"], spec, tmp_path / "again")
    assert differences(tmp_path / "own", tmp_path / "again") == set()


# ---- the command


def test_mistakes(tmp_path):
    spec = robot()
    write(tmp_path / "own", spec, [item(spec, 3, 0, action_mask=[False] * 3)])
    for format_ in ("mcap", "lerobot"):
        with pytest.raises(UserError, match="own exists already"):
            export(tmp_path / "own", tmp_path / "own", format_)
    with pytest.raises(UserError, match="is not a dataset of d4-ingest"):
        export(tmp_path, tmp_path / "out", "mcap")
    with pytest.raises(UserError, match="no episode 1; they are numbered 0 to 0"):
        export(tmp_path / "own", tmp_path / "out", "mcap", episodes=[1])
    with pytest.raises(UserError, match="no stretch of known actions"):
        export(tmp_path / "own", tmp_path / "out", "lerobot")
    one = robot(observations=yaml.safe_load(ROBOT)["observations"][:1])
    write(tmp_path / "latents", one, [own_episode(one, 3, 0, (3, 2))])
    with pytest.raises(UserError, match="holds latents of"):
        export(tmp_path / "latents", tmp_path / "out", "mcap")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latents", "own"]


def test_the_command_says_what_it_made_and_what_it_could_not(tmp_path):
    spec = robot(**change("observations", "load", type="mine_msgs/msg/Load", topic="/load"))
    write(tmp_path / "own", spec, [item(spec, 3, 0)])
    command = [sys.executable, "-m", "d4_datasets.export", "own", "--format", "mcap", "--out", "bags"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)
    assert done.stderr.startswith("warning: load is left out")
    assert "bags/episode_000000/episode_000000.mcap" in done.stdout
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2, "error: bags exists already; choose another name or remove it\n"
    )  # fmt: skip
