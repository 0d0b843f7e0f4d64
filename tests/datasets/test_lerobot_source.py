"""LeRobotDatasets as recordings: row by row at equal rate, by the rules of bags at a lower, ours copied."""

import json
import re
import shutil
import tempfile
from pathlib import Path

import foreign_lerobot as foreign
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from foreign_lerobot import TOP
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d4_datasets import sources
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError, sentence
from d4_datasets.ingest import ingest
from d4_datasets.latents import Origin
from d4_datasets.lerobot import Dataset, Episode, LeRobotWriter
from d4_datasets.windows import Windows

HOLD = {"strategy": "hold", "timeline": "header", "tolerance_ms": 150}
ARRAY, IMAGE = "std_msgs/msg/Float64MultiArray", "sensor_msgs/msg/Image"
JOINTS = ["shoulder.pos", "elbow.pos", "wrist.pos", "grip.pos"]


def arm(rate_hz=10, latency_ms=40, size=(8, 12), **changes):
    """An arm with a camera, joints and a gripper, for the features of `foreign.episode`."""
    channel = {"topic": "/cmd", "type": ARRAY, "safety": "hold", "align": HOLD}
    spec = {
        "name": "arm",
        "rate_hz": rate_hz,
        "latency_ms": latency_ms,
        "observations": [
            {"name": "top", "topic": "/top", "type": IMAGE, "size": list(size), "align": HOLD},
            {
                "name": "joints",
                "topic": "/joints",
                "type": ARRAY,
                "select": ["data[0]", "data[1]"],
                "lerobot": ["observation.state[2]", "observation.state[elbow.pos]"],
                "align": HOLD,
            },
        ],
        "actions": [
            channel | {"name": "arm", "select": [f"data[{i}]" for i in range(3)], "low": [-1] * 3,
             "high": [1] * 3},
            channel | {"name": "grip", "select": ["data[3]"], "low": [-1], "high": [1]},
        ],
        "tasks": {"topic": "/task", "type": "std_msgs/msg/String", "names": ["lift it", "drop it"]},
        "reward": {"topic": "/reward", "type": ARRAY},
        "episode": {"terminal": {"topic": "/over", "type": "std_msgs/msg/Bool"}},
    }  # fmt: skip
    merged = spec | changes
    return Contract.from_dict({key: value for key, value in merged.items() if value is not None})


def entry(spec, kind, name, /, **changes):
    """The contract's plain data with one of its entries changed, for `arm(**...)`."""
    items = [item | changes if item["name"] == name else item for item in spec.to_dict()[kind]]
    return {kind: [{key: value for key, value in item.items() if value is not None} for item in items]}


def take(tmp_path, root, contract, **options):
    """Ingest one dataset into another; returns (dataset, summary)."""
    summary = ingest([root], contract, tmp_path / "out", **options)
    return Dataset(tmp_path / "out"), summary


def shifted(reward):
    """next.reward as rewards that arrive with their frame: the last row's with the last."""
    arrived = np.append(0, reward[:-1])
    arrived[-1] = reward[-1]
    return arrived


# ---- at equal rate a row is a tick


@pytest.mark.parametrize(("version", "kind"), [("v2.0", "video"), ("v2.1", "video"), ("v2.1", "image"),
                                               ("v3.0", "video"), ("v3.0", "image")])  # fmt: skip
@pytest.mark.parametrize("fps", [10, 30, 50])
def test_every_row_becomes_a_tick_as_it_is(tmp_path, version, kind, fps):
    rows = [foreign.episode(3 + n, n, task=["drop it", "lift it"][n % 2]) for n in range(5)]
    root = foreign.write(tmp_path / "arms", rows, version, fps, {"motors": JOINTS}, kind)
    dataset, summary = take(tmp_path, root, arm(fps))
    assert (summary.episodes, summary.frames) == (5, summary.labelled)
    assert summary.warnings == []
    for number, row in enumerate(rows):
        columns = dataset.columns(number)
        np.testing.assert_array_equal(columns["action"], row["action"])
        np.testing.assert_array_equal(columns["observation.joints"], row["observation.state"][:, [2, 1]])
        np.testing.assert_array_equal(np.stack(list(dataset.frames("top", number))), row[TOP])
        np.testing.assert_array_equal(columns["reward"][:, 0], shifted(row["next.reward"][:, 0]).astype("f4"))
        assert columns["is_terminal"].tolist() == [False] * (len(row[TOP]) - 1) + [True]
        assert set(columns["task_index"]) == {[1, 0][number % 2]}
        assert dataset.d4["episodes"][number]["source"] == f"arms/{number}"
    Windows(tmp_path / "out").split()


