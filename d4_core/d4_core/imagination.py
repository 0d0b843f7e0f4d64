"""Imagination training (paper section 3.3): rollouts inside the world model, lambda-returns and PMPO.

Frames t = 0..H: h_t is read from the pass that commits frame t at the context signal level, a_t is drawn from
h_t, the model dreams frame t+1 from a_t, and r_{t+1}, c_{t+1} are read at h_{t+1}: the reward of a transition
is predicted by a token that has seen the action. Shapes: B rollouts, H horizon, F = features of h.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from d4_core.actions import ActionSpace
from d4_core.agent import Agent, Head
from d4_core.dynamics import Dynamics
from d4_core.shortcut import corrupt, denoise
from d4_core.transformer import KVCache


@dataclass(frozen=True, kw_only=True)
class ImaginationConfig:
    """Settings of phase 3.

    Attributes:
        horizon: imagined frames H per rollout.
        contexts: lengths of the real context in frames; one is drawn per batch of rollouts.
        steps: sampling steps K per frame.
        discount: gamma (paper: 0.997).
        trace: lambda of the returns.
        alpha: weight of the positive set, 1 - alpha that of the negative one (paper: 0.5).
        beta: weight of KL(policy || prior) (paper: 0.3).
        drop_smallest: share of smallest |advantage| left out of both sets (paper: 0).
        warmup: share of the updates that train only the critic.
    """

    horizon: int = 15
    contexts: tuple[int, ...] = (1, 4, 8)
    steps: int = 4
    discount: float = 0.997
    trace: float = 0.95
    alpha: float = 0.5
    beta: float = 0.3
    drop_smallest: float = 0.0
    warmup: float = 0.05


class Dream:
    """A batch of streams through the world model: one stepping engine of rollouts, robot, simulator, player.

    `predict` dreams the next frame and commits nothing; `observe` commits a frame, a real or a dreamed one,
    and returns h. Shapes are fixed, caches are preallocated and no history is recomputed, so the cost of a
    frame does not grow.

    Args:
        dynamics: the world model, in eval mode.
        agent: heads and task embedding, or None to run the world alone.
        batch: number of streams.
        gen: source of all randomness (context noise and sampling noise).
        dtype: of the cache; under autocast a float32 cache would be converted in every pass.
    """

    def __init__(
        self,
        dynamics: Dynamics,
        agent: Agent | None,
        batch: int,
        gen: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dynamics, self.agent, self.batch, self.gen = dynamics, agent, batch, gen
        self.cache: KVCache = dynamics.new_cache(batch, dtype)
        self.grid = dynamics.cfg.grid
        device = self.cache.position.device
        self._context = torch.full((batch,), self.grid.context_index, device=device)
        self._finest = torch.full((batch,), self.grid.finest, device=device)
        self._tau = self.grid.tau(self._context)[:, None]

    def reset(self) -> None:
        """Forget all frames; keeps the memory."""
        self.cache.reset()

    def _noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.gen, device=like.device)

    @torch.no_grad()
    def observe(
        self,
        clean_BNL: Tensor,
        prev_action: Tensor,
        labelled: Tensor,
        task: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Commit a frame of clean tokens at the context level; returns h (B, F); (B, 0) without an agent.

        The context noise (B, N, L) is drawn unless it is given.
        """
        noise = self._noise(clean_BNL) if noise is None else noise
        noisy = corrupt(clean_BNL[:, None], noise[:, None], self._tau)[:, 0]
        frame = self.dynamics.begin(self.cache)
        tokens = None if self.agent is None or task is None else self.agent.tokens(task)
        args = (noisy, self._context, self._finest, prev_action, labelled)
        block = self.dynamics.step(*args, self.cache, frame, tokens)
        self.cache.advance()
        return clean_BNL.new_zeros(self.batch, 0) if block.agent is None else Agent.readout(block.agent[:, 0])

    @torch.no_grad()
    def predict(self, prev_action: Tensor, labelled: Tensor, steps: int) -> Tensor:
        """Dream the next frame's clean tokens (B, N, L) in `steps` denoising passes; does not commit it."""
        frame = self.dynamics.begin(self.cache)
        cfg = self.dynamics.cfg
        like = self.cache.keys.new_empty(self.batch, cfg.num_tokens, cfg.token_dim, dtype=torch.float32)
        noise = self._noise(like)

        def model(noisy: Tensor, tau_index: Tensor, e: Tensor) -> Tensor:
            args = (noisy[:, 0], tau_index[:, 0], e[:, 0], prev_action, labelled)
            return self.dynamics.step(*args, self.cache, frame).clean

        return denoise(model, self.grid, noise[:, None], steps, finest_label=not cfg.shortcut)[:, 0]


