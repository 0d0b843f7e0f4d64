"""The ladder: its worlds are what they say, its lower rungs hold, and a broken algorithm breaks them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from d4_core import phases
from d4_core.config import Preset
from d4_core.imagination import imagine, pmpo_loss
from d4_sim import ladder
from d4_sim.ladder import EXACT, Echo, Result, real_returns, scaled
from d4_sim.square import HORIZON, Square, StateLogs, record

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def logs() -> StateLogs:
    return record(300, seed=0)


# ---- the world and its logs


def test_the_optimum_goes_round_the_pit_and_beats_everyone(logs) -> None:
    world = Square()
    best = real_returns(world, world.best)
    gen = torch.Generator().manual_seed(0)
    noise = real_returns(world, lambda state, *_: 2 * torch.rand(len(state), 2, generator=gen) - 1)
    data = np.add.reduceat(logs.reward, logs.episode_start).mean()
    # a straight way through the pit costs the episode: somebody who fell would show as a low return
    assert best.min() > 20
    assert best.mean() > 25 > 12 > data > 1.5 * noise.mean()


def test_driving_straight_through_the_pit_ends_the_episode() -> None:
    world = Square()
    state = torch.tensor([[-0.45, 0.0, 0.6, 0.0, 0.6, 0.5, 1.0]])
    rewards = []
    for _ in range(8):
        state = world.step(state, torch.tensor([[1.0, 0.0]]))
        rewards.append(world.reward(world.observe(state, torch.tensor([0]))).item())
    assert state[0, 6] == 0
    assert rewards[0] > 0
    assert rewards[1:] == [0.0] * 7  # at x = -0.15 it is in the pit, and stays there
    assert state[0, :2].norm() < 0.2


def test_logs_are_whole_episodes_of_the_true_world(logs) -> None:
    world, state = Square(), torch.from_numpy(logs.state)
    last = logs.episode_start + logs.episode_length - 1
    inner = np.setdiff1d(np.arange(logs.num_frames), last)
    torch.testing.assert_close(
        world.step(state[inner], torch.from_numpy(logs.action[inner])), state[inner + 1]
    )
    assert not logs.is_terminal[inner].any()
    assert logs.is_terminal[last].any()
    assert (logs.episode_length[~logs.is_terminal[last]] == HORIZON + 1).all()
    for task in range(2):
        reward = world.reward(world.observe(state, torch.full((len(state),), task)))
        np.testing.assert_allclose(logs.reward[:, task], reward)
    assert not logs.action_mask[last].any()
    assert 0.1 < logs.labelled.mean() < 0.3
    assert (logs.action_mask[inner] == logs.labelled[logs.episode_index[inner]]).all()


def test_windows_stay_in_their_episode_and_reach_both_ends(logs) -> None:
    episodes = np.arange(0, 300, 3)
    starts = logs.sample_starts(np.random.default_rng(0), 20_000, 4, episodes)
    index, valid = logs.indices(starts, 4)
    assert set(logs.episode_index[index].ravel()) <= set(episodes)
    assert (logs.episode_index[index] == logs.episode_index[starts][:, None]).all()
    assert valid.mean() > 0.95
    ends = (logs.episode_start + logs.episode_length - 1)[episodes]
    assert np.isin(index, logs.episode_start[episodes]).sum() > 0.005 * index.size
    assert np.isin(index, ends).sum() > 0.005 * index.size


def test_a_seed_fixes_the_recording() -> None:
    a, b, c = record(20, 1), record(20, 1), record(20, 2)
    np.testing.assert_array_equal(a.state, b.state)
    assert not np.array_equal(a.state[:20], c.state[:20])


# ---- rungs hold, and break where the algorithm is broken


def flipped(log_prob, advantage, *rest):
    return pmpo_loss(log_prob, -advantage, *rest)


def shifted(*args):
    """Every reward one step late, as if it belonged to the action before the one that earned it."""
    roll = imagine(*args)
    return replace(roll, reward=roll.reward.roll(-1, 1))


def small(scale: float) -> Preset:
    """Fewer steps and narrower heads."""
    return scaled(replace(EXACT, hidden=64), scale)


def test_rung_1_reaches_the_best_arm() -> None:
    result = ladder.bandit(0, small(0.5))
    assert result.passed
    assert result.start < 0.2 * result.optimum


def test_rung_1_breaks_under_a_flipped_advantage(monkeypatch) -> None:
    monkeypatch.setattr(ladder, "pmpo_loss", flipped)
    assert ladder.bandit(0, small(0.1)).closed < 0


def test_rung_2_credits_the_action_that_earned_the_reward() -> None:
    assert ladder.last_action(0, small(0.5)).passed


def test_rung_2_breaks_when_the_reward_is_one_step_off(monkeypatch) -> None:
    monkeypatch.setattr(phases, "imagine", shifted)
    assert ladder.last_action(0, small(0.25)).closed < 0.3


def test_rung_3_closes_a_part_of_the_gap_in_the_true_world() -> None:
    """A quarter of the steps do not suffice for the threshold."""
    result = ladder.oracle(0, small(0.25))
    assert result.closed > 0.25
    assert result.low > 1
    assert 12 < result.start < result.after < result.optimum


def test_rung_3_breaks_under_a_flipped_advantage(monkeypatch) -> None:
    monkeypatch.setattr(phases, "pmpo_loss", flipped)
    assert ladder.oracle(0, small(0.1)).closed < 0


@pytest.mark.slow
def test_rung_4_improves_the_clone_in_a_learned_world() -> None:
    assert ladder.learned(0).passed


# ---- the command


def fake(closed: float):
    def rung(seed: int, cfg) -> Result:
        after = 10 + 10 * closed
        return Result(
            rung="fake",
            seed=seed,
            start=10.0,
            after=after,
            optimum=20.0,
            low=after - 10,
            required=0.5,
            seconds=0.0,
        )

    return rung


@pytest.mark.parametrize(("closed", "code"), [(0.9, 0), (0.2, 1)])
def test_the_command_names_the_rung_that_fails(
    closed: float, code: int, monkeypatch, tmp_path: Path, capsys
) -> None:
    monkeypatch.setattr(ladder, "RUNGS", {"fine": fake(0.8), "fake": fake(closed)})
    monkeypatch.setattr(ladder.threads, "configure", lambda n: n)
    out = tmp_path / "sub" / "ladder.json"
    monkeypatch.setattr("sys.argv", ["ladder", "--seeds", "3", "4", "--out", str(out)])
    if code:
        with pytest.raises(SystemExit) as stop:
            ladder.main()
        assert stop.value.code == code
        assert "'fake' (seed 3)" in capsys.readouterr().err
    else:
        ladder.main()
    rows = json.loads(out.read_text())
    assert [row["seed"] for row in rows] == [3, 4, 3, 4]
    assert rows[2]["closed"] == pytest.approx(closed)
    assert rows[2]["passed"] is (code == 0)


def test_the_secret_action_is_on_the_policys_grid() -> None:
    world = Echo()
    distance = (Echo.secret[..., None] - world.space.centres).abs().amin(-1)
    assert distance.max() < 1e-6
