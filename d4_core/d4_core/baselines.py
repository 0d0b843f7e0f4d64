"""Baselines without a world model: behaviour cloning from scratch, and cloning from pseudo-labels (VPT).

All clone with the same small convolutional policy. From scratch, it sees the labelled part of the logs, which
it knows by heart after long training; the early one is trained for as long as held-out commands say. In the
style of VPT (Baker et al. 2022), an inverse dynamics model, which may look at the frames after an action, is
trained on that part first and labels all other frames; the policy is then cloned from all of them.

Shape suffixes: B batch, F stacked frames, V numbers of proprioception, A action size, P action parameters.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from d4_core import checkpoint
from d4_core.actions import ActionPart, ActionSpace
from d4_core.config import action_parts, input_vectors
from d4_core.data import Logs
from d4_core.loop import train
from d4_core.models import weights_hash
from d4_core.optim import OptimConfig
from d4_core.phase import Batch, Losses, Metrics, Phase, freeze
from d4_core.phases import relevant_episodes
from d4_core.tokenizer import Vector
from d4_datasets import whole
from d4_datasets.contract import Contract
from d4_datasets.errors import UserError

_OPTIM = OptimConfig(lr=1e-3, weight_decay=0.05)
_CHUNK = 512  # frames labelled at a time
_JUDGED = 256  # frames per task by which a clone is judged
# shares of the steps of the policy from scratch, of which held-out commands choose one
EARLY = "bc_early"
EARLIER = (1 / 64, 1 / 32, 1 / 16, 1 / 8)


@dataclass(frozen=True, kw_only=True)
class ScratchTraining:
    """Training of the policy: `frames` stacked pictures in, the same action distribution out."""

    steps: int = 1500
    batch: int = 64
    frames: int = 3
    shift: int = 2
    bins: int = 15
    relevant_return: float = 0.4


@dataclass(frozen=True, kw_only=True)
class InverseTraining:
    """Training of the inverse dynamics model.

    Attributes:
        lags: frames t + lag that tell what a_t was. A command takes force after frame t and the robot lags
            behind it, so that its effect is complete only at t + 2.
    """

    steps: int = 1500
    batch: int = 64
    lags: tuple[int, ...] = (-1, 0, 1, 2)
    shift: int = 2
    bins: int = 15


# ---- networks


class FrameStack(nn.Module):
    """Strided convolutions over stacked frames of one camera, beside the proprioception of the same frames.

    Args:
        size: height and width of the pictures.
        frames: F.
        vectors: proprioceptive inputs; standardised, see `set_statistics`.
        motion: look at the first frame and at what changes from each to the next, not at all frames alike: a
            shift by a third of a pixel is hard to see in two pictures full of other things.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, size: tuple[int, int], frames: int, vectors: tuple[Vector, ...] = (), motion: bool = False
    ) -> None:
        super().__init__()
        self.frames, self.vectors, self.motion = frames, vectors, motion
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise((3 * frames, 32, 64, 96, 128)):
            layers += [nn.Conv2d(a, b, 4, 2, 1), nn.GroupNorm(8, b), nn.SiLU()]
        self.trunk = nn.Sequential(*layers, nn.Flatten())
        numbers = sum(v.size for v in vectors)
        self.register_buffer("mean", torch.zeros(frames, numbers))
        self.register_buffer("std", torch.ones(frames, numbers))
        self.features = 128 * (size[0] // 16) * (size[1] // 16) + frames * numbers

    def set_statistics(self, vectors_NFV: np.ndarray) -> None:
        """Standardise proprioception by these examples of it."""
        if self.vectors:
            x = self._contrast(torch.from_numpy(vectors_NFV))
            self.mean.copy_(x.mean(0))
            self.std.copy_(x.std(0, correction=0).clamp_min(1e-6))

    def _contrast(self, x_BF: Tensor) -> Tensor:
        return torch.cat([x_BF[:, :1], x_BF.diff(dim=1)], 1) if self.motion else x_BF

    def forward(self, stack_BFHWC: Tensor, vectors_BFV: Tensor) -> Tensor:
        """uint8 pictures and proprioception, oldest first, to features (B, features)."""
        x = self._contrast(stack_BFHWC.permute(0, 1, 4, 2, 3).float() / 255 - 0.5)
        numbers = (self._contrast(vectors_BFV) - self.mean) / self.std
        return torch.cat([self.trunk(x.flatten(1, 2)), numbers.flatten(1)], 1)


class ScratchPolicy(nn.Module):
    """The policy of both baselines; the task is another input of the head."""

    def __init__(
        self, parts: tuple[ActionPart, ...], bins: int, num_tasks: int, size: tuple[int, int], frames: int,
        vectors: tuple[Vector, ...] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        self.space, self.num_tasks = ActionSpace(parts, bins), num_tasks
        self.look = FrameStack(size, frames, vectors)
        self.head = _head(self.look.features + num_tasks, self.space)

    def forward(self, stack_BFHWC: Tensor, vectors_BFV: Tensor, task: Tensor) -> Tensor:
        """Frames, oldest first, and tasks (B,) to action parameters (B, P)."""
        features = self.look(stack_BFHWC, vectors_BFV)
        one_hot = nn.functional.one_hot(task, self.num_tasks).to(features.dtype)
        return self.head(torch.cat([features, one_hot], 1))


class InverseDynamics(nn.Module):
    """What was the action at a frame, seen from the frames around it, later ones included?"""

    def __init__(
        self, parts: tuple[ActionPart, ...], bins: int, size: tuple[int, int], lags: tuple[int, ...],
        vectors: tuple[Vector, ...] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        self.space, self.lags = ActionSpace(parts, bins), lags
        self.look = FrameStack(size, len(lags), vectors, motion=True)
        self.head = _head(self.look.features, self.space)

    def forward(self, stack_BFHWC: Tensor, vectors_BFV: Tensor) -> Tensor:
        """Frames t + lags to parameters (B, P) of the action at t."""
        return self.head(self.look(stack_BFHWC, vectors_BFV))

    def label(self, params: Tensor) -> Tensor:
        """Actions (.., A): expected values of continuous entries, the most likely ones of others."""
        out, a, space = self.space.mode(params), 0, self.space
        for part, logits, _ in space._split(params.float(), None):
            if part.kind == "continuous":
                low, high = space.low[a : a + part.size], space.high[a : a + part.size]
                unit = (logits.softmax(-1) * space.centres).sum(-1)
                out[..., a : a + part.size] = low + (unit + 1) / 2 * (high - low)
            a += part.size
        return out


def scratch_policy(contract: Contract, cfg: ScratchTraining) -> ScratchPolicy:
    """An untrained policy for a robot."""
    parts, size, vectors = _spaces(contract)
    return ScratchPolicy(parts, cfg.bins, max(1, len(contract.task_names)), size, cfg.frames, vectors)


def _spaces(contract: Contract) -> tuple[tuple[ActionPart, ...], tuple[int, int], tuple[Vector, ...]]:
    """Actions, size of the first camera's pictures, and proprioception."""
    size = contract.images[0].size
    assert size is not None
    return action_parts(contract), size, input_vectors(contract)


def _head(features: int, space: ActionSpace) -> nn.Module:
    return nn.Sequential(nn.Linear(features, 256), nn.SiLU(), nn.Linear(256, space.num_params))


# ---- data


def join_vectors(vectors: dict[str, np.ndarray], which: tuple[Vector, ...], index: Any) -> np.ndarray:
    """The named vectors at `index` side by side, float32 (*index.shape, V)."""
    parts = [np.asarray(vectors[v.name][index], np.float32) for v in which]
    return np.concatenate(parts, -1) if parts else np.zeros((*np.shape(index), 0), np.float32)


class Stacks:
    """Frames t + lags of the logs' first camera and proprioception; an episode's end frames are repeated."""

    def __init__(self, logs: Logs, lags: tuple[int, ...], vectors: tuple[Vector, ...]) -> None:
        self._logs, self._lags, self._vectors = logs, np.array(lags), vectors
        self._camera = next(iter(logs.images))
        self._first = np.repeat(logs.episode_start, logs.episode_length)
        self._last = self._first + np.repeat(logs.episode_length, logs.episode_length) - 1

    def __call__(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (B, F, H, W, 3) and float32 (B, F, V) around the frames t (B,)."""
        return self._logs.images[self._camera][self._index(t)], self.proprioception(t)

    def proprioception(self, t: np.ndarray) -> np.ndarray:
        """float32 (B, F, V) around the frames t (B,)."""
        return join_vectors(self._logs.vectors, self._vectors, self._index(t))

    def _index(self, t: np.ndarray) -> np.ndarray:
        return np.clip(t[:, None] + self._lags, self._first[t][:, None], self._last[t][:, None])


def shift(stack: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Shift each row (B, F, H, W, 3) by (dy, dx) pixels, repeating the border."""
    height, width = stack.shape[2:4]
    most = int(np.abs(offset).max(initial=0))
    padded = np.pad(stack, ((0, 0), (0, 0), (most, most), (most, most), (0, 0)), mode="edge")
    out = np.empty_like(stack)
    for i, (y, x) in enumerate(offset + most):  # slices: ten times as fast as indices
        out[i] = padded[i, :, y : y + height, x : x + width]
    return out


# ---- phases


class StackPhase(Phase):
    """Log-likelihood of actions given randomly shifted stacks, as image-based cloning is usually done."""

    def __init__(self, cfg: ScratchTraining | InverseTraining, logs: Logs, stacks: Stacks) -> None:
        super().__init__(cfg.steps, {"policy": 1.0})
        self.batch, self.shift, self.logs, self.stacks = cfg.batch, cfg.shift, logs, stacks

    def examples(self, rng: np.random.Generator, t: np.ndarray) -> Batch:
        """Stacks, proprioception and actions (B, A) of the frames t (B,)."""
        stack, vectors = self.stacks(t)
        stack = shift(stack, rng.integers(-self.shift, self.shift + 1, (len(t), 2)))
        arrays = {"stack": stack, "vectors": vectors, "action": self.logs.action[t].astype(np.float32)}
        return {name: torch.from_numpy(value) for name, value in arrays.items()}

    def group(self, name: str, p: nn.Parameter) -> str:
        """Plain AdamW."""
        return "adamw"


class ScratchPhase(StackPhase):
    """Clones the labelled frames of episodes that accomplish a task."""

    def __init__(
        self, cfg: ScratchTraining, policy: ScratchPolicy, logs: Logs, episodes: np.ndarray,
        name: str = "bc_scratch",
    ) -> None:  # fmt: skip
        super().__init__(cfg, logs, Stacks(logs, tuple(range(1 - cfg.frames, 1)), policy.look.vectors))
        self.name, self.policy = name, policy
        self._frames = relevant_frames(logs, episodes, policy.num_tasks, cfg.relevant_return)
        if not any(map(len, self._frames)):
            raise UserError("no labelled episode accomplishes a task: there is nothing to clone from scratch")
        policy.look.set_statistics(self.stacks.proprioception(np.concatenate(self._frames)))

    def sample(self, rng: np.random.Generator, step: int) -> Batch:
        """`examples` with their tasks (B,): every task that was accomplished equally often."""
        usable = [q for q, frames in enumerate(self._frames) if len(frames)]
        task = rng.choice(usable, self.batch)
        t = np.array([rng.choice(self._frames[q]) for q in task])
        return self.examples(rng, t) | {"task": torch.from_numpy(task)}

    def forward(self, batch: Batch, gen: torch.Generator, step: int) -> tuple[Losses, Metrics]:
        """Negative log-likelihood in nats."""
        params = self.policy(batch["stack"], batch["vectors"], batch["task"])
        return {"policy": -self.policy.space.log_prob(params, batch["action"]).mean()}, {}

    def checkpoint_modules(self) -> dict[str, nn.Module]:
        """The policy."""
        return {"policy": self.policy}


class InversePhase(StackPhase):
    """Trains the inverse dynamics model on all labelled frames, whatever came of them."""

    name = "vpt_idm"

    def __init__(
        self, cfg: InverseTraining, inverse: InverseDynamics, logs: Logs, episodes: np.ndarray
    ) -> None:
        super().__init__(cfg, logs, Stacks(logs, inverse.lags, inverse.look.vectors))
        self.inverse = inverse
        self._frames = np.flatnonzero(answered(logs, episodes) & logs.action_mask)
        if not len(self._frames):
            raise UserError("no training frame has a known action: there is no inverse dynamics to learn")
        inverse.look.set_statistics(self.stacks.proprioception(self._frames))

    def sample(self, rng: np.random.Generator, step: int) -> Batch:
        """`examples` drawn uniformly."""
        return self.examples(rng, rng.choice(self._frames, self.batch))

    def forward(self, batch: Batch, gen: torch.Generator, step: int) -> tuple[Losses, Metrics]:
        """Negative log-likelihood in nats."""
        params = self.inverse(batch["stack"], batch["vectors"])
        return {"policy": -self.inverse.space.log_prob(params, batch["action"]).mean()}, {}

    def checkpoint_modules(self) -> dict[str, nn.Module]:
        """The inverse dynamics model."""
        return {"inverse": self.inverse}


def relevant_frames(logs: Logs, episodes: np.ndarray, num_tasks: int, share: float) -> list[np.ndarray]:
    """Labelled frames of the episodes that accomplish each task."""
    relevant = (relevant_episodes(logs, episodes, task, share) for task in range(num_tasks))
    return [np.flatnonzero(np.isin(logs.episode_index, each) & logs.action_mask) for each in relevant]


def answered(logs: Logs, episodes: np.ndarray) -> np.ndarray:
    """(N,) bool: frames of these episodes that another frame follows, so that their action shows."""
    out = np.isin(logs.episode_index, episodes)
    out[logs.episode_start + logs.episode_length - 1] = False
    return out


# ---- pseudo-labels


@dataclass
class Relabelled:
    """Logs with other actions; everything else is theirs."""

    logs: Logs
    action: np.ndarray
    action_mask: np.ndarray

    def __post_init__(self) -> None:
        self.labelled = np.logical_or.reduceat(self.action_mask, self.logs.episode_start)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.logs, name)


def relabel(logs: Logs, labels: np.ndarray, episodes: np.ndarray) -> Logs:
    """The logs with `labels` (N, A) for the unknown actions of these episodes; known ones stay."""
    unknown = answered(logs, episodes) & ~logs.action_mask
    action = np.where(unknown[:, None], labels, logs.action)
    return cast(Logs, Relabelled(logs, action, logs.action_mask | unknown))


@torch.no_grad()
def infer(inverse: InverseDynamics, logs: Logs, frames: np.ndarray) -> Tensor:
    """Action parameters (n, P) of these frames (n,)."""
    stacks, parts = Stacks(logs, inverse.lags, inverse.look.vectors), []
    for first in range(0, len(frames), _CHUNK):
        stack, vectors = stacks(frames[first : first + _CHUNK])
        parts.append(inverse(torch.from_numpy(stack), torch.from_numpy(vectors)))
    return torch.cat(parts) if parts else torch.zeros(0, inverse.space.num_params)


def inverse_error(inverse: InverseDynamics, logs: Logs, episodes: np.ndarray) -> dict[str, Any]:
    """How far labels are from the known actions of (held-out) episodes.

    Returns:
        frames: how many; mae, spread: mean absolute error of the label and standard deviation of the action,
        per action dimension in contract units; relative_mae: their mean ratio; accuracy: share of the frames
        whose keys and classes are all right, None without any; nats: mean surprise.
    """
    frames = np.flatnonzero(answered(logs, episodes) & logs.action_mask)
    if not len(frames):
        return {"frames": 0}
    params, action = infer(inverse, logs, frames), logs.action[frames].astype(np.float32)
    label = inverse.label(params).numpy()
    mae, spread = np.abs(label - action).mean(0), action.std(0)
    return {
        "frames": len(frames),
        "mae": mae.tolist(),
        "spread": spread.tolist(),
        "relative_mae": float((mae / np.maximum(spread, 1e-6)).mean()),
        "accuracy": _accuracy(inverse.space, label, action),
        "nats": -float(inverse.space.log_prob(params, torch.from_numpy(action)).mean()),
    }


@torch.no_grad()
def clone_error(policy: ScratchPolicy, logs: Logs, episodes: np.ndarray, share: float) -> dict[str, Any]:
    """How well a policy knows the commands of episodes that accomplish a task (`relevant_frames`).

    Returns:
        frames: how many were looked at, some of each task; nats: mean surprise; accuracy: share of the frames
        whose likeliest keys and classes are all right, None without any. Every task counts alike.
    """
    stacks = Stacks(logs, tuple(range(1 - policy.look.frames, 1)), policy.look.vectors)
    nats, right, count = [], [], 0
    for task, frames in enumerate(relevant_frames(logs, episodes, policy.num_tasks, share)):
        if not len(frames):
            continue
        some = frames[np.linspace(0, len(frames) - 1, min(len(frames), _JUDGED)).astype(int)]
        stack, vectors = (torch.from_numpy(part) for part in stacks(some))
        params, action = policy(stack, vectors, torch.full((len(some),), task)), logs.action[some]
        known = torch.from_numpy(action.astype(np.float32))
        nats.append(-float(policy.space.log_prob(params, known).mean()))
        right.append(_accuracy(policy.space, policy.space.mode(params).numpy(), known.numpy()))
        count += len(some)
    if not count:
        return {"frames": 0}
    accuracy = None if None in right else float(np.mean(cast(list[float], right)))
    return {"frames": count, "nats": float(np.mean(nats)), "accuracy": accuracy}


def _accuracy(space: ActionSpace, label: np.ndarray, action: np.ndarray) -> float | None:
    """Share of the rows (n, A) whose keys and classes are all right; None without any."""
    whole = np.array([part.kind != "continuous" for part in space.parts for _ in range(part.size)])
    return float((label == action)[:, whole].all(1).mean()) if whole.any() else None


# ---- training


@dataclass(frozen=True, kw_only=True)
class BaselineTrainer:
    """Trains the baselines into a run folder, or loads them from there.

    Attributes:
        run: gets bc_scratch, or bc_early and in early/ what it was chosen from, or vpt_idm, vpt and the
            pseudo-labels in vpt_labels.
        data: names the logs and their labels; other data train afresh.
        episodes: ids to train on.
        scratch, inverse: settings.
    """

    run: Path
    contract: Contract
    logs: Logs
    data: str
    episodes: np.ndarray
    seed: int
    scratch: ScratchTraining = ScratchTraining()
    inverse: InverseTraining = InverseTraining()

    def clone(self) -> ScratchPolicy:
        """The policy cloned from the known actions."""
        return self._clone(self.logs, "bc_scratch", {})

    def early(self, held_out: np.ndarray) -> ScratchPolicy:
        """The policy cloned from the known actions in fewer steps: of the lengths `EARLIER` the one after
        which these episodes surprise it least, or the longest if none of them tells.
        """
        found = {}
        for steps in sorted({max(1, round(share * self.scratch.steps)) for share in EARLIER}):
            cfg = replace(self.scratch, steps=steps)
            shorter = replace(self, run=self.run / "early" / str(steps), scratch=cfg)
            policy = shorter._clone(self.logs, EARLY, {})
            error = clone_error(policy, self.logs, held_out, cfg.relevant_return)
            found[error.get("nats", 0.0), -steps] = shorter.run / EARLY, policy
        folder, policy = found[min(found)]
        own = self.run / EARLY
        if not checkpoint.exists(own) or weights_hash(own) != weights_hash(folder):
            checkpoint.adopt(folder, own, self.contract)
        return policy

    def vpt(self) -> tuple[ScratchPolicy, InverseDynamics]:
        """The policy cloned from known and pseudo-labelled actions, and the model that labelled."""
        inverse = self._train_inverse()
        tag = weights_hash(self.run / InversePhase.name)
        logs = relabel(self.logs, self._labels(inverse, tag), self.episodes)
        return self._clone(logs, "vpt", {"labels": tag}), inverse

    def load(self, name: str) -> ScratchPolicy:
        """A policy that is there, as it is."""
        policy = scratch_policy(self.contract, self.scratch)
        checkpoint.load_modules(self.run / name, {"policy": policy}, self.contract)
        return freeze(policy)

    def _clone(self, logs: Logs, name: str, identity: dict[str, Any]) -> ScratchPolicy:
        torch.manual_seed(self.seed)
        policy = scratch_policy(self.contract, self.scratch)
        phase = ScratchPhase(self.scratch, policy, logs, self.episodes, name)
        self._train(phase, asdict(self.scratch) | identity)
        return freeze(policy)

    def _train_inverse(self) -> InverseDynamics:
        cfg = self.inverse
        torch.manual_seed(self.seed)
        parts, size, vectors = _spaces(self.contract)
        inverse = InverseDynamics(parts, cfg.bins, size, cfg.lags, vectors)
        self._train(InversePhase(cfg, inverse, self.logs, self.episodes), asdict(cfg))
        return freeze(inverse)

    def _train(self, phase: StackPhase, identity: dict[str, Any]) -> None:
        config = {"phase": phase.name, "training": identity, "data": self.data}
        train(phase, self.run, seed=self.seed, optim=_OPTIM, contract=self.contract, config=config)

    def _labels(self, inverse: InverseDynamics, tag: str) -> np.ndarray:
        """Pseudo-labels (N, A), zeros where none is needed; kept under the labelling weights' hash."""
        path = self.run / "vpt_labels" / f"labels-{tag}.npy"
        if not path.exists():
            frames = np.flatnonzero(answered(self.logs, self.episodes) & ~self.logs.action_mask)
            labels = np.zeros(self.logs.action.shape, np.float32)
            labels[frames] = inverse.label(infer(inverse, self.logs, frames)).numpy()
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole.aside(path) as new:
                np.save(new, labels)
        return np.load(path)