@dataclass
class Rollout:
    """Imagined trajectories.

    Attributes:
        h: (B, H+1, F) features of frames 0..H (0 is the last real one).
        action: (B, H, A) actions a_0..a_{H-1}.
        reward: (B, H) rewards r_1..r_H.
        proceed: (B, H) continuation probabilities c_1..c_H.
        tokens: (B, H, N, L) dreamed frames 1..H.
    """

    h: Tensor
    action: Tensor
    reward: Tensor
    proceed: Tensor
    tokens: Tensor


@torch.no_grad()
def imagine(dream: Dream, policy: Head, h: Tensor, task: Tensor, cfg: ImaginationConfig) -> Rollout:
    """Roll the policy out for `cfg.horizon` frames from the stream's current state h (B, F)."""
    space: ActionSpace = dream.dynamics.space
    known = torch.ones(dream.batch, dtype=torch.bool, device=h.device)
    features, actions, tokens = [h], [], []
    for _ in range(cfg.horizon):
        action = space.sample(policy.first(features[-1]), dream.gen)
        clean = dream.predict(action, known, cfg.steps)
        features.append(dream.observe(clean, action, known, task))
        actions.append(action)
        tokens.append(clean)
    h_all = torch.stack(features, 1)
    agent = dream.agent
    reward, proceed = agent.predict_reward(h_all[:, 1:]), agent.predict_continue(h_all[:, 1:])
    return Rollout(h_all, torch.stack(actions, 1), reward, proceed, torch.stack(tokens, 1))


def lambda_returns(reward: Tensor, proceed: Tensor, value: Tensor, discount: float, trace: float) -> Tensor:
    """Returns G_0..G_{H-1} (paper Eq. 10, with the bootstrap value of the *next* state).

    Args:
        reward, proceed: (B, H) r_1..r_H and c_1..c_H.
        value: (B, H+1) v_0..v_H.
        discount, trace: gamma and lambda.
    """
    result, returns = value[:, -1], []
    for t in range(reward.shape[1] - 1, -1, -1):
        blend = (1 - trace) * value[:, t + 1] + trace * result
        result = reward[:, t] + discount * proceed[:, t] * blend
        returns.append(result)
    return torch.stack(returns[::-1], 1)


def weights_of_frames(proceed: Tensor) -> Tensor:
    """(B, H) probability that frame t = 0..H-1 is still part of the episode; frame 0 is real."""
    return torch.cat([torch.ones_like(proceed[:, :1]), proceed[:, :-1]], 1).cumprod(1)


def pmpo_loss(
    log_prob: Tensor, advantage: Tensor, weight: Tensor, alpha: float, drop_smallest: float
) -> Tensor:
    """Sign-based policy loss (paper Eq. 11 without the KL term).

    Args:
        log_prob: (..) joint log-probability of detached actions.
        advantage: (..) only the sign is used.
        weight: (..) how much each frame counts (dead frames count for nothing).
        alpha: weight of the positive set; the negative one has 1 - alpha.
        drop_smallest: share of smallest |advantage| ignored: near convergence they are critic noise.
    """
    if drop_smallest:
        weight = weight * (advantage.abs() >= advantage.abs().flatten().quantile(drop_smallest))
    good, bad = weight * (advantage >= 0), weight * (advantage < 0)
    # an empty set contributes nothing: its weights sum to zero and so does its numerator
    positive = (good * log_prob).sum() / good.sum().clamp_min(1e-6)
    negative = (bad * log_prob).sum() / bad.sum().clamp_min(1e-6)
    return (1 - alpha) * negative - alpha * positive
