"""Tasks, rewards and terminals out of messages: the same reading for a bag and for a live topic."""

from __future__ import annotations

from typing import Any

import numpy as np

from d4_datasets import fields
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError

LARGEST_REWARD = 1e30  # so that no sum of them leaves single precision


def task(contract: Contract, msg: Any) -> int:
    """Index of the task that a message names, by name or by number.

    Raises:
        UserError: it is none of the contract's.
    """
    assert contract.tasks is not None
    value, names = fields.get(msg, contract.tasks.select), contract.tasks.names
    if isinstance(value, str):
        if value in names:
            return names.index(value)
    elif isinstance(value, int | float | np.number) and value in range(len(names)):
        return int(value)
    raise UserError(f"task {value!r} is not among the tasks {list(names)} of the contract")


def reward(contract: Contract, msg: Any) -> np.ndarray:
    """Reward per task, float64 [K]; a single number counts for every task.

    Raises:
        UserError: another number of entries, NaN or infinity.
    """
    assert contract.reward is not None
    count = len(contract.task_names)
    given = fields.get(msg, contract.reward.select)
    try:
        value = np.atleast_1d(np.asarray(given, np.float64))
    except (TypeError, ValueError):
        raise UserError(
            f"a reward is no number but {type(given).__name__}; correct `reward.select`"
        ) from None
    if len(value) not in (1, count):
        raise UserError(f"a reward has {len(value)} entries; expected one per task ({count}) or a single one")
    if not (np.abs(value) < LARGEST_REWARD).all():
        raise UserError("a reward is NaN or too large")
    return np.broadcast_to(value, (count,))


def terminal(contract: Contract, msg: Any) -> bool:
    """Whether a message says that the episode is over for good."""
    signal = contract.episode.terminal
    assert signal is not None
    value = fields.get(msg, signal.select)
    if not isinstance(value, bool | int | float | np.generic):
        raise UserError(
            f"a terminal is no truth value but {type(value).__name__}; correct `episode.terminal.select`"
        )
    return bool(value)
