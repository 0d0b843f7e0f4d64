"""Imagination training: what it changes, what it learns from which frame, and what does not count."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch

from d4_core.imagination import Dream, ImaginationConfig, lambda_returns


def weights_of(roll, alive: torch.Tensor) -> torch.Tensor:
    """(B, H): how much each frame counts, written out."""
    return torch.cat([torch.ones(len(alive), 1), roll.proceed[:, :-1].cumprod(1)], 1) * alive


def test_imagination_changes_policy_and_critic_and_nothing_else(run, imagination_phase) -> None:
    phase = imagination_phase()
    before = copy.deepcopy(phase.state_dict())
    named = dict(phase.trainable())
    assert {name.split(".")[0] for name in named} == {"policy", "critic"}
    groups = {phase.group(name, p): name.split(".")[0] for name, p in named.items()}
    assert groups == {"heads": "policy", "adamw": "critic"}  # the critic has a learning rate of its own
    run(phase, 4)
    changed = {
        name.split(".")[0]
        for name, value in phase.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert changed == {"policy", "critic", "normaliser"}
    for name, p in phase.named_parameters():
        assert (p.grad is not None) == (name in named), name
    for name, value in phase.prior.state_dict().items():
        assert torch.equal(value, phase.agent.policy.state_dict()[name])


def test_the_critic_begins_at_the_value_of_the_mean_reward(imagination_phase) -> None:
    """From zero nearly every action would seem good, and the policy would leave its prior at random."""
    phase = imagination_phase()
    phase.logs.reward[:] = 0.025
    again = type(phase)(
        phase.cfg, phase.agent, phase.dynamics, phase.tokenizer, phase.logs, phase.latents, phase._episodes
    )
    expected = 0.025 / (1 - phase.cfg.settings.discount)
    h = torch.randn(3, phase.policy.inputs, generator=torch.Generator().manual_seed(0))
    assert again.critic(h).tolist() == pytest.approx([expected] * 3, rel=0.2)


def test_policy_and_critic_share_no_parameter(imagination_phase) -> None:
    phase = imagination_phase()
    losses, _ = phase(phase.sample(np.random.default_rng(0), 0), torch.Generator().manual_seed(0), 0)
    policy, critic = list(phase.policy.parameters()), list(phase.critic.parameters())
    for loss, others in ((losses["policy"], critic), (losses["value"], policy)):
        assert all(g is None for g in torch.autograd.grad(loss, others, retain_graph=True, allow_unused=True))


def test_the_policy_starts_as_the_prior_with_no_kl(imagination_phase) -> None:
    phase = imagination_phase()
    _, metrics = phase(phase.sample(np.random.default_rng(0), 0), torch.Generator().manual_seed(0), 0)
    assert float(metrics["kl"]) == pytest.approx(0, abs=1e-6)  # to rounding, which differs between CPUs


def test_gate_10_the_policy_is_held_by_the_cloned_one(imagination_phase) -> None:
    """Loss and gradient contain beta KL(policy || prior), with the frozen copy as the prior."""
    results = []
    for beta in (0.0, 2.0):
        settings = ImaginationConfig(horizon=3, contexts=(1,), steps=2, warmup=0.0, beta=beta)
        phase = imagination_phase(settings=settings)
        with torch.no_grad():
            phase.policy.out.bias += torch.linspace(-3, 3, len(phase.policy.out.bias))
        batch = phase.sample(np.random.default_rng(0), 0)
        losses, metrics = phase(batch, torch.Generator().manual_seed(0), 0)
        (roll, alive), bias = phase._rollout, phase.policy.out.bias
        h, weight = roll.h[:, :-1], weights_of(roll, alive)
        kl = phase.agent.space.kl(phase.policy.first(h), phase.agent.policy.first(h))
        kl = (kl * weight).sum() / weight.sum()
        assert kl.item() > 0.05
        torch.testing.assert_close(metrics["kl"], kl.detach())
        grads = [torch.autograd.grad(x, bias, retain_graph=True)[0] for x in (losses["policy"], kl)]
        results.append((losses["policy"].detach(), kl.detach(), *grads))
    (free, _, free_grad, _), (held, kl, held_grad, kl_grad) = results
    torch.testing.assert_close(held - free, 2 * kl)
    torch.testing.assert_close(held_grad - free_grad, 2 * kl_grad, rtol=1e-4, atol=1e-5)


def test_gate_10_advantage_and_value_target_belong_to_the_acting_frame(imagination_phase) -> None:
    """G_t - v_t weighs a_t, and G_t is what v_t is taught; a_t was drawn from h_t."""
    settings = ImaginationConfig(horizon=5, contexts=(4,), steps=1, warmup=0.0, beta=0.0, discount=0.9)
    phase = imagination_phase(settings=settings, batch=32)
    with torch.no_grad():
        phase.critic.head.out.weight.normal_(std=4.0)  # opinions stronger than the bias
    batch = phase.sample(np.random.default_rng(0), 0)
    losses, metrics = phase(batch, torch.Generator().manual_seed(0), 0)
    roll, alive = phase._rollout
    with torch.no_grad():
        value = phase.critic(roll.h)
    returns = lambda_returns(roll.reward, roll.proceed, value, 0.9, settings.trace)
    advantage = returns - value[:, :-1]
    assert 0.1 < (advantage > 0).float().mean() < 0.9
    weight = weights_of(roll, alive)
    good, bad = weight * (advantage >= 0), weight * (advantage < 0)
    log_prob = phase.agent.space.log_prob(phase.policy.first(roll.h[:, :-1]), roll.action)
    expected = 0.5 * (bad * log_prob).sum() / bad.sum() - 0.5 * (good * log_prob).sum() / good.sum()
    torch.testing.assert_close(losses["policy"], expected)
    nats = -phase.critic.log_prob(roll.h[:, :-1], returns)
    torch.testing.assert_close(losses["value"], (nats * weight).sum() / weight.sum())
    torch.testing.assert_close(metrics["imagined_return"], returns[:, 0].mean())


def test_gate_02_contexts_are_replayed_as_they_were_recorded(imagination_phase, monkeypatch) -> None:
    phase = imagination_phase(settings=ImaginationConfig(horizon=2, contexts=(4,), steps=1))
    batch = phase.sample(np.random.default_rng(0), 0)
    assert not batch["prev_labelled"].all()  # some contexts begin with an episode
    observed, observe = [], Dream.observe
    monkeypatch.setattr(Dream, "observe", lambda dream, *a: observed.append(a) or observe(dream, *a))
    roll = phase.roll(batch, torch.Generator().manual_seed(0))
    assert len(observed) == 4 + 2
    for t, (tokens, action, labelled, task) in enumerate(observed[:4]):
        assert torch.equal(tokens, batch["tokens"][:, t])
        assert torch.equal(action, batch["prev_action"][:, t])
        assert torch.equal(labelled, batch["prev_labelled"][:, t])
        assert torch.equal(task, batch["task"])
    for t, (tokens, action, labelled, task) in enumerate(observed[4:]):
        assert torch.equal(tokens, roll.tokens[:, t])
        assert torch.equal(action, roll.action[:, t])
        assert labelled.all()
        assert torch.equal(task, batch["task"])


@pytest.mark.parametrize(("share", "matching"), [(0.0, 0.5), (0.5, 0.75), (1.0, 1.0)])
def test_contexts_are_a_mixture_of_relevant_and_uniform(
    imagination_phase, share: float, matching: float
) -> None:
    phase = imagination_phase(relevant_share=share, batch=400)
    batch = phase.sample(np.random.default_rng(0), 0)
    named = torch.from_numpy(np.sin(np.arange(23, dtype=np.float32) + 0.25))
    frame = (batch["action"][:, :1, 0] - named).abs().argmin(1)
    episode = (frame >= 9).long()
    assert 0.4 < batch["task"].float().mean() < 0.6
    assert (episode == batch["task"]).float().mean().item() == pytest.approx(matching, abs=0.1)


def by_lead(grad: torch.Tensor, leads: int) -> list[bool]:
    """Which leads a gradient of the head's output weights reaches."""
    return [bool(g.any()) for g in grad.view(leads, -1)]