@pytest.mark.parametrize("latency_ms", [0, 40, 1000])
def test_the_command_of_a_row_answers_its_frame_whatever_the_latency(tmp_path, latency_ms):
    row = foreign.episode(6)
    root = foreign.write(tmp_path / "arms", [row], names=JOINTS)
    dataset, _ = take(tmp_path, root, arm(latency_ms=latency_ms))
    np.testing.assert_array_equal(dataset.columns(0)["action"], row["action"])


def test_a_lower_rate_takes_frames_commands_and_rewards_by_the_rules_of_bags(tmp_path):
    """Tick k is at 50 + 100 k ms; the newest of 30 frames a second is then 1 + 3 k."""
    row = foreign.episode(13)
    row["next.done"][:] = False
    root = foreign.write(tmp_path / "arms", [row], fps=30, names=JOINTS)
    spec = arm(10, reward={"topic": "/reward", "type": ARRAY, "reduce": "sum"})
    dataset, _ = take(tmp_path, root, spec)
    columns = dataset.columns(0)
    used = [1, 4, 7, 10, 12]  # the last tick is less than a period after the last frame
    np.testing.assert_array_equal(np.stack(list(dataset.frames("top", 0))), row[TOP][used])
    np.testing.assert_array_equal(columns["action"], row["action"][used])
    arrived = row["next.reward"][:, 0]
    sums = [arrived[0], arrived[1:4].sum(), arrived[4:7].sum(), arrived[7:10].sum(), arrived[10:].sum()]
    np.testing.assert_allclose(columns["reward"][:, 0], sums, rtol=1e-6)


def test_a_video_as_cameras_record_it_is_found_by_timestamps(tmp_path):
    """H.264 with B frames and one key frame a file: episodes begin anywhere in it."""
    rows = [foreign.episode(7, n, (64, 64)) for n in range(3)]
    for number, row in enumerate(rows):
        row[TOP][:] = (np.arange(7) * 12 + number * 84)[:, None, None, None]
    root = foreign.write(tmp_path / "arms", rows, names=JOINTS, per_file=3, codec="libx264")
    dataset, _ = take(tmp_path, root, arm(size=(64, 64)))
    for number, row in enumerate(rows):
        frames = np.stack(list(dataset.frames("top", number))).astype(float)
        assert np.abs(frames - row[TOP]).max() <= 4


def test_pictures_may_lie_in_files_of_their_own(tmp_path):
    row = foreign.episode(3)
    root = foreign.write(tmp_path / "arms", [row], "v2.1", names=JOINTS, kind="image")
    path = root / "data/chunk-000/episode_000000.parquet"
    cells = pq.read_table(path)[TOP].to_pylist()
    (root / "images").mkdir()
    for number, cell in enumerate(cells):
        (root / f"images/{number}.png").write_bytes(cell["bytes"])
        cells[number] = {"bytes": None, "path": f"images/{number}.png"}
    edit_rows(root, TOP, pa.array(cells), path)
    dataset, _ = take(tmp_path, root, arm())
    np.testing.assert_array_equal(np.stack(list(dataset.frames("top", 0))), row[TOP])
    for damage, message in ((b"no picture", "cannot be decoded"), (None, "1.png is missing")):
        (root / "images/1.png").unlink()
        if damage:
            (root / "images/1.png").write_bytes(damage)
        with pytest.raises(UserError, match=message):
            ingest([root], arm(), tmp_path / "more")


def test_a_gap_in_the_rows_splits_an_episode(tmp_path):
    row = foreign.episode(12)
    root = foreign.write(tmp_path / "arms", [row], names=JOINTS)
    path = root / "data/chunk-000/file-000.parquet"
    keep = np.array([i for i in range(12) if i not in (5, 6, 7)])
    pq.write_table(pq.read_table(path).take(keep), path)
    episodes = root / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(episodes)
    place = table.column_names.index("length")
    pq.write_table(table.set_column(place, "length", pa.array([9])), episodes)
    dataset, _ = take(tmp_path, root, arm())
    # Frame 4 serves the tick of frame 5 too, as it is not older than its tolerance there.
    assert dataset.episodes["length"].to_pylist() == [6, 4]
    np.testing.assert_array_equal(np.stack(list(dataset.frames("top", 1))), row[TOP][8:])


