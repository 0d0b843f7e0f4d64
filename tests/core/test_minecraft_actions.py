"""Real actions of Minecraft players through contract, quantiser and action space."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from recordings import RECORDINGS, needs

from d4_core.actions import ActionEncoder, ActionSpace
from d4_core.config import PRESETS, action_parts
from d4_datasets import minecraft
from d4_datasets.contract import Contract

ROOT = Path(__file__).parents[2]
FILES = sorted(RECORDINGS.glob("vpt_actions/*.one_hot_actions.pt"))
CONTRACT = Contract.load(ROOT / "docs" / "examples" / "minecraft.yaml")
COLUMNS = (
    "inventory", "ESC", *minecraft.HOTBAR, "forward", "back", "left", "right", "pitch", "yaw", "jump",
    "sneak", "sprint", "swapHands", "attack", "use", "pickItem", "drop",
)  # fmt: skip


def recorded(path: Path) -> np.ndarray:
    """The actions [N, 25] of a file, in this project's order; its camera is in units of 20 degrees."""
    values = torch.load(path, weights_only=True).double().numpy()
    out = np.zeros((len(values), minecraft.SIZE))
    out[:, [minecraft.COLUMN[name] for name in COLUMNS]] = values
    out[:, len(minecraft.KEYS) :] *= 20
    return out


@pytest.mark.parametrize("name", list(PRESETS))
def test_the_example_fits_every_preset(name):
    PRESETS[name].tokenizer_config(CONTRACT)
    assert PRESETS[name].dynamics_config(CONTRACT).actions == action_parts(CONTRACT)


@needs("vpt_actions")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name[:12])
def test_real_actions_pass_through(path):
    actions = recorded(path)
    assert actions.shape == (1200, 25)
    keys, turns = actions[:, :23], actions[:, 23:]
    assert set(np.unique(keys)) <= {0, 1}
    for action in actions[:50]:
        np.testing.assert_allclose(minecraft.from_env(minecraft.to_env(action)), action, atol=1e-6)
    # The quantiser is fine where people aim: half of what they turn is closer than 0.4 degrees.
    inside = np.abs(turns).max(1) <= minecraft.CAMERA_LIMIT
    error = np.abs(minecraft.from_class(minecraft.to_class(turns)) - turns)[inside]
    assert inside.mean() > 0.85
    assert error.max() < 2.36
    assert 0 < np.median(error[turns[inside] != 0]) < 0.4
    columns = [minecraft.channel_values(channel, actions) for channel in CONTRACT.actions]
    values = np.clip(np.concatenate(columns, 1), CONTRACT.action_low, CONTRACT.action_high)
    space = ActionSpace(action_parts(CONTRACT))
    batch = torch.from_numpy(values).float()[None]
    log_prob = space.log_prob(torch.zeros(1, len(values), space.num_params), batch)
    assert torch.isfinite(log_prob).all()
    tokens = ActionEncoder(space, 16)(batch, torch.ones(1, len(values), dtype=torch.bool))
    assert tokens.shape == (1, len(values), 1, 16)
