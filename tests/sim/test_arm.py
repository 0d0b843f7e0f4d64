"""The arm does what its documentation says: kinematics, time, limits, reward, layout, picture, drivers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d4_sim import mujoco_world
from d4_sim.arm import (
    BASE,
    JOINT_LIMIT,
    LINKS,
    SPEED_LIMIT,
    SUCCESS_RADIUS,
    Arm,
    joints_of,
    mirrored,
    sample_layout,
    ticks_between,
    tip_of,
)
from d4_sim.driver import ScriptedPolicy, drive, quality
from d4_sim.mujoco_world import HORIZON, LATENCY_MS, MOTOR_LAG, RATE_HZ
from d4_sim.vector import run_episodes
from d4_sim.world import World

angles = st.tuples(*(st.floats(-limit, limit) for limit in JOINT_LIMIT.tolist())).map(np.array)


@pytest.fixture(scope="module")
def arm() -> Arm:
    return Arm()


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, float]]:
    # Drivers do not look at pictures, and those take most of the time.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mujoco_world._Camera, "render", lambda self, data: np.zeros((64, 64, 3), np.uint8))
        return quality(seed=0, episodes=40, world="arm")


def push(world: Arm, shoulder: float, elbow: float) -> tuple[np.ndarray, bool, bool]:
    _, reward, terminal, truncated = world.step(np.array([shoulder, elbow], np.float32))
    return reward, terminal, truncated


def place(world: Arm, joints: np.ndarray) -> None:
    """Puts the arm at rest somewhere else."""
    world._data.qpos[:] = joints
    world._data.qvel[:] = 0


@given(angles)
def test_inverse_kinematics_inverts(joints: np.ndarray) -> None:
    tip = tip_of(joints)
    np.testing.assert_allclose(tip_of(mirrored(joints)), tip, atol=1e-9)
    solutions = joints_of(tip)
    for solution in solutions:
        np.testing.assert_allclose(tip_of(solution), tip, atol=1e-6)
        assert (np.abs(solution) <= JOINT_LIMIT).all()
    if abs(joints[1]) > 0.01 and (np.abs(joints) < JOINT_LIMIT - 1e-6).all():  # a straight arm is singular
        assert np.abs(solutions - joints).max(axis=1).min() < 1e-6


def test_out_of_reach_has_no_angles() -> None:
    assert joints_of(BASE + np.array([0.0, LINKS.sum() + 0.01])).shape == (0, 2)
    assert joints_of(BASE + np.array([0.0, 0.3])).shape == (0, 2)  # too near for the elbow
    assert joints_of(BASE + np.array([0.0, -0.9])).shape == (0, 2)  # behind the shoulder


def test_ticks_are_counted_by_the_nearer_elbow() -> None:
    end = np.array([0.4, -0.7])
    assert ticks_between(end + np.array([0.1, -0.3]), end) == pytest.approx(0.3 / SPEED_LIMIT * RATE_HZ)
    other = mirrored(end)
    assert (np.abs(other) < JOINT_LIMIT).all()
    assert ticks_between(other, end) == 0.0


def test_the_model_has_the_dimensions_of_the_module(arm: Arm) -> None:
    arm.reset(0, 0)
    model = arm._camera.model
    np.testing.assert_allclose(model.jnt_range, np.stack([-JOINT_LIMIT, JOINT_LIMIT], axis=1))
    np.testing.assert_allclose(model.actuator_ctrlrange, [[-SPEED_LIMIT, SPEED_LIMIT]] * 2)
    for joints in ([0.0, 0.0], [0.7, -1.9], [-0.3, 2.2]):
        place(arm, np.array(joints))
        arm._observe()
        np.testing.assert_allclose(arm._data.site("tip").xpos[:2], tip_of(np.array(joints)), atol=1e-9)


def test_is_a_world_with_a_matching_contract(arm: Arm) -> None:
    assert isinstance(arm, World)
    contract = arm.contract
    assert (contract.rate_hz, contract.latency_ms) == (RATE_HZ, LATENCY_MS)
    assert contract.task_names == arm.tasks
    np.testing.assert_array_equal(contract.action_low, arm.action_low)
    np.testing.assert_array_equal(contract.action_high, arm.action_high)
    observation = arm.reset(0, 0)
    assert observation.image.shape == (*contract.images[0].size, 3)
    for role, values in (("input", observation.vectors), ("probe", arm.probes)):
        assert {s.name: (len(s.select),) for s in contract.vectors(role)} == {
            name: value.shape for name, value in values.items()
        }
        assert all(value.dtype == np.float32 for value in values.values())


def test_same_seed_and_actions_give_the_same_pixels(arm: Arm) -> None:
    actions = np.random.default_rng(0).uniform(-2, 2, (8, 2)).astype(np.float32)

    def frames(world: Arm, seed: int) -> np.ndarray:
        return np.stack([world.reset(seed, 0).image, *(world.step(a)[0].image for a in actions)])

    first = frames(arm, 7)
    frames(arm, 8)  # something else in between
    np.testing.assert_array_equal(first, frames(Arm(), 7))
    assert (first[0] != frames(arm, 8)[0]).any()
    np.testing.assert_array_equal(arm.reset(3, 0).image, arm.reset(3, 1).image)


@pytest.mark.parametrize("joints", [[0.0, 0.0], [0.5, 1.5], [-0.6, -2.0]])
def test_a_command_acts_after_the_latency_and_alike_in_every_posture(arm: Arm, joints: list) -> None:
    arm.reset(1, 0)
    place(arm, np.array(joints))
    push(arm, 0.5, -1.0)
    # 40 ms of nothing, then 60 ms of a first-order lag of 40 ms.
    moved = 0.06 - MOTOR_LAG * (1 - np.exp(-0.06 / MOTOR_LAG))
    np.testing.assert_allclose(arm.state()["joints"] - joints, [0.5 * moved, -moved], atol=0.005)
    before = arm.state()["joints"]
    push(arm, 0.0, 0.0)  # the old command is still in force for 40 ms
    assert arm.state()["joints"][1] - before[1] < -0.04
    for _ in range(3):
        push(arm, 0.0, 0.0)
    np.testing.assert_allclose(arm.state()["velocity"], 0.0, atol=1e-3)


def test_speed_and_joint_limits_hold(arm: Arm) -> None:
    arm.reset(2, 0)
    place(arm, -JOINT_LIMIT)
    for _ in range(4):
        push(arm, 0.3, 9.0)
    np.testing.assert_allclose(arm.state()["velocity"], [0.3, SPEED_LIMIT], atol=0.02)
    np.testing.assert_allclose(arm.state()["command"], [0.3, SPEED_LIMIT], rtol=1e-6)
    for _ in range(26):
        push(arm, SPEED_LIMIT, SPEED_LIMIT)
    np.testing.assert_allclose(arm.state()["joints"], JOINT_LIMIT, atol=0.05)


def test_reward_and_success_are_those_of_the_tip(arm: Arm) -> None:
    arm.reset(5, 1)
    reward, terminal, _ = push(arm, 0.5, 0.5)
    distance = np.linalg.norm(arm.state()["discs"] - arm.probes["tip"], axis=1)
    np.testing.assert_allclose(reward, np.exp(-((distance / 0.37) ** 2)), rtol=1e-4)
    assert reward.dtype == np.float32
    assert not terminal
    for task in (0, 1):
        arm.reset(5, task)
        place(arm, joints_of(arm.state()["discs"][task])[0])
        assert arm.rewards[task] == pytest.approx(1.0)
        assert arm.success()
        arm._discs[task, 0] += SUCCESS_RADIUS - 0.01
        assert arm.success()
        assert arm.rewards[task] > arm.success_reward
        arm._discs[task, 0] += 0.02
        assert not arm.success()
        assert arm.rewards[task] < arm.success_reward


def test_truncated_at_the_horizon_and_never_terminal(arm: Arm) -> None:
    arm.reset(6, 0)
    ends = [push(arm, 2.0, -2.0)[1:] for _ in range(arm.horizon)]
    assert ends == [(False, False)] * (arm.horizon - 1) + [(False, True)]


def test_layouts_keep_their_distances() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        layout = sample_layout(rng)
        start, discs = layout["start"], layout["discs"]
        assert (np.abs(start) < JOINT_LIMIT).all()
        assert np.linalg.norm(discs[0] - discs[1]) >= 0.6
        assert np.abs(discs).max() + 0.25 <= 1.1  # in the picture
        for disc in discs:
            assert 0.5 <= np.linalg.norm(disc - tip_of(start)) <= 0.95
            ticks = np.abs(joints_of(disc) - start).max(axis=1).min() / SPEED_LIMIT * RATE_HZ
            assert 3.4 < ticks < 7.6


def test_everything_is_in_the_picture_where_it_should_be(arm: Arm) -> None:
    colours = {"red": (235, 36, 36), "blue": (51, 97, 255), "tip": (255, 235, 51), "table": (50, 58, 60)}
    for seed in range(8):
        image = arm.reset(seed, 0).image.astype(int)
        state = arm.state()
        tip = tip_of(state["joints"])
        # A link may cover the middle of a disc, hardly its far side.
        places = {"tip": tip, "table": np.array([0.0, -1.0])}
        for name, disc in zip(("red", "blue"), state["discs"], strict=True):
            outward = disc - BASE
            places[name] = disc + 0.15 * outward / np.linalg.norm(outward)
        for name, (x, y) in places.items():
            column, row = (round((v / 2.2 + 0.5) * 64 - 0.5) for v in (x, -y))
            assert np.abs(image[row, column] - colours[name]).max() < 30, (seed, name)


def test_drivers_are_ordered_by_quality(rows: dict[str, dict[str, float]]) -> None:
    assert rows["expert"]["return"] > 26
    assert rows["expert"]["success"] == 1.0
    assert rows["expert"]["return"] > 1.2 * rows["goal"]["return"]
    assert rows["goal"]["return"] > 3 * rows["random"]["return"]
    assert max(rows["wrong"]["return"], rows["wander"]["return"]) < 0.35 * rows["goal"]["return"]
    assert all(row["fallen"] == 0.0 for row in rows.values())


def test_the_log_is_a_third_as_good_as_the_expert(rows: dict[str, dict[str, float]]) -> None:
    assert 0.2 < rows["data"]["return"] / rows["expert"]["return"] < 0.45
    assert rows["random"]["return"] / rows["expert"]["return"] < 0.25


def test_an_episode_carries_its_vectors(arm: Arm) -> None:
    episode = drive(arm, 3, "wander")
    assert set(episode.vectors) == {"joints", "tip"}
    assert episode.vectors["joints"].shape == (HORIZON + 1, 2)
    tips = np.stack([tip_of(row) for row in episode.vectors["joints"]])
    np.testing.assert_allclose(episode.vectors["tip"], tips, atol=1e-5)


class _SeesJoints(ScriptedPolicy):
    """The expert, keeping the proprioception that it was given."""

    def reset(self, n: int, tasks: np.ndarray) -> None:
        super().reset(n, tasks)
        self.joints: list[np.ndarray] = []

    def act(self, images: np.ndarray, vectors: dict[str, np.ndarray], alive: np.ndarray) -> np.ndarray:
        assert set(vectors) == {"joints"}  # the tip is a probe, not an input
        self.joints.append(vectors["joints"])
        return super().act(images, vectors, alive)


def test_run_episodes_gives_joints_to_the_policy_and_keeps_the_tip() -> None:
    policy = _SeesJoints("expert")
    batch = run_episodes("arm", [11, 12, 13], [0, 1, 0], policy, horizon=HORIZON)
    assert batch.success.all()
    assert batch.returns.min() > 22
    assert batch.action.shape == (3, HORIZON + 1, 2)
    seen = np.stack(policy.joints, axis=1)
    tips = np.stack([[tip_of(joints) for joints in row] for row in seen])
    np.testing.assert_allclose(batch.probes["tip"][:, :-1], tips, atol=1e-5)
