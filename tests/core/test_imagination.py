"""Returns, the policy gradient on bandits, the stepping engine, and credit assignment end to end."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from d4_core.actions import ActionPart, ActionSpace
from d4_core.agent import Agent, AgentConfig
from d4_core.dynamics import Block, DynamicsConfig
from d4_core.imagination import (
    Dream,
    ImaginationConfig,
    imagine,
    lambda_returns,
    pmpo_loss,
    weights_of_frames,
)
from d4_core.phase import freeze
from d4_core.phases import (
    AgentPhase,
    AgentTraining,
    DynamicsPhase,
    DynamicsTraining,
    ImaginationPhase,
    ImaginationTraining,
)
from d4_core.shortcut import Grid

KEY = (ActionPart(kind="binary", size=1),)
AXIS = (ActionPart(kind="continuous", size=1, low=(-1.0,), high=(1.0,)),)


RANGE = (-math.log(2), math.log(2))  # symlog of -1 and 1


def mean(history: list[dict[str, float]], name: str) -> float:
    return float(np.mean([entry[name] for entry in history]))


# ---- returns


def brute_force_return(reward, proceed, value, discount: float, trace: float, t: int) -> float:
    """The definition: n-step returns weighted by (1 - lambda) lambda^(n-1), the rest on the longest."""
    horizon = len(reward)

    def n_step(n: int) -> float:
        total, factor = 0.0, 1.0
        for i in range(t, t + n):
            total += factor * reward[i]
            factor *= discount * proceed[i]
        return total + factor * value[t + n]

    longest = horizon - t
    mixed = sum((1 - trace) * trace ** (n - 1) * n_step(n) for n in range(1, longest))
    return mixed + trace ** (longest - 1) * n_step(longest)


@given(
    horizon=st.integers(1, 6),
    discount=st.floats(0, 1),
    trace=st.floats(0, 1),
    terminals=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_lambda_returns_against_the_definition(
    horizon: int, discount: float, trace: float, terminals: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    reward, value = rng.normal(size=(2, horizon)), rng.normal(size=(2, horizon + 1))
    proceed = (rng.random((2, horizon)) > 0.3).astype(float) if terminals else rng.random((2, horizon))
    ours = lambda_returns(*(torch.from_numpy(x) for x in (reward, proceed, value)), discount, trace)
    assert ours.shape == (2, horizon)
    for b in range(2):
        expected = [
            brute_force_return(reward[b], proceed[b], value[b], discount, trace, t) for t in range(horizon)
        ]
        np.testing.assert_allclose(ours[b], expected, rtol=1e-6, atol=1e-6)


def test_nothing_behind_a_terminal_counts() -> None:
    reward, proceed = torch.tensor([[1.0, 2.0, 4.0, 8.0]]), torch.tensor([[1.0, 0.0, 1.0, 1.0]])
    value = torch.full((1, 5), 100.0)
    returns = lambda_returns(reward, proceed, value, 1.0, 1.0)
    assert returns.tolist() == [[3.0, 2.0, 112.0, 108.0]]  # the terminal's own reward, r_2, does count
    assert weights_of_frames(proceed).tolist() == [[1.0, 1.0, 0.0, 0.0]]
    assert lambda_returns(reward, proceed, value, 1.0, 0.0)[0, 1] == 2.0  # no bootstrap over a terminal


# ---- gate 10: the policy gradient


def bandit_loss(space: ActionSpace, params: Tensor, action: Tensor, advantage: Tensor, **changes) -> Tensor:
    log_prob = space.log_prob(params.expand(len(action), -1), action)
    settings = {"weight": torch.ones(len(action)), "alpha": 0.5, "drop_smallest": 0.0}
    return pmpo_loss(log_prob, advantage, **(settings | changes))


@pytest.mark.parametrize("parts", [KEY, AXIS], ids=["two-armed", "continuous"])
@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_gate_10_policy_gradient_equals_finite_differences(parts, alpha: float, rng: torch.Generator) -> None:
    space = ActionSpace(parts, bins=5)
    params = torch.randn(space.num_params, generator=rng, requires_grad=True)
    action = space.sample(params.expand(200, -1), rng)
    advantage, weight = torch.randn(200, generator=rng), torch.rand(200, generator=rng)
    (grad,) = torch.autograd.grad(
        bandit_loss(space, params, action, advantage, weight=weight, alpha=alpha), params
    )
    assert grad.abs().max() > 1e-3
    eps = 1e-2
    for i in range(space.num_params):
        step = torch.zeros(space.num_params)
        step[i] = eps
        up, down = (
            bandit_loss(space, params.detach() + s * step, action, advantage, weight=weight, alpha=alpha)
            for s in (1, -1)
        )
        torch.testing.assert_close(grad[i], (up - down) / (2 * eps), rtol=1e-2, atol=2e-4)


@pytest.mark.parametrize("theta", [-2.0, 0.0, 1.5])
def test_gate_10_two_armed_bandit_in_closed_form(theta: float) -> None:
    """Arm 1 is better: d L / d theta = (1 - alpha) (0 - p) - alpha (1 - p), whatever was drawn how often."""
    space, p = ActionSpace(KEY), torch.sigmoid(torch.tensor(theta))
    action = torch.tensor([1.0] * 3 + [0.0] * 17)[:, None]
    params = torch.tensor([theta], requires_grad=True)
    (grad,) = torch.autograd.grad(bandit_loss(space, params, action, action[:, 0] - 0.5, alpha=0.7), params)
    torch.testing.assert_close(grad[0], 0.3 * (0 - p) - 0.7 * (1 - p))


def test_gate_10_only_the_sign_of_the_advantage_counts_and_zero_is_good(rng: torch.Generator) -> None:
    space = ActionSpace(AXIS, bins=5)
    params, action = torch.randn(5), torch.rand(50, 1) * 2 - 1
    advantage = torch.randn(50, generator=rng)
    a = bandit_loss(space, params, action, advantage)
    assert torch.equal(a, bandit_loss(space, params, action, advantage.sign() * torch.rand(50).add(0.1)))
    zero = torch.where(advantage > 0, 0.0, advantage)
    assert torch.equal(a, bandit_loss(space, params, action, zero))


@pytest.mark.parametrize(("sign", "expected"), [(1.0, -0.5), (-1.0, 0.5)])
def test_gate_10_an_empty_set_contributes_nothing(sign: float, expected: float, rng: torch.Generator) -> None:
    log_prob = torch.randn(20, generator=rng, requires_grad=True)
    loss = pmpo_loss(log_prob, torch.full((20,), sign), torch.ones(20), 0.5, 0.0)
    torch.testing.assert_close(loss, expected * log_prob.mean())
    nothing = pmpo_loss(log_prob, torch.full((20,), sign), torch.zeros(20), 0.5, 0.0)
    (grad,) = torch.autograd.grad(nothing, log_prob)
    assert nothing == 0
    assert not grad.any()


def test_gate_10_dead_frames_and_smallest_advantages_are_left_out(rng: torch.Generator) -> None:
    log_prob, advantage = torch.randn(2, 40, generator=rng)
    alive = torch.arange(40) < 30
    a = pmpo_loss(log_prob, advantage, alive.float(), 0.5, 0.0)
    torch.testing.assert_close(a, pmpo_loss(log_prob[:30], advantage[:30], torch.ones(30), 0.5, 0.0))
    kept = advantage.abs().argsort()[20:]
    a = pmpo_loss(log_prob, advantage, torch.ones(40), 0.5, 0.5)
    torch.testing.assert_close(a, pmpo_loss(log_prob[kept], advantage[kept], torch.ones(20), 0.5, 0.0))


@pytest.mark.parametrize("parts", [KEY, AXIS, (ActionPart(kind="categorical", classes=4),)])
def test_gate_10_kl_pulls_towards_the_prior(parts, rng: torch.Generator) -> None:
    """Its gradient equals finite differences, is not zero away from the prior, and leads to it."""
    space = ActionSpace(parts, bins=5)
    prior = 2 * torch.randn(space.num_params, generator=rng)
    params = torch.randn(space.num_params, generator=rng, requires_grad=True)
    (grad,) = torch.autograd.grad(space.kl(params, prior), params)
    assert grad.norm() > 0.05
    for i in range(space.num_params):
        step = torch.zeros(space.num_params)
        step[i] = 1e-2
        slope = (space.kl(params.detach() + step, prior) - space.kl(params.detach() - step, prior)) / 2e-2
        torch.testing.assert_close(grad[i], slope, rtol=2e-2, atol=5e-4)
    there = prior.clone().requires_grad_()
    (rest,) = torch.autograd.grad(space.kl(there, prior), there)
    torch.testing.assert_close(rest, torch.zeros_like(rest), rtol=0, atol=1e-6)
    before = space.kl(params, prior).item()
    optimiser = torch.optim.Adam([params], lr=0.1)
    for _ in range(60):
        optimiser.zero_grad()
        space.kl(params, prior).backward()
        optimiser.step()
    assert space.kl(params, prior).item() < 0.1 * before


@pytest.mark.parametrize("parts", [KEY, AXIS], ids=["two-armed", "continuous"])
def test_gate_10_bandits_improve_to_the_best_arm(parts, rng: torch.Generator) -> None:
    space = ActionSpace(parts, bins=9)
    prior = torch.zeros(space.num_params)
    params = prior.clone().requires_grad_()
    optimiser = torch.optim.Adam([params], lr=0.1)
    baseline = torch.zeros(())
    for _ in range(80):
        action = space.sample(params.detach().expand(256, -1), rng)
        reward = action[:, 0] if parts is KEY else -(action[:, 0] - 0.5).square()
        advantage, baseline = reward - baseline, 0.5 * baseline + 0.5 * reward.mean()
        loss = bandit_loss(space, params, action, advantage) + 0.02 * space.kl(params, prior)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert space.mode(params).item() == (1.0 if parts is KEY else 0.5)
    action = space.sample(params.detach().expand(2000, -1), rng)[:, 0]
    assert (action - (1.0 if parts is KEY else 0.5)).abs().mean() < 0.15


# ---- the stepping engine


@torch.no_grad()
def test_gate_04_history_is_mixed_at_exactly_the_level_it_is_labelled_with(
    make_dynamics, make_agent, monkeypatch
) -> None:
    model = make_dynamics()
    dream = Dream(model, make_agent(model), 2, torch.Generator().manual_seed(3))
    calls, step = [], type(model).step
    monkeypatch.setattr(model, "step", lambda *a, **k: calls.append(a) or step(model, *a, **k))
    clean, known = torch.randn(2, 3, 2), torch.ones(2, dtype=torch.bool)
    dream.observe(clean, torch.zeros(2, 1), known, torch.zeros(2, dtype=torch.int64))
    noisy, index, e = calls[0][:3]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(3))
    tau = index[0].item() / model.cfg.grid.levels
    assert (index == 7).all()  # signal 0.9 on a grid of 8
    assert (e == model.cfg.grid.finest).all()
    torch.testing.assert_close(noisy, (1 - tau) * noise + tau * clean)


@torch.no_grad()
@pytest.mark.parametrize("shortcut", [True, False])
def test_gate_04_dreaming_uses_trained_rows_and_fresh_noise(
    make_dynamics, shortcut: bool, monkeypatch
) -> None:
    model = make_dynamics(shortcut=shortcut)
    dream = Dream(model, None, 2, torch.Generator().manual_seed(3))
    calls, step = [], type(model).step
    monkeypatch.setattr(model, "step", lambda *a, **k: calls.append(a) or step(model, *a, **k))
    known = torch.ones(2, dtype=torch.bool)
    a, b = (dream.predict(torch.zeros(2, 1), known, 4) for _ in range(2))
    assert not torch.equal(a, b)
    assert not torch.equal(a[0], a[1])
    assert [(int(c[1][0]), int(c[2][0])) for c in calls[:4]] == [
        (k, 2 if shortcut else 3) for k in (0, 2, 4, 6)
    ]
    assert dream.cache.position == 0  # nothing was committed


@torch.no_grad()
def test_gate_02_imagined_actions_are_drawn_from_h_t_and_carried_by_block_t_plus_1(
    make_dynamics, make_agent
) -> None:
    model = make_dynamics()
    agent, cfg = make_agent(model), ImaginationConfig(horizon=5, steps=2)
    dream = Dream(model, agent, 2, torch.Generator().manual_seed(0))
    log: list[tuple[str, Tensor]] = []
    observe, predict, first = dream.observe, dream.predict, agent.policy.first
    dream.observe = lambda z, a, k, q: log.append(("commit", a)) or observe(z, a, k, q)
    dream.predict = lambda a, k, *r: log.append(("dream", a)) or predict(a, k, *r)
    task, known = torch.tensor([0, 1]), torch.ones(2, dtype=torch.bool)
    h = observe(torch.randn(2, 3, 2), torch.zeros(2, 1), known, task)
    seen = []
    agent.policy.first = lambda h: seen.append(h) or first(h)
    roll = imagine(dream, agent.policy, h, task, cfg)
    assert torch.equal(roll.h[:, 0], h)
    assert [name for name, _ in log] == ["dream", "commit"] * 5
    for t in range(5):
        assert torch.equal(seen[t], roll.h[:, t])
        assert torch.equal(log[2 * t][1], roll.action[:, t])
        assert torch.equal(log[2 * t + 1][1], roll.action[:, t])
    # rows of another batch are not always equal to the last bit
    torch.testing.assert_close(roll.reward, agent.predict_reward(roll.h)[:, 1:])
    torch.testing.assert_close(roll.proceed, agent.predict_continue(roll.h)[:, 1:])
    assert roll.tokens.shape == (2, 5, 3, 2)


@torch.no_grad()
def test_a_reset_dream_is_a_new_dream(make_dynamics, make_agent) -> None:
    model = make_dynamics()
    agent, known, task = make_agent(model), torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)
    dream, frames = Dream(model, agent, 2), torch.randn(9, 2, 3, 2)
    outputs = []
    for rubbish in (0, 6):
        for frame in torch.randn(rubbish, 2, 3, 2):
            dream.observe(frame, torch.ones(2, 1), known, task)
        dream.reset()
        dream.gen = torch.Generator().manual_seed(1)
        outputs.append([dream.observe(f, torch.zeros(2, 1), known, task) for f in frames])
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


# ---- gates 2 and 11: credit assignment


class OracleWorld(nn.Module):
    """A dynamics model made by hand: h of frame t is [the action that led there, the frame, 1, 0, ...].

    With `delay` the block carries an older action than the one that led into it: the classic misalignment.
    """

    def __init__(self, delay: int = 0) -> None:
        super().__init__()
        self.cfg = DynamicsConfig(num_tokens=1, token_dim=1, actions=KEY, agent_tokens=1, grid=Grid(levels=8))
        self.space, self.delay, self.past = ActionSpace(KEY), delay, []

    def new_cache(self, batch: int, dtype: torch.dtype = torch.float32):
        self.past = []
        cache = type("Cache", (), {})()
        cache.position, cache.keys = torch.zeros((), dtype=torch.int64), torch.zeros(1)
        cache.reset, cache.advance = self.past.clear, lambda: None
        return cache

    def begin(self, cache) -> None:
        return None

    def step(self, noisy, tau_index, e, prev_action, labelled, cache, frame, agent=None) -> Block:
        if agent is None:
            return Block(torch.zeros_like(noisy)[:, None], None)
        self.past.append(prev_action)
        carried = self.past[max(0, len(self.past) - 1 - self.delay)]
        h = torch.cat([carried, noisy[:, 0], torch.ones_like(carried), torch.zeros(len(carried), 5)], -1)
        return Block(noisy[:, None], h[:, None, None])


class OracleAgent(Agent):
    """Its reward for a frame is the action that the frame's block carries."""

    def predict_reward(self, h: Tensor) -> Tensor:
        return h[..., 0]

    def predict_continue(self, h: Tensor) -> Tensor:
        return torch.ones(h.shape[:-1])


