"""Open loop: the future of real clips from their first frames and commands, and how far it stays right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d4_core.data import Clips, Logs, first_frames, transitions
from d4_core.dynamics import Dynamics
from d4_core.imagination import Dream
from d4_core.shortcut import corrupt
from d4_core.tokenizer import Tokenizer
from d4_datasets.joined import Frames

HORIZONS = (1, 2, 4, 8, 16)
CONTEXT = 4  # real frames before an open-loop rollout
EXACT_DB = 100.0  # PSNR of equal pictures, which would be infinite


# -- clips ---------------------------------------------------------------------------------------------------


def labelled_clips(logs: Logs, episodes: np.ndarray, length: int, count: int, seed: int = 0) -> np.ndarray:
    """(count, length) frame indices of clips inside labelled episodes; (0, length) if none is long enough."""
    return whole_clips(logs, episodes[logs.labelled[episodes]], length, count, seed)


def whole_clips(logs: Logs, episodes: np.ndarray, length: int, count: int, seed: int = 0) -> np.ndarray:
    """(count, length) frame indices of clips that lie inside episodes; (0, length) if none is long enough."""
    usable = episodes[logs.episode_length[episodes] >= length]
    if not len(usable):
        return np.empty((0, length), np.int64)
    index, _ = logs.indices(logs.sample_starts(np.random.default_rng(seed), count, length, usable), length)
    return index


def open_loop_clips(logs: Logs, held_out: np.ndarray, count: int) -> np.ndarray:
    """Held-out clips for open-loop rollouts: labelled ones if there are any, as long as episodes allow."""
    labelled = held_out[logs.labelled[held_out]]
    pool = labelled if len(labelled) else held_out
    horizon = min(max(HORIZONS), int(logs.episode_length[pool].max()) - CONTEXT)
    return whole_clips(logs, pool, CONTEXT + max(horizon, 1), count)


def transitions_of(logs: Logs, frames: np.ndarray) -> dict[str, Tensor]:
    """`transitions` of the frames (B, T) of clips that lie inside episodes."""
    return transitions(logs, first_frames(logs), Clips(frames, np.ones(frames.shape, bool)))


# -- rollouts ------------------------------------------------------------------------------------------------


@dataclass
class OpenLoop:
    """Open-loop rollouts on real clips: tokens (B, H, N, L) predicted, and the real clip they continue."""

    predicted: Tensor
    real: Tensor
    frames: np.ndarray  # (B, CONTEXT + H)


def open_loop(
    dynamics: Dynamics,
    logs: Logs,
    latents: Frames,
    frames: np.ndarray,
    *,
    seed: int,
    steps: int,
    mirror: bool = False,
    unknown: bool = False,
) -> OpenLoop:
    """Predict frames[:, CONTEXT:] of clips (B, T) from frames[:, :CONTEXT] and the logged actions.

    The actions can be mirrored, or withheld (`unknown`: for models that never saw any).
    """
    tokens = torch.from_numpy(latents[frames]).float().to(dynamics.slots.device)
    predicted = continued(
        dynamics, logs, frames, tokens, seed=seed, steps=steps, mirror=mirror, unknown=unknown
    )
    return OpenLoop(predicted, tokens, frames)


def continued(
    dynamics: Dynamics,
    logs: Logs,
    frames: np.ndarray,
    tokens: Tensor,
    *,
    seed: int,
    steps: int,
    mirror: bool = False,
    unknown: bool = False,
) -> Tensor:
    """Tokens (B, T - CONTEXT, N, L) dreamed behind the first CONTEXT of `tokens` (B, T, N, L), as `open_loop`
    does from the latents.
    """
    clips = transitions_of(logs, frames)
    actions = clips["prev_action"].to(tokens.device)
    labelled = clips["prev_labelled"].to(tokens.device) & (not unknown)
    if mirror:
        actions = torch.cat([actions[:, :CONTEXT], dynamics.space.mirror(actions[:, CONTEXT:])], 1)
    dream = Dream(dynamics, None, len(tokens), torch.Generator(tokens.device).manual_seed(seed))
    for t in range(CONTEXT):
        dream.observe(tokens[:, t], actions[:, t], labelled[:, t])
    out = []
    for t in range(CONTEXT, tokens.shape[1]):
        clean = dream.predict(actions[:, t], labelled[:, t], steps)
        dream.observe(clean, actions[:, t], labelled[:, t])
        out.append(clean)
    return torch.stack(out, 1)


@torch.no_grad()
def next_frame_error(
    dynamics: Dynamics, logs: Logs, latents: Frames, frames: np.ndarray, shuffle: bool = False
) -> float:
    """Mean squared error of the last frame of clips, predicted from noise behind history at context level."""
    device = dynamics.slots.device
    clips = transitions_of(logs, frames)
    clean = torch.from_numpy(latents[frames]).float().to(device)
    grid, gen = dynamics.cfg.grid, torch.Generator().manual_seed(0)
    index = torch.full(frames.shape, grid.context_index, device=device)
    index[:, -1] = 0
    noise = torch.randn(clean.shape, generator=gen).to(device)
    actions = clips["prev_action"].to(device)
    if shuffle:
        actions = actions.roll(1, 0)
    e = torch.full(frames.shape, grid.finest, device=device)
    noisy = corrupt(clean, noise, grid.tau(index))
    out = dynamics(noisy, index, e, actions, clips["prev_labelled"].to(device)).clean
    return float((out[:, -1] - clean[:, -1]).square().mean())


# -- measures ------------------------------------------------------------------------------------------------


@torch.no_grad()
def horizon_curves(
    tokenizer: Tokenizer, logs: Logs, probes: Mapping[str, Callable[[Tensor], Tensor]], run: OpenLoop
) -> dict[str, Any]:
    """Position error and PSNR against horizon: the model, copy-last, a random frame and the reconstruction.

    PSNR is measured after the tokenizer, decoded prediction against decoded truth, so that it scores the
    dynamics alone.
    """
    frames = run.frames
    real, last = run.real[:, CONTEXT:], run.real[:, CONTEXT - 1 : CONTEXT]
    horizons = [h for h in HORIZONS if h <= real.shape[1]]
    random = real[torch.randperm(len(real), generator=torch.Generator().manual_seed(0))]
    versions = {"model": run.predicted, "copy_last": last.expand_as(real), "random": random}
    curves: dict[str, Any] = {"horizons": horizons, "clips": len(frames)}
    camera = tokenizer.cfg.cameras[0].name
    context = run.real[:, :CONTEXT]
    truth = _pixels(tokenizer, camera, context, real)
    pictures = {name: _pixels(tokenizer, camera, context, z) for name, z in versions.items()}
    for kind, measure in (("psnr", _psnr), ("ssim", ssim)):
        curves[kind] = {
            name: [measure(made[:, h - 1], truth[:, h - 1]) for h in horizons]
            for name, made in pictures.items()
        }
    for name, probe in list(probes.items())[:1]:
        position = torch.from_numpy(np.ascontiguousarray(logs.vectors[name][frames[:, CONTEXT:]]))
        held = torch.from_numpy(np.ascontiguousarray(logs.vectors[name][frames[:, CONTEXT - 1]]))
        curves["probe"] = name
        curves["position"] = {
            "model": [distance(probe(run.predicted[:, h - 1].cpu()), position[:, h - 1]) for h in horizons],
            "copy_last": [distance(held, position[:, h - 1]) for h in horizons],
            "random": [distance(probe(random[:, h - 1].cpu()), position[:, h - 1]) for h in horizons],
            "reconstruction": [distance(probe(real[:, h - 1].cpu()), position[:, h - 1]) for h in horizons],
        }
    return curves


def distance(a: Tensor, b: Tensor) -> float:
    """Mean Euclidean distance of (.., k) quantities."""
    return float((a - b).square().sum(-1).sqrt().mean())


def _pixels(tokenizer: Tokenizer, camera: str, context: Tensor, tokens: Tensor) -> Tensor:
    """Decode tokens (B, H, N, L) behind their context: the decoder's time layers see what they trained on."""
    z = tokenizer.unpack(torch.cat([context, tokens], 1))
    return tokenizer.to_pixels(camera, tokenizer.decode(z)[camera])[:, context.shape[1] :].clamp(0, 1)


def _psnr(a: Tensor, b: Tensor) -> float:
    return float(-10 * torch.log10((a - b).square().mean())) if not torch.equal(a, b) else EXACT_DB


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity of pictures (B, H, W, 3) in [0, 1], Gaussian windows of 11 pixels (Wang 2004)."""
    x = torch.arange(11, device=a.device) - 5.0
    bell = torch.exp(-x.square() / (2 * 1.5**2))
    window = (bell[:, None] * bell / bell.sum() ** 2).expand(3, 1, 11, 11)
    a, b = a.permute(0, 3, 1, 2), b.permute(0, 3, 1, 2)
    blur = partial(torch.nn.functional.conv2d, weight=window, groups=3)
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    shared = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean_a * mean_b + c1) * (2 * shared + c2)
    return float((top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean())
