"""A policy over what was recorded again: the same commands, those that the guard cut, and others."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from untrained_run import save

from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_nodes import replay
from d4_nodes.memory import Memory, layout
from d4_nodes.server import PolicyBrain

FRAMES = 5
ROBOT = Path(__file__).with_name("robot.yaml")


@pytest.fixture(scope="module")
def brain(tmp_path_factory) -> PolicyBrain:
    return PolicyBrain(save(Contract.load(ROBOT), tmp_path_factory.mktemp("run")), device="cpu")


class Recorded(SimpleNamespace):
    """Two episodes, of which the policy drives; `cut` and `change` are what happens to its commands."""

    def __init__(self, brain: PolicyBrain, rng, cut: int | None = None, change: int | None = None) -> None:
        self.images = {"eye": rng.integers(0, 256, (2 * FRAMES, 8, 12, 3), np.uint8)}
        self.vectors = {"joints": rng.standard_normal((2 * FRAMES, 2)).astype(np.float32)}
        self.action = np.zeros((2 * FRAMES, 3), np.float32)
        self.action_mask = np.ones(2 * FRAMES, bool)
        self.task_index = np.zeros(2 * FRAMES, np.int64)
        self.episode_start, self.episode_length = np.array([0, FRAMES]), np.array([FRAMES, FRAMES])
        shared = Memory(layout(brain.contract, brain.leads))
        for row in range(2 * FRAMES):
            replay._ask(self, shared, row, row % FRAMES == 0)
            brain.decide(shared)
            self.action[row] = replay._bounded(brain, shared["plan"][0])
            if row == cut:
                most = np.array([0.1, 0.1, np.inf])  # the arm has no max_rate
                step = np.clip(self.action[row] - self.action[row - 1], -most, most)
                assert step[:2].any()
                self.action[row] = self.action[row - 1] + step
            if row == change:
                self.action[row] = -np.sign(self.action[row])
        shared.close()


def compared(brain: PolicyBrain, logs: Recorded) -> replay.Comparison:
    result, shared = replay.Comparison(), Memory(layout(brain.contract, brain.leads))
    for episode in range(2):
        replay._episode(brain, logs, shared, episode, result)
    shared.close()
    return result


def test_the_same_commands_come_again(brain, rng) -> None:
    result = compared(brain, Recorded(brain, rng))
    assert (result.compared, result.equal, result.limited) == (2 * FRAMES, 2 * FRAMES, 0)
    assert str(result) == "10 of 10 commands are the same"
    assert result.per_episode == [1.0, 1.0]


def test_unknown_commands_are_not_compared(brain, rng) -> None:
    logs = Recorded(brain, rng)
    logs.action_mask[3] = False
    assert compared(brain, logs).compared == 2 * FRAMES - 1


def test_what_the_guard_cut_is_told_apart_from_what_differs(brain, rng) -> None:
    cut = compared(brain, Recorded(brain, rng, cut=7))
    assert (cut.equal, cut.limited, cut.first) == (2 * FRAMES - 1, 1, None)
    assert "1 more were cut by max_rate" in str(cut)
    changed = compared(brain, Recorded(brain, rng, change=7))
    assert (changed.limited, changed.first) == (0, (1, 2))
    assert "1 differ" in str(changed)


def test_another_contract_is_refused(brain, tmp_path, monkeypatch) -> None:
    other = SimpleNamespace(contract=SimpleNamespace(hash="0"))
    monkeypatch.setattr(replay, "Windows", lambda path: other)
    monkeypatch.setattr(replay, "PolicyBrain", lambda *a: brain)
    with pytest.raises(UserError, match="another contract"):
        replay.replay(tmp_path, tmp_path)
