"""A policy's row as an action of keyboard and mouse, and back.

The row is what a dataset holds and a policy puts out, float32 [A] in the order of the contract: keys as 0 or
1, the camera in degrees, or as one of 121 classes. `d4_datasets.minecraft` knows the keys, the quantiser, and
MineRL's dictionary.
"""

from __future__ import annotations

import numpy as np

from d4_datasets import minecraft
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError
from d4_datasets.minecraft import ANGLES, CAMERA_TOPIC, COLUMN, KEYS_TOPIC, SIZE

_TURN = [COLUMN[name] for name in ANGLES]


def require_keyboard_and_mouse(contract: Contract, name: str) -> None:
    """Check that rows of a contract are for keyboard and mouse, and that it observes the picture alone.

    Args: name: of what the contract belongs to, for the sentence.

    Raises:
        UserError: it has other actions, another rate, or other observations.
    """
    for channel in contract.actions:
        if channel.topic not in (KEYS_TOPIC, CAMERA_TOPIC):
            raise UserError(
                f"{name} has another action space: {channel.name!r} is on {channel.topic}, and this game is "
                f"played with {KEYS_TOPIC} and {CAMERA_TOPIC}; train on docs/examples/minecraft.yaml"
            )
        minecraft.channel_values(channel, np.zeros((1, SIZE)))
    topics = [stream.topic for stream in contract.observations]
    if len(topics) != 1 or topics[0] not in (minecraft.POV, minecraft.POV_LINEAR):
        raise UserError(
            f"{name} observes {', '.join(topics)}; this game shows one picture, {minecraft.POV} or "
            f"{minecraft.POV_LINEAR}"
        )
    if contract.rate_hz != minecraft.RATE_HZ:
        raise UserError(
            f"{name} acts at {contract.rate_hz:g} Hz; the game takes actions at {minecraft.RATE_HZ} Hz"
        )


def to_action(contract: Contract, row: np.ndarray) -> np.ndarray:
    """A policy's row [A] as an action float64 [25]: `minecraft.KEYS`, pitch, yaw; others are up or 0."""
    action, column = np.zeros(SIZE), 0
    for channel in contract.actions:
        values = np.asarray(row[column : column + channel.dim], np.float64)
        column += channel.dim
        if channel.kind == "categorical":
            action[_TURN] = minecraft.from_class(np.round(values[0]))
        else:
            is_key = channel.kind == "binary"
            action[[COLUMN[name] for name in channel.select]] = values > 0.5 if is_key else values
    return action


def to_row(contract: Contract, action: np.ndarray) -> np.ndarray:
    """An action [25] as a policy's row, float32 [A], clipped to the limits as ingest does."""
    values = [minecraft.channel_values(channel, action[None]) for channel in contract.actions]
    row = np.concatenate(values, axis=1)[0]
    return np.clip(row, contract.action_low, contract.action_high).astype(np.float32)
