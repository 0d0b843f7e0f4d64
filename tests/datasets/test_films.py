"""Videos and pictures with tables beside them: what stands in the files stands in the dataset."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from footage_files import GRIP, contract, picture, write_pictures, write_table, write_video
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d4_datasets import messages
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_datasets.ingest import ingest
from d4_datasets.lerobot import Dataset
from d4_datasets.windows import Windows

COUNT = 20
TASKS = {"topic": "/task", "type": "std_msgs/msg/String", "select": "data", "names": ["red", "blue"]}
REWARD = {"topic": "/reward", "type": "std_msgs/msg/Float64", "select": "data"}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """(video of COUNT frames around every 100 ms, their times in ms)."""
    stamps = [100 * k + jitter for k, jitter in enumerate(np.random.default_rng(3).integers(0, 31, COUNT))]
    stamps[0] = 0
    path = tmp_path_factory.mktemp("clip") / "run.mkv"
    return write_video(path, [picture(k) for k in range(COUNT)], stamps), np.array(stamps)


def take(source, robot, out, **options):
    """Ingest; returns (dataset, summary)."""
    summary = ingest([source], robot, out, **options)
    return Dataset(out), summary


def numbers(dataset, episode=0, camera="front"):
    """Numbers of the frames of an episode, found by comparing pixels."""
    known = {picture(k).tobytes(): k for k in range(100)}
    return [known[frame.tobytes()] for frame in dataset.frames(camera, episode)]


def beside(clip, folder, rows=None, suffix=".csv"):
    """The clip in a folder of its own, with a table beside it."""
    folder.mkdir(exist_ok=True)
    shutil.copy(clip[0], folder / "run.mkv")
    if rows is not None:
        write_table(folder / f"run{suffix}", rows)
    return folder


def base(time, x, z=0.0, **more):
    return {"time": time, "base.linear.x": x, "base.angular.z": z, **more}


# ---- what comes out


cells = st.one_of(st.none(), st.floats(-100, 100, allow_subnormal=False))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(st.integers(-500, 2500), cells, cells), max_size=40),
    suffix=st.sampled_from([".csv", ".jsonl", ".parquet"]),
    unit_ns=st.sampled_from([1, 1000, 1_000_000, 50_000_000]),
    zero_s=st.sampled_from([0, -7, 1_700_000_000]),
    latency=st.sampled_from([0, 40, 130]),
)
def test_any_table_with_gaps_and_its_own_clock(tmp_path, clip, rows, suffix, unit_ns, zero_s, latency):
    """Every action and its mask against a search that knows nothing of arrays."""
    stamps = clip[1]
    for folder in (tmp_path / "in", tmp_path / "out"):
        shutil.rmtree(folder, ignore_errors=True)
    ticks = [(ms * 1_000_000 // unit_ns, x, z) for ms, x, z in rows]
    own = [t + zero_s * 10**9 // unit_ns for t, _, _ in ticks]
    table = [base(t, x, z) for t, (_, x, z) in zip(own, ticks, strict=True)]
    table = table or [base(0, None, None)]
    files = {"scale": unit_ns / 1e9, "offset_s": -zero_s}
    folder = beside(clip, tmp_path / "in", table, suffix)
    dataset, _ = take(folder, contract(latency_ms=latency, files=files), tmp_path / "out")
    columns = dataset.columns(0)
    truth = []
    for stamp in stamps:
        moment = int(stamp) * 1_000_000 + latency * 1_000_000 + 5_000_000
        force = None
        for t, x, z in ticks:
            if t * unit_ns <= moment and (force is None or t * unit_ns >= force[0]):
                force = (t * unit_ns, x, z)
        is_known = force is not None and moment - force[0] <= 250_000_000 and None not in force[1:]
        truth.append((is_known, *((force[1], force[2]) if is_known else (0, 0))))
    assert numbers(dataset) == list(range(COUNT))
    assert columns["action_mask"].tolist() == [row[0] for row in truth]
    np.testing.assert_array_equal(columns["action"], np.array([row[1:] for row in truth], np.float32))


def test_a_video_alone_is_unlabelled_and_exact(tmp_path, clip):
    dataset, summary = take(clip[0], contract(), tmp_path / "out")
    assert (summary.bags, summary.episodes, summary.frames, summary.labelled) == (1, 1, COUNT, 0)
    assert summary.warnings == []
    assert dataset.d4["episodes"][0]["source"] == "run"
    windows = Windows(tmp_path / "out")
    np.testing.assert_array_equal(windows.images["front"], [picture(k) for k in range(COUNT)])
    again = ingest([clip[0]], contract(), tmp_path / "out")
    assert (again.bags, again.skipped) == (0, 1)


def test_pictures_are_resized_as_those_of_a_bag(tmp_path):
    frames = [picture(k, (45, 70)) for k in range(4)]
    write_video(tmp_path / "run.mp4", frames)
    take(tmp_path / "run.mp4", contract(), tmp_path / "out")
    wanted = [messages.resize(frame, (8, 12)) for frame in frames]
    np.testing.assert_array_equal(Windows(tmp_path / "out").images["front"], wanted)


def test_signals_of_the_table(tmp_path, clip):
    robot = contract(tasks=TASKS, reward={**REWARD, "reduce": "sum"})
    rows = [
        base(0.0, 1, task="red", reward=1),
        base(0.5, None, None, reward=2),
        base(0.52, 2, task="1", reward=4),
        base(1.2, 3, terminal="yes"),
        base(1.9, 4, task="red"),
    ]
    columns = take(beside(clip, tmp_path / "in", rows), robot, tmp_path / "out")[0].columns(0)
    assert len(columns["action"]) == 13  # until the terminal
    assert columns["reward"][:, 0].tolist() == [1, 0, 0, 0, 0, 6, *[0] * 7]
    assert columns["task_index"].tolist() == [0] * 5 + [1] * 8
    assert columns["is_terminal"].tolist() == [False] * 12 + [True]


def test_start_cells_begin_episodes_and_rewards_can_be_per_task(tmp_path, clip):
    robot = contract(tasks=TASKS, reward=REWARD)
    rows = [
        {"time": t, "start": start, "reward.red": red, "reward.blue": None, "base.linear.x": 1,
         "base.angular.z": 0}
        for t, start, red in [(0.55, True, None), (0.85, None, 3), (1.25, "true", None)]
    ]  # fmt: skip
    dataset, _ = take(beside(clip, tmp_path / "in", rows), robot, tmp_path / "out")
    assert [numbers(dataset, n)[0] for n in range(2)] == [5, 12]
    assert dataset.columns(0)["reward"].sum(0).tolist() == [3, 0]


def test_vectors_come_from_the_table(tmp_path, clip):
    spec = contract().to_dict()
    pose = {
        "name": "pose", "topic": "/pose", "type": "geometry_msgs/msg/PoseStamped", "role": "probe",
        "select": ["pose.position.x"],
        "align": {"strategy": "hold", "timeline": "header", "tolerance_ms": 120},
    }  # fmt: skip
    robot = Contract.from_dict({**spec, "observations": [*spec["observations"], pose]})
    key = "observation.pose.pose.position.x"
    rows = [{"time": k / 10, key: None if k in (7, 8) else k, "base.linear.x": 1} for k in range(COUNT)]
    for row in rows:
        row["base.angular.z"] = 0
    dataset, _ = take(beside(clip, tmp_path / "in", rows), robot, tmp_path / "out")
    values = [dataset.columns(n)["observation.pose"].tolist() for n in range(2)]
    assert values[0][:7] == list(range(7))  # and the sample before the gap while it is not too old
    assert values[1][-1] == COUNT - 1
    with pytest.raises(
        UserError, match=r"observes pose, and no table has a row with observation\.pose\.pose"
    ):
        take(clip[0], robot, tmp_path / "other")


@pytest.mark.parametrize(
    ("cameras", "files", "table"),
    [
        ({"front": "*_front.mkv", "back": "*_back.mkv"}, ["run_front.mkv", "run_back.mkv"], "*_log.csv"),
        ({"front": "*/front.mkv", "back": "*/back.mkv"}, ["run/front.mkv", "run/back.mkv"], "*/actions.csv"),
    ],
)
def test_several_cameras_by_a_rule(tmp_path, cameras, files, table):
    robot = contract(("front", "back"), files={"cameras": cameras, "table": table})
    for number, file in enumerate(files):
        path = tmp_path / "in" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, [picture(k + 50 * number) for k in range(6)])
    write_table(tmp_path / "in" / table.replace("*", "run"), [base(k / 10, k) for k in range(7)])
    dataset, summary = take(tmp_path / "in", robot, tmp_path / "out")
    assert (summary.bags, summary.warnings) == (1, [])
    assert numbers(dataset) == list(range(6))
    assert numbers(dataset, camera="back") == list(range(50, 56))
    assert dataset.columns(0)["action"][:, 0].tolist() == list(range(6))
    assert dataset.d4["episodes"][0]["source"] == dataset.d4["sources"][0]["name"] == "run"
    (tmp_path / "in" / files[1]).unlink()
    with pytest.raises(UserError, match=r"does not exist; files\.cameras of the contract names it for back"):
        take(tmp_path / "in", robot, tmp_path / "other")


def test_two_cameras_need_a_rule(tmp_path, clip):
    with pytest.raises(UserError, match=r"has one camera and the contract 2; write files\.cameras"):
        take(clip[0], contract(("front", "back")), tmp_path / "out")


def test_a_folder_of_pictures_at_a_rate(tmp_path):
    """Natural order: 10 comes after 9."""
    frames = {f"p{k}.{'jpg' if k == 30 else 'png'}": picture(k) for k in range(12)}
    write_pictures(tmp_path / "in" / "run", frames)
    write_table(tmp_path / "in" / "run.csv", [base(k / 20, k) for k in range(30)])
    dataset, _ = take(tmp_path / "in", contract(files={"fps": 20}), tmp_path / "out")
    assert numbers(dataset) == [1, 3, 5, 7, 9, 11]  # every other picture, the newest at its tick
    assert dataset.columns(0)["action"][:, 0].tolist() == [1, 3, 5, 7, 9, 11]


def test_pictures_dated_by_their_names(tmp_path):
    zero = 1_700_000_000_123_456_789
    write_pictures(
        tmp_path / "in" / "run", {f"cam1_{zero + k * 10**8}.webp": picture(k) for k in (0, 1, 2, 5, 6)}
    )
    write_table(tmp_path / "in" / "run.csv", [base(zero + k * 10**8, k) for k in range(7)])
    files = {"stamps": "name", "scale": 1e-9}
    dataset, _ = take(tmp_path / "in", contract(files=files, latency_ms=0), tmp_path / "out")
    assert [dataset.columns(n)["action"][:, 0].tolist() for n in range(2)] == [[0, 1, 2, 3], [5, 6]]
    (tmp_path / "in" / "run" / "none.png").write_bytes(b"x")
    with pytest.raises(UserError, match="its name has no number to take its time from"):
        take(tmp_path / "in", contract(files=files), tmp_path / "other")


def test_pictures_dated_by_the_table(tmp_path):
    """Names in a table cannot lead out of the folder."""
    write_pictures(tmp_path / "in" / "run", {f"{k}.png": picture(k) for k in range(6)})
    write_pictures(tmp_path, {"secret.png": picture(99)})
    rows = [base(k / 10, k, image=f"rgb/{5 - k}.png") for k in range(5)]
    rows.append(base(0.5, 5, image="../../secret.png"))
    write_table(tmp_path / "in" / "run.csv", rows)
    dataset, summary = take(tmp_path / "in", contract(files={"stamps": "table"}), tmp_path / "out")
    assert numbers(dataset) == [5, 4, 3, 2, 1]
    assert "lists 1 pictures that are not in" in summary.warnings[0]
    assert "1 pictures are not in" in summary.warnings[1]


def test_a_damaged_picture_is_left_out(tmp_path):
    folder = write_pictures(tmp_path / "run", {f"{k}.png": picture(k) for k in range(10)})
    for k in (4, 5):
        (folder / f"{k}.png").write_bytes((folder / f"{k}.png").read_bytes()[:-30])
    dataset, summary = take(folder, contract(), tmp_path / "out")
    assert [numbers(dataset, n) for n in range(2)] == [[0, 1, 2, 3, 3], [6, 7, 8, 9]]
    assert sum("is no picture that can be read" in warning for warning in summary.warnings) == 2


# ---- what is found


def test_videos_of_a_dataset_are_none_of_a_recording(tmp_path, clip):
    """The dataset may lie in the folder that is read, the second time too."""
    folder = beside(clip, tmp_path / "in")
    take(folder, contract(), folder / "dataset")
    again = ingest([folder], contract(), folder / "dataset")
    assert (again.bags, again.skipped) == (0, 1)


def test_a_table_that_has_changed_is_noticed(tmp_path, clip):
    folder = beside(clip, tmp_path / "in")
    take(folder, contract(), tmp_path / "out")
    write_table(folder / "run.csv", [base(0, 1)])
    again = ingest([folder], contract(), tmp_path / "out")
    assert again.bags == 1
    assert "is in the dataset already with another size or time" in again.warnings[0]


def test_pictures_among_other_things_are_no_recording(tmp_path):
    write_pictures(tmp_path / "notes", {"a.png": picture(0), "b.png": picture(1)})
    (tmp_path / "notes" / "more").mkdir()
    with pytest.raises(UserError, match=r"there is no bag or .* of what is there \(2 .png\) nothing"):
        ingest([tmp_path / "notes"], contract(), tmp_path / "out")


def test_two_tables_of_one_name_are_refused(tmp_path, clip):
    folder = beside(clip, tmp_path / "in", [base(0, 1)])
    write_table(folder / "run.jsonl", [base(0, 1)])
    with pytest.raises(UserError, match=r"are both tables of run; name the one to read in files\.table"):
        take(folder, contract(), tmp_path / "out")
    assert take(folder, contract(files={"table": "*.csv"}), tmp_path / "out")[1].labelled == 3


# ---- what is refused


@pytest.mark.parametrize(
    ("rows", "more", "sentence"),
    [
        ([base(0, 101)], {}, r"run.csv \(base\) at 0.000 s: linear.x is 101, outside \[-100, 100\]"),
        ([base(0, "fast")], {}, "line 2, column 'base.linear.x': 'fast' is no number"),
        ([{"time": 0, "base.linear.x": 1}], {}, "no column 'base.angular.z', and others of base are there"),
        ([{"time": 0, "speed": 1}], {}, r"none of the columns base.linear.x, .*files\.columns"),
        ([base(0, 1)], {"files": {"columns": {"reward": "r"}}, "reward": REWARD}, "no column 'r', which"),
        ([base(0, 1, task="green")], {"tasks": TASKS}, r"'green' is not one of \['red', 'blue'\]"),
        ([base(0, 1, task="2")], {"tasks": TASKS}, r"'2' is not one of \['red', 'blue'\]"),
        ([base(0, 1, terminal="soon")], {}, "column 'terminal': 'soon' is not true or false"),
        (
            [base(0, 1, **{"grip.data": 0.5})],
            {"actions": "grip"},
            "or no whole number, as binary actions are",
        ),
    ],
)
def test_a_bad_table_is_refused_and_leaves_nothing(tmp_path, clip, rows, more, sentence):
    if more.get("actions") == "grip":
        more = {"actions": [*contract().to_dict()["actions"], GRIP]}
    with pytest.raises(UserError, match=sentence):
        take(beside(clip, tmp_path / "in", rows), contract(**more), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_table_of_another_time_and_missing_channels_are_told(tmp_path, clip):
    robot = contract(actions=[*contract().to_dict()["actions"], GRIP])
    folder = beside(clip, tmp_path / "in", [base(1_700_000_000, 1), base(1_700_000_001, 1)])
    _, summary = take(folder, robot, tmp_path / "out")
    assert summary.labelled == 0
    assert re.search(r"has no columns of grip: no action is known", summary.warnings[0])
    assert re.search(r"correct files\.offset_s and files\.scale", summary.warnings[1])


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"table": "../*.csv"}, r"`files\.table`: .* must be a path below .* without \.\."),
        ({"table": "/etc/*.csv"}, r"`files\.table`: .* must be a path below"),
        ({"table": "a/../../*.csv"}, r"`files\.table`: .* must be a path below"),
        ({"table": "..\\*.csv"}, r"`files\.table`: .* must be a path below"),
        ({"table": "log.csv"}, r"must have one \*, which stands for the name"),
        ({"table": "*.xlsx"}, r"must end in \.csv, \.jsonl or \.parquet"),
        ({"cameras": {"side": "*.mp4"}}, r"`files\.cameras\.side`: unknown key"),
        ({"cameras": {"front": "../*.mp4"}}, r"`files\.cameras\.front`: .* must be a path below"),
        (
            {"columns": {"base.linear.y": "y"}},
            r"`files\.columns\.base\.linear\.y`: unknown key; did you mean",
        ),
        ({"scale": 0}, r"`files\.scale`: must be a number above 0"),
        ({"offset_s": "now"}, r"`files\.offset_s`: must be a number"),
        ({"fps": -1}, r"`files\.fps`: must be a number above 0"),
        ({"stamps": "exif"}, r"`files\.stamps`: 'exif' must be one of rate, name, table"),
        ({"tabel": "*.csv"}, r"`files\.tabel`: unknown key; did you mean `table`"),
        ("*.csv", r"files\. must be a mapping"),
    ],
)
def test_a_bad_section_is_refused(files, sentence):
    with pytest.raises(UserError, match=sentence):
        contract(files=files)


def test_every_camera_needs_a_pattern():
    with pytest.raises(UserError, match="has no pattern for the camera back"):
        contract(("front", "back"), files={"cameras": {"front": "*.mp4"}})


def test_the_section_changes_neither_the_hash_nor_itself():
    files = {"table": "*.csv", "columns": {"time": "t"}, "cameras": {"front": "*_f.mp4"}, "fps": 5}
    robot = contract(files=files)
    assert robot.hash == contract().hash == contract(files={}).hash
    assert "files" not in contract().to_dict()
    assert Contract.from_dict(robot.to_dict()) == robot
    assert hash(robot) == hash(Contract.from_dict(robot.to_dict()))


def test_both_runs_of_one_robot_go_into_one_dataset(tmp_path, clip):
    """The offset of one day's table is not that of the other's."""
    for number, offset in enumerate((0, 5)):
        folder = tmp_path / f"day{number}"
        beside(clip, folder, [base(k / 10 - offset, k) for k in range(COUNT)])
        (folder / "run.mkv").rename(folder / f"run{number}.mkv")
        (folder / "run.csv").rename(folder / f"run{number}.csv")
        dataset, _ = take(folder, contract(files={"offset_s": offset}), tmp_path / "out")
    for number in range(2):
        assert dataset.columns(number)["action_mask"].all()
    assert Path(tmp_path / "out").is_dir()
