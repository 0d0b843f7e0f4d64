"""Sessions: stepping frame by frame equals the clip, and a loaded policy acts like the saved one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import toy_run

from d4_core.actions import ActionSpace
from d4_core.agent import Agent, Head
from d4_core.baselines import FrameStack, ScratchPolicy
from d4_core.config import action_parts
from d4_core.models import Models, load
from d4_core.session import PolicySession, RandomSession, ScratchSession
from d4_core.shortcut import corrupt
from d4_core.tokenizer import Vector

FRAMES, WORLDS = 10, 2  # more frames than the context window of 4
TASKS = np.array([1, 0])
ALIVE = np.ones(WORLDS, bool)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    run = tmp_path_factory.mktemp("session")
    toy_run.write_checkpoint(run, "imagination", toy_run.contract())
    return awake(load(run / "imagination"))


def awake(models: Models) -> Models:
    """Networks with opinions: as initialised they would do the same everywhere."""
    with torch.no_grad():
        for network in (models.tokenizer, models.dynamics):
            for name, p in network.named_parameters():
                p.mul_(10.0 if name.endswith(("attention.out.weight", "down.weight")) else 1.0)
        for head, seed in ((models.policy, 1), (models.agent.policy, 2), (models.agent.reward, 3)):
            gen = torch.Generator().manual_seed(seed)
            head.out.weight.copy_(torch.randn(head.out.weight.shape, generator=gen))
    return models


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """uint8 [T, B, H, W, 3]."""
    return np.random.default_rng(0).integers(0, 256, (FRAMES, WORLDS, 16, 24, 3), dtype=np.uint8)


class Listener:
    """A policy head that keeps what it said: the bins of its actions are too coarse to compare."""

    def __init__(self, head: Head) -> None:
        self.head, self.said = head, []

    def first(self, h: torch.Tensor) -> torch.Tensor:
        self.said.append(self.head.first(h))
        return self.said[-1]


def play(session: PolicySession, pictures: np.ndarray, tasks: np.ndarray = TASKS) -> np.ndarray:
    """Actions [T, B, A]."""
    session.reset(len(tasks), tasks)
    return np.stack([session.act(frame, {}, ALIVE) for frame in pictures])


def opinions(models: Models, pictures: np.ndarray, tasks: np.ndarray = TASKS) -> torch.Tensor:
    """What the policy head says (T, B, P), the likeliest action being taken."""
    head = Listener(models.policy)
    play(PolicySession(models, WORLDS, argmax=True, head=head), pictures, tasks)
    return torch.stack(head.said)


# ---- parity


@torch.no_grad()
def test_stepping_a_session_equals_the_clip(models, pictures) -> None:
    """Tokens, actions fed back, context noise and heads: nothing differs from what was trained."""
    head = Listener(models.policy)
    session = PolicySession(models, WORLDS, seed=5, argmax=True, head=head)
    session.reset(WORLDS, TASKS)
    actions, rewards = [], []
    for frame in pictures:
        actions.append(session.act(frame, {}, ALIVE))
        rewards.append(session.predicted_reward.clone())
    tokenizer, dynamics, agent = models.tokenizer, models.dynamics, models.agent
    clean = tokenizer.pack(tokenizer.encode({"cam": torch.from_numpy(pictures).transpose(0, 1)}))
    gen, grid = torch.Generator().manual_seed(5), dynamics.cfg.grid
    noise = torch.stack([torch.randn(clean[:, 0].shape, generator=gen) for _ in range(FRAMES)], 1)
    index = torch.full((WORLDS, FRAMES), grid.context_index)
    previous = torch.zeros(WORLDS, FRAMES, 2)
    previous[:, 1:] = torch.from_numpy(np.stack(actions, 1))[:, :-1]
    known = torch.arange(FRAMES).expand(WORLDS, -1) > 0
    tokens = agent.tokens(torch.from_numpy(TASKS))[:, None].expand(-1, FRAMES, -1, -1)
    noisy = corrupt(clean, noise, grid.tau(index))
    block = dynamics(noisy, index, torch.full_like(index, grid.finest), previous, known, tokens)
    h = Agent.readout(block.agent)
    expected = models.policy.first(h)
    torch.testing.assert_close(torch.stack(head.said, 1), expected, rtol=1e-4, atol=1e-4)
    assert np.array_equal(np.stack(actions, 1), dynamics.space.mode(expected))
    torch.testing.assert_close(torch.stack(rewards, 1), agent.predict_reward(h), rtol=1e-4, atol=1e-4)
    assert (expected.std((0, 1)) > 0.01).all()  # and it is no constant


def test_a_loaded_policy_acts_like_the_saved_one(tmp_path: Path, pictures) -> None:
    robot = toy_run.contract()
    saved = toy_run.write_checkpoint(tmp_path, "imagination", robot)
    for network in saved.named(("tokenizer", "dynamics", "agent", "policy")).values():
        network.eval()
    loaded = load(tmp_path / "imagination", robot)
    a, b = (play(PolicySession(m, WORLDS, seed=3), pictures) for m in (saved, loaded))
    assert np.array_equal(a, b)


# ---- one session


def test_a_reset_forgets_everything(models, pictures) -> None:
    head = Listener(models.policy)
    session = PolicySession(models, WORLDS, seed=3, head=head)
    first = play(session, pictures)
    play(session, pictures[::-1])
    assert np.array_equal(play(session, pictures), first)
    said = torch.stack(head.said).unflatten(0, (3, FRAMES))
    assert torch.equal(said[0], said[2])
    assert not torch.equal(said[0], said[1])
    assert not np.array_equal(play(PolicySession(models, WORLDS, seed=4), pictures), first)


def test_actions_are_samples_within_the_limits(models, pictures) -> None:
    robot = toy_run.contract()
    actions = play(PolicySession(models, WORLDS), pictures)
    assert actions.shape == (FRAMES, WORLDS, 2)
    assert actions.dtype == np.float32
    assert (robot.action_low <= actions).all()
    assert (actions <= robot.action_high).all()
    most_likely = play(PolicySession(models, WORLDS, argmax=True), pictures)
    assert not np.array_equal(actions, most_likely)


def test_task_pictures_and_own_actions_matter(models, pictures) -> None:
    plain = opinions(models, pictures)
    assert (opinions(models, pictures, TASKS[::-1].copy()) - plain).abs().min(-1).values.max() > 1e-3
    changed = pictures.copy()
    changed[FRAMES - 2] = 255 - changed[FRAMES - 2]
    other = opinions(models, changed)
    assert torch.equal(other[: FRAMES - 2], plain[: FRAMES - 2])  # what is still to come does not
    assert not torch.equal(other[FRAMES - 2], plain[FRAMES - 2])
    head = Listener(models.policy)
    session = PolicySession(models, WORLDS, argmax=True, head=head)
    session.reset(WORLDS, TASKS)
    session.act(pictures[0], {}, ALIVE)
    session._action.add_(1.0)  # as if it had done something else
    session.act(pictures[1], {}, ALIVE)
    assert torch.equal(head.said[0], plain[0])
    assert not torch.allclose(head.said[1], plain[1], atol=1e-3)


def test_the_cloned_head_can_be_played_beside_the_improved_one(models, pictures) -> None:
    improved, cloned = (PolicySession(models, WORLDS, head=head) for head in (None, models.agent.policy))
    assert improved.head is models.policy
    assert not np.array_equal(play(improved, pictures), play(cloned, pictures))


def test_proprioception_reaches_the_policy(tmp_path: Path, pictures) -> None:
    align = {"strategy": "hold", "timeline": "receive", "tolerance_ms": 150}
    cam = {"name": "cam", "topic": "/cam", "type": "sensor_msgs/msg/Image", "size": [16, 24], "align": align}
    pose = {
        "name": "pose", "topic": "/pose", "type": "geometry_msgs/msg/PoseStamped", "role": "input",
        "select": ["pose.position.x", "pose.position.y"], "align": align,
    }  # fmt: skip
    robot = toy_run.contract(observations=[cam, pose])
    toy_run.write_checkpoint(tmp_path, "imagination", robot)
    models, said = awake(load(tmp_path / "imagination")), []
    for place in (0.0, 2.0):
        head = Listener(models.policy)
        session = PolicySession(models, WORLDS, argmax=True, head=head)
        session.reset(WORLDS, TASKS)
        session.act(pictures[0], {"pose": np.full((WORLDS, 2), place, np.float32)}, ALIVE)
        said += head.said
    assert not torch.allclose(*said, atol=1e-3)


def test_a_session_is_made_for_its_number_of_worlds(models) -> None:
    with pytest.raises(ValueError, match="made for 2 worlds, not 3"):
        PolicySession(models, 2).reset(3, np.zeros(3, np.int64))


# ---- baselines as sessions


def test_random_actions_fill_the_limits_and_repeat_with_the_seed() -> None:
    low, high = np.array([-1.0, 0.0], np.float32), np.array([1.0, 3.0], np.float32)
    runs = []
    for seed in (0, 0, 1):
        session = RandomSession(low, high, seed)
        session.reset(50, np.zeros(50, np.int64))
        runs.append(np.stack([session.act(np.empty(0), {}, ALIVE) for _ in range(20)]))
    assert np.array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])
    assert runs[0].shape == (20, 50, 2)
    assert runs[0].dtype == np.float32
    flat = runs[0].reshape(-1, 2)
    np.testing.assert_allclose(flat.min(0), low, atol=0.02)
    np.testing.assert_allclose(flat.max(0), high, atol=0.02)


def test_random_classes_and_keys_are_whole_and_all_of_them_are_drawn() -> None:
    """The highest class of a categorical action was never drawn, and what was drawn were no classes."""
    low, high = np.array([-1.0, 0.0, 0.0], np.float32), np.array([1.0, 16.0, 1.0], np.float32)
    session = RandomSession(low, high, 0, np.array([False, True, True]))
    session.reset(400, np.zeros(400, np.int64))
    drawn = session.act(np.empty(0), {}, ALIVE)
    assert sorted(set(drawn[:, 1].tolist())) == list(range(17))
    assert sorted(set(drawn[:, 2].tolist())) == [0.0, 1.0]
    assert 0.4 < drawn[:, 2].mean() < 0.6
    assert len(set(drawn[:, 0].tolist())) > 300


def test_the_scratch_session_stacks_the_newest_frames_last() -> None:
    class Spy:
        """A policy that notes its input and has no opinion."""

        look = FrameStack((16, 16), 3, (Vector(name="x", size=1),))
        space = ActionSpace(action_parts(toy_run.contract()), 5)

        def __call__(self, stack: torch.Tensor, vectors: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
            seen.append((stack[:, :, 0, 0, 0].tolist(), task.tolist()))
            assert torch.equal(vectors[..., 0], 2.0 * stack[:, :, 0, 0, 0])
            return torch.zeros(len(stack), self.space.num_params)

    seen: list = []
    session = ScratchSession(Spy(), seed=0)
    for _ in range(2):
        session.reset(2, np.array([1, 0]))
        for t in range(4):
            images = np.full((2, 4, 4, 3), t, np.uint8)
            images[1] += 100
            action = session.act(images, {"x": 2.0 * images[:, 0, 0, :1], "probe": images}, ALIVE)
    steps = [[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3]]
    assert [stack[0] for stack, _ in seen] == steps * 2  # the first frame fills the stack, also after a reset
    assert [stack[1] for stack, _ in seen] == [[x + 100 for x in s] for s in steps] * 2
    assert all(task == [1, 0] for _, task in seen)
    assert action.shape == (2, 2)


def test_the_scratch_sessions_likeliest_action_has_no_luck_in_it() -> None:
    policy = ScratchPolicy(action_parts(toy_run.contract()), 5, 2, (16, 16), 1)
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    drawn = []
    for argmax, seed in ((True, 0), (True, 1), (False, 0), (False, 1)):
        session = ScratchSession(policy, seed, argmax)
        session.reset(2, np.array([0, 1]))
        drawn.append(session.act(images, {}, ALIVE))
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[2], drawn[3])


def test_actions_stay_what_they_were_when_the_next_frame_comes(models, pictures) -> None:
    """On the CPU `act` once returned a view of the session's own buffer."""
    session = PolicySession(models, WORLDS)
    session.reset(WORLDS, TASKS)
    first = session.act(pictures[0], {}, ALIVE)
    kept = first.copy()
    for frame in pictures[1:]:
        session.act(frame, {}, ALIVE)
    np.testing.assert_array_equal(first, kept)


# ---- another task on the way


def test_asking_for_another_task_keeps_what_was_seen(models, pictures) -> None:
    """A session that is asked for another task acts by it and still remembers; a new episode forgets."""
    half = FRAMES // 2
    heads = [Listener(models.policy), Listener(models.policy)]
    asked, forgot = (PolicySession(models, WORLDS, argmax=True, head=head) for head in heads)
    play(asked, pictures[:half])
    play(forgot, pictures[:half])
    asked.ask(TASKS[::-1].copy())
    forgot.reset(WORLDS, TASKS[::-1].copy())
    for session in (asked, forgot):
        session.act(pictures[half], {}, ALIVE)
    same = opinions(models, pictures[: half + 1])[-1]
    assert not torch.allclose(heads[0].said[-1], same)
    assert not torch.allclose(heads[0].said[-1], heads[1].said[-1])
    asked.ask(TASKS)
    asked.act(pictures[half], {}, ALIVE)
    assert torch.isfinite(heads[0].said[-1]).all()
