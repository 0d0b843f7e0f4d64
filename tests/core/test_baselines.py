"""Cloning from scratch and from pseudo-labels: what is shown, and that what a picture tells is learned."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import toy_run

from d4_core.actions import ActionPart
from d4_core.baselines import (
    BaselineTrainer,
    InverseDynamics,
    InversePhase,
    InverseTraining,
    ScratchPhase,
    ScratchPolicy,
    ScratchTraining,
    Stacks,
    answered,
    clone_error,
    inverse_error,
    relabel,
    shift,
)
from d4_core.checkpoint import load_config
from d4_core.tokenizer import Vector
from d4_datasets.errors import UserError

PARTS = (ActionPart(kind="continuous", size=1, low=(-1.0,), high=(1.0,)),)
LENGTHS = (6, 9, 5)
VECTORS = (Vector(name="joints", size=2), Vector(name="speed", size=1))
EVERY = np.arange(3)


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
    policy = ScratchPolicy(PARTS, 9, 2, size, cfg.frames, VECTORS if logs.vectors else ())
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
        seen = torch.from_numpy(bars(np.array([-0.7, 0.7])))[:, None], torch.zeros(2, 1, 0)
        at, away = (phase.policy.space.mode(phase.policy(*seen, torch.full((2,), q)))[:, 0] for q in (0, 1))
    assert at[0] < -0.3 < 0.3 < at[1]
    assert away[1] < -0.3 < 0.3 < away[0]


def test_nothing_to_clone_is_one_sentence(make_logs) -> None:
    images = {"cam": np.zeros((20, 16, 16, 3), np.uint8)}
    unlabelled = make_logs(LENGTHS, images=images, action_mask=np.zeros(20, bool))
    with pytest.raises(UserError, match="nothing to clone"):
        phase_of(unlabelled)


# ---- proprioception


def test_proprioception_is_stacked_standardised_and_told_from_probes(logs) -> None:
    frame = np.arange(20, dtype=np.float32)
    joints, speed = np.stack([frame, -frame], 1), 100 * frame[:, None]
    logs.vectors.update(joints=joints, speed=speed, probe=np.full((20, 1), np.nan, np.float32))
    phase = phase_of(logs)
    batch = phase.sample(np.random.default_rng(0), 0)
    grey = batch["stack"][..., 0, 0, 0].float()
    torch.testing.assert_close(batch["vectors"], torch.stack([grey, -grey, 100 * grey], -1))
    look = phase.policy.look
    x = (batch["vectors"] - look.mean) / look.std
    assert x.mean(0).abs().max() < 0.5
    assert x.std(0).sub(1).abs().max() < 0.2
    with torch.no_grad():
        other = batch["vectors"] + torch.tensor([3.0, 0.0, 0.0])
        a, b = (phase.policy(batch["stack"], v, batch["task"]) for v in (batch["vectors"], other))
    assert (a - b).abs().max() > 1e-3


# ---- inverse dynamics and pseudo-labels


def inverse_of(**changes) -> InverseDynamics:
    torch.manual_seed(0)
    settings = {"parts": PARTS, "bins": 9, "size": (16, 32), "lags": (-1, 0, 1, 2)}
    return InverseDynamics(**(settings | changes))


def test_frames_around_are_clamped_at_both_ends_of_the_episode(logs) -> None:
    stack, _ = Stacks(logs, (-1, 0, 1, 2), ())(np.array([0, 4, 5, 6, 13]))
    expected = [[0, 0, 1, 2], [3, 4, 5, 5], [4, 5, 5, 5], [6, 6, 7, 8], [12, 13, 14, 14]]
    assert stack[..., 0, 0, 0].tolist() == expected


def test_the_last_frame_of_an_episode_answers_no_action(logs) -> None:
    assert np.flatnonzero(~answered(logs, EVERY)).tolist() == [5, 14, 19]
    assert np.flatnonzero(answered(logs, EVERY[:1])).tolist() == [0, 1, 2, 3, 4]


def test_inverse_dynamics_learns_from_all_known_actions_that_show(logs) -> None:
    phase = InversePhase(InverseTraining(batch=256, shift=0), inverse_of(size=(16, 16)), logs, EVERY[:2])
    batch = phase.sample(np.random.default_rng(0), 0)
    assert set((batch["action"][:, 0] - 0.25).long().tolist()) == set(range(14)) - {5, 7}


def moving_bars(steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of a bar and the moves (N, 1) that take it from frame to frame."""
    rng, place, places, moves = np.random.default_rng(seed), 0.0, [], []
    for _ in range(steps):
        move = float(np.clip(rng.uniform(-0.4, 0.4), -1 - place, 1 - place))
        places.append(place)
        moves.append(move)
        place += move
    return bars(np.array(places)), np.array(moves, np.float32)[:, None]


