"""Streams of MineRL v0.4: which frames belong to which action, signs, rewards, and files that are broken."""

import json
import pickle

import numpy as np
import pytest
from minecraft_files import contract, grey, write_stream

from d4_datasets import minecraft, minerl_streams, sources
from d4_datasets.errors import UserError
from d4_datasets.ingest import ingest
from d4_datasets.lerobot import Dataset

NAME = "v3_absolute_grape_changeling-6_37339-46767"


def spec(**changes):
    """The example contract without abstract actions, unless they are given."""
    actions = changes.pop("actions", contract("minerl", (16, 16)).to_dict()["actions"][:2])
    return contract("minerl", (16, 16), actions=actions, **changes)


def degrees():
    """Keys and the camera in degrees."""
    camera = contract().to_dict()["actions"][1]
    return spec(
        actions=[
            contract("minerl").to_dict()["actions"][0],
            camera | {"low": [-180, -180], "high": [180, 180]},
        ]
    )


def fill(path, tmp_path, robot=None):
    folder = tmp_path / "part"
    folder.mkdir()
    return minerl_streams.fill(path, robot or spec(), folder, ())


def test_frames_from_before_the_game_began_are_skipped(tmp_path):
    """The video ends with the last state: true_video_frame_count - (rewards + 1) frames are not its own."""
    path = write_stream(tmp_path / NAME, steps=6, before=4)
    summary = ingest([path], spec(), tmp_path / "out")
    assert (summary.frames, summary.labelled) == (7, 6)
    for number, frame in enumerate(Dataset(tmp_path / "out").frames("pov", 0)):
        assert abs(float(frame.mean()) - grey(number + 4)) < 4


def test_the_last_frame_has_no_action_and_no_frame_may_be_missing_before_it(tmp_path):
    whole = write_stream(tmp_path / "whole", steps=6, before=2)
    episodes, warnings = fill(whole, tmp_path)
    assert episodes[0].action_mask.tolist() == [True] * 6 + [False]
    assert warnings == []


def test_a_video_that_lacks_its_last_frames_is_cut_and_told(tmp_path):
    path = write_stream(tmp_path / NAME, steps=6, before=2, frames=7)
    episodes, warnings = fill(path, tmp_path)
    assert episodes[0].frames == 5
    assert episodes[0].action_mask.all()
    assert "7 states for 5 frames; the first 5 are used" in warnings[0]


def test_the_camera_keeps_its_sign(tmp_path):
    """Streams have the environment's signs, +pitch down and +yaw right; it was their sources that had not."""
    turns = np.array([[3.5, -7.25], [0, 1]], np.float32)
    path = write_stream(tmp_path / NAME, 2, action__camera=turns, action__forward=np.array([0, 1]))
    episodes, _ = fill(path, tmp_path, degrees())
    assert degrees().action_names[-2:] == ("camera.pitch", "camera.yaw")
    np.testing.assert_allclose(episodes[0].action[:2, -2:], turns)
    assert episodes[0].action[1, degrees().action_names.index("keys.forward")] == 1


def test_the_camera_as_one_of_121_classes(tmp_path):
    turns = np.array([[0, 0], [10, -10], [90, 90]], np.float32)
    episodes, _ = fill(write_stream(tmp_path / NAME, 3, action__camera=turns), tmp_path)
    assert episodes[0].action[:3, -1].tolist() == [60, 110, 120]


def test_a_reward_arrives_with_the_frame_after_its_action(tmp_path):
    path = write_stream(tmp_path / NAME, 4, reward=np.array([0, 1, 0, 4], np.float32))
    episodes, _ = fill(path, tmp_path)
    assert episodes[0].reward[:, 0].tolist() == [0, 0, 1, 0, 4]


def test_tasks_are_found_in_the_inventory(tmp_path):
    logs, planks = np.array([0, 1, 1, 0, 2]), np.array([0, 0, 0, 4, 4])
    path = write_stream(
        tmp_path / NAME, 4, observation__inventory__log=logs, observation__inventory__planks=planks
    )
    robot = spec(reward=contract().to_dict()["reward"], tasks=contract().to_dict()["tasks"])
    episodes, warnings = fill(path, tmp_path, robot)
    names = robot.task_names
    found = [(int(k), names[q]) for k, q in np.argwhere(episodes[0].reward)]
    assert found == [(1, "mine_log"), (3, "craft_planks"), (4, "mine_log")]
    assert warnings == []


def test_abstract_actions_by_name_or_by_number(tmp_path):
    actions = contract("minerl").to_dict()["actions"]
    names = np.array(["none", "planks", "cake"])
    numbers = {"place": 6, "equip": 8, "nearbyCraft": 7, "nearbySmelt": 1}
    extra = {f"action__{name}": np.array([0, 0, number]) for name, number in numbers.items()}
    path = write_stream(tmp_path / NAME, 3, action__craft=names, **extra)
    robot = spec(actions=actions)
    episodes, warnings = fill(path, tmp_path, robot)
    table = dict(zip(robot.action_names, episodes[0].action[:3].T.tolist(), strict=True))
    assert table["craft.craft"] == [0, 3, 5]  # what is not in the table counts as "other"
    assert [table[f"{name}"][2] for name in ("place.place", "equip.equip", "craft_nearby.nearbyCraft")] == [
        6,
        8,
        7,
    ]
    assert warnings == []


