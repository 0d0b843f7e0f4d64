"""The yard does what its documentation says: time, walls, pit, reward, layout, both looks, GL errors."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from d4_datasets.errors import UserError
from d4_sim.driver import drive
from d4_sim.mujoco_world import LATENCY_MS, RATE_HZ
from d4_sim.world import World, make_world
from d4_sim.yard import (
    PIT_RADIUS,
    ROBOT_LIMIT,
    SPEED_LIMIT,
    SUCCESS_RADIUS,
    Yard,
    YardDusk,
    sample_layout,
)


@pytest.fixture(scope="module")
def yard() -> Yard:
    return Yard()


def push(world: Yard, vx: float, vy: float) -> tuple[np.ndarray, bool, bool]:
    _, reward, terminal, truncated = world.step(np.array([vx, vy], np.float32))
    return reward, terminal, truncated


def pose(world: Yard) -> np.ndarray:
    return world.probes["pose"]


def place(world: Yard, position: np.ndarray) -> None:
    """Puts the robot at rest somewhere else."""
    world._data.qpos[:] = position
    world._data.qvel[:] = 0


def test_is_a_world_with_a_matching_contract(yard: Yard) -> None:
    assert isinstance(yard, World)
    contract = yard.contract
    assert (contract.rate_hz, contract.latency_ms) == (RATE_HZ, LATENCY_MS)
    assert contract.task_names == yard.tasks
    np.testing.assert_array_equal(contract.action_low, yard.action_low)
    np.testing.assert_array_equal(contract.action_high, yard.action_high)
    observation = yard.reset(0, 0)
    assert observation.image.shape == (*contract.images[0].size, 3)
    assert observation.image.dtype == np.uint8


def test_unknown_world_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="yard"):
        make_world("moon")


def test_same_seed_and_actions_give_the_same_pixels(yard: Yard) -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (8, 2)).astype(np.float32)

    def frames(world: Yard, seed: int) -> np.ndarray:
        return np.stack([world.reset(seed, 0).image, *(world.step(a)[0].image for a in actions)])

    first = frames(yard, 7)
    frames(yard, 8)  # something else in between
    np.testing.assert_array_equal(first, frames(Yard(), 7))
    assert (first[0] != frames(yard, 8)[0]).any()


def test_the_layout_does_not_depend_on_the_task(yard: Yard) -> None:
    np.testing.assert_array_equal(yard.reset(3, 0).image, yard.reset(3, 1).image)


def test_a_command_acts_after_the_latency(yard: Yard) -> None:
    yard.reset(1, 0)
    place(yard, np.zeros(2))
    yard._pit[:] = 5.0
    push(yard, 1.0, 0.0)
    # 40 ms of nothing, then 60 ms of a first-order lag of 40 ms.
    lag = 0.04
    expected = 0.06 - lag * (1 - np.exp(-0.06 / lag))
    assert pose(yard)[0] == pytest.approx(expected, abs=0.005)
    assert pose(yard)[1] == pytest.approx(0.0, abs=1e-6)
    before = pose(yard)[0]
    push(yard, 0.0, 0.0)  # the old command is still in force for 40 ms
    assert pose(yard)[0] - before > 0.04
    before = pose(yard)[0]
    for _ in range(5):
        push(yard, 0.0, 0.0)
    assert pose(yard)[0] - before < 0.01


def test_speed_follows_the_command_and_the_limits(yard: Yard) -> None:
    yard.reset(1, 0)
    place(yard, np.array([-0.9, 0.0]))
    yard._pit[:] = 5.0
    for _ in range(5):
        push(yard, 9.0, 0.5)
    np.testing.assert_allclose(yard.state()["velocity"], [SPEED_LIMIT, 0.5], atol=0.02)
    np.testing.assert_allclose(yard.state()["command"], [SPEED_LIMIT, 0.5])


def test_walls_hold(yard: Yard) -> None:
    yard.reset(2, 0)
    yard._pit[:] = 5.0
    for _ in range(30):
        push(yard, SPEED_LIMIT, -SPEED_LIMIT)
    np.testing.assert_allclose(pose(yard), [ROBOT_LIMIT, -ROBOT_LIMIT], atol=0.03)


def test_the_pit_ends_the_episode_for_good(yard: Yard) -> None:
    yard.reset(4, 0)
    pit = yard.state()["pit"]
    place(yard, pit + np.array([PIT_RADIUS + 0.01, 0.0]))
    _, terminal, _ = push(yard, 0.0, 0.0)
    assert not terminal
    terminals = [push(yard, -0.5, 0.0) for _ in range(3)]
    reward, terminal, _ = terminals[-1]
    assert terminal
    assert (reward == 0).all()
    assert not yard.success()
    assert np.linalg.norm(pose(yard) - pit) < PIT_RADIUS
    fallen_at = pose(yard)
    push(yard, 1.0, 1.0)
    np.testing.assert_array_equal(pose(yard), fallen_at)


def test_the_pit_is_not_jumped_over_between_ticks(yard: Yard) -> None:
    yard.reset(4, 0)
    pit = yard.state()["pit"]
    # A chord of 0.1 m, which full speed crosses in less than one tick.
    place(yard, pit + np.array([-0.06, np.sqrt(PIT_RADIUS**2 - 0.05**2)]))
    yard._data.qvel[:] = [SPEED_LIMIT, 0.0]
    yard._command = np.array([SPEED_LIMIT, 0.0], np.float32)
    _, terminal, _ = push(yard, SPEED_LIMIT, 0.0)
    assert terminal


def test_reward_is_the_formula_for_both_tasks(yard: Yard) -> None:
    yard.reset(5, 1)
    yard._pit[:] = 5.0
    reward, _, _ = push(yard, 0.3, 0.3)
    distance = np.linalg.norm(yard.state()["pads"] - pose(yard), axis=1)
    np.testing.assert_allclose(reward, np.exp(-((distance / 0.45) ** 2)), rtol=1e-4)
    assert reward.dtype == np.float32
    for task in (0, 1):
        yard.reset(5, task)
        place(yard, yard.state()["pads"][task])
        assert yard.rewards[task] == pytest.approx(1.0)
        assert yard.success()
        place(yard, yard.state()["pads"][task] + [SUCCESS_RADIUS + 0.01, 0])
        assert not yard.success()


def test_truncated_at_the_horizon(yard: Yard) -> None:
    yard.reset(6, 0)
    yard._pit[:] = 5.0
    ends = [push(yard, 0.0, 0.0)[2] for _ in range(yard.horizon)]
    assert ends == [False] * (yard.horizon - 1) + [True]


def test_layouts_keep_their_distances() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        layout = sample_layout(rng)
        pads, pit, start = layout["pads"], layout["pit"], layout["start"]
        assert np.linalg.norm(pads[0] - pads[1]) >= 0.80
        assert np.linalg.norm(pads - pit, axis=1).min() >= 0.60
        assert np.linalg.norm(start - pit) >= 0.55
        assert np.abs(pads).max() + 0.32 <= 1.1
        assert np.abs(pit).max() + 0.21 <= 1.1
        assert np.abs(start).max() <= ROBOT_LIMIT


def test_everything_is_in_the_picture_where_it_should_be(yard: Yard) -> None:
    """Regression: with too few triangles MuJoCo drew discs without their lids."""
    colours = {"red": (230, 25, 30), "blue": (30, 56, 235), "black": (5, 5, 5), "yellow": (255, 214, 0)}
    for seed in range(5):
        image = yard.reset(seed, 0).image.astype(int)
        state = yard.state()
        # The robot may stand on a pad; look at pixels that only one thing can cover.
        places = {"black": state["pit"], "yellow": state["position"] + [0.17, 0.0]}
        for name, pad in zip(("red", "blue"), state["pads"], strict=True):
            away = pad - state["position"]
            distance = np.linalg.norm(away)
            if distance > 0.12:
                places[name] = pad + 0.18 * away / distance
        for name, (x, y) in places.items():
            column, row = (round((v / 2.26 + 0.5) * 64 - 0.5) for v in (x, -y))
            assert np.abs(image[row, column] - colours[name]).max() < 60, (seed, name)
        floor = image[(image.max(2) - image.min(2)) < 12]
        assert len(floor) > 2000
        assert floor.std() > 3  # a faint texture, not one flat colour


def test_dusk_is_the_same_yard_in_other_colours(yard: Yard) -> None:
    day, dusk = drive(yard, 11, "goal"), drive(YardDusk(), 11, "goal")
    np.testing.assert_array_equal(day.action, dusk.action)
    np.testing.assert_array_equal(day.reward, dusk.reward)
    np.testing.assert_array_equal(day.vectors["pose"], dusk.vectors["pose"])
    assert YardDusk().contract.hash == yard.contract.hash
    changed = np.abs(day.frames.astype(int) - dusk.frames).max(axis=-1)
    assert (changed > 30).mean() > 0.99
    np.testing.assert_array_equal(drive(yard, 11, "goal").frames, day.frames)  # two models in one process


def test_everything_in_the_dusk_has_its_own_colour(yard: Yard) -> None:
    """Pads, pit, robot and floor: wherever two of them can be told apart, so can they in the dusk."""
    for world in (yard, YardDusk()):
        image = world.reset(0, 0).image.astype(int)
        state = world.state()
        spots = np.array([*state["pads"], state["pit"], state["position"] + [0.17, 0.0], [0.0, 0.0]])
        columns, rows = np.round((spots.T * [[1], [-1]] / 2.26 + 0.5) * 64 - 0.5).astype(int)
        colours = image[rows, columns]
        apart = np.abs(colours[:, None] - colours).max(axis=-1)
        assert apart[~np.eye(len(spots), dtype=bool)].min() > 60


def test_renders_fast_enough_to_collect_data(yard: Yard) -> None:
    """The target is 1000 frames/s on an idle core; this catches only a renderer that lost its settings."""
    yard.reset(0, 0)
    start = time.process_time()
    for _ in range(200):
        push(yard, 0.0, 0.0)
    assert 200 / (time.process_time() - start) > 250


def test_a_model_that_this_mujoco_cannot_read_is_no_missing_library() -> None:
    """The advice was to install libegl1."""

    class Broken(Yard):
        @classmethod
        def build(cls):
            raise ValueError("XML Error: Schema violation: unrecognized attribute: 'pots'\nElement 'geom'")

    with pytest.raises(
        UserError, match=r"^MuJoCo [\d.]+ cannot make the model of Broken \(XML Error"
    ) as raised:
        Broken()
    assert "libegl1" not in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("backend", ["osmesa-that-does-not-exist", "glfw"])
def test_no_gl_is_one_sentence(backend: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "d4_sim.driver", "--episodes", "1"],
        env={**environment, "MUJOCO_GL": backend, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: cannot render")
    assert "libegl1" in result.stderr
    assert "libosmesa6" in result.stderr
    assert "Traceback" not in result.stderr
