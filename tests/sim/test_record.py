"""Recorded bags hold what a robot would have logged, and lead back to the driven episodes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml

from d4_datasets.bags import find_bags, read_bag
from d4_datasets.errors import UserError
from d4_datasets.ingest import ingest
from d4_datasets.locks import held
from d4_datasets.windows import Windows
from d4_sim import record as record_module
from d4_sim.driver import drive, episode_seed, simulate
from d4_sim.record import Args, plan_sessions, record
from d4_sim.suite.disturb import MEASURED
from d4_sim.world import make_world

TOPICS = {
    "/camera/image_raw/compressed": "sensor_msgs/msg/CompressedImage",
    "/ground_truth/pose": "geometry_msgs/msg/PoseStamped",
    "/reward": "std_msgs/msg/Float64MultiArray",
    "/task": "std_msgs/msg/String",
    "/episode": "std_msgs/msg/Int64",
    "/terminal": "std_msgs/msg/Bool",
}
EPISODES, PER_BAG = 6, 2
MS = 1_000_000


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rec") / "bags"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_module, "EPISODES_PER_BAG", PER_BAG)
        record(Args(out=out, episodes=EPISODES, labelled=0.34, seed=0))
    return out


def messages(bag: Path) -> dict[str, list[tuple[int, Any]]]:
    out = defaultdict(list)
    for topic, stamp, msg in read_bag(bag):
        out[topic].append((stamp, msg))
    return out


def header_ns(msg: Any) -> int:
    return msg.header.stamp.sec * 10**9 + msg.header.stamp.nanosec


def labelled_bag(recording: Path) -> Path:
    return next(bag for bag in find_bags(recording) if "/cmd_vel" in messages(bag))


def test_topics_and_the_labelled_share(recording: Path) -> None:
    bags = find_bags(recording)
    assert [b.name for b in bags] == ["yard-0000", "yard-0001", "yard-0002"]
    topics = [read_bag(bag).bag.topics for bag in bags]
    assert all(TOPICS.items() <= found.items() for found in topics)
    for bag in bags:  # pictures differ between versions
        about = yaml.safe_load((bag / "metadata.yaml").read_text())["rosbag2_bagfile_information"]
        assert about["custom_data"]["mujoco"] == version("mujoco")
    with_commands = [found for found in topics if "/cmd_vel" in found]
    assert len(with_commands) == 1
    assert with_commands[0] == {**TOPICS, "/cmd_vel": "geometry_msgs/msg/Twist"}


@pytest.mark.parametrize(("labelled", "expected"), [(0.0, 0), (0.001, 1), (0.15, 9), (0.5, 30), (1.0, 60)])
def test_labelled_share_of_the_plan(labelled: float, expected: int) -> None:
    sessions = plan_sessions(Args(out=Path("x"), labelled=labelled, episodes=1490))
    assert sum(s.labelled for s in sessions) == expected
    assert sum(s.episodes for s in sessions) == 1490
    assert sessions == plan_sessions(Args(out=Path("x"), labelled=labelled, episodes=1490, jobs=4))


def test_stamps(recording: Path) -> None:
    for bag in find_bags(recording):
        stamps = [stamp for _, stamp, _ in read_bag(bag)]
        assert stamps == sorted(stamps)
        for topic, entries in messages(bag).items():
            assert (np.diff([stamp for stamp, _ in entries]) > 0).all(), topic
        pictures = messages(bag)["/camera/image_raw/compressed"]
        captured = np.array([header_ns(msg) for _, msg in pictures])
        received = np.array([stamp for stamp, _ in pictures])
        assert (np.diff(captured) > 0).all()
        assert (received - captured >= 2 * MS).all()
        assert (received - captured < 25 * MS).all()


def test_the_newest_frame_before_each_tick_is_that_ticks_frame(recording: Path) -> None:
    world = make_world("yard")
    period = world.contract.period_ns
    for index, bag in enumerate(find_bags(recording)):
        found = messages(bag)
        captured = np.array([header_ns(msg) for _, msg in found["/camera/image_raw/compressed"]])
        pictures = [msg for _, msg in found["/camera/image_raw/compressed"]]
        starts = [(stamp, msg.data) for stamp, msg in found["/episode"]]
        assert [number for _, number in starts] == [index * PER_BAG, index * PER_BAG + 1]
        shown = 0
        for start, number in starts:
            episode = drive(world, episode_seed(0, number))
            for k, frame in enumerate(episode.frames):
                tick = start + k * period
                newest = np.flatnonzero(captured <= tick)[-1]
                if tick - captured[newest] > 30 * MS:
                    continue  # this one was dropped
                bgr = cv2.imdecode(np.asarray(pictures[newest].data), cv2.IMREAD_COLOR)
                np.testing.assert_array_equal(bgr[..., ::-1], frame)
                shown += 1
        assert shown == len(pictures)


def test_commands_rewards_terminals_and_poses_are_the_driven_ones(recording: Path) -> None:
    bag = labelled_bag(recording)
    found, world = messages(bag), make_world("yard")
    contract = world.contract
    commands = found["/cmd_vel"]
    command_stamps = np.array([stamp for stamp, _ in commands])
    reward_stamps = np.array([stamp for stamp, _ in found["/reward"]])
    ends = [msg.data for _, msg in found["/terminal"]]
    row = 0
    for nth, (start, msg) in enumerate(found["/episode"]):
        episode = drive(world, episode_seed(0, msg.data))
        assert found["/task"][nth][1].data == contract.task_names[episode.task]
        assert ends[nth] == bool(episode.is_terminal[-1])
        ended = start + (len(episode.frames) - 1) * contract.period_ns
        assert ended - contract.period_ns < found["/terminal"][nth][0] <= ended
        assert not any(start - contract.period_ns < stamp <= start for stamp, _ in found["/terminal"])
        for k in range(len(episode.frames)):
            tick = start + k * contract.period_ns
            in_force = commands[np.flatnonzero(command_stamps <= tick + contract.latency_ns)[-1]][1].linear
            np.testing.assert_allclose([in_force.x, in_force.y], episode.action[k])
            arrived = np.flatnonzero((reward_stamps > tick - contract.period_ns) & (reward_stamps <= tick))
            assert len(arrived) == 1  # in particular not the end of the episode before
            np.testing.assert_allclose(found["/reward"][arrived[0]][1].data, episode.reward[k])
            position = found["/ground_truth/pose"][row][1].pose.position
            np.testing.assert_allclose([position.x, position.y], episode.vectors["pose"][k])
            row += 1


def test_an_episode_ends_before_its_next_tick_would_come(recording: Path) -> None:
    """The next start event falls within one period, so an importer makes no tick out of the pause."""
    world = make_world("yard")
    for bag in find_bags(recording):
        starts = [(stamp, msg.data) for stamp, msg in messages(bag)["/episode"]]
        for (start, number), (after, _) in pairwise(starts):
            last = start + (len(drive(world, episode_seed(0, number)).frames) - 1) * world.contract.period_ns
            assert last < after < last + world.contract.period_ns


def test_the_importer_gives_back_the_driven_episodes(recording: Path, tmp_path: Path) -> None:
    ingest([recording], make_world("yard").contract, tmp_path / "dataset")
    windows, driven = Windows(tmp_path / "dataset"), simulate(seed=0, episodes=EPISODES)
    np.testing.assert_array_equal(windows.episode_length, driven["episode_length"])
    np.testing.assert_array_equal(windows.reward, driven["reward"])
    np.testing.assert_array_equal(windows.is_terminal, driven["is_terminal"])
    np.testing.assert_array_equal(windows.task_index[windows.episode_start], driven["task"])
    np.testing.assert_array_equal(windows.vectors["pose"], driven["pose"])
    assert windows.labelled.sum() == PER_BAG
    known = windows.action_mask
    np.testing.assert_array_equal(known, np.repeat(windows.labelled, windows.episode_length))
    np.testing.assert_array_equal(windows.action[known], driven["action"][known])
    same = (np.asarray(windows.images["overhead"]) == driven["frames"]).all(axis=(1, 2, 3))
    assert same.mean() > 0.95  # the others were dropped, and the frame before them is held


def test_joint_states_and_a_controller_topic_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The arm: proprioception selected by joint name, an array command, and no terminal topic."""
    monkeypatch.setattr(record_module, "EPISODES_PER_BAG", PER_BAG)
    record(Args(out=tmp_path / "bags", world="arm", episodes=4, labelled=0.5, seed=2))
    assert "robot.yaml" in capsys.readouterr().out
    bag = next(bag for bag in find_bags(tmp_path / "bags") if len(read_bag(bag).bag.topics) == 7)
    first = messages(bag)["/joint_states"][0][1]
    assert first.name == ["shoulder", "elbow"]
    ingest([tmp_path / "bags"], make_world("arm").contract, tmp_path / "dataset")
    windows, driven = Windows(tmp_path / "dataset"), simulate(seed=2, episodes=4, world="arm")
    np.testing.assert_array_equal(windows.episode_length, driven["episode_length"])
    np.testing.assert_array_equal(windows.vectors["joints"], driven["joints"])
    np.testing.assert_array_equal(windows.vectors["tip"], driven["tip"])
    np.testing.assert_array_equal(windows.reward, driven["reward"])
    np.testing.assert_array_equal(windows.task_index[windows.episode_start], driven["task"])
    known = windows.action_mask
    assert known.mean() == 0.5
    np.testing.assert_array_equal(windows.action[known], driven["action"][known])
    assert not windows.is_terminal.any()


