"""The control suite's tasks: rewards as where they come from, clocks, contracts, pictures, saved states."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d4_datasets.errors import UserError
from d4_sim.mujoco_world import Physics
from d4_sim.suite import files
from d4_sim.suite.control import ControlWorld, near
from d4_sim.suite.files import DM_CONTROL, FETCH, model_file
from d4_sim.world import World, make_world

NAMES = {
    "cartpole_swingup": ("cartpole", "swingup"),
    "reacher_easy": ("reacher", "easy"),
    "ball_in_cup_catch": ("ball_in_cup", "catch"),
    "finger_spin": ("finger", "spin"),
    "cheetah_run": ("cheetah", "run"),
    "walker_walk": ("walker", "walk"),
}

# what hardly ever happens by itself
RARE: dict[str, Callable[[Any, np.random.Generator], None]] = {
    "ball_in_cup_catch": lambda data, rng: data.qpos.__setitem__(
        slice(2, 4), rng.uniform([-0.06, 0.28], [0.06, 0.42])
    ),
    "finger_spin": lambda data, rng: data.qvel.__setitem__(2, rng.uniform(-30, 0)),
}

needs_models = pytest.mark.skipif(
    importlib.util.find_spec("dm_control") is None,
    reason=f"the models of dm_control are not here: pip install --no-deps dm_control=={DM_CONTROL.tested}",
)


def world_of(name: str) -> ControlWorld:
    made: Any = make_world(name)
    return made


def wander(world: World, ticks: int, seed: int = 0) -> np.ndarray:
    """Rewards [ticks, K] of a random walk."""
    rng = np.random.default_rng(seed)
    size = len(world.action_low)
    return np.stack([world.step(rng.uniform(-1, 1, size).astype(np.float32))[1] for _ in range(ticks)])


def test_near_is_flat_inside_and_falls_to_its_margin() -> None:
    x = np.array([-3.0, -1.0, 0.0, 1.0, 1.5, 2.0])
    assert near(x, -1, 1).tolist() == [0, 1, 1, 1, 0, 0]
    np.testing.assert_allclose(near(x, -1, 1, margin=1.0)[3:], [1.0, 0.1**0.25, 0.1])
    np.testing.assert_allclose(near(x, -1, 1, margin=1.0, at_margin=0.5)[[0, 3, 4, 5]], [0.0, 1.0, 0.75, 0.5])
    assert near(np.array([5.0]), 1.2, math.inf, margin=0.6).tolist() == [1.0]


def test_a_missing_package_is_one_sentence_that_says_how_to_get_it(monkeypatch) -> None:
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps dm_control==1\.0\.41"):
        model_file(DM_CONTROL, "walker.xml")
    with pytest.raises(UserError, match=r"comes with gymnasium-robotics, which is not installed"):
        model_file(FETCH, "push.xml")


@needs_models
def test_a_package_without_the_file_is_named_with_its_version(monkeypatch) -> None:
    monkeypatch.setattr(files.importlib.metadata, "version", lambda name: "0.0.1")
    with pytest.raises(UserError, match=r"dm_control 0\.0\.1 has no file suite/no_such\.xml"):
        model_file(DM_CONTROL, "no_such.xml")


@needs_models
@pytest.mark.parametrize("name", [*NAMES, "walker"])
def test_the_contract_is_that_of_the_world(name: str) -> None:
    world = world_of(name)
    contract = world.contract
    assert contract.name == name
    assert (contract.rate_hz, contract.latency_ms) == (world.rate_hz, world.latency_ms)
    assert contract.task_names == world.tasks
    np.testing.assert_array_equal(contract.action_low, world.action_low)
    np.testing.assert_array_equal(contract.action_high, world.action_high)
    assert {v.name: len(v.select) for v in contract.vectors()} == {k: len(v) for k, v in world.probes.items()}
    for rate in (world.rate_hz, 1000 / world.latency_ms):  # both are whole substeps
        steps = 1 / rate / world.model.opt.timestep
        assert steps == pytest.approx(round(steps))


@needs_models
@pytest.mark.parametrize("name", [*NAMES, "walker"])
def test_episodes_follow_from_their_seed_and_end_with_the_horizon(name: str) -> None:
    one, other = world_of(name), world_of(name)
    frames = [world.reset(7, 0).image for world in (one, other)]
    np.testing.assert_array_equal(*frames)
    assert frames[0].shape == (64, 64, 3)
    assert frames[0].std() > 5
    np.testing.assert_array_equal(wander(one, 5), wander(other, 5))
    np.testing.assert_array_equal(one.state()["qpos"], other.state()["qpos"])
    one.reset(8, 0)
    assert not np.array_equal(one.state()["qpos"], other.state()["qpos"])
    ends = [one.step(np.zeros_like(one.action_low))[2:] for _ in range(one.horizon)]
    assert ends[-1] == (False, True)
    assert set(ends[:-1]) == {(False, False)}


@needs_models
def test_worlds_of_one_class_show_their_own_targets() -> None:
    """All worlds of a class draw with one model, and the reacher's target is a part of it."""
    one, other = world_of("reacher_easy"), world_of("reacher_easy")
    first = one.reset(1, 0).image
    other.reset(2, 0)
    still = one.frame()[0].image
    np.testing.assert_array_equal(first, still)


