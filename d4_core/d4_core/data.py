"""Training arrays as tensors: clips with the action that led into each frame, and encoded episodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from d4_core.tokenizer import Tokenizer
from d4_datasets.joined import Frames, gather

_TOKENS = 2**15  # encoded at a time: bounds the memory of a pass whatever the size of the pictures
_PINNED: ContextVar[bool] = ContextVar("pinned", default=False)


class Logs(Protocol):
    """What training needs of a dataset; `d4_datasets.windows.Windows` provides it."""

    num_frames: int
    episode_start: np.ndarray  # [E] first frame
    episode_length: np.ndarray  # [E]
    episode_index: np.ndarray  # [N]
    labelled: np.ndarray  # [E] any known action
    vectors: dict[str, np.ndarray]  # float32 [N, k]
    action: np.ndarray  # float32 [N, A], chosen at the frame
    action_mask: np.ndarray  # [N]
    reward: np.ndarray  # float32 [N, K], arriving with the frame
    is_terminal: np.ndarray  # [N]

    @property
    def images(self) -> Mapping[str, Frames]:
        """uint8 [N, H, W, 3] by camera; empty where the data have latents in their place."""
        ...

    def sample_starts(
        self, rng: np.random.Generator, batch: int, length: int, episodes: np.ndarray
    ) -> np.ndarray:
        """Frame indices (batch,) at which windows of `length` frames in these episodes start."""
        ...

    def indices(self, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Frame indices and validity, both (batch, length), of the windows at these starts."""
        ...


@dataclass(frozen=True)
class Clips:
    """Where a batch of clips lies: frame indices (B, T), validity (B, T)."""

    index: np.ndarray
    valid: np.ndarray


def draw(logs: Logs, rng: np.random.Generator, batch: int, length: int, episodes: np.ndarray) -> Clips:
    """Clips of `length` frames from `episodes`."""
    return Clips(*logs.indices(logs.sample_starts(rng, batch, length, episodes), length))


def join(parts: list[Clips]) -> Clips:
    """Clips of the same length as one batch."""
    return Clips(np.concatenate([p.index for p in parts]), np.concatenate([p.valid for p in parts]))


def transitions(logs: Logs, first_frame: np.ndarray, clips: Clips) -> dict[str, Tensor]:
    """Actions, rewards and ends of clips as tensors.

    Returns:
        prev_action (B, T, A) and prev_labelled (B, T): the action that led into each frame, unknown at the
        first frame of an episode; action, labelled: the action chosen at each frame; reward (B, T, K),
        terminal and valid (B, T).
    """
    index, valid = clips.index, clips.valid
    before = np.maximum(index - 1, 0)
    prev_labelled = logs.action_mask[before] & ~first_frame[index] & valid
    arrays = {
        "prev_action": np.where(prev_labelled[..., None], logs.action[before], 0.0).astype(np.float32),
        "prev_labelled": prev_labelled,
        "action": logs.action[index].astype(np.float32),
        "labelled": logs.action_mask[index] & valid,
        "reward": logs.reward[index].astype(np.float32),
        "terminal": logs.is_terminal[index],
        "valid": valid,
    }
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()}


def lead_targets(logs: Logs, clips: Clips, leads: int) -> dict[str, Tensor]:
    """Targets of multi-token prediction, looked up in the logs and not cut at the clip's end.

    Returns:
        lead_action (B, T, n, A) with lead_labelled (B, T, n): a_{t+n} and whether it is known; lead_reward
        (B, T, n, K) with lead_valid (B, T, n): r_{t+n} and whether frame t+n still belongs to the episode.
    """
    episode = np.searchsorted(logs.episode_start, clips.index, side="right") - 1
    end = (logs.episode_start + logs.episode_length)[episode][..., None]
    ahead = clips.index[..., None] + np.arange(leads)
    valid = (ahead < end) & clips.valid[..., None]
    ahead = np.minimum(ahead, end - 1)
    arrays = {
        "lead_action": logs.action[ahead].astype(np.float32),
        "lead_labelled": logs.action_mask[ahead] & valid,
        "lead_reward": logs.reward[ahead].astype(np.float32),
        "lead_valid": valid,
    }
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()}


def first_frames(logs: Logs) -> np.ndarray:
    """(N,) bool: True on the first frame of every episode."""
    out = np.zeros(logs.num_frames, bool)
    out[logs.episode_start] = True
    return out


@contextmanager
def pinned(wanted: bool) -> Iterator[None]:
    """Within this, `rows` reads into page-locked memory, which a GPU copies from while the CPU goes on.

    torch keeps such memory when a batch is done with and hands it out again.
    """
    token = _PINNED.set(wanted)
    try:
        yield
    finally:
        _PINNED.reset(token)


