"""Shortcut forcing (paper section 3.2): the (tau, d) grid, the two losses and the sampler.

tau is the signal level (0 noise, 1 clean), d the step size. Both live on a grid of K_max = ``levels`` cells:
tau = index / levels, d = 2^-e. Data are corrupted per frame as z~ = (1 - tau) z0 + tau z1 and the network
predicts the clean z1. Shapes: B rows, T frames, N tokens, L channels; tau and e have shape (B, T).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# predict(noisy (B, T, N, L), tau_index (B, T) int64, e (B, T) int64) -> clean (B, T, N, L)
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Signal levels and step sizes.

    Attributes:
        levels: K_max, a power of two; the finest step is 1 / levels.
        context_signal: signal level at which history is shown to the model in rollouts (paper: noise 0.1,
            that is 0.9), snapped to the grid; content and label agree exactly.
    """

    levels: int = 64
    context_signal: float = 0.9

    def __post_init__(self) -> None:
        if self.levels < 8 or self.levels & (self.levels - 1):
            raise ValueError(f"levels must be a power of two >= 8, not {self.levels}")
        if not 0 <= self.context_index < self.levels:
            raise ValueError(
                f"context_signal {self.context_signal} is no trained level: it must round below 1"
            )

    @property
    def finest(self) -> int:
        """e of the finest step size: d = 2^-finest = 1 / levels."""
        return int(math.log2(self.levels))

    @property
    def context_index(self) -> int:
        """Grid index of the context signal level."""
        return round(self.context_signal * self.levels)

    def tau(self, index: Tensor) -> Tensor:
        """Signal level of a grid index."""
        return index.float() / self.levels


def sample_levels(
    grid: Grid, shape: tuple[int, int], bootstrap_rows: Tensor, gen: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw per-frame (tau_index, e), each (B, T) int64 on the CPU.

    Flow rows use the finest step in every frame. Bootstrap rows draw e uniformly from the coarser step sizes;
    in both, tau is uniform on the grid that the step size reaches, {0, d, ..., 1 - d}.
    """
    coarse = torch.randint(0, grid.finest, shape, generator=gen)
    e = torch.where(bootstrap_rows[:, None], coarse, grid.finest)
    steps = 2**e
    j = (torch.rand(shape, generator=gen) * steps).long().clamp_max(steps - 1)
    return j * (grid.levels // steps), e


def corrupt(clean: Tensor, noise: Tensor, tau: Tensor) -> Tensor:
    """z~ = (1 - tau) noise + tau clean, tau (B, T) broadcast over tokens."""
    tau = tau[..., None, None].to(clean.dtype)
    return (1 - tau) * noise + tau * clean


def ramp(tau: Tensor) -> Tensor:
    """Loss weight 0.9 tau + 0.1 (paper Eq. 8): low signal levels say little about the data."""
    return 0.9 * tau + 0.1


@torch.no_grad()
def bootstrap_target(predict: Predict, grid: Grid, noisy: Tensor, tau_index: Tensor, e: Tensor) -> Tensor:
    """Clean-space target y of the shortcut loss: two teacher steps of half the size (paper Eq. 7).

    The paper writes the loss in velocity space with a factor (1-tau)^2; cancelling that factor gives
    ||z^ - y||^2 with y = z~ + 1/2 [(x' - z~) + (x'' - z') (1-tau)/(1-tau-d/2)], which never divides by a
    small number: the ratio lies in (1, 2].
    """
    half = grid.levels // 2 ** (e + 1)  # d/2 in grid cells
    tau, d_half = grid.tau(tau_index)[..., None, None], grid.tau(half)[..., None, None]
    first = predict(noisy, tau_index, e + 1).float()
    middle = noisy + (first - noisy) / (1 - tau) * d_half
    second = predict(middle, tau_index + half, e + 1).float()
    ratio = (1 - tau) / (1 - tau - d_half)
    return noisy + 0.5 * ((first - noisy) + (second - middle) * ratio)


def shortcut_schedule(step: int, total: int, warmup: float, rows: float) -> float:
    """Share of bootstrap rows at a step: none while the model is untrained, then `rows`.

    Distilling an untrained model is a known way to make rollouts worse while the loss falls.
    """
    return 0.0 if step < warmup * total else rows


def denoise(predict: Predict, grid: Grid, noise: Tensor, steps: int, finest_label: bool = False) -> Tensor:
    """Turn noise (B, T, N, L) into clean tokens in `steps` Euler steps of size d = 1/steps (section 3.2).

    Args:
        predict: the model bound to its context.
        grid: levels; `steps` must be a power of two that divides them.
        noise: standard normal, the starting point; each step moves along the current velocity.
        steps: K.
        finest_label: tell the model d_min instead of 1/steps: plain diffusion-forcing sampling, for models
            whose shortcut loss was switched off (an untrained step-size row would silently cost quality).
    """
    if steps < 1 or grid.levels % steps:
        raise ValueError(f"steps must be a power of two up to {grid.levels}, not {steps}")
    z, batch = noise, noise.shape[:2]
    label = grid.finest if finest_label else int(math.log2(steps))
    e = torch.full(batch, label, device=noise.device)
    for k in range(steps):
        index = torch.full(batch, k * (grid.levels // steps), device=noise.device)
        x = predict(z, index, e).float()
        z = x if k == steps - 1 else z + (x - z) / (steps - k)  # (x - z) / (1 - k/K) * 1/K
    return z