def test_the_task_may_change_at_any_row(tmp_path):
    row = foreign.episode(5)
    root = foreign.write(tmp_path / "arms", [row, foreign.episode(2, task="drop it")], names=JOINTS)
    path = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    place = table.column_names.index("task_index")
    pq.write_table(table.set_column(place, "task_index", pa.array([0, 1, 1, 0, 0, 1, 1])), path)
    dataset, _ = take(tmp_path, root, arm())
    assert dataset.columns(0)["task_index"].tolist() == [0, 1, 1, 0, 0]


def test_short_episodes_are_left_out_and_said(tmp_path):
    root = foreign.write(
        tmp_path / "arms", [foreign.episode(n, n) for n in (3, 1, 4)], names=JOINTS, per_file=3
    )
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(path).to_pylist()
    empty = rows[-1] | {"episode_index": 3, "length": 0}
    pq.write_table(pa.Table.from_pylist([*rows, empty]), path)
    dataset, summary = take(tmp_path, root, arm())
    assert [entry["source"] for entry in dataset.d4["episodes"]] == ["arms/0", "arms/2"]
    assert summary.warnings == [f"{root}: 2 episodes of fewer than 2 frames are left out"]


# ---- which feature is meant


def test_names_that_are_the_same_need_no_key(tmp_path):
    row = foreign.episode(4)
    row["observation.joints"] = row.pop("observation.state")[:, :2]
    root = foreign.write(
        tmp_path / "arms", [row], names=["arm.data[2]", "arm.data[0]", "arm.data[1]", "grip.data[3]"]
    )
    spec = arm(**entry(arm(), "observations", "joints", lerobot=None))
    dataset, _ = take(tmp_path, root, spec)
    np.testing.assert_array_equal(dataset.columns(0)["observation.joints"], row["observation.joints"])
    np.testing.assert_array_equal(dataset.columns(0)["action"], row["action"][:, [1, 2, 0, 3]])


def test_pictures_and_actions_come_from_the_features_that_are_named(tmp_path):
    row = foreign.episode(4)
    root = foreign.write(tmp_path / "arms", [row], names={"arm": JOINTS})
    spec = arm(**entry(arm(), "observations", "top", name="cam", lerobot=TOP))
    spec = Contract.from_dict(
        spec.to_dict()
        | entry(spec, "actions", "arm", lerobot=["action[grip.pos]", "action[0]", "observation.state[1]"])
        | {"reward": {"topic": "/r", "type": ARRAY, "lerobot": "next.done"}, "tasks": None}
    )
    dataset, _ = take(tmp_path, root, spec)
    np.testing.assert_array_equal(
        dataset.columns(0)["action"],
        np.column_stack([row["action"][:, [3, 0]], row["observation.state"][:, 1], row["action"][:, 3]]),
    )
    assert dataset.columns(0)["reward"].tolist() == [0, 0, 0, 1]
    assert dataset.contract.task_names == ("arm",)


def test_frames_without_commands_or_rewards_are_data_too(tmp_path):
    row = foreign.episode(4)
    root = foreign.write(
        tmp_path / "arms", [{name: row[name] for name in row if not name.startswith("next")}]
    )
    (root / "meta/info.json").write_text(
        (root / "meta/info.json").read_text().replace('"action"', '"leader"')
    )
    dataset, summary = take(tmp_path, root, arm(**entry(arm(), "observations", "joints", lerobot=[
        "observation.state[0]", "observation.state[1]"])))  # fmt: skip
    assert not dataset.columns(0)["action_mask"].any()
    assert len(summary.warnings) == 4  # both channels, reward, terminal
    assert summary.labelled == 0


def test_a_contract_without_the_key_is_written_and_hashed_as_before():
    plain = arm(**entry(arm(), "observations", "joints", lerobot=None))
    assert "lerobot" not in json.dumps(plain.to_dict())
    assert plain.hash == arm().hash  # where others keep it is not the robot
    assert Contract.from_dict(arm().to_dict()) == arm()
    short = Contract.from_dict(
        arm().to_dict() | entry(arm(), "observations", "joints", lerobot="observation.state")
    )
    assert short.observations[1].lerobot == ("observation.state",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"observations": [{"lerobot": ["a", "b"]}, {}]}, r"observations\[0\].lerobot`: has 2 entries"),
        ({"observations": [{}, {"lerobot": 3}]}, "must be a list"),
        ({"tasks": {"lerobot": ["one"]}}, "write one for each of"),
        ({"reward": {"lerobot": []}}, "at least one entry"),
        ({"episode": {"start": {"topic": "/s", "type": ARRAY, "lerobot": "x"}}}, "unknown key"),
    ],
)
def test_mistakes_in_the_contract(changes, message):
    raw = arm().to_dict()
    for key, change in changes.items():
        if isinstance(change, list):
            raw[key] = [old | new for old, new in zip(raw[key], change, strict=True)]
        else:
            raw[key] = raw[key] | change
    with pytest.raises(UserError, match=message):
        Contract.from_dict(raw)


