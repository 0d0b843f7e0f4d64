"""The planner: its search finds what scores best, its dreams start from the real state and leave it alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import toy_run

from d4_core.models import Models, build
from d4_core.planner import PlannerConfig, PlannerSession
from d4_datasets.errors import UserError

WORLDS = 5
TASKS = np.arange(WORLDS) % 2
ALIVE = np.ones(WORLDS, bool)
PLAIN = PlannerConfig(candidates=8, cloned=0.0, elites=3, iterations=2, horizon=3, streams=16)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    run = tmp_path_factory.mktemp("planner")
    return toy_run.write_checkpoint(run, "agent", toy_run.contract())


def session_of(models: Models, cfg: PlannerConfig = PLAIN, seed: int = 0) -> PlannerSession:
    session = PlannerSession(models, WORLDS, seed, cfg)
    session.reset(WORLDS, TASKS)
    return session


def pictures(frames: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, WORLDS, 16, 24, 3), dtype=np.uint8)


def test_a_copied_state_goes_on_like_the_original(make_dynamics) -> None:
    model, gen = make_dynamics(), torch.Generator().manual_seed(0)
    source, copy = model.new_cache(3), model.new_cache(4)
    rows = torch.tensor([2, 0, 0, 1])
    levels = torch.full((3,), 7), torch.full((3,), 3)

    def step(cache, tokens, action, chosen):
        tau, e = (x[:1].expand(len(tokens)) for x in levels)
        known = torch.ones(len(tokens), dtype=torch.bool)
        with torch.no_grad():
            block = model.step(
                tokens[chosen], tau, e, action[chosen], known[chosen], cache, model.begin(cache)
            )
        cache.advance()
        return block.clean

    every = torch.arange(3)
    for _ in range(6):  # past the end of the ring
        step(source, torch.randn(3, 3, 2, generator=gen), torch.rand(3, 1, generator=gen), every)
    copy.take(source, rows)
    kept = source.keys.clone()
    tokens, action = torch.randn(3, 3, 2, generator=gen), torch.rand(3, 1, generator=gen)
    wide = tokens[rows], action[rows]
    forked = step(copy, *wide, torch.arange(4))
    assert torch.equal(source.keys, kept)
    torch.testing.assert_close(forked, step(source, tokens, action, every)[rows])


@pytest.mark.parametrize("memory", [0.0, 0.7])
def test_noise_has_unit_variance_and_the_memory_asked_for(models, memory) -> None:
    session = session_of(models, PlannerConfig(candidates=8, horizon=4, memory=memory))
    noise = session._noise(4000)
    assert noise.shape == (4000, 4, 2)
    assert noise.std(0).sub(1).abs().max() < 0.06
    correlation = (noise[:, 1:] * noise[:, :-1]).mean((0, 2))
    assert (correlation - memory).abs().max() < 0.06


def test_the_search_finds_the_best_sequence_of_every_world(models, monkeypatch) -> None:
    cfg = PlannerConfig(candidates=64, cloned=0.0, elites=8, iterations=6, horizon=2, memory=0.0)
    session = session_of(models, cfg)
    goal = torch.rand(WORLDS, 2, 2, generator=torch.Generator().manual_seed(1)) * 1.6 - 0.8

    def judge(h, worlds, wanted):
        return -(wanted - goal[worlds][:, None]).square().sum((2, 3)), wanted

    monkeypatch.setattr(session, "_imagine", judge)
    plan = session._optimise(torch.zeros(WORLDS, 1), torch.arange(WORLDS))
    assert (plan - goal).abs().max() < 0.15
    action = session._choose(torch.zeros(WORLDS, 1), ALIVE)
    unit = models.dynamics.space.normalise(action)
    assert (unit - goal[:, 0]).abs().max() < 0.15
    assert (session._plan[:, 0] - goal[:, 1]).abs().max() < 0.15  # where the next tick starts from
    assert torch.equal(session._plan[:, 0], session._plan[:, 1])
    session.reset(WORLDS, TASKS)
    assert not session._plan.any()


def test_commands_stay_within_the_contract_however_far_the_best_lies(models, monkeypatch) -> None:
    session = session_of(models)
    monkeypatch.setattr(session, "_imagine", lambda h, worlds, wanted: (wanted.sum((2, 3)), wanted))
    for _ in range(4):
        action = session._choose(torch.zeros(WORLDS, 1), ALIVE)
    robot = toy_run.contract()
    assert (action.numpy() <= robot.action_high).all()
    assert (action.numpy() > 0.8 * robot.action_high).all()


def test_only_worlds_that_run_are_planned_for(models, monkeypatch) -> None:
    session, seen = session_of(models), []

    def judge(h, worlds, wanted):
        seen.append(worlds.tolist())
        return wanted.sum((2, 3)), wanted

    monkeypatch.setattr(session, "_imagine", judge)
    action = session._choose(torch.zeros(WORLDS, 1), np.array([True, False, False, True, True]))
    assert session._chunk == 2  # 5 worlds of 8 candidates in 3 chunks of at most 16 streams
    assert seen == [[0, 3], [0, 3], [4, 4], [4, 4]]
    middle = torch.tensor((toy_run.contract().action_low + toy_run.contract().action_high) / 2)
    assert torch.equal(action[1], middle)
    assert (action[[0, 3, 4]] > middle).all()


def test_dreams_leave_the_real_stream_alone(models) -> None:
    session = session_of(models)
    for t, frame in enumerate(pictures(3)):
        action = session.act(frame, {}, ALIVE)
        assert session.dream.cache.position == t + 1
    robot = toy_run.contract()
    assert action.shape == (WORLDS, 2)
    assert ((robot.action_low <= action) & (action <= robot.action_high)).all()
    before = session.dream.cache.keys.clone(), session._action.clone()
    wanted = torch.zeros(2, 8, 3, 2)
    for _ in range(2):
        session._imagine(session.features, torch.tensor([0, 3]), wanted)
    assert torch.equal(session.dream.cache.keys, before[0])
    assert torch.equal(session._action, before[1])
    assert session._futures.cache.position == 3 + 3


def test_a_reset_with_the_same_seed_repeats_the_actions(models) -> None:
    runs = []
    for seed in (0, 0, 1):
        session = session_of(models, seed=seed)
        runs.append(np.stack([session.act(frame, {}, ALIVE) for frame in pictures(2)]))
    assert np.array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


def test_a_share_of_the_sequences_is_the_cloned_policys(models, monkeypatch) -> None:
    cfg = PlannerConfig(candidates=8, cloned=0.25, elites=3, horizon=3)
    session, space = session_of(models, cfg), models.dynamics.space
    session.act(pictures(1)[0], {}, ALIVE)
    params = torch.zeros(space.num_params)
    params.view(2, -1)[:, -1] = 100.0  # full speed in both dimensions
    monkeypatch.setattr(session.head, "first", lambda h: params.expand(len(h), -1))
    wanted = torch.full((WORLDS, 8, 3, 2), -0.5)
    _, taken = session._imagine(session.features, torch.arange(WORLDS), wanted)
    torch.testing.assert_close(taken[:, :2], torch.ones(WORLDS, 2, 3, 2))
    torch.testing.assert_close(taken[:, 2:], wanted[:, 2:])


@pytest.mark.parametrize("survival", [0.0, 0.5, 1.0])
def test_a_plan_is_worth_its_discounted_reward_while_it_lasts(models, monkeypatch, survival) -> None:
    cfg = PlannerConfig(candidates=8, cloned=0.0, elites=3, horizon=3, discount=0.9)
    session = session_of(models, cfg)
    session.act(pictures(1)[0], {}, ALIVE)
    monkeypatch.setattr(models.agent, "predict_reward", lambda h: torch.arange(1.0, 4.0).expand(len(h), -1))
    monkeypatch.setattr(models.agent, "predict_continue", lambda h: torch.full(h.shape[:2], survival))
    score, _ = session._imagine(session.features, torch.arange(WORLDS), torch.zeros(WORLDS, 8, 3, 2))
    expected = 1 + survival * 0.9 * 2 + survival**2 * 0.81 * 3
    torch.testing.assert_close(score, torch.full((WORLDS, 8), expected))


def test_other_than_continuous_actions_are_refused() -> None:
    align = {"strategy": "hold", "timeline": "receive", "tolerance_ms": 150}
    key = {
        "name": "gripper", "topic": "/gripper", "type": "std_msgs/msg/Bool", "select": ["data"],
        "kind": "binary", "safety": "zeros", "align": align,
    }  # fmt: skip
    models = build(toy_run.PRESET, toy_run.contract(actions=[key]), "agent")
    with pytest.raises(UserError, match="continuous actions only, and the contract has binary"):
        PlannerSession(models, 1)