def test_warm_up_leaves_the_first_lead_alone(imagination_phase) -> None:
    """The critic and the later leads learn from rollouts of the policy as it is."""
    settings = ImaginationConfig(horizon=4, contexts=(1,), steps=2, warmup=0.25)
    phase = imagination_phase(settings=settings)
    for step, moves in ((4, False), (5, True)):
        losses, _ = phase(phase.sample(np.random.default_rng(0), 4), torch.Generator().manual_seed(0), step)
        phase.zero_grad()
        phase.total(losses).backward()
        assert by_lead(phase.policy.out.weight.grad, 3) == [moves, True, True]
        assert (losses["policy"] != 0) == moves
        assert all(p.grad.isfinite().all() for p in phase.critic.parameters())
        assert phase.critic.head.out.weight.grad.any()


# ---- later leads


def test_later_leads_clone_what_the_rollout_did_next(imagination_phase) -> None:
    settings = ImaginationConfig(horizon=4, contexts=(4,), steps=1, warmup=0.0)
    phase = imagination_phase(settings=settings)
    losses, _ = phase(phase.sample(np.random.default_rng(0), 0), torch.Generator().manual_seed(0), 0)
    roll, alive = phase._rollout
    params, weight, nats = phase.policy(roll.h[:, :-1]), weights_of(roll, alive), []
    for b, t, n in itertools.product(range(6), range(4), (1, 2)):
        if t + n < 4:  # the rollout knows no action past its horizon
            score = phase.agent.space.log_prob(params[b, t, n], roll.action[b, t + n])
            nats.append(-score * weight[b, t])
    torch.testing.assert_close(losses["leads"], torch.stack(nats).mean())