def train_in_oracle(make_logs, delay: int, seed: int, discount: float = 0.0) -> tuple[float, float]:
    """Train phase 3 for 60 steps; returns the mean imagined reward at the start and at the end."""
    torch.manual_seed(seed)
    world = OracleWorld(delay)
    agent = OracleAgent(
        AgentConfig(num_tasks=1, leads=2, hidden=16, value_range=(-1.0, 1.0)), world.space, 8, 1
    )
    settings = ImaginationConfig(horizon=4, contexts=(2,), steps=1, discount=discount, beta=0.01, warmup=0.1)
    logs = make_logs((8, 8), tasks=1)
    logs.action[:] = 0.0
    phase = ImaginationPhase(
        ImaginationTraining(steps=60, batch=64, reuse=1, settings=settings), agent, world, nn.Identity(),
        logs, np.zeros((16, 1, 1), np.float32), np.arange(2),
    )  # fmt: skip
    optimiser = torch.optim.Adam([p for _, p in phase.trainable()], lr=1e-2)
    rewards = []
    for step in range(60):
        batch = phase.sample(np.random.default_rng([seed, step]), step)
        losses, metrics = phase(batch, torch.Generator().manual_seed(step), step)
        optimiser.zero_grad()
        phase.total(losses).backward()
        optimiser.step()
        rewards.append(float(metrics["imagined_reward"]) / settings.horizon)
    return float(np.mean(rewards[:5])), float(np.mean(rewards[-5:]))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gate_11_reward_equals_the_previous_action_is_driven_to_its_maximum(make_logs, seed: int) -> None:
    """With no discount to hide behind: only the action that caused a reward can get its credit."""
    before, after = train_in_oracle(make_logs, delay=0, seed=seed)
    assert 0.4 < before < 0.6
    assert after > 0.95


