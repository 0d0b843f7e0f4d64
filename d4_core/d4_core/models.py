"""Models of a run: built from a preset and a contract, or loaded from a checkpoint folder."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from d4_core import checkpoint
from d4_core.agent import Agent, Critic, Head
from d4_core.config import Preset, from_dict
from d4_core.dynamics import Dynamics
from d4_core.phase import freeze
from d4_core.tokenizer import Tokenizer
from d4_datasets.contract import Contract
from d4_datasets.digest import sha256
from d4_datasets.errors import UserError

# what each phase's checkpoint holds: every one is complete for its own use
CONTENTS = {
    "tokenizer": ("tokenizer",),
    "dynamics": ("tokenizer", "dynamics"),
    "agent": ("tokenizer", "dynamics", "agent"),
    "imagination": ("tokenizer", "dynamics", "agent", "policy", "critic"),
}


@dataclass
class Models:
    """The networks of one run; those that a phase has not reached yet are None."""

    contract: Contract
    preset: Preset
    tokenizer: Tokenizer
    dynamics: Dynamics | None = None
    agent: Agent | None = None
    policy: Head | None = None
    critic: Critic | None = None

    def named(self, names: tuple[str, ...]) -> dict[str, nn.Module]:
        """These networks by name."""
        return {name: getattr(self, name) for name in names}

    @property
    def acting(self) -> Head:
        """The policy head in force: the imagination-trained one if there is one, else the cloned one."""
        return self.policy if self.policy is not None else self.agent.policy


def build(preset: Preset, contract: Contract, phase: str = "imagination") -> Models:
    """Freshly initialised networks, as far as `phase` needs them."""
    models = Models(contract, preset, Tokenizer(preset.tokenizer_config(contract)))
    names = CONTENTS[phase]
    if "dynamics" in names:
        models.dynamics = Dynamics(preset.dynamics_config(contract))
    if "agent" in names:
        dynamics = models.dynamics
        assert dynamics is not None
        dim, num_tokens = dynamics.cfg.transformer.dim, dynamics.cfg.agent_tokens
        models.agent = Agent(preset.agent_config(contract), dynamics.space, dim, num_tokens)
    if "critic" in names:
        assert models.agent is not None
        models.policy = copy.deepcopy(models.agent.policy)
        models.critic = Critic(models.agent.cfg, models.policy.inputs)
    return models


def preset_of(folder: Path, config: dict[str, Any]) -> Preset:
    """The preset in a checkpoint's config.json.

    Raises:
        UserError: there is none, or one with settings of another version of d4.
    """
    try:
        preset: Preset = from_dict(Preset, config["config"]["preset"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder} holds no d4 model ({error}): train the phase again") from error
    return preset


def load(folder: Path, contract: Contract | None = None, device: torch.device | str = "cpu") -> Models:
    """Networks of a checkpoint folder, frozen, on a device.

    Raises:
        UserError: there is no readable checkpoint, or it was trained on another contract.
    """
    config = checkpoint.load_config(folder)
    preset = preset_of(folder, config)
    try:
        own = Contract.load(checkpoint.resolve(folder) / "contract.yaml")
        models = build(preset, own, config["phase"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder} holds no d4 model ({error}): train the phase again") from error
    networks = models.named(CONTENTS[config["phase"]])
    checkpoint.load_modules(folder, networks, contract)
    for network in networks.values():
        freeze(network.to(device))
    return models


def weights_hash(folder: Path) -> str:
    """Short hash of a checkpoint's weights; names everything derived from them."""
    return sha256(checkpoint.resolve(folder) / checkpoint.WEIGHTS)[:12]
