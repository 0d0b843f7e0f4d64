"""Actions in three forms, checked without the game: MineRL's spaces and wire text, the camera's quantiser."""

from __future__ import annotations

from pathlib import Path

import minecraft_files
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from minerl_forms import ENV_KEYS, is_in_space, wire_text
from recordings import RECORDINGS, needs

from d4_datasets import minecraft
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_sim.minecraft import keys, minerl_worker

ROOT = Path(__file__).parents[2]
EXAMPLE = Contract.load(ROOT / "docs" / "examples" / "minecraft.yaml")
CONTRACT = Contract.from_dict(minecraft_files.in_degrees(EXAMPLE.to_dict()))
DATA = RECORDINGS / "vpt_actions"
FILES = sorted(DATA.glob("*.one_hot_actions.pt"))

# What the package says, as read out of it; test_minerl_itself compares with a package that is there.
SPACE = (
    "ESC", "attack", "back", "camera", "drop", "forward", "hotbar.1", "hotbar.2", "hotbar.3", "hotbar.4",
    "hotbar.5", "hotbar.6", "hotbar.7", "hotbar.8", "hotbar.9", "inventory", "jump", "left", "pickItem",
    "right", "sneak", "sprint", "swapHands", "use",
)  # fmt: skip
WIRE = (
    "forward 1\nleft 0\nback 0\nright 0\njump 0\ninventory 0\ndrop 0\nswapHands 0\nsneak 0\nsprint 0\n"
    "attack 0\nuse 0\npickItem 0\nhotbar.1 0\nhotbar.2 0\nhotbar.3 0\nhotbar.4 0\nhotbar.5 0\nhotbar.6 0\n"
    "hotbar.7 0\nhotbar.8 0\nhotbar.9 0\nESC 0\ncamera 3.0 -7.5"
)
CENTRES = (-10, -5.8095, -3.2154, -1.6095, -0.6154, 0, 0.6154, 1.6095, 3.2154, 5.8095, 10)
EDGES = (0.271, 1.0531, 2.3166, 4.3577, 7.6547)


angles = st.floats(-10, 10, width=32)
actions = st.builds(
    lambda pressed, pitch, yaw: np.array([*pressed, pitch, yaw], np.float64),
    hnp.arrays(np.int64, 23, elements=st.integers(0, 1)), angles, angles,
)  # fmt: skip


def test_the_spaces_are_minerls() -> None:
    assert ENV_KEYS == SPACE
    assert len(minecraft.KEYS) == 23
    assert tuple(key.replace("hotbar_", "hotbar.") for key in minecraft.KEYS) == minerl_worker.KEYS


def test_the_text_is_minerls() -> None:
    action = np.zeros(minecraft.SIZE)
    action[[minecraft.COLUMN[name] for name in ("forward", "pitch", "yaw")]] = 1, 3.0, -7.5
    assert wire_text(minecraft.to_env(action)) == WIRE


@given(action=actions)
def test_dictionaries_are_contained_and_come_back(action) -> None:
    env = minecraft.to_env(action)
    assert is_in_space(env)
    np.testing.assert_array_equal(minecraft.from_env(env), action)
    mine, its = env, minerl_worker.to_env(action)
    assert {k: v for k, v in mine.items() if k != "camera"} == {k: v for k, v in its.items() if k != "camera"}
    np.testing.assert_array_equal(mine["camera"], its["camera"])


@given(action=actions)
def test_rows_of_the_contract_come_back(action) -> None:
    """Keys and degrees pass unchanged; the 121 classes give the same class again."""
    row = keys.to_row(CONTRACT, action)
    assert row.shape == (25,)
    np.testing.assert_array_equal(keys.to_action(CONTRACT, row), action)
    coarse = EXAMPLE
    row = keys.to_row(coarse, action)
    assert row.shape == (24,)
    back = keys.to_action(coarse, row)
    np.testing.assert_array_equal(back[:23], action[:23])
    np.testing.assert_array_equal(keys.to_row(coarse, back), row)


