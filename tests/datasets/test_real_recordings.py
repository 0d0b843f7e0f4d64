"""Recordings of real robots and other people's recorders go through reading and ingest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from recordings import RECORDINGS, needs

from d4_datasets import messages
from d4_datasets.audit import audit
from d4_datasets.bags import Bag, find_bags, read_bag
from d4_datasets.contract import IMAGE_TYPES, Contract
from d4_datasets.errors import UserError
from d4_datasets.ingest import ingest
from d4_datasets.windows import Windows

ROOT = Path(__file__).parents[2]
CAR = RECORDINGS / "donkeycar"
ROBOT = ROOT / "docs" / "examples" / "donkeycar.yaml"

try:
    BAGS = find_bags(RECORDINGS)
except UserError:
    BAGS = []
pytestmark = needs()
needs_car = needs("donkeycar")


def camera_contract(topic: str, type_: str) -> Contract:
    """The example contract with another camera topic, and without its cut into pieces."""
    spec = Contract.load(ROBOT).to_dict()
    camera = {**spec["observations"][0], "topic": topic, "type": type_}
    return Contract.from_dict({**spec, "observations": [camera], "episode": None})


@pytest.mark.parametrize("path", BAGS, ids=lambda path: path.name)
def test_every_bag_is_read_in_order_of_time(path):
    bag = Bag(path)
    counts = dict.fromkeys((topic for topic in bag.topics if bag.decodable(topic)), 0)
    before = 0
    for topic, receive, msg in read_bag(path):
        assert receive >= before
        assert msg.__msgtype__ == bag.topics[topic]
        before = receive
        counts[topic] += 1
    assert sum(counts.values()) >= 10


@pytest.mark.parametrize("path", BAGS, ids=lambda path: path.name)
def test_every_camera_becomes_a_dataset_or_one_clear_sentence(path, tmp_path):
    cameras = [(topic, type_) for topic, type_ in Bag(path).topics.items() if type_ in IMAGE_TYPES]
    assert cameras
    for number, (topic, type_) in enumerate(cameras):
        out = tmp_path / str(number)
        sent = sum(1 for _ in read_bag(path, [topic]))
        if sent == 1:  # a recording of a single picture has no transition to learn from
            with pytest.raises(UserError, match="no episode came out"):
                ingest([path], camera_contract(topic, type_), out)
            assert not out.exists()
            continue
        summary = ingest([path], camera_contract(topic, type_), out)
        windows = Windows(out)
        assert 2 <= windows.num_frames == summary.frames <= sent + 1
        assert windows.images["front"].std() > 20  # pictures, not grey
        assert windows.action_mask.mean() > 0.9
        change = np.diff(windows.images["front"].astype(np.int16), axis=0)
        assert np.abs(change).mean(axis=(1, 2, 3)).max() > 1


@needs_car
def test_the_car_is_the_same_from_either_storage(tmp_path):
    contract = Contract.load(ROBOT)
    both = []
    for name in ("full_compressed_mcap", "full_compressed_db3"):
        ingest([CAR / name], contract, tmp_path / name)
        both.append(Windows(tmp_path / name))
    one, other = both
    assert one.num_frames == other.num_frames == 1000
    for name in ("action", "action_mask", "reward", "is_terminal", "episode_index"):
        assert np.array_equal(getattr(one, name), getattr(other, name))
    assert np.array_equal(one.images["front"], other.images["front"])


@needs_car
def test_the_car_keeps_its_pictures_and_commands(tmp_path):
    """The recorder wrote frame k and command k at the same moment: they belong to the same tick."""
    contract = Contract.load(ROBOT)
    ingest([CAR / "full_compressed_mcap"], contract, tmp_path / "data")
    windows = Windows(tmp_path / "data")
    bag = [(topic, msg) for topic, _, msg in read_bag(CAR / "full_compressed_mcap")]
    frames = [messages.decode(msg) for topic, msg in bag if topic == "/camera/image_raw/compressed"]
    drive = [(msg.linear.x, msg.angular.z) for topic, msg in bag if topic == "/cmd_vel"]
    for k in (0, 1, 499, 999):
        assert np.array_equal(windows.images["front"][k], messages.resize(frames[k], (48, 64)))
    assert windows.action_mask.all()
    np.testing.assert_allclose(windows.action, np.array(drive), atol=1e-6)
    assert (windows.action >= contract.action_low).all()
    assert (windows.action <= contract.action_high).all()


@needs_car
def test_the_one_drive_of_the_car_is_cut_so_that_seconds_of_it_can_be_held_out(tmp_path):
    ingest([CAR / "full_compressed_mcap"], Contract.load(ROBOT), tmp_path / "data")
    windows = Windows(tmp_path / "data")
    assert windows.episode_length.tolist() == [100] * 10
    assert not windows.is_terminal.any()
    train, held_out = windows.split()
    assert len(held_out) == 1
    assert len(train) == 9
    verdicts = audit(tmp_path / "data").verdicts
    assert not [v for v in verdicts if v.level == "ERROR"]