def test_leads_and_policy_loss_keep_to_their_own_outputs(imagination_phase) -> None:
    """Cloning its own samples would sharpen lead 0; the advantage says nothing about later leads."""
    phase = imagination_phase(settings=ImaginationConfig(horizon=4, contexts=(1,), steps=1, warmup=0.0))
    losses, _ = phase(phase.sample(np.random.default_rng(0), 0), torch.Generator().manual_seed(0), 0)
    weight = phase.policy.out.weight
    reached = {
        n: by_lead(torch.autograd.grad(losses[n], weight, retain_graph=True)[0], 3)
        for n in losses
        if n != "value"
    }
    assert reached == {"policy": [True, False, False], "leads": [False, True, True]}
    trunk = torch.autograd.grad(losses["leads"], list(phase.policy.trunk.parameters()), allow_unused=True)
    assert trunk == (None,) * len(trunk)  # features that move would move lead 0 with them, without its KL


def test_leads_past_the_horizon_are_not_taught(imagination_phase) -> None:
    phase = imagination_phase()
    space = phase.agent.space
    leads = torch.randn(
        5, 4, 3, space.num_params, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    action = torch.linspace(-2, 2, 20).view(5, 4, 1)
    weight = torch.ones(5, 4)
    weight[2] = 0.0  # a dead row
    (grad,) = torch.autograd.grad(phase._follow(leads, action, weight), leads)
    taught = grad.abs().sum(-1) > 0
    inside = torch.arange(4)[:, None] + torch.arange(3) < 4
    inside[:, 0] = False
    assert torch.equal(taught, inside.expand(5, -1, -1) & (weight > 0)[..., None])
    one_frame = phase._follow(leads[:, :1], action[:, :1], weight[:, :1])
    assert one_frame == 0  # nothing lies ahead: no loss, not 0 / 0


def test_a_head_with_one_lead_has_no_leads_loss(imagination_phase) -> None:
    phase = imagination_phase(leads=1)
    losses, _ = phase(phase.sample(np.random.default_rng(0), 0), torch.Generator().manual_seed(0), 0)
    assert set(losses) == {"policy", "value"}
    assert phase.total(losses).isfinite()


# ---- starts


@pytest.mark.parametrize(("is_over", "matters"), [(True, False), (False, True)])
def test_a_rollout_from_a_terminal_frame_counts_nothing(
    imagination_phase, is_over: bool, matters: bool
) -> None:
    """Behind the end of an episode the model dreams what no robot will see."""
    phase = imagination_phase(settings=ImaginationConfig(horizon=3, contexts=(4,), steps=1, warmup=0.0))
    with torch.no_grad():
        phase.critic.head.out.weight.normal_()
    batch = phase.sample(np.random.default_rng(0), 0)
    batch["terminal"][:] = False
    batch["terminal"][0, -1], batch["terminal"][1, 0] = is_over, True  # only a context's last frame decides
    first, _ = phase(batch, torch.Generator().manual_seed(0), 0)
    roll, alive = phase._rollout
    assert alive[:, 0].tolist() == [not is_over, True, True, True, True, True]
    roll.reward[0] += 3.0
    roll.action[0] = -roll.action[0] + 0.5
    then, _ = phase({}, torch.Generator().manual_seed(0), 1)
    assert {name: bool(first[name] != then[name]) for name in first} == dict.fromkeys(first, matters)
    roll.reward[1] += 3.0
    assert phase({}, torch.Generator().manual_seed(0), 1)[0]["value"] != then["value"]


def test_a_rollout_serves_several_steps(imagination_phase) -> None:
    phase = imagination_phase()
    assert phase.period == 2
    first = phase.sample(np.random.default_rng(0), 0)
    phase(first, torch.Generator().manual_seed(0), 0)
    kept = phase._rollout
    assert phase.sample(np.random.default_rng(1), 1) == {}
    phase({}, torch.Generator().manual_seed(1), 1)
    assert phase._rollout is kept
    phase(phase.sample(np.random.default_rng(2), 2), torch.Generator().manual_seed(2), 2)
    assert phase._rollout is not kept
    roll, alive = kept
    assert not any(x.requires_grad for x in (*vars(roll).values(), alive))


def test_rollouts_start_from_whole_contexts_of_long_enough_episodes(imagination_phase) -> None:
    phase, lengths = imagination_phase(), set()
    for step in range(0, 40, 2):
        batch = phase.sample(np.random.default_rng(step), step)
        lengths.add(batch["tokens"].shape[1])
        assert batch["valid"].all()
    assert lengths == {1, 4}
    assert phase._episodes.tolist() == [0, 1]


def test_rollouts_are_a_function_of_the_generator(imagination_phase) -> None:
    phase = imagination_phase()
    batch = phase.sample(np.random.default_rng(0), 0)
    a, b, c = (phase.roll(batch, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.action, b.action)
    assert not torch.equal(a.tokens, c.tokens)


def test_a_batch_of_nothing_but_terminal_starts_is_finite(imagination_phase) -> None:
    """It used to divide by zero, and one such batch ended the training."""
    phase = imagination_phase(settings=ImaginationConfig(horizon=3, contexts=(4,), steps=1, warmup=0.0))
    batch = phase.sample(np.random.default_rng(0), 0)
    batch["terminal"][:, -1] = True
    losses, _ = phase(batch, torch.Generator().manual_seed(0), 0)
    assert all(torch.isfinite(loss) for loss in losses.values())