def test_a_contract_with_keys_that_streams_lack_takes_them_as_video(tmp_path):
    episodes, warnings = fill(write_stream(tmp_path / NAME, 3), tmp_path, contract(size=(18, 32)))
    assert not episodes[0].action_mask.any()
    assert "has no use, drop, swapHands" in warnings[0]
    assert "taken as video without commands" in warnings[0]


def test_streams_on_a_list_are_left_out(tmp_path):
    """MineRL's package has a folder with an empty file for each stream that is corrupt."""
    for name in (NAME, "v3_good-1"):
        write_stream(tmp_path / "MineRLObtainDiamond-v0" / name, 3)
    (tmp_path / "blacklist").mkdir()
    (tmp_path / "blacklist" / NAME).touch()
    found = sources.find(tmp_path)
    assert [one.path.name for one in found] == [NAME, "v3_good-1"]
    assert {one.reader.KIND for one in found} == {"minerl"}
    ingest([tmp_path / "MineRLObtainDiamond-v0"], spec(), tmp_path / "out", skip=tmp_path / "blacklist")
    assert [entry["name"] for entry in Dataset(tmp_path / "out").d4["sources"]] == ["v3_good-1"]


def test_a_tick_is_50_ms(tmp_path):
    with pytest.raises(UserError, match="recorded at 20 Hz"):
        fill(write_stream(tmp_path / NAME, 3), tmp_path, spec(rate_hz=5))


def test_python_objects_are_never_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    path = write_stream(tmp_path / NAME, 3)
    trap = np.empty(3, object)
    trap[:] = Trap()
    np.savez(path / "rendered.npz", **{"reward": np.zeros(3), "action$camera": trap})
    with pytest.raises(UserError, match=r"action\$camera cannot be read"):
        fill(path, tmp_path)
    (path / "rendered.npz").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match="the file cannot be read"):
        minerl_streams.fill(path, spec(), tmp_path, ())
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"reward": None}, "has no reward"),
        ({"reward": np.zeros(0)}, "reward cannot be read"),
        ({"reward": np.array(3.0)}, "reward cannot be read"),
        ({"reward": np.array(["a", "b", "c"])}, "reward cannot be read"),
        ({"reward": np.array([0, np.nan, 0])}, "NaN"),
        ({"action__camera": np.zeros((3, 3))}, r"action\$camera cannot be read"),
        ({"action__camera": np.zeros((2, 2))}, r"action\$camera cannot be read"),
        ({"action__camera": np.full((3, 2), np.inf)}, "NaN"),
        ({"action__forward": np.zeros((3, 2))}, r"action\$forward cannot be read"),
    ],
)
def test_arrays_that_are_not_right_are_named(tmp_path, arrays, message):
    path = write_stream(tmp_path / NAME, 3, **arrays)
    with pytest.raises(UserError, match=message):
        fill(path, tmp_path)


@pytest.mark.parametrize(
    "meta", ["{", "[]", "{}", '{"true_video_frame_count": "9"}', '{"true_video_frame_count": 2}']
)
def test_metadata_that_are_not_right_are_named(tmp_path, meta):
    path = write_stream(tmp_path / NAME, 3)
    (path / "metadata.json").write_text(meta)
    with pytest.raises(UserError, match=r"--skip"):
        fill(path, tmp_path)


def test_damaged_files_are_named(tmp_path):
    path = write_stream(tmp_path / NAME, 3)
    arrays = (path / "rendered.npz").read_bytes()
    for damaged in (b"", arrays[:50], arrays[: len(arrays) // 2]):
        (path / "rendered.npz").write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be read"):
            minerl_streams.fill(path, spec(), tmp_path, ())
    (path / "rendered.npz").write_bytes(arrays)
    (path / "recording.mp4").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"recording\.mp4 cannot be decoded"):
        minerl_streams.fill(path, spec(), tmp_path, ())


def test_arrays_beyond_reason_are_not_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(minerl_streams, "_LARGEST_ARRAY", 100)
    path = write_stream(tmp_path / NAME, 30)
    with pytest.raises(UserError, match="bytes are too many"):
        fill(path, tmp_path)


def test_the_example_contract_agrees_with_the_table_of_abstract_actions():
    for channel in contract("minerl").actions[2:]:
        assert channel.classes == len(minerl_streams.ABSTRACT[channel.select[0]])
    assert contract("minerl").actions[1].classes == minecraft.CAMERA_CLASSES
    assert json.dumps(contract("minerl").to_dict())
