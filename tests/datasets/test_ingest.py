"""d4-ingest end to end: what stands in the bags stands in the dataset, and every mistake is one sentence."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from recordings import RECORDINGS, needs

from d4_datasets import bags, ingest, messages
from d4_datasets.bags import BagWriter, new, read_bag
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_datasets.lerobot import Dataset

T0 = 1_700_000_000_000_000_000
TICK = 100_000_000
MS = 1_000_000
POSE, TWIST, ARRAY = (
    "geometry_msgs/msg/PoseStamped",
    "geometry_msgs/msg/Twist",
    "std_msgs/msg/Float64MultiArray",
)
COMPRESSED, BOOL = "sensor_msgs/msg/CompressedImage", "std_msgs/msg/Bool"

ROBOT = """
name: toy
rate_hz: 10
latency_ms: 40
observations:
  - {name: cam, topic: /cam, type: sensor_msgs/msg/CompressedImage, size: [8, 12],
     align: {strategy: hold, timeline: header, tolerance_ms: 150}}
  - {name: pose, topic: /pose, type: geometry_msgs/msg/PoseStamped, select: [pose.position.x], role: probe,
     align: {strategy: hold, timeline: header, tolerance_ms: 150}}
actions:
  - {name: base, topic: /cmd_vel, type: geometry_msgs/msg/Twist, select: [linear.x, angular.z],
     low: [-1, -2], high: [1, 2], safety: zeros, align: {strategy: hold, timeline: receive, tolerance_ms: 90}}
  - {name: grip, topic: /grip, type: std_msgs/msg/Bool, select: [data], kind: binary, safety: hold,
     align: {strategy: hold, timeline: receive}}
tasks: {topic: /task, type: std_msgs/msg/String, select: data, names: [red, blue]}
reward: {topic: /reward, type: std_msgs/msg/Float64MultiArray, select: data, reduce: last}
episode: {start: {topic: /episode, type: std_msgs/msg/Int64, select: data},
          terminal: {topic: /terminal, type: std_msgs/msg/Bool, select: data}}