def test_inverse_dynamics_sees_an_action_in_what_followed(run, make_logs) -> None:
    images, moves = moving_bars(200, 0)
    logs = make_logs((200,), images={"cam": images}, action=2.5 * moves)
    inverse = inverse_of()
    phase = InversePhase(InverseTraining(batch=32, shift=0), inverse, logs, np.arange(1))
    before = inverse_error(inverse, logs, np.arange(1))
    run(phase, 80, lr=5e-3)
    after = inverse_error(inverse.eval(), logs, np.arange(1))
    assert after["frames"] == 199
    assert after["relative_mae"] < 0.5 * before["relative_mae"]
    assert after["nats"] < before["nats"] - 0.3
    assert after["relative_mae"] == pytest.approx(after["mae"][0] / after["spread"][0])


def test_a_label_is_the_expected_continuous_and_the_most_likely_other_value() -> None:
    keys = ActionPart(kind="binary", size=1)
    inverse = inverse_of(parts=(keys, ActionPart(kind="continuous", size=1, low=(0.0,), high=(4.0,))), bins=3)
    params = torch.tensor([[0.1, 0.0, 0.0, -1e9], [-0.1, -1e9, 0.0, np.log(3.0)]])
    torch.testing.assert_close(inverse.label(params), torch.tensor([[1.0, 1.0], [0.0, 3.5]]))


def test_inverse_dynamics_looks_at_what_changes() -> None:
    look = inverse_of(size=(16, 16)).look
    still, moving = (look._contrast(torch.tensor([[3.0, 3.0, x]])) for x in (3.0, 3.5))
    assert still.tolist() == [[3.0, 0.0, 0.0]]
    assert moving.tolist() == [[3.0, 0.0, 0.5]]


def test_without_held_out_labels_there_is_no_error_to_tell(make_logs) -> None:
    images = {"cam": np.zeros((20, 16, 32, 3), np.uint8)}
    unlabelled = make_logs(LENGTHS, images=images, action_mask=np.zeros(20, bool))
    assert inverse_error(inverse_of(), unlabelled, EVERY) == {"frames": 0}
    with pytest.raises(UserError, match="no inverse dynamics to learn"):
        InversePhase(InverseTraining(), inverse_of(), unlabelled, EVERY)


def test_classes_are_right_or_wrong(make_logs, monkeypatch) -> None:
    """Of classes the mean error says nothing: 16 is no more wrong than 1."""
    images = {"cam": np.zeros((20, 16, 32, 3), np.uint8)}
    action = (np.arange(20) % 4)[:, None].astype(np.float32)
    logs = make_logs((20,), images=images, action=action)
    inverse = inverse_of(parts=(ActionPart(kind="categorical", classes=4),))
    monkeypatch.setattr(inverse, "label", lambda params: torch.zeros(len(params), 1))
    assert inverse_error(inverse, logs, np.arange(1))["accuracy"] == pytest.approx(5 / 19)
    assert inverse_error(inverse_of(), make_logs((20,), images=images), np.arange(1))["accuracy"] is None


def test_pseudo_labels_fill_the_gaps_and_true_labels_stay(logs) -> None:
    logs.action_mask[15:] = False
    labels = np.full((20, 1), -7.0, np.float32)
    new = relabel(logs, labels, EVERY)
    assert np.flatnonzero(new.action[:, 0] == -7.0).tolist() == [7, 15, 16, 17, 18]
    assert np.flatnonzero(~new.action_mask).tolist() == [19]
    known = logs.action_mask
    assert np.array_equal(new.action[known], logs.action[known])
    assert logs.labelled.tolist() == [True, True, False]
    assert new.labelled.tolist() == [True, True, True]
    assert new.reward is logs.reward
    held_out = relabel(logs, labels, EVERY[:2])
    assert held_out.labelled.tolist() == [True, True, False]


# ---- training into a run folder