def rows(source: Frames, index: np.ndarray) -> Tensor:
    """The rows `index` of an array as a tensor (*index.shape, ...), copied once."""
    kind = torch.from_numpy(np.empty(0, source.dtype)).dtype
    out = torch.empty((*index.shape, *source.shape[1:]), dtype=kind, pin_memory=_PINNED.get())
    gather(source, index, out.numpy())
    return out


def observations(logs: Logs, index: np.ndarray, names: list[str]) -> dict[str, Tensor]:
    """Modalities {name: (*index.shape, ...)}; images stay uint8."""
    source: dict[str, Frames] = {**logs.images, **logs.vectors}
    return {name: rows(source[name], index) for name in names}


def pixel_statistics(
    logs: Logs,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    among: np.ndarray | None = None,
    count: int = 2000,
) -> None:
    """Set the mean image, pixel spread and vector statistics from `count` of the frames `among`."""
    among = np.arange(logs.num_frames) if among is None else among
    index = np.sort(rng.choice(among, min(count, len(among)), replace=False))
    parts = np.array_split(index, max(1, len(index) // 64))  # a few pictures at a time
    mean, std = {}, {}
    for cam in tokenizer.cfg.cameras:
        images = logs.images[cam.name]
        first = sum((images[p] / 255.0).sum(0) for p in parts) / len(index)
        square = sum(((images[p] / 255.0 - first) ** 2).mean((1, 2, 3)).sum() for p in parts) / len(index)
        mean[cam.name], std[cam.name] = torch.from_numpy(first).float(), torch.tensor(square**0.5).float()
    for vec in tokenizer.cfg.vectors:
        x = torch.from_numpy(np.ascontiguousarray(logs.vectors[vec.name][index]))
        mean[vec.name], std[vec.name] = x.mean(0), x.std(0)
    tokenizer.set_statistics(mean, std)


@torch.no_grad()
def encode_episode(tokenizer: Tokenizer, logs: Logs, episode: int) -> Tensor:
    """Latents (T, N, L) of one episode; see `encode_episodes`."""
    return encode_episodes(tokenizer, logs, np.array([episode]))[0]


@torch.no_grad()
def encode_episodes(tokenizer: Tokenizer, logs: Logs, episodes: np.ndarray, chunk: int = 0) -> list[Tensor]:
    """Latents (T, N, L) of each episode, equal to streaming it frame by frame as a robot does.

    Shorter episodes are padded at their end, where a causal encoder cannot notice; long ones run in chunks
    that repeat the encoder's receptive field, so memory stays bounded. Data that were recorded as latents
    have them already; that they are this tokenizer's is for the caller to see to.
    """
    stored = getattr(logs, "latents", None)  # float16 [N, tokens, channels]; what is no dataset has none
    if stored is not None:
        spans = zip(logs.episode_start[episodes], logs.episode_length[episodes], strict=True)
        rows = (torch.from_numpy(np.array(stored[s : s + n], np.float32)) for s, n in spans)
        return [z.to(tokenizer.latents.device) for z in rows]
    cfg, device = tokenizer.cfg.transformer, tokenizer.latents.device
    names = [c.name for c in tokenizer.cfg.cameras] + [v.name for v in tokenizer.cfg.vectors]
    overlap = cfg.depth // cfg.time_every * (cfg.context - 1)
    start, length = logs.episode_start[episodes], logs.episode_length[episodes]
    chunk = chunk or max(1, chunk_frames(tokenizer) // len(episodes))
    parts = []
    for t in range(0, int(length.max()), chunk):
        begin = max(0, t - overlap)
        step = np.arange(begin, min(t + chunk, int(length.max())))
        index = start[:, None] + np.minimum(step, length[:, None] - 1)
        obs = {k: v.to(device) for k, v in observations(logs, index, names).items()}
        parts.append(tokenizer.encode(obs)[:, t - begin :])
    z = torch.cat(parts, 1)
    return [row[:n] for row, n in zip(z, length, strict=True)]


def chunk_frames(tokenizer: Tokenizer) -> int:
    """Frames to encode in one pass."""
    return max(16, _TOKENS // tokenizer.encoder_bias.shape[0])


@torch.no_grad()
def latent_statistics(
    tokenizer: Tokenizer, logs: Logs, episodes: np.ndarray, rng: np.random.Generator
) -> None:
    """Set the tokenizer's per-channel latent mean and spread from up to 64 episodes."""
    picked = rng.choice(episodes, min(64, len(episodes)), replace=False)
    tokenizer.latent_mean.zero_()
    tokenizer.latent_std.fill_(1.0)
    z = torch.cat([tokenizer.pack(encode_episode(tokenizer, logs, int(e))) for e in picked])
    tokenizer.latent_mean.copy_(z.mean(0))
    tokenizer.latent_std.copy_(z.std(0).clamp_min(1e-3))
