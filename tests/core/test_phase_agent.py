"""Agent finetuning: which episodes are cloned, whose half teaches what, and which tick a lead predicts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from d4_core.phases import AgentTraining, DynamicsTraining, accomplished, relevant_episodes
from d4_datasets.errors import UserError


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


def test_nothing_to_clone_is_said_in_one_sentence(agent_phase) -> None:
    """Labels without a success and a success without labels: neither can be cloned."""
    with pytest.raises(UserError, match="no labelled episode reaches 150% of the best return of any task"):
        agent_phase(relevant_return=1.5)
    with pytest.raises(UserError, match="or lower agent_training"):
        agent_phase(reward=-1.0)  # punished only: no return is positive


def test_one_task_with_an_example_is_enough(agent_phase) -> None:
    phase = agent_phase()
    phase.relevant[1] = np.zeros(0, np.int64)
    batch = phase.sample(np.random.default_rng(0), 0)
    assert not batch["task"][6:].any()  # only task 0 can be cloned
    assert batch["task"][:6].any()  # rewards are learned for both


def test_the_step_sizes_stay_trained_in_this_phase() -> None:
    """The world model arrives with its shortcut loss switched on: a second warm-up would let it forget."""
    assert AgentTraining().dynamics.bootstrap_warmup == 0.0
    assert DynamicsTraining().bootstrap_warmup > 0.0
