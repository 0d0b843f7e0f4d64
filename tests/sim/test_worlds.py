"""Worlds by name: in pictures of another size, and names that are none."""

import numpy as np
import pytest

from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_sim.world import contract_text, make_world, world_class


@pytest.mark.parametrize("name", ["yard", "arm"])
def test_the_same_world_in_larger_pictures(name) -> None:
    usual, large = make_world(name), make_world(f"{name}_128")
    first, other = usual.reset(3, 0), large.reset(3, 0)
    assert first.image.shape == (64, 64, 3)
    assert other.image.shape == (128, 128, 3)
    halved = other.image.reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(halved - first.image).mean() < 12  # the same scene
    for key, value in first.vectors.items():
        np.testing.assert_array_equal(value, other.vectors[key])
    assert large.contract.hash != usual.contract.hash
    assert large.contract.name == f"{name}_128"


def test_the_contract_of_a_world_is_its_file_unless_it_is_resized(tmp_path) -> None:
    path = world_class("yard").contract_path()
    assert contract_text("yard") == contract_text("yard_64") == path.read_text()
    (tmp_path / "robot.yaml").write_text(contract_text("yard_128"))
    assert Contract.load(tmp_path / "robot.yaml").hash == make_world("yard_128").contract.hash
    assert make_world(make_world("yard_128").contract.name).contract.hash  # as d4-eval finds it


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("mars", "unknown world 'mars'"),
        ("yard_dawn", "unknown world 'yard_dawn'"),
        ("yard_100", "multiple of 8"),
        ("yard_4096", "multiple of 8"),
        ("crafter_128", "one size only"),
    ],
)
def test_names_that_are_none(name, sentence) -> None:
    if name.startswith("crafter"):
        pytest.importorskip("crafter")
    with pytest.raises(UserError, match=sentence):
        world_class(name)
