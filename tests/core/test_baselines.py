"""Behaviour cloning from scratch: what it is shown, and that it learns what a picture tells."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from d4_core.actions import ActionPart
from d4_core.baselines import ScratchPhase, ScratchPolicy, ScratchTraining, shift
from d4_datasets.errors import UserError

PARTS = (ActionPart(kind="continuous", size=1, low=(-1.0,), high=(1.0,)),)
LENGTHS = (6, 9, 5)


def bars(places: np.ndarray) -> np.ndarray:
    """uint8 [N, 16, 32, 3]: a white bar at each place in [-1, 1]."""
    images = np.zeros((len(places), 16, 32, 3), np.uint8)
    for image, place in zip(images, places, strict=True):
        column = round((place + 1) / 2 * 28)
        image[:, column : column + 4] = 255
    return images


@pytest.fixture
def logs(make_logs):
    """Picture n has grey level n; episode 0 does task 0, 1 both, 2 none; frame 7 is unlabelled."""
    reward = np.zeros((20, 2), np.float32)
    reward[[3, 8], 0] = 1.0
    reward[9, 1] = 1.0
    mask = np.ones(20, bool)
    mask[7] = False
    images = np.zeros((20, 16, 16, 3), np.uint8) + np.arange(20, dtype=np.uint8)[:, None, None, None]
    return make_logs(LENGTHS, images={"cam": images}, reward=reward, action_mask=mask)


def phase_of(logs, size=(16, 16), **changes) -> ScratchPhase:
    torch.manual_seed(0)
    cfg = ScratchTraining(**({"steps": 10, "batch": 256, "shift": 0} | changes))
    policy = ScratchPolicy(PARTS, 9, num_tasks=2, size=size, frames=cfg.frames)
    return ScratchPhase(cfg, policy, logs, np.arange(len(logs.episode_length)))


def test_only_labelled_frames_of_episodes_that_did_the_task_are_cloned(logs) -> None:
    phase = phase_of(logs)
    batch = phase.sample(np.random.default_rng(0), 0)
    frame = batch["stack"][:, -1, 0, 0, 0].long()
    seen = {q: set(frame[batch["task"] == q].tolist()) for q in (0, 1)}
    assert seen == {0: set(range(15)) - {7}, 1: set(range(6, 15)) - {7}}
    torch.testing.assert_close(batch["action"][:, 0], frame + 0.25)
    assert batch["stack"].dtype == torch.uint8


def test_a_stack_holds_the_newest_frame_last_and_never_another_episode(logs) -> None:
    batch = phase_of(logs).sample(np.random.default_rng(0), 0)
    stack = batch["stack"][..., 0, 0, 0].long()
    assert stack.shape == (256, 3)
    for old, middle, new in stack.tolist():
        first = 0 if new < 6 else 6
        assert (old, middle) == (max(new - 2, first), max(new - 1, first))


def test_a_task_that_nobody_did_is_not_drawn(logs) -> None:
    logs.reward[:, 1] = 0
    batch = phase_of(logs).sample(np.random.default_rng(0), 0)
    assert not batch["task"].any()


def test_shift_moves_all_frames_of_a_row_alike_and_repeats_the_border() -> None:
    stack = np.arange(2 * 2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 2, 4, 5, 3)
    moved = shift(stack, np.array([[1, -2], [0, 0]]))
    assert np.array_equal(moved[1], stack[1])
    for y in range(4):
        for x in range(5):
            assert np.array_equal(moved[0, :, y, x], stack[0, :, min(y + 1, 3), max(x - 2, 0)])


def test_shifts_are_drawn_per_row_within_the_limit(logs) -> None:
    ramp = np.arange(16, dtype=np.uint8)[None, None, :, None] + np.zeros((20, 16, 16, 3), np.uint8)
    logs.images["cam"] = ramp
    stack = phase_of(logs, shift=2).sample(np.random.default_rng(0), 0)["stack"]
    moved = stack[:, 0, 8, 8, 0].int() - 8
    assert set(moved.tolist()) == {-2, -1, 0, 1, 2}
    assert torch.equal(stack[:, 0], stack[:, 2])


def test_everything_trains_with_adamw_and_the_policy_is_saved(logs) -> None:
    phase = phase_of(logs)
    assert {phase.group(name, p) for name, p in phase.trainable()} == {"adamw"}
    assert phase.checkpoint_modules() == {"policy": phase.policy}
    assert {name.split(".")[0] for name, _ in phase.trainable()} == {"policy"}


def test_it_learns_what_the_picture_says_and_what_the_task_asks(run, make_logs) -> None:
    """Go to the bar (task 0) or away from it (task 1)."""
    places = np.random.default_rng(0).uniform(-1, 1, 120)
    sign = np.repeat([1.0, -1.0], 60)
    reward = np.zeros((120, 2), np.float32)
    reward[30, 0] = reward[90, 1] = 1.0
    action = (places * sign)[:, None].astype(np.float32)
    logs = make_logs((60, 60), images={"cam": bars(places)}, reward=reward, action=action)
    phase = phase_of(logs, size=(16, 32), frames=1, batch=32)
    history = run(phase, 60, lr=1e-2)
    first, last = (np.mean([h["policy"] for h in history[part]]) for part in (slice(3), slice(-5, None)))
    assert first == pytest.approx(np.log(9), rel=0.1)  # untrained: uniform over the bins
    assert last < 0.6 * first
    with torch.no_grad():
        stack = torch.from_numpy(bars(np.array([-0.7, 0.7])))[:, None]
        at, away = (phase.policy.space.mode(phase.policy(stack, torch.full((2,), q)))[:, 0] for q in (0, 1))
    assert at[0] < -0.3 < 0.3 < at[1]
    assert away[1] < -0.3 < 0.3 < away[0]


def test_nothing_to_clone_is_one_sentence(make_logs) -> None:
    images = {"cam": np.zeros((20, 16, 16, 3), np.uint8)}
    unlabelled = make_logs(LENGTHS, images=images, action_mask=np.zeros(20, bool))
    with pytest.raises(UserError, match="nothing to clone"):
        phase_of(unlabelled)
