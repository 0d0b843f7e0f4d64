"""Heads: two-hot values, initial predictions and layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d4_core.agent import AgentConfig, Critic, Head, TwoHot, symexp, symlog


@given(st.floats(-1e6, 1e6))
def test_symlog_inverts(value: float) -> None:
    x = torch.tensor(value, dtype=torch.float64)
    torch.testing.assert_close(symexp(symlog(x)), x, rtol=1e-9, atol=1e-9)
    assert symlog(-x) == -symlog(x)


@given(value=st.floats(-6, 6), bins=st.integers(3, 101))
def test_two_hot_round_trip_is_exact(value: float, bins: int) -> None:
    """A head that outputs the target distribution predicts the target: rare 0/1 rewards are not blurred."""
    dist = TwoHot(bins, (-2.0, 2.0))
    target = torch.tensor(value)
    grid = torch.linspace(-2, 2, bins)
    torch.testing.assert_close(dist.centres, symexp(grid))
    logits = torch.full((bins,), -1e9)
    weights = torch.zeros(bins)
    upper = int(
        torch.searchsorted(dist.centres, target.clamp(dist.centres[0], dist.centres[-1])).clamp(1, bins - 1)
    )
    low, high = dist.centres[upper - 1], dist.centres[upper]
    share = ((target - low) / (high - low)).clamp(0, 1)
    weights[upper - 1], weights[upper] = 1 - share, share
    logits = torch.where(weights > 0, weights.clamp_min(1e-30).log(), logits)
    expected = target.clamp(dist.centres[0], dist.centres[-1])
    torch.testing.assert_close(dist.mean(logits), expected, rtol=1e-5, atol=1e-5)
    # and that output is the one the loss asks for
    entropy = -(weights * weights.clamp_min(1e-30).log()).sum()
    torch.testing.assert_close(-dist.log_prob(logits, target), entropy, rtol=1e-4, atol=1e-4)


def test_two_hot_gradient_points_to_the_target() -> None:
    dist = TwoHot(21, (-1.0, 1.0))
    logits = torch.zeros(21, requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=0.1)
    for _ in range(400):
        optimiser.zero_grad()
        (-dist.log_prob(logits, torch.tensor(0.73))).backward()
        optimiser.step()
    assert abs(dist.mean(logits).item() - 0.73) < 0.01


def test_untrained_heads_say_the_same_everywhere(make_dynamics, make_agent) -> None:
    """Born from noise, a critic signs the first advantages at random; zero output weights prevent it."""
    agent = make_agent(make_dynamics(), awake=False)
    h = torch.randn(5, agent.policy.trunk[0].in_features)
    assert not agent.policy(h).any()
    assert (agent.predict_continue(h) == 0.5).all()
    reward = agent.predict_reward(h)
    assert (reward == reward[0]).all()
    assert reward.abs().max() < 1e-3
    value = Critic(agent.cfg, h.shape[1])(h)
    assert (value == value[0]).all()


@pytest.mark.parametrize(
    ("limits", "error"), [((-1.0, 1.0), 1e-4), ((-20.0, 20.0), 1e-3), ((-1.0, 4.0), 5e-3)]
)
def test_initial_prediction_is_about_zero(limits: tuple[float, float], error: float) -> None:
    """A uniform start would predict the middle of the range: millions, for the widest."""
    cfg = AgentConfig(num_tasks=1, hidden=8, value_bins=81, value_range=limits)
    assert Critic(cfg, 4)(torch.randn(4)).abs().item() < error


def test_every_reward_lead_starts_near_zero(make_dynamics, make_agent) -> None:
    agent = make_agent(make_dynamics(), awake=False, leads=3, reward_bins=41)
    h = torch.randn(5, agent.reward.trunk[0].in_features)
    assert agent.reward_dist.mean(agent.reward(h)).abs().max() < 1e-3


def test_heads_give_one_block_per_lead_and_first_is_lead_zero() -> None:
    head = Head(4, 8, outputs=3, leads=5)
    torch.nn.init.normal_(head.out.weight)
    h = torch.randn(2, 6, 4)
    assert head(h).shape == (2, 6, 5, 3)
    assert torch.equal(head.first(h), head(h)[..., 0, :])


def test_task_and_readout_layout(make_dynamics, make_agent) -> None:
    dynamics = make_dynamics()
    agent = make_agent(dynamics)
    tokens = agent.tokens(torch.tensor([1, 0, 1]))
    assert tokens.shape == (3, 2, 16)
    assert torch.equal(tokens[0], tokens[2])
    assert not torch.equal(tokens[0], tokens[1])
    h = agent.readout(tokens)
    assert h.shape == (3, 32)
    assert torch.equal(h[0, :16], tokens[0, 0])
    assert torch.equal(h[0, 16:], tokens[0, 1])  # all agent tokens, in order: no mean here and token 0 there


@pytest.mark.parametrize("value", [0.0, 0.7, 11.5])
def test_a_critic_begins_with_the_value_it_was_told_to_expect(value: float) -> None:
    critic = Critic(AgentConfig(num_tasks=1, hidden=8), 6)
    critic.expect(value)
    h = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    assert critic(h).tolist() == pytest.approx([value] * 5, abs=0.05 + 0.1 * value)
