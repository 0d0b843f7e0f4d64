"""Planning in the world model by the cross-entropy method: what the model is worth without phase 3.

At every tick the real frame is committed, and copies of that state are rolled forward under candidate action
sequences. A Gaussian over sequences is refitted to those with the best predicted reward, a few times, and the
first action of its mean is executed. The next tick starts from the rest of that plan.

Shape suffixes: W worlds, C candidates of each, H horizon, A action size, F = features of h.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from d4_core.imagination import Dream, weights_of_frames
from d4_core.models import Models
from d4_core.session import PolicySession
from d4_datasets.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PlannerConfig:
    """Settings of the planner. A tick costs candidates x iterations x horizon x (steps + 1) model passes.

    Attributes:
        candidates: sequences per iteration.
        cloned: share of them that the cloned policy chooses, action by action in the dream, as in TD-MPC: the
            reward of a goal beyond the horizon is too flat to find the way by.
        elites: best sequences, to which the Gaussian is refitted.
        iterations: refits per tick.
        horizon: ticks looked ahead.
        steps: sampling steps K of a dreamed frame.
        discount: gamma of the predicted rewards.
        spread, floor: initial and smallest standard deviation, as a share of half the action's range.
        memory: correlation of a sequence's noise from tick to tick; white noise leads nowhere.
        streams: copies of the world rolled at once, which bounds the memory.
    """

    candidates: int = 24
    cloned: float = 0.25
    elites: int = 5
    iterations: int = 2
    horizon: int = 6
    steps: int = 1
    discount: float = 0.95
    spread: float = 0.7
    floor: float = 0.1
    memory: float = 0.7
    streams: int = 512


class PlannerSession(PolicySession):
    """The planner with the interface of a policy.

    Args:
        models: networks of an agent checkpoint; only its reward and continuation heads judge a plan.
        batch: number of worlds stepped together.
        seed: decides all noise.
        cfg: settings.

    Raises:
        UserError: an action of the contract is not continuous.
    """

    def __init__(
        self, models: Models, batch: int, seed: int = 0, cfg: PlannerConfig = PlannerConfig()
    ) -> None:
        super().__init__(models, batch, seed)
        assert models.dynamics is not None
        kinds = {part.kind for part in models.dynamics.space.parts} - {"continuous"}
        if kinds:
            raise UserError(f"the planner handles continuous actions only, and the contract has {min(kinds)}")
        self.cfg, self.space = cfg, models.dynamics.space
        self._uniform = []  # of the actions that no head chooses
        # chunks of equal size, so that the last one is not padded by more than a few worlds
        chunks = math.ceil(batch * cfg.candidates / cfg.streams)
        self._chunk = math.ceil(batch / chunks)
        self._futures = Dream(models.dynamics, models.agent, self._chunk * cfg.candidates, self.gen)
        self._plan = torch.zeros(batch, cfg.horizon, self.space.size, device=self.device)

    def reset(self, n: int, tasks: np.ndarray) -> None:
        """Start new episodes of these tasks in all n = batch worlds."""
        super().reset(n, tasks)
        self._plan.zero_()

    def _choose(self, h: Tensor, alive: np.ndarray) -> Tensor:
        """Plan for the worlds that still run; the others keep the middle of the range."""
        unit = h.new_zeros(self.batch, self.space.size)
        running = torch.from_numpy(np.flatnonzero(alive)).to(self.device)
        for worlds in running.split(self._chunk):
            plan = self._optimise(h, worlds)
            unit[worlds] = plan[:, 0]
            self._plan[worlds] = torch.cat([plan[:, 1:], plan[:, -1:]], 1)
        return self._to_contract(unit)

    def _optimise(self, h: Tensor, worlds: Tensor) -> Tensor:
        """Mean sequences (W, H, A) in [-1, 1] after the last refit."""
        cfg, count = self.cfg, len(worlds)
        padded = torch.cat([worlds, worlds[-1:].expand(self._chunk - count)])  # the dream's shape is fixed
        mean, std = self._plan[padded], torch.full_like(self._plan[padded], cfg.spread)
        for _ in range(cfg.iterations):
            noise = self._noise(self._chunk, cfg.candidates)
            wanted = (mean[:, None] + std[:, None] * noise).clamp(-1, 1)
            score, taken = self._imagine(h, padded, wanted)
            best = score.topk(cfg.elites, 1).indices
            elites = taken.take_along_dim(best[:, :, None, None], 1)
            mean, std = elites.mean(1), elites.std(1).clamp_min(cfg.floor)
        return mean[:count]

    def _noise(self, *shape: int) -> Tensor:
        """Unit-variance noise (*shape, H, A) that remembers."""
        memory, size = self.cfg.memory, (*shape, self.space.size)
        white = [torch.randn(size, generator=self.gen, device=self.device) for _ in range(self.cfg.horizon)]
        out = white[:1]
        for fresh in white[1:]:
            out.append(memory * out[-1] + math.sqrt(1 - memory**2) * fresh)
        return torch.stack(out, -2)

    def _imagine(self, h: Tensor, worlds: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Roll sequences (W, C, H, A) out from the worlds' present state.

        Returns:
            score (W, C), the discounted reward to the horizon weighted by survival, and the actions taken
            (W, C, H, A): those wanted, and in the first `cloned` rows the policy's.
        """
        cfg, dream, shape = self.cfg, self._futures, wanted.shape
        rows = worlds.repeat_interleave(cfg.candidates)
        dream.cache.take(self.dream.cache, rows)
        clones = torch.arange(shape[1], device=h.device) < round(cfg.cloned * cfg.candidates)
        clones = clones.repeat(shape[0])[:, None]
        known, task = torch.ones_like(rows, dtype=torch.bool), self._task[rows]
        plan, state = self._to_contract(wanted.flatten(0, 1)), h[rows]
        features, taken = [], []
        for t in range(cfg.horizon):
            action = torch.where(clones, self.space.sample(self.head.first(state), self.gen), plan[:, t])
            clean = dream.predict(action, known, cfg.steps)
            state = dream.observe(clean, action, known, task)
            features.append(state)
            taken.append(self.space.normalise(action))
        path, agent = torch.stack(features, 1), self.models.agent
        weight = weights_of_frames(agent.predict_continue(path))
        discount = cfg.discount ** torch.arange(cfg.horizon, device=h.device)
        score = (agent.predict_reward(path) * weight * discount).sum(1)
        return score.view(shape[:2]), torch.stack(taken, 1).view(shape)

    def _to_contract(self, unit: Tensor) -> Tensor:
        """Actions in [-1, 1] to contract units."""
        low, high = self.space.low, self.space.high
        return low + (unit + 1) / 2 * (high - low)
