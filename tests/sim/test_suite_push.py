"""The puck, the Fetch and the planner: experts succeed, plans come true, other goals are other goals."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from d4_datasets.errors import UserError
from d4_sim import mujoco_world
from d4_sim.arm import LINKS, joints_of, tip_of
from d4_sim.driver import KINDS, drive
from d4_sim.mujoco_world import MujocoWorld, Physics
from d4_sim.suite import arm_push
from d4_sim.suite.planner import MppiConfig, Planner, threads
from d4_sim.suite.push import CONTACT, SUCCESS_RADIUS, Push, sample_layout
from d4_sim.world import make_world

SMALL = MppiConfig(copies=12, horizon=6)
needs_fetch = pytest.mark.skipif(
    importlib.util.find_spec("gymnasium_robotics") is None,
    reason="the model of the Fetch is not here: pip install --no-deps gymnasium-robotics==1.4.2",
)


@pytest.fixture(scope="module")
def blind():
    """Worlds without pictures, which take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mujoco_world._Camera, "render", lambda self, data: np.zeros((64, 64, 3), np.uint8))
        yield


def made(name: str) -> Any:
    return make_world(name)


def own_return(world: Any, seed: int, task: int, kind: str) -> tuple[float, bool]:
    world.reset(seed, task)
    driver, total = world.driver(kind, np.random.default_rng(seed)), 0.0
    for _ in range(world.horizon):
        total += float(world.step(driver.act(world))[1][task])
    return total, world.success()


# ---- the puck


def test_layouts_keep_their_distances() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        layout = sample_layout(rng)
        assert np.linalg.norm(layout["puck"] - layout["target"]) > 2 * SUCCESS_RADIUS
        assert np.linalg.norm(layout["puck"] - layout["pusher"]) > CONTACT


def test_the_arm_reaches_all_that_its_tasks_need() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        layout = arm_push.sample_layout(rng)
        puck, target = layout["puck"], layout["target"]
        behind = puck - 1.25 * CONTACT * (target - puck) / np.linalg.norm(target - puck)
        for place in (tip_of(layout["joints"]), behind, target):
            assert len(joints_of(place, arm_push.JOINT_LIMIT)) == 2  # with either elbow
        assert np.linalg.norm(tip_of(layout["joints"]) - puck) > CONTACT


def test_the_arms_model_has_the_dimensions_of_its_module() -> None:
    world = made("arm_push")
    world.reset(0, 0)
    model, data = world.model, world._data
    limit, speed = arm_push.JOINT_LIMIT, arm_push.SPEED_LIMIT
    np.testing.assert_allclose(model.jnt_range[2:], np.stack([-limit, limit], axis=1))
    np.testing.assert_allclose(model.actuator_ctrlrange, [[-speed, speed]] * 2)
    assert model.geom("finger").size[0] + model.geom("puck").size[0] == pytest.approx(CONTACT)
    for joints in (np.zeros(2), np.array([0.7, -1.9])):
        data.qpos[2:] = joints
        world._refresh()
        np.testing.assert_allclose(data.site("tip").xpos[:2], tip_of(joints), atol=1e-9)
        np.testing.assert_allclose(data.geom("finger").xpos[2], data.geom("puck").xpos[2], atol=0.01)
    assert tip_of(np.zeros(2))[1] == pytest.approx(data.body("upper").xpos[1] + LINKS.sum())


def test_the_contract_is_that_of_the_world() -> None:
    for name in ("push", "arm_push", *(["fetch"] if importlib.util.find_spec("gymnasium_robotics") else [])):
        world = made(name)
        contract = world.contract
        assert (contract.name, contract.task_names) == (name, world.tasks)
        assert (contract.rate_hz, contract.latency_ms) == (world.rate_hz, world.latency_ms)
        np.testing.assert_allclose(contract.action_high, world.action_high)
        seen = world.reset(0, 0).vectors
        sizes = {v.name: len(v.select) for v in contract.vectors()}
        assert sizes == {k: len(v) for k, v in (seen | world.probes).items()}


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize("name", ["push", "arm_push"])
def test_the_expert_pushes_and_reaches_and_random_does_neither(name: str) -> None:
    world = made(name)
    for task in (0, 1):
        best = [own_return(world, seed, task, "expert") for seed in range(8)]
        chance = [own_return(world, seed, task, "random") for seed in range(8)]
        assert all(success for _, success in best)
        assert np.mean([r for r, _ in best]) > 30 > 15 > np.mean([r for r, _ in chance])


@pytest.mark.usefixtures("blind")
def test_the_arms_tip_moves_the_puck_and_its_links_do_not() -> None:
    world = made("arm_push")
    world.reset(0, 0)
    over = tip_of(np.array([0.3, 0.0]))
    world._data.qpos[:] = *(over - [0.0, 0.4]), 0.3, 0.0  # a link lies over the puck
    for _ in range(5):
        world.step(np.zeros(2, np.float32))
    np.testing.assert_allclose(world.state()["puck"], over - [0.0, 0.4], atol=1e-6)
    world._data.qpos[:2] = over - [CONTACT + 0.02, 0.0]
    for _ in range(8):
        world.step(np.array([1.0, 0.0], np.float32))
    assert world.state()["puck"][0] < over[0] - CONTACT - 0.1