def test_gate_02_a_shifted_world_gives_no_credit(make_logs) -> None:
    _, after = train_in_oracle(make_logs, delay=1, seed=0)
    assert 0.3 < after < 0.7


def test_a_discounted_return_bridges_a_delay(make_logs) -> None:
    """The same shifted world is solvable where returns look ahead: they carry later rewards back."""
    assert train_in_oracle(make_logs, delay=1, seed=0, discount=0.9)[1] > 0.65


# ---- worlds learned end to end


def tiny_world(
    make_dynamics, make_logs, noise_latents, reward_shift: int = 0, labels: float = 1.0, seen: bool = False
):
    """40 episodes of 12 frames under a random key; the reward of a frame is the key pressed before it.

    With `reward_shift` 1 it is the key pressed at the frame itself. Frames show
    nothing, or, if `seen`, the key before.
    """
    rng = np.random.default_rng(0)
    action = rng.integers(0, 2, (480, 1)).astype(np.float32)
    arrived = np.roll(action, 1 - reward_shift, 0)
    if not reward_shift:
        arrived[::12] = 0
    mask = np.repeat(np.arange(40) < 40 * labels, 12)
    logs = make_logs(
        (12,) * 40, tasks=1, action=action, reward=arrived, action_mask=mask, is_terminal=np.zeros(480, bool)
    )
    latents = noise_latents(480, 1, 1)
    if seen:
        latents[:, 0] = 2 * np.roll(action, 1, 0) - 1
    shape = {"dim": 32, "depth": 2, "time_every": 2, "context": 8}
    dynamics = make_dynamics(
        actions=KEY, num_tokens=1, token_dim=1, agent_tokens=1, awake=False, shape=shape, grid=Grid(levels=8)
    )
    return logs, latents, dynamics


