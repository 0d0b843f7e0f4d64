"""Run a policy again over what a robot recorded while it drove, and compare command by command.

What went wrong on the robot can be looked at on a desk only if the desk computes the same. Frames,
joints and the commands that were in force come from a dataset that `d4-ingest` made of the robot's bags; with
the server's seed the answers must be the same, frame for frame.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from d4_datasets.errors import UserError
from d4_datasets.windows import Windows
from d4_nodes import memory
from d4_nodes.memory import CAMERA, VECTOR, Memory
from d4_nodes.server import PolicyBrain

_SAY_S = 5.0  # how often it says how far it is


@dataclass
class Comparison:
    """How far two runs agree.

    Attributes: compared, equal: ticks with a known command, and those where the same command came again.
        limited: those where the guard went towards that command as far as `max_rate` let it. largest:
        difference in any component of the others, contract units. first: (episode, tick) of the first of
        them.
    """

    compared: int = 0
    equal: int = 0
    limited: int = 0
    largest: float = 0.0
    first: tuple[int, int] | None = None
    per_episode: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{self.equal} of {self.compared} commands are the same"
        text += f", {self.limited} more were cut by max_rate on their way there" if self.limited else ""
        if self.first is None:
            return text
        others = self.compared - self.equal - self.limited
        return (
            f"{text}; {others} differ, by {self.largest:.3g} at most, first in episode {self.first[0]} at "
            f"tick {self.first[1]}. A tick that the run reports as missed cannot agree, nor those after one "
            "whose frame the server never saw, nor one whose command was recorded more than 5 ms late, for "
            "which the dataset holds the one before"
        )


def replay(checkpoint: Path, dataset: Path, seed: int = 0, argmax: bool = False) -> Comparison:
    """Run the policy over every episode of a dataset and compare with the commands that it holds.

    Args: seed, argmax: as the server had them.

    Raises:
        UserError: the dataset was made with another contract than the policy's.
    """
    brain, logs = PolicyBrain(checkpoint, seed, argmax), Windows(dataset)
    if logs.contract.hash != brain.contract.hash:
        raise UserError(f"{dataset} was recorded with another contract than the policy was trained with")
    shared, result = Memory(memory.layout(brain.contract, brain.leads)), Comparison()
    try:
        began = said = time.monotonic()
        for episode in range(count := len(logs.episode_start)):
            _episode(brain, logs, shared, episode, result)
            if (now := time.monotonic()) - said > _SAY_S:
                said, left = now, (now - began) / (episode + 1) * (count - episode - 1)
                print(f"{episode + 1}/{count} episodes, about {left:.0f} s left", file=sys.stderr, flush=True)
    finally:
        shared.close()
    if not result.compared:
        raise UserError(f"{dataset} holds no known commands to compare with")
    return result


def _episode(brain: PolicyBrain, logs: Windows, shared: Memory, episode: int, result: Comparison) -> None:
    begin, count = int(logs.episode_start[episode]), int(logs.episode_length[episode])
    same = compared = 0
    for tick in range(count):
        row = begin + tick
        _ask(logs, shared, row, tick == 0)
        brain.decide(shared)
        if not logs.action_mask[row]:
            continue
        wanted, sent = _bounded(brain, shared["plan"][0]), logs.action[row]
        difference = float(np.abs(wanted - sent).max())
        compared += 1
        same += difference == 0.0
        if difference and any(_is_cut(brain, before, wanted, sent) for before in logs.action[row - 2 : row]):
            result.limited += 1
        elif difference:
            result.largest = max(result.largest, difference)
            result.first = result.first or (episode, tick)
    result.compared += compared
    result.equal += same
    result.per_episode.append(same / max(1, compared))


def _ask(logs: Windows, shared: Memory, row: int, is_first: bool) -> None:
    for name, target in shared.observation(CAMERA).items():
        target[...] = logs.images[name][row]
    vectors: Any = logs.vectors
    for name, target in shared.observation(VECTOR).items():
        target[...] = vectors[name][row]
    shared["task"][...], shared["reset"][...] = logs.task_index[row], is_first
    known = not is_first and bool(logs.action_mask[row - 1])
    shared["previous_known"][...] = known
    if known:
        shared["previous"][...] = logs.action[row - 1]


def _bounded(brain: PolicyBrain, command: np.ndarray) -> np.ndarray:
    """What the guard makes of a command that it lets pass."""
    return np.clip(command, brain.contract.action_low, brain.contract.action_high)


def _is_cut(brain: PolicyBrain, before: np.ndarray, wanted: np.ndarray, sent: np.ndarray) -> bool:
    """Whether every component of a command is the one that was wanted, or as far on the way to it from one
    before as `max_rate` allows in at most two periods. (Two of those before are tried: the last tick of an
    episode may have the first command of the next one in force.)
    """
    most = (
        np.concatenate([c.max_rate or (0.0,) * c.dim for c in brain.contract.actions])
        * 2
        / brain.contract.rate_hz
    )
    step, left = sent - before, wanted - sent
    return bool(((left == 0) | ((step * left > 0) & (np.abs(step) <= most))).all())