# ---- what is wrong with a folder is one sentence


def edit_info(root, **changes):
    path = root / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_rows(root, name, values, path=None):
    path = path or root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index(name), name, values), path)


FAULTS = {
    "version": (
        lambda root: edit_info(root, codebase_version="v1.6"),
        r"LeRobotDataset v1\.6; v2\.0, v2\.1, v3",
    ),
    "no fps": (lambda root: edit_info(root, fps=None), "info.json is damaged"),
    "zero fps": (lambda root: edit_info(root, fps=0), "fps is 0"),
    "no json": (lambda root: (root / "meta/info.json").write_text("{"), "is not readable JSON"),
    "a list": (lambda root: (root / "meta/info.json").write_text("[]"), "holds no mapping"),
    "paths": (lambda root: edit_info(root, data_path="data/{nothing}.parquet"), "meta/episodes is damaged"),
    "no table": (lambda root: shutil.rmtree(root / "meta/episodes"), "no table of episodes"),
    "no data": (lambda root: shutil.rmtree(root / "data"), "file-000.parquet is missing"),
    "no video": (lambda root: shutil.rmtree(root / "videos"), "file-000.mp4 is missing"),
    "no tasks": (lambda root: (root / "meta/tasks.parquet").unlink(), "tasks.jsonl is missing"),
    "task": (lambda root: edit_rows(root, "task_index", pa.array([7] * 9)), "episode 0 is 'number 7'"),
    "rows": (lambda root: edit_rows(root, "episode_index", pa.array([0] * 9)), "9 rows of episode 0"),
    "twice": (lambda root: edit_rows(root, "frame_index", pa.array([0] * 9)), "stands twice"),
    "stamps": (lambda root: edit_rows(root, "timestamp", pa.array([0.5] * 9)), "is stamped 0.500 s"),
    "cells": (lambda root: edit_rows(root, "action", pa.array([None] * 9)), "'action' has empty cells"),
    "texts": (lambda root: edit_rows(root, "action", pa.array(["x"] * 9)), "which is no number"),
    "ragged": (
        lambda root: edit_rows(root, "action", pa.array([[1.0]] * 8 + [[1.0] * 4])),
        "differ in length",
    ),
    "width": (lambda root: edit_rows(root, "action", pa.array([[1.0]] * 9)), "has 1 numbers in a row"),
    "nan": (
        lambda root: edit_rows(root, "next.reward", pa.array([np.nan] * 9)),
        "frame 0 of episode 0 is NaN",
    ),
    "limits": (
        lambda root: edit_rows(root, "action", pa.array([[2.0] * 4] * 9)),
        r"episode 0: action at 0\.040 s",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_folder_is_one_sentence_and_leaves_nothing(tmp_path, fault):
    root = foreign.write(tmp_path / "arms", [foreign.episode(4), foreign.episode(5, 1)], names=JOINTS)
    damage, message = FAULTS[fault]
    damage(root)
    with pytest.raises(UserError, match=message):
        ingest([root], arm(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["arms"]


@pytest.mark.parametrize("number", ["Infinity", "1e999", "9" * 400, "-1"])
@pytest.mark.parametrize(
    ("file", "key"),
    [("tasks.jsonl", "task_index"), ("episodes.jsonl", "episode_index"), ("episodes.jsonl", "length"),
     ("info.json", "chunks_size"), ("info.json", "fps")],
)  # fmt: skip
def test_numbers_beyond_all_numbers_are_one_sentence(tmp_path, file, key, number):
    """The fuzzer's finding: JSON knows Infinity, and int() of it is neither a ValueError nor a TypeError."""
    root = foreign.write(tmp_path / "arms", [foreign.episode(4)], "v2.1", names=JOINTS)
    path = root / "meta" / file
    text, count = re.subn(rf'("{key}": *)[\d.]+', rf"\g<1>{number}", path.read_text(), count=1)
    assert count == 1
    path.write_text(text)
    told = ""
    try:
        ingest([root], arm(), tmp_path / "out")
    except Exception as error:
        told = sentence(error)
    assert told is not None  # a traceback
    assert len(told) < 1500
    assert (told == "") == (tmp_path / "out").exists()


def test_a_file_that_is_no_text_is_named_and_not_quoted(tmp_path):
    """UnicodeDecodeError quotes all that it was given."""
    root = foreign.write(tmp_path / "arms", [foreign.episode(4)], "v2.1", names=JOINTS)
    (root / "meta/tasks.jsonl").write_bytes(b"[" * 3000 + b"\xff")
    with pytest.raises(UserError, match=r"tasks\.jsonl is damaged") as caught:
        ingest([root], arm(), tmp_path / "out")
    assert len(str(caught.value)) < 700


def test_no_chunks_at_all_are_one_sentence(tmp_path):
    root = foreign.write(tmp_path / "arms", [foreign.episode(4)], "v2.1", names=JOINTS)
    edit_info(root, chunks_size=0)
    with pytest.raises(UserError, match=r"episodes.jsonl is damaged: .*ZeroDivision"):
        ingest([root], arm(), tmp_path / "out")


@pytest.mark.parametrize("name", ["data/chunk-000/file-000.parquet", f"videos/{TOP}/chunk-000/file-000.mp4",
                                  "meta/episodes/chunk-000/file-000.parquet"])  # fmt: skip
@pytest.mark.parametrize("share", [0.0, 0.5, 0.95, None])
def test_a_file_that_is_cut_off_or_was_never_fetched(tmp_path, name, share):
    root = foreign.write(tmp_path / "arms", [foreign.episode(4), foreign.episode(5, 1)], names=JOINTS)
    data = (root / name).read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\n"
    (root / name).write_bytes(pointer if share is None else data[: int(share * len(data))])
    with pytest.raises(
        UserError, match="git-lfs" if share is None else "damaged|cannot be decoded|lacks frames"
    ):
        ingest([root], arm(), tmp_path / "out")


def test_a_video_that_is_too_short_is_named_with_the_episode(tmp_path):
    root = foreign.write(tmp_path / "arms", [foreign.episode(4), foreign.episode(5, 1)], names=JOINTS)
    other = foreign.write(tmp_path / "other", [foreign.episode(4), foreign.episode(3, 1)], names=JOINTS)
    video = f"videos/{TOP}/chunk-000/file-000.mp4"
    shutil.copy(other / video, root / video)
    with pytest.raises(UserError, match=r"file-000\.mp4 lacks frames of episode 1"):
        ingest([root], arm(), tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate_hz": 12}, "has 10 frames a second and contract arm asks for 12; write rate_hz: 10"),
        (entry(arm(), "observations", "top", name="left"), f"no feature 'observation.images.left'.*{TOP}"),
        (entry(arm(), "observations", "top", lerobot="action"), "'action' holds float32, no pictures"),
        (entry(arm(), "observations", "joints", lerobot=None), "no feature 'observation.joints'"),
        (
            entry(arm(), "observations", "joints", lerobot="observation.state"),
            "gives 4 numbers and `select` names 2",
        ),
        (
            entry(arm(), "observations", "joints", lerobot=["action[0]", "action[knee]"]),
            "no element 'knee'; it has shoulder",
        ),
        (entry(arm(), "observations", "joints", lerobot=["action[0]", "action[4]"]), "no element '4'"),
        (
            entry(arm(), "observations", "joints", lerobot=["action[0]", f"{TOP}[4]"]),
            "holds video, no numbers",
        ),
        (entry(arm(), "actions", "grip", lerobot="gripper"), "no feature 'gripper'"),
        ({"actions": arm().to_dict()["actions"][:1]}, "'action' has 4 numbers .* and the contract 3"),
        (
            {"reward": {"topic": "/r", "type": ARRAY, "lerobot": "action"}},
            "'action' has 4 numbers; one or 2 would fit",
        ),
        (
            {"tasks": {"topic": "/t", "type": ARRAY, "names": ["a", "b"]}},
            "'lift it', which the contract does not name",
        ),
    ],
)
def test_a_contract_that_does_not_fit_the_folder(tmp_path, changes, message):
    root = foreign.write(tmp_path / "arms", [foreign.episode(3)], names=JOINTS)
    with pytest.raises(UserError, match=message):
        ingest([root], arm(**changes), tmp_path / "out")


# ---- our own


def own_episode(spec, length, seed, latents=None):
    rng = np.random.default_rng(seed)
    origin = None if latents is None else Origin("abc", "float16", *latents)
    return Episode(
        images={c.name: rng.integers(0, 256, (length, *c.size, 3), np.uint8) for c in spec.images}
        if latents is None else {},
        action=rng.uniform(-1, 1, (length, spec.action_dim)).astype(np.float32),
        action_mask=rng.random(length) < 0.6,
        reward=rng.uniform(size=(length, len(spec.task_names))).astype(np.float32),
        task_index=rng.integers(0, len(spec.task_names), length),
        is_terminal=rng.random(length) < 0.2,
        vectors={v.name: rng.normal(size=(length, len(v.select))).astype(np.float32) for v in spec.vectors()},
        latents=None if latents is None else rng.normal(size=(length, *latents)).astype(np.float16),
        origin=origin,
        source=f"bag{seed}", start_ns=seed * 10**9, stale=seed % 3, dropped=seed % 5,
    )  # fmt: skip


def same(one, other):
    """Both datasets hold the same values, frames and provenance."""
    one, other = Dataset(one), Dataset(other)
    assert one.info == other.info
    assert one.d4["episodes"] == other.d4["episodes"]
    assert one.origin == other.origin
    for number in range(one.episodes.num_rows):
        mine, theirs = one.columns(number), other.columns(number)
        assert mine.keys() == theirs.keys()
        for name in mine:
            np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)
            assert mine[name].dtype == theirs[name].dtype
        for camera in one.contract.images if one.origin is None else ():
            frames = zip(one.frames(camera.name, number), other.frames(camera.name, number), strict=True)
            assert all(np.array_equal(a, b) for a, b in frames)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    rate=st.sampled_from([10, 29.97, 50]),
    latents=st.sampled_from([None, None, (3, 2)]),
    seed=st.integers(0, 2**30),
)
def test_any_dataset_of_ours_is_read_back_by_value(lengths, rate, latents, seed):
    spec = arm(rate)
    with tempfile.TemporaryDirectory() as folder:
        with LeRobotWriter(Path(folder, "own"), spec) as writer:
            for number, length in enumerate(lengths):
                writer.add_episode(own_episode(spec, length, seed + number, latents))
        ingest([Path(folder, "own")], spec, Path(folder, "again"))
        same(Path(folder, "own"), Path(folder, "again"))


def test_our_own_with_another_contract_keeps_what_is_unknown_unknown(tmp_path):
    spec = arm(episode=None)
    item = own_episode(spec, 9, 1)
    with LeRobotWriter(tmp_path / "own", spec) as writer:
        writer.add_episode(item)
    one = Contract.from_dict(spec.to_dict() | {"name": "one", "actions": spec.to_dict()["actions"][1:]})
    one = Contract.from_dict(one.to_dict() | entry(one, "observations", "joints", lerobot=None))
    dataset, summary = take(tmp_path, tmp_path / "own", one)
    columns = dataset.columns(0)
    np.testing.assert_array_equal(columns["action_mask"], item.action_mask)
    np.testing.assert_array_equal(columns["action"], item.action[:, 3] * item.action_mask)
    np.testing.assert_array_equal(columns["reward"], item.reward)
    np.testing.assert_array_equal(columns["task_index"], item.task_index)
    assert summary.warnings == []


def test_a_dataset_of_ours_is_taken_only_where_it_is_named(tmp_path):
    """Beside the bags that it was made of it would be these once more."""
    foreign.write(tmp_path / "all/theirs", [foreign.episode(3)], names=JOINTS)
    with LeRobotWriter(tmp_path / "all/own", arm()) as writer:
        writer.add_episode(own_episode(arm(), 4, 0))
    assert [one.path.name for one in sources.find(tmp_path / "all")] == ["theirs"]
    assert [one.path.name for one in sources.find(tmp_path / "all", "lerobot")] == ["own", "theirs"]
    assert [one.path.name for one in sources.find(tmp_path / "all/own")] == ["own"]
    summary = ingest([tmp_path / "all", tmp_path / "all/own"], arm(), tmp_path / "out")
    assert (summary.bags, summary.frames) == (2, 7)
    assert ingest([tmp_path / "all"], arm(), tmp_path / "out").skipped == 1