@pytest.fixture(scope="module")
def train_agent(run, make_dynamics, make_agent, make_logs, noise_latents):
    def train(reward_shift: int, steps: int) -> tuple[AgentPhase, list[dict[str, float]]]:
        logs, latents, dynamics = tiny_world(make_dynamics, make_logs, noise_latents, reward_shift)
        agent = make_agent(
            dynamics,
            awake=False,
            num_tasks=1,
            leads=1,
            hidden=32,
            reward_bins=3,
            reward_range=RANGE,
            value_bins=21,
        )
        flow = DynamicsTraining(image_rows=0.0, bootstrap_rows=0.25, bootstrap_warmup=0.0)
        cfg = AgentTraining(steps=steps, batch=32, length=6, dynamics=flow)
        phase = AgentPhase(cfg, agent, dynamics, nn.Identity(), logs, latents, np.arange(40))
        return phase, run(phase, steps)

    return train


@pytest.fixture(scope="module")
def keyboard(train_agent) -> tuple[AgentPhase, list[dict[str, float]]]:
    return train_agent(0, 80)


def test_gate_02_reward_lead_zero_learns_the_arriving_reward_and_cannot_learn_the_outgoing(
    keyboard, train_agent
) -> None:
    """Frames show nothing, so all that a head can know of a reward is the action that its block carries."""
    _, right = keyboard
    _, shifted = train_agent(1, 60)
    assert mean(right[50:60], "reward") < 0.15
    assert mean(shifted[-10:], "reward") > 0.6  # ln 2 = 0.69


