"""Policies as they play: a session of its own for every environment, so that none waits for another.

Networks are shared and sessions hold only their caches. An episode is seeded by its own number, so what a
policy does in it depends on nothing but the episode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from d4_datasets.contract import Contract
from d4_datasets.errors import UserError

if TYPE_CHECKING:
    import torch

RANDOM = "random"  # in place of a checkpoint: every key and turn is drawn anew at every tick
CLONES = ("bc_early", "bc_scratch", "vpt")  # without a world model
ACTING = ("imagination", "agent", *CLONES)  # phases that leave a policy, the best first


class _Session(Protocol):
    """Plays one environment after the other (`d4_core.session`, with a batch of one)."""

    seed: int

    def reset(self, n: int, tasks: np.ndarray) -> None: ...

    def ask(self, tasks: np.ndarray) -> None: ...

    def act(self, images: np.ndarray, vectors: dict[str, np.ndarray], alive: np.ndarray) -> np.ndarray: ...


class Policy:
    """What plays: a contract, and a session for each of several environments.

    Attributes:
        contract: of the observations and actions.
        name: where it comes from, for sentences.
        identity: phase and hash of the weights; results of others are not mixed with its own.
    """

    def __init__(self, contract: Contract, name: str, identity: str, sessions: Sequence[_Session]) -> None:
        self.contract, self.name, self.identity = contract, name, identity
        self._sessions = list(sessions)
        self._alive = np.ones(1, bool)

    def task_number(self, name: str) -> int:
        """The number of a task in the contract.

        Raises:
            UserError: the policy does not know it.
        """
        names = self.contract.task_names
        if name not in names:
            raise UserError(
                f"the contract {self.contract.name} has no task {name!r}, which it is asked for; it has "
                f"{', '.join(names)}: train with that task, or give one of these with --prompt"
            )
        return names.index(name)

    def begin(self, place: int, seed: int, task: str) -> None:
        """An episode begins in environment number `place`."""
        session = self._sessions[place]
        session.seed = seed
        session.reset(1, np.array([self.task_number(task)]))

    def ask(self, place: int, task: str) -> None:
        """Ask for another task from now on; what was seen stays in memory."""
        self._sessions[place].ask(np.array([self.task_number(task)]))

    def warm_up(self) -> None:
        """Decide a few times on nothing: the first decisions take many times as long as the later ones."""
        size = self.contract.images[0].size
        assert size is not None
        vectors = {v.name: np.zeros(len(v.select), np.float32) for v in self.contract.vectors("input")}
        for place in range(len(self._sessions)):
            self.begin(place, 0, self.contract.task_names[0])
            for _ in range(2):
                self.act(place, np.zeros((*size, 3), np.uint8), vectors)

    def act(self, place: int, image: np.ndarray, vectors: dict[str, np.ndarray]) -> np.ndarray:
        """The row float32 [A] for a picture uint8 [H, W, 3] of the contract's size and proprioception."""
        batch = {name: values[None] for name, values in vectors.items()}
        return self._sessions[place].act(image[None], batch, self._alive)[0]


def load_policy(
    what: str, places: int, device: torch.device | str, contract: Contract | None = None
) -> Policy:
    """The policy of a checkpoint or run folder, or RANDOM, for this many environments.

    Args: contract: what a random policy acts by; checkpoints bring their own.

    Raises:
        UserError: there is no checkpoint that acts, or no contract for the random policy.
    """
    from d4_core.session import RandomSession, whole

    if what == RANDOM:
        if contract is None:
            raise UserError("a random policy needs --contract, one of docs/examples for instance")
        low, high, entries = contract.action_low, contract.action_high, whole(contract)
        sessions: Sequence[_Session] = [RandomSession(low, high, whole=entries) for _ in range(places)]
        return Policy(contract, "the contract", RANDOM, sessions)
    from d4_core import checkpoint
    from d4_core.models import weights_hash

    folder = _acting(Path(what))
    config = checkpoint.load_config(folder)
    phase = str(config["phase"])
    own = Contract.load(checkpoint.resolve(folder) / "contract.yaml")
    sessions = _scratch(folder, own, places) if phase in CLONES else _sessions(folder, places, device)
    part = f" at step {config.get('step')}" if config.get("status") == "training" else ""
    return Policy(own, f"the checkpoint {folder}", f"{phase}{part} {weights_hash(folder)}", sessions)


def contract_of(what: str) -> Contract:
    """What a checkpoint or run folder acts by. Raises UserError if there is none that acts."""
    from d4_core import checkpoint

    return Contract.load(checkpoint.resolve(_acting(Path(what))) / "contract.yaml")


def _acting(path: Path) -> Path:
    """The checkpoint folder of a path: itself, or the last phase of a run that acts and is done."""
    from d4_core import checkpoint

    under_way = ""
    for folder in (path, *(path / phase for phase in ACTING)):
        if not checkpoint.exists(folder):
            continue
        config = checkpoint.load_config(folder)
        if (phase := config.get("phase")) not in ACTING:
            raise UserError(
                f"{folder} is a checkpoint of the phase {phase}, which does not act: give one of "
                f"{', '.join(ACTING)}"
            )
        if folder == path or config.get("status") != "training":
            return folder
        under_way = (
            under_way or f"{phase}, which is not trained to its end: go on with that, or give {folder}"
        )
    if under_way:
        raise UserError(f"{path} has only {under_way}")
    if not path.exists():
        raise UserError(f"{path} does not exist: give a run folder of d4-train, or one of its phases")
    raise UserError(
        f"{path} has no checkpoint that acts: give a run folder of d4-train, or one of its phases"
    )


def _sessions(folder: Path, places: int, device: Any) -> Sequence[_Session]:
    from d4_core.models import load
    from d4_core.session import PolicySession

    models = load(folder, None, device)
    sessions = [PolicySession(models, 1) for _ in range(places)]
    said = {session.accelerate() for session in sessions}
    if models.tokenizer.latents.is_cuda:
        print(f"the policy decides as {'; '.join(sorted(said))}", flush=True)
    return sessions


def _scratch(folder: Path, contract: Contract, places: int) -> Sequence[_Session]:
    """Sessions of a policy that was cloned without a world model."""
    from d4_core import checkpoint
    from d4_core.baselines import ScratchTraining, scratch_policy
    from d4_core.phase import freeze
    from d4_core.session import ScratchSession

    noted = checkpoint.load_config(folder)["config"].get("training", {})
    known = {field.name for field in fields(ScratchTraining)}
    cfg = ScratchTraining(**{name: value for name, value in noted.items() if name in known})
    policy = scratch_policy(contract, cfg)
    checkpoint.load_modules(folder, {"policy": policy}, contract)
    freeze(policy)
    return [ScratchSession(policy) for _ in range(places)]