@needs_models
def test_the_walker_is_paid_for_three_tasks_at_once() -> None:
    world = world_of("walker")
    at = Physics(
        qpos=np.zeros((3, 9)), qvel=np.zeros((3, 9)), ctrl=np.zeros((3, 6)),
        sensors=np.array([[0.0, 0, 0], [1.0, 0, 0], [8.0, 0, 0]]),
    )  # fmt: skip
    np.testing.assert_allclose(world.reward_of(at)[:, 0], 1.0)
    np.testing.assert_allclose(world.reward_of(at)[:, 1], [1 / 6, 1.0, 1.0])
    # 8 m/s, half of it at a distance of 4 m/s, and along that line to 1 m/s
    np.testing.assert_allclose(world.reward_of(at)[:, 2], [1 / 6, (5 * 0.125 + 1) / 6, 1.0])
    one = world_of("walker_walk")
    np.testing.assert_array_equal(one.reward_of(at)[:, 0], world.reward_of(at)[:, 1])


@needs_models
@pytest.mark.parametrize("name", NAMES)
def test_rewards_are_those_that_dm_control_gave(name: str) -> None:
    """States and rewards were written down where dm_control ran, with the versions that the file names."""
    world = world_of(name)
    world.reset(0, 0)
    told = json.loads((Path(__file__).parent / "dm_control_rewards.json").read_text())["states"][name]
    for state in told:
        for what in ("qpos", "qvel", "ctrl"):
            getattr(world._data, what)[:] = state[what]
        if "target" in state:
            world._targets[0] = state["target"]
        world._mj.mj_forward(world.model, world._data)
        assert float(world.rewards[0]) == pytest.approx(state["reward"], abs=2e-5)
    assert len({round(state["reward"], 3) for state in told}) > 1


@needs_models
@pytest.mark.parametrize(("name", "task"), NAMES.items())
def test_rewards_are_those_of_dm_control(name: str, task: tuple[str, str]) -> None:
    """In the same states under the same command; needs dm_control with a MuJoCo that it works with."""
    try:
        from dm_control import suite

        theirs = suite.load(*task, task_kwargs={"random": 0})
        theirs.reset()
    except Exception as error:  # whatever a version of MuJoCo that it does not know makes of it
        pytest.skip(f"dm_control itself does not run here: {type(error).__name__}")
    world, rng = world_of(name), np.random.default_rng(0)
    world.reset(0, 0)
    different = set()
    for _ in range(60):
        world.step(rng.uniform(-1, 1, len(world.action_low)).astype(np.float32))
        if rng.random() < 0.3:
            world.reset(int(rng.integers(1000)), 0)
        if name in RARE:
            RARE[name](world._data, rng)
        with theirs.physics.reset_context():
            theirs.physics.data.qpos[:] = world._data.qpos
            theirs.physics.data.qvel[:] = world._data.qvel
            theirs.physics.data.ctrl[:] = world._data.ctrl
            if name == "reacher_easy":
                theirs.physics.named.model.geom_pos["target", :2] = world._targets[0]
        expected = theirs.task.get_reward(theirs.physics)
        assert float(world.rewards[0]) == pytest.approx(expected, abs=2e-5)
        different.add(round(expected, 3))
    assert len(different) > 1
