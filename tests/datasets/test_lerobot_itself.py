"""Where LeRobot is installed: it opens what we write, and we read what it writes, item by item."""

import numpy as np
import pytest
from test_export import item, robot, write
from test_lerobot_source import JOINTS, arm

from d4_datasets.export import export
from d4_datasets.ingest import ingest
from d4_datasets.lerobot import Dataset

lerobot = pytest.importorskip("lerobot.datasets.lerobot_dataset", reason="lerobot is not installed")
TOP = "observation.images.top"


def picture(tensor):
    """A picture of LeRobot's [3, H, W] in [0, 1] as ours."""
    return (tensor.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


@pytest.mark.parametrize("plain", [False, True])
def test_lerobot_opens_our_datasets_as_they_are_and_plain(tmp_path, plain):
    spec = robot()
    root = write(
        tmp_path / "own", spec, [item(spec, 5 + n, n, action_mask=[True] * (5 + n)) for n in range(3)]
    )
    ours = Dataset(root)
    if plain:
        export(root, tmp_path / "plain", "lerobot")
        root = tmp_path / "plain"
    theirs = lerobot.LeRobotDataset("me/own", root=root)
    assert (len(theirs), theirs.num_episodes, theirs.fps) == (18, 3, 10)
    row = 0
    for number in range(3):
        frames = {camera.name: list(ours.frames(camera.name, number)) for camera in spec.images}
        columns = ours.columns(number)
        for step in range(5 + number):
            seen = theirs[row]
            row += 1
            for name in ("action", "index", "timestamp") if plain else columns:
                assert np.array_equal(np.reshape(seen[name], -1), np.reshape(columns[name][step], -1))
            assert seen["task"] == spec.task_names[columns["task_index"][step]]
            for camera, pictures in frames.items():
                assert np.array_equal(picture(seen[f"observation.images.{camera}"]), pictures[step])


@pytest.mark.parametrize("kind", ["video", "image"])
def test_we_read_what_lerobot_writes_and_see_the_same_pictures(tmp_path, kind):
    about = {"dtype": "float32", "shape": (4,), "names": JOINTS}
    features = {
        TOP: {"dtype": kind, "shape": (64, 96, 3), "names": ["height", "width", "channels"]},
        "observation.state": about,
        "action": about,
        "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
        "next.done": {"dtype": "bool", "shape": (1,), "names": None},
    }
    options = {"fps": 30, "features": features, "use_videos": kind == "video"}
    theirs = lerobot.LeRobotDataset.create("me/arm", root=tmp_path / "arm", **options)
    rng, rows = np.random.default_rng(0), []
    for number in range(3):
        for step in range(4 + number):
            seen = {
                name: rng.uniform(-1, 1, 4).astype(np.float32) for name in ("observation.state", "action")
            }
            seen |= {"next.reward": np.ones(1, np.float32), "next.done": np.array([step == 3 + number])}
            seen[TOP] = np.full((64, 96, 3), 20 * step + number, np.uint8)
            theirs.add_frame(seen | {"task": "lift it"})
            rows.append(seen)
        theirs.save_episode()
    theirs.finalize()
    again = lerobot.LeRobotDataset("me/arm", root=tmp_path / "arm")
    ingest([tmp_path / "arm"], arm(30, size=(64, 96)), tmp_path / "out")
    ours, row = Dataset(tmp_path / "out"), 0
    for number in range(3):
        columns = ours.columns(number)
        for step, frame in enumerate(ours.frames("top", number)):
            assert np.array_equal(columns["action"][step], rows[row]["action"])
            assert np.array_equal(columns["observation.joints"][step], rows[row]["observation.state"][[2, 1]])
            assert np.array_equal(frame, picture(again[row][TOP]))
            row += 1
        assert columns["is_terminal"].tolist() == [False] * (3 + number) + [True]
    assert row == len(again) == 15
