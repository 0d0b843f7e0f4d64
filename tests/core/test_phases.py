"""The four phases: who is trained on what, golden curves, and tiny worlds learned end to end."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from d4_core.dynamics import Block, Dynamics
from d4_core.imagination import Dream, ImaginationConfig, lambda_returns
from d4_core.phase import Normaliser, masked_mean
from d4_core.phases import (
    AgentPhase,
    AgentTraining,
    DynamicsPhase,
    DynamicsTraining,
    ImaginationPhase,
    ImaginationTraining,
    ShortcutObjective,
    TokenizerPhase,
    TokenizerTraining,
    accomplished,
    draw_clips,
    relevant_episodes,
)
from d4_core.shortcut import ramp

ALWAYS_BOTH = {"image_rows": 0.3, "bootstrap_rows": 0.5, "bootstrap_warmup": 0.0}


# ---- normaliser


def test_normaliser_divides_by_the_running_rms() -> None:
    normaliser, squares, outputs = Normaliser(["a", "b"], beta=0.9), [], []
    values = [4.0, 1.0, 0.5, -3.0]
    for n, value in enumerate(values, 1):
        outputs.append(normaliser("a", torch.tensor(value)).item())
        squares.append(value**2)
        weights = np.array([0.1 * 0.9 ** (n - 1 - i) for i in range(n)])
        assert outputs[-1] == pytest.approx(value / math.sqrt((weights @ squares) / weights.sum()), rel=1e-5)
    assert outputs[0] == pytest.approx(1.0)
    assert normaliser("b", torch.tensor(5.0)).item() == pytest.approx(1.0)  # terms do not mix


def test_normaliser_is_a_constant_factor_for_the_gradient_and_survives_zero() -> None:
    normaliser, loss = Normaliser(["a"]), torch.tensor(4.0, requires_grad=True)
    (grad,) = torch.autograd.grad(normaliser("a", loss), loss)
    assert grad.item() == pytest.approx(0.25)
    assert Normaliser(["a"])("a", torch.zeros(())).item() == 0.0


def test_normaliser_state_is_saved() -> None:
    """Lost on resume, it would scale the first losses by its start value."""
    a, b = Normaliser(["x"]), Normaliser(["x"])
    for value in (1.0, 2.0, 3.0):
        a("x", torch.tensor(value))
    b.load_state_dict(a.state_dict())
    assert a("x", torch.tensor(2.0)) == b("x", torch.tensor(2.0))


def test_masked_mean() -> None:
    value, mask = torch.tensor([[1.0, 2.0], [3.0, 8.0]]), torch.tensor([[True, False], [True, False]])
    assert masked_mean(value, mask) == 2.0
    assert masked_mean(value, torch.zeros(2, 2, dtype=torch.bool)) == 0.0
    assert masked_mean(value[..., None].expand(-1, -1, 3), mask[..., None]) == 2.0


# ---- phase 1


@pytest.fixture
def dynamics_phase(make_dynamics, make_logs, noise_latents) -> Callable[..., DynamicsPhase]:
    def make(**changes) -> DynamicsPhase:
        logs = make_logs((9, 12, 7))
        logs.action[:] = np.sin(logs.action)
        settings = {"steps": 40, "batch": 6, "length": 4, "long_length": 8} | changes
        return DynamicsPhase(
            DynamicsTraining(**settings),
            make_dynamics(),
            nn.Identity(),
            logs,
            noise_latents(28),
            np.arange(3),
        )

    return make


def test_batch_shapes_alternate_and_end_long(dynamics_phase) -> None:
    phase = dynamics_phase(steps=1000, long_share=0.1, long_final=0.2)
    rng = np.random.default_rng(0)
    shapes = [phase.shape(rng, step) for step in range(1000)]
    assert set(shapes) == {(6, 4), (3, 8)}
    early = sum(shape == (3, 8) for shape in shapes[:800]) / 800
    assert 0.06 < early < 0.14
    assert set(shapes[800:]) == {(3, 8)}
    assert phase.sample(rng, 999)["tokens"].shape == (3, 8, 3, 2)


def test_a_fixed_share_of_clips_comes_from_labelled_episodes(make_logs) -> None:
    mask = np.zeros(28, bool)
    mask[9:21] = True  # episode 1 of 3
    logs, rng = make_logs((9, 12, 7), action_mask=mask), np.random.default_rng(0)
    clips = draw_clips(DynamicsTraining(labelled_share=0.5), logs, rng, 40, 3, np.array([0, 2, 1]))
    labelled = logs.action_mask[clips.index].all(1)
    assert labelled[20:].all()
    assert 0 < labelled[:20].sum() < 20
    blind = draw_clips(DynamicsTraining(labelled_share=0.5), logs, rng, 40, 3, np.array([0, 2]))
    assert blind.index.shape == (40, 3)


class Recorder(nn.Module):
    """Stands for the dynamics model: notes its inputs, and knows that all data are `truth`."""

    def __init__(self, dynamics: Dynamics, truth: float, student: float) -> None:
        super().__init__()
        self.cfg, self.truth, self.student = dynamics.cfg, truth, student
        self.calls: list[dict] = []

    def forward(self, noisy, tau_index, e, action, labelled, agent=None, image_rows=None) -> Block:
        self.calls.append(
            {
                "noisy": noisy,
                "index": tau_index,
                "e": e,
                "labelled": labelled,
                "agent": agent,
                "images": image_rows,
            }
        )
        value = self.student if len(self.calls) == 1 else self.truth
        return Block(torch.full_like(noisy, value), agent)


def objective_call(make_dynamics, student: float, step: int = 30, **changes):
    """One call on 400 clips of constant data 0.7."""
    recorder = Recorder(make_dynamics(), 0.7, student)
    objective = ShortcutObjective(DynamicsTraining(**(ALWAYS_BOTH | changes)), recorder, 100)
    shape = (400, 5)
    batch = {
        "tokens": torch.full((*shape, 3, 2), 0.7, dtype=torch.float16), "prev_action": torch.zeros(*shape, 1),
        "prev_labelled": torch.ones(shape, dtype=torch.bool), "valid": torch.ones(shape, dtype=torch.bool),
    }  # fmt: skip
    _, error, _ = objective(batch, torch.Generator().manual_seed(0), step)
    return recorder.calls, error


def test_roles_of_rows_are_drawn_independently(make_dynamics) -> None:
    calls, _ = objective_call(make_dynamics, 0.7)
    images, finest = calls[0]["images"], 3
    bootstrap = (calls[0]["e"] < finest).all(1)
    assert torch.equal((calls[0]["e"] < finest).any(1), bootstrap)  # the step size tells rows apart
    assert 0.22 < images.float().mean() < 0.38
    assert 0.42 < bootstrap.float().mean() < 0.58
    assert 0.1 < (images & bootstrap).float().mean() < 0.2
    assert torch.equal(~calls[0]["labelled"], images[:, None].expand(-1, 5))  # images carry no action


def test_the_teacher_runs_on_bootstrap_rows_only_at_half_the_step(make_dynamics) -> None:
    calls, error = objective_call(make_dynamics, 0.7)
    student, first, second = calls
    bootstrap = (student["e"] < 3).all(1)
    for teacher in (first, second):
        assert torch.equal(teacher["e"], student["e"][bootstrap] + 1)
        assert torch.equal(teacher["labelled"], student["labelled"][bootstrap])
        assert torch.equal(teacher["images"], student["images"][bootstrap])
    assert torch.equal(first["noisy"], student["noisy"][bootstrap])
    assert torch.equal(second["index"] - first["index"], 8 // 2 ** (first["e"]))
    assert error.abs().max() < 1e-6  # a perfect model has no loss on either kind of row


def test_loss_is_weighted_by_the_ramp_on_both_kinds_of_rows(make_dynamics) -> None:
    calls, error = objective_call(make_dynamics, 0.2)
    expected = 0.25 * ramp(calls[0]["index"] / 8)
    torch.testing.assert_close(error, expected, rtol=5e-3, atol=1e-3)
    _, flat = objective_call(make_dynamics, 0.2, ramp=False)
    torch.testing.assert_close(flat, torch.full_like(flat, 0.25), rtol=5e-3, atol=1e-3)


def test_no_bootstrap_before_its_time(make_dynamics) -> None:
    assert len(objective_call(make_dynamics, 0.7, step=9, bootstrap_warmup=0.1)[0]) == 1
    assert len(objective_call(make_dynamics, 0.7, step=10, bootstrap_warmup=0.1)[0]) == 3


def test_committed_frames_sit_at_the_context_level_of_flow_rows(make_dynamics) -> None:
    calls, _ = objective_call(make_dynamics, 0.7, committed=0.5)
    flow = (calls[0]["e"] == 3).all(1)
    share = (calls[0]["index"][flow] == 7).float().mean()
    assert 0.5 < share < 0.62  # a half, and an eighth of the rest
    assert (calls[0]["index"][~flow] == 7).sum() == 0


def test_frames_past_the_end_do_not_count(dynamics_phase) -> None:
    phase = dynamics_phase()
    batch = phase.sample(np.random.default_rng(0), 0)
    batch["tokens"] = batch["tokens"].clone().requires_grad_()
    batch["valid"] = batch["valid"].clone()
    batch["valid"][:, 2:] = False
    losses, _ = phase(batch, torch.Generator().manual_seed(0), 0)
    (grad,) = torch.autograd.grad(losses["dynamics"], batch["tokens"])
    assert grad[:, :2].any()
    assert not grad[:, 2:].any()


def test_tokenizer_phase_mixes_frames_and_clips(make_tokenizer, make_logs) -> None:
    logs = make_logs((9, 12), images={"front": np.zeros((21, 8, 12, 3), np.uint8)})
    phase = TokenizerPhase(
        TokenizerTraining(batch=12, length=4, clip_share=0.25), make_tokenizer(), logs, np.arange(2)
    )
    rng = np.random.default_rng(0)
    shapes = [tuple(phase.sample(rng, s)["front"].shape[:2]) for s in range(400)]
    assert set(shapes) == {(12, 1), (3, 4)}
    assert 0.18 < shapes.count((3, 4)) / 400 < 0.32


# ---- golden curves: a change that is meant to leave the computation alone must leave these alone

GOLDEN_TOKENIZER = [1.831164, 1.533122, 1.343878, 1.137666, 1.005521]
GOLDEN_DYNAMICS = [1.972014, 0.826017, 0.679364, 0.214334, 0.707807]


def test_golden_curve_tokenizer(run, make_tokenizer, make_logs) -> None:
    images = np.random.default_rng(0).integers(0, 256, (21, 8, 12, 3), dtype=np.uint8)
    logs = make_logs((9, 12), images={"front": images})
    cfg = TokenizerTraining(steps=5, batch=12, length=4, clip_share=0.5)
    history = run(TokenizerPhase(cfg, make_tokenizer(), logs, np.arange(2)), 5)
    np.testing.assert_allclose([h["pixels"] for h in history], GOLDEN_TOKENIZER, rtol=5e-3)


def test_golden_curve_dynamics(run, dynamics_phase) -> None:
    history = run(dynamics_phase(steps=5, bootstrap_warmup=0.4, bootstrap_rows=0.5, long_final=0.2), 5)
    np.testing.assert_allclose([h["dynamics"] for h in history], GOLDEN_DYNAMICS, rtol=5e-3)


# ---- phase 2


def test_relevant_episodes(make_logs) -> None:
    reward = np.zeros((15, 2), np.float32)
    reward[[1, 6, 13], 0] = (1.0, 0.4, 0.5)
    reward[[7, 12], 1] = 1.0
    mask = np.ones(15, bool)
    mask[12:] = False  # episode 2 has no action labels: nothing to clone
    logs = make_logs((5, 7, 3), reward=reward, action_mask=mask)
    everything = np.arange(3)
    assert relevant_episodes(logs, everything, 0, 0.5).tolist() == [0]
    assert relevant_episodes(logs, everything, 0, 0.3).tolist() == [0, 1]
    assert relevant_episodes(logs, everything, 1, 0.5).tolist() == [1]
    assert relevant_episodes(logs, np.array([0, 2]), 1, 0.5).tolist() == []
    # without labels an episode is a good place to imagine from all the same
    assert accomplished(logs, everything, 0, 0.5).tolist() == [0, 2]
    never = make_logs((5, 7, 3), reward=reward * np.array([1.0, 0.0], np.float32))
    assert accomplished(never, everything, 1, 0.5).tolist() == []  # no success is not success everywhere
    assert accomplished(make_logs((5, 7, 3), reward=0 * reward), everything, 1, 0.5).tolist() == [0, 1, 2]
    scalar = make_logs((5, 7, 3), reward=reward[:, :1])
    assert accomplished(scalar, everything, 1, 0.5).tolist() == [0, 2]  # a scalar reward serves every task


def test_passing_by_is_not_doing_the_task(make_logs) -> None:
    reward = np.zeros((20, 1), np.float32)
    reward[5, 0] = 1.0  # episode 0 touches the goal once
    reward[12:20, 0] = 1.0  # episode 1 stays there
    assert accomplished(make_logs((10, 10), reward=reward), np.arange(2), 0, 0.4).tolist() == [1]


@pytest.fixture
def agent_phase(make_dynamics, make_agent, make_logs, noise_latents) -> Callable[..., AgentPhase]:
    def make(awake: bool = True, **changes) -> AgentPhase:
        logs = make_logs((9, 12, 7))
        logs.reward[:] = 0
        logs.reward[[4, 15], [0, 1]] = 1.0  # episode 0 does task 0, episode 1 task 1, episode 2 none
        dynamics = make_dynamics()
        settings = {
            "steps": 40,
            "batch": 12,
            "length": 4,
            "long_share": 0.0,
            "dynamics": DynamicsTraining(**ALWAYS_BOTH),
        } | changes
        return AgentPhase(
            AgentTraining(**settings), make_agent(dynamics, awake=awake), dynamics, nn.Identity(), logs,
            noise_latents(28), np.arange(3),
        )  # fmt: skip

    return make


def test_agent_batches_are_half_uniform_half_relevant(agent_phase) -> None:
    phase = agent_phase()
    rng, seen = np.random.default_rng(0), set()
    for step in range(40):
        batch = phase.sample(rng, step)
        frame = (batch["action"][..., 0] - 0.25).long()
        episode = torch.bucketize(frame[:, 0].contiguous(), torch.tensor([9, 21]), right=True)
        assert batch["relevant"].tolist() == [False] * 6 + [True] * 6
        assert torch.equal(batch["task"][6:], episode[6:])  # hindsight: the task that was accomplished
        seen |= set(zip(episode[:6].tolist(), batch["task"][:6].tolist(), strict=True))
        reward, task = torch.from_numpy(phase.logs.reward), batch["task"][:, None].expand(-1, 4)
        arrived = batch["lead_reward"][:, :, 0]
        assert torch.equal(arrived[batch["valid"]], reward[frame, task][batch["valid"]])
    assert seen == {(e, q) for e in range(3) for q in range(2)}  # uniform rows: any episode under any task


def test_agent_batches_are_now_and_then_long(agent_phase) -> None:
    phase = agent_phase(long_share=0.3, long_length=8)
    rng = np.random.default_rng(0)
    shapes = [tuple(phase.sample(rng, step)["valid"].shape) for step in range(200)]
    assert set(shapes) == {(12, 4), (6, 8)}
    assert 0.2 < shapes.count((6, 8)) / 200 < 0.4


def test_each_loss_learns_from_its_own_half(agent_phase) -> None:
    """By gradients: cloning on relevant rows, the world on uniform ones (or it turns optimistic)."""
    phase = agent_phase()
    batch = phase.sample(np.random.default_rng(0), 0)
    batch["tokens"] = batch["tokens"].clone().requires_grad_()
    losses, _ = phase(batch, torch.Generator().manual_seed(0), 0)
    halves = {}
    for name, loss in losses.items():
        (grad,) = torch.autograd.grad(loss, batch["tokens"], retain_graph=True)
        halves[name] = (bool(grad[:6].any()), bool(grad[6:].any()))
    both = (True, True)
    assert halves == {"dynamics": (True, False), "policy": (False, True), "reward": both, "proceed": both}


def test_cloning_skips_unlabelled_frames(agent_phase) -> None:
    phase = agent_phase()
    batch = phase.sample(np.random.default_rng(0), 0)
    batch["lead_labelled"][:] = False
    losses, _ = phase(batch, torch.Generator().manual_seed(0), 0)
    assert losses["policy"] == 0
    assert losses["reward"] > 0


def test_heads_train_the_transformer_and_the_task_embedding(agent_phase) -> None:
    """Detached features would leave the agent tokens at their random start."""
    phase = agent_phase()
    losses, _ = phase(phase.sample(np.random.default_rng(0), 0), torch.Generator().manual_seed(0), 0)
    for name in ("policy", "reward"):
        grads = torch.autograd.grad(
            losses[name],
            [phase.agent.task, phase.dynamics.transformer.layers[0].up.weight],
            retain_graph=True,
        )
        assert all(g.any() for g in grads)


def test_gate_02_leads_are_scored_against_the_right_ticks(agent_phase) -> None:
    """Heads that say the same everywhere, one thing per lead: the losses can be counted by hand."""
    phase = agent_phase(awake=False)
    agent, leads = phase.agent, phase.agent.cfg.leads
    with torch.no_grad():
        agent.policy.out.bias.normal_()
        agent.reward.out.bias.normal_()
    logs, rng = phase.logs, np.random.default_rng(3)
    logs.action[:, 0], logs.reward[:] = np.linspace(-2, 2, 28), rng.random((28, 2))
    logs.action_mask[:] = rng.random(28) < 0.7
    batch = phase.sample(rng, 0)
    losses, metrics = phase(batch, torch.Generator().manual_seed(0), 0)
    policy, reward = agent.policy.out.bias.view(leads, -1), agent.reward.out.bias.view(leads, -1)
    episode = np.repeat(np.arange(3), logs.episode_length)
    start = ((batch["action"][:, 0, 0] + 2) / 4 * 27).round().long().tolist()
    nats, lead0, surprise = [], [], []
    for b, t, n in itertools.product(range(12), range(4), range(leads)):
        frame = start[b] + t + n
        if frame >= 28 or episode[frame] != episode[start[b]]:
            continue
        if b >= 6 and logs.action_mask[frame]:
            nats.append(-agent.space.log_prob(policy[n], torch.from_numpy(logs.action[frame])))
            lead0 += [nats[-1]] if n == 0 else []
        arrived = torch.tensor(logs.reward[frame, batch["task"][b]])
        surprise.append(-agent.reward_dist.log_prob(reward[n], arrived))
    torch.testing.assert_close(losses["policy"], torch.stack(nats).mean())
    torch.testing.assert_close(metrics["bc_nats"], torch.stack(lead0).mean())
    torch.testing.assert_close(losses["reward"], torch.stack(surprise).mean())


def test_continuation_is_the_absence_of_a_terminal(agent_phase) -> None:
    phase = agent_phase(awake=False)
    with torch.no_grad():
        phase.agent.proceed.out.bias.fill_(20.0)  # sure to go on
    batch = phase.sample(np.random.default_rng(0), 0)
    batch["terminal"][:], batch["valid"][:] = False, True
    assert phase(batch, torch.Generator().manual_seed(0), 0)[0]["proceed"].item() < 1e-6
    batch["terminal"][:] = True
    assert phase(batch, torch.Generator().manual_seed(0), 0)[0]["proceed"].item() == pytest.approx(20.0)


# ---- phase 3


@pytest.fixture
def imagination_phase(make_dynamics, make_agent, make_logs, noise_latents) -> Callable[..., ImaginationPhase]:
    def make(awake: bool = True, **changes) -> ImaginationPhase:
        dynamics, logs = make_dynamics(), make_logs((9, 12, 2))
        logs.action[:] = np.sin(logs.action)
        logs.reward[:] = 0
        logs.reward[[4, 15], [0, 1]] = 1.0  # episode 0 does task 0, episode 1 task 1
        settings = ImaginationConfig(horizon=3, contexts=(1, 4), steps=2, warmup=0.0)
        cfg = ImaginationTraining(**({"steps": 20, "batch": 6, "reuse": 2, "settings": settings} | changes))
        torch.manual_seed(0)
        return ImaginationPhase(
            cfg,
            make_agent(dynamics, awake=awake),
            dynamics,
            nn.Identity(),
            logs,
            noise_latents(23),
            np.arange(3),
        )

    return make


def test_imagination_changes_policy_and_critic_and_nothing_else(run, imagination_phase) -> None:
    phase = imagination_phase()
    before = copy.deepcopy(phase.state_dict())
    named = dict(phase.trainable())
    assert {name.split(".")[0] for name in named} == {"policy", "critic"}
    assert all(phase.group(name, p) == "heads" for name, p in named.items())
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


def test_policy_and_critic_share_no_parameter(imagination_phase) -> None:
    phase = imagination_phase()
    losses, _ = phase(phase.sample(np.random.default_rng(0), 0), torch.Generator().manual_seed(0), 0)
    policy, critic = list(phase.policy.parameters()), list(phase.critic.parameters())
    for loss, others in ((losses["policy"], critic), (losses["value"], policy)):
        assert all(g is None for g in torch.autograd.grad(loss, others, retain_graph=True, allow_unused=True))


def test_the_policy_starts_as_the_prior_with_no_kl(imagination_phase) -> None:
    phase = imagination_phase()
    _, metrics = phase(phase.sample(np.random.default_rng(0), 0), torch.Generator().manual_seed(0), 0)
    assert metrics["kl"] == 0


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
        roll, bias = phase._rollout, phase.policy.out.bias
        h = roll.h[:, :-1]
        weight = torch.cat([torch.ones(6, 1), roll.proceed[:, :-1].cumprod(1)], 1)
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
        phase.critic.head.out.weight.normal_()
    batch = phase.sample(np.random.default_rng(0), 0)
    losses, metrics = phase(batch, torch.Generator().manual_seed(0), 0)
    roll = phase._rollout
    with torch.no_grad():
        value = phase.critic(roll.h)
    returns = lambda_returns(roll.reward, roll.proceed, value, 0.9, settings.trace)
    advantage = returns - value[:, :-1]
    assert 0.1 < (advantage > 0).float().mean() < 0.9
    weight = torch.cat([torch.ones(32, 1), roll.proceed[:, :-1].cumprod(1)], 1)
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


def test_warm_up_trains_only_the_critic(imagination_phase) -> None:
    settings = ImaginationConfig(horizon=3, contexts=(1,), steps=2, warmup=0.25)
    phase = imagination_phase(settings=settings)
    for step, moves in ((4, False), (5, True)):
        losses, _ = phase(phase.sample(np.random.default_rng(0), 4), torch.Generator().manual_seed(0), step)
        phase.zero_grad()
        phase.total(losses).backward()
        assert any(p.grad is not None and p.grad.any() for p in phase.policy.parameters()) == moves
        assert all(p.grad.isfinite().all() for p in phase.critic.parameters())


def test_a_rollout_serves_several_steps(imagination_phase) -> None:
    phase = imagination_phase()
    assert phase.period == 2
    first = phase.sample(np.random.default_rng(0), 0)
    phase(first, torch.Generator().manual_seed(0), 0)
    roll = phase._rollout
    assert phase.sample(np.random.default_rng(1), 1) == {}
    phase({}, torch.Generator().manual_seed(1), 1)
    assert phase._rollout is roll
    phase(phase.sample(np.random.default_rng(2), 2), torch.Generator().manual_seed(2), 2)
    assert phase._rollout is not roll
    assert not any(x.requires_grad for x in vars(roll).values())


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


def test_every_trained_weight_gets_a_gradient_under_autocast(
    imagination_phase, agent_phase, dynamics_phase
) -> None:
    """Autocast may keep copies of the weights from a no-grad rollout or teacher, and lose their gradients."""
    for phase in (imagination_phase(), agent_phase(), dynamics_phase(**ALWAYS_BOTH)):
        if isinstance(phase, ImaginationPhase):
            nn.init.normal_(phase.critic.head.out.weight)  # its start at zero would hide what lies behind it
        batch = phase.sample(np.random.default_rng(0), 0)
        with torch.autocast("cpu", torch.bfloat16):
            losses, _ = phase(batch, torch.Generator().manual_seed(0), 30)
        phase.total(losses).backward()
        missing = [name for name, p in phase.trainable() if p.grad is None or not p.grad.isfinite().all()]
        assert missing == []
        dead = [name for name, p in phase.trainable() if p.ndim == 2 and not p.grad.any()]
        assert dead == []


def test_checkpoints_are_complete_in_themselves(dynamics_phase, agent_phase, imagination_phase) -> None:
    assert set(dynamics_phase().checkpoint_modules()) == {"tokenizer", "dynamics"}
    assert set(agent_phase().checkpoint_modules()) == {"tokenizer", "dynamics", "agent"}
    names = set(imagination_phase().checkpoint_modules())
    assert names == {"tokenizer", "dynamics", "agent", "policy", "critic"}