def test_two_looks_make_one_dataset(
    recording: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(record_module, "EPISODES_PER_BAG", PER_BAG)
    record(Args(out=tmp_path / "dusk", world="yard_dusk", episodes=2, seed=1))
    assert "robot.yaml" in capsys.readouterr().out
    ingest([recording, tmp_path / "dusk"], make_world("yard").contract, tmp_path / "dataset")
    windows, dusk = Windows(tmp_path / "dataset"), simulate(seed=1, episodes=2, world="yard_dusk")
    assert len(windows.episode_length) == EPISODES + 2
    assert windows.contract.name == "yard"
    pictures = np.asarray(windows.images["overhead"])
    starts = {pictures[start].tobytes() for start in windows.episode_start}
    assert all(dusk["frames"][start].tobytes() in starts for start in dusk["episode_start"])


def test_about_one_frame_in_a_hundred_is_dropped() -> None:
    world = make_world("yard")
    episode = drive(world, 1)
    log = record_module.SessionLog(world.contract, labelled=False, rng=np.random.default_rng(0))
    sent = sum(
        event.topic == "/camera/image_raw/compressed"
        for number in range(20)
        for event in log.events(episode, number, number * 10**10)
    )
    assert 0.97 < sent / (20 * len(episode.frames)) < 1.0


def test_finished_bags_are_kept(recording: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(record_module, "EPISODES_PER_BAG", PER_BAG)
    kept = {bag: (bag / "metadata.yaml").stat().st_mtime_ns for bag in find_bags(recording)}
    gone = recording / "yard-0001"
    content = (gone / "yard-0001.mcap").read_bytes()
    gone.rename(recording.parent / "elsewhere")
    (recording / ".tmp-yard-0001").mkdir()  # what a killed run leaves behind
    record(Args(out=recording, episodes=EPISODES, labelled=0.34, seed=0))
    assert "2 of 3 bags are there already" in capsys.readouterr().out
    assert (gone / "yard-0001.mcap").read_bytes() == content
    del kept[gone]
    assert all((bag / "metadata.yaml").stat().st_mtime_ns == stamp for bag, stamp in kept.items())
    assert not list(recording.glob(".tmp-*"))


def test_bags_of_a_disturbed_world_are_named_and_marked_as_others_are(tmp_path: Path) -> None:
    """They said no version of MuJoCo, and those under a latency report lay in folders named by its path."""
    report = "docs/results/robot/latency-20hz.json"
    (tmp_path / report).parent.mkdir(parents=True)
    (tmp_path / report).write_bytes(MEASURED.read_bytes())
    (session,) = plan_sessions(Args(out=tmp_path, world=f"yard+latency={tmp_path / report}", episodes=1))
    assert session.path.parent == tmp_path
    record_module.record_session(replace(session, world="yard+noise=0.1"))
    (bag,) = find_bags(tmp_path)
    about = yaml.safe_load((bag / "metadata.yaml").read_text())["rosbag2_bagfile_information"]
    assert about["custom_data"]["mujoco"] == version("mujoco")
    assert about["custom_data"]["world"] == "yard+noise=0.1"


def test_other_settings_are_refused(recording: Path) -> None:
    with pytest.raises(UserError, match="other settings"):
        record(Args(out=recording, episodes=EPISODES, labelled=0.34, seed=1))


@pytest.mark.parametrize(
    "wrong",
    [
        {"world": "moon"},
        {"world": "yard+noise=nan"},
        {"episodes": 0},
        {"labelled": 1.5},
        {"jobs": 0},
        {"seed": -1},
    ],
)
def test_unusable_settings_are_refused_before_anything_is_written(tmp_path: Path, wrong: dict) -> None:
    with pytest.raises(UserError):
        record(Args(out=tmp_path / "bags", **wrong))
    assert not (tmp_path / "bags").exists()


def test_two_recordings_in_one_folder_are_refused(recording: Path) -> None:
    args = Args(**json.loads((recording / "recording.json").read_text()), out=recording)
    with held(recording / ".lock", "-"), pytest.raises(UserError, match="another d4-record writes to"):
        record(args)


def test_ctrl_c_does_not_wait_for_the_bags_that_are_being_driven(tmp_path: Path) -> None:
    """A planner takes minutes for one, and two were at work with a third in their queue."""
    words = ["--episodes", "2000", "--jobs", "2", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "d4_sim.record", *words]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".tmp-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    began = {path.name for path in tmp_path.iterdir() if path.name.startswith("yard-")}
    child.send_signal(signal.SIGINT)
    assert child.communicate(timeout=20)[1] == "interrupted\n"
    assert child.returncode == 130
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith("yard-")} == began


def test_workers_end_with_a_recorder_that_is_killed(tmp_path: Path) -> None:
    """They waited for ever for its next bag."""
    words = ["--episodes", "2000", "--jobs", "2", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "d4_sim.record", *words]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".tmp-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    listed = subprocess.run(["pgrep", "-P", str(child.pid)], capture_output=True, text=True)
    workers = listed.stdout.split()
    child.kill()
    child.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workers
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_command_line_with_two_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "d4_sim.record", "--out", str(tmp_path / "bags"), "--episodes", "26"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [*command, "--jobs", "2"], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "2 bags, 26 episodes" in result.stdout
    assert len(find_bags(tmp_path / "bags")) == 2
    assert json.loads((tmp_path / "bags" / "recording.json").read_text())["episodes"] == 26
    wrong = subprocess.run([*command, "--labelled", "2"], env=environment, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: ")
    assert wrong.stderr.count("\n") == 1


def test_files_that_d4_did_not_make_are_left_alone(tmp_path: Path) -> None:
    """The contract of somebody's robot was replaced by that of the yard without a word."""
    contract = tmp_path / "robot.yaml"
    contract.write_text("name: precious\n")
    with pytest.raises(UserError, match=r"robot\.yaml is there already and not the contract of a world"):
        record(Args(out=tmp_path, episodes=1))
    assert contract.read_text() == "name: precious\n"
    assert not list(tmp_path.glob("yard-*"))