@pytest.mark.parametrize("index", range(121))
def test_every_class_of_the_camera_comes_back(index) -> None:
    row = np.zeros(24, np.float32)
    row[-1] = index
    action = keys.to_action(EXAMPLE, row)
    assert keys.to_row(EXAMPLE, action)[-1] == index
    pitch, yaw = action[-2:]
    np.testing.assert_allclose((pitch, yaw), (CENTRES[index // 11], CENTRES[index % 11]), atol=6e-5)


def test_the_quantiser_over_its_whole_range() -> None:
    """Every hundredth of a degree against the table of centres and edges, and beyond it the outer bins."""
    degrees = np.linspace(-12, 12, 2401)
    edges = np.array([*(-edge for edge in reversed(EDGES)), *EDGES])
    clear = np.abs(degrees[:, None] - edges).min(1) > 1e-3  # the table has four digits
    expected = np.searchsorted(edges, degrees)
    np.testing.assert_array_equal(minecraft.to_bins(degrees)[clear], expected[clear])
    np.testing.assert_allclose(minecraft.to_degrees(np.arange(11)), CENTRES, atol=6e-5)
    np.testing.assert_array_equal(minecraft.to_bins(np.array([-180.0, 180.0])), (0, 10))
    inside = degrees[np.abs(degrees) <= 10]
    assert np.abs(minecraft.to_degrees(minecraft.to_bins(inside)) - inside).max() < 2.36


@needs("vpt_actions")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name[:12])
def test_real_actions_through_every_form(path) -> None:
    """A minute of a real player: contract row, dictionary and text agree, whatever the camera's kind."""
    columns = (
        "inventory", "ESC", *minecraft.HOTBAR, "forward", "back", "left", "right", "pitch", "yaw", "jump",
        "sneak", "sprint", "swapHands", "attack", "use", "pickItem", "drop",
    )  # fmt: skip
    values = torch.load(path, weights_only=True).double().numpy()
    recorded = np.zeros((len(values), minecraft.SIZE))
    recorded[:, [minecraft.COLUMN[name] for name in columns]] = values
    recorded[:, 23:] *= 20  # this file's unit
    for action in recorded:
        assert is_in_space(minecraft.to_env(action))
        back = keys.to_action(CONTRACT, keys.to_row(CONTRACT, action))
        np.testing.assert_array_equal(back[:23], action[:23])
        np.testing.assert_allclose(back[23:], np.clip(action[23:], -10, 10), rtol=1e-6)
        coarse = keys.to_action(EXAMPLE, keys.to_row(EXAMPLE, action))
        assert minecraft.to_class(coarse[23:]) == minecraft.to_class(action[23:])
        text = dict(line.split(" ", 1) for line in wire_text(minecraft.to_env(action)).splitlines())
        assert {key for key, value in text.items() if value == "1"} == {
            name.replace("hotbar_", "hotbar.") for name in minecraft.KEYS if action[minecraft.COLUMN[name]]
        }
        np.testing.assert_allclose([float(x) for x in text["camera"].split()], action[23:], rtol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"attack": 2},
        {"attack": True},
        {"fly": 1},
        {"camera": np.array([200, 0], np.float32)},
        {"camera": np.array([np.nan, 0], np.float32)},
        {"camera": np.zeros(2)},
    ],
)
def test_dictionaries_outside_the_space_are_known(change) -> None:
    assert not is_in_space(minecraft.to_env(np.zeros(minecraft.SIZE)) | change)


def changed(**parts) -> Contract:
    return Contract.from_dict(CONTRACT.to_dict() | parts)


def test_contracts_of_other_robots_are_refused() -> None:
    spec = CONTRACT.to_dict()
    other = spec["actions"][1] | {"topic": "/cmd_vel", "name": "base"}
    with pytest.raises(UserError, match=r"x has another action space: 'base' is on /cmd_vel"):
        keys.require_keyboard_and_mouse(changed(actions=[spec["actions"][0], other]), "x")
    with pytest.raises(UserError, match="x acts at 10 Hz"):
        keys.require_keyboard_and_mouse(changed(rate_hz=10), "x")
    picture = spec["observations"][0] | {"topic": "/front"}
    with pytest.raises(UserError, match="x observes /front; this game shows one picture"):
        keys.require_keyboard_and_mouse(changed(observations=[picture]), "x")
    jump = spec["actions"][0] | {"select": ["leap"]}
    with pytest.raises(UserError, match="has no 'leap'"):
        keys.require_keyboard_and_mouse(changed(actions=[jump]), "x")
    keys.require_keyboard_and_mouse(CONTRACT, "x")
    keys.require_keyboard_and_mouse(EXAMPLE, "x")