def test_both_baselines_are_trained_once_per_data_and_labels(tmp_path, make_logs, capsys) -> None:
    robot, images = toy_run.contract(), np.random.default_rng(0).integers(0, 256, (20, 16, 24, 3), np.uint8)
    action = np.tile(np.array([[0.5, 2.0]], np.float32), (20, 1))
    logs = make_logs(LENGTHS, images={"cam": images}, action=action, reward=np.ones((20, 2), np.float32))
    logs.action_mask[6:] = False

    def trainer(data: str = "a", seed: int = 0) -> BaselineTrainer:
        return BaselineTrainer(
            run=tmp_path, contract=robot, logs=logs, data=data, episodes=EVERY, seed=seed,
            scratch=ScratchTraining(steps=2, batch=4), inverse=InverseTraining(steps=2, batch=4, bins=5),
        )  # fmt: skip

    first, inverse = trainer().vpt()
    trainer().clone()
    configs = {name: load_config(tmp_path / name)["config"] for name in ("bc_scratch", "vpt", "vpt_idm")}
    assert {c["data"] for c in configs.values()} == {"a"}
    assert {c["training"]["steps"] for c in configs.values()} == {2}
    (labels,) = (tmp_path / "vpt_labels").iterdir()
    assert labels.name == f"labels-{configs['vpt']['training']['labels']}.npy"
    expected = np.zeros((20, 2), bool)
    expected[np.flatnonzero(answered(logs, EVERY) & ~logs.action_mask)] = True
    assert np.array_equal(np.load(labels) != 0, expected & (np.load(labels) != 0))
    assert not inverse.training
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    again, _ = trainer().vpt()
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")} == stamps
    for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    capsys.readouterr()
    trainer(data="b").vpt()
    assert "starting afresh" in capsys.readouterr().out


def test_a_clone_is_judged_by_known_commands_every_task_alike(make_logs, monkeypatch) -> None:
    """Episode 0 did task 0 and is right in all 6 frames, episode 1 task 1 and in none of 9."""
    reward = np.zeros((20, 2), np.float32)
    reward[3, 0] = reward[9, 1] = 1.0
    action = np.repeat([0.0, 1.0, 0.0], LENGTHS)[:, None].astype(np.float32)
    images = {"cam": np.zeros((20, 16, 16, 3), np.uint8)}
    logs = make_logs(LENGTHS, images=images, reward=reward, action=action)
    policy = ScratchPolicy((ActionPart(kind="categorical", classes=4),), 9, 2, (16, 16), 3)
    monkeypatch.setattr(policy.space, "mode", lambda params: torch.zeros(len(params), 1))
    monkeypatch.setattr(policy.space, "log_prob", lambda params, a: -1.0 - 2 * a[:, 0])
    assert clone_error(policy, logs, EVERY, 0.4) == {"frames": 15, "nats": 2.0, "accuracy": 0.5}
    assert clone_error(policy, logs, EVERY[1:], 0.4) == {"frames": 9, "nats": 3.0, "accuracy": 0.0}
    assert clone_error(policy, logs, EVERY[2:], 0.4) == {"frames": 0}


@pytest.mark.parametrize(
    ("nats", "steps"), [((3, 1, 2, 4), 4), ((9, 8, 7, 6), 16), ((2, 2, 2, 2), 16), ((None,) * 4, 16)]
)
def test_held_out_commands_choose_the_length_of_the_early_clone(
    tmp_path, make_logs, monkeypatch, nats, steps
) -> None:
    """Cloned for as long as a whole chain trains, a policy knows its few labels by heart and little else."""
    robot, images = toy_run.contract(), np.random.default_rng(0).integers(0, 256, (20, 16, 24, 3), np.uint8)
    action = np.tile(np.array([[0.5, 2.0]], np.float32), (20, 1))
    logs = make_logs(LENGTHS, images={"cam": images}, action=action, reward=np.ones((20, 2), np.float32))
    makes = BaselineTrainer(
        run=tmp_path, contract=robot, logs=logs, data="a", episodes=EVERY[:2], seed=0,
        scratch=ScratchTraining(steps=128, batch=1),
    )  # fmt: skip
    left, judged = list(nats), []

    def error(policy, logs, episodes, share):
        judged.append(episodes.tolist())
        value = left.pop(0)
        return {"frames": 0} if value is None else {"frames": 5, "nats": float(value)}

    monkeypatch.setattr("d4_core.baselines.clone_error", error)
    policy = makes.early(EVERY[2:])
    assert judged == [[2]] * 4
    assert load_config(tmp_path / "bc_early")["total_steps"] == steps
    assert sorted(int(p.name) for p in (tmp_path / "early").iterdir()) == [2, 4, 8, 16]
    for a, b in zip(policy.state_dict().values(), makes.load("bc_early").state_dict().values(), strict=True):
        assert torch.equal(a, b)