@pytest.mark.usefixtures("blind")
def test_touching_moves_the_puck_and_nothing_else_does() -> None:
    world = Push()
    world.reset(0, 0)
    before = world.state()["puck"]
    for _ in range(5):
        world.step(np.zeros(2, np.float32))
    np.testing.assert_allclose(world.state()["puck"], before, atol=1e-6)
    world._data.qpos[2:] = before - [CONTACT + 0.02, 0.0]
    for _ in range(8):
        world.step(np.array([1.0, 0.0], np.float32))
    assert world.state()["puck"][0] > before[0] + 0.1


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize(("name", "task"), [("push", 0), ("arm_push", 1)])
def test_the_wrong_driver_does_the_other_task(name: str, task: int) -> None:
    world = made(name)
    wrong = [own_return(world, seed, task, "wrong")[0] for seed in range(6)]
    right = [own_return(world, seed, task, "goal")[0] for seed in range(6)]
    assert np.mean(wrong) < 0.5 * np.mean(right)


@needs_fetch
@pytest.mark.usefixtures("blind")
def test_the_fetch_reaches_and_pushes_its_block() -> None:
    world = made("fetch")
    for task in (0, 1):
        results = [own_return(world, seed, task, "expert") for seed in range(3)]
        assert all(success for _, success in results), world.tasks[task]
    assert own_return(world, 0, 1, "random")[0] < 10


@needs_fetch
def test_fetch_worlds_show_their_own_spots() -> None:
    one, other = made("fetch"), made("fetch")
    first = one.reset(1, 0).image
    other.reset(2, 0)
    np.testing.assert_array_equal(one.frame()[0].image, first)


# ---- the planner


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize("name", ["push", "arm_push", "yard", "arm"])
def test_what_a_plan_scores_is_what_then_happens(name: str) -> None:
    """Rollouts see the same physics, latency and clock as the world that they were begun in."""
    world: MujocoWorld = made(name)
    rng = np.random.default_rng(0)
    way = rng.uniform(-1, 1, (3, 2)).astype(np.float32)

    def begin() -> None:
        world.reset(4, 0)
        for action in way:
            world.step(action)

    begin()
    planner = Planner(world, SMALL, rng)
    plans = rng.uniform(-1, 1, (3, SMALL.horizon, 2)).astype(np.float32).astype(float)
    promised = planner.evaluate(plans, 1)
    for plan, value in zip(plans, promised, strict=True):
        begin()
        total = 0.0
        for action in plan:
            world.step((action * world.action_high).astype(np.float32))
            total += float(world.score(_alone(world), 1)[0])
        assert value == pytest.approx(total, rel=1e-4)


def _alone(world: MujocoWorld) -> Physics:
    data = world._data
    return Physics(*(np.array(x)[None] for x in (data.qpos, data.qvel, data.ctrl, data.sensordata)))


@pytest.mark.usefixtures("blind")
def test_planning_leaves_the_world_as_it_is_and_follows_from_its_noise(monkeypatch) -> None:
    world: MujocoWorld = made("push")
    world.reset(1, 0)
    before = world.physics()
    commands = []
    for count in ("1", "2"):
        monkeypatch.setenv("OMP_NUM_THREADS", count)
        assert threads() == int(count)
        planner = Planner(world, SMALL, np.random.default_rng(5))
        commands.append([planner.act(0) for _ in range(2)])
        np.testing.assert_array_equal(world.physics(), before)
    np.testing.assert_array_equal(*commands)


@pytest.mark.usefixtures("blind")
def test_the_planner_is_an_expert_in_a_world_that_it_was_not_made_for() -> None:
    world = made("yard")
    total = 0.0
    for seed in range(2):
        world.reset(seed, 0)
        planner = Planner(world, replace(SMALL, copies=32, horizon=12), np.random.default_rng(seed))
        for _ in range(world.horizon):
            total += float(world.step((planner.act(0) * world.action_high).astype(np.float32))[1][0]) / 2
    assert total > 20  # random gets 5, the scripted optimum 27 of 30


def test_a_world_that_says_nothing_is_one_sentence() -> None:
    class Mute(Push):
        score = MujocoWorld.score

    with pytest.raises(UserError, match="does not say what a planner should do"):
        Mute().score(Physics(*[np.zeros((1, 4))] * 4), 0)


@pytest.mark.usefixtures("blind")
@pytest.mark.skipif(importlib.util.find_spec("dm_control") is None, reason="the models of dm_control")
def test_planned_drivers_are_of_mixed_quality() -> None:
    world = made("reacher_easy")
    means = {
        kind: np.mean([own_return(world, seed, 0, kind)[0] for seed in range(4)])
        for kind in ("expert", "goal", "wrong")
    }
    assert means["expert"] > 40
    assert means["wrong"] < means["goal"] <= means["expert"] + 5


@pytest.mark.usefixtures("blind")
def test_an_episode_is_as_long_as_its_world_says() -> None:
    episode = drive(made("push"), 3)
    assert episode.frames.shape[0] == Push.horizon + 1
    assert episode.reward.shape == (Push.horizon + 1, 2)
    assert KINDS[episode.kind] in ("goal", "wrong", "wander")
