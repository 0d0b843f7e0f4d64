"""Behaviour cloning from scratch: what the labelled part of the logs is worth without a world model."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from d4_core.actions import ActionPart, ActionSpace
from d4_core.data import Logs
from d4_core.phase import Batch, Losses, Metrics, Phase
from d4_core.phases import relevant_episodes
from d4_datasets.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ScratchTraining:
    """Training of the baseline: `frames` stacked pictures in, the same action distribution out."""

    steps: int = 1500
    batch: int = 64
    frames: int = 3
    shift: int = 2
    relevant_return: float = 0.4


class ScratchPolicy(nn.Module):
    """Strided convolutions over stacked frames of one camera; the task is another input of the head."""

    def __init__(
        self, parts: tuple[ActionPart, ...], bins: int, num_tasks: int, size: tuple[int, int], frames: int
    ) -> None:
        super().__init__()
        self.space, self.num_tasks, self.frames = ActionSpace(parts, bins), num_tasks, frames
        widths = (3 * frames, 32, 64, 96, 128)
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Conv2d(a, b, 4, 2, 1), nn.GroupNorm(8, b), nn.SiLU()]
        self.trunk = nn.Sequential(*layers, nn.Flatten())
        features = 128 * (size[0] // 16) * (size[1] // 16)
        self.head = nn.Sequential(
            nn.Linear(features + num_tasks, 256), nn.SiLU(), nn.Linear(256, self.space.num_params)
        )

    def forward(self, stack: Tensor, task: Tensor) -> Tensor:
        """uint8 (B, F, H, W, 3), oldest first, and tasks (B,) to action parameters (B, P)."""
        x = stack.permute(0, 1, 4, 2, 3).flatten(1, 2).float() / 255 - 0.5
        one_hot = nn.functional.one_hot(task, self.num_tasks).to(x.dtype)
        return self.head(torch.cat([self.trunk(x), one_hot], 1))


class ScratchPhase(Phase):
    """Clones the labelled, relevant frames with random shifts, as image-based cloning is usually done."""

    name = "bc_scratch"

    def __init__(self, cfg: ScratchTraining, policy: ScratchPolicy, logs: Logs, episodes: np.ndarray) -> None:
        super().__init__(cfg.steps, {"policy": 1.0})
        self.cfg, self.policy, self.logs = cfg, policy, logs
        self.camera = next(iter(logs.images))
        self._start = np.repeat(logs.episode_start, logs.episode_length)
        self._frames = []
        for task in range(policy.num_tasks):
            relevant = relevant_episodes(logs, episodes, task, cfg.relevant_return)
            self._frames.append(np.flatnonzero(np.isin(logs.episode_index, relevant) & logs.action_mask))
        if not any(map(len, self._frames)):
            raise UserError("no labelled episode accomplishes a task: there is nothing to clone from scratch")

    def sample(self, rng: np.random.Generator, step: int) -> Batch:
        """Stacks (B, F, H, W, 3), tasks (B,) and actions (B, A)."""
        usable = [q for q, frames in enumerate(self._frames) if len(frames)]
        task = rng.choice(usable, self.cfg.batch)
        t = np.array([rng.choice(self._frames[q]) for q in task])
        lags = np.arange(self.cfg.frames - 1, -1, -1)
        index = np.maximum(t[:, None] - lags, self._start[t][:, None])
        stack = self.logs.images[self.camera][index]
        stack = shift(stack, rng.integers(-self.cfg.shift, self.cfg.shift + 1, (self.cfg.batch, 2)))
        return {
            "stack": torch.from_numpy(stack),
            "task": torch.from_numpy(task),
            "action": torch.from_numpy(self.logs.action[t].astype(np.float32)),
        }

    def forward(self, batch: Batch, gen: torch.Generator, step: int) -> tuple[Losses, Metrics]:
        """Negative log-likelihood in nats."""
        params = self.policy(batch["stack"], batch["task"])
        return {"policy": -self.policy.space.log_prob(params, batch["action"]).mean()}, {}

    def group(self, name: str, p: nn.Parameter) -> str:
        """Plain AdamW."""
        return "adamw"

    def checkpoint_modules(self) -> dict[str, nn.Module]:
        """The policy."""
        return {"policy": self.policy}


def shift(stack: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Shift each row (B, F, H, W, 3) by (dy, dx) pixels, repeating the border."""
    height, width = stack.shape[2:4]
    out = np.empty_like(stack)
    for i, (dy, dx) in enumerate(offset):
        rows = np.clip(np.arange(height) + dy, 0, height - 1)
        columns = np.clip(np.arange(width) + dx, 0, width - 1)
        out[i] = stack[i][:, rows][:, :, columns]
    return out