def test_gate_02_policy_lead_zero_does_not_see_the_action_it_predicts(keyboard) -> None:
    """Keys are random: a head that beats ln 2 copies its label."""
    phase, history = keyboard
    assert mean(history[-10:], "policy") > 0.66
    assert phase.agent.policy.out.weight.any()


def real_return(phase: ImaginationPhase, policy: nn.Module, seed: int = 0) -> float:
    """Mean reward per tick in the real world: frames are noise, the reward is the key just pressed."""
    gen = torch.Generator().manual_seed(seed)
    dream = Dream(phase.dynamics, phase.agent, 64, gen)
    action, known, total = torch.zeros(64, 1), torch.zeros(64, dtype=torch.bool), 0.0
    with torch.no_grad():
        for _ in range(6):
            h = dream.observe(
                torch.randn(64, 1, 1, generator=gen), action, known, torch.zeros(64, dtype=torch.int64)
            )
            action, known = (
                dream.dynamics.space.sample(policy.first(h), gen),
                torch.ones(64, dtype=torch.bool),
            )
            total += action.mean().item() / 6
    return total


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gate_11_imagination_improves_on_cloning_in_the_real_world(run, keyboard, seed: int) -> None:
    trained, _ = keyboard
    torch.manual_seed(seed)
    settings = ImaginationConfig(horizon=4, contexts=(1, 2), steps=1, beta=0.03, discount=0.5, warmup=0.1)
    phase = ImaginationPhase(
        ImaginationTraining(steps=50, batch=48, reuse=1, settings=settings), copy.deepcopy(trained.agent),
        copy.deepcopy(trained.dynamics), nn.Identity(), trained.logs, trained.latents, np.arange(40),
    )  # fmt: skip
    run(phase, 50, lr=1e-2)
    cloned, improved = real_return(phase, phase.prior), real_return(phase, phase.policy)
    assert 0.35 < cloned < 0.65
    assert improved > 0.85


