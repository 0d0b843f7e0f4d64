"""Calibration: returns and tables against plain loops, and which frames count."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d4_sim.calibration import Recorder, calibrate, compare, discounted, judge_value, read, table
from d4_sim.vector import EpisodeBatch

LIMIT = 6  # ticks of an episode


def episodes(reward: np.ndarray, length: np.ndarray, terminal: np.ndarray | None = None) -> EpisodeBatch:
    """Episodes of one task with rewards (N, T + 1); `terminal` (N,): those that fell at their last frame."""
    n, rows = reward.shape
    ends = np.zeros((n, rows), bool)
    if terminal is not None:
        ends[np.flatnonzero(terminal), length[terminal] - 1] = True
    return EpisodeBatch(
        action=np.zeros((n, rows, 1)), reward=reward[..., None], terminal=ends, probes={},
        length=length, task=np.zeros(n, np.int64), success=np.zeros(n, bool),
    )  # fmt: skip


def models_of(gamma: float, **networks) -> SimpleNamespace:
    """What of a run's models is asked: gamma and the heads."""
    imagination = SimpleNamespace(settings=SimpleNamespace(discount=gamma))
    return SimpleNamespace(preset=SimpleNamespace(imagination_training=imagination), **networks)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=12), st.floats(0.5, 1.0))
@settings(deadline=None, max_examples=40)
def test_returns_are_what_the_sum_says(rewards: list[float], gamma: float) -> None:
    got = discounted(np.array([rewards]), gamma)[0]
    for t in range(len(rewards)):
        later = enumerate(rewards[t + 1 :])
        assert got[t] == pytest.approx(sum(gamma**k * r for k, r in later), abs=1e-9)


@given(st.integers(1, 60), st.integers(0, 100))
@settings(deadline=None, max_examples=40)
def test_a_table_keeps_every_pair_in_bins_that_rise(count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    predicted, real = rng.random(count), rng.random(count)
    rows = table(predicted, real)
    sizes = [row["count"] for row in rows]
    assert len(rows) == min(10, count)
    assert sum(sizes) == count
    assert max(sizes) - min(sizes) <= 1
    assert sorted(row["predicted"] for row in rows) == [row["predicted"] for row in rows]
    assert sum(r["real"] * r["count"] for r in rows) == pytest.approx(real.sum())
    assert sum(r["predicted"] * r["count"] for r in rows) == pytest.approx(predicted.sum())


def test_a_constant_has_no_correlation_but_a_bias() -> None:
    row = compare("x", np.ones(5), np.arange(5.0))
    assert math.isnan(row["x_correlation"])
    assert row["x_bias"] == -1.0


def test_an_exact_critic_is_found_exact_and_only_early_frames_count() -> None:
    reward = np.random.default_rng(0).random((8, LIMIT + 1)).astype(np.float32)
    batch = episodes(reward, np.full(8, LIMIT + 1))
    value = discounted(reward, 0.5)[:, :LIMIT]
    row = judge_value(models_of(0.5), value, reward, batch)
    assert row["value_correlation"] == pytest.approx(1.0)
    assert row["value_bias"] == pytest.approx(0.0, abs=1e-6)
    # gamma 0.5 looks two ticks ahead: frames 0..4 of 6 have them
    assert sum(r["count"] for r in row["value_calibration"]) == 8 * 5
    assert row["value_cut"] == pytest.approx(np.mean([0.5 ** (6 - t) for t in range(5)]))
    late = value.copy()
    late[:, 5] = 100.0
    assert judge_value(models_of(0.5), late, reward, batch) == row


def test_a_long_view_is_judged_where_two_thirds_of_the_episode_remain() -> None:
    reward = np.ones((2, LIMIT + 1), np.float32)
    row = judge_value(models_of(0.99), np.zeros((2, LIMIT)), reward, episodes(reward, np.full(2, LIMIT + 1)))
    assert sum(r["count"] for r in row["value_calibration"]) == 2 * 3


def test_steady_reward_makes_an_exact_critic_exceed_the_return_by_the_cut() -> None:
    reward = np.ones((3, LIMIT + 1), np.float32)
    value = np.full((3, LIMIT), 1 / (1 - 0.5))
    row = judge_value(models_of(0.5), value, reward, episodes(reward, np.full(3, LIMIT + 1)))
    assert row["value_bias"] == pytest.approx(2.0 * row["value_cut"])


def test_a_fall_ends_the_return_and_nothing_is_cut_off_there() -> None:
    reward = np.zeros((2, LIMIT + 1), np.float32)
    reward[:, 1:3] = 1.0
    batch = episodes(reward, np.array([3, 3]), np.array([True, True]))
    row = judge_value(models_of(0.5), discounted(reward, 0.5)[:, :LIMIT], reward, batch)
    assert sum(r["count"] for r in row["value_calibration"]) == 2 * 2  # the frame of the fall has no value
    assert row["value_bias"] == pytest.approx(0.0)
    assert row["value_cut"] == 0.0


def test_reward_and_divergence_are_measured_at_the_frames_that_were_reached() -> None:
    reward = np.random.default_rng(0).random((3, LIMIT + 1)).astype(np.float32)
    length = np.array([LIMIT + 1, 3, 4])
    h = torch.from_numpy(reward[:, :LIMIT, None].copy())
    for i, n in enumerate(length):
        h[i, n:] = 1e3  # the kept picture of a world that has ended
    h[:, 0] = 0.0
    cloned, acting = (SimpleNamespace(first=lambda h, k=k: h * 0 + k) for k in (0.25, 1.0))
    space = SimpleNamespace(kl=lambda p, q: (p - q).sum(-1))
    agent = SimpleNamespace(predict_reward=lambda h: h[..., 0] + 0.5, policy=cloned, space=space)
    models = models_of(0.5, agent=agent, critic=None)

    def readings() -> list:
        frames = (SimpleNamespace(models=models, head=acting, features=frame) for frame in h.unbind(1))
        return [read(session) for session in frames]

    row = calibrate(models, readings(), episodes(reward, length))
    assert row["reward_correlation"] == pytest.approx(1.0)
    assert row["reward_bias"] == pytest.approx(0.5)
    assert sum(r["count"] for r in row["reward_calibration"]) == 5 + 2 + 3
    assert row["kl_to_cloned"] == pytest.approx(0.75)
    assert not any(name.startswith("value") for name in row)
    models.critic = lambda h: h[..., 0]
    assert "value_calibration" in calibrate(models, readings(), episodes(reward, length))


def test_a_recorder_is_invisible_to_session_and_worlds() -> None:
    class Plain:
        def reset(self, n, tasks):
            self.n = n

        def act(self, images, vectors, alive):
            return images + 1

    recorder = Recorder(Plain())
    recorder.reset(2, np.zeros(2))
    assert recorder.session.n == 2
    assert recorder.act(np.zeros(2), {}, np.ones(2, bool)).tolist() == [1, 1]
    assert recorder.readings == []
    assert not hasattr(recorder, "bind")
    plain = Plain()
    plain.bind = lambda worlds: worlds
    assert Recorder(plain).bind("these") == "these"