"""


def robot(**changes):
    raw = yaml.safe_load(ROBOT) | changes
    return Contract.from_dict({key: value for key, value in raw.items() if value is not None})


def picture(k):
    return np.random.default_rng(k).integers(0, 256, (8, 12, 3), np.uint8)


def command(x, z=0.0):
    msg = new(TWIST)
    msg.linear.x, msg.angular.z = x, z
    return msg


def pose(stamp, x):
    msg = new(POSE, header=bags.header(stamp))
    msg.pose.position.x = x
    return msg


class Log:
    """A bag in the making: messages in any order, some to be changed or left out, then written."""

    def __init__(self):
        self.items = []

    def add(self, topic, kind, stamp, msg):
        self.items.append([topic, kind, stamp, msg])

    def frame(self, k, stamp, x=None, delay=3 * MS):
        """Frame number `k` and the pose, captured at `stamp` and received a little later."""
        self.add("/cam", COMPRESSED, stamp + delay, bags.compressed_image(picture(k), stamp))
        self.add("/pose", POSE, stamp + delay, pose(stamp, float(k) if x is None else x))

    def without(self, *topics):
        self.items = [item for item in self.items if item[0] not in topics]
        return self

    def write(self, path):
        with BagWriter(path) as writer:
            for topic, kind, stamp, msg in sorted(self.items, key=lambda item: item[2]):
                writer.write(topic, kind, stamp, msg)
        return path


def drive(episodes=2, length=6, t0=T0, first=0):
    """Episodes back to back: each tick a frame and rewards, and 40 ms later the command in answer."""
    log, k = Log(), first
    for number in range(episodes):
        start = t0 + number * length * TICK
        log.add("/episode", "std_msgs/msg/Int64", start, new("std_msgs/msg/Int64", data=number))
        task = new("std_msgs/msg/String", data=["red", "blue"][number % 2])
        log.add("/task", "std_msgs/msg/String", start + 5 * MS, task)
        log.add("/grip", BOOL, start, new(BOOL, data=bool(number % 2)))
        for step in range(length):
            stamp = start + step * TICK
            log.frame(k, stamp)
            log.add("/reward", ARRAY, stamp, bags.float64_array([step, -step]))
            log.add("/cmd_vel", TWIST, stamp + 40 * MS, command(step / 100, k / 100))
            k += 1
        log.add("/terminal", BOOL, start + (length - 1) * TICK, new(BOOL, data=True))
    return log


def take(tmp_path, *logs, contract=None, **options):
    """Write the logs as bags, ingest them; returns (dataset, summary)."""
    for number, log in enumerate(logs):
        log.write(tmp_path / f"bags/bag{number}")
    summary = ingest.ingest([tmp_path / "bags"], contract or robot(), tmp_path / "data", **options)
    return Dataset(tmp_path / "data"), summary


def frames(dataset, episode):
    """Numbers of the frames of an episode, found by comparing pixels."""
    known = {picture(k).tobytes(): k for k in range(40)}
    return [known[frame.tobytes()] for frame in dataset.frames("cam", episode)]


# ---- what comes out


def test_everything_in_the_bag_is_in_the_dataset_at_its_tick(tmp_path):
    dataset, summary = take(tmp_path, drive())
    assert (summary.bags, summary.episodes, summary.frames, summary.labelled) == (1, 2, 12, 12)
    assert summary.warnings == []
    for number in range(2):
        columns = dataset.columns(number)
        step, k = np.arange(6), np.arange(6) + 6 * number
        assert frames(dataset, number) == k.tolist()
        np.testing.assert_array_equal(columns["observation.pose"], k)
        np.testing.assert_allclose(
            columns["action"], np.stack([step / 100, k / 100, step * 0 + number], 1), rtol=1e-6
        )
        assert columns["action_mask"].all()
        np.testing.assert_array_equal(columns["reward"], np.stack([step, -step], 1))
        assert columns["task_index"].tolist() == [number] * 6
        assert columns["is_terminal"].tolist() == [False] * 5 + [True]
    assert dataset.d4["episodes"][1] == {
        "source": "bag0",
        "start_ns": T0 + 6 * TICK,
        "frames": 6,
        "labelled": 6,
        "stale": 0,
        "terminal": True,
    } | {"dropped": 0, "drive": 1}
    assert dataset.d4["contract_hash"] == robot().hash
    assert sorted(os.listdir(tmp_path)) == ["bags", "data"]


@pytest.mark.parametrize(("late_ms", "counts"), [(0, True), (1, True), (5, True), (5.000001, False)])
def test_the_label_is_what_is_in_force_after_the_latency(tmp_path, late_ms, counts):
    """A command sent for its moment is recorded a little after it, and must not slip to the next tick."""
    log = drive(1)
    for item in log.items:
        if item[0] == "/cmd_vel":
            item[2] += round(late_ms * 1e6)
    dataset, _ = take(tmp_path, log)
    assert (
        dataset.columns(0)["action_mask"].all() == counts
    )  # the one before is beyond its tolerance of 90 ms
    assert dataset.columns(0)["action"].any() == counts


def test_video_without_commands_is_unlabelled(tmp_path):
    dataset, summary = take(tmp_path, drive().without("/cmd_vel", "/grip"))
    assert summary.labelled == 0
    assert summary.frames == 12
    assert not dataset.columns(1)["action_mask"].any()
    assert dataset.d4["episodes"][0]["labelled"] == 0


def test_a_stretch_without_commands_is_masked(tmp_path):
    log = drive(1)
    log.items = [item for item in log.items if item[0] != "/cmd_vel" or not 2 <= (item[2] - T0) // TICK < 4]
    columns = take(tmp_path, log)[0].columns(0)
    assert columns["action_mask"].tolist() == [True, True, False, False, True, True]
    assert not columns["action"][2:4].any()


def test_a_gap_in_any_observation_splits_the_episode(tmp_path):
    log = drive(1, length=12)
    log.items = [item for item in log.items if item[0] != "/pose" or (item[2] - T0) // TICK not in (4, 5, 6)]
    dataset, _ = take(tmp_path, log)
    # The pose of tick 3 is 100 ms old at tick 4, which is within tolerance, and too old at 5 and 6.
    assert [frames(dataset, number) for number in range(2)] == [[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]]
    assert [entry["dropped"] for entry in dataset.d4["episodes"]] == [2, 0]
    assert [entry["terminal"] for entry in dataset.d4["episodes"]] == [False, True]
    assert dataset.columns(1)["is_first"].tolist() == [True, False, False, False, False]


def test_a_long_recording_is_cut_into_episodes(tmp_path):
    contract = robot(episode=robot().to_dict()["episode"] | {"max_s": 0.4})
    dataset, _ = take(tmp_path, drive(1, length=10), contract=contract)
    assert [frames(dataset, number) for number in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]
    assert [entry["terminal"] for entry in dataset.d4["episodes"]] == [False, False, True]
    assert [(e["dropped"], e["drive"]) for e in dataset.d4["episodes"]] == [(0, 0)] * 3


def test_a_repeated_frame_is_counted_as_stale(tmp_path):
    log = drive(1)
    log.items = [item for item in log.items if item[0] != "/cam" or (item[2] - T0) // TICK != 3]
    dataset, _ = take(tmp_path, log)
    assert frames(dataset, 0) == [0, 1, 2, 2, 4, 5]
    assert dataset.d4["episodes"][0]["stale"] == 1


def test_without_start_events_a_bag_is_an_episode_and_jitter_does_no_harm(tmp_path):
    log = Log()
    for k, jitter in enumerate([0, 30, -40, 20, -10, 45, 0]):
        log.frame(k, T0 + k * TICK + jitter * MS)
    contract = robot(tasks=None, reward=None, episode=None)
    dataset, _ = take(tmp_path, log, contract=contract)
    assert frames(dataset, 0) == list(range(7))
    assert dataset.d4["episodes"][0]["start_ns"] == T0 + TICK // 2
    assert dataset.columns(0)["reward"].tolist() == [0.0] * 7
    assert dataset.contract.task_names == ("toy",)


def test_frames_received_out_of_order_are_put_in_order_of_capture(tmp_path):
    log = drive(1)
    for item in log.items:
        if item[0] == "/cam" and (item[2] - T0) // TICK == 2:
            item[2] += 150 * MS
    assert frames(take(tmp_path, log)[0], 0) == [0, 1, 2, 3, 4, 5]


def test_frames_between_ticks_are_never_decoded(tmp_path):
    log = drive(1)
    for k in range(5):  # a camera faster than the contract, whose extra frames are damaged
        stamp = T0 + k * TICK + 50 * MS
        broken = new(COMPRESSED, header=bags.header(stamp), format="jpeg", data=np.zeros(9, np.uint8))
        log.add("/cam", COMPRESSED, stamp, broken)
    assert frames(take(tmp_path, log)[0], 0) == list(range(6))


def test_two_cameras_on_one_topic_and_a_vector_shared_with_actions(tmp_path):
    raw = yaml.safe_load(ROBOT)
    raw["observations"].append(raw["observations"][0] | {"name": "small", "size": [4, 6]})
    speed = {key: raw["actions"][0][key] for key in ("topic", "type", "select", "align")}
    raw["observations"].append(speed | {"name": "speed"})
    dataset, _ = take(tmp_path, drive(1), contract=Contract.from_dict(raw))
    # As an observation the command at a tick is the one sent before it, and before the first there is none.
    assert frames(dataset, 0) == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(dataset.columns(0)["observation.speed"][:, 0], np.arange(5) / 100)
    small = np.stack(list(dataset.frames("small", 0)))
    np.testing.assert_array_equal(small, [messages.resize(picture(k), (4, 6)) for k in range(1, 6)])


def test_several_rewards_in_a_tick(tmp_path):
    log = drive(1)
    for step in range(6):
        log.add("/reward", ARRAY, T0 + step * TICK - 10 * MS, bags.float64_array([10, 20]))
    last = take(tmp_path, log)[0].columns(0)["reward"]
    np.testing.assert_array_equal(last, [[step, -step] for step in range(6)])
    shutil.rmtree(tmp_path / "data")
    total = robot(reward=robot().to_dict()["reward"] | {"reduce": "sum"})
    ingest.ingest([tmp_path / "bags"], total, tmp_path / "data")
    # What came before the start event is not part of the episode.
    expected = [[step + 10 * (step > 0), -step + 20 * (step > 0)] for step in range(6)]
    np.testing.assert_array_equal(Dataset(tmp_path / "data").columns(0)["reward"], expected)


def test_unused_streams_and_signals_are_said(tmp_path):
    _, summary = take(tmp_path, drive(1).without("/reward", "/task"))
    assert any("has no topic /reward, which gives the reward" in text for text in summary.warnings)
    assert any("has no topic /task, which gives the tasks" in text for text in summary.warnings)


def test_clocks_that_disagree_are_said(tmp_path):
    log = Log()
    for k in range(5):
        log.frame(k, T0 + k * TICK, delay=7 * 10**9)
    _, summary = take(tmp_path, log, contract=robot(tasks=None, reward=None, episode=None))
    assert any(
        "header stamps of /cam are 7.0 s away from the time of reception" in w for w in summary.warnings
    )


# ---- running it again, and side by side


def test_a_second_run_adds_only_what_is_new(tmp_path):
    _, first = take(tmp_path, drive(1))
    stamp = (tmp_path / "data/meta/info.json").stat().st_mtime_ns
    again = ingest.ingest([tmp_path / "bags"], robot(), tmp_path / "data")
    assert (first.bags, again.bags, again.skipped) == (1, 0, 1)
    assert (tmp_path / "data/meta/info.json").stat().st_mtime_ns == stamp
    drive(2, t0=T0 + 10**12, first=6).write(tmp_path / "bags/later")
    more = ingest.ingest([tmp_path / "bags"], robot(), tmp_path / "data")
    assert (more.bags, more.skipped, more.episodes) == (1, 1, 2)
    dataset = Dataset(tmp_path / "data")
    assert [frames(dataset, number)[0] for number in range(3)] == [0, 6, 12]
    assert [entry["name"] for entry in dataset.d4["sources"]] == ["bag0", "later"]
    other = robot(latency_ms=50)
    with pytest.raises(UserError, match="made with another contract"):
        ingest.ingest([tmp_path / "bags"], other, tmp_path / "data")
    assert sorted(os.listdir(tmp_path)) == ["bags", "data"]


def test_a_bag_that_changed_is_said(tmp_path):
    take(tmp_path, drive(1))
    shutil.rmtree(tmp_path / "bags")
    _, summary = take(tmp_path, drive(2))
    assert any("is in the dataset already with another size or time" in text for text in summary.warnings)


def test_a_bag_that_gives_nothing_is_remembered(tmp_path):
    empty = drive(1).without("/episode")
    empty.add("/episode", "std_msgs/msg/Int64", T0 + 10**12, new("std_msgs/msg/Int64"))
    dataset, summary = take(tmp_path, drive(1), empty)
    assert "bag1 gave no episode" in summary.warnings
    assert len(dataset.d4["sources"]) == 2
    assert ingest.ingest([tmp_path / "bags"], robot(), tmp_path / "data").skipped == 2
    shutil.rmtree(tmp_path / "bags/bag0")
    with pytest.raises(UserError, match="no episode came out of 1 bags"):
        ingest.ingest([tmp_path / "bags"], robot(), tmp_path / "fresh")


def test_many_processes_give_the_same_dataset(tmp_path):
    logs = [drive(2, t0=T0 + n * 10**12, first=n * 12) for n in range(3)]
    one, _ = take(tmp_path, *logs)
    ingest.ingest([tmp_path / "bags"], robot(), tmp_path / "parallel", jobs=2)
    two = Dataset(tmp_path / "parallel")
    assert two.d4 == one.d4
    for number in range(6):
        assert frames(two, number) == frames(one, number)
        for name, values in one.columns(number).items():
            np.testing.assert_array_equal(two.columns(number)[name], values)


def command_line(tmp_path, *extra):
    (tmp_path / "robot.yaml").write_text(ROBOT)
    return [
        *(sys.executable, "-m", "d4_datasets.ingest", str(tmp_path / "bags")),
        *("--contract", str(tmp_path / "robot.yaml"), "--out", str(tmp_path / "data"), *extra),
    ]


def children(pid):
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []


@pytest.mark.parametrize(("how", "jobs"), [(signal.SIGKILL, 1), (signal.SIGKILL, 2), (signal.SIGINT, 2)])
def test_a_kill_in_the_middle_leaves_nothing_half_written_and_the_next_run_goes_on(tmp_path, how, jobs):
    for n in range(8):
        drive(2, length=25, t0=T0 + n * 10**12).write(tmp_path / f"bags/bag{n:02d}")
    process = subprocess.Popen(command_line(tmp_path, "--jobs", str(jobs)), stderr=subprocess.PIPE, text=True)
    parts = tmp_path / ".tmp-data-parts"
    deadline = time.monotonic() + 200
    while not list(parts.glob("[!.]*/part.json")) and time.monotonic() < deadline:
        time.sleep(0.002)
    workers = children(process.pid)
    process.send_signal(how)
    stderr = process.communicate(timeout=200)[1]
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130}[how]
    assert "Traceback" not in stderr
    assert not (tmp_path / "data").exists()
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [pid for pid in workers if os.path.exists(f"/proc/{pid}")]  # no orphans
    finished = {path.parent: path.stat().st_mtime_ns for path in parts.glob("[!.]*/part.json")}
    assert finished
    taken = []
    real = ingest._read_part
    ingest._read_part = lambda part: (
        taken.append((part, (part / "part.json").stat().st_mtime_ns)),
        real(part),
    )[1]
    try:
        summary = ingest.ingest([tmp_path / "bags"], robot(), tmp_path / "data")
    finally:
        ingest._read_part = real
    assert summary.frames == 400
    assert finished.items() <= dict(taken).items()  # what was done is not done again
    assert Dataset(tmp_path / "data").info["total_frames"] == 400
    assert sorted(os.listdir(tmp_path)) == ["bags", "data", "robot.yaml"]


def test_two_at_once_into_one_dataset_are_refused(tmp_path):
    drive(1).write(tmp_path / "bags/bag0")
    parts = tmp_path / ".tmp-data-parts"
    parts.mkdir()
    with (parts / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another d4-ingest is writing to"):
            ingest.ingest([tmp_path / "bags"], robot(), tmp_path / "data")


# ---- mistakes


def refused(tmp_path, log, message, contract=None, **options):
    with pytest.raises(UserError, match=message):
        take(tmp_path, log, contract=contract, **options)
    assert sorted(os.listdir(tmp_path)) == ["bags"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_in_a_bag_names_it_and_leaves_no_dataset(tmp_path, jobs):
    bad = drive(1)
    next(item for item in bad.items if item[0] == "/cmd_vel")[3].linear.x = 7.0
    message = (
        r"bag1: /cmd_vel at 1700000000.040 s: linear.x is 7, outside \[-1, 1\]; correct the limits .* "
        "or pass --clip-actions base"
    )
    with pytest.raises(UserError, match=message):
        take(tmp_path, drive(1), bad, jobs=jobs)
    assert not (tmp_path / "data").exists()


def test_commands_can_be_clipped_by_name(tmp_path):
    log = drive(1)
    next(item for item in log.items if item[0] == "/cmd_vel")[3].linear.x = 7.0
    dataset, _ = take(tmp_path, log, clip_actions=["base"])
    assert dataset.columns(0)["action"][0].tolist() == [1.0, 0.0, 0.0]
    with pytest.raises(
        UserError, match="--clip-actions arm: the contract has no action channel of that name"
    ):
        ingest.ingest([tmp_path / "bags"], robot(), tmp_path / "other", clip_actions=["arm"])


def test_rounding_beyond_the_limits_is_no_mistake(tmp_path):
    log = drive(1)
    next(item for item in log.items if item[0] == "/cmd_vel")[3].linear.x = 1.001
    assert take(tmp_path, log)[0].columns(0)["action"][0, 0] == 1.0


def test_values_that_are_no_numbers(tmp_path):
    log = drive(1)
    next(item for item in log.items if item[0] == "/pose")[3].pose.position.x = float("nan")
    refused(tmp_path, log, r"bag0: /pose at 1700000000.000 s: pose.position.x is nan")
    shutil.rmtree(tmp_path / "bags")
    log = drive(1)
    next(item for item in log.items if item[0] == "/cmd_vel")[3].angular.z = float("inf")
    refused(tmp_path, log, r"/cmd_vel at 1700000000.040 s: angular.z is inf")
    shutil.rmtree(tmp_path / "bags")
    log = drive(1)
    log.add("/reward", ARRAY, T0 + 1, bags.float64_array([float("nan"), 0]))
    refused(tmp_path, log, r"/reward at 1700000000.000 s: a reward is NaN or too large")


@pytest.mark.parametrize(
    ("topic", "message"),
    [
        ("/cam", "bag0 has no topic /cam; it has /cmd_vel, /episode"),
        ("/pose", "bag0 has no topic /pose"),
        ("/episode", "bag0 has no topic /episode"),
    ],
)
def test_missing_topics(tmp_path, topic, message):
    refused(tmp_path, drive(1).without(topic), message)


def test_wrong_messages(tmp_path):
    log = drive(1).without("/pose")
    log.add("/pose", TWIST, T0, new(TWIST))
    refused(
        tmp_path,
        log,
        "/pose carries geometry_msgs/msg/Twist, the contract says geometry_msgs/msg/PoseStamped",
    )
    cases = [
        (
            "/task",
            "std_msgs/msg/String",
            new("std_msgs/msg/String", data="green"),
            "task 'green' is not among",
        ),
        ("/reward", ARRAY, bags.float64_array([1, 2, 3]), "a reward has 3 entries; expected one per task"),
        (
            "/cam",
            COMPRESSED,
            new(COMPRESSED, header=bags.header(T0 + TICK), format="jpeg"),
            "cannot be decoded",
        ),
    ]
    for topic, kind, msg, message in cases:
        shutil.rmtree(tmp_path / "bags")
        log = drive(1)
        log.add(topic, kind, T0 + TICK + 5 * MS, msg)
        refused(tmp_path, log, f"bag0: {topic} at 1700000000.105 s: .*{message}")


def test_stamps_that_are_not_there(tmp_path):
    raw = yaml.safe_load(ROBOT)
    raw["actions"][0]["align"]["timeline"] = "header"
    refused(
        tmp_path, drive(1), "/cmd_vel has no header .* write `timeline: receive`", Contract.from_dict(raw)
    )
    log = drive(1)
    for item in log.items:
        if item[0] == "/pose":
            item[3].header = bags.header(0)
    shutil.rmtree(tmp_path / "bags")
    refused(tmp_path, log, "/pose has no stamped message; write `timeline: receive` for it")


def test_categorical_actions_are_whole_numbers(tmp_path):
    raw = yaml.safe_load(ROBOT)
    base = {key: raw["actions"][0][key] for key in ("name", "topic", "type", "select", "safety", "align")}
    raw["actions"][0] = base | {"kind": "categorical", "classes": 3, "select": ["linear.x"]}
    refused(
        tmp_path, drive(1), r"linear.x is 0.01, outside \[0, 2\] or no whole number", Contract.from_dict(raw)
    )


# ---- the command


def run(tmp_path, *extra):
    return subprocess.run(command_line(tmp_path, *extra), capture_output=True, text=True, check=False)


def test_the_command_says_what_it_did_and_what_comes_next(tmp_path):
    drive(2).write(tmp_path / "bags/bag0")
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 bags -> 2 episodes, 12 frames, 12 with a known action, in ")
    assert f"next:    d4-audit {tmp_path}/data" in done.stdout
    assert "nothing new: all 1 bags" in run(tmp_path).stdout


def test_the_command_fails_in_one_sentence(tmp_path):
    (tmp_path / "bags").mkdir()
    done = run(tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no bag or ")
    assert sorted(os.listdir(tmp_path)) == ["bags", "robot.yaml"]
    help_ = subprocess.run(
        [*command_line(tmp_path)[:3], "--help"], capture_output=True, text=True, check=True
    )
    assert "--clip-actions" in help_.stdout
    assert "Turn robot logs" in help_.stdout


# ---- recordings of real robots

CAR = RECORDINGS / "donkeycar/full_compressed_mcap"


@needs("donkeycar/full_compressed_mcap")
def test_a_real_drive(tmp_path):
    camera = {"name": "front", "topic": "/camera/image_raw/compressed", "type": COMPRESSED, "size": [60, 80]}
    align = {"strategy": "hold", "timeline": "header", "tolerance_ms": 150}
    contract = Contract.from_dict(
        {
            "name": "car",
            "rate_hz": 20,
            "latency_ms": 20,
            "observations": [{**camera, "align": align}],
            "actions": [
                {
                    "name": "drive",
                    "topic": "/cmd_vel",
                    "type": TWIST,
                    "select": ["linear.x", "angular.z"],
                    "low": [0, -1],
                    "high": [1, 1],
                    "safety": "zeros",
                    "align": align | {"timeline": "receive"},
                }
            ],
        }
    )
    summary = ingest.ingest([CAR], contract, tmp_path / "data")
    assert (summary.episodes, summary.frames, summary.labelled) == (1, 1000, 1000)
    dataset = Dataset(tmp_path / "data")
    assert dataset.d4["episodes"][0]["stale"] == 0
    source = [msg for _, _, msg in read_bag(CAR, ["/camera/image_raw/compressed"])]
    ours = np.stack(list(dataset.frames("front", 0)))
    real = [messages.resize(messages.decode(m), (60, 80)) for m in source[::97]]
    np.testing.assert_array_equal(ours[::97], real)
    commands = [[msg.linear.x, msg.angular.z] for _, _, msg in read_bag(CAR, ["/cmd_vel"])]
    np.testing.assert_allclose(dataset.columns(0)["action"], commands, rtol=1e-6)