def test_gate_08_09_actions_steer_the_world_and_unlabelled_frames_average(
    run, make_dynamics, make_logs, noise_latents
) -> None:
    """Trained with a fifth of the labels: right actions beat none, and none beat wrong ones."""
    logs, latents, dynamics = tiny_world(make_dynamics, make_logs, noise_latents, labels=0.2, seen=True)
    cfg = DynamicsTraining(
        steps=150,
        batch=32,
        length=6,
        long_length=12,
        long_share=0.1,
        bootstrap_rows=0.25,
        bootstrap_warmup=0.3,
    )
    phase = DynamicsPhase(cfg, dynamics, nn.Identity(), logs, latents, np.arange(40))
    run(phase, 150)
    freeze(dynamics)
    action = torch.randint(0, 2, (64, 6, 1), generator=torch.Generator().manual_seed(0)).float()
    target, noise = 2 * action[..., None] - 1, torch.randn(64, 6, 1, 1)
    start, known = torch.zeros(64, 6, dtype=torch.int64), torch.ones(64, 6, dtype=torch.bool)

    def loss(carried: Tensor, labelled: Tensor) -> float:
        clean = dynamics(noise, start, start + 3, carried, labelled).clean
        return (clean - target).square().mean().item()

    right, wrong, none = loss(action, known), loss(1 - action, known), loss(action, ~known)
    assert right < 0.3
    assert math.isfinite(none)
    assert 2 * right < none < wrong
    assert wrong > 1.5
