"""Drivers are of the quality they claim, and a seed fixes everything."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from d4_datasets.errors import UserError
from d4_sim import mujoco_world
from d4_sim.driver import (
    KINDS,
    ScriptedPolicy,
    drive,
    episode_seed,
    quality,
    save,
    simulate,
)
from d4_sim.mujoco_world import HORIZON
from d4_sim.vector import run_episodes
from d4_sim.world import make_world
from d4_sim.yard_driver import YardDriver, around


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, float]]:
    # Drivers do not look at pictures, and those take most of the time.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mujoco_world._Camera, "render", lambda self, data: np.zeros((64, 64, 3), np.uint8))
        return quality(seed=0, episodes=40)


def test_drivers_are_ordered_by_quality(rows: dict[str, dict[str, float]]) -> None:
    assert rows["expert"]["return"] > 25
    assert rows["expert"]["success"] == 1.0
    assert rows["expert"]["fallen"] == 0.0
    assert rows["expert"]["return"] > 1.2 * rows["goal"]["return"]
    assert rows["goal"]["return"] > 4 * rows["random"]["return"]
    assert max(rows["wrong"]["return"], rows["wander"]["return"]) < 0.3 * rows["goal"]["return"]


def test_the_log_is_a_third_as_good_as_the_expert(rows: dict[str, dict[str, float]]) -> None:
    assert 0.2 < rows["data"]["return"] / rows["expert"]["return"] < 0.45
    assert rows["data"]["fallen"] > 0  # a log without a fall cannot teach what the pit is


def test_wanderers_cover_the_action_range() -> None:
    data = simulate(seed=1, episodes=6, kind="wander")
    spread = np.percentile(data["action"], [5, 95], axis=0)
    assert (spread[0] < -0.9).all()
    assert (spread[1] > 0.9).all()


def test_arrays_are_whole_and_follow_the_row_convention() -> None:
    data = simulate(seed=3, episodes=8)
    frames = len(data["frames"])
    assert data["frames"].shape == (frames, 64, 64, 3)
    assert data["frames"].dtype == np.uint8
    assert data["action"].dtype == data["reward"].dtype == data["pose"].dtype == np.float32
    assert data["episode_length"].sum() == frames == len(data["reward"]) == len(data["is_terminal"])
    assert set(data["kind"]) <= {0, 1, 2}
    last = data["episode_start"] + data["episode_length"] - 1
    assert (data["action"][last] == 0).all()
    assert not data["is_terminal"][np.setdiff1d(np.arange(frames), last)].any()
    assert (data["episode_length"][~data["is_terminal"][last]] == HORIZON + 1).all()
    assert (data["reward"][data["is_terminal"]] == 0).all()
    # Row 0 already carries the reward of the state it shows.
    world = make_world("yard")
    world.reset(episode_seed(3, 0), 0)
    np.testing.assert_array_equal(world.rewards, data["reward"][0])


def test_same_seed_same_episodes_however_they_are_split() -> None:
    whole = simulate(seed=9, episodes=4)
    second = simulate(seed=9, episodes=2, first=2)
    cut = whole["episode_start"][2]
    np.testing.assert_array_equal(whole["frames"][cut:], second["frames"])
    np.testing.assert_array_equal(whole["action"][cut:], second["action"])
    assert (simulate(seed=10, episodes=1)["frames"][0] != whole["frames"][0]).any()


def test_a_driver_of_another_kind_gets_the_same_layout() -> None:
    world = make_world("yard")
    first, second = (drive(world, 5, kind).frames[0] for kind in ("expert", "random"))
    np.testing.assert_array_equal(first, second)


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="expert"):
        YardDriver("champion", np.random.default_rng(0))


def test_around_goes_straight_unless_the_pit_is_in_the_way() -> None:
    goal, pit = np.array([0.8, 0.0]), np.array([0.0, 0.05])
    clear = np.array([0.8, 0.8])
    np.testing.assert_array_equal(around(np.array([-0.8, 0.8]), clear, pit), clear)
    np.testing.assert_array_equal(around(np.array([0.4, 0.0]), goal, pit), goal)  # already past it
    waypoint = around(np.array([-0.8, 0.0]), goal, pit)
    assert np.linalg.norm(waypoint - pit) >= 0.29
    assert waypoint[1] < 0  # the shorter side
    low = np.array([0.0, -0.80])  # below this pit there is only wall
    assert around(np.array([-0.6, -0.85]), np.array([0.6, -0.85]), low)[1] > -0.80


def test_run_episodes_agrees_with_its_worlds() -> None:
    seeds, tasks = [11, 12, 13, 14, 15, 16], [0, 1, 0, 1, 0, 1]
    batch = run_episodes("yard", seeds, tasks, ScriptedPolicy("expert"), horizon=HORIZON, keep_frames=True)
    assert batch.frames is not None
    assert batch.frames.shape == (6, HORIZON + 1, 64, 64, 3)
    assert batch.action.shape == (6, HORIZON + 1, 2)
    assert batch.reward.shape == (6, HORIZON + 1, 2)
    assert batch.success.all()
    assert (batch.length == HORIZON + 1).all()
    assert (batch.action[:, -1] == 0).all()
    assert batch.returns.min() > 22
    own = batch.reward[np.arange(6), :, tasks]
    np.testing.assert_allclose(batch.returns, own[:, 1:].sum(axis=1), rtol=1e-5)
    world = make_world("yard")
    np.testing.assert_array_equal(world.reset(13, 0).image, batch.frames[2, 0])
    np.testing.assert_array_equal(world.probes["pose"], batch.probes["pose"][2, 0])
    for t in range(HORIZON):
        observation, *_ = world.step(batch.action[2, t])
    np.testing.assert_array_equal(observation.image, batch.frames[2, HORIZON])


class _IntoThePit:
    """Drives at the pit and checks what it is given."""

    def bind(self, worlds: list) -> None:
        self.worlds = worlds

    def reset(self, n: int, tasks: np.ndarray) -> None:
        self.n, self.calls, self.ended = n, 0, np.zeros(n, bool)

    def act(self, images: np.ndarray, vectors: dict[str, np.ndarray], alive: np.ndarray) -> np.ndarray:
        assert images.shape == (self.n, 64, 64, 3)
        assert vectors == {}  # the pose is a probe, not an input
        assert not (alive & self.ended).any()
        self.ended |= ~alive
        self.calls += 1
        states = [w.state() for w in self.worlds]
        return np.stack([4 * (s["pit"] - s["position"]) for s in states])


def test_run_episodes_ends_early_when_all_have_fallen() -> None:
    policy = _IntoThePit()
    batch = run_episodes("yard", [1, 2, 3], [0, 0, 1], policy, horizon=HORIZON)
    assert (batch.length < HORIZON).all()
    assert policy.calls == batch.length.max() - 1
    assert not batch.success.any()
    for row, length in enumerate(batch.length):
        assert batch.terminal[row].nonzero()[0].tolist() == [length - 1]
        assert (batch.reward[row, length - 1 :] == 0).all()
        assert (batch.action[row, length - 1 :] == 0).all()


def test_run_episodes_stops_at_a_shorter_horizon() -> None:
    batch = run_episodes("yard", [1], [0], ScriptedPolicy("random", seed=4), horizon=7)
    assert batch.action.shape == (1, 8, 2)
    assert batch.length.tolist() == [8]


def test_save_is_atomic_and_wants_npz(tmp_path: Path) -> None:
    save(tmp_path / "x.npz", {"a": np.arange(3)})
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]
    with pytest.raises(UserError, match="npz"):
        save(tmp_path / "x.npy", {"a": np.arange(3)})


def test_kinds_begin_with_the_log_mix() -> None:
    assert KINDS[:3] == ("goal", "wrong", "wander")
